"""The command: which package does the work, what the exit code says, and what is not imported on the way."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from parablock import cli

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, name: str = "fake_command"
) -> Callable[[list[str]], int]:
    """`parablock fake ...`, done by a module with this source."""
    (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(cli.COMMANDS, "fake", (name, "for this test"))
    return lambda rest: cli.main(["fake", *rest])


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"], ["help"], ["help", "run"]])
def test_usage_names_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: parablock COMMAND ...")
    for name, (_, meaning) in cli.COMMANDS.items():
        assert any(line.split() == [name, *meaning.split()] for line in shown.splitlines())


def test_the_arguments_are_those_of_the_process_unless_they_are_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["parablock", "config", "--set", "rounds=0"])
    assert cli.main() == 2
    assert "parablock config: rounds must be" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", "Run", "quickstarts", "--version", "parablock.report"])
def test_an_unknown_command_is_refused_with_the_usage(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, "x"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(f"parablock: there is no command {name!r}\n\nusage: parablock COMMAND ...")


@pytest.mark.parametrize("code", [0, 2, 3, 75])
def test_the_exit_code_is_the_commands_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int) -> None:
    source = f"def main(argv):\n    assert argv == ['--x', '1=2', '']\n    return {code}\n"
    assert command(monkeypatch, tmp_path, source, f"fake_{code}")(["--x", "1=2", ""]) == code


@pytest.mark.parametrize(
    "source",
    [
        pytest.param("def main(argv):\n    raise KeyboardInterrupt\n", id="at work"),
        pytest.param("raise KeyboardInterrupt\n", id="while torch is being imported"),
    ],
)
def test_an_interrupt_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str
) -> None:
    assert command(monkeypatch, tmp_path, source, "fake_interrupt")([]) == 75
    assert capsys.readouterr().err == "parablock: interrupted\n"
    sys.modules.pop("fake_interrupt", None)


def test_our_own_bugs_are_not_hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = command(monkeypatch, tmp_path, "def main(argv):\n    raise AssertionError('bug')\n", "fake_bug")
    with pytest.raises(AssertionError, match="bug"):
        run([])


def test_every_command_can_say_what_it_takes() -> None:
    # In one process, as each import of torch takes seconds.
    code = """
import contextlib, io, json
from parablock import cli
said = {}
for name in cli.COMMANDS:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            cli.main([name, "--help"])
        except SystemExit as end:
            said[name] = [end.code, out.getvalue()]
print(json.dumps(said))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said: dict[str, Any] = json.loads(done.stdout)
    assert set(said) == set(cli.COMMANDS)
    for name, (status, text) in said.items():
        assert status == 0
        assert text.startswith(f"usage: parablock {name}")


def imported(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after `code`."""
    code += "\nimport sys; print('|'.join({name.partition('.')[0] for name in sys.modules}))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return set(shown.splitlines()[-1].split("|"))


def test_usage_loads_no_command() -> None:
    assert not imported("from parablock import cli; cli.main([])") & {"zmq", "asyncio", "torch", "numpy", "rich"}


def test_the_protocol_runs_without_sockets_event_loop_and_torch() -> None:
    # What import-linter proves of the source, seen at run time: it does not follow the libraries we import.
    names = "aggregation config coordinator correction flight manifest messages network participant rounds schedule"
    modules = ", ".join(f"parablock.{name}" for name in [*names.split(), "transfer", "wire"])
    assert not imported(f"import {modules}") & {"zmq", "asyncio", "uvloop", "torch", "transformers"}
