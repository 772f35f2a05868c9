"""The allocator: what is asked of glibc, and nothing elsewhere."""

from __future__ import annotations

import ctypes
import logging
import platform
from types import SimpleNamespace

import pytest

from parablock.allocator import keep_freed_memory


@pytest.mark.parametrize(("library", "arenas", "asked"), [("glibc", 0, 2), ("glibc", 2, 3), ("", 2, 0), ("musl", 0, 0)])
def test_settings_are_made_where_the_library_is_glibc(
    library: str, arenas: int, asked: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[tuple[int, int]] = []

    def mallopt(name: int, value: int) -> int:
        made.append((name, value))
        return int(name != -8)  # M_ARENA_MAX is refused

    monkeypatch.setattr(platform, "libc_ver", lambda: (library, "2.39"))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    with caplog.at_level(logging.WARNING):
        keep_freed_memory(arenas=arenas)
    assert len(made) == asked
    assert ("refuses mallopt(-8, 2)" in caplog.text) == (asked == 3)
