"""The block correction: which share of the own update a guess keeps, how it is learnt, and what replaces it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from parablock.correction import Corrector, Guess, Observation, replacement
from parablock.sections import Pipeline

if TYPE_CHECKING:
    import numpy.typing as npt

    Vector = npt.NDArray[np.float32]

NUMEL = (1 << 16) + 7  # over the border of a piece


WHOLE = [[0]] * 6
"""Six blocks of one tensor each."""


def alpha_of(corrector: Corrector, block: int) -> float:
    """Of the block's only tensor."""
    (alpha,) = corrector.alpha(block)
    return alpha


def vector(seed: int, numel: int = 100, scale: float = 1.0) -> Vector:
    values: Vector = (scale * np.random.default_rng(seed).standard_normal(numel)).astype(np.float32)
    return values


def observe(corrector: Corrector, step: Vector, delta: Vector, *, block: int = 0, alone: bool = False) -> Observation:
    """One visit in which the broker moved the block by `step`."""
    start = np.zeros_like(delta)
    if not alone:
        corrector.joined()
    return corrector.learn(corrector.guess(block, start, delta), start + step)


# Alpha


@pytest.mark.parametrize(("correction", "alpha"), [("own", 1.0), ("stale", 0.0)])
@pytest.mark.parametrize("clients", [1, 4])
def test_own_and_stale_never_learn(correction: Any, alpha: float, clients: int) -> None:
    corrector = Corrector(Pipeline(correction=correction), clients, WHOLE)
    assert alpha_of(corrector, 0) == alpha
    observe(corrector, vector(0), 2 * vector(0))
    assert alpha_of(corrector, 0) == alpha


@pytest.mark.parametrize("clients", [2, 4, 9])
def test_shrink_begins_at_one_over_the_root_of_the_clients(clients: int) -> None:
    assert alpha_of(Corrector(Pipeline(), clients, WHOLE), 3) == 1 / math.sqrt(clients)


@pytest.mark.parametrize(("clients", "sampled"), [(4, 2), (4, 1), (9, 3)])
def test_shrink_begins_at_one_over_the_root_of_those_that_train_in_a_round(clients: int, sampled: int) -> None:
    corrector = Corrector(Pipeline(), clients, WHOLE, sampled)
    assert alpha_of(corrector, 3) == 1 / math.sqrt(sampled)
    observe(corrector, np.float32(0.25) * vector(0), vector(0), alone=True)
    assert alpha_of(corrector, 0) == pytest.approx(0.25, rel=1e-6), "drawn by itself, it is still one of several"


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_the_first_observation_is_taken_whole(share: float) -> None:
    corrector = Corrector(Pipeline(smoothing=0.1), 4, WHOLE)
    observe(corrector, np.float32(share) * vector(0), vector(0))
    assert alpha_of(corrector, 0) == pytest.approx(share, rel=1e-6)


def test_alpha_is_the_least_squares_share() -> None:
    step, delta = vector(0, NUMEL) + np.float32(0.5) * vector(1, NUMEL), vector(1, NUMEL)
    corrector = Corrector(Pipeline(), 4, WHOLE)
    observe(corrector, step, delta)
    solution = np.linalg.lstsq(delta.astype(np.float64)[:, None], step.astype(np.float64), rcond=None)[0]
    assert 0.4 < solution[0] < 0.6
    assert alpha_of(corrector, 0) == pytest.approx(float(solution[0]), rel=1e-5)


def test_later_observations_are_smoothed() -> None:
    corrector = Corrector(Pipeline(smoothing=0.25), 4, WHOLE)
    expected = None
    for seen in (0.2, 0.6, 1.0, 0.0):
        observe(corrector, np.float32(seen) * vector(0), vector(0))
        expected = seen if expected is None else 0.25 * seen + 0.75 * expected
        assert alpha_of(corrector, 0) == pytest.approx(expected, rel=1e-5)


def test_each_block_has_an_alpha_of_its_own() -> None:
    corrector = Corrector(Pipeline(), 4, WHOLE)
    observe(corrector, np.float32(0.25) * vector(0), vector(0), block=2)
    assert alpha_of(corrector, 2) == pytest.approx(0.25, rel=1e-6)
    assert alpha_of(corrector, 1) == 0.5


def test_each_tensor_of_a_block_has_an_alpha_of_its_own() -> None:
    shares = [0.25, 1.0, 0.75]
    corrector = Corrector(Pipeline(), 4, [[0], [0, 3, NUMEL]])
    delta = vector(0, NUMEL + 50)
    tensors = [slice(0, 3), slice(3, NUMEL), slice(NUMEL, None)]
    step = delta.copy()
    for tensor, share in zip(tensors, shares, strict=True):
        step[tensor] *= np.float32(share)
    assert observe(corrector, step, delta, block=1).miss > 0.1, "1/2 of all"
    assert corrector.alpha(1) == pytest.approx(shares, rel=1e-6)
    guess = corrector.guess(1, step, delta)
    for tensor, share in zip(tensors, shares, strict=True):
        assert guess.value[tensor] == pytest.approx(step[tensor] + share * delta[tensor], rel=1e-5)
    assert guess.share == pytest.approx((3 * 0.25 + (NUMEL - 3) + 50 * 0.75) / (NUMEL + 50), rel=1e-6)
    assert observe(corrector, step, delta, block=1).miss < 1e-3


def test_a_tensor_whose_update_was_nothing_keeps_its_alpha() -> None:
    corrector = Corrector(Pipeline(smoothing=1.0), 4, [[0, 2]])
    observe(corrector, np.array([1, 1, 1], np.float32), np.array([1, 1, 0], np.float32))
    assert corrector.alpha(0) == (1.0, 0.5)
    observe(corrector, np.array([1, 1, 1], np.float32), np.array([0, 0, 4], np.float32))
    assert corrector.alpha(0) == (1.0, 0.25)


@pytest.mark.parametrize(("factor", "expected"), [(-3.0, 0.0), (3.0, 1.0)])
def test_alpha_stays_between_nothing_and_the_whole_update(factor: float, expected: float) -> None:
    corrector = Corrector(Pipeline(), 4, WHOLE)
    observe(corrector, np.float32(factor) * vector(0), vector(0))
    assert alpha_of(corrector, 0) == expected


def test_an_update_of_nothing_teaches_nothing() -> None:
    corrector = Corrector(Pipeline(), 4, WHOLE)
    assert observe(corrector, vector(0), np.zeros(100, np.float32)) == Observation(1.0, 1.0)
    assert alpha_of(corrector, 0) == 0.5


def test_a_single_client_keeps_exactly_its_own_update() -> None:
    corrector = Corrector(Pipeline(), 1, WHOLE)
    for seed in range(5):
        start, delta = vector(seed), vector(seed + 10, scale=1e-3)
        guess = corrector.guess(0, start, delta)
        assert guess.alpha == (1.0,)
        assert guess.value.tobytes() == (start + delta).tobytes()
        # The mean was rounded on its way: the observation is not exactly 1, and must not count.
        assert corrector.learn(guess, guess.value).drift < 1e-3


def test_a_client_that_is_joined_by_others_is_not_single_any_more() -> None:
    corrector = Corrector(Pipeline(smoothing=1.0), 1, WHOLE)
    observe(corrector, vector(0), vector(0), alone=True)
    assert alpha_of(corrector, 0) == 1.0
    observe(corrector, np.float32(0.5) * vector(0), vector(0), alone=False)
    assert alpha_of(corrector, 0) == pytest.approx(0.5, rel=1e-6)
    observe(corrector, np.float32(0.25) * vector(0), vector(0), alone=True)  # a round in which the others were late
    assert alpha_of(corrector, 0) == pytest.approx(0.25, rel=1e-6)


def test_one_that_is_taken_for_joined_though_it_is_single_learns_that_all_of_its_update_counts() -> None:
    """As after the repair of a block, which no client has made."""
    corrector = Corrector(Pipeline(), 1, WHOLE)
    for seed in range(5):
        observe(corrector, vector(seed), vector(seed), alone=False)
        assert alpha_of(corrector, 0) == pytest.approx(1.0, abs=1e-6)


def test_one_of_several_does_not_become_single_by_contributing_alone() -> None:
    corrector = Corrector(Pipeline(), 4, WHOLE)
    observe(corrector, np.float32(0.25) * vector(0), vector(0), alone=True)
    assert alpha_of(corrector, 0) == pytest.approx(0.25, rel=1e-6)


def test_a_run_has_clients_and_a_correction_that_config_knows() -> None:
    for clients, sampled in ((0, None), (4, 0), (4, 5)):
        with pytest.raises(AssertionError):
            Corrector(Pipeline(), clients, WHOLE, sampled)
    with pytest.raises(AssertionError, match="no such correction: other"):
        alpha_of(Corrector(Pipeline(correction="other"), 2, WHOLE), 0)  # type: ignore[arg-type]


# Guesses


@pytest.mark.parametrize(("correction", "factor"), [("own", 1.0), ("stale", 0.0), ("shrink", 0.5)])
def test_a_guess_is_the_start_and_alpha_of_the_update(correction: Any, factor: float) -> None:
    start, delta = vector(0), vector(1)
    guess = Corrector(Pipeline(correction=correction), 4, WHOLE).guess(5, start, delta)
    assert (guess.block, guess.alpha) == (5, (factor,))
    assert guess.value.dtype == np.float32
    assert guess.start is start
    assert guess.delta is delta
    assert guess.value.tobytes() == (start + np.float32(factor) * delta).tobytes()


# Drift and miss


def test_the_drift_is_the_distance_from_the_mean_relative_to_it() -> None:
    step, delta = vector(0, NUMEL), vector(1, NUMEL)
    apart = np.linalg.norm(delta.astype(np.float64) - step.astype(np.float64)) / np.linalg.norm(step.astype(np.float64))
    assert observe(Corrector(Pipeline(), 4, WHOLE), step, delta).drift == pytest.approx(float(apart), rel=1e-5)


@pytest.mark.parametrize(("correction", "share"), [("own", 1.0), ("stale", 0.0), ("shrink", 0.5)])
def test_the_miss_is_the_distance_of_the_guess(correction: Any, share: float) -> None:
    step, delta = vector(0, NUMEL), vector(1, NUMEL)
    apart = np.linalg.norm(np.float32(share) * delta - step) / np.linalg.norm(step)
    seen = observe(Corrector(Pipeline(correction=correction), 4, WHOLE), step, delta)
    assert seen.miss == pytest.approx(float(apart), rel=1e-4)


def test_no_guess_misses_by_the_step_itself() -> None:
    assert observe(Corrector(Pipeline(correction="stale"), 4, WHOLE), vector(0), vector(1)).miss == 1.0


def test_the_drift_of_the_mean_itself_is_nothing() -> None:
    assert observe(Corrector(Pipeline(), 4, WHOLE), vector(0), vector(0)).drift == pytest.approx(0.0, abs=1e-3)


def test_the_drift_is_always_a_number_that_can_be_told() -> None:
    zero, one, tiny = np.zeros(100, np.float32), vector(0), vector(1, scale=1e-15)
    corrector = Corrector(Pipeline(), 4, WHOLE)
    assert observe(corrector, zero, zero) == Observation(0.0, 0.0)
    assert observe(corrector, zero, one) == Observation(1e9, 1e9)
    assert observe(corrector, tiny, one) == Observation(1e9, pytest.approx(1.0)), "alpha has become 0"


@pytest.mark.parametrize(("step", "delta"), [(1e25, 1e25), (1e25, 1.0), (1.0, 1e25), (1e25, -1e25)])
def test_a_run_that_blows_up_teaches_nothing_and_is_told_as_such(step: float, delta: float) -> None:
    # Squares of such values are beyond float32; an alpha that is not a number would reach the model.
    corrector = Corrector(Pipeline(), 4, WHOLE)
    assert observe(corrector, np.float32(step) * vector(0), np.float32(delta) * vector(1)) == Observation(1e9, 1e9)
    assert alpha_of(corrector, 0) == 0.5


# Replacement


def test_the_delta_rule_keeps_what_a_later_round_added() -> None:
    held, guess, landed = (np.array(values, np.float32) for values in ([7.0, 5.0], [4.0, 4.0], [1.0, 6.0]))
    assert replacement(held, guess, landed).tolist() == [4.0, 7.0]


def test_a_guess_is_not_changed() -> None:
    with pytest.raises(AttributeError):
        Guess(0, vector(0), vector(1), (slice(None),), (1.0,)).alpha = (0.5,)  # type: ignore[misc]
