"""Rates, sizes, times and numbers as people type and read them: "45mbit", "64KiB", "50ms", "1,2,4", "1 block".

Prefixes are decimal (k, M, G) unless written with an i (Ki, Mi, Gi). This module knows no link.
"""

from __future__ import annotations

import math
import re
from typing import TypeVar

Number = TypeVar("Number", int, float)

_BYTES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "min": 60.0}
_NUMBER = r"\s*(\d+(?:\.\d*)?(?:e[+-]?\d+)?)\s*"


class UnitError(ValueError):
    """A quantity is not written as expected. The message says what came and gives examples."""


def parse_rate(text: str) -> float:
    """Bytes per second from "45mbit", "1gbit", "5MB/s", "2.5MiB/s", or a plain number of bytes per second.

    Raises UnitError for anything else, and for zero: a link that carries nothing is a cut, not a rate.
    """
    pattern = _NUMBER + r"(?:([kmg]?)(bit)|([kmg]i?|)b?)(?:/s|ps)?"
    match = re.fullmatch(pattern, text, re.IGNORECASE)
    if match is None:
        raise UnitError(f"{text!r} is not a rate; write it like 45mbit, 1gbit, 5MB/s or 5600000 (bytes/s)")
    number, bit_prefix, bit, byte_prefix = match.groups()
    rate = float(number) * _BYTES[(bit_prefix if bit else byte_prefix).lower()] / (8 if bit else 1)
    if not 0 < rate < math.inf:
        raise UnitError(f"a rate must be above zero, got {text!r}; to stop a link, cut it")
    return rate


def parse_size(text: str) -> int:
    """Bytes from "64KiB", "5MB" or a plain number. Raises UnitError for anything else."""
    match = re.fullmatch(_NUMBER + r"([kmg]i?|)b?", text, re.IGNORECASE)
    if match is None:
        raise UnitError(f"{text!r} is not a size; write it like 64KiB, 5MB or 65536")
    return round(float(match[1]) * _BYTES[match[2].lower()])


def parse_duration(text: str) -> float:
    """Seconds from "50ms", "2s", "1min" or a plain number of seconds. Raises UnitError for anything else."""
    match = re.fullmatch(_NUMBER + r"(s|ms|us|min|)", text, re.IGNORECASE)
    if match is None:
        raise UnitError(f"{text!r} is not a time; write it like 50ms, 2s or 0.05 (seconds)")
    return float(match[1]) * _SECONDS[match[2].lower()]


def parse_numbers(text: str, kind: type[Number], option: str) -> tuple[Number, ...]:
    """Numbers above zero from "1,2,4". option: whose value it is, for the message. Raises UnitError otherwise."""
    try:
        numbers = tuple(kind(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(0 < number < 1e6 for number in numbers):
        raise UnitError(f"{option} takes numbers above zero, separated by commas; got {text!r}")
    return numbers


def counted(count: int, noun: str) -> str:
    """ "1 block", "2 blocks", "1,000 blocks". noun: in the singular, with a regular plural."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def format_rate(rate: float) -> str:
    """A rate in bytes per second as bits, which is how links are sold: 5.6e6 is "44.8 Mbit/s"."""
    for unit, size in (("Gbit/s", 1e9), ("Mbit/s", 1e6), ("kbit/s", 1e3)):
        if rate * 8 >= size:
            return f"{rate * 8 / size:.3g} {unit}"
    return f"{rate * 8:.3g} bit/s"
