"""What a worker knows of the commits: nothing counts as in hand before it is, in whatever order it comes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from parablock.commits import Commits
from parablock.messages import Start


@given(
    next_round=st.integers(0, 20),
    pending=st.sets(st.integers(0, 19)),
    total=st.integers(0, 12),
    starts_after=st.integers(0, 12),
    order=st.randoms(use_true_random=False),
)
def test_everything_is_in_hand_exactly_when_it_has_arrived(
    next_round: int, pending: set[int], total: int, starts_after: int, order: object
) -> None:
    pending = {round for round in pending if round < next_round}
    coming = sorted(pending) + list(range(next_round, next_round + total))
    order.shuffle(coming)  # type: ignore[attr-defined]
    commits, arrived = Commits(0), set()
    start = Start(next_round, 1, next_round, tuple(sorted(pending)))
    for number, round in enumerate(coming):
        if number == starts_after:
            commits.start(start)
        assert commits.wanted(round)
        commits.arrive(round)
        arrived.add(round)
        assert commits.has(round)
    if starts_after >= len(coming):
        commits.start(start)
    assert commits.through(next_round + total - 1)
    assert not commits.through(next_round + total)
    assert all(commits.has(round) for round in coming)
    assert [round for round in range(next_round) if commits.wanted(round)] == sorted(pending)
    assert commits.told == next_round


def test_a_gap_holds_up_what_comes_after_it() -> None:
    commits = Commits(0)
    commits.start(Start(5, 2, 3, (1,)))
    commits.arrive(4)
    assert not commits.through(2), "round 1 is to come"
    commits.arrive(1)
    assert commits.through(2)
    assert not commits.through(3)
    commits.arrive(3)
    assert commits.through(4)
    assert not commits.has(5)


def test_before_the_start_nothing_is_complete_and_everything_is_wanted() -> None:
    commits = Commits(7)
    assert commits.greeted_at == commits.told == 7
    assert commits.wanted(0)
    assert not commits.has(0)
    assert not commits.through(0)
    commits.arrive(9)
    assert commits.has(9)
    commits.start(Start(9, 2, 8, ()))
    assert commits.told == 8
    assert commits.through(7)
    assert not commits.through(8)
    commits.arrive(8)
    assert commits.through(9)
    assert not commits.wanted(7)
