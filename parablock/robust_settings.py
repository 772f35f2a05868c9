"""The settings of robust aggregation, and which of the others they do not go with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from parablock.robust import fewest
from parablock.setting import key

if TYPE_CHECKING:
    from parablock.config import Config

Rule = Literal["mean", "median", "trimmed-mean", "krum", "multi-krum"]


@dataclass(frozen=True)
class Robust:
    """What the broker makes of contributions some of which may be bad (`parablock.robust`)."""

    rule: Rule = key(
        "mean",
        "what the clients' deltas become: their weighted mean; by element the median, or the mean without the "
        "`bad` smallest and largest; the one that is nearest to most others (krum), or the mean of those (multi-krum)",
    )
    bad: int = key(
        0,
        "bad clients of a round that the rule shall bear: at least 1, of at least 2*bad + 1 (median, trimmed-mean) or "
        "2*bad + 3 (krum, multi-krum); 0 with mean, which bears none",
        low=0,
        high=100_000,
    )
    chosen: int = key(
        0, "how many contributions multi-krum takes the mean of; 0: all but bad + 2, which is the most", low=0
    )
    clip: float = key(0.0, "a longer contribution is cut to this norm; 0: not", low=0)
    clip_ratio: float = key(
        0.0, "a contribution is cut to so many times the median of its round's norms; 0: not", low=0, high=1e6
    )

    @property
    def by_element(self) -> bool:
        """Whether the rule looks at each element by itself, and counts all clients alike."""
        return self.rule in ("median", "trimmed-mean")

    @property
    def by_distance(self) -> bool:
        """Whether the rule chooses among whole contributions."""
        return self.rule in ("krum", "multi-krum")

    @property
    def measured(self) -> bool:
        """Whether all of a contribution must be seen before any of it is folded."""
        return self.by_distance or bool(self.clip) or bool(self.clip_ratio)

    @property
    def fewest(self) -> int:
        """Fewest contributions of which anything is made, if none is refused."""
        return fewest(self.rule, self.bad)

    def still_bad(self, refused: int) -> int:
        """How many of a round's contributions may be bad, when so many others were refused as not finite: those were
        the work of bad clients, or of what is as good as such."""
        return max(self.bad - refused, 0)

    def too_few(self, number: int, refused: int) -> str | None:
        """Why nothing is made of so many contributions beside those that were refused; None if something is."""
        needed = fewest(self.rule, self.still_bad(refused))
        if number >= needed:
            return None
        beside = f" beside {refused} that are not finite" if refused else ""
        return (
            f"robust.rule = {self.rule} with robust.bad = {self.bad} makes nothing of fewer than {needed} "
            f"contributions{beside}, and {number} came"
        )

    def count(self, number: int, bad: int) -> int:
        """How many of `number` contributions, of which so many may be bad, a rule by distance counts."""
        most = number - bad - 2
        return 1 if self.rule == "krum" else min(self.chosen or most, most)


def objection(config: Config) -> str | None:
    """Why these settings do not go together, and what to do; None if they do."""
    robust, policy = config.robust, config.round
    if robust.clip and robust.clip_ratio:
        return "robust.clip and robust.clip_ratio exclude each other; set one of them to 0"
    if robust.chosen and robust.rule != "multi-krum":
        return f"robust.chosen = {robust.chosen} is for multi-krum only, and robust.rule = {robust.rule}; set it to 0"
    if robust.rule == "mean":
        if robust.bad:
            return (
                f"robust.bad = {robust.bad} with robust.rule = mean, which bears no bad client; set robust.rule to "
                "median, trimmed-mean, krum or multi-krum, or robust.bad to 0"
            )
        return None
    ruled = f"robust.rule = {robust.rule} with robust.bad = {robust.bad}"
    if not robust.bad:
        return f"{ruled} would bear no bad client; set robust.bad to how many it shall bear, or robust.rule to mean"
    if config.mode == "fedcybgd":
        return f"robust.rule = {robust.rule} does not go with mode = fedcybgd, in which a round is one client's alone"
    drawn = config.drawn(policy.clients)
    if drawn < robust.fewest:
        of = "" if drawn == policy.clients else f" of round.clients = {policy.clients}"
        return (
            f"{ruled} needs at least {robust.fewest} contributions a round, and {drawn}{of} clients train in one; "
            "lower robust.bad, take another rule, or have more clients"
        )
    if config.quorum < robust.fewest:
        return (
            f"{ruled} needs at least {robust.fewest} contributions, and round.quorum = {policy.quorum} lets a round "
            f"close with fewer; raise round.quorum to {robust.fewest} or more, or set it to 0"
        )
    if robust.chosen > drawn - robust.bad - 2:
        return (
            f"robust.chosen = {robust.chosen} is more than the {drawn - robust.bad - 2} of {drawn} contributions that "
            f"multi-krum can vouch for with robust.bad = {robust.bad} (all but bad + 2); lower it, or set it to 0"
        )
    return _excluded(config)


def _excluded(config: Config) -> str | None:
    """What no rule but the mean goes with."""
    rule = config.robust.rule
    if config.round.quorum_lost == "fewer":
        return (
            f"round.quorum_lost = fewer does not go with robust.rule = {rule}, which can bear no bad client among "
            "fewer; set it to wait or stop"
        )
    if config.round.late == "fold":
        return (
            f"round.late = fold does not go with robust.rule = {rule}: a client could have two contributions in one "
            "round, and count as two; set round.late to discard"
        )
    if config.solver.adaptive:
        return (
            f"solver.adaptive does not go with robust.rule = {rule}, which compares deltas, and those of clients that "
            "take more steps are longer; set solver.adaptive to false"
        )
    return None
