"""Held-out scores of a model: the loss of the answers, and exact match of answers that it generates itself.

An answer of the GSM8K kind ends in `#### N`; it is right where its number is the reference's. Which rows are held
out is `workers.rows`' business. The model is left in the mode in which it came.
"""

from __future__ import annotations

import contextlib
import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig

from parablock.loss import answer_loss
from workers.batches import collate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from parablock import config
    from workers.rows import Row, Rows

_NUMBER = re.compile(r"-?(\d+\.?\d*|\.\d+)")


@dataclass(frozen=True)
class Scores:
    """Sums over held-out rows, so that those of several clients can be added.

    loss_sum: nats over `tokens` predicted tokens. correct: of `answered` generated answers.
    """

    loss_sum: float
    tokens: int
    correct: int
    answered: int

    def __add__(self, other: Scores) -> Scores:
        return Scores(
            self.loss_sum + other.loss_sum,
            self.tokens + other.tokens,
            self.correct + other.correct,
            self.answered + other.answered,
        )

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


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    settings: config.Evaluation,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """The model's scores over the rows that are among the first `settings.rows` of their source.

    Those among the first `settings.generate` that have a `#### N` reference are answered, greedily. model: on
    `device`. progress: called before the first and after each batch with the rows done and the rows to do; an
    exception that it raises ends the evaluation.
    """
    scored = [row for row in rows if settings.rows == 0 or row.place < settings.rows]
    asked = [row for row in rows if row.place < settings.generate and number(row.answer) is not None]
    total = len(scored) + len(asked)
    done, scores = 0, Scores(0.0, 0, 0, 0)
    with _evaluating(model), torch.no_grad():
        if progress is not None:
            progress(0, total)
        for batch in _by_length(scored, settings.batch_size):
            loss, tokens = answer_loss(model, collate(batch, rows.pad_id))
            scores += Scores(loss.item(), tokens, 0, 0)
            done += len(batch)
            if progress is not None:
                progress(done, total)
        for batch in _by_length(asked, settings.batch_size):
            answers = _generate(model, tokenizer, batch, rows.pad_id, settings.max_new_tokens, device)
            right = sum(number(answer) == number(row.answer) for answer, row in zip(answers, batch, strict=True))
            scores += Scores(0.0, 0, right, len(batch))
            done += len(batch)
            if progress is not None:
                progress(done, total)
    return scores


def number(text: str) -> Decimal | None:
    """The number after the last `####`: 1,000, $1000, 1000.0 and 1000. are all the same. None without one."""
    _, mark, answer = text.rpartition("####")
    match = _NUMBER.match(answer.strip().replace(",", "").replace("$", "")) if mark else None
    return Decimal(match[0]) if match else None


def _by_length(rows: Sequence[Row], size: int) -> Iterator[list[Row]]:
    """Batches of rows of similar lengths, the longest first: what does not fit into memory fails at once."""
    ordered = sorted(rows, key=lambda row: len(row.tokens), reverse=True)
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    pad_id: int,
    max_new_tokens: int,
    device: torch.device,
) -> list[str]:
    """The model's greedy answers to the rows' prompts, in order."""
    length = max(row.prompt for row in rows)
    input_ids = torch.full((len(rows), length), pad_id)
    attention_mask = torch.zeros((len(rows), length), dtype=torch.int64)
    for place, row in enumerate(rows):  # on the left, so that every answer begins in the same column
        input_ids[place, length - row.prompt :] = torch.from_numpy(row.tokens[: row.prompt])
        attention_mask[place, length - row.prompt :] = 1
    ends = _end_tokens(model, tokenizer)
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        # Set, though they are the defaults: what is not set is taken from the model's own generation config.
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=ends,
        pad_token_id=pad_id,
    )
    output = model.generate(
        input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), generation_config=greedy
    )
    answers = []
    for tokens in output[:, length:].tolist():
        end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
        answers.append(tokenizer.decode(tokens[:end], skip_special_tokens=True))
    return answers


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What ends an answer: the tokenizer's end token, and those that the model was published with."""
    published = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = {tokenizer.eos_token_id, *(published if isinstance(published, list) else [published])}
    return sorted(end for end in ends if end is not None)


@contextlib.contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """The model without dropout, and afterwards every module in the mode that it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
