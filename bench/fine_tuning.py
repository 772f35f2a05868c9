"""One way to fine-tune, timed and weighed in a process of its own: `python -m bench.fine_tuning METHOD CONFIG.toml`.

    blocks   parablock's block solver: rounds of K steps, one block after the other
    bare     the least that makes the same steps: a loop of AdamW over the block's parameters as they are stored
    adamw    AdamW on every parameter
    lora     AdamW on the adapters of the mode of that name: rank 8 at every linear layer of the decoder
    badam    BAdam's BlockOptimizer, used as its authors say

All have the same model, batches, loss, clipping, K and learning rate, and torch's fused AdamW. A sweep is K steps for
each block, or as many without blocks. All of it is timed, also what it costs to begin and to end a block.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util
import json
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from bench import usage
from parablock import config as settings
from parablock import models, trainable
from parablock.allocator import keep_freed_memory
from parablock.loss import answer_loss
from parablock.solver import BlockSolver
from workers.batches import step_batches
from workers.setup import Local, prepare

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import nn

    from parablock.batch import Batch
    from workers.setup import Setup

NEEDS = {"lora": "peft", "badam": "badam"}
"""What a method needs that the project does not: the package, by method."""


class Method(Protocol):
    """A way to fine-tune the model of a `Setup`."""

    def round(self, block: int, batches: Sequence[Batch]) -> None:
        """A step on each batch. block: of methods that train one at a time."""


class Blocks:
    def __init__(self, setup: Setup) -> None:
        self._settings = setup.config.solver
        self._slots = [len(block.slots) for block in setup.manifest.blocks]
        self._solver = BlockSolver(setup.model, setup.manifest, self._settings, setup.device, setup.staging)

    def round(self, block: int, batches: Sequence[Batch]) -> None:
        trained = self._solver.train(block, [(batch,) for batch in batches], self._settings.lr)
        self._solver.write_guess(block, trained, [1.0] * self._slots[block])


class Bare:
    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        setup.model.eval().requires_grad_(False)

    def round(self, block: int, batches: Sequence[Batch]) -> None:
        model = self._setup.model
        parameters = [model.get_parameter(slot.name) for slot in self._setup.manifest.blocks[block].slots]
        for parameter in parameters:
            parameter.requires_grad_()
        optimizer = _adamw(self._setup, parameters)
        for batch in batches:
            _backward(self._setup, batch, parameters)
            optimizer.step()
            optimizer.zero_grad()
        for parameter in parameters:
            parameter.requires_grad_(False)


class AdamW:
    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._parameters = [each for each in setup.model.eval().parameters() if each.requires_grad]
        self._optimizer = _adamw(setup, self._parameters)

    def round(self, _block: int, batches: Sequence[Batch]) -> None:
        for batch in batches:
            _backward(self._setup, batch, self._parameters)
            self._optimizer.step()
            self._optimizer.zero_grad()


class Lora(AdamW):
    def __init__(self, setup: Setup) -> None:
        trainable.prepare(setup.model, dataclasses.replace(setup.config, mode="lora"))
        super().__init__(setup)


class BAdam:
    def __init__(self, setup: Setup) -> None:
        import badam

        self._setup = setup
        named = list(setup.model.eval().named_parameters())
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="BAdam expect model")  # a float32 model is what is asked for
            self._optimizer = badam.BlockOptimizer(
                base_optimizer=_adamw(setup, [parameter for _, parameter in named]),
                named_parameters_list=named,
                switch_block_every=setup.config.solver.steps,
                switch_mode="ascending",
                verbose=0,
            )

    def round(self, _block: int, batches: Sequence[Batch]) -> None:
        """Which block it is, the optimizer says: it goes on to the next one after K steps."""
        with contextlib.redirect_stdout(sys.stderr):
            for batch in batches:
                active = [each for each in self._setup.model.parameters() if each.requires_grad]
                _backward(self._setup, batch, active)
                self._optimizer.step()
                self._optimizer.zero_grad()


METHODS: dict[str, type[Method]] = {"blocks": Blocks, "bare": Bare, "adamw": AdamW, "lora": Lora, "badam": BAdam}


def missing(names: Iterable[str]) -> list[str]:
    """The packages that these methods need and that are not installed."""
    return [NEEDS[name] for name in names if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None]


def sweep(setup: Setup, method: Method, number: int) -> float:
    """Seconds of sweep `number`, from 0, which decides its rows."""
    solver = setup.config.solver
    rounds = []
    for block in range(len(setup.manifest.blocks)):
        first = (number * len(setup.manifest.blocks) + block) * solver.steps
        batches = step_batches(setup.rows, setup.config.seed, setup.name, first, solver.steps, solver)
        rounds.append([batch for (batch,) in batches])
    began = time.perf_counter()
    for block, batches_of_round in enumerate(rounds):
        method.round(block, batches_of_round)
        print(f"sweep {number}, block {block}", flush=True)  # whoever started this sees that it gets on
    return time.perf_counter() - began


def _adamw(setup: Setup, parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    solver = setup.config.solver
    return torch.optim.AdamW(parameters, lr=solver.lr, weight_decay=solver.weight_decay, fused=True)


def _backward(setup: Setup, batch: Batch, parameters: list[nn.Parameter]) -> None:
    loss, tokens = answer_loss(setup.model, batch)
    (loss / tokens).backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(parameters, setup.config.solver.clip)


def setup_of(config: settings.Config) -> Setup:
    local = Local(
        name="worker-0",
        train=config.data.train,
        held_out="",
        shard=(0, 1),
        model="",
        device="cpu",
        threads=1,
        trust_remote_code=False,
    )
    return prepare(json.dumps(settings.to_dict(config)), local)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.fine_tuning", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("config", type=Path, help="TOML file of settings: model, data, blocks, solver")
    parser.add_argument("--report", type=Path, required=True, metavar="FILE", help="where to write the measures, JSON")
    options = parser.parse_args(argv)
    keep_freed_memory()
    torch.set_num_threads(1)
    models.quiet()
    config = settings.load(options.config)
    if options.method in NEEDS:
        importlib.import_module(NEEDS[options.method])  # now: it is not what the method needs for training
    before = usage.Memory()
    setup = setup_of(config)
    training = usage.Memory()  # what loading needed beyond the model is not the method's
    method = METHODS[options.method](setup)
    sweep(setup, method, 0)  # the first steps of a process are slower than all others
    report = {"sweep_s": sweep(setup, method, 1), "peak_bytes": training.base + training.peak() - before.base}
    options.report.write_text(json.dumps(report), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
