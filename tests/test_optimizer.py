"""The local optimizer's state between rounds: what comes back is what went, and on the host it is the very tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from parablock import config, sections, tensor_file
from parablock.manifest import Block, Slot
from parablock.optimizer import OptimizerStates, optimizer_of
from parablock.staging import Staging
from tests.test_staging import Copies

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BLOCK = Block(
    3,
    "layer 3",
    (
        Slot("weight", (4, 3), "float32", 0),
        Slot("norm", (5,), "float32", 12),
        Slot("expert", (2, 2), "float32", 17),
    ),
)
SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd": {},
    "heavy ball": {"optimizer": "sgd", "momentum": 0.9},
    "adafactor": {},
}
STAGINGS: dict[str, Callable[[], Staging]] = {
    "host": lambda: Staging(None),
    "early": lambda: Staging(Copies(late=False)),
    "late": lambda: Staging(Copies(late=True)),
}


def settings_of(name: str) -> sections.Solver:
    return config.from_dict({"solver": {"optimizer": name, "weight_decay": 0.1, "lr": 0.1, **SETTINGS[name]}}).solver


def masters(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(slot.shape, generator=generator).requires_grad_() for slot in BLOCK.slots]


def step(optimizer: torch.optim.Optimizer, on: list[torch.Tensor], seed: int, *, idle: int = -1) -> None:
    """idle: which of the tensors has no gradient."""
    generator = torch.Generator().manual_seed(100 + seed)
    for number, master in enumerate(on):
        gradient = torch.randn(master.shape, generator=generator)
        master.grad = None if number == idle else gradient
    optimizer.step()


@pytest.mark.parametrize("staging", STAGINGS)
@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_kept_goes_on_as_if_it_had_never_been_away(name: str, staging: str) -> None:
    """Also of a tensor without a gradient in the first round. Other blocks have states of their own."""
    settings = settings_of(name)
    states = OptimizerStates(STAGINGS[staging]())
    steady, moving = masters(), masters()
    lasting = optimizer_of(BLOCK, steady, settings, 0.1)
    for round in range(3):
        moving = [master.detach().clone().requires_grad_() for master in moving]
        optimizer = optimizer_of(BLOCK, moving, settings, 0.1)
        states.give_back(3, optimizer, moving)
        for number in range(2):
            for one, on in ((lasting, steady), (optimizer, moving)):
                step(one, on, 2 * round + number, idle=2 if round == 0 else -1)
        states.keep(3, optimizer, moving)
        other = masters(seed=round)
        stranger = optimizer_of(BLOCK, other, settings, 0.1)
        step(stranger, other, seed=50 + round)
        states.keep(0, stranger, other)
    assert all(torch.equal(a, b) for a, b in zip(steady, moving, strict=True))


@pytest.mark.parametrize("staging", STAGINGS)
@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_kept_goes_on_in_another_process(name: str, staging: str, tmp_path: Path) -> None:
    """Through a file, after each round; also where a tensor has had no gradient yet."""
    settings, path = settings_of(name), tmp_path / "learnt.safetensors"
    steady, moving = masters(), masters()
    lasting = optimizer_of(BLOCK, steady, settings, 0.1)
    for round in range(3):
        states = OptimizerStates(STAGINGS[staging]())
        assert states.written(3) is None
        if path.exists():
            states.restore(3, tensor_file.read(path), torch.device("cpu"))
        moving = [master.detach().clone().requires_grad_() for master in moving]
        optimizer = optimizer_of(BLOCK, moving, settings, 0.1)
        states.give_back(3, optimizer, moving)
        for one, on in ((lasting, steady), (optimizer, moving)):
            step(one, on, round, idle=2 if round == 0 else -1)
        states.keep(3, optimizer, moving)
        written = states.written(3)
        assert written is not None
        tensor_file.write(path, written.vectors, written.facts)
    assert all(torch.equal(a, b) for a, b in zip(steady, moving, strict=True))


@pytest.mark.parametrize("name", ["adamw", "heavy ball", "adafactor"])
def test_on_the_host_the_very_tensors_are_kept(name: str) -> None:
    states = OptimizerStates(Staging(None))
    on = masters()
    first, second = (optimizer_of(BLOCK, on, settings_of(name), 0.1) for _ in range(2))
    step(first, on, 0)
    before = {(n, key): value.data_ptr() for n, m in enumerate(on) for key, value in first.state[m].items()}
    states.keep(3, first, on)
    states.give_back(3, second, on)
    after = {(n, key): value.data_ptr() for n, m in enumerate(on) for key, value in second.state[m].items()}
    assert before == after
    assert before


@pytest.mark.parametrize("name", SETTINGS)
def test_what_was_given_back_is_not_given_twice(name: str) -> None:
    states = OptimizerStates(Staging(None))
    on = masters()
    first, second, third = (optimizer_of(BLOCK, on, settings_of(name), 0.1) for _ in range(3))
    step(first, on, 0)
    states.keep(3, first, on)
    states.give_back(3, second, on)
    states.give_back(3, third, on)
    assert dict(third.state) == {}


def test_on_a_device_nobody_waits_for_what_goes_out() -> None:
    engine = Copies(late=True)
    states = OptimizerStates(Staging(engine))
    on = masters()
    optimizer = optimizer_of(BLOCK, on, settings_of("adamw"), 0.1)
    step(optimizer, on, 0)
    states.keep(3, optimizer, on)
    assert engine.waited == []
    assert engine.marks == 2 * len(on), "two moments of every tensor; the counts of steps stay where they are"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["adamw", "heavy ball", "adafactor"])
def test_on_cuda_the_state_goes_to_the_host_and_comes_back(name: str) -> None:
    device = torch.device("cuda")
    states = OptimizerStates(Staging.of(device))
    on = [master.detach().to(device).requires_grad_() for master in masters()]
    first, second = (optimizer_of(BLOCK, on, settings_of(name), 0.1) for _ in range(2))
    for master in on:
        master.grad = torch.ones_like(master)
    first.step()
    before = [{key: value.clone() for key, value in first.state[master].items()} for master in on]
    states.keep(3, first, on)
    first.state.clear()
    states.give_back(3, second, on)
    for master, state in zip(on, before, strict=True):
        assert all(torch.equal(second.state[master][key], value) for key, value in state.items())
        assert {v.device for v in second.state[master].values() if v.ndim} == {master.device}
