"""A session is its key: whose message it is says the broker's list, never the message nor the address it came from."""

from __future__ import annotations

from typing import Any

import pytest

from parablock import wire
from parablock.coordinator_events import Drop, Malformed, Note, Received, Revoked, Send
from parablock.messages import (
    PROTOCOL,
    Chunk,
    Heartbeat,
    Hello,
    Join,
    Leave,
    Message,
    Offer,
    Refused,
    Rejoin,
    Start,
    Terms,
    Welcome,
)
from parablock.participant_events import Denied, End, Gone, Notice, Prepare
from parablock.wire import Envelope
from tests.test_coordinator import BASE, MANIFEST, RUN, TOKENIZER, Desk, kinds, peer_of
from tests.test_participant import Seat

JOIN = Join(MANIFEST.digest, BASE, TOKENIZER, 10, (0, 0, 0, 0), -1)
CHUNK = Chunk(0, 0, 0, 0, wire.checksum(memoryview(bytes(1024))))


class KeyedDesk(Desk):
    """On encrypted connections: what comes from the peer `name` has that client's key, unless it is said otherwise."""

    def say(self, name: str, message: Message, payload: bytes | None = None, **more: Any) -> list[Message]:
        key, run, epoch = more.get("key", name), more.get("run", RUN), more.get("epoch", self.epoch)
        view = None if payload is None else memoryview(payload)
        self.handle(Received(peer_of(name), Envelope(run, epoch, message, view), key))
        return self.to(name)


def test_the_name_is_the_lists_whatever_the_greeting_says() -> None:
    desk = KeyedDesk()
    (terms,) = desk.say("a", Hello("somebody-else", "aa", PROTOCOL))
    assert isinstance(terms, Terms)
    assert terms.name == "a"
    assert desk.say("a", JOIN) == [Welcome(1)]
    assert desk.coordinator.clients == ["a"]


def test_two_keys_that_call_themselves_alike_are_two_clients() -> None:
    desk = KeyedDesk()
    for name in ("a", "b"):
        desk.say(name, Hello("us", "aa", PROTOCOL))
        desk.say(name, JOIN)
    assert desk.coordinator.clients == ["a", "b"]
    assert {note.client for note in desk.notes if note.kind == "joined"} == {"a", "b"}


SAID: list[tuple[Message, bytes | None]] = [
    (Hello("a", "61", PROTOCOL), None),
    (Hello("a", "0the", PROTOCOL), None),
    (JOIN, None),
    (Offer(0, 0, 1200, 1, 1, 0.5), None),
    (CHUNK, bytes(1024)),
    (Heartbeat(0.0, 0, 0, "training"), None),
    (Leave("as if I were a"), None),
]


@pytest.mark.parametrize(("message", "payload"), SAID, ids=lambda each: type(each).__name__)
def test_a_valid_key_with_anothers_routing_id_is_kept_apart(message: Message, payload: bytes | None) -> None:
    desk = KeyedDesk()
    desk.gather("a", "b", "c")
    desk.notes.clear()
    assert desk.say("a", message, payload, key="c") == [], "nobody is answered: that may be a by now"
    (refused,) = desk.to("c")
    assert refused == Refused("the worker broke the protocol: it spoke under the routing id of a; not let in for 10 s")
    assert desk.coordinator.clients == ["a", "b"], "the owner of the key is out, and a is not"
    assert [(note.kind, note.client) for note in desk.notes] == [("dropped", "c")]
    assert "broke the protocol: it spoke under the routing id of a" in desk.notes[0].text
    assert kinds(desk.say("a", Offer(0, 0, 1200, 1, 1, 0.5))) != [Rejoin], "a goes on"


def test_what_is_no_message_is_held_against_the_key_it_came_by() -> None:
    desk = KeyedDesk()
    desk.gather("a", "b")
    desk.handle(Malformed(peer_of("a"), "the header is not a map", "b"))
    assert desk.to("a") == []
    assert desk.coordinator.clients == ["a"]
    desk.handle(Malformed(peer_of("z"), "the header is not a map", "z"))
    assert desk.of(Note) == [Note("dropped", "z", "broke the protocol: the header is not a map; not let in for 10 s")]
    desk.handle(Malformed(peer_of("a"), "the header is not a map", "a"))
    assert desk.coordinator.clients == []


@pytest.mark.parametrize(("message", "payload"), SAID[2:], ids=lambda each: type(each).__name__)
@pytest.mark.parametrize(
    ("peer", "run", "epoch"), [("a", "run-2", 1), ("a", RUN, 0), ("a", RUN, 2), ("a'", RUN, 1)],
    ids=["another run", "an earlier broker", "a later broker", "another session"],
)  # fmt: skip
def test_a_message_of_another_session_run_or_epoch_changes_nothing(
    message: Message, payload: bytes | None, peer: str, run: str, epoch: int
) -> None:
    desk = KeyedDesk()
    desk.gather("a", "b")
    desk.notes.clear()
    said = desk.say(peer, message, payload, key="a", run=run, epoch=epoch)
    assert len(said) == 1, "it is told to greet, or goodbye, and that is all"
    assert len(desk.of(Send)) == len(desk.effects)
    assert desk.coordinator.clients == ["a", "b"]


def test_a_revoked_client_is_out_at_once_and_nobody_waits_for_it() -> None:
    desk = KeyedDesk()
    desk.gather("a", "b")
    desk.say("a", Offer(0, 0, 1200, 1, 1, 0.5))
    desk.handle(Revoked("a"))
    assert desk.to("a") == [Refused("the broker's owner has revoked the key of this worker")]
    assert Note("revoked", "a", "its key was revoked") in desk.notes
    assert desk.coordinator.clients == ["b"]
    assert desk.coordinator.members(0) == {"b"}
    assert kinds(desk.say("a", CHUNK, bytes(1024))) == [Rejoin]
    desk.handle(Revoked("a"))
    assert [type(effect) for effect in desk.effects] == [Drop], "it is not there any more, but a connection may be"


def test_a_revoked_clients_offences_are_not_those_of_who_has_its_name_afterwards() -> None:
    desk = KeyedDesk()
    desk.handle(Malformed(peer_of("a"), "no message", "a"))
    assert [drop.seconds for drop in desk.of(Drop)] == [10.0]
    assert desk.say("a", Hello("a", "aa", PROTOCOL)) == [], "barred"
    desk.handle(Revoked("a"))
    assert kinds(desk.say("a", Hello("a", "ab", PROTOCOL))) == [Terms]
    desk.handle(Malformed(peer_of("a"), "no message", "a"))
    assert [drop.seconds for drop in desk.of(Drop)] == [10.0], "its first one"


def test_what_a_lost_client_had_begun_does_not_count_when_it_is_revoked() -> None:
    desk = KeyedDesk()
    desk.gather("a", "b")
    desk.say("a", Offer(0, 0, 1200, 1, 1, 0.5))
    desk.say("a", CHUNK, bytes(1024))
    session = desk.coordinator._roster.get(peer_of("a"))
    assert session is not None
    desk.coordinator._remove(session, "lost", "silent", desk.now)
    desk.coordinator._effects.clear()
    uploads = desk.coordinator._collection._rounds.round(0).uploads
    assert "a" in uploads, "as it may come back and go on"
    desk.handle(Revoked("a"))
    assert "a" not in uploads


def test_one_that_is_revoked_while_it_is_expected_back_is_not_waited_for() -> None:
    desk = KeyedDesk(quorum=1)
    desk.gather("a", "b")
    desk.commit("a", "b")
    assert len(desk.journal) == 1
    desk.restart()
    assert desk.coordinator.clients == ["a", "b"]
    desk.handle(Revoked("a"))
    assert desk.notes == [Note("revoked", "a", "its key was revoked before it was back")]
    assert desk.coordinator.clients == ["b"]


# The worker's side


def seat(run: str = "") -> Seat:
    made = Seat()
    made.participant._invited_to = run
    return made


def test_the_worker_takes_the_name_that_it_is_told() -> None:
    us = seat()
    us.hear(Terms("{}", "hospital-2"))
    assert us.of(Prepare) == [Prepare("{}", "hospital-2")]
    assert us.of(Notice) == [Notice("the broker's list calls this worker hospital-2, not a")]


def test_a_worker_that_is_called_otherwise_than_before_does_not_go_on() -> None:
    us = seat()
    us.greet(Start(0, 2, 0, ()))
    us.hear(Rejoin("who are you?"), Terms("{}", "b"))
    assert us.of(Gone) == [Gone(End.REFUSED, "the broker calls this worker b now, and a before")]


def test_an_invite_to_another_run_is_told() -> None:
    us = seat("run-0")
    us.hear(Terms("{}", "a"))
    (gone,) = us.of(Gone)
    assert gone.end is End.REFUSED
    assert f"the invite is to the run run-0, and the broker serves {RUN}" in gone.reason
    assert "parablock invite" in gone.reason
    us = seat(RUN)
    us.hear(Terms("{}", "a"))
    assert us.of(Prepare) == [Prepare("{}", "a")]


@pytest.mark.parametrize("greeted", [False, True])
def test_a_worker_that_is_denied_ends_with_what_to_do(greeted: bool) -> None:
    us = seat()
    if greeted:
        us.greet(Start(0, 2, 0, ()))
    us.handle(Denied("ask for `parablock keys allow`"))
    assert us.of(Gone) == [Gone(End.REFUSED, "ask for `parablock keys allow`")]
