"""The releases: what this client has told of its data in a run in which it adds its own noise, and may tell yet.

A contribution leaves at most once for each round, with one draw of noise, be it in several processes: if it was made
anew, the mean of the two would have less noise than is counted. So a round that a process began to send and has not
kept is not trained again, and no more leave than the budget allows, whatever the broker says: each counts with the
noise that it left with, be it another after the broker was started anew.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from parablock.accountant import epsilon_of
from parablock.config import ConfigError
from workers.state_folder import Released, StateError

if TYPE_CHECKING:
    from parablock.config import Config
    from workers.state_folder import State, StateFolder

STRICTEST_DELTA = 1e-5
"""With `--max-epsilon`, the broker's `privacy.delta` may not be larger."""


class Releases:
    """Of the worker whose folder this is, in a run. state: what an earlier process of it has left.

    Raises StateError where what that has sent cannot be told any more, DiskError, OSError and NoAccountantError.
    """

    def __init__(self, folder: StateFolder, run: str, state: State | None, config: Config) -> None:
        self._folder = folder
        self._run = run
        self._privacy = config.privacy
        released = folder.released(run)
        if released is None:
            if state is not None and state.position is not None:
                raise StateError(
                    f"{folder.path} does not tell what this worker has sent of its data; restore it from a backup, or "
                    "this worker's part in the run ends here"
                )
            released = Released()
            folder.write_released(run, released)
        self._released = released
        self._before = self._released.through  # what an earlier process has begun to send

    @property
    def epsilon(self) -> float:
        """What has left so far has cost so much, at `privacy.delta`."""
        return self._cost(self._released.spent)

    def _cost(self, spent: float) -> float:
        return epsilon_of(math.sqrt(spent), self._privacy.delta)

    @property
    def _after(self) -> float:
        """`Released.spent` with one more round."""
        return self._released.spent + self._privacy.noise**-2

    def refusal(self, round: int) -> str | None:
        """Why nothing may leave for a round that was not trained yet; None if it may."""
        if round <= self._before:
            return "an earlier process of this worker may have sent its contribution, and it has not kept it"
        if self._cost(self._after) > self._privacy.budget:
            return f"the worker has spent its privacy budget of {self._privacy.budget:g}"
        return None

    def release(self, round: int) -> None:
        """The contribution to this round is about to leave: on disk when this returns. Raises OSError."""
        assert round > self._released.through, f"round {round} a second time"
        released = Released(round, self._after)
        self._folder.write_released(self._run, released)
        self._released = released


def check_bound(config: Config, most: float) -> None:
    """Raises ConfigError where a run would cost this worker a higher epsilon than `most`."""
    privacy = config.privacy
    if not privacy.local:
        raise ConfigError(
            f"--max-epsilon is for runs in which this worker adds its own noise, and the broker's says privacy.where = "
            f"{privacy.where}; leave it out if you trust the broker, or ask for privacy.where = local"
        )
    if privacy.budget > most or privacy.delta > STRICTEST_DELTA:
        raise ConfigError(
            f"the run may cost an epsilon of privacy.budget = {privacy.budget:g} at privacy.delta = "
            f"{privacy.delta:g}, and this worker allows {most:g} at {STRICTEST_DELTA:g} (--max-epsilon)"
        )
