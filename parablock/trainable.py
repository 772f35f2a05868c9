"""What a mode trains of a model: its own parameters, or adapters that are put beside them, and the blocks of it.

Broker, workers and export make it of the base model by themselves, each to the last bit alike. An adapter (LoRA, Hu
et al., arXiv 2106.09685) adds (alpha / rank) · B A x to what a linear layer computes; A begins random, B at zero.
Federated averaging of both is FedIT (Zhang et al., arXiv 2305.05644); with A left as it began, so that the mean of the
products is the product with the mean, FFA-LoRA (Sun et al., arXiv 2403.12313). Adapters are peft's, an extra. In lisa
(Pan et al., arXiv 2403.17919) what is in no layer is the first block, and `parablock.schedule` draws the others.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.pytorch_utils import Conv1D

from parablock.blocks import PartitionError, partition

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from parablock.config import Config
    from parablock.manifest import Manifest


def prepare(model: PreTrainedModel, config: Config) -> Manifest:
    """Put in what the mode needs, let only what it trains require gradients, and partition that.

    Raises PartitionError where the settings do not fit the model, or peft is needed and not there.
    """
    if config.adapters:
        _add_adapters(model, config)
    return cut(model, config)


def cut(model: PreTrainedModel, config: Config) -> Manifest:
    """The partition of what a `prepare`d model trains. Raises PartitionError."""
    return partition(model, config.block_settings, ends_together=config.mode == "lisa")


def merge(model: PreTrainedModel) -> None:
    """Add adapters to the weights that they stand beside, and take them out; without any nothing happens.

    Best in float32: less would round the sum.
    """
    for name, module in list(model.named_modules()):
        if hasattr(module, "lora_A"):
            adapter: Any = module
            adapter.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, adapter.get_base_layer())


def _add_adapters(model: PreTrainedModel, config: Config) -> None:
    peft = _peft()
    settings = config.lora
    targets: str | list[str] = "all-linear"
    if settings.targets != targets:
        targets = _checked(model, [name.strip() for name in settings.targets.split(",")])
    model.requires_grad_(False)
    adapters = peft.LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=targets)
    with warnings.catch_warnings():
        # It says what it does about GPT-2's layers, whose weights lie the other way, and about stacked experts.
        warnings.filterwarnings("ignore", module="peft")
        try:
            peft.inject_adapter_in_model(adapters, model)
        except ValueError as error:
            told = str(error).strip().partition("\n")[0]
            raise PartitionError(f"peft cannot put adapters at lora.targets = {settings.targets}: {told}") from error
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()  # the base model may be stored in less
            parameter.requires_grad_(config.mode == "lora" or ".lora_B." in name)
            if ".lora_A." in name:
                _begin(parameter, f"{config.seed} {name}")


def _checked(model: PreTrainedModel, targets: list[str]) -> list[str]:
    """`targets`, each of which is the ending of some linear layer's name, and of none whose weights others share."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D))}
    tied = [name for name, module in linear.items() if module.weight is model.get_input_embeddings().weight]
    there = dict.fromkeys(name.rpartition(".")[2] for name in linear if name not in tied)
    for target in targets:
        at = [name for name in linear if f".{name}".endswith(f".{target}")]
        if not at:
            raise PartitionError(
                f"lora.targets has {target!r}, with which the name of no linear layer ends; there are "
                f"{', '.join(there)}, or write all-linear alone"
            )
        if shared := [name for name in at if name in tied]:
            raise PartitionError(
                f"lora.targets has {target!r}: the weights of {shared[0]} are the embeddings' too, so that an adapter "
                f"could not become part of them; choose of {', '.join(there)}"
            )
    return targets


def _begin(parameter: nn.Parameter, seed: str) -> None:
    """Uniform within ±1/√(inputs), as torch begins a linear layer; the same with every version of torch."""
    entropy = int.from_bytes(hashlib.sha256(f"parablock adapter {seed}".encode()).digest(), "little")
    bound = 1.0 / math.sqrt(parameter.shape[1])
    values = np.random.Generator(np.random.PCG64(entropy)).uniform(-bound, bound, tuple(parameter.shape))
    parameter.data.copy_(torch.from_numpy(values.astype(np.float32)))


def _peft() -> Any:
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise PartitionError(
            "adapters (mode lora or ffa-lora) need peft, which is not installed here: pip install -c constraints.txt "
            "-e '.[lora]'"
        ) from error
