"""One way to fine-tune, timed and weighed in a process of its own.

    python -m bench.fine_tuning METHOD CONFIG.toml --shape 12-layers --report FILE.json

    blocks         parablock's block solver: rounds of K steps, one block after the other
    bare           the least that makes the same steps: a loop of AdamW over the block's parameters as they are stored
    adamw          AdamW on every parameter as it is stored, its state in the same dtype
    adamw-masters  AdamW on float32 masters of every parameter, for a model that is stored in less
    lora           AdamW on the adapters of the mode of that name: rank 8 at every linear layer of the decoder
    badam          BAdam's BlockOptimizer, used as its authors say

All have the same model, batches, loss, clipping, K, learning rate and checkpointing, and torch's fused AdamW. A sweep
is K steps for each block, or as many without blocks. All of it is timed, also what it costs to begin and to end a
block. On CUDA a block's values go to the host and come from there, as a worker's do.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util
import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from bench.gauges import gauge_of
from bench.shapes import SHAPES
from parablock import builtin, models, trainable
from parablock import config as settings
from parablock.allocator import keep_freed_memory
from parablock.loss import answer_loss
from parablock.solver import BlockSolver, checkpointing
from parablock.staging import Staging
from workers.batches import step_batches
from workers.setup import Setup

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from bench.gauges import Gauge
    from bench.shapes import Shape
    from parablock.batch import Batch
    from parablock.staging import Incoming, Outgoing

NEEDS = {"lora": "peft", "badam": "badam"}
"""What a method needs that the project does not: the package, by method."""


class Method(Protocol):
    """A way to fine-tune the model of a `Setup`."""

    def round(self, block: int, batches: Sequence[Batch]) -> None:
        """A step on each batch. block: of methods that train one at a time."""


class Blocks:
    """As a worker has it, but that nobody else contributes: where the device is not the host, the delta and what it is
    from go out, and the block of the round before comes in during the first step, as it was then, and lands."""

    def __init__(self, setup: Setup) -> None:
        self._settings = setup.config.solver
        self._slots = [len(block.slots) for block in setup.manifest.blocks]
        self._staging = setup.staging
        self._solver = BlockSolver(setup.model, setup.manifest, self._settings, setup.device, setup.staging)
        self._away: tuple[int, Outgoing, Outgoing] | None = None  # the last round's block, start and delta
        self._coming: Incoming | None = None

    def round(self, block: int, batches: Sequence[Batch]) -> None:
        steps = [(batch,) for batch in batches]
        trained = self._solver.train(block, steps, self._settings.lr, self._arrive)
        away = block, self._staging.out(trained.start), self._staging.out(trained.delta)
        self._solver.write_guess(block, trained, [1.0] * self._slots[block])
        if not self._staging.copies:
            return  # and nothing is kept: on the host it costs no copy
        if self._away is not None and self._coming is not None:
            self._solver.write(self._away[0], self._coming.ready())
        self._away, self._coming = away, None

    def _arrive(self, step: int) -> None:
        if self._away is not None and step == 0:
            self._coming = self._staging.bring(self._away[1].wait())


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


class MasterAdamW:
    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._parameters = [each for each in setup.model.eval().parameters() if each.requires_grad]
        assert all(each.dtype != torch.float32 for each in self._parameters), "float32 needs no masters"
        self._masters = [each.detach().float() for each in self._parameters]
        self._optimizer = _adamw(setup, self._masters)

    def round(self, _block: int, batches: Sequence[Batch]) -> None:
        for batch in batches:
            _loss(self._setup, batch).backward()  # type: ignore[no-untyped-call]
            for parameter, master in zip(self._parameters, self._masters, strict=True):
                master.grad = None if parameter.grad is None else parameter.grad.float()
                parameter.grad = None
            _clip(self._setup, self._masters)
            self._optimizer.step()
            self._optimizer.zero_grad()
            for parameter, master in zip(self._parameters, self._masters, strict=True):
                parameter.data.copy_(master)


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


METHODS: dict[str, type[Method]] = {
    "blocks": Blocks,
    "bare": Bare,
    "adamw": AdamW,
    "adamw-masters": MasterAdamW,
    "lora": Lora,
    "badam": BAdam,
}


def missing(names: Iterable[str]) -> list[str]:
    """The packages that these methods need and that are not installed."""
    return [NEEDS[name] for name in names if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None]


def chosen(count: int, sample: bool) -> dict[int, int]:
    """The blocks of a sweep, and how many blocks of the model each stands for.

    All of `count`, or, as a sample, the first, the middle and the last one: the ends may hold embeddings and head, and
    between them a step's time goes down evenly, since the backward pass ends at the block. The one before the middle
    stands for none: it is there so that what is still on its way beside the middle one is of a block of its kind.
    """
    if not sample or count <= 4:
        return dict.fromkeys(range(count), 1)
    middle = (count - 1) // 2
    return {0: 1, middle - 1: 0, middle: count - 2, count - 1: 1}


def sweep(setup: Setup, method: Method, number: int, blocks: Sequence[int], gauge: Gauge) -> Sequence[float]:
    """Seconds of the round of each of `blocks`. number: of the sweep, from 0, which decides its rows."""
    solver = setup.config.solver
    rounds = []
    for place, block in enumerate(blocks):
        first = (number * len(blocks) + place) * solver.steps
        batches = step_batches(setup.rows, setup.config.seed, setup.name, first, solver.steps, solver)
        rounds.append((block, [batch for (batch,) in batches]))
    gauge.begin()
    for block, batches_of_round in rounds:
        method.round(block, batches_of_round)
        gauge.lap()
        print(f"sweep {number}, block {block}", flush=True)  # whoever started this sees that it gets on
    return gauge.laps()


def step_s(laps: Sequence[float], blocks: Mapping[int, int], steps: int) -> float:
    """Seconds a step, mean over all blocks. laps: of a sweep. blocks: see `chosen`. steps: of a round."""
    weighed = sum(lap * stands for lap, stands in zip(laps, blocks.values(), strict=True))
    return weighed / (steps * sum(blocks.values()))


def _adamw(setup: Setup, parameters: list[torch.Tensor]) -> torch.optim.AdamW:
    solver = setup.config.solver
    return torch.optim.AdamW(parameters, lr=solver.lr, weight_decay=solver.weight_decay, fused=True)


def _backward(setup: Setup, batch: Batch, parameters: list[torch.Tensor]) -> None:
    _loss(setup, batch).backward()  # type: ignore[no-untyped-call]
    _clip(setup, parameters)


def _loss(setup: Setup, batch: Batch) -> torch.Tensor:
    """Mean over the batch's tokens."""
    rerun = checkpointing(setup.model) if setup.config.solver.gradient_checkpointing else contextlib.nullcontext()
    with rerun:
        loss, tokens = answer_loss(setup.model, batch)
    return loss / tokens


def _clip(setup: Setup, parameters: list[torch.Tensor]) -> None:
    torch.nn.utils.clip_grad_norm_(parameters, setup.config.solver.clip)


def setup_of(config: settings.Config, shape: Shape, device: torch.device) -> Setup:
    """What a worker has before it joins, of a random model and random rows. config: data.max_tokens are a row's."""
    model = shape.model(device, getattr(torch, config.dtype), config.seed)
    return Setup(
        name="worker-0",
        config=config,
        model=model,
        tokenizer=builtin.tokenizer(),
        manifest=trainable.prepare(model, config),
        base="",
        tokenizer_digest="",
        rows=shape.rows(config.data.max_tokens, config.seed),
        held_out=None,
        device=device,
        staging=Staging.of(device),
    )


def measure(name: str, config: settings.Config, shape: Shape, device: torch.device, sample: bool) -> dict[str, Any]:
    """Of one method, after a sweep that nobody looks at: the first steps of a process are slower than all others. Where
    blocks go to pinned memory there are two: a block that is trained again needs more of it, and to pin takes long.

    step_s: of each of `config.rounds` sweeps. Where the device's memory is not enough, out_of_memory says for what, and
    there is nothing else.
    """
    gauge = gauge_of(device)
    try:
        setup = setup_of(config, shape, device)
        gauge.loaded()
        print("the model is there", flush=True)
        numels = [block.numel for block in setup.manifest.blocks]
        numel = sum(parameter.numel() for parameter in setup.model.parameters())
        blocks = chosen(len(numels), sample)
        method = METHODS[name](setup)
        before = 2 if setup.staging.copies else 1
        laps = [sweep(setup, method, number, list(blocks), gauge) for number in range(before + config.rounds)][before:]
    except torch.cuda.OutOfMemoryError as error:
        return {"out_of_memory": str(error).partition(" GPU ")[0]}
    return {
        "step_s": [step_s(each, blocks, config.solver.steps) for each in laps],
        "round_s": [list(each) for each in laps],
        **gauge.memory(),
        "numel": numel,
        "block_numels": numels,
        "blocks": list(blocks),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.fine_tuning", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("config", type=Path, help="TOML file of settings; rounds: sweeps that are timed")
    parser.add_argument("--shape", choices=SHAPES, required=True, help="of the model, whose weights are random")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--sample", action="store_true", help="the first, the middle and the last block only")
    parser.add_argument("--report", type=Path, required=True, metavar="FILE", help="where to write the measures, JSON")
    options = parser.parse_args(argv)
    keep_freed_memory()
    torch.set_num_threads(1)
    models.quiet()
    config = settings.load(options.config)
    # Now, as training does not need it; and all of them in each process, as what they share of torch counts where
    # it is first used: 1.5 MB of it was in the block solver's peak that BAdam's imports had taken beforehand.
    for package in set(NEEDS.values()).difference(missing(NEEDS)):
        importlib.import_module(package)
    device = torch.device(options.device)
    report = measure(options.method, config, SHAPES[options.shape], device, options.sample)
    options.report.write_text(json.dumps(report), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
