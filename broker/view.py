"""What a person sees of a run while it goes on: a live table on a terminal, one line per round elsewhere.

Shows only what the record and the heartbeats say; decides nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from parablock.printable import printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from parablock.config import Config
    from parablock.manifest import Manifest
    from parablock.messages import Heartbeat


class View:
    """On stderr. `start` and `close` enclose its life. block: says which one a round trains, if that is known."""

    def __init__(self, config: Config, manifest: Manifest, block: Callable[[int], int | None]) -> None:
        self._config = config
        self._manifest = manifest
        self._block_of = block
        self._console = Console(
            stderr=True, highlight=False, markup=False, emoji=False
        )  # peers' words are shown as they are
        self._clients: dict[str, Heartbeat | None] = {}
        self._row: dict[str, Any] = {}
        self._live: Live | None = None
        self._progress = Progress(
            TextColumn("rounds"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._progress.add_task("rounds", total=config.rounds, start=False)

    def start(self) -> None:
        if self._console.is_terminal:
            self._live = Live(self._render(), console=self._console, refresh_per_second=4, transient=True)
            self._live.start()

    def close(self) -> None:
        if self._live is not None:
            self._live.update(self._render())
            self._live.stop()
            self._live = None

    def say(self, text: str) -> None:
        """One line that stays. What a terminal would obey, in peers' words, is shown as it is written in Python."""
        text = printable(text)
        if self._live is not None:
            self._console.print(text, soft_wrap=True)
        else:
            print(text, file=self._console.file, flush=True)  # rich takes a millisecond to lay out a line

    def joined(self, client: str) -> None:
        self._clients.setdefault(client, None)
        self._refresh()

    def gone(self, client: str) -> None:
        self._clients.pop(client, None)
        self._refresh()

    def began(self) -> None:
        self._progress.start_task(self._task)

    def heartbeat(self, client: str, heartbeat: Heartbeat) -> None:
        if client in self._clients:
            self._clients[client] = heartbeat
            self._refresh()

    def committed(self, round: int) -> None:
        self._progress.update(self._task, completed=round + 1)
        self._refresh()

    def show(self, row: dict[str, Any]) -> None:
        """A row of metrics is complete."""
        if row["kind"] == "evaluation":
            self._show_evaluation(row)
            return
        self._row = row
        if self._live is None:
            self.say(
                f"round {row['round'] + 1}/{self._config.rounds}  {row['block_name']}  loss {_number(row['loss'], 4)}  "
                f"round {_number(row['round_s'], 2)} s  compute {_number(row['compute_s'], 2)} s  "
                f"exchange {_number(row['comm_s'], 2)} s  waited {_number(row['exposed_s'], 2)} s{self._spent(row)}"
            )
        self._refresh()

    def _show_evaluation(self, row: dict[str, Any]) -> None:
        text = f"held-out loss {_number(row['eval_loss'], 4)} over {row['tokens']} tokens of {row['rows']} rows"
        if row["exact_match"] is not None:
            text += f", exact match {100 * row['exact_match']:.1f} % of {row['answered']}"
        self.say(("before the first round: " if row["round"] < 0 else f"after round {row['round'] + 1}: ") + text)

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.update(self._render())

    def _render(self) -> Group:
        table = Table(expand=False)
        for heading in ("client", "state", "round", "block", "step"):
            table.add_column(heading, justify="right" if heading in ("round", "step") else "left")
        for name in sorted(self._clients):
            beat = self._clients[name]
            training = beat is not None and beat.state == "training" and beat.round >= 0
            table.add_row(
                name,
                beat.state if beat is not None else "joined",
                str(beat.round + 1) if beat is not None and training else "",
                self._block(beat.round) if beat is not None and training else "",
                self._step(beat.step) if beat is not None and training else "",
            )
        row = self._row
        text = "waiting for clients" if not self._clients else f"{self._config.mode}"
        if row:
            text = (
                f"{self._config.mode}  loss {_number(row['loss'], 4)}  round {_number(row['round_s'], 2)} s  "
                f"compute {_number(row['compute_s'], 2)} s  exchange {_number(row['comm_s'], 2)} s  "
                f"waited {_number(row['exposed_s'], 2)} s{self._spent(row)}"
            )
        return Group(self._progress, table, text)

    def _spent(self, row: dict[str, Any]) -> str:
        return f"  ε {row['epsilon']:.4g} of {self._config.privacy.budget:g}" if row["epsilon"] is not None else ""

    def _step(self, step: int) -> str:
        solver = self._config.solver  # with adaptive K each client has its own, which is told when the round has landed
        return str(step) if solver.adaptive else f"{step}/{solver.steps}"

    def _block(self, round: int) -> str:
        block = self._block_of(round)
        return "" if block is None else self._manifest.blocks[block].name


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
