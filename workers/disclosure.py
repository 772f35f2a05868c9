"""The disclosure: what a run's settings have the broker see of this worker's deltas, and whether the worker agrees.

Settings are the broker's word; that it keeps to them with keys it is trusted for (README, "Secure aggregation").
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from parablock.config import ConfigError
from parablock.secure_settings import fewest

if TYPE_CHECKING:
    from parablock.config import Config

_NOISE = {
    "none": "no noise is added to them (privacy.where = none)",
    "central": "the broker adds noise to what it makes of them (privacy.where = central)",
    "local": "with this worker's own noise on them (privacy.where = local)",
}


def told(config: Config) -> str:
    """A line for the worker's start."""
    if config.secure.enabled:
        seen = f"masked; the broker sees sums of at least {fewest(config)} of {config.round.clients} clients' deltas"
    else:
        seen = "not masked; the broker sees this worker's deltas"
    return f"{seen}, {_NOISE[config.privacy.where]}"


def check_summed(config: Config, least: int) -> None:
    """Raises ConfigError where the broker would see a sum of fewer than `least` clients' deltas."""
    if not config.secure.enabled:
        raise ConfigError(
            "--min-summed is for runs whose contributions are masked, and the broker's says secure.enabled = false; "
            "leave it out if the broker may see this worker's deltas, or ask for secure.enabled = true"
        )
    if fewest(config) < least:
        raise ConfigError(
            f"the run's sums may be of {fewest(config)} clients (secure.threshold), and this worker allows none of "
            f"fewer than {least} (--min-summed); ask for a higher secure.threshold"
        )
