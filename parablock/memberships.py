"""A client's parts in the secure sums of the rounds ahead: which it has begun, and what it has said of each.

Keys are shown as soon as a round is known, which is a round's training before its contribution is ready: masks are
there by then. With another broker (epoch) all of it begins anew, with fresh secrets. What a client has helped to unmask
stays known beyond that: its contribution to a round is added up with the same others each time, or not again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from parablock.fixed_point import exponent
from parablock.layout import Layout
from parablock.masker import Masker
from parablock.messages import Dealt, Keys, Roll, Shares, Unmask, Unmasked
from parablock.participant_events import Mask
from parablock.secure_settings import fewest, most_tokens
from parablock.sum_member import Occasion, SumMember, UnreadableSharesError

if TYPE_CHECKING:
    from collections.abc import Callable

    from parablock.config import Config
    from parablock.manifest import Manifest
    from parablock.messages import FromWorker, Start
    from parablock.wire import Buffer


class Memberships:
    """say: sends a message, with its payload. emit: asks for an effect. withhold(round, reason): nothing of ours may be
    part of that round. name: as the broker knows the client."""

    def __init__(
        self,
        config: Config,
        manifest: Manifest,
        name: str,
        say: Callable[[FromWorker, Buffer | None], None],
        emit: Callable[[Mask], None],
        withhold: Callable[[int, str], None],
    ) -> None:
        self._config = config
        self._manifest = manifest
        self._name = name
        self._say = say
        self._emit = emit
        self._withhold = withhold
        self._broker = ("", 0)  # run and epoch
        self._members: dict[int, SumMember] = {}  # by round
        self._said: set[int] = set()  # rounds of which something was said since the last reminder
        self._refused: set[int] = set()  # rounds that go on without us
        self._inherited: int | None = None  # a round to which an earlier process of ours may have given, −1: none open
        self._given: dict[int, dict[int, tuple[str, ...]]] = {}  # by round and slice: what we helped any broker add up

    def greet(self, run: str, epoch: int) -> bool:
        """This broker begins a session; whether it is its first one with us. Then what was masked is of no use."""
        if (run, epoch) == self._broker:
            return False
        self._broker = run, epoch
        for round in self._members:
            self._emit(Mask(round, None))
        self._members.clear()
        self._refused.clear()
        return True

    def start(self, start: Start) -> None:
        """A session of this process has started."""
        if self._inherited is None:
            self._inherited = start.next
        if self._broker[1] > 1 and max(start.round, start.next) <= self._inherited:
            self._withhold(
                self._inherited, "an earlier process may have given to it, and an earlier broker have unmasked that"
            )

    def begin(self, round: int, block: int) -> None:
        """Take part in a round that we are to train, or have trained; unless that was begun."""
        if round in self._members or round in self._refused:
            return
        layout = Layout.up(self._config, self._manifest.blocks[block].numel)
        occasion = Occasion(*self._broker, round, layout.count, self._config.secure, fewest(self._config))
        self._members[round] = SumMember(occasion, self._name)
        self._show(round)

    def waits(self, round: int) -> bool:
        """Whether there are no masks yet for a contribution to the round, and there may come to be."""
        return round not in self._refused and (round not in self._members or not self._members[round].settled)

    def refuse(self, round: int) -> None:
        """The broker does not want ours."""
        self._refused.add(round)

    def remind(self) -> None:
        """Say again what was not answered, unless it was said since the last time."""
        said, self._said = self._said, set()
        for round, member in self._members.items():
            if round not in self._refused and not member.settled and round not in said:
                self._show(round)
        self._said.clear()

    def _show(self, round: int) -> None:
        member = self._members[round]
        self._said.add(round)
        if member.dealt:
            self._say(Shares(round), memoryview(member.dealt))
        else:
            self._say(Keys(round), memoryview(member.keys))

    def hear(self, message: Roll | Dealt | Unmask, payload: Buffer | None) -> bool:
        """What the broker says towards a sum; of one that is closed, or of another broker's, it is passed over.

        Returns whether a contribution to the round can leave from now on. Raises SumError for what breaks the rules.
        """
        member = self._members.get(message.round)
        if member is None:
            return False
        if not (member.settled if isinstance(message, Unmask) else member.dealt or isinstance(message, Roll)):
            return False  # it has overtaken, or outlived, what comes before it; both are said again
        try:
            match message:
                case Roll(round, clients):
                    member.deal(clients, bytes(payload or b""))
                    if not member.settled:
                        self._show(round)
                case Dealt(round, clients):
                    return self._settle(round, member, clients, bytes(payload or b""))
                case Unmask(round, slice, clients):
                    given = self._given.setdefault(round, {})
                    if slice not in member.answered and given.get(slice, clients) != clients:
                        self._say(Unmasked(round, slice), None)  # which this broker cannot know
                        return False
                    answer = member.answer(slice, clients)
                    given[slice] = clients
                    self._say(Unmasked(round, slice), memoryview(answer))
        except UnreadableSharesError as error:
            self._give_up(message.round, str(error))
        return False

    def _settle(self, round: int, member: SumMember, clients: tuple[str, ...], sealed: bytes) -> bool:
        fresh = not member.settled
        keys = member.settle(clients, sealed)
        if not fresh or round in self._refused:
            return False
        if any(others != clients for others in self._given.get(round, {}).values()):
            self._give_up(
                round,
                "it was added up with other clients' before the broker was restarted; another sum would tell more",
            )
            return False
        secure = self._config.secure
        bits = exponent(len(clients), secure.range)
        masker = Masker(keys, member.occasion.chunks, bits, secure.range, most_tokens(self._config))
        self._emit(Mask(round, masker))
        if (round, self._broker[1]) == (self._inherited, 1):
            self._inherited = -1  # the only sum so far that we can be in is with this process
        return True

    def _give_up(self, round: int, reason: str) -> None:
        self._refused.add(round)
        self._withhold(round, reason)

    def forget(self, told: int) -> None:
        """Rounds before it are closed."""
        for round in [round for round in self._members.keys() | self._given.keys() if round < told]:
            self._members.pop(round, None)
            self._given.pop(round, None)
        self._refused = {round for round in self._refused if round >= told}
