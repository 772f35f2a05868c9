"""Codecs: how float32 values become bytes on the wire, and what is read back.

    name      bytes per element   what is lost
    float32   4                   nothing
    bfloat16  2                   rounded to 8 significant bits
    float16   2                   rounded to 11 significant bits; below 6e-5 to multiples of 6e-8; cut off at 65504
    int8      1 + 2/64            rounded to 1/127 of the largest value of each group of 64
    int4      1/2 + 2/64          rounded to 1/7 of it

The integer codecs scale each group of `GROUP` values by itself (block-wise quantization, as in Dettmers et al., arXiv
2110.02861, with linear levels); the scale is a bfloat16, rounded up so that the largest value fits. Encoding is a pure
function: the same values give the same bytes everywhere, and so do the same bytes the same values. What is lost is the
business of `parablock.feedback`. Values that are not finite stay not finite, so that whoever decodes them sees it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Vector = npt.NDArray[np.float32]
    Buffer = memoryview

GROUP = 64
"""Values that share a scale. The last group of a chunk may be shorter, and its length odd."""

CodecName = Literal["float32", "bfloat16", "float16", "int8", "int4"]

_SCALE_BYTES = 2
_SMALLEST_SCALE = np.float32(1e-37)  # below it 1/scale overflows; such values become zero, and are left to the residual
_QUIET_NAN = np.uint16(0x7FC0)


class Codec(ABC):
    """See the module. All vectors are float32 of shape (numel,), all payloads contiguous bytes."""

    name: ClassVar[CodecName]
    lossless: ClassVar[bool] = False

    @abstractmethod
    def nbytes(self, numel: int) -> int:
        """Bytes of a payload of `numel` values."""

    @abstractmethod
    def encode(self, values: Vector) -> Buffer:
        """The payload. float32 gives a view of `values`, the others bytes of their own."""

    @abstractmethod
    def decode(self, payload: Buffer, numel: int) -> Vector:
        """The values. float32 gives a view of `payload`, the others a vector of their own.

        The length must fit: it was checked against the manifest where the payload came in.
        """


class Float32(Codec):
    name = "float32"
    lossless = True

    def nbytes(self, numel: int) -> int:
        return 4 * numel

    def encode(self, values: Vector) -> Buffer:
        return np.ascontiguousarray(values, np.float32).data.cast("B")

    def decode(self, payload: Buffer, numel: int) -> Vector:
        return np.frombuffer(payload, np.float32, numel)


class BFloat16(Codec):
    name = "bfloat16"

    def nbytes(self, numel: int) -> int:
        return 2 * numel

    def encode(self, values: Vector) -> Buffer:
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        # To nearest, ties to even. What is near the end of the range becomes infinite, as in hardware.
        rounded = ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1)))) >> 16).astype(np.uint16)
        return _keep_nan(values, rounded).data.cast("B")

    def decode(self, payload: Buffer, numel: int) -> Vector:
        return _widen(np.frombuffer(payload, np.uint16, numel))


class Float16(Codec):
    name = "float16"

    def nbytes(self, numel: int) -> int:
        return 2 * numel

    def encode(self, values: Vector) -> Buffer:
        largest = np.float32(65504.0)
        finite = np.where(np.isfinite(values), np.clip(values, -largest, largest), values)
        return finite.astype(np.float16).data.cast("B")

    def decode(self, payload: Buffer, numel: int) -> Vector:
        return np.frombuffer(payload, np.float16, numel).astype(np.float32)


class _Scaled(Codec):
    """Groups of values as whole numbers of −levels … levels times a scale. A payload is all scales, then all codes."""

    levels: ClassVar[int]

    def _quantize(self, values: Vector) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.int8]]:
        """(scales as bfloat16 bits, of shape (groups,); codes, of shape (groups · GROUP,), filled up with zeros)."""
        groups = -(-values.size // GROUP)
        if values.size == groups * GROUP:
            table = values.reshape(groups, GROUP)
        else:
            table = np.zeros((groups, GROUP), np.float32)
            table.reshape(-1)[: values.size] = values
        # By their bits values without a sign are in order, infinity and NaN above the others.
        magnitudes = table.view(np.uint32) & np.uint32(0x7FFFFFFF)
        largest = np.maximum.reduce(magnitudes, axis=1).view(np.float32)
        with np.errstate(all="ignore"):  # a group that is not finite has a scale that says so
            bits = (largest / np.float32(self.levels)).view(np.uint32) + np.uint32(0xFFFF)
            scales = _keep_nan(largest, (bits >> np.uint32(16)).astype(np.uint16))
            wide = _widen(scales)
            odd = ~(wide * np.float32(self.levels) < np.inf)
            any_odd = np.count_nonzero(odd)
            if any_odd:  # rounded up too far at the end of the range, or not finite to begin with
                scales[odd & np.isfinite(largest)] -= np.uint16(1)
                wide = _widen(scales)
            inverse = np.where(wide >= _SMALLEST_SCALE, np.float32(1.0) / wide, np.float32(0.0))
            scaled = table * inverse[:, None]
            if any_odd:
                scaled = np.nan_to_num(scaled.clip(-self.levels, self.levels), nan=1.0)
            codes = np.rint(scaled, out=scaled).astype(np.int8)
        return scales, codes.reshape(-1)

    def _values(self, scales: npt.NDArray[np.uint16], codes: npt.NDArray[np.int8], numel: int) -> Vector:
        table = codes.astype(np.float32)
        with np.errstate(invalid="ignore", over="ignore"):  # who folds them looks whether they are finite
            if table.size == scales.size * GROUP:
                table.reshape(-1, GROUP)[...] *= _widen(scales)[:, None]
            else:
                table *= np.repeat(_widen(scales), GROUP)[: table.size]
        return table[:numel]


class Int8(_Scaled):
    name = "int8"
    levels = 127

    def nbytes(self, numel: int) -> int:
        return numel + _SCALE_BYTES * -(-numel // GROUP)

    def encode(self, values: Vector) -> Buffer:
        scales, codes = self._quantize(values)
        return memoryview(scales.tobytes() + codes[: values.size].tobytes())

    def decode(self, payload: Buffer, numel: int) -> Vector:
        groups = -(-numel // GROUP)
        scales = np.frombuffer(payload, np.uint16, groups)
        return self._values(scales, np.frombuffer(payload, np.int8, numel, _SCALE_BYTES * groups), numel)


class Int4(_Scaled):
    """Two codes a byte, the earlier one in the lower half. With an odd number of values the last half is zero."""

    name = "int4"
    levels = 7

    def nbytes(self, numel: int) -> int:
        return -(-numel // 2) + _SCALE_BYTES * -(-numel // GROUP)

    def encode(self, values: Vector) -> Buffer:
        scales, codes = self._quantize(values)
        pairs = codes[: 2 * -(-values.size // 2)].view("<u2")  # GROUP is even: there is a zero to fill up with
        packed = ((pairs & np.uint16(0x0F)) | ((pairs >> np.uint16(4)) & np.uint16(0xF0))).astype(np.uint8)
        return memoryview(scales.tobytes() + packed.tobytes())

    def decode(self, payload: Buffer, numel: int) -> Vector:
        groups = -(-numel // GROUP)
        scales = np.frombuffer(payload, np.uint16, groups)
        packed = np.frombuffer(payload, np.uint8, -(-numel // 2), _SCALE_BYTES * groups)
        codes = np.empty(2 * packed.size, np.int8)
        codes[0::2] = (packed << np.uint8(4)).view(np.int8) >> np.int8(4)  # an arithmetic shift keeps the sign
        codes[1::2] = packed.view(np.int8) >> np.int8(4)
        return self._values(scales, codes, numel)


_CODECS: dict[CodecName, Codec] = {codec.name: codec for codec in (Float32(), BFloat16(), Float16(), Int8(), Int4())}

NAMES = tuple(_CODECS)
"""In the order in which they lose more and more."""


def codec_of(name: CodecName) -> Codec:
    return _CODECS[name]


def _widen(bits: npt.NDArray[np.uint16]) -> Vector:
    """bfloat16 bits as float32, which is exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _keep_nan(values: Vector, bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint16]:
    """Rounding may carry a NaN's bits over into a number; put it back."""
    nan = np.isnan(values)
    if np.count_nonzero(nan):
        bits[nan] = _QUIET_NAN
    return bits
