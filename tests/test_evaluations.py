"""A run's evaluations: shares of clients that add up by task and by client, whatever a client says."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest

from broker.evaluations import Evaluations
from parablock.config import Config, from_dict
from parablock.messages import MAX_LABEL, MAX_TASKS, Evaluated

CLIENTS = ("a", "b")
EVERY = {"rounds": 40, "eval": {"every": 1}}


def shares(round: int, *, tasks: tuple[str, ...] = ("",), rows: int = 1, loss: float = 5.0) -> Evaluated:
    """Of ten tokens and two answers, one of them right, in each task; the second task's loss is twice the first's."""
    each = len(tasks)
    losses = tuple(loss * (place + 1) for place in range(each))
    return Evaluated(round, tasks, (rows,) * each, losses, (10,) * each, (1,) * each, (2,) * each)


def evaluations(tree: dict[str, Any] | None = None) -> Evaluations:
    return Evaluations(Config() if tree is None else from_dict(tree))


def told(
    found: Evaluations, client: str, share: Evaluated, committed: int = -1, at: float = 1.0
) -> list[dict[str, Any]]:
    return found.reported(client, share, CLIENTS, committed, at)


def test_shares_add_up_over_clients_and_stay_apart_by_client() -> None:
    found = evaluations()
    assert told(found, "a", shares(-1, rows=3, loss=30.0)) == []
    (row,) = told(found, "b", shares(-1, rows=2, loss=10.0), at=2.0)
    assert (row["round"], row["time_s"], row["eval_loss"], row["rows"], row["tokens"]) == (-1, 2.0, 2.0, 5, 20)
    assert (row["exact_match"], row["answered"], row["perplexity"]) == (0.5, 4, pytest.approx(7.389, abs=1e-3))
    assert "tasks" not in row
    assert {name: part["eval_loss"] for name, part in row["clients"].items()} == {"a": 3.0, "b": 1.0}
    assert not any("tasks" in part for part in row["clients"].values())


def test_a_tasks_loss_is_over_all_its_tokens_whoever_has_them() -> None:
    found = evaluations()
    told(found, "a", shares(-1, tasks=("qa", "topic"), loss=10.0))
    (row,) = told(found, "b", shares(-1, tasks=("qa",), loss=40.0))
    assert list(row["tasks"]) == ["qa", "topic"]
    assert {name: part["eval_loss"] for name, part in row["tasks"].items()} == {"qa": 2.5, "topic": 2.0}
    assert row["tasks"]["qa"].keys() == {"eval_loss", "perplexity", "exact_match", "rows", "tokens", "answered"}
    assert {name: part["eval_loss"] for name, part in row["clients"]["a"]["tasks"].items()} == {"qa": 1.0, "topic": 2.0}
    assert (row["eval_loss"], row["rows"]) == (pytest.approx(70 / 30), 3)


def test_without_held_out_rows_there_is_no_evaluation() -> None:
    found = evaluations()
    nothing = Evaluated(-1, (), (), (), (), (), ())
    assert [told(found, client, nothing) for client in CLIENTS] == [[], []]
    assert told(found, "a", nothing) == [], "nor later"


def test_who_has_no_row_is_left_out() -> None:
    found = evaluations()
    told(found, "a", Evaluated(-1, (), (), (), (), (), ()))
    (row,) = told(found, "b", shares(-1))
    assert list(row["clients"]) == ["b"]


def test_a_loss_that_nobody_knows_is_none() -> None:
    found = evaluations()
    unknown = Evaluated(-1, ("",), (4,), (0.0,), (0,), (0,), (0,))
    told(found, "a", unknown)
    (row,) = told(found, "b", unknown)
    assert (row["rows"], row["eval_loss"], row["perplexity"], row["exact_match"]) == (8, None, None, None)


def test_rows_of_which_only_answers_count_are_told_too() -> None:
    """The first eval.rows of the source may all be other clients'."""
    found = evaluations()
    told(found, "a", Evaluated(-1, (), (), (), (), (), ()))
    (row,) = told(found, "b", Evaluated(-1, ("",), (0,), (0.0,), (0,), (1,), (2,)))
    assert (row["rows"], row["eval_loss"], row["exact_match"]) == (0, None, 0.5)


def test_a_later_share_releases_the_earlier_evaluations() -> None:
    found = evaluations(EVERY)
    told(found, "a", shares(0), committed=0)
    told(found, "a", shares(1), committed=1)
    # b's share of the first was lost with its connection.
    assert [row["round"] for row in told(found, "b", shares(1), committed=1)] == [0, 1]
    assert told(found, "b", shares(0), committed=1) == [], "nor is it told a second time"


def test_nobody_is_waited_for_who_has_gone() -> None:
    found = evaluations()
    told(found, "a", shares(-1))
    assert [row["round"] for row in found.gone("b")] == [-1]
    assert found.gone("a") == []


def test_at_the_end_everything_is_told() -> None:
    found = evaluations(EVERY)
    told(found, "a", shares(-1))
    told(found, "a", shares(0), committed=0)
    assert [row["round"] for row in found.close()] == [-1, 0]


@pytest.mark.parametrize("round", [3, 4, 38, 39, 2**31])
def test_a_round_that_nobody_evaluates_or_can_have_reached_does_not_count(round: int) -> None:
    found = evaluations({"rounds": 40, "eval": {"every": 4}})  # after rounds 3, 7, ..., and 39
    told(found, "a", shares(round), committed=0)
    assert found.close() == []
    if round == 3:
        told(found, "a", shares(round), committed=1)  # one in flight, one in training
        assert [row["round"] for row in found.close()] == [3]


def test_a_worker_cannot_fill_the_memory() -> None:
    """One that says as much as it can, for a run of many evaluations, beside another that says nothing at all."""
    found = evaluations({"rounds": 10_000, "eval": {"every": 1}})
    counts = (2**53,) * MAX_TASKS
    rows = 0
    tracemalloc.start()
    try:
        for round in range(20):
            labels = tuple(f"{round} {place} ".ljust(MAX_LABEL, "\U0001f984") for place in range(MAX_TASKS))
            share = Evaluated(round, labels, counts, (1e38,) * MAX_TASKS, counts, counts, counts)
            rows += len(told(found, "a", share, committed=round))
            for ahead in (3, 4, 1000):
                assert told(found, "a", shares(round + ahead), committed=round) == []
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert rows == 20 - 8
    assert held < 2e6, "eight evaluations of 128 labels"


@pytest.mark.parametrize("in_flight", [1, 7, 20])
def test_a_slow_client_is_waited_for_while_others_are_as_far_ahead_as_they_may(in_flight: int) -> None:
    """Round 0 was committed with the slow client's contribution, after which its share of it is still to come."""
    found = evaluations({"rounds": 90, "eval": {"every": 1}, "pipeline": {"max_in_flight": in_flight}})
    told(found, "a", shares(-1))
    assert [row["round"] for row in told(found, "b", shares(-1))] == [-1]
    for round in range(in_flight + 2):
        assert told(found, "a", shares(round), committed=0) == []
    (row,) = told(found, "b", shares(0), committed=0)
    assert (row["round"], list(row["clients"])) == (0, ["a", "b"])


def test_a_task_that_is_named_twice_counts_with_both() -> None:
    found = evaluations()
    told(found, "a", Evaluated(-1, ("x", "x"), (1, 2), (5.0, 5.0), (10, 10), (0, 0), (0, 0)))
    (row,) = told(found, "b", shares(-1, tasks=("x",)))
    assert {name: part["rows"] for name, part in row["tasks"].items()} == {"x": 4}
