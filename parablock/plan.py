"""The plan: how long rounds will take, and which exchanges will hide behind compute.

Pure arithmetic on what was measured elsewhere: the compute of each block (`Cost`), and the link (`Link`). An exchange
is cut through, chunk by chunk: the mean of a chunk comes down while later chunks still go up. Rounds follow the
algorithm (design §2): the next one trains at once, a client is at most `in_flight` rounds ahead of what has landed,
and one upload follows another on the link. What a client cannot measure is not in it: slower clients, a broker whose
own link is shared. What would make the rest hide is `parablock.advice`'s business.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from parablock import slices
from parablock.codec import codec_of
from parablock.layout import Layout, chunk_numel

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from parablock.sections import Codecs

COMMIT_S = 0.005
"""What an exchange takes beyond moving the bytes: the fold of its last chunk, the record of the commit, the landing."""

_WARM_UP_SWEEPS = 2
_SWEEPS = 8  # enough for the mean of a random order, in which pairs of blocks vary


@dataclass(frozen=True)
class Cost:
    """The compute of one block: so much a round, and so much for each of its K steps."""

    fixed_s: float
    step_s: float

    def seconds(self, steps: int) -> float:
        return self.fixed_s + steps * self.step_s


@dataclass(frozen=True)
class Link:
    """Between a client and the broker, payload only: round-trip time, bytes per second up and down."""

    rtt_s: float
    up_bytes_s: float
    down_bytes_s: float
    start_s: float = 0.0
    """By how much an exchange is longer than its bytes: after a pause TCP starts slowly, where acknowledgements wait
    behind what goes the other way."""

    @classmethod
    def given(cls, rate_bytes_s: float, delay_s: float, window_bytes: int) -> Link:
        """A link of this rate and this delay, each way. A transfer has at most `window_bytes` under way."""
        rtt_s = 2 * delay_s
        rate = min(rate_bytes_s, window_bytes / rtt_s) if rtt_s else rate_bytes_s
        return cls(rtt_s, rate, rate)


@dataclass(frozen=True)
class Exchange:
    """One block's way up and down: bytes and seconds of each leg, and M, from the delta to the landing."""

    bytes_up: int
    bytes_down: int
    up_s: float
    down_s: float
    seconds: float

    @property
    def wire_s(self) -> float:
        """How long it keeps the next exchange off the link: up and down do not share a rate."""
        return max(self.up_s, self.down_s)


def exchange(numel: int, link: Link, codecs: Codecs, chunk_bytes: int, *, masked: bool = False) -> Exchange:
    """M of a block of `numel` elements: RTT and start of the link, and until the last chunk is down, and `COMMIT_S`.

    A chunk comes down when it is up and the one before it is down. chunk_bytes: `network.chunk_bytes`. masked: what
    unmasks a slice comes after two more (`Layout.window_bytes`), and another RTT.
    """
    of_chunk = chunk_numel(numel, chunk_bytes, masked=masked)
    up, down = (Layout(codec_of(name), numel, of_chunk) for name in (codecs.up, codecs.down))
    are_up = list(accumulate(up.chunk_nbytes(index) / link.up_bytes_s for index in range(up.count)))
    behind = 2 * -(-up.count // slices.count(up.count)) if masked else 0
    is_down = 0.0
    for index in range(up.count):
        ready = are_up[min(index + behind, up.count - 1)] + (link.rtt_s if masked else 0.0)
        is_down = max(ready, is_down) + down.chunk_nbytes(index) / link.down_bytes_s
    down_s = down.nbytes / link.down_bytes_s
    return Exchange(up.nbytes, down.nbytes, are_up[-1], down_s, link.rtt_s + link.start_s + is_down + COMMIT_S)


def round_seconds(
    order: Sequence[int], compute_s: Sequence[float], exchanges: Sequence[Exchange], in_flight: int
) -> float:
    """T, the mean round time in steady state: plays the rounds of `order`, `rounds_to_play` of them.

    order: the block of each round. compute_s, exchanges: by block. in_flight: 0 in the synchronous mode. Round t starts
    when t − 1 is trained and t − 1 − in_flight has landed; its upload starts when it is trained and the one before has
    left. So T is C + M in the synchronous mode, and max(C, M) with one exchange in flight that fills the link.
    """
    trained: list[float] = []
    landed: list[float] = []
    link_free = 0.0
    for round, block in enumerate(order):
        start = trained[-1] if trained else 0.0
        if round > in_flight:
            start = max(start, landed[round - 1 - in_flight])
        trained.append(start + compute_s[block])
        leaves = max(trained[-1], link_free)
        link_free = leaves + exchanges[block].wire_s
        landed.append(max(leaves + exchanges[block].seconds, landed[-1] if landed else 0.0))
    warm_up = len(order) * _WARM_UP_SWEEPS // (_WARM_UP_SWEEPS + _SWEEPS)
    return (trained[-1] - trained[warm_up - 1]) / (len(order) - warm_up)


def rounds_to_play(num_blocks: int, in_flight: int) -> int:
    """Rounds that `round_seconds` needs: whole sweeps, and more of them than rounds in flight."""
    return num_blocks * (_WARM_UP_SWEEPS + _SWEEPS) * math.ceil((in_flight + 1) / num_blocks)


def successors(order: Sequence[int], in_flight: int) -> dict[int, set[tuple[int, ...]]]:
    """By block, the blocks that are trained while its exchange is under way: one tuple for each that occurs."""
    found: dict[int, set[tuple[int, ...]]] = {}
    for round in range(len(order) - in_flight):
        found.setdefault(order[round], set()).add(tuple(order[round + 1 : round + 1 + in_flight]))
    return found


def exposed_seconds(exchange: Exchange, behind: set[tuple[int, ...]], compute_s: Sequence[float]) -> float:
    """How much longer the exchange takes than what is trained meanwhile, by mean over `behind` (from `successors`)."""
    return statistics.fmean(max(exchange.seconds - sum(compute_s[block] for block in blocks), 0.0) for blocks in behind)


def to_measure(kinds: Sequence[Hashable]) -> list[int]:
    """Which blocks to measure. kinds: of each block, by depth; blocks of a kind have the same shapes.

    All of a kind that has few, else its first, its last, and the one between: what differs within a kind is how deep
    the backward pass goes.
    """
    chosen = []
    for members in _members(kinds):
        few = len(members) <= 4
        chosen += members if few else [members[0], members[len(members) // 2], members[-1]]
    return sorted(chosen)


def interpolated(kinds: Sequence[Hashable], measured: Mapping[int, Cost]) -> list[Cost]:
    """The cost of every block from those that `to_measure` names, linear in depth within a kind."""
    costs: dict[int, Cost] = dict(measured)
    for members in _members(kinds):
        known = [block for block in members if block in measured]
        assert known, f"no block of the kind of block {members[0]} was measured"
        for low, high in pairwise(known):
            for block in range(low + 1, high):
                if kinds[block] == kinds[low]:
                    share = (block - low) / (high - low)
                    costs[block] = Cost(
                        measured[low].fixed_s * (1 - share) + measured[high].fixed_s * share,
                        measured[low].step_s * (1 - share) + measured[high].step_s * share,
                    )
    return [costs[block] for block in range(len(kinds))]


def _members(kinds: Sequence[Hashable]) -> list[list[int]]:
    members: dict[Hashable, list[int]] = {}
    for block, kind in enumerate(kinds):
        members.setdefault(kind, []).append(block)
    return list(members.values())
