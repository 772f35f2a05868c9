"""The layout of a block on the wire: chunks of so many elements, each encoded by itself.

Chunk c holds the same elements whatever the codec, so that chunk c of the mean can be formed as soon as chunk c of
every contribution is in, and leave encoded in another way. Broker and workers derive it from the manifest and the
settings; no peer says how long anything is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from parablock.codec import Codec, codec_of

if TYPE_CHECKING:
    from parablock.config import Config


@dataclass(frozen=True)
class Layout:
    """`numel` elements in chunks of `chunk_numel`, the last one shorter."""

    codec: Codec
    numel: int
    chunk_numel: int

    @classmethod
    def up(cls, config: Config, numel: int) -> Layout:
        """Of a contribution."""
        return cls(codec_of(config.codec.up), numel, config.network.chunk_bytes // 4)

    @classmethod
    def down(cls, config: Config, numel: int, attempt: int) -> Layout:
        """Of a new block: in full (attempt 0: float32), or as an attempt to fold it sends it."""
        return cls(codec_of(config.codec.down if attempt else "float32"), numel, config.network.chunk_bytes // 4)

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
