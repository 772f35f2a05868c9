"""The learning rate over rounds: its ends, its middle, and that it never leaves its bounds."""

from __future__ import annotations

import itertools
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parablock.learning_rate import learning_rate
from parablock.sections import Solver

schedules = st.sampled_from(["constant", "cosine", "linear"])


def test_constant_is_the_same_in_every_round() -> None:
    settings = Solver(lr=3e-4, lr_schedule="constant", lr_final=0.1)
    assert {learning_rate(settings, round, 20) for round in range(20)} == {3e-4}


def test_warm_up_rises_by_equal_steps_and_reaches_the_peak_in_the_round_after() -> None:
    settings = Solver(lr=1.0, lr_schedule="constant", warmup=0.5)
    rates = [learning_rate(settings, round, 7) for round in range(7)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0])


@pytest.mark.parametrize(("warmup", "rounds", "rising"), [(0.0, 9, 0), (0.25, 3, 0), (0.25, 35, 8), (0.29, 100, 29)])
def test_a_share_of_the_rounds_is_rounded_down(warmup: float, rounds: int, rising: int) -> None:
    rates = [learning_rate(Solver(lr=1.0, warmup=warmup), round, rounds) for round in range(rounds)]
    assert rates.index(1.0) == rising


def test_linear_falls_by_equal_steps() -> None:
    settings = Solver(lr=1.0, lr_schedule="linear", lr_final=0.2)
    assert [learning_rate(settings, round, 4) for round in range(4)] == pytest.approx([1.0, 0.8, 0.6, 0.4])


def test_cosine_is_half_way_in_the_middle_and_flat_at_both_ends() -> None:
    settings = Solver(lr=1.0, lr_schedule="cosine", lr_final=0.0)
    rates = [learning_rate(settings, round, 100) for round in range(100)]
    assert rates[50] == pytest.approx(0.5)
    assert rates[0] - rates[1] < 0.001 < 0.015 < rates[50] - rates[51]
    assert 0 < rates[99] < 0.001


@given(schedules, st.integers(1, 60), st.floats(0, 0.99), st.floats(0, 1))
def test_starts_below_or_at_the_peak_reaches_it_and_ends_where_asked(
    schedule: Literal["constant", "cosine", "linear"], rounds: int, warmup: float, final: float
) -> None:
    settings = Solver(lr=2e-3, lr_schedule=schedule, lr_final=final, warmup=warmup)
    rates = [learning_rate(settings, round, rounds) for round in range(rounds)]
    rising = next(round for round, rate in enumerate(rates) if rate == pytest.approx(2e-3, rel=1e-12))
    assert rising <= warmup * rounds + 1e-9 < rising + 1
    assert rates[rising] == pytest.approx(2e-3)
    assert all(low < high for low, high in itertools.pairwise(rates[: rising + 1]))
    assert all(high >= low - 1e-15 for high, low in itertools.pairwise(rates[rising:]))
    assert all(0 <= rate <= 2e-3 + 1e-15 for rate in rates)
    if schedule != "constant":  # the rate that would be next is where it was asked to end
        assert rates[-1] >= final * 2e-3 - 1e-12
        assert rates[-1] == pytest.approx(final * 2e-3, abs=2e-3 * 1.6 / (rounds - rising))
