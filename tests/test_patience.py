"""A worker's patience with the broker: times only."""

from __future__ import annotations

import pytest

from parablock.patience import Patience
from parablock.sections import Network

LIMIT_S = 100.0


def called(times: int, seed: str = "seed") -> list[float]:
    """The waits between so many calls that nobody answers, in seconds."""
    patience, now, waits = Patience(1e9, seed, 0.0), 0.0, []
    for _ in range(times):
        assert patience.call_due(now)
        patience.called(now)
        patience.fell_silent(now + 1e6, calling=True)  # so that only calls are due
        waits.append(patience.calls_at() - now)
        assert not patience.call_due(now + 0.999 * waits[-1])
        now = patience.calls_at()
    return waits


def test_waits_double_up_to_half_a_minute_and_half_of_each_is_chance() -> None:
    waits = called(9)
    for wait, longest in zip(waits, [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0, 30.0], strict=True):
        assert longest / 2 <= wait <= longest
    assert called(9) == waits
    assert called(9, "another") != waits


def test_once_the_broker_is_heard_the_next_call_comes_as_the_first() -> None:
    patience = Patience(LIMIT_S, "seed", 0.0)
    for _ in range(5):
        patience.called(0.0)
    patience.heard(1.0)
    patience.called(2.0)
    assert patience.calls_at() <= 3.0


def test_a_call_does_not_follow_another_within_a_second() -> None:
    patience = Patience(LIMIT_S, "seed", 0.0)
    patience.called(10.0)
    patience.heard(10.2)
    assert not patience.call_anew(10.5)
    assert patience.calls_at() == 11.0
    assert patience.call_anew(11.0)


def test_a_silence_is_told_once_and_ends_with_a_word() -> None:
    patience = Patience(LIMIT_S, "seed", 0.0)
    patience.settle(Network(heartbeat_s=1.0, timeout_s=6.0, resend_s=3.0))
    assert patience.resend_s == 3.0
    assert patience.fell_silent(5.9, calling=False) is None
    assert patience.fell_silent(6.0, calling=False) == "nothing heard from the broker for 6 s"
    assert patience.fell_silent(7.0, calling=False) is None
    assert patience.heard(8.0), "it was silent"
    assert not patience.heard(9.0)
    assert patience.fell_silent(11.0, calling=True) == "the broker does not answer yet"


def test_it_ends_after_so_much_silence_whatever_was_said_meanwhile() -> None:
    patience = Patience(LIMIT_S, "seed", 0.0)
    patience.heard(50.0)
    for now in (60.0, 100.0, 149.5):
        patience.said(now)
        assert patience.ended(now) is None
        assert patience.beats_at() <= 50.0 + LIMIT_S
    assert patience.ended(150.0) == "nothing heard from the broker for 100 s"


def test_a_broker_that_stopped_is_silent_until_one_is_heard() -> None:
    patience = Patience(LIMIT_S, "seed", 0.0)
    patience.stop()
    assert patience.silent
    assert patience.stopped
    patience.heard(1.0)
    assert not patience.silent
    assert not patience.stopped


@pytest.mark.parametrize(("now", "again", "enough"), [(0.9, False, False), (1.0, True, False), (10.0, True, True)])
def test_goodbye_is_said_each_second_for_ten(now: float, again: bool, enough: bool) -> None:
    patience = Patience(LIMIT_S, "seed", 0.0)
    patience.leaves(0.0)
    assert patience.leaves_at() == 1.0
    assert (patience.farewell_due(now), patience.unanswered(now)) == (again, enough)
