"""What a mode trains: the same on every machine, no more than it says, and in an export part of the weights."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from bench.simulation import Outcome, Simulation
from parablock import builtin, export, models, trainable
from parablock.block_file import Label
from parablock.blocks import PartitionError, decoder_layers, partition
from parablock.config import Config, from_dict
from parablock.export import load_trained
from parablock.run_folder import RunFolder
from parablock.schedule import Schedule
from parablock.sections import Data
from tests import families
from tests.processes import blocks, finished
from workers.evaluation import evaluate
from workers.rows import load_rows

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

adapters = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="peft is an extra: pip install -e '.[lora]'"
)


def asked(mode: str, **tree: Any) -> Config:
    return from_dict({"mode": mode, **tree})


def prepared(mode: str, **tree: Any) -> tuple[PreTrainedModel, list[str]]:
    """The built-in model and the names of what the mode trains of it."""
    model = builtin.model(0)
    manifest = trainable.prepare(model, asked(mode, **tree))
    return model, [slot.name for block in manifest.blocks for slot in block.slots]


def test_blocks_are_cut_as_before() -> None:
    for mode in ("parablock", "fedbcd"):
        config = asked(mode, blocks={"num_blocks": 2})
        model = builtin.model(0)
        assert trainable.prepare(model, config) == partition(builtin.model(0), config.blocks)


@pytest.mark.parametrize("treatment", ["join", "own"])
def test_fedavg_has_every_parameter_in_one_block(treatment: str) -> None:
    config = asked("fedavg", blocks={"num_blocks": 3, "embeddings": treatment, "head": treatment})
    manifest = trainable.prepare(builtin.model(0), config)
    assert len(manifest.blocks) == 1
    assert {slot.name for slot in manifest.blocks[0].slots} == dict(builtin.model(0).named_parameters()).keys()
    assert config.in_flight == 0


def test_fedavg_leaves_out_what_is_frozen() -> None:
    model, names = prepared("fedavg", blocks={"embeddings": "freeze"})
    assert len(names) == len(list(model.parameters())) - 1


@pytest.mark.parametrize("family", families.CONFIGS)
def test_lisa_has_what_is_in_no_layer_in_its_first_block(family: str) -> None:
    model = families.build(family)
    ends, *layers = trainable.prepare(model, asked("lisa", blocks={"num_blocks": 2})).blocks
    inside = {id(value) for value in decoder_layers(model).parameters()}
    assert len(layers) == 2
    assert all(id(model.get_parameter(slot.name)) in inside for block in layers for slot in block.slots)
    assert not any(id(model.get_parameter(slot.name)) in inside for slot in ends.slots)
    assert ends.name.startswith("embeddings + final norm")
    names = [slot.name for block in (ends, *layers) for slot in block.slots]
    assert sorted(names) == sorted(dict(model.named_parameters())), "each parameter in exactly one block"


def test_lisa_leaves_out_what_is_frozen_but_not_all() -> None:
    blocks = {"embeddings": "freeze", "final_norm": "freeze"}
    manifest = trainable.prepare(builtin.model(0), asked("lisa", blocks=blocks))
    assert manifest.blocks[0].name == "head"
    with pytest.raises(PartitionError, match=r"mode = lisa trains embeddings, final norm and head together with"):
        trainable.prepare(builtin.model(0), asked("lisa", blocks={**blocks, "head": "freeze"}))


@adapters
def test_lora_trains_adapters_and_ffa_lora_half_of_them() -> None:
    model, both = prepared("lora")
    _, second = prepared("ffa-lora")
    assert {name.split(".")[-3] for name in both} == {"lora_A", "lora_B"}
    assert second == [name for name in both if ".lora_B." in name]
    layers = len(model.model.layers)
    assert len(both) == 2 * 7 * layers  # four linear layers of attention, three of the MLP


@adapters
def test_adapters_begin_alike_everywhere_and_change_nothing() -> None:
    batch = families.batch(seed=3)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    first, names = prepared("lora")
    again, _ = prepared("lora")
    other, _ = prepared("lora", seed=1)
    with torch.no_grad():
        assert torch.equal(first(**inputs).logits, builtin.model(0)(**inputs).logits)
    assert models.weights_digest(first) == models.weights_digest(again)
    a = next(name for name in names if ".lora_A." in name)
    assert not torch.equal(first.get_parameter(a), other.get_parameter(a))
    bound = first.get_parameter(a).shape[1] ** -0.5
    assert 0.9 * bound < float(first.get_parameter(a).detach().abs().max()) <= bound


@adapters
def test_adapters_are_float32_beside_a_model_of_less() -> None:
    model = builtin.model(0).to(torch.bfloat16)
    manifest = trainable.prepare(model, asked("lora"))
    assert {slot.dtype for block in manifest.blocks for slot in block.slots} == {"float32"}
    batch = families.batch(seed=3)
    assert model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.dtype == torch.bfloat16


@adapters
def test_targets_and_rank_are_the_users() -> None:
    model, names = prepared("lora", lora={"targets": "q_proj, v_proj", "rank": 3})
    assert {name.split(".")[-4] for name in names} == {"q_proj", "v_proj"}
    assert {min(model.get_parameter(name).shape) for name in names} == {3}


@adapters
@pytest.mark.parametrize("targets", ["q_project", "q_proj,v_prj", "embed_tokens", "proj", "q_proj,all-linear", ""])
def test_each_target_must_be_a_linear_layer(targets: str) -> None:
    missing = repr(targets.rpartition(",")[2])
    with pytest.raises(PartitionError, match=rf"has {missing}, with which the name of no .* there are q_proj, k_proj"):
        prepared("lora", lora={"targets": targets})


@adapters
def test_a_head_that_is_the_embeddings_too_gets_no_adapter() -> None:
    tied, apart = families.build("llama-tied", torch.float32), families.build("llama", torch.float32)
    config = asked("lora", lora={"targets": "q_proj,lm_head"})
    with pytest.raises(PartitionError, match=r"the weights of lm_head are the embeddings' too"):
        trainable.prepare(tied, config)
    assert any("lm_head" in slot.name for slot in trainable.prepare(apart, config).blocks[0].slots)


@adapters
def test_adapters_are_trained_where_their_parts_are_frozen() -> None:
    config = asked("lora", lora={"targets": "q_proj,lm_head"}, blocks={"head": "freeze", "num_blocks": 2})
    (block,) = trainable.prepare(families.build("llama", torch.float32), config).blocks
    assert any("lm_head" in slot.name for slot in block.slots)


def test_without_peft_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(PartitionError, match=r"need peft, .* '\.\[lora\]'"):
        prepared("lora")


@adapters
@pytest.mark.parametrize("family", families.CONFIGS)
def test_merged_weights_compute_what_the_adapters_did(family: str) -> None:
    model = families.build(family, torch.float32).eval()
    names = {name for name, _ in model.named_parameters()}
    batch = families.batch(seed=3)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        base = model(**inputs).logits
        (block,) = trainable.prepare(model, asked("lora")).blocks
        generator = torch.Generator().manual_seed(0)
        for slot in block.slots:
            model.get_parameter(slot.name).copy_(0.1 * torch.randn(slot.shape, generator=generator))
        before = model(**inputs).logits
        trainable.merge(model)
        torch.testing.assert_close(model(**inputs).logits, before, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, base, rtol=0, atol=1e-2)
    assert {name for name, _ in model.named_parameters()} == names


@adapters
def test_an_export_has_the_adapters_merged(tmp_path: Path) -> None:
    config = asked("lora")
    folder = RunFolder.create(tmp_path / "run", config)
    base = builtin.model(0)
    manifest = trainable.prepare(base, config)
    folder.write_manifest(manifest, models.weights_digest(base))
    values = np.random.default_rng(0).normal(0, 0.1, manifest.blocks[0].numel).astype(np.float32)
    folder.blocks.save(Label(0, 1, manifest.digest), {"block": values})
    assert export.main([str(folder.path)]) == 0
    loaded = models.load(str(folder.model_path), dtype="float32")
    kept = load_trained(folder)
    for name, parameter in builtin.model(0).named_parameters():
        assert torch.equal(loaded.model.get_parameter(name), kept.model.get_parameter(name))
        linear = parameter.ndim == 2 and ".layers." in name
        assert torch.equal(loaded.model.get_parameter(name), parameter) != linear


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "mode", ["fedavg", pytest.param("lora", marks=adapters), pytest.param("ffa-lora", marks=adapters)]
)
def test_a_run_of_each_mode_trains(mode: str, tmp_path: Path) -> None:
    folder = finished(tmp_path, mode=mode, **{"solver.lr": 0.003})
    rows = folder.read_metrics()
    losses = [row["eval_loss"] for row in rows if row["kind"] == "evaluation"]
    assert losses[-1] < losses[0]
    assert {row["block"] for row in rows if row["kind"] == "round"} == {0}
    assert len(blocks(folder)) == 1


def simulation_of(folder: RunFolder) -> tuple[Outcome, list[bytes]]:
    """How the same run ends in one process, and each block then."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max((os.cpu_count() or 1) // 2, 1))  # as the run's workers
    try:
        simulation = Simulation(folder.config())
        return simulation.run(), [values.tobytes() for values in simulation.blocks]
    finally:
        torch.set_num_threads(threads)


@pytest.mark.timeout(300)
def test_a_run_of_lisa_trains_what_it_stores(tmp_path: Path) -> None:
    """The clients' own loss at the end is the stored model's: all hold the same, block by block, as in a simulation."""
    folder = finished(tmp_path, mode="lisa", rounds=8, **{"solver.lr": 0.003, "eval.every": 4, "eval.generate": 0})
    rows = folder.read_metrics()
    rounds = [row for row in rows if row["kind"] == "round"]
    schedule = Schedule.of(folder.config(), len(folder.manifest().blocks))
    assert schedule is not None
    assert [row["block"] for row in rounds] == [schedule.block(round) for round in range(8)]
    assert all(row["contributors"] == ["worker-0", "worker-1"] and row["steps"] == 2 for row in rounds)
    assert [row["staleness"] for row in rounds] == [0.0] * 8
    assert all(row["exposed_s"] > 0 for row in rounds), "both exchanges are waited for"
    pairs = list(zip(rounds[::2], rounds[1::2], strict=True))
    assert all(0 < second["compute_s"] < first["compute_s"] for first, second in pairs), "the steps are told once"
    assert all(first["loss"] == second["loss"] for first, second in pairs)
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    assert [row["round"] for row in evaluations] == [-1, 3, 7]
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]
    newest = dict.fromkeys(blocks(folder), 0) | {row["block"]: row["round"] + 1 for row in rounds}
    assert {index: version for index, (version, _) in blocks(folder).items()} == newest
    outcome, simulated = simulation_of(folder)
    assert {index: simulated[index] for index in newest} == {
        index: content for index, (_, content) in blocks(folder).items()
    }
    assert outcome.loss == evaluations[-1]["eval_loss"]
    loaded = load_trained(folder)
    held_out = load_rows("builtin", Data(), tokenizer=loaded.tokenizer, seed=0, held_out=True, limit=16)
    settings = folder.config().eval
    (stored,) = evaluate(loaded.model, loaded.tokenizer, held_out, settings, torch.device("cpu")).values()
    assert stored.loss == pytest.approx(evaluations[-1]["eval_loss"], abs=1e-4)
