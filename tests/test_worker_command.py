"""`parablock worker`'s own state, as its command line has it: whose it is, and what is refused before it calls."""

from __future__ import annotations

import errno
import logging
import os
from typing import TYPE_CHECKING, Any

import pytest

from workers import __main__ as command
from workers.state_folder import Identity, StateFolder

if TYPE_CHECKING:
    from pathlib import Path

    from workers.__main__ import Keeping
    from workers.contact import Contact
    from workers.setup import Local

BROKER = ("--allow-plain-tcp", "--broker", "tcp://127.0.0.1:9")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Local, Keeping | None]]:
    """With what workers would take part."""
    found: list[tuple[Local, Keeping | None]] = []

    async def take_part(local: Local, _there: Contact, _patience_s: float, keeping: Keeping | None) -> int:
        found.append((local, keeping))
        if keeping is not None and keeping.folder is not None:
            keeping.folder.close()
        return 0

    monkeypatch.setattr(command, "_take_part", take_part)
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    return found


def state_of(path: Path, name: str) -> None:
    folder = StateFolder(path)
    folder.begin(Identity(name, "run-1", "d1"))
    folder.close()


def test_a_state_that_another_process_uses_is_refused(
    tmp_path: Path, asked: list[tuple[Local, Keeping | None]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = StateFolder(tmp_path / "s")
    assert command.main([*BROKER, "--state", str(tmp_path / "s")]) == 2
    assert f"is in use by a worker (process {os.getpid()} on " in capsys.readouterr().err
    assert not asked
    folder.close()


def test_the_name_is_the_states_unless_one_is_given(tmp_path: Path, asked: list[tuple[Local, Keeping | None]]) -> None:
    state_of(tmp_path / "s", "us")
    assert command.main([*BROKER, "--state", str(tmp_path / "s")]) == 0
    assert command.main([*BROKER, "--state", str(tmp_path / "s"), "--name", "them"]) == 0  # refused when it has joined
    assert command.main([*BROKER, "--state", "none"]) == 0
    (us, _), (them, _), (nobody, keeping) = asked
    assert (us.name, them.name, keeping) == ("us", "them", None)
    assert str(os.getpid()) in nobody.name


def test_a_disk_that_refuses_just_now_is_no_wrong_input(
    tmp_path: Path,
    asked: list[tuple[Local, Keeping | None]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    state_of(tmp_path / "s", "us")

    def refuses(path: Path) -> str:
        raise OSError(errno.EIO, "Input/output error", path)

    monkeypatch.setattr("pathlib.Path.read_text", lambda path, **_: refuses(path))
    assert command.main([*BROKER, "--state", str(tmp_path / "s")]) == 75
    said = capsys.readouterr().err
    assert f"cannot read {tmp_path / 's' / 'worker.json'}: Input/output error" in said
    assert "the same command goes on" in said
    assert not asked


@pytest.mark.parametrize("name", ["..", ".", ".hidden", "-x", "_x", "a/b", "a" * 65])
def test_a_name_that_is_no_folders_name_is_refused(
    name: str, asked: list[tuple[Local, Keeping | None]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([*BROKER, f"--name={name}"]) == 2
    assert f"begins with a letter or a digit; got {name!r}" in capsys.readouterr().err
    assert not asked


def test_without_a_folder_it_is_the_users_own_by_run_and_name(
    tmp_path: Path, asked: list[tuple[Local, Keeping | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert command.main([*BROKER, "--name", "us"]) == 0
    assert command.main([*BROKER]) == 0
    (_, named), (local, nameless) = asked
    assert named is not None
    for run in ("..", ".", "../..", ".hidden"):  # as a broker may call it
        elsewhere = named.open(run, "us")
        assert elsewhere.path.resolve().parent.parent == (tmp_path / "parablock").resolve()
        elsewhere.remove()
        elsewhere.close()
    folder = named.open("run/1", "us")
    assert folder.path == tmp_path / "parablock" / "run-1" / "us"
    folder.remove()
    folder.close()
    assert os.listdir(tmp_path / "parablock") == []
    assert nameless is not None
    assert (named.again, nameless.again) == ("", f" --name {local.name}")


def test_what_the_broker_says_is_one_line_that_steers_no_terminal(
    asked: list[tuple[Local, Keeping | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reasons are the broker's words: none looks as if it were a line of ours."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(command.logging, "basicConfig", lambda **arguments: given.update(arguments))
    assert command.main([*BROKER, "--state", "none"]) == 0
    assert asked
    (handler,) = given["handlers"]
    record = logging.LogRecord("worker", logging.INFO, "", 0, "left: %s", ("\x1b[2Jbye\n12:00:00 done – ok",), None)
    assert handler.format(record).endswith(" left: \\x1b[2Jbye\\n12:00:00 done – ok")
    try:
        raise ValueError("ours")
    except ValueError as error:
        record.exc_info = (type(error), error, error.__traceback__)
    assert "\nTraceback (most recent call last):\n" in handler.format(record)
