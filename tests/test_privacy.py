"""Differential privacy at the broker: what leaves when, who is charged, and what is told only once."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from broker.blocks import BaseModel, GlobalBlocks
from broker.record import Record
from parablock import feedback, participant_events
from parablock.accountant import epsilon
from parablock.agenda import Agenda
from parablock.aggregation import Contribution, server_move
from parablock.config import Config, from_dict, to_dict
from parablock.coordinator_events import Committed, Fold, Measure, Send, Store, Tick, Unfit
from parablock.layout import Layout
from parablock.ledger import Ledger
from parablock.measurement import Measurement
from parablock.messages import Abstain, Chunk, Commit, Heartbeat, Join, Leave, Offer, Rejected, Start, Terms
from parablock.noise import Noise
from parablock.run_folder import RunFolder
from parablock.saved import EVERYBODY, recent, spent
from parablock.verdict import Verdict
from tests.test_broker_blocks import MANIFEST as BLOCKS
from tests.test_broker_blocks import NUMEL, store_of, vector
from tests.test_coordinator import NBYTES, Desk, kinds
from tests.test_cut_through import begun, chunks, gathered, offer, send
from tests.test_participant import Seat
from tests.test_record import BEGAN, commit, land
from tests.test_record import MANIFEST as RECORDED

if TYPE_CHECKING:
    from pathlib import Path

CENTRAL = {"where": "central", "clip": 1.0, "noise": 2.0, "budget": 100.0}
LOCAL = CENTRAL | {"where": "local"}


# What leaves, and when (central)


def test_nothing_of_a_block_leaves_before_its_round_is_durable() -> None:
    desk = begun("a", "b", privacy=CENTRAL)
    send(desk, 1, "a", "b")
    assert [type(asked) for asked in desk.asked] == [Measure, Measure]
    while not any(isinstance(asked, Store) for asked in desk.asked):
        desk.work(most=1)
        assert not [m for name in "ab" for m in desk.to(name) if isinstance(m, Chunk | Commit)]
    desk.work()
    assert kinds(desk.to("a")) == [Commit, Chunk, Chunk], "then all of it at once, unasked, within a window"
    assert chunks(desk, "b") == [(1, 0), (1, 1024)]
    desk.confirm("a", 0)
    desk.handle(Tick(), after_s=3.0)
    assert (chunks(desk, "a"), len(chunks(desk, "b"))) == ([], 2), "what was lost is sent again"


def test_a_fold_that_is_begun_anew_has_told_nothing_before() -> None:
    """Somebody turns out unfit when all is folded but the last chunk; the second attempt has other noise."""
    desk = begun("a", "b", "c", privacy=CENTRAL)
    send(desk, 1, "a", "b", "c")
    desk.work(most=3)  # measured, and the first chunk folded
    desk.asked.clear()
    desk.handle(Unfit(0, 1, {"c": "too large"}))
    assert not [e for e in desk.of(Send) if isinstance(e.envelope.message, Chunk | Commit)]
    desk.work()
    assert chunks(desk, "a") == [(2, 0), (2, 1024)], "only what is durable has ever left"
    (committed,) = desk.of(Committed)
    assert committed.contributors == committed.charged == ("a", "b")


def test_of_a_round_that_was_not_durable_when_the_broker_died_nobody_has_seen_anything() -> None:
    desk = begun("a", "b", privacy=CENTRAL)
    send(desk, 1, "a", "b")
    sent = desk.work(most=4)  # all is folded, and the disk has been asked
    assert isinstance(desk.asked[-1], Store)
    assert not [e for e in sent if isinstance(e, Send) and isinstance(e.envelope.message, Chunk | Commit)]
    desk.restart()
    desk.gather("a", "b")
    desk.commit("a", "b")
    assert len(desk.journal) == 1, "held again, with other noise, and told for the first time"
    desk.restart()
    desk.handle(Tick())
    desk.hello("a")
    desk.join("a", position=1)
    assert next(m for m in desk.to("a") if isinstance(m, Commit)).attempt == 0, "what is durable is told as it is"
    assert desk.journal[0][0].charged == ("a", "b")


# Who is charged


def test_in_the_central_place_only_those_are_charged_that_are_counted() -> None:
    """Of three one abstains, and one is late."""
    desk = gathered("a", "b", "c", privacy=CENTRAL, deadline_s=1.0, quorum=1)
    desk.upload("a")
    desk.say("b", Abstain(0, "the loss is nan"))
    offer(desk, "c")
    desk.handle(Tick(), after_s=1.5)
    desk.work()
    (committed,) = desk.of(Committed)
    assert (committed.contributors, committed.charged, committed.late) == (("a",), ("a",), 1)


def test_in_the_local_place_all_are_charged_of_whom_something_may_have_left() -> None:
    """One that has gone amid its upload, one that has said nothing yet, and one whose contribution is not used."""
    desk = gathered("a", "b", "c", "d", privacy=LOCAL, deadline_s=1.0, quorum=1)
    offer(desk, "b")
    desk.say("d", Abstain(0, "an earlier process may have sent its contribution"))
    desk.say("b", Leave("amid its upload"))
    desk.upload("a")
    desk.handle(Tick(), after_s=1.5)
    desk.work()
    (committed,) = desk.of(Committed)
    assert committed.contributors == ("a",)
    assert committed.charged == ("a", "b", "c", "d")
    assert committed.loss is None
    assert desk.journal[0][0].losses == ()


def test_in_the_local_place_those_are_charged_of_whom_an_earlier_broker_may_have_seen_something() -> None:
    """c has sent some of its contribution to round 2, and is not there any more when that is begun anew."""
    desk = gathered("a", "b", "c", privacy=LOCAL, quorum=1)
    assert [desk.commit("a", "b", "c", round=round).charged for round in (0, 1)] == [("a", "b", "c")] * 2
    offer(desk, "c", round=2)
    send(desk, 0, "c", round=2)
    desk.restart()
    desk.handle(Tick())
    for name in "ab":
        desk.hello(name)
        desk.join(name, versions=(1, 2, 0, 0), position=2)
    desk.handle(Tick(), after_s=desk.config.network.timeout_s - 1)
    for name in "ab":
        desk.say(name, Heartbeat(0.0, -1, 0, "training"))
    desk.handle(Tick(), after_s=2.0)
    assert [note.client for note in desk.notes if note.kind == "lost"] == ["c"]
    charged = [desk.commit("a", "b", round=number).charged for number in (2, 3, 4)]
    assert charged == [("a", "b", "c")] * 2 + [("a", "b")], "the third was not open then"


def lose(desk: Desk, who: str, *others: str) -> None:
    """Nothing is heard of one client for too long."""
    desk.handle(Tick(), after_s=desk.config.network.timeout_s - 1)
    for name in others:
        desk.say(name, Heartbeat(0.0, -1, 0, "training"))
    desk.handle(Tick(), after_s=1.5)
    assert [note.client for note in desk.notes if note.kind == "lost"] == [who]


def to_the_disk(desk: Desk) -> None:
    """The broker acts until it waits for the disk."""
    while not any(isinstance(asked, Store) for asked in desk.asked):
        desk.work(most=1)


def test_in_the_local_place_one_is_charged_that_was_lost_while_the_round_was_open() -> None:
    """It may have trained on, and the first chunks leave with an offer, which nobody may take any more."""
    desk = gathered("a", "b", "c", privacy=LOCAL, rounds=12, policy={"late": "fold"})
    lose(desk, "c", "a", "b")
    assert desk.commit("a", "b").charged == ("a", "b", "c")
    assert desk.commit("a", "b", round=1).charged == ("a", "b", "c"), "it could be trained without the commit of 0"
    assert desk.commit("a", "b", round=2).charged == ("a", "b")


def test_nobody_begins_with_a_round_that_is_written_to_disk_as_nobody_would_be_charged_for_it() -> None:
    """c comes between a round's Store and its Stored, with what an earlier broker had asked it for."""
    desk = gathered("a", "b", privacy=LOCAL, rounds=12, policy={"late": "fold"})
    desk.upload("a")
    desk.upload("b")
    to_the_disk(desk)
    desk.hello("c")
    assert desk.join("c", position=1)[-1] == Start(1, 3, 0, ())
    desk.work()
    (committed,) = desk.of(Committed)
    assert committed.charged == ("a", "b")
    for name in "abc":
        desk.confirm(name, 0)
    assert kinds(desk.say("c", Offer(0, 0, NBYTES[0], 1, 1, 0.5))) == [Rejected], "it is not owed"
    assert desk.commit("a", "b", "c", round=1).charged == ("a", "b", "c")


def test_nobody_makes_up_for_others_in_a_round_that_is_written_to_disk() -> None:
    desk = gathered("a", "b", privacy=LOCAL, fraction=0.5, quorum=1)
    (who,) = [name for name in "ab" if desk.coordinator._agenda.trains(0, name)]
    desk.upload(who)
    to_the_disk(desk)
    desk.say(who, Leave("for good"))
    desk.hello("c")
    start = desk.join("c", position=0)[-1]
    assert isinstance(start, Start)
    assert (start.round, start.next, start.trains[0]) == (1, 0, False)


def test_without_privacy_nobody_is_charged() -> None:
    desk = gathered("a", "b")
    assert desk.commit("a", "b").charged == ()


def test_who_may_have_given_to_the_open_rounds_is_who_was_there_since_they_could_be_trained() -> None:
    """b goes after round 1, when it could have trained round 2, and with one in flight round 3."""
    desk = gathered("a", "b", privacy=LOCAL, quorum=1)
    desk.commit("a", "b")
    entries = [entry for entry, _ in desk.journal]
    assert recent(entries, 1) == (EVERYBODY, "a", "b"), "who was there at the start has nobody written down"
    desk.commit("a", "b", round=1)
    desk.say("b", Leave("for good"))
    for round in (2, 3, 4):
        desk.commit("a", round=round)
    entries = [entry for entry, _ in desk.journal]
    assert [entry.charged for entry in entries] == [("a", "b")] * 4 + [("a",)]
    assert [recent(entries[:count], 1) for count in (2, 3, 4, 5)] == [("a", "b")] * 4
    assert recent(entries, 0) == ("a",)
    assert recent([*entries[:3], entries[4]], 1) == (EVERYBODY,), "a row between them is lost"
    assert recent(entries[1:2], 1) == (EVERYBODY,), "one before it"
    assert recent([*entries, spent(entries[-1], 5, 1, "lost", charged=(EVERYBODY,))], 1) == (EVERYBODY,)


def test_where_the_journal_says_who_was_drawn_for_the_open_rounds_nobody_else_is_charged() -> None:
    """Also in the first ones; and a, though it does not come back."""
    desk = gathered("a", "b", privacy=LOCAL, fraction=0.5, quorum=1, seed=4, rounds=8)
    desk.commit("b")
    assert [name for round in (1, 2) for name in "ab" if desk.coordinator._agenda.trains(round, name)] == ["b", "a"]
    desk.restart()
    desk.handle(Tick())
    desk.hello("b")
    desk.join("b", (1, 0, 0, 0), position=1)
    assert desk.commit("b", round=1).charged == ("b",)
    lose(desk, "a", "b")
    desk.work()
    (committed,) = desk.of(Committed)
    assert (committed.contributors, committed.charged) == ((), ("a",))


def test_of_the_first_rounds_nothing_tells_whom_a_broker_before_has_asked_for_them() -> None:
    """It was killed before its first commit, and c, of which it had some, does not come back."""
    desk = gathered("a", "b", "c", privacy=LOCAL, quorum=1)
    offer(desk, "c")
    desk.restart()
    desk.gather("a", "b")
    desk.join("a", position=0)
    desk.handle(Tick(), after_s=desk.config.network.timeout_s + 1)
    desk.gather("a", "b", "d")
    assert [desk.commit("a", "b", "d", round=round).charged for round in (0, 1)] == [(EVERYBODY,)] * 2
    assert desk.commit("a", "b", "d", round=2).charged == ("a", "b", "d")


def test_what_a_row_does_not_tell_the_next_broker_does_not_know_either() -> None:
    """b had been drawn by a broker that left nothing. The one after it has drawn a, and written that down."""
    desk = gathered("a", "b", privacy=LOCAL, fraction=0.5, quorum=1, seed=4)
    offer(desk, "b", round=1)
    desk.restart()
    desk.hello("a")
    desk.join("a", position=0)
    desk.handle(Tick(), after_s=desk.config.network.timeout_s - 1)
    desk.say("a", Heartbeat(0.0, -1, 0, "training"))
    desk.handle(Tick(), after_s=1.5)
    assert desk.commit("a").charged == (EVERYBODY,)
    desk.restart()
    desk.handle(Tick())
    desk.hello("a")
    desk.join("a", (1, 0, 0, 0), position=1)
    assert [desk.commit("a", round=round).charged for round in (1, 2)] == [(EVERYBODY,)] * 2


def test_who_gives_to_a_round_for_which_it_is_not_drawn_is_charged_and_has_had_a_turn() -> None:
    """An earlier broker may have drawn it, in place of another: what it says with its offer has left."""
    desk = gathered("a", "b", privacy=LOCAL, fraction=0.5, quorum=1)
    agenda = desk.coordinator._agenda
    (one,) = [name for name in "ab" if agenda.trains(0, name)]
    (other,) = {"a", "b"} - {one}
    before = agenda.snapshot()["turns"].get(other, 0)
    desk.say(other, Offer(0, 0, NBYTES[0], 1, 1, 0.5))
    assert kinds(desk.to(other)) == [Rejected]
    assert desk.commit(one).charged == ("a", "b")
    drawn = [each for each in agenda.snapshot()["decided"] if each["round"] == 2]
    assert agenda.snapshot()["turns"][other] == before + 1 + (other in drawn[0]["clients"])


def test_how_many_rows_a_client_has_is_not_told_where_it_hides_them() -> None:
    for tables, rows in (({"privacy": LOCAL}, 1), ({"privacy": CENTRAL}, 10), ({}, 10)):
        seat = Seat(**tables)
        seat.handle(participant_events.Tick())
        seat.hear(Terms(json.dumps(to_dict(seat.config, shared_only=True)), "a"))
        (join,) = seat.prepared()
        assert isinstance(join, Join)
        assert join.rows == rows
    desk = gathered("a", "b", privacy=LOCAL)
    assert [note.text for note in desk.notes if note.kind == "joined"] == ["it does not tell its rows"] * 2


# The mean (central)


def fold(config: Config, deltas: dict[str, Any], noise: Noise) -> Any:
    """Measured and folded, whole, as the broker does: what the block becomes."""
    measurement, blocks = (
        Measurement(config, BLOCKS),
        GlobalBlocks(BaseModel(BLOCKS, "", "", [np.zeros(NUMEL, np.float32) for _ in range(2)]), config, noise),
    )
    layout = Layout.up(config, NUMEL)
    parts = [
        {name: layout.codec.encode(delta[layout.part(index)]) for name, delta in deltas.items()}
        for index in range(layout.count)
    ]
    verdict = Verdict({})
    for index, part in enumerate(parts):
        contributions = tuple(Contribution(name, 99, 4, payload) for name, payload in part.items())
        answer = measurement.take(Measure(0, 0, 1, index, contributions))
        verdict = answer.verdict if answer is not None else verdict
    for index, part in enumerate(parts):
        contributions = tuple(
            Contribution(name, weight, 4, payload, 0, verdict.factors[name])
            for weight, (name, payload) in enumerate(part.items(), start=1)
        )
        blocks.fold(Fold(0, 0, 1, index, contributions))
    return blocks.tensors(store_of(0, 1))["block"]


@pytest.mark.parametrize("up", ["float32", "int8"])
def test_the_mean_is_of_cut_deltas_over_the_clients_that_a_round_is_to_have(up: str) -> None:
    """Unweighted, and over four, though three have come, as one sits the round out."""
    privacy = {"where": "central", "clip": 2.0, "noise": 1e-9, "budget": 1000.0}
    tables = {"network": {"chunk_bytes": 65536}, "round": {"clients": 8, "fraction": 0.5}, "codec": {"up": up}}
    config = from_dict({"privacy": privacy, **tables})
    deltas = {"a": vector(1), "b": vector(2, 1e-3), "c": vector(3, 50.0)}
    made = fold(config, deltas, Noise(key=1))
    expected = np.zeros(NUMEL)
    for delta in deltas.values():
        wide = delta.astype(np.float64)
        expected += wide * min(1.0, 2.0 / float(np.linalg.norm(wide))) / 4
    close = 1e-7 if up == "float32" else 2e-4
    assert np.abs(made - expected).max() < close
    assert float(np.linalg.norm(made)) <= 3 * 2.0 / 4


def test_the_mean_has_the_noise_that_the_accountant_counts() -> None:
    config = from_dict({"privacy": CENTRAL, "round": {"clients": 4}, "network": {"chunk_bytes": 65536}})
    made = fold(config, {"a": np.zeros(NUMEL, np.float32)}, Noise(key=1))
    assert made.std() == pytest.approx(2.0 / 4, rel=0.02)
    assert fold(config, {"a": np.zeros(NUMEL, np.float32)}, Noise()).tobytes() != made.tobytes()
    chunk = Layout.up(config, NUMEL).part(0)
    halves = made[chunk], made[chunk.stop : 2 * chunk.stop]
    assert abs(np.corrcoef(*halves)[0, 1]) < 0.04, "each chunk has noise of its own"


@pytest.mark.parametrize("down", ["float32", "int8"])
def test_what_is_made_of_the_noisy_mean_knows_no_other(down: str) -> None:
    """Server optimizers and the way down's codec, with its error feedback, come after the noise: post-processing."""
    tables = {"privacy": CENTRAL, "network": {"chunk_bytes": 65536}, "codec": {"down": down}}
    deltas = {"a": vector(1), "b": vector(2)}
    mean = fold(from_dict({"privacy": CENTRAL, "network": tables["network"]}), deltas, Noise(key=1))
    server = {"optimizer": "nesterov", "lr": 0.5, "momentum": 0.8}
    config = from_dict({**tables, "server": server})
    move, _ = server_move(config.server, mean, {})
    made = fold(config, deltas, Noise(key=1))
    if down == "float32":
        assert made.tobytes() == move.tobytes()
    else:
        layout = Layout.down(config, NUMEL, 1)
        parts = [layout.part(index) for index in range(layout.count)]
        said = [feedback.encode(layout.codec, move[part], np.zeros_like(move[part]))[1] for part in parts]
        assert made.tobytes() == np.concatenate(said).tobytes()


# Turns


def test_who_has_had_all_its_turns_is_drawn_no_more_nor_makes_up_for_others() -> None:
    tables = {"round": {"fraction": 0.5, "clients": 4, "quorum": 1}, "privacy": LOCAL | {"rounds": 3}}
    run = from_dict({"rounds": 8, **tables})
    agenda, names = Agenda(run, 4), ["a", "b", "c", "d"]
    drawn = []
    for round in range(8):
        agenda.decide(round, names)
        if round == 4:
            agenda.join("a", 4, ["b", "c", "d"])
            other = Agenda(run, 4)
            other.restore(agenda.snapshot())
            agenda = other  # as after a restart
        drawn.append([name for name in names if agenda.trains(round, name)])
    counts = {name: sum(name in those for those in drawn) for name in names}
    assert max(counts.values()) == 3
    assert sum(counts.values()) <= 12
    assert all(len(those) <= 3 for those in drawn)


def test_who_comes_back_to_a_round_that_lacks_somebody_has_no_more_turns_than_it_may() -> None:
    """Of two clients with a turn each nobody is left for round 2."""
    tables = {"round": {"fraction": 0.5, "clients": 2, "quorum": 1}, "privacy": LOCAL | {"rounds": 1}}
    agenda = Agenda(from_dict({"rounds": 4, **tables}), 4)
    agenda.decide(2, ["a", "b"])
    for name in "ab":
        assert [agenda.trains(round, name) for round in range(2)].count(True) == 1
        agenda.join(name, 2, [])
        assert not agenda.trains(2, name)
    agenda.join("c", 2, [])
    assert agenda.trains(2, "c"), "who has had none makes up for them"


def test_the_broker_says_which_rounds_too_few_will_train() -> None:
    """Two clients of one turn each: nobody is left for round 2."""
    desk = begun("a", "b", privacy=CENTRAL | {"rounds": 1}, fraction=0.5, quorum=1)
    (who,) = [name for name in "ab" if desk.coordinator._agenda.trains(0, name)]
    desk.upload(who)
    desk.work()
    assert [note.text for note in desk.notes if note.kind == "drawn"] == [
        "round 2 is trained by 0 clients, and 1 are wanted: of the 2 that are there the others have had their 1 rounds "
        "(privacy.rounds)"
    ]


def test_who_may_have_given_in_rounds_that_are_lost_has_had_its_turns() -> None:
    """The rows of four rounds are lost, and with them who was drawn: all may have been, and newcomers too."""
    tables = {"round": {"fraction": 0.5, "clients": 4, "quorum": 1}, "privacy": LOCAL | {"rounds": 8}}
    run, names = from_dict({"rounds": 16, **tables}), ["a", "b", "c", "d"]
    agenda = Agenda(run, 4)
    ledger = Ledger(run.privacy)
    for round in range(3):
        agenda.decide(round + 1, names)
        ledger.take(round, [name for name in names if agenda.trains(round, name)])
    for round in range(3, 7):
        ledger.take(round, (EVERYBODY,))
    resumed = Agenda(run, 4)
    resumed.restore(agenda.snapshot())
    resumed.account(7, ledger.rounds, ledger.untold)
    drawn = dict(ledger.rounds)
    for round in range(4, 16):
        resumed.decide(round, [*names, "new"])
        if round >= 7:
            for name in (*names, "new"):
                drawn[name] = drawn.get(name, 0) + resumed.trains(round, name)
    assert ledger.untold == 4
    assert all(7 <= given + ledger.untold <= 8 for given in drawn.values()), "new, too, may have been there in the four"
    assert "are wanted" in resumed.take_short()[-1]


def test_where_nothing_is_lost_turns_are_what_they_were() -> None:
    """Also of who was drawn and not charged, as it was not there."""
    desk = gathered("a", "b", "c", privacy=LOCAL | {"rounds": 5}, fraction=0.7, quorum=1, rounds=6)
    for round in range(3):
        desk.commit(*(name for name in "abc" if desk.coordinator._agenda.trains(round, name)), round=round)
    turns = desk.coordinator._agenda.snapshot()["turns"]
    desk.restart()
    assert desk.coordinator._agenda.snapshot()["turns"] == turns


# The record


def test_what_has_been_spent_stands_in_every_row_and_outlives_the_broker(tmp_path: Path) -> None:
    config = from_dict({"privacy": CENTRAL})
    desk = gathered("a", "b", privacy=CENTRAL)
    with RunFolder.create(tmp_path / "run", config) as folder:
        record = Record(folder, RECORDED, config, BEGAN)
        for round, clients in enumerate((("a", "b"), ("a",))):
            committed = Committed(round, round % 2, clients, 0, 1.5, 32, 32, "", charged=clients)
            record.committed(committed, (), BEGAN + 1)
        record.close()
        assert [row["epsilon"] for row in folder.read_metrics()] == [epsilon(2.0, 1, 1e-5), epsilon(2.0, 2, 1e-5)]
        desk.commit("a", "b")
        desk.commit("a", "b", round=1)
        entries = [entry for entry, _ in desk.journal]
        again = Record(folder, RECORDED, config, BEGAN, folder.read_metrics(), entries)
        assert again.epsilon == epsilon(2.0, 2, 1e-5)
        again.close()
    ledger = Ledger(config.privacy)
    for entry in entries:
        ledger.take(entry.round, entry.charged)
    assert ledger.most == 2


def test_what_private_clients_do_not_tell_is_not_taken_for_a_zero(tmp_path: Path) -> None:
    config = from_dict({"privacy": LOCAL})
    with RunFolder.create(tmp_path / "run", config) as folder:
        record = Record(folder, RECORDED, config, BEGAN)
        commit(record, 0, at=1.0)
        land(record, "a", 0)
        land(record, "b", 0)
        record.close()
        (row,) = folder.read_metrics()
    assert (row["alpha"], row["drift"], row["miss"]) == (None, None, None)
    assert (row["steps"], row["staleness"]) == (8.0, 1.0)
