"""The manifest: which parameter belongs to which block, in an order and layout that both sides agree on.

Pure data. `parablock.blocks` makes one from a model; the broker and the workers compare the hash at the door and
take every shape and length from here, never from a peer.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from functools import cached_property


@dataclass(frozen=True)
class Slot:
    """One parameter's place in its block: `numel` float32 elements from `offset` on, in row-major order."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # of the model's parameter, as "float32" or "bfloat16"
    offset: int  # in elements, from the start of the block

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Block:
    """Parameters that are trained and exchanged together, as one flat float32 vector of `numel` elements."""

    index: int
    name: str  # for people: "layers 0-2", "embeddings"
    slots: tuple[Slot, ...]

    @cached_property
    def numel(self) -> int:
        return sum(slot.numel for slot in self.slots)

    @property
    def nbytes(self) -> int:
        """Bytes of the block in float32."""
        return 4 * self.numel


@dataclass(frozen=True)
class Manifest:
    """All blocks of a model in order, and the names of what is frozen."""

    blocks: tuple[Block, ...]
    frozen: tuple[str, ...]

    @property
    def starts(self) -> list[list[int]]:
        """By block, where each of its parameters begins, in elements."""
        return [[slot.offset for slot in block.slots] for block in self.blocks]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of names, shapes, dtypes and offsets, as hexadecimal text."""
        canonical = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def numel(self) -> int:
        return sum(block.numel for block in self.blocks)
