"""A delta as it may leave this client: cut, and with noise (`privacy.where = "local"`). Nothing else of it is sent."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

from parablock.noise import private

if TYPE_CHECKING:
    import numpy.typing as npt

    from parablock.noise import Noise
    from parablock.privacy_settings import Privacy
    from workers.outbox import Leaving

    Vector = npt.NDArray[np.float32]


class Noised:
    """`workers.outbox.Leaving` of another one. Its noise is drawn once, by whoever waits for it first: what is sent
    again is the same, bit for bit. Any thread may wait."""

    def __init__(self, delta: Leaving, privacy: Privacy, noise: Noise) -> None:
        self.numel = delta.numel
        self._delta = delta
        self._privacy = privacy
        self._noise = noise
        self._lock = threading.Lock()
        self._values: Vector | None = None

    def wait(self) -> Vector:
        with self._lock:
            if self._values is None:
                self._values = private(self._delta.wait(), self._privacy, self._noise)
                self._values.flags.writeable = False
            return self._values


class Nothing:
    """What a training has made that came to nothing, as `workers.outbox.Leaving`."""

    def __init__(self, numel: int) -> None:
        self.numel = numel

    def wait(self) -> Vector:
        return np.zeros(self.numel, np.float32)
