"""The whole system as real processes over loopback: broker, two workers, a run's folder, report, evaluation, export."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.link import Link
from bench.shaping import Shape
from bench.simulation import Outcome, Simulation
from parablock import export, models, report, tensor_file, verify_command
from parablock.run_folder import RunFolder
from parablock.trace import read_trace
from tests.processes import Processes, blocks, finished, run, wait_for
from workers import evaluate_command

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def overlapped(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """By the command itself; the other runs of this file are its processes one by one."""
    out = tmp_path_factory.mktemp("overlapped") / "run"
    done = run(out, mode="parablock")
    assert done.returncode == 0, done.stderr
    return RunFolder.open(out)


@pytest.fixture(scope="module")
def synchronous(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The longer one of two deltas is cut to the length of the other, so that the broker measures before it folds."""
    return finished(tmp_path_factory.mktemp("synchronous"), mode="fedbcd", **{"robust.clip_ratio": 1.0})


def stored_loss(folder: RunFolder, out: Path, capsys: pytest.CaptureFixture[str]) -> float:
    """The held-out loss of the run's model, which is exported to `out`."""
    assert export.main([str(folder.path), "--out", str(out)]) == 0
    capsys.readouterr()
    settings = ["--set", "eval.rows=16", "--set", "eval.generate=0", "--json"]
    data = ["--data", "builtin", "--set", f"data.template={folder.config().data.template}"]
    assert evaluate_command.main([str(out), *data, *settings]) == 0
    loss: float = json.loads(capsys.readouterr().out)["loss"]
    return loss


@pytest.mark.parametrize("which", ["overlapped", "synchronous"])
def test_every_round_is_told_and_stored(which: str, request: pytest.FixtureRequest) -> None:
    folder: RunFolder = request.getfixturevalue(which)
    rows = folder.read_metrics()
    rounds = [row for row in rows if row["kind"] == "round"]
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    assert [row["round"] for row in rounds] == list(range(6))
    assert [row["round"] for row in evaluations] == [-1, 5]
    for row in rounds:
        assert row["contributors"] == ["worker-0", "worker-1"]
        assert row["compute_s"] > 0
        assert row["comm_s"] > 0
        assert row["bytes_up"] == row["bytes_down"] > 0
        assert row["late"] == 0
    assert all(row["rows"] == 16 and row["tokens"] > 0 and row["answered"] == 4 for row in evaluations)
    assert evaluations[1]["eval_loss"] < evaluations[0]["eval_loss"]
    newest = {row["block"]: row["round"] + 1 for row in rounds}
    assert {index: version for index, (version, _) in blocks(folder).items()} == newest


def test_staleness_is_the_pipelines(overlapped: RunFolder, synchronous: RunFolder) -> None:
    def staleness(folder: RunFolder) -> list[float]:
        return [row["staleness"] for row in folder.read_metrics() if row["kind"] == "round"]

    assert staleness(overlapped) == [1.0] * 5 + [0.0]  # after the last round nothing trains while it is exchanged
    assert staleness(synchronous) == [0.0] * 6


def simulation(folder: RunFolder) -> tuple[Simulation, Outcome]:
    """The same run without brokers, links and processes, on as many threads as its workers had."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max((os.cpu_count() or 1) // 2, 1))
    try:
        simulated = Simulation(folder.config())
        return simulated, simulated.run()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("which", ["overlapped", "synchronous"])
def test_a_simulation_gives_the_runs_own_blocks_and_loss(which: str, request: pytest.FixtureRequest) -> None:
    folder: RunFolder = request.getfixturevalue(which)
    simulated, outcome = simulation(folder)
    assert [values.tobytes() for values in simulated.blocks] == [values for _, values in blocks(folder).values()]
    rows = folder.read_metrics()
    assert outcome.loss == next(row["eval_loss"] for row in rows if row.get("eval_loss") and row["round"] == 5)
    assert outcome.miss == pytest.approx(statistics.fmean(row["miss"] for row in rows if row["kind"] == "round"))


def test_who_was_cut_is_in_the_metrics(overlapped: RunFolder, synchronous: RunFolder) -> None:
    cut, whole = ([row["clipped"] for row in folder.read_metrics() if row["kind"] == "round"] for folder in
                  (synchronous, overlapped))  # fmt: skip
    assert all(len(names) == 1 for names in cut), "of two the longer one"
    assert {"worker-0", "worker-1"} >= {name for names in cut for name in names}
    assert not any(whole)


def test_the_same_seed_gives_identical_blocks(overlapped: RunFolder, tmp_path: Path) -> None:
    again = finished(tmp_path, mode="parablock")  # by processes with other hash seeds
    assert blocks(again) == blocks(overlapped)


def test_another_seed_gives_other_blocks(overlapped: RunFolder, tmp_path: Path) -> None:
    other = finished(tmp_path, mode="parablock", seed=1)
    assert blocks(other) != blocks(overlapped)


def test_what_the_broker_announces_is_the_same_for_a_seed(tmp_path: Path) -> None:
    """One of two clients a round, blocks by importance: neither follows from the settings."""
    settings = {"rounds": 10, "round.fraction": 0.5, "schedule.order": "importance", "eval.generate": 0}
    told = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        folder = finished(tmp_path / name, **settings)
        rows = [row for row in folder.read_metrics() if row["kind"] == "round"]
        told.append(([(row["block"], *row["contributors"]) for row in rows], blocks(folder)))
    assert told[0] == told[1]
    rounds, stored = told[0]
    assert [block for block, *_ in rounds[:4]] == [3, 2, 1, 0]
    assert {tuple(names) for _, *names in rounds} == {("worker-0",), ("worker-1",)}
    assert stored.keys() == {0, 1, 2, 3}


def test_adaptive_steps_follow_the_link(tmp_path: Path) -> None:
    """An exchange of about half a second, in which many more steps can be taken than the two of the first rounds."""
    settings = {"rounds": 10, "round.clients": 1, "data.eval": "", "solver.adaptive": "true", "solver.max_steps": 20}
    with Processes(tmp_path, **settings) as processes:
        host, port = processes.endpoint().removeprefix("tcp://").split(":")
        with Link((host, int(port)), Shape(rate=1e6)) as link:
            assert processes.worker(0, endpoint=link.endpoint).wait(timeout=200) == 0, processes.said(0)
        assert processes.broker.wait(timeout=30) == 0
    steps = [row["steps"] for row in RunFolder.open(processes.out).read_metrics()]
    assert steps[:2] == [2.0, 2.0], "nothing has been exchanged yet"
    assert 8 < max(steps) <= 20


def test_other_optimizers_at_both_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two visits of every block. The clients' own losses are the stored model's, so that both hold what it is."""
    settings = {"solver.optimizer": "sgd", "solver.momentum": 0.9, "solver.state": "keep", "solver.lr": 0.1}
    server = {"server.optimizer": "adam", "server.lr": 0.003}
    folder = finished(tmp_path, rounds=8, **settings, **server, **{"eval.generate": 0})
    rows = folder.read_metrics()
    assert all(row["contributors"] == ["worker-0", "worker-1"] for row in rows if row["kind"] == "round")
    first, last = (row["eval_loss"] for row in rows if row["kind"] == "evaluation")
    assert last < first
    assert stored_loss(folder, tmp_path / "model", capsys) == pytest.approx(last, abs=1e-4)


def test_report_is_one_page_that_opens_without_a_network(overlapped: RunFolder) -> None:
    assert report.main([str(overlapped.path)]) == 0
    page = overlapped.report_path.read_text(encoding="utf-8")
    assert "<svg" in page
    assert "src=" not in page
    assert "<link" not in page


def test_exported_folder_loads_and_gives_the_runs_own_loss(
    overlapped: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model"
    last = [row for row in overlapped.read_metrics() if row["kind"] == "evaluation"][-1]
    assert stored_loss(overlapped, out, capsys) == pytest.approx(last["eval_loss"], abs=1e-4)
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    tokens = tokenizer("2 + 2", return_tensors="pt")
    with torch.inference_mode():
        assert model(**tokens).logits.isfinite().all()


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(overlapped: RunFolder) -> None:
    before = (overlapped.path / "metrics.jsonl").read_bytes()
    done = run(overlapped.path)
    assert done.returncode == 2
    assert "already" in done.stderr
    assert (overlapped.path / "metrics.jsonl").read_bytes() == before


def test_no_training_text_leaves_the_worker(tmp_path: Path) -> None:
    """Neither the run's folder nor the broker's output holds a planted sentence or the name of its file, nor the label
    of a row, but for the worker that tells those."""
    planted = "the heron counts seventeen lanterns"
    with Processes(tmp_path, rounds=3, **{"eval.task": "kind", "eval.rows": 2}) as processes:
        for index, (label, agreed) in enumerate((("otter", ["--tell-tasks"]), ("stork", []))):
            data = tmp_path / f"secret-ledger-{index}.jsonl"
            kept = {"completion": "#### 7", "kind": label}
            rows = [{"prompt": f"{planted} {number}?", **kept} for number in range(40)]
            data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            processes.worker(index, "--eval", str(data), *agreed, data=str(data))
        assert processes.broker.wait(timeout=120) == 0
    first, last = (row for row in RunFolder.open(processes.out).read_metrics() if row["kind"] == "evaluation")
    assert last["eval_loss"] < first["eval_loss"]
    # Of each client's share the first eval.rows of the source count, though for eval.generate more are loaded.
    assert {name: part["rows"] for name, part in last["clients"].items()} == {"worker-0": 1, "worker-1": 1}
    assert last["answered"] == 4
    assert last["tasks"] == {"otter": last["clients"]["worker-0"]["tasks"]["otter"]}
    assert "tasks" not in last["clients"]["worker-1"]
    told = processes.broker_log.read_text(encoding="utf-8", errors="replace")
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file():
            told += path.read_bytes().decode("utf-8", errors="replace")
    assert "heron" not in told
    assert "secret-ledger" not in told
    assert "otter" in told
    assert "stork" not in told


def test_a_run_outlives_its_brokers_and_ends_as_if_there_had_been_one(tmp_path: Path) -> None:
    """One is killed, the next one asked to end; the workers wait, train on, and make the same blocks bit for bit."""
    settings = {"rounds": 40, "server.optimizer": "momentum", "server.lr": 0.5, "network.heartbeat_s": 0.2}
    with Processes(
        tmp_path, **settings, **{"network.timeout_s": 20, "network.resend_s": 5, "eval.generate": 0}
    ) as processes:
        threads = max((os.cpu_count() or 1) // 2, 1)
        workers = [processes.worker(index, "--eval", "builtin", "--threads", str(threads)) for index in range(2)]
        endpoint = processes.endpoint()
        folder = processes.folder_of_run()

        def committed() -> int:
            return sum(event["kind"] == "committed" for event in folder.read_events())

        wait_for(lambda: committed() >= 3)
        processes.broker.kill()
        processes.broker.wait(timeout=30)
        before = committed()
        processes.resume()
        wait_for(lambda: committed() >= before + 5)
        processes.broker.send_signal(signal.SIGTERM)
        assert processes.broker.wait(timeout=30) == 75
        assert f"go on with it: parablock broker --resume {processes.out}" in processes.broker_log.read_text()
        assert [worker.poll() for worker in workers] == [None, None], "they wait"
        processes.resume()
        assert processes.broker.wait(timeout=120) == 0, processes.broker_log.read_text()
        assert [worker.wait(timeout=30) for worker in workers] == [0, 0]
        assert processes.endpoint() == endpoint, "where they waited"
    assert "the broker stopped: the broker was interrupted (SIGTERM); waiting for it to come back" in processes.said(0)
    rows = [row for row in folder.read_metrics() if row["kind"] == "round"]
    assert [row["round"] for row in rows] == list(range(40)), "each once"
    assert all(row["contributors"] == ["worker-0", "worker-1"] for row in rows)
    assert [row["round"] for row in folder.read_metrics() if row["kind"] == "evaluation"] == [-1, 39]
    events = folder.read_events()
    assert [event["text"][:10] for event in events if event["kind"] == "restarted"] == ["as epoch 2", "as epoch 3"]
    assert all(one["time_s"] <= other["time_s"] for one, other in itertools.pairwise(events))
    assert {span.process_name for span in read_trace(folder.trace_path)} == {"broker", "worker-0", "worker-1"}
    assert "Broker restarts" in report.write(folder).read_text()
    assert verify_command.main([str(folder.path)]) == 0
    simulated, _ = simulation(folder)
    assert [values.tobytes() for values in simulated.blocks] == [values for _, values in blocks(folder).values()]


def test_interrupt_ends_everything_in_good_order(tmp_path: Path) -> None:
    with Processes(tmp_path, rounds=5000) as processes:
        workers = [processes.worker(index) for index in range(2)]
        wait_for(lambda: len(RunFolder.open(processes.out).read_metrics()) >= 2)
        workers[0].send_signal(signal.SIGINT)
        assert workers[0].wait(timeout=30) == 75
        assert f"the same command goes on from {tmp_path / 'state-0'}" in processes.said(0)
        assert tensor_file.read(tmp_path / "state-0" / "position.safetensors").facts["round"] >= 1
        processes.broker.send_signal(signal.SIGTERM)
        assert processes.broker.wait(timeout=30) == 75
        wait_for(lambda: "broker stopped" in processes.said(1))
        workers[1].send_signal(signal.SIGTERM)
        assert workers[1].wait(timeout=30) == 75
    folder = RunFolder.open(processes.out)
    assert read_trace(folder.trace_path)
    json.loads(folder.trace_path.read_text(encoding="utf-8"))
    kinds = {event["kind"] for event in folder.read_events()}
    assert {"joined", "started", "committed", "left"} <= kinds


def test_a_killed_worker_is_missed_and_a_new_one_catches_up(tmp_path: Path) -> None:
    settings = {"rounds": 400, "round.quorum": 1, "network.heartbeat_s": 0.2, "network.timeout_s": 1.0}
    with Processes(tmp_path, **settings, **{"network.resend_s": 0.5}) as processes:
        workers = [processes.worker(index) for index in range(2)]
        folder = processes.out
        wait_for(lambda: len(RunFolder.open(folder).read_metrics()) >= 4)
        os.kill(workers[1].pid, signal.SIGKILL)
        wait_for(lambda: any(event["kind"] == "lost" for event in RunFolder.open(folder).read_events()))
        alone = len(RunFolder.open(folder).read_metrics())
        wait_for(lambda: len(RunFolder.open(folder).read_metrics()) > alone + 2)
        processes.worker(1)
        wait_for(lambda: RunFolder.open(folder).read_metrics()[-1].get("contributors") == ["worker-0", "worker-1"])
        processes.broker.send_signal(signal.SIGINT)
        assert processes.broker.wait(timeout=30) == 75
    rounds = [row for row in RunFolder.open(folder).read_metrics() if row["kind"] == "round"]
    assert [row["round"] for row in rounds] == list(range(len(rounds)))
    assert any(row["contributors"] == ["worker-0"] for row in rounds)


def test_a_worker_that_is_killed_goes_on_as_if_nothing_had_happened(overlapped: RunFolder, tmp_path: Path) -> None:
    """Killed while it trains, with a round in flight; the same command brings it back, and the run ends as ever."""
    threads = str(max((os.cpu_count() or 1) // 2, 1))
    with Processes(tmp_path, mode="parablock") as processes:
        workers = [processes.worker(index, "--eval", "builtin", "--threads", threads) for index in range(2)]
        state = tmp_path / "state-1"

        def in_mid_round() -> bool:
            """Stopped where what it has sent is on disk: a moment before it the round might be closed without that."""
            workers[1].send_signal(signal.SIGSTOP)
            passed = state / "position.safetensors"
            position = tensor_file.read(passed).facts["round"] if passed.exists() else 0
            if position >= 2 and processes.said(1).count(": loss ") == position:
                return True
            workers[1].send_signal(signal.SIGCONT)
            return False

        wait_for(in_mid_round)
        workers[1].kill()
        workers[1].wait()
        returned = processes.worker(1, "--eval", "builtin", "--threads", threads)
        assert processes.broker.wait(timeout=120) == 0, processes.broker_log.read_text()
        assert [workers[0].wait(timeout=30), returned.wait(timeout=30)] == [0, 0]
    assert "going on from" in processes.said(1)
    rows = [row for row in processes.folder_of_run().read_metrics() if row["kind"] == "round"]
    assert all(row["contributors"] == ["worker-0", "worker-1"] for row in rows)
    assert blocks(processes.folder_of_run()) == blocks(overlapped)
    assert not state.exists(), "the run is done"


def test_a_worker_of_another_model_is_refused_at_the_door(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        other = models.load("builtin", dtype="float32", seed=99)
        other.model.save_pretrained(tmp_path / "other")
        other.tokenizer.save_pretrained(tmp_path / "other")
        worker = processes.worker(0, "--model", str(tmp_path / "other"))
        assert worker.wait(timeout=60) == 3
        assert "differs from the broker's in its weights" in processes.said(0)


def test_a_worker_before_the_broker_waits_and_says_so(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    with Processes(tmp_path, rounds=2) as idle:  # only to have workers without a broker on that port
        worker = idle.worker(0, endpoint=endpoint)
        wait_for(lambda: "does not answer yet" in idle.said(0))
        second = tmp_path / "second"
        second.mkdir()
        settings = {"network.bind": endpoint, "round.clients": 1}
        with Processes(second, keys=idle.keys, rounds=2, **settings) as processes:
            assert processes.broker.wait(timeout=90) == 0
            assert worker.wait(timeout=30) == 0


def test_bad_input_is_told_and_nothing_is_left_running(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(4 * '{"question": "1 + 1?", "answer": "2"}\n', encoding="utf-8")
    done = run(tmp_path / "run", workers=1, **{"data.train": str(data)})
    assert done.returncode == 2
    assert "data.prompt" in done.stderr
    assert "question" in done.stderr


def test_a_port_in_use_is_told(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        endpoint = processes.endpoint()
        command = [sys.executable, "-m", "broker", "--out", str(tmp_path / "b"), f"--set=network.bind={endpoint}"]
        command += ["--keys", str(processes.keys)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2
        assert "in use" in done.stderr
        assert not (tmp_path / "b").exists()
