"""The exchange that the benchmarks run: real broker and light clients as processes, and what stands around them."""

from __future__ import annotations

import asyncio
import json
import mmap
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest
import zmq
import zmq.asyncio

from bench import exchange, raw, synthetic, usage
from bench.exchange import Client, Exchange, Finished, exchange_s
from bench.figures import FiguresError
from bench.gate import AsyncVisitor, Gate, Visitor
from bench.network import network
from bench.processes import ChildError, Children
from parablock.run_folder import RunFolder

if TYPE_CHECKING:
    from pathlib import Path

# The synthetic model ------------------------------------------------------------------------------------------


def test_a_synthetic_model_has_blocks_of_the_size_that_was_asked_for() -> None:
    manifest = synthetic.manifest(3, 4096)
    assert [block.nbytes for block in manifest.blocks] == [4096] * 3
    assert manifest.digest != synthetic.manifest(3, 4100).digest
    base = synthetic.base(manifest)
    assert [vector.nbytes for vector in base.values] == [4096] * 3
    assert not any(vector.any() or vector.flags.writeable for vector in base.values)


def test_every_client_has_an_update_of_its_own() -> None:
    first = synthetic.delta(0, 1000)
    assert np.array_equal(first, synthetic.delta(0, 1000))
    assert not np.array_equal(first, synthetic.delta(1, 1000))
    assert np.abs(first).max() <= 0.5
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 1.0


def test_neither_end_of_the_exchange_loads_torch() -> None:
    program = "import sys, bench.light, bench.light_broker, bench.raw; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# What a run gives ---------------------------------------------------------------------------------------------


def test_a_run_counts_every_client_in_every_round(tmp_path: Path) -> None:
    asked = Exchange(clients=3, blocks=2, block_bytes=40_000, rounds=4, gated=True)
    finished = exchange.run(asked, tmp_path)
    names = ("light-0000", "light-0001", "light-0002")
    assert finished.contributors == (names,) * 4
    assert tuple(client.name for client in finished.clients) == names
    for client in finished.clients:
        assert sorted(client.began) == sorted(client.held) == [0, 1, 2, 3]
        assert all(client.began[round] < client.held[round] for round in range(4))
    assert len(finished.exchange_s(1)) == 3
    assert [row["round"] for row in finished.stored] == [0, 1, 2, 3]
    assert finished.store_s(1) > 0
    assert finished.broker_cpu_s(1) > 0
    assert finished.broker_peak_bytes >= 2 * 40_000


def test_the_clients_hold_the_sum_of_the_means(tmp_path: Path) -> None:
    exchange.run(Exchange(clients=2, blocks=1, block_bytes=4000, rounds=3), tmp_path)
    mean = (synthetic.delta(0, 1000) + synthetic.delta(1, 1000)) / 2
    with RunFolder.open(tmp_path / "run") as folder:
        ((version, values),) = folder.load_blocks().values()
    assert version == 3
    np.testing.assert_allclose(values, 3 * mean, rtol=1e-5, atol=1e-6)


def test_many_clients_share_a_process(tmp_path: Path) -> None:
    finished = exchange.run(Exchange(clients=7, blocks=2, block_bytes=4096, rounds=3, processes=2), tmp_path)
    assert len(finished.clients) == 7
    assert len(list(tmp_path.glob("clients-*.json"))) == 2
    assert len(finished.periods_s(1)) == 2


def test_nobody_waits_for_a_client_that_a_quorum_can_do_without(tmp_path: Path) -> None:
    asked = Exchange(clients=2, blocks=1, block_bytes=1 << 20, rounds=3, quorum=1, deadline_s=0.01, excused=1)
    with network("user", [1e8, 5e4]) as links:  # bytes per second: the second one's upload takes 20 s
        finished = exchange.run(asked, tmp_path, links)
    assert finished.contributors == (("light-0000",),) * 3
    assert sorted(finished.clients[0].held) == [0, 1, 2]


def test_a_broker_that_cannot_start_is_told_with_its_log(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    with pytest.raises(ChildError, match=r"(?s)broker ended: exit code 1.*already holds a run"):
        exchange.run(Exchange(clients=1, blocks=1, block_bytes=4096, rounds=1), tmp_path)


def test_clients_with_different_models_fail_the_run(tmp_path: Path) -> None:
    asked = Exchange(clients=2, blocks=1, block_bytes=4096, rounds=2)
    exchange.run(asked, tmp_path)
    report = json.loads((tmp_path / "clients-1.json").read_text())
    report["clients"][0]["digest"] = "another"
    reports = [json.loads((tmp_path / "clients-0.json").read_text()), report]
    with pytest.raises(FiguresError, match="the clients hold 2 different models") as failed:
        exchange._finished(tmp_path, reports)
    assert str(tmp_path) not in str(failed.value)  # it goes before anyone could look there


# Arithmetic ---------------------------------------------------------------------------------------------------


def client(began: dict[int, float], held: dict[int, float]) -> Client:
    return Client("c", began, held)


EARLY = client({0: 0.0, 1: 2.0, 2: 5.0}, {0: 1.0, 1: 3.0, 2: 6.0})
LATE = client({0: 0.5, 1: 2.5, 2: 5.25}, {0: 1.5, 1: 4.5, 2: 8.0})


def test_a_round_lasts_from_the_first_start_to_the_last_holding() -> None:
    assert exchange_s([EARLY, LATE], warm_up=0) == [1.5, 2.5, 3.0]
    assert exchange_s([EARLY, LATE], warm_up=2) == [3.0]


def test_rounds_that_overlap_are_refused() -> None:
    hasty = client({0: 0.0, 1: 1.25}, {0: 1.0, 1: 3.0})
    with pytest.raises(FiguresError, match="round 1 began before round 0 had ended"):
        exchange_s([hasty, LATE], warm_up=1)


def test_the_brokers_figures_are_over_the_rounds_after_the_warm_up() -> None:
    stored = [
        {"round": 0, "began": 0.0, "ended": 9.0, "cpu_s": 5.0},
        {"round": 1, "began": 10.0, "ended": 10.5, "cpu_s": 6.0},
        {"round": 2, "began": 20.0, "ended": 20.5, "cpu_s": 6.5},
        {"round": 3, "began": 30.0, "ended": 30.7, "cpu_s": 7.5},
    ]
    finished = Finished((EARLY, LATE), (("c",),) * 4, tuple(stored), 0, 0)
    assert finished.store_s(1) == 0.5
    assert finished.broker_cpu_s(2) == pytest.approx(0.75)
    assert finished.periods_s(1) == [3.0, 3.5]


# The gate, usage, the bare exchange, children -----------------------------------------------------------------


ROUNDS = 100
"""So many that parties whom a gate does not hold would run apart."""


def test_the_gate_lets_nobody_through_before_all_have_come(tmp_path: Path) -> None:
    came: list[int] = []
    passed: list[tuple[int, int, int]] = []
    with Gate(tmp_path / "gate", 2) as gate:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()

        def visit() -> None:
            visitor = Visitor(context, gate.endpoint)
            for round in range(ROUNDS):
                came.append(round)
                visitor.wait()
                passed.append((round, came.count(round), gate.passed))
            visitor.close()

        threads = [threading.Thread(target=visit) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20.0)
        context.term()
    assert sorted(passed) == [(round, 2, round + 1) for round in range(ROUNDS) for _ in range(2)]


def test_the_gate_is_passed_on_an_event_loop_too(tmp_path: Path) -> None:
    came: list[int] = []
    passed: list[tuple[int, int]] = []

    async def visit(context: zmq.asyncio.Context, endpoint: str) -> None:
        visitor = AsyncVisitor(context, endpoint)
        for round in range(ROUNDS):
            came.append(round)
            await visitor.wait()
            passed.append((round, came.count(round)))
        visitor.close()

    async def scenario(endpoint: str) -> None:
        context = zmq.asyncio.Context()
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            for _ in range(2):
                group.create_task(visit(context, endpoint))
        context.term()

    with Gate(tmp_path / "gate", 2) as gate:
        asyncio.run(scenario(gate.endpoint))
    assert sorted(passed) == [(round, 2) for round in range(ROUNDS) for _ in range(2)]


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from Linux's /proc")
def test_memory_is_what_came_after_the_base() -> None:
    memory = usage.Memory()
    with mmap.mmap(-1, 16 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:  # malloc may have some to spare
        pages.write(bytes([1]) * len(pages))
    assert 0.9 * (16 << 20) <= memory.peak() <= 3 * (16 << 20)  # the peak stays, though the pages are gone
    assert usage.Memory().peak() < 8 << 20


def test_files_that_may_not_be_opened_are_told() -> None:
    usage.allow_files(1)
    with pytest.raises(ValueError, match=r"1000000000000 open files are needed, \d+ are allowed; raise the limit"):
        usage.allow_files(10**12)


def test_the_bare_exchange_moves_every_byte_of_every_round(tmp_path: Path) -> None:
    found = raw.measure(clients=2, nbytes=100_001, chunk_bytes=4096, rounds=3, warm_up=1, folder=tmp_path)
    assert len(found) == 2
    assert all(seconds > 0 for seconds in found)
    assert not list(tmp_path.iterdir())


def test_a_condition_that_does_not_come_is_told_with_the_logs(tmp_path: Path) -> None:
    program = [sys.executable, "-c", "print('still busy', flush=True); import time; time.sleep(60)"]
    with Children(tmp_path) as children:
        child = children.start("broker", program)
        children.until(lambda: "still busy" in child.log.read_text(), patience_s=30.0)
        with pytest.raises(ChildError, match=r"(?s)not ready after 0\.1 s.*still busy") as failed:
            children.until(lambda: False, patience_s=0.1)
    assert "broker, the end of its log:" in str(failed.value)
    assert str(tmp_path) not in str(failed.value)  # the logs go with their folder


def test_a_child_that_fails_ends_the_wait_for_a_condition(tmp_path: Path) -> None:
    with Children(tmp_path) as children:
        children.start("broker", [sys.executable, "-c", "import sys; sys.exit('the reason')"])
        with pytest.raises(ChildError, match=r"(?s)broker ended: exit code 1.*the reason"):
            children.until(lambda: False, patience_s=30.0)
