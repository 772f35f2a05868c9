"""A model that is only a layout: blocks of any size, all zeros, without torch, for benchmarks of the exchange alone.

Both sides make it from the same two numbers, so that the real broker and the real link carry blocks of a chosen size
without a model that has them. Nothing here is trained; the updates are seeded noise.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from broker.blocks import BaseModel
from parablock import config
from parablock.manifest import Block, Manifest, Slot

if TYPE_CHECKING:
    import numpy.typing as npt

    Vector = npt.NDArray[np.float32]

WEIGHTS = hashlib.sha256(b"zeros").hexdigest()
TOKENIZER = hashlib.sha256(b"no tokenizer").hexdigest()
"""What stands for the digests that broker and workers compare at the door."""

MOST_STEPS = 3
"""An `update` says that it took 1 to so many, so that they count in the mean."""


def client_name(index: int) -> str:
    """What a light client is called."""
    return f"light-{index:04d}"


def manifest(blocks: int, block_bytes: int) -> Manifest:
    """A model of `blocks` blocks of `block_bytes` in float32, one parameter each. block_bytes: a multiple of 4."""
    assert block_bytes % 4 == 0, f"a block is float32 values, got {block_bytes} bytes"
    slots = [Slot(f"weight.{index}", (block_bytes // 4,), "float32", 0) for index in range(blocks)]
    return Manifest(tuple(Block(index, f"block {index}", (slot,)) for index, slot in enumerate(slots)), ())


def base(manifest: Manifest) -> BaseModel:
    """The model's values as the broker holds them: zeros that were written, so that they are in memory."""
    values = []
    for block in manifest.blocks:
        vector = np.empty(block.numel, dtype=np.float32)
        vector.fill(0.0)
        vector.flags.writeable = False
        values.append(vector)
    return BaseModel(manifest, WEIGHTS, TOKENIZER, values)


def delta(client: int, numel: int) -> Vector:
    """The update that a client sends in every round: noise of its own, shape (numel,), which nobody may change."""
    return _noise(np.random.default_rng(client), numel)


@dataclass(frozen=True)
class Update:
    """What a client contributes to a round. values: shape (numel,), which nobody may change; the rest as offered."""

    values: Vector
    weight: int
    steps: int
    loss: float


def update(client: str, round: int, numel: int) -> Update:
    """A contribution that follows from who makes it and to which round: whoever knows both can make it again."""
    seed = int.from_bytes(hashlib.sha256(f"{client} {round}".encode()).digest()[:8])
    rng = np.random.default_rng(seed)
    weight, steps, loss = int(rng.integers(1, 1000)), int(rng.integers(1, MOST_STEPS + 1)), float(rng.random())
    return Update(_noise(rng, numel), weight, steps, loss)


def settings(
    clients: int, rounds: int, bind: str, *, quorum: int = 0, deadline_s: float = 0.0, secure: bool = False
) -> config.Config:
    """The settings of a run that only exchanges: synchronous, every client counted unless a quorum is named.

    secure: contributions are masked.
    """
    return config.from_dict(
        {
            "mode": "fedbcd",
            "rounds": rounds,
            "solver": {"steps": 1},
            "round": {"clients": clients, "quorum": quorum or clients, "deadline_s": deadline_s},
            "network": {"bind": bind},
            "secure": {"enabled": secure},
        }
    )


def _noise(rng: np.random.Generator, numel: int) -> Vector:
    """float32 in [-0.5, 0.5)."""
    vector = rng.random(numel, dtype=np.float32)
    vector -= np.float32(0.5)
    vector.flags.writeable = False
    return vector
