"""The trained model out of a run's folder: the base model with the run's blocks written into it.

`load_trained` gives it in memory, `parablock export` as a folder that transformers loads. The base model is
loaded as the workers loaded it, so that what no block replaced is what they computed with, and is then widened
to float32, so that nothing of the float32 blocks is lost.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from parablock import blocks, models, trainable
from parablock.run_folder import RunFolder, RunFolderError

if TYPE_CHECKING:
    from collections.abc import Sequence

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ExportError(ValueError):
    """The trained model cannot be put together or written. The message says what to do."""


def load_trained(folder: RunFolder, *, model: str | None = None) -> models.Loaded:
    """The model of a run in float32, with every stored block, adapters merged into it, and its tokenizer.

    model: where the base model is now, if not where the run's config says. Blocks that the run has not committed
    yet keep the base model's values. Raises ExportError where the base model is not the one that was trained,
    RunFolderError where the folder is damaged or holds no block.
    """
    config = folder.config()
    name = model if model is not None else config.model
    loaded = models.load(name, dtype=config.dtype, trust_remote_code=config.trust_remote_code, seed=config.seed)
    digest = trainable.prepare(loaded.model, config).digest
    weights = folder.weights_digest() if folder.has_manifest else ""
    # Another checkpoint of the same shapes would show in what no block replaces, and nobody would be told.
    if weights and weights != models.weights_digest(loaded.model):
        raise ExportError(
            f"the base model {name} is not the one that this run trained: its weights are others; "
            "put the original model back, or name it with --model"
        )
    loaded.model.float()
    # Widened parameters have slots of another dtype, so the partition that is written by is a second one.
    manifest = trainable.cut(loaded.model, config)
    found = False
    for stored in folder.read_blocks():
        if stored.label.manifest != digest:
            raise ExportError(
                f"the base model {name} is not the one that this run trained: its parameters' names, shapes or "
                f"dtypes have the digest {digest[:16]}…, block {stored.label.index} was trained with "
                f"{stored.label.manifest[:16]}…; put the original model back, or name it with --model"
            )
        block = manifest.blocks[stored.label.index]
        assert stored.values.shape == (block.numel,), "a block of this manifest has another length"
        blocks.write_block(loaded.model, block, torch.from_numpy(stored.values))
        found = found or stored.label.version > 0
    if not found:
        raise RunFolderError(f"{folder.path} holds no trained block; wait until the run has committed its first round")
    trainable.merge(loaded.model)
    return loaded


def export(folder: RunFolder, out: Path, *, dtype: str = "float32", model: str | None = None) -> None:
    """Write the trained model and its tokenizer to the folder `out`, parameters in `dtype`.

    All or nothing: `out` appears once everything is in it. Raises ExportError where `out` is in use or cannot
    be written, and what `load_trained` raises.
    """
    if out.exists() and not out.is_dir():
        raise ExportError(f"{out} is a file, not a folder; choose another --out")
    if out.is_dir() and any(out.iterdir()):
        raise ExportError(f"{out} is not empty; choose another --out, or delete it")
    loaded = load_trained(folder, model=model)
    loaded.model.to(DTYPES[dtype])
    partial = out.resolve().with_name(f".{out.resolve().name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of an export that was interrupted
        partial.mkdir(parents=True)
        loaded.model.save_pretrained(partial)
        loaded.tokenizer.save_pretrained(partial)
        os.replace(partial, out)
    except OSError as error:
        raise ExportError(f"cannot write {out}: {error}; choose another --out") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> int:
    """`parablock export RUN [--out DIR]`. Returns the exit code: 0, or 2 where the user's input is wrong."""
    parser = argparse.ArgumentParser(
        prog="parablock export",
        description="The trained model as a folder that AutoModelForCausalLM.from_pretrained loads.",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="the run's folder")
    parser.add_argument("--out", metavar="DIR", type=Path, help="default: RUN/model")
    parser.add_argument(
        "--dtype",
        choices=sorted(DTYPES),
        default="float32",
        help="of the saved parameters (default: float32)",
    )
    parser.add_argument("--model", help="the base model, if it is no longer where the run's config says")
    arguments = parser.parse_args(argv)
    models.quiet()
    try:
        folder = RunFolder.open(arguments.run)
        out = arguments.out if arguments.out is not None else folder.model_path
        export(folder, out, dtype=arguments.dtype, model=arguments.model)
    except ValueError as error:
        print(f"parablock export: {error}", file=sys.stderr)
        return 2
    print(f"model: {out} ({arguments.dtype})")
    return 0
