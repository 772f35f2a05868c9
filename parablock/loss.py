"""The loss of a micro-batch: next-token cross entropy on the answer's tokens, summed.

One function, used by the solver and by the evaluation, so that the two cannot differ. It sums and counts;
what to divide by (an optimizer step's tokens, all held-out tokens) is the caller's business. The logits are
the largest tensor of a small model's step, so the head is computed only at positions that some row needs.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from parablock.batch import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from parablock.batch import Batch


def answer_loss(model: PreTrainedModel, batch: Batch) -> tuple[torch.Tensor, int]:
    """Cross entropy in nats, summed over the tokens whose label is not `IGNORED`, and how many they are.

    The loss is a float32 scalar on the model's device. With no such token it is a zero without a graph, and
    the model is not run. A row's first token has nothing before it to be predicted from: it never counts.

    Leave the batch on the host: the positions are chosen where its labels are, and on a CUDA device that
    choice would wait for everything queued there.
    """
    device = next(model.parameters()).device
    targets = batch.labels[:, 1:]  # position p of the logits predicts the token at p + 1
    counted = targets != IGNORED
    tokens = answer_tokens(batch)
    if tokens == 0:
        return torch.zeros((), dtype=torch.float32, device=device), 0
    positions = counted.any(dim=0).nonzero().squeeze(1)
    logits = _logits(model, batch, positions, device).flatten(0, 1)
    chosen = counted[:, positions].flatten().nonzero().squeeze(1)
    if len(chosen) < len(logits):
        logits = logits.index_select(0, chosen.to(device, non_blocking=True))
    # Widened only now: float32 logits at every position of every row would be most of the memory of a step.
    targets = targets[counted].to(device, non_blocking=True)
    return functional.cross_entropy(logits.float(), targets, reduction="sum"), tokens


def answer_tokens(batch: Batch) -> int:
    """How many tokens of the batch carry loss."""
    return int((batch.labels[:, 1:] != IGNORED).sum())


def _logits(model: PreTrainedModel, batch: Batch, positions: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Logits of shape (rows, len(positions), vocabulary), in the model's dtype."""
    inputs = {
        "input_ids": batch.input_ids.to(device, non_blocking=True),
        "attention_mask": batch.attention_mask.to(device, non_blocking=True),
        "use_cache": False,
    }
    positions = positions.to(device, non_blocking=True)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits: torch.Tensor = model(**inputs, logits_to_keep=positions).logits
        return logits
    # A model from outside transformers may not know the argument.
    return model(**inputs).logits.index_select(1, positions)  # type: ignore[no-any-return]
