"""Every family, all the way: loaded, partitioned, trained by two clients for two rounds, exported, and loaded again.

The clients are real trainers without processes between them; what they say is folded here, as the broker folds.
"""

from __future__ import annotations

import json
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING

import pytest
import torch
from transformers import AutoModelForCausalLM

from parablock import builtin, config, export
from parablock.aggregation import server_move, weighted_mean
from parablock.block_file import Label
from parablock.blocks import read_block
from parablock.participant_events import Arrived
from parablock.run_folder import RunFolder
from tests import families
from workers.inbox import Delivery
from workers.setup import Local, Setup, prepare
from workers.trainer import Trainer

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

    from parablock.staging import Incoming

    Vector = npt.NDArray[np.float32]

ROUNDS = 2


def settings(base: Path) -> config.Config:
    return config.from_dict(
        {
            "model": str(base),
            "rounds": ROUNDS,
            "solver": {"steps": 2, "batch_size": 2, "lr": 1e-2},
            "blocks": {"num_blocks": ROUNDS},
            "data": {"max_tokens": 60},
        }
    )


def client(index: int, run: config.Config) -> tuple[Setup, Trainer, deque[Delivery]]:
    # A 64th of the built-in rows is plenty, and tokenizing them all would take longer than the training.
    local = Local(f"c{index}", "builtin", "", (index, 64), "", "cpu", 1, False)
    setup = prepare(json.dumps(config.to_dict(run, shared_only=True)), local)
    arrivals: deque[Delivery] = deque()
    return setup, Trainer(setup, 2, arrivals, lambda _round, _step: None), arrivals


def delivery(setup: Setup, arrived: Arrived, values: Vector) -> Delivery:
    brought: Future[Incoming] = Future()
    brought.set_result(setup.staging.bring(values.copy()))
    return Delivery(arrived, brought, change=False)


@pytest.mark.parametrize("family", families.CONFIGS)
def test_is_partitioned_trained_and_exported(family: str, tmp_path: Path) -> None:
    families.build(family, vocab_size=259).save_pretrained(tmp_path / "base")
    builtin.tokenizer().save_pretrained(tmp_path / "base")
    run = settings(tmp_path / "base")
    clients = [client(index, run) for index in range(2)]
    setup = clients[0][0]
    manifest = setup.manifest
    names = [slot.name for block in manifest.blocks for slot in block.slots]
    assert sorted(names) == sorted(dict(setup.model.named_parameters())), "each parameter in exactly one block"
    assert manifest.digest == clients[1][0].manifest.digest
    assert (setup.base, setup.tokenizer_digest) == (clients[1][0].base, clients[1][0].tokenizer_digest)

    values = [read_block(setup.model, block).numpy().copy() for block in manifest.blocks]
    base = [value.copy() for value in values]
    with RunFolder.create(tmp_path / "run", run) as folder:
        folder.write_manifest(manifest, setup.base)
        for round in range(ROUNDS):
            solved = [trainer.train(round, [round % len(manifest.blocks)], 2)[0] for _, trainer, _ in clients]
            block = solved[0].block
            deltas = [part.values.wait() for part in solved if part.values is not None]
            assert len(deltas) == 2
            move, _ = server_move(run.server, weighted_mean(deltas, [part.weight for part in solved]), {})
            values[block] = values[block] + move
            folder.blocks.save(Label(block, round + 1, manifest.digest), {"block": values[block]})
            for client_setup, trainer, arrivals in clients:
                arrived = Arrived(round, block, 0, -1, 2, True, 0.0, 1.0)
                arrivals.append(delivery(client_setup, arrived, values[block]))
                landed = trainer.land(round - 1, round + 1)  # one round late, as in the pipeline
                assert [land.arrived.round for land in landed] == ([round - 1] if round else [])
        for _, trainer, _ in clients:
            trainer.land(ROUNDS, ROUNDS)

    for block in manifest.blocks:
        for other, _, _ in clients:
            assert torch.equal(read_block(other.model, block), torch.from_numpy(values[block.index]))
        assert (values[block.index] != base[block.index]).any(), "every block was trained"
    assert export.main([str(folder.path)]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(folder.model_path)
    batch = families.batch(seed=3)
    with torch.inference_mode():
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        assert torch.equal(loaded.eval()(**inputs).logits, setup.model.eval()(**inputs).logits)
