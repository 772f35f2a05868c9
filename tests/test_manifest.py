"""The manifest: layout arithmetic, and a digest that changes with everything that two sides must agree on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from parablock.manifest import Block, Manifest, Slot

MANIFEST = Manifest(
    blocks=(
        Block(0, "layer 0", (Slot("a", (2, 3), "float32", 0), Slot("scalar", (), "float32", 6))),
        Block(1, "layer 1", (Slot("b", (4,), "bfloat16", 0),)),
    ),
    frozen=("c",),
)


def test_sizes_are_in_elements_and_in_float32_bytes_whatever_the_dtype() -> None:
    first, second = MANIFEST.blocks
    assert [slot.numel for slot in first.slots] == [6, 1]
    assert (first.numel, second.numel, MANIFEST.numel) == (7, 4, 11)
    assert (first.nbytes, second.nbytes) == (28, 16)


def test_equal_manifests_have_equal_digests_in_every_process() -> None:
    # Pinned: the digest is compared between machines and kept in journals.
    assert MANIFEST.digest == "b5fe2d951ce85425fd00ff2c77e12e4c9d15bffeda1688533d7d8981296a0a8b"


SLOT = MANIFEST.blocks[1].slots[0]


@pytest.mark.parametrize(
    "other",
    [
        replace(SLOT, name="B"),
        replace(SLOT, shape=(2, 2)),
        replace(SLOT, dtype="float32"),
        replace(SLOT, offset=1),
    ],
    ids=["name", "shape", "dtype", "offset"],
)
def test_digest_changes_with_every_property_of_a_slot(other: Slot) -> None:
    changed = replace(MANIFEST, blocks=(MANIFEST.blocks[0], replace(MANIFEST.blocks[1], slots=(other,))))
    assert changed.digest != MANIFEST.digest


def test_digest_changes_with_the_order_of_blocks_and_with_what_is_frozen() -> None:
    others = [replace(MANIFEST, blocks=MANIFEST.blocks[::-1]), replace(MANIFEST, frozen=())]
    assert len({MANIFEST.digest, *(other.digest for other in others)}) == 3
