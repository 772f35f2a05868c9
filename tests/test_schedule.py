"""The schedule: each block once per sweep, far enough apart for what is in flight, and the same for whoever asks."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parablock.config import load
from parablock.schedule import Schedule, gap_holds

ORDERS = ["cyclic", "descending", "random"]

orders = st.sampled_from(ORDERS)
seeds = st.integers(0, 2**31 - 1)
sizes = st.integers(1, 12)
flights = st.integers(0, 12)

PINNED = [5, 4, 0, 2, 1, 3, 2, 5, 0, 1, 3, 4, 2, 0, 5, 4, 3, 1]


@given(orders, sizes, flights, seeds)
def test_each_sweep_trains_every_block_exactly_once(order: str, num_blocks: int, in_flight: int, seed: int) -> None:
    schedule = Schedule(order, num_blocks, in_flight, seed)
    for sweep in range(5):
        trained = [schedule.block(sweep * num_blocks + position) for position in range(num_blocks)]
        assert sorted(trained) == list(range(num_blocks))


@given(orders, sizes, flights, seeds)
def test_rounds_in_flight_together_train_different_blocks(
    order: str, num_blocks: int, in_flight: int, seed: int
) -> None:
    schedule = Schedule(order, num_blocks, in_flight, seed)
    assert gap_holds(num_blocks, in_flight) == (num_blocks > in_flight)
    if gap_holds(num_blocks, in_flight):
        blocks = [schedule.block(round) for round in range(6 * num_blocks)]
        for first in range(len(blocks) - in_flight):  # across the borders of sweeps too
            together = blocks[first : first + in_flight + 1]
            assert len(set(together)) == in_flight + 1


@given(orders, sizes, flights, seeds, st.lists(st.integers(0, 100), min_size=1, max_size=20))
def test_random_access_equals_sequential(
    order: str, num_blocks: int, in_flight: int, seed: int, rounds: list[int]
) -> None:
    # Worker and broker ask for different rounds, and a worker that comes late starts in the middle.
    sequential = Schedule(order, num_blocks, in_flight, seed)
    blocks = [sequential.block(round) for round in range(max(rounds) + 1)]
    jumping = Schedule(order, num_blocks, in_flight, seed)
    assert [jumping.block(round) for round in rounds] == [blocks[round] for round in rounds]
    assert Schedule(order, num_blocks, in_flight, seed).block(rounds[-1]) == blocks[rounds[-1]]


def test_cyclic_and_descending_are_what_they_are_called() -> None:
    assert [Schedule("cyclic", 3, 1, 0).block(round) for round in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert [Schedule("descending", 3, 1, 0).block(round) for round in range(7)] == [2, 1, 0, 2, 1, 0, 2]


def test_random_sweeps_differ_from_each_other_and_between_seeds() -> None:
    def sweeps(seed: int, count: int = 20) -> list[tuple[int, ...]]:
        schedule = Schedule("random", 8, 1, seed)
        return [tuple(schedule.block(8 * sweep + position) for position in range(8)) for sweep in range(count)]

    assert len(set(sweeps(0))) > 15
    assert sweeps(0) != sweeps(1)


def test_every_block_may_come_first_where_the_gap_allows_it() -> None:
    # A gap of 1 bars one block of three at the start of a sweep; the other two must both turn up.
    schedule = Schedule("random", 3, 1, 0)
    follows = {(schedule.block(3 * sweep - 1), schedule.block(3 * sweep)) for sweep in range(1, 100)}
    assert follows == {(last, first) for last in range(3) for first in range(3) if last != first}


def test_the_draw_is_the_same_in_every_process_and_version() -> None:
    # Pinned: machines with other interpreters and other hash seeds take part in one run.
    code = "from parablock.schedule import Schedule; s = Schedule('random', 6, 2, 7)\n"
    code += "print([s.block(round) for round in range(18)])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(PINNED)


def test_it_is_built_from_the_config() -> None:
    schedule = Schedule.of(load(None, ["schedule.order=random", "seed=7", "pipeline.max_in_flight=2"]), 6)
    assert schedule is not None
    assert [schedule.block(round) for round in range(18)] == PINNED
    assert Schedule.of(load(None, ["schedule.order=importance"]), 6) is None, "it depends on how the run goes"


@pytest.mark.parametrize(("num_blocks", "in_flight"), [(0, 1), (-1, 1), (1, -1)])
def test_impossible_numbers_are_our_own_bugs(num_blocks: int, in_flight: int) -> None:
    with pytest.raises(AssertionError):
        Schedule("cyclic", num_blocks, in_flight, 0)


def test_an_order_that_config_does_not_know_is_our_own_bug() -> None:
    with pytest.raises(AssertionError, match="no such order: spiral"):
        Schedule("spiral", 2, 1, 0).block(0)


def test_lisa_trains_the_first_block_every_time_and_draws_the_other() -> None:
    config = load(None, ["mode=lisa", "seed=3"])
    schedule = Schedule.of(config, 5)
    blocks = [schedule.block(round) for round in range(4000)]
    assert set(blocks[::2]) == {0}
    counts = [blocks[1::2].count(block) for block in range(1, 5)]
    assert sum(counts) == 2000
    assert all(430 < count < 570 for count in counts), "each as likely as any other"
    assert Schedule.of(config, 5).block(1001) == blocks[1001], "whoever asks, and in whatever order"
    other = Schedule.of(load(None, ["mode=lisa", "seed=4"]), 5)
    assert [other.block(round) for round in range(100)] != blocks[:100]
    assert blocks[1:20:2] == [1, 3, 3, 4, 1, 4, 2, 1, 3, 2], "on every machine"
