"""The secure sums of the open rounds, at the broker: who takes part in them, and which slices can be folded.

A slice is added up as soon as it is in from everybody who takes part and is there; who lacks in it then is out of the
round. What is left when the round closes is added up with those that are done.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from parablock import slices
from parablock.aggregation import Contribution
from parablock.coordinator_events import Fold, Note
from parablock.layout import Layout
from parablock.messages import Keys, Rejected, Shares, Unmasked
from parablock.secure_settings import fewest
from parablock.sum_member import Occasion
from parablock.sum_round import Phase, SumRound
from parablock.transfer import TransferError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from parablock.agenda import Agenda
    from parablock.config import Config
    from parablock.manifest import Manifest
    from parablock.messages import FromBroker
    from parablock.roster import Roster
    from parablock.rounds import Round
    from parablock.sessions import Session
    from parablock.wire import Buffer


_CUT = "the sum goes on without the rest of it, which was not in when that was settled"


@dataclass
class _Open:
    """A round. parts: by chunk, what is added up of it; until it is folded. folded: slices that were."""

    sum: SumRound
    chunks: int
    parts: dict[int, tuple[Contribution, ...]] = field(default_factory=dict)
    folded: int = 0


class Sums:
    """say: sends a message to a peer, with its payload. emit: asks for an effect."""

    def __init__(
        self,
        config: Config,
        manifest: Manifest,
        agenda: Agenda,
        roster: Roster,
        run: str,
        epoch: int,
        say: Callable[[bytes, FromBroker, Buffer | None], None],
        emit: Callable[[Note], None],
    ) -> None:
        self._config = config
        self._manifest = manifest
        self._agenda = agenda
        self._roster = roster
        self._broker = run, epoch
        self._say = say
        self._emit = emit
        self._rounds: dict[int, _Open] = {}

    # What clients say

    def receive(
        self,
        session: Session,
        message: Keys | Shares | Unmasked,
        payload: Buffer | None,
        out: Collection[str],
        now: float,
    ) -> None:
        """Towards an open round. out: who does not contribute to it. Raises TransferError for what cannot be."""
        number, said, name, token = message.round, bytes(payload or b""), session.name, session.token
        opened = self._rounds.get(number)
        if isinstance(message, Keys):
            known = opened is not None and opened.sum.members.get(name) == token
            reason = None if known else self._stranger(session, number, out)
            if reason is None:
                reason = self._open(number).sum.keys(name, token, said, now)
        elif opened is None:
            raise TransferError(f"a {type(message).__name__} for round {number}, for which nobody has shown keys")
        elif isinstance(message, Shares):
            reason = opened.sum.shares(name, token, said, now)
        else:
            opened.sum.answer(name, token, message.slice, said)
            return
        if reason is not None:
            self._say(session.peer, Rejected(number, reason), None)

    def _stranger(self, session: Session, number: int, out: Collection[str]) -> str | None:
        """Why a client does not belong to a round; None if it may."""
        assert session.start is not None
        if number < session.start.round:
            return f"the client takes part from round {session.start.round} on"
        if not self._agenda.trains(number, session.name):
            return "the client was not drawn for this round"
        return "the client has abstained, or its contribution was refused before" if session.name in out else None

    def remind(self, session: Session) -> None:
        """Ask a client again for what it has not answered."""
        for opened in self._rounds.values():
            opened.sum.remind(session.name, session.token)

    # Who takes part

    def look(self, outs: Callable[[int], Collection[str]], now: float) -> None:
        """Go on wherever something has come, somebody has gone, or patience is over. outs: of a round, as `receive`."""
        here = self._here()
        quorate = len(self._roster.present()) >= self._config.quorum
        for number, opened in self._rounds.items():
            shall = self._agenda.members(number, self._roster.members(number))
            opened.sum.advance(here, shall - frozenset(outs(number)), quorate, now)

    def due(self, now: float) -> float:
        """When to look though nothing comes; what has passed was looked at."""
        return min((due for each in self._rounds.values() if (due := each.sum.due()) > now), default=math.inf)

    def members(self, number: int, members: frozenset[str]) -> frozenset[str]:
        """Of these, who can still contribute to a round: the processes whose shares were dealt, once they were."""
        opened = self._rounds.get(number)
        if opened is None or opened.sum.phase is Phase.KEYS:
            return members
        if opened.sum.phase is Phase.FAILED:
            return frozenset()
        here, dealt = self._here(), opened.sum.members
        return frozenset(name for name in members if name in dealt and here.get(name) == dealt[name])

    def admits(self, session: Session, number: int) -> bool:
        """Whether a client may send a contribution to a round; if it never may, it is told."""
        opened = self._rounds.get(number)
        if opened is None or opened.sum.phase is Phase.KEYS:
            return False  # not yet
        belongs = opened.sum.members.get(session.name) == session.token
        if opened.sum.phase is Phase.FAILED or not belongs:
            reason = opened.sum.reason or "this round's sum was settled without this process of the client"
            self._say(session.peer, Rejected(number, reason), None)
            return False
        return opened.sum.phase is Phase.MASKED

    def needed(self, number: int) -> int:
        """Contributions that it takes to count any."""
        opened = self._rounds.get(number)
        return 0 if opened is None else opened.sum.needed

    # What is added up

    def name(self, round: Round, voters: Collection[str], now: float) -> None:
        """Settle whose contributions are added up in the slices that are in from all of `voters`; who lacks in one is
        out of the round."""
        opened = self._rounds.get(round.number)
        if opened is None or opened.sum.phase is not Phase.MASKED:
            return
        sum, before = opened.sum, opened.sum.left
        while not sum.complete:
            end = slices.first(sum.named + 1, opened.chunks)
            have = tuple(n for n in sum.left if n in round.uploads and len(round.uploads[n].pieces) >= end)
            if len(have) < sum.needed or not {name for name in sum.left if name in voters} <= set(have):
                break
            self._name(opened, round, have, now)
        for name in [name for name in before if name not in sum.left]:
            if name in round.uploads:
                round.drop(name)
            round.out.add(name)
            self._emit(Note("cut", name, f"round {round.number}: {_CUT}"))
            for session in self._roster.named(name):
                self._say(session.peer, Rejected(round.number, _CUT), None)

    def settle(self, round: Round, now: float) -> str | None:
        """The round closes: all that is left of it is added up with those that are done. Why nothing is, if so."""
        opened = self._rounds.get(round.number)
        if opened is None:
            return "nobody has shown keys"
        sum = opened.sum
        if sum.phase in (Phase.KEYS, Phase.SHARES):
            sum.fail(f"{len(sum.members)} of its clients had exchanged keys, and not all of them")
        done = tuple(name for name in sum.left if name in round.done)
        if sum.phase is not Phase.FAILED and len(done) < sum.needed:
            sum.fail(f"{len(done)} contributions are in, and it takes {sum.needed} to unmask their sum")
        if sum.phase is Phase.FAILED:
            return sum.reason
        while not sum.complete:
            self._name(opened, round, done, now)
        return None

    def _name(self, opened: _Open, round: Round, clients: tuple[str, ...], now: float) -> None:
        for chunk in slices.chunks_of(opened.sum.named, opened.chunks):
            uploads = ((name, round.uploads[name]) for name in clients)
            opened.parts[chunk] = tuple(
                Contribution(name, upload.offer.weight, upload.offer.steps, upload.pieces[chunk])
                for name, upload in uploads
            )
        opened.sum.name(clients, now)

    def folds(self, round: Round, attempt: int) -> Iterator[Fold]:
        """Of the slices that can be unmasked by now, each once, in order."""
        opened = self._rounds.get(round.number)
        while opened is not None and opened.sum.phase is Phase.MASKED and opened.folded < opened.sum.named:
            if (unmasking := opened.sum.unmasking(opened.folded)) is None:
                return
            for chunk in slices.chunks_of(opened.folded, opened.chunks):
                yield Fold(round.number, round.block, attempt, chunk, opened.parts.pop(chunk), unmasking=unmasking)
            opened.folded += 1

    def failure(self, number: int) -> str | None:
        """Why a round's sum cannot be; None if it can, as far as one can tell."""
        opened = self._rounds.get(number)
        return opened.sum.reason or None if opened is not None else None

    def contributors(self, number: int) -> tuple[str, ...]:
        """Who is in every slice of a round whose slices are all named."""
        return self._rounds[number].sum.left

    def fail(self, number: int, reason: str) -> None:
        """Nothing of the round shall be counted."""
        self._rounds[number].sum.fail(reason)

    def close(self, number: int) -> None:
        """The round is committed."""
        self._rounds.pop(number, None)

    def _here(self) -> dict[str, str]:
        return {session.name: session.token for session in self._roster.active()}

    def _open(self, number: int) -> _Open:
        if number not in self._rounds:
            numel = self._manifest.blocks[self._agenda.block(number)].numel
            chunks, network = Layout.up(self._config, numel).count, self._config.network
            deadline_s = self._config.round.deadline_s
            # What was lost is said again with the next heartbeat.
            patience_s = max(deadline_s, 2 * network.heartbeat_s) if deadline_s else network.timeout_s
            occasion = Occasion(*self._broker, number, chunks, self._config.secure, fewest(self._config))
            sum = SumRound(occasion, patience_s, network.timeout_s, self._tell)
            self._rounds[number] = _Open(sum, chunks)
        return self._rounds[number]

    def _tell(self, name: str, token: str, message: FromBroker, payload: bytes | None) -> None:
        for session in self._roster.active():
            if (session.name, session.token) == (name, token):
                self._say(session.peer, message, None if payload is None else memoryview(payload))
