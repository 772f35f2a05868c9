"""A tally: which one of its kind something is, what of it is told, and that it is forgotten with time."""

from __future__ import annotations

from parablock.tally import Tally


def test_the_first_ones_are_told_and_ever_fewer_of_those_after_them() -> None:
    tally = Tally(5)
    told = [number for number in (tally.add("a", 0.0) for _ in range(200)) if tally.tells(number)]
    assert told == [1, 2, 3, 4, 5, 8, 16, 32, 64, 128]
    assert tally.add("b", 0.0) == 1, "each has its own"


def test_the_count_is_halved_for_each_hour_in_which_nothing_came() -> None:
    tally = Tally(5)
    for _ in range(8):
        tally.add("a", 0.0)
    assert tally.add("a", 3599.0) == 9
    assert tally.add("a", 3599.0 + 3600.0) == 5
    tally.wait("a", 10_000.0)
    assert tally.add("a", 9000.0) == 6, "before the hours begin"
    assert tally.add("a", 1e9) == 1
    tally.forget("a")
    tally.forget("a")
    assert tally.add("a", 1e9) == 1
