"""The releases: what a worker has told of its data is known to every process of it, and is never told twice."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from parablock import config as settings
from parablock.accountant import epsilon, epsilon_of, most_rounds
from parablock.config import Config, ConfigError, from_dict
from workers.releases import Releases
from workers.setup import Local, prepare
from workers.state_folder import Identity, Position, Released, State, StateError, StateFolder

if TYPE_CHECKING:
    from pathlib import Path

LOCAL = {"where": "local", "clip": 1.0, "noise": 2.0, "budget": 8.0}


def config(**privacy: Any) -> Config:
    return from_dict({"rounds": 24, "privacy": LOCAL | privacy})


def opened(path: Path, run: str = "run-1") -> tuple[StateFolder, State | None]:
    folder = StateFolder(path)
    return folder, folder.begin(Identity("us", run, "d1"))


def test_what_has_left_is_on_disk_before_it_leaves_and_counts_for_the_next_process(tmp_path: Path) -> None:
    folder, state = opened(tmp_path / "state")
    releases = Releases(folder, "run-1", state, config())
    assert (releases.epsilon, releases.refusal(0)) == (0.0, None)
    releases.release(0)
    releases.release(3)  # between those it sat out
    assert folder.released("run-1") == Released(3, 2 / 2.0**2)
    assert releases.epsilon == pytest.approx(epsilon(2.0, 2, 1e-5), rel=1e-9)
    folder.close()
    folder, state = opened(tmp_path / "state")
    again = Releases(folder, "run-1", state, config())
    assert again.epsilon == releases.epsilon
    assert "may have sent" in str(again.refusal(3)), "it has not kept that one, or it would not be asked for"
    assert again.refusal(4) is None
    with pytest.raises(AssertionError, match="round 3 a second time"):
        again.release(3)
    folder.close()


def test_that_it_leaves_outlives_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, state = opened(tmp_path / "state")
    releases = Releases(folder, "run-1", state, config())
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(descriptor), fsync(descriptor))[1])
    releases.release(0)
    assert len(synced) == 2, "the file, and the folder's entry"
    folder.close()


def test_no_more_leave_than_the_budget_allows_whatever_the_broker_says(tmp_path: Path) -> None:
    folder, state = opened(tmp_path / "state")
    releases = Releases(folder, "run-1", state, config(rounds=0))
    most = most_rounds(2.0, 1e-5, 8.0, 24)
    for round in range(most):
        assert releases.refusal(round) is None
        releases.release(round)
    assert releases.refusal(most) == "the worker has spent its privacy budget of 8"
    assert releases.epsilon <= 8.0
    folder.close()


def test_where_it_is_lost_what_has_left_nothing_leaves_any_more(tmp_path: Path) -> None:
    folder, state = opened(tmp_path / "state")
    Releases(folder, "run-1", state, config()).release(0)
    folder.write_position(Position(1))
    folder.close()
    path = tmp_path / "state" / "released" / "run-1.safetensors"
    assert path.stat().st_mode & 0o777 == 0o600
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + b"\0" * 9)
    folder, state = opened(tmp_path / "state")
    with pytest.raises(StateError, match="cannot be known any more, and may not be told twice; restore"):
        Releases(folder, "run-1", state, config())
    path.unlink()
    with pytest.raises(StateError, match="does not tell what this worker has sent of its data"):
        Releases(folder, "run-1", state, config())
    folder.close()


def test_a_broker_that_asks_for_other_noise_finds_spent_what_has_left_with_less(tmp_path: Path) -> None:
    """Each round counts with its own noise multiplier: Σ 1/z²."""
    folder, state = opened(tmp_path / "state")
    releases = Releases(folder, "run-1", state, config(noise=2.0))
    for round in range(4):
        releases.release(round)
    folder.close()
    folder, state = opened(tmp_path / "state")
    quiet = Releases(folder, "run-1", state, config(noise=10.0, budget=4.0))
    assert quiet.epsilon == pytest.approx(epsilon(2.0, 4, 1e-5), rel=1e-9)
    assert quiet.epsilon > 4.0
    assert quiet.refusal(4) == "the worker has spent its privacy budget of 4"
    more = Releases(folder, "run-1", state, config(noise=10.0))
    round = 4
    while more.refusal(round) is None:
        more.release(round)
        round += 1
    spent = 4 / 2.0**2 + (round - 4) / 10.0**2
    assert epsilon_of(spent**0.5, 1e-5) <= 8.0 < epsilon_of((spent + 0.01) ** 0.5, 1e-5)
    folder.close()


def test_another_runs_are_another_budget_and_the_same_runs_are_the_same(tmp_path: Path) -> None:
    """Of two runs by turns, under another manifest, and after the run has ended here."""
    folder, state = opened(tmp_path / "state")
    releases = Releases(folder, "run-1", state, config())
    releases.release(0)
    folder.close()
    folder, state = opened(tmp_path / "state", run="run-2")
    assert Releases(folder, "run-2", state, config()).epsilon == 0.0
    folder.close()
    folder, state = opened(tmp_path / "state")
    assert Releases(folder, "run-1", state, config()).epsilon == releases.epsilon
    folder.close()
    folder = StateFolder(tmp_path / "state")
    state = folder.begin(Identity("us", "run-1", "d2"))
    assert state is None
    again = Releases(folder, "run-1", state, config())
    assert (again.epsilon, again.refusal(0) is None) == (releases.epsilon, False)
    folder.remove()
    folder.close()
    assert sorted(path.name for path in (tmp_path / "state" / "released").iterdir()) == [
        "run-1.safetensors",
        "run-2.safetensors",
    ]
    folder, state = opened(tmp_path / "state")
    assert Releases(folder, "run-1", state, config()).epsilon == releases.epsilon
    folder.close()


@pytest.mark.parametrize(
    ("tree", "told"),
    [
        ({}, "the broker's says privacy.where = none"),
        ({"privacy": LOCAL | {"where": "central"}}, "the broker's says privacy.where = central"),
        ({"privacy": LOCAL | {"budget": 9.0}}, "privacy.budget = 9 at privacy.delta = 1e-05, and this worker allows 8"),
        ({"privacy": LOCAL | {"delta": 1e-3}}, "privacy.delta = 0.001, and this worker allows 8 at 1e-05"),
    ],
)
def test_a_worker_takes_no_part_in_what_costs_it_more_than_it_allows(tree: dict[str, Any], told: str) -> None:
    local = Local("us", "builtin", "", (0, 64), "", "cpu", 1, False, max_epsilon=8.0)
    terms = json.dumps(settings.to_dict(from_dict(tree), shared_only=True))
    with pytest.raises(ConfigError, match=re.escape(told)):
        prepare(terms, local)
    within = json.dumps(settings.to_dict(config(), shared_only=True))
    if not tree:
        assert prepare(within, local).config.privacy.local
        assert prepare(terms, replace(local, max_epsilon=float("inf"))).config.privacy.where == "none"
