"""`parablock plan`: against a real broker and against an assumed link, and what it says of wrong input."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from parablock import builtin, cli
from parablock.plan import Cost
from parablock.units import format_rate
from tests.processes import Processes
from tests.test_trainable import adapters
from workers import plan_command, prober, timing
from workers.plan_command import main

if TYPE_CHECKING:
    from pathlib import Path

PLAIN = ("--allow-plain-tcp", "--broker")
SMALL = ("--threads", "1", "--set", "solver.steps=2", "--set", "solver.batch_size=1")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prober, "STREAM_S", 0.2)
    monkeypatch.setattr(prober, "PAUSE_S", 0.01)
    monkeypatch.setattr(timing, "_BLOCK_S", 0.0)
    monkeypatch.setattr(plan_command, "_PATIENCE_S", 10.0)


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[dict[str, Any], str]:
    assert main([*SMALL, *arguments, "--json"]) == 0
    *shown, last = capsys.readouterr().out.splitlines()
    result: dict[str, Any] = json.loads(last)
    return result, "\n".join(shown)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    assert main([*SMALL, *arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith("parablock plan: ")
    return captured.err


def test_this_machine_and_the_link_to_a_real_broker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Processes(tmp_path) as processes:
        result, shown = planned(capsys, "--broker", processes.endpoint(), *processes.contact(0))
        assert processes.broker.poll() is None
        assert "stranger" not in processes.broker_log.read_text()
    assert result["link"]["measured"]
    assert 0 < result["link"]["rtt_s"] < 1
    assert min(result["link"]["up_bytes_s"], result["link"]["down_bytes_s"]) > 1e6
    assert [block["index"] for block in result["blocks"]] == [0, 1, 2, 3]
    assert all(block["measured"] and block["step_s"] > 0 for block in result["blocks"])
    assert result["fedbcd_round_s"] == pytest.approx(result["compute_s"] + result["exchange_s"])
    assert result["compute_s"] <= result["parablock_round_s"] <= result["fedbcd_round_s"]
    assert "(measured, payload)" in shown


def test_an_assumed_link_that_is_too_slow(capsys: pytest.CaptureFixture[str]) -> None:
    result, shown = planned(capsys, "--rate", "100kbit", "--delay", "20ms", "--clients", "3")
    assert result["link"] == {
        "rtt_s": 0.04, "up_bytes_s": 12_500.0, "down_bytes_s": 12_500.0, "start_s": 0.0, "measured": False,
    }  # fmt: skip
    first = result["blocks"][0]
    assert first["upload_s"] == pytest.approx(first["bytes_up"] / 12_500)
    assert first["exposed_s"] == pytest.approx(first["exchange_s"] - result["blocks"][-1]["compute_s"])
    assert not result["hidden"]
    assert result["steps_to_hide"] == max(block["steps_to_hide"] for block in result["blocks"]) > 2
    assert f"solver.steps = {result['steps_to_hide']}" in shown
    assert "for 3 clients" in shown


def test_the_round_is_that_of_the_mode(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(timing.BlockTimer, "cost", lambda _timer, _block: Cost(0.01, 0.1))
    for mode in ("fedbcd", "parablock"):
        result, _ = planned(capsys, "--rate", "8mbit", "--set", f"mode={mode}")
        assert result["round_s"] == result[f"{mode}_round_s"]
    assert result["parablock_round_s"] < result["fedbcd_round_s"]


def test_the_brokers_link_carries_up_what_those_who_are_drawn_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(timing.BlockTimer, "cost", lambda _timer, _block: Cost(0.01, 0.1))
    result, shown = planned(capsys, "--rate", "8mbit", "--clients", "8", "--set", "round.fraction=0.25")
    each = sum(block["bytes_up"] for block in result["blocks"]) / len(result["blocks"]) / result["round_s"]
    assert result["sampled"] == 2
    told = f"for 8 clients, 2 of them drawn for a round, its own link carries {format_rate(2 * each)} in and "
    assert f"{told}{format_rate(8 * each)} out" in shown


def test_a_fast_link_hides_everything(capsys: pytest.CaptureFixture[str]) -> None:
    result, shown = planned(capsys, "--rate", "10GB/s", "--set", "schedule.order=importance")  # as its first sweep
    assert result["hidden"]
    assert (result["codec_to_hide"], result["num_blocks_to_hide"]) == (None, None)
    assert result["steps_to_hide"] <= 2
    assert "hidden    all of it" in shown


def test_more_blocks_or_a_codec_can_do_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # Four layers in one block cost a step as much as one by one, and have four times as much to exchange: at this
    # rate by the block 1.5 times as long as the compute. Two measurements of a busy machine may be further apart.
    monkeypatch.setattr(timing.BlockTimer, "cost", lambda _timer, _block: Cost(0.01, 0.1))
    whole, _ = planned(capsys, "--rate", "10GB/s", "--set", "blocks.num_blocks=1")
    (block,) = whole["blocks"]
    rate = 2 * block["bytes_up"] / (1.5 * block["compute_s"])
    result, shown = planned(capsys, "--rate", str(rate), "--set", "blocks.num_blocks=1")
    assert not result["hidden"]
    assert result["codec_to_hide"] in ("bfloat16", "int8", "int4")
    assert result["num_blocks_to_hide"] in (2, 3, 4)
    assert f"codec.up and codec.down = {result['codec_to_hide']}" in shown
    assert f"blocks.num_blocks = {result['num_blocks_to_hide']}" in shown


@pytest.mark.parametrize("mode", ["fedavg", pytest.param("lora", marks=adapters)])
def test_a_mode_without_blocks_waits_for_its_one_exchange(
    mode: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(timing.BlockTimer, "cost", lambda _timer, _block: Cost(0.01, 0.1))
    result, shown = planned(capsys, "--rate", "8mbit", "--delay", "20ms", "--set", f"mode={mode}", "--clients", "2")
    (block,) = result["blocks"]
    sides = 4 * (64 + 64) + 3 * (64 + 192)  # of the linear layers of one of the four layers, at rank 8
    assert block["numel"] == (builtin.model(0).num_parameters() if mode == "fedavg" else 4 * 8 * sides)
    assert block["exchange_s"] > 0.04 + block["bytes_up"] / 1e6
    assert result["round_s"] == pytest.approx(0.21 + block["exchange_s"])
    assert not {"hidden", "steps_to_hide", "fedbcd_round_s", "parablock_round_s"} & result.keys()
    assert f"round     {mode} {result['round_s']:.3f} s, with K = 2" in shown
    share = block["exchange_s"] / result["round_s"]
    assert f"hidden    nothing: {mode} waits for every exchange, {share:.0%} of a round" in shown
    assert "exposed" not in shown
    assert "for 2 clients its own link carries" in shown


@pytest.mark.parametrize(("mode", "instead"), [("lisa", "parablock"), ("fedcybgd", "fedbcd")])
def test_a_mode_whose_rounds_it_does_not_tell_is_refused(
    mode: str, instead: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refusal(capsys, "--rate", "1mbit", "--set", f"mode={mode}")
    assert f"how long rounds of mode = {mode} take" in told
    assert f"add --set mode={instead}" in told


def test_nobody_answers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(plan_command, "_PATIENCE_S", 0.2)
    # Port 9 is discard: nobody listens there.
    assert "no broker answers at tcp://127.0.0.1:9" in refusal(capsys, *PLAIN, "tcp://127.0.0.1:9", code=75)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "name the link: --invite"),
        (["--broker", "tcp://127.0.0.1:1", "--rate", "1mbit"], "name the link: --invite"),
        (["--rate", "0mbit"], "a rate must be above zero, got '0mbit'"),
        (["--rate", "fast"], "'fast' is not a rate"),
        (["--rate", "1mbit", "--delay", "soon"], "'soon' is not a time"),
        (["--broker", "tcp://127.0.0.1:1", "--delay", "5ms"], "--delay goes with --rate"),
        ([*PLAIN, "127.0.0.1:5557"], "an endpoint is tcp://HOST:PORT"),
        ([*PLAIN, "tcp://192.0.2.1:5557"], "beyond this machine"),
        (["--broker", "tcp://127.0.0.1:5557"], "--invite is missing"),
        (["--rate", "1mbit", "--clients", "0"], "--clients is a whole number above zero, got 0"),
        (["--rate", "1mbit", "--threads=-1"], "--threads is a whole number"),
        (["--rate", "1mbit", "--set", "solver.stepz=1"], "solver.step"),
        (["no-such.toml", "--rate", "1mbit"], "cannot read the config file no-such.toml"),
        (["--rate", "1mbit", "--data", "no-such.jsonl"], "no-such.jsonl"),
        (["--rate", "1mbit", "--device", "warp"], "there is no device called 'warp'"),
        (["--rate", "1mbit", "--set", "blocks.num_blocks=9"], "at most 4"),
        (["--rate", "1mbit", "--set", "solver.lr=1e30"], "diverged"),
    ],
)
def test_wrong_input_is_told(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert complaint in refusal(capsys, *arguments)


def test_it_is_a_command_of_parablock(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--rate", "0"]) == 2
    assert "above zero" in capsys.readouterr().err
