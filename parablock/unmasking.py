"""Unmasking: the sum of masked contributions, chunk by chunk, and the masks that are to come off it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from parablock.masks import Mask, agreed_key, apply, own_key

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from parablock.wire import Buffer

    Words = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Unmasking:
    """What the clients of a round have given away to unmask the sum of one slice. bits: as `fixed_point` has them.

    seeds: of the own masks of those whose contributions are added up. lost: of those whose are not, the secret key of
    their pairs, and the public ones of those that come before and after them and whose contributions are: what they
    have added for the lost one does not cancel out.
    """

    context: bytes
    bits: int
    seeds: tuple[bytes, ...]
    lost: tuple[tuple[bytes, tuple[bytes, ...], tuple[bytes, ...]], ...]

    @cached_property
    def masks(self) -> tuple[Mask, ...]:
        """Derived when they are needed, on the fold's thread; the signs are those that take them off."""
        masks = [Mask(own_key(seed, self.context), plus=False) for seed in self.seeds]
        for secret, earlier, later in self.lost:
            # Earlier ones have added the mask that they share with it, later ones have subtracted it.
            masks += [Mask(agreed_key(secret, public, self.context), plus=False) for public in earlier]
            masks += [Mask(agreed_key(secret, public, self.context), plus=True) for public in later]
        return tuple(masks)

    def total(self, payloads: Sequence[Buffer], chunk: int) -> Words:
        """What these masked chunks add up to without their masks: uint32 of shape (numel,), modulo 2³²."""
        words = np.frombuffer(payloads[0], np.uint32).copy()
        for payload in payloads[1:]:
            words += np.frombuffer(payload, np.uint32)
        apply(words, self.masks, chunk)
        return words
