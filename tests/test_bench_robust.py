"""The robustness benchmark: its attacks, rows by hand, one small run, and what it refuses."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING

import numpy as np
import pytest

from bench import robust
from bench.attacks import ATTACKS, Attack

if TYPE_CHECKING:
    from pathlib import Path

DELTAS = {n: np.random.default_rng(n).standard_normal(50, np.float32) for n in range(5)}
HONEST = np.mean([DELTAS[n] for n in (2, 3, 4)], axis=0)


def sent(kind: str, round: int = 0, seed: int = 0) -> dict[int, np.ndarray]:
    return Attack(kind, 2, seed)(round, DELTAS)


@pytest.mark.parametrize("kind", ATTACKS)
def test_honest_clients_send_what_they_have_made(kind: str) -> None:
    forged = sent(kind)
    assert all(forged[client] is DELTAS[client] for client in (2, 3, 4))
    assert all(forged[client].tobytes() != DELTAS[client].tobytes() for client in (0, 1))
    assert {each.dtype for each in forged.values()} == {np.dtype(np.float32)}


def test_attacks_by_hand() -> None:
    np.testing.assert_allclose(sent("flipped")[1], -5.0 * DELTAS[1])
    np.testing.assert_allclose(sent("equal")[0], -5.0 * HONEST, rtol=1e-4, atol=1e-6)
    assert sent("equal")[0].tobytes() == sent("equal")[1].tobytes()
    assert np.isnan(sent("nan")[0]).sum() == 1
    assert np.linalg.norm(sent("random")[0]) == pytest.approx(10.0 * np.linalg.norm(DELTAS[0]), rel=1e-5)
    hidden = sent("hidden")[0]
    assert np.linalg.norm(hidden) == pytest.approx(np.median([np.linalg.norm(DELTAS[n]) for n in (2, 3, 4)]), rel=1e-5)
    assert float(hidden @ HONEST) / np.linalg.norm(hidden) / np.linalg.norm(HONEST) == pytest.approx(-1.0, abs=1e-5)


def test_noise_is_that_of_the_seed_the_round_and_the_client() -> None:
    assert sent("random")[0].tobytes() == sent("random")[0].tobytes()
    others = {sent("random")[0].tobytes(), sent("random")[1].tobytes(), sent("random", 1)[0].tobytes()}
    assert len(others | {sent("random", seed=1)[0].tobytes()}) == 4


def test_a_row_by_hand() -> None:
    found = {
        ("mean", "none", 0): 2.0,
        ("median", "none", 0): 2.5,
        ("median", "flipped", 0): 3.0,
        ("mean", "flipped", 0): math.nan,
    }
    row = robust.row("median", "flipped", [0], found)
    assert (row["gap_pct"], row["gap_to_own_pct"]) == (pytest.approx(50.0), pytest.approx(20.0))
    assert row["within_bar"] is False
    assert robust.row("median", "none", [0], found | {("median", "none", 0): 2.09})["within_bar"] is True
    blown = robust.row("mean", "flipped", [0], found)
    assert (blown["final_losses"], blown["gap_pct"], blown["within_bar"]) == ([None], None, False)
    assert robust.plot([row, blown])


def test_a_small_run_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "robust.json"
    smaller = ("rounds=2", "eval.rows=2", "solver.batch_size=1")
    assert robust.main(["--quick", *(f"--set={setting}" for setting in smaller), "--out", str(out)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads(out.read_text(encoding="utf-8"))
    rows = {(row["rule"], row["attack"]): row for row in told["rows"]}
    assert set(rows) == {(rule, attack) for rule in ("mean", "median") for attack in ("none", "flipped")}
    assert rows["mean", "none"]["gap_pct"] == 0.0
    assert rows["mean", "flipped"]["final_losses"] != rows["mean", "none"]["final_losses"], "it is attacked"
    assert out.with_suffix(".png").stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rules", "best"], "--rules takes mean, .*; got best"),
        (["--attacks", "all"], "--attacks takes flipped, .*; got all"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--bad", "0"], "--bad must be at least 1 and below --clients = 7, got 0"),
        (["--bad", "3"], r"robust.bad = 3 needs at least 9 contributions"),
        (["--set", "codec.up=int8"], "codecs are not simulated"),
    ],
)
def test_what_cannot_be_run_is_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert robust.main(arguments) == 2
    assert re.search(said, capsys.readouterr().err)
