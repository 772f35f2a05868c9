"""The partition: every family, every option, each parameter exactly once; and blocks read and written."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from parablock import sections
from parablock.blocks import (
    PartitionError,
    decoder_layers,
    partition,
    read_block,
    split_by_size,
    split_evenly,
    write_block,
)
from tests import families

ENDS = {
    # input side; output side, by the one who reads the model's forward
    "llama": ({"model.embed_tokens.weight"}, {"model.norm.weight"}, {"lm_head.weight"}),
    "llama-tied": ({"model.embed_tokens.weight"}, {"model.norm.weight"}, set()),
    "gpt2": (
        {"transformer.wte.weight", "transformer.wpe.weight"},
        {"transformer.ln_f.weight", "transformer.ln_f.bias"},
        set(),
    ),
    "gpt-neox": (
        {"gpt_neox.embed_in.weight"},
        {"gpt_neox.final_layer_norm.weight", "gpt_neox.final_layer_norm.bias"},
        {"lm_head.weight"},
    ),
    "phi": (
        {"model.embed_tokens.weight"},
        {"model.final_layernorm.weight", "model.final_layernorm.bias"},
        {"lm_head.weight", "lm_head.bias"},
    ),
    "opt": (
        {
            "model.decoder.embed_tokens.weight",
            "model.decoder.embed_positions.weight",
            "model.decoder.project_in.weight",
        },
        {
            "model.decoder.final_layer_norm.weight",
            "model.decoder.final_layer_norm.bias",
            "model.decoder.project_out.weight",
        },
        set(),
    ),
}
OWN = sections.Blocks(embeddings="own", final_norm="own", head="own")


def names(block: Any) -> set[str]:
    return {slot.name for slot in block.slots}


@pytest.mark.parametrize("family", families.CONFIGS)
@pytest.mark.parametrize(
    "asked",
    [sections.Blocks(), sections.Blocks(num_blocks=3), OWN, sections.Blocks(embeddings="freeze", head="freeze")],
    ids=["join", "three", "own", "freeze"],
)
def test_every_parameter_is_in_exactly_one_place(family: str, asked: sections.Blocks) -> None:
    model = families.build(family)
    manifest = partition(model, asked)
    placed = [slot.name for block in manifest.blocks for slot in block.slots] + list(manifest.frozen)
    parameters = dict(model.named_parameters())  # a tied parameter once
    assert sorted(placed) == sorted(parameters)
    assert [block.index for block in manifest.blocks] == list(range(len(manifest.blocks)))
    order = list(parameters)
    for block in manifest.blocks:
        assert [order.index(slot.name) for slot in block.slots] == sorted(
            order.index(slot.name) for slot in block.slots
        )
        offset = 0
        for slot in block.slots:
            assert slot.offset == offset
            assert slot.shape == tuple(parameters[slot.name].shape)
            assert slot.dtype == "float32"
            offset += slot.numel
        assert offset == block.numel
    if asked.embeddings != "freeze":
        assert manifest.frozen == ()
    assert manifest.digest == partition(families.build(family), asked).digest


@pytest.mark.parametrize("family", families.CONFIGS)
def test_layers_are_in_their_blocks_and_ends_at_the_ends(family: str) -> None:
    model = families.build(family)
    manifest = partition(model, sections.Blocks(num_blocks=3))
    stack = decoder_layers(model)
    assert len(stack) == families.LAYERS
    layer_of = {id(p): index for index, layer in enumerate(stack) for p in layer.parameters()}
    for block, layers in zip(manifest.blocks, [{0, 1}, {2}, {3}], strict=True):
        found = {layer_of.get(id(model.get_parameter(name))) for name in names(block)} - {None}
        assert found == layers
    assert [block.name.replace(" + head", "") for block in manifest.blocks] == [
        "embeddings + layers 0-1",
        "layer 2",
        "layer 3 + final norm",
    ]


@pytest.mark.parametrize("family", ENDS)
def test_what_is_not_a_layer_goes_where_the_forward_uses_it(family: str) -> None:
    manifest = partition(families.build(family), OWN)
    embeddings, norm, head = ENDS[family]
    alone = {block.name: names(block) for block in manifest.blocks if "layer" not in block.name}
    assert alone == {"embeddings": embeddings, "final norm": norm} | ({"head": head} if head else {})
    assert [block.name for block in manifest.blocks] == [
        "embeddings",
        *[f"layer {index}" for index in range(families.LAYERS)],
        "final norm",
        *(["head"] if head else []),
    ]


def test_frozen_parts_are_in_no_block_and_are_named() -> None:
    asked = sections.Blocks(embeddings="freeze", final_norm="freeze", head="freeze")
    manifest = partition(families.build("phi"), asked)
    assert set(manifest.frozen) == set().union(*ENDS["phi"])
    assert [block.name for block in manifest.blocks] == [f"layer {i}" for i in range(families.LAYERS)]


def test_a_tied_head_is_trained_with_the_embeddings_or_not_at_all() -> None:
    model = families.build("llama-tied")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert "model.embed_tokens.weight" in names(partition(model, sections.Blocks(head="freeze")).blocks[0])
    assert partition(model, sections.Blocks(embeddings="freeze")).frozen == ("model.embed_tokens.weight",)


def test_what_the_user_froze_stays_frozen() -> None:
    model = families.build("llama")
    decoder_layers(model)[1].requires_grad_(False)
    manifest = partition(model, sections.Blocks())
    assert [block.name for block in manifest.blocks] == [
        "embeddings + layer 0",
        "layer 2",
        "layer 3 + final norm + head",
    ]
    assert all(name.startswith("model.layers.1.") for name in manifest.frozen)


def test_eleven_layers_are_not_confused_by_their_names() -> None:
    model = families.build("llama", num_hidden_layers=11)
    manifest = partition(model, sections.Blocks(embeddings="freeze", final_norm="freeze", head="freeze"))
    assert len(manifest.blocks) == 11
    assert all(name.startswith("model.layers.1.") for name in names(manifest.blocks[1]))
    assert len({block.numel for block in manifest.blocks}) == 1


def test_experts_in_a_list_of_their_own_are_not_taken_for_the_layers() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(8))

    model = nn.Module()
    model.layers = nn.ModuleList(Layer() for _ in range(2))
    assert decoder_layers(model) is model.layers


def test_max_block_mb_takes_as_many_layers_as_fit_and_names_the_smallest_that_would() -> None:
    model = families.build("llama")
    sizes = [block.nbytes for block in partition(model, sections.Blocks()).blocks]
    two = partition(model, sections.Blocks(max_block_mb=(sizes[2] + sizes[3]) / 1e6))
    assert [block.name for block in two.blocks] == [
        "embeddings + layers 0-1",
        "layers 2-3 + final norm + head",
    ]
    with pytest.raises(PartitionError, match=r"decoder layer 3, .*at least (\d+\.\d+)") as caught:
        partition(model, sections.Blocks(max_block_mb=(max(sizes) - 4) / 1e6))
    smallest = float(str(caught.value).split("at least ")[1].split(";")[0])
    assert max(block.nbytes for block in partition(model, sections.Blocks(max_block_mb=smallest)).blocks) == max(sizes)
    with pytest.raises(PartitionError):
        partition(model, sections.Blocks(max_block_mb=smallest - 0.001))


def test_more_blocks_than_layers_is_refused_with_the_number_that_works() -> None:
    with pytest.raises(PartitionError, match=r"num_blocks = 5, but the model has 4 decoder layers; .*at most 4"):
        partition(families.build("gpt2"), sections.Blocks(num_blocks=5))


def test_a_model_without_layers_and_one_with_nothing_to_train_are_refused() -> None:
    with pytest.raises(PartitionError, match="no list of decoder layers"):
        decoder_layers(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(PartitionError, match="nothing to train"):
        partition(families.build("llama").requires_grad_(False), sections.Blocks())


def test_a_largest_list_that_the_forward_skips_is_refused() -> None:
    model = families.build("llama")
    model.unused = nn.ModuleList(nn.Linear(64, 64) for _ in range(9))
    with pytest.raises(PartitionError, match="runs without its largest list"):
        partition(model, sections.Blocks())


def test_the_probe_leaves_the_model_the_random_numbers_and_the_modes_alone() -> None:
    model = families.build("opt")
    model.train()
    decoder_layers(model)[2].eval()
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    partition(model, sections.Blocks())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_pre_hooks for module in model.modules())
    batch = families.batch(0)
    fresh = families.build("opt").eval()
    assert torch.equal(model.eval()(batch.input_ids).logits, fresh(batch.input_ids).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_that_is_written_is_read_back_and_nothing_else_changes(dtype: torch.dtype) -> None:
    model = families.build("qwen3", dtype)
    manifest = partition(model, sections.Blocks(num_blocks=2))
    block = manifest.blocks[1]
    before = copy.deepcopy(dict(model.named_parameters()))
    values = torch.randn(block.numel, generator=torch.Generator().manual_seed(0)).to(dtype).float()
    write_block(model, block, values)
    assert torch.equal(read_block(model, block), values)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == dtype
        assert parameter.requires_grad
        assert torch.equal(parameter, before[name]) == (name not in names(block))


def test_a_read_block_is_a_copy_in_the_layout_of_the_slots() -> None:
    model = families.build("gpt2")
    block = partition(model, sections.Blocks()).blocks[0]
    values = read_block(model, block)
    assert (values.dtype, values.device.type, values.shape) == (torch.float32, "cpu", (block.numel,))
    for slot in block.slots:
        part = values[slot.offset : slot.offset + slot.numel].view(slot.shape)
        assert torch.equal(part, model.get_parameter(slot.name))
    values.zero_()
    assert read_block(model, block).abs().sum() > 0


def test_writing_a_wrong_length_or_dtype_is_our_bug() -> None:
    model = families.build("llama")
    block = partition(model, sections.Blocks()).blocks[0]
    with pytest.raises(AssertionError, match="elements"):
        write_block(model, block, torch.zeros(block.numel + 1))
    with pytest.raises(AssertionError, match="float32"):
        write_block(model, block, torch.zeros(block.numel, dtype=torch.float64))


@given(st.integers(1, 200), st.data())
def test_even_runs_cover_each_layer_once_and_differ_by_one_at_most(count: int, data: st.DataObject) -> None:
    runs = split_evenly(count, data.draw(st.integers(1, count)))
    assert [index for run in runs for index in run] == list(range(count))
    lengths = [len(run) for run in runs]
    assert max(lengths) - min(lengths) <= 1
    assert lengths == sorted(lengths, reverse=True)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=60), st.integers(0, 100))
def test_runs_by_size_cover_each_layer_once_and_none_could_take_one_more(sizes: list[int], extra: int) -> None:
    limit = max(sizes) + extra
    runs = split_by_size(sizes, limit)
    assert [index for run in runs for index in run] == list(range(len(sizes)))
    totals = [sum(sizes[index] for index in run) for run in runs]
    assert all(run for run in runs)
    assert all(total <= limit for total in totals)
    assert all(total + sizes[run.stop] > limit for total, run in zip(totals[:-1], runs[:-1], strict=True))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 7), st.data())
def test_num_blocks_groups_any_depth(depth: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, depth))
    model = families.build("llama", num_hidden_layers=depth)
    manifest = partition(model, sections.Blocks(num_blocks=count))
    assert len(manifest.blocks) == count
    assert manifest.numel == sum(parameter.numel() for parameter in model.parameters())
