"""The roster: the sessions of the workers that the broker knows, and which of them take part from which round on.

In the order of names wherever an order matters, so that nothing depends on who came first. After a restart of the
broker those who took part before are expected back: they take part, for a while, though they have no session yet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from parablock.sessions import Session, SessionState

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from parablock.messages import Start


class Roster:
    """Sessions by the transport's address of their peer. A name has at most one session that is more than greeted."""

    def __init__(self) -> None:
        self._sessions: dict[bytes, Session] = {}
        self._begins: dict[str, int] = {}  # by name: the round from which on a client takes part
        self._expected: set[str] = set()  # names that took part before the broker's restart, and have not come yet
        self._members: tuple[int, frozenset[str]] | None = None  # of the round last asked for

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._sessions.values())

    def get(self, peer: bytes) -> Session | None:
        return self._sessions.get(peer)

    def named(self, name: str) -> list[Session]:
        return [session for session in self if session.name == name]

    def greet(self, peer: bytes, name: str, token: str, now: float, client: str | None = None) -> Session:
        """The session of a peer: the one that there is, or a new one."""
        return self._sessions.setdefault(peer, Session(peer, name, token, now, client))

    def expect(self, names: Iterable[str], round: int) -> None:
        """These are to come back, and take part from `round` on until they have or are not expected any more."""
        self._expected.update(names)
        self._begins.update(dict.fromkeys(self._expected, round))
        self._members = None

    @property
    def expected(self) -> list[str]:
        """Names of those that are still to come back."""
        return sorted(self._expected)

    def unexpect(self, name: str) -> None:
        """One has come back, or will not. If it has, it takes part as soon as it is started."""
        if name in self._expected:
            self._expected.remove(name)
            del self._begins[name]
            self._members = None

    def start(self, session: Session, start: Start) -> None:
        session.state = SessionState.ACTIVE
        session.start = start
        self._begins[session.name] = start.round
        self._members = None

    def remove(self, session: Session) -> None:
        del self._sessions[session.peer]
        if session.name not in self._expected:
            self._begins.pop(session.name, None)
        self._members = None

    def active(self) -> list[Session]:
        """Those that have started, and hear of everything."""
        return [session for session in self if session.state is SessionState.ACTIVE]

    def members(self, round: int) -> frozenset[str]:
        """Live clients that take part in a round, and those that are expected back."""
        if self._members is None or self._members[0] != round:
            self._members = round, frozenset(name for name, begin in self._begins.items() if begin <= round)
        return self._members[1]

    def present(self) -> frozenset[str]:
        """Live clients that take part in some round, this one or a later one, and those that are expected back."""
        return frozenset(self._begins)

    @property
    def clients(self) -> list[str]:
        """Names of those that have joined, and of those that are expected back."""
        joined = {session.name for session in self if session.state is not SessionState.GREETED}
        return sorted(joined | self._expected)
