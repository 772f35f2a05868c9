"""Rates, sizes and times as people type them."""

from __future__ import annotations

import pytest

from parablock.units import UnitError, counted, format_rate, parse_duration, parse_rate, parse_size


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [
        ("45mbit", 5.625e6), ("10mbit", 1.25e6), ("1gbit", 1.25e8), ("8 kbit/s", 1000.0), ("10Mbps", 10e6),
        ("5MB/s", 5e6), ("2.5MiB/s", 2.5 * 2**20), ("64KiB", 65536.0), ("5600000", 5.6e6), ("1e6", 1e6),
    ],
)  # fmt: skip
def test_rates_as_people_type_them(text: str, bytes_per_s: float) -> None:
    assert parse_rate(text) == bytes_per_s


@pytest.mark.parametrize("text", ["", "fast", "-1mbit", "10 mbits", "1kibit", "5MB/h", "1e400", "0", "0mbit"])
def test_a_rate_that_is_none_is_refused_with_what_came(text: str) -> None:
    with pytest.raises(UnitError, match=repr(text)):
        parse_rate(text)


def test_one_of_a_kind_is_no_plural() -> None:
    assert [counted(count, "block") for count in (0, 1, 2, 1000)] == ["0 blocks", "1 block", "2 blocks", "1,000 blocks"]


def test_sizes_and_times() -> None:
    assert [parse_size(text) for text in ("5MB", "64KiB", "65536", "1.5k")] == [5_000_000, 65536, 65536, 1500]
    assert [parse_duration(text) for text in ("50ms", "2s", "0.5", "1min")] == [0.05, 2.0, 0.5, 60.0]
    for parse in (parse_size, parse_duration):
        with pytest.raises(UnitError, match="soon"):
            parse("soon")
    assert format_rate(5.6e6) == "44.8 Mbit/s"
    assert format_rate(parse_rate("1gbit")) == "1 Gbit/s"
