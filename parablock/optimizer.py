"""The local optimizer of a block: which of torch's, with which settings, and its state from one round to the next.

Steps, gradients and masters are the solver's part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from parablock.tensor_file import Tensors

if TYPE_CHECKING:
    from parablock import sections
    from parablock.manifest import Block
    from parablock.staging import Outgoing, Staging

_Kept = tuple["Outgoing", torch.Size] | torch.Tensor


def optimizer_of(
    block: Block, masters: list[torch.Tensor], settings: sections.Solver, lr: float
) -> torch.optim.Optimizer:
    """The optimizer that `settings` ask for, new, on the block's masters, which come in the order of its slots.

    adamw:     lr, weight_decay, beta1, beta2, eps.
    sgd:       lr, weight_decay (added to the gradient, before the momentum), momentum (without dampening).
    adafactor: lr, weight_decay. A step moves a tensor by at most min(lr, 1/√t) of its root mean square, or of 1e-3
               where that is less; the second moment's decay is 1 − t^−0.8, there is no first moment. As torch has it
               (after Shazeer and Stern, arXiv 1804.04235), which on CUDA waits for the device at every tensor.
    """
    groups = _groups(block, masters, settings.weight_decay)
    match settings.optimizer:
        case "adamw":
            betas = (settings.beta1, settings.beta2)
            return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=settings.eps, fused=True)
        case "sgd":
            # The fused one fails where a parameter has its first gradient later than others, as an expert may.
            return torch.optim.SGD(groups, lr=lr, momentum=settings.momentum, foreach=True)
        case "adafactor":
            return torch.optim.Adafactor(groups, lr=lr)
    raise AssertionError(f"no such optimizer: {settings.optimizer}")


def _groups(block: Block, masters: list[torch.Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """torch's parameter groups: what decays, and the rest."""
    decayed: list[torch.Tensor] = []
    rest: list[torch.Tensor] = []
    for slot, master in zip(block.slots, masters, strict=True):
        # Norms and biases set a scale and an origin: to pull those to zero changes what is computed without
        # making it any smoother. A mixture of experts has its biases stacked, so the name counts too.
        plain = len(slot.shape) <= 1 or slot.name.endswith("bias")
        (rest if plain else decayed).append(master)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class OptimizerStates:
    """What optimizers have learnt about blocks, while the blocks are not trained: on CUDA in pinned host memory, on the
    CPU the very tensors. Single numbers, as AdamW's count of steps, stay where they are."""

    def __init__(self, staging: Staging) -> None:
        self._staging = staging
        self._kept: dict[int, list[dict[str, _Kept]]] = {}  # by block: for each of its masters, the state by name

    def keep(self, block: int, optimizer: torch.optim.Optimizer, masters: list[torch.Tensor]) -> None:
        """Take the state of an optimizer that makes no more steps. Its copies begin here, and nobody waits for them."""
        self._kept[block] = [
            {name: self._out(value) for name, value in optimizer.state.get(master, {}).items()} for master in masters
        ]

    def written(self, block: int) -> Tensors | None:
        """What is kept of a block, as a file can hold it; None: nothing. Waits for its copies; the same memory as here,
        so that whoever writes it has to be done before the block is trained again."""
        if block not in self._kept:
            return None
        vectors = {}
        facts: list[dict[str, Any]] = []
        for place, state in enumerate(self._kept[block]):
            for name, kept in state.items():
                key = f"{place}.{name}"
                if isinstance(kept, torch.Tensor):
                    facts.append({"key": key, "number": kept.item(), "device": kept.device.type})
                else:
                    values, shape = kept
                    vectors[key] = values.wait()
                    facts.append({"key": key, "shape": list(shape)})
        return Tensors(vectors, {"masters": len(self._kept[block]), "state": facts})

    def restore(self, block: int, written: Tensors, device: torch.device) -> None:
        """Go on from what another process has kept. device: the masters'."""
        states: list[dict[str, _Kept]] = [{} for _ in range(written.facts["masters"])]
        for fact in written.facts["state"]:
            place, name = fact["key"].split(".", 1)
            if "number" in fact:
                where = torch.device("cpu") if fact["device"] == "cpu" else device
                states[int(place)][name] = torch.tensor(fact["number"], dtype=torch.float32, device=where)
            else:
                values = self._staging.out(torch.from_numpy(written.vectors[fact["key"]]).to(device))
                states[int(place)][name] = (values, torch.Size(fact["shape"]))
        self._kept[block] = states

    def give_back(self, block: int, optimizer: torch.optim.Optimizer, masters: list[torch.Tensor]) -> None:
        """Let a new optimizer, on masters in the same order, go on where the block's last one ended, if any did.

        The state is the optimizer's then, which changes it: it is gone from here until it is kept again.
        """
        for master, state in zip(masters, self._kept.pop(block, [{} for _ in masters]), strict=True):
            if state:
                optimizer.state[master] = {name: self._bring(kept) for name, kept in state.items()}

    def _out(self, value: torch.Tensor) -> _Kept:
        return value if value.ndim == 0 else (self._staging.out(value.flatten()), value.shape)

    def _bring(self, kept: _Kept) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        values, shape = kept
        return self._staging.bring(values.wait()).ready().view(shape)
