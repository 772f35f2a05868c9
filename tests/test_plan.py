"""The plan's arithmetic: against rows worked out by hand, and against what it must be whatever the numbers are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parablock.plan import (
    COMMIT_S,
    Cost,
    Exchange,
    Link,
    exchange,
    exposed_seconds,
    interpolated,
    round_seconds,
    rounds_to_play,
    successors,
    to_measure,
)
from parablock.schedule import Schedule
from parablock.sections import Codecs

FLOAT32 = Codecs("float32", "float32")
seconds = st.floats(0.01, 10.0)


def moving(wire_s: float, beyond_s: float = 0.0) -> Exchange:
    """An exchange that fills the link for so long, and takes so much longer to land."""
    return Exchange(1, 1, wire_s, wire_s, wire_s + beyond_s)


def played(num_blocks: int, in_flight: int, order: str = "cyclic") -> list[int]:
    schedule = Schedule(order, num_blocks, in_flight, 0)
    return [schedule.block(round) for round in range(rounds_to_play(num_blocks, in_flight))]


# Exchanges


def test_an_exchange_is_cut_through() -> None:
    # 4 MiB up in 4 s; the last chunk of 512 KiB comes down at 2 MiB/s when it is up.
    numel, most = 1 << 20, 1 << 20
    moved = exchange(numel, Link(0.1, 1 << 20, 2 << 20), FLOAT32, most)
    assert (moved.bytes_up, moved.bytes_down, moved.up_s, moved.down_s) == (4 << 20, 4 << 20, 4.0, 2.0)
    assert moved.seconds == pytest.approx(0.1 + 4.0 + 0.25 + COMMIT_S)
    assert moved.wire_s == 4.0
    # The other way round the first chunk goes up, and then everything comes down.
    assert exchange(numel, Link(0.1, 2 << 20, 1 << 20), FLOAT32, most).seconds == pytest.approx(moved.seconds)


def test_under_masks_a_slice_comes_down_two_slices_and_an_answer_later() -> None:
    """Four MB in sixteen chunks, at 1 MB/s each way: the last answer ends the way up, and one chunk is left
    to come down."""
    moved = exchange(1_048_576, Link(0.1, 1e6, 1e6), FLOAT32, 1 << 20, masked=True)
    up, chunk = 4.194304, 0.262144
    assert moved.up_s == pytest.approx(up)
    first = 3 * chunk + 0.1  # when the first one can come down
    assert moved.seconds == pytest.approx(0.1 + first + up + COMMIT_S)
    slow_up = exchange(1_048_576, Link(0.1, 1e6, 1e9), FLOAT32, 1 << 20, masked=True)
    assert slow_up.seconds == pytest.approx(0.1 + up + 0.1 + COMMIT_S, abs=0.005)


def test_a_block_of_one_chunk_goes_up_and_then_down() -> None:
    assert exchange(250, Link(0.0, 1e3, 1e3), FLOAT32, 1 << 20).seconds == pytest.approx(2.0 + COMMIT_S)


def test_a_start_makes_an_exchange_longer_and_keeps_no_other_off_the_link() -> None:
    at_once, started = (exchange(6400, Link(0.1, 1e4, 1e4, start_s), FLOAT32, 1 << 20) for start_s in (0.0, 0.25))
    assert started.seconds == pytest.approx(at_once.seconds + 0.25)
    assert started.wire_s == at_once.wire_s


def test_codecs_may_differ_by_direction() -> None:
    moved = exchange(6400, Link(0.0, 1e3, 1e3), Codecs("int8", "bfloat16"), 1 << 20)
    assert (moved.bytes_up, moved.bytes_down) == (6600, 12800)


def test_a_given_link_carries_no_more_than_its_windows() -> None:
    assert Link.given(1e6, 0.0, 4 << 20) == Link(0.0, 1e6, 1e6)
    assert Link.given(1e6, 0.05, 4 << 20) == Link(0.1, 1e6, 1e6)
    assert Link.given(1e9, 0.05, 1_000_000) == Link(0.1, 1e7, 1e7)


# Rounds


@pytest.mark.parametrize(("compute_s", "comm_s"), [(1.0, 0.5), (1.0, 1.0), (1.0, 2.0)])
def test_a_synchronous_round_is_the_sum_and_an_overlapped_one_the_longer(compute_s: float, comm_s: float) -> None:
    costs, exchanges = [compute_s] * 4, [moving(comm_s)] * 4
    assert round_seconds(played(4, 1), costs, exchanges, 0) == pytest.approx(compute_s + comm_s)
    assert round_seconds(played(4, 1), costs, exchanges, 1) == pytest.approx(max(compute_s, comm_s))


def test_what_does_not_fill_the_link_hides_behind_more_rounds() -> None:
    # 2.0 s of delay and 0.5 s on the link: in two rounds C + M passes once.
    costs, exchanges = [1.0] * 4, [moving(0.5, 2.0)] * 4
    assert round_seconds(played(4, 1), costs, exchanges, 1) == pytest.approx((1.0 + 2.5) / 2)
    assert round_seconds(played(4, 3), costs, exchanges, 3) == pytest.approx(1.0)


def test_each_exchange_hides_behind_the_block_that_follows_it() -> None:
    # Block 0 has 3.0 s to exchange and 1.0 s of compute behind it; block 1 has 0.5 s and 2.0 s.
    costs, exchanges = [2.0, 1.0], [moving(3.0), moving(0.5)]
    behind = successors(played(2, 1), 1)
    assert behind == {0: {(1,)}, 1: {(0,)}}
    assert [exposed_seconds(exchanges[b], behind[b], costs) for b in (0, 1)] == [2.0, 0.0]
    assert round_seconds(played(2, 1), costs, exchanges, 1) == pytest.approx((max(3.0, 1.0) + max(0.5, 2.0)) / 2)


@given(st.integers(1, 6), st.integers(1, 4), st.sampled_from(["cyclic", "descending", "random"]), st.data())
def test_no_round_is_shorter_than_its_compute_nor_longer_than_the_sum(
    num_blocks: int, in_flight: int, order: str, data: st.DataObject
) -> None:
    costs = data.draw(st.lists(seconds, min_size=num_blocks, max_size=num_blocks))
    exchanges = [moving(data.draw(seconds), data.draw(seconds)) for _ in range(num_blocks)]
    rounds = played(num_blocks, in_flight, order)
    mean = sum(costs) / num_blocks
    synchronous = round_seconds(rounds, costs, exchanges, 0)
    # Rounds are counted from one end of compute to the next, so a sweep's first exchange is the one before it.
    assert synchronous == pytest.approx(mean + sum(moved.seconds for moved in exchanges) / num_blocks, rel=0.1)
    assert mean - 1e-9 <= round_seconds(rounds, costs, exchanges, in_flight) <= synchronous * 1.1


@given(st.integers(1, 8), st.integers(1, 4), st.sampled_from(["cyclic", "descending", "random"]))
def test_every_block_has_successors(num_blocks: int, in_flight: int, order: str) -> None:
    behind = successors(played(num_blocks, in_flight, order), in_flight)
    assert set(behind) == set(range(num_blocks))
    for block, windows in behind.items():
        for blocks in windows:
            assert len(blocks) == in_flight
            assert block not in blocks or num_blocks <= in_flight


# Which blocks are measured


def test_few_blocks_are_all_measured_and_of_many_three_of_a_kind() -> None:
    assert to_measure("abbc") == [0, 1, 2, 3]
    assert to_measure("aaaa") == [0, 1, 2, 3]
    assert to_measure("xaaaaaaaay") == [0, 1, 5, 8, 9]


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=30), seconds, seconds)
def test_a_cost_that_is_linear_in_depth_is_found_from_the_measured_blocks(
    kinds: list[str], slope: float, base: float
) -> None:
    costs = [Cost(slope * depth, base + slope * depth) for depth in range(len(kinds))]
    found = interpolated(kinds, {block: costs[block] for block in to_measure(kinds)})
    assert [cost.fixed_s for cost in found] == pytest.approx([cost.fixed_s for cost in costs])
    assert [cost.step_s for cost in found] == pytest.approx([cost.step_s for cost in costs])


def test_a_kind_that_nobody_measured_is_our_own_bug() -> None:
    with pytest.raises(AssertionError, match="kind of block 1"):
        interpolated("ab", {0: Cost(0.0, 1.0)})
