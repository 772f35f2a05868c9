"""Contributions that are on disk: what of them is in memory while they go up, and that all of them still arrives."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from parablock.contributions import Contributions
from parablock.messages import Chunk, Credit, Offer
from parablock.participant_events import Fetch
from parablock.transfer import Encoded, Payload

if TYPE_CHECKING:
    from parablock.messages import FromWorker
    from parablock.participant_events import Deferred, Dismissed, Settled, Uploaded
    from parablock.wire import Buffer

CHUNK, COUNT, WINDOW = 1000, 20, 4000


def content(index: int) -> bytes:
    return bytes([index]) * (CHUNK if index < COUNT - 1 else 77)


NBYTES = sum(len(content(index)) for index in range(COUNT))


class Piece(bytearray):
    """Memory of one chunk, of which it shows when it goes."""

    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__


@dataclass
class Upload:
    """A contribution to round 3 of which all chunks were made, and what is said of it."""

    came: dict[int, bytes] = field(default_factory=dict)  # by offset
    sent: int = 0
    fetches: list[Fetch] = field(default_factory=list)
    memory: weakref.WeakSet[Piece] = field(default_factory=weakref.WeakSet)
    now: float = 0.0

    def __post_init__(self) -> None:
        self.contributions = Contributions(self.say, self.emit)
        self.contributions.offer(Offer(3, 1, NBYTES, 7, 1, 0.5), Payload(NBYTES, CHUNK), WINDOW, 0.0, live=False)
        for index in range(COUNT):
            self.contributions.ready(3, self.chunk(index), 0.0, live=False)

    def chunk(self, index: int) -> Encoded:
        return Encoded(self.piece(index))

    def piece(self, index: int) -> Buffer:
        piece = Piece(content(index))
        self.memory.add(piece)
        return memoryview(piece)

    def store(self) -> None:
        self.contributions.stored(3, [lambda index=index: self.piece(index) for index in range(COUNT)])  # type: ignore[misc]

    def say(self, message: FromWorker, payload: Buffer | None) -> None:
        if isinstance(message, Chunk):
            assert payload is not None
            self.came[message.offset] = bytes(payload)
            self.sent += 1

    def emit(self, effect: Dismissed | Uploaded | Deferred | Settled | Fetch) -> None:
        if isinstance(effect, Fetch):
            self.fetches.append(effect)

    def fetch(self) -> None:
        """What the outbox does with the oldest one."""
        fetch = self.fetches.pop(0)
        chunk = Encoded(fetch.stored.again())
        assert chunk.checksum == fetch.stored.checksum
        self.contributions.fetched(fetch.round, fetch.index, chunk, live=True)

    def credit(self, held: int) -> None:
        self.contributions.credit(Credit(3, 1, 0, held, min(held + WINDOW, NBYTES)), self.now)

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.memory))


def test_what_is_on_disk_goes_up_with_no_more_than_a_chunk_in_memory() -> None:
    upload = Upload()
    assert upload.nbytes == NBYTES
    upload.store()
    assert upload.nbytes == 0
    upload.contributions.start(0, 3, 3, 0.0)
    upload.credit(0)
    most = 0
    while upload.fetches:
        assert len(upload.fetches) <= WINDOW // CHUNK, "no more is fetched than may be sent"
        upload.fetch()
        most = max(most, upload.nbytes)
        if not upload.fetches:  # all that was granted has come
            upload.credit(min(upload.sent * CHUNK, NBYTES))
    assert [upload.came[offset] for offset in sorted(upload.came)] == [content(index) for index in range(COUNT)]
    assert upload.sent == COUNT, "each once"
    assert most == 0, "it is the socket's from when it is sent"


def test_what_was_fetched_and_may_not_be_sent_yet_is_no_more_than_a_window() -> None:
    """Chunks that come back in another order wait for the one before them."""
    upload = Upload()
    upload.store()
    upload.contributions.start(0, 3, 3, 0.0)
    upload.credit(0)
    first = upload.fetches.pop(0)
    while upload.fetches:
        upload.fetch()
    assert (upload.sent, upload.nbytes) == (0, WINDOW - CHUNK)
    upload.fetches.append(first)
    upload.fetch()
    assert (upload.sent, upload.nbytes) == (WINDOW // CHUNK, 0)


def test_another_broker_gets_it_from_the_beginning_again() -> None:
    upload = Upload()
    upload.store()
    upload.contributions.start(0, 3, 3, 0.0)
    upload.credit(0)
    upload.fetch()
    under_way = upload.fetches[:]
    upload.fetches.clear()
    upload.contributions.start(0, 3, 3, 1.0)  # what is being fetched is not fetched twice
    upload.credit(0)
    assert [fetch.index for fetch in upload.fetches] == [0]
    upload.fetches += under_way
    while upload.fetches:
        upload.fetch()
        if not upload.fetches:
            upload.credit(min((max(upload.came) // CHUNK + 1) * CHUNK, NBYTES))
    assert len(upload.came) == COUNT
    assert upload.sent == COUNT + 1, "only what had left before"


def test_what_is_fetched_for_a_closed_round_or_a_lost_session_is_let_go() -> None:
    upload = Upload()
    upload.store()
    upload.contributions.start(0, 3, 3, 0.0)
    upload.credit(0)
    lost, closed = upload.fetches[:2]
    upload.contributions.fetched(3, lost.index, Encoded(lost.stored.again()), live=False)
    assert (upload.sent, upload.nbytes) == (0, 0)
    upload.contributions.committed(3, counted=True)
    upload.contributions.fetched(3, closed.index, Encoded(closed.stored.again()), live=True)
    assert (upload.sent, upload.nbytes) == (0, 0)
