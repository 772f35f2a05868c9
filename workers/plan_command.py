"""`parablock plan CONFIG.toml`: how long rounds will take, and which exchanges will hide, measured here and now.

Only the command: it measures by `workers.prober` and `workers.timing`, and what follows from that is the arithmetic of
`parablock.plan` and `parablock.advice`. Trains a model that it throws away.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from parablock import advice, plan
from parablock import config as settings
from parablock.config import ConfigError
from parablock.keys import KeyFileError
from parablock.network import EndpointError
from parablock.plan import Link
from parablock.schedule import Schedule
from parablock.units import UnitError, counted, format_rate, parse_duration, parse_rate
from workers.__main__ import EXIT_DONE, EXIT_INPUT, EXIT_LATER, EXIT_REFUSED, loop_factory
from workers.contact import add_arguments, contact
from workers.prober import Prober, Refusal, Unanswered

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from parablock.config import Config
    from parablock.manifest import Manifest
    from parablock.plan import Cost, Exchange
    from workers.contact import Contact
    from workers.setup import Setup

_PATIENCE_S = 8.0
_HIDDEN_S = 5e-4  # what is shorter is not shown
_MOST_PARTITIONS = 32  # that are tried for a finer one
_UNPLANNED = {
    "fedcybgd": "as long as those of fedbcd, so add --set mode=fedbcd",
    "lisa": "two of them exchange what was trained at once, so add --set mode=parablock, or another mode",
}
"""By mode, why a plan is refused."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0; 2 where the input is wrong; 3 refused by the broker; 75 where no broker answers."""
    arguments = _parser().parse_args(argv)
    try:
        _check(arguments)
        config = settings.load(arguments.config, arguments.set)
        if config.mode in _UNPLANNED:
            raise ConfigError(
                f"plan does not tell how long rounds of mode = {config.mode} take: {_UNPLANNED[config.mode]}"
            )
        there = contact(arguments) if arguments.rate is None else None
        link = _link(arguments, config)
        with _Live() as live:
            if link is None:
                assert there is not None
                with asyncio.Runner(loop_factory=loop_factory()) as runner:
                    link = runner.run(_probed(there, config, live.tell))
            result = _measured(arguments, config, link, live)
    except (ConfigError, EndpointError, KeyFileError, UnitError) as error:
        return _complain(error, EXIT_INPUT)
    except _WrongInput as error:
        return _complain(error, EXIT_INPUT)
    except Refusal as error:
        return _complain(error, EXIT_REFUSED)
    except Unanswered as error:
        return _complain(error, EXIT_LATER)
    console = Console()
    console.print(_table(result))
    for line in _conclusions(result):
        console.print(line, highlight=False, soft_wrap=True)
    if arguments.json:
        print(json.dumps(result, allow_nan=False), flush=True)
    return EXIT_DONE


class _WrongInput(ValueError):
    """Told by a module that is imported late."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="parablock plan",
        description="Measures K steps of each kind of block on this machine, and the link to the broker; says which "
        "exchanges will hide behind compute, by how much not, and what would hide them; for a mode without blocks, how "
        "long its rounds take.",
    )
    add = parser.add_argument
    add("config", metavar="CONFIG.toml", nargs="?", type=Path, help="the run's settings (default: the built-in ones)")
    add("--set", metavar="KEY=VALUE", action="append", default=[], help="change a setting, as solver.steps=4")
    add_arguments(parser)
    add("--rate", help="instead of a broker that is measured: a link of this rate each way, as 100mbit or 5MB/s")
    add("--delay", help="with --rate: the link's delay each way, as 20ms (default: none)")
    add("--data", metavar="FILE", help="training rows (default: data.train of the settings)")
    add("--model", default="", help="where the model lies on this machine, if elsewhere")
    add("--device", default="auto", help="cpu, cuda, cuda:N or auto")
    add("--threads", type=int, default=0, help="torch threads on the CPU (default: one for each core)")
    add("--clients", type=int, help="how many will take part (default: round.clients of the settings)")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    add("--json", action="store_true", help="also print one JSON object, the last line")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    """Raises UnitError."""
    measures = arguments.invite is not None or arguments.broker is not None
    if measures == (arguments.rate is not None):
        raise UnitError("name the link: --invite FILE to measure that to a broker, or --rate 100mbit to assume one")
    if arguments.delay is not None and arguments.rate is None:
        raise UnitError("--delay goes with --rate; the delay to a broker is measured")
    for option in ("threads", "clients"):
        value = getattr(arguments, option)
        if value is not None and not (0 if option == "threads" else 1) <= value <= 100_000:
            raise UnitError(f"--{option} is a whole number above zero, got {value}")


def _link(arguments: argparse.Namespace, config: Config) -> Link | None:
    """The link that was given, None where it is to be measured."""
    if arguments.rate is None:
        return None
    delay_s = parse_duration(arguments.delay) if arguments.delay is not None else 0.0
    return Link.given(parse_rate(arguments.rate), delay_s, config.network.window_bytes)


async def _probed(there: Contact, config: Config, told: Callable[[str], None]) -> Link:
    network = config.network
    prober = Prober(there.endpoint, network.chunk_bytes, network.window_bytes, _PATIENCE_S, there.credentials)
    return await prober.measure(lambda what: told(f"the link to {there.endpoint}: {what}"))


def _measured(arguments: argparse.Namespace, config: Config, link: Link, live: _Live) -> dict[str, Any]:
    """Time the blocks and work out the result. Raises _WrongInput."""
    # Imported here: torch and transformers take seconds, and a broker that does not answer should be told at once.
    import torch

    from parablock.blocks import PartitionError
    from parablock.models import ModelError, quiet
    from parablock.solver import Diverged
    from workers.rows import DataError
    from workers.setup import DeviceError, Local, prepare
    from workers.timing import BlockTimer

    quiet()
    torch.set_num_threads(arguments.threads or os.cpu_count() or 1)
    local = Local(
        name="plan",
        train=arguments.data or config.data.train,
        held_out="",
        shard=(0, 1),
        model=arguments.model,
        device=arguments.device,
        threads=arguments.threads,
        trust_remote_code=arguments.trust_remote_code or config.trust_remote_code,
    )
    try:
        live.tell("the model and its rows")
        setup = prepare(json.dumps(settings.to_dict(config)), local)
        # Now: the solver leaves no parameter that a partition would call trainable.
        finer = _finer(setup) if config.knows_blocks else {}
        kinds = [tuple(slot.shape for slot in block.slots) for block in setup.manifest.blocks]
        chosen = plan.to_measure(kinds)
        timer = BlockTimer(setup, config.solver.steps)
        live.tell("the first steps")
        timer.warm_up(chosen[0])
        measured: dict[int, Cost] = {}
        for block in chosen:
            live.tell(f"K steps of block {block} ({setup.manifest.blocks[block].name})", len(measured), len(chosen))
            measured[block] = timer.cost(block)
    except (ModelError, DataError, PartitionError, DeviceError, Diverged) as error:
        raise _WrongInput(str(error)) from error
    result = outcome(config, setup.manifest, plan.interpolated(kinds, measured), link, finer)
    for block in result["blocks"]:
        block["measured"] = block["index"] in measured
    clients = arguments.clients or config.round.clients
    return {
        "plan": 1,
        "model": arguments.model or config.model,
        "device": str(setup.device),
        "threads": torch.get_num_threads(),
        "clients": clients,
        "sampled": config.sampled(clients),
        "link": {**dataclasses.asdict(link), "measured": arguments.rate is None},
        **result,
    }


def _finer(setup: Setup) -> dict[int, list[int]]:
    """Partitions into more and smaller blocks: elements of each block, by `blocks.num_blocks`."""
    from parablock.blocks import decoder_layers, partition

    layers = len(decoder_layers(setup.model))
    largest = max(block.numel for block in setup.manifest.blocks)
    step = -(-layers // _MOST_PARTITIONS)
    sizes = {}
    for number in sorted({*range(1, layers, step), layers}):
        blocks = dataclasses.replace(setup.config.blocks, num_blocks=number, max_block_mb=0.0)
        numels = [block.numel for block in partition(setup.model, blocks).blocks]
        if max(numels) < largest:
            sizes[number] = numels
    return sizes


def outcome(
    config: Config, manifest: Manifest, costs: Sequence[Cost], link: Link, finer: dict[int, list[int]]
) -> dict[str, Any]:
    """What is shown and printed: per block, and how long rounds take. costs: by block.

    Where the mode knows blocks, for both of those that do, with what would hide what does not; else every exchange is
    waited for.
    """
    steps, codecs = config.solver.steps, config.codec
    compute_s = [cost.seconds(steps) for cost in costs]
    chunk_bytes, masked = config.network.chunk_bytes, config.secure.enabled
    exchanges = [plan.exchange(block.numel, link, codecs, chunk_bytes, masked=masked) for block in manifest.blocks]
    result = {
        "mode": config.mode,
        "steps": steps,
        "codec_up": codecs.up,
        "codec_down": codecs.down,
        "compute_s": statistics.fmean(compute_s),
        "exchange_s": statistics.fmean(moved.seconds for moved in exchanges),
        "blocks": [
            {
                "index": block.index,
                "name": block.name,
                "numel": block.numel,
                "bytes_up": moved.bytes_up,
                "bytes_down": moved.bytes_down,
                "fixed_s": costs[block.index].fixed_s,
                "step_s": costs[block.index].step_s,
                "compute_s": compute_s[block.index],
                "upload_s": moved.up_s,
                "download_s": moved.down_s,
                "exchange_s": moved.seconds,
            }
            for block, moved in zip(manifest.blocks, exchanges, strict=True)
        ],
    }
    if not config.knows_blocks:
        order = [0] * plan.rounds_to_play(1, 0)
        return result | {"round_s": plan.round_seconds(order, compute_s, exchanges, 0)}
    return _with_overlap(result, config, costs, exchanges, link, finer)


def _with_overlap(
    result: dict[str, Any],
    config: Config,
    costs: Sequence[Cost],
    exchanges: Sequence[Exchange],
    link: Link,
    finer: dict[int, list[int]],
) -> dict[str, Any]:
    """The same with the rounds of fedbcd and parablock, and what would hide the exchanges that do not hide."""
    steps, in_flight, chunk_bytes = config.solver.steps, config.pipeline.max_in_flight, config.network.chunk_bytes
    numels = [block["numel"] for block in result["blocks"]]
    compute_s = [block["compute_s"] for block in result["blocks"]]
    order_name = config.schedule.order
    if order_name == "importance":
        order_name = "descending"  # as its first sweep; which blocks will be important nobody knows yet
    schedule = Schedule(order_name, len(numels), in_flight, config.seed)
    order = [schedule.block(round) for round in range(plan.rounds_to_play(len(numels), in_flight))]
    behind = plan.successors(order, in_flight)
    needed = [advice.steps_to_hide(exchanges[block], behind[block], costs) for block in range(len(numels))]
    hidden = all(number is not None and number <= steps for number in needed)
    known = [number for number in needed if number is not None]
    for block, moved in zip(result["blocks"], exchanges, strict=True):
        block["exposed_s"] = plan.exposed_seconds(moved, behind[block["index"]], compute_s)
        block["steps_to_hide"] = needed[block["index"]]
    rounds_s = {
        mode: plan.round_seconds(order, compute_s, exchanges, 0 if mode == "fedbcd" else in_flight)
        for mode in ("fedbcd", "parablock")
    }
    return result | {
        "in_flight": in_flight,
        **{f"{mode}_round_s": seconds for mode, seconds in rounds_s.items()},
        "round_s": rounds_s[config.mode],
        "hidden": hidden,
        "steps_to_hide": max(known) if len(known) == len(needed) else None,
        "num_blocks_to_hide": None
        if hidden
        else advice.blocks_to_hide(finer, min(compute_s), link, config.codec, chunk_bytes, in_flight),
        "codec_to_hide": None if hidden else advice.codec_to_hide(numels, behind, costs, steps, link, chunk_bytes),
    }


def _table(result: dict[str, Any]) -> Table:
    """Narrow enough for 80 columns."""
    hides = "hidden" in result
    caption = "seconds of compute (C), of each way, and of the exchange (M)"
    table = Table(
        box=box.SIMPLE,
        padding=(0, 0),
        caption=caption + ("; exposed: longer than the C behind it; K: from which on it hides" if hides else ""),
    )
    table.add_column("block")
    for name in ("MB up", "MB down", "C", "up", "down", "M", *(("exposed", "K") if hides else ())):
        table.add_column(name, justify="right", no_wrap=True)
    for block in result["blocks"]:
        cells = [
            f"{block['index']} {block['name']}",
            f"{block['bytes_up'] / 1e6:.2f}",
            f"{block['bytes_down'] / 1e6:.2f}",
            ("" if block["measured"] else "≈ ") + f"{block['compute_s']:.3f}",
            *(f"{block[key]:.3f}" for key in ("upload_s", "download_s", "exchange_s")),
        ]
        if hides:
            needed, waits = block["steps_to_hide"], block["exposed_s"]
            cells.append("hidden" if waits < _HIDDEN_S else f"{waits:.3f}")
            cells.append("none" if needed is None else str(needed))
        table.add_row(*cells)
    return table


def _start(start_s: float) -> str:
    return f", after a pause {start_s * 1e3:.0f} ms more" if start_s else ""


def _conclusions(result: dict[str, Any]) -> list[str]:
    link = result["link"]
    hides = "hidden" in result
    told = f"{result['mode']} {result['round_s']:.3f} s"
    if hides:
        told = f"fedbcd {result['fedbcd_round_s']:.3f} s, parablock {result['parablock_round_s']:.3f} s"
    lines = [
        f"link      {format_rate(link['up_bytes_s'])} up, {format_rate(link['down_bytes_s'])} down, round trip "
        f"{link['rtt_s'] * 1e3:.1f} ms{_start(link['start_s'])} "
        f"({'measured, payload' if link['measured'] else 'given'})",
        f"round     {told}, with K = {result['steps']} on {result['device']} with "
        f"{counted(result['threads'], 'thread')}",
    ]
    if not hides:
        share = result["exchange_s"] / result["round_s"]
        lines.append(f"hidden    nothing: {result['mode']} waits for every exchange, {share:.0%} of a round")
    elif result["hidden"]:
        lines.append(
            f"hidden    all of it; the smallest K that still hides every exchange is {result['steps_to_hide']}"
        )
    else:
        ways = [
            f"solver.steps = {result['steps_to_hide']}" if result["steps_to_hide"] is not None else "",
            f"blocks.num_blocks = {result['num_blocks_to_hide']}" if result["num_blocks_to_hide"] is not None else "",
            f"codec.up and codec.down = {result['codec_to_hide']}" if result["codec_to_hide"] is not None else "",
        ]
        told = ", or ".join(way for way in ways if way) or "no K, number of blocks or codec; take a faster link"
        lines.append(f"to hide   every exchange: {told}")
    if result["clients"] > 1:
        # In steady state each round brings up the block of every client that was drawn, and the new one down to all.
        clients, sampled = result["clients"], result["sampled"]
        up, down = (statistics.fmean(block[key] for block in result["blocks"]) for key in ("bytes_up", "bytes_down"))
        drawn = f", {sampled} of them drawn for a round," if sampled < clients else ""
        lines.append(
            f"broker    for {clients} clients{drawn} its own link carries "
            f"{format_rate(up * sampled / result['round_s'])} in and "
            f"{format_rate(down * clients / result['round_s'])} out"
        )
    return lines


class _Live:
    """What is being measured: a bar on a terminal, a line each elsewhere. On stderr."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._progress = Progress(console=self._console, transient=True, disable=not self._console.is_terminal)
        self._bar = self._progress.add_task("measuring", total=None)

    def __enter__(self) -> _Live:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def tell(self, what: str, done: int = 0, total: int | None = None) -> None:
        if self._console.is_terminal:
            self._progress.update(self._bar, description=f"measuring {what}", completed=done, total=total)
        else:
            print(f"measuring {what}", file=sys.stderr, flush=True)


def _complain(error: Exception, code: int) -> int:
    print(f"parablock plan: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
