"""How far contributions lie apart, by hand and on drawn ones of known spread; what each rule's theory asks for."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bench import spread


def drawn(clients: int, apart: float, numel: int = 4000) -> list[np.ndarray]:
    """Of signal 1, and of spread `apart`, as far as chance goes."""
    random = np.random.default_rng(0)
    common = random.standard_normal(numel)
    common /= np.linalg.norm(common)
    noise = [random.standard_normal(numel) * apart / math.sqrt(numel) for _ in range(clients)]
    return [(common + each).astype(np.float32) for each in noise]


def test_by_hand() -> None:
    # The mean is (3, 0) and each is 1 from it: s² = 2, g² = 9 − 2 / 2.
    deltas = [np.array([3.0, 1.0], np.float32), np.array([3.0, -1.0], np.float32)]
    assert spread.ratio(deltas) == pytest.approx(math.sqrt(2.0 / 8.0))


def test_contributions_that_are_alike_have_no_spread_and_opposite_ones_no_signal() -> None:
    one = np.ones(3, np.float32)
    assert spread.ratio([one, one, one]) == 0.0
    assert spread.ratio([one, -one]) == math.inf
    assert spread.ratio([0.0 * one, 0.0 * one]) == math.inf


@pytest.mark.parametrize("clients", [3, 10])
@pytest.mark.parametrize("apart", [0.2, 2.0])
def test_it_does_not_depend_on_how_many_there_are(clients: int, apart: float) -> None:
    assert spread.ratio(drawn(clients, apart)) == pytest.approx(apart, rel=0.1)


def test_krum_asks_for_the_published_factor() -> None:
    # η² = 2 (6 + (1 · 4 + 1 · 5) / 3) for n = 7, f = 1, and 2 (9 + (2 · 7 + 4 · 8) / 5) for n = 11, f = 2.
    assert spread.asked("krum", 7, 1) == pytest.approx(math.sqrt(18.0))
    assert spread.asked("multi-krum", 11, 2) == pytest.approx(math.sqrt(36.4))


def test_median_and_trimmed_mean_ask_for_less_the_more_clients_there_are() -> None:
    for rule in ("median", "trimmed-mean"):
        assert spread.asked(rule, 4, 1) == pytest.approx(0.75)
        assert spread.asked(rule, 100, 10) == pytest.approx(0.2)
    assert spread.asked("mean", 7, 1) is None
