"""`parablock run` and `quickstart`: children that do well, fail, hang or are interrupted, and nothing left of any.

The children are real processes. Where their own work does not matter they are small fakes: `python -m broker` finds
the folder `broker` of the working directory before the installed package.
"""

from __future__ import annotations

import errno
import importlib
import io
import json
import os
import signal
import stat
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from broker.pairs import make_throw_away
from parablock import config as settings
from parablock import keys, launch, quickstart
from parablock.allow_list import AllowList
from parablock.config import MAY_CHANGE
from parablock.journal import Journal
from parablock.journal_rows import Facts
from parablock.launch import Launch
from parablock.run_folder import RunFolder
from tests.test_journal import row
from workers.state_folder import StateFolder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from parablock.config import Config

BROKER = """
import json, os, signal, sys, time
from pathlib import Path
out = Path(sys.argv[sys.argv.index("--out") + 1])
def listen():
    out.mkdir(parents=True, exist_ok=True)
    (out / "broker.json").write_text(json.dumps(sys.argv[1:]))
    (out / "endpoint").write_text("tcp://127.0.0.1:5557\\n")
def until(ready, seconds=20):
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.01)
def marks():
    return len(list(out.glob("worker-*.json")))
"""
WORKER = """
import json, os, signal, sys, time
from pathlib import Path
name = sys.argv[sys.argv.index("--name") + 1]
out = Path("run")
def mark():
    threads = os.environ["OMP_NUM_THREADS"], os.environ["OPENBLAS_NUM_THREADS"]
    part = out / f"{name}.part"
    part.write_text(json.dumps({"argv": sys.argv[1:], "threads": threads}))
    part.rename(out / f"{name}.json")
def asked(number, frame):
    (out / f"{name}.asked").write_text(signal.Signals(number).name)
    sys.exit(75)
"""
HANG = "time.sleep(60)\n"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory in which `broker` and `workers` can be replaced; the run's folder is `run`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    return tmp_path


def fakes(place: Path, broker: str, worker: str = "mark()\n") -> None:
    for package, source in (("broker", BROKER + broker), ("workers", WORKER + worker)):
        (place / package).mkdir()
        real = importlib.import_module(package).__path__[0]  # which is where the rest of the package is
        (place / package / "__init__.py").write_text(f"__path__.append({real!r})\n", encoding="utf-8")
        (place / package / "__main__.py").write_text(source, encoding="utf-8")


def started(place: Path, workers: int = 2, **overrides: object) -> tuple[int, Launch]:
    """A launch to its end: its exit code, and what is left of it."""
    config = settings.load(None, [f"{key}={value}" for key, value in overrides.items()])
    run = Launch(config, place / "run", workers, "cpu")
    with unchanged_signals():
        code = run.run()
    for process in [run._shards, run._broker, *run._workers.values()]:
        assert process is None or process.poll() is not None
    assert all(log.closed for log in run._logs)
    return code, run


@contextmanager
def unchanged_signals() -> Iterator[None]:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def option(argv: list[str], name: str) -> str:
    """The value of `--name VALUE` or `--name=VALUE`."""
    for position, argument in enumerate(argv):
        if argument == name:
            return argv[position + 1]
        if argument.startswith(name + "="):
            return argument.partition("=")[2]
    raise AssertionError(f"{name} is not among {argv}")


# What the children are told


texts = st.text(max_size=20)


@given(texts, texts, st.floats(1e-300, 1e300), st.booleans(), st.integers(0, 2**31 - 1))
def test_the_broker_is_told_every_setting(train: str, template: str, lr: float, trust: bool, seed: int) -> None:
    config = settings.from_dict(
        {
            "seed": seed,
            "trust_remote_code": trust,
            "solver": {"lr": lr, "gradient_checkpointing": not trust},
            "data": {"train": train, "template": template},
            "server": {"optimizer": "nesterov"},
        }
    )
    assert settings.load(None, launch._overrides(config)) == config
    assert len(launch._overrides(config)) == len(settings.keys())


def test_every_child_gets_its_part(place: Path) -> None:
    fakes(place, "listen()\nuntil(lambda: marks() == 3)\n")
    overrides = {
        "data.train": "-häuser = 1.jsonl",
        "data.eval": "",
        "data.template": '"Q: {prompt}\\nA: "',
        "network.bind": "tcp://127.0.0.1:*",
    }
    code, run = started(place, workers=3, **overrides)
    assert code == 0
    assert not (place / "run" / "keys").exists(), "they were throw-away keys"

    argv = json.loads((place / "run" / "broker.json").read_text())
    sets = [argument.removeprefix("--set=") for argument in argv if argument.startswith("--set=")]
    assert settings.load(None, sets) == run._config
    assert option(argv, "--keys") == str(place / "run" / "keys")
    for index in range(3):
        told: dict[str, Any] = json.loads((place / "run" / f"worker-{index}.json").read_text())
        assert option(told["argv"], "--invite") == str(place / "run" / "invite.toml")
        assert option(told["argv"], "--key") == str(place / "run" / "keys" / f"worker-{index}.secret")
        assert option(told["argv"], "--shard") == f"{index}/3"
        assert option(told["argv"], "--data") == "-häuser = 1.jsonl"
        assert option(told["argv"], "--eval") == ""
        assert option(told["argv"], "--device") == "cpu"
        assert option(told["argv"], "--state") == str(place / "run" / "workers" / f"worker-{index}")
        # The cores are shared out once, and numpy gets as many threads as torch.
        threads = str(max((os.cpu_count() or 1) // 3, 1))
        assert [option(told["argv"], "--threads"), *told["threads"]] == [threads] * 3
        assert "--trust-remote-code" not in told["argv"]


def test_throw_away_keys_are_nobody_elses_and_stay_as_long_as_the_run_can_go_on(place: Path) -> None:
    fakes(place, "listen()\n(out / 'config.toml').touch()\nsys.exit(75)\n")
    code, run = started(place)
    assert code == 75
    folder = place / "run" / "keys"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    names = ["broker", "worker-0", "worker-1"]
    for name in names:
        assert keys.read_secret(folder / f"{name}.secret").name == name
    clients = {client.name: client.key for client in AllowList.read(folder).clients}
    assert clients == {name: keys.read_public(folder / f"{name}.public").key for name in names[1:]}
    assert Launch(run._config, place / "run", 2, "cpu", resume=())._make_keys() == 0
    assert {client.name: client.key for client in AllowList.read(folder).clients} == clients, "the run has them still"


def test_keys_of_a_run_that_was_not_begun_are_made_anew(place: Path) -> None:
    fakes(place, "listen()\nuntil(lambda: marks() == 2)\nsys.exit(75)\n")
    for left in (".keys.partial", "keys"):  # as a kill may leave them
        make_throw_away(place / "run" / left, ["worker-7"])
    assert started(place)[0] == 75
    assert sorted(AllowList.read(place / "run" / "keys").names.values()) == ["worker-0", "worker-1"]
    assert not (place / "run" / "keys" / "worker-7.public").exists()
    assert not (place / "run" / ".keys.partial").exists()


WORN = "the only copy"


def own_keys(folder: Path) -> Path:
    """A user's own keys folder; the file that must be there afterwards."""
    folder.mkdir(parents=True)
    (folder / "broker.secret").write_text(WORN)
    return folder / "broker.secret"


@pytest.mark.parametrize("left", ["keys", ".keys.partial"])
def test_a_users_own_keys_in_the_place_are_never_touched(
    place: Path, left: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fakes(place, "raise AssertionError('not to be started')\n")
    own = own_keys(place / "run" / left)
    assert started(place)[0] == 2
    assert own.read_text() == WORN
    assert f"run/{left} is there and is not of a run; choose another --out" in capsys.readouterr().err
    assert sorted(path.name for path in (place / "run").iterdir()) == [left], "nothing is left of the refused run"


def test_a_run_that_goes_on_takes_no_keys_but_its_own(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fakes(place, "raise AssertionError('not to be started')\n")
    run = begun(place)
    own = own_keys(run / "keys")
    assert launch.main(["--resume", "run"]) == 2
    assert "run/keys is there and is not of a run; move it away" in capsys.readouterr().err
    committed(run, rounds=7)
    assert launch.main(["--resume", "run"]) == 2, "nor when it is complete"
    assert own.read_text() == WORN


@pytest.mark.parametrize(("ends", "code"), [("until(lambda: marks() == 2)", 0), ("sys.exit(2)", 2)])
def test_what_somebody_puts_beside_the_throw_away_keys_stays(place: Path, ends: str, code: int) -> None:
    put = "(out / 'keys' / 'mine.secret').write_text('the only copy')\n"
    fakes(place, put + ("listen()\n" if code == 0 else "") + ends + "\n")
    assert started(place)[0] == code
    assert [path.name for path in (place / "run" / "keys").iterdir()] == ["mine.secret"]
    assert started(place)[0] == 2, "and is not taken for the next run's"
    assert (place / "run" / "keys" / "mine.secret").read_text() == WORN


def test_where_no_keys_can_be_made_nothing_is_left(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes(place, "raise AssertionError('not to be started')\n")
    (place / "broker" / "pairs.py").write_text(
        "import sys; from pathlib import Path; folder = Path(sys.argv[1]); folder.mkdir()\n"
        "(folder / 'throw-away').write_text('broker\\n'); (folder / 'broker.secret').touch(); sys.exit(75)\n"
    )
    code, run = started(place)
    assert (code, run._broker) == (75, None)
    assert not (place / "run").exists()
    (place / "broker" / "pairs.py").unlink()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.rename", full)
    assert started(place)[0] == 75
    assert not (place / "run").exists()


@pytest.mark.parametrize("umask", [0o002, 0])
def test_throw_away_keys_do_not_hang_on_the_umask(place: Path, umask: int) -> None:
    fakes(place, "listen()\nuntil(lambda: marks() == 2)\nsys.exit(75)\n")
    before = os.umask(umask)
    try:
        assert started(place)[0] == 75
    finally:
        os.umask(before)
    assert sorted(AllowList.read(place / "run" / "keys").names.values()) == ["worker-0", "worker-1"]
    assert stat.S_IMODE((place / "run" / "keys" / "clients.toml").stat().st_mode) == 0o600


@pytest.mark.parametrize("trust", ["true", "false"])
def test_code_from_others_runs_only_where_the_user_says_so(place: Path, trust: str) -> None:
    fakes(place, "listen()\nuntil(lambda: marks() == 1)\n")
    assert started(place, workers=1, trust_remote_code=trust)[0] == 0
    told = json.loads((place / "run" / "worker-0.json").read_text())
    assert ("--trust-remote-code" in told["argv"]) == (trust == "true")


@pytest.mark.parametrize("task", ["kind", ""])
def test_tasks_are_told_where_scores_by_task_are_asked_for(place: Path, task: str) -> None:
    fakes(place, "listen()\nuntil(lambda: marks() == 1)\n")
    assert started(place, workers=1, **{"eval.task": task})[0] == 0
    told = json.loads((place / "run" / "worker-0.json").read_text())
    assert ("--tell-tasks" in told["argv"]) == bool(task)


SHARDS = """
import json, os, signal, sys, time
from pathlib import Path
def main(argv):
    Path("shards.json").write_text(json.dumps(list(argv)))
    print("the table")
    %s
"""
UNEVEN = {"partition.method": "quantity", "partition.alpha": 0.25, "data.train": "-häuser = 1.jsonl"}


def test_uneven_shards_are_shown_and_kept_before_anything_starts(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fakes(place, "print('the broker', flush=True)\nlisten()\nuntil(lambda: marks() == 3)\n")
    (place / "workers" / "shards_command.py").write_text(SHARDS % "return 0", encoding="utf-8")
    code, run = started(place, workers=3, **UNEVEN)
    assert code == 0
    assert capfd.readouterr().out.splitlines() == ["the table", "the broker"]
    argv = json.loads((place / "shards.json").read_text())
    assert option(argv, "--workers") == "3"
    assert option(argv, "--out") == str(place / "run" / "partition.png")
    sets = [argument.removeprefix("--set=") for argument in argv if argument.startswith("--set=")]
    assert settings.load(None, sets) == run._config


def test_rows_that_cannot_be_divided_start_nothing(place: Path) -> None:
    fakes(place, "raise AssertionError('not to be started')\n")
    (place / "workers" / "shards_command.py").write_text(SHARDS % "return 2", encoding="utf-8")
    code, run = started(place, **UNEVEN)
    assert (code, run._broker) == (2, None)


@pytest.mark.parametrize(
    ("does", "ended"),
    [
        ("os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)", -signal.SIGTERM),
        ("os.kill(os.getppid(), signal.SIGINT); time.sleep(60)", 75),
        # Done in spite of the signal, and still nothing more is begun.
        ("signal.signal(signal.SIGTERM, signal.SIG_IGN); os.kill(os.getppid(), signal.SIGTERM); return 0", 0),
    ],
)
def test_a_signal_while_the_shards_are_worked_out_starts_nothing(
    place: Path, does: str, ended: int, capfd: pytest.CaptureFixture[str]
) -> None:
    fakes(place, "raise AssertionError('not to be started')\n")
    (place / "workers" / "shards_command.py").write_text(SHARDS % does, encoding="utf-8")
    code, run = started(place, **UNEVEN)
    assert (code, run._broker) == (75, None)
    assert run._shards is not None
    assert run._shards.returncode == ended
    assert capfd.readouterr().err == "parablock: interrupted\n" * (ended == 75)


def test_shards_that_are_killed_are_told(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fakes(place, "raise AssertionError('not to be started')\n")
    killed = SHARDS % "os.kill(os.getpid(), signal.SIGKILL)"
    (place / "workers" / "shards_command.py").write_text(killed, encoding="utf-8")
    code, run = started(place, **UNEVEN)
    assert (code, run._broker) == (75, None)
    assert capsys.readouterr().err == (
        "parablock run: parablock shards was ended by SIGKILL; the run had not begun: give the same command again\n"
    )


@pytest.mark.parametrize(("field", "shown"), [("", ""), ("task", "the table\n")])
def test_rows_in_turn_are_shown_where_a_field_labels_them(
    place: Path, field: str, shown: str, capfd: pytest.CaptureFixture[str]
) -> None:
    fakes(place, "listen()\nuntil(lambda: marks() == 2)\n")
    (place / "workers" / "shards_command.py").write_text(SHARDS % "return 0", encoding="utf-8")
    assert started(place, **{"partition.field": field})[0] == 0
    assert capfd.readouterr().out == shown
    assert not (place / "run" / "partition.json").exists()


# How it ends


def test_a_broker_that_ends_at_once_gives_its_exit_code_and_starts_no_worker(place: Path) -> None:
    fakes(place, "sys.exit(2)\n")
    code, run = started(place)
    assert code == 2
    assert run._workers == {}
    assert not (place / "run").exists()


def test_the_broker_itself_refuses_an_address_that_is_none_of_this_machine(tmp_path: Path) -> None:
    # The real one, in the real command.
    command = [sys.executable, "-m", "parablock.cli", "run", "--out", str(tmp_path / "run")]
    command.append("--set=network.bind=tcp://192.0.2.1:*")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "parablock broker: cannot listen on tcp://192.0.2.1:*" in done.stderr
    assert not (tmp_path / "run").exists()


ENDS_WHEN_ASKED = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
FAILS = "print('\\n'.join(f'line {n}' for n in range(20)))\nsys.exit(%d) if name == 'worker-0' else None\n"
WAITS = "signal.signal(signal.SIGTERM, asked)\nmark()\n" + HANG


def test_a_worker_with_wrong_input_ends_the_run_and_is_shown(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begins = "(out / 'metrics.jsonl').touch()\n"
    fakes(place, ENDS_WHEN_ASKED + "out.mkdir(exist_ok=True)\n" + begins + "listen()\n" + HANG, FAILS % 3 + WAITS)
    code, _ = started(place, **{"round.quorum": 1})
    assert code == 3
    told = capsys.readouterr().err
    assert "parablock run: worker-0 ended with exit code 3:\n  line 5\n" in told
    assert "line 4\n" not in told  # its last lines only
    assert (place / "run" / "logs" / "worker-0.log").read_text().startswith("line 0\n")


@pytest.mark.parametrize(("begins", "exit_code", "told"), [("", 2, True), ("", 3, False), ("touch", 2, False)])
def test_of_a_setting_that_was_wrong_from_the_start_it_is_said_that_the_run_cannot_have_another(
    place: Path, begins: str, exit_code: int, told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = "out.mkdir(exist_ok=True)\n(out / 'metrics.jsonl').touch()\n" if begins else ""
    fakes(place, ENDS_WHEN_ASKED + begun + "listen()\n" + HANG, FAILS % exit_code + WAITS)
    code, _ = started(place)
    assert code == exit_code
    said = capsys.readouterr().err
    advice = "to change anything else, begin anew: choose another --out, or delete "
    assert (f"{advice}{place / 'run'}\n" in said) == told
    assert all((f"{key}" in said.partition("other values of ")[2]) == told for key in MAY_CHANGE)


@pytest.mark.parametrize(("begun", "quorum"), [(False, 1), (True, 2)])
def test_a_worker_that_fails_ends_a_run_that_cannot_go_on(place: Path, begun: bool, quorum: int) -> None:
    begins = "out.mkdir(exist_ok=True)\n(out / 'metrics.jsonl').touch()\n" if begun else ""
    fakes(place, ENDS_WHEN_ASKED + begins + "listen()\n" + HANG, FAILS % 1 + WAITS)
    code, _ = started(place, **{"round.quorum": quorum, "round.clients": 2})
    assert code == 1


def test_a_run_outlives_one_of_its_workers(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    waits = "until(lambda: marks() == 1)\nuntil(lambda: (out / 'told').exists())\n"
    begins = "out.mkdir(exist_ok=True)\n(out / 'metrics.jsonl').touch()\nlisten()\n"
    fakes(place, begins + waits, "if name == 'worker-0':\n    sys.exit('out of memory')\nmark()\n")
    capsys.readouterr()

    class Told(io.StringIO):
        """Stands for stderr: lets the broker end once the failure has been shown."""

        def write(self, text: str) -> int:
            if "out of memory" in text:
                (place / "run" / "told").touch()
            return super().write(text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", Told())
        assert started(place, **{"round.quorum": 1})[0] == 0


def test_a_broker_that_is_killed_is_told_and_its_workers_are_asked_to_end(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fakes(
        place,
        "listen()\nuntil(lambda: marks() == 2)\nos.kill(os.getpid(), signal.SIGKILL)\n",
        "signal.signal(signal.SIGTERM, asked)\nmark()\n" + HANG,
    )
    assert started(place)[0] == 75
    assert "parablock run: the broker was ended by SIGKILL" in capsys.readouterr().err
    assert [(place / "run" / f"worker-{n}.asked").read_text() for n in range(2)] == ["SIGTERM"] * 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_and_the_children_end_in_good_order(
    place: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    name = number.name
    fakes(
        place,
        f"signal.signal(signal.{name}, lambda *_: sys.exit(75))\nlisten()\nuntil(lambda: marks() == 2)\n"
        f"os.kill(os.getppid(), signal.{name})\n" + HANG,
        f"signal.signal(signal.{name}, asked)\nmark()\n" + HANG,
    )
    assert started(place)[0] == 75
    assert [(place / "run" / f"worker-{n}.asked").read_text() for n in range(2)] == [name] * 2
    assert capsys.readouterr().err == ""  # the user has ended them, that is no failure


def test_a_signal_before_the_broker_listens_starts_no_worker(place: Path) -> None:
    fakes(place, "os.kill(os.getppid(), signal.SIGTERM)\n" + HANG)
    code, run = started(place)
    assert code == 75
    assert run._workers == {}


def test_what_does_not_listen_is_killed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_GRACE_S", 0.1)
    fakes(
        place,
        "listen()\nuntil(lambda: marks() == 1)\nsys.exit(75)\n",
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nmark()\n" + HANG,
    )
    code, run = started(place, workers=1)
    assert code == 75
    assert run._workers["worker-0"].returncode == -signal.SIGKILL


def test_nothing_stays_behind_where_the_workers_cannot_be_started(place: Path) -> None:
    fakes(place, "out.mkdir(exist_ok=True)\n(out / 'logs').touch()\nlisten()\n" + HANG)
    run = Launch(settings.load(None), place / "run", 1)
    with unchanged_signals(), pytest.raises(FileExistsError):
        run.run()
    assert run._broker is not None
    assert run._broker.returncode == -signal.SIGTERM


# What was there before


def test_a_folder_that_holds_a_run_is_refused_and_left_as_it_is(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fakes(place, "raise AssertionError('not to be started')\n")
    RunFolder.create(place / "run", settings.load(None)).close()
    (place / "run" / "logs").mkdir()
    (place / "run" / "logs" / "worker-0.log").write_text("precious")
    (place / "run" / "endpoint").write_text("tcp://127.0.0.1:5557\n")
    code, run = started(place)
    assert (code, run._broker) == (2, None)
    assert "parablock run: " in (told := capsys.readouterr().err)
    assert "already holds a run" in told
    assert (place / "run" / "logs" / "worker-0.log").read_text() == "precious"
    assert (place / "run" / "endpoint").exists()


def test_an_old_endpoint_is_not_waited_at(place: Path) -> None:
    fakes(place, "sys.exit(2)\n")
    (place / "run").mkdir()
    (place / "run" / "endpoint").write_text("tcp://127.0.0.1:5557\n")
    code, run = started(place)
    assert (code, run._workers) == (2, {})


@pytest.mark.parametrize(
    ("written", "read"), [("", ""), ("tcp://127.0.0.1:55", ""), ("tcp://x:5557\n", "tcp://x:5557")]
)
def test_an_endpoint_is_read_once_it_is_whole(tmp_path: Path, written: str, read: str) -> None:
    run = Launch(settings.load(None), tmp_path, 1)
    assert run._endpoint() == ""
    (tmp_path / "endpoint").write_text(written)
    assert run._endpoint() == read


# A run that goes on


TOLD = '{"workers": 3, "device": "cpu", "threads": 5}'


def committed(run: Path, rounds: int) -> None:
    """Rounds of the run, in its journal and in its record."""
    with (
        Journal.create(run / "journal.sqlite", Facts("run-1", "", "", "", ""), map(row, range(rounds))),
        RunFolder.open(run) as folder,
    ):
        for number in range(rounds):
            folder.append_metrics(round_row(number))


def begun(place: Path, told: str = TOLD, *more: str) -> Path:
    sets = ["rounds=7", "data.train=mine.jsonl", "round.clients=3", *more]
    with RunFolder.create(place / "run", settings.load(None, sets)):
        (place / "run" / "launch.json").write_text(told)
        (place / "run" / "endpoint").write_text("tcp://127.0.0.1:5555\n")
    return place / "run"


@pytest.mark.parametrize(("bind", "any_port"), [("tcp://127.0.0.1:*", ["--any-port"]), ("tcp://127.0.0.1:5555", [])])
def test_the_same_workers_go_on(place: Path, bind: str, any_port: list[str]) -> None:
    fakes(place, "listen()\nuntil(lambda: marks() == 3)\n")
    (place / "broker" / "__main__.py").write_text(
        (place / "broker" / "__main__.py").read_text().replace('"--out"', '"--resume"')
    )
    run = begun(place, TOLD, f"network.bind={bind}")
    (run / "logs").mkdir()
    (run / "logs" / "worker-0.log").write_text("said before\n")
    with unchanged_signals():
        assert launch.main(["--resume", "run", "--set", "round.deadline_s=3"]) == 0
    told = ["--keys", "run/keys", "--resume", "run", "--set=round.deadline_s=3", *any_port]
    assert json.loads((run / "broker.json").read_text()) == told
    for index in range(3):
        told = json.loads((run / f"worker-{index}.json").read_text())["argv"]
        assert option(told, "--invite") == "run/invite.toml", "where the broker listens now"
        assert [option(told, name) for name in ("--name", "--shard", "--data", "--device", "--threads", "--state")] == [
            f"worker-{index}", f"{index}/3", "mine.jsonl", "cpu", "5", str(Path("run/workers") / f"worker-{index}")
        ]  # fmt: skip
    assert (run / "logs" / "worker-0.log").read_text().startswith("said before\n")


def test_a_complete_run_starts_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fakes(place, "raise AssertionError('not to be started')\n")
    run = begun(place)
    committed(run, rounds=7)
    make_throw_away(run / "keys", ["worker-0"])
    assert launch.main(["--resume", "run"]) == 0
    assert not (run / "keys").exists()
    assert capsys.readouterr().out == (
        "run is complete: each of its 7 rounds is committed. "
        "Next: parablock report run, parablock evaluate run --data FILE, parablock export run\n"
    )


@pytest.mark.parametrize("needed", ["a round", "a row of the record", "a worker's state", "the broker's judgement"])
def test_a_run_from_which_somebody_needs_something_is_served(place: Path, needed: str) -> None:
    fakes(place, "sys.exit(4)\n")
    (place / "broker" / "__main__.py").write_text("raise SystemExit(4)\n")
    run = begun(place)
    committed(run, rounds=6 if needed == "a round" else 7)
    if needed == "a row of the record":
        rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        (run / "metrics.jsonl").write_text("".join(rows[:-1]))
    elif needed == "a worker's state":
        (run / "workers" / "worker-1").mkdir(parents=True)
    sets = ["--set", "rounds=7"] if needed == "the broker's judgement" else []
    with unchanged_signals():
        assert launch.main(["--resume", "run", *sets]) == 4


def test_what_a_launch_was_told_is_kept_before_the_run_begins(place: Path) -> None:
    fakes(place, "assert (out / 'launch.json').exists()\nlisten()\nuntil(lambda: marks() == 2)\n")
    assert started(place)[0] == 0
    threads = max((os.cpu_count() or 1) // 2, 1)
    told = {"workers": 2, "device": "cpu", "threads": threads}
    assert json.loads((place / "run" / "launch.json").read_text()) == told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "3"], "--resume goes on with the run as it was begun; leave workers out"),
        (["--out", "other"], "leave out out, or begin"),
        (["config.toml"], "leave config out"),
        (["--set", "rounds"], "--set expects KEY=VALUE"),
    ],
)
def test_what_was_told_before_is_not_told_again(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    begun(place)
    assert launch.main(["--resume", "run", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_run_that_could_not_be_launched_may_be_tried_again(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    fakes(place, "raise AssertionError('not to be started')\n")
    with monkeypatch.context() as patch:
        patch.setattr("parablock.placement.os.fsync", full)
        assert started(place)[0] == 75
    assert "the run had not begun: give the same command again" in capsys.readouterr().err
    RunFolder.check_free(place / "run")
    (place / "file").write_text("mine")
    config = settings.load(None)
    assert Launch(config, place / "file" / "run", 2).run() == 2
    assert "cannot write the run folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ('{"workers": 0, "device": "cpu", "threads": 1}', "expected a whole number of at least 1, got 0"),
        ('{"workers": 3, "device": "cpu", "threads": 0}', "expected a whole number of at least 1, got 0"),
        ('{"workers": true, "device": "cpu", "threads": 1}', "expected a whole number of at least 1, got True"),
        ('{"workers": 4, "device": "cpu", "threads": 1}', "tells of 4 workers, and the run's settings of 3"),
        ("[]", "launch.json is damaged"),
        ("", "launch.json is damaged"),
    ],
)
def test_a_damaged_launch_file_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], told: str, message: str
) -> None:
    begun(place, told)
    assert launch.main(["--resume", "run"]) == 2
    assert message in capsys.readouterr().err


def test_as_many_workers_are_started_as_the_run_has_clients(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["--workers", "3", "--set", "round.clients=2"]) == 2
    assert "--workers is 3, and round.clients 2" in capsys.readouterr().err


def test_workers_that_outlived_their_run_are_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fakes(place, "raise AssertionError('not to be started')\n")
    state = begun(place) / "workers" / "worker-1"
    state.mkdir(parents=True)
    orphan = StateFolder(state)
    assert launch.main(["--resume", "run"]) == 2
    said = capsys.readouterr().err
    assert f"workers of run still wait for its broker (worker-1: a worker (process {os.getpid()} on " in said
    assert "worker-0" not in said
    orphan.close()


def test_a_run_that_was_not_launched_or_is_in_use_does_not_go_on(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch.main(["--resume", "run"]) == 2
    assert "there is no run folder run" in capsys.readouterr().err
    run = begun(place, "{}")
    assert launch.main(["--resume", "run"]) == 2
    assert (
        "launch.json is damaged: KeyError('workers'); it holds workers, device and threads" in capsys.readouterr().err
    )
    with RunFolder.open(run) as folder:
        folder.lock("noon")
        (run / "launch.json").write_text('{"workers": 3, "device": "auto", "threads": 1}')
        assert launch.main(["--resume", "run"]) == 2
        assert "run is in use by a broker" in capsys.readouterr().err
    (run / "launch.json").unlink()
    assert launch.main(["--resume", "run"]) == 2
    assert (
        "was not begun by `parablock run`; go on with it by `parablock broker --resume run`" in capsys.readouterr().err
    )


# The command


@pytest.mark.parametrize("workers", ["0", "-1"])
def test_at_least_one_worker_is_needed(workers: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["--workers", workers]) == 2
    assert capsys.readouterr().err == f"parablock run: --workers is at least 1, got {workers}\n"


def test_at_least_one_thread_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["--threads", "0"]) == 2
    assert capsys.readouterr().err == "parablock run: --threads is at least 1, got 0\n"


def test_the_number_of_workers_is_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        launch.main(["--workers", "two"])
    assert caught.value.code == 2
    assert "argument --workers: invalid int value: 'two'" in capsys.readouterr().err


@pytest.mark.parametrize("main", [launch.main, quickstart.main])
def test_a_wrong_setting_is_told_before_anything_starts(
    main: Any, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--set", "solver.stepz=1"]) == 2
    name = "run" if main is launch.main else "quickstart"
    assert capsys.readouterr().err.startswith(f"parablock {name}: there is no setting solver.stepz.")
    assert list(place.iterdir()) == []


def test_a_run_on_one_machine_waits_for_its_own_workers_on_a_free_port(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Config, Path, int, str, int]] = []

    def run(self: Launch) -> int:
        asked.append((self._config, self._out, self._count, self._device, self._threads))
        return 3

    monkeypatch.setattr(Launch, "run", run)
    (place / "run.toml").write_text('rounds = 5\n[network]\nbind = "tcp://127.0.0.1:5557"\n[round]\nclients = 7\n')
    chosen = ["--device", "cpu", "--threads", "5"]
    assert launch.main(["run.toml", "--workers", "3", "--set", "seed=4", *chosen]) == 3
    config, out, workers, device, threads = asked[0]
    assert (config.rounds, config.seed, config.round.clients, config.network.bind) == (5, 4, 3, "tcp://127.0.0.1:*")
    assert (workers, device, threads) == (3, "cpu", 5)
    assert out.parts[0] == "runs"
    launch.main(["--out", "elsewhere", "--set", "network.bind=tcp://127.0.0.1:7777"])
    config, out, workers, device, threads = asked[1]
    assert (str(out), workers, device, config.network.bind) == ("elsewhere", 2, "auto", "tcp://127.0.0.1:7777")
    assert threads == max((os.cpu_count() or 1) // 2, 1)


# Quickstart


def round_row(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "round", "round": number, "block": 0, "block_name": "layer 0", "time_s": 1.0 + number, "loss": 1.0,
        "compute_s": 1.0, "comm_s": 2.0, "exposed_s": 0.5, "wait_s": 0.5, "round_s": 1.5, "bytes_up": 1,
        "bytes_down": 1, "contributors": ["worker-0"], "late": 0, "staleness": 1.0, "drift": 0.5, "alpha": 0.5,
    } | changes  # fmt: skip


def evaluation(number: int, loss: float | None, match: float | None) -> dict[str, Any]:
    return {
        "kind": "evaluation", "round": number, "time_s": 1.0 + number, "eval_loss": loss, "perplexity": None,
        "exact_match": match, "rows": 8, "tokens": 80, "answered": 8,
    }  # fmt: skip


def shown(path: Path, rows: list[dict[str, Any]]) -> str:
    """The summary of a run with these metrics, as text."""
    with RunFolder.create(path, settings.load(None)) as folder:
        for row in rows:
            folder.append_metrics(row)
        console = Console(file=io.StringIO(), width=300)
        console.print(quickstart.summary(folder))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def cells(text: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]
    return {line[0]: line[1:] for line in lines if line}


def test_the_summary_compares_the_first_evaluation_with_the_last(tmp_path: Path) -> None:
    rows = [evaluation(-1, 4.0, 0.0), round_row(0, round_s=100.0), round_row(1), evaluation(1, 3.0, 0.5)]
    rows += [round_row(2, round_s=2.5, exposed_s=0.0), evaluation(2, 1.2345, 0.123)]
    text = shown(tmp_path / "run [a]", rows)
    table = cells(text)
    assert table["held-out loss"] == ["4.000", "1.234"]
    assert table["exact match"] == ["0.0%", "12.3%"]
    assert table["mean round time"] == ["", "2.00 s over 3 rounds"]  # the first one warms up
    assert table["communication hidden"] == ["", "83%"]
    assert table["report"] == ["", str(tmp_path / "run [a]" / "report" / "index.html")]
    assert str(tmp_path / "run [a]") in text.splitlines()[0]


def test_the_summary_shows_what_there_is(tmp_path: Path) -> None:
    assert set(cells(shown(tmp_path / "none", []))) == {"report"}
    table = cells(shown(tmp_path / "one", [evaluation(-1, None, None), round_row(0, round_s=3.0, comm_s=None)]))
    assert table["held-out loss"] == table["exact match"] == ["–", "–"]
    assert table["mean round time"] == ["", "3.00 s over 1 rounds"]
    assert table["communication hidden"] == ["", "–"]
    table = cells(shown(tmp_path / "untimed", [round_row(0, round_s=None), round_row(1, round_s=None)]))
    assert table["mean round time"] == ["", "– over 2 rounds"]


def test_the_quickstart_ends_with_a_report_and_its_summary(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [evaluation(-1, 4.0, 0.0), round_row(0), round_row(1), evaluation(1, 2.0, 0.5)]
    fakes(
        place,
        f"""
from parablock import config
from parablock.run_folder import RunFolder
sets = [argument.removeprefix("--set=") for argument in sys.argv if argument.startswith("--set=")]
with RunFolder.create(out, config.load(None, sets)) as folder:
    for row in {rows!r}:
        folder.append_metrics(row)
listen()
until(lambda: marks() == 2)
""",
    )
    assert quickstart.main(["--out", "run", "--set", "seed=4"]) == 0
    assert "communication hidden" in capsys.readouterr().out
    folder = RunFolder.open(place / "run")
    assert folder.report_path.is_file()
    config = folder.config()
    assert (config.seed, config.round.clients, config.network.bind) == (4, 2, "tcp://127.0.0.1:*")
    assert (config.model, config.data.train, config.eval.generate) == ("builtin", "builtin", 256)


def test_a_quickstart_that_fails_gives_the_exit_code_and_no_summary(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fakes(place, "sys.exit(75)\n")
    assert quickstart.main([]) == 75
    assert "held-out loss" not in capsys.readouterr().out


def test_a_quickstart_without_a_run_to_report_on_says_so(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fakes(place, "listen()\nuntil(lambda: marks() == 2)\n")
    assert quickstart.main(["--out", "run"]) == 2
    told = capsys.readouterr()
    assert "run is not a run folder" in told.err
    assert "communication hidden" not in told.out
