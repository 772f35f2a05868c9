"""Noise and cutting, as they leave: of the right variance, apart from every other randomness, and bounded before."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import pytest

from parablock.noise import Noise, noised_mean, norm, private
from parablock.privacy_settings import ROUNDING, Privacy

if TYPE_CHECKING:
    import numpy.typing as npt

    Vector = npt.NDArray[np.float32]

NUMEL = 200_000  # more than a piece, and no multiple of one
PRIVACY = Privacy("local", clip=0.5, noise=3.0, budget=8.0)


def vector(seed: int, length: float) -> Vector:
    drawn = np.random.default_rng(seed).standard_normal(NUMEL)
    values: Vector = (length * drawn / np.linalg.norm(drawn)).astype(np.float32)
    return values


def test_the_noise_has_the_deviation_that_was_asked_for_and_no_mean() -> None:
    values = np.full(NUMEL, 100.0, np.float32)
    Noise(key=7).add(values, 1.5)
    errors = values.astype(np.float64) - 100.0
    assert errors.std() == pytest.approx(1.5, rel=0.01)  # its own deviation is 0.16 %
    assert abs(errors.mean()) < 4 * 1.5 / np.sqrt(NUMEL)
    assert np.mean(np.abs(errors) > 2 * 1.5) == pytest.approx(0.0455, abs=0.003), "Gaussian"
    halves = errors[: NUMEL // 2], errors[NUMEL // 2 :]
    assert abs(np.corrcoef(*halves)[0, 1]) < 0.02, "no draw is used twice"


def test_noise_depends_on_nothing_that_anybody_knows() -> None:
    """The run's seed, and every other generator, are set the same each time."""
    drawn = []
    for _ in range(3):
        np.random.seed(0)
        values = np.zeros(8, np.float32)
        Noise().add(values, 1.0)
        drawn.append(values.tobytes())
    assert len(set(drawn)) == 3
    same = [np.zeros(8, np.float32) for _ in range(2)]
    for values in same:
        Noise(key=3).add(values, 1.0)
    assert same[0].tobytes() == same[1].tobytes(), "a test's key says all of it"


@pytest.mark.parametrize("length", [0.0, 0.1, 0.5, 40.0, 1e30])
def test_no_delta_leaves_longer_than_it_may(length: float) -> None:
    delta = vector(1, 1.0) * np.float32(length)
    silent = Privacy("local", clip=0.5, noise=1e-9, budget=8.0)
    before = delta.tobytes()
    left = private(delta, silent, Noise(key=1))
    assert delta.tobytes() == before
    assert norm(left) == pytest.approx(min(length, 0.5), rel=1e-5, abs=1e-6)
    assert norm(left) <= 0.5 * (1 + ROUNDING)
    assert np.dot(left, delta) >= 0.0


def test_what_leaves_of_a_delta_that_is_not_finite_is_noise_like_any_other() -> None:
    wrong = vector(1, 1.0)
    wrong[77] = np.nan
    left = private(wrong, PRIVACY, Noise(key=5))
    assert left.tobytes() == private(np.zeros_like(wrong), PRIVACY, Noise(key=5)).tobytes()
    assert left.std() == pytest.approx(1.5, rel=0.01)


def test_a_noised_mean_has_one_denominator_whoever_comes() -> None:
    deltas, out = [vector(seed, 2.0) for seed in range(3)], np.empty(NUMEL, np.float32)
    central = Privacy("central", clip=0.5, noise=1e-9, budget=8.0)
    for count in range(1, 4):
        noised_mean(deltas[:count], [0.25] * count, 4, central, Noise(key=1), out)
        expected = sum(0.25 * delta.astype(np.float64) for delta in deltas[:count]) / 4
        assert np.abs(out - expected).max() < 1e-7


def test_one_client_more_or_less_moves_the_sum_by_no_more_than_the_noise_is_made_for() -> None:
    """Whoever else is there: S, of which the noise's deviation is z S (1 + ROUNDING)."""
    central = Privacy("central", clip=0.5, noise=1.0, budget=8.0)
    deltas = [vector(seed, length) for seed, length in enumerate((0.2, 0.5, 9.0, 1e4))]
    factors = [min(1.0, 0.5 / norm(delta)) for delta in deltas]
    sums = {}
    for size in range(1, 5):
        for who in itertools.combinations(range(4), size):
            sums[who] = summed([deltas[i] for i in who], [factors[i] for i in who], central)
    for who, total in sums.items():
        for other in set(range(4)) - set(who):
            apart = np.linalg.norm(sums[tuple(sorted({*who, other}))] - total)
            assert apart <= 0.5 * (1 + ROUNDING)


def test_nor_where_thousands_point_the_same_way() -> None:
    """In float32 the sum of 4096 was moved by up to 1.7e-5 too much."""
    central = Privacy("central", clip=1.0, noise=1.0, budget=8.0)
    drawn = np.random.default_rng(0).standard_normal((8, 100))
    first, *many = [(each / np.linalg.norm(each)).astype(np.float32) for each in drawn]
    for one in (first, -first, *many):
        factors = [min(1.0, 1.0 / norm(one)), *[1.0] * 4095]
        with_it, without = (summed([each, *[first] * 4095], factors, central) for each in (one, np.zeros_like(one)))
        assert np.linalg.norm(with_it - without) <= 1 + ROUNDING


def summed(deltas: list[Vector], factors: list[float], privacy: Privacy) -> npt.NDArray[np.float64]:
    """What the noise is added to."""
    silent, out = Silent(), np.empty_like(deltas[0])
    noised_mean(deltas, factors, 4, privacy, silent, out)
    total: npt.NDArray[np.float64] = np.concatenate(silent.given)
    assert np.array_equal(out, (total / 4).astype(np.float32))
    return total


class Silent(Noise):
    """None, and what it was asked to be added to."""

    def __init__(self) -> None:
        super().__init__(key=0)
        self.given: list[npt.NDArray[np.float64]] = []

    def add(self, values: Vector | npt.NDArray[np.float64], deviation: float) -> None:
        assert deviation > 0.0
        self.given.append(values.astype(np.float64))


def test_the_noise_of_a_mean_has_the_deviation_that_the_accountant_assumes() -> None:
    central = Privacy("central", clip=0.5, noise=3.0, budget=8.0)
    out = np.empty(NUMEL, np.float32)
    noised_mean([np.zeros(NUMEL, np.float32)], [1.0], 4, central, Noise(key=2), out)
    assert out.std() == pytest.approx(3.0 * 0.5 / 4, rel=0.01)
    assert central.deviation >= 3.0 * 0.5
