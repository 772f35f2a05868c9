"""One round: when it closes and why, and what it hands to the fold."""

from __future__ import annotations

import itertools

import pytest

from parablock import sections
from parablock.messages import Offer
from parablock.quorum import Quorum
from parablock.rounds import TRANSITIONS, Attempt, Decision, Round, RoundState, Upload, decide
from parablock.sessions import Shipment
from parablock.transfer import Encoded, Incoming, Payload


def upload(*, chunks: int, weight: int = 1, fill: bytes = b"\1") -> Upload:
    """A contribution of two chunks, of which so many are in."""
    upload = Upload("5e55", Offer(0, 0, 16, weight, 1, 0.5), Incoming(16, 8, 1024), 0.0)
    for index in range(chunks):
        piece = memoryview((fill + bytes([index])) * 4)
        assert upload.incoming.take(8 * index, piece)
        upload.pieces.append(piece)
    return upload


def attempt_of(*clients: str, missing: tuple[int, int] = (0, 0)) -> Attempt:
    return Attempt(clients, (), list(missing), Shipment("run-1", 1, 0, 0, 1, Payload(16, 8)))


def round_of(done: str = "", begun: str = "", out: str = "", first_done_at: float | None = None) -> Round:
    uploads = {name: upload(chunks=2 if name in done else 1) for name in done + begun}
    return Round(0, 0, uploads=uploads, done=set(done), out=set(out), first_done_at=first_done_at)


# quorum 2, a deadline of 10 s after t = 100: (members, also present, done, begun, out, now) → (close, reason)
TABLE = {
    "nobody is there": ("", "", "", "", "", 101, False, "0 of at least 2 clients are there"),
    "one of two is there": ("a", "", "", "", "", 101, False, "1 of at least 2 clients are there"),
    "one is there and has answered": ("a", "", "a", "", "", 101, False, "1 of at least 2 clients are there"),
    "nobody has answered": ("ab", "", "", "", "", 101, False, "waiting for a, b"),
    "one has answered": ("ab", "", "a", "", "", 101, False, "waiting for b"),
    "a beginning is no answer": ("ab", "", "a", "b", "", 101, False, "waiting for b"),
    "all have answered": ("ab", "", "ab", "", "", 101, True, "2 of 2 clients have answered"),
    "abstaining is an answer": ("ab", "", "a", "", "b", 101, True, "2 of 2 clients have answered"),
    "all have abstained": ("ab", "", "", "", "ab", 101, True, "2 of 2 clients have answered"),
    "the gone one had answered": ("a", "", "ab", "", "", 101, True, "2 of 2 clients have answered"),
    "the gone one had begun": ("ac", "", "a", "b", "c", 101, True, "2 of 2 clients have answered"),
    "all are gone and had answered": ("", "", "ab", "", "", 101, True, "2 of 2 clients have answered"),
    "a later one makes the quorum": ("a", "b", "a", "", "", 101, True, "1 of 1 clients have answered"),
    "only later ones are there": ("", "ab", "", "", "", 101, True, "0 of 0 clients have answered"),
    "a later one is not waited for": ("ab", "c", "ab", "", "", 101, True, "2 of 2 clients have answered"),
    "just before the deadline": ("abc", "", "ab", "", "", 109.9, False, "waiting for c"),
    "at the deadline": ("abc", "", "ab", "c", "", 110, True, "the deadline of 10 s has passed with 2 contributions"),
    "at the deadline, too few": ("abc", "", "a", "", "", 110, False, "only 1 of 2 contributions are in"),
    "at the deadline, too few and an abstention": ("abc", "", "a", "", "b", 110, False, "only 1 of 2 contributions"),
    "at the deadline, nobody there": ("", "", "a", "", "", 110, False, "1 of at least 2 clients are there"),
}


@pytest.mark.parametrize(
    ("members", "later", "done", "begun", "out", "now", "close", "reason"), TABLE.values(), ids=TABLE.keys()
)
def test_when_a_round_closes_and_why(
    members: str, later: str, done: str, begun: str, out: str, now: float, close: bool, reason: str
) -> None:
    round = round_of(done, begun, out, first_done_at=100.0 if done else None)
    policy = sections.Rounds(deadline_s=10.0, grace=False)
    decision = decide(round, set(members), set(members + later), Quorum(policy, 2), policy, now)
    assert decision.close is close
    assert reason in decision.reason


def test_without_a_deadline_a_round_waits_for_ever() -> None:
    round = round_of("ab", first_done_at=100.0)
    policy = sections.Rounds()
    assert decide(round, set("abc"), set("abc"), Quorum(policy, 2), policy, 1e9) == Decision(False, "waiting for c")


def test_the_deadline_counts_from_the_first_complete_contribution() -> None:
    policy = sections.Rounds(deadline_s=10.0)
    decision = decide(round_of(begun="ab"), set("abc"), set("abc"), Quorum(policy, 1), policy, 1e9)
    assert decision.reason == "waiting for a, b, c"


GRACE = {
    "nobody stands still": (True, "", False, "nobody's training waits for the round, so c may come"),
    "one stands still": (True, "b", True, "has passed with 2 contributions, and b would wait"),
    "no grace": (False, "", True, "has passed with 2 contributions"),
}


@pytest.mark.parametrize(("grace", "standing", "close", "reason"), GRACE.values(), ids=GRACE.keys())
def test_past_its_deadline_a_round_waits_on_where_that_costs_nothing(
    grace: bool, standing: str, close: bool, reason: str
) -> None:
    policy = sections.Rounds(deadline_s=10.0, grace=grace)
    round = round_of("ab", first_done_at=100.0)
    before = decide(round, set("abc"), set("abc"), Quorum(policy, 2), policy, 109.9, set("ab"))
    assert before == Decision(False, "waiting for c"), "whoever waits, until the deadline it does"
    decision = decide(round, set("abc"), set("abc"), Quorum(policy, 2), policy, 110.0, set(standing))
    assert decision.close is close
    assert decision.reason.endswith(reason)


# quorum 3 of policy "fewer", given up: (members, done, out, now) → (close, reason)
FEWER = {
    "all that are there have answered": (
        "ab",
        "ab",
        "",
        101,
        True,
        "2 of 2 clients have answered; only 2 of at least 3",
    ),
    "one is still at it": ("ab", "a", "", 101, False, "waiting for b"),
    "one is still at it, past the deadline": ("ab", "a", "", 110, True, "with 1 contributions; only 2 of at least 3"),
    "nobody has contributed yet": ("ab", "", "a", 101, False, "2 of at least 3 clients are there, and none has contr"),
    "nobody has anything to contribute": (
        "ab",
        "",
        "ab",
        101,
        True,
        "2 of 2 clients have answered; only 2 of at least",
    ),
    "nobody is there": ("", "", "", 101, False, "0 of at least 3 clients are there, and none has contributed"),
    "nobody is there, and one had contributed": ("", "a", "", 101, True, "1 of 1 clients have answered; only 1"),
}


@pytest.mark.parametrize(("members", "done", "out", "now", "close", "reason"), FEWER.values(), ids=FEWER.keys())
def test_with_fewer_than_the_quorum_a_round_closes_with_those_that_are_there(
    members: str, done: str, out: str, now: float, close: bool, reason: str
) -> None:
    policy = sections.Rounds(deadline_s=10.0, grace=False, quorum_lost="fewer", quorum_lost_s=5.0)
    quorum = Quorum(policy, 3)
    round = round_of(done, out=out, first_done_at=100.0 if done else None)
    patient = decide(round, set(members), set(members), quorum, policy, now)
    assert not patient.close
    assert "of at least 3 clients are there" in patient.reason
    quorum.look(len(members), 90.0)
    quorum.look(len(members), 95.0)
    decision = decide(round, set(members), set(members), quorum, policy, now)
    assert decision.close is close
    assert reason in decision.reason


def test_transitions_are_those_of_the_table_and_no_others() -> None:
    actions = {action for _, action in TRANSITIONS}
    for state, action in itertools.product(RoundState, actions):
        round = Round(3, 0, state=state)
        if (state, action) in TRANSITIONS:
            round.move(action)
            assert round.state is TRANSITIONS[state, action]
        else:
            with pytest.raises(AssertionError, match=f"round 3 is {state.value}, cannot {action}"):
                round.move(action)


def test_contributions_are_those_of_the_attempt_in_its_order() -> None:
    names = ["zoe", "adam", "kim", "bo"]
    round = Round(0, 0)
    for weight, name in enumerate(names, start=1):
        round.begin(name, upload(chunks=1 if name == "kim" else 2, weight=weight, fill=name[:1].encode()))
    round.attempt = attempt_of("adam", "bo", "zoe")
    for index in (0, 1):
        assert [(c.client, c.weight, bytes(c.payload[:2])) for c in round.next(index).contributions] == [
            ("adam", 2, b"a" + bytes([index])),
            ("bo", 4, b"b" + bytes([index])),
            ("zoe", 1, b"z" + bytes([index])),
        ]


def test_a_chunk_is_in_when_the_last_of_the_attempt_has_sent_it() -> None:
    attempt = attempt_of("a", "b", missing=(2, 1))
    assert not attempt.take("a", 0)
    assert not attempt.take("c", 0), "it does not count"
    assert attempt.take("b", 0)
    assert attempt.take("a", 1)


def test_an_attempt_is_complete_when_every_chunk_is_folded() -> None:
    attempt = attempt_of("a")
    for _ in range(2):
        assert not attempt.complete
        attempt.shipment.payload.append(Encoded(memoryview(bytes(8))))
    assert attempt.complete


@pytest.mark.parametrize(("dropped", "goes_on"), [("a", False), ("c", True)])
def test_who_is_dropped_takes_along_the_attempt_that_counted_it(dropped: str, goes_on: bool) -> None:
    round = round_of(done="ab", begun="c")
    attempt = round.attempt = attempt_of("a", "b")
    round.drop(dropped)
    assert dropped not in round.uploads
    assert dropped not in round.done
    assert (round.attempt is attempt) is goes_on


def test_another_process_begins_in_place_of_the_one_before() -> None:
    round = round_of(begun="ab")
    round.attempt = attempt_of("a", "b")
    other = upload(chunks=0)
    round.begin("a", other)
    assert round.uploads["a"] is other
    assert round.attempt is None, "it held what the other one had sent"
