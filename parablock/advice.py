"""Advice: which K, which number of blocks, and which codec would hide the exchanges that do not hide.

Pure arithmetic beside `parablock.plan`, with the same costs and link. A block's exchange hides when it takes no longer
than what is trained meanwhile.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from parablock import codec
from parablock.plan import Cost, Exchange, Link, exchange
from parablock.sections import Codecs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def steps_to_hide(exchange: Exchange, behind: set[tuple[int, ...]], costs: Sequence[Cost]) -> int | None:
    """The smallest K with which the exchange hides, whichever of `behind` is trained meanwhile; None: there is none."""
    most = 1
    for blocks in behind:
        together = Cost(sum(costs[block].fixed_s for block in blocks), sum(costs[block].step_s for block in blocks))
        # Several in flight share one link: each must also leave it within one round.
        for needed_s, cost in ((exchange.seconds, together), (exchange.wire_s, costs[blocks[0]])):
            if needed_s > cost.seconds(most):
                if cost.step_s <= 0:
                    return None
                most = math.ceil((needed_s - cost.fixed_s) / cost.step_s - 1e-9)
    return most


def blocks_to_hide(
    sizes: Mapping[int, Sequence[int]], least_s: float, link: Link, codecs: Codecs, chunk_bytes: int, in_flight: int
) -> int | None:
    """The smallest `blocks.num_blocks` with which every exchange hides; None: no number does.

    sizes: by number, the elements of each block. least_s: the compute of the cheapest block, which a finer partition
    changes little, for every step runs the whole model forward.
    """
    for number in sorted(sizes):
        moved = exchange(max(sizes[number]), link, codecs, chunk_bytes)
        if moved.seconds <= in_flight * least_s and moved.wire_s <= least_s:
            return number
    return None


def codec_to_hide(
    numels: Sequence[int],
    behind: Mapping[int, set[tuple[int, ...]]],
    costs: Sequence[Cost],
    steps: int,
    link: Link,
    chunk_bytes: int,
) -> str | None:
    """The first of `codec.NAMES` that, both ways, hides every exchange at K = steps."""
    for name in codec.NAMES:
        moved = [exchange(numel, link, Codecs(name, name), chunk_bytes) for numel in numels]
        needed = [steps_to_hide(moved[block], blocks, costs) for block, blocks in behind.items()]
        if all(number is not None and number <= steps for number in needed):
            return name
    return None
