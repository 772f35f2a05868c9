"""The runs that codecs are compared by: the quickstart's problem with one of them, as real processes, to its end.

A case is a codec for both directions, with error feedback or without. `float32~` is float32 once more, computed with
torch's plain kernels in place of those for this processor: the same arithmetic, rounded otherwise in the last bits.
What it does to a loss is what a run does to any change, however small.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bench import learning_curve

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from bench.learning_curve import LearningCurve
    from parablock.codec import CodecName


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


def train(case: Case, seed: int, overrides: Sequence[str], folder: Path) -> LearningCurve:
    """One run. folder: new. Raises ChildError, and FiguresError where a held-out loss is missing."""
    asked = learning_curve.settings(None, [*overrides, f"seed={seed}", *case.settings])
    return learning_curve.learn(asked, folder, f"{case.name} with seed {seed}", environment=case.environment)
