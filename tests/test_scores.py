"""Scores: sums that add up, and what they say where there is nothing to divide by."""

from __future__ import annotations

import math

import pytest

from parablock.scores import Scores, total


def test_sums_add_up_and_means_are_over_all() -> None:
    scores = total([Scores(30.0, 10, 1, 2, 0.5, 1, 3), Scores(10.0, 10, 1, 2, 0.25, 2, 2)])
    assert scores == Scores(40.0, 20, 2, 4, 0.75, 3, 5)
    assert (scores.loss, scores.exact_match, scores.rouge_l) == (2.0, 0.5, 0.25)


def test_of_nothing_nothing_is_known() -> None:
    scores = total([])
    assert scores == Scores()
    assert math.isnan(scores.loss)
    assert math.isnan(scores.perplexity)
    assert (scores.exact_match, scores.rouge_l) == (None, None)


def test_perplexity_is_the_exponential_of_the_loss() -> None:
    assert Scores(6.0, 3).perplexity == pytest.approx(math.e**2)
    assert Scores(1e6, 1).perplexity == math.inf
