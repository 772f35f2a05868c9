"""What secure aggregation is refused with, and that each refusal says why and what to do."""

from __future__ import annotations

from typing import Any

import pytest

from parablock import secure_settings
from parablock.config import ConfigError, from_dict

ON = {"enabled": True}


@pytest.mark.parametrize(
    ("tree", "why"),
    [
        ({"mode": "fedcybgd"}, "the sum of one client's delta is that delta"),
        ({"round": {"clients": 1}}, "at least 2 clients a round, and 1 of round.clients = 1"),
        ({"round": {"clients": 4, "fraction": 0.25}}, "at least 2 clients a round, and 1 of round.clients = 4"),
        ({"round": {"clients": 129}}, "at most 128 clients a round"),
        ({"round": {"clients": 4}, "secure": ON | {"threshold": 5}}, "secure.threshold = 5 is more than the 4 clients"),
        ({"round": {"clients": 8, "fraction": 0.5}, "secure": ON | {"threshold": 5}}, "is more than the 4 clients"),
        ({"round": {"clients": 4}, "secure": ON | {"threshold": 2}}, "more than half of the 4 clients.*raise it to 3"),
        ({"round": {"clients": 2}, "secure": ON | {"threshold": 1}}, "must be at least 2.*raise it to 2"),
        ({"round": {"clients": 6, "quorum": 3}}, "round.quorum = 3 is below the 4 clients.*raise round.quorum to 4"),
        ({"codec": {"up": "int8"}}, "codec.up = int8 does not go.*set codec.up to float32"),
        ({"round": {"late": "fold"}}, "round.late = fold does not go.*set round.late to discard"),
        ({"round": {"quorum_lost": "fewer"}}, "round.quorum_lost = fewer does not go.*set it to wait or stop"),
        (
            {"privacy": {"where": "central", "clip": 1.0, "noise": 1.0, "budget": 8.0}},
            "privacy.where = central does not go.*set privacy.where to local",
        ),
        ({"round": {"clients": 3}, "robust": {"rule": "median", "bad": 1}}, "robust.rule = median does not go"),
        ({"robust": {"clip": 1.0}}, "robust.clip does not go.*sees only their sum"),
        ({"robust": {"clip_ratio": 2.0}}, "robust.clip does not go"),
        ({"solver": {"adaptive": True}}, "solver.adaptive does not go.*set solver.adaptive to false"),
    ],
)
def test_what_does_not_go_with_it_is_refused(tree: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        from_dict({"secure": ON} | tree)
    tree.pop("secure", None)
    from_dict(tree)  # without it all of this is right


@pytest.mark.parametrize("mode", ["parablock", "fedbcd", "fedavg", "lora", "ffa-lora", "lisa"])
def test_every_other_mode_goes_with_it(mode: str) -> None:
    config = from_dict({"mode": mode, "secure": ON, "round": {"clients": 8}, "codec": {"down": "int8"}})
    assert config.quorum == config.secure.needed(8) == 6
    assert from_dict({"round": {"clients": 8}}).quorum == 5


@pytest.mark.parametrize("range", [0.0, -1.0, 2e6, float("nan")])
def test_a_range_is_above_zero(range: float) -> None:
    with pytest.raises(ConfigError, match=r"secure\.range must be a number above 0, at most 1000000"):
        from_dict({"secure": ON | {"range": range}})


def test_what_is_not_installed_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert secure_settings.missing() is None
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert "pip install -c constraints.txt -e '.[secure]'" in str(secure_settings.missing())


def test_most_tokens_are_those_of_full_rows() -> None:
    config = from_dict({"solver": {"steps": 3, "batch_size": 5, "accumulate": 2}, "data": {"max_tokens": 7}})
    assert secure_settings.most_tokens(config) == 210
    private = {"where": "local", "clip": 1.0, "noise": 1.0, "budget": 8.0}
    config = from_dict({"secure": ON | {"range": 9.5}, "privacy": private})
    assert secure_settings.most_tokens(config) == 1, "all count alike"
