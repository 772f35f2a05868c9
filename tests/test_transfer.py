"""The two ends of a transfer: whole and in order whatever is lost, within the credit, resumed from what is held."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parablock.transfer import Incoming, Outgoing, TransferError

CHUNK, WINDOW = 1024, 2500


def payload_of(nbytes: int, seed: int = 0) -> memoryview:
    return memoryview(random.Random(seed).randbytes(nbytes))


@given(
    nbytes=st.integers(0, 20_000),
    window=st.integers(CHUNK, 8 * CHUNK),
    seed=st.integers(0, 2**32),
    loss=st.sampled_from([0.0, 0.3, 0.7]),
)
def test_what_arrives_is_what_was_sent_whatever_is_lost_or_comes_twice(
    nbytes: int, window: int, seed: int, loss: float
) -> None:
    payload, rng = payload_of(nbytes), random.Random(seed)
    outgoing, incoming = Outgoing(payload, CHUNK, window), Incoming(nbytes, CHUNK, window)
    grants = [(0, incoming.until)]
    for _ in range(1000):
        chunks = list(outgoing.due())
        assert all(offset + view.nbytes <= incoming.held + window for offset, view in chunks), "beyond the credit"
        chunks += rng.choices(chunks, k=2) if chunks else []
        rng.shuffle(chunks)
        for offset, view in chunks:
            if rng.random() >= loss:
                incoming.take(offset, view)
                grants.append((incoming.held, incoming.until))
        for held, until in rng.sample(grants, min(3, len(grants))):  # also old ones
            outgoing.credit(held, until)
        if outgoing.done:
            break
        outgoing.rewind()
    assert outgoing.done
    assert incoming.done
    assert b"".join(incoming.pieces) == payload


def test_chunk_borders_do_not_depend_on_the_credit() -> None:
    outgoing = Outgoing(payload_of(5000), CHUNK, WINDOW)
    sent = [(offset, view.nbytes) for offset, view in outgoing.due()]
    assert sent == [(0, 1024), (1024, 1024)], "2500 bytes of credit are two whole chunks"
    assert list(outgoing.due()) == []
    outgoing.credit(1024, 3524)
    assert [(offset, view.nbytes) for offset, view in outgoing.due()] == [(2048, 1024)]
    outgoing.credit(3072, 5000)
    assert [(offset, view.nbytes) for offset, view in outgoing.due()] == [(3072, 1024), (4096, 904)]


def test_chunks_are_views_and_pieces_are_kept_uncopied() -> None:
    payload = payload_of(2000)
    outgoing, incoming = Outgoing(payload, CHUNK, WINDOW), Incoming(2000, CHUNK, WINDOW)
    for offset, view in outgoing.due():
        assert view.obj is payload.obj
        assert incoming.take(offset, view)
    assert all(piece.obj is payload.obj for piece in incoming.pieces)


def test_a_sender_takes_up_where_the_receiver_is() -> None:
    outgoing = Outgoing(payload_of(5000), CHUNK, WINDOW)
    assert outgoing.credit(2048, 4548), "held from an earlier session"
    assert [offset for offset, _ in outgoing.due()] == [2048, 3072]
    outgoing.rewind()
    assert [offset for offset, _ in outgoing.due()] == [2048, 3072]


def test_an_old_grant_takes_nothing_back() -> None:
    outgoing = Outgoing(payload_of(5000), CHUNK, WINDOW)
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
    outgoing = Outgoing(payload_of(5000), CHUNK, WINDOW)
    with pytest.raises(TransferError, match=f"credit of {held} held, up to {until}, for a transfer of 5000 bytes"):
        outgoing.credit(held, until)


@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [(0, 1000), (0, 1025), (512, 1024), (4096, 1024), (5120, 1), (1 << 30, 1024)],
    ids=["short", "long", "between borders", "long at the end", "after the end", "far after the end"],
)
def test_a_chunk_that_cannot_be_of_the_transfer_breaks_the_rules(offset: int, nbytes: int) -> None:
    incoming = Incoming(5000, CHUNK, 8192)
    with pytest.raises(TransferError, match=f"a chunk of {nbytes} bytes at {offset}; expected"):
        incoming.take(offset, payload_of(nbytes))


def test_a_chunk_beyond_the_credit_breaks_the_rules() -> None:
    incoming = Incoming(5000, CHUNK, WINDOW)
    with pytest.raises(TransferError, match="ends at 3072, beyond the credit of 2500"):
        incoming.take(2048, payload_of(1024))


def test_a_chunk_that_is_held_or_comes_too_early_is_passed_over() -> None:
    incoming = Incoming(5000, CHUNK, WINDOW)
    assert not incoming.take(1024, payload_of(1024)), "too early"
    assert incoming.take(0, payload_of(1024))
    assert not incoming.take(0, payload_of(1024)), "held"
    assert (incoming.held, incoming.until, len(incoming.pieces)) == (1024, 3524, 1)


def test_a_transfer_of_nothing_is_done_at_once() -> None:
    outgoing, incoming = Outgoing(memoryview(b""), CHUNK, WINDOW), Incoming(0, CHUNK, WINDOW)
    assert outgoing.done
    assert incoming.done
    assert incoming.until == 0
    assert list(outgoing.due()) == []
    assert not outgoing.credit(0, 0)
