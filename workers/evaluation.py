"""Held-out scores of a model, by task: the loss of the answers, and how good those are that it generates itself.

Which rows are held out, and what their tasks are, is `workers.rows`' business, how an answer is graded
`workers.grades`'. The model is left in the mode in which it came.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig

from parablock.loss import answer_loss
from parablock.scores import Scores
from workers.batches import collate
from workers.grades import grade, wanted_number
from workers.labels import MOST
from workers.sources import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from parablock import sections
    from workers.grades import Answer
    from workers.rows import Row, Rows


def asked(rows: Rows, settings: sections.Evaluation, *, free_form: bool) -> list[Row]:
    """The rows among the first `settings.generate` of their source that are answered: those with a reference, and
    without `free_form` only those whose reference is `#### N`."""
    return [
        row
        for row in rows
        if row.place < settings.generate and row.answer and (free_form or wanted_number(row.answer) is not None)
    ]


def check_tasks(rows: Iterable[Row], field: str, most: int = MOST) -> None:
    """Raises DataError where the rows have so many tasks that `field` cannot be that of a task, or more than `most`."""
    tasks = {row.task for row in rows}
    if len(tasks) > most:
        raise DataError(
            f"eval.task = {field!r} tells {len(tasks)} tasks apart, and at most {most} are told: a task is a "
            "kind of rows, as a category, that many rows share; name its field, not one that differs from row to row"
        )


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    settings: sections.Evaluation,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
    *,
    free_form: bool = False,
    known: Mapping[int, str] | None = None,
    keep: Callable[[Sequence[Answer]], None] | None = None,
) -> dict[str, Scores]:
    """The model's scores by task: the loss of the rows that are among the first `settings.rows` of their source, and
    the grades of those that are `asked`, answered greedily.

    model: on `device`. progress: called before the first and after each batch with the rows done and the rows to do; an
    exception that it raises ends the evaluation. known: answers by the place of their row, from an earlier evaluation
    that was the same in everything. keep: given every other answer, batch by batch.
    """
    scored = [row for row in rows if settings.rows == 0 or row.place < settings.rows]
    questions = asked(rows, settings, free_form=free_form)
    known = known or {}
    counted = Counter(row.task for row in scored)
    scores = {task: Scores(rows=counted[task]) for task in sorted(counted.keys() | {row.task for row in questions})}
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, len(scored) + len(questions))

    with _evaluating(model), torch.no_grad():
        advance(0)
        for batch in _of_one_task(scored, settings.batch_size):
            loss, tokens = answer_loss(model, collate(batch, rows.pad_id))
            scores[batch[0].task] += Scores(loss.item(), tokens)
            advance(len(batch))
        for batch in _by_length(questions, settings.batch_size):
            texts = [known.get(row.place) for row in batch]
            if None in texts:
                # The whole batch, also where some of it is known: beside other rows a row is padded otherwise, and
                # its answer could differ.
                fresh = _generate(model, tokenizer, batch, rows.pad_id, settings.max_new_tokens, device)
                if keep is not None:
                    new = zip(batch, fresh, texts, strict=True)
                    keep([grade(row, text) for row, text, old in new if old is None])
                texts = [text if old is None else old for text, old in zip(fresh, texts, strict=True)]
            for row, text in zip(batch, texts, strict=True):
                assert text is not None
                scores[row.task] += _graded(grade(row, text))
            advance(len(batch))
    return scores


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What ends an answer: the tokenizer's end token, and those that the model was published with."""
    published = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = {tokenizer.eos_token_id, *(published if isinstance(published, list) else [published])}
    return sorted(end for end in ends if end is not None)


def _graded(answer: Answer) -> Scores:
    """Of one answer, whose row is counted elsewhere."""
    free_form = answer.rouge_l is not None
    return Scores(correct=int(answer.right), answered=1, rouge_sum=answer.rouge_l or 0.0, free_form=int(free_form))


def _of_one_task(rows: Sequence[Row], size: int) -> list[list[Row]]:
    """Batches of rows of one task each, so that a batch's loss is its task's; the longest first."""
    tasks: dict[str, list[Row]] = {}
    for row in rows:
        tasks.setdefault(row.task, []).append(row)
    batches = [batch for task in sorted(tasks) for batch in _by_length(tasks[task], size)]
    return sorted(batches, key=lambda batch: len(batch[0].tokens), reverse=True)


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
    ends = end_tokens(model, tokenizer)
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
