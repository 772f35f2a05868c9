"""Whether a version of a block, intact as its file may be, belongs to the run in whose folder it lies.

A checksum says that a file is as it was written, not that it was written here: it may be another run's, or an older
model's, or this run's as it was before its journal was restored from a backup.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from parablock.aggregation import STATE
from parablock.block_file import BLOCK, RESIDUAL, SERVER, BlockFileError
from parablock.journal_rows import Row, entry_from_json, entry_json
from parablock.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from parablock.block_file import StoredBlock
    from parablock.config import Config
    from parablock.journal import Journal
    from parablock.manifest import Manifest


@dataclass(frozen=True)
class Belonging:
    """What a version must agree with; None where that cannot be told. run: its id. rows: the journal's, by round."""

    run: str | None = None
    manifest: Manifest | None = None
    config: Config | None = None
    rows: Mapping[int, Row] = field(default_factory=dict)

    @classmethod
    def to(cls, journal: Journal | None, manifest: Manifest | None, config: Config | None) -> Belonging:
        """Raises JournalError where a row is damaged, OSError where the disk refuses."""
        if journal is None:
            return cls(None, manifest, config)
        return cls(journal.facts.run, manifest, config, {row.entry.round: row for row in journal.rows()})

    def check(self, path: Path, stored: StoredBlock) -> None:
        """Raise BlockFileError, naming the file, where what it holds is not this run's."""
        wrong = self._of_label(stored) or self._of_tensors(stored) or self._of_entry(stored)
        if wrong:
            raise BlockFileError(f"{path} is intact, and does not belong here: {wrong}; move it away")

    def _of_label(self, stored: StoredBlock) -> str:
        label = stored.label
        if self.run is not None and label.run != self.run:
            return f"it is of the run {label.run!r}, and this one is {self.run!r}"
        if self.manifest is not None and label.manifest != self.manifest.digest:
            return "it is of another model than manifest.json"
        if self.manifest is not None and label.index >= len(self.manifest.blocks):
            return f"the model has {len(self.manifest.blocks)} blocks"
        return ""

    def _of_tensors(self, stored: StoredBlock) -> str:
        sizes = {name: vector.size for name, vector in stored.tensors.items()}
        if BLOCK not in sizes:
            return f"it holds {sorted(sizes)} and no {BLOCK}"
        numel = sizes[BLOCK] if self.manifest is None else self.manifest.blocks[stored.label.index].numel
        for name, size in sizes.items():
            if size != numel:
                return f"its {name} holds {size} elements instead of {numel}"
        if self.config is None:
            return ""
        lossless = Layout.down(self.config, numel, attempt=1).codec.lossless
        state = {SERVER + name for name in STATE[self.config.server.optimizer]}
        may = state | {RESIDUAL} if self.config.codec.error_feedback and not lossless else state
        if odd := sizes.keys() - {BLOCK} - may:
            return f"it holds {sorted(odd)}, for which the settings have no use"
        lacks = state - sizes.keys()
        if 0 < len(lacks) < len(state):  # the base model's content has none of it
            return f"it lacks {sorted(lacks)}"
        return ""

    def _of_entry(self, stored: StoredBlock) -> str:
        label = stored.label
        if label.version == 0:
            return "a round's entry is in it, and no round made it" if stored.entry else ""
        try:
            entry = entry_from_json(stored.entry)
        except (ValueError, KeyError, TypeError) as error:
            return f"it holds no entry of its round ({error!r})"
        if (entry.round, entry.block) != (label.round, label.index):
            return f"its entry is of round {entry.round} and block {entry.block}"
        row = self.rows.get(label.round)
        if row is not None and (entry_json(row.entry), row.version) != (stored.entry, label.version):
            return f"its entry of round {label.round} is not that of journal.sqlite"
        return ""
