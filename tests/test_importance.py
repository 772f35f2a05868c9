"""The order by importance: its three bounds whatever is told, and that what moves more comes more often."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parablock.importance import SWEEPS, ImportanceOrder

LARGEST = float("inf")


def rounds(num_blocks: int, in_flight: int, moves: list[float], count: int) -> list[int]:
    """The blocks of so many rounds. When a round is committed its move is told, and one that is far ahead decided.

    moves: of one round after the other, again from the first; below 0: nobody was counted.
    """
    order = ImportanceOrder(num_blocks, in_flight)
    blocks = [order.next() for _ in range(in_flight + 1)]
    for round in range(count):
        move = moves[round % len(moves)]
        if move >= 0.0:
            order.moved(blocks[round], move)
        blocks.append(order.next())
    return blocks[:count]


def by_block(importances: list[float], count: int, in_flight: int = 1) -> list[int]:
    """The blocks of so many rounds, each block always being as important."""
    order = ImportanceOrder(len(importances), in_flight)
    blocks = [order.next() for _ in range(in_flight + 1)]
    for round in range(count):
        order.moved(blocks[round], importances[blocks[round]])
        blocks.append(order.next())
    return blocks


sizes = st.integers(1, 9)
flights = st.integers(0, 4)
told = st.lists(st.sampled_from([-1.0, 0.0, 1e-30, 1.0, LARGEST]) | st.floats(0.0, 10.0), min_size=1, max_size=40)


@given(sizes, flights, told)
def test_the_first_sweep_trains_every_block_once_the_last_one_first(
    num_blocks: int, f: int, moves: list[float]
) -> None:
    assert rounds(num_blocks, f, moves, num_blocks) == list(range(num_blocks - 1, -1, -1))


@given(sizes, flights, told)
def test_no_block_waits_longer_than_the_bound(num_blocks: int, f: int, moves: list[float]) -> None:
    blocks = rounds(num_blocks, f, moves, 20 * num_blocks)
    longest = SWEEPS * num_blocks
    for first in range(len(blocks) - longest):
        assert set(blocks[first : first + longest]) == set(range(num_blocks))


@given(sizes, flights, told)
def test_rounds_in_flight_together_train_different_blocks(num_blocks: int, f: int, moves: list[float]) -> None:
    if num_blocks > f:
        blocks = rounds(num_blocks, f, moves, 20 * num_blocks)
        for first in range(len(blocks) - f):
            assert len(set(blocks[first : first + f + 1])) == f + 1


@given(sizes, flights, told)
def test_the_same_moves_make_the_same_order(num_blocks: int, f: int, moves: list[float]) -> None:
    assert rounds(num_blocks, f, moves, 30) == rounds(num_blocks, f, moves, 30)


@pytest.mark.parametrize("importance", [0.0, 1.0, LARGEST])
def test_blocks_of_equal_importance_come_in_turn(importance: float) -> None:
    assert by_block([importance] * 3, 12)[:12] == [2, 1, 0] * 4


def test_a_block_comes_in_proportion_to_the_root_of_its_importance() -> None:
    importances = [1.0, 1.0, 2.25, 1.5, 1.0, 0.7, 0.8, 1.2]
    roots = [math.sqrt(importance) for importance in importances]
    seen = Counter(by_block(importances, 4000))
    shares = [seen[block] / 4000 for block in range(8)]
    assert shares == pytest.approx([root / sum(roots) for root in roots], rel=0.01)


def test_the_most_important_of_all_comes_as_often_as_the_gap_allows_and_the_others_still_do() -> None:
    seen = Counter(by_block([1e6, 1.0, 1.0, 1.0, 1.0, 1.0], 1200))
    assert seen[0] == pytest.approx(600, abs=3), "every second round, as one round is in flight"
    assert min(seen.values()) >= 1200 // 12


def test_a_block_of_which_nothing_is_known_counts_as_much_as_the_most_important() -> None:
    order = ImportanceOrder(3, 0)
    assert [order.next() for _ in range(3)] == [2, 1, 0]
    order.moved(2, 0.005)
    order.moved(0, 5.0)
    assert [order.next() for _ in range(4)] == [1, 0, 1, 2]  # 1 before 0, as longer ago; 2 at its bound


def test_with_too_few_blocks_for_the_gap_all_go_on_being_trained() -> None:
    assert set(by_block([1.0, 1.0], 8, in_flight=3)) == {0, 1}
    assert by_block([7.0], 4, in_flight=1) == [0] * 6
