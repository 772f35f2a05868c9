"""The coordinator by itself: who may say what and when, what is refused and why, when a round closes, what goes out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from parablock import config as settings
from parablock import wire
from parablock.agenda import in_turn as in_turn_of
from parablock.coordinator import Coordinator, Phase
from parablock.coordinator_events import (
    Committed,
    Drop,
    Effect,
    Event,
    Fold,
    Folded,
    Malformed,
    Measure,
    Measured,
    Note,
    Over,
    Received,
    Reported,
    Send,
    Stop,
    Store,
    Stored,
    Tick,
    Unfit,
)
from parablock.layout import Layout
from parablock.messages import (
    MAX_PROBE_BYTES,
    PROTOCOL,
    Abstain,
    Chunk,
    Commit,
    Credit,
    Evaluated,
    Goodbye,
    Heartbeat,
    Hello,
    Join,
    Leave,
    Message,
    Offer,
    Probe,
    Probed,
    Refused,
    Rejected,
    Rejoin,
    Start,
    Stopped,
    Terms,
    Waiting,
    Welcome,
)
from parablock.quota import Quotas
from parablock.sessions import ALLOWED, SessionState
from parablock.transfer import Encoded
from parablock.verdict import Verdict
from parablock.wire import Envelope
from tests.network import BASE, RUN, SIZES, TOKENIZER, config_of, manifest_of, saved_of

if TYPE_CHECKING:
    from parablock.saved import Entry

M = TypeVar("M")
MANIFEST = manifest_of()
NBYTES = [4 * size for size in SIZES]
EVALUATED = Evaluated(0, ("",), (1,), (0.5,), (1,), (0,), (0,))


def peer_of(name: str) -> bytes:
    return name.encode()


class Desk:
    """A coordinator, and what it has said to whom."""

    def __init__(self, clients: int = 2, rounds: int = 6, **config: Any) -> None:
        self.config = config_of(clients, rounds, **config)
        self.epoch = 1
        self.coordinator = Coordinator(self.config, MANIFEST, BASE, TOKENIZER, RUN, self.epoch)
        self.now = 100.0
        self.effects: list[Effect] = []  # of the last event
        self.notes: list[Note] = []  # of all
        self.asked: list[Measure | Fold | Store] = []  # of the fold executor, and not answered yet
        self.left_out: dict[str, str] = {}  # by the verdict on what is measured; who counts does so by half
        self.journal: list[tuple[Entry, bytes | None]] = []  # what was made durable

    def restart(self) -> None:
        """Another broker begins with what the one before has made durable."""
        self.epoch += 1
        saved = saved_of(self.journal, self.config.in_flight)
        self.coordinator = Coordinator(self.config, MANIFEST, BASE, TOKENIZER, RUN, self.epoch, saved)
        self.asked.clear()
        self.notes.clear()

    def handle(self, event: Event, after_s: float = 0.0) -> list[Effect]:
        self.now += after_s
        self.effects = self.coordinator.handle(event, self.now)
        self.notes += self.of(Note)
        self.asked += [effect for effect in self.effects if isinstance(effect, Measure | Fold | Store)]
        return self.effects

    def say(
        self, name: str, message: Message, payload: bytes | None = None, run: str = RUN, epoch: int | None = None
    ) -> list[Message]:
        """A message from `name`; what is answered to it. epoch: else that of the present broker."""
        view = None if payload is None else memoryview(payload)
        self.handle(Received(peer_of(name), Envelope(run, self.epoch if epoch is None else epoch, message, view)))
        return self.to(name)

    def to(self, name: str) -> list[Message]:
        return [e.envelope.message for e in self.effects if isinstance(e, Send) and e.peer == peer_of(name)]

    def of(self, kind: type[M]) -> list[M]:
        return [effect for effect in self.effects if isinstance(effect, kind)]

    def hello(self, name: str, token: str = "") -> list[Message]:
        return self.say(name, Hello(name, token or f"{ord(name[0]):x}", PROTOCOL))

    def join(
        self, name: str, versions: tuple[int, ...] = (0, 0, 0, 0), rows: int = 10, position: int = -1
    ) -> list[Message]:
        return self.say(name, Join(MANIFEST.digest, BASE, TOKENIZER, rows, versions, position))

    def gather(self, *names: str) -> None:
        for name in names:
            self.hello(name)
            self.join(name)

    def upload(self, name: str, round: int = 0, block: int | None = None, fill: int = 0) -> None:
        """A whole contribution."""
        block = round % 4 if block is None else block
        self.say(name, Offer(round, block, NBYTES[block], 1, 1, 0.5))
        for start in range(0, NBYTES[block], 1024):
            self.chunk(name, round, block, start, min(1024, NBYTES[block] - start), fill)

    def chunk(self, name: str, round: int, block: int, offset: int, nbytes: int, fill: int = 0) -> list[Message]:
        payload = bytes([fill]) * nbytes
        return self.say(name, Chunk(round, block, 0, offset, wire.checksum(payload)), payload)

    def work(self, fill: int = 0, most: int = 1000) -> list[Effect]:
        """Act the fold executor: answer what it was asked for, and what it is asked for then, `most` at most.

        A new block is of bytes `fill`. `effects` are those of all answers.
        """
        effects: list[Effect] = []
        for _ in range(most):
            if not self.asked:
                break
            asked = self.asked.pop(0)
            if isinstance(asked, Measure):
                if asked.index + 1 == Layout.up(self.config, SIZES[asked.block]).count:
                    names = [contribution.client for contribution in asked.contributions]
                    factors = {name: 0.5 for name in names if name not in self.left_out}
                    effects += self.handle(Measured(asked.round, asked.attempt, Verdict(factors, self.left_out)))
            elif isinstance(asked, Fold):
                layout = Layout.down(self.config, SIZES[asked.block], asked.attempt)
                made = memoryview(bytes([fill]) * layout.chunk_nbytes(asked.index))
                effects += self.handle(Folded(asked.round, asked.attempt, Encoded(made)))
            else:
                values = bytes([fill]) * NBYTES[asked.block] if asked.attempt else None
                self.journal.append((asked.entry, values))
                effects += self.handle(Stored(asked.round, asked.attempt, memoryview(values) if values else None))
        self.effects = effects
        return effects

    def block_of(self, round: int) -> tuple[int, int]:
        """Which block a round of two clients in turn trains, and the number of the client that does."""
        return round % 4, in_turn_of(round, 2, 4)

    @property
    def counting(self) -> list[str]:
        """Whose contributions the newest fold that was asked for counts."""
        fold = [asked for asked in self.asked if isinstance(asked, Fold)][-1]
        return [contribution.client for contribution in fold.contributions]

    def commit(self, *names: str, round: int = 0) -> Committed:
        """The round is contributed to by all of `names`, folded and committed."""
        for name in names:
            self.upload(name, round)
        self.work(fill=round)
        (committed,) = self.of(Committed)
        assert committed.round == round
        return committed

    def confirm(self, name: str, round: int, attempt: int = 1) -> None:
        """Say that a block has arrived whole."""
        self.say(name, Credit(round, round % 4, attempt, NBYTES[round % 4], NBYTES[round % 4]))


@pytest.fixture
def desk() -> Desk:
    """Two clients, a and b, that have started."""
    desk = Desk()
    desk.gather("a", "b")
    assert desk.coordinator.phase is Phase.RUNNING
    return desk


def kinds(messages: list[Message]) -> list[type[Any]]:
    return [type(message) for message in messages]


# At the door


def test_the_run_starts_when_all_clients_have_joined() -> None:
    desk = Desk()
    (terms,) = desk.hello("a")
    assert isinstance(terms, Terms)
    assert settings.from_dict(json.loads(terms.config)) == desk.config
    assert desk.coordinator.clients == [], "who has only greeted is not on the roster"
    assert desk.join("a") == [Welcome(1)]
    assert desk.coordinator.phase is Phase.GATHERING
    desk.hello("c")
    desk.hello("b")
    assert desk.join("b") == [Welcome(2), Start(0, 2, 0, ())]
    assert desk.to("a") == [Start(0, 2, 0, ())]
    assert desk.to("c") == [], "it is still preparing"
    assert desk.coordinator.clients == ["a", "b"]
    assert desk.coordinator.members(0) == {"a", "b"}


def test_local_settings_stay_with_the_broker() -> None:
    desk = Desk(data={"train": "/home/secret/shard.jsonl"})
    (terms,) = desk.hello("a")
    assert isinstance(terms, Terms)
    assert "secret" not in terms.config


def test_another_version_of_the_protocol_is_refused() -> None:
    (refused,) = Desk().say("a", Hello("a", "aa", PROTOCOL + 1))
    assert isinstance(refused, Refused)
    assert f"speaks protocol {PROTOCOL}, the worker {PROTOCOL + 1}" in refused.reason


@pytest.mark.parametrize(
    ("join", "says"),
    [
        (Join("0", BASE, TOKENIZER, 1, (0,) * 4, -1), "differs from the broker's in its blocks"),
        (Join(MANIFEST.digest, "0", TOKENIZER, 1, (0,) * 4, -1), "differs from the broker's in its weights;"),
        (Join(MANIFEST.digest, BASE, "0", 1, (0,) * 4, -1), "differs from the broker's in its tokenizer;"),
        (Join(MANIFEST.digest, "0", "0", 1, (0,) * 4, -1), "in its weights, its tokenizer; load the same model"),
        (Join(MANIFEST.digest, BASE, TOKENIZER, 0, (0,) * 4, -1), "no training rows"),
        (Join(MANIFEST.digest, BASE, TOKENIZER, 1, (0,) * 3, -1), "versions of 3 blocks, the run has 4"),
    ],
    ids=["manifest", "weights", "tokenizer", "weights and tokenizer", "rows", "versions"],
)
def test_a_worker_that_does_not_match_is_refused_and_told_what_differs(join: Join, says: str) -> None:
    desk = Desk()
    desk.hello("a")
    (refused,) = desk.say("a", join)
    assert isinstance(refused, Refused)
    assert says in refused.reason
    assert desk.of(Note) == [Note("refused", "a", refused.reason)]
    assert desk.coordinator.clients == []


def test_a_greeting_and_a_join_may_be_repeated() -> None:
    desk = Desk()
    assert kinds(desk.hello("a")) == kinds(desk.hello("a")) == [Terms]
    assert desk.join("a") == desk.join("a") == [Welcome(1)]
    assert desk.coordinator.clients == ["a"]
    desk.gather("b")
    assert desk.join("a") == [Start(0, 2, 0, ())], "the start was lost on the way"


def test_a_name_belongs_to_the_newest_process() -> None:
    desk = Desk()
    desk.gather("a")
    desk.handle(Received(b"other", Envelope("", 0, Hello("a", "0the", PROTOCOL))))
    assert desk.to("a") == [Refused("another worker has joined under the name a")]
    assert desk.of(Note) == [Note("replaced", "a", "another worker has joined under this name")]
    assert kinds(desk.to("other")) == [Terms]
    assert kinds(desk.join("a")) == [Rejoin], "the first one is a stranger now"


def test_a_session_keeps_its_name() -> None:
    desk = Desk()
    desk.hello("a")
    (refused,) = desk.say("a", Hello("b", "61", PROTOCOL))
    assert refused == Refused("the worker broke the protocol: a Hello of b from the session of a")


# What may be said when


@pytest.mark.parametrize("message", [Heartbeat(0.0, 0, 0, "training"), Offer(0, 0, 1200, 1, 1, 0.5), EVALUATED])
def test_a_stranger_is_told_to_join_again(message: Message) -> None:
    assert kinds(Desk().say("a", message)) == [Rejoin]


@pytest.mark.parametrize("asked", [0, 1, 70_000, MAX_PROBE_BYTES])
def test_a_probe_is_answered_once_whoever_asks(asked: int) -> None:
    desk = Desk()
    assert desk.say("a", Probe(7, asked), b"x" * 100, run="", epoch=0) == [Probed(7)]
    (send,) = desk.of(Send)
    assert (0 if send.envelope.payload is None else send.envelope.payload.nbytes) == asked
    wire.encode(send.envelope)
    assert desk.of(Note) == []
    assert desk.coordinator.clients == []
    assert desk.coordinator.deadline() is None, "no session was made"


def test_a_probe_changes_nothing_for_a_session(desk: Desk) -> None:
    due = desk.coordinator.deadline()
    desk.now += 1.0
    assert desk.say("a", Probe(0, 0)) == [Probed(0)]
    assert desk.coordinator.deadline() == due, "it is no sign of life of the worker"
    assert desk.effects == desk.of(Send)
    assert len(desk.commit("a", "b").contributors) == 2


def test_answers_to_probes_share_one_buffer() -> None:
    desk = Desk()
    shared = set()
    for sequence in range(5):
        desk.say("a", Probe(sequence, 1000 + sequence))
        (send,) = desk.of(Send)
        assert send.envelope.payload is not None
        assert send.envelope.payload.readonly
        shared.add(id(send.envelope.payload.obj))
    assert len(shared) == 1


def test_a_stranger_that_leaves_may_go() -> None:
    assert Desk().say("a", Leave("done")) == [Goodbye("you were not on the roster")]


@pytest.mark.parametrize(("run", "epoch"), [("run-0", 1), (RUN, 0), (RUN, 2), ("", 1)])
def test_a_message_of_another_run_or_epoch_is_not_taken(desk: Desk, run: str, epoch: int) -> None:
    assert kinds(desk.say("a", Offer(0, 0, NBYTES[0], 1, 1, 0.5), run=run, epoch=epoch)) == [Rejoin]
    assert desk.coordinator.clients == ["a", "b"], "it may be late; the session is not to blame"


@pytest.mark.parametrize(
    "message",
    [
        Heartbeat(0.0, 0, 0, "training"),
        Heartbeat(0.0, -1, 0, "waiting"),
        Offer(0, 0, NBYTES[0], 1, 1, 0.5),
        Abstain(0, "diverged"),
        Credit(0, 0, 0, 0, 0),
        EVALUATED,
    ],
    ids=lambda message: type(message).__name__,
)
def test_a_session_that_was_forgotten_is_told_to_join_again(message: Message) -> None:
    desk = Desk()
    desk.hello("a")
    assert kinds(desk.say("a", message)) == [Rejoin]
    assert desk.join("a") == [Welcome(1)], "it is not to blame"


def test_a_heartbeat_while_it_prepares_is_answered() -> None:
    desk = Desk()
    desk.hello("a")
    assert desk.say("a", Heartbeat(1.0, -1, 0, "preparing")) == [Heartbeat(desk.now, 0, 0, "gathering")]
    assert desk.of(Reported) == [Reported("a", Heartbeat(1.0, -1, 0, "preparing"))]


@pytest.mark.parametrize(
    "message", [Terms("{}", "a"), Welcome(1), Start(0, 1, 0, ()), Commit(0, 0, 0, -1, 0, 0, False), Probed(1)]
)
def test_what_only_a_broker_says_breaks_the_protocol(desk: Desk, message: Message) -> None:
    (refused,) = desk.say("a", message)
    reason = f"broke the protocol: {type(message).__name__} from a session that is active"
    assert refused == Refused(f"the worker {reason}")
    assert desk.of(Note)[0] == Note("dropped", "a", reason)
    assert desk.coordinator.clients == ["b"]


@pytest.mark.parametrize(
    "message", [Offer(0, 0, NBYTES[0], 1, 1, 0.5), Abstain(0, ""), Credit(0, 0, 0, 0, 0), EVALUATED]
)
def test_a_session_that_has_not_started_takes_no_part(message: Message) -> None:
    desk = Desk()
    desk.gather("a")
    assert SessionState.JOINED not in ALLOWED[type(message)]
    (refused,) = desk.say("a", message)
    assert isinstance(refused, Refused)
    assert f"{type(message).__name__} from a session that is joined" in refused.reason
    assert desk.coordinator.clients == []


def test_frames_that_are_no_message_end_the_session(desk: Desk) -> None:
    desk.handle(Malformed(b"a", "the header is not valid msgpack"))
    assert desk.to("a") == [Refused("the worker broke the protocol: the header is not valid msgpack")]
    assert desk.coordinator.clients == ["b"]
    desk.handle(Malformed(b"nobody", "no"))
    assert desk.of(Note) == [
        Note("dropped", "", "a stranger broke the protocol: no; offence number 2 of those without a key")
    ]


# Contributions


def test_a_contribution_is_taken_chunk_by_chunk_within_its_credit(desk: Desk) -> None:
    assert desk.say("a", Offer(0, 0, 1200, 7, 1, 0.5)) == [Credit(0, 0, 0, 0, 1200)]
    assert desk.chunk("a", 0, 0, 1024, 176) == [Credit(0, 0, 0, 0, 1200)], "too early: the first one was lost"
    assert desk.chunk("a", 0, 0, 0, 1024) == [Credit(0, 0, 0, 1024, 1200)]
    assert desk.say("a", Offer(0, 0, 1200, 7, 1, 0.5)) == [Credit(0, 0, 0, 1024, 1200)], "resumed"
    assert desk.chunk("a", 0, 0, 1024, 176) == [Credit(0, 0, 0, 1200, 1200)]
    assert desk.chunk("a", 0, 0, 1024, 176) == [Credit(0, 0, 0, 1200, 1200)], "repeated"
    assert not desk.asked, "b has not answered"


def test_all_contributions_are_folded_in_roster_order_and_committed(desk: Desk) -> None:
    desk.upload("b", fill=2)
    desk.upload("a", fill=1)
    assert [(fold.round, fold.block, fold.attempt, fold.index) for fold in desk.asked if isinstance(fold, Fold)] == [
        (0, 0, 1, 0),
        (0, 0, 1, 1),
    ]
    for fold in desk.asked:
        assert isinstance(fold, Fold)
        assert [(c.client, bytes(c.payload[:1])) for c in fold.contributions] == [("a", b"\1"), ("b", b"\2")]
    desk.work()
    (committed,) = desk.of(Committed)
    assert committed == Committed(0, 0, ("a", "b"), 0, 0.5, 2400, 2400, "2 contributions; 2 of 2 clients have answered")
    assert kinds(desk.to("a")) == kinds(desk.to("b")) == [Chunk, Chunk, Commit]
    assert desk.to("a")[-1] == Commit(0, 0, 1, -1, 1200, 2, True)
    assert desk.coordinator.next_round == 1


def test_the_loss_is_weighted_by_tokens(desk: Desk) -> None:
    for name, weight, loss in (("a", 1, 4.0), ("b", 3, 2.0)):
        desk.say(name, Offer(0, 0, 1200, weight, 1, loss))
        desk.chunk(name, 0, 0, 0, 1024)
        desk.chunk(name, 0, 0, 1024, 176)
    desk.work()
    assert desk.of(Committed)[0].loss == 2.5


@pytest.mark.parametrize(
    ("offer", "says"),
    [
        (Offer(0, 1, NBYTES[0], 1, 1, 0.5), "round 0 trains block 0 of 1200 bytes; got block 1 of 1200 bytes"),
        (Offer(0, 0, 1204, 1, 1, 0.5), "round 0 trains block 0 of 1200 bytes; got block 0 of 1204 bytes"),
        (Offer(2, 2, NBYTES[2], 1, 1, 0.5), "a contribution to round 2 while round 0 is open"),
        (Offer(6, 2, NBYTES[2], 1, 1, 0.5), "a contribution to round 6 while round 0 is open"),
        (Offer(0, 0, NBYTES[0], 1, 2, 0.5), "a round takes 1 to 1 optimizer steps; got 2"),
    ],
    ids=["block", "size", "too far ahead", "after the last", "steps"],
)
def test_an_impossible_offer_breaks_the_protocol(desk: Desk, offer: Offer, says: str) -> None:
    (refused,) = desk.say("a", offer)
    assert refused == Refused(f"the worker broke the protocol: {says}")
    assert desk.coordinator.clients == ["b"]


@pytest.mark.parametrize(("steps", "taken"), [(2, False), (3, True), (5, True), (6, False)])
def test_steps_that_adapt_stay_within_their_bounds(steps: int, taken: bool) -> None:
    desk = Desk(solver={"adaptive": True, "steps": 4, "min_steps": 3, "max_steps": 5})
    desk.gather("a", "b")
    (answer,) = desk.say("a", Offer(0, 0, NBYTES[0], 1, steps, 0.5))
    assert isinstance(answer, Credit) is taken
    assert taken or answer == Refused(
        f"the worker broke the protocol: a round takes 3 to 5 optimizer steps; got {steps}"
    )


def test_a_round_after_the_last_cannot_be_contributed_to() -> None:
    desk = Desk(rounds=1)
    desk.gather("a", "b")
    (refused,) = desk.say("a", Offer(1, 1, NBYTES[1], 1, 1, 0.5))
    assert isinstance(refused, Refused)


def test_a_second_contribution_to_a_round_breaks_the_protocol(desk: Desk) -> None:
    desk.say("a", Offer(0, 0, 1200, 1, 1, 0.5))
    (refused,) = desk.say("a", Offer(0, 0, 1200, 2, 1, 0.5))
    assert refused == Refused("the worker broke the protocol: a second, different contribution to round 0")


def test_an_impossible_chunk_breaks_the_protocol() -> None:
    desk = Desk(schedule={"order": "descending"})
    desk.gather("a", "b")
    desk.say("a", Offer(0, 3, NBYTES[3], 1, 1, 0.5))
    (refused,) = desk.chunk("a", 0, 3, 0, 1000)
    assert isinstance(refused, Refused)
    assert "a chunk of 1000 bytes at 0" in refused.reason
    assert desk.coordinator.clients == ["b"]
    assert desk.join("a") == [Rejoin("the broker does not know this session; say Hello again")]


def test_a_chunk_beyond_the_credit_is_answered_by_what_is_granted_and_too_many_break_the_protocol() -> None:
    desk = Desk(schedule={"order": "descending"})
    desk.gather("a", "b")
    desk.say("a", Offer(0, 3, NBYTES[3], 1, 1, 0.5))
    for _ in range(16):  # four windows, in chunks of 512
        assert desk.chunk("a", 0, 3, 2048, 512) == [Credit(0, 3, 0, 0, 2048)]
    (refused,) = desk.chunk("a", 0, 3, 2048, 512)
    assert isinstance(refused, Refused)
    assert "beyond the credit" in refused.reason


def test_a_lost_acknowledgement_is_repeated_and_the_update_counts_once(desk: Desk) -> None:
    """a does not hear that its contribution is held, and sends all of it again, also while it is folded and after."""

    def again() -> list[Message]:
        said = desk.say("a", Offer(0, 0, 1200, 1, 1, 0.5))
        for offset, nbytes in ((0, 1024), (1024, 176)):
            said += desk.chunk("a", 0, 0, offset, nbytes, fill=1)
        return said

    desk.upload("a", fill=1)
    assert again() == [Credit(0, 0, 0, 1200, 1200)] * 3
    desk.upload("b")
    assert again() == [], "the commit will say it"
    folds = [asked for asked in desk.asked if isinstance(asked, Fold)]
    assert [(fold.attempt, [part.client for part in fold.contributions]) for fold in folds] == [(1, ["a", "b"])] * 2
    desk.work()
    assert desk.of(Committed)[0].contributors == ("a", "b")
    assert again() == [], "the commit is on its way"
    desk.confirm("a", 0)
    assert again() == [Rejected(0, "the round was closed before the contribution came")]
    assert desk.commit("a", "b", round=1).contributors == ("a", "b")


def test_a_chunk_without_its_offer_is_passed_over(desk: Desk) -> None:
    assert desk.chunk("a", 0, 0, 0, 1024) == []
    desk.say("b", Offer(0, 0, 1200, 1, 1, 0.5))
    assert desk.chunk("a", 0, 0, 0, 1024) == [], "of a round that others have offered to"
    desk.say("a", Offer(0, 0, 1200, 1, 1, 0.5))
    assert desk.chunk("a", 0, 1, 0, 1024) == [], "of another block"
    assert desk.coordinator.clients == ["a", "b"]


def test_abstaining_is_an_answer(desk: Desk) -> None:
    desk.upload("a")
    desk.say("b", Offer(0, 0, 1200, 1, 1, 0.5))
    desk.chunk("b", 0, 0, 0, 1024)
    assert desk.say("b", Abstain(0, "the loss is not finite")) == []
    assert desk.of(Note) == [Note("abstained", "b", "round 0: the loss is not finite")]
    assert desk.counting == ["a"]
    assert desk.say("b", Abstain(0, "the loss is not finite")) == [], "repeated while it is folded"
    desk.work()
    assert desk.to("b")[-1] == Commit(0, 0, 2, -1, 1200, 1, False)
    assert desk.say("b", Abstain(0, "the loss is not finite")) == [], "repeated after the commit"
    assert not desk.of(Note)


def test_who_has_abstained_cannot_contribute(desk: Desk) -> None:
    desk.say("a", Abstain(0, "diverged"))
    assert kinds(desk.say("a", Offer(0, 0, 1200, 1, 1, 0.5))) == [Rejected]


def test_an_acknowledged_contribution_is_not_taken_back(desk: Desk) -> None:
    desk.upload("a")
    desk.say("a", Abstain(0, "no"))
    assert not desk.of(Note)
    desk.upload("b")
    assert desk.counting == ["a", "b"]


def test_a_round_to_which_everybody_abstains_changes_nothing() -> None:
    desk = Desk()
    desk.gather("a", "b")
    desk.say("a", Abstain(0, "diverged"))
    desk.say("b", Abstain(0, "diverged"))
    assert not desk.of(Committed), "not before it is durable"
    assert [(store.attempt, store.entry.contributors) for store in desk.of(Store)] == [(0, ())]
    desk.work()
    (committed,) = desk.of(Committed)
    assert (committed.contributors, committed.loss, committed.bytes_down) == ((), None, 0)
    assert desk.to("a") == [Commit(0, 0, 0, -1, 0, 0, False)]
    desk.say("a", Credit(0, 0, 0, 0, 0))
    desk.handle(Tick(), after_s=5.0)
    assert kinds(desk.to("a")) == [], "it has said that it knows"
    assert kinds(desk.to("b")) == [Commit], "it has not"


def test_an_unfit_contribution_is_rejected_and_the_round_goes_on(desk: Desk) -> None:
    desk.upload("a")
    desk.upload("b")
    asked = len(desk.asked)
    desk.handle(Unfit(0, 1, {"b": "the update holds values that are not finite"}))
    assert desk.to("b") == [Rejected(0, "the update holds values that are not finite")]
    assert desk.of(Note) == [Note("rejected", "b", "round 0: the update holds values that are not finite")]
    desk.asked = desk.asked[asked:]
    assert [(fold.attempt, fold.index) for fold in desk.of(Fold)] == [(2, 0), (2, 1)]
    assert desk.counting == ["a"]
    assert kinds(desk.say("b", Offer(0, 0, 1200, 1, 1, 0.5))) == [Rejected], "once is enough"


def test_what_is_offered_while_a_round_is_folded_is_taken_if_it_is_opened_again() -> None:
    """It must not be refused: with the unfit one gone, the round may need it."""
    desk = Desk(clients=3, quorum=2, deadline_s=5.0)
    desk.gather("a", "b", "c")
    desk.say("c", Offer(0, 0, 1200, 1, 1, 0.5))
    desk.upload("a")
    desk.upload("b")
    assert not desk.asked
    desk.handle(Tick(), after_s=5.0)
    assert desk.counting == ["a", "b"]
    desk.asked.clear()
    assert desk.say("c", Offer(0, 0, 1200, 1, 1, 0.5)) == []
    assert desk.chunk("c", 0, 0, 0, 1024) == []
    desk.handle(Unfit(0, 2, {"a": "not finite"}))
    assert not desk.asked, "one is less than the quorum"
    assert desk.to("c") == [Credit(0, 0, 0, 0, 1200)], "go on"
    desk.upload("c")
    assert desk.counting == ["b", "c"]
    desk.work()
    assert desk.of(Committed)[0].contributors == ("b", "c")


def test_the_deadline_counts_anew_when_the_only_contribution_was_unfit() -> None:
    desk = Desk(quorum=1, deadline_s=5.0)
    desk.gather("a", "b")
    desk.upload("a")
    desk.handle(Tick(), after_s=5.0)
    assert desk.counting == ["a"]
    desk.asked.clear()
    desk.handle(Unfit(0, 1, {"a": "not finite"}))
    desk.handle(Tick(), after_s=0.5)
    assert not desk.asked
    desk.upload("b")
    assert desk.counting == ["b"]


def test_a_straggler_is_told_that_the_round_has_closed() -> None:
    desk = Desk(clients=3, deadline_s=5.0)
    desk.gather("a", "b", "c")
    desk.say("c", Offer(0, 0, 1200, 1, 1, 0.5))
    desk.chunk("c", 0, 0, 0, 1024)
    desk.upload("a")
    desk.upload("b", round=1)
    assert desk.coordinator.deadline() == desk.now + 5.0
    desk.upload("b")
    desk.handle(Tick(), after_s=4.9)
    assert {fold.index for fold in desk.asked if isinstance(fold, Fold)} == {0}, "what is in of everybody"
    desk.handle(Tick(), after_s=0.2)
    assert desk.counting == ["a", "b"]
    desk.work()
    *_, rejected, commit = desk.to("c")
    assert isinstance(rejected, Rejected)
    assert "the deadline of 5 s has passed with 2 contributions" in rejected.reason
    assert commit == Commit(0, 0, 2, -1, 1200, 2, False)
    assert desk.of(Committed)[0].late == 1
    assert desk.of(Committed)[0].bytes_up == 2400 + 1024
    assert desk.say("c", Offer(0, 0, 1200, 1, 1, 0.5)) == [], "the commit is on its way, and says it"
    desk.confirm("c", 0, attempt=2)
    assert desk.say("c", Offer(0, 0, 1200, 1, 1, 0.5)) == [
        Rejected(0, "the round was closed before the contribution came")
    ]


@pytest.fixture
def kind() -> Desk:
    """Three clients, of whom a and b have contributed to round 0, one chunk of c's is in, and the deadline passes."""
    desk = Desk(clients=3, quorum=2, deadline_s=5.0, policy={"grace": True})
    desk.gather("a", "b", "c")
    desk.say("c", Offer(0, 0, 1200, 1, 1, 0.5))
    desk.chunk("c", 0, 0, 0, 1024)
    desk.upload("a")
    desk.upload("b")
    desk.asked.clear()
    desk.handle(Tick(), after_s=5.0)
    return desk


def test_in_the_time_of_grace_what_is_there_goes_out_and_counts_when_somebody_waits(kind: Desk) -> None:
    assert kind.counting == ["a", "b"]
    kind.work()
    assert not kind.of(Committed), "c may still come"
    assert kind.say("a", Waiting(-1)) == [], "for an earlier one"
    assert not kind.asked
    kind.say("a", Waiting(0))
    assert [type(asked) for asked in kind.asked] == [Store], "all of it is down already"
    kind.work()
    (committed,) = kind.of(Committed)
    assert (committed.contributors, committed.late) == (("a", "b"), 1)
    assert "the deadline of 5 s has passed with 2 contributions, and a would wait" in committed.reason


def test_in_the_time_of_grace_the_last_one_still_counts(kind: Desk) -> None:
    kind.work()
    kind.chunk("c", 0, 0, 1024, 176)
    assert kind.counting == ["a", "b", "c"]
    kind.work()
    (committed,) = kind.of(Committed)
    assert committed.contributors == ("a", "b", "c")
    assert "3 of 3 clients have answered" in committed.reason


def test_nobody_can_wait_for_a_round_that_is_far_ahead(kind: Desk) -> None:
    """Else one message would end the grace of all rounds to come."""
    kind.work()
    for round in (2, 2**31):
        kind.say("b", Waiting(round))
    assert not kind.asked
    kind.say("b", Waiting(1))
    assert kind.asked


def test_a_newcomer_that_stands_still_ends_the_grace(kind: Desk) -> None:
    """Who has contributed may have died since, and c never answer: nobody else would."""
    kind.work()
    kind.hello("d")
    kind.join("d")
    assert not kind.asked
    kind.say("d", Waiting(0))
    kind.work()
    assert "and d would wait" in kind.of(Committed)[0].reason


def test_who_waited_before_the_deadline_is_remembered() -> None:
    desk = Desk(clients=3, quorum=2, deadline_s=5.0, policy={"grace": True})
    desk.gather("a", "b", "c")
    desk.upload("a")
    desk.upload("b")
    desk.handle(Tick(), after_s=5.0)
    desk.work()
    assert not desk.of(Committed)
    desk.say("b", Waiting(0))
    desk.work()
    desk.upload("a", 1)
    desk.upload("b", 1)
    desk.say("b", Waiting(1))
    desk.handle(Tick(), after_s=4.9)
    assert not desk.of(Store), "the deadline holds for those who are at it"
    desk.handle(Tick(), after_s=0.1)
    desk.work()
    assert desk.of(Committed)[0].contributors == ("a", "b")


def test_an_upload_that_is_withheld_is_reclaimed_and_the_round_goes_on() -> None:
    """By a client that is heard from: its place and its bytes are not held for ever."""
    desk = Desk(clients=2, quorum=1)
    desk.gather("a", "b")
    desk.upload("a")
    desk.say("b", Offer(0, 0, 1200, 1, 1, 0.5))
    desk.chunk("b", 0, 0, 0, 1024)
    for _ in range(5):
        desk.handle(Tick(), after_s=1.0)
        desk.say("a", Heartbeat(0.0, 1, 0, "training"))
        desk.say("b", Heartbeat(0.0, 1, 0, "training"))
        desk.say("b", Offer(0, 0, 1200, 1, 1, 0.5))  # which is no progress
    desk.work()
    assert not desk.of(Committed)
    due = desk.coordinator.deadline()
    assert due is not None
    assert due <= desk.now + 1.0
    desk.say("b", Heartbeat(0.0, 1, 0, "training"))
    desk.now += 1.0
    desk.say("b", Heartbeat(0.0, 1, 0, "training"))
    desk.handle(Tick())
    reason = "nothing more of the contribution came for 6 s"
    assert Rejected(0, reason) in desk.to("b")
    assert desk.of(Note) == [Note("stalled", "b", f"round 0: {reason}")]
    assert desk.chunk("b", 0, 0, 1024, 176) == [], "too late"
    assert kinds(desk.say("b", Offer(0, 0, 1200, 1, 1, 0.5))) == [Rejected]
    desk.work()
    (committed,) = desk.of(Committed)
    assert (committed.contributors, committed.bytes_up) == (("a",), 1200)


def test_an_upload_ahead_of_its_round_is_not_taken_for_withheld() -> None:
    """All that it may send has come; the rest waits for its turn."""
    desk = Desk(clients=2, window=1024)
    desk.gather("a", "b")
    desk.say("b", Offer(1, 1, 2000, 1, 1, 0.5))
    desk.chunk("b", 1, 1, 0, 1024)
    for _ in range(9):
        desk.handle(Tick(), after_s=1.0)
        for name in "ab":
            desk.say(name, Heartbeat(0.0, 1, 0, "training"))
    desk.commit("a", "b")
    assert Credit(1, 1, 0, 1024, 2000) in desk.to("b"), "its turn has come"
    for _ in range(5):
        desk.handle(Tick(), after_s=1.0)
        for name in "ab":
            desk.say(name, Heartbeat(0.0, 1, 0, "training"))
    assert [note.kind for note in desk.notes if note.kind == "stalled"] == []
    assert desk.chunk("b", 1, 1, 1024, 976) == [Credit(1, 1, 0, 2000, 2000)]


def test_a_lost_quorum_stops_the_run_once_it_has_lasted() -> None:
    desk = Desk(clients=2, policy={"quorum_lost": "stop", "quorum_lost_s": 3.0})
    desk.gather("a", "b")
    desk.upload("a")
    desk.say("b", Leave("interrupted"))
    desk.handle(Tick(), after_s=2.9)
    assert not desk.of(Over)
    due = desk.coordinator.deadline()
    assert due is not None
    assert due <= desk.now + 0.1 + 1e-6
    desk.handle(Tick(), after_s=0.2)
    reason = "round 0: 1 of at least 2 clients are there, for 3 s; the run stops (round.quorum_lost)"
    assert desk.of(Note) == [Note("quorum", "", reason)]
    assert desk.to("a") == [Stopped(reason, returns=False)]
    assert desk.of(Over) == [Over(False, reason)]
    assert not desk.asked, "no partial commit"


def test_a_round_that_is_being_stored_is_committed_whole_before_the_quorum_is_given_up() -> None:
    desk = Desk(clients=2, policy={"quorum_lost": "stop", "quorum_lost_s": 0.0})
    desk.gather("a", "b")
    desk.upload("a")
    desk.upload("b")
    desk.say("b", Leave("interrupted"))
    assert not desk.of(Over)
    desk.work()
    assert [committed.contributors for committed in desk.of(Committed)] == [("a", "b")]
    (over,) = desk.of(Over)
    assert over.reason.startswith("round 1: 1 of at least 2 clients are there, for 0 s; the run stops")
    assert desk.to("a").index(Stopped(over.reason, returns=False)) > kinds(desk.to("a")).index(Commit)


def test_with_fewer_than_the_quorum_rounds_go_on_and_it_is_told_once() -> None:
    desk = Desk(clients=3, quorum=3, policy={"quorum_lost": "fewer", "quorum_lost_s": 3.0})
    desk.gather("a", "b", "c")
    desk.upload("a")
    desk.upload("b")
    desk.say("c", Leave("interrupted"))
    desk.work()
    assert not desk.of(Committed)
    desk.handle(Tick(), after_s=3.0)
    desk.work()
    for round in (1, 2):
        committed = desk.commit("a", "b", round=round)
        assert committed.contributors == ("a", "b")
        assert "only 2 of at least 3 clients are there" in committed.reason
    assert [note.kind for note in desk.notes].count("quorum") == 2, "that it is missing, and that it is done without"
    desk.gather("c")
    assert desk.notes[-1].text == "round 3: 3 clients are there again, at least 3 are needed"
    desk.upload("a", 3)
    desk.upload("b", 3)
    desk.work()
    assert not desk.of(Committed), "from now on all three are waited for"


def test_a_lost_quorum_that_is_back_in_time_changes_nothing() -> None:
    desk = Desk(clients=2, policy={"quorum_lost": "stop", "quorum_lost_s": 3.0})
    desk.gather("a", "b")
    desk.say("b", Leave("interrupted"))
    desk.handle(Tick(), after_s=2.0)
    desk.hello("b", token="0the")
    desk.join("b")
    assert [note.text for note in desk.of(Note) if note.kind == "quorum"] == [
        "round 0: 2 clients are there again, at least 2 are needed"
    ]
    desk.handle(Tick(), after_s=3.0)
    assert not desk.of(Over)
    desk.commit("a", "b")


def test_a_deadline_that_has_passed_is_not_due_again() -> None:
    desk = Desk(clients=2, quorum=2, deadline_s=1.0)
    desk.gather("a", "b")
    desk.upload("a")
    desk.handle(Tick(), after_s=1.0)
    due = desk.coordinator.deadline()
    assert due is not None
    assert due > desk.now, "the broker would spin"


# Blocks on their way down


def test_a_block_comes_down_within_the_credit(desk: Desk) -> None:
    for round in range(3):
        desk.commit("a", "b", round=round)
        desk.confirm("a", round)
    desk.commit("a", "b", round=3)
    first, second, commit = desk.to("a")
    assert commit == Commit(3, 3, 1, -1, 2560, 2, True)
    assert [m.offset for m in (first, second) if isinstance(m, Chunk)] == [0, 1024], "two chunks are the window"
    (third,) = desk.say("a", Credit(3, 3, 1, 1024, 2560))
    assert isinstance(third, Chunk)
    assert third.offset == 2048
    assert desk.say("a", Credit(3, 3, 1, 1024, 2560)) == []
    assert desk.say("a", Credit(3, 2, 1, 2560, 2560)) == [], "of another block"
    assert desk.say("a", Credit(3, 3, 2, 2560, 2560)) == [], "of another attempt"
    desk.handle(Tick(), after_s=3.0)
    assert [m.offset for m in desk.to("a") if isinstance(m, Chunk) and m.round == 3] == [1024, 2048]
    assert desk.say("a", Credit(3, 3, 1, 2560, 2560)) == []
    desk.handle(Tick(), after_s=2.0)
    desk.say("a", Heartbeat(0.0, 4, 0, "training"))
    desk.handle(Tick(), after_s=1.0)
    assert not [m for m in desk.to("a") if isinstance(m, Chunk | Commit) and m.round == 3], "it is confirmed"
    assert desk.say("a", Credit(3, 3, 1, 2560, 2560)) == [], "repeated"


def test_one_window_is_under_way_to_a_session_earlier_blocks_first(desk: Desk) -> None:
    """What is queued for a slow peer delays all that is said to it."""
    desk.commit("a", "b")
    desk.commit("a", "b", round=1)
    assert kinds(desk.to("a")) == [Commit], "1200 bytes of round 0 are under way, and the next chunk has 1024"
    assert kinds(desk.to("b")) == [Commit]
    desk.say("a", Credit(0, 0, 1, 1024, 1200))
    assert [(m.round, m.offset) for m in desk.to("a") if isinstance(m, Chunk)] == [(1, 0)]
    desk.confirm("a", 0)
    assert [(m.round, m.offset) for m in desk.to("a") if isinstance(m, Chunk)] == [(1, 1024)]


def test_an_impossible_credit_breaks_the_protocol(desk: Desk) -> None:
    desk.commit("a", "b")
    (refused,) = desk.say("a", Credit(0, 0, 1, 0, 5000))
    assert isinstance(refused, Refused)
    assert "credit of 0 held, up to 5000, for a transfer of 1200 bytes" in refused.reason


def test_what_is_not_confirmed_is_sent_again(desk: Desk) -> None:
    desk.commit("a", "b")
    desk.say("a", Credit(0, 0, 1, 1024, 1200))
    desk.confirm("b", 0)
    due = desk.coordinator.deadline()
    assert due is not None
    assert due <= desk.now + 3.0
    desk.handle(Tick(), after_s=3.0)
    commit, chunk = desk.to("a")
    assert commit == Commit(0, 0, 1, -1, 1200, 2, True)
    assert isinstance(chunk, Chunk)
    assert chunk.offset == 1024, "only what is missing"
    assert desk.to("b") == []


def test_who_falls_too_far_behind_joins_again_for_the_newest_blocks() -> None:
    desk = Desk(rounds=12)
    desk.gather("a", "b", "c")
    for round in range(7):
        assert desk.coordinator.clients == ["a", "b", "c"]
        desk.commit(*sorted(desk.coordinator.members(round)), round=round)
        desk.confirm("a", round)
        desk.confirm("b", round)
    assert desk.coordinator.clients == ["a", "b"], "more than four blocks, one in flight and one being made"
    assert desk.notes[-1] == Note("behind", "c", "7 blocks wait for its link")
    desk.hello("c")
    said = desk.join("c")
    assert [m.round for m in said if isinstance(m, Commit)] == [3, 4, 5, 6]


# Coming and going


def test_without_a_client_nothing_is_due() -> None:
    assert Desk().coordinator.deadline() is None


def test_a_silent_client_is_lost_and_the_others_go_on() -> None:
    desk = Desk(clients=2, quorum=1)
    desk.gather("a", "b")
    desk.upload("a")
    desk.handle(Tick(), after_s=3.0)
    desk.say("a", Heartbeat(0.0, 1, 0, "training"))
    due = desk.coordinator.deadline()
    assert due is not None
    assert due <= desk.now + 3.0
    desk.handle(Tick(), after_s=3.0)
    assert desk.of(Note) == [Note("lost", "b", "nothing heard for 6 s")]
    assert desk.counting == ["a"]


def test_a_start_is_repeated_with_each_heartbeat(desk: Desk) -> None:
    assert desk.say("a", Heartbeat(0.0, -1, 0, "waiting")) == [
        Start(0, 2, 0, ()),
        Heartbeat(desk.now, 0, 0, "running"),
    ]


def test_a_late_worker_gets_only_the_blocks_that_it_lacks() -> None:
    desk = Desk(clients=2, rounds=12)
    desk.gather("a", "b")
    for round in range(5):
        desk.commit("a", "b", round=round)
    desk.hello("c")
    said = desk.join("c", versions=(1, 2, 0, 4))  # block 0 has changed since, block 2 never came
    assert said[0] == Welcome(3)
    assert said[-1] == Start(round=7, clients=3, next=5, pending=(2, 4))
    assert [message for message in said if isinstance(message, Commit)] == [
        Commit(2, 2, 1, -1, NBYTES[2], 2, False),
        Commit(4, 0, 1, 0, NBYTES[0], 2, False),
    ]
    assert desk.coordinator.members(6) == {"a", "b"}, "nobody waits for it before it can be there"
    assert desk.coordinator.members(7) == {"a", "b", "c"}
    assert kinds(desk.say("c", Offer(6, 2, NBYTES[2], 1, 1, 0.5))) == [Rejected]


def test_a_worker_that_the_quorum_needs_begins_at_once(desk: Desk) -> None:
    desk.commit("a", "b")
    desk.say("b", Leave("interrupted"))
    assert desk.to("b") == [Goodbye("until the next time")]
    quorum = Note("quorum", "", "round 1: 1 of at least 2 clients are there; rounds wait")
    assert desk.of(Note) == [Note("left", "b", "interrupted"), quorum]
    desk.upload("a", round=1)
    assert not desk.asked, "one of two waits for the other"
    desk.hello("c")
    assert desk.join("c")[-1] == Start(1, 2, 1, (0,))


def test_nobody_starts_after_the_last_round() -> None:
    desk = Desk(clients=2, rounds=2)
    desk.gather("a", "b")
    desk.commit("a", "b", round=0)
    desk.hello("c")
    assert desk.join("c")[-1] == Start(2, 3, 1, (0,))


def test_those_that_begin_later_make_a_quorum_so_that_the_run_goes_on() -> None:
    desk = Desk(clients=2)
    desk.gather("a", "b", "c")
    assert desk.coordinator.present() == {"a", "b", "c"}
    assert desk.coordinator.members(0) == {"a", "b"}
    desk.say("b", Leave("interrupted"))
    desk.upload("a")
    desk.work()
    assert desk.of(Committed)[0].contributors == ("a",)


def test_the_same_process_comes_back_and_goes_on_with_its_upload() -> None:
    desk = Desk(clients=3, quorum=2)
    desk.gather("a", "b", "c")
    for name in "abc":
        desk.say(name, Offer(0, 0, 1200, 1, 1, 0.5))
        desk.chunk(name, 0, 0, 0, 1024, fill=9)
    desk.hello("a")
    assert desk.of(Note) == [Note("rejoining", "a", "the worker greets again")]
    assert desk.join("a")[-1] == Start(2, 3, 0, ())
    assert desk.say("a", Offer(0, 0, 1200, 1, 1, 0.5)) == [Credit(0, 0, 0, 1024, 1200)], "begun as a member"
    desk.chunk("a", 0, 0, 1024, 176, fill=9)
    for name in "bc":
        desk.chunk(name, 0, 0, 1024, 176)
    assert desk.counting == ["a", "b", "c"]
    folds = [fold for fold in desk.asked if isinstance(fold, Fold) and len(fold.contributions) == 3]
    newest = [fold for fold in folds if fold.attempt == folds[-1].attempt]
    assert b"".join(fold.contributions[0].payload for fold in newest) == bytes([9]) * 1200


@pytest.mark.parametrize("way", ["replaced", "left"])
def test_another_process_of_the_name_begins_its_upload_anew(desk: Desk, way: str) -> None:
    desk.say("a", Offer(0, 0, 1200, 1, 1, 0.5))
    desk.chunk("a", 0, 0, 0, 1024, fill=1)
    if way == "left":
        desk.say("a", Leave("interrupted"))
    other = b"a'"
    for message in (Hello("a", "0the", PROTOCOL), Join(MANIFEST.digest, BASE, TOKENIZER, 1, (0,) * 4, -1)):
        desk.handle(Received(other, Envelope(RUN, 1, message)))
    payload = memoryview(bytes([2]) * 1024)
    desk.handle(Received(other, Envelope(RUN, 1, Chunk(0, 0, 0, 0, wire.checksum(payload)), payload)))
    assert desk.effects == [], "its offer was lost"
    desk.handle(Received(other, Envelope(RUN, 1, Offer(0, 0, 1200, 1, 1, 0.5))))
    assert desk.to("a'") == [Credit(0, 0, 0, 0, 1200)]


def test_a_lost_process_leaves_no_half_upload_to_another(desk: Desk) -> None:
    desk.say("a", Offer(0, 0, 1200, 1, 1, 0.5))
    desk.chunk("a", 0, 0, 0, 1024, fill=1)
    desk.handle(Tick(), after_s=6.0)
    other = b"a'"
    for message in (Hello("a", "0the", PROTOCOL), Join(MANIFEST.digest, BASE, TOKENIZER, 1, (0,) * 4, -1)):
        desk.handle(Received(other, Envelope(RUN, 1, message)))
    tail = memoryview(bytes([2]) * 176)
    desk.handle(Received(other, Envelope(RUN, 1, Chunk(0, 0, 0, 1024, wire.checksum(tail)), tail)))
    assert desk.effects == [], "a mixed contribution"
    desk.handle(Received(other, Envelope(RUN, 1, Offer(0, 0, 1200, 1, 1, 0.5))))
    assert desk.to("a'") == [Credit(0, 0, 0, 0, 1200)]


def test_what_a_process_had_contributed_counts_though_it_has_died(desk: Desk) -> None:
    desk.upload("a", fill=1)
    desk.handle(Received(b"a'", Envelope("", 0, Hello("a", "0the", PROTOCOL))))
    desk.handle(Received(b"a'", Envelope(RUN, 1, Join(MANIFEST.digest, BASE, TOKENIZER, 1, (0,) * 4, -1))))
    assert desk.to("a'")[-1] == Start(0, 2, 0, ())
    desk.handle(Received(b"a'", Envelope(RUN, 1, Offer(0, 0, 1200, 5, 1, 0.1))))
    assert desk.to("a'") == [Credit(0, 0, 0, 1200, 1200)], "the broker has one, and the commit will count it"
    desk.upload("b")
    (fold,) = desk.of(Fold)
    assert bytes(fold.contributions[0].payload[:1]) == b"\1"


# The end


def test_the_run_is_over_when_every_client_has_the_last_block_and_has_left() -> None:
    desk = Desk(rounds=1)
    desk.gather("a", "b")
    desk.commit("a", "b")
    assert desk.coordinator.phase is Phase.DRAINING
    desk.hello("c")
    assert desk.join("c")[-1] == Start(1, 3, 1, (0,)), "who comes now still gets the model"
    desk.say("a", EVALUATED)
    assert desk.of(Reported) == [Reported("a", EVALUATED)]
    for name in "abc":
        assert not desk.of(Over)
        desk.say(name, Leave("done"))
    assert desk.of(Over) == [Over(True, "every round is committed and every client has left")]
    assert desk.coordinator.phase is Phase.OVER
    assert desk.hello("a") == [], "nobody is at home"


def test_the_run_is_over_when_the_last_client_is_lost_while_it_drains() -> None:
    desk = Desk(rounds=1)
    desk.gather("a", "b")
    desk.commit("a", "b")
    desk.handle(Tick(), after_s=6.0)
    assert desk.of(Over)[0].complete


def test_a_run_that_ends_while_nobody_is_there_is_complete() -> None:
    desk = Desk(rounds=1)
    desk.gather("a", "b")
    desk.upload("a")
    desk.upload("b")
    for name in "ab":
        desk.say(name, Leave("interrupted"))
    desk.work()
    assert desk.of(Over)[0].complete


@pytest.mark.parametrize("returns", [False, True])
def test_stopping_tells_everybody(desk: Desk, returns: bool) -> None:
    desk.handle(Stop("interrupted (SIGTERM)", returns))
    assert desk.to("a") == desk.to("b") == [Stopped("interrupted (SIGTERM)", returns)]
    assert desk.of(Over) == [Over(False, "interrupted (SIGTERM)")]


# Rounds that are announced


@pytest.fixture
def in_turn() -> Desk:
    """Two clients that train block 0, 1, 2, ... in turn, a first."""
    desk = Desk(mode="fedcybgd")
    desk.gather("a", "b")
    return desk


def test_a_start_and_each_commit_say_what_comes(in_turn: Desk) -> None:
    assert in_turn.to("a") == [Start(0, 2, 0, (), (0,), (True,))]
    in_turn.upload("a")
    in_turn.work()
    said = {name: [m for m in in_turn.to(name) if isinstance(m, Commit)] for name in "ab"}
    assert said["a"] == [Commit(0, 0, 1, -1, NBYTES[0], 1, True, (1,), (False,))]
    assert said["b"] == [Commit(0, 0, 1, -1, NBYTES[0], 1, False, (1,), (True,))]
    for round in range(1, 6):
        in_turn.upload("ab"[in_turn.block_of(round)[1]], round, in_turn.block_of(round)[0])
        in_turn.work()
    (last,) = [m for m in in_turn.to("a") if isinstance(m, Commit)]
    assert (last.round, last.blocks, last.trains) == (5, (), ()), "there is no round after it"


def test_who_comes_later_hears_what_is_decided_but_not_what_is_over(in_turn: Desk) -> None:
    in_turn.upload("a")
    in_turn.work()
    in_turn.hello("c")
    said = in_turn.join("c")
    assert said[-1] == Start(2, 3, 1, (0,), (1,), (False,))
    assert [(m.blocks, m.trains) for m in said if isinstance(m, Commit)] == [((), ())]


def test_who_was_not_drawn_is_told_so_and_not_waited_for(in_turn: Desk) -> None:
    (rejected,) = in_turn.say("b", Offer(0, 0, NBYTES[0], 1, 1, 0.5))
    assert rejected == Rejected(0, "the client was not drawn for this round")
    assert in_turn.say("b", Abstain(0, "diverged")) == []
    assert [note for note in in_turn.notes if note.kind == "abstained"] == []
    in_turn.upload("a")
    in_turn.work()
    assert in_turn.of(Committed)[0].contributors == ("a",)


def test_a_round_beyond_the_last_cannot_be_abstained_from(desk: Desk) -> None:
    for round in range(5):
        desk.commit("a", "b", round=round)
    assert desk.say("a", Abstain(6, "diverged")) == []
    assert desk.coordinator.next_round == 5


def test_a_client_that_was_late_is_late_until_it_is_drawn_again() -> None:
    """Nobody's chunks wait for it before they are folded, also some rounds later."""
    desk = Desk(clients=3, rounds=12, mode="fedbcd", fraction=0.6, quorum=1, deadline_s=2.0, seed=2)
    desk.gather("a", "b", "c")
    agenda = desk.coordinator._agenda
    drawn = sorted(agenda.members(0, frozenset("abc")))
    desk.upload(drawn[0])
    desk.handle(Tick(), after_s=2.5)
    desk.work()
    assert desk.of(Committed)[0].contributors == (drawn[0],)
    for round in range(1, 12):
        names = sorted(agenda.members(round, frozenset("abc")))
        if drawn[1] in names:
            break
        desk.commit(*names, round=round)
    assert round > 1, "with this seed it sits out at least once"
    other = next(name for name in names if name != drawn[1])
    desk.upload(other, round)
    assert desk.counting == [other]


# Hostile clients


def flood(desk: Desk, peer: bytes, message: Message, times: int, payload: memoryview | None = None) -> int:
    """Say a message again and again, at once; after how many the connection was dropped."""
    for count in range(1, times + 1):
        desk.handle(Received(peer, Envelope(RUN, 1, message, payload)))
        if desk.of(Drop):
            return count
    raise AssertionError(f"{times} times {message} are taken")


def known(desk: Desk, name: str) -> None:
    """A client joins over a connection that proves its name."""
    join = Join(MANIFEST.digest, BASE, TOKENIZER, 10, (0, 0, 0, 0), -1)
    for message in (Hello(name, f"{ord(name[0]):x}", PROTOCOL), join):
        desk.handle(Received(peer_of(name), Envelope(RUN, 1, message), name))


def test_who_breaks_the_protocol_is_dropped_counted_and_named(desk: Desk) -> None:
    desk.handle(Malformed(peer_of("a"), "no"))
    assert desk.to("a") == [Refused("the worker broke the protocol: no")]
    assert desk.of(Drop) == [Drop(peer_of("a"), "no")]
    desk.hello("a")
    desk.handle(Malformed(peer_of("a"), "nor this"))
    assert desk.of(Note) == [
        Note("dropped", "a", "broke the protocol: nor this; offence number 2 of those without a key")
    ]


@pytest.mark.parametrize(
    "message",
    [
        Heartbeat(0.0, 0, 0, "training"),
        Offer(0, 0, 1200, 10, 1, 0.5),
        Abstain(0, "no"),
        Waiting(0),
        EVALUATED,
        Credit(0, 0, 1, 0, 0),
        Hello("a", "61", PROTOCOL),
    ],
    ids=lambda message: type(message).__name__,
)
def test_a_flood_of_any_message_is_dropped(desk: Desk, message: Message) -> None:
    quotas = Quotas(desk.config, MANIFEST)
    taken = flood(desk, peer_of("a"), message, 2000)
    assert taken >= quotas.burst / (quotas.window + 8) / 2
    assert "that nothing asked for" in desk.of(Drop)[0].reason
    desk.say("b", Heartbeat(0.0, 0, 0, "training"))
    assert not desk.of(Drop), "what one says is not held against the others"


@pytest.mark.parametrize("greeted", [False, True])
def test_a_flood_of_chunks_that_nobody_granted_is_dropped(desk: Desk, greeted: bool) -> None:
    payload = memoryview(bytes(1024))
    chunk = Chunk(0, 0, 0, 0, wire.checksum(payload))
    peer = peer_of("c" if not greeted else "a")
    assert flood(desk, peer, chunk, 2000, payload=payload) > 100


def test_chunks_within_the_credit_cost_nothing() -> None:
    def desk() -> Desk:
        desk = Desk(2)
        desk.gather("a", "b")
        desk.say("a", Offer(0, 0, 1200, 10, 1, 0.5))
        return desk

    beat, payload = Heartbeat(0.0, 0, 0, "training"), bytes(1024)
    allowed = flood(desk(), peer_of("a"), beat, 2000) - 1
    exhausted = desk()
    for _ in range(allowed - 1):
        exhausted.say("a", beat)
    exhausted.say("a", Chunk(0, 0, 0, 0, wire.checksum(memoryview(payload))), payload)
    exhausted.say("a", beat)
    assert not exhausted.of(Drop)
    exhausted.say("a", beat)
    assert exhausted.of(Drop)


def test_a_probe_too_many_is_refused_and_a_flood_of_them_dropped() -> None:
    desk = Desk()
    probe = Probe(1, MAX_PROBE_BYTES)
    taken = 0
    while isinstance(desk.say("p", probe)[0], Probed):
        taken += 1
    assert taken == pytest.approx((2 << 30) / (MAX_PROBE_BYTES + 4096), abs=1)
    assert desk.to("p") == [Refused("more probes than 2 GiB, or 16 MiB a second; try again later")]
    assert not desk.of(Drop)
    flood(desk, peer_of("p"), probe, 2000)


def test_a_client_is_not_let_in_again_for_a_while_and_longer_each_time() -> None:
    desk = Desk()
    known(desk, "a")
    known(desk, "b")
    for offence, seconds in enumerate((10.0, 20.0, 40.0), 1):
        desk.handle(Malformed(peer_of("a"), "no", "a"))
        assert desk.of(Drop) == [Drop(peer_of("a"), "no", "a", seconds)]
        assert f"not let in for {seconds:g} s" in desk.of(Note)[0].text
        assert (f"offence number {offence}" in desk.of(Note)[0].text) == (offence > 1)
        desk.handle(Received(b"another", Envelope("", 0, Hello("a", "62", PROTOCOL)), "a"), after_s=1.0)
        assert desk.effects == [Drop(b"another", "not let in yet", "a", seconds - 1.0)], "nor by another connection"
        desk.handle(Malformed(b"another", "no", "a"))
        assert desk.effects == [Drop(b"another", "not let in yet", "a", seconds - 1.0)], "which is not counted"
        desk.now += seconds
        known(desk, "a")
        assert desk.coordinator.clients == ["a", "b"]
        known(desk, "b")


def test_with_one_connection_of_a_client_all_its_sessions_end() -> None:
    desk = Desk()
    known(desk, "a")
    known(desk, "b")
    desk.handle(Malformed(b"another", "no", "a"))
    assert desk.of(Drop) == [Drop(b"another", "no", "a", 10.0)]
    assert [note.client for note in desk.of(Note) if note.kind == "dropped"] == ["a"]
    assert desk.coordinator.clients == ["b"]


def test_the_names_of_strangers_do_not_fill_the_record() -> None:
    desk = Desk()
    for number in range(3000):
        desk.handle(Malformed(b"%d" % number, "no"))
        assert desk.of(Drop)
    assert len(desk.notes) < 30
    assert desk.notes[-1].text == "a stranger broke the protocol: no; offence number 2048 of those without a key"


def test_names_that_nothing_proves_do_not_fill_the_record() -> None:
    """Nor do they take memory: anybody on an unencrypted connection may choose any."""
    desk = Desk()
    for number in range(3000):
        desk.now += 1.0
        desk.handle(Received(b"%d" % number, Envelope("", 0, Hello(f"n{number}", f"{number:x}", PROTOCOL))))
        desk.handle(Malformed(b"%d" % number, "no"))
        assert desk.of(Note)[-1].kind == "dropped", "what follows from it follows"
    assert sum(note.told for note in desk.notes if note.kind == "dropped") < 30
    assert len(desk.coordinator._conduct._offences._tally._counts) == 1


def test_one_clients_comings_and_goings_do_not_fill_the_record() -> None:
    desk = Desk()
    for _ in range(1000):
        desk.now += 1.0
        known(desk, "a")
        desk.handle(Received(peer_of("a"), Envelope(RUN, 1, Leave("x" * 1000)), "a"))
    assert [note.kind for note in desk.notes] == ["joined", "left"] * 1000
    told = [note for note in desk.notes if note.told]
    assert told[:100] == desk.notes[:100]
    assert len(told) == 104, "and the 128th, 256th, 512th, 1024th"
    assert told[-1].text.endswith("; number 1024 of such events, of which few are told")
    assert max(len(note.text) for note in desk.notes[:100]) == 200
    known(desk, "b")
    assert desk.notes[-1].told, "each client has its own count"


def test_nor_does_what_they_do_to_the_quorum() -> None:
    desk = Desk(quorum=2)
    desk.gather("a", "b")
    for _ in range(500):
        desk.now += 1.0
        desk.say("a", Heartbeat(desk.now, 0, 0, "training"))
        desk.say("b", Leave("for a moment"))
        desk.gather("b")
    changes = [note for note in desk.notes if note.kind == "quorum"]
    assert len(changes) == 1000
    assert [note.told for note in changes[:100]] == [True] * 100
    assert sum(note.told for note in changes) == 103, "and the 128th, 256th and 512th"


def test_a_reason_that_quotes_what_came_still_fits_into_a_message() -> None:
    desk = Desk()
    desk.handle(Malformed(b"a", "x" * 5000))
    assert wire.decode([bytes(frame) for frame in desk.of(Send)[0].envelope.frames])
