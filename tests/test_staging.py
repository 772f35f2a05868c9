"""Staging: what goes out and comes in is the same whenever the copies are made, and on the host nothing is copied."""

from __future__ import annotations

import threading
import time
import weakref
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from parablock.staging import CudaEngine, Staging

if TYPE_CHECKING:
    from collections.abc import Callable


class Copies:
    """An engine whose device is other memory of the host. late: nothing is copied before somebody waits for it."""

    def __init__(self, *, late: bool) -> None:
        self.late = late
        self.marks = 0
        self.waited: list[threading.Thread] = []

    def host(self, numel: int) -> torch.Tensor:
        return torch.full((numel,), float("nan"))

    def out(self, source: torch.Tensor, target: torch.Tensor) -> Callable[[], object]:
        return self._begin(source, target)

    def bring(self, source: torch.Tensor) -> tuple[torch.Tensor, Callable[[], object]]:
        target = torch.full_like(source, float("nan"))
        return target, self._begin(source, target)

    def wait(self, mark: Callable[[], object]) -> None:
        self.waited.append(threading.current_thread())
        mark()

    def follow(self, mark: Callable[[], object], tensor: torch.Tensor) -> None:
        assert tensor.ndim == 1
        mark()

    def _begin(self, source: torch.Tensor, target: torch.Tensor) -> Callable[[], object]:
        self.marks += 1
        left = [source]

        def copy() -> None:
            if left:
                target.copy_(left.pop())

        if not self.late:
            copy()
        return copy


@pytest.fixture(params=[False, True], ids=["early", "late"])
def engine(request: pytest.FixtureRequest) -> Copies:
    return Copies(late=request.param)


def values(numel: int = 5) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(0))


def test_what_goes_out_is_there_for_whoever_waits_as_often_as_they_ask(engine: Copies) -> None:
    outgoing = Staging(engine).out(values())
    assert outgoing.numel == 5
    assert engine.waited == [], "the thread that trains does not wait"
    assert outgoing.wait().tobytes() == values().numpy().tobytes()
    assert np.shares_memory(outgoing.wait(), outgoing.wait())


def test_waiting_is_done_on_the_thread_that_asks(engine: Copies) -> None:
    outgoing = Staging(engine).out(values())
    encoder = threading.Thread(target=outgoing.wait)
    encoder.start()
    encoder.join(timeout=10)
    assert engine.waited == [encoder]


def test_what_is_brought_is_on_the_device_when_it_is_used(engine: Copies) -> None:
    staging = Staging(engine)
    buffer = staging.buffer(5)
    buffer[:] = values().numpy()
    incoming = staging.bring(buffer)
    assert engine.marks == 1
    assert incoming.values is buffer
    assert torch.equal(incoming.ready(), values())
    assert not np.shares_memory(incoming.ready().numpy(), buffer)
    assert engine.waited == []


def test_many_copies_do_not_mix(engine: Copies) -> None:
    staging = Staging(engine)
    outgoing = [staging.out(torch.full((3,), float(number))) for number in range(5)]
    incoming = [staging.bring(np.full(2, number, np.float32)) for number in range(5)]
    assert [copy.wait().tolist() for copy in reversed(outgoing)] == [[n] * 3 for n in (4, 3, 2, 1, 0)]
    assert [copy.ready().tolist() for copy in reversed(incoming)] == [[n] * 2 for n in (4, 3, 2, 1, 0)]


def test_on_the_host_nothing_is_copied() -> None:
    staging = Staging.of(torch.device("cpu"))
    source, buffer = values(), staging.buffer(4)
    assert (buffer.dtype, buffer.shape) == (np.float32, (4,))
    assert np.shares_memory(staging.out(source).wait(), source.numpy())
    assert np.shares_memory(staging.bring(buffer).ready().numpy(), buffer)


def test_on_the_host_what_was_brought_serves_the_next_buffer_of_its_size() -> None:
    staging = Staging.of(torch.device("cpu"))
    buffer = staging.buffer(4)
    staging.release(staging.bring(buffer))
    assert staging.buffer(4) is buffer
    staging.release(staging.bring(buffer))
    other = staging.buffer(5)
    assert other.shape == (5,)
    assert staging.buffer(4) is not buffer  # it was let go: it fitted nowhere


def test_on_the_host_no_buffer_lies_idle_while_the_next_one_is_in_use() -> None:
    staging = Staging.of(torch.device("cpu"))
    landing, arriving = staging.buffer(4), staging.buffer(4)  # a block comes before the one before it has landed
    let_go = weakref.ref(landing)
    staging.release(staging.bring(landing))
    del landing
    assert let_go() is None
    staging.release(staging.bring(arriving))
    assert staging.buffer(4) is arriving


def test_on_the_host_a_download_that_was_given_up_holds_nobody_up() -> None:
    staging = Staging.of(torch.device("cpu"))
    landing = staging.buffer(4)
    staging.buffer(4)  # and nobody keeps it
    staging.release(staging.bring(landing))
    assert staging.buffer(4) is landing


@pytest.mark.parametrize("wrong", [values().double(), values(4).view(2, 2)], ids=["dtype", "shape"])
def test_only_flat_float32_goes_out(wrong: torch.Tensor) -> None:
    with pytest.raises(AssertionError, match="blocks are"):
        Staging.of(torch.device("cpu")).out(wrong)


NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
NUMEL = 1 << 22
BUSY = 200_000_000  # cycles: about a tenth of a second, in which nothing of what follows on the stream is done


@NEEDS_CUDA
def test_on_cuda_copies_run_beside_the_training_stream() -> None:
    device = torch.device("cuda")
    staging = Staging.of(device)
    numel = 1 << 24
    source = torch.zeros(numel, device=device)
    for _ in range(50):  # work that the copy out must wait for, though nobody has waited for it
        source += 1
    outgoing = staging.out(source.clone())
    source.zero_()
    assert (outgoing.wait() == 50).all()
    buffer = staging.buffer(numel)
    assert torch.from_numpy(buffer).is_pinned()
    assert torch.from_numpy(outgoing.wait()).is_pinned()
    buffer[:] = np.arange(numel)
    incoming = staging.bring(buffer)
    total = incoming.ready().double().sum().item()
    del incoming, buffer
    assert total == numel * (numel - 1) / 2


def engine_of(staging: Staging) -> CudaEngine:
    assert isinstance(staging._engine, CudaEngine)
    return staging._engine


@NEEDS_CUDA
def test_on_cuda_a_source_that_is_let_go_while_it_goes_out_is_not_written_over() -> None:
    """`Tensor.record_stream`: what is dropped at once serves the training stream only once the copy has read it."""
    device = torch.device("cuda")
    staging = Staging.of(device)
    with torch.cuda.stream(engine_of(staging)._outwards):
        torch.cuda._sleep(BUSY)
    source = torch.full((NUMEL,), 7.0, device=device)
    outgoing = staging.out(source)
    del source
    others = [torch.full((NUMEL,), -1.0, device=device) for _ in range(4)]  # as the next round's masters would
    torch.cuda.current_stream(device).synchronize()
    assert (outgoing.wait() == 7).all()
    del others


@NEEDS_CUDA
def test_on_cuda_host_memory_that_is_let_go_while_it_comes_in_is_not_given_out_again() -> None:
    """A buffer is known to torch's host allocator by its address, though the tensor it is copied from is numpy's."""
    device = torch.device("cuda")
    staging = Staging.of(device)
    with torch.cuda.stream(engine_of(staging)._inwards):
        torch.cuda._sleep(BUSY)
    buffer = staging.buffer(NUMEL)
    buffer[:] = 7
    device_values = staging.bring(buffer)._device  # nothing on the host refers to the buffer any more
    del buffer
    others = [staging.buffer(NUMEL) for _ in range(4)]
    for other in others:
        other[:] = -1
    torch.cuda.synchronize(device)
    assert bool((device_values == 7).all())


@NEEDS_CUDA
def test_on_cuda_host_memory_that_is_let_go_while_it_is_written_is_not_given_out_again() -> None:
    device = torch.device("cuda")
    staging = Staging.of(device)
    source = torch.full((NUMEL,), 7.0, device=device)
    with torch.cuda.stream(engine_of(staging)._outwards):
        torch.cuda._sleep(BUSY)
    staging.out(source)  # nobody wants it
    others = [staging.buffer(NUMEL) for _ in range(4)]
    for other in others:
        other[:] = -1
    torch.cuda.synchronize(device)
    assert all((other == -1).all() for other in others)


@NEEDS_CUDA
def test_on_cuda_what_came_in_and_is_let_go_is_not_written_over_while_training_reads_it() -> None:
    device = torch.device("cuda")
    staging = Staging.of(device)
    buffer, other = staging.buffer(NUMEL), staging.buffer(NUMEL)
    buffer[:], other[:] = 7, -1
    incoming = staging.bring(buffer)
    torch.cuda._sleep(BUSY)  # on the stream that trains
    used = incoming.ready() * 1.0
    del incoming
    later = [staging.bring(other) for _ in range(4)]
    torch.cuda.synchronize(device)
    assert bool((used == 7).all())
    del later


@NEEDS_CUDA
def test_on_cuda_neither_way_holds_up_the_thread_that_trains() -> None:
    device = torch.device("cuda")
    staging = Staging.of(device)
    values, buffer = torch.ones(NUMEL, device=device), staging.buffer(NUMEL)
    buffer[:] = 1
    staging.out(values).wait()
    staging.bring(buffer).ready()  # the memory of the next ones is there
    torch.cuda.synchronize(device)
    torch.cuda._sleep(10 * BUSY)
    began = time.perf_counter()
    outgoing, incoming = staging.out(values), staging.bring(buffer)
    incoming.ready()
    told_s = time.perf_counter() - began
    outgoing.wait()
    done_s = time.perf_counter() - began
    assert told_s < done_s / 5


@NEEDS_CUDA
def test_on_cuda_what_comes_in_does_not_wait_for_training() -> None:
    device = torch.device("cuda")
    staging = Staging.of(device)
    buffer = staging.buffer(NUMEL)
    buffer[:] = 7
    staging.bring(buffer).ready()  # the memory of the next one is there
    torch.cuda.synchronize(device)
    training = torch.cuda.Event()
    torch.cuda._sleep(10 * BUSY)
    training.record()
    incoming = staging.bring(buffer)
    engine_of(staging)._inwards.synchronize()
    assert not training.query(), "the copy was done while the stream that trains was still busy"
    assert bool((incoming.ready() == 7).all())
