"""The answer loss against one written out over full logits, and the cases with nothing to sum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from parablock.batch import IGNORED, Batch
from parablock.loss import answer_loss, answer_tokens
from tests import families


def by_hand(model: Any, batch: Batch) -> tuple[float, int]:
    """Row by row without its padding, position by position, in float64."""
    total, count = 0.0, 0
    for ids, mask, labels in zip(batch.input_ids, batch.attention_mask, batch.labels, strict=True):
        length = int(mask.sum())
        with torch.no_grad():
            logits = model(input_ids=ids[None, :length]).logits[0].double()
        for position in range(1, length):
            if labels[position] != IGNORED:
                total -= functional.log_softmax(logits[position - 1], dim=0)[labels[position]].item()
                count += 1
    return total, count


@pytest.mark.parametrize("family", families.CONFIGS)
def test_equals_the_sum_by_hand_for_every_family(family: str) -> None:
    model = families.build(family).eval()
    batch = families.batch(seed=1)
    loss, tokens = answer_loss(model, batch)
    expected, count = by_hand(model, batch)
    assert tokens == count == answer_tokens(batch)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_padding_changes_nothing() -> None:
    model = families.build("llama").eval()
    batch = families.batch(seed=2)

    def wider(tensor: torch.Tensor, value: int) -> torch.Tensor:
        return functional.pad(tensor, (0, 5), value=value)

    padded = Batch(wider(batch.input_ids, 7), wider(batch.attention_mask, 0), wider(batch.labels, IGNORED))
    loss, tokens = answer_loss(model, batch)
    with_padding, same = answer_loss(model, padded)
    assert tokens == same
    assert with_padding.item() == pytest.approx(loss.item(), rel=1e-6)


def test_without_answer_tokens_it_is_zero_and_the_model_does_not_run() -> None:
    model = families.build("llama")
    batch = families.batch(seed=3)
    # Only the first token of each row is labelled: nothing predicts it.
    labels = torch.full_like(batch.labels, IGNORED)
    labels[:, 0] = batch.input_ids[:, 0]

    def fail(*_: object) -> None:
        raise AssertionError("the model ran")

    model.register_forward_pre_hook(fail)
    loss, tokens = answer_loss(model, Batch(batch.input_ids, batch.attention_mask, labels))
    assert (loss.item(), tokens) == (0.0, 0)


def test_gradients_equal_those_of_the_full_logits() -> None:
    model = families.build("gemma2").eval()  # its logits are capped, after the head
    batch = families.batch(seed=4)
    answer_loss(model, batch)[0].backward()
    chosen = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1].flatten(0, 1)
    functional.cross_entropy(logits, batch.labels[:, 1:].flatten(), reduction="sum").backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(chosen[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_the_head_runs_only_where_a_row_needs_it() -> None:
    model = families.build("llama").eval()
    batch = families.batch(seed=5, rows=2, tokens=12)
    labels = torch.full_like(batch.labels, IGNORED)
    labels[0, 4], labels[1, 4], labels[1, 9] = 5, 6, 7
    shapes: list[torch.Size] = []
    model.get_output_embeddings().register_forward_hook(lambda _m, _i, output: shapes.append(output.shape))
    _, tokens = answer_loss(model, Batch(batch.input_ids, torch.ones_like(batch.input_ids), labels))
    assert tokens == 3
    assert shapes == [(2, 2, families.VOCABULARY)]


def test_low_precision_is_widened_before_the_softmax() -> None:
    model = families.build("llama", torch.bfloat16).eval()
    loss, _ = answer_loss(model, families.batch(seed=6))
    assert loss.dtype == torch.float32


def test_a_model_that_cannot_select_positions_gives_the_same_loss() -> None:
    class Foreign(nn.Module):
        """As a model from outside transformers: it always computes all logits."""

        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, input_ids: Any, attention_mask: Any, use_cache: bool) -> Any:
            return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    model = families.build("llama").eval()
    batch = families.batch(seed=7)
    expected, tokens = answer_loss(model, batch)
    loss, same = answer_loss(Foreign(model), batch)
    assert tokens == same
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
