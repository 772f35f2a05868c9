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
from parablock.messages import Evaluated
from parablock.messages import Landed as LandedMessage
from parablock.noise import Noise
from parablock.participant_events import Arrived, Contribute, Event, Say, SitOut, Started, Wait, Withhold
from tests.network import manifest_of
from workers.lag import LoopLag
from workers.noised import Noised, Nothing
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

    late: set[int] = field(default_factory=set)  # rounds that may be trained only once they were waited for

    def may_train(self, round: int) -> bool:
        return round not in self.late

    def wants(self, _round: int) -> bool:
        return True


@dataclass
class Link:
    participant: Participant
    started: Started | None = None
    uploads: dict[int, tuple[float, float]] = field(default_factory=dict)
    heard: list[Event] = field(default_factory=list)
    leaving: list[Any] = field(default_factory=list)  # what was contributed

    async def until(self, condition: Callable[[], bool]) -> None:
        if not condition():
            self.participant.late.clear()
        assert condition()

    def handle(self, event: Event) -> None:
        self.heard.append(event)

    def contribute(self, contribution: Contribute, delta: object) -> tuple[bool, None]:
        self.heard.append(contribution)
        self.leaving.append(delta)
        return True, None


@dataclass
class Trainer:
    """Does nothing at all, and lands one round after the other. done: what was asked of it, in order."""

    participant: Participant
    done: list[Any] = field(default_factory=list)
    landed: int = 0
    misses: dict[int, float] = field(default_factory=dict)
    diverges: int = -1
    exchange: tuple[float, float] = 0.5, 0.0  # seconds from a delta to its block; of them, those for slower clients

    def train(self, round: int, blocks: list[int], steps: int) -> list[Solved]:
        made = list(enumerate(blocks, start=round))
        self.done += made
        if round == self.diverges:
            return [Solved(at, block, None, 0, steps, 0.0, "the loss is nan", 10.0, 10.5) for at, block in made]
        return [Solved(at, block, Nothing(4), 7, steps, 0.5, "", 10.0 + at, 10.5 + at) for at, block in made]  # type: ignore[arg-type]

    def sit_out(self) -> None:
        self.done.append("sits out")

    def revert(self, _before: int, _pending: object) -> None:
        pass

    def land(self, through: int, _next_round: int) -> list[Landed]:
        first, self.landed = self.landed, max(min(through + 1, len(self.participant.turns)), self.landed)
        lasts, ahead_s = self.exchange
        arrivals = [
            Arrived(
                round, round % 4, 1, -1, 2, self.participant.turns[round] == "T", 10.5, 10.5 + round + lasts, ahead_s
            )
            for round in range(first, self.landed)
        ]
        self.done += [f"lands {arrived.round}" for arrived in arrivals if self.misses]
        return [Landed(arrived, 0.5, 0.1, self.misses.get(arrived.round, 0.2), 1) for arrived in arrivals]


async def call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


@dataclass
class Releases:
    """In memory. may: how many may leave."""

    may: int = 1000
    fails: int = -1
    left: list[int] = field(default_factory=list)

    def refusal(self, _round: int) -> str | None:
        return None if len(self.left) < self.may else "the budget is spent"

    def release(self, round: int) -> None:
        if round == self.fails:
            raise OSError(28, "No space left on device")
        self.left.append(round)


def run(
    turns: str,
    misses: dict[int, float] | None = None,
    first: int = 0,
    diverges: int = -1,
    releases: Releases | None = None,
    exchange: tuple[float, float] = (0.5, 0.0),
    **tables: Any,
) -> tuple[Trainer, Link]:
    """A client's run from round `first` on, of as many rounds as there are turns. misses: of guesses, by round."""
    config: Config = from_dict({"rounds": len(turns), **tables})
    participant = Participant(turns)
    link, trainer = (
        Link(participant, Started(first, 4, first)),
        Trainer(participant, misses=misses or {}, diverges=diverges, exchange=exchange),
    )
    setup = SimpleNamespace(config=config, manifest=manifest_of(), held_out=None)
    noise = Noise(key=1)
    loop = RoundLoop(setup, link, call, trainer, LoopLag(), releases=releases, noise=noise)  # type: ignore[arg-type]
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


@pytest.mark.parametrize(("exchange", "steps"), [((0.5, 0.0), 8), ((3.0, 2.5), 8), ((3.0, 0.0), 48), ((3.0, 4.0), 1)])
def test_adaptive_steps_hide_the_exchange_and_not_the_wait_for_slower_clients(
    exchange: tuple[float, float], steps: int
) -> None:
    """Eight steps last half a second."""
    _, link = run("TTT", exchange=exchange, solver={"adaptive": True, "steps": 8, "min_steps": 1, "max_steps": 100})
    assert [event.steps for event in link.heard if isinstance(event, Contribute)] == [8, 8, steps]


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


def test_that_it_stands_still_is_said_when_it_begins_to() -> None:
    """Of the round whose block it waits for; where that is in hand nothing is said."""
    config: Config = from_dict({"rounds": 5})
    participant = Participant("TTTTT", late={3})
    link = Link(participant, Started(0, 4, 0))
    setup = SimpleNamespace(config=config, manifest=manifest_of(), held_out=None)
    loop = RoundLoop(setup, link, call, Trainer(participant), LoopLag())  # type: ignore[arg-type]
    asyncio.run(loop.run())
    (at,) = [place for place, event in enumerate(link.heard) if isinstance(event, Wait)]
    assert link.heard[at] == Wait(1)
    trained = [event.round for event in link.heard[:at] if isinstance(event, Contribute)]
    assert trained == [0, 1, 2], "round 3 builds on the block of round 1"


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


# Where the client adds its own noise

LOCAL = {"privacy": {"where": "local", "clip": 1.0, "noise": 1.0, "budget": 100.0}}


def reports(link: Link) -> list[LandedMessage]:
    return [e.message for e in link.heard if isinstance(e, Say) and isinstance(e.message, LandedMessage)]


def test_of_what_a_private_client_trains_nothing_is_told_but_what_noise_hides() -> None:
    releases = Releases()
    _, link = run("TTTT", releases=releases, misses=dict.fromkeys(range(4), 0.7), **LOCAL)
    told = [(e.round, e.weight, e.steps, e.loss) for e in link.heard if isinstance(e, Contribute)]
    assert told == [(0, 1, 8, 0.0), (1, 1, 8, 0.0), (2, 1, 8, 0.0), (3, 1, 8, 0.0)]
    assert [(report.alpha, report.drift, report.miss) for report in reports(link)] == [(0.0, 0.0, 0.0)] * 4
    assert releases.left == [0, 1, 2, 3]
    assert all(isinstance(leaving, Noised) for leaving in link.leaving)


def test_whether_a_private_clients_training_came_to_nothing_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    _, link = run("TTTT", diverges=1, releases=Releases(), **LOCAL)
    assert [event.round for event in link.heard if isinstance(event, Contribute)] == [0, 1, 2, 3]
    assert not [event for event in link.heard if isinstance(event, Withhold)]
    assert "round 1 (block 1) was of no use" in caplog.text, "its own user hears of it"
    only_noise = link.leaving[1].wait()
    assert 0.9 < only_noise.std() < 1.1
    assert link.leaving[1].wait() is only_noise, "drawn once"


def test_a_private_client_does_not_show_by_waiting_that_its_guess_was_far_off() -> None:
    trainer, _ = run("TTTT", misses=dict.fromkeys(range(4), 9.0), releases=Releases(), **LOCAL)
    assert trainer.done == [(0, 0), (1, 1), "lands 0", (2, 2), "lands 1", (3, 3), "lands 2", "lands 3"]


def test_a_private_client_is_evaluated_without_what_only_it_has_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that it has trained has landed by then."""
    seen = []

    def handle(self: Link, event: Event) -> None:
        self.heard.append(event)
        if isinstance(event, Say) and isinstance(event.message, Evaluated):
            trained = [e.round for e in self.heard if isinstance(e, Contribute)]
            seen.append(
                (event.message.round, max(trained, default=-1), max((r.round for r in reports(self)), default=-1))
            )

    monkeypatch.setattr(Link, "handle", handle)
    run("TTTTTT", releases=Releases(), eval={"every": 2}, **LOCAL)
    assert seen == [(-1, -1, -1), (1, 1, 1), (3, 3, 3), (5, 5, 5)]
    seen.clear()
    run("TTTTTT", eval={"every": 2})
    assert seen == [(-1, -1, -1), (1, 1, -1), (3, 3, 1), (5, 5, 5)], "others are not held up for it"


def test_what_the_budget_does_not_allow_is_not_trained_and_does_not_leave() -> None:
    trainer, link = run("TTTT", releases=Releases(may=2), **LOCAL)
    assert trainer.done == [(0, 0), (1, 1)]
    assert [e for e in link.heard if isinstance(e, Withhold)] == [
        Withhold(2, "the budget is spent"), Withhold(3, "the budget is spent")
    ]  # fmt: skip
    _, link = run("TTTT", releases=Releases(may=1), mode="lisa", **LOCAL)
    assert [e.round for e in link.heard if isinstance(e, Contribute)] == [0], "not both of two that are trained at once"


def test_what_cannot_be_noted_as_having_left_does_not_leave(caplog: pytest.LogCaptureFixture) -> None:
    _, link = run("TTTT", releases=Releases(fails=1), **LOCAL)
    assert [e.round for e in link.heard if isinstance(e, Contribute)] == [0, 2, 3]
    (withheld,) = [e for e in link.heard if isinstance(e, Withhold)]
    assert withheld == Withhold(1, "the worker's disk refuses to note that it leaves: No space left on device")
    assert "round 1 is not sent" in caplog.text
