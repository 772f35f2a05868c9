"""The conveyor: in order, each result once, errors told, few wake-ups, and an end that forgets the rest."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from parablock.conveyor import Conveyor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WAIT_S = 10.0


class Owner:
    """The owner's thread: what the conveyor asks to be called is done when the test says so."""

    def __init__(self) -> None:
        self.calls: deque[Callable[[], None]] = deque()
        self.asked = threading.Semaphore(0)
        self.wakeups = 0
        self.results: list[Any] = []
        self.errors: list[BaseException] = []
        self.conveyor: Conveyor[Any] = Conveyor("test", self._call_soon, self.results.append, self.errors.append)

    def _call_soon(self, call: Callable[[], None]) -> None:
        self.calls.append(call)
        self.asked.release()

    def turn(self) -> None:
        """Wait for a call and make it."""
        assert self.asked.acquire(timeout=WAIT_S)
        self.wakeups += 1
        self.calls.popleft()()

    def until(self, count: int) -> None:
        while len(self.results) + len(self.errors) < count:
            self.turn()


@pytest.fixture
def owner() -> Iterator[Owner]:
    made = Owner()
    yield made
    made.conveyor.close()


def test_results_come_in_the_order_of_the_jobs_each_once(owner: Owner) -> None:
    for number in range(200):
        owner.conveyor.put(lambda number=number: number)  # type: ignore[misc]
    owner.until(200)
    assert owner.results == list(range(200))
    assert owner.errors == []


def test_jobs_are_done_on_one_thread_and_results_on_the_owners(owner: Owner) -> None:
    for _ in range(3):
        owner.conveyor.put(threading.get_ident)
    owner.until(3)
    assert len(set(owner.results)) == 1
    assert owner.results[0] != threading.get_ident()


def test_an_error_is_told_in_its_place_and_the_others_go_on(owner: Owner) -> None:
    def fail() -> None:
        raise OSError("disk")

    owner.conveyor.put(lambda: 1)
    owner.conveyor.put(fail)
    owner.conveyor.put(lambda: 3)
    owner.until(3)
    assert owner.results == [1, 3]
    assert [str(error) for error in owner.errors] == ["disk"]


def test_a_burst_costs_one_wake_up(owner: Owner) -> None:
    done = threading.Event()
    for number in range(100):
        owner.conveyor.put(lambda number=number: number)  # type: ignore[misc]
    owner.conveyor.put(done.set)
    assert done.wait(WAIT_S)
    owner.conveyor.put(lambda: "last")
    owner.until(101)
    assert owner.wakeups <= 3, "all that had come by then was handed over at once"
    owner.conveyor.put(lambda: "again")
    owner.until(102)
    assert owner.results[-1] == "again"


def test_a_job_without_a_result_wakes_nobody(owner: Owner) -> None:
    for _ in range(100):
        owner.conveyor.put(lambda: None)
    owner.conveyor.put(lambda: "last")
    owner.until(1)
    assert (owner.results, owner.wakeups) == (["last"], 1)


def test_a_job_is_let_go_when_it_is_done(owner: Owner) -> None:
    class Frame:
        pass

    frame = Frame()
    gone = weakref.ref(frame)
    owner.conveyor.put(partial(id, frame))
    del frame
    owner.conveyor.put(lambda: "next")
    owner.until(2)
    assert gone() is None


def test_closing_waits_for_the_job_at_hand_and_forgets_the_others() -> None:
    owner = Owner()
    started, pause, done = threading.Event(), threading.Event(), []

    def slow() -> None:
        started.set()
        while not owner.conveyor._closed:
            pause.wait(0.001)
        done.append("slow")

    owner.conveyor.put(slow)
    owner.conveyor.put(lambda: done.append("never"))
    assert started.wait(WAIT_S)
    owner.conveyor.close()
    assert done == ["slow"]
    for call in owner.calls:
        call()
    assert owner.results == []
