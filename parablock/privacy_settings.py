"""The settings of differential privacy, and which of the others they do not go with. What they promise is in
`parablock.accountant`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from parablock.setting import key

if TYPE_CHECKING:
    from parablock.config import Config

ROUNDING = 1e-6
"""So much more noise is added than asked for, as rounding may leave a delta that was cut a little too long."""


@dataclass(frozen=True)
class Privacy:
    """Client-level differential privacy: what a round tells of any one client is bounded by cutting and noise."""

    where: Literal["none", "central", "local"] = key(
        "none",
        "who cuts each client's delta to `clip` and adds noise: nobody; the broker, to their sum (central: the clients "
        "trust it); or each client, to its own before it leaves (local: far more noise for the same epsilon)",
    )
    clip: float = key(0.0, "norm to which each client's delta is cut; needed with central and local", low=0, high=1e6)
    noise: float = key(
        0.0,
        "noise multiplier z: standard deviation of the noise, in multiples of clip, on the sum of a round's deltas "
        "(central) or on each (local)",
        low=0,
        high=1e6,
    )
    delta: float = key(
        1e-5,
        "the chance with which epsilon may not hold; far below one in the number of clients",
        above=0,
        high=0.1,
    )
    budget: float = key(
        0.0,
        "the epsilon that no client's data may pass in the whole run; needed with central and local",
        low=0,
        high=1e3,
    )
    rounds: int = key(
        0, "rounds in which a client may take part; 0: as many as the budget allows, which the broker fills in", low=0
    )

    @property
    def private(self) -> bool:
        return self.where != "none"

    @property
    def central(self) -> bool:
        return self.where == "central"

    @property
    def local(self) -> bool:
        return self.where == "local"

    @property
    def deviation(self) -> float:
        """Standard deviation of the noise, of each element."""
        return self.noise * self.clip * (1.0 + ROUNDING)


def objection(config: Config) -> str | None:
    """Why these settings do not go together, and what to do; None if they do."""
    privacy = config.privacy
    given = [name for name in ("clip", "noise", "budget", "rounds") if getattr(privacy, name)]
    if not privacy.private:
        if given:
            return (
                f"privacy.{given[0]} = {getattr(privacy, given[0]):g} protects nobody with privacy.where = none; "
                "set privacy.where to central or local, or leave it out"
            )
        return None
    meanings = {
        "clip": "the norm to which each delta is cut (a run without privacy tells how long they are)",
        "noise": "the standard deviation of the noise in multiples of privacy.clip, as 1.0",
        "budget": "the epsilon before which the run stops, as 8.0",
    }
    for name, meaning in meanings.items():
        if name not in given:
            return f"privacy.where = {privacy.where} needs privacy.{name} above 0: {meaning}"
    clients = config.round.clients
    if privacy.delta * clients >= 1.0:
        return (
            f"privacy.delta = {privacy.delta:g} would allow that the data of one of round.clients = {clients} are told "
            f"outright; set it far below 1 / {clients}"
        )
    return _unlike_a_sum(config) if privacy.central else _beyond_range(config)


def _beyond_range(config: Config) -> str | None:
    """Where clients mask what has their noise: what it needs of the masked integers."""
    needed = config.privacy.clip + 8.0 * config.privacy.deviation
    if config.secure.enabled and config.secure.range < needed:
        return (
            f"secure.range = {config.secure.range:g} is too small for noise of privacy.noise = "
            f"{config.privacy.noise:g} times privacy.clip = {config.privacy.clip:g}: clients would abstain; set it to "
            f"{needed:.3g} or more"
        )
    return None


def _unlike_a_sum(config: Config) -> str | None:
    """What the central place does not go with: it promises something of a sum of which each client has one part."""
    if config.round.late == "fold":
        return (
            "round.late = fold does not go with privacy.where = central: a client could have two contributions in one "
            "round, and the noise hides one; set round.late to discard"
        )
    if (robust := config.robust).rule != "mean" or robust.clip or robust.clip_ratio:
        return (
            "settings of robust do not go with privacy.where = central, whose noise is made for a sum of deltas, each "
            "cut to privacy.clip; leave [robust] out, or set privacy.where to local"
        )
    if config.round.weights == "tokens":
        return (
            "round.weights = tokens does not go with privacy.where = central, in which all clients count alike: "
            "a weight would tell of a client's data and make its part longer; leave round.weights out"
        )
    return None
