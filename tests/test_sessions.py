"""A session's rules, and the shipments that many sessions share."""

from __future__ import annotations

from typing import get_args

import pytest

from parablock.messages import Chunk, Credit, FromWorker, Heartbeat, Join, Leave, Offer, Probe
from parablock.sessions import ALLOWED, SessionState, Shipment, takes_part
from parablock.transfer import Encoded, Payload
from parablock.wire import checksum


def test_each_message_of_a_worker_has_its_states_and_no_other_has() -> None:
    assert set(ALLOWED) == set(get_args(FromWorker)) - {Probe}, "a probe needs no session"
    assert all(SessionState.ACTIVE in states for states in ALLOWED.values())


@pytest.mark.parametrize(
    ("message", "part"),
    [
        (Offer(0, 0, 8, 1, 1, 0.5), True),
        (Credit(0, 0, 1, 0, 0), True),
        (Heartbeat(0.0, 0, 0, "training"), True),
        (Heartbeat(0.0, -1, 0, "waiting"), True),
        (Heartbeat(0.0, -1, 0, "preparing"), False),
        (Heartbeat(0.0, -1, 0, "joining"), False),
        (Join("0", "0", "0", 1, (), -1), False),
        (Leave("done"), False),
    ],
    ids=lambda value: getattr(value, "state", type(value).__name__),
)
def test_who_takes_part_says_so_by_what_it_says(message: FromWorker, part: bool) -> None:
    assert takes_part(message) is part


def test_a_chunk_of_a_shipment_becomes_a_message_once() -> None:
    shipment = Shipment("run-1", 4, 7, 2, 3, Payload(12, 8))
    chunks = [Encoded(memoryview(b"12345678")), Encoded(memoryview(b"1234"))]
    for offset, chunk in zip((0, 8), chunks, strict=True):
        envelope = shipment.envelope(offset, chunk)
        assert (envelope.run, envelope.epoch) == ("run-1", 4)
        assert envelope.message == Chunk(7, 2, 3, offset, checksum(chunk.payload))
        assert envelope.payload is chunk.payload, "not copied"
        assert shipment.envelope(offset, chunk) is envelope
        assert envelope.frames is envelope.frames, "nor packed again"
    assert shipment.envelope(0, chunks[0]) is not shipment.envelope(8, chunks[1])


def test_two_shipments_of_a_round_share_nothing() -> None:
    first, second = (Shipment("run-1", 1, 0, 0, attempt, Payload(8, 8)) for attempt in (1, 2))
    chunk = Encoded(memoryview(bytes(8)))
    assert (first.envelope(0, chunk).message, second.envelope(0, chunk).message) == (
        Chunk(0, 0, 1, 0, chunk.checksum),
        Chunk(0, 0, 2, 0, chunk.checksum),
    )
