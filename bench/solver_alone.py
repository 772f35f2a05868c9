"""A worker's solver without a wire: `python -m bench.solver_alone CONFIG.toml`, in place of the run's first worker.

The same process (imports, allocator, event loop, torch thread), the same model and rows, the same schedule of rounds
and K steps in each; a block's own update is applied at once. No broker, no socket, no transfer, and nothing that
stands for a block on its way: what a worker needs beyond this is the exchange's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from parablock import config as settings
from parablock import models
from parablock.allocator import keep_freed_memory
from parablock.learning_rate import learning_rate
from parablock.schedule import Schedule
from parablock.solver import BlockSolver
from workers.__main__ import loop_factory
from workers.batches import step_batches
from workers.executor import TorchExecutor
from workers.setup import Local, prepare

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workers.setup import Setup


def descend(setup: Setup) -> None:
    """All rounds of the run. Runs on the torch executor, as `workers.trainer` does."""
    config = setup.config
    schedule = Schedule.of(config, len(setup.manifest.blocks))
    assert schedule is not None, "what is important shows in the broker's means only"
    solver = BlockSolver(setup.model, setup.manifest, config.solver, setup.device, setup.staging)
    steps = config.solver.steps
    for round in range(config.rounds):
        batches = step_batches(setup.rows, config.seed, setup.name, round * steps, steps, config.solver)
        block = schedule.block(round)
        own = [1.0] * len(setup.manifest.blocks[block].slots)
        trained = solver.train(block, batches, learning_rate(config.solver, round, config.rounds))
        solver.write_guess(block, trained, own)
        del trained  # the next round finds nothing but the model


async def _run(config: settings.Config, local: Local) -> None:
    executor = TorchExecutor(local.threads)
    try:
        await executor(lambda: descend(prepare(json.dumps(settings.to_dict(config)), local)))
    finally:
        executor.close()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.solver_alone", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("config", type=Path, help="TOML file of the run's settings")
    options = parser.parse_args(argv)
    keep_freed_memory()
    logging.basicConfig(level=logging.WARNING)
    models.quiet()
    config = settings.load(options.config)
    local = Local(
        name="worker-0",
        train=config.data.train,
        held_out="",
        shard=(0, config.round.clients),
        model="",
        device="auto",
        threads=1,
        trust_remote_code=False,
    )
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(_run(config, local))
    return 0


if __name__ == "__main__":
    sys.exit(main())
