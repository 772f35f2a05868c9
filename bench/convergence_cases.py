"""The ways to train that are compared by their learning curves: parablock by its corrections, and the baselines.

A case is a few settings; what else a run is made of is the same for all, but for a learning rate that may be its own.
"""

from __future__ import annotations

import contextlib
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench import learning_curve, runs
from bench.network import network

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Mapping, Sequence
    from pathlib import Path

    from bench.learning_curve import LearningCurve
    from bench.network import Kind
    from parablock.config import Config


@dataclass(frozen=True)
class Case:
    """What a run differs in from the others. needs: a package that is not installed with parablock itself."""

    name: str
    settings: tuple[str, ...]
    needs: str | None = None


REFERENCE = "fedbcd"

CASES = {
    case.name: case
    for case in (
        Case(REFERENCE, ("mode=fedbcd",)),
        Case("parablock", ("mode=parablock", "pipeline.correction=shrink")),
        Case("own", ("mode=parablock", "pipeline.correction=own")),
        Case("stale", ("mode=parablock", "pipeline.correction=stale")),
        Case("fedcybgd", ("mode=fedcybgd",)),
        Case("fedavg", ("mode=fedavg",)),
        Case("lisa", ("mode=lisa",)),
        Case("lora", ("mode=lora",), needs="peft"),
        Case("ffa-lora", ("mode=ffa-lora",), needs="peft"),
    )
}
"""By name."""

TAKEN = ("mode", "pipeline.correction", "seed", "round.clients", "network.bind")
"""Settings that are the benchmark's own."""


@dataclass(frozen=True)
class Conditions:
    """What all runs have in common. config: None for the quickstart's. rates, rounds: by case, where it has
    its own learning rate or number of rounds.

    link_rate: of each client's link, in bytes per second each way; None for loopback, whatever the link.
    """

    config: Path | None
    overrides: tuple[str, ...]
    rates: Mapping[str, float]
    rounds: Mapping[str, int]
    clients: int
    link: Kind
    link_rate: float | None

    def settings(self, case: Case, seed: int, bind: str | None = None) -> Config:
        """Of one run. Raises ConfigError."""
        ours = [f"seed={seed}", f"round.clients={self.clients}"]
        if case.name in self.rates:
            ours.append(f"solver.lr={self.rates[case.name]!r}")
        if case.name in self.rounds:
            ours.append(f"rounds={self.rounds[case.name]}")
        if bind is not None:
            ours.append(f"network.bind={bind}")
        return learning_curve.settings(self.config, [*self.overrides, *case.settings, *ours])


def train(case: Case, seed: int, given: Conditions, folder: Path) -> LearningCurve:
    """One run. folder: new. Raises ChildError, LinkError, and FiguresError where a held-out loss is missing."""
    whose = f"{case.name} with seed {seed}"
    if given.link_rate is None:
        return learning_curve.learn(given.settings(case, seed), folder, whose)
    with network(given.link, [given.link_rate] * given.clients) as links:
        return learning_curve.learn(given.settings(case, seed, links.bind), folder, whose, links)


def train_many(
    asked: Sequence[tuple[Case, int]], given: Conditions, jobs: int, folder: Path
) -> Generator[tuple[Case, int, LearningCurve], None, None]:
    """Runs over loopback, up to `jobs` at a time; each as it ends. asked: cases and seeds. folder: exists.

    Raises what `train` does.
    """
    assert given.link_rate is None, "links belong to one run"
    runs_asked = [(given.settings(case, seed), folder / f"{case.name}-{seed}") for case, seed in asked]
    with contextlib.closing(runs.launch_many(runs_asked, jobs)) as ended:
        for place, finished in ended:
            case, seed = asked[place]
            with finished:
                yield case, seed, learning_curve.read(finished.read_metrics(), f"{case.name} with seed {seed}")


def missing(cases: Iterable[Case]) -> dict[str, Sequence[str]]:
    """Packages that are not installed, with the names of the cases that need them."""
    found: dict[str, list[str]] = {}
    for case in cases:
        if case.needs is not None and importlib.util.find_spec(case.needs) is None:
            found.setdefault(case.needs, []).append(case.name)
    return dict(found)
