"""The agenda: what is decided when, who is drawn, and what a client hears of it."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parablock.agenda import Agenda, Turn, Turns, in_turn
from parablock.config import Config, from_dict

ROUNDS = 40
NAMES = [f"c{number}" for number in range(8)]


def config(**tables: Any) -> Config:
    return from_dict({"rounds": ROUNDS, **tables})


def drawn(agenda: Agenda, round: int, names: list[str]) -> set[str]:
    return {name for name in names if agenda.trains(round, name)}


def every_round(agenda: Agenda, names: list[str]) -> list[set[str]]:
    """Who trains, by round, where everybody is always there."""
    found = []
    for round in range(ROUNDS):
        agenda.decide(round, names)
        found.append(drawn(agenda, round, names))
    return found


# Who trains


@pytest.mark.parametrize(
    ("fraction", "clients", "quorum", "count"),
    [(0.5, 4, 0, 2), (0.5, 5, 0, 3), (0.3, 8, 0, 2), (0.01, 8, 0, 1), (0.1, 30, 0, 3), (0.9, 2, 0, 2), (0.5, 8, 4, 4)],
)
def test_a_round_is_trained_by_its_share_of_the_clients(fraction: float, clients: int, quorum: int, count: int) -> None:
    names = [f"c{number:02d}" for number in range(clients)]
    run = config(round={"fraction": fraction, "clients": clients, "quorum": quorum})
    assert {len(those) for those in every_round(Agenda(run, 4), names)} == {count}
    assert run.sampled(clients) == count


def test_it_is_said_when_too_few_have_turns_left() -> None:
    """Of eight that the budget was shared out for, five have come."""
    privacy = {"where": "central", "clip": 1.0, "noise": 4.0, "budget": 8.0, "rounds": 3}
    agenda = Agenda(config(round={"fraction": 0.5, "clients": 8}, privacy=privacy), 4)
    for round in range(6):
        before = sum(agenda._turns.get(name, 0) < 3 for name in NAMES[:5])
        agenda.decide(round, NAMES[:5])
        said = agenda.take_short()
        assert len(said) == (before < 4), (round, before)
    assert said == [
        "round 5 is trained by 0 clients, and 4 are wanted: of the 5 that are there the others have had their 3 rounds "
        "(privacy.rounds)"
    ]
    assert agenda.take_short() == []


def test_every_client_is_drawn_about_as_often_and_seeds_draw_differently() -> None:
    run = config(round={"fraction": 0.5, "clients": 4})
    rounds = every_round(Agenda(run, 4), NAMES[:4])
    seen = Counter(name for those in rounds for name in those)
    assert all(10 <= seen[name] <= 30 for name in NAMES[:4])
    assert every_round(Agenda(run, 4), NAMES[3::-1]) == rounds, "the order in which they came is of no influence"
    assert every_round(Agenda(config(seed=1, round={"fraction": 0.5, "clients": 4}), 4), NAMES[:4]) != rounds


def test_fewer_than_the_quorum_are_never_drawn_while_that_many_are_there() -> None:
    agenda = Agenda(config(round={"fraction": 0.5, "clients": 8, "quorum": 4}), 4)
    agenda.decide(0, NAMES[:5])
    agenda.decide(1, NAMES[:3])
    agenda.decide(2, [])
    assert [len(drawn(agenda, round, NAMES)) for round in range(3)] == [4, 3, 0]


def test_without_a_fraction_everybody_takes_part_whoever_comes() -> None:
    agenda = Agenda(config(schedule={"order": "importance"}), 4)
    agenda.decide(1, NAMES[:2])
    assert drawn(agenda, 1, NAMES) == set(NAMES)
    assert agenda.members(1, frozenset("ab")) == {"a", "b"}


def test_who_comes_makes_up_for_those_who_are_gone() -> None:
    agenda = Agenda(config(round={"fraction": 0.5, "clients": 4}, pipeline={"max_in_flight": 2}), 4)
    agenda.decide(2, NAMES[:4])
    gone = drawn(agenda, 1, NAMES)
    left = set(NAMES[:4]) - gone
    agenda.join("new", 1, left)
    assert agenda.trains(1, "new"), "nobody else was left of this round"
    assert not agenda.trains(0, "new"), "it begins later"


@pytest.mark.parametrize("order", ["random", "importance"])
def test_who_comes_between_two_commits_changes_nothing_where_all_take_part(order: str) -> None:
    """So that a broker that dies before the next one has forgotten nothing."""
    agenda = Agenda(config(schedule={"order": order}), 4)
    agenda.decide(1, NAMES[:2])
    before = agenda.snapshot()
    agenda.join("new", 0, [])
    assert agenda.snapshot() == before


@pytest.mark.parametrize("names", [NAMES[:4], NAMES[:5]])
def test_who_comes_is_not_drawn_where_nobody_is_gone_who_was(names: list[str]) -> None:
    """Also where one more client would be a larger share: of five, three are drawn."""
    agenda = Agenda(config(round={"fraction": 0.5, "clients": 4}), 4)
    agenda.decide(1, names)
    before = drawn(agenda, 0, names)
    agenda.join("new", 0, names)
    assert not agenda.trains(0, "new")
    sat_out = sorted(set(names) - before)[0]
    agenda.join("new", 0, [name for name in names if name != sat_out])
    assert not agenda.trains(0, "new"), "who is gone would have sat it out"
    agenda.join("new", 0, [name for name in names if name != min(before)])
    assert drawn(agenda, 0, [*names, "new"]) == before | {"new"}


def test_who_comes_makes_up_for_a_quorum_that_was_not_there() -> None:
    agenda = Agenda(config(round={"fraction": 0.5, "clients": 8, "quorum": 2}), 4)
    agenda.decide(1, NAMES[:1])
    agenda.join("new", 0, NAMES[:1])
    agenda.join("newer", 0, [NAMES[0], "new"])
    assert drawn(agenda, 0, [*NAMES, "new", "newer"]) == {NAMES[0], "new"}
    nobody = Agenda(config(mode="fedcybgd"), 4)
    nobody.decide(0, [])
    nobody.join("new", 0, [])
    assert nobody.trains(0, "new")


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 3))
def test_in_turn_each_client_trains_each_block_exactly_once(clients: int, blocks: int, again: int) -> None:
    span = clients * blocks
    pairs = [(in_turn(round, clients, blocks), round % blocks) for round in range(again * span, (again + 1) * span)]
    assert sorted(pairs) == [(client, block) for client in range(clients) for block in range(blocks)]


@given(st.integers(2, 9), st.integers(2, 9))
def test_in_turn_goes_from_client_to_client(clients: int, blocks: int) -> None:
    period = math.lcm(clients, blocks)
    for round in range(1, 3 * period):
        step = 2 if round % period == 0 else 1  # a period begins one further on
        assert in_turn(round, clients, blocks) == (in_turn(round - 1, clients, blocks) + step) % clients


def test_fedcybgd_is_one_client_a_round_in_roster_order() -> None:
    agenda = Agenda(config(mode="fedcybgd", round={"clients": 4}), 4)
    rounds = every_round(agenda, NAMES[:4])
    assert [next(iter(those)) for those in rounds[:9]] == ["c0", "c1", "c2", "c3", "c1", "c2", "c3", "c0", "c2"]
    assert all(len(those) == 1 for those in rounds)


# What is said


def test_what_follows_from_the_settings_is_not_said() -> None:
    run = config(schedule={"order": "random"}, seed=3)
    agenda = Agenda(run, 4)
    agenda.decide(1, NAMES)
    assert agenda.turns(0, "c0") == ()
    turns = Turns(run, 4)
    turns.hear(0, (), ())
    agenda.decide(ROUNDS, NAMES)
    assert [turns.turn(round) for round in range(ROUNDS)] == [
        Turn(agenda.find(round) or 0, True) for round in range(40)
    ]


@pytest.mark.parametrize("in_flight", [1, 3])
def test_a_client_that_hears_each_commit_knows_what_it_may_train(in_flight: int) -> None:
    run = config(round={"fraction": 0.5, "clients": 4}, pipeline={"max_in_flight": in_flight})
    agenda, turns = Agenda(run, 4), Turns(run, 4)

    def hear(first: int) -> None:
        said = agenda.turns(first, "c1")
        turns.hear(first, [turn.block for turn in said], [turn.trains for turn in said])

    agenda.decide(in_flight, NAMES[:4])
    hear(0)
    for round in range(ROUNDS):
        if round > in_flight:  # what round - in_flight - 1 has made is here, and its commit has said this round
            agenda.decide(round, NAMES[:4])
            hear(round)
        for known in range(max(round - in_flight, 0), round + 1):  # what is on the way, and what is trained now
            assert turns.turn(known) == Turn(agenda.block(known), agenda.trains(known, "c1"))
        turns.passed(round)
    assert turns.turn(ROUNDS) is None
    assert turns.turn(0) is None, "long gone"


@pytest.mark.parametrize("order", ["cyclic", "random", "importance"])
def test_a_number_that_is_no_decided_round_trains_no_block(order: str) -> None:
    """A client may name any, and the order at random is drawn up to the round that is asked for."""
    agenda = Agenda(config(schedule={"order": order}), 4)
    assert agenda.find(0) is None
    agenda.decide(1, NAMES)
    assert [agenda.find(round) for round in (-1, 2, ROUNDS, 2**31)] == [None] * 4
    assert [agenda.find(round) for round in (0, 1)] == [agenda.block(0), agenda.block(1)]


def test_rounds_beyond_the_end_are_not_decided() -> None:
    agenda = Agenda(config(schedule={"order": "importance"}), 4)
    agenda.decide(ROUNDS + 5, NAMES)
    assert agenda.find(ROUNDS - 1) is not None
    assert agenda.find(ROUNDS) is None
    assert agenda.turns(ROUNDS, "c0") == ()


@given(
    order=st.sampled_from(["descending", "random", "importance"]),
    mode=st.sampled_from(["parablock", "fedcybgd"]),
    fraction=st.sampled_from([0.5, 1.0]),
    in_flight=st.integers(1, 3),
    moves=st.lists(st.floats(0.0, 1e3), min_size=2, max_size=16),
    stop=st.integers(0, 12),
)
def test_what_goes_on_from_a_snapshot_decides_the_same(
    order: str, mode: str, fraction: float, in_flight: int, moves: list[float], stop: int
) -> None:
    """Through JSON, after the commit of any round, and with somebody who made up for others."""
    fraction, order = (1.0, "descending") if mode == "fedcybgd" else (fraction, order)
    tables: dict[str, Any] = {"schedule": {"order": order}, "round": {"fraction": fraction, "clients": 4}}
    run = config(mode=mode, pipeline={"max_in_flight": in_flight}, **tables)
    plain = Agenda(run, 4)
    ahead = run.in_flight + 1
    plain.decide(ahead - 1, NAMES[:4])
    resumed = plain
    for round, move in enumerate(moves):
        for agenda in {id(agenda): agenda for agenda in (plain, resumed)}.values():
            agenda.moved(round, agenda.block(round), move)
            agenda.decide(round + ahead, NAMES[: 3 + round % 4])
            if round % 5 == 0:
                agenda.join("c7", round + 1, NAMES[:2])
        if round == stop:
            snapshot = json.loads(json.dumps(plain.snapshot()))
            resumed = Agenda(run, 4)
            resumed.restore(snapshot)
        for name in NAMES:
            assert resumed.turns(round + 1, name) == plain.turns(round + 1, name)
            assert resumed.members(round, frozenset({name})) == plain.members(round, frozenset({name}))
    assert resumed.snapshot() == plain.snapshot()


@pytest.mark.parametrize(("blocks", "trains"), [((4,), (True,)), ((1,), ()), ((1,), (True, False))])
def test_what_cannot_be_is_refused(blocks: tuple[int, ...], trains: tuple[bool, ...]) -> None:
    with pytest.raises(ValueError, match="rounds from 7 on are to train blocks"):
        Turns(config(schedule={"order": "importance"}), 4).hear(7, blocks, trains)


def test_a_move_counts_by_the_rate_of_its_round() -> None:
    """Two blocks move alike for their rates, which fall to a tenth: they come in turn."""
    solver = {"lr": 1.0, "lr_schedule": "linear", "lr_final": 0.1}
    run = config(schedule={"order": "importance"}, solver=solver, pipeline={"max_in_flight": 1})
    agenda = Agenda(run, 3)
    agenda.decide(1, NAMES)
    for round in range(ROUNDS):
        agenda.moved(round, agenda.block(round), 0.5 * (1.0 - 0.9 * round / ROUNDS))
        agenda.decide(round + 2, NAMES)
        assert agenda.block(round) == 2 - round % 3
