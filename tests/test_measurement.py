"""The measure of contributions, on chunks as they travel, against whole vectors number by number."""

from __future__ import annotations

import math
import tracemalloc
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from parablock.aggregation import PIECE, Contribution
from parablock.config import from_dict
from parablock.coordinator_events import Measure, Measured, Unfit
from parablock.layout import Layout
from parablock.manifest import Block, Manifest, Slot
from parablock.measurement import Measurement, judge, products
from parablock.robust_settings import Robust
from tests import robust_reference as reference

if TYPE_CHECKING:
    import numpy.typing as npt

    from parablock.verdict import Verdict

    Vector = npt.NDArray[np.float32]

NUMEL = 2 * 16384 + 77  # two whole chunks of 64 KiB and a rest
MANIFEST = Manifest((Block(0, "layer", (Slot("p", (NUMEL,), "float32", 0),)),), ())


def vectors(number: int, numel: int = NUMEL, seed: int = 0) -> list[Vector]:
    """Lengths differ."""
    rng = np.random.default_rng(seed)
    return [(rng.uniform(0.1, 3.0) * rng.standard_normal(numel)).astype(np.float32) for _ in range(number)]


class Desk:
    """A measurement, and what it is asked to measure."""

    def __init__(self, **tables: Any) -> None:
        self.config = from_dict({"network": {"chunk_bytes": 65536}, "round": {"clients": 5}, **tables})
        self.layout = Layout.up(self.config, NUMEL)
        self.measurement = Measurement(self.config, MANIFEST)

    def take(self, deltas: list[Vector], index: int, attempt: int = 1) -> Measured | Unfit | None:
        encoded = [self.layout.codec.encode(delta[self.layout.part(index)]) for delta in deltas]
        contributions = [Contribution(name, 1, 1, each) for name, each in zip("abcde", encoded, strict=False)]
        return self.measurement.take(Measure(0, 0, attempt, index, tuple(contributions), self.config.robust.bad))

    def verdict(self, deltas: list[Vector], attempt: int = 1) -> Verdict:
        first, second, last = (self.take(deltas, index, attempt) for index in range(self.layout.count))
        assert (first, second) == (None, None), "no verdict before the last chunk"
        assert isinstance(last, Measured)
        assert (last.round, last.attempt) == (0, attempt)
        return last.verdict

    def decoded(self, delta: Vector) -> Vector:
        parts = [self.layout.part(index) for index in range(self.layout.count)]
        codec = self.layout.codec
        return np.concatenate([codec.decode(codec.encode(delta[part]), part.stop - part.start) for part in parts])


@pytest.mark.parametrize("up", ["float32", "bfloat16", "int8"])
def test_what_travels_is_cut_to_the_length_that_is_set(up: str) -> None:
    desk, deltas = Desk(robust={"clip": 200.0}, codec={"up": up}), vectors(5)
    norms = [reference.norm(desk.decoded(delta)) for delta in deltas]
    assert min(norms) < 200.0 < max(norms), "else this would test little"
    verdict = desk.verdict(deltas)
    assert verdict.left_out == {}
    expected = {name: min(1.0, 200.0 / norm) for name, norm in zip("abcde", norms, strict=True)}
    assert verdict.factors == pytest.approx(expected, rel=1e-9)
    assert verdict.clipped == tuple(name for name, norm in zip("abcde", norms, strict=True) if norm > 200.0)


@pytest.mark.parametrize(("rule", "chosen", "count"), [("krum", 0, 1), ("multi-krum", 0, 2), ("multi-krum", 1, 1)])
@pytest.mark.parametrize("clip", [{}, {"clip_ratio": 0.5}])
def test_the_chosen_are_those_of_whole_vectors(rule: str, chosen: int, count: int, clip: dict[str, float]) -> None:
    desk = Desk(robust={"rule": rule, "bad": 1, "chosen": chosen, **clip})
    for attempt in range(1, 6):
        deltas = vectors(5, seed=attempt)
        verdict = desk.verdict(deltas, attempt)
        norms = [reference.norm(delta) for delta in deltas]
        limit = 0.5 * sorted(norms)[2] if clip else math.inf
        factors = [min(1.0, limit / norm) for norm in norms]
        cut = [delta * np.float64(factor) for delta, factor in zip(deltas, factors, strict=True)]
        places = reference.krum(cut, 1, count)
        assert verdict.factors == pytest.approx({"abcde"[place]: factors[place] for place in places})
        assert list(verdict.left_out) == [name for place, name in enumerate("abcde") if place not in places]
        assert f"{rule} has chosen {count} of 5 contributions" in next(iter(verdict.left_out.values()))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named_and_the_attempt_given_up(bad: float) -> None:
    desk, deltas = Desk(robust={"clip": 1.0}), vectors(3)
    deltas[1][16384 + 5] = bad
    assert desk.take(deltas, 0) is None
    reason = "the update holds values that are not finite (NaN or infinity)"
    assert desk.take(deltas, 1) == Unfit(0, 1, {"b": reason})
    assert desk.take(deltas, 2) is None, "it had been asked for before that was known"
    again = [deltas[0], deltas[2]]
    assert desk.verdict(again, attempt=2) == Desk(robust={"clip": 1.0}).verdict(again, attempt=2)


@pytest.mark.parametrize("numel", [1, PIECE, 2 * PIECE + 7])
def test_products_are_those_of_float64(numel: int) -> None:
    deltas = vectors(4, numel)
    exact = np.array([[math.fsum(np.float64(a) * np.float64(b)) for b in deltas] for a in deltas])
    np.testing.assert_allclose(products(deltas, pairs=True), exact, rtol=1e-9, atol=1e-9 * exact.max())
    np.testing.assert_allclose(products(deltas, pairs=False), np.diag(exact), rtol=1e-12)


def test_norms_alone_take_no_memory_for_pairs() -> None:
    """Of 1,000 clients a matrix of pairs is 8 MB, and so are the pieces of all at once."""
    deltas = [np.ones(PIECE + 7, np.float32)] * 1000
    tracemalloc.start()
    try:
        assert products(deltas, pairs=False) == pytest.approx(np.full(1000, PIECE + 7.0))
        assert tracemalloc.get_traced_memory()[1] < 8 * PIECE + 200_000
    finally:
        tracemalloc.stop()
    desk = Desk(robust={"clip": 1.0})
    desk.take(vectors(3), 0)
    assert desk.measurement._attempt is not None
    assert desk.measurement._attempt.products.shape == (3,)


def test_huge_finite_values_are_measured_and_cut() -> None:
    """Their squares are beyond float32."""
    deltas = [np.full(10, 1e30, np.float32), np.ones(10, np.float32)]
    factors = judge(Robust(clip=2.0), "ab", products(deltas, pairs=False), 0).factors
    assert factors == pytest.approx({"a": 2.0 / (1e30 * math.sqrt(10)), "b": 2.0 / math.sqrt(10)})


def test_the_length_of_most_is_the_measure_of_all() -> None:
    """Two of five are far too long; of an even number the smaller middle one counts; nothing is not cut."""
    deltas = [np.full(4, value, np.float32) for value in (1.0, 2.0, 3.0, 1e6, 1e9)]
    assert list(judge(Robust(clip_ratio=2.0), "abcde", products(deltas, pairs=False), 0).factors.values()) == (
        pytest.approx([1.0, 1.0, 1.0, 6.0 / 1e6, 6.0 / 1e9])
    )
    assert judge(Robust(clip_ratio=1.0), "abcd", products(deltas[:4], pairs=False), 0).factors["c"] == pytest.approx(
        2 / 3
    )
    nothing = [np.zeros(4, np.float32)] * 2 + [deltas[0]]
    factors = judge(Robust(clip_ratio=1.0), "abc", products(nothing, pairs=False), 0).factors
    assert factors == {"a": 1.0, "b": 1.0, "c": 0.0}
