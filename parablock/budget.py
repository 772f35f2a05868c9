"""The budget: how many rounds of a run it allows, and what they will have cost. Settled before a run begins.

Each client may take part in `privacy.rounds` rounds, the most after which epsilon is within the budget. Where all
train in every round, those are the run's rounds. Where clients are drawn, the run has as many as there are turns for
all of them, and whoever has had its turns is drawn no more (`parablock.agenda`). So the run is complete before the
budget would be passed, whoever comes and goes, and nothing has to be stopped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from parablock import config as settings
from parablock.accountant import epsilon, most_rounds
from parablock.config import ConfigError

if TYPE_CHECKING:
    from parablock.config import Config
    from parablock.privacy_settings import Privacy


@dataclass(frozen=True)
class Plan:
    """A run's settings as the budget allows them, and a sentence on it; "": the run is not private."""

    config: Config
    told: str


def plan(config: Config) -> Plan:
    """Fill in `privacy.rounds`, and cut `rounds` to what the budget allows. Of what it returns it changes nothing.

    Raises ConfigError where not even one round is within it, NoAccountantError where nothing can be worked out.
    """
    privacy = config.privacy
    if not privacy.private:
        return Plan(config, "")
    allowed = most_rounds(privacy.noise, privacy.delta, privacy.budget, config.rounds)
    if not allowed:
        raise ConfigError(
            f"one round spends an epsilon of {spent(privacy, 1)} with privacy.noise = {privacy.noise:g}, and "
            f"privacy.budget = {privacy.budget:g}; raise privacy.noise, or the budget"
        )
    if privacy.rounds > allowed and allowed < config.rounds:
        raise ConfigError(
            f"privacy.rounds = {privacy.rounds} would spend an epsilon of {spent(privacy, privacy.rounds)}, and "
            f"privacy.budget = {privacy.budget:g} allows {allowed} rounds; lower the one, or raise the other"
        )
    each = min(privacy.rounds or allowed, allowed)
    clients = config.round.clients
    turns = each * clients // config.sampled(clients)
    rounds = min(config.rounds, turns - turns % config.together)
    if not rounds:
        raise ConfigError(
            f"privacy.budget = {privacy.budget:g} allows a client {each} round, and mode = {config.mode} trains "
            f"{config.together} at once; raise privacy.noise, or the budget"
        )
    within = settings.from_dict(
        settings.to_dict(replace(config, rounds=rounds, privacy=replace(privacy, rounds=each)))
    )  # checked again, as there are fewer rounds
    return Plan(within, _told(config, within))


def spent(privacy: Privacy, rounds: int) -> str:
    """What so many rounds cost a client, in digits that matter. Raises NoAccountantError."""
    return f"{epsilon(privacy.noise, rounds, privacy.delta):.4g}"


def _told(config: Config, within: Config) -> str:
    privacy = within.privacy
    who = "the broker" if privacy.central else "each client"
    cost = (
        f"{privacy.where} privacy: {who} cuts deltas to {privacy.clip:g} and adds noise of {privacy.noise:g} times "
        f"that; a client takes part in at most {min(privacy.rounds, within.rounds)} rounds, after which epsilon is "
        f"{spent(privacy, min(privacy.rounds, within.rounds))} of {privacy.budget:g} at delta {privacy.delta:g}"
    )
    if within.rounds < config.rounds:
        cost += f". The budget allows {within.rounds} of {config.rounds} rounds: the run is complete after those"
    return cost
