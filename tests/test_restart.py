"""Restarts, each machine by itself: a coordinator that goes on from a journal, a participant from what it has kept."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from parablock.conversation import State
from parablock.coordinator import Phase
from parablock.coordinator_events import Committed, Fold, Note, Over, Received, Store, Stored, Tick
from parablock.messages import (
    PROTOCOL,
    Abstain,
    Chunk,
    Commit,
    Credit,
    Goodbye,
    Heartbeat,
    Hello,
    Join,
    Leave,
    Offer,
    Rejected,
    Rejoin,
    Start,
    Terms,
    Welcome,
)
from parablock.participant_events import Dismissed, End, Gone, Held, Kept, Notice, Prepared, Ready, Started, Uploaded
from parablock.participant_events import Tick as Due
from parablock.saved import Entry
from parablock.transfer import Encoded, Payload
from parablock.wire import Envelope
from tests.network import BASE, RUN, TOKENIZER
from tests.test_coordinator import MANIFEST, NBYTES, Desk, kinds
from tests.test_participant import Seat

# The broker: what is durable, and when


def test_an_entry_says_all_of_a_round_and_nothing_is_announced_before_it_is_durable() -> None:
    desk = Desk(quorum=1, deadline_s=1.0)
    desk.gather("a", "b")
    desk.upload("a")
    desk.handle(Tick(), after_s=1.0)
    desk.work(most=2)
    (store,) = desk.of(Store)
    entry = store.entry
    assert (store.round, store.block, store.attempt) == (entry.round, entry.block, entry.attempt) == (0, 0, 1)
    assert entry == Entry(
        round=0,
        block=0,
        attempt=1,
        base=-1,
        contributors=("a",),
        weights=(1,),
        steps=(1,),
        losses=(0.5,),
        moved=0.0,
        late=0,
        bytes_up=1200,
        bytes_down=2400,
        reason=entry.reason,
        agenda=entry.agenda,
        clients=("a", "b"),
        tardy=("b",),
    )
    assert entry.reason == "1 contributions; the deadline of 1 s has passed with 1 contributions"
    assert json.loads(json.dumps(entry.agenda)) == entry.agenda
    desk.hello("c")
    assert kinds(desk.join("c")) == [Welcome, Start], "no Commit"
    desk.handle(Tick(), after_s=3.0)
    assert Commit not in kinds(desk.to("a"))
    desk.work()
    assert Commit in kinds(desk.to("a"))
    (committed,) = desk.of(Committed)
    assert (committed.contributors, committed.bytes_down, committed.reason) == (("a",), 2400, entry.reason)


def test_what_was_stored_must_be_what_was_to_be() -> None:
    desk = Desk()
    desk.gather("a", "b")
    desk.upload("a")
    desk.upload("b")
    desk.work(most=2)
    for wrong in (Stored(0, 2, memoryview(bytes(1200))), Stored(0, 1, None)):
        with pytest.raises(AssertionError):
            desk.handle(wrong)


# The broker: after a restart


@pytest.fixture
def desk() -> Desk:
    """Of a and b, restarted after round 1."""
    desk = Desk()
    desk.gather("a", "b")
    desk.commit("a", "b")
    desk.commit("a", "b", round=1)
    desk.restart()
    return desk


def back(desk: Desk, name: str, versions: tuple[int, ...] = (1, 2, 0, 0), position: int = 3) -> Start:
    """A worker that has gone on meanwhile."""
    assert kinds(desk.hello(name)) == [Terms]
    *_, start = desk.join(name, versions, position=position)
    assert isinstance(start, Start)
    return start


def test_a_restarted_broker_goes_on_where_the_journal_ends(desk: Desk) -> None:
    assert desk.coordinator.phase is Phase.RUNNING
    assert (desk.coordinator.next_round, desk.coordinator.clients) == (2, ["a", "b"])
    assert kinds(desk.say("a", Heartbeat(1.0, 3, 0, "training"), epoch=1)) == [Rejoin]
    assert back(desk, "a") == Start(2, 2, 2, ())
    desk.upload("a", 2)
    desk.handle(Tick(), after_s=5.0)
    assert not desk.of(Fold), "b is expected back, and waited for"
    back(desk, "b")
    committed = desk.commit("b", round=2)
    assert committed.contributors == ("a", "b")
    assert desk.to("a")[-1] == Commit(2, 2, 1, -1, NBYTES[2], 2, True, ahead_s=5.0), "b came 5 s later"
    assert not [note for note in desk.notes if note.kind == "lost"]


def test_who_does_not_come_back_in_time_is_lost(desk: Desk) -> None:
    desk.handle(Tick(), after_s=50.0)
    back(desk, "a")
    desk.handle(Tick(), after_s=5.9)
    assert desk.coordinator.clients == ["a", "b"]
    desk.say("a", Heartbeat(1.0, 3, 0, "training"))
    desk.handle(Tick(), after_s=0.2)
    assert desk.of(Note)[0] == Note("lost", "b", "not back within 6 s of the broker's restart")
    assert desk.coordinator.clients == ["a"]
    assert desk.coordinator.present() == {"a"}


def test_nobody_waits_for_one_that_comes_back_with_nothing(desk: Desk) -> None:
    """It says by its position that it cannot answer the rounds at hand."""
    desk.restart()
    back(desk, "a")
    desk.hello("b", "0the")
    assert desk.join("b", (0, 0, 0, 0))[-1] == Start(2, 2, 2, (0, 1)), "the quorum is both: at once"
    desk.hello("c")
    assert desk.join("c")[-1] == Start(4, 3, 2, (0, 1)), "else after the rounds at hand"


def test_one_that_says_to_be_farther_than_anybody_can_be_is_no_member_of_the_rounds_at_hand(desk: Desk) -> None:
    back(desk, "a", position=4)
    back(desk, "b", position=4)
    for name, position, first in (("c", 4, 2), ("d", 5, 4), ("e", 2**31, 4)):
        desk.hello(name)
        *_, start = desk.join(name, (1, 2, 0, 0), position=position)
        assert isinstance(start, Start)
        assert start.round == first


def test_a_version_from_before_the_restart_goes_out_in_full(desk: Desk) -> None:
    start = back(desk, "a", versions=(1, 0, 0, 0))
    assert start.pending == (1,)
    assert desk.say("a", Credit(1, 1, 0, 0, 2000)) != []
    assert [(m.attempt, m.offset) for m in desk.to("a") if isinstance(m, Chunk)] == [(0, 0), (0, 1024)]


@pytest.mark.parametrize("down", ["int8", "bfloat16"])
def test_a_change_is_in_full_after_a_restart_and_the_next_one_builds_on_it(down: str) -> None:
    desk = Desk(codec={"down": down})
    desk.gather("a", "b")
    for round in range(4):
        desk.commit("a", "b", round=round)
    desk.restart()
    assert back(desk, "a", (0, 2, 3, 4), 4).pending == (0,)
    assert [m.attempt for m in desk.to("a") if isinstance(m, Commit)] == [0]
    assert back(desk, "b", (1, 2, 3, 4), 4).pending == ()
    desk.upload("a", 4)
    desk.upload("b", 4)
    desk.work(fill=9)
    (announced,) = [m for m in desk.to("b") if isinstance(m, Commit)]
    assert (announced.round, announced.attempt, announced.base) == (4, 1, 0)


def test_one_that_had_gone_before_it_came_back_is_not_waited_for(desk: Desk) -> None:
    desk.hello("b")
    desk.say("b", Leave("interrupted"))
    assert desk.coordinator.clients == ["a"]


def test_a_run_that_has_stopped_without_a_quorum_can_be_resumed() -> None:
    """The journal says that one of two was there. The other is not missed before it has had the time to come back."""
    desk = Desk(clients=2, rounds=8, policy={"quorum_lost": "stop", "quorum_lost_s": 0.0})
    desk.gather("a", "b")
    desk.upload("a")
    desk.upload("b")
    desk.say("b", Leave("interrupted"))
    desk.work()
    (over,) = desk.of(Over)
    assert "the run stops" in over.reason
    (entry, values), timeout_s = desk.journal[0], desk.config.network.timeout_s
    desk.journal = [(replace(entry, clients=("a",)), values)]
    desk.restart()
    desk.handle(Tick())
    back(desk, "a", (1, 0, 0, 0), 1)
    desk.handle(Tick(), after_s=timeout_s - 1)
    assert not desk.of(Over)
    desk.say("a", Heartbeat(0.0, -1, 0, "training"))
    back(desk, "b", (1, 0, 0, 0), 1)
    assert desk.commit("a", "b", round=1).contributors == ("a", "b")
    desk.restart()
    desk.handle(Tick())
    back(desk, "a", (1, 2, 0, 0), 2)
    due = desk.coordinator.deadline()
    assert due is not None
    assert due <= desk.now + timeout_s, "the time is not over without a look"
    desk.handle(Tick(), after_s=timeout_s - 1)
    desk.say("a", Heartbeat(0.0, -1, 0, "training"))
    desk.handle(Tick(), after_s=1.0)
    assert [over.reason for over in desk.of(Over)] == [
        "round 2: 1 of at least 2 clients are there, for 0 s; the run stops (round.quorum_lost)"
    ]


def test_one_whose_link_breaks_before_it_has_joined_is_still_expected(desk: Desk) -> None:
    desk.handle(Tick())
    desk.handle(Tick(), after_s=1.0)
    desk.hello("b")
    desk.hello("b")
    assert desk.coordinator.clients == ["a", "b"]


def test_a_run_that_is_complete_ends_when_the_clients_have_come_and_left() -> None:
    desk = Desk(rounds=1)
    desk.gather("a", "b")
    desk.commit("a", "b")
    desk.restart()
    assert desk.coordinator.phase is Phase.DRAINING
    assert back(desk, "a", (0, 0, 0, 0), 1) == Start(1, 2, 1, (0,))
    desk.say("a", Leave("done"))
    assert not desk.of(Over)
    back(desk, "b", (1, 0, 0, 0), 1)
    desk.say("b", Leave("done"))
    assert desk.of(Over) == [Over(True, "every round is committed and every client has left")]


def test_a_run_that_is_complete_ends_though_nobody_comes_back() -> None:
    desk = Desk(rounds=1)
    desk.gather("a", "b")
    desk.commit("a", "b")
    desk.restart()
    desk.handle(Tick())
    assert desk.coordinator.deadline() == desk.now + 6.0
    desk.handle(Tick(), after_s=6.0)
    assert [over.complete for over in desk.of(Over)] == [True]


def test_a_tick_is_due_at_once_so_that_the_time_runs(desk: Desk) -> None:
    due = desk.coordinator.deadline()
    assert due is not None
    assert due <= desk.now


def test_a_run_that_has_committed_nothing_gathers_again() -> None:
    desk = Desk()
    desk.gather("a", "b")
    desk.restart()
    assert desk.coordinator.phase is Phase.GATHERING
    desk.hello("a")
    desk.join("a", position=1)
    desk.hello("b")
    assert desk.join("b", position=1)[-1] == Start(0, 2, 0, ())


def test_a_run_that_had_begun_does_not_gather_for_ever() -> None:
    """Of three that had begun one has died with the broker."""
    desk = Desk(clients=3, quorum=2)
    desk.gather("a", "b", "c")
    desk.restart()
    desk.hello("a")
    assert kinds(desk.join("a", position=1)) == [Welcome]
    assert desk.coordinator.deadline() == desk.now + 6.0
    for _ in range(2):
        desk.handle(Tick(), after_s=4.0)
        desk.say("a", Heartbeat(1.0, 1, 0, "waiting"))
    assert desk.coordinator.phase is Phase.GATHERING, "a is no quorum"
    desk.hello("b")
    assert desk.join("b", position=1)[-1] == Start(0, 2, 0, ())
    assert desk.to("a") == [Start(0, 2, 0, ())]
    desk.hello("c")
    assert desk.join("c")[-1] == Start(2, 3, 0, ())


def test_a_run_that_had_begun_begins_again_as_soon_as_its_time_to_gather_is_over() -> None:
    desk = Desk(clients=3, quorum=1)
    desk.restart()
    for name, position in (("a", -1), ("b", 0)):
        desk.hello(name)
        desk.join(name, position=position)
    for _ in range(2):
        desk.handle(Tick(), after_s=2.9)
        for name in "ab":
            assert kinds(desk.say(name, Heartbeat(1.0, 1, 0, "waiting"))) == [Heartbeat]
    desk.handle(Tick(), after_s=0.2)
    assert (desk.to("a"), desk.to("b")) == ([Start(0, 2, 0, ())], [Start(0, 2, 0, ())])


def test_a_run_that_has_not_begun_waits_for_all_its_clients() -> None:
    for epoch, position in ((1, 0), (2, -1)):
        desk = Desk(clients=3, quorum=1)
        if epoch > 1:
            desk.restart()
        for name in "ab":
            desk.hello(name)
            desk.join(name, position=position)
        for _ in range(4):
            desk.handle(Tick(), after_s=3.0)
            for name in "ab":
                desk.say(name, Heartbeat(1.0, 1, 0, "waiting"))
        assert desk.coordinator.phase is Phase.GATHERING


def test_a_second_restart_expects_those_who_have_not_come_since_the_first() -> None:
    desk = Desk(quorum=1, deadline_s=1.0)
    desk.gather("a", "b")
    desk.commit("a", "b")
    desk.restart()
    back(desk, "a", (1, 0, 0, 0), 2)
    desk.upload("a", 1)
    desk.handle(Tick(), after_s=1.0)
    desk.work()
    assert desk.of(Committed)[0].contributors == ("a",)
    desk.restart()
    assert desk.coordinator.clients == ["a", "b"]


def test_one_that_was_asked_between_two_commits_to_make_up_for_another_waits_for_nothing_after_a_restart() -> None:
    """That is not in the journal: the next broker expects the other back, and draws nobody in its place."""
    desk = Desk(rounds=8, fraction=0.5, quorum=1, seed=4)
    desk.gather("a", "b")
    for round in range(2):
        desk.commit(next(name for name in "ab" if desk.coordinator._agenda.trains(round, name)), round=round)
    assert [name for round in (2, 3) for name in "ab" if desk.coordinator._agenda.trains(round, name)] == ["a", "b"]
    desk.say("b", Leave("for good"))
    desk.hello("c")
    before = desk.join("c", versions=(1, 2, 0, 0), position=2)[-1]
    assert isinstance(before, Start)
    assert (before.round, before.trains) == (2, (False, True))
    desk.restart()
    desk.handle(Tick())
    back(desk, "a", position=2)
    after = back(desk, "c", position=4)
    assert (after.round, after.blocks, after.trains) == (2, before.blocks, (False, False))
    assert desk.say("c", Offer(3, 3, NBYTES[3], 1, 1, 0.5)) == [Rejected(3, "the client was not drawn for this round")]
    desk.handle(Tick(), after_s=desk.config.network.timeout_s - 1)
    for name in "ac":
        desk.say(name, Heartbeat(0.0, -1, 0, "training"))
    assert desk.commit("a", round=2).contributors == ("a",)
    desk.handle(Tick(), after_s=1.5)
    desk.work()
    (committed,) = desk.of(Committed)
    assert (committed.round, committed.contributors) == (3, ()), "nobody is waited for who was not drawn"


def test_what_was_decided_ahead_stays_decided() -> None:
    """Blocks by importance, half of the clients drawn: each is told after the restart what it was told before."""
    desk = Desk(schedule={"order": "importance"}, fraction=0.5, rounds=30)
    desk.gather("a", "b")
    told = {}
    for round in range(5):
        block = desk.coordinator.block(round)
        assert block is not None
        for name in "ab":
            desk.upload(name, round, block)
        desk.work(fill=round)
        for name in "ab":
            (commit,) = [m for m in desk.to(name) if isinstance(m, Commit)]
            told[name, round + 2] = commit.blocks + commit.trains
    desk.restart()
    for name in "ab":
        start = back(desk, name, (0, 0, 0, 0), 6)
        assert [told[name, 5], told[name, 6]] == list(zip(start.blocks, start.trains, strict=True))


# The broker: who comes back while it runs


@pytest.mark.parametrize(("position", "first"), [(-1, 4), (1, 4), (2, 2), (3, 2), (4, 2)])
def test_who_has_not_fallen_behind_takes_part_in_the_open_rounds(position: int, first: int) -> None:
    desk = Desk(clients=3, quorum=2)
    desk.gather("a", "b", "c")
    desk.commit("a", "b", "c")
    desk.commit("a", "b", "c", round=1)
    desk.hello("c")
    assert desk.join("c", (1, 2, 0, 0), position=position)[-1] == Start(first, 3, 2, ())


def test_what_an_earlier_process_had_begun_its_successor_sends_anew() -> None:
    desk = Desk()
    desk.gather("a", "b")
    desk.say("a", Offer(0, 0, 1200, 1, 1, 0.5))
    desk.chunk("a", 0, 0, 0, 1024, fill=1)
    desk.hello("a", "0the")
    desk.join("a", position=1)
    assert desk.say("a", Offer(0, 0, 1200, 1, 1, 0.5)) == [Credit(0, 0, 0, 0, 1200)], "nothing of it is held"
    desk.upload("a", fill=2)
    desk.upload("b")
    folds = [fold for fold in desk.asked if isinstance(fold, Fold)]
    assert [bytes(fold.contributions[0].payload[:1]) for fold in folds] == [b"\2", b"\2"]


def test_a_session_that_another_has_replaced_is_fenced() -> None:
    """A connection that is half open: what still comes of it, late, neither counts nor ends anything."""
    desk = Desk()
    desk.gather("a", "b")
    desk.say("a", Offer(0, 0, 1200, 1, 1, 0.5))
    desk.chunk("a", 0, 0, 0, 1024, fill=1)
    new = b"a'"
    for message in (Hello("a", "0the", PROTOCOL), Join(MANIFEST.digest, BASE, TOKENIZER, 10, (0,) * 4, 0)):
        desk.handle(Received(new, Envelope(RUN, 1, message)))
    assert desk.coordinator.clients == ["a", "b"]
    assert kinds(desk.chunk("a", 0, 0, 1024, 176, fill=1)) == [Rejoin]
    assert kinds(desk.say("a", Heartbeat(1.0, 0, 0, "training"))) == [Rejoin]
    assert kinds(desk.say("a", Leave("interrupted"))) == [Goodbye]
    assert desk.coordinator.clients == ["a", "b"]
    desk.upload("b")
    assert not desk.asked, "of a's contribution nothing is there"


def test_clocks_that_jump_evict_nobody() -> None:
    """What peers say of their clocks goes into the trace; what times out goes by the time that `handle` is told."""
    desk = Desk()
    desk.gather("a", "b")
    for clock in (1e11, -1e11, 0.0, 3.2e7):
        desk.now += 5.0
        for name in "ab":
            desk.say(name, Heartbeat(clock, 0, 0, "training"))
        desk.handle(Tick())
        assert desk.coordinator.clients == ["a", "b"]


def test_an_upload_that_is_withheld_gives_up_its_place_when_its_client_is_lost() -> None:
    """Its reservation is a window, and the others' round closes without it."""
    desk = Desk(clients=3, quorum=2)
    desk.gather("a", "b", "c")
    desk.say("c", Offer(0, 0, 1200, 1, 1, 0.5))
    desk.chunk("c", 0, 0, 0, 1024)
    desk.upload("a")
    desk.upload("b")
    for _ in range(2):
        for name in "ab":
            desk.say(name, Heartbeat(0.0, 0, 0, "training"))
        desk.handle(Tick(), after_s=3.0)
    desk.work()
    assert desk.journal[0][0].contributors == ("a", "b")
    assert desk.coordinator._collection._rounds.find(0) is None


# The worker: what it has kept


def held(round: int) -> Held:
    payload = Payload.whole(memoryview(bytes([round]) * NBYTES[round % 4]), 1024)
    return Held(Offer(round, round % 4, NBYTES[round % 4], 7, 1, 0.5), payload)


def resumed(kept: Kept) -> Seat:
    seat = Seat()
    seat.handle(Due())
    seat.hear(Terms("{}", "a"), epoch=3)
    seat.handle(Prepared(seat.config, MANIFEST, BASE, TOKENIZER, 10, kept))
    return seat


KEPT = Kept(RUN, (5, 2, 3, 4), 7, (held(6), held(5)))


def test_a_worker_goes_on_from_what_it_has_kept() -> None:
    seat = Seat()
    seat.handle(Due())
    seat.hear(Terms("{}", "a"))
    said = seat.handle(Prepared(seat.config, MANIFEST, BASE, TOKENIZER, 10, KEPT))
    assert said == [Join(MANIFEST.digest, BASE, TOKENIZER, 10, (5, 2, 3, 4), 7)]
    said = seat.hear(Welcome(2)) + seat.hear(Start(5, 2, 5, ()))
    assert seat.of(Started) == [Started(7, 2, 5)], "what was trained is not trained again"
    assert [m.round for m in said if isinstance(m, Offer)] == [5, 6]
    assert not [m for m in said if isinstance(m, Abstain)]
    assert seat.participant.may_train(6)
    assert not seat.participant.may_train(7), "round 5 has not landed"
    said = seat.hear(Credit(5, 1, 0, 0, 2000))
    assert [m.offset for m in said if isinstance(m, Chunk)] == [0, 1024]
    seat.hear(Credit(5, 1, 0, 2000, 2000))
    assert [uploaded.round for uploaded in seat.of(Uploaded)] == [5]
    seat.land(5)
    assert seat.participant.may_train(7)


def test_what_was_kept_of_closed_rounds_is_let_go() -> None:
    seat = Seat()
    seat.handle(Due())
    seat.hear(Terms("{}", "a"))
    seat.handle(Prepared(seat.config, MANIFEST, BASE, TOKENIZER, 10, KEPT))
    seat.hear(Welcome(2))
    said = seat.hear(Start(6, 2, 6, (5,)))
    assert [m.round for m in said if isinstance(m, Offer)] == [6]
    assert not seat.of(Dismissed), "nobody has said that it was not counted"


def test_a_round_that_was_passed_and_of_which_nothing_was_kept_is_abstained_from() -> None:
    seat = Seat()
    seat.handle(Due())
    seat.hear(Terms("{}", "a"))
    kept = Kept(RUN, (5, 2, 3, 4), 7, (held(6),))
    seat.handle(Prepared(seat.config, MANIFEST, BASE, TOKENIZER, 10, kept))
    seat.hear(Welcome(2))
    said = seat.hear(Start(5, 2, 5, ()))
    assert [m.round for m in said if isinstance(m, Offer)] == [6]
    assert [m.round for m in said if isinstance(m, Abstain)] == [5]


def test_what_was_kept_of_rounds_that_the_journal_lacks_ends_the_session() -> None:
    seat = resumed(KEPT)
    seat.hear(Welcome(2), Start(3, 2, 3, ()), epoch=3)
    assert [gone.end for gone in seat.of(Gone)] == [End.REFUSED]


def test_what_was_kept_of_another_run_is_passed_over() -> None:
    seat = Seat()
    seat.handle(Due())
    seat.hear(Terms("{}", "a"))
    kept = Kept("run-0", (5, 2, 3, 4), 7, (held(6),))
    said = seat.handle(Prepared(seat.config, MANIFEST, BASE, TOKENIZER, 10, kept))
    assert said == [Join(MANIFEST.digest, BASE, TOKENIZER, 10, (0, 0, 0, 0), -1)]
    assert seat.of(Notice) == [Notice("what was kept is of another run (run-0); it is not used")]


def test_a_part_of_a_contribution_is_not_kept() -> None:
    payload = Payload(NBYTES[0], 1024)
    payload.append(Encoded(memoryview(bytes(1024))))
    part = Held(Offer(4, 0, NBYTES[0], 7, 1, 0.5), payload)
    with pytest.raises(AssertionError, match="of the contribution to round 4 a part was kept"):
        resumed(Kept(RUN, (0, 0, 0, 0), 5, (part,)))
    with pytest.raises(AssertionError, match="a contribution to round 6, kept at 5"):
        resumed(Kept(RUN, (0, 0, 0, 0), 5, (held(6),)))


def test_what_the_broker_said_before_its_restart_is_passed_over() -> None:
    seat = resumed(KEPT)
    seat.hear(Welcome(2), Start(5, 2, 5, ()), epoch=3)
    assert seat.participant.state is State.TRAINING
    for stale in (Rejoin("who are you?"), Terms("{}", "a"), Rejected(6, "closed"), Commit(5, 1, 0, -1, 0, 0, False)):
        assert seat.hear(stale, epoch=2) == []
    assert seat.participant.state is State.TRAINING
    assert seat.participant.told == 5
    seat.now += 1.0
    assert seat.hear(Rejoin("who are you?"), epoch=4) == [Hello("a", "5e55", PROTOCOL)]


def test_what_is_in_hand_is_not_waited_for_though_the_start_says_that_it_comes() -> None:
    """An old Join was answered, and an old Credit has told the broker that all of it is here: nothing will come."""
    seat = resumed(Kept(RUN, (5, 2, 3, 4), 5))
    seat.hear(Welcome(2), Start(5, 2, 5, (3, 4)), epoch=3)
    assert seat.participant.may_train(6)


def test_a_contribution_outlives_the_brokers_restart() -> None:
    seat = Seat()
    seat.handle(Due())
    seat.hear(Terms("{}", "a"))
    seat.prepared()
    seat.hear(Welcome(2), Start(0, 2, 0, ()))
    seat.contribute(0)
    seat.confirm(0)
    seat.hear(Rejoin("who are you?"), epoch=2)
    seat.handle(Ready(1, Encoded(memoryview(b""))))
    said = seat.hear(Terms("{}", "a"), epoch=2)
    assert [m.position for m in said if isinstance(m, Join)] == [1]
    said = seat.hear(Welcome(2), Start(0, 2, 0, ()), epoch=2)
    assert [m.round for m in said if isinstance(m, Offer)] == [0], "that the broker had it all is of no use now"
