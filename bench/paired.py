"""The paired comparison: how much larger a positive number becomes, from pairs that have all else in common.

    log ratio of each pair,  mean ± t(0.975, pairs − 1) · standard error,  held against a bar

Ratios, because losses of different seeds differ by more than any treatment does. Plain arithmetic; what is compared,
and what the bar is, is the caller's part.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

Verdict = Literal["within", "beyond", "undecided"]

# Student's t at 0.975 for 1, 2, ... 30 degrees of freedom. Beyond them the last one is taken, which errs on the side of
# a wider interval (by 4 % at most: the normal distribution has 1.960).
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Paired:
    """The log ratios of the pairs, at least one. Below zero: smaller than what it is compared with."""

    ratios: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.ratios)

    @property
    def error(self) -> float:
        """The standard error of the mean; infinite with a single pair."""
        return statistics.stdev(self.ratios) / math.sqrt(len(self.ratios)) if len(self.ratios) > 1 else math.inf

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the mean; without ends with a single pair."""
        reach = _t(len(self.ratios) - 1) * self.error
        return self.mean - reach, self.mean + reach

    def verdict(self, bar: float) -> Verdict:
        """Whether the whole interval lies below the bar, a log ratio; above it; or neither."""
        low, high = self.interval
        return "within" if high <= bar else "beyond" if low > bar else "undecided"

    def pairs_needed(self, bar: float) -> int | None:
        """About how many pairs would have an interval that reaches no farther than the bar to either side, if they are
        like these; None where one pair cannot tell."""
        if len(self.ratios) < 2:
            return None
        spread = statistics.stdev(self.ratios)
        return max(2, math.ceil((_T[-1] * spread / bar) ** 2))

    def told(self, bar: float | None = None) -> dict[str, Any]:
        """For a result: everything in per cent, and None for what one pair cannot tell. Verdicts only with a bar."""
        low, high = (None, None) if len(self.ratios) < 2 else map(percent, self.interval)
        gap = {
            "gap_pct": percent(self.mean),
            "error_pct": None if len(self.ratios) < 2 else 100 * self.error,
            "low_pct": low,
            "high_pct": high,
            "gap_pct_by_pair": [percent(ratio) for ratio in self.ratios],
        }
        if bar is None:
            return gap
        return {
            **gap,
            "bar_pct": percent(bar),
            "verdict": self.verdict(bar),
            "pairs_needed": self.pairs_needed(bar),
        }


def log_ratios(values: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Of each pair. All above zero, both of one length."""
    return [math.log(value / other) for value, other in zip(values, reference, strict=True)]


def percent(ratio: float) -> float:
    """A log ratio as what the number has grown by, in per cent."""
    return 100 * math.expm1(ratio)


def text(told: dict[str, Any] | None) -> str:
    """What was told, for people: the gap and its interval in per cent. None: nothing to compare."""
    if told is None:
        return ""
    if told["low_pct"] is None:
        return f"{told['gap_pct']:+.2f}"
    return f"{told['gap_pct']:+.2f} ({told['low_pct']:+.2f} to {told['high_pct']:+.2f})"


def _t(freedom: int) -> float:
    return _T[min(max(freedom, 1), len(_T)) - 1]
