"""A conveyor: one thread that does jobs in the order in which they are put on it, and hands back their results.

Results go back to the thread that put the jobs on, in order, as many at a time as have come together meanwhile, so that
a burst of small jobs costs that thread one wake-up and not one a job, and jobs without a result none. What the jobs are
is the owner's business.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

R = TypeVar("R")


class Conveyor(Generic[R]):
    """call_soon: runs a function on the owner's thread, from any thread (an event loop's `call_soon_threadsafe`).

    on_result: called there with each result but None. on_error: with the exception of a job that failed; the others go
    on.
    """

    def __init__(
        self,
        name: str,
        call_soon: Callable[[Callable[[], None]], object],
        on_result: Callable[[R], None],
        on_error: Callable[[BaseException], None],
    ) -> None:
        self._call_soon = call_soon
        self._on_result = on_result
        self._on_error = on_error
        self._jobs: queue.SimpleQueue[Callable[[], R | None] | None] = queue.SimpleQueue()
        self._results: deque[tuple[R | None, BaseException | None]] = deque()
        self._called = threading.Event()  # the owner's thread will look at the results
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, job: Callable[[], R | None]) -> None:
        self._jobs.put(job)

    def close(self) -> None:
        """Wait for the job that is being done, and forget the others and all results."""
        self._closed = True
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None and not self._closed:
            try:
                if (result := job()) is not None:
                    self._results.append((result, None))
                del result
            except BaseException as error:
                self._results.append((None, error))
            del job  # what it holds on to must not wait for the next one
            if self._results and not self._called.is_set() and not self._closed:
                self._called.set()
                self._call_soon(self._hand_over)

    def _hand_over(self) -> None:
        self._called.clear()  # first: what is done from here on calls again
        while self._results and not self._closed:
            result, error = self._results.popleft()
            if error is not None:
                self._on_error(error)
            else:
                self._on_result(result)  # type: ignore[arg-type]
