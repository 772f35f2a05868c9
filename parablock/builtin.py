"""The built-in model: a tiny Llama with seeded random weights, and a byte-level tokenizer. No download.

Only what the two are made of. Where a run gets its model from is `parablock.models`' business, and the problems that
it learns are `parablock.problems`'.
"""

from __future__ import annotations

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"

LAYERS = 4
HIDDEN = 64
INIT_STD = 0.08
"""Of the random weights. Four times the usual 0.02, which suits wide models: at this width it halves the rounds that
the built-in problems take."""


def tokenizer() -> PreTrainedTokenizerFast:
    """Ids 0 to 255 are the bytes of the UTF-8 text; 256, 257 and 258 are padding, begin and end.

    Lossless: `decode` gives back any text that was encoded, also one that spells a special token out.
    """
    # The byte-level alphabet of GPT-2 gives each byte a printable character; without merges a token is a byte.
    alphabet = _alphabet()
    backend = Tokenizer(models.BPE(vocab={char: byte for byte, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in (PAD, BOS, EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="right",
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def _alphabet() -> list[str]:
    """The printable character that stands for each byte, by byte: GPT-2's map, which `ByteLevel` uses as well."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in alphabet)
    alphabet |= {byte: chr(256 + place) for place, byte in enumerate(others)}
    return [alphabet[byte] for byte in range(256)]


def model(seed: int) -> LlamaForCausalLM:
    """A Llama in float32 with 0.25 million parameters and random weights that only `seed` decides.

    The global random state is left as it was.
    """
    config = LlamaConfig(
        vocab_size=256 + len((PAD, BOS, EOS)),
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=INIT_STD,
        tie_word_embeddings=False,
        pad_token_id=256,
        bos_token_id=257,
        eos_token_id=258,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
