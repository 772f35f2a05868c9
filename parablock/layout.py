"""The layout of a block on the wire: chunks of so many elements, each encoded by itself.

Chunk c holds the same elements whatever the codec, so that chunk c of the mean can be formed as soon as chunk c of
every contribution is in, and leave encoded in another way. Broker and workers derive it from the manifest and the
settings; no peer says how long anything is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from parablock import slices
from parablock.codec import GROUP, Codec, codec_of
from parablock.messages import MAX_SLICES

if TYPE_CHECKING:
    from parablock.config import Config

_LEAST_BYTES = 512 << 10
_LEAST_MASKED_BYTES = 256 << 10
"""Below it what a message costs outweighs what a shorter chunk saves."""

_CHUNKS = 8


def chunk_numel(numel: int, most_bytes: int, *, masked: bool = False) -> int:
    """Elements of each chunk of a block of `numel`, in whole groups: an eighth of it, within 512 KiB and `most_bytes`.

    An exchange ends one chunk after the longer way, and a broker holds another one for each connection, encrypted, so a
    chunk is a small part of its block; and each costs both ends a message, so it is no smaller than that. most_bytes:
    `network.chunk_bytes`, in float32, a multiple of 4 · GROUP. masked: it ends about three chunks after that
    (`Layout.window_bytes`), so that a chunk is a sixteenth, of 256 KiB at least.
    """
    parts, least = (MAX_SLICES, _LEAST_MASKED_BYTES) if masked else (_CHUNKS, _LEAST_BYTES)
    part = -(-numel // (parts * GROUP)) * GROUP
    return min(max(part, least // 4), most_bytes // 4)


def _chunk_numel(config: Config, numel: int) -> int:
    return chunk_numel(numel, config.network.chunk_bytes, masked=config.secure.enabled)


@dataclass(frozen=True)
class Layout:
    """`numel` elements in chunks of `chunk_numel`, the last one shorter."""

    codec: Codec
    numel: int
    chunk_numel: int

    @classmethod
    def up(cls, config: Config, numel: int) -> Layout:
        """Of a contribution."""
        return cls(codec_of(config.codec.up), numel, _chunk_numel(config, numel))

    @classmethod
    def down(cls, config: Config, numel: int, attempt: int) -> Layout:
        """Of a new block: in full (attempt 0: float32), or as an attempt to fold it sends it."""
        codec = codec_of(config.codec.down if attempt else "float32")
        return cls(codec, numel, _chunk_numel(config, numel))

    def window_bytes(self, config: Config) -> int:
        """Of a contribution, what may be under way: with masks no more than two slices, because what unmasks a slice
        goes the same way, and would wait behind it."""
        if not config.secure.enabled:
            return config.network.window_bytes
        longest = -(-self.count // slices.count(self.count))
        return min(config.network.window_bytes, 2 * longest * self.chunk_bytes)

    @property
    def count(self) -> int:
        """Number of chunks."""
        return -(-self.numel // self.chunk_numel)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of every chunk but the last."""
        return self.codec.nbytes(self.chunk_numel)

    @property
    def nbytes(self) -> int:
        full, rest = divmod(self.numel, self.chunk_numel)
        return full * self.chunk_bytes + (self.codec.nbytes(rest) if rest else 0)

    def chunk_nbytes(self, index: int) -> int:
        """Bytes of chunk `index`."""
        part = self.part(index)
        return self.codec.nbytes(part.stop - part.start)

    def part(self, index: int) -> slice:
        """The elements of chunk `index`."""
        start = index * self.chunk_numel
        return slice(start, min(start + self.chunk_numel, self.numel))
