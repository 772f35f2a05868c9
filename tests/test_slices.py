"""Slices: each chunk in exactly one, in order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from parablock import slices
from parablock.messages import MAX_SLICES


@given(chunks=st.integers(1, 3000))
def test_each_chunk_is_in_one_slice(chunks: int) -> None:
    number = slices.count(chunks)
    assert number == min(chunks, MAX_SLICES)
    parts = [slices.chunks_of(slice, chunks) for slice in range(number)]
    assert [chunk for part in parts for chunk in part] == list(range(chunks))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert all(slices.slice_of(chunk, chunks) == slice for slice, part in enumerate(parts) for chunk in part)
