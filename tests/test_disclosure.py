"""The disclosure: a worker says what the broker gets to see, and takes no part where that is more than it allows."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from typing import Any

import pytest

from parablock import config as settings
from parablock.config import ConfigError, from_dict
from workers.__main__ import parser
from workers.disclosure import told
from workers.setup import Local, prepare

LOCAL = Local("us", "builtin", "", (0, 64), "", "cpu", 1, False)
EIGHT: dict[str, Any] = {"round": {"clients": 8}, "secure": {"enabled": True}}
PRIVACY = {"clip": 1.0, "noise": 2.0, "budget": 8.0}


def terms(tree: dict[str, Any]) -> str:
    return json.dumps(settings.to_dict(from_dict(tree), shared_only=True))


@pytest.mark.parametrize(
    ("tree", "line"),
    [
        ({}, "not masked; the broker sees this worker's deltas, no noise is added"),
        ({"privacy": PRIVACY | {"where": "central"}}, "the broker sees this worker's deltas, the broker adds noise"),
        (EIGHT, "masked; the broker sees sums of at least 6 of 8 clients' deltas, no noise"),
        (
            {
                "round": {"clients": 8},
                "secure": {"enabled": True, "range": 100.0},
                "privacy": PRIVACY | {"where": "local"},
            },
            "sums of at least 6 of 8 clients' deltas, with this worker's own noise",
        ),
    ],
)
def test_it_says_what_the_broker_sees(tree: dict[str, Any], line: str, caplog: pytest.LogCaptureFixture) -> None:
    assert line in told(from_dict(tree))
    caplog.set_level(logging.INFO, "worker")
    prepare(terms(tree), LOCAL)
    assert line in caplog.text


@pytest.mark.parametrize(
    ("tree", "why"),
    [
        ({}, "the broker's says secure.enabled = false"),
        (EIGHT, "may be of 6 clients (secure.threshold), and this worker allows none of fewer than 7 (--min-summed)"),
    ],
)
def test_a_worker_takes_no_part_where_sums_are_of_fewer_than_it_allows(tree: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(why)):
        prepare(terms(tree), replace(LOCAL, min_summed=7))
    assert prepare(terms(EIGHT), replace(LOCAL, min_summed=6)).config.secure.enabled


@pytest.mark.parametrize("text", ["1", "129", "-3", "many"])
def test_a_sum_is_of_at_least_two(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args([f"--min-summed={text}"])
    assert f"a number of clients from 2 to 128; got '{text}'" in capsys.readouterr().err
