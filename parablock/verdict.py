"""The verdict on an attempt's contributions: which of them count, and how much of each.

Given where all of every contribution must be seen before any of it can be folded: its norm, its distance from the
others. Who gives it is `parablock.measurement`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Verdict:
    """By `Contribution.client`. factors: of those that count, at least one, what the delta is multiplied by: 1, or less
    where it is clipped. left_out: of the others, why they do not count."""

    factors: Mapping[str, float]
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def clipped(self) -> tuple[str, ...]:
        """Those that count with less than their whole length."""
        return tuple(name for name, factor in self.factors.items() if factor < 1.0)
