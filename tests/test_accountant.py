"""The accountant, against computations of its own that share nothing with it."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest

from parablock.accountant import NoAccountantError, epsilon, most_rounds


def delta_of(eps: float, apart: float) -> float:
    """δ(ε) of two unit Gaussians that are so far apart (Balle and Wang, arXiv 1805.06530, theorem 8)."""

    def tail(x: float) -> float:
        return 0.5 * math.erfc(x / math.sqrt(2.0))

    return tail(eps / apart - apart / 2.0) - math.exp(eps) * tail(eps / apart + apart / 2.0)


def exact(noise: float, rounds: int, delta: float) -> float:
    """By bisection of what falls with ε."""
    apart = math.sqrt(rounds) / noise
    low, high = 0.0, 500.0
    if delta_of(0.0, apart) <= delta:
        return 0.0
    for _ in range(200):
        middle = (low + high) / 2.0
        low, high = (middle, high) if delta_of(middle, apart) > delta else (low, middle)
    return high


@pytest.mark.parametrize(
    ("noise", "rounds", "delta"),
    [
        (1.0, 1, 1e-5),
        (1.0, 16, 1e-5),
        (0.7, 10, 1e-6),
        (4.0, 400, 1e-5),
        (8.0, 10, 1e-3),
        (20.0, 1, 1e-2),
        (1.5, 100, 1e-7),
        (50.0, 3, 1e-9),
        (100.0, 1, 0.1),
    ],
)
def test_epsilon_is_that_of_the_analytic_gaussian_mechanism(noise: float, rounds: int, delta: float) -> None:
    found, expected = epsilon(noise, rounds, delta), exact(noise, rounds, delta)
    assert found == pytest.approx(expected, abs=1e-3)
    assert found >= expected - 1e-9, "never too low"


def test_two_rounds_compose_to_one_with_less_noise() -> None:
    """δ of two mechanisms at once, by adding up max(p − eᵉ q, 0) over the plane, with nothing assumed of their sum."""
    noise, eps = 1.3, epsilon(1.3, 2, 1e-3)
    at = np.arange(-10.0, 12.0, 0.01)
    near = np.exp(-((at - 1.0 / noise) ** 2) / 2.0) / math.sqrt(2.0 * math.pi)
    far = np.exp(-(at**2) / 2.0) / math.sqrt(2.0 * math.pi)
    excess = np.maximum(np.outer(near, near) - math.exp(eps) * np.outer(far, far), 0.0)
    assert float(excess.sum()) * 0.01**2 == pytest.approx(1e-3, rel=2e-3)


@pytest.mark.parametrize(("noise", "budget"), [(1.0, 8.0), (4.0, 8.0), (2.0, 3.0), (0.5, 100.0)])
def test_as_many_rounds_as_the_budget_allows_and_not_one_more(noise: float, budget: float) -> None:
    most = most_rounds(noise, 1e-5, budget, 10_000)
    assert epsilon(noise, most, 1e-5) <= budget < epsilon(noise, most + 1, 1e-5)
    assert most_rounds(noise, 1e-5, budget, most - 1) == most - 1, "no more than there are"


def test_no_rounds_cost_nothing_and_next_to_no_noise_more_than_can_be_told() -> None:
    assert epsilon(1.0, 0, 1e-5) == 0.0
    assert epsilon(0.001, 1, 1e-5) == math.inf
    assert most_rounds(0.001, 1e-5, 1000.0, 10) == 0


def test_without_the_package_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting.pld", None)
    with pytest.raises(NoAccountantError, match=r"pip install -c constraints\.txt -e '\.\[privacy\]'"):
        epsilon(1.25, 3, 1e-5)
