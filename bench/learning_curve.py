"""A run's learning curve: held-out loss by rounds, time and bytes; the runs that have one, and how it is read.

Which runs are made, and what their curves are compared by, is the caller's part.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from importlib import resources
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from bench import runs
from bench.figures import FiguresError
from parablock import config

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from bench.network import Network

EVALUATE_EVERY = 4
"""Rounds between two held-out losses, unless the settings say otherwise."""


@dataclass(frozen=True)
class Point:
    """One held-out evaluation. loss: in nats per token. time_s: from the one before training until the round's end.

    nbytes: payload until then, up and down, all clients.
    """

    rounds: int
    loss: float
    time_s: float
    nbytes: int


@dataclass(frozen=True)
class LearningCurve:
    """The evaluations of one run: the first before training, the last after it, at least one between or after."""

    points: tuple[Point, ...]
    compute_s: float | None = None
    """C: the slowest client's compute, mean over rounds. None, as the next: no client has told."""
    comm_s: float | None = None
    """M: from the last delta ready to the block landed everywhere, mean over rounds."""

    @property
    def held_out(self) -> dict[int, float]:
        """Loss by rounds done, without the one before training."""
        return {point.rounds: point.loss for point in self.points[1:]}

    @property
    def final_loss(self) -> float:
        return self.points[-1].loss

    @property
    def time_s(self) -> float:
        return self.points[-1].time_s

    @property
    def nbytes(self) -> int:
        return self.points[-1].nbytes

    def time_to(self, loss: float) -> float | None:
        """Seconds until the held-out loss was first as low as this, on a straight line between two evaluations.

        None: it never was.
        """
        if self.points[0].loss <= loss:
            return 0.0
        for before, after in pairwise(self.points):
            if after.loss <= loss:
                share = (before.loss - loss) / (before.loss - after.loss)
                return before.time_s + share * (after.time_s - before.time_s)
        return None


def settings(path: Path | None, overrides: Sequence[str]) -> config.Config:
    """Of a run that is evaluated on its way. path: None for the quickstart's. Raises ConfigError.

    Answers are not generated: they take time, and are in no curve.
    """
    ours = ["eval.generate=0", f"eval.every={EVALUATE_EVERY}", *overrides]
    if path is not None:
        return config.load(path, ours)
    with resources.as_file(resources.files("parablock") / "quickstart.toml") as quickstart:
        return config.load(quickstart, ours)


def learn(
    asked: config.Config,
    folder: Path,
    whose: str,
    links: Network | None = None,
    environment: Mapping[str, str] | None = None,
) -> LearningCurve:
    """Make a run and read its curve. folder: new. whose: names the run in messages. links: None for loopback.

    environment: of a run over loopback. Raises ChildError, and FiguresError where a loss is missing.
    """
    if links is None:
        finished = runs.launch(asked, folder, environment)
    else:
        assert environment is None, "only a run over loopback takes one"
        finished = runs.run(asked, links, folder)
    with finished:
        return read(finished.read_metrics(), whose)


def read(rows: Sequence[Mapping[str, Any]], whose: str) -> LearningCurve:
    """The curve in the rows of metrics.jsonl. whose: names the run in messages. Raises FiguresError."""
    rounds = [row for row in rows if row["kind"] == "round"]
    evaluations = sorted((row for row in rows if row["kind"] == "evaluation"), key=lambda row: row["round"])
    if len(evaluations) < 2 or any(row["eval_loss"] is None for row in evaluations):
        raise FiguresError(
            f"{whose} has no held-out loss after some of its rounds and cannot be compared: did it diverge? Lower its "
            "learning rate, and leave data.eval as it is"
        )
    began = evaluations[0]["time_s"]

    def point(row: Mapping[str, Any]) -> Point:
        done = [each for each in rounds if each["round"] <= row["round"]]
        ended = max((each["time_s"] for each in done), default=began)
        nbytes = sum(each["bytes_up"] + each["bytes_down"] for each in done)
        return Point(row["round"] + 1, row["eval_loss"], ended - began, nbytes)

    def mean(key: str) -> float | None:
        told = [row[key] for row in rounds if row.get(key) is not None]
        return statistics.fmean(told) if told else None

    return LearningCurve(tuple(point(row) for row in evaluations), mean("compute_s"), mean("comm_s"))
