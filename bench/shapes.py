"""Models of a given shape with random weights, made on the device and in the dtype in which they are trained.

Nobody looks at their loss: only the shape decides what a step costs. No file, no float32 copy, nothing on the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from workers.rows import Row, Rows

ROWS = 64


@dataclass(frozen=True)
class Shape:
    """Of a Llama. tied: the output head is the embeddings. tokens: of a row, dtype: of the weights, unless another is
    asked for."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    tokens: int
    dtype: str = "float32"

    def model(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
        """With weights as transformers begins them, seeded; in evaluation mode. The global random state stays."""
        shape = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            tie_word_embeddings=self.tied,
            max_position_embeddings=max(512, self.tokens),
        )
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.device(device):
            torch.manual_seed(seed)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(shape, dtype=dtype)
        return model.eval()

    def rows(self, tokens: int, seed: int = 0) -> Rows:
        """Random rows of so many tokens, all of which count."""
        rng = np.random.default_rng(seed)
        counted = np.ones(tokens, dtype=np.bool_)
        rows = (
            Row(place, rng.integers(self.vocabulary, size=tokens, dtype=np.int32), counted, 0, "")
            for place in range(ROWS)
        )
        return Rows(tuple(rows), pad_id=0, read=ROWS, truncated=0, dropped={})


SHAPES = {
    "12-layers": Shape(12, 384, 1152, heads=4, kv_heads=4, vocabulary=259, tied=True, tokens=64),
    "3-layers": Shape(3, 128, 384, heads=4, kv_heads=4, vocabulary=259, tied=True, tokens=64),
    "llama-3.2-1b": Shape(
        16, 2048, 8192, heads=32, kv_heads=8, vocabulary=128256, tied=True, tokens=512, dtype="bfloat16"
    ),
    "llama-3-8b": Shape(
        32, 4096, 14336, heads=32, kv_heads=8, vocabulary=128256, tied=False, tokens=512, dtype="bfloat16"
    ),
}
"""By name. The first two are for the CPU: of the time of a step next to nothing is the head's."""
