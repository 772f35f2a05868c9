"""What has arrived at a worker: which versions of the blocks are in hand, which commits it has heard of, and what of
them is still to come.

How a block comes is in `parablock.downloads`, which rounds are known to be committed in `parablock.commits`; what is
done about what cannot be is `parablock.participant`'s business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from parablock.commits import Commits
from parablock.downloads import Downloads
from parablock.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Callable

    from parablock.config import Config
    from parablock.manifest import Manifest
    from parablock.messages import Chunk, Commit, Credit, Start
    from parablock.participant_events import Arrived, Dropped, Kept, Took
    from parablock.wire import Buffer


class Arrivals:
    """say: sends a message. emit: asks for an effect. Nothing arrives before `prepare`.

    told_in: the epoch of the broker that said what `told` is; 0: an earlier process of the worker knew it.
    """

    def __init__(self, say: Callable[[Credit], None], emit: Callable[[Took | Dropped | Arrived], None]) -> None:
        self.told_in = 0
        self._config: Config | None = None
        self._manifest: Manifest | None = None
        self._versions: list[int] = []  # by block: the round that made it plus one, 0: the base model's
        self._layouts: dict[tuple[int, bool], Layout] = {}  # by block, and whether it comes of an attempt
        self._commits = Commits(0)
        self._downloads = Downloads(say, emit, self._builds)

    def prepare(self, config: Config, manifest: Manifest) -> None:
        """The settings and the model's layout are known; or known again, as a resumed run may have other settings."""
        if self._manifest is None:
            self._versions = [0] * len(manifest.blocks)
        self._config, self._manifest = config, manifest
        self._layouts.clear()

    def restore(self, kept: Kept) -> None:
        """Be where the process was that has kept this."""
        assert self._config is not None
        assert len(kept.versions) == len(self._versions), "kept of a model with other blocks"
        self._versions = list(kept.versions)
        # What is in the model was committed; and so was all that must land before the last round that was passed.
        self._commits = Commits(max(0, *kept.versions, kept.position - self._config.in_flight - 1))

    @property
    def versions(self) -> tuple[int, ...]:
        """As in `messages.Join`."""
        return tuple(self._versions)

    @property
    def told(self) -> int:
        """The first round that is not known to be committed."""
        return self._commits.told

    @property
    def greeted_at(self) -> int:
        """What `told` was when the worker greeted last."""
        return self._commits.greeted_at

    def through(self, round: int) -> bool:
        """Whether every block that was committed in or before `round` is in hand."""
        return self._commits.through(round)

    # Sessions

    def suspend(self) -> None:
        """The session has ended; another one may take up what was begun."""
        self._downloads.suspend()
        self._commits = Commits(self._commits.told)

    def forget(self) -> None:
        """What was begun will not go on: another broker counts its attempts anew."""
        self._downloads.forget()

    def start(self, start: Start, epoch: int) -> None:
        """The broker has said where we begin."""
        self._commits.start(start)
        self.told_in = epoch
        for round in start.pending:
            if round + 1 in self._versions:  # an old Join was answered, and what we have said since may end the sending
                self._commits.arrive(round)
        self._downloads.keep(self._commits.wanted)

    # Commits

    def fits(self, commit: Commit) -> bool:
        """Whether there is such a block, of such a length."""
        assert self._manifest is not None
        if commit.block >= len(self._manifest.blocks):
            return False
        return commit.nbytes == (self._layout(commit.block, commit.attempt).nbytes if commit.contributors else 0)

    def tell(self, round: int, epoch: int) -> None:
        """The broker has said that a round is committed."""
        if round + 1 >= self._commits.told:
            self._commits.told, self.told_in = round + 1, epoch

    def commit(self, commit: Commit, now: float) -> None:
        """A round is committed, whose block may be on its way, or there."""
        assert self._config is not None
        round = commit.round
        told_before = round < self._commits.greeted_at and not commit.contributors  # there was nothing to come
        if self._versions[commit.block] == round + 1 or told_before or not self._commits.wanted(round):
            self._commits.arrive(round)  # in hand since before this session, or not of this session
        if self._commits.has(round):  # repeated, because our last grant was lost
            self._downloads.confirm(commit)
            return
        layout = self._layout(commit.block, commit.attempt)
        if self._downloads.commit(commit, layout, self._config.network.window_bytes, now):
            self._arrived(commit, now)

    # Blocks

    def expects(self, chunk: Chunk) -> bool:
        """Whether this chunk's transfer is known already, or a newer one that is sure to count."""
        return self._downloads.expects(chunk)

    def begin(self, chunk: Chunk, now: float) -> None:
        """A block begins to come with this chunk, before its round is closed."""
        assert self._config is not None
        layout = self._layout(chunk.block, chunk.attempt)
        window = self._config.network.window_bytes
        self._downloads.begin(chunk.round, chunk.block, chunk.attempt, layout, layout.nbytes, window, now)

    def take(self, chunk: Chunk, payload: Buffer, now: float) -> None:
        """A chunk of a transfer that is known. Raises TransferError for one that cannot be."""
        commit = self._downloads.take(chunk, payload, now)
        if commit is not None:
            self._arrived(commit, now)

    def _arrived(self, commit: Commit, now: float) -> None:
        self._commits.arrive(commit.round)
        if commit.contributors:
            self._versions[commit.block] = max(self._versions[commit.block], commit.round + 1)
            for other in self._downloads.unblocked(commit.block, now):
                self._arrived(other, now)

    def _builds(self, commit: Commit) -> bool:
        """Whether the version that a commit changes is in hand, if it changes one: it may have overtaken that."""
        change = commit.contributors > 0 and not self._layout(commit.block, commit.attempt).codec.lossless
        return not change or self._versions[commit.block] > commit.base

    def _layout(self, block: int, attempt: int) -> Layout:
        key = block, attempt > 0
        if key not in self._layouts:
            assert self._config is not None
            assert self._manifest is not None
            self._layouts[key] = Layout.down(self._config, self._manifest.blocks[block].numel, attempt)
        return self._layouts[key]
