"""Secure aggregation as real processes: two workers, and a broker that is killed on the way."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import numpy as np
import pytest

from bench.simulation import Simulation
from tests.processes import Processes, blocks, wait_for

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.timeout(240)
def test_a_masked_run_ends_where_a_plain_one_does(tmp_path: Path) -> None:
    """But for what fixed point rounds away. The broker's second life has other keys; no round is lost with it."""
    settings = {"mode": "fedbcd", "secure.enabled": "true", "eval.generate": 0}
    with Processes(tmp_path, **settings) as processes:
        workers = [processes.worker(index, "--eval", "builtin") for index in range(2)]
        metrics = processes.out / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and '"round": 1,' in metrics.read_text(encoding="utf-8"))
        processes.broker.kill()
        assert processes.broker.wait(timeout=30) == -signal.SIGKILL
        processes.resume()
        assert processes.broker.wait(timeout=120) == 0, processes.broker_log.read_text()
        assert [worker.wait(timeout=30) for worker in workers] == [0, 0]
        assert "was not counted" not in processes.said(0) + processes.said(1)
    folder = processes.folder_of_run()
    rounds = {row["round"]: row for row in folder.read_metrics() if row["kind"] == "round"}
    assert [rounds[number]["contributors"] for number in range(6)] == [["worker-0", "worker-1"]] * 6
    simulation = Simulation(folder.config())
    simulation.run()
    for (_, values), plain in zip(blocks(folder).values(), simulation.blocks, strict=True):
        apart = np.abs(np.frombuffer(values, np.float32) - plain)
        assert np.mean(apart) < 1e-6, "a round moves a value by about 1e-3"
        assert np.max(apart) < 3e-4, "AdamW makes the most of a gradient that is all but zero"
