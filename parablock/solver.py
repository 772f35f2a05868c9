"""The local solver: some optimizer steps on one block, or several, of a model whose other parameters stand still.

Only the active block has gradients, float32 masters and optimizer state, and the backward pass ends at its
lowest layer (BAdam, arXiv 2404.02827, is the same idea on one machine). The solver owns the model's
parameters: whoever wants a block's values reads them here, and whoever has new ones writes them here, on the
thread that trains. Which block is trained, on what, and what stands for it afterwards is the caller's part.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch.utils.checkpoint import checkpoint

from parablock.blocks import decoder_layers, read_block, write_block
from parablock.loss import answer_loss, answer_tokens
from parablock.manifest import Block
from parablock.optimizer import OptimizerStates, optimizer_of
from parablock.staging import Outgoing, Staging

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import nn
    from transformers import PreTrainedModel

    from parablock import sections
    from parablock.batch import Batch
    from parablock.manifest import Manifest, Slot
    from parablock.tensor_file import Tensors

FLOAT16_LOSS_SCALE = 2.0**10
"""Gradients below 6e-8 are zero in float16. A power of two is undone exactly, in the masters' gradients."""


class Diverged(ArithmeticError):
    """Training gave a loss, a gradient or a value that is not finite. The block is as it was before."""


@dataclass(frozen=True)
class Trained:
    """What a round of training did to a block. Nobody changes its tensors."""

    start: torch.Tensor  # the block before: float32, on the device, of shape (block.numel,)
    delta: torch.Tensor  # what training added to it: like start
    loss: float  # in nats per answer token, mean over the round's tokens, each before its step; 0 without any
    tokens: int  # answer tokens trained on
    steps: int  # optimizer steps
    grad_norm: float  # of the whole block, before clipping, mean over the steps

    def guess(self, part: slice, alpha: float) -> torch.Tensor:
        """x + α Δ on the device, each operation rounded to float32, as in `parablock.correction`, to the last bit."""
        return (self.delta[part] * alpha).add_(self.start[part])


class BlockSolver:
    """A model, block by block.

    A block of float32 parameters is kept in the model itself. Of a block with parameters of less precision a
    float32 copy is kept on the host from its first writing on (on CUDA, from its first round on, and in pinned
    memory): the model's rounded values would forget what is smaller than their last bit. While such a block is
    trained, the device holds 16 bytes for each of its parameters beside the model: master, gradient, two moments. With
    state = "keep" they are 20 at a round's end: master, the moments that then go to the host, the start and the delta.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        manifest: Manifest,
        settings: sections.Solver,
        device: torch.device,
        staging: Staging | None = None,
    ) -> None:
        # Never in training mode: dropout is noise that fine-tuning over few epochs gains nothing from, and
        # without it a run is a function of its data: one client equals serial descent bit for bit.
        self._model = model.to(device).eval().requires_grad_(False)
        self._manifest = manifest
        self._settings = settings
        self._device = device
        self._staging = staging or Staging.of(device)
        self._masters: dict[int, Outgoing] = {}  # by block; only of blocks that are not float32 throughout
        self._states = OptimizerStates(self._staging) if settings.state == "keep" else None
        self._active: tuple[int, ...] = ()

    def read(self, block: int) -> torch.Tensor:
        """The block's exact values: float32, on the CPU, of shape (block.numel,), a copy."""
        assert block not in self._active, f"block {block} is being trained; its values are the optimizer's"
        if block in self._masters:
            return torch.from_numpy(self._masters[block].wait()).clone()
        return read_block(self._model, self._manifest.blocks[block]).cpu()

    def write(self, block: int, values: torch.Tensor) -> None:
        """Set the block. values: like those that `read` gives, but on any device; copied.

        Safe between two steps of another block (`after_step`): no graph is alive then.
        """
        assert block not in self._active, f"block {block} is being trained; a landing would be lost or tear it"
        values = values.to(self._device)
        write_block(self._model, self._manifest.blocks[block], values)
        if self._has_masters(block):
            self._masters[block] = self._staging.out(values.clone())

    def write_guess(self, block: int, trained: Trained, alpha: Sequence[float]) -> None:
        """Set the block to `trained.guess`, parameter by parameter, with an α for each. Where there are no masters, no
        third vector of the block's size is needed, for which the allocator might have no room between smaller ones."""
        assert block not in self._active, f"block {block} is being trained; a landing would be lost or tear it"
        of = self._manifest.blocks[block]
        values = torch.empty_like(trained.start) if self._has_masters(block) else None
        for slot, parameter, share in zip(of.slots, self._parameters(of), alpha, strict=True):
            part = slice(slot.offset, slot.offset + slot.numel)
            guess = trained.guess(part, share)
            parameter.data.copy_(guess.view(slot.shape))
            if values is not None:
                values[part] = guess
        if values is not None:
            self._masters[block] = self._staging.out(values)

    def learnt(self, block: int) -> Tensors | None:
        """What the optimizer has learnt of the block, see `OptimizerStates.written`; None: nothing that is kept."""
        return None if self._states is None else self._states.written(block)

    def restore(self, block: int, learnt: Tensors) -> None:
        """What an earlier process's `learnt` has given."""
        assert self._states is not None, "no state is kept"
        self._states.restore(block, learnt, self._device)

    def train(
        self,
        block: int,
        batches: Sequence[Sequence[Batch]],
        lr: float,
        after_step: Callable[[int], None] | None = None,
    ) -> Trained:
        """Train the block on `batches`, one optimizer step for each element, then put its old values back.

        batches[k]: the micro-batches of step k, on the host. The step's loss is the mean over all their
        answer tokens, as if they were one batch; a step without any changes nothing. lr: the learning rate of
        every step. after_step: called with k after step k, here; it may `read` and `write` other blocks.

        The optimizer's state is new in every round: what it had learnt about the block was about another
        model. With state = "keep" it goes on all the same from the block's last round that came to its end here, also
        where that round's mean, from which this one starts, is not what the optimizer had made of the block.

        Raises Diverged. However this ends, the block has its old values and no gradient is left. A round that raises
        leaves no state either: it has changed what it began with.
        """
        (trained,) = self.train_together([block], batches, lr, after_step)
        return trained

    def train_together(
        self,
        indices: Sequence[int],
        batches: Sequence[Sequence[Batch]],
        lr: float,
        after_step: Callable[[int], None] | None = None,
    ) -> list[Trained]:
        """Train several blocks as if they were one, with one optimizer and one norm of the gradient; otherwise as
        `train`. Of each block what became of it, with the loss and the norm of all."""
        assert not self._active, f"block {self._active} is being trained"
        assert batches, "a round has at least one step"
        blocks = [self._manifest.blocks[index] for index in indices]
        starts = [self._start(index) for index in indices]
        self._active = tuple(indices)
        trained = None
        try:
            trained = self._steps(blocks, starts, batches, lr, after_step)
            return trained
        finally:
            self._active = ()
            for place, block in enumerate(blocks):
                for parameter in self._parameters(block):
                    parameter.requires_grad_(False)
                    parameter.grad = None
                write_block(self._model, block, starts[place]() if trained is None else trained[place].start)

    def _start(self, block: int) -> Callable[[], torch.Tensor]:
        """Gives what `read` gives, on the device; not to be changed.

        Where the host has a copy, it is brought at each call, so that no step needs memory on the device for it. Of a
        block that has masters on a device that is not the host, it has one from the first round on.
        """
        if block not in self._masters:
            values = read_block(self._model, self._manifest.blocks[block])
            if not (self._staging.copies and self._has_masters(block)):
                return lambda: values
            self._masters[block] = self._staging.out(values)
        copy = self._masters[block]
        return lambda: self._staging.bring(copy.wait()).ready()

    def _has_masters(self, block: int) -> bool:
        return any(slot.dtype != "float32" for slot in self._manifest.blocks[block].slots)

    def _steps(
        self,
        blocks: Sequence[Block],
        starts: Sequence[Callable[[], torch.Tensor]],
        batches: Sequence[Sequence[Batch]],
        lr: float,
        after_step: Callable[[int], None] | None,
    ) -> list[Trained]:
        """starts, and what it returns: by block."""
        joined = _joined(blocks)
        parameters = [parameter.requires_grad_() for parameter in self._parameters(joined)]
        masters = [
            master
            for (block, own), start in zip(_divided(blocks, parameters), starts, strict=True)
            for master in _masters(block, own, start())
        ]
        optimizer = optimizer_of(joined, masters, self._settings, lr)
        if self._states is not None:
            for block, own in _divided(blocks, masters):
                self._states.give_back(block.index, optimizer, own)
        losses: list[torch.Tensor] = []  # summed over the step's tokens; kept on the device, as are the norms:
        norms: list[torch.Tensor] = []  # to look at one before the round ends would wait for the device
        tokens = 0
        rerun = checkpointing(self._model) if self._settings.gradient_checkpointing else contextlib.nullcontext()
        with rerun:
            for step, micro_batches in enumerate(batches):
                count = sum(answer_tokens(batch) for batch in micro_batches)
                losses.append(self._backward(micro_batches, count, parameters, masters))
                norms.append(_clip(masters, self._settings.clip))
                optimizer.step()
                optimizer.zero_grad()
                _copy_down(masters, parameters)
                tokens += count
                if after_step is not None:
                    after_step(step)
        if self._states is None:
            del optimizer  # nothing of it is needed any more, and the delta needs as much memory as a moment
        made = []
        for (block, own), start in zip(_divided(blocks, masters), starts, strict=True):
            made.append((began := start(), _delta(block, own, began)))
        step_losses, step_norms = torch.stack(losses).cpu(), torch.stack(norms).cpu()
        _check_finite(joined, step_losses, step_norms, [delta for _, delta in made], lr)
        if self._states is not None:
            for block, own in _divided(blocks, masters):
                self._states.keep(block.index, optimizer, own)
        loss, grad_norm = step_losses.double().sum().item() / max(1, tokens), step_norms.double().mean().item()
        return [Trained(began, delta, loss, tokens, len(batches), grad_norm) for began, delta in made]

    def _backward(
        self,
        micro_batches: Sequence[Batch],
        tokens: int,
        parameters: list[torch.Tensor],
        masters: list[torch.Tensor],
    ) -> torch.Tensor:
        """Leave the gradient of the step's mean loss in the masters; returns the loss summed over tokens."""
        scale = FLOAT16_LOSS_SCALE if self._model.dtype == torch.float16 else 1.0
        total = torch.zeros((), device=parameters[0].device)
        for batch in micro_batches:
            loss, counted = answer_loss(self._model, batch)
            if counted == 0:
                continue
            (loss / tokens * scale).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
            _move_up(parameters, masters)
        if scale != 1.0:
            for master in masters:
                if master.grad is not None:
                    master.grad /= scale
        return total

    def _parameters(self, block: Block) -> list[nn.Parameter]:
        return [self._model.get_parameter(slot.name) for slot in block.slots]


@contextlib.contextmanager
def checkpointing(model: nn.Module) -> Iterator[None]:
    """Within it each decoder layer keeps only its input and is run again backwards.

    Not through transformers' own switch, which acts in training mode only, and with it comes dropout.
    Non-reentrant, so that layers below the active block, where no gradient goes, are not run again.
    """
    layers = list(decoder_layers(model))
    for layer in layers:
        layer.forward = functools.partial(_rerun_backwards, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # what the class defines shows again


def _rerun_backwards(forward: Callable[..., object], *arguments: object, **named: object) -> object:
    # Nothing random runs in evaluation mode, so that there is no state of the generators to keep.
    call = functools.partial(forward, **named)
    return checkpoint(call, *arguments, use_reentrant=False, preserve_rng_state=False)


def _joined(blocks: Sequence[Block]) -> Block:
    """The blocks as one, each after the other."""
    first, *others = blocks
    if not others:
        return first
    starts = itertools.accumulate((block.numel for block in blocks), initial=0)
    slots = [
        replace(slot, offset=start + slot.offset)
        for block, start in zip(blocks, starts, strict=False)
        for slot in block.slots
    ]
    return Block(first.index, " + ".join(block.name for block in blocks), tuple(slots))


def _divided(blocks: Sequence[Block], tensors: Sequence[torch.Tensor]) -> Iterator[tuple[Block, list[torch.Tensor]]]:
    """Each block with those of its slots, of `tensors` of the slots of all."""
    left = iter(tensors)
    return ((block, list(itertools.islice(left, len(block.slots)))) for block in blocks)


def _masters(block: Block, parameters: list[torch.Tensor], start: torch.Tensor) -> list[torch.Tensor]:
    """What the optimizer steps on: a float32 parameter itself, else a copy from `start`."""

    def master(slot: Slot, parameter: torch.Tensor) -> torch.Tensor:
        if parameter.dtype == torch.float32:
            return parameter
        values = start[slot.offset : slot.offset + slot.numel].view(slot.shape)
        return values.clone()

    return [master(slot, parameter) for slot, parameter in zip(block.slots, parameters, strict=True)]


def _delta(block: Block, masters: Sequence[torch.Tensor], start: torch.Tensor) -> torch.Tensor:
    """What training has added to a block: float32, of shape (block.numel,)."""
    delta = torch.empty_like(start)
    for slot, master in zip(block.slots, masters, strict=True):
        part = slice(slot.offset, slot.offset + slot.numel)
        torch.sub(master.detach().flatten(), start[part], out=delta[part])
    return delta


def _move_up(parameters: list[torch.Tensor], masters: list[torch.Tensor]) -> None:
    """Add the parameters' gradients to their masters', in float32."""
    for parameter, master in zip(parameters, masters, strict=True):
        if master is parameter or parameter.grad is None:
            continue
        gradient = parameter.grad.float()
        parameter.grad = None
        if master.grad is None:
            master.grad = gradient
        else:
            master.grad += gradient


def _copy_down(masters: list[torch.Tensor], parameters: list[torch.Tensor]) -> None:
    """Round the masters to their parameters' dtype, into the model."""
    with torch.no_grad():
        for master, parameter in zip(masters, parameters, strict=True):
            if master is not parameter:
                parameter.copy_(master)


def _clip(masters: list[torch.Tensor], limit: float) -> torch.Tensor:
    """Scale the gradients down to a norm of at most `limit` (0: leave them); returns the norm before."""
    gradients = [master.grad for master in masters if master.grad is not None]
    if not gradients:
        return torch.zeros((), device=masters[0].device)
    norm = torch.nn.utils.get_total_norm(gradients)
    if limit:
        torch.nn.utils.clip_grads_with_norm_(masters, limit, norm)
    return norm


def _check_finite(
    block: Block, losses: torch.Tensor, norms: torch.Tensor, deltas: Iterable[torch.Tensor], lr: float
) -> None:
    """Raise Diverged at the first step whose loss or gradient is not finite, or where a delta is not."""
    advice = f"lower solver.lr (this round's rate was {lr:g}), or set solver.clip to a smaller norm"
    for step, (loss, norm) in enumerate(zip(losses.tolist(), norms.tolist(), strict=True)):
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise Diverged(
                f"block {block.index} ({block.name}) diverged in step {step} of {len(losses)}: "
                f"the loss, summed over tokens, is {loss:g}, the gradient's norm {norm:g}; {advice}"
            )
    # One pass without a vector of its own. Where only the squares overflow, the block has moved by more than 1e19.
    if not all(math.isfinite(torch.linalg.vector_norm(delta).item()) for delta in deltas):
        raise Diverged(
            f"block {block.index} ({block.name}) diverged in step {len(losses) - 1} of {len(losses)}: "
            f"its loss and gradient were finite, the values after it are not; {advice}"
        )
