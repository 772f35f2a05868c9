"""The comparison with Flower: its arithmetic, its output, and what is run, with programs that stand for Flower's."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import flower, peers
from bench.figures import FiguresError
from bench.grid import Grid
from bench.processes import ChildError
from tests.shown import shown

PLAN = peers.Plan(Grid((4.0,), (2,), rounds=3, repeat=1), Path("python"), "1.42.0", out=None, where=None)


def found_row() -> dict[str, Any]:
    return peers.row(2, 4_000_000, ours=[0.5, 0.25, 0.25], theirs=[5.0, 8.0, 5.0])


def test_a_row_from_rounds_by_hand() -> None:
    row = found_row()
    # Two clients moved 4 MB each way, so 16 MB, in 0.25 s and in 5 s.
    assert (row["parablock_mb_s"], row["flower_mb_s"], row["ratio"]) == (64.0, 3.2, 20.0)
    assert (row["workers"], row["block_mb"], row["rounds"]) == (2, 4.0, 3)


def test_the_result_has_the_keys_of_the_contract_and_survives_json() -> None:
    better = {**found_row(), "ratio": 30.0}
    found = json.loads(json.dumps(peers.result([better, found_row()], PLAN), allow_nan=False))
    contract = {"parablock_mb_s", "flower_mb_s", "ratio"}
    assert contract <= found.keys()
    assert contract <= found["rows"][0].keys()
    assert (found["ratio"], found["flower"]) == (20.0, "1.42.0")


def test_the_table_and_the_plot_show_every_row(tmp_path: Path) -> None:
    rows = [found_row(), {**found_row(), "workers": 4}]
    assert shown(peers.table(rows)).count("20.0") == 2
    peers.plot(rows).savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_flowers_rounds_are_from_its_first_step_to_the_mean() -> None:
    rows = [(1, 2, 0.0, 9.0), (2, 2, 10.0, 12.0), (3, 2, 13.0, 16.0)]
    assert flower.round_s(rows, clients=2, warm_up=1) == [2.0, 3.0]
    with pytest.raises(FiguresError, match="Flower's round 2 has 1 results of 2 clients"):
        flower.round_s([rows[0], (2, 1, 10.0, 12.0)], clients=2, warm_up=1)


# What is run --------------------------------------------------------------------------------------------------

_SUPERLINK = """
import socket, subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
port = int(sys.argv[sys.argv.index("--port") + 1])
with socket.create_server(("127.0.0.1", port)) as server:
    while True:
        server.accept()[0].close()
"""

_SUPERNODE = "import time; time.sleep(60)"

_FLWR = """
import json, pathlib, sys, tomllib
app = pathlib.Path(sys.argv[2])
assert sys.argv[1] == "run" and (app / "flower_app.py").exists()
tree = tomllib.loads((app / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
assert tree["components"] == {"serverapp": "flower_app:server", "clientapp": "flower_app:client"}
settings = tree["config"]
rows = [(n, settings["clients"], float(n), n + 0.25 * n) for n in range(settings["rounds"])]
pathlib.Path(settings["report"]).write_text(json.dumps(rows))
"""


def imagined(folder: Path, **programs: str) -> Path:
    """A Python with programs beside it that stand for Flower's."""
    folder.mkdir()
    for name, text in {
        "flower-superlink": _SUPERLINK, "flower-supernode": _SUPERNODE, "flwr": _FLWR, **programs
    }.items():  # fmt: skip
        (folder / name).write_text(f"#!{sys.executable}\n{text}")
        (folder / name).chmod(0o755)
    (folder / "python").symlink_to(sys.executable)
    return folder / "python"


def test_flower_is_started_asked_and_ended(tmp_path: Path) -> None:
    python = imagined(tmp_path / "bin")
    assert flower.measure(python, 2, 4000, rounds=3, warm_up=1, folder=tmp_path) == [0.25, 0.5]
    left = [pid for pid, environment in _environments() if f"FLWR_HOME={tmp_path}".encode() in environment]
    assert left == []  # not even what was started in a session of its own
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


def test_a_supernode_that_fails_is_told_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower, "PATIENCE_S", 30.0)
    python = imagined(tmp_path / "bin", **{"flower-supernode": "import sys; sys.exit('no such option')", "flwr": ""})
    with pytest.raises(ChildError, match=r"(?s)supernode-0 ended: exit code 1.*no such option"):
        flower.measure(python, 1, 4000, rounds=1, warm_up=0, folder=tmp_path)


def test_a_run_that_gives_no_rounds_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower, "PATIENCE_S", 0.0)  # of a round, not of what starts
    python = imagined(tmp_path / "bin", flwr="print('Successfully started run 1')")
    with pytest.raises(ChildError, match=r"(?s)not ready after 0 s.*Successfully started run 1"):
        flower.measure(python, 1, 4000, rounds=1, warm_up=0, folder=tmp_path)


def _environments() -> list[tuple[int, bytes]]:
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            found.append((int(path.parent.name), path.read_bytes()))
        except OSError:  # ended meanwhile
            continue
    return [(pid, environment) for pid, environment in found if pid != os.getpid()]


def test_a_python_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert peers.main(["--flower-python", "/no/such/python"]) == 2
    assert "name a Python that has flwr" in capsys.readouterr().err


def test_without_flower_the_command_that_installs_it_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "python").symlink_to(sys.executable)  # with nothing beside it
    assert peers.main(["--flower-python", str(tmp_path / "python")]) == 2
    told = capsys.readouterr().err
    assert "pip install 'flwr==" in told
    assert "add --flower-python flower/bin/python" in told
