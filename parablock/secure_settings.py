"""The settings of secure aggregation, what follows from them, and which of the others they do not go with."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

from parablock.messages import MAX_SUMMED
from parablock.setting import key

if TYPE_CHECKING:
    from parablock.config import Config


@dataclass(frozen=True)
class Secure:
    """The broker learns the sum of the clients' deltas, and none of them (Bonawitz et al. 2017)."""

    enabled: bool = key(False, "contributions are masked, so that the broker learns only what they add up to")
    threshold: int = key(
        0,
        "clients of a round that must be left to unmask its sum, however few are there: at least 2 and more than half "
        "of those that train in one by round.clients; 0: two thirds, rounded up",
        low=0,
        high=MAX_SUMMED,
    )
    range: float = key(
        1.0,
        "largest absolute value in a delta; a client with a larger one abstains from the round. What is left of 32 "
        "bits is the fraction, so that a smaller range loses less",
        above=0,
        high=1e6,
    )

    def needed(self, clients: int) -> int:
        """t: how many of so many clients must be left to unmask a sum; more than half, so that no two groups can."""
        least = max(2, clients // 2 + 1)
        return max(least, self.threshold or -(-2 * clients // 3))


def fewest(config: Config) -> int:
    """Clients without which no sum is made, however few are there: t of as many as the settings want in a round."""
    return config.secure.needed(config.drawn(config.round.clients))


def most_tokens(config: Config) -> int:
    """n_max: a delta is multiplied by n / n_max before it is masked, n being the tokens that it was trained on."""
    if config.privacy.local:
        return 1  # all clients count alike
    solver = config.solver
    return solver.steps * solver.batch_size * solver.accumulate * config.data.max_tokens


def objection(config: Config) -> str | None:
    """Why these settings do not go together, and what to do; None if they do."""
    if not config.secure.enabled:
        return None
    drawn, policy, needed = config.drawn(config.round.clients), config.round, config.secure.needed
    if config.mode == "fedcybgd":
        return "secure.enabled does not go with mode = fedcybgd: the sum of one client's delta is that delta"
    if drawn < 2:
        return (
            f"secure.enabled needs at least 2 clients a round, and {drawn} of round.clients = {policy.clients} trains "
            "in one: its sum would be that client's delta; raise round.clients or round.fraction"
        )
    if drawn > MAX_SUMMED:
        return (
            f"secure.enabled bears at most {MAX_SUMMED} clients a round, as each exchanges keys with each, and {drawn} "
            f"of round.clients = {policy.clients} train in one; lower round.fraction"
        )
    if config.secure.threshold > drawn:
        return (
            f"secure.threshold = {config.secure.threshold} is more than the {drawn} clients that train in a round; "
            f"lower it to {drawn} or less, or set it to 0"
        )
    if 0 < config.secure.threshold < needed(drawn):
        return (
            f"secure.threshold = {config.secure.threshold} must be at least 2 and more than half of the {drawn} "
            f"clients that train in a round, or two groups could each unmask a sum; raise it to {needed(drawn)}, or "
            "set it to 0"
        )
    if 0 < policy.quorum < needed(drawn):
        return (
            f"round.quorum = {policy.quorum} is below the {needed(drawn)} clients that must be left to unmask a sum "
            f"(secure.threshold); raise round.quorum to {needed(drawn)} or more, or set it to 0"
        )
    return _excluded(config)


def _excluded(config: Config) -> str | None:
    if config.codec.up != "float32":
        return (
            f"codec.up = {config.codec.up} does not go with secure.enabled: masked values are whole 32-bit numbers, of "
            "which nothing can be left out; set codec.up to float32"
        )
    if config.round.late == "fold":
        return (
            "round.late = fold does not go with secure.enabled: a late contribution bears masks of a round that is "
            "closed; set round.late to discard"
        )
    if config.round.quorum_lost == "fewer":
        return (
            "round.quorum_lost = fewer does not go with secure.enabled: fewer than secure.threshold clients cannot "
            "unmask a sum; set it to wait or stop"
        )
    if config.privacy.central:
        return (
            "privacy.where = central does not go with secure.enabled: the broker cuts each delta, and sees only their "
            "sum; set privacy.where to local, or secure.enabled to false"
        )
    robust = config.robust
    if robust.rule != "mean" or robust.measured:
        what = "robust.clip" if robust.rule == "mean" else f"robust.rule = {robust.rule}"
        return (
            f"{what} does not go with secure.enabled: it looks at every single contribution, and the broker sees only "
            "their sum; set robust.rule to mean, and robust.clip and robust.clip_ratio to 0"
        )
    if config.solver.adaptive:
        return (
            "solver.adaptive does not go with secure.enabled: deltas of unequal numbers of steps are weighed one by "
            "one, and the broker sees only their sum; set solver.adaptive to false"
        )
    return None


def missing() -> str | None:
    """What has to be installed for secure aggregation, and how; None: nothing."""
    if importlib.util.find_spec("cryptography") is not None:
        return None
    return (
        "secure.enabled needs cryptography, which is not installed here: pip install -c constraints.txt -e '.[secure]'"
    )
