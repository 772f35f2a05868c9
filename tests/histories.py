"""Histories: runs in which much goes wrong at once, each of them drawn from a seed.

    python -m tests.histories --seed 4711 --large      replay one, with what befell it
    python -m tests.histories --count 10000 --large    so many, on all cores; one that fails prints how to replay it

The invariants are asserted after each event by `tests.network`; here it is asserted that the run ends, and well.
"""

from __future__ import annotations

import argparse
import gc
import logging
import multiprocessing
import os
import random
import sys
import time
import traceback
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from parablock.messages import Commit
from parablock.robust import fewest
from tests.network import POINTS, VARYING, Faults, Habits, Incident, Network, config_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

LARGE = 5, 20
"""Clients and rounds of a large history."""

LOCAL = {"where": "local", "clip": 1.0, "noise": 2.0, "budget": 1000.0}
"""Clients hide from the broker, without any end; nobody adds noise here."""

RULES = ("median", "trimmed-mean", "krum", "multi-krum")


def history(seed: int, mode: str = "", *, large: bool = False) -> Network:
    """All of it follows from `seed`, but for a mode that is asked for, and for whether it is a large one."""
    return drawn(random.Random(seed), seed, mode, large=large)


def drawn(rng: random.Random, seed: int, mode: str = "", *, large: bool = False) -> Network:
    """Settings, clients and incidents by `rng`, what the links do by `seed`.

    Whoever dies comes back; but where the quorum may be done without, or its loss stops the run, some do not, all but
    the first client.
    """
    names = "abcd"[: rng.randint(1, 4)]
    rounds = rng.randint(3, 9)
    if large:
        names, rounds = "abcde"[: LARGE[0]], LARGE[1]
    mode = mode or rng.choice(["parablock", "parablock", "parablock", "fedbcd", "fedcybgd"])
    rounds += rounds % 2 if mode == "lisa" else 0
    fraction = rng.choice([1.0, 0.5]) if mode not in ("fedcybgd", "lisa") else 1.0
    most = 1 if mode == "fedcybgd" else max(int(fraction * len(names) + 0.5), 1)
    orders = ["cyclic", "random", "descending", *["importance"] * (mode != "lisa")]
    policies = random.Random(f"policy/{seed}")
    rule = _robust(seed, most) if mode != "fedcybgd" else {}
    strict = rule.get("rule", "mean") != "mean"
    grace, lost = policies.random() < 0.5, policies.choice(["wait", "fewer"] if not strict else ["wait"])
    quorum = rng.randint(0, most) * (not strict)
    if random.Random(f"stop/{seed}").random() < 0.2:
        lost, quorum = "stop", most
    config = config_of(
        len(names),
        rounds,
        quorum=quorum,
        fraction=fraction,
        deadline_s=rng.choice([0.0, 0.0, 1.0, 3.0]),
        policy={
            "grace": grace,
            "quorum_lost": lost,
            "quorum_lost_s": 2.0 if lost == "stop" else 8.0,
            "late": policies.choice(["discard", "fold"] if mode != "fedcybgd" and not strict else ["discard"]),
            "late_decay": policies.choice([1.0, 0.5]),
        },
        mode=mode,
        schedule={"order": rng.choice(orders if mode != "fedcybgd" else ["cyclic", "descending"])},
        robust=rule,
        solver=VARYING if mode == "parablock" and not strict else {"steps": 1},
        pipeline={"max_in_flight": rng.choice([1, 1, 2, 3]), "land": rng.choice(["boundary", "arrival"])},
        codec={
            "up": rng.choice(["float32", "float32", "bfloat16", "float16", "int8", "int4"]),
            "down": rng.choice(["float32", "float32", "bfloat16", "float16", "int8", "int4"]),
            "error_feedback": rng.random() < 0.7,
        },
        server={"optimizer": rng.choice(["average", "average", "nesterov", "yogi"])},
        privacy=LOCAL if random.Random(f"privacy/{seed}").random() < 0.5 else {},
        window=rng.choice([1024, 2048, 2048, 8192]),
        heartbeat_s=2.0 if large else 1.0,
    )
    habits = {name: _habits(rng, rounds, 0.3 if large else 1.0) for name in names}
    habits = {name: replace(each, stalls=_stalls(f"{name}/{seed}", rounds)) for name, each in habits.items()}
    incidents = tuple(_incident(rng, names, 30.0 if large else 20.0) for _ in range(rng.randint(0, 8 if large else 4)))
    if lost != "wait":
        incidents = tuple(
            replace(each, returns=each.victim in ("broker", names[0]) or policies.random() < 0.5) for each in incidents
        )
    faults = Faults(
        loss=rng.choice([0.0, 0.02, 0.1, 0.1 if large else 0.2]),
        duplication=rng.choice([0.0, 0.0, 0.1, 0.3]),
        echo=rng.choice([0.0, 0.02, 0.1]),
        delay_s=(0.001, rng.choice([0.02, 0.3, 0.6 if large else 1.5])),
        ordered=rng.random() < 0.5,
        incidents=incidents,
        jumps=_jumps(seed, 30.0 if large else 20.0),
    )
    return Network(config, habits, faults, seed)


def _robust(seed: int, most: int) -> dict[str, Any]:
    """In half of the histories a rule, if so many contributions allow one, and a length to which they are cut."""
    rng = random.Random(f"rule/{seed}")
    if rng.random() < 0.5:
        return {}
    rule, bad = rng.choice([("mean", 0)] + [(name, 1) for name in RULES if fewest(name, 1) <= most])
    return {"rule": rule, "bad": bad} | rng.choice([{}, {"clip": 20.0}, {"clip_ratio": 0.99}])


def _habits(rng: random.Random, rounds: int, scale: float) -> Habits:
    pace = scale * rng.choice([1, 1, 4])
    return Habits(
        seconds=(0.2 * pace, 1.5 * pace),
        diverges=frozenset(round for round in range(rounds) if rng.random() < 0.05),
        spoils=frozenset(round for round in range(rounds) if rng.random() < 0.05),
        astray=rng.choice((0.0, 0.0, 0.5)),
        joins_at=rng.uniform(0.0, 3.0),
    )


def _stalls(whose: str, rounds: int) -> frozenset[int]:
    """By chance of its own, as for `_jumps`: what is drawn else stays as it is."""
    rng = random.Random(f"stalls/{whose}")
    return frozenset(round for round in range(rounds) if rng.random() < 0.02)


def _jumps(seed: int, span_s: float) -> tuple[tuple[float, float], ...]:
    rng = random.Random(f"jumps/{seed}")
    number = rng.randint(0, 3)  # by a second to a day, in either direction
    return tuple((rng.uniform(0.0, span_s), rng.choice([-1, 1]) * 10.0 ** rng.uniform(0, 5)) for _ in range(number))


def _incident(rng: random.Random, names: str, span_s: float) -> Incident:
    kind = rng.choice(["freeze", "cut", "kill", "kill", "disk"])
    brokers = kind == "disk" or (kind != "cut" and rng.random() < 0.4)
    victim = "broker" if brokers else rng.choice(names)
    at = rng.uniform(0.0, span_s)
    if kind == "kill" and brokers:
        point = rng.choice(["", *POINTS])
        return Incident(kind, victim, at, rng.uniform(0.0, rng.choice([1.0, 15.0])), point=point)
    # A worker that comes back takes longer than a message: what the dead one said has arrived, or never will.
    lasts = rng.uniform(4.0 if kind == "kill" else 0.5, 15.0)
    return Incident(kind, victim, at, lasts, kept=rng.random() < 0.7)


def outcome(network: Network) -> Counter[str]:
    """Run it, and see that it ends well, be it slowly, and where it was stopped, when it is begun again. Returns how
    often what has happened."""
    network.run(until_s=2000.0)
    stops = 0
    while network.over is not None and not network.over.complete and stops < 10:
        stops += 1
        network.check_stopped()
        network.begin_again()
        network.run(until_s=network.now + 2000.0)
    network.check_ended()
    seen = Counter(note.kind for note in network.notes)
    seen["stopped"] += stops
    seen.update([type(each.message).__name__ for each in network.sent])
    commits = [each.message for each in network.sent if isinstance(each.message, Commit)]
    seen["left out"] += sum(len(entry.left_out) for entry in network.committed)
    seen["clipped"] += sum(len(entry.clipped) for entry in network.committed)
    seen["folded anew"] += sum(commit.attempt > 1 for commit in commits)
    seen["in full"] += sum(commit.attempt == 0 and commit.contributors > 0 for commit in commits)
    for process in network.processes:
        seen["dismissed"] += len(process.dismissed)
        seen["dead"] += process.dead
        seen["resumed"] += process.kept is not None
        seen["resumed with contributions"] += process.kept is not None and process.kept.held != ()
        seen["skipped"] += network.config.rounds - len(process.trained)
    seen["sits out"] += sum(not turn.trains for _, turn in network.told.values())
    seen["makes up for others"] += network.made_up
    seen["late"] += sum(entry.late for entry in network.committed)
    seen["folded late"] += sum(len(entry.folded_late) for entry in network.committed)
    seen["settled"] += sum(len(process.settled) for process in network.processes)
    seen["empty"] += sum(not entry.contributors for entry in network.committed)
    seen["behind a start"] += sum(start.pending != () for starts in network.starts.values() for start in starts)
    seen["restarted"] += network.broker.epoch - 1
    seen["tried the disk again"] += network.retries
    seen.update(network.crashed)
    return seen


def replay(seed: int, mode: str = "", *, large: bool = False) -> str:
    """The line that replays a history."""
    return f"python -m tests.histories --seed {seed}" + (f" --mode {mode}" if mode else "") + " --large" * large


def attempt(seed: int, mode: str = "", *, large: bool = False) -> tuple[int, str]:
    """Of a history: its seed, and what went wrong with it, if anything did."""
    trouble = ""
    try:
        network = history(seed, mode, large=large)
        outcome(network)
        vars(network).clear()  # what refers to itself through it is freed at once, for less than by a search for it
    except Exception:
        trouble = traceback.format_exc()
    if seed % 25 == 24:
        gc.collect()
        gc.freeze()  # what is left are caches
    return seed, trouble


def _begin() -> None:
    """In a process that plays histories: it collects garbage between them, and looks through nothing else for it."""
    logging.getLogger("broker").setLevel(logging.ERROR)  # that the disk refuses is no news
    gc.disable()
    gc.freeze()


def failures(
    seeds: Iterable[int], mode: str = "", *, large: bool = False, processes: int = 0
) -> Iterator[tuple[int, str]]:
    """The seeds of histories that did not end well, and why. processes: 0: one a core."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes or os.cpu_count(), _begin) as pool:
        for seed, trouble in pool.imap_unordered(partial(attempt, mode=mode, large=large), seeds, chunksize=10):
            if trouble:
                yield seed, trouble


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.histories", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--count", type=int, default=1, help="how many")
    parser.add_argument("--mode", default="", help="of the run, in place of one that is drawn")
    parser.add_argument("--large", action="store_true", help="{} clients and {} rounds".format(*LARGE))
    parser.add_argument("--processes", type=int, default=0, help="by default one a core")
    options = parser.parse_args(argv)
    if options.count == 1:
        network = history(options.seed, options.mode, large=options.large)
        print(network.config, network.faults, sep="\n")
        for kind, count in sorted(outcome(network).items()):
            print(f"{count:6} {kind}")
        return 0
    began, failed = time.monotonic(), 0
    seeds = range(options.seed, options.seed + options.count)
    for seed, trouble in failures(seeds, options.mode, large=options.large, processes=options.processes):
        failed += 1
        print(trouble, replay(seed, options.mode, large=options.large), sep="\n", flush=True)
    minutes = (time.monotonic() - began) / 60
    print(f"{options.count} histories in {minutes:.1f} min, {options.count / minutes:.0f} a minute; {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
