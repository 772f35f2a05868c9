"""Staging: the way of a block's values between the device that trains and the host that sends and receives.

    out    device ──copy stream──▸ pinned host memory    Outgoing.wait, on the thread that encodes
    in     pinned host memory ──copy stream──▸ device    Incoming.ready, on the thread that trains

The copies run beside the training stream: neither the steps that follow nor the thread that trains waits for them. On
the host nothing is copied: what goes out and comes in is the tensor itself. What is written where is the caller's part.

Lifetimes: pinned memory comes from torch's caching host allocator, which takes it again when nothing refers to it and
the copies from and to it are done; the vectors given out refer to it. Device memory is marked as used on the other
stream (`Tensor.record_stream`), so that to drop it early is safe. While a copy is under way nobody writes either side.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

if TYPE_CHECKING:
    import numpy.typing as npt

    Vector = npt.NDArray[np.float32]


class Engine(Protocol):
    """What copies, beside training. A mark is a moment in it. Tensors are float32, contiguous, of shape (numel,)."""

    def host(self, numel: int) -> torch.Tensor:
        """Host memory that is copied to and from without the processor."""

    def out(self, source: torch.Tensor, target: torch.Tensor) -> Any:
        """Begin to copy from the device, once all that training was told to do so far is done. Returns the mark."""

    def bring(self, source: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Begin to copy to the device, at once. Returns what is there at the mark, and the mark. From any thread."""

    def wait(self, mark: Any) -> None:
        """Let this thread wait, without the interpreter lock."""

    def follow(self, mark: Any, tensor: torch.Tensor) -> None:
        """Let what training is told to do from now on wait, and use the tensor."""


class Outgoing:
    """Values on their way to the host."""

    def __init__(self, host: torch.Tensor, engine: Engine | None, mark: Any) -> None:
        self._host, self._engine, self._mark = host, engine, mark
        self.numel = host.numel()

    def wait(self) -> Vector:
        """The values, float32 of shape (numel,), each time the same memory. Blocks until they are there.

        From any thread, and again.
        """
        if self._engine is not None:
            self._engine.wait(self._mark)
        values: Vector = self._host.numpy()
        return values


class Incoming:
    """Values on their way to the device. values: what they are, on the host; read only until `ready`."""

    def __init__(self, values: Vector, device: torch.Tensor, engine: Engine | None, mark: Any) -> None:
        self.values = values
        self._device, self._engine, self._mark = device, engine, mark

    def ready(self) -> torch.Tensor:
        """The values on the device, for what the calling thread tells it to do from now on. Blocks nobody."""
        if self._engine is not None:
            self._engine.follow(self._mark, self._device)
        return self._device


class Staging:
    """Of one device. engine: None where the device is the host."""

    def __init__(self, engine: Engine | None) -> None:
        self._engine = engine
        self._free: list[Vector] = []  # on the host; one at most
        self._newest: weakref.ref[Vector] | None = None  # the buffer that was given out last, there

    @classmethod
    def of(cls, device: torch.device) -> Staging:
        return cls(CudaEngine(device) if device.type == "cuda" else None)

    @property
    def copies(self) -> bool:
        """Whether what goes out and comes in is copied: the device is not the host."""
        return self._engine is not None

    def out(self, values: torch.Tensor) -> Outgoing:
        """Begin to copy to the host. values: float32 of shape (numel,), which nobody changes any more."""
        values = values.detach()
        assert values.dtype == torch.float32, f"blocks are float32, got {values.dtype}"
        assert values.ndim == 1, f"blocks are flat, got {tuple(values.shape)}"
        if self._engine is None:
            return Outgoing(values, None, None)
        host = self._engine.host(values.numel())
        return Outgoing(host, self._engine, self._engine.out(values, host))

    def buffer(self, numel: int) -> Vector:
        """Memory for values that are to be brought to the device, not yet written. float32 of shape (numel,)."""
        if self._engine is not None:
            values: Vector = self._engine.host(numel).numpy()
            return values
        free = self._free.pop() if self._free else None
        buffer = free if free is not None and free.size == numel else np.empty(numel, np.float32)
        self._newest = weakref.ref(buffer)
        return buffer

    def release(self, incoming: Incoming) -> None:
        """What was brought is not needed any more. On the host its memory serves the next buffer: fresh pages cost
        more than to fill them. Not where the next buffer is in use already: it will serve the one after, and two would
        be a block that lies idle. Pinned memory torch takes back by itself."""
        if self._engine is not None:
            return
        newest = None if self._newest is None else self._newest()
        if not self._free and (newest is None or newest is incoming.values):
            self._free.append(incoming.values)

    def bring(self, values: Vector) -> Incoming:
        """Begin to copy to the device. values: best from `buffer`; from elsewhere the copy holds this thread up."""
        host = torch.from_numpy(values)
        if self._engine is None:
            return Incoming(values, host, None, None)
        device, mark = self._engine.bring(host)
        return Incoming(values, device, self._engine, mark)


class CudaEngine:
    """Two streams beside the one that trains, so that out and in do not wait for each other either."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._outwards = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._inwards = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def host(self, numel: int) -> torch.Tensor:
        return torch.empty(numel, dtype=torch.float32, pin_memory=True)

    def out(self, source: torch.Tensor, target: torch.Tensor) -> torch.cuda.Event:
        self._outwards.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._outwards):
            target.copy_(source, non_blocking=True)
        source.record_stream(self._outwards)
        return self._mark(self._outwards)

    def bring(self, source: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
        with torch.cuda.stream(self._inwards):  # so that the target's memory is that stream's: no other one uses it yet
            target = torch.empty(source.numel(), dtype=torch.float32, device=self._device)
            target.copy_(source, non_blocking=True)
        return target, self._mark(self._inwards)

    def wait(self, mark: torch.cuda.Event) -> None:
        mark.synchronize()  # releases the interpreter lock

    def follow(self, mark: torch.cuda.Event, tensor: torch.Tensor) -> None:
        training = torch.cuda.current_stream(self._device)
        training.wait_event(mark)
        tensor.record_stream(training)

    def _mark(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        # Whoever waits for it sleeps: the cores are needed elsewhere.
        mark = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        mark.record(stream)
        return mark
