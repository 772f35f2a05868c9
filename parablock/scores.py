"""Held-out scores as sums over rows, so that those of several tasks, files or clients can be added."""

from __future__ import annotations

import math
import operator
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True)
class Scores:
    """loss_sum: nats over `tokens` predicted tokens. correct: of `answered` generated answers. rouge_sum: of ROUGE-L
    over the `free_form` ones of them, whose reference is no `#### N`. rows: whose loss this is; there may be fewer of
    them than answers.
    """

    loss_sum: float = 0.0
    tokens: int = 0
    correct: int = 0
    answered: int = 0
    rouge_sum: float = 0.0
    free_form: int = 0
    rows: int = 0

    def __add__(self, other: Scores) -> Scores:
        return Scores(*map(operator.add, astuple(self), astuple(other)))

    @property
    def loss(self) -> float:
        """Nats per token; NaN where there was none."""
        return self.loss_sum / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite where that is beyond a float."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    @property
    def exact_match(self) -> float | None:
        """Share of right answers, 0 to 1; None where nothing was answered."""
        return self.correct / self.answered if self.answered else None

    @property
    def rouge_l(self) -> float | None:
        """Mean over the free-form answers, 0 to 1; None where there was none."""
        return self.rouge_sum / self.free_form if self.free_form else None


def total(scores: Iterable[Scores]) -> Scores:
    return sum(scores, Scores())
