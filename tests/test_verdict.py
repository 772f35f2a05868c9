"""Rounds whose contributions are measured before they are folded, at the coordinator: what is asked for when, who
counts, and what those hear who do not."""

from __future__ import annotations

from typing import Any

from parablock.coordinator_events import Committed, Fold, Measure, Measured, Note, Send, Store, Tick, Unfit
from parablock.messages import Abstain, Chunk, Commit, Offer, Rejected
from parablock.verdict import Verdict
from tests.test_coordinator import NBYTES, Desk


def desk_of(clients: int = 3, **config: Any) -> Desk:
    """Clients a, b, c and so on, whose contributions are measured."""
    desk = Desk(clients, **({"robust": {"clip": 1.0}} | config))
    desk.gather(*"abcde"[:clients])
    return desk


def asked(desk: Desk) -> list[tuple[type, int, int]]:
    return [(type(each), each.attempt, each.index) for each in desk.asked if isinstance(each, Measure | Fold)]


def test_a_chunk_is_measured_when_it_is_in_from_everybody_and_folded_after_the_verdict() -> None:
    desk = desk_of(2)
    desk.upload("a")
    desk.say("b", Offer(0, 0, NBYTES[0], 1, 1, 0.5))
    assert asked(desk) == []
    desk.chunk("b", 0, 0, 0, 1024)
    assert asked(desk) == [(Measure, 1, 0)], "the second one is still to come"
    desk.chunk("b", 0, 0, 1024, NBYTES[0] - 1024)
    assert asked(desk) == [(Measure, 1, 0), (Measure, 1, 1)]
    assert not [e for e in desk.effects if isinstance(e, Send) and isinstance(e.envelope.message, Chunk)]
    desk.work(most=1)
    assert asked(desk) == [(Measure, 1, 1)], "no verdict before the last chunk"
    desk.work(most=1)
    assert asked(desk) == [(Fold, 1, 0), (Fold, 1, 1)]
    for fold in desk.asked:
        assert isinstance(fold, Fold)
        assert [(each.client, each.factor) for each in fold.contributions] == [("a", 0.5), ("b", 0.5)]
    desk.work()
    (committed,) = desk.of(Committed)
    assert (committed.contributors, committed.left_out, committed.clipped) == (("a", "b"), (), ("a", "b"))
    assert "clipped: a, b" in committed.reason


def test_who_is_left_out_is_told_why_and_neither_counted_nor_late() -> None:
    desk = desk_of(deadline_s=10.0)
    desk.left_out = {"b": "too far from the others"}
    for name in "abc":
        desk.upload(name)
    desk.work(most=3)  # two measures, and the first fold
    (fold,) = desk.asked
    assert isinstance(fold, Fold)
    assert [each.client for each in fold.contributions] == ["a", "c"]
    desk.work(most=1)
    (store,) = desk.asked
    assert isinstance(store, Store)
    assert not [m for m in desk.to("b") if isinstance(m, Rejected)], "it is not durable yet"
    entry = store.entry
    assert (entry.contributors, entry.left_out, entry.tardy, entry.late) == (("a", "c"), ("b",), (), 0)
    assert entry.bytes_up == 3 * NBYTES[0]
    assert "2 contributions; left out: b" in entry.reason
    desk.work()
    rejected, commit = [m for m in desk.to("b") if isinstance(m, Rejected | Commit)]
    assert rejected == Rejected(0, "too far from the others")
    assert Note("uncounted", "b", "round 0: too far from the others") in desk.notes
    assert isinstance(commit, Commit)
    assert (commit.counted, commit.contributors) == (False, 2)
    assert [m.counted for m in desk.to("a") if isinstance(m, Commit)] == [True]
    for name in "ac":
        desk.upload(name, round=1)
    assert asked(desk) == [], "b was in time, and is waited for"


def test_a_verdict_on_contributions_that_others_have_joined_is_given_anew() -> None:
    """Past its deadline a round is folded for those who are there; one more comes in time after all."""
    desk = desk_of(deadline_s=2.0, policy={"grace": True})
    desk.upload("a")
    desk.upload("b")
    desk.handle(Tick(), after_s=3.0)
    assert asked(desk) == [(Measure, 1, 0), (Measure, 1, 1)]
    desk.upload("c")
    assert asked(desk)[2:] == [(Measure, 2, 0), (Measure, 2, 1)]
    desk.left_out = {"a": "of the first attempt"}
    desk.work(most=2)
    assert asked(desk) == [(Measure, 2, 0), (Measure, 2, 1)], "nothing is folded of what was given up"
    desk.left_out = {}
    desk.work()
    (committed,) = desk.of(Committed)
    assert (committed.contributors, committed.left_out) == (("a", "b", "c"), ())


def test_what_is_found_unfit_by_its_measure_counts_as_absent() -> None:
    desk = desk_of()
    for name in "abc":
        desk.upload(name)
    desk.handle(Unfit(0, 1, {"b": "not finite"}))
    assert desk.to("b") == [Rejected(0, "not finite")]
    assert asked(desk)[2:] == [(Measure, 2, 0), (Measure, 2, 1)]
    desk.handle(Measured(0, 1, Verdict({"a": 1.0, "b": 1.0, "c": 1.0})))
    assert Fold not in [kind for kind, *_ in asked(desk)], "that was about another attempt"
    desk.asked = desk.asked[2:]
    desk.work()
    (committed,) = desk.of(Committed)
    assert (committed.contributors, committed.left_out) == (("a", "c"), ())


def test_too_few_for_the_rule_leave_the_block_as_it_is_and_hear_why() -> None:
    desk = desk_of(robust={"rule": "trimmed-mean", "bad": 1}, deadline_s=10.0)
    for name in "ab":
        desk.upload(name)
    desk.say("c", Abstain(0, "the loss is not finite"))
    (store,) = desk.asked
    assert isinstance(store, Store)
    entry = store.entry
    assert (entry.attempt, entry.contributors, entry.left_out) == (0, (), ("a", "b"))
    assert (entry.tardy, entry.late, entry.bytes_up) == ((), 0, 2 * NBYTES[0])
    desk.work()
    (committed,) = desk.of(Committed)
    reason = "robust.rule = trimmed-mean with robust.bad = 1 makes nothing of fewer than 3 contributions, and 2 came"
    assert committed.reason == f"0 contributions; 3 of 3 clients have answered; {reason}"
    assert [m for m in desk.to("a") if isinstance(m, Rejected)] == [Rejected(0, reason)]
    assert [m.contributors for m in desk.to("a") if isinstance(m, Commit)] == [0]
    assert committed.late == 0
    desk.commit("a", "b", "c", round=1)


def test_who_sends_what_is_not_finite_is_one_of_the_bad_that_a_rule_bears() -> None:
    """Else it could stop the run by it."""
    desk = desk_of(5, robust={"rule": "krum", "bad": 1})
    for name in "abcde":
        desk.upload(name)
    assert {each.bad for each in desk.asked if isinstance(each, Measure)} == {1}
    desk.handle(Unfit(0, 1, {"b": "not finite"}))
    again = [each for each in desk.asked if isinstance(each, Measure) and each.attempt == 2]
    assert [(len(each.contributions), each.bad) for each in again] == [(4, 0), (4, 0)]
    desk.asked = list(again)
    desk.work(most=2)
    assert {each.bad for each in desk.asked if isinstance(each, Fold)} == {0}
    desk.handle(Unfit(0, 2, {name: "not finite" for name in "ac"}))
    desk.asked = [each for each in desk.asked if isinstance(each, Store)]
    desk.work()
    (committed,) = desk.of(Committed)
    assert committed.contributors == ()
    assert "makes nothing of fewer than 3 contributions beside 3 that are not finite, and 2 came" in committed.reason


def test_a_rule_needs_no_measure_where_it_looks_at_each_element_by_itself() -> None:
    desk = desk_of(robust={"rule": "median", "bad": 1})
    for name in "abc":
        desk.upload(name)
    assert asked(desk) == [(Fold, 1, 0), (Fold, 1, 1)]
