"""One client equals serial block coordinate descent written in plain torch, bit for bit, whatever the link.

The reference applies x + Δ, as the broker does. The runs are real processes; the slow ones go through a user-space
link whose rate makes an exchange last longer than a round's training.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from torch.nn import functional

from bench.link import Link
from bench.shaping import Shape
from parablock import models
from parablock.blocks import partition
from parablock.schedule import Schedule
from parablock.sections import Pipeline
from parablock.trace import Span, read_trace
from tests.processes import Processes, blocks
from workers.batches import step_batches
from workers.rows import load_rows

if TYPE_CHECKING:
    from pathlib import Path

    from parablock.batch import Batch
    from parablock.config import Config
    from parablock.run_folder import RunFolder

pytestmark = pytest.mark.timeout(300)

ROUNDS = 6
SLOW = Shape(rate=1e6)  # bytes per second: a block of some 250 kB goes up and down in about half a second

CASES = {
    "fedbcd, fast": ({"mode": "fedbcd"}, Shape()),
    "fedbcd, slow": ({"mode": "fedbcd"}, SLOW),
    "own, fast": ({"pipeline.correction": "own"}, Shape()),
    "shrink, fast": ({"pipeline.correction": "shrink"}, Shape()),
    "shrink, slow": ({"pipeline.correction": "shrink"}, SLOW),
    "shrink, arrival, slow": ({"pipeline.correction": "shrink", "pipeline.land": "arrival"}, SLOW),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    """Each case once, as a broker and one worker with the link between them."""
    return {name: single(tmp_path_factory.mktemp("run"), *case) for name, case in CASES.items()}


def single(folder: Path, settings: dict[str, object], shape: Shape) -> RunFolder:
    common = {"rounds": ROUNDS, "round.clients": 1, "data.eval": "", "solver.steps": 8}
    common |= {"solver.weight_decay": 0.1, "solver.lr_schedule": "constant"}
    with Processes(folder, **{**common, **settings}) as processes:
        host, port = processes.endpoint().removeprefix("tcp://").split(":")
        with Link((host, int(port)), shape) as link:
            worker = processes.worker(0, "--shard", "0/1", endpoint=link.endpoint)
            assert worker.wait(timeout=200) == 0, processes.said(0)
            assert processes.broker.wait(timeout=30) == 0
    return processes.folder_of_run()


@pytest.fixture(scope="module")
def expected(runs: dict[str, RunFolder]) -> dict[int, bytes]:
    """The reference, once: it knows neither modes nor pipelines, and nothing else differs between the cases."""
    configs = [replace(run.config(), mode="fedbcd", pipeline=Pipeline()) for run in runs.values()]
    assert all(config == configs[0] for config in configs)
    return serial(configs[0])


@pytest.mark.parametrize("case", CASES)
def test_one_client_is_serial_block_descent(runs: dict[str, RunFolder], expected: dict[int, bytes], case: str) -> None:
    got = blocks(runs[case])
    assert got.keys() == expected.keys()
    assert {index: values == expected[index] for index, (_, values) in got.items()} == dict.fromkeys(got, True)


def serial(config: Config) -> dict[int, bytes]:
    """Block → its float32 bytes after plain AdamW steps on one block after the other."""
    loaded = models.load(config.model, dtype="float32", seed=config.seed)
    model = loaded.model.eval()
    rows = load_rows("builtin", config.data, tokenizer=loaded.tokenizer, seed=config.seed, held_out=False)
    manifest = partition(model, config.blocks)
    named = dict(model.named_parameters())
    schedule = Schedule.of(config, len(manifest.blocks))
    for round in range(config.rounds):
        parameters = [named[slot.name] for slot in manifest.blocks[schedule.block(round)].slots]
        model.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        start = [parameter.detach().clone() for parameter in parameters]
        decay = config.solver.weight_decay
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        betas = (config.solver.beta1, config.solver.beta2)
        optimizer = torch.optim.AdamW(groups, lr=config.solver.lr, betas=betas, eps=config.solver.eps, fused=True)
        steps = config.solver.steps
        for (batch,) in step_batches(rows, config.seed, "worker-0", round * steps, steps, config.solver):
            mean_loss(model, batch).backward()
            torch.nn.utils.clip_grad_norm_(parameters, config.solver.clip)
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            for parameter, before in zip(parameters, start, strict=True):
                parameter.copy_(before + (parameter - before))  # x + Δ, rounded as the broker rounds it
    return {
        block.index: torch.cat([named[slot.name].detach().flatten() for slot in block.slots]).numpy().tobytes()
        for block in manifest.blocks
    }


def mean_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Mean cross entropy of the answer's tokens, each predicted from what stands before it.

    The head is applied to the columns that some row needs, as the solver does: over all columns the matrix products
    would be of other shapes, and their last bits too.
    """
    targets = batch.labels[:, 1:]
    counted = targets != -100
    columns = counted.any(dim=0).nonzero().flatten()
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, logits_to_keep=columns).logits
    return functional.cross_entropy(logits[counted[:, columns]], targets[counted], reduction="sum") / counted.sum()


def of(folder: RunFolder, lane: str, kind: str) -> dict[int, Span]:
    """The client's spans of one lane by round; kind: how their names begin."""
    spans = read_trace(folder.trace_path)
    return {s.args["round"]: s for s in spans if s.process == 1 and s.lane == lane and s.name.startswith(kind)}


def shared(a: Span, b: Span) -> float:
    """Seconds in which both go on."""
    return max(min(a.end_s, b.end_s) - max(a.start_s, b.start_s), 0.0)


def test_the_trace_shows_communication_under_the_next_rounds_compute(runs: dict[str, RunFolder]) -> None:
    folder = runs["shrink, slow"]
    compute, up, down = of(folder, "compute", "round"), of(folder, "upload", "round"), of(folder, "download", "round")
    assert set(up) == set(down) == set(compute) == set(range(ROUNDS))
    under_up = under_down = 0.0
    for round in range(ROUNDS - 1):
        training = compute[round + 1]
        assert up[round].start_s < training.end_s
        assert training.start_s < down[round].end_s
        under_up += shared(up[round], training)
        under_down += sum(shared(down[round], later) for later in compute.values())
    assert under_up > 0
    assert under_down > 0


def test_the_synchronous_modes_trace_shows_none(runs: dict[str, RunFolder]) -> None:
    folder = runs["fedbcd, slow"]
    compute, up, down = of(folder, "compute", "round"), of(folder, "upload", "round"), of(folder, "download", "round")
    assert set(up) == set(down) == set(compute) == set(range(ROUNDS))
    for training in compute.values():
        # Not 0: where a heartbeat comes through faster than those before, what follows is placed a little earlier.
        length = training.end_s - training.start_s
        assert sum(shared(span, training) for span in [*up.values(), *down.values()]) < 0.1 * length
