"""The quorum over time: when it is missing, when it is given up, and what is said of that."""

from __future__ import annotations

import math
from typing import Literal

import pytest

from parablock.quorum import Quorum
from parablock.sections import Rounds


def test_as_long_as_enough_are_there_nothing_is_said() -> None:
    quorum = Quorum(Rounds(quorum_lost="stop"), 2)
    assert [quorum.look(there, 10.0 * there) for there in (2, 3, 9)] == [None] * 3
    assert quorum.due == math.inf


@pytest.mark.parametrize(("policy", "then"), [("fewer", "rounds close with those"), ("stop", "the run stops")])
def test_what_is_missing_for_long_enough_is_given_up_once(policy: str, then: str) -> None:
    quorum = Quorum(Rounds(quorum_lost=policy, quorum_lost_s=5.0), 2)  # type: ignore[arg-type]
    lost = quorum.look(1, 100.0)
    assert lost == f"1 of at least 2 clients are there; rounds wait; in 5 s {lost.split('in 5 s ')[1]}"
    assert quorum.due == 105.0
    assert quorum.look(0, 104.9) is None
    assert not quorum.given_up
    said = quorum.look(0, 105.0)
    assert said is not None
    assert said.startswith(f"0 of at least 2 clients are there, for 5 s; {then}")
    assert (quorum.given_up, quorum.due) == (True, math.inf)
    assert quorum.look(1, 200.0) is None, "once"


def test_a_quorum_that_is_back_counts_anew() -> None:
    quorum = Quorum(Rounds(quorum_lost="fewer", quorum_lost_s=5.0), 2)
    quorum.look(1, 100.0)
    quorum.look(1, 105.0)
    assert quorum.look(2, 106.0) == "2 clients are there again, at least 2 are needed"
    assert not quorum.given_up
    assert quorum.due == math.inf
    assert quorum.look(2, 107.0) is None
    assert quorum.look(1, 108.0) is not None
    assert quorum.due == 113.0


def test_one_that_is_waited_for_is_never_given_up() -> None:
    quorum = Quorum(Rounds(), 2)
    assert quorum.look(1, 100.0) == "1 of at least 2 clients are there; rounds wait"
    assert quorum.look(1, 1e9) is None
    assert (quorum.given_up, quorum.due) == (False, math.inf)


def test_without_patience_it_is_given_up_at_once() -> None:
    quorum = Quorum(Rounds(quorum_lost="stop", quorum_lost_s=0.0), 2)
    said = quorum.look(1, 100.0)
    assert said is not None
    assert "the run stops" in said
    assert quorum.given_up


@pytest.mark.parametrize("policy", ["wait", "fewer", "stop"])
def test_while_clients_are_coming_back_it_is_not_missed(policy: Literal["wait", "fewer", "stop"]) -> None:
    quorum = Quorum(Rounds(quorum_lost=policy, quorum_lost_s=5.0), 2)
    quorum.expect(106.0)
    assert quorum.due == math.inf
    assert quorum.look(1, 100.0) is None
    assert quorum.due == 106.0
    assert quorum.look(2, 101.0) is None
    assert quorum.due == math.inf, "nothing is to be told of it"
    assert quorum.look(0, 105.9) is None
    said = quorum.look(1, 106.0)
    assert said is not None
    assert said.startswith("1 of at least 2 clients are there; rounds wait")
    assert quorum.due == (math.inf if policy == "wait" else 111.0)
