"""The outbox of masked contributions: what is encoded when, and again where a broker has other masks."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pytest

from parablock import slices
from parablock.config import from_dict
from parablock.layout import Layout
from parablock.masker import Masker
from parablock.masks import Keys, public_key
from workers.masking_outbox import MaskingOutbox

if TYPE_CHECKING:
    import numpy.typing as npt

    from parablock.transfer import Encoded

    Vector = npt.NDArray[np.float32]

CONFIG = from_dict({"secure": {"enabled": True}, "network": {"chunk_bytes": 1024}})
DELTA = np.linspace(-0.9, 0.9, 700, dtype=np.float32)
COUNT = Layout.up(CONFIG, DELTA.size).count


@dataclass(frozen=True)
class Ready:
    values: Vector

    @property
    def numel(self) -> int:
        return self.values.size

    def wait(self) -> Vector:
        return self.values


def masker(seed: int, largest: float = 1.0) -> Masker:
    keys = Keys(bytes([seed]) * 32, bytes([seed + 1]) * 32, (public_key(b"x" * 32),), (), b"run/1/0")
    return Masker((keys,) * slices.count(COUNT), COUNT, 20, largest, 100)


@dataclass
class Desk:
    chunks: list[tuple[int, bytes]] = field(default_factory=list)
    refused: list[tuple[int, str]] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)
    _count: int = 0
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def make(self) -> MaskingOutbox:
        def took(round: int, chunk: Encoded) -> None:
            self.chunks.append((round, bytes(chunk.payload)))
            self._came()

        def refused(round: int, reason: str) -> None:
            self.refused.append((round, reason))
            self._came()

        return MaskingOutbox(CONFIG, took, refused, self.errors.append)

    async def until(self, count: int) -> None:
        """So many chunks or refusals have come."""
        async with asyncio.timeout(10):
            while self._count < count:
                self._changed.clear()
                await self._changed.wait()

    def _came(self) -> None:
        self._count += 1
        self._changed.set()


def expected(by: Masker, tokens: int) -> list[bytes]:
    layout = Layout.up(CONFIG, DELTA.size)
    return [bytes(by.mask(DELTA[layout.part(index)], tokens, index)) for index in range(COUNT)]


@pytest.mark.parametrize("masks_first", [True, False])
def test_a_delta_is_encoded_when_both_are_there(masks_first: bool) -> None:
    async def act() -> Desk:
        desk = Desk()
        outbox = desk.make()
        first, second = (lambda: outbox.mask(3, masker(1))), (lambda: outbox.put(3, Ready(DELTA), 50))
        for step in (first, second) if masks_first else (second, first):
            assert not desk.chunks
            step()
        await desk.until(COUNT)
        outbox.close()
        return desk

    desk = asyncio.run(act())
    assert desk.chunks == [(3, chunk) for chunk in expected(masker(1), 50)]
    assert not desk.refused
    assert not desk.errors


def test_another_brokers_masks_are_put_on_anew_and_no_chunk_of_the_old_ones_follows() -> None:
    async def act() -> Desk:
        desk = Desk()
        outbox = desk.make()
        outbox.put(3, Ready(DELTA), 50)
        outbox.mask(3, masker(1))
        outbox.mask(3, None)  # before any of its chunks is handed back
        outbox.mask(3, masker(5))
        await desk.until(COUNT)
        outbox.close()
        return desk

    assert asyncio.run(act()).chunks == [(3, chunk) for chunk in expected(masker(5), 50)]


@pytest.mark.parametrize(("tokens", "largest", "why"), [(50, 0.5, "beyond secure.range"), (101, 1.0, "101 tokens")])
def test_what_cannot_be_masked_is_refused_and_none_of_it_sent(tokens: int, largest: float, why: str) -> None:
    async def act() -> Desk:
        desk = Desk()
        outbox = desk.make()
        outbox.put(3, Ready(DELTA), tokens)
        outbox.mask(3, masker(1, largest))
        outbox.put(4, Ready(DELTA), 1)
        outbox.mask(4, masker(2))
        await desk.until(COUNT + 1)
        outbox.close()
        return desk

    desk = asyncio.run(act())
    assert [(round, why in reason) for round, reason in desk.refused] == [(3, True)]
    assert {round for round, _ in desk.chunks} == {4}


def test_what_is_closed_is_let_go() -> None:
    async def act() -> Desk:
        desk = Desk()
        outbox = desk.make()
        outbox.put(3, Ready(DELTA), 50)
        outbox.mask(4, masker(1))
        outbox.closed(4)
        outbox.mask(3, masker(1))  # comes late
        outbox.put(4, Ready(DELTA), 50)
        await desk.until(COUNT)
        outbox.close()
        return desk

    assert {round for round, _ in asyncio.run(act()).chunks} == {4}
