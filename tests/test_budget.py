"""The budget: what a run is before it begins, so that it is complete before the budget would be passed."""

from __future__ import annotations

from typing import Any

import pytest

from parablock.accountant import epsilon
from parablock.budget import plan
from parablock.config import Config, ConfigError, from_dict


def config(rounds: int = 24, noise: float = 2.0, budget: float = 8.0, each: int = 0, **tables: Any) -> Config:
    privacy = {"where": "central", "clip": 1.0, "noise": noise, "budget": budget, "rounds": each}
    return from_dict({"rounds": rounds, "privacy": privacy, **tables})


def test_a_run_has_no_more_rounds_than_the_budget_allows_and_says_so() -> None:
    planned = plan(config(rounds=24))
    most = planned.config.rounds
    assert epsilon(2.0, most, 1e-5) <= 8.0 < epsilon(2.0, most + 1, 1e-5)
    assert planned.config.privacy.rounds == most
    assert f"The budget allows {most} of 24 rounds: the run is complete after those" in planned.told
    assert f"epsilon is {epsilon(2.0, most, 1e-5):.4g} of 8 at delta 1e-05" in planned.told
    assert plan(planned.config).config == planned.config, "and goes on with the same"


def test_a_run_within_its_budget_stays_as_long_as_it_is() -> None:
    planned = plan(config(rounds=5))
    assert planned.config.rounds == 5
    assert "The budget allows" not in planned.told
    assert plan(from_dict({})).told == ""


@pytest.mark.parametrize(
    ("tables", "share"),
    [({"round": {"clients": 4, "fraction": 0.5}}, 2), ({"mode": "fedcybgd", "round": {"clients": 4}}, 4)],
)
def test_where_clients_take_turns_there_are_as_many_rounds_as_turns(tables: dict[str, Any], share: int) -> None:
    planned = plan(config(rounds=1000, noise=4.0, **tables)).config
    assert planned.rounds == share * planned.privacy.rounds
    assert epsilon(4.0, planned.privacy.rounds, 1e-5) <= 8.0
    assert plan(planned).config == planned


def test_lisa_trains_two_rounds_at_once_and_is_charged_for_both() -> None:
    planned = plan(config(rounds=24, noise=2.0, mode="lisa")).config
    assert planned.rounds % 2 == 0
    assert 0 < planned.rounds <= planned.privacy.rounds


def test_fewer_rounds_than_the_budget_allows_may_be_asked_for() -> None:
    assert plan(config(each=3)).config.rounds == 3


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"noise": 0.1}, r"one round spends an epsilon of 91\.8\d with privacy\.noise = 0\.1"),
        ({"each": 20}, r"privacy\.rounds = 20 would spend an epsilon of .*allows \d+ rounds"),
        ({"noise": 0.9, "budget": 5.0, "mode": "lisa"}, "allows a client 1 round, and mode = lisa trains 2 at once"),
    ],
)
def test_what_cannot_be_is_refused(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        plan(config(**wrong))


def private(**privacy: Any) -> dict[str, Any]:
    return {"privacy": {"where": "central", "clip": 1.0, "noise": 1.0, "budget": 8.0, **privacy}}


@pytest.mark.parametrize(
    ("tree", "told"),
    [
        (private(budget=0), r"needs privacy\.budget above 0: the epsilon before which the run stops"),
        (private(budget=-1.0), r"privacy\.budget must be a number at least 0"),
        (private(clip=0), r"needs privacy\.clip above 0"),
        (private(noise=0), r"needs privacy\.noise above 0"),
        (private(delta=0.0), r"privacy\.delta must be a number above 0"),
        (private(delta=1.0), r"privacy\.delta must be a number above 0, at most 0\.1"),
        (private(delta=1e-2) | {"round": {"clients": 100}}, r"set it far below 1 / 100"),
        (private(where="none"), r"privacy\.clip = 1 protects nobody with privacy\.where = none"),
        (private() | {"round": {"late": "fold"}}, "two contributions in one round, and the noise hides one"),
        (private() | {"round": {"weights": "tokens"}}, "in which all clients count alike"),
        (
            private(where="local") | {"secure": {"enabled": True, "range": 5.0}, "round": {"clients": 4}},
            r"secure\.range = 5 is too small for noise .* set it to 9 or more",
        ),
        (private() | {"robust": {"clip": 1.0}}, r"leave \[robust\] out, or set privacy\.where to local"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tree: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        from_dict(tree)


def test_where_each_client_adds_its_own_noise_the_broker_may_do_what_it_likes_with_it() -> None:
    """It is post-processing: a rule that bears bad clients, contributions that count late, weights (all are 1)."""
    median = {"robust": {"rule": "median", "bad": 1}, "round": {"clients": 3}}
    for tables in (median, {"round": {"late": "fold"}}, {"round": {"weights": "tokens"}}):
        assert from_dict(private(where="local") | tables).privacy.local
