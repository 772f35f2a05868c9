"""Where models come from: what loads, what is refused and with which words, and the digests."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5EncoderModel

from parablock import builtin, models
from parablock.models import ModelError, tokenizer_digest, weights_digest

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> None:
    models.quiet()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete model folder."""
    path = tmp_path / "model"
    builtin.model(3).save_pretrained(path)
    builtin.tokenizer().save_pretrained(path)
    return path


def refusal(name: Path | str, *, dtype: str = "float32") -> str:
    with pytest.raises(ModelError) as caught:
        models.load(str(name), dtype=dtype)
    return str(caught.value)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_folder_loads_as_what_was_saved(folder: Path) -> None:
    loaded = models.load(str(folder), dtype="float32")
    assert weights_digest(loaded.model) == weights_digest(builtin.model(3))
    assert tokenizer_digest(loaded.tokenizer) == tokenizer_digest(builtin.tokenizer())
    assert not loaded.model.training


@pytest.mark.parametrize(
    ("dtype", "expected"), [("auto", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)]
)
def test_the_dtype_is_as_asked(folder: Path, dtype: str, expected: torch.dtype) -> None:
    for name in ("builtin", str(folder)):
        model = models.load(name, dtype=dtype).model
        assert {value.dtype for value in model.parameters()} == {expected}


def test_auto_keeps_the_dtype_of_the_file(folder: Path) -> None:
    builtin.model(3).bfloat16().save_pretrained(folder)
    assert models.load(str(folder), dtype="auto").model.dtype == torch.bfloat16


def test_the_built_in_model_goes_by_the_seed() -> None:
    first, second = (models.load("builtin", dtype="float32", seed=seed).model for seed in (1, 2))
    assert weights_digest(first) == weights_digest(builtin.model(1)) != weights_digest(second)


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    assert "has no config.json" in refusal(tmp_path)


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "has no weights; expected *.safetensors" in refusal(folder)


def test_pickled_weights_are_not_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(builtin.model(0).state_dict(), folder / "pytorch_model.bin")
    assert "only pickled weights, which are never read" in refusal(folder)


def test_weights_that_were_cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    assert f"the model {folder} cannot be loaded: " in refusal(folder)


def test_a_parameter_that_the_checkpoint_lacks(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    del weights["model.norm.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    message = refusal(folder)
    assert "1 parameters are missing from the checkpoint (model.norm.weight)" in message


def test_a_parameter_of_another_shape(folder: Path) -> None:
    edit_config(folder, intermediate_size=16)
    assert f"the model {folder} cannot be loaded: " in refusal(folder)


def test_a_model_that_is_no_causal_lm(folder: Path) -> None:
    T5EncoderModel(T5Config(vocab_size=50, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).save_pretrained(
        folder
    )
    assert "is not a causal language model (its type is 't5')" in refusal(folder)


def test_a_folder_without_a_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert "has no tokenizer that can be loaded" in refusal(folder)


def test_a_tokenizer_of_a_larger_model(folder: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=8, n_layer=1, n_head=1)).save_pretrained(folder)
    assert "has 256 tokens, but the model embeds only 100" in refusal(folder)


def test_code_of_the_repository_is_refused_and_not_run(folder: Path) -> None:
    ran = folder.parent / "ran"
    for name in ("configuration", "modeling"):
        (folder / f"{name}_x.py").write_text(f"import pathlib; pathlib.Path({str(ran)!r}).touch()\n")
    auto_map = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.X"}
    edit_config(folder, model_type="x", auto_map=auto_map)
    message = refusal(folder)
    assert "brings code of its own" in message
    assert "--trust-remote-code" in message
    assert not ran.exists()


@pytest.mark.parametrize("text", ["{", '{"model_type": "no-such-family"}'])
def test_a_config_that_means_nothing(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert f"the model {folder} cannot be loaded: " in refusal(folder)


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    assert "there is no model folder" in refusal(tmp_path / "nothing")
    assert "there is no model folder" in refusal("./nothing")
    (tmp_path / "file").touch()
    assert "is a file" in refusal(tmp_path / "file")


def test_a_hub_name_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = refusal("nobody/no-such-model")
    assert (
        "nobody/no-such-model is neither a folder on this machine nor a model that can be had from the hub" in message
    )
    assert "\n" not in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_digest_sees_every_bit(dtype: torch.dtype) -> None:
    model = builtin.model(0).to(dtype)
    before = weights_digest(model)
    with torch.no_grad():
        value = model.model.norm.weight
        value[7] = torch.nextafter(value[7], torch.tensor(9.0, dtype=dtype))
    assert weights_digest(model) != before


def test_the_weights_digest_sees_the_dtype_and_buffers() -> None:
    assert weights_digest(builtin.model(0)) != weights_digest(builtin.model(0).bfloat16())
    model = builtin.model(0)
    model.register_buffer("scale", torch.tensor(1.0))
    before = weights_digest(model)
    model.get_buffer("scale").fill_(2.0)
    assert weights_digest(model) != before


def test_the_weights_digest_is_the_same_for_tied_weights_loaded_again(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=8, n_layer=1, n_head=1))
    model.save_pretrained(tmp_path)
    builtin.tokenizer().save_pretrained(tmp_path)
    assert weights_digest(models.load(str(tmp_path), dtype="float32").model) == weights_digest(model)


def test_the_tokenizer_digest_is_of_the_rules_not_of_the_place(folder: Path) -> None:
    shutil.copytree(folder, folder.parent / "elsewhere")
    first, second = (models.load(str(path), dtype="auto").tokenizer for path in (folder, folder.parent / "elsewhere"))
    second(["some", "texts here"], padding=True, truncation=True, max_length=3)
    assert tokenizer_digest(first) == tokenizer_digest(second)
    second.chat_template = "{{ messages }}"
    assert tokenizer_digest(first) != tokenizer_digest(second)
    first.add_tokens(["<new>"])
    assert tokenizer_digest(first) != tokenizer_digest(builtin.tokenizer())
