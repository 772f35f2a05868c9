"""Aggregation: the mean against a slow reference in float64, exact where that is promised, and the optimizers."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parablock.aggregation import PIECE, Contribution, ServerOptimizer, gather, unfit, weighted_mean
from parablock.config import Server

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Vector = npt.NDArray[np.float32]

SIZES = [1, 7, 1000, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE + 5]


def vector(numel: int, seed: int, scale: float = 1.0) -> Vector:
    values: Vector = (scale * np.random.default_rng(seed).standard_normal(numel)).astype(np.float32)
    return values


def cut(values: Vector, sizes: Sequence[int]) -> list[memoryview]:
    """The bytes of `values` in pieces of `sizes` elements, over and over; the last one is what is left."""
    pieces: list[memoryview] = []
    position = 0
    for size in itertools.cycle(sizes):
        if position >= values.size:
            return pieces
        pieces.append(memoryview(values[position : position + size].tobytes()))
        position += size
    raise AssertionError


def contribution(values: Vector, weight: int = 1, sizes: Sequence[int] = (1 << 30,)) -> Contribution:
    return Contribution("client", weight, cut(values, sizes))


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
    contributions = [contribution(values, weight) for values, weight in zip(vectors, weights, strict=True)]
    mean = weighted_mean(contributions, numel)
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
    st.lists(
        st.tuples(
            st.integers(1, 10**9), st.lists(st.sampled_from([1000, 4096, PIECE - 1, PIECE, PIECE + 3]), min_size=1)
        ),
        min_size=1,
        max_size=4,
    ),
)
def test_the_mean_does_not_depend_on_where_the_chunks_are_cut(numel: int, clients: list[tuple[int, list[int]]]) -> None:
    vectors = [vector(numel, seed) for seed in range(len(clients))]
    whole = weighted_mean([contribution(v, w) for v, (w, _) in zip(vectors, clients, strict=True)], numel)
    parts = weighted_mean([contribution(v, w, cuts) for v, (w, cuts) in zip(vectors, clients, strict=True)], numel)
    assert parts.tobytes() == whole.tobytes()


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("weight", [1, 3, 12_345, 2**53])
def test_the_mean_of_one_contribution_is_that_contribution_bit_for_bit(numel: int, weight: int) -> None:
    values = vector(numel, 3)
    values[0] = -0.0
    values[-1] = np.float32(1e-45)  # the smallest there is
    assert weighted_mean([contribution(values, weight, [1000])], numel).tobytes() == values.tobytes()


@given(st.permutations(range(4)))
def test_the_fold_is_in_the_order_of_the_list(order: list[int]) -> None:
    vectors, weights = [vector(500, seed, scale=10.0**seed) for seed in range(4)], [3, 1, 4, 2]
    mean = weighted_mean([contribution(vectors[n], weights[n]) for n in order], 500)
    total = np.zeros(500, dtype=np.float32)
    for position, n in enumerate(order):
        term = vectors[n] * np.float32(weights[n] / 10)
        total = term if position == 0 else total + term
    assert mean.tobytes() == total.tobytes()


def test_another_order_is_another_sum() -> None:
    # Else the test above could not fail.
    one, two, three = (contribution(np.array([value], dtype=np.float32)) for value in (1e8, -1e8, 1.0))
    assert weighted_mean([one, two, three], 1) != weighted_mean([one, three, two], 1)


def test_contributions_are_not_modified() -> None:
    # They lie in frames of the socket, and are folded again when another one turns out unfit.
    buffers = [bytearray(vector(1000, seed).tobytes()) for seed in range(3)]
    before = [bytes(buffer) for buffer in buffers]
    contributions = [Contribution(str(n), n + 1, [memoryview(buffer)]) for n, buffer in enumerate(buffers)]
    first = weighted_mean(contributions, 1000)
    assert [bytes(buffer) for buffer in buffers] == before
    assert weighted_mean(contributions, 1000).tobytes() == first.tobytes()


@pytest.mark.parametrize("numel", [999, 1001])
def test_a_contribution_of_another_length_is_our_own_bug(numel: int) -> None:
    with pytest.raises((AssertionError, ValueError)):
        weighted_mean([contribution(vector(1000, 0))], numel)


# Pieces


@given(st.integers(0, 3000), st.lists(st.integers(1, 700), min_size=1, max_size=5))
def test_pieces_are_gathered_in_order(numel: int, sizes: list[int]) -> None:
    values = vector(numel, numel)
    gathered = gather(cut(values, sizes), numel)
    assert gathered.dtype == np.float32
    assert gathered.tobytes() == values.tobytes()


def test_what_is_gathered_is_a_copy_that_may_be_written_to() -> None:
    buffer = bytearray(vector(10, 0).tobytes())
    gathered = gather([memoryview(buffer)], 10)
    gathered[:] = 0
    assert buffer != bytearray(40)


@pytest.mark.parametrize("numel", [999, 1001, 0])
def test_pieces_of_another_length_are_our_own_bug(numel: int) -> None:
    with pytest.raises((AssertionError, ValueError)):
        gather(cut(vector(1000, 0), [300]), numel)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 299, 300, 999])
def test_a_value_that_is_not_finite_makes_a_contribution_unfit(bad: float, position: int) -> None:
    values = vector(1000, 0)
    assert unfit(contribution(values, sizes=[300])) is None
    values[position] = bad
    assert unfit(contribution(values, sizes=[300])) == "the update holds values that are not finite (NaN or infinity)"


def test_the_largest_finite_values_are_fit() -> None:
    assert (
        unfit(contribution(np.array([np.finfo(np.float32).max, -np.finfo(np.float32).max, 1e-45], np.float32))) is None
    )


# Server optimizers


def plain_loop(optimizer: str, lr: float, beta: float, x: Vector, means: Sequence[Vector]) -> list[list[float]]:
    """The formulas element by element in double precision; the block's value after each round."""
    history, state, momentum = [], [float(value) for value in x], [0.0] * x.size
    for mean in means:
        for n in range(x.size):
            step = float(mean[n])
            momentum[n] = beta * momentum[n] + step
            move = {"average": step, "momentum": momentum[n], "nesterov": step + beta * momentum[n]}[optimizer]
            state[n] += lr * move
        history.append(list(state))
    return history


@pytest.mark.parametrize("optimizer", ["average", "momentum", "nesterov"])
@pytest.mark.parametrize(("lr", "beta"), [(1.0, 0.9), (0.7, 0.5), (1.0, 0.0)])
def test_server_optimizers_are_those_of_a_plain_loop(optimizer: Any, lr: float, beta: float) -> None:
    server = ServerOptimizer(Server(optimizer=optimizer, lr=lr, momentum=beta))
    x, means = vector(50, 0), [vector(50, seed, scale=0.1) for seed in range(1, 7)]
    for expected, mean in zip(plain_loop(optimizer, lr, beta, x, means), means, strict=True):
        x = server.step(0, x, mean)
        assert x.dtype == np.float32
        np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["momentum", "nesterov"])
def test_each_block_has_a_momentum_of_its_own(optimizer: Any) -> None:
    settings = Server(optimizer=optimizer, momentum=0.9)
    together, alone = ServerOptimizer(settings), ServerOptimizer(settings)
    x = vector(20, 0)
    for round in range(4):
        together.step(1, vector(30, round), vector(30, 10 + round))
        mean = vector(20, 20 + round)
        assert together.step(0, x, mean).tobytes() == alone.step(0, x, mean).tobytes()


@pytest.mark.parametrize("optimizer", ["average", "momentum", "nesterov"])
def test_inputs_are_left_as_they_are(optimizer: Any) -> None:
    server = ServerOptimizer(Server(optimizer=optimizer))
    x, mean = vector(20, 0), vector(20, 1)
    x.flags.writeable = mean.flags.writeable = False
    own = mean.copy()
    first = server.step(0, x, own)
    first[:] = own[:] = 0.0  # both are the caller's afterwards, and no part of the state
    again = ServerOptimizer(Server(optimizer=optimizer))
    again.step(0, x, mean)
    assert server.step(0, x, mean).tobytes() == again.step(0, x, mean).tobytes()


def test_averaging_is_x_plus_delta_to_the_last_bit() -> None:
    x, mean = vector(1000, 0), vector(1000, 1, scale=1e-3)
    assert ServerOptimizer(Server()).step(0, x, mean).tobytes() == (x + mean).tobytes()
