"""What a worker that comes back tells the participant: which blocks it holds, and what it had finished."""

from __future__ import annotations

from typing import TYPE_CHECKING

from parablock.layout import Layout
from parablock.messages import Offer
from parablock.participant_events import Held, Kept
from parablock.transfer import Encoded, Payload

if TYPE_CHECKING:
    from parablock.config import Config
    from parablock.manifest import Manifest
    from workers.state_folder import Spooled, State


def kept(state: State, config: Config, manifest: Manifest, run: str) -> Kept:
    """`state` in the protocol's terms. What a lossless codec sends is the delta itself, in the same memory; where noise
    was added to it, what has left before, and nothing else."""
    versions = tuple(
        state.blocks[index].round + 1 if index in state.blocks else 0 for index in range(len(manifest.blocks))
    )
    offered = [spooled for _, spooled in sorted(state.contributions.items()) if spooled.made.offered]
    # What masks a contribution dies with its process, and under other masks it may not go into the sum of its round.
    held = () if config.secure.enabled else tuple(_held(spooled, config) for spooled in offered)
    return Kept(run, versions, -1 if state.position is None else state.position.round, held)


def _held(spooled: Spooled, config: Config) -> Held:
    made, layout = spooled.made, Layout.up(config, spooled.delta.size)
    payload = Payload.of(layout)
    remade = config.privacy.local or not layout.codec.lossless
    for index in range(layout.count):
        part = spooled.chunks[index] if remade else spooled.delta[layout.part(index)]
        payload.append(Encoded.checked(part.data.cast("B")))
    return Held(Offer(made.round, made.block, payload.nbytes, made.weight, made.steps, made.loss), payload)
