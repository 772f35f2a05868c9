"""The two ends of a transfer: whole and in order whatever is lost, within the credit, resumed from what is held."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parablock import wire
from parablock.transfer import Encoded, Incoming, Outgoing, Payload, TransferError

CHUNK, WINDOW = 1024, 2500


def bytes_of(nbytes: int, seed: int = 0) -> memoryview:
    return memoryview(random.Random(seed).randbytes(nbytes))


def payload_of(nbytes: int, seed: int = 0) -> Payload:
    return Payload.whole(bytes_of(nbytes, seed), CHUNK)


@given(
    nbytes=st.integers(0, 20_000),
    window=st.integers(CHUNK, 8 * CHUNK),
    seed=st.integers(0, 2**32),
    loss=st.sampled_from([0.0, 0.3, 0.7]),
)
def test_what_arrives_is_what_was_sent_whatever_is_lost_or_comes_twice(
    nbytes: int, window: int, seed: int, loss: float
) -> None:
    sent, rng = bytes_of(nbytes), random.Random(seed)
    payload = Payload(nbytes, CHUNK)  # its chunks become ready while others are on their way
    unready = Payload.whole(sent, CHUNK).chunks
    outgoing, incoming = Outgoing(payload, window), Incoming(nbytes, CHUNK, window)
    came = bytearray()
    grants = [(0, incoming.until)]
    for _ in range(1000):
        for _ in range(rng.randint(0, 3)):
            if unready:
                payload.append(unready.pop(0))
        chunks = [(offset, chunk.payload) for offset, chunk in outgoing.due()]
        assert all(offset + view.nbytes <= incoming.held + window for offset, view in chunks), "beyond the credit"
        chunks += rng.choices(chunks, k=2) if chunks else []
        rng.shuffle(chunks)
        for offset, view in chunks:
            if rng.random() >= loss:
                if incoming.take(offset, view):
                    came += view
                grants.append((incoming.held, incoming.until))
        for held, until in rng.sample(grants, min(3, len(grants))):  # also old ones
            outgoing.credit(held, until)
        if outgoing.done:
            break
        outgoing.rewind()
    assert outgoing.done
    assert incoming.done
    assert came == sent


def test_chunk_borders_do_not_depend_on_the_credit() -> None:
    outgoing = Outgoing(payload_of(5000), WINDOW)
    sent = [(offset, chunk.payload.nbytes) for offset, chunk in outgoing.due()]
    assert sent == [(0, 1024), (1024, 1024)], "2500 bytes of credit are two whole chunks"
    assert list(outgoing.due()) == []
    outgoing.credit(1024, 3524)
    assert [(offset, chunk.payload.nbytes) for offset, chunk in outgoing.due()] == [(2048, 1024)]
    outgoing.credit(3072, 5000)
    assert [(offset, chunk.payload.nbytes) for offset, chunk in outgoing.due()] == [(3072, 1024), (4096, 904)]


def test_chunks_are_views() -> None:
    values = bytes_of(2000)
    outgoing, incoming = Outgoing(Payload.whole(values, CHUNK), WINDOW), Incoming(2000, CHUNK, WINDOW)
    for offset, chunk in outgoing.due():
        assert chunk.payload.obj is values.obj
        assert incoming.take(offset, chunk.payload)
    assert incoming.done


def test_what_is_not_ready_waits_and_follows() -> None:
    payload = Payload(2 * CHUNK + 1, CHUNK)
    first, second, last = Payload.whole(bytes_of(payload.nbytes), CHUNK).chunks
    outgoing = Outgoing(payload, 8 * CHUNK)
    assert list(outgoing.due()) == []
    payload.append(first)
    assert list(outgoing.due()) == [(0, first)]
    assert not payload.complete
    payload.append(second)
    payload.append(last)
    assert payload.complete
    assert list(outgoing.due()) == [(CHUNK, second), (2 * CHUNK, last)]


def test_many_transfers_share_a_payload() -> None:
    payload = payload_of(3000)
    one, other = Outgoing(payload, WINDOW), Outgoing(payload, 8 * CHUNK)
    assert [chunk for _, chunk in other.due()] == payload.chunks
    assert [chunk for _, chunk in one.due()] == payload.chunks[:2]


@pytest.mark.parametrize("nbytes", [CHUNK - 1, CHUNK + 1, 1])
def test_a_chunk_of_another_length_is_our_own_bug(nbytes: int) -> None:
    with pytest.raises(AssertionError, match=f"a chunk of {nbytes} bytes, 1024 expected"):
        Payload(5000, CHUNK).append(Encoded(bytes_of(nbytes)))


def test_a_chunk_brings_the_checksum_that_the_wire_expects() -> None:
    chunk = bytes_of(1000)
    assert Encoded.checked(chunk).checksum == Encoded(chunk).checksum == wire.checksum(chunk)


def test_a_sender_takes_up_where_the_receiver_is() -> None:
    outgoing = Outgoing(payload_of(5000), WINDOW)
    assert outgoing.credit(2048, 4548), "held from an earlier session"
    assert [offset for offset, _ in outgoing.due()] == [2048, 3072]
    outgoing.rewind()
    assert [offset for offset, _ in outgoing.due()] == [2048, 3072]


def test_after_too_long_the_newest_grant_is_believed_though_it_is_lower() -> None:
    outgoing = Outgoing(payload_of(5000), WINDOW)
    outgoing.credit(2048, 4548)  # delayed: of a transfer that the receiver has let go of
    assert not outgoing.credit(0, 2500)
    outgoing.rewind()
    assert [offset for offset, _ in outgoing.due()] == [0, 1024], "nor beyond what that one granted"


def test_a_transfer_that_is_done_stays_done() -> None:
    outgoing = Outgoing(payload_of(5000), WINDOW)
    assert outgoing.credit(5000, 5000)
    assert not outgoing.credit(1024, 3524)
    outgoing.rewind()
    assert outgoing.done


def test_an_old_grant_takes_nothing_back() -> None:
    outgoing = Outgoing(payload_of(5000), WINDOW)
    assert outgoing.credit(3072, 5000)
    assert not outgoing.credit(3072, 5000)
    assert not outgoing.credit(0, 2500)
    assert outgoing.held == 3072
    assert [offset for offset, _ in outgoing.due()] == [3072, 4096]


@pytest.mark.parametrize(
    ("held", "until"),
    [(1024, 0), (0, 6000), (6000, 6000), (1000, 3000), (4999, 5000)],
    ids=["held beyond until", "until beyond the end", "held beyond the end", "within a chunk", "within the last chunk"],
)
def test_an_impossible_credit_breaks_the_rules(held: int, until: int) -> None:
    outgoing = Outgoing(payload_of(5000), WINDOW)
    with pytest.raises(TransferError, match=f"credit of {held} held, up to {until}, for a transfer of 5000 bytes"):
        outgoing.credit(held, until)


def test_a_credit_of_what_was_not_made_yet_breaks_the_rules() -> None:
    payload = Payload(5000, CHUNK)
    outgoing = Outgoing(payload, 8 * CHUNK)
    payload.append(Encoded(bytes_of(CHUNK)))
    assert outgoing.credit(CHUNK, 5000)
    with pytest.raises(TransferError, match="credit of 2048 held, of which not all was made yet"):
        outgoing.credit(2 * CHUNK, 5000)


@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [(0, 1000), (0, 1025), (512, 1024), (4096, 1024), (5120, 1), (1 << 30, 1024)],
    ids=["short", "long", "between borders", "long at the end", "after the end", "far after the end"],
)
def test_a_chunk_that_cannot_be_of_the_transfer_breaks_the_rules(offset: int, nbytes: int) -> None:
    incoming = Incoming(5000, CHUNK, 8192)
    with pytest.raises(TransferError, match=f"a chunk of {nbytes} bytes at {offset}; expected"):
        incoming.take(offset, bytes_of(nbytes))


def test_a_chunk_beyond_the_credit_is_not_taken_and_too_many_break_the_rules() -> None:
    incoming = Incoming(5000, CHUNK, WINDOW)
    taken = 4 * WINDOW // CHUNK
    assert not any(incoming.take(2048, bytes_of(1024)) for _ in range(taken)), "a grant may have been delayed"
    assert (incoming.held, incoming.until) == (0, 2500)
    says = f"{CHUNK * (taken + 1)} bytes beyond the credit, the last of them up to 3072, granted are 2500"
    with pytest.raises(TransferError, match=says):
        incoming.take(2048, bytes_of(1024))


def test_a_chunk_that_is_held_or_comes_too_early_is_passed_over() -> None:
    incoming = Incoming(5000, CHUNK, WINDOW)
    assert not incoming.take(1024, bytes_of(1024)), "too early"
    assert incoming.take(0, bytes_of(1024))
    assert not incoming.take(0, bytes_of(1024)), "held"
    assert (incoming.held, incoming.until) == (1024, 3524)


def test_a_transfer_of_nothing_is_done_at_once() -> None:
    outgoing, incoming = Outgoing(payload_of(0), WINDOW), Incoming(0, CHUNK, WINDOW)
    assert outgoing.done
    assert incoming.done
    assert incoming.until == 0
    assert list(outgoing.due()) == []
    assert not outgoing.credit(0, 0)


# Grants


def test_a_grant_is_owed_for_a_quarter_of_the_window_or_after_a_second_or_at_the_end() -> None:
    incoming = Incoming(9 * CHUNK, CHUNK, 8 * CHUNK)
    assert incoming.grant(10.0) == (0, 8 * CHUNK)
    incoming.take(0, bytes_of(CHUNK))
    assert not incoming.owes_grant(10.5), "an eighth of the window, half a second ago"
    assert incoming.owes_grant(11.0), "it has not heard for a second"
    incoming.take(CHUNK, bytes_of(CHUNK))
    assert incoming.owes_grant(10.5), "a quarter of the window"
    assert incoming.grant(10.5) == (2 * CHUNK, 9 * CHUNK)
    assert not incoming.owes_grant(10.6), "it was told"
    for index in range(2, 9):
        incoming.take(index * CHUNK, bytes_of(CHUNK))
        if index == 7:
            incoming.grant(10.7)
    assert incoming.owes_grant(10.7), "everything"


def test_a_paused_receiver_says_when_nothing_more_fits() -> None:
    """Nothing else would come to say it by, and what is under way counts against the sender's other transfers."""
    incoming = Incoming(30 * CHUNK, CHUNK, 9 * CHUNK, paused=True)
    incoming.grant(0.0)
    told = []
    for index in range(9):
        incoming.take(index * CHUNK, bytes_of(CHUNK))
        if incoming.owes_grant(0.1):
            told.append(incoming.grant(0.1)[0])
    assert told == [3 * CHUNK, 6 * CHUNK, 9 * CHUNK]
    incoming = Incoming(30 * CHUNK, CHUNK, 10 * CHUNK, paused=True)
    incoming.grant(0.0)
    for index in range(10):
        incoming.take(index * CHUNK, bytes_of(CHUNK))
        if incoming.owes_grant(0.1):
            told.append(incoming.grant(0.1)[0])
    assert told[3:] == [3 * CHUNK, 6 * CHUNK, 9 * CHUNK, 10 * CHUNK], "less than a quarter of the window, and the last"


def test_a_paused_receiver_takes_the_first_window_and_goes_on_when_it_may() -> None:
    incoming = Incoming(9 * CHUNK, CHUNK, 2 * CHUNK, paused=True)
    outgoing = Outgoing(payload_of(9 * CHUNK), 2 * CHUNK)
    for offset, chunk in outgoing.due():
        assert incoming.take(offset, chunk.payload)
    held, until = incoming.grant(0.0)
    assert (held, until) == (2 * CHUNK, 2 * CHUNK), "a grant that can be sent: never below what is held"
    outgoing.credit(held, until)
    assert list(outgoing.due()) == []
    assert not incoming.take(2 * CHUNK, bytes_of(CHUNK)), "though it is the next"
    incoming.paused = False
    outgoing.credit(*incoming.grant(1.0))
    assert [offset for offset, _ in outgoing.due()] == [2 * CHUNK, 3 * CHUNK]
