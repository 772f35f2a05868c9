"""Slices: the parts of a contribution that secure aggregation adds up one by one.

So the first ones can be unmasked, and go down, while the last ones are still on their way up.

A slice is some chunks in a row. Each has masks and secrets of its own: who falls out in the middle of its upload is
missing from the slices that it has not sent, and from no other.
"""

from __future__ import annotations

from parablock.messages import MAX_SLICES


def count(chunks: int) -> int:
    """Slices of a contribution of so many chunks.

    An exchange ends one slice after the longer way; and each costs its own keys and shares.
    """
    return min(chunks, MAX_SLICES)


def first(slice: int, chunks: int) -> int:
    """The first chunk of a slice; of the one after the last: their number."""
    return slice * chunks // count(chunks)


def chunks_of(slice: int, chunks: int) -> range:
    return range(first(slice, chunks), first(slice + 1, chunks))


def slice_of(chunk: int, chunks: int) -> int:
    return next(slice for slice in range(count(chunks)) if chunk < first(slice + 1, chunks))
