"""Adaptive K: where it settles, that it never leaves its bounds, and that noise does not move it."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parablock.adaptive_steps import MARGIN_SHARE, MARGIN_STEPS, AdaptiveSteps
from parablock.messages import Offer
from parablock.participant_events import Arrived
from parablock.rounds import Round, Upload
from parablock.sections import Solver
from parablock.transfer import Incoming
from workers.rounds import _exchange_s

seconds = st.floats(1e-9, 1e9)


def adaptive(steps: int = 8, low: int = 1, high: int = 1000, in_flight: int = 1) -> AdaptiveSteps:
    return AdaptiveSteps(Solver(adaptive=True, steps=steps, min_steps=low, max_steps=high), in_flight)


def settled(choice: AdaptiveSteps, exchange_s: float, step_s: float, rounds: int = 40, overhead_s: float = 0.0) -> int:
    """The K after so many rounds in which a round takes `overhead_s` beyond its steps."""
    for _ in range(rounds):
        steps = choice.next(0, [0])
        choice.trained(0, steps, overhead_s + steps * step_s)
        choice.exchanged(0, exchange_s)
    return choice.next(0, [0])


def near(steps: int, wanted: float) -> bool:
    """Whether `wanted` is in the range that K stands for, with its margins."""
    below, above = MARGIN_SHARE * steps + 1e-6, max(MARGIN_STEPS, MARGIN_SHARE * steps) + 1e-6
    return steps - 1 - below <= wanted <= steps + above


@given(
    st.integers(1, 50),
    st.integers(0, 50),
    st.integers(0, 50),
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(0, 2), seconds, st.none() | st.floats(0, 1e9)), max_size=30),
)
def test_whatever_is_observed_it_stays_within_its_bounds(
    low: int, first: int, more: int, in_flight: int, rounds: list[tuple[int, float, float | None]]
) -> None:
    high = low + first + more
    choice = adaptive(low + first, low, high, in_flight)
    for block, compute_s, exchange_s in rounds:
        steps = choice.next(block, [0])
        assert low <= steps <= high
        choice.trained(block, steps, compute_s)
        if exchange_s is not None:
            choice.exchanged(0, exchange_s)
    assert low <= choice.next(0, [0]) <= high


@given(st.floats(0.01, 100), st.floats(0.5, 500), st.integers(1, 1000), st.integers(1, 3))
def test_on_a_constant_link_it_settles_at_exchange_over_step_seconds(
    step_s: float, wanted: float, first: int, in_flight: int
) -> None:
    choice = adaptive(first, in_flight=in_flight)
    steps = settled(choice, wanted * step_s * in_flight, step_s)
    assert near(steps, wanted)
    assert settled(choice, wanted * step_s * in_flight, step_s, rounds=10) == steps


@given(st.floats(4, 400), st.integers(1, 800))
def test_a_client_twice_as_slow_settles_at_half_the_steps(wanted: float, first: int) -> None:
    fast, slow = settled(adaptive(first), wanted, 1.0), settled(adaptive(first), wanted, 2.0)
    assert near(fast, wanted)
    assert near(slow, wanted / 2)
    assert fast / 2 == pytest.approx(slow, rel=2 * MARGIN_SHARE, abs=1 + 2 * MARGIN_STEPS)


def test_training_lasts_as_long_as_the_exchange_also_where_a_round_costs_more_than_its_steps() -> None:
    assert settled(adaptive(), exchange_s=10.0, step_s=1.0, overhead_s=2.5) == 8


def test_the_round_that_hides_and_the_exchange_that_waits_for_the_one_before_find_each_other() -> None:
    """On a link that carries one exchange at a time a round that is too short makes the next exchange queue."""
    choice, link_s = adaptive(steps=1), 12.0
    for _ in range(30):
        steps = choice.next(0, [0])
        choice.trained(0, steps, 1.0 * steps)
        choice.exchanged(0, link_s + max(link_s - steps, 0.0))
    assert choice.next(0, [0]) == 12


def raced(step_s: dict[str, float], exchange_s: float, rounds: int = 40) -> tuple[dict[str, int], float]:
    """The K of clients that train together, by name, and how long their rounds last in the end.

    One round is in flight. A client's own way up takes `exchange_s`, one contribution after the other, and each block
    comes down as the last one goes up.
    """
    choices = {name: adaptive() for name in step_s}
    ended, up = dict.fromkeys(step_s, 0.0), dict.fromkeys(step_s, 0.0)
    landed = [0.0, 0.0]
    for number in range(rounds):
        closing = Round(number, number % 4)
        for name, choice in choices.items():
            began = max(ended[name], landed[-2])
            steps = choice.next(number % 4, [(number - 1) % 4])
            ended[name] = began + steps * step_s[name]
            choice.trained(number % 4, steps, ended[name] - began)
            up[name] = max(up[name], ended[name]) + exchange_s
            offer = Offer(number, number % 4, 1, 1, steps, 0.0)
            closing.begin(name, Upload("", offer, Incoming(1, 1, 1), up[name], done_at=up[name]))
        landed.append(max(up.values()))
        for name, ahead_s in closing.ahead_s(list(step_s)).items():
            arrived = Arrived(number, number % 4, 1, -1, len(step_s), True, landed[-2], landed[-1], ahead_s)
            choices[name].exchanged(number % 4, _exchange_s((0.0, ended[name]), arrived))
    taken = {name: choice.next(rounds % 4, [(rounds - 1) % 4]) for name, choice in choices.items()}
    return taken, (landed[-1] - landed[-9]) / 8


@pytest.mark.parametrize("slower", [1.5, 2.0, 3.0])
def test_beside_a_slower_client_rounds_last_no_longer(slower: float) -> None:
    """What the fast one waits for is not taken for its own exchange, which more steps would hide."""
    alike, alike_s = raced({"a": 1.0, "b": 1.0}, exchange_s=12.0)
    taken, round_s = raced({"a": 1.0, "b": slower}, exchange_s=12.0)
    assert alike == {"a": 12, "b": 12}
    assert taken == {"a": 12, "b": 12 / slower}
    assert round_s == pytest.approx(alike_s)


def test_before_the_first_exchange_it_is_the_steps_of_the_settings() -> None:
    choice = adaptive(steps=5)
    assert choice.next(0, [0]) == 5
    choice.trained(0, 5, 1.0)
    assert choice.next(1, [0]) == 5
    choice.exchanged(0, 100.0)
    assert choice.next(1, []) == 5, "nothing is on its way that this round could hide"
    assert choice.next(2, [1]) == 500, "of block 1 no more is known than of any"


def test_noise_around_a_whole_number_of_steps_moves_nothing() -> None:
    generator, choice, seen = random.Random(0), adaptive(steps=7), set()
    for _ in range(200):
        steps = choice.next(0, [0])
        seen.add(steps)
        choice.trained(0, steps, steps * generator.uniform(0.98, 1.02))
        choice.exchanged(0, 7.0 * generator.uniform(0.98, 1.02))
    assert seen == {7}


@pytest.mark.parametrize("first", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("wanted", [1.8, 2.1])
def test_a_tenth_of_a_step_is_not_hidden_behind_a_whole_one_wherever_it_began(first: int, wanted: float) -> None:
    assert settled(adaptive(first), wanted, 1.0) == (2 if (first, wanted) != (3, 2.1) else 3), "3 stands for it as well"


def test_one_slow_round_moves_nothing() -> None:
    choice = adaptive()
    assert settled(choice, 5.5, 1.0) == 6
    choice.exchanged(0, 500.0)
    choice.trained(0, 6, 500.0)
    assert choice.next(0, [0]) == 6


def test_a_block_whose_steps_take_longer_gets_fewer() -> None:
    choice = adaptive()
    for _ in range(10):
        for block, step_s in enumerate((4.0, 1.0)):
            choice.trained(block, steps := choice.next(block, [0]), steps * step_s)
            choice.exchanged(0, 20.0)
    assert (choice.next(0, [0]), choice.next(1, [0])) == (5, 20)


def test_a_round_lasts_as_long_as_the_exchange_of_the_blocks_that_are_on_their_way() -> None:
    choice = adaptive(in_flight=2)
    choice.trained(0, 10, 10.0)
    for block, exchange_s in enumerate((10.0, 20.0, 40.0)):
        choice.exchanged(block, exchange_s)
    assert [choice.next(0, hidden) for hidden in ([0, 1], [1, 2], [2, 2])] == [8, 15, 20]


@given(st.integers(1, 100), st.lists(st.tuples(seconds, seconds), max_size=10))
def test_unless_it_is_asked_for_nothing_adapts(steps: int, rounds: list[tuple[float, float]]) -> None:
    choice = AdaptiveSteps(Solver(steps=steps), in_flight=1)
    for compute_s, exchange_s in rounds:
        assert choice.next(0, [0]) == steps
        choice.trained(0, steps, compute_s)
        choice.exchanged(0, exchange_s)
    assert choice.next(0, [0]) == steps
