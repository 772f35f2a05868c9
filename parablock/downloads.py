"""A worker's downloads: new blocks on their way to it, each as the attempt that is likely to count.

A block may begin to arrive before its round is closed. What comes then belongs to an attempt, which a later one may
supersede; a block has arrived only when a commit has named the attempt, all of it is there, and so is the version that
it changes. Not before that is its last byte confirmed. What was begun is kept over a new greeting, and goes on from
where it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from parablock.messages import Credit
from parablock.participant_events import Arrived, Dropped, Took
from parablock.transfer import Incoming

if TYPE_CHECKING:
    from collections.abc import Callable

    from parablock.layout import Layout
    from parablock.messages import Chunk, Commit
    from parablock.wire import Buffer


@dataclass
class _Download:
    """Of one attempt; without a commit as long as it is not sure to count. began: in seconds."""

    round: int
    block: int
    attempt: int
    chunk_bytes: int
    incoming: Incoming
    began: float
    commit: Commit | None = None


class Downloads:
    """say: sends a message. emit: asks for an effect. builds: whether what a block builds on is in hand."""

    def __init__(
        self,
        say: Callable[[Credit], None],
        emit: Callable[[Took | Dropped | Arrived], None],
        builds: Callable[[Commit], bool],
    ) -> None:
        self._say = say
        self._emit = emit
        self._builds = builds
        self._now: dict[int, _Download] = {}  # by round
        self._before: dict[tuple[int, int], _Download] = {}  # by round and attempt: begun before the last greeting

    def suspend(self) -> None:
        """The session has ended; another one may take up what was begun."""
        for download in self._now.values():
            self._before[download.round, download.attempt] = download
        self._now.clear()

    def keep(self, wanted: Callable[[int], bool]) -> None:
        """Of what was begun earlier, only that of rounds which are `wanted` will go on."""
        for key in [key for key in self._before if not wanted(key[0])]:
            self._drop(self._before.pop(key))
        for round in [round for round in self._now if not wanted(round)]:  # what an earlier session still said
            self._drop(self._now.pop(round))

    def forget(self) -> None:
        """Nothing that was begun will go on: another broker counts its attempts anew."""
        self.keep(lambda _: False)

    def expects(self, chunk: Chunk) -> bool:
        """Whether this chunk's transfer is known already, or a newer one that is sure to count."""
        download = self._now.get(chunk.round)
        return download is not None and (download.commit is not None or chunk.attempt <= download.attempt)

    def begin(self, round: int, block: int, attempt: int, layout: Layout, nbytes: int, window: int, now: float) -> None:
        """Get ready for a block, in place of what another attempt has sent of it. nbytes: 0, or the layout's."""
        if round in self._now:
            self._drop(self._now[round])
        download = self._before.pop((round, attempt), None)
        for key in [key for key in self._before if key[0] == round]:
            self._drop(self._before.pop(key))
        if download is None:
            incoming = Incoming(nbytes, layout.chunk_bytes, window)
            download = _Download(round, block, attempt, layout.chunk_bytes, incoming, now)
        self._now[round] = download

    def commit(self, commit: Commit, layout: Layout, window: int, now: float) -> bool:
        """The attempt that `commit` names counts. True if with this the block has arrived."""
        download = self._now.get(commit.round)
        if download is None or download.attempt != commit.attempt:
            self.begin(commit.round, commit.block, commit.attempt, layout, commit.nbytes, window, now)
            download = self._now[commit.round]
        download.commit = commit
        return self._look(download, now, tell=True)

    def unblocked(self, block: int, now: float) -> list[Commit]:
        """A version of `block` is in hand: the commits of those that were only waiting for it."""
        waiting = [download for download in self._now.values() if download.block == block and download.incoming.done]
        return [d.commit for d in waiting if d.commit is not None and self._look(d, now, tell=False)]

    def confirm(self, commit: Commit) -> None:
        """The block is in hand already: say so, and let go of what has come of it again."""
        if commit.round in self._now:
            self._drop(self._now.pop(commit.round))
        self._say(Credit(commit.round, commit.block, commit.attempt, commit.nbytes, commit.nbytes))

    def take(self, chunk: Chunk, payload: Buffer, now: float) -> Commit | None:
        """The commit of the block that has arrived with this chunk, if one has. Raises TransferError."""
        download = self._now[chunk.round]
        if (download.block, download.attempt) != (chunk.block, chunk.attempt):
            return None  # of an attempt that was given up
        taken = download.incoming.take(chunk.offset, payload)
        if taken:
            index = chunk.offset // download.chunk_bytes
            self._emit(Took(chunk.round, chunk.block, chunk.attempt, index, payload))
        return download.commit if self._look(download, now, tell=not taken) else None

    def _look(self, download: _Download, now: float, *, tell: bool) -> bool:
        """Grant what is due, in any case if `tell`, and see whether the block has arrived."""
        incoming, commit = download.incoming, download.commit
        if incoming.done and (commit is None or not self._builds(commit)):
            return False  # that it holds everything the broker hears when it is sure to be of use
        if tell or incoming.owes_grant(now):
            self._say(Credit(download.round, download.block, download.attempt, *incoming.grant(now)))
        if not incoming.done:
            return False
        assert commit is not None
        del self._now[commit.round]
        self._emit(
            Arrived(
                commit.round,
                commit.block,
                commit.attempt,
                commit.base,
                commit.contributors,
                commit.counted,
                download.began,
                now,
                commit.ahead_s,
            )
        )
        return True

    def _drop(self, download: _Download) -> None:
        if download.incoming.held:
            self._emit(Dropped(download.round, download.attempt))
