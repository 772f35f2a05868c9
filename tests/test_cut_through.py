"""Cut-through: a block leaves while it is folded and its contributions come; attempts, and what of them counts."""

from __future__ import annotations

import weakref

import numpy as np
import pytest

from parablock import wire
from parablock.coordinator_events import Committed, Fold, Note, Send, Store, Tick, Unfit
from parablock.messages import (
    Abstain,
    Chunk,
    Commit,
    Credit,
    Heartbeat,
    Leave,
    Offer,
    Refused,
    Rejected,
    Rejoin,
    Start,
    Terms,
    Welcome,
)
from parablock.participant_events import (
    Arrived,
    Contribute,
    Dismissed,
    Dropped,
    Gone,
    Prepared,
    Received,
    Took,
    Uploaded,
)
from parablock.wire import Envelope
from tests.network import BASE, RUN, TOKENIZER
from tests.test_coordinator import MANIFEST, NBYTES, Desk, kinds
from tests.test_participant import Seat

SECONDS = {"heartbeat_s": 1.0, "timeout_s": 6.0, "resend_s": 3.0}
ONE_CHUNK = {"chunk_bytes": 1024, "window_bytes": 1024, **SECONDS}
EIGHT_CHUNKS = {"chunk_bytes": 1024, "window_bytes": 8192, **SECONDS}


def gathered(*names: str, rounds: int = 6, **config: object) -> Desk:
    desk = Desk(clients=len(names), rounds=rounds, **config)
    desk.gather(*names)
    return desk


def offer(desk: Desk, *names: str, round: int = 0) -> None:
    for name in names:
        desk.say(name, Offer(round, round % 4, NBYTES[round % 4], 1, 1, 0.5))


def send(desk: Desk, index: int, *names: str, round: int = 0) -> None:
    """One chunk of each of these contributions."""
    offset = 1024 * index
    for name in names:
        desk.chunk(name, round, round % 4, offset, min(1024, NBYTES[round % 4] - offset))


def begun(*names: str, **config: object) -> Desk:
    """Round 0 is on its way up: everybody has offered and sent its first chunk."""
    desk = gathered(*names, **config)
    offer(desk, *names)
    send(desk, 0, *names)
    return desk


def chunks(desk: Desk, name: str) -> list[tuple[int, int]]:
    """(attempt, offset) of the chunks that went to a client."""
    return [(m.attempt, m.offset) for m in desk.to(name) if isinstance(m, Chunk)]


def asked(desk: Desk) -> list[tuple[int, int]]:
    """(attempt, index) of the folds that were asked for and not answered yet."""
    return [(fold.attempt, fold.index) for fold in desk.asked if isinstance(fold, Fold)]


def credited(desk: Desk, name: str, credit: Credit) -> list[Envelope]:
    """What a credit sets free."""
    desk.say(name, credit)
    return [effect.envelope for effect in desk.of(Send)]


# The broker: on the way down while it comes up


def test_a_chunk_leaves_when_it_is_in_from_everybody_and_before_the_commit() -> None:
    desk = gathered("a", "b")
    offer(desk, "a", "b")
    send(desk, 0, "a")
    assert not desk.asked, "b's is missing"
    send(desk, 0, "b")
    assert asked(desk) == [(1, 0)]
    desk.work()
    assert chunks(desk, "a") == chunks(desk, "b") == [(1, 0)]
    assert not desk.of(Committed)
    send(desk, 1, "b", "a")
    desk.work(most=1)
    assert chunks(desk, "a") == [(1, 1024)]
    assert [(store.round, store.block, store.attempt) for store in desk.of(Store)] == [(0, 0, 1)]
    desk.work()
    assert desk.to("a") == desk.to("b") == [Commit(0, 0, 1, -1, 1200, 2, True)], "when it is durable"


def test_a_client_is_told_for_how_long_it_had_been_ready_when_the_last_one_was() -> None:
    desk = gathered("a", "b", "c")
    offer(desk, "a", "b")
    desk.say("c", Abstain(0, "no rows"))
    send(desk, 0, "a", "b")
    send(desk, 1, "a")
    desk.handle(Tick(), after_s=3.0)
    send(desk, 1, "b")
    desk.handle(Tick(), after_s=1.0)  # the fold takes its time, which is everybody's
    desk.work()
    assert [desk.to(name)[-1].ahead_s for name in "abc"] == [3.0, 0.0, 0.0]


def test_contributions_are_let_go_when_all_is_folded() -> None:
    """The disk may take its time, or be full; nothing is folded anew from here on."""
    desk = gathered("a", "b")
    offer(desk, "a", "b")
    gone = []
    for name in "ab":
        for offset, nbytes in ((0, 1024), (1024, 176)):
            payload = np.zeros(nbytes, np.uint8)
            gone.append(weakref.ref(payload))
            desk.say(name, Chunk(0, 0, 0, offset, wire.checksum(payload.data)), payload.data)
            del payload
    assert all(ref() is not None for ref in gone)
    desk.work(most=2)
    assert len(desk.of(Store)) == 1
    desk.effects.clear()
    assert all(ref() is None for ref in gone)
    desk.work()
    assert desk.of(Committed)[0].contributors == ("a", "b")


def test_nothing_is_folded_before_everybody_has_offered() -> None:
    desk = gathered("a", "b", "c")
    offer(desk, "a", "b")
    send(desk, 0, "a", "b")
    assert not desk.asked
    offer(desk, "c")
    assert not desk.asked
    send(desk, 0, "c")
    assert asked(desk) == [(1, 0)]
    assert desk.counting == ["a", "b", "c"]


def test_what_came_before_the_attempt_is_folded_when_it_begins() -> None:
    desk = gathered("a", "b")
    desk.upload("a")
    desk.upload("b")
    assert asked(desk) == [(1, 0), (1, 1)]


def test_a_chunk_and_its_message_are_made_once_for_all() -> None:
    desk = gathered("a", "b", "c")
    for name in "abc":
        desk.upload(name)
    desk.work(most=1)
    sent = [effect.envelope for effect in desk.of(Send) if isinstance(effect.envelope.message, Chunk)]
    assert len(sent) == 3
    assert all(envelope is sent[0] for envelope in sent)
    desk.work()
    desk.handle(Tick(), after_s=3.0)
    again = [e.envelope for e in desk.of(Send) if isinstance(e.envelope.message, Chunk) and e.peer == b"a"]
    assert again[0] is sent[0], "also when it is repeated"


def test_who_has_only_joined_is_sent_nothing_and_a_newcomer_gets_it_with_the_commit() -> None:
    desk = begun("a", "b")
    desk.work()
    desk.hello("c")
    assert desk.join("c")[-1] == Start(2, 3, 0, ())
    send(desk, 1, "a", "b")
    desk.work()
    assert desk.to("c") == [Commit(0, 0, 1, -1, 1200, 2, False)], "its answer says what it holds"
    assert kinds(desk.say("c", Credit(0, 0, 1, 0, 1200))) == [Chunk, Chunk]


def test_a_slow_client_delays_nobody() -> None:
    desk = gathered("a", "b", network=ONE_CHUNK)
    for round in range(3):
        desk.upload("a", round)
        desk.upload("b", round)
        desk.work()
        desk.confirm("a", round)
    assert desk.coordinator.next_round == 3, "b has confirmed nothing"


# The broker: another attempt


def test_who_leaves_takes_the_attempt_along() -> None:
    desk = begun("a", "b", "c", quorum=2)
    desk.work()
    assert chunks(desk, "a") == [(1, 0)]
    send(desk, 1, "a", "b")
    desk.say("c", Leave("interrupted"))
    assert asked(desk) == [(2, 0), (2, 1)]
    assert desk.counting == ["a", "b"]
    desk.work()
    assert chunks(desk, "a") == chunks(desk, "b") == [(2, 0), (2, 1024)], "from the first one on"
    assert desk.to("a")[-1] == Commit(0, 0, 2, -1, 1200, 2, True)


def test_what_is_still_folded_of_a_given_up_attempt_goes_nowhere() -> None:
    desk = gathered("a", "b", "c", quorum=2)
    for name in "ab":
        desk.upload(name)
    offer(desk, "c")
    send(desk, 0, "c")
    assert asked(desk) == [(1, 0)]
    desk.say("c", Abstain(0, "diverged"))
    assert asked(desk) == [(1, 0), (2, 0), (2, 1)]
    desk.work(most=1)
    assert desk.effects == []
    desk.work()
    assert desk.of(Committed)[0].contributors == ("a", "b")


def test_an_unfit_chunk_is_found_while_the_round_is_open() -> None:
    desk = begun("a", "b", "c", quorum=2)
    desk.asked.clear()
    desk.handle(Unfit(0, 1, {"b": "not finite"}))
    assert desk.to("b") == [Rejected(0, "not finite")]
    assert asked(desk) == [(2, 0)]
    assert desk.counting == ["a", "c"]
    assert desk.chunk("b", 0, 0, 1024, 176) == [], "it has not heard of it yet"
    desk.handle(Unfit(0, 1, {"b": "not finite"}))
    assert desk.effects == [], "from a fold of the first attempt"
    send(desk, 1, "a", "c")
    desk.work()
    assert desk.of(Committed)[0].contributors == ("a", "c")


def test_another_process_is_not_to_blame_for_what_the_one_before_had_sent() -> None:
    desk = begun("a", "b")
    assert asked(desk) == [(1, 0)]
    desk.say("b", Leave("interrupted"))
    desk.hello("b", token="0the")
    desk.join("b")
    offer(desk, "b")
    desk.handle(Unfit(0, 1, {"b": "not finite"}))
    assert not desk.of(Note), "that was the first attempt's b"


def test_a_contribution_of_one_that_has_gone_counts_and_the_attempt_with_it() -> None:
    desk = begun("a", "b", quorum=1)
    send(desk, 1, "b")
    desk.say("b", Leave("interrupted"))
    send(desk, 1, "a")
    assert asked(desk) == [(1, 0), (1, 1)]
    desk.work()
    assert desk.of(Committed)[0].contributors == ("a", "b")


def test_the_same_process_comes_back_and_the_attempt_goes_on() -> None:
    desk = begun("a", "b")
    desk.work()
    desk.hello("b")
    assert desk.join("b")[-1] == Start(0, 2, 0, ()), "the quorum needs it"
    offer(desk, "b")
    assert desk.to("b") == [Credit(0, 0, 0, 1024, 1200)]
    send(desk, 1, "b", "a")
    assert asked(desk) == [(1, 1)]
    desk.work()
    assert chunks(desk, "b") == [], "it will say what it holds"
    assert kinds(desk.to("b")) == [Commit]
    assert [m.offset for m in desk.say("b", Credit(0, 0, 1, 1024, 1200)) if isinstance(m, Chunk)] == [1024]


def test_at_the_deadline_it_is_folded_anew_without_those_that_were_expected() -> None:
    desk = begun("a", "b", "c", quorum=2, deadline_s=5.0)
    desk.work()
    send(desk, 1, "a", "b")
    desk.handle(Tick(), after_s=5.0)
    assert asked(desk) == [(2, 0), (2, 1)]
    desk.work()
    assert chunks(desk, "c") == [(2, 0), (2, 1024)]
    assert kinds(desk.to("c"))[-2:] == [Rejected, Commit]
    assert desk.of(Committed)[0].contributors == ("a", "b")


def test_who_was_late_is_not_waited_for_the_next_time() -> None:
    desk = gathered("a", "b", "c", quorum=2, deadline_s=5.0)
    desk.upload("a")
    desk.upload("b")
    desk.handle(Tick(), after_s=5.0)
    desk.work()
    offer(desk, "a", "b", round=1)
    send(desk, 0, "a", "b", round=1)
    assert asked(desk) == [(1, 0)], "c has not even offered"
    assert desk.counting == ["a", "b"]
    send(desk, 1, "a", "b", round=1)
    desk.work()
    assert not desk.of(Committed), "but it may still come"
    desk.upload("c", round=1)
    assert desk.counting == ["a", "b", "c"]
    desk.work()
    assert desk.of(Committed)[0].contributors == ("a", "b", "c")
    assert desk.to("a")[-1] == Commit(1, 1, 2, -1, NBYTES[1], 3, True)
    offer(desk, "a", "b", round=2)
    send(desk, 0, "a", "b", round=2)
    assert not desk.asked, "this time it was in time"


def test_where_there_is_no_deadline_everybody_is_waited_for() -> None:
    desk = gathered("a", "b", "c", quorum=2)
    desk.upload("a")
    desk.upload("b")
    desk.say("c", Abstain(0, "diverged"))
    desk.work()
    assert desk.of(Committed)
    offer(desk, "a", "b", round=1)
    send(desk, 0, "a", "b", round=1)
    assert not desk.asked


def test_what_was_folded_of_nobody_in_the_end_changes_nothing() -> None:
    desk = begun("a", "b", quorum=1)
    desk.work()
    desk.say("a", Abstain(0, "diverged"))
    desk.work()
    desk.say("b", Abstain(0, "diverged"))
    assert desk.to("a") == [], "not before it is durable"
    desk.work()
    assert desk.of(Committed)[0].contributors == ()
    assert desk.to("a") == desk.to("b") == [Commit(0, 0, 0, -1, 0, 0, False)]


# The broker: credits


@pytest.mark.parametrize("attempt", [0, 2])
def test_a_credit_of_another_attempt_is_passed_over(attempt: int) -> None:
    desk = gathered("a", "b")
    desk.commit("a", "b")
    assert desk.say("a", Credit(0, 0, attempt, 5000, 5000)) == []
    assert desk.coordinator.clients == ["a", "b"]
    desk.handle(Tick(), after_s=3.0)
    assert kinds(desk.to("a")) == [Commit, Chunk, Chunk], "it confirms nothing"


def test_a_credit_of_a_given_up_attempt_is_passed_over() -> None:
    desk = begun("a", "b", "c", quorum=2, network=ONE_CHUNK)
    desk.work()
    send(desk, 1, "a", "b")
    desk.say("c", Leave("interrupted"))
    assert desk.say("a", Credit(0, 0, 1, 1024, 1200)) == []
    desk.work()
    assert chunks(desk, "a") == [(2, 0)], "the window holds one"
    assert [m.offset for m in desk.say("a", Credit(0, 0, 2, 1024, 1200)) if isinstance(m, Chunk)] == [1024]


@pytest.mark.parametrize(
    ("held", "until", "says"),
    [
        (1200, 1200, "of which not all was made yet"),
        (-1024, 1200, "credit of -1024 held"),
        (0, -1, "credit of 0 held, up to -1"),
        (1000, 1200, "credit of 1000 held"),
        (1024, 0, "credit of 1024 held, up to 0"),
        (0, 1 << 40, "for a transfer of 1200 bytes"),
    ],
    ids=["more than was made", "negative", "until before the beginning", "within a chunk", "backwards", "far beyond"],
)
def test_an_absurd_credit_ends_the_session_and_nobody_elses(held: int, until: int, says: str) -> None:
    desk = begun("a", "b", "c", quorum=2)
    desk.work()
    (refused,) = desk.say("c", Credit(0, 0, 1, held, until))
    assert isinstance(refused, Refused)
    assert says in refused.reason
    assert desk.coordinator.clients == ["a", "b"]
    send(desk, 1, "a", "b")
    desk.work()
    assert desk.of(Committed)[0].contributors == ("a", "b")


def test_changes_under_way_do_not_keep_back_the_version_that_they_build_on() -> None:
    """A window holds one chunk in full. The ends of the changes are not confirmed before block 0 is there."""
    desk = gathered("a", "b", rounds=12, codec={"down": "int4"}, network=ONE_CHUNK)
    for round in range(4):
        desk.commit("a", "b", round=round)
    desk.hello("c")
    desk.join("c")
    desk.commit("a", "b", round=4)
    assert chunks(desk, "c") == [(1, 0), (1, 136)]
    assert desk.say("c", Credit(4, 0, 1, 136, 160)) == [], "the end of it is under way, as far as one can tell"
    desk.say("c", Credit(0, 0, 0, 0, 1024))
    assert chunks(desk, "c") == [(0, 0)]


def test_a_lost_commit_is_repeated_until_the_last_byte_is_confirmed() -> None:
    desk = gathered("a", "b")
    desk.commit("a", "b")
    desk.confirm("b", 0)
    desk.say("a", Credit(0, 0, 1, 1024, 1200))
    for _ in range(3):
        desk.handle(Tick(), after_s=3.0)
        assert desk.to("a")[0] == Commit(0, 0, 1, -1, 1200, 2, True)
        assert chunks(desk, "a") == [(1, 1024)]
        assert desk.to("b") == []
        desk.say("a", Heartbeat(0.0, 1, 0, "training"))
        desk.say("b", Heartbeat(0.0, 1, 0, "training"))
    desk.confirm("a", 0)
    desk.handle(Tick(), after_s=3.0)
    assert desk.to("a") == []


def test_a_tick_is_asked_for_in_time() -> None:
    desk = gathered("a", "b")
    began = desk.now
    desk.commit("a", "b")
    desk.confirm("b", 0)
    ticks, resent, lost = 0, [], []
    while (due := desk.coordinator.deadline()) is not None:
        assert due > desk.now, "the broker would spin"
        desk.handle(Tick(), after_s=due - desk.now)
        ticks += 1
        resent += [desk.now - began] * len(chunks(desk, "a"))
        lost += [(note.client, desk.now - began) for note in desk.of(Note) if note.client]
    assert resent == [3.0, 3.0]
    assert lost == [("a", 6.0), ("b", 6.0)]
    assert ticks < 10


# The broker: uploads ahead of their round


def test_a_contribution_ahead_of_its_round_takes_one_window_until_its_turn_comes() -> None:
    desk = gathered("a", "b", network=ONE_CHUNK)
    desk.upload("a")
    assert desk.say("a", Offer(1, 1, 2000, 1, 1, 0.5)) == [Credit(1, 1, 0, 0, 1024)]
    assert desk.chunk("a", 1, 1, 0, 1024) == [Credit(1, 1, 0, 1024, 1024)], "no more for now"
    assert desk.say("a", Offer(1, 1, 2000, 1, 1, 0.5)) == [Credit(1, 1, 0, 1024, 1024)], "however often it asks"
    desk.upload("b")
    desk.work()
    assert Credit(1, 1, 0, 1024, 2000) in desk.to("a"), "its turn has come"
    assert desk.chunk("a", 1, 1, 1024, 976) == [Credit(1, 1, 0, 2000, 2000)]


def test_a_chunk_of_a_paused_contribution_beyond_its_window_is_not_taken() -> None:
    desk = gathered("a", "b", network=ONE_CHUNK)
    desk.say("a", Offer(1, 1, 2000, 1, 1, 0.5))
    desk.chunk("a", 1, 1, 0, 1024)
    assert desk.chunk("a", 1, 1, 1024, 976) == [Credit(1, 1, 0, 1024, 1024)]


def test_what_is_ahead_of_its_round_is_not_folded_before_its_turn() -> None:
    desk = gathered("a", "b")
    for round in (1, 0):
        for name in "ab":
            if (round, name) != (0, "b"):
                desk.upload(name, round)
    assert not desk.asked
    desk.upload("b")
    desk.work()
    assert [committed.round for committed in desk.of(Committed)] == [0, 1]


def test_a_paused_contribution_of_one_that_is_away_is_resumed_when_it_is_back() -> None:
    desk = gathered("a", "b", quorum=1, network=ONE_CHUNK)
    desk.upload("a")
    desk.say("b", Offer(1, 1, 2000, 1, 1, 0.5))
    desk.chunk("b", 1, 1, 0, 1024)
    desk.say("b", Abstain(0, "diverged"))
    desk.hello("b")
    desk.work()
    assert desk.coordinator.next_round == 1
    desk.join("b")
    assert desk.say("b", Offer(1, 1, 2000, 1, 1, 0.5)) == [Credit(1, 1, 0, 1024, 2000)]


def test_one_answer_of_a_late_joiner_sets_free_no_other_block() -> None:
    desk = gathered("a", "b", network=EIGHT_CHUNKS)
    for round in range(2):
        desk.commit("a", "b", round=round)
    desk.hello("c")
    desk.join("c")
    set_free = [envelope.message for envelope in credited(desk, "c", Credit(0, 0, 1, 1024, 1200))]
    assert [(m.round, m.offset) for m in set_free if isinstance(m, Chunk)] == [(0, 1024)], "of block 1 it may hold more"


def test_grants_come_every_quarter_of_the_window_or_each_second() -> None:
    desk = gathered("a", "b", schedule={"order": "descending"}, network=EIGHT_CHUNKS)
    assert desk.say("a", Offer(0, 3, 2560, 1, 1, 0.5)) == [Credit(0, 3, 0, 0, 2560)]
    assert desk.chunk("a", 0, 3, 0, 1024) == [], "less than 2048 bytes, just now"
    desk.now += 1.0
    assert desk.chunk("a", 0, 3, 1024, 1024) == [Credit(0, 3, 0, 2048, 2560)]
    assert desk.chunk("a", 0, 3, 2048, 512) == [Credit(0, 3, 0, 2560, 2560)], "all of it"


# The broker: changes and full blocks


def test_only_who_holds_the_version_before_gets_the_change() -> None:
    desk = gathered("a", "b", rounds=12, codec={"down": "bfloat16"})
    for round in range(5):  # block 0 in rounds 0 and 4
        desk.commit("a", "b", round=round)
    assert desk.to("a")[-1] == Commit(4, 0, 1, 0, 600, 2, True)
    desk.hello("c")
    said = desk.join("c", versions=(1, 2, 3, 4))
    assert [m for m in said if isinstance(m, Commit)] == [Commit(4, 0, 1, 0, 600, 2, False)]
    desk.hello("d")
    said = desk.join("d", versions=(0, 2, 3, 4))
    assert [m for m in said if isinstance(m, Commit)] == [Commit(4, 0, 0, 0, 1200, 2, False)]
    first, second = credited(desk, "d", Credit(4, 0, 0, 0, 1200))
    assert first.payload is not None
    assert second.payload is not None
    assert bytes(first.payload) + bytes(second.payload) == bytes([4]) * 1200, "the values, in float32"


def test_a_change_that_nobody_can_be_in_the_middle_of_is_let_go() -> None:
    desk = gathered("a", "b", rounds=12, codec={"down": "bfloat16"})
    for round in range(4):
        desk.commit("a", "b", round=round)
    desk.hello("c")
    said = desk.join("c")
    attempts = {m.round: (m.attempt, m.nbytes) for m in said if isinstance(m, Commit)}
    assert attempts[0] == (0, NBYTES[0]), "c holds the version before, but the change is gone"
    assert attempts[3] == (1, NBYTES[3] // 2)


def test_a_lossless_block_goes_to_newcomers_as_it_went_to_all() -> None:
    desk = gathered("a", "b", rounds=12)
    for round in range(5):
        desk.commit("a", "b", round=round)
    desk.hello("c")
    assert {m.attempt for m in desk.join("c") if isinstance(m, Commit)} == {1}


# The worker


@pytest.fixture
def seat() -> Seat:
    """In training from round 0 on."""
    seat = Seat()
    seat.hear(Terms("{}", "a"))
    seat.prepared()
    seat.hear(Welcome(2), Start(0, 2, 0, ()))
    return seat


COMMIT = Commit(0, 0, 1, -1, 1200, 2, True)
CONTRIBUTE = Contribute(0, 0, 7, 1, 0.5)


def test_what_comes_before_the_commit_is_taken_and_its_last_byte_is_confirmed_with_it(seat: Seat) -> None:
    assert seat.chunk(0, 0, 1024, fill=1) == [Credit(0, 0, 1, 1024, 1200)]
    assert [(t.round, t.block, t.attempt, t.index) for t in seat.of(Took)] == [(0, 0, 1, 0)]
    assert seat.chunk(0, 1024, 176, fill=2) == []
    assert [took.index for took in seat.of(Took)] == [1]
    assert not seat.of(Arrived), "it may come to nothing"
    assert not seat.participant.arrived_through(0)
    assert seat.chunk(0, 1024, 176, fill=2) == [], "repeated"
    assert seat.participant.told == 0
    assert seat.hear(COMMIT) == [Credit(0, 0, 1, 1200, 1200)]
    (arrived,) = seat.of(Arrived)
    assert (arrived.round, arrived.attempt, arrived.base, arrived.contributors, arrived.counted) == (0, 1, -1, 2, True)
    assert b"".join(seat.taken[0, 1]) == b"\1" * 1024 + b"\2" * 176
    assert seat.participant.arrived_through(0)


def test_grants_of_a_block_come_every_quarter_of_the_window_or_each_second() -> None:
    seat = Seat(network=EIGHT_CHUNKS, schedule={"order": "descending"})
    seat.hear(Terms("{}", "a"))
    seat.prepared()
    seat.hear(Welcome(2), Start(0, 2, 0, ()))
    assert seat.hear(Commit(0, 3, 1, -1, 2560, 2, True)) == [Credit(0, 3, 1, 0, 2560)]
    assert seat.chunk(0, 0, 1024, block=3) == [], "less than 2048 bytes, just now"
    seat.now += 1.0
    assert seat.chunk(0, 1024, 1024, block=3) == [Credit(0, 3, 1, 2048, 2560)]


def test_a_higher_attempt_takes_the_place_of_a_lower_one(seat: Seat) -> None:
    seat.chunk(0, 0, 1024, fill=1, attempt=1)
    assert seat.chunk(0, 0, 1024, fill=2, attempt=3) == [Credit(0, 0, 3, 1024, 1200)]
    assert seat.of(Dropped) == [Dropped(0, 1)]
    for attempt in (1, 2):
        assert seat.chunk(0, 1024, 176, fill=1, attempt=attempt) == []
        assert seat.effects == [], "late, of one that was given up"
    seat.chunk(0, 1024, 176, fill=2, attempt=3)
    seat.hear(Commit(0, 0, 3, -1, 1200, 2, True))
    assert [arrived.attempt for arrived in seat.of(Arrived)] == [3]
    assert b"".join(seat.taken[0, 3]) == b"\2" * 1200


def test_a_commit_of_another_attempt_drops_what_was_taken(seat: Seat) -> None:
    seat.chunk(0, 0, 1024, attempt=1)
    assert seat.hear(Commit(0, 0, 2, -1, 1200, 1, False)) == [Credit(0, 0, 2, 0, 1200)]
    assert seat.of(Dropped) == [Dropped(0, 1)]
    assert seat.chunk(0, 0, 1024, attempt=3) == [], "what counts is settled"
    assert seat.effects == []
    seat.chunk(0, 0, 1024, fill=2, attempt=2)
    seat.chunk(0, 1024, 176, fill=2, attempt=2)
    assert [arrived.attempt for arrived in seat.of(Arrived)] == [2]


def test_a_commit_that_changes_nothing_drops_what_was_taken(seat: Seat) -> None:
    seat.chunk(0, 0, 1024)
    assert seat.hear(Commit(0, 0, 0, -1, 0, 0, False)) == [Credit(0, 0, 0, 0, 0)]
    assert seat.of(Dropped) == [Dropped(0, 1)]
    assert [arrived.contributors for arrived in seat.of(Arrived)] == [0]


def test_a_chunk_after_its_block_has_arrived_is_passed_over(seat: Seat) -> None:
    seat.land(0)
    assert seat.chunk(0, 0, 1024) == []
    assert seat.chunk(0, 0, 1024, attempt=2) == []
    assert seat.effects == []


@pytest.mark.parametrize(
    ("round", "block", "attempt"),
    [(0, 0, 0), (0, 1, 1), (0, 4, 1), (0, 8191, 1), (2, 2, 1), (2**31, 0, 1), (-1, 3, 1)],
    ids=[
        "in full",
        "another block",
        "no such block",
        "nor this",
        "too far ahead",
        "after the last",
        "before the first",
    ],
)
def test_a_chunk_that_may_not_come_is_passed_over(seat: Seat, round: int, block: int, attempt: int) -> None:
    assert seat.chunk(round, 0, 1024, block=block, attempt=attempt) == []
    assert seat.effects == []


def test_a_chunk_of_a_round_after_the_last_is_passed_over(seat: Seat) -> None:
    for round in range(8):
        seat.land(round)
    assert seat.chunk(8, 0, 1024) == []
    assert seat.effects == []


@pytest.mark.parametrize("round", [-1, 2**31])
def test_a_chunk_of_what_is_no_round_is_passed_over_at_once(round: int) -> None:
    """The order at random is drawn up to the round that is asked for: for 2³¹ that would take hours."""
    seat = Seat(schedule={"order": "random"})
    seat.hear(Terms("{}", "a"))
    seat.prepared()
    seat.hear(Welcome(2), Start(0, 2, 0, ()))
    assert seat.chunk(round, 0, 1024) == []
    assert seat.effects == []


def test_a_chunk_of_the_next_round_but_one_may_overtake_the_commit(seat: Seat) -> None:
    assert seat.chunk(1, 0, 1024) == [Credit(1, 1, 1, 1024, 2000)]


def test_before_the_start_no_chunk_may_come_without_its_commit() -> None:
    seat = Seat()
    seat.hear(Terms("{}", "a"))
    seat.prepared()
    for message in (Welcome(2), COMMIT):
        assert seat.chunk(0, 0, 1024) == []
        assert not seat.of(Took)
        seat.hear(message)
    assert seat.chunk(0, 0, 1024) == [Credit(0, 0, 1, 1024, 1200)]


def test_a_chunk_that_cannot_be_of_the_attempt_ends_the_session(seat: Seat) -> None:
    seat.chunk(0, 512, 1024)
    (gone,) = seat.of(Gone)
    assert "a chunk of 1024 bytes at 512" in gone.reason


def test_an_attempt_is_resumed_after_a_new_greeting(seat: Seat) -> None:
    seat.chunk(0, 0, 1024, fill=1)
    seat.hear(Rejoin("who are you?"))
    assert not seat.of(Dropped)
    seat.greet(Start(2, 2, 0, ()))
    assert not seat.of(Dropped)
    assert seat.chunk(0, 0, 1024, fill=1) == [Credit(0, 0, 1, 1024, 1200)], "held; go on from there"
    assert not seat.of(Took)
    seat.chunk(0, 1024, 176, fill=2)
    assert [took.index for took in seat.of(Took)] == [1]
    seat.hear(COMMIT)
    assert len(seat.of(Arrived)) == 1
    assert b"".join(seat.taken[0, 1]) == b"\1" * 1024 + b"\2" * 176


def test_what_another_attempt_had_begun_is_dropped_after_a_new_greeting(seat: Seat) -> None:
    seat.chunk(0, 0, 1024)
    seat.hear(Rejoin("who are you?"))
    seat.greet(Start(2, 2, 1, (0,)))
    assert seat.hear(Commit(0, 0, 2, -1, 1200, 2, True)) == [Credit(0, 0, 2, 0, 1200)]
    assert seat.of(Dropped) == [Dropped(0, 1)]


def test_what_the_broker_does_not_owe_any_more_is_dropped_at_the_start(seat: Seat) -> None:
    seat.chunk(0, 0, 1024)
    seat.hear(Rejoin("who are you?"), Terms("{}", "a"), Welcome(2))
    seat.hear(Start(6, 2, 5, (4,)))  # block 0 was made again in round 4
    assert seat.of(Dropped) == [Dropped(0, 1)]


def test_an_attempt_of_a_broker_that_has_begun_anew_is_another_one(seat: Seat) -> None:
    """What was not committed the next incarnation makes again, perhaps of others, and counts attempts from 1."""
    seat.chunk(0, 0, 1024, fill=1)
    seat.hear(Rejoin("who are you?"))
    seat.hear(Terms("{}", "a"), Welcome(2), Start(0, 2, 0, ()), epoch=2)
    payload = memoryview(bytes([9]) * 1024)
    header = Chunk(0, 0, 1, 0, wire.checksum(payload))
    seat.handle(Received(Envelope(RUN, 2, header, payload)))
    assert [bytes(took.payload[:1]) for took in seat.of(Took)] == [b"\x09"], "or two attempts make one block"


def test_a_lossy_codec_has_blocks_of_other_sizes_as_change_and_in_full() -> None:
    seat = Seat(codec={"down": "bfloat16"})
    seat.hear(Terms("{}", "a"))
    seat.handle(Prepared(seat.config, MANIFEST, BASE, TOKENIZER, 10))
    seat.hear(Welcome(2), Start(2, 2, 2, (0, 1)))
    assert seat.hear(Commit(0, 0, 0, -1, 1200, 2, False)) == [Credit(0, 0, 0, 0, 1200)]
    assert seat.hear(Commit(1, 1, 1, -1, 1000, 2, False)) == [Credit(1, 1, 1, 0, 1000)]
    seat.hear(Commit(2, 2, 1, -1, NBYTES[2], 2, False))
    assert "not in the manifest" in seat.of(Gone)[0].reason


def test_a_chunk_of_a_contribution_leaves_when_it_is_encoded(seat: Seat) -> None:
    assert seat.handle(CONTRIBUTE) == [Offer(0, 0, 1200, 7, 1, 0.5)]
    (chunk,) = seat.ready(0, 1024)
    assert isinstance(chunk, Chunk)
    assert (chunk.attempt, chunk.offset) == (0, 0)
    seat.hear(Credit(0, 0, 0, 1024, 1200))
    assert not seat.of(Uploaded)
    (chunk,) = seat.ready(0, 176)
    assert isinstance(chunk, Chunk)
    assert chunk.offset == 1024
    seat.confirm(0)
    assert len(seat.of(Uploaded)) == 1


def test_a_credit_for_what_is_not_encoded_yet_breaks_the_protocol(seat: Seat) -> None:
    seat.handle(CONTRIBUTE)
    seat.hear(Credit(0, 0, 0, 1024, 1200))
    assert "not all was made yet" in seat.of(Gone)[0].reason


def test_what_an_earlier_process_has_sent_whole_is_not_sent_again(seat: Seat) -> None:
    """The broker says so while this process is still encoding; what it encodes later stays here."""
    seat.handle(CONTRIBUTE)
    assert kinds(seat.ready(0, 1024)) == [Chunk]
    seat.confirm(0)
    assert seat.of(Uploaded)
    assert seat.ready(0, 176) == []
    assert not any(isinstance(said, Offer | Chunk) for said in seat.handle(Tick(), after_s=10.0))
    seat.hear(Commit(0, 0, 1, -1, 1200, 2, True))
    assert not seat.of(Dismissed)


def test_what_is_encoded_while_nobody_listens_is_sent_later(seat: Seat) -> None:
    seat.handle(CONTRIBUTE)
    seat.ready(0, 1024)
    seat.hear(Rejoin("who are you?"))
    assert seat.ready(0, 176) == []
    seat.greet(Start(0, 2, 0, ()))
    said = seat.hear(Credit(0, 0, 0, 1024, 1200))
    assert [m.offset for m in said if isinstance(m, Chunk)] == [1024]


def test_what_is_encoded_after_the_round_was_closed_is_let_go(seat: Seat) -> None:
    seat.handle(CONTRIBUTE)
    seat.hear(Commit(0, 0, 0, -1, 0, 0, False))
    assert seat.ready(0, 1024) == []
    assert seat.effects == []
