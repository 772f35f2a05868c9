"""Layouts: each element in exactly one chunk, the same whatever the codec, and every length known beforehand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parablock.codec import GROUP, NAMES, codec_of
from parablock.config import from_dict
from parablock.layout import Layout, chunk_numel

layouts = st.builds(
    Layout, st.sampled_from(NAMES).map(codec_of), st.integers(1, 5000), st.integers(1, 20).map(lambda n: n * GROUP)
)


@given(layouts)
def test_each_element_is_in_exactly_one_chunk_in_order(layout: Layout) -> None:
    elements = np.arange(layout.numel)
    parts = [elements[layout.part(index)] for index in range(layout.count)]
    assert np.concatenate(parts).tolist() == elements.tolist()
    assert all(part.size == layout.chunk_numel for part in parts[:-1])
    assert 1 <= parts[-1].size <= layout.chunk_numel


@given(layouts)
def test_lengths_are_those_of_what_is_encoded(layout: Layout) -> None:
    values = np.ones(layout.numel, np.float32)
    sizes = [layout.codec.encode(values[layout.part(index)]).nbytes for index in range(layout.count)]
    assert [layout.chunk_nbytes(index) for index in range(layout.count)] == sizes
    assert sum(sizes) == layout.nbytes
    assert all(size == layout.chunk_bytes for size in sizes[:-1])


@pytest.mark.parametrize("codec", NAMES)
def test_chunks_hold_the_same_elements_whatever_the_codec(codec: Any) -> None:
    config = from_dict({"network": {"chunk_bytes": 65536}, "codec": {"up": codec, "down": "int4"}})
    up, down = Layout.up(config, 40_000), Layout.down(config, 40_000, attempt=1)
    assert (up.codec.name, down.codec.name) == (codec, "int4")
    assert up.chunk_numel == down.chunk_numel == 16384
    assert [up.part(index) for index in range(up.count)] == [down.part(index) for index in range(down.count)]


def test_a_block_in_full_is_float32() -> None:
    config = from_dict({"codec": {"down": "int8"}})
    assert Layout.down(config, 1000, attempt=0).codec.name == "float32"
    assert [Layout.down(config, 1000, attempt=n).codec.name for n in (1, 2)] == ["int8", "int8"]


@pytest.mark.parametrize(
    ("numel", "most_bytes", "expected"),
    [
        (1 << 17, 2 << 20, 1 << 17),  # 512 KiB, in one
        (1 << 18, 2 << 20, 1 << 17),  # 1 MiB: not less than 512 KiB
        (1 << 20, 2 << 20, 1 << 17),  # 4 MiB: eighths
        (3 << 20, 2 << 20, 3 << 17),  # 12 MiB: likewise
        ((3 << 20) + 1, 2 << 20, (3 << 17) + GROUP),  # in whole groups
        (1 << 26, 2 << 20, 1 << 19),  # 256 MiB: what the settings allow
        (1 << 26, 1 << 16, 1 << 14),  # also where they allow less than 512 KiB
    ],
)
def test_a_chunk_is_an_eighth_of_its_block_within_bounds(numel: int, most_bytes: int, expected: int) -> None:
    assert chunk_numel(numel, most_bytes) == expected
