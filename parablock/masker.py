"""What a client's delta is masked with in one round, chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from parablock import slices
from parablock.fixed_point import beyond, encode
from parablock.masks import apply

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from parablock.masks import Keys
    from parablock.wire import Buffer

    Vector = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Masker:
    """keys: by slice. chunks: of a contribution. bits: as `fixed_point` has them; largest: value of a delta.

    most_tokens: a delta is multiplied by its tokens over these, so that the sum is weighted by tokens.
    """

    keys: tuple[Keys, ...]
    chunks: int
    bits: int
    largest: float
    most_tokens: int

    def prepare(self) -> None:
        """Derive the masks' keys, half of what masking a block of 4 MB with eight clients takes."""
        for keys in self.keys:
            _ = keys.masks

    def objection(self, values: Vector, tokens: int) -> str | None:
        """Why this delta cannot be masked; None if it can. values: all of it, float32 of shape (numel,)."""
        if tokens > self.most_tokens:
            return f"trained on {tokens} tokens, where the settings make it {self.most_tokens} at most"
        return beyond(values, self.largest)

    def mask(self, values: Vector, tokens: int, chunk: int) -> Buffer:
        """The payload of a chunk with these values: as many uint32."""
        words = encode(values, tokens / self.most_tokens, self.bits)
        apply(words, self.keys[slices.slice_of(chunk, self.chunks)].masks, chunk)
        return words.data.cast("B")
