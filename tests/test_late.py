"""Late contributions: what is owed, held and counted, once; at the broker, at the worker, and between the two."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from parablock.coordinator_events import Committed, Fold, Note, Store, Tick, Unfit
from parablock.late import VISITS, LateContributions
from parablock.messages import (
    Abstain,
    Chunk,
    Commit,
    Credit,
    Heartbeat,
    Late,
    Leave,
    Offer,
    Refused,
    Rejected,
    Rejoin,
    Start,
    Terms,
    Welcome,
)
from parablock.participant_events import Contribute, Deferred, Dismissed, Settled, Uploaded
from parablock.participant_events import Tick as Due
from parablock.rounds import Upload
from parablock.transfer import Incoming
from tests.network import Faults, Habits, Incident, Network, config_of, part_of
from tests.test_coordinator import NBYTES, Desk, kinds
from tests.test_participant import Seat

FOLD: dict[str, Any] = {"late": "fold"}


def upload(round: int, block: int, *, whole: bool) -> Upload:
    upload = Upload("5e55", Offer(round, block, 8, 1, 1, 0.5), Incoming(8, 8, 1024), 0.0)
    if whole:
        upload.incoming.take(0, memoryview(bytes(8)))
    return upload


# What is owed


def test_what_is_owed_can_be_claimed_once() -> None:
    late = LateContributions()
    late.close(0, 1, {"b", "c"}, empty=False)
    assert late.claim("a", 1, 0) is None, "it was counted, or no member"
    assert late.claim("b", 0, 0) is None, "of another block"
    assert late.claim("b", 1, 4) is None, "of another round"
    assert late.claim("b", 1, 0) == 1
    assert late.claim("b", 1, 0) is None
    late.close(4, 1, {"c"}, empty=False)
    assert [late.claim("c", 1, 4), late.claim("c", 1, 0)] == [1, 2]


def test_what_is_owed_is_forgotten_in_the_end() -> None:
    late = LateContributions()
    for round in range(VISITS + 1):
        late.close(round, 0, {"a"}, empty=False)
    assert late.claim("a", 0, 0) is None
    assert late.claim("a", 0, 1) == VISITS


def test_what_is_complete_is_ready_in_roster_order_for_its_block() -> None:
    late = LateContributions()
    for client, block, whole in (("c", 0, True), ("a", 0, True), ("d", 0, False), ("b", 1, True)):
        late.hold(client, upload(3, block, whole=whole), 1)
    assert [each.label for each in late.ready(0)] == ["a@3", "c@3"]


def test_at_the_close_of_its_block_what_is_not_complete_goes() -> None:
    late = LateContributions()
    whole, part = (late.hold(name, upload(0, 0, whole=name == "a"), 1) for name in "ab")
    other = late.hold("c", upload(1, 1, whole=False), 1)
    assert late.close(4, 0, set(), empty=True) == [part]
    assert (late.held("a"), whole.missed, other.missed) == (whole, 2, 1)
    late.count(whole, 8)
    assert late.close(8, 0, set(), empty=False) == []
    assert (late.held("a"), late.held("c")) == (None, other)
    assert (late.counted_in("a", 0), late.counted_in("a", 4), late.counted_in("c", 1)) == (8, None, None)


# The broker


@pytest.fixture
def desk() -> Desk:
    """a and b have closed round 0, of block 0, at its deadline; of c's contribution one of two chunks is in."""
    desk = Desk(clients=3, rounds=12, quorum=2, deadline_s=5.0, policy=FOLD)
    desk.gather("a", "b", "c")
    desk.say("c", Offer(0, 0, 1200, 7, 1, 0.5))
    desk.chunk("c", 0, 0, 0, 1024, fill=9)
    close(desk, 0)
    return desk


def close(desk: Desk, round: int, *others: str) -> Committed:
    """By a, b and others, at the deadline."""
    for name in ("a", "b", *others):
        desk.upload(name, round)
    desk.handle(Tick(), after_s=5.0)
    desk.work()
    (committed,) = desk.of(Committed)
    for name in ("a", "b", "c"):
        desk.confirm(name, round, committed_attempt(desk, name, round))
    return committed


def committed_attempt(desk: Desk, name: str, round: int) -> int:
    downloads = [session.downloads.get(round) for session in desk.coordinator._roster.named(name)]
    return next((download.shipment.attempt for download in downloads if download is not None), 1)


def finish(desk: Desk) -> list[Any]:
    return desk.chunk("c", 0, 0, 1024, 176, fill=9)


def test_what_was_on_its_way_goes_on_and_counts_in_the_next_round_of_its_block(desk: Desk) -> None:
    late = [note for note in desk.notes if note.kind == "late"]
    assert late == [Note("late", "c", "round 0: may count in the next round of block 0")]
    assert finish(desk) == [Credit(0, 0, 0, 1200, 1200)]
    assert [close(desk, round).folded_late for round in (1, 2, 3)] == [()] * 3, "of other blocks"
    for name in "bca":
        desk.upload(name, 4, fill=1)
    (fold, *_) = [asked for asked in desk.asked if isinstance(asked, Fold) and len(asked.contributions) == 4]
    parts = [(part.client, part.missed, part.weight, bytes(part.payload[:1])) for part in fold.contributions]
    assert parts == [("a", 0, 1, b"\1"), ("b", 0, 1, b"\1"), ("c", 0, 1, b"\1"), ("c@0", 1, 7, b"\11")]
    desk.work()
    (committed,) = desk.of(Committed)
    assert (committed.contributors, committed.folded_late) == (("a", "b", "c"), ("c@0",))
    assert committed.reason.startswith("3 contributions and 1 late; ")
    assert committed.loss == 0.5
    assert Late(0, 4) in desk.to("c")
    assert desk.to("a")[-1] == Commit(4, 0, committed_attempt(desk, "a", 4), 0, 1200, 4, True)
    assert desk.of(Note) == [Note("folded", "c", "round 0: counted in round 4, its tokens by 0.5^1")]
    assert desk.say("c", Offer(0, 0, 1200, 7, 1, 0.5)) == [Late(0, 4)], "however often it asks"
    assert all(not committed.folded_late for committed in (close(desk, round, "c") for round in range(5, 9)))


def test_bytes_of_late_ones_are_counted_when_they_come(desk: Desk) -> None:
    finish(desk)
    assert close(desk, 1).bytes_up == 2 * NBYTES[1] + 176


@pytest.mark.parametrize("policy", ["discard", "fold"])
def test_an_offer_after_the_close_is_late_once(policy: str) -> None:
    desk = Desk(clients=3, rounds=12, quorum=2, deadline_s=5.0, policy={"late": policy})
    desk.gather("a", "b", "c")
    assert close(desk, 0).late == 0, "nothing of it was on its way"
    answers = [desk.say("c", Offer(0, 0, 1200, 7, 1, 0.5)) for _ in range(2)]
    if policy == "fold":
        assert answers == [[Late(0, -1), Credit(0, 0, 0, 0, 1200)]] * 2
    else:
        assert answers == [[Rejected(0, "the round was closed before the contribution came")]] * 2
    assert len([note for note in desk.notes if note.kind == "late"]) == 1
    assert close(desk, 1).late == 1
    assert close(desk, 2).late == 0
    assert desk.say("a", Offer(0, 0, 1200, 1, 1, 0.5)) == [
        Rejected(0, "the round was closed before the contribution came")
    ], "it was counted in its round"


def test_what_is_not_complete_by_then_is_dropped_and_told(desk: Desk) -> None:
    for round in (1, 2, 3):
        close(desk, round)
    desk.upload("a", 4)
    desk.upload("b", 4)
    desk.handle(Tick(), after_s=5.0)
    desk.work()
    reason = "round 4, the next one of its block, was closed before all of it came"
    assert Rejected(0, reason) in desk.to("c")
    assert desk.of(Committed)[0].folded_late == ()
    assert Note("late", "c", f"round 0: not counted: {reason}") in desk.of(Note)
    assert finish(desk) == []


def test_one_late_contribution_of_a_client_is_held_at_a_time(desk: Desk) -> None:
    """Which bounds what late ones may cost: a block a client."""
    desk.say("c", Offer(1, 1, NBYTES[1], 7, 1, 0.5))
    desk.chunk("c", 1, 1, 0, 1024)
    desk.upload("a", 1)
    desk.upload("b", 1)
    desk.handle(Tick(), after_s=5.0)
    desk.work()
    (rejected,) = [message for message in desk.to("c") if isinstance(message, Rejected)]
    assert "one late contribution of each client is kept, and that to round 0 is" in rejected.reason
    assert desk.chunk("c", 1, 1, 1024, 976) == []
    assert finish(desk) == [Credit(0, 0, 0, 1200, 1200)]


def test_what_missed_a_round_in_which_another_of_it_counted_is_not_kept(desk: Desk) -> None:
    """Else one that is late each time had always the same block counted."""
    finish(desk)
    for round in (1, 2, 3):
        close(desk, round)
    desk.say("c", Offer(4, 0, 1200, 7, 1, 0.5))
    desk.chunk("c", 4, 0, 0, 1024)
    desk.upload("a", 4)
    desk.upload("b", 4)
    desk.handle(Tick(), after_s=5.0)
    desk.work()
    assert desk.of(Committed)[0].folded_late == ("c@0",)
    (rejected,) = [message for message in desk.to("c") if isinstance(message, Rejected)]
    assert "one that was late before has counted in that round; it is the next block's turn" in rejected.reason
    for name in "abc":
        desk.confirm(name, 4, committed_attempt(desk, name, 4))
    close(desk, 5)
    assert desk.say("c", Offer(5, 1, NBYTES[1], 7, 1, 0.5))[0] == Late(5, -1)


def test_a_late_one_that_is_unfit_is_dropped_alone(desk: Desk) -> None:
    finish(desk)
    for round in (1, 2, 3):
        close(desk, round)
    desk.upload("a", 4)
    desk.upload("b", 4)
    desk.upload("c", 4)
    attempt = max(asked.attempt for asked in desk.asked if isinstance(asked, Fold))
    desk.asked.clear()
    desk.handle(Unfit(4, attempt, {"c@0": "not finite"}))
    assert desk.to("c") == [Rejected(0, "not finite")]
    assert desk.of(Note) == [Note("rejected", "c", "round 0: not finite")]
    assert desk.counting == ["a", "b", "c"]
    desk.work()
    assert desk.of(Committed)[0].folded_late == ()


def test_a_round_of_its_own_has_no_late_one_for_its_only_part(desk: Desk) -> None:
    """It would move the block by all of an old delta, whatever its weight."""
    finish(desk)
    for round in (1, 2, 3):
        close(desk, round)
    for name in "abc":
        desk.say(name, Abstain(4, "diverged"))
    desk.work()
    assert (desk.of(Committed)[0].contributors, desk.of(Committed)[0].folded_late) == ((), ())
    for round in (5, 6, 7):
        close(desk, round)
    desk.upload("a", 8)
    desk.upload("b", 8)
    desk.handle(Tick(), after_s=5.0)
    fold = [asked for asked in desk.asked if isinstance(asked, Fold)][-1]
    assert [(part.client, part.missed) for part in fold.contributions] == [("a", 0), ("b", 0), ("c@0", 2)]


def test_another_process_does_not_go_on_with_half_a_late_one(desk: Desk) -> None:
    desk.say("c", Leave("interrupted"))
    assert desk.hello("c", token="0the")
    desk.join("c")
    desk.confirm("c", 0, committed_attempt(desk, "c", 0))
    assert finish(desk) == []
    assert kinds(desk.say("c", Offer(0, 0, 1200, 7, 1, 0.5))) == [Rejected]


def lost_and_replaced(desk: Desk, rounds: int) -> None:
    """c has died, with half a late contribution under way, and another process of it comes; so many rounds pass."""
    for _ in range(2):
        desk.handle(Tick(), after_s=3.0)
        for name in "ab":
            desk.say(name, Heartbeat(desk.now, 1, 0, "training"))
    assert desk.notes[-1].kind == "lost"
    for round in range(1, 1 + rounds):
        close(desk, round)
    desk.hello("c", token="0the")
    desk.join("c", position=1 + rounds)
    for round in range(1 + rounds):
        desk.confirm("c", round, committed_attempt(desk, "c", round))


def test_the_successor_of_a_dead_process_sends_its_late_one_from_the_start(desk: Desk) -> None:
    lost_and_replaced(desk, rounds=2)
    assert desk.say("c", Offer(0, 0, 1200, 8, 1, 0.5)) == [Late(0, -1), Credit(0, 0, 0, 0, 1200)]
    desk.chunk("c", 0, 0, 0, 1024, fill=3)
    desk.chunk("c", 0, 0, 1024, 176, fill=3)
    close(desk, 3)
    desk.upload("a", 4)
    desk.upload("b", 4)
    desk.handle(Tick(), after_s=5.0)
    fold = next(asked for asked in desk.asked if isinstance(asked, Fold))
    parts = [(part.client, part.weight, part.missed, bytes(part.payload[:1])) for part in fold.contributions]
    assert parts[-1] == ("c@0", 8, 1, b"\3")


def test_half_a_late_one_of_a_dead_process_makes_room_for_another_of_its_successor(desk: Desk) -> None:
    lost_and_replaced(desk, rounds=0)
    close(desk, 1)
    assert desk.say("c", Offer(1, 1, NBYTES[1], 7, 1, 0.5))[0] == Late(1, -1)
    assert kinds(desk.say("c", Offer(0, 0, 1200, 7, 1, 0.5))) == [Rejected], "it is not owed any more"


def test_a_whole_late_one_stays_though_its_process_has_died(desk: Desk) -> None:
    finish(desk)
    desk.say("c", Leave("interrupted"))
    desk.hello("c", token="0the")
    desk.join("c")
    assert desk.say("c", Offer(0, 0, 1200, 5, 1, 0.1)) == [Late(0, -1), Credit(0, 0, 0, 1200, 1200)]
    for round in (1, 2, 3):
        close(desk, round)
    assert close(desk, 4).folded_late == ("c@0",)


def test_a_second_different_late_one_breaks_the_protocol(desk: Desk) -> None:
    (refused,) = desk.say("c", Offer(0, 0, 1200, 8, 1, 0.5))
    assert refused == Refused("the worker broke the protocol: a second, different contribution to round 0")


def test_an_impossible_late_one_breaks_the_protocol() -> None:
    desk = Desk(clients=3, rounds=12, quorum=2, deadline_s=5.0, policy=FOLD)
    desk.gather("a", "b", "c")
    close(desk, 0)
    (refused,) = desk.say("c", Offer(0, 0, 1204, 7, 1, 0.5))
    assert isinstance(refused, Refused)
    assert "round 0 trains block 0 of 1200 bytes; got block 0 of 1204 bytes" in refused.reason


def test_a_broker_that_begins_anew_counts_nothing_late(desk: Desk) -> None:
    """What it held is gone, and what it had counted it must not count again."""
    finish(desk)
    desk.restart()
    for name in "abc":
        desk.hello(name)
        desk.join(name, (1, 0, 0, 0), position=1)
    assert desk.say("c", Offer(0, 0, 1200, 7, 1, 0.5)) == [
        Rejected(0, "the round was closed before the contribution came")
    ]


def test_a_broker_that_begins_anew_knows_what_has_counted_late(desk: Desk) -> None:
    """Its client may not have heard of it, and must not be told that it was in vain."""
    finish(desk)
    assert [close(desk, round).folded_late for round in range(1, 10)] == [(), (), (), ("c@0",), (), (), (), (), ()]
    desk.restart()
    for name in "abc":
        desk.hello(name)
        desk.join(name, (9, 10, 7, 8), position=10)
    assert desk.say("c", Offer(0, 0, 1200, 7, 1, 0.5)) == [Late(0, 4)]


def test_a_broker_that_begins_anew_knows_the_newest_of_each_client(desk: Desk) -> None:
    finish(desk)
    for round in (1, 2, 3, 4):
        close(desk, round)
    desk.say("c", Offer(5, 1, NBYTES[1], 7, 1, 0.5))
    close(desk, 5)
    desk.chunk("c", 5, 1, 0, 1024)
    desk.chunk("c", 5, 1, 1024, 976)
    for round in (6, 7, 8, 9):
        close(desk, round)
    desk.restart()
    for name in "abc":
        desk.hello(name)
        desk.join(name, (9, 10, 7, 8), position=10)
    answers = [desk.say("c", Offer(round, block, NBYTES[block], 7, 1, 0.5)) for round, block in ((0, 0), (5, 1))]
    assert [kinds(answer) for answer in answers] == [[Rejected], [Late]], "another one of the client has counted since"
    assert answers[1] == [Late(5, 9)]


def test_what_has_counted_late_is_known_of_each_client_for_a_while() -> None:
    late = LateContributions()
    late.restore({"a": (1, 5), "b": (2, 5)})
    for round in range(6, 5 + VISITS):
        late.restore({"a": (round - 4, round)})
    assert [late.counted_in("a", 1), late.counted_in("b", 2), late.counted_in("a", 5)] == [5, 5, None]
    assert late.has_part("a", 5)
    late.restore({"a": (9, 13)})
    assert (late.counted_in("a", 1), late.counted_in("a", 9), late.has_part("a", 5)) == (None, 13, False)


def test_the_journal_says_what_counted_late(desk: Desk) -> None:
    finish(desk)
    for round in (1, 2, 3):
        close(desk, round)
    desk.upload("a", 4)
    desk.upload("b", 4)
    desk.handle(Tick(), after_s=5.0)
    stores: list[Store] = []
    while not stores:
        desk.work(most=1)
        stores = [asked for asked in desk.asked if isinstance(asked, Store)]
    entry = stores[0].entry
    assert (entry.contributors, entry.folded_late) == (("a", "b"), ("c@0",))
    assert entry.counted == ("a", "b", "c@0")
    assert len(entry.weights) == 2


# The worker


@pytest.fixture
def seat() -> Seat:
    """In training from round 0 on; late ones may count."""
    seat = Seat(policy=FOLD)
    seat.handle(Due())
    seat.hear(Terms("{}", "a"))
    seat.prepared()
    seat.hear(Welcome(2), Start(0, 2, 0, ()))
    return seat


def test_a_contribution_that_missed_its_round_goes_on_when_the_broker_wants_it(seat: Seat) -> None:
    seat.contribute(3)
    seat.hear(Credit(3, 3, 0, 1024, 2560))
    seat.hear(Commit(3, 3, 1, -1, 2560, 1, False))
    assert seat.of(Dismissed) == [Dismissed(3, "the round was closed without it")]
    said = seat.hear(Late(3, -1))
    assert seat.of(Deferred) == [Deferred(3)]
    assert [type(message) for message in said] == [Offer, Chunk, Chunk], "what the broker has not confirmed"
    assert seat.hear(Late(3, -1)) == []
    assert not seat.of(Deferred), "told once"
    seat.hear(Credit(3, 3, 0, 2560, 2560))
    assert not seat.of(Uploaded), "it is no part of that round's exchange"
    seat.hear(Late(3, 7))
    assert seat.of(Settled) == [Settled(3, 7, "")]
    seat.hear(Late(3, 7))
    assert not seat.of(Settled), "told once"


def test_what_becomes_of_a_late_one_is_asked_until_it_is_known(seat: Seat) -> None:
    seat.contribute(0)
    seat.hear(Commit(0, 0, 0, -1, 0, 0, False), Late(0, -1), Credit(0, 0, 0, 1200, 1200))
    for _ in range(2):
        assert seat.participant.deadline() <= seat.now + 3.0
        assert Offer(0, 0, 1200, 7, 1, 0.5) in seat.handle(Due(), after_s=3.0)
        assert Chunk not in kinds(seat.hear(Late(0, -1), Credit(0, 0, 0, 1200, 1200)))
    seat.hear(Rejected(0, "not complete"))
    assert seat.of(Settled) == [Settled(0, -1, "not complete")]
    assert Offer not in kinds(seat.handle(Due(), after_s=3.0))


def test_what_is_trained_too_late_is_offered_all_the_same(seat: Seat) -> None:
    seat.hear(Commit(0, 0, 0, -1, 0, 0, False))
    assert seat.participant.wants(0)
    said = seat.contribute(0)
    assert seat.of(Dismissed) == [Dismissed(0, "the round was closed before the contribution was ready")]
    assert kinds(said) == [Offer, Chunk, Chunk]


def test_what_an_earlier_process_has_made_of_a_round_counts_and_is_not_made_again(seat: Seat) -> None:
    """It was still being trained when the commit came."""
    seat.hear(Commit(0, 0, 1, -1, 1200, 2, True))
    assert seat.handle(Contribute(0, 0, 7, 1, 0.5)) == []
    assert seat.effects == [Dismissed(0, "what an earlier process of this worker had made for it has counted")]


def test_late_ones_leave_after_those_that_are_in_time(seat: Seat) -> None:
    """They are what the others wait for; a link that is slow enough to be late has no room for both at once."""
    seat.contribute(3)  # two chunks of three are under way, which is the window
    seat.contribute(4)
    seat.hear(Commit(3, 3, 1, -1, 2560, 1, False))
    assert [(m.round, m.offset) for m in seat.hear(Credit(3, 3, 0, 2048, 2560)) if isinstance(m, Chunk)] == [
        (4, 0),
        (4, 1024),
        (3, 2048),
    ]


def test_one_of_which_nobody_knows_any_more_is_offered_and_let_go_without_a_word(seat: Seat) -> None:
    """Its commit was missed with the session: it may well have counted."""
    seat.contribute(0)
    seat.hear(Rejoin("who are you?"))
    seat.hear(Terms("{}", "a"), Welcome(2))
    assert Offer(0, 0, 1200, 7, 1, 0.5) in seat.hear(Start(3, 2, 3, ()))
    seat.hear(Rejected(0, "the round was closed before the contribution came"))
    assert not seat.of(Settled)
    assert not seat.of(Dismissed)


def test_without_the_policy_nothing_is_kept() -> None:
    seat = Seat()
    seat.handle(Due())
    seat.hear(Terms("{}", "a"))
    seat.prepared()
    seat.hear(Welcome(2), Start(0, 2, 0, ()), Commit(0, 0, 0, -1, 0, 0, False))
    assert not seat.participant.wants(0)
    seat.contribute(0)
    assert seat.participant.deadline() > seat.now + 0.5
    assert Offer not in kinds(seat.handle(Due(), after_s=3.0))


# The two joined

STEADY = Habits(seconds=(1.0, 1.0))


def with_a_slow_one(mode: str, **policy: Any) -> Network:
    """c takes three times as long as a and b, who close their rounds without it."""
    habits = {"a": STEADY, "b": STEADY, "c": Habits(seconds=(2.8, 3.2))}
    config = config_of(3, rounds=24, deadline_s=0.3, mode=mode, policy=FOLD | policy)
    network = Network(config, habits).run()
    network.check_ended()
    return network


def test_who_is_late_each_time_has_its_blocks_counted_in_turn() -> None:
    """One is held of it at a time, and the block that it was of has its next turn last."""
    network = with_a_slow_one("fedbcd")
    blocks = [committed.block for committed in network.committed for _ in committed.folded_late]
    assert len(set(blocks)) >= 3
    assert all(one != next for one, next in itertools.pairwise(blocks))
    assert any("it is the next block's turn" in why for _, why in network.process("c").settled.values())


@pytest.mark.parametrize(("mode", "decay"), [("parablock", 0.5), ("fedbcd", 0.25), ("lisa", 0.5)])
def test_the_slow_one_is_counted_late_each_time_once_and_hears_of_it(mode: str, decay: float) -> None:
    """What is folded, the world asserts against the formulas, and that it counts once."""
    network = with_a_slow_one(mode, late_decay=decay)
    folded = [part for committed in network.committed for part in committed.folded_late]
    assert len(folded) >= 2
    assert {part_of(part, -1)[0] for part in folded} == {"c"}
    slow = network.process("c")
    counted = {round: into for round, (into, _) in slow.settled.items() if into >= 0}
    assert counted == {made: into for (name, made), into in network.counted.items() if name == "c" and made != into}
    assert set(counted) <= set(slow.dismissed), "its own round was closed without it"
    assert sum(committed.late for committed in network.committed) >= len(folded)


def test_one_of_the_whole_model_counts_two_visits_late() -> None:
    """Every round trains the one block that there is."""
    network = with_a_slow_one("parablock", late_decay=0.5)
    assert max(contribution.missed for fold in network.broker.folds for contribution in fold.contributions) == 1
    habits = {"a": STEADY, "b": STEADY, "c": Habits(seconds=(2.6, 2.8))}
    config = config_of(3, rounds=16, deadline_s=0.1, mode="fedbcd", policy=FOLD)
    network = Network(config, habits, sizes=(300,)).run()
    network.check_ended()
    assert max(contribution.missed for fold in network.broker.folds for contribution in fold.contributions) >= 2


@pytest.mark.parametrize("seed", range(6))
def test_late_ones_survive_a_bad_link_and_a_cut(seed: int) -> None:
    habits = {"a": STEADY, "b": STEADY, "c": Habits(seconds=(2.8, 3.2))}
    cuts = tuple(Incident("cut", "c", at=6.0 + 9 * number, lasts=1.5 + number) for number in range(3))
    faults = Faults(loss=0.05, duplication=0.2, delay_s=(0.001, 0.3), ordered=False, incidents=cuts)
    config = config_of(3, rounds=30, deadline_s=0.3, policy=FOLD)
    network = Network(config, habits, faults, seed).run()
    network.check_ended()
    assert any(committed.folded_late for committed in network.committed)
