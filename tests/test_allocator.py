"""The allocator: what is asked of glibc, and nothing elsewhere."""

from __future__ import annotations

import ctypes
import logging
import mmap
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest

from parablock.allocator import keep_freed_memory


@pytest.mark.parametrize(("library", "asked"), [("glibc", 3), ("", 0), ("musl", 0)])
def test_settings_are_made_where_the_library_is_glibc(
    library: str, asked: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[tuple[int, int]] = []

    def mallopt(name: int, value: int) -> int:
        made.append((name, value))
        return int(name != -8)  # M_ARENA_MAX is refused

    monkeypatch.setattr(platform, "libc_ver", lambda: (library, "2.39"))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    with caplog.at_level(logging.WARNING):
        keep_freed_memory()
    assert len(made) == asked
    assert ("refuses mallopt(-8, 1)" in caplog.text) == bool(asked)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="elsewhere nothing is done")
def test_what_was_freed_is_kept_and_serves_again() -> None:
    """In a process of its own, as it cannot be undone: the same large messages once more take no fresh pages."""
    program = """
import resource, threading
from parablock.allocator import keep_freed_memory
keep_freed_memory()
def fill():
    for each in [bytearray(2 << 20) for _ in range(40)]:  # cleared, so that every page is touched
        del each
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    thread = threading.Thread(target=fill)
    thread.start()
    thread.join()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    first, second = map(int, done.stdout.split())
    assert first > 40 * (2 << 20) // mmap.PAGESIZE * 0.9
    assert second < first / 20
