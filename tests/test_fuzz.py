"""Hostile input in small: a seed's worth of what `bench.fuzz` does by the million, with the decoder and the machine."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import fuzz, fuzz_decoder, fuzz_live, mutations
from bench.exchange import Client, Finished
from bench.figures import FiguresError
from parablock import wire
from parablock.coordinator_events import Committed, Drop, Malformed, Received
from parablock.messages import Heartbeat
from parablock.wire import WireError
from tests.test_coordinator import RUN, Desk, peer_of

if TYPE_CHECKING:
    from pathlib import Path

# The decoder


def test_the_decoder_refuses_what_is_wrong_soon_and_in_little_memory() -> None:
    found = fuzz_decoder.run(4000, seed=7)
    assert found["taken"] + found["refused"] == found["messages"] == 4000
    assert found["taken"] > 400, "those that are left as they are"
    assert found["kinds_of_reason"] > 80, "it is wrong in many ways"
    assert found["most_kib_of_one"] < 2048


@settings(max_examples=300)
@given(seed=st.integers(0, 2**64 - 1))
def test_whatever_the_seed_only_wire_errors_come(seed: int) -> None:
    frames = mutations.message(random.Random(seed))
    try:
        wire.decode(frames)
    except WireError:
        with pytest.raises(WireError, match=r"(?s)\A.{1,599}\Z"):  # a peer does not choose how much is logged
            wire.decode(frames)


@pytest.mark.parametrize("kind", mutations.KINDS, ids=lambda kind: kind.__name__)
def test_what_is_valid_is_taken_and_what_is_made_of_it_is_another_thing(kind: type[Any]) -> None:
    rng = random.Random(kind.__name__)
    for _ in range(30):
        message, payload = mutations.valid(rng, kind)
        frames = mutations.frames_of(message, payload)
        envelope = wire.decode(frames)
        assert envelope.message == message
        assert msgpack.unpackb(mutations._one_field_less(rng, frames)[0]).keys() < msgpack.unpackb(frames[0]).keys()
        for broken in (mutations._one_field_less, mutations._one_field_more, mutations._a_field_twice):
            with pytest.raises(WireError):
                wire.decode(broken(rng, frames))


def test_a_decoder_that_fails_otherwise_is_told_with_the_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(frames: list[bytes]) -> None:
        if frames == [b"\xab\xcd"]:
            raise KeyError("planted")

    monkeypatch.setattr(wire, "decode", decode)
    monkeypatch.setattr(mutations, "message", lambda _rng: next(messages))
    messages = iter([[b"ab"]] * 2003 + [[b"\xab\xcd"]])
    with pytest.raises(FiguresError, match=r"message 3 of seed 1: KeyError\('planted'\) of abcd"):
        fuzz_decoder.run(20, seed=1)


# The machine


@pytest.mark.parametrize("seed", range(6))
def test_whatever_peers_say_the_machine_goes_on_and_honest_clients_are_served(seed: int) -> None:
    """Hostile ones in all states, without keys and with, between each message of the honest ones."""
    rng = random.Random(seed)
    desk = Desk(2, rounds=4)
    desk.gather("a", "b")
    dropped = 0
    committed: list[Committed] = []

    def attack(count: int) -> None:
        nonlocal dropped
        for _ in range(count):
            client = rng.choice((None, "m", "n"))
            peer = b"evil-%d" % rng.randrange(4) + (client or "").encode()
            if rng.random() < 0.3:
                client, peer = "m", peer_of(rng.choice("ab"))  # somebody else's routing id
            frames = mutations.message(rng, RUN, 1) if rng.random() < 0.5 else plausible()
            try:
                event: Received | Malformed = Received(peer, wire.decode(frames), client)
            except WireError as error:
                event = Malformed(peer, str(error), client)
            desk.handle(event, after_s=0.001)
            dropped += len(desk.of(Drop))
            committed.extend(desk.of(Committed))

    def plausible() -> list[bytes]:
        message, payload = mutations.valid(rng)
        return mutations.frames_of(message, payload, RUN, 1)

    for round in range(3):
        attack(150)
        for name in "ab":
            desk.upload(name, round)
            attack(50)
            desk.work(fill=round)
            committed.extend(desk.of(Committed))
        for name in "ab":
            desk.confirm(name, round)
        desk.say("a", Heartbeat(0.0, 0, 0, "training"))
        assert desk.coordinator.next_round == round + 1, "nothing stops the honest ones"
    assert [each.contributors for each in committed] == [("a", "b")] * 3
    assert dropped > 50
    assert desk.coordinator.clients == ["a", "b"]
    assert len(desk.notes) < 600, "the record does not grow with what comes"


# The benchmark


def test_turns_are_held_against_those_beside_them() -> None:
    """Rounds of 0.5 s in quiet turns and 0.6 s under attack; those across a border count nowhere."""
    at, held = 95.0, {}
    for round in range(80):
        attacked = at >= 100.0 and int((at - 100.0) // fuzz_live.TURN_S) % 2 == 1
        at += 0.6 if attacked else 0.5
        held[round] = at
    finished = Finished((Client("a", {}, held),), (), (), 0, 0)
    quiet, under = fuzz_live.turns(finished, 100.0)
    assert len(quiet) == len(under) >= 5
    assert quiet == pytest.approx([0.5] * len(quiet))
    assert under == pytest.approx([0.6] * len(under))
    with pytest.raises(FiguresError, match="too short"):
        fuzz_live.turns(finished, 138.0)


def test_the_decoder_alone_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "fuzz.json"
    assert fuzz.main(["--decoder", "300", "--live", "0", "--out", str(out)]) == 0
    assert '"messages": 300' in out.read_text()
    assert out.with_suffix(".png").exists()
    assert '"bench": "fuzz"' in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--decoder", "-1"], "--decoder and --live are numbers of messages"),
        (["--decoder", "0", "--live", "0"], "not both 0"),
        (["--rate", "0"], "--rate is from 1"),
        (["--out", "fuzz.txt"], "end it in .json"),
    ],
)
def test_what_cannot_be_run_is_refused(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(arguments) == 2
    assert told in capsys.readouterr().err


@pytest.mark.slow
def test_a_broker_under_attack_serves_on(tmp_path: Path) -> None:
    out = tmp_path / "fuzz.json"
    assert fuzz.main(["--decoder", "0", "--live", "2000", "--out", str(out)]) == 0
