"""Time and memory of training on a device: what a way to fine-tune is measured by.

    host   seconds of the processor's clock; resident memory above what the process had before it loaded the model
    CUDA   laps as the training stream passes their ends; memory that torch's allocator has given out

Both count the model, and of training the peak, not what loading needed beside it.
"""

from __future__ import annotations

import gc
import time
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import torch

from bench import usage

if TYPE_CHECKING:
    from collections.abc import Sequence


class Gauge(Protocol):
    """Made before the model is loaded."""

    def loaded(self) -> None:
        """The model is there: from now on it is training."""

    def memory(self) -> dict[str, int | None]:
        """Since `loaded`, in bytes. peak_bytes is on every device what training needs of it at once."""

    def begin(self) -> None:
        """A watch is started. All that the device was told before is done."""

    def lap(self) -> None:
        """A lap ends with what the device was told so far."""

    def laps(self) -> Sequence[float]:
        """Seconds of each, of which the last ends when the device has done everything."""


class HostGauge:
    def __init__(self) -> None:
        self._before = usage.Memory()
        self._training = self._before
        self._marks: list[float] = []

    def loaded(self) -> None:
        self._training = usage.Memory()

    def memory(self) -> dict[str, int | None]:
        return {"peak_bytes": self._training.base + self._training.peak() - self._before.base}

    def begin(self) -> None:
        self._marks = [time.perf_counter()]

    def lap(self) -> None:
        self._marks.append(time.perf_counter())

    def laps(self) -> Sequence[float]:
        return [after - before for before, after in pairwise(self._marks)]


class CudaGauge:
    """Nothing waits for the device between `begin` and `laps`, as nothing would between two rounds of a worker."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[torch.cuda.Event] = []
        self._began = 0.0

    def loaded(self) -> None:
        gc.collect()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)

    def memory(self) -> dict[str, int | None]:
        """peak_bytes: with memory that was let go while a copy still reads it, which nobody else can have until then:
        max_memory_allocated (allocated_bytes) does not count that. pinned_bytes: on the host."""
        stats = torch.cuda.memory_stats(self._device)
        return {
            "peak_bytes": stats["active_bytes.all.peak"],
            "allocated_bytes": torch.cuda.max_memory_allocated(self._device),
            "reserved_bytes": torch.cuda.max_memory_reserved(self._device),
            "pinned_bytes": torch.cuda.host_memory_stats().get("allocated_bytes.peak"),  # older torch does not tell
        }

    def begin(self) -> None:
        torch.cuda.synchronize(self._device)
        self._began = time.perf_counter()
        self._marks = [self._mark()]

    def lap(self) -> None:
        self._marks.append(self._mark())

    def laps(self) -> Sequence[float]:
        torch.cuda.synchronize(self._device)
        whole_s = time.perf_counter() - self._began
        laps = [1e-3 * before.elapsed_time(after) for before, after in pairwise(self._marks[:-1])]
        return [*laps, whole_s - sum(laps)]  # the last copies run beside the training stream

    def _mark(self) -> torch.cuda.Event:
        mark = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        mark.record(torch.cuda.current_stream(self._device))
        return mark


def gauge_of(device: torch.device) -> Gauge:
    return CudaGauge(device) if device.type == "cuda" else HostGauge()
