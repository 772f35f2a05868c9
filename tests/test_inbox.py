"""The inbox: chunks decoded into place, by round and attempt, and delivered when everything is decoded."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from parablock.config import Config, from_dict
from parablock.layout import Layout
from parablock.manifest import Block, Manifest, Slot
from parablock.participant_events import Arrived
from parablock.staging import Staging
from workers.inbox import Inbox

if TYPE_CHECKING:
    import numpy.typing as npt

    Vector = npt.NDArray[np.float32]

NUMEL = 16384 + 77
MANIFEST = Manifest((Block(0, "layer", (Slot("p", (NUMEL,), "float32", 0),)),), ())
WAIT_S = 10.0


def config(down: str) -> Config:
    return from_dict({"network": {"chunk_bytes": 65536}, "codec": {"down": down}})


def vector(seed: int) -> Vector:
    values: Vector = np.random.default_rng(seed).standard_normal(NUMEL).astype(np.float32)
    return values


def arrived(round: int, attempt: int, contributors: int = 2) -> Arrived:
    return Arrived(round, 0, attempt, -1, contributors, True, 0.0, 1.0)


def chunks(layout: Layout, values: Vector) -> list[memoryview]:
    return [layout.codec.encode(values[layout.part(index)]) for index in range(layout.count)]


@pytest.mark.parametrize(
    ("down", "attempt", "change"),
    [("float32", 1, False), ("int8", 1, True), ("int4", 3, True), ("int4", 0, False)],
)
def test_what_is_delivered_is_what_the_chunks_decode_to(down: str, attempt: int, change: bool) -> None:
    async def deliver() -> None:
        errors: list[BaseException] = []
        inbox = Inbox(config(down), MANIFEST, Staging(None), errors.append)
        layout = Layout.down(config(down), NUMEL, attempt)
        encoded = chunks(layout, vector(0))
        for index, payload in enumerate(encoded):
            inbox.take(4, 0, attempt, index, payload)
        delivery = inbox.deliver(arrived(4, attempt))
        assert delivery.change == change
        assert delivery.values is not None
        values = delivery.values.result(WAIT_S).values
        sizes = [layout.part(index).stop - layout.part(index).start for index in range(layout.count)]
        expected = [layout.codec.decode(payload, size) for payload, size in zip(encoded, sizes, strict=True)]
        assert values.tobytes() == np.concatenate(expected).tobytes()
        inbox.close()
        assert errors == []

    asyncio.run(deliver())


def test_attempts_and_rounds_that_come_at_once_do_not_mix() -> None:
    async def deliver() -> None:
        inbox = Inbox(config("float32"), MANIFEST, Staging(None), pytest.fail)  # type: ignore[arg-type]
        layout = Layout.down(config("float32"), NUMEL, 1)
        first, second, other = (chunks(layout, vector(seed)) for seed in range(3))
        inbox.take(4, 0, 1, 0, first[0])
        inbox.take(4, 0, 2, 0, second[0])
        inbox.take(5, 0, 1, 0, other[0])
        inbox.drop(4, 1)
        inbox.take(5, 0, 1, 1, other[1])
        inbox.take(4, 0, 2, 1, second[1])
        for round, attempt, seed in ((5, 1, 2), (4, 2, 1)):
            delivery = inbox.deliver(arrived(round, attempt))
            assert delivery.values is not None
            assert delivery.values.result(WAIT_S).values.tobytes() == vector(seed).tobytes()
        inbox.close()

    asyncio.run(deliver())


def test_a_round_that_changed_nothing_has_no_values() -> None:
    async def deliver() -> Any:
        inbox = Inbox(config("int8"), MANIFEST, Staging(None), pytest.fail)  # type: ignore[arg-type]
        try:
            return inbox.deliver(arrived(4, 0, contributors=0))
        finally:
            inbox.close()

    delivery = asyncio.run(deliver())
    assert delivery.values is None
    assert not delivery.change


def test_what_goes_wrong_on_the_thread_is_told() -> None:
    async def deliver() -> BaseException:
        told: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        inbox = Inbox(config("float32"), MANIFEST, Staging(None), told.set_result)
        inbox.take(4, 0, 1, 0, memoryview(b"short"))
        error = await asyncio.wait_for(told, WAIT_S)
        inbox.close()
        return error

    assert isinstance(asyncio.run(deliver()), ValueError)


def test_whoever_waits_for_a_block_that_cannot_be_brought_hears_of_it() -> None:
    class FullDevice(Staging):
        def bring(self, values: Vector) -> Any:  # noqa: ARG002 - the device's signature
            raise MemoryError("the device is full")

    async def deliver() -> BaseException | None:
        told: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        inbox = Inbox(config("float32"), MANIFEST, FullDevice(None), told.set_result)
        for index, payload in enumerate(chunks(Layout.down(config("float32"), NUMEL, 1), vector(0))):
            inbox.take(4, 0, 1, index, payload)
        delivery = inbox.deliver(arrived(4, 1))
        assert delivery.values is not None
        error = delivery.values.exception(WAIT_S)
        assert error is await asyncio.wait_for(told, WAIT_S), "and the link hears of it"
        inbox.close()
        return error

    assert isinstance(asyncio.run(deliver()), MemoryError)


def test_buffers_are_the_threads() -> None:
    """Pinned memory takes a while to get, and the event loop shall not wait for it."""
    asked: list[int] = []

    class Slow(Staging):
        def buffer(self, numel: int) -> Vector:
            asked.append(threading.get_ident())
            return super().buffer(numel)

    async def deliver() -> None:
        inbox = Inbox(config("float32"), MANIFEST, Slow(None), pytest.fail)  # type: ignore[arg-type]
        for index, payload in enumerate(chunks(Layout.down(config("float32"), NUMEL, 1), vector(0))):
            inbox.take(4, 0, 1, index, payload)
        delivery = inbox.deliver(arrived(4, 1))
        assert delivery.values is not None
        delivery.values.result(WAIT_S)
        inbox.close()

    asyncio.run(deliver())
    assert len(asked) == 1
    assert asked[0] != threading.get_ident()
