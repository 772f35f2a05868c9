"""Fixed point against whole-number arithmetic by hand."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parablock.fixed_point import beyond, decode, encode, exponent

ranges = st.floats(1e-6, 1e6)


@given(clients=st.integers(2, 128), largest=ranges)
def test_the_largest_sum_fits_and_one_bit_more_would_not(clients: int, largest: float) -> None:
    bits = exponent(clients, largest)
    most = Fraction(largest) * Fraction(2) ** bits + 1
    assert clients * most < 2**31
    assert clients * (2 * most) >= 2**31 - clients * 2


@given(data=st.data(), largest=ranges, factor=st.floats(0.001, 1.0))
def test_a_sum_modulo_the_word_is_the_sum_of_the_rounded_values(
    data: st.DataObject, largest: float, factor: float
) -> None:
    clients = data.draw(st.integers(2, 9))
    bits = exponent(clients, largest)
    values = st.floats(-largest, largest).map(lambda x: float(np.clip(np.float32(x), -largest, largest)))
    rows = [data.draw(st.lists(values, min_size=3, max_size=3)) for _ in range(clients)]
    vectors = [np.array(row, np.float64).astype(np.float32) for row in rows]
    kept = [vector for vector in vectors if beyond(vector, largest) is None]
    words = sum((encode(vector, factor, bits) for vector in kept), start=np.zeros(3, np.uint32))
    by_hand = [sum(round(float(vector[i]) * (factor * 2.0**bits)) for vector in kept) for i in range(3)]
    assert words.astype(np.uint32).view(np.int32).tolist() == by_hand
    mean = np.empty(3, np.float32)
    decode(words.astype(np.uint32), 0.5, bits, mean)
    assert mean.tolist() == [float(np.float32(total * (0.5 * 2.0**-bits))) for total in by_hand]


def test_long_vectors_are_encoded_piece_by_piece() -> None:
    vector = np.random.default_rng(0).uniform(-1, 1, (1 << 16) * 2 + 5).astype(np.float32)
    words = encode(vector, 1.0, 20)
    assert words.view(np.int32).tolist() == np.rint(vector.astype(np.float64) * 2**20).astype(int).tolist()
    back = np.empty_like(vector)
    decode(words, 1.0, 20, back)
    assert np.max(np.abs(back - vector)) <= 2.0**-21


@pytest.mark.parametrize(
    ("value", "what"),
    [(1.5, "a value beyond secure.range = 1"), (np.nan, "not finite"), (np.inf, "not finite"), (-np.inf, "not finite")],
)
def test_what_is_beyond_the_range_is_named(value: float, what: str) -> None:
    vector = np.zeros((1 << 16) + 2, np.float32)
    assert beyond(vector, 1.0) is None
    vector[-1] = value
    assert what in str(beyond(vector, 1.0))
