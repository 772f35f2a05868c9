"""What the timing benchmarks train: a model whose blocks are alike, rows of one length, and the settings of a run.

`make` gives a model for the CPU, `of_shape` one of `bench.shapes`, with random weights either way.

Nobody looks at its loss. A timing needs rounds that cost the same: every block is one decoder layer; all rows
have the same number of tokens; and the vocabulary is so large that the frozen head, which every round pays,
outweighs the part of the backward pass that only lower blocks pay (what is left is a few per cent between
blocks, and the figures take whole sweeps besides).
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from parablock import builtin, config, models

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from bench.shapes import Shape

LAYERS = 4
HIDDEN = 256
VOCABULARY = 65536  # ids beyond the tokenizer's 259 never occur; they are weight for the head
ROW_TOKENS = 64
ROWS = 1024
BATCH = 4


@dataclass(frozen=True)
class Workload:
    """A model folder and a file of rows on disk."""

    model: Path
    data: Path
    blocks: int
    block_bytes: int
    """Of one block in float32, which is what travels."""
    model_bytes: int
    """Of all parameters in float32, those that are in no block included."""
    row_tokens: int = ROW_TOKENS
    """Of each row, all of which count."""
    dtype: str = "float32"
    """In which the model is trained."""


def make(folder: Path, *, hidden: int = HIDDEN, layers: int = LAYERS, vocabulary: int = VOCABULARY) -> Workload:
    """Write the model (about 80 MB, unless it is given another shape) and the rows into `folder`, which exists."""
    shape = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=256,
        bos_token_id=257,
        eos_token_id=258,
    )
    models.quiet()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(shape)
    return _write(folder, model, ROW_TOKENS, "float32")


def of_shape(folder: Path, shape: Shape, dtype: str) -> Workload:
    """The same with one of `bench.shapes`' models in `dtype`, and rows as long as its."""
    models.quiet()
    return _write(folder, shape.model(torch.device("cpu"), getattr(torch, dtype)), shape.tokens, dtype)


def _write(folder: Path, model: PreTrainedModel, row_tokens: int, dtype: str) -> Workload:
    model.save_pretrained(folder / "model")
    builtin.tokenizer().save_pretrained(folder / "model")
    layers = model.model.layers
    layer_numel = sum(parameter.numel() for parameter in layers[0].parameters())
    model_numel = sum(parameter.numel() for parameter in model.parameters())

    # Longer than what is kept, so that truncation makes all rows equal, whatever the tokenizer adds at the ends.
    rng = random.Random(0)
    rows = [{"text": "".join(rng.choices("abcdefgh ", k=2 * row_tokens))} for _ in range(ROWS)]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Workload(folder / "model", data, len(layers), 4 * layer_numel, 4 * model_numel, row_tokens, dtype)


def settings(workload: Workload, mode: str, rounds: int, clients: int, steps: int, bind: str) -> config.Config:
    """The settings of one run over `workload`, without evaluations."""
    return config.from_dict(
        {
            "model": str(workload.model),
            "mode": mode,
            "rounds": rounds,
            "dtype": workload.dtype,
            "blocks": {"embeddings": "freeze", "final_norm": "freeze", "head": "freeze"},
            "solver": {"steps": steps, "batch_size": BATCH},
            "round": {"clients": clients, "quorum": clients},
            "data": {"train": str(workload.data), "format": "text", "max_tokens": workload.row_tokens},
            "network": {"bind": bind},
        }
    )
