"""What a worker needs before it can join: the run's settings, its model, its rows, and the digests to show.

The settings come from the broker, so that workers cannot disagree; where the data lies, which device is used, and
whether code from a model's repository may run is decided here, on the worker's machine, and told to nobody.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from parablock import config as settings
from parablock import models, trainable
from parablock.messages import MAX_TASKS
from parablock.staging import Staging
from workers.disclosure import check_summed, told
from workers.evaluation import asked, check_tasks
from workers.releases import check_bound
from workers.rows import Rows, load_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from parablock.config import Config
    from parablock.manifest import Manifest

log = logging.getLogger("worker")


class DeviceError(ValueError):
    """The device that was asked for is not here."""


@dataclass(frozen=True)
class Local:
    """The worker's own choices. shard: this worker's part i of n of the rows. tell_tasks: the labels in the field that
    `eval.task` names may leave this machine. max_epsilon: no run that may cost more; inf: any. min_summed: none in
    which the broker sees a sum of fewer clients' deltas; 0: any."""

    name: str
    train: str
    held_out: str
    shard: tuple[int, int]
    model: str
    device: str
    threads: int
    trust_remote_code: bool
    tell_tasks: bool = False
    max_epsilon: float = math.inf
    min_summed: int = 0


@dataclass(frozen=True)
class Setup:
    """Everything loaded. base and tokenizer_digest are what the broker compares at the door. staging: the device's."""

    name: str
    config: Config
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    manifest: Manifest
    base: str
    tokenizer_digest: str
    rows: Rows
    held_out: Rows | None
    device: torch.device
    staging: Staging


def prepare(terms: str, local: Local) -> Setup:
    """Load by the broker's `terms` (settings as JSON). Raises ConfigError, ModelError, DataError, PartitionError or
    DeviceError, each of which says what to do."""
    config = settings.from_json(terms)
    settings.check_installed(config)
    if math.isfinite(local.max_epsilon):
        check_bound(config, local.max_epsilon)
    if local.min_summed:
        check_summed(config, local.min_summed)
    log.info("%s", told(config))
    device = _device(local.device)
    loaded = models.load(
        local.model or config.model, dtype=config.dtype, trust_remote_code=local.trust_remote_code, seed=config.seed
    )
    manifest = trainable.prepare(loaded.model, config)
    load = partial(load_rows, settings=config.data, tokenizer=loaded.tokenizer, seed=config.seed, shard=local.shard)
    rows = load(local.train, held_out=False, partition=config.partition)
    log.info("training rows: %s", rows.summary())
    held_out = None
    if local.held_out:
        limit = max(config.eval.rows, config.eval.generate) if config.eval.rows else 0
        # The broker names the field; what stands in it is text of rows, and goes nowhere unless this worker agrees.
        task = config.eval.task if local.tell_tasks else ""
        held_out = load(local.held_out, held_out=True, limit=limit, task=task)
        check_tasks(held_out, task, MAX_TASKS)
        log.info("held-out rows: %s", held_out.summary())
        if config.eval.generate and held_out and not asked(held_out, config.eval, free_form=False):
            log.info(
                "eval.generate = %d, and none of these rows is answered during the run: no answer among them ends in "
                "`#### N`; `parablock evaluate` grades any",
                config.eval.generate,
            )
        if config.eval.task and not task:
            log.info(
                "the run asks for scores by the field %r; its labels stay here (--tell-tasks tells them)",
                config.eval.task,
            )
    return Setup(
        name=local.name,
        config=config,
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        manifest=manifest,
        base=models.weights_digest(loaded.model),
        tokenizer_digest=models.tokenizer_digest(loaded.tokenizer),
        rows=rows,
        held_out=held_out,
        device=device,
        staging=Staging.of(device),
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"there is no device called {name!r}; expected cpu, cuda, cuda:N or auto") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices here; try --device cpu"
        )
    return device
