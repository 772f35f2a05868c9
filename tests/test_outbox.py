"""The outbox: contributions encoded chunk by chunk, in order, with what is lost added to the block's next one."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from parablock import feedback, tensor_file, wire
from parablock.config import Config, from_dict, to_dict
from parablock.layout import Layout
from parablock.noise import Noise
from parablock.tensor_file import Reader
from parablock.transfer import Stored
from workers.noised import Noised
from workers.outbox import Outbox
from workers.spill import Spillable
from workers.state_folder import DELTA, DiskError, chunk_name

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy.typing as npt

    from parablock.transfer import Encoded
    from parablock.wire import Buffer

    Vector = npt.NDArray[np.float32]

NUMEL = 16384 + 77
WAIT_S = 10.0


def config(up: str, feedback: bool = True) -> Config:
    return from_dict({"network": {"chunk_bytes": 65536}, "codec": {"up": up, "error_feedback": feedback}})


def vector(seed: int) -> Vector:
    values: Vector = np.random.default_rng(seed).standard_normal(NUMEL).astype(np.float32)
    values.flags.writeable = False
    return values


class Leaving:
    """A delta, and the threads that have waited for it."""

    def __init__(self, values: Vector, error: Exception | None = None) -> None:
        self.numel = values.size
        self.threads: set[int] = set()
        self._values, self._error = values, error

    def wait(self) -> Vector:
        self.threads.add(threading.get_ident())
        if self._error is not None:
            raise self._error
        return self._values


def encoded(config: Config, *contributions: tuple[int, int, Leaving]) -> list[tuple[int, Encoded]]:
    """What (round, block, delta) one after the other are made of."""

    async def run() -> list[tuple[int, Encoded]]:
        found: list[tuple[int, Encoded]] = []
        failed: list[BaseException] = []
        came = asyncio.Event()

        def on_chunk(round: int, chunk: Encoded) -> None:
            found.append((round, chunk))
            came.set()

        def on_error(error: BaseException) -> None:
            failed.append(error)
            came.set()

        def not_asked_for(*told: Any) -> None:
            raise AssertionError(told)

        outbox = Outbox(config, on_chunk, not_asked_for, not_asked_for, on_error)
        for round, block, delta in contributions:
            outbox.put(round, block, delta)
        total = sum(Layout.up(config, delta.numel).count for _, _, delta in contributions)
        while len(found) < total and not failed:
            await asyncio.wait_for(came.wait(), WAIT_S)
            came.clear()
        outbox.close()
        if failed:
            raise failed[0]
        return found

    return asyncio.run(run())


def decoded(config: Config, chunks: list[Encoded]) -> Vector:
    layout = Layout.up(config, NUMEL)
    parts = [layout.part(index) for index in range(layout.count)]
    pairs = zip(parts, chunks, strict=True)
    return np.concatenate([layout.codec.decode(chunk.payload, part.stop - part.start) for part, chunk in pairs])


def test_chunks_come_in_order_with_their_checksums() -> None:
    one, other = Leaving(vector(0)), Leaving(vector(1))
    found = encoded(config("float32"), (3, 0, one), (4, 1, other))
    assert [round for round, _ in found] == [3, 3, 4, 4]
    assert decoded(config("float32"), [chunk for round, chunk in found if round == 3]).tobytes() == vector(0).tobytes()
    assert all("checksum" in vars(chunk) for _, chunk in found), "made on the thread"
    assert all(chunk.checksum == wire.checksum(chunk.payload) for _, chunk in found)
    assert threading.get_ident() not in one.threads | other.threads


@pytest.mark.parametrize("up", ["bfloat16", "int8", "int4"])
def test_what_a_block_has_lost_is_added_to_its_next_contribution(up: str) -> None:
    settings = config(up)
    found = encoded(settings, *((round, round % 2, Leaving(vector(round % 2))) for round in range(40)))
    for block in range(2):
        said = [decoded(settings, [c for r, c in found if r == round]) for round in range(block, 40, 2)]
        once = abs(said[0] - vector(block)).max()
        assert once > 0
        assert abs(np.mean(said, axis=0, dtype=np.float64) - vector(block)).max() < 2 * once / len(said) + 1e-6


def test_without_feedback_each_is_by_itself() -> None:
    settings = config("int4", feedback=False)
    found = encoded(settings, (0, 0, Leaving(vector(0))), (1, 0, Leaving(vector(0))))
    first, again = ([bytes(chunk.payload) for round, chunk in found if round == number] for number in (0, 1))
    assert first == again


def test_what_goes_wrong_on_the_thread_is_told() -> None:
    with pytest.raises(RuntimeError, match="the device is gone"):
        encoded(config("int8"), (0, 0, Leaving(vector(0), RuntimeError("the device is gone"))))


def test_noise_comes_before_the_codec_whose_residual_knows_nothing_else() -> None:
    """Of the delta itself nothing is encoded; what is made of it can be kept, also where the codec loses nothing."""
    privacy = {"where": "local", "clip": 1.0, "noise": 0.01, "budget": 1000.0}
    noisy = {up: from_dict({**to_dict(config(up)), "privacy": privacy}) for up in ("float32", "int8")}
    noised = [Noised(Leaving(vector(round)), noisy["int8"].privacy, Noise(key=round)) for round in range(3)]
    layout = Layout.up(noisy["int8"], NUMEL)
    residual = np.zeros(NUMEL, np.float32)
    sent = encoded(noisy["int8"], *((round, 0, delta) for round, delta in enumerate(noised)))
    for place, (round, chunk) in enumerate(sent):
        part = layout.part(place % layout.count)
        expected, _ = feedback.encode(layout.codec, noised[round].wait()[part], residual[part])
        assert bytes(chunk.payload) == bytes(expected)
    plain = encoded(noisy["float32"], (0, 0, noised[0]))
    assert b"".join(bytes(chunk.payload) for _, chunk in plain) == noised[0].wait().tobytes()


@pytest.mark.parametrize("up", ["float32", "int8"])
def test_what_is_on_disk_is_let_go_of_when_it_is_encoded_and_fetched_again(up: str, tmp_path: Path) -> None:
    settings, path = config(up), tmp_path / "contribution"
    layout = Layout.up(settings, NUMEL)

    async def run() -> tuple[list[bytes], list[bytes], bool]:
        made: list[Encoded] = []
        again: asyncio.Future[tuple[Callable[[], Buffer], ...]] = asyncio.Future()
        fetched: asyncio.Queue[tuple[int, int, Encoded]] = asyncio.Queue()
        failed: asyncio.Queue[BaseException] = asyncio.Queue()
        outbox = Outbox(
            settings,
            lambda _, chunk: made.append(chunk),
            lambda _, read: again.set_result(read),
            lambda *told: fetched.put_nowait(told),
            failed.put_nowait,
        )
        delta = Spillable(Leaving(vector(0)))
        encoded = outbox.put(3, 0, delta)
        vectors: dict[str, npt.NDArray[Any]] = {DELTA: vector(0)}
        if encoded is not None:
            encoding = await asyncio.wrap_future(encoded)
            chunks = (np.frombuffer(chunk.payload, np.uint8) for chunk in encoding.chunks)
            vectors |= {chunk_name(index): chunk for index, chunk in enumerate(chunks)}
        tensor_file.write(path, vectors, {})
        outbox.stored(3, delta, Reader(path))
        read = await asyncio.wait_for(again, WAIT_S)
        assert len(made) == layout.count, "all was encoded before it went"
        for index in range(layout.count):
            outbox.fetch(3, index, Stored(made[index].checksum, read[index]))
            assert (await asyncio.wait_for(fetched.get(), WAIT_S))[:2] == (3, index)
        outbox.fetch(3, 0, Stored(made[0].checksum + 1, read[0]))
        error = await asyncio.wait_for(failed.get(), WAIT_S)
        outbox.close()
        told = isinstance(error, DiskError) and "not what was written" in str(error)
        return [bytes(chunk.payload) for chunk in made], [bytes(give()) for give in read], told

    before, after, told = asyncio.run(run())
    assert after == before
    assert told
