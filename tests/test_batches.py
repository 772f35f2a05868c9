"""Which rows come in which round, and how they are padded."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from parablock.batch import IGNORED, Batch
from parablock.sections import Solver
from workers.batches import collate, step_batches
from workers.rows import Row, Rows

PAD = 99


def row(place: int, tokens: list[int], prompt: int = 1) -> Row:
    counted = np.arange(len(tokens)) >= prompt
    return Row(place, np.array(tokens, dtype=np.int32), counted, prompt, "x")


def numbered(count: int) -> Rows:
    """Rows that can be told apart by their first token."""
    return Rows(tuple(row(place, [place, 1]) for place in range(count)), PAD, count, 0, {})


def of_round(rows: Rows, seed: int, client: str, round: int, settings: Solver) -> list[tuple[Batch, ...]]:
    return step_batches(rows, seed, client, round * settings.steps, settings.steps, settings)


def order(batches: list[tuple[Batch, ...]]) -> list[int]:
    return [int(number) for step in batches for batch in step for number in batch.input_ids[:, 0]]


def test_rows_are_padded_on_the_right_to_the_longest() -> None:
    batch = collate([row(0, [5, 6, 7], prompt=2), row(1, [8, 9, 10, 11])], PAD)
    assert batch.input_ids.tolist() == [[5, 6, 7, PAD], [8, 9, 10, 11]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch.labels.tolist() == [[IGNORED, IGNORED, 7, IGNORED], [IGNORED, 9, 10, 11]]
    assert {batch.input_ids.dtype, batch.attention_mask.dtype, batch.labels.dtype} == {torch.int64}


def test_a_round_has_the_shape_that_the_settings_say() -> None:
    batches = of_round(numbered(50), 0, "a", 3, Solver(steps=3, accumulate=2, batch_size=4))
    assert [len(step) for step in batches] == [2, 2, 2]
    assert all(batch.input_ids.shape == (4, 2) for step in batches for batch in step)


@given(
    count=st.integers(1, 30),
    steps=st.integers(1, 4),
    accumulate=st.integers(1, 3),
    batch_size=st.integers(1, 7),
    seed=st.integers(0, 2**31 - 1),
)
def test_every_epoch_takes_each_row_once(count: int, steps: int, accumulate: int, batch_size: int, seed: int) -> None:
    settings = Solver(steps=steps, accumulate=accumulate, batch_size=batch_size)
    rounds = 3 * count // (steps * accumulate * batch_size) + 2
    rows = numbered(count)
    taken = [number for round in range(rounds) for number in order(of_round(rows, seed, "c", round, settings))]
    for epoch in range(3):
        assert Counter(taken[epoch * count : (epoch + 1) * count]) == Counter(range(count))


def test_a_round_is_a_function_of_its_arguments_alone() -> None:
    settings, rows = Solver(steps=2, batch_size=8), numbered(100)
    first = order(of_round(rows, 1, "a", 5, settings))
    order(of_round(rows, 2, "b", 9, settings))
    assert order(of_round(rows, 1, "a", 5, settings)) == first
    # Written down once: the order must be the same in every process and release.
    assert first == [21, 59, 77, 12, 41, 70, 24, 80, 5, 95, 0, 89, 60, 81, 25, 15]


def test_epochs_seeds_and_clients_have_orders_of_their_own() -> None:
    settings, rows = Solver(steps=1, batch_size=100), numbered(100)
    orders = {
        tuple(order(of_round(rows, seed, client, round, settings)))
        for seed in (0, 1) for client in ("a", "b") for round in (0, 1)
    }  # fmt: skip
    assert len(orders) == 8


def test_gradient_accumulation_takes_the_same_rows_as_one_large_batch() -> None:
    whole = of_round(numbered(40), 0, "a", 1, Solver(steps=2, batch_size=6))
    parts = of_round(numbered(40), 0, "a", 1, Solver(steps=2, accumulate=3, batch_size=2))
    assert order(whole) == order(parts)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 3), st.integers(1, 7))
def test_rounds_of_any_length_take_the_rows_one_after_the_other(
    lengths: list[int], accumulate: int, batch_size: int
) -> None:
    settings, rows = Solver(accumulate=accumulate, batch_size=batch_size), numbered(30)
    firsts = [sum(lengths[:index]) for index in range(len(lengths))]
    parts = [
        number
        for first, steps in zip(firsts, lengths, strict=True)
        for number in order(step_batches(rows, 0, "a", first, steps, settings))
    ]
    assert parts == order(step_batches(rows, 0, "a", 0, sum(lengths), settings))
