"""The overlap benchmark: its arithmetic against rows worked out by hand, its output, and the processes it starts."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bench import overlap, results, workload
from bench.figures import Averages, FiguresError, averages, medians, rate_for, rounds_for
from bench.figures import overlap as ratios
from bench.processes import ChildError, Children
from bench.shapes import SHAPES
from bench.store_broker import Nowhere, Timed
from bench.workload import Workload
from broker.store import BlockStore
from parablock import config
from tests.shown import shown

if TYPE_CHECKING:
    from collections.abc import Sequence

CONFIGS = Path(__file__).parents[1] / "bench" / "configs"


def metrics_row(round: int, compute_s: float, comm_s: float, round_s: float, **more: Any) -> dict[str, Any]:
    """A row of metrics.jsonl as far as the figures read it."""
    return {
        "kind": "round", "round": round, "compute_s": compute_s, "comm_s": comm_s, "exposed_s": 0.25,
        "round_s": round_s, "contributors": ["a", "b"], "loop_lag_p99_ms": None, **more,
    }  # fmt: skip


# Two rounds of warm-up, two sweeps over two blocks, a tail. The numbers outside the middle must not count.
ROWS = [
    {"kind": "evaluation", "round": -1, "eval_loss": 2.0},
    metrics_row(0, 99.0, 99.0, 99.0),
    metrics_row(1, 99.0, 99.0, 99.0),
    metrics_row(2, 1.0, 0.5, 1.5, loop_lag_p99_ms=4.0),
    metrics_row(3, 2.0, 0.5, 2.5),
    metrics_row(4, 1.0, 1.5, 2.5, loop_lag_p99_ms=2.0),
    metrics_row(5, 2.0, 1.5, 3.5),
    metrics_row(6, 99.0, 99.0, 99.0),
    {"kind": "evaluation", "round": 6, "eval_loss": 1.0},
]


def run_of(compute_s: float, comm_s: float, round_s: float) -> Averages:
    return Averages(4, compute_s, comm_s, 0.0, round_s, None, (round_s, round_s))


# Arithmetic ---------------------------------------------------------------------------------------------------


def test_means_are_over_whole_sweeps_between_warm_up_and_tail() -> None:
    found = averages(ROWS, blocks=2, clients=2)
    assert (found.rounds, found.compute_s, found.comm_s, found.round_s) == (4, 1.5, 1.0, 2.5)
    assert (found.exposed_s, found.loop_lag_p99_ms) == (0.25, 3.0)
    assert len(found.round_times_s) == 7


def test_a_part_of_a_sweep_is_left_out() -> None:
    # With three blocks one sweep fits, rounds 2 to 4; round 5 would weigh one block more than the others.
    assert averages(ROWS, blocks=3, clients=2).compute_s == pytest.approx(4 / 3)


def test_a_run_has_the_rounds_that_its_means_need() -> None:
    assert rounds_for(2, 2) == 7
    assert averages(ROWS, blocks=2, clients=2).rounds == 4


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        (ROWS[:5], "needs 5 rounds with warm-up and tail; the run has 4"),
        ([*ROWS[:4], metrics_row(3, 1, 1, 1, contributors=["a"]), *ROWS[5:]], "counted 1 of 2 clients"),
        ([*ROWS[:4], {**metrics_row(3, 1, 1, 1), "comm_s": None}, *ROWS[5:]], "round 3 has no comm_s"),
    ],
)
def test_rows_that_give_no_figures_are_refused(rows: Sequence[dict[str, Any]], complaint: str) -> None:
    with pytest.raises(FiguresError, match=complaint):
        averages(rows, blocks=2, clients=2)


def test_the_ratios_of_the_design() -> None:
    # C = 1.0, M = 0.8 and T = 1.8 without overlap; C = 1.1, M = 0.9 and T = 1.21 with.
    found = ratios(run_of(1.0, 0.8, 1.8), run_of(1.1, 0.9, 1.21))
    assert found.efficiency == pytest.approx((1.8 - 1.21) / 0.8)
    assert found.bound_ratio == pytest.approx(1.1)
    assert found.compute_slowdown == pytest.approx(1.1)


def test_perfect_overlap_is_one_on_either_side_of_m_equals_c() -> None:
    for compute_s, comm_s in ((1.0, 0.5), (1.0, 2.0)):
        synchronous = run_of(compute_s, comm_s, compute_s + comm_s)
        found = ratios(synchronous, run_of(compute_s, comm_s, max(compute_s, comm_s)))
        assert (found.efficiency, found.bound_ratio, found.compute_slowdown) == (1.0, 1.0, 1.0)


def test_no_overlap_is_zero() -> None:
    assert ratios(run_of(1.0, 0.5, 1.5), run_of(1.0, 0.5, 1.5)).efficiency == 0.0


def test_the_rate_for_a_regime() -> None:
    # Up and down took 0.5 s at 8 MB/s, so 4 MB moved; M = 2 C = 2.0 s asks for 2 MB/s.
    assert rate_for(2.0, {8e6: run_of(1.0, 0.5, 1.5)}) == pytest.approx(2e6)
    # 0.8 MB took 0.8 s at 1 MB/s and 0.2 s at 4 MB/s; the rest of each, 0.1 s, is delay, which no rate shortens.
    delayed = {1e6: run_of(1.0, 0.9, 1.9), 4e6: run_of(1.0, 0.3, 1.3)}
    assert rate_for(0.5, delayed) == pytest.approx(2e6)
    with pytest.raises(FiguresError, match=r"0\.1 s of it do not depend on the rate"):
        rate_for(0.05, delayed)
    with pytest.raises(FiguresError, match="no shorter over a faster link"):
        rate_for(1.0, {1e6: run_of(1.0, 0.5, 1.5), 4e6: run_of(1.0, 0.5, 1.5)})


def test_repetitions_become_their_medians() -> None:
    turns = [{"clients": 2, "a": value, "series": [value], "lag": None} for value in (3.0, 1.0, 2.0)]
    assert medians(turns) == {"clients": 2, "a": 2.0, "series": [2.0], "lag": None}


# The benchmark with runs that are made up ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Imagined(overlap.Bench):
    """Its runs take one second of compute and move 8 MB at the rate, with or without overlap as the mode says.

    A journal makes a round 2 % longer, encryption 4 %.
    """

    def run(self, name: str, mode: str, clients: int, rate: float, sweeps: int, kind: str = "fedbcd") -> Averages:
        del name, clients, sweeps
        comm_s = 8e6 / rate
        whole_s = 1.0 + comm_s if mode == "fedbcd" else max(1.0, comm_s)
        return run_of(1.0, comm_s, whole_s / {"bare": 1.02, "plain": 1.04}.get(kind, 1.0))

    def stored_s(self, name: str) -> list[float]:
        assert name.endswith("journaled")
        return [0.01, 0.02, 0.06]

    def predict(self, name: str, clients: int, rate: float) -> list[dict[str, Any]]:  # noqa: ARG002
        """The first client's machine is a tenth faster than it will be in the run."""
        plan = {"compute_s": 1.0, "exchange_s": 1.0, "fedbcd_round_s": 2.0, "parablock_round_s": 1.0}
        return [{key: value * share for key, value in plan.items()} for share in (0.9, 1.0)[:clients]]


PLAN = overlap.Plan(
    clients=(1, 2), ratios=(0.5, 1.0, 2.0), rate=None, delay_s=0.0, kind="user", steps=2, sweeps=2, repeat=2,
    predict=False, cost="", overrides=(), keep=None, out=None,
)  # fmt: skip


def imagined_rows(plan: overlap.Plan) -> list[dict[str, Any]]:
    bench = Imagined(
        plan,
        Workload(Path("model"), Path("rows"), blocks=4, block_bytes=4_000_000, model_bytes=90_000_000),
        Path("folder"),
    )
    return [row for clients in plan.clients for row in bench.rows(clients)]


def test_the_journal_costs_what_its_absence_saves() -> None:
    (row,) = imagined_rows(dataclasses.replace(PLAN, clients=(1,), ratios=(1.0,), cost="journal", repeat=3))
    cost = row["journal"]
    assert cost["gap_pct_by_pair"] == [pytest.approx(2.0)] * 3
    assert (cost["gap_pct"], cost["bar_pct"], cost["verdict"]) == (pytest.approx(2.0), pytest.approx(5.0), "within")
    assert "+2.00 (+2.00 to +2.00)" in shown(overlap.table([row]))
    assert (row["store_p50_s"], row["store_max_s"]) == (0.02, 0.06)
    assert "journal" not in imagined_rows(dataclasses.replace(PLAN, clients=(1,), ratios=(1.0,)))[0]


def test_encryption_costs_what_its_absence_saves() -> None:
    (row,) = imagined_rows(dataclasses.replace(PLAN, clients=(1,), ratios=(1.0,), cost="encryption", repeat=3))
    assert row["encryption"]["gap_pct_by_pair"] == [pytest.approx(4.0)] * 3
    assert row["encryption"]["verdict"] == "within"
    assert "+4.00 (+4.00 to +4.00)" in shown(overlap.table([row]))
    assert "store_p50_s" not in row


def test_unencrypted_runs_stay_on_loopback(capsys: pytest.CaptureFixture[str]) -> None:
    assert overlap.main(["--encryption", "--link", "kernel"]) == 2
    assert "--encryption goes with --link user" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [Timed, Nowhere])
def test_stores_that_stand_in_for_the_brokers_are_made_like_it(kind: type[BlockStore]) -> None:
    assert inspect.signature(kind) == inspect.signature(BlockStore)


def test_there_is_a_row_for_each_number_of_clients_and_regime() -> None:
    rows = imagined_rows(PLAN)
    assert [(row["clients"], row["regime"]) for row in rows] == [
        (1, 0.5), (1, 1.0), (1, 2.0), (2, 0.5), (2, 1.0), (2, 2.0),
    ]  # fmt: skip
    for row in rows:
        assert row["comm_s"] == pytest.approx(row["regime"])
        assert row["rate_bytes_s"] == pytest.approx(8e6 / row["regime"])
        assert row["efficiency"] == pytest.approx(1.0)
        assert row["tokens_s"] == pytest.approx(2 * 4 * 64 / row["parablock_compute_s"])


def test_a_shape_is_written_as_a_model_whose_rows_are_as_long_as_its(tmp_path: Path) -> None:
    made = workload.of_shape(tmp_path, SHAPES["3-layers"], "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(made.model, dtype="auto")
    assert (model.dtype, model.config.num_hidden_layers, made.blocks) == (torch.bfloat16, 3, 3)
    assert made.block_bytes == 4 * sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    asked = workload.settings(made, "parablock", 4, 1, 2, "tcp://127.0.0.1:5557")
    assert (asked.dtype, asked.data.max_tokens) == ("bfloat16", SHAPES["3-layers"].tokens)


def test_a_rate_that_is_given_is_taken_without_calibration() -> None:
    (row,) = imagined_rows(dataclasses.replace(PLAN, clients=(1,), rate=4e6))
    assert (row["rate_bytes_s"], row["comm_s"], row["regime"]) == (4e6, 2.0, None)


def test_a_plan_is_held_against_what_was_measured() -> None:
    rows = imagined_rows(dataclasses.replace(PLAN, ratios=(1.0,), predict=True))
    alone, together = rows
    # Measured are 2.0 and 1.0 s. The only client's plan is a tenth short; of two, the slower one's is right.
    assert (alone["planned_fedbcd_s"], alone["planned_parablock_s"]) == (1.8, 0.9)
    assert alone["plan_error_fedbcd_pct"] == pytest.approx(-10.0)
    assert alone["plan_error_parablock_pct"] == pytest.approx(-10.0)
    assert together["plan_error_fedbcd_pct"] == pytest.approx(0.0, abs=1e-9)
    assert "-10.0 -10.0" in shown(overlap.table(rows))
    assert "plan" not in str(overlap.table(imagined_rows(PLAN)).caption)


def test_the_result_has_the_keys_of_the_contract_and_survives_json() -> None:
    found = json.loads(json.dumps(overlap.result(imagined_rows(PLAN), PLAN, 4_000_000), allow_nan=False))
    contract = {
        "compute_s", "comm_s", "fedbcd_round_s", "parablock_round_s", "efficiency", "bound_ratio",
        "compute_slowdown", "loop_lag_p99_ms", "rows",
    }  # fmt: skip
    assert contract <= found.keys()
    assert contract - {"rows"} <= found["rows"][0].keys()
    assert (found["clients"], found["regime"], len(found["rows"])) == (1, 1.0, 6)
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["torch"]


def test_the_table_and_the_plot_show_every_row(tmp_path: Path) -> None:
    rows = imagined_rows(PLAN)
    told = shown(overlap.table(rows))
    assert told.count(" 64.0 ") == 2  # Mbit/s at M = C
    assert told.count("1.500") == 2  # T of fedbcd at M = C / 2
    assert len(overlap.plot(rows).axes) == 6
    overlap.plot(rows[:1]).savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_kept_is_the_json_and_a_plot_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = imagined_rows(PLAN)
    out = tmp_path / "overlap.json"
    results.check_out(out)
    results.emit(overlap.result(rows, PLAN, 4_000_000), overlap.plot(rows[:1]), out)
    printed = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(printed) == json.loads(out.read_text())
    assert (tmp_path / "overlap.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--clients", "0"], "--clients takes numbers above zero"),
        (["--clients", "1.5"], "--clients takes numbers above zero"),
        (["--regime", "half"], "--regime takes numbers above zero"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--rate", "0mbit"], "above zero"),
        (["--delay=-5ms"], "is not a time"),
        (["--link", "kernel", "--delay", "50ms"], "use --link user"),
        (["--quick", "--clients", "1,2"], "--quick is one row"),
        (["--set", "solver.lrr=1"], "solver.lr"),
        (["--dtype", "bfloat16"], "--dtype is of a --shape"),
        (["--keep", "/dev/null/runs"], "name a new one"),
    ],
)
def test_wrong_input_is_told_before_anything_runs(
    arguments: Sequence[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert overlap.main(["--link", "user", *arguments]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_the_committed_configs_are_valid(path: Path) -> None:
    assert config.load(path).rounds > 0


# Children -----------------------------------------------------------------------------------------------------


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def test_a_child_that_fails_ends_the_wait_with_its_last_words(tmp_path: Path) -> None:
    with Children(tmp_path) as children:
        patient = children.start("broker", python("import time; time.sleep(60)"))
        children.start("worker-0", python("import sys; print('the reason', file=sys.stderr); sys.exit(3)"))
        with pytest.raises(ChildError, match=r"(?s)worker-0 ended: exit code 3.*the reason"):
            children.wait(patient, lambda: 0, patience_s=30.0)
    assert patient.process.returncode == -signal.SIGTERM


def test_a_child_that_ends_well_ends_the_wait(tmp_path: Path) -> None:
    with Children(tmp_path) as children:
        child = children.start("broker", python("import os; print(os.environ['WORD'])"), {"WORD": "here"})
        children.wait(child, lambda: 0, patience_s=30.0)
    assert child.log.read_text() == "here\n"


def test_a_child_that_gets_nowhere_is_not_waited_for(tmp_path: Path) -> None:
    with Children(tmp_path) as children:
        child = children.start("broker", python("import time; time.sleep(60)"))
        with pytest.raises(ChildError, match=r"(?s)nothing moved for 0\.1 s.*broker"):
            children.wait(child, lambda: 0, patience_s=0.1)


def test_progress_is_all_that_patience_asks_for(tmp_path: Path) -> None:
    ticks = iter(range(10**9))
    with Children(tmp_path) as children:
        child = children.start("broker", python("import time; time.sleep(0.5)"))
        children.wait(child, lambda: next(ticks), patience_s=0.15)


_WITH_A_GRANDCHILD = (
    "import signal, subprocess, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid, flush=True); signal.pause()"
)


def test_whole_groups_end_with_the_block_even_if_they_ignore_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.processes._GRACE_S", 0.1)
    with Children(tmp_path) as children:
        child = children.start("stubborn", python(_WITH_A_GRANDCHILD))
        grandchild = int(_wait_for(lambda: child.log.read_text()))
    assert child.process.returncode == -signal.SIGKILL
    _wait_for(lambda: not _alive(grandchild))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's death signal is Linux's")
def test_children_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    program = (
        "import pathlib, time; from bench.processes import Children\n"
        f"with Children(pathlib.Path({str(tmp_path)!r})) as children:\n"
        f"    child = children.start('child', [{sys.executable!r}, '-c', 'import time; time.sleep(60)'])\n"
        "    print(child.process.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen(python(program), stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert _alive(child)
        parent.kill()
    _wait_for(lambda: not _alive(child))


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _wait_for(answer: Any, timeout_s: float = 20.0) -> Any:
    """The first answer that is true. What other processes do cannot be awaited otherwise."""
    deadline = time.monotonic() + timeout_s
    while not (found := answer()):
        assert time.monotonic() < deadline, "it did not happen"
        os.sched_yield()
    return found
