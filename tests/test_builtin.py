"""The built-in model and its byte-level tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from parablock import builtin

if TYPE_CHECKING:
    from pathlib import Path

TOKENIZER = builtin.tokenizer()


@given(st.text())
def test_any_text_is_its_utf8_bytes_and_comes_back(text: str) -> None:
    ids = TOKENIZER(text)["input_ids"]
    assert ids == list(text.encode())
    assert TOKENIZER.decode(ids) == text


def test_a_special_token_spelled_out_in_a_text_is_only_text() -> None:
    text = f"one {builtin.EOS} two"
    ids = TOKENIZER(text)["input_ids"]
    assert TOKENIZER.eos_token_id not in ids
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == text


def test_the_special_tokens_have_the_ids_that_the_model_knows() -> None:
    config = builtin.model(0).config
    ids = (TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id)
    assert ids == (256, 257, 258) == (config.pad_token_id, config.bos_token_id, config.eos_token_id)
    assert len(TOKENIZER) == config.vocab_size == 259


def test_the_tokenizer_survives_a_folder(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = f"héllo \x00\n  <|eos|> {builtin.PAD} 漢字 , don 't"
    assert loaded(text)["input_ids"] == list(text.encode())
    assert loaded.decode(list(text.encode()), skip_special_tokens=True) == text
    assert (loaded.pad_token_id, loaded.eos_token_id) == (256, 258)


def test_the_seed_alone_decides_the_weights() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, again, other = builtin.model(1), builtin.model(1), builtin.model(2)
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, value in first.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, again.state_dict()[name]), name
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_no_weight_is_tied_and_the_model_is_tiny() -> None:
    model = builtin.model(0)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert 200_000 < sum(value.numel() for value in model.parameters()) < 300_000
