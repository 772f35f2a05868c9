from __future__ import annotations

import os
import resource
import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from parablock.append_file import AppendFile, cut_torn_line

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LIMIT = 20


@contextmanager
def little_room() -> Iterator[None]:
    """No file may grow beyond LIMIT bytes: the kernel then writes what fits, and refuses the rest.

    Every file of the process: nothing may be printed meanwhile.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_what_was_appended_is_in_the_file_at_once(tmp_path: Path) -> None:
    with AppendFile(tmp_path / "log") as file:
        file.append("eins\n")
        assert (tmp_path / "log").read_text() == "eins\n"
        file.append("zwölf\n")
    with AppendFile(tmp_path / "log") as file:
        file.append("drei\n")
    assert (tmp_path / "log").read_text(encoding="utf-8") == "eins\nzwölf\ndrei\n"
    AppendFile(tmp_path / "log", truncate=True).close()
    assert (tmp_path / "log").read_bytes() == b""


def test_an_append_that_does_not_fit_leaves_nothing_behind(tmp_path: Path) -> None:
    with little_room(), AppendFile(tmp_path / "log") as file:
        file.append("0123456789\n")
        with pytest.raises(OSError, match=r"space|large"):
            file.append("0123456789\n")
        assert os.stat(tmp_path / "log").st_size == 11
        file.append("01234567\n")
    assert (tmp_path / "log").read_text() == "0123456789\n01234567\n"


@pytest.mark.parametrize(
    ("content", "whole"), [(b"", b""), (b"a\n", b"a\n"), (b"a\nb", b"a\n"), (b"a", b""), (b"a\n\nb\xc3", b"a\n\n")]
)
def test_what_follows_the_last_newline_is_cut_off(tmp_path: Path, content: bytes, whole: bytes) -> None:
    (tmp_path / "log").write_bytes(content)
    assert cut_torn_line(tmp_path / "log") == len(content) - len(whole)
    assert (tmp_path / "log").read_bytes() == whole
