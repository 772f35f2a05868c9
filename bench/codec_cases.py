"""The runs that codecs are compared by: the quickstart's problem with one of them, as real processes, to its end.

A case is a codec for both directions, with error feedback or without. `float32~` is float32 once more, computed with
torch's plain kernels in place of those for this processor: the same arithmetic, rounded otherwise in the last bits.
What it does to a loss is what a run does to any change, however small.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING

from bench.figures import FiguresError
from bench.processes import Children, size
from parablock import config
from parablock.run_folder import METRICS, RunFolder

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from parablock.codec import CodecName

EVALUATE_EVERY = 4
"""Rounds between two held-out losses."""

_PATIENCE_S = 120.0


@dataclass(frozen=True)
class Case:
    """What a run differs in from the others. bar_pct: how much larger a loss than float32's is taken for as good.

    environment: of its processes.
    """

    name: str
    codec: CodecName
    bar_pct: float
    feedback: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def settings(self) -> list[str]:
        """As --set has them."""
        feedback = str(self.feedback).lower()
        return [f"codec.up={self.codec}", f"codec.down={self.codec}", f"codec.error_feedback={feedback}"]


REFERENCE = "float32"
NULL = "float32~"

CASES = {
    case.name: case
    for case in (
        Case(REFERENCE, "float32", 0.3),
        Case(NULL, "float32", 0.3, environment={"ATEN_CPU_CAPABILITY": "default"}),
        Case("bfloat16", "bfloat16", 0.3),
        Case("int8", "int8", 0.3),
        Case("int4", "int4", 1.0),
        Case("int4-", "int4", 1.0, feedback=False),
    )
}
"""By name. A minus: without error feedback."""


@dataclass(frozen=True)
class Trained:
    """One run. held_out: by rounds done, the loss in nats per token, without the one before training.

    nbytes: up and down, all clients.
    """

    held_out: dict[int, float]
    nbytes: int

    @property
    def final_loss(self) -> float:
        return self.held_out[max(self.held_out)]


def settings(overrides: Sequence[str]) -> config.Config:
    """The quickstart's, without what only its table needs. Raises ConfigError."""
    with resources.as_file(resources.files("parablock") / "quickstart.toml") as path:
        return config.load(path, ["eval.generate=0", f"eval.every={EVALUATE_EVERY}", *overrides])


def train(case: Case, seed: int, overrides: Sequence[str], folder: Path) -> Trained:
    """One run. folder: new. Raises ChildError, and FiguresError where a held-out loss is missing."""
    folder.mkdir()
    asked = settings([*overrides, f"seed={seed}", *case.settings])
    (folder / "config.toml").write_text(config.to_toml(asked), encoding="utf-8")
    run = folder / "run"

    with Children(folder) as children:
        command = [sys.executable, "-m", "parablock.cli", "run", str(folder / "config.toml"), "--out", str(run)]
        started = children.start("run", command, case.environment)
        children.wait(started, lambda: size(run / METRICS), _PATIENCE_S)
    with RunFolder.open(run) as finished:
        rows = finished.read_metrics()
    evaluations = [row for row in rows if row["kind"] == "evaluation" and row["round"] >= 0]
    held_out = {row["round"] + 1: row["eval_loss"] for row in evaluations}
    if not held_out or any(loss is None for loss in held_out.values()):
        raise FiguresError(
            f"{case.name} with seed {seed} has no held-out loss after some of its rounds and cannot be compared: did "
            "it diverge? Lower solver.lr, and leave data.eval as it is"
        )
    nbytes = sum(row["bytes_up"] + row["bytes_down"] for row in rows if row["kind"] == "round")
    return Trained(held_out, nbytes)
