"""What a step costs, in time and memory, by ways to fine-tune: the block solver against what users would pick instead.

    python -m bench.solver --quick --methods blocks,bare,adamw
    pip install -c constraints.txt -e '.[rivals]' && python -m bench.solver --out solver.json
    python -m bench.solver --device cuda --shape llama-3-8b --sample --out solver_8b.json

A model with random weights is trained with the same batches, loss and K by each of the ways in `bench.fine_tuning`:
the block solver, a bare loop over the same blocks, AdamW on every parameter (as stored, and on float32 masters), LoRA
(peft), and BAdam. Each in a process of its own with one thread; the ways take turns, so that a machine that changes its
pace favours none. By default the model is one of twelve equal layers, a block each, for the CPU.

Step times are whole sweeps over their steps, and compared within a turn; with --sample a sweep is the first, the middle
and the last block, of which the middle one counts for all between. Memory is the peak of training with the model in it:
on the CPU resident memory above what the process had before it loaded the model, on CUDA what torch's allocator has
given out (its context and what the allocator keeps unused are not in it; the latter is in reserved_mb).
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from matplotlib.figure import Figure
from rich.console import Console

from bench import command, fine_tuning, results
from bench.processes import Children, size
from bench.runs import ENVIRONMENT
from bench.shapes import SHAPES
from parablock import config

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from rich.table import Table

DEFAULT, QUICK = "12-layers", "3-layers"

BARS: dict[tuple[str, str], float] = {
    ("step_ratio", "bare"): 1.02,
    ("step_ratio", "badam"): 1.0,
    ("peak_ratio", "badam"): 1.0,
    ("peak_ratio", "adamw"): 0.5,
}
"""What the block solver may need at most of what another way needs, with the default shape (issue 4)."""

_PATIENCE_S = 120.0

_console = Console(stderr=True, width=None if sys.stderr.isatty() else 140)


@dataclass(frozen=True)
class Plan:
    """What the command line asked for. turns: processes of each method, `sweeps` timed sweeps in each, of which
    the median counts.

    num_blocks: of groups of layers, 0 for a layer a block. ends: what embeddings and head are (the final norm is with
    the last layer, or frozen as they are). steps: K. batch: rows of `tokens` tokens.
    """

    shape: str
    device: Literal["cpu", "cuda"]
    methods: tuple[str, ...]
    dtype: Literal["float32", "bfloat16"]
    turns: int
    sweeps: int
    sample: bool
    num_blocks: int
    ends: Literal["join", "own", "freeze"]
    steps: int
    batch: int
    tokens: int
    gradient_checkpointing: bool
    out: Path | None

    @property
    def conditions(self) -> dict[str, Any]:
        """What all methods have in common, for the result."""
        told = dataclasses.asdict(self)
        del told["methods"], told["out"]
        return {**dataclasses.asdict(SHAPES[self.shape]), **told, "batch": [self.batch, self.tokens]}


def measure(plan: Plan, folder: Path) -> None:
    """All rows, printed and kept."""
    asked = folder / "config.toml"
    asked.write_text(config.to_toml(settings(plan)), encoding="utf-8")
    reports: dict[str, list[dict[str, Any]]] = {name: [] for name in plan.methods}
    for turn in range(plan.turns):
        first = turn % len(plan.methods)
        for name in (*plan.methods[first:], *plan.methods[:first]):
            _console.print(f"turn {turn + 1} of {plan.turns}: {name}")
            reports[name].append(found := _run(name, plan, asked, folder))
            _console.print(f"  {_told(found)}")
    measured = rows(reports, plan)
    _console.print(table(measured, plan))
    results.emit(result(measured, reports, plan), plot(measured), plan.out)


def settings(plan: Plan) -> config.Config:
    return config.from_dict(
        {
            "rounds": plan.sweeps,
            "dtype": plan.dtype,
            "blocks": {
                "num_blocks": plan.num_blocks,
                "embeddings": plan.ends,
                "final_norm": "freeze" if plan.ends == "freeze" else "join",
                "head": plan.ends,
            },
            "solver": {
                "steps": plan.steps,
                "batch_size": plan.batch,
                "gradient_checkpointing": plan.gradient_checkpointing,
            },
            "data": {"max_tokens": plan.tokens},
        }
    )


def _run(name: str, plan: Plan, asked: Path, folder: Path) -> dict[str, Any]:
    """What one process measured. Raises ChildError."""
    report = folder / "report.json"
    options = [name, str(asked), "--shape", plan.shape, "--device", plan.device, "--report", str(report)]
    if plan.sample:
        options.append("--sample")
    with Children(folder) as children:
        child = children.start(name, [sys.executable, "-m", "bench.fine_tuning", *options], ENVIRONMENT)
        children.wait(child, lambda: size(child.log), _PATIENCE_S)
    measured: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    report.unlink()
    return measured


def _told(report: Mapping[str, Any]) -> str:
    if "out_of_memory" in report:
        return f"does not fit: {report['out_of_memory']}"
    return f"{1e3 * statistics.median(report['step_s']):.1f} ms a step, peak {report['peak_bytes'] / 1e6:.0f} MB"


def rows(reports: Mapping[str, Sequence[Mapping[str, Any]]], plan: Plan) -> list[dict[str, Any]]:
    """A row for each method: medians over turns. reports: by method and turn.

    The ratios are the block solver's step time and peak over the method's: medians of each turn's ratio. All is None
    where the method does not fit into the device's memory, but the formula's megabytes (see `formula_bytes`).
    """
    fits = {name: not any("out_of_memory" in each for each in own) for name, own in reports.items()}
    step_s = {name: [statistics.median(each["step_s"]) for each in own] for name, own in reports.items() if fits[name]}
    peaks = {name: [each["peak_bytes"] for each in own] for name, own in reports.items() if fits[name]}
    sizes = next((own[0] for name, own in reports.items() if fits[name]), None)

    def row(name: str) -> dict[str, Any]:
        formula = None if sizes is None else formula_bytes(name, sizes["numel"], max(sizes["block_numels"]), plan.dtype)
        told: dict[str, Any] = {
            "method": name,
            "fits": fits[name],
            **dict.fromkeys(("step_ms", "tokens_s", "peak_mb", "allocated_mb", "reserved_mb", "pinned_mb")),
            "formula_mb": None if formula is None else formula / 1e6,
            **dict.fromkeys(("step_ratio", "peak_ratio")),
        }
        if not fits[name]:
            return {**told, "out_of_memory": [each.get("out_of_memory") for each in reports[name]]}
        middle_s = statistics.median(step_s[name])
        told |= {
            "step_ms": 1e3 * middle_s,
            "tokens_s": plan.batch * plan.tokens / middle_s,
            **{f"{kind}_mb": _megabytes(reports[name], kind) for kind in ("peak", "allocated", "reserved", "pinned")},
            "step_ms_by_turn": [1e3 * each for each in step_s[name]],
            "peak_mb_by_turn": [each / 1e6 for each in peaks[name]],
        }
        if fits["blocks"]:
            told["step_ratio"] = _ratio(step_s["blocks"], step_s[name])
            told["peak_ratio"] = _ratio(peaks["blocks"], peaks[name])
        return told

    return [row(name) for name in reports]


def _megabytes(reports: Sequence[Mapping[str, Any]], kind: str) -> float | None:
    found = [each.get(f"{kind}_bytes") for each in reports]
    return None if None in found else statistics.median(each for each in found if each is not None) / 1e6


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.median(our / their for our, their in zip(ours, theirs, strict=True))


def formula_bytes(method: str, numel: int, block: int, dtype: str) -> int | None:
    """What parameters, gradients and optimizer state need, without activations; None where it was not written down.

    numel: parameters of the model. block: of its largest block. The block solver's is design §2, in bf16 2M + 16M/D for
    D equal blocks of M parameters: with float32 masters, gradients and two moments beside the model.
    """
    stored = {"float32": 4, "bfloat16": 2}[dtype]
    masters = 16 if stored < 4 else 12
    return {
        "blocks": stored * numel + masters * block,
        "badam": stored * numel + masters * block,
        "bare": stored * numel + 3 * stored * block,
        "adamw": 4 * stored * numel,
        "adamw-masters": stored * numel + masters * numel,
    }.get(method)


def result(
    rows: list[dict[str, Any]], reports: Mapping[str, Sequence[Mapping[str, Any]]], plan: Plan
) -> dict[str, Any]:
    """The JSON object of design §6: step_ms and peak_mb by method, all rows, what processes told, the conditions."""
    return {
        "bench": "solver",
        "step_ms": {row["method"]: row["step_ms"] for row in rows},
        "peak_mb": {row["method"]: row["peak_mb"] for row in rows},
        "tokens_s": {row["method"]: row["tokens_s"] for row in rows},
        "rows": rows,
        "reports": {name: list(own) for name, own in reports.items()},
        **plan.conditions,
        "machine": results.machine(),
    }


def table(rows: Sequence[dict[str, Any]], plan: Plan) -> Table:
    barred = plan.shape == DEFAULT and plan.device == "cpu"
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "method": lambda row: row["method"],
        " step ms": lambda row: f"{row['step_ms']:.1f}" if row["fits"] else "does not fit",
        " blocks / it": lambda row: _held(row, "step_ratio", barred),
        " tokens/s": lambda row: _number(row["tokens_s"]),
        " peak MB": lambda row: _number(row["peak_mb"]),
        "  blocks / it": lambda row: _held(row, "peak_ratio", barred),
        " by formula": lambda row: _number(row["formula_mb"]),
    }
    if plan.device == "cuda":
        columns[" reserved"] = lambda row: _number(row["reserved_mb"])
        columns[" pinned"] = lambda row: _number(row["pinned_mb"])
    blocks = {
        "join": "a block a layer, embeddings and head with the first and the last",
        "own": "a block a layer, embeddings and head blocks of their own",
        "freeze": "a block a layer, embeddings and head frozen but for AdamW",
    }[plan.ends]
    if plan.num_blocks:
        blocks = blocks.replace("a block a layer", f"{plan.num_blocks} blocks")
    caption = (
        f"{plan.shape} in {plan.dtype} on {plan.device}; {plan.batch} x {plan.tokens} tokens a step, K = {plan.steps}; "
        f"{blocks}; {'gradient checkpointing; ' if plan.gradient_checkpointing else ''}"
        f"{'first, middle and last block, the middle one for all between; ' if plan.sample else ''}"
        f"blocks / it: the block solver's over the method's{', with the bar where there is one' if barred else ''}; "
        "medians over turns, ratios within a turn; MB = 1e6 bytes; by formula: without activations, in bf16 "
        "2M + 16 x (the largest block) for the block solver"
    )
    return results.table(columns, rows, caption)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _held(row: Mapping[str, Any], key: str, barred: bool) -> str:
    if row[key] is None:
        return "–"
    bar = BARS.get((key, row["method"])) if barred else None
    return f"{row[key]:.3f}" + (f" ({'within' if row[key] <= bar else 'above'} {bar:g})" if bar is not None else "")


def plot(rows: Sequence[dict[str, Any]]) -> Figure:
    """A bar for each method that fits: step time, and peak memory."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    drawn = [row for row in rows if row["fits"]]
    names = [row["method"] for row in drawn]
    colors = ["tab:blue" if name == "blocks" else "tab:gray" for name in names]
    for axes, key, quantity in zip(
        figure.subplots(1, 2), ("step_ms", "peak_mb"), ("step (ms)", "peak memory (MB)"), strict=True
    ):
        bars = axes.bar(names, [row[key] for row in drawn], color=colors)
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
        axes.set_ylabel(quantity)
        axes.tick_params(axis="x", labelsize=8)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; exit codes as in `bench.command`."""
    return command.run("solver", _parser().parse_args(argv), _plan, measure)


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("solver", __doc__, quick=f"one turn of {QUICK}, two steps a block")
    add = parser.add_argument
    add("--shape", choices=SHAPES, help=f"of the model (default: {DEFAULT})")
    add("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")
    told = ", ".join(fine_tuning.METHODS)
    add("--methods", help=f"of {told} (default: all that can be run); blocks is always run")
    add("--dtype", choices=("float32", "bfloat16"), help="of the model (default: float32; of a llama bfloat16)")
    add("--turns", type=int, help="processes of each method (default: 5; of a llama, and quick: 1)")
    add("--sweeps", type=int, help="timed sweeps over the blocks in each process (default: 1; of a llama 3)")
    add("--sample", action="store_true", help="a sweep is the first, the middle and the last block, not all")
    add("--num-blocks", type=int, default=0, help="equal groups of layers (default: a layer a block)")
    ends = "embeddings and head: with the first and last block, blocks of their own, or frozen"
    add("--ends", choices=("join", "own", "freeze"), help=f"{ends} (default: freeze; of a llama join)")
    add("--steps", type=int, help="optimizer steps a block and round, K (default: 4; quick: 2)")
    add("--batch", type=int, default=1, help="rows a step (default: 1)")
    add("--tokens", type=int, help="of a row (default: 64; of a llama 512)")
    add("--gradient-checkpointing", action="store_true", help="of all methods")
    return parser


def _plan(options: argparse.Namespace, _where: Path | None) -> Plan:
    """Raises ValueError, with what to do, for what cannot be run."""
    quick = options.quick
    if quick and options.shape not in (None, QUICK):
        raise ValueError(f"--quick is {QUICK} within 60 s; leave it out for --shape {options.shape}")
    shape = options.shape or (QUICK if quick else DEFAULT)
    small = shape in (DEFAULT, QUICK)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here; leave it out for the CPU")
    layers = SHAPES[shape].layers
    if options.num_blocks > layers:
        raise ValueError(f"--num-blocks is at most {layers}, the layers of {shape}, got {options.num_blocks}")
    dtype = options.dtype or SHAPES[shape].dtype

    def given(name: str, default: int, least: int = 1) -> int:
        value = getattr(options, name)
        value = default if value is None else value
        if value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
        return int(value)

    return Plan(
        shape=shape,
        device=options.device,
        methods=_methods(options.methods, dtype, options.sample),
        dtype=dtype,
        turns=given("turns", 5 if small and not quick else 1),
        sweeps=given("sweeps", 1 if small else 3),
        sample=options.sample,
        num_blocks=given("num_blocks", 0, 0),
        ends=options.ends or ("freeze" if small else "join"),
        steps=given("steps", 2 if quick else 4),
        batch=given("batch", 1),
        tokens=given("tokens", SHAPES[shape].tokens, 2),
        gradient_checkpointing=options.gradient_checkpointing,
        out=options.out,
    )


def _methods(asked: str | None, dtype: str, sample: bool) -> tuple[str, ...]:
    """Those asked for, the block solver first; without any, those that can be run. Raises ValueError."""
    names = list(fine_tuning.METHODS) if asked is None else asked.split(",")
    unknown = [name for name in names if name not in fine_tuning.METHODS]
    if unknown:
        raise ValueError(f"--methods takes {', '.join(fine_tuning.METHODS)}, separated by commas; got {unknown[0]!r}")
    names = list(dict.fromkeys(["blocks", *names]))
    for name in list(names):
        if reason := _hindrance(name, dtype, sample):
            if asked is not None:
                raise ValueError(f"--methods {name}: {reason}, or leave it out")
            _console.print(f"without {name}: {reason}")
            names.remove(name)
    return tuple(names)


def _hindrance(name: str, dtype: str, sample: bool) -> str:
    """Why a method cannot be run, and what would help; "" where it can."""
    if name == "adamw-masters" and dtype == "float32":
        return "a float32 model has no need of masters: it is adamw then; add --dtype bfloat16"
    if name == "badam" and sample:
        return "BAdam takes its blocks in turn, and cannot be told which: leave --sample out"
    if missing := fine_tuning.missing([name]):
        return f"{missing[0]} is not installed: pip install -c constraints.txt -e '.[rivals]'"
    return ""


if __name__ == "__main__":
    sys.exit(main())
