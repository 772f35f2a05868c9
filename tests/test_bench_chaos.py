"""The chaos run's parts: its plan, each of its invariants against a planted violation, its measures, its output."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from bench import chaos, chaos_plan, chaos_run, invariants, listener, recoveries, synthetic
from bench.chaos_plan import BROKER, Shape
from bench.chaos_run import Seen
from bench.figures import FiguresError
from bench.invariants import Exit, Held
from bench.listener import Ear, Line
from bench.recoveries import Act, Recovery
from bench.victims import Victim
from parablock import config
from parablock.saved import Entry
from tests.shown import shown

if TYPE_CHECKING:
    from collections.abc import Sequence

SHAPE = Shape(kills=40, clients=("a", "b", "c"), linked=("b",), spacing=10, longest_s=3.0)

# The plan -----------------------------------------------------------------------------------------------------


def test_a_plan_follows_from_its_seed() -> None:
    assert chaos_plan.plan(3, SHAPE) == chaos_plan.plan(3, SHAPE)
    assert chaos_plan.plan(3, SHAPE) != chaos_plan.plan(4, SHAPE)


def test_a_plan_has_the_kills_that_were_asked_for_and_every_kind_of_fault() -> None:
    faults = chaos_plan.plan(0, SHAPE)
    kills = [fault for fault in faults if fault.kind == "kill"]
    assert len(kills) == SHAPE.kills
    assert {fault.kind for fault in faults} == {"kill", "stop", "cut", "stall"}
    assert {fault.target for fault in kills} == {BROKER, "a", "b", "c"}
    assert {fault.target for fault in faults if fault.kind in ("cut", "stall")} == {"b"}
    assert all(0 <= fault.lasts_s <= SHAPE.longest_s for fault in faults)


def test_faults_come_in_order_and_some_at_once_upon_another() -> None:
    faults = chaos_plan.plan(1, SHAPE)
    gaps = [after.rounds - before.rounds for before, after in pairwise(faults)]
    assert min(gaps) == 0 < max(gaps) <= 2 * SHAPE.spacing
    assert chaos_plan.rounds(faults) == faults[-1].rounds + chaos_plan.TAIL


def test_without_links_only_processes_are_stopped_and_killed() -> None:
    faults = chaos_plan.plan(0, dataclasses.replace(SHAPE, linked=()))
    assert {fault.kind for fault in faults} == {"kill", "stop"}


# The invariants, each with a violation that it catches --------------------------------------------------------


def entry(round: int, contributors: Sequence[str] = ("a", "b"), block: int | None = None) -> Entry:
    """As the updates of `synthetic.update` give it, for blocks of 8 elements."""
    made = [synthetic.update(client, round, 8) for client in contributors]
    return Entry(
        round=round,
        block=round % 2 if block is None else block,
        attempt=1 if contributors else 0,
        base=-1,
        contributors=tuple(contributors),
        weights=tuple(update.weight for update in made),
        steps=tuple(update.steps for update in made),
        losses=tuple(update.loss for update in made),
        moved=0.0,
        late=0,
        bytes_up=0,
        bytes_down=0,
        reason="",
        agenda={},
        clients=("a", "b"),
        tardy=(),
    )


def told(entry: Entry, client: str, **changes: Any) -> Line:
    counted = client in entry.contributors
    line = Line(1.0, "commit", 1, entry.round, entry.block, entry.attempt, len(entry.contributors), counted)
    return dataclasses.replace(line, **changes)


def gave(client: str, round: int, **changes: Any) -> Line:
    update = synthetic.update(client, round, 8)
    line = Line(1.0, "contribute", 0, round, round % 2, weight=update.weight, steps=update.steps, loss=update.loss)
    return dataclasses.replace(line, **changes)


ENTRIES = [entry(0), entry(1, ("a",)), entry(2, ()), entry(3, ("b",))]


def test_a_good_journal_has_nothing_wrong() -> None:
    assert [*invariants.history(ENTRIES), *invariants.unchanged(ENTRIES[:2], ENTRIES)] == []


@pytest.mark.parametrize(
    ("entries", "complaint"),
    [
        ([entry(0), entry(2)], "entry 1 of the journal is of round 2"),
        ([entry(0), entry(1), entry(1)], "entry 2 of the journal is of round 1"),
        ([entry(0, ("a", "a"))], "round 0 counts somebody twice"),
        ([dataclasses.replace(entry(0), weights=(1,))], "not one weight"),
        ([dataclasses.replace(entry(0, ()), attempt=1)], "is of attempt 1 and counts 0"),
    ],
)
def test_a_round_that_is_missing_or_counts_twice_is_found(entries: list[Entry], complaint: str) -> None:
    assert any(complaint in wrong for wrong in invariants.history(entries))


def test_a_journal_that_lost_or_rewrote_a_round_is_found() -> None:
    assert list(invariants.unchanged(ENTRIES, ENTRIES[:3])) == ["the journal had 4 rounds, and then 3"]
    (wrong,) = invariants.unchanged(ENTRIES[:1], [entry(0, ("b",))])
    assert wrong.startswith("round 0 was rewritten")


def test_epochs_that_do_not_rise_are_found() -> None:
    assert list(invariants.epochs_rise([1, 2, 5])) == []
    assert list(invariants.epochs_rise([1, 2, 2])) == ["epoch 2 came after epoch 2"]


def test_a_commit_that_was_announced_and_is_not_in_the_journal_is_found() -> None:
    lines = [told(each, "a") for each in ENTRIES]
    assert list(invariants.announced("a", lines, ENTRIES)) == []
    assert len(list(invariants.announced("a", lines, ENTRIES[:3]))) == 1


@pytest.mark.parametrize("change", [{"block": 1}, {"attempt": 2}, {"contributors": 1}, {"counted": False}])
def test_a_commit_that_was_announced_otherwise_is_found(change: dict[str, Any]) -> None:
    assert len(list(invariants.announced("a", [told(ENTRIES[0], "a", **change)], ENTRIES))) == 1


def test_a_block_in_full_is_of_no_attempt() -> None:
    assert list(invariants.announced("a", [told(ENTRIES[0], "a", attempt=0)], ENTRIES)) == []


def test_a_client_that_an_old_broker_started_after_a_new_one_is_found() -> None:
    starts = [Line(1.0, "start", epoch) for epoch in (1, 1, 2)]
    assert list(invariants.forward("a", starts)) == []
    assert list(invariants.forward("a", [*starts, Line(2.0, "start", 1)])) == ["a was started by epoch 1 after epoch 2"]


def test_a_client_that_trains_a_round_again_is_found() -> None:
    rounds = [gave("a", 0), gave("a", 1), Line(2.0, "born"), gave("a", 1)]
    assert list(invariants.forward("a", rounds)) == []  # another process, which had not kept it
    assert list(invariants.forward("a", [*rounds, gave("a", 1)])) == ["a trained round 1 after round 1"]


def test_a_client_that_trained_another_block_than_the_journals_is_found() -> None:
    assert list(invariants.agreed("a", [gave("a", 0), gave("a", 9, block=7)], ENTRIES)) == []
    wrong = list(invariants.agreed("a", [gave("a", 1, block=0)], ENTRIES))
    assert wrong == ["a trained block 0 in round 1, which is of 1"]


def test_a_contribution_that_nobody_made_is_found() -> None:
    lines = {"a": [gave("a", 0), gave("a", 1)], "b": [gave("b", 0), gave("b", 3)]}
    assert list(invariants.given(lines, ENTRIES)) == []
    (wrong,) = invariants.given({**lines, "b": [gave("b", 0), gave("b", 3, weight=10_000)]}, ENTRIES)
    assert "round 3 counts b" in wrong
    assert len(list(invariants.given({"a": lines["a"]}, ENTRIES))) == 2


@pytest.mark.parametrize(
    ("exit", "wrong"),
    [
        (Exit("a", -9, killed=True, complete=False), 0),
        (Exit("a", 0, killed=False, complete=True), 0),
        (Exit("a", 0, killed=False, complete=False), 1),
        (Exit("a", 75, killed=False, complete=True), 1),
        (Exit("a", -9, killed=False, complete=False), 1),
    ],
)
def test_whoever_ends_by_itself_is_found(exit: Exit, wrong: int) -> None:
    assert len(list(invariants.exits([exit]))) == wrong


def test_half_written_files_are_found(tmp_path: Path) -> None:
    (tmp_path / "blocks").mkdir()
    (tmp_path / "blocks" / "0000-000001.safetensors").touch()
    assert list(invariants.leftovers(tmp_path)) == []
    (tmp_path / "blocks" / ".0000-000002.safetensors.partial").touch()
    assert list(invariants.leftovers(tmp_path)) == ["blocks/.0000-000002.safetensors.partial was left behind"]


def test_a_round_that_the_metrics_have_twice_or_invented_is_found() -> None:
    rows = [{"kind": "round", "round": round} for round in range(4)] + [{"kind": "eval", "round": 3}]
    assert list(invariants.metrics_once(rows, ENTRIES)) == []
    assert list(invariants.metrics_once([*rows, rows[0]], ENTRIES)) == ["metrics.jsonl has round 0 2 times"]
    assert "not in the journal" in next(invariants.metrics_once(rows, ENTRIES[:3]))
    assert (invariants.rows_missing(rows, ENTRIES), invariants.rows_missing(rows[2:], ENTRIES)) == (0, 2)


# The exact check ----------------------------------------------------------------------------------------------


def settings(optimizer: str) -> config.Config:
    return config.from_dict({"mode": "fedbcd", "rounds": 4, "server": {"optimizer": optimizer}})


def test_the_fold_is_the_mean_of_what_was_counted() -> None:
    base = [np.zeros(8, np.float32), np.ones(8, np.float32)]
    found = invariants.folded(settings("average"), base, [entry(0), entry(3, ("b",))], synthetic.update)
    a, b = (synthetic.update(client, 0, 8) for client in "ab")
    tokens = a.weight + b.weight
    steps = sum(each.weight * each.steps for each in (a, b)) / tokens
    by_hand = steps * sum(each.weight / tokens * each.values / each.steps for each in (a, b))
    np.testing.assert_allclose(found[0].values, by_hand, rtol=1e-5)
    np.testing.assert_array_equal(found[1].values, np.float32(1) + synthetic.update("b", 3, 8).values)
    assert (found[0].round, found[1].round) == (0, 3)


@pytest.mark.parametrize(
    "other",
    [
        [entry(0, ("a",)), *ENTRIES[1:]],  # somebody is not counted
        [ENTRIES[0], entry(1, ("a", "b")), *ENTRIES[2:]],  # or is who was not
        [*ENTRIES[:3], entry(3, ("a",))],  # or another one
        ENTRIES[:3],  # a round is lost
    ],
)
@pytest.mark.parametrize("optimizer", ["average", "momentum"])
def test_blocks_that_count_otherwise_are_found(optimizer: str, other: list[Entry]) -> None:
    base = [np.zeros(8, np.float32)] * 2
    right, wrong = (invariants.folded(settings(optimizer), base, each, synthetic.update) for each in (ENTRIES, other))
    assert list(invariants.same_blocks(right, right)) == []
    assert len(list(invariants.same_blocks(wrong, right))) >= 1
    assert invariants.digest(wrong) != invariants.digest(right)


def test_a_server_state_that_was_lost_is_found() -> None:
    base, third = [np.zeros(8, np.float32)] * 2, [entry(round, block=0) for round in range(3)]
    right = invariants.folded(settings("momentum"), base, third, synthetic.update)
    before = invariants.folded(settings("momentum"), base, third[:2], synthetic.update)
    restarted = invariants.folded(settings("momentum"), [before[0].values, base[1]], third[2:], synthetic.update)
    assert "differs in 8 of 8 values" in next(invariants.same_blocks(restarted, right))


def test_a_block_that_is_missing_or_made_up_or_old_is_found() -> None:
    held = Held(3, np.zeros(8, np.float32))
    assert list(invariants.same_blocks({}, {0: held})) == ["block 0 is missing"]
    assert list(invariants.same_blocks({0: held}, {})) == ["block 0 is there, and no round made it"]
    old = dataclasses.replace(held, round=1)
    assert list(invariants.same_blocks({0: old}, {0: held})) == ["block 0 is round 1's, the journal's last is 3"]


def test_an_update_follows_from_its_client_and_its_round() -> None:
    first = synthetic.update("a", 7, 100)
    assert np.array_equal(first.values, synthetic.update("a", 7, 100).values)
    assert not np.array_equal(first.values, synthetic.update("a", 8, 100).values)
    assert not np.array_equal(first.values, synthetic.update("b", 7, 100).values)
    assert len({synthetic.update("a", round, 1).weight for round in range(20)}) > 10


# What clients hear, and how long they take to come back -------------------------------------------------------


def test_lines_are_read_once_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    ear = Ear(path)
    assert ear.read() == []
    first, second = Line(1.0, "born"), told(ENTRIES[0], "a")
    texts = [json.dumps(dataclasses.asdict(line)) for line in (first, second)]
    path.write_text(texts[0] + "\n" + texts[1][:20])
    assert ear.read() == [first]
    path.write_text("\n".join(texts) + "\n")
    assert ear.read() == [second]
    assert ear.read() == []


def line(at: float, what: listener.What, epoch: int = 0) -> Line:
    return Line(at, what, epoch)


KILL = Act("kill", BROKER, 10.0, 11.0)
BACK = [line(5.0, "start", 1), line(13.0, "start", 2), line(13.5, "contribute")]


def test_the_brokers_restart_is_measured_from_its_process_to_each_client() -> None:
    assert list(recoveries.of_broker([KILL], {"a": BACK})) == [Recovery("a", 11.0, 2.0, 2.5)]


def test_a_start_that_the_old_broker_had_sent_is_not_the_new_ones() -> None:
    late = [BACK[0], line(11.5, "start", 1), *BACK[1:]]
    assert list(recoveries.of_broker([KILL], {"a": late})) == [Recovery("a", 11.0, 2.0, 2.5)]


@pytest.mark.parametrize(
    "other",
    [
        Act("kill", "a", 10.5, 12.0),
        Act("stop", "a", 9.0, 10.5),
        Act("stall", "a", 12.0, 20.0),
        Act("stop", BROKER, 12.0, 12.5),
        Act("kill", BROKER, 12.0, 12.5),
    ],
)
def test_what_something_else_disturbed_is_no_measure(other: Act) -> None:
    lines = {"a": BACK, "b": BACK}
    clients = {recovery.client for recovery in recoveries.of_broker([KILL, other], lines) if recovery.at == 11.0}
    assert clients == (set() if other.target == BROKER else {"b"})


def test_a_client_that_had_not_begun_when_the_broker_went_is_no_measure() -> None:
    killed_before = Act("kill", "a", 7.0, 7.5)  # and its next process still loads its model
    assert list(recoveries.of_broker([killed_before, KILL], {"a": BACK, "b": BACK[1:]})) == []


def test_a_clients_restart_is_its_own() -> None:
    act = Act("kill", "a", 10.0, 11.0)
    lines = {"a": [line(5.0, "start", 1), line(12.0, "start", 1), line(12.25, "contribute")], "b": BACK}
    assert list(recoveries.of_clients([act], lines)) == [Recovery("a", 11.0, 1.0, 1.25)]
    assert list(recoveries.of_clients([KILL], lines)) == []


# Victims ------------------------------------------------------------------------------------------------------


def test_a_victim_is_killed_stopped_or_not_and_starts_again(tmp_path: Path) -> None:
    program = "import sys, time; print(sys.argv[1], flush=True); time.sleep(float(sys.argv[2]))"

    def command(again: bool) -> list[str]:
        return [sys.executable, "-c", program, *(("second", "0") if again else ("first", "60"))]

    victim = Victim("a", command, tmp_path / "log", {})
    assert victim.ended(complete=False) is None
    victim.start()
    victim.stop()
    victim.kill()
    assert victim.ended(complete=False) == Exit("a", -9, killed=True, complete=False)
    assert not victim.runs
    victim.start()
    deadline = time.monotonic() + 20
    while (end := victim.ended(complete=True)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert end == Exit("a", 0, killed=False, complete=True)
    assert "second" in victim.story()
    assert (victim.kills, len(victim.starts)) == (1, 2)


# The command --------------------------------------------------------------------------------------------------


def planned(*arguments: str) -> chaos.Plan:
    return chaos.plan_of(chaos.parser().parse_args(arguments), None)


def seen() -> Seen:
    """Two restarts that were measured, of the broker and of a worker."""
    acts = [KILL, Act("kill", "a", 20.0, 21.0), Act("cut", "b", 30.0, 30.0)]
    lines = {"a": [*BACK, line(22.0, "start", 2), line(22.5, "contribute")], "b": [*BACK, told(ENTRIES[0], "b")]}
    kills = {BROKER: 1, "a": 1, "b": 0}
    return Seen([], acts, lines, ENTRIES, [1, 2], listening_s=[0.5], kills=kills, verified=1, seconds=40.0)


def test_a_run_says_how_it_is_replayed() -> None:
    plan = planned("--seed", "7", "--kills", "3", "--set", "server.optimizer=adam")
    again = planned(*shlex.split(plan.replay)[3:])
    assert again.asked == plan.asked
    assert again.replay == plan.replay
    assert planned("--seed", "8", "--kills", "3").asked.faults != plan.asked.faults


def test_a_run_is_long_enough_for_its_faults_and_every_other_worker_has_a_link() -> None:
    plan = planned("--kills", "5")
    assert plan.asked.config.rounds == plan.asked.faults[-1].rounds + chaos_plan.TAIL
    assert plan.asked.linked == plan.asked.clients[::2]
    low, high = plan.asked.config.solver.step_bounds
    made = [synthetic.update("a", round, 1).steps for round in range(50)]
    assert (low, high) == (min(made), max(made))  # or the broker would refuse some


def test_the_result_has_what_was_done_and_survives_json(tmp_path: Path) -> None:
    plan, found = planned("--kills", "2"), seen()
    rows = chaos.rows(found)
    result = json.loads(json.dumps(chaos.result(rows, found, plan), allow_nan=False))
    assert (result["kills"], result["broker_kills"], result["cuts"], result["rounds"]) == (2, 1, 1, 4)
    assert (result["training_p50_s"], result["training_max_s"], result["within_bar"]) == (2.5, 2.5, True)
    assert [row["measured"] for row in result["rows"]] == [2, 1]
    assert result["rounds_by_contributors"] == {"0": 1, "1": 2, "2": 1}
    assert "2.50" in shown(chaos.table(rows, found))
    chaos.plot(rows).savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_what_is_wrong_is_told_with_the_replay_and_the_folder_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned("--kills", "2")
    (tmp_path / "broker.log").write_text("its last words")
    broken = dataclasses.replace(seen(), wrong=[f"wrong {n}" for n in range(30)])
    monkeypatch.setattr(chaos_run, "run", lambda *_: broken)
    with pytest.raises(FiguresError) as failed:
        chaos.measure(plan, tmp_path)
    message = str(failed.value)
    assert "wrong 19\nand 10 more" in message
    assert f"replay: {plan.replay}" in message
    kept = Path(message.rpartition(": ")[2])
    assert (kept / "broker.log").read_text() == "its last words"
    shutil.rmtree(kept)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--kills", "0"], "--kills must be at least 1"),
        (["--spacing", "0"], "--spacing must be at least 1"),
        (["--clients", "1"], "--clients is from 2 to 16"),
        (["--block", "7"], "--block is a multiple of 4 bytes"),
        (["--pause-s", "-1"], "--pause-s is from 0"),
        (["--quick", "--kills", "9"], "--quick ends within 60 s"),
        (["--quick", "--workers", "real"], "--quick ends within 60 s"),
        (["--set", "codec.up=int8"], "bit for bit in float32"),
        (["--set", "nothing=1"], "nothing"),
    ],
)
def test_wrong_input_is_told_before_anything_runs(
    arguments: Sequence[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chaos.main(arguments) == 2
    assert complaint in capsys.readouterr().err


def test_one_small_run_loses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "chaos.json"
    small = ["--seed", "7", "--kills", "2", "--clients", "2", "--spacing", "4", "--block", "4KiB", "--pause-s", "0"]
    assert chaos.main([*small, "--out", str(out)]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told == json.loads(out.read_text())
    assert (told["kills"], told["broker_kills"], told["verified"]) == (2, 1, 1)
    assert out.with_suffix(".png").stat().st_size > 1000
