from __future__ import annotations

from typing import TYPE_CHECKING

from broker.view import View
from parablock.config import from_dict
from parablock.manifest import Block, Manifest, Slot
from parablock.messages import Heartbeat

if TYPE_CHECKING:
    import pytest

MANIFEST = Manifest(tuple(Block(i, f"layer {i}", (Slot(f"w{i}", (4,), "float32", 0),)) for i in range(2)), ())
ROW = {
    "kind": "round",
    "round": 1,
    "block_name": "layer 1",
    "loss": 1.25,
    "round_s": 2.0,
    "compute_s": None,
    "epsilon": None,
}
EVALUATION = {"kind": "evaluation", "round": -1, "eval_loss": 2.5, "tokens": 10, "rows": 3, "answered": 2}


def one_after_the_other(round: int) -> int | None:
    return round % 2 if round < 4 else None


def test_without_a_terminal_there_is_one_line_per_round(capsys: pytest.CaptureFixture[str]) -> None:
    view = View(from_dict({"rounds": 4}), MANIFEST, one_after_the_other)
    view.start()
    view.show({**EVALUATION, "exact_match": 0.5})
    view.show({**ROW, "comm_s": 0.5, "exposed_s": 0.0})
    view.show({**EVALUATION, "round": 3, "exact_match": None})
    view.close()
    assert capsys.readouterr().err.splitlines() == [
        "before the first round: held-out loss 2.5000 over 10 tokens of 3 rows, exact match 50.0 % of 2",
        "round 2/4  layer 1  loss 1.2500  round 2.00 s  compute – s  exchange 0.50 s  waited 0.00 s",
        "after round 4: held-out loss 2.5000 over 10 tokens of 3 rows",
    ]


def test_on_a_terminal_there_is_a_row_per_client(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    view = View(from_dict({"rounds": 4, "solver": {"steps": 9}}), MANIFEST, one_after_the_other)
    view.start()
    for name in ("w1", "w0"):
        view.joined(name)
    view.began()
    view.heartbeat("w0", Heartbeat(0.0, 1, 7, "training"))
    view.heartbeat("stranger", Heartbeat(0.0, 1, 7, "training"))
    view.committed(0)
    view.heartbeat("w1", Heartbeat(0.0, 9, 7, "training"))  # a round that the broker knows nothing of
    view.show({**ROW, "comm_s": 0.5, "exposed_s": 0.0})
    view.gone("w1")
    view.close()
    told = capsys.readouterr().err
    assert "7/9" in told
    assert "layer 1" in told
    assert "stranger" not in told


def test_with_adaptive_steps_nobody_knows_how_many_there_will_be(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    view = View(from_dict({"solver": {"steps": 9, "adaptive": True}}), MANIFEST, one_after_the_other)
    view.start()
    view.joined("w0")
    view.heartbeat("w0", Heartbeat(0.0, 1, 17, "training"))
    view.close()
    told = capsys.readouterr().err
    assert "17" in told
    assert "17/" not in told


def test_what_a_peer_says_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    View(from_dict({}), MANIFEST, one_after_the_other).say(
        "a stranger dropped: there is no message of kind '[/a]' :smile:"
    )
    assert "'[/a]' :smile:" in capsys.readouterr().err


def test_what_has_been_spent_of_the_budget_is_in_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    privacy = {"where": "central", "clip": 1.0, "noise": 1.0, "budget": 20.0}
    view = View(from_dict({"rounds": 4, "privacy": privacy}), MANIFEST, one_after_the_other)
    view.show({**ROW, "comm_s": 0.5, "exposed_s": 0.0, "epsilon": 6.5734})
    assert capsys.readouterr().err.endswith("waited 0.00 s  ε 6.573 of 20\n")


def test_what_a_terminal_would_obey_is_shown_and_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    view = View(from_dict({}), MANIFEST, one_after_the_other)
    view.say("w0 left: \x1b]0;title\x07\x1b[2J\r\nround 9/9 done \u202egnol \ud800 Grüße · 你好")
    said = capsys.readouterr().err
    assert said == "w0 left: \\x1b]0;title\\x07\\x1b[2J\\r\\nround 9/9 done \\u202egnol \\ud800 Grüße · 你好\n"
