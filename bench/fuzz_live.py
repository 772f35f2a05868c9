"""A live broker under attack while honest clients run rounds: they shall not notice, and it shall not grow.

The attack comes and goes every few seconds, so that rounds under attack are held against others of it.
A run without any, before, tells what the broker needs by itself.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench import exchange, synthetic, zmtp
from bench.attacker import Attacker
from bench.exchange import Exchange
from bench.figures import FiguresError
from bench.paired import Paired, log_ratios
from bench.zmtp import Raw
from parablock import wire
from parablock.invite import Invite
from parablock.messages import Probe
from parablock.run_folder import INVITE, METRICS, RunFolder

if TYPE_CHECKING:
    from pathlib import Path

    from bench.exchange import Finished

CLIENTS, BLOCKS, BLOCK_BYTES = 2, 2, 64 << 10
PAUSE_S = 0.25
"""A client's rest in place of training, so that the cores are not what is measured."""

DEADLINE_S = 0.05
"""Who has joined and contributes nothing is not waited for."""

TURN_S = 3.0
"""The attack lasts so long, and is away for so long."""

MOST_MORE_BYTES = 512 << 20
"""The broker may need so much more than without an attack: what `broker.guard` lets some connections have at once."""

_WARM_UP = 4
_GUESTS = 400  # most are barred most of the time


@dataclass(frozen=True)
class Attack:
    """What is done to one broker. rate: messages a second, while it lasts."""

    count: int
    rate: float
    plain: bool
    seed: int

    @property
    def rounds(self) -> int:
        """Enough for all of it, and its absences."""
        return _WARM_UP + int(4.0 * self.count / self.rate / PAUSE_S) + int(4 * TURN_S / PAUSE_S)


def quiet_peak_bytes(folder: Path, *, plain: bool) -> int:
    """What the broker needs without an attack, above what it had before."""
    return exchange.run(_asked(20, plain=plain), folder).broker_peak_bytes


def run(attack: Attack, folder: Path, quiet_bytes: int) -> dict[str, Any]:
    """Attack a broker in `folder`, which is empty. Raises FiguresError, or ChildError where it is brought down."""
    asked = _asked(attack.rounds, plain=attack.plain)
    siege = _Siege(attack, folder, asked)
    siege.start()
    try:
        finished = exchange.run(asked, folder)
    finally:
        siege.end()
    sent = siege.sent()
    if sum(sent.values()) < attack.count:
        raise FiguresError(f"{sum(sent.values())} of {attack.count} messages were sent before the run's end")
    with RunFolder.open(folder / "run") as opened:
        events = Counter(event["kind"] for event in opened.read_events())
    more_bytes = finished.broker_peak_bytes - quiet_bytes
    if more_bytes > MOST_MORE_BYTES:
        raise FiguresError(
            f"under attack the broker needs {more_bytes >> 20} MiB more, {MOST_MORE_BYTES >> 20} are allowed"
        )
    quiet, under = turns(finished, siege.began)
    ratios = Paired(tuple(log_ratios(under, quiet)))
    return {
        "way": "plain" if attack.plain else "CURVE",
        "messages": sum(sent.values()),
        "sent": dict(sorted(sent.items())),
        "rate": attack.rate,
        "dropped": events["dropped"],
        "rounds": len(finished.contributors),
        "pairs": len(quiet),
        "quiet_round_s": statistics.median(quiet),
        "round_s": statistics.median(under),
        **ratios.told(0.0953),  # 10 %
        "quiet_s": quiet,
        "under_s": under,
        "broker_quiet_mb": quiet_bytes / 1e6,
        "broker_more_mb": more_bytes / 1e6,
    }


def turns(finished: Finished, began: float) -> tuple[list[float], list[float]]:
    """Mean round times of the turns without the attack, and of the turns with it that follow each."""
    ends = sorted(min(client.held[round] for client in finished.clients) for round in finished.clients[0].held)
    by_turn: dict[int, list[float]] = {}
    for before, end in zip(ends[_WARM_UP:], ends[_WARM_UP + 1 :], strict=False):
        first, last = int((before - began) // TURN_S), int((end - began) // TURN_S)
        if before >= began and first == last:
            by_turn.setdefault(first, []).append(end - before)
    pairs = [(turn, turn + 1) for turn in sorted(by_turn) if turn % 2 == 0 and turn + 1 in by_turn]
    if not pairs:
        raise FiguresError("the run was too short to hold rounds under attack against others")
    return [statistics.fmean(by_turn[a]) for a, _ in pairs], [statistics.fmean(by_turn[b]) for _, b in pairs]


def _asked(rounds: int, *, plain: bool) -> Exchange:
    return Exchange(
        CLIENTS,
        BLOCKS,
        BLOCK_BYTES,
        rounds,
        quorum=CLIENTS,
        deadline_s=DEADLINE_S,
        pause_s=PAUSE_S,
        plain=plain,
        guests=tuple(f"mallory-{index}" for index in range(_GUESTS)),
    )


class _Siege:
    """The attack on a run that is about to begin in `folder`. began: when its first turn (a quiet one) did."""

    def __init__(self, attack: Attack, folder: Path, asked: Exchange) -> None:
        self.began = 0.0
        self._attack = attack
        self._folder = folder
        self._asked = asked
        self._over = threading.Event()
        self._attacker: Attacker | None = None
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._go, name="attack", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """Raises what has failed in it."""
        self._over.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def sent(self) -> Counter[str]:
        return self._attacker.sent if self._attacker is not None else Counter()

    def _go(self) -> None:
        try:
            out = self._folder / "run"
            while exchange.endpoint(out) == "" or not (out / METRICS).exists() or not (out / METRICS).stat().st_size:
                if self._over.wait(0.05):
                    return
            endpoint = exchange.endpoint(out)
            manifest = synthetic.manifest(self._asked.blocks, self._asked.block_bytes)
            keys = None if self._attack.plain else self._folder / "keys"
            run = _run_of(endpoint) if keys is None else Invite.read(out / INVITE).run
            self._attacker = Attacker(endpoint, manifest, keys, self._asked.guests, run, self._attack.seed)
            self.began = time.monotonic()
            self._attacker.attack(self._attack.count, self._attack.rate, self._let, self._over)
        except BaseException as error:
            self._failure = error

    def _let(self) -> bool:
        return int((time.monotonic() - self.began) // TURN_S) % 2 == 1


def _run_of(endpoint: str) -> str:
    """The run's name, which a broker says to everybody who asks without encryption."""
    with Raw(zmtp.address(endpoint)) as raw:
        raw.null(b"scout")
        raw.send(wire.encode(wire.Envelope("", 0, Probe(1, 0)))[0])
        _, body = raw.get_frame()
        return wire.decode([body]).run
