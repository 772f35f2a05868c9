"""One tiny model of each supported family, built from its config, and random micro-batches for it.

Shared by the tests of what must work on any causal LM. Nothing is downloaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers

from parablock.batch import IGNORED, Batch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Two threads on a tensor this small only wait for each other: on busy cores 143 s instead of 8.
torch.set_num_threads(1)

VOCABULARY = 61
LAYERS = 4

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED: dict[str, Any] = {**_COMMON, "num_key_value_heads": 1}
_HEAD_DIM: dict[str, Any] = {**_GROUPED, "head_dim": 8}

CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {**_GROUPED, "tie_word_embeddings": False}),
    "llama-tied": (transformers.LlamaConfig, {**_GROUPED, "tie_word_embeddings": True}),
    "qwen2": (transformers.Qwen2Config, {**_GROUPED, "tie_word_embeddings": False}),
    "qwen3": (transformers.Qwen3Config, {**_HEAD_DIM, "tie_word_embeddings": True}),
    "mistral": (transformers.MistralConfig, {**_GROUPED, "sliding_window": 8}),
    "gemma": (transformers.GemmaConfig, _HEAD_DIM),
    "gemma2": (transformers.Gemma2Config, {**_HEAD_DIM, "sliding_window": 8}),
    "gpt2": (
        transformers.GPT2Config,
        {
            "vocab_size": VOCABULARY,
            "n_embd": 16,
            "n_layer": LAYERS,
            "n_head": 2,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt-neox": (transformers.GPTNeoXConfig, {**_COMMON, "tie_word_embeddings": False}),
    "phi": (transformers.PhiConfig, {**_COMMON, "tie_word_embeddings": False}),
    "opt": (
        transformers.OPTConfig,
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "ffn_dim": 24,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 8,  # as in OPT-350M: a projection before the layers and one after them
            "layerdrop": 0.5,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    ),
    "mixtral": (transformers.MixtralConfig, {**_GROUPED, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "qwen3-moe": (
        transformers.Qwen3MoeConfig,
        {**_HEAD_DIM, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
    ),
}
"""By name; GPT-2, OPT and Phi have dropout, OPT drops whole layers in training mode."""


def build(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A model of random weights, the same at every call."""
    make, settings = CONFIGS[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = make(**{**settings, **changes})
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def batch(seed: int, rows: int = 3, tokens: int = 12) -> Batch:
    """Random rows of unlike lengths, padded on the right, the first few tokens of each without loss."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
    lengths = torch.randint(tokens // 2, tokens + 1, (rows, 1), generator=generator)
    prompts = torch.randint(1, tokens // 2, (rows, 1), generator=generator)
    place = torch.arange(tokens).expand(rows, tokens)
    mask = place < lengths
    input_ids = input_ids.where(mask, 0)
    return Batch(input_ids, mask.long(), input_ids.where(mask & (place >= prompts), IGNORED))


def batches(steps: int, micro_batches: int = 1, seed: int = 0) -> list[list[Batch]]:
    """What `BlockSolver.train` takes: the micro-batches of each step."""
    return [[batch(seed + 100 * step + index) for index in range(micro_batches)] for step in range(steps)]
