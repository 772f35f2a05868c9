"""Error feedback: nothing is lost for good, and without it something is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from parablock import feedback
from parablock.codec import NAMES, codec_of

if TYPE_CHECKING:
    import numpy.typing as npt

    from parablock.codec import CodecName

    Vector = npt.NDArray[np.float32]

LOSSY = [name for name in NAMES if not codec_of(name).lossless]


def vector(numel: int, seed: int) -> Vector:
    values: Vector = np.random.default_rng(seed).standard_normal(numel).astype(np.float32)
    return values


@pytest.mark.parametrize("name", NAMES)
def test_what_was_said_is_what_the_payload_decodes_to(name: CodecName) -> None:
    codec, values, residual = codec_of(name), vector(1000, 0), vector(1000, 1)
    wanted = values + residual
    payload, said = feedback.encode(codec, values, residual)
    assert bytes(payload) == bytes(codec.encode(wanted))
    assert said.tobytes() == codec.decode(payload, 1000).tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_what_was_said_and_the_residual_are_what_was_meant(name: CodecName) -> None:
    codec, values = codec_of(name), vector(1000, 0)
    residual = 0.01 * vector(1000, 1)
    wanted = values + residual
    _, said = feedback.encode(codec, values, residual)
    # Their difference is a small multiple of the values' last bit: as good as exact.
    np.testing.assert_allclose(said + residual, wanted, rtol=0, atol=float(np.spacing(abs(wanted).max())))
    assert residual.any() != codec.lossless


def test_the_residual_is_moved_on_in_place_and_the_values_are_left() -> None:
    values, block = vector(100, 0), np.zeros(300, np.float32)
    values.flags.writeable = False
    feedback.encode(codec_of("int4"), values, block[100:200])
    assert block[100:200].any()
    assert not block[:100].any()
    assert not block[200:].any()


def test_without_a_residual_each_transfer_is_by_itself() -> None:
    codec, values = codec_of("int4"), vector(100, 0)
    first, _ = feedback.encode(codec, values, None)
    again, _ = feedback.encode(codec, values, None)
    assert bytes(first) == bytes(again) == bytes(codec.encode(values))


@pytest.mark.parametrize("name", LOSSY)
def test_the_mean_of_what_is_said_converges_with_feedback_and_not_without(name: CodecName) -> None:
    codec, values, rounds = codec_of(name), vector(640, 0), 200
    residual = np.zeros_like(values)
    meant = values.astype(np.float64)

    def error(kept: Vector | None) -> float:
        total = sum(feedback.encode(codec, values, kept)[1].astype(np.float64) for _ in range(rounds))
        return float(np.linalg.norm(total / rounds - meant))

    without = error(None)
    assert without > 0
    assert error(residual) < 5 * without / rounds


def test_what_is_below_half_a_step_is_said_in_the_end() -> None:
    codec = codec_of("int4")
    values = np.full(64, 0.01, np.float32)
    values[0] = 7.0  # a scale of one
    residual = np.zeros_like(values)
    said = [feedback.encode(codec, values, residual)[1][1] for _ in range(100)]
    assert 0 < sum(value != 0 for value in said) < 10
    assert sum(said) == pytest.approx(1.0, abs=0.51)
