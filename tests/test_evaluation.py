"""Held-out scores: the loss against a plain sum, generation against a token-by-token loop, and where a row counts."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch.nn import functional

from parablock import builtin
from parablock.scores import total
from parablock.sections import Data, Evaluation
from workers.evaluation import _of_one_task, asked, check_tasks, evaluate
from workers.rows import DataError, Row, Rows, load_rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from workers.grades import Answer

CPU = torch.device("cpu")
TOKENIZER = builtin.tokenizer()
EOS = TOKENIZER.eos_token_id


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return builtin.model(0)


@pytest.fixture(scope="module")
def rows() -> Rows:
    return load_rows("builtin", Data(), tokenizer=TOKENIZER, seed=0, held_out=True, limit=24)


def plain_loss(model: torch.nn.Module, rows: list[Row]) -> tuple[float, int]:
    """Row by row, without padding or batches."""
    total, count = 0.0, 0
    for row in rows:
        tokens = torch.from_numpy(row.tokens).long()
        with torch.no_grad():
            losses = functional.cross_entropy(model(tokens[None]).logits[0, :-1], tokens[1:], reduction="none")
        counted = torch.from_numpy(row.counted[1:])
        total, count = total + losses[counted].sum().item(), count + int(counted.sum())
    return total, count


def plain_answer(model: torch.nn.Module, row: Row, length: int) -> list[int]:
    """Greedy, token by token, without a cache."""
    tokens = row.tokens[: row.prompt].tolist()
    with torch.no_grad():
        for _ in range(length):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[row.prompt :]


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_the_loss_is_that_of_a_plain_sum_over_rows(model: torch.nn.Module, rows: Rows, batch_size: int) -> None:
    (scores,) = evaluate(model, TOKENIZER, rows, Evaluation(rows=0, batch_size=batch_size), CPU).values()
    loss_sum, count = plain_loss(model, list(rows))
    assert scores.tokens == count
    assert scores.loss_sum == pytest.approx(loss_sum, rel=1e-5)
    assert scores.loss == pytest.approx(math.log(259), rel=0.2)  # random weights know nothing
    assert (scores.rows, scores.answered, scores.exact_match, scores.rouge_l) == (24, 0, None, None)


def test_shares_of_several_workers_add_up_to_the_first_rows(model: torch.nn.Module, rows: Rows) -> None:
    settings = Evaluation(rows=9, generate=4, max_new_tokens=2)
    shares = [
        load_rows("builtin", Data(), tokenizer=TOKENIZER, seed=0, held_out=True, shard=(shard, 3), limit=24)
        for shard in range(3)
    ]
    scores = [evaluate(model, TOKENIZER, share, settings, CPU) for share in shares]
    whole = scores[0][""] + scores[1][""] + scores[2][""]
    assert (whole.tokens, whole.answered) == (plain_loss(model, list(rows)[:9])[1], 4)
    assert whole.loss == pytest.approx(plain_loss(model, list(rows)[:9])[0] / whole.tokens, rel=1e-5)


def test_tasks_add_up_to_all(model: torch.nn.Module, rows: Rows) -> None:
    named = [dataclasses.replace(row, task="abc"[row.place % 3 and row.place % 2 + 1]) for row in rows]
    told = dataclasses.replace(rows, rows=tuple(named))
    settings = Evaluation(rows=20, generate=11, max_new_tokens=3, batch_size=4)
    by_task = evaluate(model, TOKENIZER, told, settings, CPU)
    (whole,) = evaluate(model, TOKENIZER, rows, settings, CPU).values()
    assert list(by_task) == ["a", "b", "c"]
    for task, scores in by_task.items():
        mine = [row for row in named if row.task == task]
        loss_sum, tokens = plain_loss(model, [row for row in mine if row.place < 20])
        assert (scores.rows, scores.tokens) == (sum(row.place < 20 for row in mine), tokens)
        assert scores.answered == sum(row.place < 11 for row in mine)
        assert scores.loss_sum == pytest.approx(loss_sum, rel=1e-5)
    added = total(by_task.values())
    assert added.loss_sum == pytest.approx(whole.loss_sum, rel=1e-6)
    assert dataclasses.replace(added, loss_sum=whole.loss_sum) == whole


def test_rows_are_those_of_the_loss_also_where_more_are_answered(model: torch.nn.Module, rows: Rows) -> None:
    last = dataclasses.replace(rows[11], task="answered")
    told = dataclasses.replace(rows, rows=(*rows.rows[:11], last, *rows.rows[12:]))
    scores = evaluate(model, TOKENIZER, told, Evaluation(rows=3, generate=12, max_new_tokens=1), CPU)
    assert {task: (each.rows, each.answered) for task, each in scores.items()} == {"": (3, 11), "answered": (0, 1)}


class Walked(list[Row]):
    """Counts how often it was gone through."""

    walks = 0

    def __iter__(self) -> Iterator[Row]:
        self.walks += 1
        return super().__iter__()


def test_rows_are_batched_by_task_in_one_walk() -> None:
    rows = Walked(
        dataclasses.replace(row(place, b"a" * (place % 7), "b"), task=str(place % 50)) for place in range(400)
    )
    batches = _of_one_task(rows, 3)
    assert rows.walks == 1, "not once a task"
    assert sorted(each.place for batch in batches for each in batch) == list(range(400))
    assert all(len({each.task for each in batch}) == 1 and len(batch) <= 3 for batch in batches)
    assert len(batches) == 50 * 3


def test_so_many_tasks_are_a_mistake() -> None:
    rows = [dataclasses.replace(row(place, b"a", "b"), task=str(place // 2)) for place in range(2002)]
    check_tasks(rows[:2000], "id")
    with pytest.raises(DataError, match=r"eval\.task = 'id' tells 1001 tasks apart, .*: a task is a kind of rows"):
        check_tasks(rows, "id")


class Recorder:
    """A tokenizer that keeps the answers that it was asked to decode."""

    def __init__(self, eos_token_id: int) -> None:
        self.eos_token_id = eos_token_id
        self.answers: list[list[int]] = []

    def decode(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        self.answers.append(tokens)
        return ""


def test_generation_in_batches_is_that_of_one_row_at_a_time(rows: Rows) -> None:
    model = builtin.model(4)
    with torch.no_grad():
        model.lm_head.weight.mul_(5)  # sharp enough that rounding decides nothing
    answers = [plain_answer(model, row, 12) for row in rows]
    # A model of random weights does not end, so a token that it says in some answers stands for the end.
    end = next(token for answer in answers for token in answer[3:] if 2 < sum(token in other for other in answers) < 20)
    expected = [answer[: answer.index(end)] if end in answer else answer for answer in answers]
    recorder = Recorder(end)
    settings = Evaluation(generate=24, max_new_tokens=12, batch_size=7)
    (scores,) = evaluate(model, recorder, rows, settings, CPU).values()  # type: ignore[arg-type]
    assert sorted(recorder.answers) == sorted(expected)
    assert len({len(answer) for answer in expected}) > 2
    assert (scores.answered, scores.correct) == (24, 0)


def row(place: int, prompt: bytes, answer: str) -> Row:
    tokens = np.array([*prompt, *answer.encode(), EOS], dtype=np.int32)
    return Row(place, tokens, np.arange(len(tokens)) >= len(prompt), len(prompt), answer)


def speaker(said: dict[bytes, bytes]) -> tuple[torch.nn.Module, list[int]]:
    """A model that says what it is told to, by the prompt, and how many rows it has been asked each time."""
    model = builtin.model(0)
    batches = []

    def generate(*, input_ids: torch.Tensor, attention_mask: torch.Tensor, generation_config: object) -> torch.Tensor:
        del generation_config
        batches.append(len(input_ids))
        answers = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            text = said[bytes(ids[mask.bool()].tolist())]
            answers.append([*ids.tolist(), *text, EOS, *b"#### 5", *[256] * 40][:40])
        return torch.tensor(answers)

    model.generate = generate
    return model, batches


def test_a_right_answer_is_counted_and_a_wrong_one_not() -> None:
    model, _ = speaker({b"a": b"7#### 1,000.0", b"bb": b"7#### 12 left", b"c": b"no idea"})
    rows = [
        row(0, b"a", "so #### $1000"),
        row(1, b"bb", "#### 13"),
        row(2, b"c", "#### 5"),
        row(3, b"d", "no number, so not asked"),
        row(4, b"a", "#### 1"),
    ]
    loaded = Rows(tuple(rows), 256, 5, 0, {})
    (scores,) = evaluate(model, TOKENIZER, loaded, Evaluation(generate=4, batch_size=2), CPU).values()
    assert (scores.correct, scores.answered, scores.free_form) == (1, 3, 0)
    assert scores.exact_match == pytest.approx(1 / 3)


def test_free_form_answers_are_graded_too_where_that_is_asked() -> None:
    model, _ = speaker({b"a": b"#### 7", b"b": b"Positive.", b"c": b"the cat sat"})
    rows = [
        row(0, b"a", "#### 7"),
        row(1, b"b", "positive"),
        row(2, b"c", "the dog sat"),
        row(3, b"d", "beyond eval.generate"),
        dataclasses.replace(row(4, b"e", "text"), place=1, prompt=0, answer=""),
    ]
    loaded = Rows(tuple(rows), 256, 5, 0, {})
    settings = Evaluation(generate=3, batch_size=2)
    assert [row.place for row in asked(loaded, settings, free_form=True)] == [0, 1, 2]
    assert [row.place for row in asked(loaded, settings, free_form=False)] == [0]
    (scores,) = evaluate(model, TOKENIZER, loaded, settings, CPU, free_form=True).values()
    assert (scores.correct, scores.answered, scores.free_form) == (2, 3, 2)
    assert scores.rouge_l == pytest.approx((1 + 2 / 3) / 2)


def test_known_answers_are_taken_and_only_the_others_kept() -> None:
    prompts = [b"a", b"bb", b"ccc", b"dddd", b"eeeee"]
    rows = Rows(tuple(row(place, prompt, "yes") for place, prompt in enumerate(prompts)), 256, 5, 0, {})
    settings = Evaluation(generate=5, batch_size=2)
    said = dict(zip(prompts, (b"yes", b"no", b"yes", b"no", b"yes"), strict=True))
    runs = []
    whole = {place: said[prompt].decode() for place, prompt in enumerate(prompts)}
    for known in ({}, {place: whole[place] for place in (4, 3, 2)}, whole):
        model, batches = speaker(said)
        kept: list[Answer] = []
        (scores,) = evaluate(
            model, TOKENIZER, rows, settings, CPU, free_form=True, known=known, keep=kept.extend
        ).values()  # fmt: skip
        runs.append((scores, [answer.place for answer in kept], batches))
    # The longest come first: {4, 3}, {2, 1}, {0}. A batch of which some is known is the same batch again.
    assert [(places, batches) for _, places, batches in runs] == [
        ([4, 3, 2, 1, 0], [2, 2, 1]),
        ([1, 0], [2, 1]),
        ([], []),
    ]
    assert runs[0][0] == runs[1][0] == runs[2][0]
    assert (runs[0][0].correct, runs[0][0].answered) == (3, 5)


def test_the_model_is_left_in_its_mode_also_after_an_interruption(rows: Rows) -> None:
    model = builtin.model(0)
    model.train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    steps: list[tuple[int, int]] = []
    evaluate(
        model, TOKENIZER, rows, Evaluation(rows=10, generate=3, batch_size=4, max_new_tokens=1), CPU,
        lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    assert [module.training for module in model.modules()] == before
    assert steps == [(0, 13), (4, 13), (8, 13), (10, 13), (13, 13)]

    def interrupt(done: int, _total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, TOKENIZER, rows, Evaluation(), CPU, interrupt)
    assert [module.training for module in model.modules()] == before


def test_evaluation_moves_no_weight_and_no_random_state(model: torch.nn.Module, rows: Rows) -> None:
    before = [value.clone() for value in model.parameters()]
    state = torch.random.get_rng_state()
    evaluate(model, TOKENIZER, rows, Evaluation(generate=4, max_new_tokens=3), CPU)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, old) for value, old in zip(model.parameters(), before, strict=True))
    assert all(value.grad is None for value in model.parameters())


def test_no_rows_give_empty_scores(model: torch.nn.Module) -> None:
    assert evaluate(model, TOKENIZER, Rows((), 0, 0, 0, {}), Evaluation(generate=4), CPU) == {}
