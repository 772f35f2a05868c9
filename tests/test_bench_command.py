"""What the benchmarks' commands share: the options that all have, exit codes, the temporary folder."""

from __future__ import annotations

import signal
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bench import command, throughput
from parablock.config import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _sigterm() -> Iterator[None]:
    """How it is handled is the whole process's."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_all_have_quick_and_out_and_tell_their_first_line() -> None:
    parser = command.parser("thing", "What it measures.\n\n    python -m bench.thing\n", quick="one row")
    told = " ".join(parser.format_help().split())
    assert "usage: python -m bench.thing [-h] [--quick] [--out FILE.json] What it measures. options:" in told
    assert "one row: within 60 s" in told
    options = parser.parse_args(["--quick", "--out", "r.json"])
    assert (options.quick, options.out) == (True, Path("r.json"))
    assert "shm" not in options
    command.add_shm(parser)
    assert parser.parse_args(["--shm"]).shm


def test_a_run_that_fails_is_exit_code_1_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Path] = []

    def fail(plan: str, folder: Path) -> None:
        seen.append(folder)
        raise OSError(f"no room for {plan}")

    monkeypatch.setattr(command, "SHM", tmp_path)
    assert command.run("thing", Namespace(out=None, shm=True), lambda *_: "the plan", fail) == 1
    assert "bench.thing failed: no room for the plan" in capsys.readouterr().err
    assert seen[0].parent == tmp_path
    assert not seen[0].exists()


def test_settings_that_do_not_fit_the_run_are_wrong_input(capsys: pytest.CaptureFixture[str]) -> None:
    def measure(_plan: None, _folder: Path) -> None:
        raise ConfigError("round.quorum must be at most 2")

    assert command.run("thing", Namespace(out=None), lambda *_: None, measure) == 2
    assert capsys.readouterr().err == "bench.thing: round.quorum must be at most 2\n"


def test_an_interrupt_is_exit_code_130() -> None:
    def interrupt(_plan: None, _folder: Path) -> None:
        raise KeyboardInterrupt

    assert command.run("thing", Namespace(out=None, shm=False), lambda *_: None, interrupt) == 130


def test_a_machine_without_a_file_system_in_memory_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.shm(False) is None
    monkeypatch.setattr(command, "SHM", tmp_path / "shm")
    assert throughput.main(["--shm"]) == 2
    assert "leave --shm out" in capsys.readouterr().err
    (tmp_path / "shm").mkdir()
    assert command.shm(True) == tmp_path / "shm"


def test_out_is_checked_before_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    def plan(*_: object) -> None:
        raise AssertionError("the plan was made")

    for out, complaint in (("no/such/folder/r.json", "make it first"), ("result.txt", "end it in .json")):
        assert command.run("thing", Namespace(out=Path(out)), plan, lambda *_: None) == 2
        assert complaint in capsys.readouterr().err
