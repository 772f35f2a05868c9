"""Codecs: each against a slow, obvious reference, exact where that is promised, within half a step elsewhere."""

from __future__ import annotations

import math
import re
import struct
from typing import TYPE_CHECKING, get_args, get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parablock import codec
from parablock.codec import GROUP, NAMES, codec_of
from parablock.sections import Codecs

if TYPE_CHECKING:
    import numpy.typing as npt

    from parablock.codec import CodecName

    Vector = npt.NDArray[np.float32]

LARGEST = float(np.finfo(np.float32).max)
SIZES = [1, 2, 3, 63, 64, 65, 127, 128, 129, 1000, 4096 + 7]
LEVELS: dict[CodecName, int] = {"int8": 127, "int4": 7}

every_codec = pytest.mark.parametrize("name", NAMES)
scaled = pytest.mark.parametrize("name", LEVELS)


def vector(numel: int, seed: int = 0, scale: float = 1.0) -> Vector:
    """Normal values, of which the groups differ by orders of magnitude."""
    rng = np.random.default_rng(seed)
    spread = np.repeat(10.0 ** rng.integers(-6, 3, -(-numel // GROUP)), GROUP)[:numel]
    return (scale * spread * rng.standard_normal(numel)).astype(np.float32)


def through(name: CodecName, values: Vector) -> Vector:
    return codec_of(name).decode(codec_of(name).encode(values), values.size)


def bits(values: Vector) -> npt.NDArray[np.uint32]:
    return values.view(np.uint32)


# References


def bfloat16_up(value: float) -> float:
    """The smallest bfloat16 that is not below a finite `value` ≥ 0."""
    (whole,) = struct.unpack("<I", struct.pack("<f", value))
    cut = whole & 0xFFFF0000
    (found,) = struct.unpack("<f", struct.pack("<I", cut if cut == whole else cut + 0x10000))
    return float(found)


def bfloat16_down(value: float) -> float:
    (found,) = struct.unpack("<f", b"\0\0" + struct.pack("<f", value)[2:])
    return float(found)


def groups_of(values: Vector) -> list[list[float]]:
    return [[float(value) for value in values[at : at + GROUP]] for at in range(0, values.size, GROUP)]


def scale_of(group: list[float], levels: int) -> float:
    """Rounded up, but where the largest code times it would overflow."""
    scale = bfloat16_up(float(np.float32(max(map(abs, group))) / np.float32(levels)))
    return scale if scale * levels <= LARGEST else bfloat16_down(LARGEST / levels)


def reference(name: CodecName, values: Vector) -> bytes:
    """The payload of finite values, of which no group's scale is below 1e-37, one value after the other."""
    levels = LEVELS[name]
    scales, codes = b"", []
    for group in groups_of(values):
        scale = scale_of(group, levels)
        scales += struct.pack("<f", scale)[2:]
        inverse = float(np.float32(1) / np.float32(scale)) if scale else 0.0
        codes += [round(float(np.float32(value) * np.float32(inverse))) for value in group]  # ties to even, as rint
    codes = [max(-levels, min(levels, code)) for code in codes]
    if name == "int8":
        return scales + struct.pack(f"{len(codes)}b", *codes)
    codes += [0] * (len(codes) % 2)
    return scales + bytes((low & 15) | (high & 15) << 4 for low, high in zip(codes[::2], codes[1::2], strict=True))


# All of them


def test_the_names_are_the_choices_of_the_settings() -> None:
    for setting in ("up", "down"):
        assert get_args(get_type_hints(Codecs)[setting]) == NAMES
    assert get_args(codec.CodecName) == NAMES
    assert [codec_of(name).name for name in NAMES] == list(NAMES)


@every_codec
@pytest.mark.parametrize("numel", SIZES)
def test_a_payload_has_the_bytes_that_were_announced_and_gives_as_many_values(name: CodecName, numel: int) -> None:
    payload = codec_of(name).encode(vector(numel))
    assert payload.contiguous
    assert payload.nbytes == len(payload) == codec_of(name).nbytes(numel)
    decoded = codec_of(name).decode(payload, numel)
    assert decoded.dtype == np.float32
    assert decoded.shape == (numel,)


@every_codec
def test_a_chunk_of_a_mebibyte_costs_what_the_table_says(name: CodecName) -> None:
    assert codec.__doc__ is not None
    row = re.search(rf"^ +{name} +([\d/ +]+?)  ", codec.__doc__, re.MULTILINE)
    assert row is not None
    promised = sum(int(a) / int(b or 1) for a, b in re.findall(r"(\d+)(?:/(\d+))?", row[1]))
    numel = (1 << 20) // 4
    assert codec_of(name).nbytes(numel) / numel == pytest.approx(promised, rel=0.01)


@every_codec
def test_encoding_is_a_pure_function_and_leaves_its_input(name: CodecName) -> None:
    values = vector(1000)
    values.flags.writeable = False
    first = bytes(codec_of(name).encode(values))
    through(name, vector(1000, seed=1))
    assert bytes(codec_of(name).encode(values)) == first
    frozen = memoryview(first)  # read-only, as the socket's frames are
    assert codec_of(name).decode(frozen, 1000).tobytes() == through(name, values).tobytes()


@every_codec
@pytest.mark.parametrize("numel", SIZES)
def test_zeros_stay_zeros(name: CodecName, numel: int) -> None:
    assert not through(name, np.zeros(numel, np.float32)).any()


@every_codec
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, "-nan", "signalling"])
@pytest.mark.parametrize(("numel", "position"), [(1, 0), (65, 64), (65, 63), (130, 5), (1001, 1000)])
def test_what_is_not_finite_stays_not_finite(name: CodecName, bad: float | str, numel: int, position: int) -> None:
    values = vector(numel)
    if isinstance(bad, str):
        bits(values)[position] = {"-nan": 0xFFFFFFFF, "signalling": 0x7F800001}[bad]
    else:
        values[position] = bad
    decoded = through(name, values)
    assert not np.isfinite(decoded[position])
    # And only there: in the group whose scale says so, with the integer codecs.
    group = np.arange(numel) // GROUP == position // GROUP
    assert np.isfinite(decoded[~group] if name in LEVELS else np.delete(decoded, position)).all()


@every_codec
def test_groups_of_zeros_beside_what_is_not_finite_give_no_warning(name: CodecName) -> None:
    values = np.zeros(3 * GROUP, np.float32)
    values[GROUP], values[GROUP + 1] = np.nan, -np.inf
    decoded = through(name, values)
    assert not np.isfinite(decoded[GROUP : GROUP + 2]).any()
    assert not decoded[:GROUP].any()


@every_codec
def test_decoding_starts_a_chunk_of_its_own(name: CodecName) -> None:
    """A vector whose chunks end with a group has the same values whether it is encoded in one or in many."""
    values = vector(10 * GROUP + 3)
    parts = [through(name, values[at : at + 2 * GROUP]) for at in range(0, values.size, 2 * GROUP)]
    assert np.concatenate(parts).tobytes() == through(name, values).tobytes()


# float32


def test_float32_copies_nothing() -> None:
    values = vector(1000)
    payload = codec_of("float32").encode(values)
    assert np.shares_memory(np.frombuffer(payload, np.float32), values)
    assert np.shares_memory(codec_of("float32").decode(payload, 1000), values)
    assert codec_of("float32").lossless
    assert [name for name in NAMES if codec_of(name).lossless] == ["float32"]


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=200))
def test_float32_keeps_every_bit(raw: list[int]) -> None:
    values = np.array(raw, np.uint32).view(np.float32)
    assert through("float32", values).tobytes() == values.tobytes()


# bfloat16 and float16


def patterns() -> Vector:
    """Every upper half of a float32 with the lower halves that decide how it is rounded."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    return (upper[:, None] | lower).reshape(-1).view(np.float32)


def test_bfloat16_is_torchs_bit_for_bit() -> None:
    """Ties, denormals, infinities and what is rounded to them; of a NaN that it stays one."""
    values = patterns()
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    found = np.frombuffer(codec_of("bfloat16").encode(values), np.uint16)
    number = ~np.isnan(values)
    np.testing.assert_array_equal(found[number], expected[number])
    assert np.isnan(through("bfloat16", values)[~number]).all()
    assert number.sum() < values.size


def test_bfloat16_reads_what_torch_reads() -> None:
    every = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    expected = torch.from_numpy(every.view(np.int16)).view(torch.bfloat16).to(torch.float32).numpy()
    found = codec_of("bfloat16").decode(memoryview(every.tobytes()), every.size)
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(bits(found)[number], bits(expected)[number])
    np.testing.assert_array_equal(np.isnan(found), ~number)


def test_float16_is_torchs_within_its_range() -> None:
    values = patterns()
    values = values[np.isfinite(values) & (abs(values) <= 65504)]
    expected = torch.from_numpy(values).to(torch.float16).numpy()
    assert bytes(codec_of("float16").encode(values)) == expected.tobytes()


def test_float16_is_cut_off_at_its_largest_and_stays_finite() -> None:
    values = np.array([65504, 65505, 65520, 1e6, LARGEST, -65519, -LARGEST, 1e-8, -1e-45], np.float32)
    assert through("float16", values).tolist() == [65504] * 5 + [-65504] * 2 + [0, 0]


# int8 and int4


@scaled
@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e30])
def test_the_bytes_are_those_of_a_slow_reference(name: CodecName, numel: int, scale: float) -> None:
    values = vector(numel, seed=numel, scale=scale)
    assert bytes(codec_of(name).encode(values)) == reference(name, values)


@scaled
def test_whole_multiples_of_a_scale_come_back_as_they_were(name: CodecName) -> None:
    levels = LEVELS[name]
    codes = np.arange(-levels, levels + 1)
    values = np.zeros(4 * GROUP, np.float32)
    values[: codes.size] = 0.25 * codes
    values[GROUP * np.arange(4)] = 0.25 * levels  # so that each group has this scale
    assert through(name, values).tobytes() == values.tobytes()


@scaled
@given(
    data=st.lists(
        st.floats(-LARGEST, LARGEST, width=32) | st.sampled_from([LARGEST, -LARGEST, 1e-37, 1e-38, 1e-45, -0.0]),
        min_size=1,
        max_size=150,
    )
)
def test_the_error_is_half_a_scale_at_most(name: CodecName, data: list[float]) -> None:
    values = np.array(data, np.float32)
    decoded = through(name, values)
    for at, group in enumerate(groups_of(values)):
        scale = scale_of(group, LEVELS[name])
        for value, found in zip(group, groups_of(decoded)[at], strict=True):
            if scale < 1e-37:
                assert found == 0, "too small to divide by: left to the residual"
            else:
                # 1/scale and its product with the value are rounded once each.
                assert abs(value - found) <= scale * (0.5 + 2.0**-23 * LEVELS[name])


@scaled
def test_near_the_largest_float32_nothing_overflows(name: CodecName) -> None:
    values = np.full(GROUP + 5, LARGEST, np.float32)
    values[1::2] *= -1
    decoded = through(name, values)
    assert np.isfinite(decoded).all()
    np.testing.assert_allclose(decoded, values, rtol=0.01)


@scaled
def test_tiny_denormals_become_zeros_and_no_warning(name: CodecName) -> None:
    values = np.array([1e-45, -1e-45, 1e-39, -1e-38] * 40, np.float32)
    assert not through(name, values).any()


@scaled
@pytest.mark.parametrize("largest", [9e-38, 1e-37, 1.2e-37, 1e-36, 1e-35])
def test_at_the_smallest_scales_the_error_stays_below_the_value(name: CodecName, largest: float) -> None:
    values = np.full(GROUP, largest, np.float32) * LEVELS[name]
    decoded = through(name, values)
    assert (abs(decoded) <= abs(values) * 1.01).all()
    assert np.isfinite(decoded).all()
