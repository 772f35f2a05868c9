"""The roster: the sessions of the workers that the broker knows, and which of them take part from which round on.

In the order of names wherever an order matters, so that nothing depends on who came first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from parablock.sessions import Session, SessionState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from parablock.messages import Start


class Roster:
    """Sessions by the transport's address of their peer. A name has at most one session that is more than greeted."""

    def __init__(self) -> None:
        self._sessions: dict[bytes, Session] = {}
        self._begins: dict[str, int] = {}  # by name: the round from which on a client takes part
        self._members: tuple[int, frozenset[str]] | None = None  # of the round last asked for

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._sessions.values())

    def get(self, peer: bytes) -> Session | None:
        return self._sessions.get(peer)

    def named(self, name: str) -> list[Session]:
        return [session for session in self if session.name == name]

    def greet(self, peer: bytes, name: str, token: str, now: float) -> Session:
        """The session of a peer: the one that there is, or a new one."""
        return self._sessions.setdefault(peer, Session(peer, name, token, now))

    def start(self, session: Session, start: Start) -> None:
        session.state = SessionState.ACTIVE
        session.start = start
        self._begins[session.name] = start.round
        self._members = None

    def remove(self, session: Session) -> None:
        del self._sessions[session.peer]
        self._begins.pop(session.name, None)
        self._members = None

    def active(self) -> list[Session]:
        """Those that have started, and hear of everything."""
        return [session for session in self if session.state is SessionState.ACTIVE]

    def members(self, round: int) -> frozenset[str]:
        """Live clients that take part in a round."""
        if self._members is None or self._members[0] != round:
            self._members = round, frozenset(name for name, begin in self._begins.items() if begin <= round)
        return self._members[1]

    def present(self) -> frozenset[str]:
        """Live clients that take part in some round, this one or a later one."""
        return frozenset(self._begins)

    @property
    def clients(self) -> list[str]:
        """Names of those that have joined."""
        return sorted(session.name for session in self if session.state is not SessionState.GREETED)
