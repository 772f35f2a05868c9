"""A micro-batch of token rows, as the data loader makes it and the solver and the evaluation take it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""Label of a position that carries no loss (a prompt's, a padded one's)."""


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right to one length. All tensors are int64 of shape (rows, tokens).

    labels: the token at the same position where it counts for the loss, else `IGNORED`; the shift by one between
    logits and labels is the loss's business.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))
