"""Aggregation: the mean against a slow reference in float64, exact where that is promised, and the optimizers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parablock.aggregation import PIECE, STATE, decayed, server_move, shares, unfit, weighted_mean
from parablock.sections import Server

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Vector = npt.NDArray[np.float32]

SIZES = [1, 7, 1000, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE + 5]


def vector(numel: int, seed: int, scale: float = 1.0) -> Vector:
    values: Vector = (scale * np.random.default_rng(seed).standard_normal(numel)).astype(np.float32)
    return values


def reference_mean(vectors: Sequence[Vector], weights: Sequence[int]) -> list[float]:
    """Σ w_i Δ_i / Σ w_i element by element, in the double precision of Python."""
    total = sum(weights)
    return [
        math.fsum(weight * float(values[n]) for values, weight in zip(vectors, weights, strict=True)) / total
        for n in range(vectors[0].size)
    ]


# The mean


@pytest.mark.parametrize("numel", [1, 7, 1000])
@pytest.mark.parametrize("weights", [[1], [1, 1], [3, 1, 4, 1, 5], [2**53, 1], [1, 10**6, 1000]])
def test_the_mean_is_that_of_a_slow_reference(numel: int, weights: list[int]) -> None:
    vectors = [vector(numel, seed, scale=10.0**seed) for seed in range(len(weights))]
    mean = weighted_mean(vectors, weights)
    assert mean.dtype == np.float32
    assert mean.shape == (numel,)
    # Each of n terms is rounded twice (share, product), each of n sums once.
    largest = sum(abs(values) * weight / sum(weights) for values, weight in zip(vectors, weights, strict=True))
    np.testing.assert_array_less(
        abs(mean - reference_mean(vectors, weights)), (len(weights) + 2) * np.finfo(np.float32).eps * largest + 1e-30
    )


@settings(deadline=None)
@given(
    st.sampled_from(SIZES),
    st.lists(st.integers(1, 10**9), min_size=1, max_size=4),
    st.sampled_from([1000, 4096, PIECE - 1, PIECE, PIECE + 3]),
)
def test_the_mean_of_chunks_is_the_chunks_of_the_mean(numel: int, weights: list[int], size: int) -> None:
    vectors = [vector(numel, seed) for seed in range(len(weights))]
    chunks = [weighted_mean([v[at : at + size] for v in vectors], weights) for at in range(0, numel, size)]
    assert np.concatenate(chunks).tobytes() == weighted_mean(vectors, weights).tobytes()


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("weight", [1, 3, 12_345, 2**53])
def test_the_mean_of_one_contribution_is_that_contribution_bit_for_bit(numel: int, weight: int) -> None:
    values = vector(numel, 3)
    values[0] = -0.0
    values[-1] = np.float32(1e-45)  # the smallest there is
    assert weighted_mean([values], [weight]).tobytes() == values.tobytes()


@given(st.permutations(range(4)))
def test_the_fold_is_in_the_order_of_the_list(order: list[int]) -> None:
    vectors, weights = [vector(500, seed, scale=10.0**seed) for seed in range(4)], [3, 1, 4, 2]
    mean = weighted_mean([vectors[n] for n in order], [weights[n] for n in order])
    total = np.zeros(500, dtype=np.float32)
    for position, n in enumerate(order):
        term = vectors[n] * np.float32(weights[n] / 10)
        total = term if position == 0 else total + term
    assert mean.tobytes() == total.tobytes()


def test_another_order_is_another_sum() -> None:
    # Else the test above could not fail.
    one, two, three = (np.array([value], dtype=np.float32) for value in (1e8, -1e8, 1.0))
    assert weighted_mean([one, two, three], [1, 1, 1]) != weighted_mean([one, three, two], [1, 1, 1])


def test_contributions_are_not_modified() -> None:
    # They are views of the socket's frames where the codec is float32, and folded again when one turns out unfit.
    vectors = [vector(1000, seed) for seed in range(3)]
    for values in vectors:
        values.flags.writeable = False
    first = weighted_mean(vectors, [1, 2, 3])
    assert weighted_mean(vectors, [1, 2, 3]).tobytes() == first.tobytes()
    assert not any(np.shares_memory(first, values) for values in vectors)


@pytest.mark.parametrize("numel", [999, 1001])
def test_a_contribution_of_another_length_is_our_own_bug(numel: int) -> None:
    with pytest.raises((AssertionError, ValueError)):
        weighted_mean([vector(1000, 0), vector(numel, 1)], [1, 1])


# Clients that take more steps than others

tokens_and_steps = st.lists(st.tuples(st.integers(1, 10**6), st.integers(1, 64)), min_size=1, max_size=6)


@given(tokens_and_steps)
def test_normalised_shares_are_fednovas(clients: list[tuple[int, int]]) -> None:
    tokens, steps = zip(*clients, strict=True)
    p = [n / sum(tokens) for n in tokens]
    effective = math.fsum(share * tau for share, tau in zip(p, steps, strict=True))
    expected = [effective * share / tau for share, tau in zip(p, steps, strict=True)]
    assert shares(tokens, steps) == pytest.approx(expected, rel=1e-12)


@given(st.lists(st.integers(1, 2**53), min_size=1, max_size=6), st.integers(1, 2**31))
def test_with_equal_steps_shares_are_those_by_tokens_to_the_last_bit(tokens: list[int], steps: int) -> None:
    assert shares(tokens, [steps] * len(tokens)) == shares(tokens, None) == [n / sum(tokens) for n in tokens]


@given(st.integers(1, 2**53), st.integers(1, 2**31))
def test_a_single_share_is_the_whole(tokens: int, steps: int) -> None:
    assert shares([tokens], [steps]) == shares([tokens], None) == [1.0]


def test_a_client_that_takes_four_times_the_steps_counts_for_its_tokens_only() -> None:
    """Deltas grow with the steps, each client's in its own direction, and so do tokens."""
    slow, fast = np.array([1.0, 0.0], np.float32), np.array([0.0, 4.0], np.float32)
    by_tokens = weighted_mean([slow, fast], [100, 400])
    assert by_tokens[1] / by_tokens[0] == pytest.approx(16.0), "for its tokens and for its length"
    normalised = weighted_mean([slow, fast], [100, 400], [8, 32])
    assert normalised[1] / normalised[0] == pytest.approx(4.0)
    assert normalised.tolist() == pytest.approx([0.68, 2.72]), "27.2 steps of an eighth, by a fifth and four fifths"


@given(st.lists(st.integers(1, 64), min_size=2, max_size=6), st.integers(1, 10**6))
def test_deltas_of_as_many_tokens_a_step_count_alike(steps: list[int], rate: int) -> None:
    found = shares([rate * taken for taken in steps], steps)
    assert found == pytest.approx([found[0]] * len(steps), rel=1e-12)
    assert found[0] >= 1 / len(steps) - 1e-12, "and no less than the mean of them all"


# Those that come late


late_ones = st.lists(st.tuples(st.integers(1, 10**6), st.integers(1, 64), st.integers(0, 4)), min_size=1, max_size=6)


@given(late_ones, st.floats(0.01, 1.0))
def test_shares_of_late_ones_are_fednovas_with_tokens_that_decay(
    clients: list[tuple[int, int, int]], decay: float
) -> None:
    """p_i = d^m_i n_i over the sum of these, τ_eff = Σ p_i τ_i, and a share is τ_eff p_i / τ_i."""
    steps = [tau for _, tau, _ in clients]
    tokens = [decay**missed * n for n, _, missed in clients]
    p = [n / math.fsum(tokens) for n in tokens]
    effective = math.fsum(share * tau for share, tau in zip(p, steps, strict=True))
    expected = [effective * share / tau for share, tau in zip(p, steps, strict=True)]
    weights = [decayed(n, decay, missed) for n, _, missed in clients]
    assert shares(weights, steps) == pytest.approx(expected, rel=1e-12)
    assert shares(weights, None) == pytest.approx([n / math.fsum(tokens) for n in tokens], rel=1e-12)


def test_what_is_in_time_does_not_decay() -> None:
    assert decayed(2**53 - 1, 0.3, 0) == 2**53 - 1
    assert decayed(8, 0.5, 3) == 1
    assert decayed(7, 1.0, 4) == 7


# What must not be counted


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, PIECE - 1, PIECE, PIECE + 6])
def test_a_value_that_is_not_finite_makes_a_contribution_unfit(bad: float, position: int) -> None:
    values = vector(PIECE + 7, 0)
    assert unfit(values) is None
    values[position] = bad
    assert unfit(values) == "the update holds values that are not finite (NaN or infinity)"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("client", [0, 1, 2])
def test_a_mean_is_unfit_if_any_contribution_is(bad: float, client: int) -> None:
    # The broker looks at the mean only, and at each contribution only if that is not finite.
    vectors = [vector(1000, seed) for seed in range(3)]
    vectors[client][500] = bad
    vectors[(client + 1) % 3][500] = -bad
    with np.errstate(invalid="ignore"):
        assert unfit(weighted_mean(vectors, [2**53, 1, 1])) is not None


def test_the_largest_finite_values_are_fit() -> None:
    assert unfit(np.array([np.finfo(np.float32).max, -np.finfo(np.float32).max, 1e-45], np.float32)) is None


# Server optimizers


def plain_loop(settings: Server, x: Vector, means: Sequence[Vector]) -> list[list[float]]:
    """The formulas element by element in double precision; the block's value after each round."""
    lr, beta, beta1, beta2 = settings.lr, settings.momentum, settings.beta1, settings.beta2
    values = [float(value) for value in x]
    momentum, first, second = [0.0] * x.size, [0.0] * x.size, [settings.tau**2] * x.size
    history = []
    for mean in means:
        for n in range(x.size):
            step = float(mean[n])
            momentum[n] = beta * momentum[n] + step
            first[n] = beta1 * first[n] + (1 - beta1) * step
            if settings.optimizer == "yogi":
                second[n] -= (1 - beta2) * step**2 * ((second[n] > step**2) - (second[n] < step**2))
            else:
                second[n] = beta2 * second[n] + (1 - beta2) * step**2
            scaled = first[n] / (math.sqrt(second[n]) + settings.tau)
            move = {"average": step, "momentum": momentum[n], "nesterov": step + beta * momentum[n]}
            values[n] += lr * move.get(settings.optimizer, scaled)
        history.append(list(values))
    return history


@pytest.mark.parametrize("optimizer", STATE)
@pytest.mark.parametrize(
    "settings",
    [{}, {"lr": 0.7, "momentum": 0.5, "beta1": 0.8, "beta2": 0.9, "tau": 0.1}, {"momentum": 0.0, "beta1": 0.0}],
    ids=["default", "others", "without momentum"],
)
def test_server_optimizers_are_those_of_a_plain_loop(optimizer: Any, settings: dict[str, float]) -> None:
    server = Server(optimizer=optimizer, **settings)  # type: ignore[arg-type]
    x, means = vector(50, 0), [vector(50, seed, scale=0.1 * seed) for seed in (1, 2, 5, 4, 3, 6)]
    state: dict[str, Vector] = {}
    for expected, mean in zip(plain_loop(server, x, means), means, strict=True):
        move, state = server_move(server, mean, state)
        assert move.dtype == np.float32
        assert {name: (kept.dtype, kept.shape) for name, kept in state.items()} == dict.fromkeys(
            STATE[optimizer], (np.float32, (50,))
        )
        x = x + move
        np.testing.assert_allclose(x, expected, rtol=1e-5, atol=2e-5)


BY_HAND = {
    # β₁ = β₂ = 1/2, τ = 1, lr = 1/2: every number is one that float32 holds.
    "adam": [(7.0, 3.5, 25.0, 3.5 / 12), (5.0, 4.25, 25.0, 4.25 / 12), (-5.0, -0.375, 25.0, -0.375 / 12)],
    "yogi": [(4.0, 2.0, 9.0, 0.25), (0.0, 1.0, 9.0, 0.125), (3.0, 2.0, 9.0, 0.25), (-4.0, -1.0, 17.0, None)],
}
"""By optimizer, one element's rounds: its mean, then its m, v and move. v = Δ̄² is where Yogi's sign is 0."""


@pytest.mark.parametrize("optimizer", BY_HAND)
def test_adam_and_yogi_are_exact_by_hand(optimizer: Any) -> None:
    settings = Server(optimizer=optimizer, lr=0.5, beta1=0.5, beta2=0.5, tau=1.0)
    state: dict[str, Vector] = {}
    for mean, first, second, move in BY_HAND[optimizer]:
        moved, state = server_move(settings, np.array([mean], np.float32), state)
        assert (state["first"].item(), state["second"].item()) == (first, second)
        if move is not None:
            assert moved.item() == np.float32(move)


@pytest.mark.parametrize("optimizer", STATE)
@pytest.mark.parametrize("size", [1000, PIECE + 1])
def test_optimizing_by_chunks_is_optimizing_whole_vectors(optimizer: Any, size: int) -> None:
    settings = Server(optimizer=optimizer, lr=0.3)
    whole: dict[str, Vector] = {}
    chunks: dict[int, dict[str, Vector]] = {}
    for seed in range(4):
        mean = vector(2 * PIECE + 5, seed, scale=1e-3)
        move, whole = server_move(settings, mean, whole)
        parts = []
        for at in range(0, mean.size, size):
            part, chunks[at] = server_move(settings, mean[at : at + size], chunks.get(at, {}))
            parts.append(part)
        assert np.concatenate(parts).tobytes() == move.tobytes()


@pytest.mark.parametrize("optimizer", STATE)
@pytest.mark.parametrize("first", [True, False])
def test_inputs_are_left_as_they_are(optimizer: Any, first: bool) -> None:
    settings = Server(optimizer=optimizer)
    mean = vector(20, 1)
    state = {} if first else {name: abs(vector(20, 2)) for name in STATE[optimizer]}
    before = [mean, *state.values()]
    for values in before:
        values.flags.writeable = False
    _, new = server_move(settings, mean, state)
    for values in new.values():  # they are kept, while the mean is gone
        assert not any(np.shares_memory(values, other) for other in before)


def test_averaging_is_x_plus_delta_to_the_last_bit() -> None:
    x, mean = vector(1000, 0), vector(1000, 1, scale=1e-3)
    move, _ = server_move(Server(), mean, {})
    assert (x + move).tobytes() == (x + mean).tobytes()


@pytest.mark.parametrize("optimizer", ["adam", "yogi"])
@pytest.mark.parametrize("tau", [1e-9, 1e9])
def test_the_bounds_of_tau_are_far_enough_from_those_of_float32(optimizer: Any, tau: float) -> None:
    state: dict[str, Vector] = {}
    for _ in range(3):
        move, state = server_move(Server(optimizer=optimizer, tau=tau), np.zeros(3, np.float32), state)
        assert move.tolist() == [0.0] * 3
        assert np.isfinite(state["second"]).all()
        assert (state["second"] > 0).all()
