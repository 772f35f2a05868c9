"""The partition of a model's trainable parameters into blocks, and a block's way out of the model and in.

Every trainable parameter is in exactly one block, a tied one under the first of its names. What a parameter
is (embedding, decoder layer, final norm, head) is found by the model's structure and by what runs before its
first layer, never by names: "layers.1" also begins "layers.10", and every family has names of its own. Which
block is trained when is the schedule's business, how is the solver's.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from parablock.manifest import Block, Manifest, Slot

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from parablock import sections

Part = Literal["embeddings", "layers", "final norm", "head"]


class PartitionError(ValueError):
    """The model cannot be partitioned as the settings ask. The message says what would work."""


@dataclass(frozen=True)
class _Parameter:
    """A trainable parameter and its place: `layer` counts from 0 where `part` is "layers"."""

    name: str
    value: nn.Parameter
    part: Part
    layer: int = 0


@dataclass
class _Group:
    """Parameters that become one block: a run of decoder layers with what joins it, or one of the ends."""

    layers: range = range(0)
    parameters: list[_Parameter] = field(default_factory=list)

    @property
    def name(self) -> str:
        parts = {parameter.part for parameter in self.parameters}
        layers = "layer" if len(self.layers) == 1 else "layers"
        if self.layers:
            layers += f" {self.layers[0]}" if len(self.layers) == 1 else f" {self.layers[0]}-{self.layers[-1]}"
        names = {"embeddings": "embeddings", "layers": layers, "final norm": "final norm", "head": "head"}
        return " + ".join(name for part, name in names.items() if part in parts)


def partition(model: PreTrainedModel, settings: sections.Blocks, *, ends_together: bool = False) -> Manifest:
    """The blocks of a causal LM, by depth: embeddings, decoder layers, final norm, head.

    ends_together: what the settings give a block of its own is all in one, the first.

    A parameter is trainable where it is floating-point and requires a gradient; what is not, and what the
    settings freeze, is in the manifest's `frozen`. What is neither in a decoder layer nor the input or output
    embedding counts to the embeddings where it runs before the first layer (positions, a projection of the
    embeddings), else to the final norm. A tied head belongs to the embeddings. What joins a layer counts for
    `max_block_mb`; a part that is a block of its own has the size that it has.

    The model's forward is run on one token, up to its first layer; the model is afterwards as it was before.
    Raises PartitionError for a model without decoder layers or with nothing to train, and for settings that
    its layers cannot meet.
    """
    treatment: dict[Part, str] = {
        "embeddings": settings.embeddings,
        "final norm": settings.final_norm,
        "head": settings.head,
    }
    trained = [item for item in _classified(model) if treatment.get(item.part) != "freeze"]
    if not trained:
        raise PartitionError(
            "the model has nothing to train: no floating-point parameter requires a gradient beyond what "
            "blocks.embeddings, blocks.final_norm and blocks.head freeze"
        )
    groups = _grouped(trained, len(decoder_layers(model)), settings, ends_together)
    names = {item.name for item in trained}
    frozen = tuple(name for name, _ in model.named_parameters() if name not in names)
    return Manifest(tuple(_block(index, group) for index, group in enumerate(groups)), frozen)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The model's stack of decoder layers: of its module lists the one that holds most parameters.

    A list inside a layer (experts) holds fewer than the stack around it. Raises PartitionError without one.
    """

    def size(layers: nn.ModuleList) -> tuple[int, int]:
        return sum(parameter.numel() for parameter in layers.parameters()), len(layers)

    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    best = max(stacks, key=size, default=None)
    if best is None or size(best)[0] == 0:
        raise PartitionError(
            f"{type(model).__name__} has no list of decoder layers (an nn.ModuleList with parameters), "
            "so it cannot be trained block by block; use a decoder-only causal LM"
        )
    return best


def read_block(model: nn.Module, block: Block) -> torch.Tensor:
    """The block's values as the model holds them: float32, on the model's device, of shape (block.numel,), a copy."""
    return torch.cat([model.get_parameter(slot.name).detach().flatten().float() for slot in block.slots])


def write_block(model: nn.Module, block: Block, values: torch.Tensor) -> None:
    """Set the block in the model, rounding to each parameter's dtype.

    values: float32 of shape (block.numel,), on any device; copied.
    """
    assert values.shape == (block.numel,), f"{block.name}: {block.numel} elements, got {tuple(values.shape)}"
    assert values.dtype == torch.float32, f"{block.name}: blocks are float32, got {values.dtype}"
    with torch.no_grad():
        for slot in block.slots:
            part = values[slot.offset : slot.offset + slot.numel]
            model.get_parameter(slot.name).copy_(part.view(slot.shape))


def split_evenly(count: int, runs: int) -> list[range]:
    """0..count-1 as `runs` contiguous ranges whose lengths differ by at most one, the longer ones first."""
    length, longer = divmod(count, runs)
    bounds = [index * length + min(index, longer) for index in range(runs + 1)]
    return [range(low, high) for low, high in itertools.pairwise(bounds)]


def split_by_size(sizes: list[int], limit: int) -> list[range]:
    """The indices of `sizes` as contiguous ranges, from the first on each as long as `limit` allows its sum.

    No single size may be over the limit.
    """
    assert max(sizes) <= limit, f"{max(sizes)} is over the limit of {limit}"
    runs: list[range] = []
    start, total = 0, 0
    for index, size in enumerate(sizes):
        if total + size > limit:
            runs.append(range(start, index))
            start, total = index, 0
        total += size
    return [*runs, range(start, len(sizes))]


def _classified(model: PreTrainedModel) -> list[_Parameter]:
    """Every trainable parameter, in the order of `model.named_parameters()`, which gives a tied one once."""
    stack = decoder_layers(model)
    layer_of: dict[int, int] = {}
    for index, layer in enumerate(stack):
        for value in layer.parameters():
            layer_of.setdefault(id(value), index)  # what layers share belongs to the first of them
    embeddings = _identities(model.get_input_embeddings())
    head = _identities(model.get_output_embeddings())
    early = _run_before(model, stack)

    def place(name: str, value: nn.Parameter) -> _Parameter:
        if id(value) in embeddings:
            return _Parameter(name, value, "embeddings")
        if id(value) in layer_of:
            return _Parameter(name, value, "layers", layer_of[id(value)])
        if id(value) in head:
            return _Parameter(name, value, "head")
        return _Parameter(name, value, "embeddings" if id(value) in early else "final norm")

    named = model.named_parameters()
    return [place(name, value) for name, value in named if value.requires_grad and value.is_floating_point()]


def _identities(module: nn.Module | None) -> set[int]:
    return set() if module is None else {id(value) for value in module.parameters()}


class _FirstLayerReached(Exception):
    """Ends the forward of `_run_before`; nothing went wrong."""


def _run_before(model: PreTrainedModel, stack: nn.ModuleList) -> set[int]:
    """Identities of the parameters of the modules that run before any layer of `stack` does.

    Where a module is registered would not tell: OPT registers its final norm before the layers.
    """
    seen: set[int] = set()

    def note(module: nn.Module, _arguments: Any) -> None:
        seen.update(id(value) for value in module.parameters(recurse=False))

    def stop(_module: nn.Module, _arguments: Any) -> None:
        raise _FirstLayerReached

    inside = {id(module) for module in stack.modules()}
    outside = [module for module in model.modules() if id(module) not in inside]
    handles = [module.register_forward_pre_hook(note) for module in outside]
    handles += [layer.register_forward_pre_hook(stop) for layer in stack]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()  # dropout would draw from the run's random numbers
    try:
        with torch.no_grad():
            token = torch.zeros((1, 1), dtype=torch.int64, device=next(model.parameters()).device)
            model(input_ids=token, use_cache=False)
    except _FirstLayerReached:
        return seen
    finally:
        for module, training in modes:
            module.training = training
        for handle in handles:
            handle.remove()
    raise PartitionError(
        f"{type(model).__name__} runs without its largest list of modules, so that is not its stack of "
        "decoder layers; use a decoder-only causal LM"
    )


def _grouped(parameters: list[_Parameter], layers: int, settings: sections.Blocks, ends_together: bool) -> list[_Group]:
    """The groups by depth, each with its parameters in the order in which they came."""
    ends: dict[Part, tuple[str, int]] = {
        "embeddings": (settings.embeddings, 0),
        "final norm": (settings.final_norm, layers - 1),
        "head": (settings.head, layers - 1),
    }
    joined = {part: layer for part, (treatment, layer) in ends.items() if treatment == "join"}
    nbytes = [0] * layers
    for parameter in parameters:
        if parameter.part == "layers" or parameter.part in joined:
            nbytes[joined.get(parameter.part, parameter.layer)] += 4 * parameter.value.numel()

    middle = [_Group(run) for run in _runs(nbytes, settings)]
    group_of = {layer: group for group in middle for layer in group.layers}
    alone = {part: _Group() for part in ends}
    for parameter in parameters:
        if parameter.part == "layers" or parameter.part in joined:
            group = group_of[joined.get(parameter.part, parameter.layer)]
        else:
            group = alone[parameter.part]
        group.parameters.append(parameter)
    by_depth = [alone["embeddings"], *middle, alone["final norm"], alone["head"]]
    if ends_together:
        outside = _Group(parameters=[each for group in alone.values() for each in group.parameters])
        if not outside.parameters or not any(group.parameters for group in middle):
            raise PartitionError(
                "mode = lisa trains embeddings, final norm and head together with a block of layers, and of the one or "
                "the other nothing is trainable; see blocks.embeddings, blocks.final_norm and blocks.head, or choose "
                "another mode"
            )
        by_depth = [outside, *middle]
    # Empty are the parts that are frozen or have joined a layer, a tied head, and layers that the user froze.
    return [group for group in by_depth if group.parameters]


def _runs(nbytes: list[int], settings: sections.Blocks) -> list[range]:
    """Runs of decoder layers as the settings ask. nbytes: each layer's in float32, with what joins it."""
    layers = len(nbytes)
    if not settings.max_block_mb:
        if settings.num_blocks > layers:
            raise PartitionError(
                f"blocks.num_blocks = {settings.num_blocks}, but the model has {layers} decoder layers; "
                f"set it to at most {layers}"
            )
        return split_evenly(layers, settings.num_blocks or layers)
    limit = round(settings.max_block_mb * 1e6)
    largest = max(nbytes)
    if largest > limit:
        raise PartitionError(
            f"blocks.max_block_mb = {settings.max_block_mb:g} is too small: decoder layer "
            f"{nbytes.index(largest)}, with what joins it, has {largest / 1e6:.3f} MB in float32. Set it to "
            f"at least {math.ceil(largest / 1000) / 1000:.3f}; where embeddings or head make it that large, "
            "set blocks.embeddings or blocks.head to own or freeze"
        )
    return split_by_size(nbytes, limit)


def _block(index: int, group: _Group) -> Block:
    slots: list[Slot] = []
    offset = 0
    for parameter in group.parameters:
        dtype = str(parameter.value.dtype).removeprefix("torch.")
        slots.append(Slot(parameter.name, tuple(parameter.value.shape), dtype, offset))
        offset += parameter.value.numel()
    return Block(index, group.name, tuple(slots))
