"""The evaluations of a run while the clients' shares of them come in, and what they are together.

A row is complete when everybody has told its share, or a later one, or has gone. What a client says is bounded: only
the evaluations that the run's settings ask for count, only up to the round that a client can have reached, and at most
so many are waited for at a time as clients can be apart.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from parablock.scores import Scores, total

if TYPE_CHECKING:
    from collections.abc import Iterable

    from parablock.config import Config
    from parablock.messages import Evaluated


@dataclass
class _Open:
    waiting_for: set[str]
    at: float = 0.0  # when the newest share came
    shares: dict[str, Evaluated] = field(default_factory=dict)


class Evaluations:
    """Every method returns the rows of metrics that have become complete by it, in the order of rounds."""

    def __init__(self, config: Config, told: int = -2) -> None:
        """told: the round of the newest row that is written; −2: none is."""
        self._config = config
        self._open: dict[int, _Open] = {}
        # That wait for shares; when there are more, the oldest is told without them. A client that is evaluated last
        # after the newest commit, and one that has trained all it may beyond it, have in_flight + 2 between them.
        self._most_open = max(8, config.in_flight + 3)
        self._told = told

    def reported(
        self, client: str, share: Evaluated, clients: Iterable[str], committed: int, at: float
    ) -> list[dict[str, Any]]:
        """A client's share. clients: who else will tell one. committed: the newest round, −1 before any. at: seconds
        since the run began."""
        if self._told < share.round <= committed + self._config.in_flight + 1 and self._asked(share.round):
            opened = self._open.setdefault(share.round, _Open(set(clients)))
            opened.shares[client] = share
            opened.at = at
            for round, other in self._open.items():
                if round < share.round:  # a share that was lost with a connection must not hold up what comes after it
                    other.waiting_for.discard(client)
        return self._complete()

    def gone(self, client: str) -> list[dict[str, Any]]:
        """Nothing more will come from this client."""
        for opened in self._open.values():
            opened.waiting_for.discard(client)
        return self._complete()

    def close(self) -> list[dict[str, Any]]:
        """What there is, complete or not."""
        for opened in self._open.values():
            opened.waiting_for.clear()
        return self._complete()

    def _asked(self, round: int) -> bool:
        """Whether the clients evaluate after this round: before the first, after the last, and by `eval.every`."""
        every = self._config.eval.every
        last = self._config.rounds - 1
        return round in (-1, last) or (every > 0 and round < last and (round + 1) % every == 0)

    def _complete(self) -> list[dict[str, Any]]:
        rows = []
        for round in sorted(self._open):
            opened = self._open[round]
            if len(self._open) <= self._most_open and opened.waiting_for - opened.shares.keys():
                break
            del self._open[round]
            self._told = round
            row = _row(round, opened)
            if row["rows"] or row["answered"]:
                rows.append(row)
        return rows


def _row(round: int, opened: _Open) -> dict[str, Any]:
    by_client = {client: _by_task(share) for client, share in sorted(opened.shares.items())}
    by_task: dict[str, Scores] = defaultdict(Scores)
    for tasks in by_client.values():
        for task, scores in tasks.items():
            by_task[task] += scores
    return {
        "kind": "evaluation",
        "round": round,
        "time_s": opened.at,
        **_branch(by_task),
        "clients": {client: _branch(tasks) for client, tasks in by_client.items() if tasks},
    }


def _by_task(share: Evaluated) -> dict[str, Scores]:
    scores: dict[str, Scores] = defaultdict(Scores)
    columns = share.rows, share.loss_sums, share.tokens, share.correct, share.answered
    for task, rows, loss_sum, tokens, correct, answered in zip(share.tasks, *columns, strict=True):
        scores[task] += Scores(loss_sum, tokens, correct, answered, rows=rows)
    return scores


def _branch(tasks: dict[str, Scores]) -> dict[str, Any]:
    """The numbers over all tasks, and where tasks are told apart, under `tasks` each one's."""
    branch = _numbers(total(tasks.values()))
    named = {task: _numbers(scores) for task, scores in sorted(tasks.items()) if task}
    return branch | ({"tasks": named} if named else {})


def _numbers(scores: Scores) -> dict[str, Any]:
    return {
        "eval_loss": scores.loss if scores.tokens else None,
        "perplexity": scores.perplexity if scores.tokens and math.isfinite(scores.perplexity) else None,
        "exact_match": scores.exact_match,
        "rows": scores.rows,
        "tokens": scores.tokens,
        "answered": scores.answered,
    }
