"""The decoder against messages that are wrong: only WireError may come of one, soon, and without much memory.

What is counted as memory: of one message in so many the most that Python has given out while it was decoded, and what
the process has grown by in the end.
"""

from __future__ import annotations

import random
import time
import tracemalloc
from typing import Any

from bench import mutations, usage
from bench.figures import FiguresError
from parablock import wire

MOST_SECONDS = 0.1
"""Of the processor, for one message; a header of 64 KiB takes 2 ms."""

MOST_BYTES = 8 << 20
"""May be given out for one message of at most 64 KiB and its error."""

MOST_GROWTH = 64 << 20
_SAMPLE = 500


def run(count: int, seed: int) -> dict[str, Any]:
    """Decode so many. Raises FiguresError, with the frames, for one that does what it must not."""
    rng = random.Random(seed)
    for _ in range(2000):  # what is cached and interned is there before memory is looked at
        _decode(mutations.message(rng))
    memory = usage.Memory()
    taken = refused = 0
    slowest_s, most_bytes, decoding_s = 0.0, 0, 0.0
    reasons: set[str] = set()
    for number in range(count):
        frames = mutations.message(rng)
        sampled = number % _SAMPLE == 0
        if sampled:
            tracemalloc.start()
        began = time.thread_time()
        try:
            reason = _decode(frames)
        except Exception as error:
            raise FiguresError(f"message {number} of seed {seed}: {error!r} of {_shown(frames)}") from error
        took_s = time.thread_time() - began
        if sampled:
            most_bytes = max(most_bytes, tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        else:
            slowest_s, decoding_s = max(slowest_s, took_s), decoding_s + took_s
        if reason is None:
            taken += 1
        else:
            refused += 1
            reasons.add(reason[:12])
        if slowest_s > MOST_SECONDS or most_bytes > MOST_BYTES:
            raise FiguresError(f"message {number} of seed {seed}: {took_s:.3f} s, {most_bytes} B of {_shown(frames)}")
    grown = memory.peak()
    if grown > MOST_GROWTH:
        raise FiguresError(f"{grown} bytes more are held after {count} messages than before; {MOST_GROWTH} are allowed")
    return {
        "messages": count,
        "taken": taken,
        "refused": refused,
        "kinds_of_reason": len(reasons),
        "mean_us": 1e6 * decoding_s / max(count, 1),
        "slowest_ms": 1e3 * slowest_s,
        "most_kib_of_one": most_bytes / 1024,
        "grown_mb": grown / 1e6,
    }


def _decode(frames: list[bytes]) -> str | None:
    """Why it is no message; None if it is one."""
    try:
        wire.decode(frames)
    except wire.WireError as error:
        return str(error)
    return None


def _shown(frames: list[bytes]) -> str:
    return " ".join(frame[:200].hex() or "''" for frame in frames) or "no frames"
