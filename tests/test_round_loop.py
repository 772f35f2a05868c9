"""The round loop of a client: what it trains and what it passes by, and which waits it reports."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from parablock.adaptive_steps import AdaptiveSteps
from parablock.agenda import Turn
from parablock.config import Config, from_dict
from parablock.messages import Landed as LandedMessage
from parablock.participant_events import Arrived, Contribute, Event, Say, SitOut, Started, Withhold
from tests.network import manifest_of
from workers.lag import LoopLag
from workers.rounds import RoundLoop
from workers.trainer import Landed, Solved

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

NAMES = {"T": True, "s": False}


@dataclass
class Participant:
    """Of a run in which round r trains block r mod 4, and `turns` says by a letter a round whether this client does."""

    turns: str
    told: int = 0

    def turn(self, round: int) -> Turn | None:
        return Turn(round % 4, NAMES[self.turns[round]]) if round < len(self.turns) else None

    def may_train(self, _round: int) -> bool:
        return True


@dataclass
class Link:
    participant: Participant
    started: Started | None = None
    uploads: dict[int, tuple[float, float]] = field(default_factory=dict)
    heard: list[Event] = field(default_factory=list)

    async def until(self, condition: Callable[[], bool]) -> None:
        assert condition()

    def handle(self, event: Event) -> None:
        self.heard.append(event)

    def contribute(self, contribution: Contribute, _delta: object) -> tuple[bool, None]:
        self.heard.append(contribution)
        return True, None


@dataclass
class Trainer:
    """Does nothing at all, and lands one round after the other. done: what was asked of it, in order."""

    participant: Participant
    done: list[Any] = field(default_factory=list)
    landed: int = 0
    misses: dict[int, float] = field(default_factory=dict)
    diverges: int = -1

    def train(self, round: int, blocks: list[int], steps: int) -> list[Solved]:
        made = list(enumerate(blocks, start=round))
        self.done += made
        if round == self.diverges:
            return [Solved(at, block, None, 0, steps, 0.0, "the loss is nan", 10.0, 10.5) for at, block in made]
        return [Solved(at, block, object(), 7, steps, 0.5, "", 10.0 + at, 10.5 + at) for at, block in made]  # type: ignore[arg-type]

    def sit_out(self) -> None:
        self.done.append("sits out")

    def revert(self, _before: int, _pending: object) -> None:
        pass

    def land(self, through: int, _next_round: int) -> list[Landed]:
        first, self.landed = self.landed, max(min(through + 1, len(self.participant.turns)), self.landed)
        arrivals = [
            Arrived(round, round % 4, 1, -1, 2, self.participant.turns[round] == "T", 1.0, 2.0)
            for round in range(first, self.landed)
        ]
        self.done += [f"lands {arrived.round}" for arrived in arrivals if self.misses]
        return [Landed(arrived, 0.5, 0.1, self.misses.get(arrived.round, 0.2), 1) for arrived in arrivals]


async def call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def run(
    turns: str, misses: dict[int, float] | None = None, first: int = 0, diverges: int = -1, **tables: Any
) -> tuple[Trainer, Link]:
    """A client's run from round `first` on, of as many rounds as there are turns. misses: of guesses, by round."""
    config: Config = from_dict({"rounds": len(turns), **tables})
    participant = Participant(turns)
    link, trainer = (
        Link(participant, Started(first, 4, first)),
        Trainer(participant, misses=misses or {}, diverges=diverges),
    )
    setup = SimpleNamespace(config=config, manifest=manifest_of(), held_out=None)
    loop = RoundLoop(setup, link, call, trainer, LoopLag())  # type: ignore[arg-type]
    asyncio.run(loop.run())
    return trainer, link


def waited(link: Link) -> list[int]:
    """The rounds for which a wait was reported."""
    reports = [event.message for event in link.heard if isinstance(event, Say)]
    return [report.round for report in reports if isinstance(report, LandedMessage) and report.waiting != (0.0, 0.0)]


def test_a_client_trains_its_rounds_and_passes_the_others_by() -> None:
    trainer, link = run("TssTT", round={"fraction": 0.5, "clients": 4})
    assert trainer.done == [(0, 0), "sits out", "sits out", (3, 3), (4, 0)]
    assert [event.round for event in link.heard if isinstance(event, SitOut)] == [1, 2]
    assert [(event.round, event.steps) for event in link.heard if isinstance(event, Contribute)] == [
        (0, 8), (3, 8), (4, 8)
    ]  # fmt: skip
    assert trainer.landed == 5, "it lands every round"


def test_a_round_that_diverges_is_withheld_and_told_and_the_run_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    trainer, link = run("TTTT", diverges=1)
    assert [event for event in link.heard if isinstance(event, Withhold)] == [Withhold(1, "the loss is nan")]
    assert [event.round for event in link.heard if isinstance(event, Contribute)] == [0, 2, 3]
    assert "round 1 (block 1) was of no use: the loss is nan" in caplog.text
    assert trainer.landed == 4


@pytest.mark.parametrize(
    ("turns", "tables", "rounds"),
    [
        ("TTTTT", {}, [0, 1, 2, 4]),  # at the end for all that is left at once
        ("TTsTT", {}, [0, 4]),  # 1 had nothing to hide behind, and 2 was not its own
        ("TTsTT", {"pipeline": {"max_in_flight": 2}}, [4]),
        ("TTTTT", {"mode": "fedbcd"}, [0, 1, 2, 3, 4]),
        ("TTsTs", {"mode": "fedbcd"}, [0, 1, 3]),  # nothing hides an exchange, so that each is waited for
    ],
)
def test_to_sit_out_is_no_waiting_for_the_link(turns: str, tables: dict[str, Any], rounds: list[int]) -> None:
    _, link = run(turns, round={"fraction": 0.5, "clients": 4}, **tables)
    assert waited(link) == rounds


# The guard


def test_after_a_guess_that_missed_by_too_much_training_waits_for_what_is_in_flight() -> None:
    trainer, _ = run("TTTTT", misses={0: 0.2, 1: 1.3})
    assert trainer.done == [
        (0, 0), (1, 1), "lands 0", (2, 2), "lands 1", "lands 2", (3, 3), (4, 0), "lands 3", "lands 4",
    ]  # fmt: skip


def test_the_next_round_that_is_trained_is_the_one_that_waits() -> None:
    trainer, link = run("TTsTT", misses={0: 1.3}, round={"fraction": 0.5, "clients": 4})
    assert trainer.done == [
        (0, 0), (1, 1), "lands 0", "sits out", "lands 1", "lands 2", (3, 3), (4, 0), "lands 3", "lands 4",
    ]  # fmt: skip
    assert 1 not in waited(link), "nobody waited for the link in a round that it sat out"


def test_what_is_on_its_way_does_not_count_what_a_guarded_round_has_landed(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden: list[list[int]] = []

    def next(_self: AdaptiveSteps, _block: int, hides: Sequence[int]) -> int:
        hidden.append(list(hides))
        return 8

    monkeypatch.setattr(AdaptiveSteps, "next", next)
    run("TTTTTT", misses={1: 1.3}, pipeline={"max_in_flight": 2})
    assert hidden == [[], [0], [0, 1], [1, 2], [], [0]], "round 1 has missed, so that round 4 waited for all before it"


def test_as_long_as_guesses_miss_every_round_is_synchronous() -> None:
    trainer, _ = run("TTTT", misses=dict.fromkeys(range(4), 2.0))
    assert trainer.done == [(0, 0), (1, 1), "lands 0", "lands 1", (2, 2), "lands 2", (3, 3), "lands 3"]


@pytest.mark.parametrize("tables", [{"pipeline": {"max_miss": 0.0}}, {"pipeline": {"max_miss": 1.5}}])
def test_a_guard_that_is_off_or_wider_lets_the_same_guesses_pass(tables: dict[str, Any]) -> None:
    trainer, _ = run("TTTT", misses={0: 1.3, 1: 1.3}, **tables)
    assert trainer.done == [(0, 0), (1, 1), "lands 0", (2, 2), "lands 1", (3, 3), "lands 2", "lands 3"]


def test_synchronous_rounds_have_no_guess_to_guard() -> None:
    trainer, _ = run("TTT", misses=dict.fromkeys(range(3), 2.0), mode="fedbcd")
    assert trainer.done == [(0, 0), "lands 0", (1, 1), "lands 1", (2, 2), "lands 2"]


# Rounds that are trained at once


def test_both_rounds_of_a_pair_are_waited_for_and_no_guess_is_guarded() -> None:
    trainer, link = run("TTTT", misses=dict.fromkeys(range(4), 2.0), mode="lisa")
    assert trainer.done == [(0, 0), (1, 1), "lands 0", "lands 1", (2, 2), (3, 3), "lands 2", "lands 3"]
    assert waited(link) == [0, 1, 2, 3]


def test_who_begins_in_the_middle_of_a_pair_passes_its_second_round_by() -> None:
    trainer, link = run("TTTT", first=1, mode="lisa")
    assert trainer.done == [(2, 2), (3, 3)]
    assert [event.round for event in link.heard if isinstance(event, Withhold)] == [1]
    assert waited(link) == [2, 3]
