"""The block solver against plain torch, and that it touches one block only, in values, gradients and work."""

from __future__ import annotations

import copy
import math
import warnings
import weakref
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from bench.shapes import Shape
from parablock import sections
from parablock.batch import IGNORED, Batch
from parablock.blocks import decoder_layers, partition, read_block, write_block
from parablock.loss import answer_loss
from parablock.solver import BlockSolver, Diverged, Trained
from parablock.staging import Staging
from tests import families
from tests.test_staging import Copies

if TYPE_CHECKING:
    from parablock.manifest import Block, Manifest

CPU = torch.device("cpu")


def build(
    family: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any
) -> tuple[Any, Manifest, BlockSolver]:
    model = families.build(family, dtype)
    manifest = partition(model, sections.Blocks(num_blocks=3))
    return model, manifest, BlockSolver(model, manifest, sections.Solver(**settings), CPU)


def values(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def flat(model: Any, block: Block) -> torch.Tensor:
    return torch.cat([model.get_parameter(slot.name).detach().flatten() for slot in block.slots])


def plain_optimizer(parameters: list[Any], settings: sections.Solver, lr: float) -> torch.optim.Optimizer:
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=settings.momentum)
    if settings.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, lr=lr)
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=settings.eps, fused=True)


def plain_torch(
    model: Any, block: Block, steps: list[list[Batch]], settings: sections.Solver, lr: float, rounds: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Start and delta of the block, by an ordinary loop over an ordinary model.

    rounds: one optimizer goes through them all, each on the same batches, from x + Δ as that is rounded; the last
    one's start and delta.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    parameters = [model.get_parameter(slot.name).requires_grad_() for slot in block.slots]
    optimizer = plain_optimizer(parameters, settings, lr)
    start = delta = torch.zeros(block.numel)
    for round in range(rounds):
        if round:
            write_block(model, block, start + delta)
        start = flat(model, block)
        for micro_batches in steps:
            tokens = sum(int((batch.labels[:, 1:] != IGNORED).sum()) for batch in micro_batches)
            for batch in micro_batches:
                (answer_loss(model, batch)[0] / tokens).backward()
            if settings.clip:
                torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
            optimizer.step()
            optimizer.zero_grad()
        delta = flat(model, block) - start
    return start, delta


@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"clip": 0.05, "weight_decay": 0.1, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6},
        {"clip": 0.0, "gradient_checkpointing": True},
        {"optimizer": "sgd"},
        {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.1},
        {"optimizer": "adafactor", "weight_decay": 0.1},
    ],
    ids=["default", "clipped and decayed", "checkpointed", "sgd", "sgd with momentum", "adafactor"],
)
def test_equals_plain_torch_bit_for_bit(block: int, settings: dict[str, Any]) -> None:
    model, manifest, solver = build("phi", **settings)  # with biases, an untied head, and dropout in its config
    steps = families.batches(3, micro_batches=2)
    start, delta = plain_torch(model, manifest.blocks[block], steps, sections.Solver(**settings), lr=1e-2)
    trained = solver.train(block, steps, lr=1e-2)
    assert torch.equal(trained.start, start)
    assert torch.equal(trained.delta, delta)
    assert trained.delta.abs().max() > 1e-3


def joined(manifest: Manifest, *indices: int) -> Block:
    """Blocks as one, as far as an ordinary loop reads one."""
    slots, start = [], 0
    for index in indices:
        slots += [replace(slot, offset=start + slot.offset) for slot in manifest.blocks[index].slots]
        start += manifest.blocks[index].numel
    return replace(manifest.blocks[indices[0]], slots=tuple(slots))


@pytest.mark.parametrize("settings", [{"clip": 0.05, "weight_decay": 0.1}, {"optimizer": "sgd"}], ids=str)
def test_blocks_that_are_trained_together_are_trained_as_one(settings: dict[str, Any]) -> None:
    model, manifest, solver = build("phi", **settings)
    before = values(model)
    steps = families.batches(3, micro_batches=2)
    start, delta = plain_torch(model, joined(manifest, 2, 0), steps, sections.Solver(**settings), lr=1e-2)
    last, first = solver.train_together([2, 0], steps, lr=1e-2)
    assert torch.equal(torch.cat([last.start, first.start]), start)
    assert torch.equal(torch.cat([last.delta, first.delta]), delta)
    assert (last.loss, last.tokens, last.grad_norm) == (first.loss, first.tokens, first.grad_norm)
    assert all(torch.equal(before[name], now) for name, now in values(model).items())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for index, trained in ((2, last), (0, first)):
        solver.write_guess(index, trained, share(manifest, index, 1.0))
        assert torch.equal(solver.read(index), trained.start + trained.delta)


def test_a_state_that_is_kept_is_its_blocks_own_whatever_it_was_trained_with() -> None:
    """The step of plain momentum is lr (m v + g): what the first round leaves of v comes on top of a round's own."""
    settings: dict[str, Any] = {"optimizer": "sgd", "momentum": 0.5, "clip": 0.0}
    steps = families.batches(1)
    _, _, fresh = build(**settings)
    _, _, solver = build(state="keep", **settings)
    once = fresh.train_together([0, 2], steps, lr=1e-2)
    solver.train_together([0, 1], steps, lr=1e-2)  # nothing is written: the next gradients are the same
    common, other = solver.train_together([0, 2], steps, lr=1e-2)
    torch.testing.assert_close(common.delta, 1.5 * once[0].delta, rtol=1e-3, atol=1e-6)
    assert torch.equal(other.delta, once[1].delta), "trained for the first time"


@pytest.mark.parametrize("family", families.CONFIGS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_rounds_of_every_family_change_the_active_block_only(family: str, checkpointing: bool) -> None:
    model, manifest, solver = build(family, gradient_checkpointing=checkpointing)
    for round in range(2):
        index = (round + 1) % 3
        before = values(model)
        trained = solver.train(index, families.batches(2, seed=round), lr=1e-2)
        # Reset first: what stands for the block is the caller's decision.
        assert all(torch.equal(before[name], now) for name, now in values(model).items())
        solver.write(index, trained.start + trained.delta)
        active = {slot.name for slot in manifest.blocks[index].slots}
        changed = {name for name, now in values(model).items() if not torch.equal(before[name], now)}
        assert changed == active
        assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_training_lowers_the_loss() -> None:
    _, manifest, solver = build("llama-tied")
    steps = [[families.batch(0)]] * 6
    losses = []
    for round in range(9):
        block = round % len(manifest.blocks)
        trained = solver.train(block, steps, lr=1e-2)
        losses.append(trained.loss)
        solver.write(block, trained.start + trained.delta)
    assert losses[0] < 1.1 * math.log(families.VOCABULARY)
    assert losses[-1] < 0.7 * losses[0]


def test_reports_the_loss_per_token_the_tokens_the_steps_and_the_norm() -> None:
    model, manifest, solver = build(clip=1e-3)
    batches = [families.batch(seed) for seed in range(3)]
    expected = [answer_loss(model, batch) for batch in batches]
    norm = 0.0
    for batch in batches:
        twin = copy.deepcopy(model).requires_grad_(True)
        loss, tokens = answer_loss(twin, batch)
        (loss / tokens).backward()
        grads = [twin.get_parameter(slot.name).grad for slot in manifest.blocks[1].slots]
        norm += torch.cat([grad.flatten() for grad in grads]).norm().item() / 3
    trained = solver.train(1, [[batch] for batch in batches], lr=1e-12)  # the model stands still
    assert trained.tokens == sum(tokens for _, tokens in expected)
    assert trained.loss == pytest.approx(sum(loss.item() for loss, _ in expected) / trained.tokens, rel=1e-6)
    assert trained.steps == 3
    assert trained.grad_norm == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_micro_batches_add_up_to_one_batch(dtype: torch.dtype) -> None:
    _, _, solver = build(dtype=dtype)
    whole = families.batch(seed=0, rows=6)
    parts = [
        Batch(whole.input_ids[rows], whole.attention_mask[rows], whole.labels[rows])
        for rows in (slice(0, 1), slice(1, 4), slice(4, 6))  # of unlike numbers of answer tokens
    ]
    together = solver.train(1, [[whole]], lr=1e-3)
    apart = solver.train(1, [parts], lr=1e-3)
    assert together.tokens == apart.tokens
    assert together.loss == pytest.approx(apart.loss, rel=1e-5 if dtype == torch.float32 else 1e-2)
    assert together.grad_norm == pytest.approx(apart.grad_norm, rel=1e-4 if dtype == torch.float32 else 3e-2)
    cosine = torch.nn.functional.cosine_similarity(together.delta, apart.delta, dim=0)
    assert cosine > (0.9999 if dtype == torch.float32 else 0.9)


def test_what_has_no_answer_tokens_changes_nothing() -> None:
    _, _, solver = build(weight_decay=0.5)
    full = families.batch(0)
    empty = Batch(full.input_ids, full.attention_mask, torch.full_like(full.labels, IGNORED))
    alone = solver.train(0, [[full]], lr=1e-2)
    for steps in ([[full, empty]], [[empty, full]], [[full], [empty]]):
        with_empty = solver.train(0, steps, lr=1e-2)
        assert torch.equal(with_empty.delta, alone.delta)
        assert (with_empty.loss, with_empty.tokens) == (alone.loss, alone.tokens)
    nothing = solver.train(0, [[empty]], lr=1e-2)
    assert (nothing.loss, nothing.tokens, nothing.grad_norm) == (0.0, 0, 0.0)
    assert not nothing.delta.any()


STATEFUL = [{}, {"optimizer": "sgd", "momentum": 0.9}, {"optimizer": "adafactor"}]


@pytest.mark.parametrize("settings", STATEFUL, ids=str)
def test_each_round_has_an_optimizer_of_its_own(settings: dict[str, Any]) -> None:
    _, _, solver = build(**settings)
    first = solver.train(1, families.batches(2), lr=1e-2)
    again = solver.train(1, families.batches(2), lr=1e-2)
    assert torch.equal(first.delta, again.delta)


@pytest.mark.parametrize("staging", [None, Staging(Copies(late=True))], ids=["host", "device"])
@pytest.mark.parametrize("settings", [*STATEFUL, {"optimizer": "sgd"}], ids=str)
def test_a_state_that_is_kept_makes_rounds_those_of_one_lasting_optimizer(
    settings: dict[str, Any], staging: Staging | None
) -> None:
    """Bit for bit, with rounds of other blocks, which nobody puts in place, in between."""
    model = families.build("phi")
    manifest = partition(model, sections.Blocks(num_blocks=3))
    solver = BlockSolver(model, manifest, sections.Solver(state="keep", **settings), CPU, staging)
    steps = families.batches(2)
    start, delta = plain_torch(model, manifest.blocks[1], steps, sections.Solver(**settings), lr=1e-2, rounds=3)
    for _ in range(3):
        solver.train(0, families.batches(1), lr=1e-2)
        trained = solver.train(1, steps, lr=1e-2)
        solver.write(1, trained.start + trained.delta)
    assert torch.equal(trained.start, start)
    assert torch.equal(trained.delta, delta)


def test_a_kept_state_makes_a_difference() -> None:
    _, _, solver = build(state="keep")
    first = solver.train(1, families.batches(2), lr=1e-2)
    again = solver.train(1, families.batches(2), lr=1e-2)
    assert torch.equal(first.start, again.start)
    assert not torch.equal(first.delta, again.delta)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_round_that_does_not_end_well_leaves_no_state(dtype: torch.dtype) -> None:
    def stop(step: int) -> None:
        if step == 1:
            raise InterruptedError

    _, _, fresh = build(dtype=dtype)
    expected = fresh.train(1, families.batches(3), lr=1e-2)
    _, _, solver = build(dtype=dtype, state="keep")
    for lr, raised, after_step in ((1e39, Diverged, None), (1e-2, InterruptedError, stop)):
        solver.train(1, families.batches(2), lr=1e-2)
        with pytest.raises(raised):
            solver.train(1, families.batches(2), lr=lr, after_step=after_step)
        assert torch.equal(solver.train(1, families.batches(3), lr=1e-2).delta, expected.delta)
        with pytest.raises(Diverged):  # so that the next turn begins without a state, too
            solver.train(1, families.batches(1), lr=1e39)


def test_clipping_bounds_the_step_that_the_optimizer_sees() -> None:
    # With an eps that dwarfs the second moment, AdamW's first step is lr * gradient / eps.
    settings = {"eps": 1e6, "weight_decay": 0.0}
    _, _, loose = build(**settings, clip=0.0)
    free = loose.train(1, families.batches(1), lr=1.0)
    _, _, tight = build(**settings, clip=free.grad_norm / 10)
    clipped = tight.train(1, families.batches(1), lr=1.0)
    assert clipped.grad_norm == pytest.approx(free.grad_norm)  # reported before clipping
    assert (free.delta * 1e6).norm().item() == pytest.approx(free.grad_norm, rel=0.05)
    assert (clipped.delta * 1e6).norm().item() == pytest.approx(free.grad_norm / 10, rel=0.2)


def test_weight_decay_shrinks_matrices_and_leaves_norms_and_biases() -> None:
    # With that eps the gradients move nothing, so that a delta is the decay's alone: -lr * decay * value.
    model, manifest, solver = build("phi", eps=1e30, weight_decay=0.25)
    trained = solver.train(1, families.batches(1), lr=0.5)
    seen = Counter[str]()
    for slot in manifest.blocks[1].slots:
        part = slice(slot.offset, slot.offset + slot.numel)
        start, delta = trained.start[part], trained.delta[part]
        kind = "bias" if slot.name.endswith("bias") else "norm" if "norm" in slot.name else "matrix"
        seen[kind] += 1
        if kind == "matrix":
            torch.testing.assert_close(delta, -0.125 * start, rtol=1e-3, atol=1e-7)
            assert delta.abs().max() > 1e-4
        else:
            assert delta.abs().max() < 1e-30
    assert min(seen["bias"], seen["norm"], seen["matrix"]) >= 1
    assert model.get_parameter(manifest.blocks[1].slots[0].name).dtype == torch.float32


def test_stacked_biases_of_experts_are_biases() -> None:
    model = families.build("llama")
    layer = decoder_layers(model)[1]
    layer.self_attn.q_proj.bias = torch.nn.Parameter(torch.ones(1, 16))  # two-dimensional, as stacked ones are
    manifest = partition(model, sections.Blocks())
    solver = BlockSolver(model, manifest, sections.Solver(eps=1e30, weight_decay=0.25), CPU)
    trained = solver.train(1, families.batches(1), lr=0.5)
    slot = next(slot for slot in manifest.blocks[1].slots if slot.name.endswith("q_proj.bias"))
    assert trained.delta[slot.offset : slot.offset + slot.numel].abs().max() < 1e-30


def test_masters_keep_what_bfloat16_would_round_away() -> None:
    model, manifest, solver = build(dtype=torch.bfloat16)
    block = manifest.blocks[1]
    origin = solver.read(1)
    coarse = read_block(model, block)
    assert torch.equal(origin, coarse)
    tiny = 2e-6  # about a thousandth of the last bit of a norm weight of 1
    for round in range(40):
        trained = solver.train(1, families.batches(1, seed=round), lr=tiny)
        assert 0 < trained.delta.abs().max() < 2 * tiny
        solver.write(1, trained.start + trained.delta)
        assert torch.equal(solver.read(1), trained.start + trained.delta)
    moved = solver.read(1) - origin
    assert moved.abs().max() > 10 * tiny
    norm = next(slot for slot in block.slots if len(slot.shape) == 1)
    part = slice(norm.offset, norm.offset + norm.numel)
    assert moved[part].any()
    assert not (read_block(model, block) - coarse)[part].any()  # too little yet for bfloat16 to show
    # What the model computes with is the masters, rounded.
    assert torch.equal(read_block(model, block), solver.read(1).bfloat16().float())


def test_bfloat16_delta_follows_the_float32_one() -> None:
    _, _, exact = build()
    _, _, rounded = build(dtype=torch.bfloat16)
    expected = exact.train(1, families.batches(4), lr=1e-3).delta
    delta = rounded.train(1, families.batches(4), lr=1e-3).delta
    assert delta.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(delta, expected, dim=0) > 0.9


def test_float16_gradients_are_scaled_and_unscaled() -> None:
    _, _, exact = build()
    _, _, rounded = build(dtype=torch.float16)
    # A gradient per token this small is zero in float16 without the scale.
    expected = exact.train(1, families.batches(2, micro_batches=2), lr=1e-3)
    trained = rounded.train(1, families.batches(2, micro_batches=2), lr=1e-3)
    assert trained.grad_norm == pytest.approx(expected.grad_norm, rel=1e-2)
    assert torch.nn.functional.cosine_similarity(trained.delta, expected.delta, dim=0) > 0.95


def test_a_block_of_mixed_precision_is_exact_throughout() -> None:
    model = families.build("llama", torch.bfloat16)
    for layer in decoder_layers(model):
        layer.mlp.float()
        layer.mlp.register_forward_pre_hook(lambda _m, inputs: (inputs[0].float(),))
        layer.mlp.register_forward_hook(lambda _m, _i, output: output.bfloat16())
    manifest = partition(model, sections.Blocks())
    assert {slot.dtype for slot in manifest.blocks[1].slots} == {"float32", "bfloat16"}
    solver = BlockSolver(model, manifest, sections.Solver(), CPU)
    before = values(model)
    trained = solver.train(1, families.batches(3), lr=1e-4)
    assert all(torch.equal(before[name], now) for name, now in values(model).items())
    assert all(trained.delta[s.offset : s.offset + s.numel].any() for s in manifest.blocks[1].slots)
    solver.write(1, trained.start + trained.delta)
    assert torch.equal(solver.read(1), trained.start + trained.delta)


def test_reading_and_writing_copies() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        _, _, solver = build(dtype=dtype)
        given = torch.full_like(solver.read(0), 1 / 3)
        solver.write(0, given)
        given.zero_()
        solver.read(0).zero_()
        assert torch.equal(solver.read(0), torch.full_like(given, 1 / 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_blocks_land_between_steps(dtype: torch.dtype) -> None:
    _, _, solver = build(dtype=dtype)
    landing = {0: solver.read(0) * 1.5, 2: solver.read(2) * 0.5}
    called: list[int] = []

    def land(step: int) -> None:
        called.append(step)
        if step in (0, 2):
            solver.write(step, landing[step])
            assert torch.equal(solver.read(step), landing[step])

    undisturbed = solver.train(1, families.batches(4), lr=1e-2)
    disturbed = solver.train(1, families.batches(4), lr=1e-2, after_step=land)
    assert called == [0, 1, 2, 3]
    assert torch.equal(disturbed.start, undisturbed.start)
    assert not torch.equal(disturbed.delta, undisturbed.delta)  # later steps saw what had landed
    assert all(torch.equal(solver.read(block), landing[block]) for block in landing)


def test_the_active_block_can_be_neither_written_nor_read_and_is_put_back_after_any_error() -> None:
    model, _, solver = build()
    before = values(model)
    start = solver.read(1)
    for touch in (lambda _: solver.write(1, start), lambda _: solver.read(1)):
        with pytest.raises(AssertionError, match="block 1 is being trained"):
            solver.train(1, families.batches(2), lr=1e-2, after_step=touch)
        assert all(torch.equal(before[name], now) for name, now in values(model).items())
        assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    solver.write(1, start)


def test_a_loss_that_is_not_finite_is_diverged_and_the_block_is_put_back() -> None:
    model, _, solver = build()
    poison = solver.read(2)
    poison[0] = math.nan
    start = solver.read(1)

    def land(step: int) -> None:
        if step == 1:
            solver.write(2, poison)

    with pytest.raises(Diverged, match=r"block 1 \(layer 2\) .*step 2 of 4.*nan.*lower solver.lr"):
        solver.train(1, families.batches(4), lr=1e-2, after_step=land)
    assert torch.equal(solver.read(1), start)
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_values_that_are_not_finite_after_finite_steps_are_diverged() -> None:
    _, _, solver = build()
    start = solver.read(1)
    with pytest.raises(Diverged, match="values after it are not"):
        solver.train(1, families.batches(1), lr=1e39)
    assert torch.equal(solver.read(1), start)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("block", "lowest"), [(0, 0), (1, 2), (2, 3)])
def test_nothing_below_the_active_block_runs_backwards(checkpointing: bool, block: int, lowest: int) -> None:
    model, _, solver = build(gradient_checkpointing=checkpointing)
    forwards, graphs = Counter[int](), Counter[int]()
    for index, layer in enumerate(decoder_layers(model)):

        def count(_module: Any, _inputs: Any, index: int = index) -> None:
            forwards[index] += 1

        def record(_module: Any, _inputs: Any, output: Any, index: int = index) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            graphs[index] += hidden.grad_fn is not None

        layer.mlp.register_forward_pre_hook(count)  # inside the layer: seen again where it is run again
        layer.register_forward_hook(record)
    solver.train(block, families.batches(1), lr=1e-3)
    assert [graphs[index] for index in range(4)] == [int(index >= lowest) for index in range(4)]
    rerun = int(checkpointing)
    assert [forwards[index] for index in range(4)] == [1 + rerun * (index >= lowest) for index in range(4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_active_block_has_gradients_while_it_is_trained(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, manifest, solver = build(dtype=dtype)
    step = torch.optim.AdamW.step
    seen: list[set[str]] = []
    stepped: list[int] = []

    def spy(optimizer: torch.optim.AdamW) -> None:
        seen.append({name for name, p in model.named_parameters() if p.grad is not None or p.requires_grad})
        masters = [p for group in optimizer.param_groups for p in group["params"]]
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in masters)
        stepped.append(sum(p.numel() for p in masters))
        step(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    solver.train(1, families.batches(2), lr=1e-3)
    assert seen == [{slot.name for slot in manifest.blocks[1].slots}] * 2
    assert stepped == [manifest.blocks[1].numel] * 2


def test_the_layers_are_themselves_again_after_checkpointing() -> None:
    model, _, solver = build("gpt2", gradient_checkpointing=True)
    attributes = [set(vars(layer)) for layer in decoder_layers(model)]
    solver.train(0, families.batches(1), lr=1e-3)
    assert [set(vars(layer)) for layer in decoder_layers(model)] == attributes
    copy.deepcopy(model)(input_ids=families.batch(0).input_ids)


def test_dropout_and_layer_drop_are_off() -> None:
    _, _, solver = build("opt")
    random = torch.get_rng_state()
    first = solver.train(1, families.batches(2), lr=1e-3)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(solver.train(1, families.batches(2), lr=1e-3).delta, first.delta)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 0.3, 1 / 3, 0.9999999])
def test_the_guess_is_the_corrections_to_the_last_bit(alpha: float) -> None:
    start, delta = torch.randn(2, 10_000, generator=torch.Generator().manual_seed(1)).unbind()
    guess = Trained(start, 1e-3 * delta, 0.0, 1, 1, 0.0).guess(slice(None), alpha)
    assert guess.numpy().tobytes() == (start.numpy() + np.float32(alpha) * (1e-3 * delta).numpy()).tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_guess_is_written_as_its_vector_would_be(dtype: torch.dtype) -> None:
    written = []
    for whole in (True, False):
        model, manifest, solver = build("llama", dtype)
        trained = solver.train(1, families.batches(2), lr=1e-2)
        slots = manifest.blocks[1].slots
        alpha = [1 / (2 + place) for place in range(len(slots))]
        if whole:
            parts = [slice(slot.offset, slot.offset + slot.numel) for slot in slots]
            solver.write(1, torch.cat([trained.guess(*each) for each in zip(parts, alpha, strict=True)]))
        else:
            solver.write_guess(1, trained, alpha)
        written.append((solver.read(1).numpy().tobytes(), read_block(model, manifest.blocks[1]).numpy().tobytes()))
    assert written[0] == written[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("state", ["reset", "keep"])
def test_a_device_that_copies_on_its_own_changes_nothing(state: Any, dtype: torch.dtype, late: bool) -> None:
    results = []
    for staging in (Staging(None), Staging(Copies(late=late))):
        model = families.build("llama", dtype)
        manifest = partition(model, sections.Blocks(num_blocks=3))
        solver = BlockSolver(model, manifest, sections.Solver(state=state), CPU, staging)
        for round in range(4):
            trained = solver.train(round % 2, families.batches(2, seed=round), lr=1e-2)
            solver.write(round % 2, trained.guess(slice(None), 0.5))
        results.append([solver.read(block).numpy().tobytes() for block in range(3)])
    assert results[0] == results[1]


class Watched(Copies):
    """Knows which of what it brought is still held by anyone."""

    def __init__(self) -> None:
        super().__init__(late=True)
        self._brought: list[weakref.ref[torch.Tensor]] = []

    def bring(self, source: torch.Tensor) -> Any:
        target, mark = super().bring(source)
        self._brought.append(weakref.ref(target))
        return target, mark

    def held(self) -> int:
        return sum(target() is not None for target in self._brought)


@pytest.mark.parametrize("blocks", [[1], [0, 2]], ids=["one", "several"])
def test_while_the_steps_run_nothing_on_the_device_holds_what_the_blocks_were(blocks: list[int]) -> None:
    """Beside the model are the masters, their gradients and moments: 16 bytes a parameter of the blocks."""
    model = families.build("llama", torch.bfloat16)
    manifest = partition(model, sections.Blocks(num_blocks=3))
    engine = Watched()
    solver = BlockSolver(model, manifest, sections.Solver(), CPU, Staging(engine))
    held: list[int] = []
    trained = solver.train_together(blocks, families.batches(3), 1e-2, lambda _step: held.append(engine.held()))
    assert held == [0, 0, 0]
    assert engine.held() == len(blocks), "where it began is told at the end"
    for block, each in zip(blocks, trained, strict=True):
        assert torch.equal(each.start, read_block(model, manifest.blocks[block]))


@pytest.mark.parametrize("again", [False, True], ids=["first", "again"])
def test_a_round_that_ends_badly_leaves_the_block_on_a_device_as_it_was(again: bool) -> None:
    model = families.build("llama", torch.bfloat16)
    manifest = partition(model, sections.Blocks(num_blocks=3))
    solver = BlockSolver(model, manifest, sections.Solver(), CPU, Staging(Copies(late=True)))
    if again:
        solver.write_guess(1, solver.train(1, families.batches(2), 1e-2), share(manifest, 1, 1.0))
    exact, rounded = solver.read(1), flat(model, manifest.blocks[1]).clone()
    with pytest.raises(Diverged):
        solver.train(1, families.batches(2), 1e39)
    assert torch.equal(solver.read(1), exact)
    assert torch.equal(flat(model, manifest.blocks[1]), rounded)


def share(manifest: Manifest, block: int, alpha: float) -> list[float]:
    """α for each of the block's parameters."""
    return [alpha] * len(manifest.blocks[block].slots)


NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_cuda(dtype: torch.dtype = torch.bfloat16, **settings: Any) -> tuple[Any, Manifest, BlockSolver]:
    """Four layers of 0.8 million parameters each, so that activations are small beside a block."""
    shape = Shape(4, 256, 768, heads=4, kv_heads=4, vocabulary=512, tied=True, tokens=16)
    device = torch.device("cuda")
    model = shape.model(device, dtype)
    manifest = partition(model, sections.Blocks(embeddings="freeze", final_norm="freeze"))
    return model, manifest, BlockSolver(model, manifest, sections.Solver(**settings), device)


def rows_of(tokens: int, count: int) -> list[list[Batch]]:
    """One row a step, of which every token counts and none is padding."""
    drawn = torch.Generator().manual_seed(0)
    ids = [torch.randint(512, (1, tokens), generator=drawn) for _ in range(count)]
    return [[Batch(each, torch.ones_like(each), each)] for each in ids]


@NEEDS_CUDA
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_cuda_the_steps_are_those_of_the_host(dtype: torch.dtype) -> None:
    model, manifest, solver = on_cuda(dtype)
    host = copy.deepcopy(model).to(CPU)
    other = BlockSolver(host, manifest, sections.Solver(), CPU)
    for round in range(4):
        steps = rows_of(16, 3)
        ours, theirs = (each.train(round % 2, steps, 1e-3) for each in (solver, other))
        solver.write_guess(round % 2, ours, share(manifest, round % 2, 0.5))
        other.write_guess(round % 2, theirs, share(manifest, round % 2, 0.5))
    assert ours.loss == pytest.approx(theirs.loss, rel=2e-2)
    # AdamW's first steps are of one size whatever the gradient's, so that signs are what is compared.
    agree = (ours.delta.cpu().sign() == theirs.delta.sign()).float().mean()
    assert agree > (0.95 if dtype == torch.float32 else 0.7)


@NEEDS_CUDA
def test_on_cuda_a_round_needs_sixteen_bytes_a_parameter_of_the_block_beside_the_model() -> None:
    _, manifest, solver = on_cuda()
    solver.write_guess(1, solver.train(1, rows_of(8, 2), 1e-4), share(manifest, 1, 1.0))  # cuBLAS has its workspace now
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    solver.train(1, rows_of(8, 2), 1e-4)
    numel = manifest.blocks[1].numel
    # Two more for the gradients in bfloat16 before they are moved up, one for activations, logits and the allocator.
    assert torch.cuda.max_memory_allocated() - before < (16 + 2 + 1) * numel


@NEEDS_CUDA
def test_on_cuda_a_step_waits_for_the_device_only_where_transformers_does() -> None:
    """The thread that trains is ahead of the device, but that each forward looks whether the mask hides anything."""
    _, manifest, solver = on_cuda()
    solver.write_guess(1, solver.train(1, rows_of(8, 2), 1e-4), share(manifest, 1, 1.0))  # what is made once may wait
    modes = {0: "warn", 2: "default"}  # after step 0 and after step 2: steps 1 and 2 are looked at
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            solver.train(1, [*rows_of(8, 2), *rows_of(8, 1)], 1e-4, lambda step: change_mode(modes.get(step)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) <= 2, [str(wait.message) for wait in waits]


def change_mode(mode: str | None) -> None:
    if mode is not None:
        torch.cuda.set_sync_debug_mode(mode)
