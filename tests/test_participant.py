"""The participant by itself: the conversation, what is kept over a new greeting, what may be trained, how it ends."""

from __future__ import annotations

from typing import Any, TypeVar

import pytest

from parablock import wire
from parablock.agenda import Turn
from parablock.conversation import EXPECTED, State
from parablock.layout import Layout
from parablock.messages import (
    PROTOCOL,
    Abstain,
    Chunk,
    Commit,
    Credit,
    Dealt,
    Evaluated,
    Goodbye,
    Heartbeat,
    Hello,
    Join,
    Keys,
    Leave,
    Message,
    Offer,
    Refused,
    Rejected,
    Rejoin,
    Roll,
    Start,
    Stopped,
    Terms,
    Waiting,
    Welcome,
)
from parablock.participant import Participant
from parablock.participant_events import (
    Arrived,
    Contribute,
    Dismissed,
    Dropped,
    Effect,
    End,
    Event,
    Finish,
    Gone,
    Mask,
    Notice,
    Prepare,
    Prepared,
    Progress,
    Ready,
    Received,
    Say,
    Send,
    SitOut,
    Started,
    Tick,
    Took,
    Uploaded,
    Wait,
    Withhold,
)
from parablock.sum_member import Occasion, SumMember
from parablock.transfer import Encoded
from parablock.wire import Envelope
from tests.network import BASE, RUN, SIZES, TOKENIZER, config_of, manifest_of

E = TypeVar("E")
MANIFEST = manifest_of()
NBYTES = [4 * size for size in SIZES]
EVALUATED = Evaluated(0, ("",), (1,), (0.5,), (1,), (0,), (0,))
ANNOUNCED: dict[str, Any] = {"schedule": {"order": "importance"}}


class Seat:
    """A participant with rounds 0, 1, 2, ... on blocks 0, 1, 2, 3, 0, ..., and what it does."""

    def __init__(self, patience_s: float = 60.0, session: str = "5e55", **config: Any) -> None:
        self.now = 100.0
        self.config = config_of(2, 8, **config)
        self.participant = Participant("a", session, patience_s, self.now)
        self.effects: list[Effect] = []  # of the last event
        self.taken: dict[tuple[int, int], list[bytes]] = {}  # by round and attempt: chunks

    def handle(self, event: Event, after_s: float = 0.0) -> list[Message]:
        """An event; what is said to the broker."""
        self.now += after_s
        self.effects = self.participant.handle(event, self.now)
        return [effect.envelope.message for effect in self.effects if isinstance(effect, Send)]

    def hear(self, *messages: Message, run: str = RUN, epoch: int = 1) -> list[Message]:
        said = []
        for message in messages:
            said = self.handle(Received(Envelope(run, epoch, message)))
            self._keep()
        return said

    def of(self, kind: type[E]) -> list[E]:
        return [effect for effect in self.effects if isinstance(effect, kind)]

    def prepared(self) -> list[Message]:
        return self.handle(Prepared(self.config, MANIFEST, BASE, TOKENIZER, 10))

    def chunk(
        self, round: int, offset: int, nbytes: int, fill: int = 0, block: int | None = None, attempt: int = 1
    ) -> list[Message]:
        payload = memoryview(bytes([fill]) * nbytes)
        header = Chunk(round, round % 4 if block is None else block, attempt, offset, wire.checksum(payload))
        said = self.handle(Received(Envelope(RUN, 1, header, payload)))
        self._keep()
        return said

    def _keep(self) -> None:
        """Keep what was taken, as the model's process does: in order, each chunk once, until it is dropped."""
        for effect in self.effects:
            if isinstance(effect, Took):
                chunks = self.taken.setdefault((effect.round, effect.attempt), [])
                assert effect.index == len(chunks)
                chunks.append(bytes(effect.payload))
            elif isinstance(effect, Dropped):
                del self.taken[effect.round, effect.attempt]

    def contribute(self, round: int, fill: int = 0) -> list[Message]:
        """All of a contribution, the chunks of which are ready at once."""
        said = self.handle(Contribute(round, round % 4, 7, 1, 0.5))
        effects = self.effects
        for offset in range(0, NBYTES[round % 4], 1024):
            said += self.ready(round, min(1024, NBYTES[round % 4] - offset), fill)
            effects += self.effects
        self.effects = effects
        return said

    def ready(self, round: int, nbytes: int, fill: int = 0) -> list[Message]:
        """The next chunk of a contribution is encoded."""
        return self.handle(Ready(round, Encoded(memoryview(bytes([fill]) * nbytes))))

    def land(self, round: int, counted: bool = True, contributors: int = 2) -> None:
        """A commit and its whole block."""
        self.hear(Commit(round, round % 4, 1, -1, NBYTES[round % 4], contributors, counted))
        for offset in range(0, NBYTES[round % 4], 1024):
            self.chunk(round, offset, min(1024, NBYTES[round % 4] - offset), fill=round + 1)

    def confirm(self, round: int) -> list[Message]:
        return self.hear(Credit(round, round % 4, 0, NBYTES[round % 4], NBYTES[round % 4]))

    def greet(self, start: Start) -> None:
        """From calling to training."""
        self.hear(Terms("{}", "a"), Welcome(2), start)


@pytest.fixture
def seat() -> Seat:
    """In training from round 0 on."""
    seat = Seat()
    seat.handle(Tick())
    seat.hear(Terms("{}", "a"))
    seat.prepared()
    seat.hear(Welcome(2), Start(0, 2, 0, ()))
    assert seat.participant.state is State.TRAINING
    return seat


def kinds(messages: list[Message]) -> list[type[Any]]:
    return [type(message) for message in messages]


# Joining


def test_the_conversation_up_to_the_start() -> None:
    seat = Seat()
    participant = seat.participant
    assert seat.handle(Tick()) == [Hello("a", "5e55", PROTOCOL)]
    assert seat.hear(Terms('{"rounds": 8}', "a")) == []
    assert seat.of(Prepare) == [Prepare('{"rounds": 8}', "a")]
    assert participant.state is State.PREPARING
    assert seat.prepared() == [Join(MANIFEST.digest, BASE, TOKENIZER, 10, (0, 0, 0, 0), -1)]
    assert participant.state is State.JOINING
    seat.hear(Welcome(1))
    assert participant.state is State.WAITING
    assert seat.of(Notice) == [Notice("on the roster (1 so far); waiting for the start")]
    assert not participant.may_train(0)
    assert seat.hear(Start(0, 2, 0, ())) == [Heartbeat(seat.now, -1, 0, "training")]
    assert seat.of(Started) == [Started(0, 2, 0)]
    assert participant.may_train(0)


def calls(seat: Seat, until_s: float) -> tuple[list[float], list[str]]:
    """When it calls, in seconds from now on, while nobody answers, and what its user hears."""
    began, at, told = seat.now, list[float](), list[str]()
    while (due := seat.participant.deadline()) <= began + until_s:
        at += [due - began for said in seat.handle(Tick(), after_s=due - seat.now) if isinstance(said, Hello)]
        told += [notice.text for notice in seat.of(Notice)]
    return at, told


def test_a_call_is_repeated_until_it_is_answered_and_the_user_is_told_once() -> None:
    seat = Seat()
    assert seat.handle(Tick()) == [Hello("a", "5e55", PROTOCOL)]
    at, told = calls(seat, 20.0)
    assert len(at) >= 4
    assert told == ["the broker does not answer yet; waiting for it"]
    seat.hear(Terms("{}", "a"))
    assert seat.of(Notice) == [Notice("the broker is back")]


def test_calls_become_rare_each_worker_at_its_own_times_and_quick_again_when_the_broker_was_heard() -> None:
    seat, other = Seat(patience_s=1800.0), Seat(patience_s=1800.0, session="0the")
    seat.handle(Tick())
    other.handle(Tick())
    at, _ = calls(seat, 1000.0)
    waits = [after - before for before, after in zip([0.0, *at], at, strict=False)]
    longest = [1.0, 2.0, 4.0, 8.0, 16.0, *[30.0] * (len(waits) - 5)]
    assert len(waits) > 30
    assert all(0.5 * most <= wait <= most for wait, most in zip(waits, longest, strict=True))
    assert len({round(wait, 3) for wait in waits[5:]}) > 20
    assert calls(other, 1000.0)[0] != at
    seat.now += 1.0
    assert kinds(seat.hear(Terms("{}", "a"), Rejoin("who are you?"))) == [Hello]
    assert calls(seat, 1.0)[0] != []


def test_a_call_that_nobody_answers_is_given_up_when_the_patience_ends() -> None:
    """Not with the next call, which may be half a minute away."""
    seat = Seat(patience_s=60.0)
    seat.handle(Tick())
    began = seat.now
    while not seat.of(Gone):
        seat.handle(Tick(), after_s=seat.participant.deadline() - seat.now)
    assert seat.now == pytest.approx(began + 60.0)


def test_a_join_is_repeated_until_it_is_answered() -> None:
    seat = Seat()
    seat.hear(Terms("{}", "a"))
    seat.prepared()
    assert kinds(seat.handle(Tick(), after_s=1.0)) == [Join, Heartbeat]
    assert kinds(seat.handle(Tick(), after_s=1.0)) == [Join, Heartbeat]
    seat.hear(Start(0, 2, 0, ()))
    assert seat.participant.state is State.TRAINING, "the welcome was lost"


def test_heartbeats_say_where_training_is(seat: Seat) -> None:
    seat.handle(Progress(3, 5))
    assert seat.handle(Tick(), after_s=1.0) == [Heartbeat(seat.now, 3, 5, "training")]
    assert seat.participant.deadline() == seat.now + 1.0


def test_a_heartbeat_while_preparing_keeps_the_session() -> None:
    seat = Seat()
    seat.hear(Terms("{}", "a"))
    assert seat.handle(Tick(), after_s=2.0) == [Heartbeat(seat.now, -1, 0, "preparing")]


@pytest.mark.parametrize("state", list(State))
def test_what_is_not_expected_is_passed_over(state: State) -> None:
    messages = [
        Terms("{}", "a"), Welcome(1), Start(0, 2, 0, ()), Commit(0, 0, 0, -1, 0, 0, False), Credit(0, 0, 0, 0, 0),
        Rejected(0, ""), Heartbeat(0.0, 0, 0, "running"), Rejoin(""), Goodbye(""), Refused(""), Stopped("", False),
        Hello("b", "b0", PROTOCOL),
    ]  # fmt: skip
    for message in messages:
        if state not in EXPECTED.get(type(message), ()):
            seat = Seat()
            seat.participant.state = state
            seat.hear(message)
            assert seat.effects == []
            assert seat.participant.state is state


@pytest.mark.parametrize(("run", "epoch"), [(RUN, 0), (RUN, 2), ("run-0", 1)])
def test_what_another_epoch_says_is_passed_over(seat: Seat, run: str, epoch: int) -> None:
    assert seat.hear(Commit(0, 0, 1, -1, NBYTES[0], 1, False), run=run, epoch=epoch) == []
    assert seat.participant.told == 0


# Contributions


def test_a_contribution_goes_up_within_its_credit(seat: Seat) -> None:
    said = seat.contribute(3, fill=7)
    assert said[0] == Offer(3, 3, 2560, 7, 1, 0.5)
    assert [m.offset for m in said[1:] if isinstance(m, Chunk)] == [0, 1024], "two chunks are the window"
    (third,) = seat.hear(Credit(3, 3, 0, 1024, 2560))
    assert isinstance(third, Chunk)
    assert (third.offset, third.checksum) == (2048, wire.checksum(memoryview(bytes([7]) * 512)))
    assert seat.hear(Credit(3, 2, 0, 2560, 2560)) == [], "of another block"
    assert seat.hear(Credit(3, 3, 1, 2560, 2560)) == [], "of a block on its way down"
    assert seat.hear(Credit(2, 2, 0, 0, 0)) == [], "of a round that was not contributed to"
    began, seat.now = seat.now, seat.now + 2.0
    assert seat.confirm(3) == []
    assert seat.of(Uploaded) == [Uploaded(3, began, began + 2.0)]
    assert seat.confirm(3) == []
    assert not seat.of(Uploaded), "told once"


def test_an_upload_without_progress_is_resumed(seat: Seat) -> None:
    seat.contribute(3)
    seat.hear(Credit(3, 3, 0, 1024, 2560))
    assert seat.participant.deadline() == seat.now + 1.0
    seat.handle(Tick(), after_s=1.5)
    said = seat.handle(Tick(), after_s=1.5)
    assert [getattr(message, "offset", message) for message in said[1:]] == [Offer(3, 3, 2560, 7, 1, 0.5), 1024, 2048]
    seat.confirm(3)
    assert kinds(seat.handle(Tick(), after_s=4.0)) == [Heartbeat]


def test_an_impossible_credit_ends_the_session(seat: Seat) -> None:
    seat.contribute(0)
    seat.hear(Credit(0, 0, 0, 0, 9999))
    (gone,) = seat.of(Gone)
    assert gone.end is End.REFUSED
    assert "the broker broke the protocol: credit of 0 held, up to 9999" in gone.reason


def test_that_training_stands_still_is_said_at_once_and_until_it_need_not(seat: Seat) -> None:
    assert seat.handle(Wait(1)) == [Waiting(1)]
    assert kinds(seat.handle(Tick(), after_s=1.0)) == [Waiting, Heartbeat]
    seat.land(0)
    assert kinds(seat.handle(Tick(), after_s=1.0)) == [Waiting, Heartbeat], "that was another round"
    seat.land(1)
    assert kinds(seat.handle(Tick(), after_s=1.0)) == [Heartbeat]


def test_who_trains_does_not_wait(seat: Seat) -> None:
    seat.handle(Wait(1))
    seat.handle(Progress(2, 1))
    assert kinds(seat.handle(Tick(), after_s=1.0)) == [Heartbeat]


def test_that_training_stands_still_a_new_session_hears_of(seat: Seat) -> None:
    seat.hear(Rejoin("who are you?"))
    assert seat.handle(Wait(1)) == [], "nobody listens"
    seat.hear(Terms("{}", "a"), Welcome(2))
    assert Waiting(1) in seat.hear(Start(0, 2, 0, ()))


def test_a_contribution_to_a_closed_round_is_told_and_not_sent(seat: Seat) -> None:
    seat.hear(Commit(0, 0, 0, -1, 0, 0, False))
    assert seat.contribute(0) == [Offer(0, 0, 1200, 7, 1, 0.5)], "the broker counts it as late"
    assert seat.of(Dismissed) == [Dismissed(0, "the round was closed before the contribution was ready")]


def test_what_is_said_again_of_an_empty_round_before_the_start_of_another_session_is_no_news(seat: Seat) -> None:
    """It comes late, from the session before, which had ended when an earlier round was not yet heard of."""
    empty = Commit(1, 1, 0, -1, 0, 0, False)
    seat.hear(empty)
    assert [arrived.round for arrived in seat.of(Arrived)] == [1]
    seat.hear(Rejoin("say Hello again"), Terms("{}", "a"), Welcome(2))
    assert seat.hear(empty) == [Credit(1, 1, 0, 0, 0)]
    assert seat.of(Arrived) == []
    seat.hear(Start(0, 2, 2, (0,)))
    assert not seat.participant.arrived_through(0), "that one is still to come"
    seat.hear(Commit(0, 0, 0, -1, 0, 0, False))
    assert seat.participant.arrived_through(1)


def test_a_commit_that_does_not_count_us_ends_the_upload_and_is_told(seat: Seat) -> None:
    seat.contribute(3)
    seat.hear(Commit(3, 3, 1, -1, 2560, 1, False))
    assert seat.of(Dismissed) == [Dismissed(3, "the round was closed without it")]
    assert seat.hear(Credit(3, 3, 0, 1024, 2560)) == []
    seat.hear(Rejected(3, "too late"))
    assert not seat.of(Dismissed), "told once"


def test_a_commit_that_counts_us_ends_the_upload(seat: Seat) -> None:
    seat.contribute(0)
    seat.hear(Commit(0, 0, 1, -1, 1200, 2, True))
    assert not seat.of(Dismissed)
    assert kinds(seat.handle(Tick(), after_s=4.0)) == [Heartbeat], "our offer is not repeated"


def test_a_rejection_is_told_also_when_all_of_it_was_uploaded(seat: Seat) -> None:
    seat.contribute(0)
    seat.confirm(0)
    seat.hear(Rejected(0, "it holds values that are not finite"))
    assert seat.of(Dismissed) == [Dismissed(0, "it holds values that are not finite")]
    seat.hear(Commit(0, 0, 1, -1, 1200, 1, False))
    assert not seat.of(Dismissed)


def test_withholding_is_said_until_the_round_is_closed(seat: Seat) -> None:
    assert seat.handle(Withhold(0, "diverged")) == [Abstain(0, "diverged")]
    assert kinds(seat.handle(Tick(), after_s=1.0)) == [Abstain, Heartbeat]
    seat.hear(Commit(0, 0, 0, -1, 0, 0, False))
    assert kinds(seat.handle(Tick(), after_s=1.0)) == [Heartbeat]
    assert seat.handle(Withhold(0, "diverged")) == [], "of a closed round"


def test_reports_are_passed_on_in_training_only(seat: Seat) -> None:
    assert seat.handle(Say(EVALUATED)) == [EVALUATED]
    seat.hear(Rejoin("who are you?"))
    assert seat.handle(Say(EVALUATED)) == []


# Blocks


def test_a_block_arrives_in_chunks(seat: Seat) -> None:
    assert seat.hear(Commit(3, 3, 1, -1, 2560, 2, True)) == [Credit(3, 3, 1, 0, 2048)]
    assert seat.chunk(3, 1024, 1024) == [Credit(3, 3, 1, 0, 2048)], "too early: the first one was lost"
    assert seat.chunk(3, 0, 1024, block=2) == [], "of another block"
    assert seat.chunk(3, 0, 1024, fill=1) == [Credit(3, 3, 1, 1024, 2560)]
    assert seat.hear(Commit(3, 3, 1, -1, 2560, 2, True)) == [Credit(3, 3, 1, 1024, 2560)], "repeated: go on from here"
    began, seat.now = seat.now, seat.now + 1.0
    seat.chunk(3, 1024, 1024, fill=2)
    assert seat.chunk(3, 2048, 512, fill=3) == [Credit(3, 3, 1, 2560, 2560)]
    (arrived,) = seat.of(Arrived)
    assert b"".join(seat.taken[3, 1]) == b"\1" * 1024 + b"\2" * 1024 + b"\3" * 512
    assert (arrived.round, arrived.block, arrived.contributors, arrived.counted) == (3, 3, 2, True)
    assert (arrived.attempt, arrived.base) == (1, -1)
    assert (arrived.began, arrived.ended) == (began, began + 1.0)
    assert seat.chunk(3, 2048, 512, fill=3) == [], "repeated"
    assert seat.hear(Commit(3, 3, 1, -1, 2560, 2, True)) == [Credit(3, 3, 1, 2560, 2560)], "our last grant was lost"
    assert not seat.of(Arrived)


def test_a_round_that_changed_nothing_arrives_at_once(seat: Seat) -> None:
    assert seat.hear(Commit(0, 0, 0, -1, 0, 0, False)) == [Credit(0, 0, 0, 0, 0)]
    (arrived,) = seat.of(Arrived)
    assert (arrived.contributors, seat.taken) == (0, {})


@pytest.mark.parametrize(
    "commit",
    [
        Commit(0, 4, 1, -1, 1200, 1, False),
        Commit(0, 0, 1, -1, 1204, 1, False),
        Commit(0, 0, 1, -1, 1200, 0, False),
        Commit(0, 0, 1, -1, 0, 1, True),
    ],
    ids=["no such block", "wrong size", "bytes of nobody", "no bytes of somebody"],
)
def test_a_commit_that_does_not_fit_the_manifest_ends_the_session(seat: Seat, commit: Commit) -> None:
    seat.hear(commit)
    (gone,) = seat.of(Gone)
    assert gone.end is End.REFUSED
    assert "not in the manifest" in gone.reason
    assert seat.hear(Commit(0, 0, 0, -1, 0, 0, False)) == [], "it has gone"


def test_a_chunk_that_does_not_fit_ends_the_session(seat: Seat) -> None:
    seat.hear(Commit(0, 0, 1, -1, 1200, 1, False))
    seat.chunk(0, 0, 1000)
    (gone,) = seat.of(Gone)
    assert gone.end is End.REFUSED
    assert "the broker broke the protocol: a chunk of 1000 bytes at 0" in gone.reason


@pytest.mark.parametrize("in_flight", [0, 1, 2])
def test_training_waits_for_all_but_the_rounds_in_flight(in_flight: int) -> None:
    mode = {"mode": "parablock", "pipeline": {"max_in_flight": in_flight}} if in_flight else {"mode": "fedbcd"}
    seat = Seat(**mode)
    seat.hear(Terms("{}", "a"))
    seat.prepared()
    seat.hear(Start(0, 2, 0, ()))
    participant = seat.participant
    assert participant.may_train(in_flight)
    assert not participant.may_train(in_flight + 1)
    seat.land(1)
    assert participant.told == 2
    assert not participant.may_train(in_flight + 1), "round 1 has overtaken round 0"
    seat.land(0)
    assert participant.may_train(in_flight + 2)
    assert not participant.may_train(in_flight + 3)
    assert participant.arrived_through(1)
    assert not participant.arrived_through(2)


def test_a_late_worker_waits_for_the_blocks_that_it_lacks() -> None:
    seat = Seat()
    seat.hear(Terms("{}", "a"))
    seat.prepared()
    seat.land(4)
    assert len(seat.of(Arrived)) == 1, "before the start"
    seat.hear(Start(7, 3, 5, (3, 4)))
    participant = seat.participant
    assert not participant.may_train(5), "round 3 is missing"
    seat.land(3)
    assert participant.may_train(6)
    assert not participant.may_train(7), "round 5 is not committed"
    seat.land(5)
    assert participant.may_train(7)
    assert seat.hear(Commit(2, 2, 1, -1, NBYTES[2], 1, False)) == [Credit(2, 2, 1, NBYTES[2], NBYTES[2])]
    assert not seat.of(Arrived), "a late copy from before our start"


def test_a_commit_that_overtakes_the_start_is_not_forgotten() -> None:
    seat = Seat()
    seat.hear(Terms("{}", "a"))
    seat.prepared()
    seat.land(0)
    seat.land(1)
    seat.hear(Start(0, 2, 0, ()))
    assert seat.participant.told == 2
    assert seat.participant.arrived_through(1)
    assert not seat.participant.arrived_through(2)


# Joining again


def test_joining_again_says_what_is_held_and_needs_no_preparation(seat: Seat) -> None:
    seat.land(0)
    seat.land(1)
    seat.now += 1.0
    assert seat.hear(Rejoin("who are you?")) == [Hello("a", "5e55", PROTOCOL)]
    assert seat.of(Notice) == [Notice("joining again: who are you?")]
    assert not seat.participant.may_train(0)
    assert seat.hear(Terms("{}", "a"), epoch=2) == [Join(MANIFEST.digest, BASE, TOKENIZER, 10, (1, 2, 0, 0), 0)]
    assert seat.hear(Start(4, 2, 2, ()), epoch=1) == [], "of the old epoch"
    seat.hear(Welcome(2), Start(4, 2, 3, (2,)), epoch=2)
    assert seat.of(Started) == [Started(4, 2, 3, pending=(2,))]


def test_told_to_join_again_and_again_it_calls_once_a_second(seat: Seat) -> None:
    """A call that comes twice, the second time when it has started, ends its session, and so on for ever."""
    seat.now += 1.0
    for _ in range(3):
        assert seat.hear(Rejoin("who are you?")) == [Hello("a", "5e55", PROTOCOL)]
        for _ in range(3):
            assert kinds(seat.hear(Terms("{}", "a"))) == [Join]
            assert seat.hear(Rejoin("who are you?")) == []
            assert seat.participant.deadline() == seat.now + 1.0
        seat.hear(Terms("{}", "a"), Welcome(2), Start(0, 2, 0, ()))
        assert seat.hear(Rejoin("who are you?")) == []
        assert seat.handle(Tick(), after_s=0.9) == []
        assert seat.handle(Tick(), after_s=0.1) == [Hello("a", "5e55", PROTOCOL)]
        seat.hear(Terms("{}", "a"), Welcome(2), Start(0, 2, 0, ()))
        seat.now += 1.0


def test_a_rejoin_while_it_prepares_loses_nothing() -> None:
    seat = Seat()
    seat.hear(Terms("{}", "a"), Rejoin("who are you?"))
    assert seat.participant.state is State.CALLING
    assert seat.prepared() == [], "after the terms"
    assert kinds(seat.hear(Terms("{}", "a"))) == [Join]


def test_another_run_is_not_joined(seat: Seat) -> None:
    seat.hear(Rejoin("who are you?"))
    seat.hear(Terms("{}", "a"), run="run-2")
    assert seat.of(Gone) == [Gone(End.LOST, f"the broker now serves another run (run-2 instead of {RUN})")]


def test_contributions_are_offered_again_after_a_new_start(seat: Seat) -> None:
    seat.contribute(0)
    seat.confirm(0)
    seat.contribute(1)
    seat.hear(Rejoin("who are you?"))
    assert seat.contribute(2) == [], "when it was ready nobody was there"
    assert seat.handle(Withhold(3, "diverged")) == []
    assert kinds(seat.handle(Tick(), after_s=3.0)) == [Hello]
    seat.hear(Terms("{}", "a"), Welcome(2))
    assert kinds(seat.handle(Tick(), after_s=3.0)) == [Heartbeat]
    said = seat.hear(Start(4, 2, 1, (0,)))
    assert said[:3] == [Offer(1, 1, NBYTES[1], 7, 1, 0.5), Offer(2, 2, NBYTES[2], 7, 1, 0.5), Abstain(3, "diverged")]
    assert kinds(said[3:]) == [Heartbeat], "no chunk before the broker has said what it holds"
    assert [m.offset for m in seat.hear(Credit(1, 1, 0, 0, 2000)) if isinstance(m, Chunk)] == [0, 1024]
    assert [m.offset for m in seat.hear(Credit(2, 2, 0, 1024, 1028)) if isinstance(m, Chunk)] == [1024]
    seat.hear(Rejected(2, "too late"))
    assert seat.of(Dismissed) == [Dismissed(2, "too late")]
    seat.hear(Rejected(0, "too late"))
    assert not seat.of(Dismissed), "round 0 was committed, with us or without"


def test_one_answer_after_a_new_start_sets_free_no_other_contribution() -> None:
    seat = Seat(window=8192)
    seat.handle(Tick())
    seat.hear(Terms("{}", "a"))
    seat.prepared()
    seat.hear(Welcome(2), Start(0, 2, 0, ()))
    seat.contribute(0)
    seat.contribute(1)
    seat.hear(Rejoin("who are you?"))
    seat.greet(Start(0, 2, 0, ()))
    said = seat.hear(Credit(0, 0, 0, 1024, 1200))
    assert [(m.round, m.offset) for m in said if isinstance(m, Chunk)] == [(0, 1024)], "of round 1 it may hold more"
    said = seat.hear(Credit(1, 1, 0, 1024, 2000))
    assert [(m.round, m.offset) for m in said if isinstance(m, Chunk)] == [(1, 1024)]


def test_what_was_uploaded_is_not_told_twice(seat: Seat) -> None:
    seat.contribute(0)
    seat.confirm(0)
    seat.hear(Rejoin("who are you?"))
    seat.greet(Start(0, 2, 0, ()))
    seat.confirm(0)
    assert not seat.of(Uploaded)


def test_rounds_that_will_not_be_trained_are_given_up(seat: Seat) -> None:
    """The broker, short of clients, may start us at a round that we have left behind; it must not wait for us."""
    seat.contribute(0)
    seat.hear(Rejected(0, "not finite"))
    seat.contribute(1)
    seat.hear(Rejoin("who are you?"), Terms("{}", "a"), Welcome(2))
    said = seat.hear(Start(0, 2, 0, ()))
    assert Abstain(0, "the worker had gone on to later rounds") in said
    assert [message.round for message in said if isinstance(message, Offer)] == [1]


def test_a_start_that_was_taken_holds_also_after_an_earlier_one(seat: Seat) -> None:
    seat.hear(Rejoin("who are you?"))
    seat.greet(Start(2, 2, 0, ()))
    seat.hear(Rejoin("who are you?"), Terms("{}", "a"), Welcome(2))
    assert [m for m in seat.hear(Start(1, 2, 0, ())) if isinstance(m, Abstain)] == [
        Abstain(1, "the worker had gone on to later rounds")
    ]


def test_the_times_are_those_of_the_present_broker(seat: Seat) -> None:
    """They may change when a run is resumed; a client that said too little to the new one was lost, time and again."""
    seat.hear(Rejoin("who are you?"), epoch=2)
    seat.hear(Terms('{"network": {"heartbeat_s": 0.5, "timeout_s": 2.0, "resend_s": 0.75}}', "a"), Welcome(2), epoch=2)
    seat.hear(Start(0, 2, 0, ()), epoch=2)
    assert seat.participant.deadline() == seat.now + 0.5
    seat.contribute(0)
    assert kinds(seat.handle(Tick(), after_s=0.75)) == [Heartbeat, Offer, Chunk, Chunk]
    seat.handle(Tick(), after_s=1.25)
    assert seat.of(Notice) == [Notice("nothing heard from the broker for 2 s; waiting for it")]


@pytest.mark.parametrize("terms", ["{", "[]", '{"rounds": 0}', "[" * 100_000], ids=["torn", "list", "zero", "nested"])
def test_a_broker_with_impossible_settings_is_left(seat: Seat, terms: str) -> None:
    seat.hear(Rejoin("who are you?"), Terms(terms, "a"))
    (gone,) = seat.of(Gone)
    assert gone.end is End.REFUSED
    assert "the broker's settings cannot be: " in gone.reason


def test_a_download_is_resumed_in_a_new_session(seat: Seat) -> None:
    seat.hear(Commit(3, 3, 1, -1, 2560, 2, True))
    seat.chunk(3, 0, 1024, fill=1)
    seat.hear(Commit(2, 2, 1, -1, NBYTES[2], 2, True))
    seat.chunk(2, 0, 1024, fill=1)
    seat.hear(Rejoin("who are you?"))
    assert seat.chunk(3, 1024, 1024, fill=2) == [], "nobody has announced it in this session"
    seat.greet(Start(6, 2, 4, (0, 1, 3)))
    assert seat.hear(Commit(3, 3, 1, -1, 2560, 2, True)) == [Credit(3, 3, 1, 1024, 2560)]
    seat.chunk(3, 1024, 1024, fill=2)
    seat.chunk(3, 2048, 512, fill=3)
    (arrived,) = seat.of(Arrived)
    assert (arrived.round, arrived.attempt) == (3, 1)
    assert b"".join(seat.taken[3, 1]) == b"\1" * 1024 + b"\2" * 1024 + b"\3" * 512


def test_a_block_that_is_held_does_not_arrive_again(seat: Seat) -> None:
    seat.land(0)
    seat.hear(Rejoin("who are you?"), Terms("{}", "a"), Welcome(2))
    said = seat.hear(Commit(0, 0, 1, -1, 1200, 2, True))
    assert said == [Credit(0, 0, 1, 1200, 1200)], "the broker had an older join of us"
    assert not seat.of(Arrived)
    seat.hear(Start(1, 2, 1, (0,)))
    assert seat.participant.may_train(1)


def test_a_repeated_start_is_passed_over(seat: Seat) -> None:
    assert seat.hear(Start(0, 2, 0, ())) == []
    assert seat.effects == []


def test_a_start_of_another_session_makes_it_join_again(seat: Seat) -> None:
    seat.now += 1.0
    assert kinds(seat.hear(Start(2, 2, 0, ()))) == [Hello]
    assert seat.participant.state is State.CALLING


def test_a_late_start_of_an_earlier_session_is_passed_over(seat: Seat) -> None:
    seat.land(0)
    seat.hear(Rejoin("who are you?"), Terms("{}", "a"))
    assert seat.hear(Start(0, 2, 0, ())) == []
    assert seat.participant.state is State.JOINING, "it would leave out what round 0 has changed"
    seat.hear(Start(3, 2, 1, ()))
    assert seat.participant.state is State.TRAINING
    assert seat.hear(Start(0, 2, 0, ())) == []
    assert seat.participant.state is State.TRAINING


def test_a_broker_with_an_older_journal_is_not_waited_for(seat: Seat) -> None:
    for round in range(3):
        seat.land(round)
    seat.hear(Rejoin("who are you?"))
    seat.hear(Terms("{}", "a"), Welcome(2), Start(2, 2, 2, ()), epoch=2)
    (gone,) = seat.of(Gone)
    assert gone.end is End.REFUSED
    assert "goes on with round 2, but round 2 was announced" in gone.reason
    assert "delete the folder that --state names" in gone.reason
    assert "older" in gone.reason
    assert seat.participant.state is State.GONE


def test_a_late_start_is_passed_over_though_the_broker_was_started_anew_before(seat: Seat) -> None:
    """The new broker itself has said what that start leaves out."""
    seat.land(0)
    seat.hear(Rejoin("who are you?"))
    seat.hear(
        Terms("{}", "a"), Commit(1, 1, 1, -1, NBYTES[1], 2, False), Rejoin("who are you?"), Terms("{}", "a"), epoch=2
    )
    assert seat.hear(Start(1, 2, 1, ()), epoch=2) == []
    assert seat.participant.state is State.JOINING
    seat.hear(Start(2, 2, 2, (1,)), epoch=2)
    assert seat.participant.state is State.TRAINING


def test_what_an_earlier_session_has_begun_goes_with_the_start_that_does_not_want_it(seat: Seat) -> None:
    """It comes before the start, when nobody can say whether it will be completed."""
    seat.land(0)
    seat.hear(Rejoin("who are you?"), Terms("{}", "a"))
    seat.hear(Commit(1, 1, 1, -1, NBYTES[1], 2, False))
    seat.chunk(1, 0, 1024, block=1)
    seat.hear(Start(6, 2, 6, (5,)))
    assert seat.of(Dropped) == [Dropped(1, 1)]


def test_a_late_start_that_is_repeated_has_it_greet_again(seat: Seat) -> None:
    """It came upon old Terms, so that to the broker the earlier session goes on; nothing else would end that."""
    seat.land(0)
    seat.hear(Rejoin("who are you?"), Terms("{}", "a"))
    assert seat.hear(Start(0, 2, 0, ())) == []
    seat.handle(Tick(), after_s=15.0)  # resend_s, by those Terms
    seat.hear(Start(0, 2, 0, ()))
    assert seat.participant.state is State.CALLING
    assert Hello in kinds(seat.handle(Tick(), after_s=1.0))


def test_where_its_own_noise_was_told_a_worker_is_not_sent_to_begin_anew() -> None:
    """It would tell of its rows a second time, with a budget that is whole again."""
    seat = Seat(privacy={"where": "local", "clip": 1.0, "noise": 1.0, "budget": 8.0})
    seat.hear(Terms("{}", "a"))
    seat.prepared()
    seat.hear(Welcome(2), Start(0, 2, 0, ()))
    for round in range(3):
        seat.land(round)
    seat.hear(Rejoin("who are you?"))
    seat.hear(Terms("{}", "a"), Welcome(2), Start(2, 2, 2, ()), epoch=2)
    (gone,) = seat.of(Gone)
    assert "this worker's part in the run ends here" in gone.reason
    assert "delete" not in gone.reason


def test_a_commit_from_an_older_journal_does_not_hide_that_it_is_older(seat: Seat) -> None:
    for round in range(3):
        seat.land(round)
    seat.hear(Rejoin("who are you?"))
    seat.hear(Terms("{}", "a"), Commit(1, 1, 1, -1, NBYTES[1], 2, False), Start(1, 2, 1, ()), epoch=2)
    assert [gone.end for gone in seat.of(Gone)] == [End.REFUSED]


# The end


def test_leaving_waits_for_the_answer(seat: Seat) -> None:
    assert seat.handle(Finish("done")) == [Leave("done")]
    assert seat.participant.state is State.LEAVING
    assert seat.participant.deadline() == seat.now + 1.0
    assert seat.handle(Tick(), after_s=0.5) == []
    assert seat.handle(Tick(), after_s=0.5) == [Leave("done")], "the answer was lost"
    seat.hear(Goodbye("until the next time"))
    assert seat.of(Gone) == [Gone(End.DONE, "left the run")]
    assert seat.handle(Tick(), after_s=9.0) == []
    assert seat.effects == []


def test_a_broker_that_was_restarted_may_say_goodbye(seat: Seat) -> None:
    seat.handle(Finish("done"))
    seat.hear(Goodbye("of another run"), run="run-2", epoch=2)
    assert not seat.of(Gone)
    seat.hear(Goodbye("you were not on the roster"), epoch=2)
    assert seat.of(Gone) == [Gone(End.DONE, "left the run")]


def test_leaving_does_not_wait_for_ever_and_keeps_its_reason(seat: Seat) -> None:
    seat.handle(Finish("interrupted (SIGTERM)"))
    for _ in range(9):
        assert seat.handle(Tick(), after_s=1.0) == [Leave("interrupted (SIGTERM)")]
    seat.handle(Tick(), after_s=1.0)
    assert seat.of(Gone) == [Gone(End.DONE, "left the run (the broker did not answer)")]


def test_what_is_on_its_way_up_ends_with_the_leave(seat: Seat) -> None:
    seat.contribute(0)
    seat.handle(Finish("interrupted (SIGTERM)"))
    for _ in range(4):
        assert kinds(seat.handle(Tick(), after_s=1.0)) == [Leave]


def test_nobody_to_leave() -> None:
    seat = Seat()
    seat.handle(Tick())
    assert seat.handle(Finish("interrupted")) == []
    assert seat.of(Gone) == [Gone(End.DONE, "interrupted")]


@pytest.mark.parametrize(
    ("message", "gone"),
    [
        (Refused("another worker has joined"), Gone(End.REFUSED, "another worker has joined")),
        (Stopped("SIGTERM", False), Gone(End.LOST, "the broker stopped: SIGTERM")),
    ],
)
def test_the_broker_may_end_it_in_any_state(message: Message, gone: Gone) -> None:
    for said in ([], [Terms("{}", "a")], [Terms("{}", "a"), Rejoin("who?")]):
        seat = Seat()
        seat.hear(*said)
        seat.hear(message, run="", epoch=0)
        assert seat.of(Gone) == [gone]


def test_a_broker_that_will_be_back_is_waited_for(seat: Seat) -> None:
    seat.contribute(0)
    seat.hear(Stopped("interrupted (SIGTERM)", returns=True))
    assert seat.of(Gone) == []
    assert seat.of(Notice) == [Notice("the broker stopped: interrupted (SIGTERM); waiting for it to come back")]
    assert Heartbeat in kinds(seat.handle(Tick(), after_s=2.0)), "by which the next one learns of us"
    seat.hear(Rejoin("the broker does not know this session"), epoch=2)
    assert [notice.text for notice in seat.of(Notice)] == [
        "the broker is back",
        "joining again: the broker does not know this session",
    ]


@pytest.mark.parametrize("first", ["the broker", "the worker"])
def test_nobody_waits_for_the_goodbye_of_a_broker_that_has_stopped(seat: Seat, first: str) -> None:
    if first == "the broker":
        seat.hear(Stopped("SIGINT", returns=True))
        assert seat.handle(Finish("interrupted")) == []
    else:
        assert kinds(seat.handle(Finish("interrupted"))) == [Leave]
        seat.hear(Stopped("SIGINT", returns=True))
    assert [gone.end for gone in seat.of(Gone)] == [End.DONE]


def test_a_silent_broker_is_waited_for_with_patience(seat: Seat) -> None:
    notices = []
    while seat.participant.state is not State.GONE:
        due = seat.participant.deadline()
        assert due > seat.now
        assert seat.now < 161.0
        seat.handle(Tick(), after_s=due - seat.now)
        notices += seat.of(Notice)
    assert seat.now == 160.0
    assert notices == [Notice("nothing heard from the broker for 6 s; waiting for it")]
    assert seat.of(Gone) == [Gone(End.LOST, "nothing heard from the broker for 60 s")]


def test_a_silent_broker_is_sent_no_window_again_and_again(seat: Seat) -> None:
    """It would all lie before the next Hello, for the broker that comes after."""
    seat.contribute(0)
    said = []
    while (due := seat.participant.deadline()) < 150.0:
        assert due > seat.now
        said += kinds(seat.handle(Tick(), after_s=due - seat.now))
    assert said.count(Chunk) == 2, "once more, before it was taken for silent"
    seat.hear(Heartbeat(0.0, 0, 0, "running"))
    assert Chunk in kinds(seat.handle(Tick(), after_s=seat.participant.deadline() - seat.now))


def test_a_broker_that_was_never_there_is_given_up_too() -> None:
    seat = Seat(patience_s=3.5)
    for _ in range(4):
        seat.handle(Tick(), after_s=1.0)
    assert seat.of(Gone) == [Gone(End.LOST, "nothing heard from the broker for 3.5 s")]


def test_a_broker_that_is_back_is_welcome(seat: Seat) -> None:
    seat.handle(Tick(), after_s=7.0)
    seat.hear(Heartbeat(0.0, 0, 0, "running"))
    assert seat.of(Notice) == [Notice("the broker is back")]
    seat.handle(Tick(), after_s=59.0)
    assert not seat.of(Gone)


# Rounds that the broker announces


def announced() -> Seat:
    """In training from round 0 on, told of rounds 0 and 1."""
    seat = Seat(**ANNOUNCED)
    seat.handle(Tick())
    seat.hear(Terms("{}", "a"))
    seat.prepared()
    seat.hear(Welcome(2), Start(0, 2, 0, (), (3, 2), (True, False)))
    return seat


def test_it_knows_of_a_round_what_was_announced() -> None:
    seat = announced()
    turns = [seat.participant.turn(round) for round in range(3)]
    assert turns == [Turn(3, True), Turn(2, False), None]
    seat.hear(Commit(0, 3, 1, -1, NBYTES[3], 2, True, (0,), (True,)))
    assert seat.participant.turn(2) == Turn(0, True), "with the commit on which it depends"
    assert not seat.participant.may_train(2), "what round 0 has made is not here"


def test_a_round_of_which_nothing_is_said_is_not_trained() -> None:
    """After a Start of an earlier session, and a Commit of the newest, whose own Start says what comes next."""
    seat = announced()
    seat.hear(Commit(0, 3, 0, -1, 0, 0, False, (), ()))
    assert seat.participant.arrived_through(0)
    assert seat.participant.turn(2) is None
    assert not seat.participant.may_train(2)
    seat.hear(Start(2, 2, 1, (), (2, 0), (False, True)))
    assert seat.participant.state is State.CALLING, "joins anew, for the newest start"


def test_before_its_commit_only_the_announced_block_of_a_round_is_taken() -> None:
    seat = announced()
    seat.chunk(0, 0, 1024, block=1)
    assert seat.of(Took) == []
    seat.chunk(0, 0, 1024, block=3)
    assert [took.block for took in seat.of(Took)] == [3]
    seat.chunk(2, 0, 1024, block=1)
    assert seat.of(Took) == [], "nothing is known of that round"


@pytest.mark.parametrize(("blocks", "trains"), [((3, 4), (True, True)), ((3,), (True, True))])
def test_an_announcement_that_cannot_be_ends_the_session(blocks: tuple[int, ...], trains: tuple[bool, ...]) -> None:
    seat = Seat(**ANNOUNCED)
    seat.handle(Tick())
    seat.hear(Terms("{}", "a"))
    seat.prepared()
    seat.hear(Welcome(2), Start(0, 2, 0, (), blocks, trains))
    (gone,) = seat.of(Gone)
    assert gone.end is End.REFUSED
    assert "the broker announced what cannot be: rounds from 0 on are to train blocks" in gone.reason
    seat = announced()
    seat.hear(Commit(0, 3, 1, -1, NBYTES[3], 2, True, (4,), (True,)))
    assert [gone.end for gone in seat.of(Gone)] == [End.REFUSED]


def test_a_round_that_was_sat_out_is_not_trained_when_a_later_start_asks_for_it() -> None:
    """It has gone on. Whoever waits for it shall not wait for ever."""
    seat = announced()
    seat.handle(SitOut(1))
    seat.handle(Tick(), after_s=2.0)
    assert seat.of(Send)[-1].envelope.message == Heartbeat(seat.now, -1, 0, "training"), "it trains nothing"
    seat.hear(Rejoin("the broker does not know this session"))
    seat.greet(Start(1, 2, 1, (0,), (2, 1), (True, True)))
    said = [effect.envelope.message for effect in seat.of(Send)]
    assert [message.round for message in said if isinstance(message, Abstain)] == [1]


@pytest.mark.parametrize("dealt", [False, True])
def test_a_round_that_an_earlier_process_may_have_given_to_is_not_given_to_with_another_broker(dealt: bool) -> None:
    """This process begins with the same broker as that one, too late for the round's sum, unless it is in it itself."""
    seat = Seat(secure={"enabled": True})
    seat.hear(Terms("{}", "a"))
    seat.prepared()
    seat.hear(Welcome(2), Start(0, 2, 0, ()))
    said = [(effect.envelope.message, effect.envelope.payload) for effect in seat.of(Send)]
    keys = next(bytes(payload or b"") for message, payload in said if message == Keys(0))
    if dealt:
        chunks = Layout.up(seat.config, SIZES[0]).count
        other = SumMember(Occasion(RUN, 1, 0, chunks, seat.config.secure, fewest=2), "b")
        seat.handle(Received(Envelope(RUN, 1, Roll(0, ("a", "b")), memoryview(keys + other.keys))))
        sealed = other.deal(("a", "b"), keys + other.keys)
        seat.handle(Received(Envelope(RUN, 1, Dealt(0, ("a", "b")), memoryview(sealed))))
        assert seat.of(Mask)
    seat.hear(Rejoin("who are you?"))
    seat.hear(Terms("{}", "a"), Welcome(2), epoch=2)
    said = seat.hear(Start(0, 2, 0, ()), epoch=2)
    assert {m.round for m in said if isinstance(m, Abstain)} == (set() if dealt else {0})
    assert (Keys(0) in said) is dealt
    assert Keys(1) in said, "later ones are as any"
