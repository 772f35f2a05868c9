"""How a setting is declared: its default, meaning, unit and range. `parablock.config` reads and checks them all."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def key(
    default: Any,
    meaning: str,
    *,
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    local: bool = False,
) -> Any:
    """A field of a frozen dataclass of settings: `low` and `high` are inclusive bounds, `above` an exclusive lower one.

    local: it stays on the machine that reads it.
    """
    metadata = {"meaning": meaning, "unit": unit, "low": low, "high": high, "above": above, "local": local}
    return field(default=default, metadata=metadata)
