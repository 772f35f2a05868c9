"""Robust rules against the slow and obvious way, and what f bad ones of n can do to them: nothing much."""

from __future__ import annotations

from itertools import permutations
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.attacks import ATTACKS, Attack
from parablock import robust
from parablock.aggregation import PIECE, weighted_mean
from parablock.measurement import judge, products
from parablock.robust_settings import Robust
from tests import robust_reference as reference

if TYPE_CHECKING:
    import numpy.typing as npt

    Vector = npt.NDArray[np.float32]

finite = st.floats(-1e6, 1e6, width=32)


def columns(most: int = 9) -> st.SearchStrategy[list[list[float]]]:
    """Contributions of one to `most` clients, of a few elements each."""
    return st.integers(1, 4).flatmap(lambda numel: st.lists(st.lists(finite, min_size=numel, max_size=numel),
                                                            min_size=1, max_size=most))  # fmt: skip


def arrays(deltas: list[list[float]]) -> list[Vector]:
    return [np.array(delta, np.float32) for delta in deltas]


@given(columns())
def test_median_and_trimmed_mean_are_those_of_sorted_columns(deltas: list[list[float]]) -> None:
    made = arrays(deltas)
    scale = max(1.0, float(np.abs(made).max()))
    np.testing.assert_allclose(robust.median(made), reference.median(made), atol=1e-6 * scale, rtol=0)
    for cut in range((len(deltas) + 1) // 2):
        np.testing.assert_allclose(
            robust.trimmed_mean(made, cut), reference.trimmed_mean(made, cut), atol=1e-6 * scale, rtol=0
        )


@given(columns(6), st.randoms())
def test_by_element_the_order_of_the_contributions_does_not_change_a_bit(
    deltas: list[list[float]], order: np.random.Generator
) -> None:
    made = [each + np.float32(0.0) for each in arrays(deltas)]  # −0 and 0 are equal, and not the same bits
    mixed = list(made)
    order.shuffle(mixed)  # type: ignore[arg-type]
    assert robust.median(made).tobytes() == robust.median(mixed).tobytes()
    cut = (len(made) - 1) // 2
    assert robust.trimmed_mean(made, cut).tobytes() == robust.trimmed_mean(mixed, cut).tobytes()


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 13])
def test_longer_vectors_are_sorted_piece_by_piece(count: int) -> None:
    rng = np.random.default_rng(count)
    made = [rng.standard_normal(PIECE + 100, np.float32) for _ in range(count)]
    before = [each.copy() for each in made]
    out = np.empty_like(made[0])
    assert robust.median(made, out=out) is out
    np.testing.assert_allclose(out, np.median(made, axis=0), rtol=1e-6, atol=1e-7)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(made, before, strict=True)), "contributions are left alone"


def test_a_factor_counts_before_the_order() -> None:
    made = arrays([[9.0], [2.0], [3.0]])
    assert robust.median(made, [0.1, 1.0, 1.0]).tolist() == [2.0]
    assert robust.trimmed_mean(made, 1, [0.3, 1.0, 1.0]).tolist() == pytest.approx([2.7])


def test_the_largest_values_do_not_overflow() -> None:
    most = np.finfo(np.float32).max
    made = [np.full(3, most, np.float32) for _ in range(4)]
    assert robust.median(made).tolist() == [most] * 3
    assert np.isfinite(robust.trimmed_mean(made, 1)).all()


@given(
    st.integers(0, 2).flatmap(
        lambda bad: st.tuples(
            st.just(bad), st.lists(st.lists(finite, min_size=3, max_size=3), min_size=2 * bad + 3, max_size=9)
        )
    ),
    st.integers(1, 9),
)
def test_krum_chooses_those_with_the_least_scores(drawn: tuple[int, list[list[float]]], count: int) -> None:
    """Or others whose scores are the same but for rounding."""
    bad, deltas = drawn
    made = arrays(deltas)
    chosen = robust.krum(products(made, pairs=True), bad, min(count, len(made)))
    exact = {}
    for place in range(len(made)):
        apart = sorted(
            float(((made[place].astype(float) - other) ** 2).sum()) for n, other in enumerate(made) if n != place
        )
        exact[place] = sum(apart[: len(made) - bad - 2])
    assert list(chosen) == sorted(set(chosen))
    expected = reference.krum(made, bad, len(chosen))
    assert len(chosen) == len(expected)
    norm = max(float((np.square(each, dtype=np.float64)).sum()) for each in made)
    np.testing.assert_allclose(
        sorted(exact[place] for place in chosen), sorted(exact[place] for place in expected), rtol=1e-9,
        atol=1e-11 * norm * len(made),
    )  # fmt: skip


def test_of_equal_scores_the_first_in_the_roster_is_chosen() -> None:
    same = [np.ones(4, np.float32)] * 5
    assert robust.krum(products(same, pairs=True), 1, 1) == (0,)
    assert robust.krum(products(same, pairs=True), 1, 2) == (0, 1)


@pytest.mark.parametrize(("rule", "fewest"), [("median", 5), ("trimmed-mean", 5), ("krum", 7), ("multi-krum", 7)])
def test_how_many_it_takes_to_bear_two(rule: str, fewest: int) -> None:
    assert robust.fewest(rule, 2) == fewest
    assert robust.fewest("mean", 0) == 1


# f bad ones of n

HONEST, NUMEL = 9, 400
"""Honest clients of which each has the same 1s and a noise of its own, a fifth as long."""


def honest(seed: int) -> dict[int, Vector]:
    """By client, of which the first two are to be bad."""
    rng = np.random.default_rng(seed)
    return {n: (1.0 + 0.2 * rng.standard_normal(NUMEL)).astype(np.float32) for n in range(2 + HONEST)}


def made_of(rule: str, deltas: list[Vector], bad: int = 2) -> Vector:
    settings = Robust(rule=rule, bad=bad if rule != "mean" else 0)  # type: ignore[arg-type]
    factors = dict.fromkeys(map(str, range(len(deltas))), 1.0)
    if settings.measured:
        factors = dict(judge(settings, list(factors), products(deltas, pairs=True), bad).factors)
    counted = [deltas[int(name)] for name in factors]
    return robust.aggregate(rule, bad, counted, [1] * len(counted), None, list(factors.values()))


def off(made: Vector, deltas: dict[int, Vector]) -> float:
    """How far from the honest mean, in lengths of that."""
    mean = np.mean([delta for client, delta in deltas.items() if client >= 2], axis=0, dtype=np.float64)
    return float(np.linalg.norm(made - mean) / np.linalg.norm(mean))


@pytest.mark.parametrize("attack", [each for each in ATTACKS if each != "nan"])
@pytest.mark.parametrize("rule", ["median", "trimmed-mean", "krum", "multi-krum"])
def test_two_bad_ones_do_not_move_it_beyond_the_honest(rule: str, attack: str) -> None:
    for seed in range(5):
        deltas = honest(seed)
        sent = list(Attack(attack, 2, seed)(0, deltas).values())
        assert off(made_of(rule, sent), deltas) < 0.25, "about as far as one honest one is"
        assert off(made_of("mean", sent), deltas) > 0.3


@pytest.mark.parametrize("rule", ["krum", "multi-krum"])
def test_what_is_far_off_is_not_chosen_wherever_it_stands_in_the_roster(rule: str) -> None:
    deltas = list(honest(0).values())[:7]
    for places in permutations(range(7), 2):
        sent = [(-5.0 * each).astype(np.float32) if n in places else each for n, each in enumerate(deltas)]
        settings = Robust(rule=rule, bad=2)  # type: ignore[arg-type]
        verdict = judge(settings, "abcdefg", products(sent, pairs=True), 2)
        assert {"abcdefg"[place] for place in places} <= verdict.left_out.keys()
        assert len(verdict.factors) == (1 if rule == "krum" else 3)


def test_one_more_than_it_bears_takes_a_rule_over() -> None:
    """The breakdown point is where the theory says: three of five that agree are the middle."""
    deltas = honest(0)
    few = [deltas[n] for n in range(2, 4)] + [np.full(NUMEL, -100.0, np.float32)] * 3
    assert off(made_of("median", few), deltas) > 50.0
    assert off(made_of("trimmed-mean", few), deltas) > 20.0
    enough = [deltas[n] for n in range(2, 5)] + [np.full(NUMEL, -100.0, np.float32)] * 2
    assert off(made_of("median", enough), deltas) < 0.5
    assert off(made_of("trimmed-mean", enough), deltas) < 0.5


def test_a_clipped_contribution_has_the_direction_that_it_had() -> None:
    made = arrays([[3.0, 4.0], [0.3, 0.4]])
    factors = list(judge(Robust(clip=1.0), "ab", products(made, pairs=False), 0).factors.values())
    assert factors == pytest.approx([0.2, 1.0])
    np.testing.assert_allclose(weighted_mean(made, [1, 3], None, None, factors), [0.375, 0.5], rtol=1e-6)


def test_without_clipping_the_mean_is_what_it_was_to_the_last_bit() -> None:
    rng = np.random.default_rng(0)
    made = [rng.standard_normal(1000, np.float32) for _ in range(5)]
    weights, steps = [1, 2, 3, 4, 5], [4, 4, 8, 4, 4]
    plain = weighted_mean(made, weights, steps)
    assert robust.aggregate("mean", 0, made, weights, steps, [1.0] * 5).tobytes() == plain.tobytes()
