"""The advice: what it names hides the exchange, and nothing smaller does."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from parablock.advice import blocks_to_hide, codec_to_hide, steps_to_hide
from parablock.plan import Cost, Exchange, Link
from parablock.sections import Codecs

FLOAT32 = Codecs("float32", "float32")
seconds = st.floats(0.01, 10.0)
costs = st.builds(Cost, st.floats(0.0, 5.0), seconds)


def test_the_smallest_k() -> None:
    moved = Exchange(1, 1, 1.0, 1.0, 2.0)
    assert steps_to_hide(moved, {(0,)}, [Cost(0.5, 0.5)]) == 3
    assert steps_to_hide(moved, {(0,)}, [Cost(2.5, 0.5)]) == 1
    assert steps_to_hide(moved, {(0,), (1,)}, [Cost(0.5, 0.5), Cost(0.0, 0.25)]) == 8, "whichever is behind it"
    assert steps_to_hide(moved, {(0, 1)}, [Cost(0.5, 0.5), Cost(0.0, 0.25)]) == 2, "both are behind it"
    assert steps_to_hide(moved, {(1, 0)}, [Cost(0.5, 0.5), Cost(0.0, 0.25)]) == 4, "it must leave the link to the next"
    assert steps_to_hide(moved, {(0,)}, [Cost(0.5, 0.0)]) is None


@given(st.lists(costs, min_size=2, max_size=2), seconds, seconds)
def test_k_hides_it_and_one_less_does_not(both: list[Cost], wire_s: float, beyond_s: float) -> None:
    moved = Exchange(1, 1, wire_s, wire_s, wire_s + beyond_s)
    needed = steps_to_hide(moved, {(0,), (1,)}, both)
    assert needed is not None

    def hides(steps: int, slack_s: float) -> bool:
        return all(cost.seconds(steps) >= moved.seconds - slack_s for cost in both)

    assert hides(needed, 1e-6)
    assert needed == 1 or not hides(needed - 1, -1e-6)


def test_the_smallest_number_of_blocks() -> None:
    sizes = {2: [5000, 4000], 3: [3000, 3000, 3000], 9: [1000] * 9}
    link = Link(0.0, 10_000.0, 10_000.0)  # 4,000 bytes up and down in chunks of 1,000: 0.5 s and what a commit takes
    assert blocks_to_hide(sizes, 0.51, link, FLOAT32, 1000, 1) == 9
    assert blocks_to_hide(sizes, 1.31, link, FLOAT32, 1000, 1) == 3
    assert blocks_to_hide(sizes, 9.0, link, FLOAT32, 1000, 1) == 2
    assert blocks_to_hide(sizes, 0.1, link, FLOAT32, 1000, 1) is None
    assert blocks_to_hide(sizes, 0.41, link, FLOAT32, 1000, 2) == 9, "two rounds hide it, if each leaves the link"
    assert blocks_to_hide(sizes, 0.39, link, FLOAT32, 1000, 2) is None
    assert blocks_to_hide({}, 9.0, link, FLOAT32, 1000, 1) is None


def test_the_codec_that_loses_least() -> None:
    link = Link(0.0, 1000.0, 1000.0)
    behind = {0: {(0,)}}

    def codec(compute_s: float) -> str | None:
        return codec_to_hide([1000], behind, [Cost(compute_s, 0.0)], 1, link, 100)

    assert codec(4.2) == "float32"
    assert codec(4.0) == "bfloat16"
    assert codec(1.2) == "int8"
    assert codec(0.7) == "int4"
    assert codec(0.5) is None
