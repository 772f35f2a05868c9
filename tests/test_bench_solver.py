"""bench.solver: what its figures mean, that all ways train the same blocks, and one small run."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from bench import fine_tuning, results, solver
from bench.fine_tuning import METHODS, chosen
from bench.gauges import CudaGauge, gauge_of
from bench.shapes import SHAPES, Shape
from parablock.blocks import read_block
from parablock.staging import Staging
from tests.shown import shown
from tests.test_staging import Copies

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from workers.setup import Setup

CPU = torch.device("cpu")
TINY = Shape(2, 16, 48, heads=4, kv_heads=2, vocabulary=40, tied=True, tokens=8)
PLAN = solver.Plan(
    shape=solver.DEFAULT,
    device="cpu",
    methods=("blocks", "bare"),
    dtype="float32",
    turns=2,
    sweeps=1,
    sample=False,
    num_blocks=0,
    ends="freeze",
    steps=2,
    batch=1,
    tokens=8,
    gradient_checkpointing=False,
    out=None,
)
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def report(seconds: float, peak: int) -> dict[str, Any]:
    return {"step_s": [seconds], "peak_bytes": peak, "numel": 1000, "block_numels": [100, 300, 100]}


def reports() -> dict[str, list[dict[str, Any]]]:
    """The machine is twice as slow in the second turn; the ratios do not see it."""
    return {
        "blocks": [report(0.1, 100_000_000), report(0.2, 100_000_000)],
        "bare": [report(0.1, 80_000_000), report(0.2, 80_000_000)],
        "adamw": [report(0.2, 400_000_000), report(0.4, 400_000_000)],
    }


def found() -> list[dict[str, Any]]:
    return solver.rows(reports(), PLAN)


def test_ratios_are_taken_within_a_turn() -> None:
    ours, bare, adamw = found()
    assert ours["step_ms"] == pytest.approx(150.0)
    assert ours["tokens_s"] == pytest.approx(8 / 0.15)
    assert (ours["step_ratio"], ours["peak_ratio"]) == (1.0, 1.0)
    assert (bare["step_ratio"], bare["peak_ratio"]) == (1.0, 1.25)
    assert (adamw["step_ratio"], adamw["peak_ratio"]) == (0.5, 0.25)
    assert adamw["step_ms_by_turn"] == pytest.approx([200.0, 400.0])


def test_the_result_has_the_keys_of_the_contract_and_survives_json() -> None:
    told = json.loads(json.dumps(solver.result(found(), reports(), PLAN), allow_nan=False))
    assert told["bench"] == "solver"
    assert told["step_ms"].keys() == told["peak_mb"].keys() == {"blocks", "bare", "adamw"}
    assert (told["batch"], told["tokens"], told["layers"]) == ([1, 8], 8, 12)


def test_the_table_says_what_is_within_its_bar_and_the_plot_shows_every_row(tmp_path: Path) -> None:
    rows = found()
    told = shown(solver.table(rows, PLAN))
    assert "1.000 (within 1.02)" in told
    assert "0.250 (within 0.5)" in told
    rows[1]["step_ratio"] = 1.03
    assert "1.030 (above 1.02)" in shown(solver.table(rows, PLAN))
    assert "(within" not in shown(solver.table(rows, dataclasses.replace(PLAN, shape="llama-3-8b")))
    solver.plot(rows).savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("which", ["blocks", "adamw"])
def test_what_does_not_fit_is_a_row_that_says_so(which: str, tmp_path: Path) -> None:
    told = reports() | {which: [report(0.1, 1), {"out_of_memory": "Tried to allocate 2.00 GiB."}]}
    rows = {row["method"]: row for row in solver.rows(told, PLAN)}
    assert not rows[which]["fits"]
    assert rows[which]["step_ms"] is rows[which]["tokens_s"] is rows[which]["step_ratio"] is None
    assert rows[which]["out_of_memory"] == [None, "Tried to allocate 2.00 GiB."]
    assert rows["bare"]["step_ms"] == pytest.approx(150.0)
    assert (rows["bare"]["step_ratio"] is None) == (which == "blocks")
    assert "does not fit" in shown(solver.table(list(rows.values()), PLAN))
    solver.plot(list(rows.values())).savefig(tmp_path / "plot.png")


def test_a_method_that_runs_out_of_the_devices_memory_says_so_and_other_errors_are_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Large:
        def __init__(self, setup: Setup) -> None:
            told = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1.00 GiB"
            raise torch.cuda.OutOfMemoryError(told) if setup.name == "worker-0" else AssertionError

    class Wrong:
        def __init__(self, _setup: Setup) -> None:
            raise RuntimeError("CUDA error: an illegal memory access")

    settings = solver.settings(PLAN)
    monkeypatch.setattr(fine_tuning, "METHODS", {"large": Large, "wrong": Wrong})
    told = fine_tuning.measure("large", settings, TINY, CPU, sample=False)
    assert told == {"out_of_memory": "CUDA out of memory. Tried to allocate 2.00 GiB."}
    with pytest.raises(RuntimeError, match="illegal memory access"):
        fine_tuning.measure("wrong", settings, TINY, CPU, sample=False)


def test_the_formula_is_the_designs_in_bf16() -> None:
    numel, blocks = 1000, 10
    assert solver.formula_bytes("blocks", numel, numel // blocks, "bfloat16") == 2 * numel + 16 * numel // blocks
    assert solver.formula_bytes("adamw", numel, 1, "bfloat16") == 8 * numel
    assert solver.formula_bytes("adamw", numel, 1, "float32") == 16 * numel
    assert solver.formula_bytes("lora", numel, 1, "float32") is None


@pytest.mark.parametrize(
    ("name", "numel"), [("llama-3.2-1b", 1_235_814_400), ("llama-3-8b", 8_030_261_248), ("12-layers", 23_112_192)]
)
def test_a_shape_is_the_models_and_all_of_it_is_on_the_device_in_its_dtype(name: str, numel: int) -> None:
    device = torch.device("meta")
    model = SHAPES[name].model(device, torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == numel
    assert {(value.device, value.dtype) for value in model.parameters()} == {(device, torch.bfloat16)}
    assert {(value.device, value.dtype) for value in model.buffers()} == {(device, torch.float32)}, "rotary angles"


def test_random_weights_are_the_same_for_every_method_and_leave_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    one, other = (TINY.model(CPU, torch.bfloat16, seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert 0.01 < one.get_input_embeddings().weight.float().std() < 0.03


def test_every_block_is_stood_for_once() -> None:
    assert chosen(4, sample=False) == {0: 1, 1: 1, 2: 1, 3: 1}
    assert chosen(4, sample=True) == {0: 1, 1: 1, 2: 1, 3: 1}
    assert chosen(5, sample=True) == {0: 1, 1: 0, 2: 3, 4: 1}
    assert chosen(32, sample=True) == {0: 1, 14: 0, 15: 30, 31: 1}
    assert all(sum(chosen(count, sample=True).values()) == count for count in range(1, 40))


def test_a_sample_gives_the_mean_over_all_blocks() -> None:
    def lap(block: int) -> float:  # even between the ends, which hold embeddings and head
        return 4 * (2.0 - 0.01 * block) + {0: 5.0, 30: 3.0}.get(block, 0.0)

    means = [
        fine_tuning.step_s([lap(block) for block in blocks], blocks, steps=4)
        for blocks in (chosen(31, sample=True), chosen(31, sample=False))
    ]
    assert means[0] == pytest.approx(means[1])


def setup_in(dtype: str, **plan: Any) -> Setup:
    return fine_tuning.setup_of(solver.settings(dataclasses.replace(PLAN, dtype=dtype, **plan)), TINY, CPU)


def train(setup: Setup, name: str) -> None:
    """One sweep over all blocks."""
    fine_tuning.sweep(setup, METHODS[name](setup), 0, range(len(setup.manifest.blocks)), gauge_of(setup.device))


@pytest.fixture
def setup() -> Setup:
    return setup_in("float32")


@pytest.mark.parametrize("rerun", [False, True], ids=["", "checkpointing"])
def test_the_bare_loop_makes_the_same_steps(rerun: bool) -> None:
    """What it is compared with is the same work: a block's values after a sweep are the solver's, to rounding."""
    trained = []
    for name in ("blocks", "bare"):
        again = setup_in("float32", gradient_checkpointing=rerun)
        before = [read_block(again.model, block).clone() for block in again.manifest.blocks]
        train(again, name)
        after = [read_block(again.model, block) for block in again.manifest.blocks]
        assert all(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
        trained.append(after)
    for ours, theirs in zip(*trained, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "dtype"), [("adamw", "float32"), ("adamw", "bfloat16"), ("adamw-masters", "bfloat16")]
)
def test_adamw_moves_every_parameter(name: str, dtype: str) -> None:
    setup = setup_in(dtype)
    before = {name: parameter.detach().clone() for name, parameter in setup.model.named_parameters()}
    train(setup, name)
    still = {key for key, value in setup.model.named_parameters() if torch.equal(value, before[key])}
    # A norm's weights are 1, and in bfloat16 a step of 1e-4 leaves them there.
    assert all("norm" in key for key in still) if dtype == "bfloat16" else not still


def test_a_worker_whose_device_is_not_the_host_sends_each_block_out_and_has_it_land_a_round_later() -> None:
    setup = setup_in("bfloat16", ends="join")
    engine = Copies(late=True)
    setup = dataclasses.replace(setup, staging=Staging(engine))
    before = [read_block(setup.model, block).clone() for block in setup.manifest.blocks]
    train(setup, "blocks")
    after = [read_block(setup.model, block) for block in setup.manifest.blocks]
    assert torch.equal(after[0], before[0]), "what comes back of a block is what it was"
    assert not torch.equal(after[1], before[1]), "it is not back yet"
    # Of each of two rounds: out go the block as it was (once for the solver's copy, once for the exchange), delta and
    # guess, in comes the block before the steps and after them. What lands comes in, and goes out for that copy.
    assert engine.marks == 2 * (4 + 2) + 2


@pytest.mark.parametrize("name", fine_tuning.NEEDS)
def test_a_rival_trains_what_it_should(name: str, setup: Setup) -> None:
    pytest.importorskip(fine_tuning.NEEDS[name], reason="an extra: pip install -e '.[rivals]'")
    before = {name: parameter.detach().clone() for name, parameter in setup.model.named_parameters()}
    train(setup, name)
    after = {key.replace(".base_layer", ""): value for key, value in setup.model.named_parameters()}
    moved = {key for key, value in before.items() if not torch.equal(after[key], value)}
    if name == "lora":  # an adapter leaves the model's own parameters alone
        assert not moved
        second = [value for key, value in after.items() if ".lora_B." in key]
        assert second
        assert all(bool(value.any()) for value in second)  # they began at zero
    else:
        assert {key.split(".")[2] for key in moved if ".layers." in key} == {"0", "1"}
        assert all(".layers." in key for key in moved)


def test_one_small_measurement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    assert solver.main(["--quick", "--methods", "blocks", "--out", str(out)]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == json.loads(out.read_text())
    assert [row["method"] for row in printed["rows"]] == ["blocks"]
    assert all(row["step_ms"] > 0 for row in printed["rows"])
    assert all(row["peak_mb"] > row["formula_mb"] for row in printed["rows"])
    assert out.with_suffix(".png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--methods", "sgd"], "--methods takes blocks, bare"),
        (["--turns", "0"], "--turns must be at least 1"),
        (["--tokens", "1"], "--tokens must be at least 2"),
        (["--num-blocks", "13"], "--num-blocks is at most 12"),
        (["--quick", "--shape", "llama-3-8b"], "--quick is 3-layers"),
        (["--methods", "adamw-masters"], "add --dtype bfloat16"),
        (["--methods", "badam", "--sample"], "leave --sample out"),
    ],
)
def test_wrong_input_is_told_before_anything_runs(
    arguments: Sequence[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert solver.main([*arguments] if "--methods" in arguments else ["--methods", "bare", *arguments]) == 2
    assert complaint in capsys.readouterr().err


def test_without_a_cuda_device_there_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert solver.main(["--device", "cuda", "--methods", "bare"]) == 2
    assert "torch sees no CUDA device here" in capsys.readouterr().err


def test_what_was_not_asked_for_by_name_is_left_out_where_it_cannot_be_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fine_tuning, "NEEDS", {"badam": "no_such_package"})
    assert solver._methods(None, "float32", sample=False) == ("blocks", "bare", "adamw", "lora")
    assert "without badam: no_such_package is not installed" in capsys.readouterr().err
    assert "adamw-masters" in solver._methods(None, "bfloat16", sample=False)


def test_a_package_that_is_missing_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(fine_tuning, "NEEDS", {"lora": "no_such_package"})
    assert solver.main(["--methods", "lora"]) == 2
    assert "no_such_package is not installed: pip install" in capsys.readouterr().err


@NEEDS_CUDA
@pytest.mark.parametrize("name", ["blocks", "bare", "adamw", "adamw-masters"])
def test_on_cuda_a_method_is_timed_and_weighed(name: str) -> None:
    settings = solver.settings(dataclasses.replace(PLAN, dtype="bfloat16", sweeps=2))
    shape = Shape(6, 256, 768, heads=4, kv_heads=2, vocabulary=1000, tied=False, tokens=8)
    told = fine_tuning.measure(name, settings, shape, torch.device("cuda"), sample=True)
    assert len(told["step_s"]) == 2
    assert all(0 < seconds < 10 for laps in told["round_s"] for seconds in laps)
    formula = solver.formula_bytes(name, told["numel"], max(told["block_numels"]), "bfloat16")
    assert formula is not None
    assert formula < told["allocated_bytes"] <= told["peak_bytes"] <= told["reserved_bytes"]
    assert (told["pinned_bytes"] or 0) > 0 or name != "blocks"


@NEEDS_CUDA
def test_on_cuda_laps_add_up_to_the_whole() -> None:
    device = torch.device("cuda")
    gauge = CudaGauge(device)
    gauge.loaded()
    values = torch.ones(1 << 24, device=device).mul_(1.0)
    gauge.begin()
    for repeat in (1, 100, 1):
        for _ in range(repeat):
            values.mul_(1.0)
        gauge.lap()
    short, long, _ = gauge.laps()
    assert long > 5 * short > 0


@NEEDS_CUDA
def test_on_cuda_a_model_that_is_too_large_is_told() -> None:
    rows = torch.cuda.get_device_properties(0).total_memory // (2 * 4096) + 1
    huge = Shape(1, 4096, 64, heads=32, kv_heads=8, vocabulary=rows, tied=True, tokens=8)
    settings = solver.settings(dataclasses.replace(PLAN, dtype="bfloat16"))
    told = fine_tuning.measure("bare", settings, huge, torch.device("cuda"), sample=False)
    assert told["out_of_memory"].startswith("CUDA out of memory. Tried to allocate ")


def test_the_machine_says_which_gpu() -> None:
    assert ("gpu" in results.machine()) == torch.cuda.is_available()
