"""Where a run's model and tokenizer come from, and the digests by which broker and workers know them to be the same.

The built-in model, a local folder or a hub name, by way of transformers. Weights are read from safetensors only, so
that loading a model never unpickles anything, and code from a model repository runs only with permission. What is
trained of the model, and on which device, is not decided here.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub.utils.tqdm import disable_progress_bars
from safetensors import SafetensorError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from parablock import builtin

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_DTYPES: dict[str, torch.dtype | str] = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_LOADING = (OSError, ValueError, RuntimeError, ImportError, KeyError, SafetensorError)
"""What transformers raises for what is wrong with a model's files."""


class ModelError(ValueError):
    """The model cannot be used. The message names it, says what is missing, and what to do."""


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode on the CPU, and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load(name: str, *, dtype: str, trust_remote_code: bool = False, seed: int = 0) -> Loaded:
    """The causal LM called `name`: "builtin", a local folder, or a hub name.

    dtype: auto (as stored), float32, bfloat16 or float16. seed: of the built-in model's random weights.
    Raises ModelError where there is no such model, where it is not a complete causal LM with a tokenizer and
    safetensors weights, or where it brings code that may not run.
    """
    if name == "builtin":
        model: PreTrainedModel = builtin.model(seed)
        if dtype != "auto":
            model = model.to(_DTYPES[dtype])
        return Loaded(model.eval(), builtin.tokenizer())
    place = _place(name)
    model = _load_model(name, place, _DTYPES[dtype], trust_remote_code)
    tokenizer = _load_tokenizer(name, place, trust_remote_code)
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer.vocab_size > rows:
        raise ModelError(
            f"the tokenizer of {name} has {tokenizer.vocab_size} tokens, but the model embeds only {rows}; "
            "they do not belong together: take both from one model"
        )
    return Loaded(model.eval(), tokenizer)


def quiet() -> None:
    """Switch off the progress bars and notices of the model libraries, for a process that has its own view."""
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    disable_progress_bars()


def weights_digest(model: PreTrainedModel) -> str:
    """SHA-256, in hexadecimal, over names, dtypes, shapes and bytes of the parameters and persistent buffers.

    Sorted by name, a tied parameter once. Equal exactly where every worker would compute with the same model.
    """
    tensors = dict(model.named_parameters())
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tensors |= {name: value for name, value in model.state_dict().items() if name not in parameters}
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        # numpy knows no bfloat16; the bytes are the same through any other type.
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256, in hexadecimal, of what decides which tokens a text becomes: not of where it was loaded from."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: dict[str, Any] = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    if backend is not None:
        rules = json.loads(backend.to_str())
        for of_the_last_call in ("padding", "truncation"):
            del rules[of_the_last_call]
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    tree = {"rules": rules, "special": special, "chat_template": tokenizer.chat_template}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _place(name: str) -> Path | None:
    """The folder called `name`, with a config and weights in it, or None where it can only be a hub name."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if folder.exists():
            raise ModelError(f"the model {name} is a file; give the folder that it lies in")
        if name.startswith(("/", ".", "~")) or name.count("/") > 1:
            raise ModelError(f"there is no model folder {name}; check the path (model = ...)")
        return None
    if not (folder / "config.json").is_file():
        raise ModelError(f"the model folder {name} has no config.json; give a folder that save_pretrained wrote")
    if not any(folder.glob("*.safetensors")):
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        found = "only pickled weights, which are never read" if pickled else "no weights"
        raise ModelError(f"the model folder {name} has {found}; expected *.safetensors, as save_pretrained writes them")
    return folder


def _load_model(name: str, place: Path | None, dtype: torch.dtype | str, trusted: bool) -> PreTrainedModel:
    where = place or name
    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=trusted)
    except _LOADING as error:
        raise _refusal(name, place, error) from error
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in (
        getattr(config, "auto_map", None) or {}
    )
    if not causal or getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name} is not a causal language model (its type is {config.model_type!r}); "
            "choose a decoder-only model, as Llama, Qwen or GPT-2"
        )
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            where,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trusted,
            output_loading_info=True,
        )
    except _LOADING as error:
        raise _refusal(name, place, error) from error
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"the weights of {name} are incomplete: {len(missing)} parameters are missing from the checkpoint "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}) and would be random; "
            "use a checkpoint of the whole causal LM"
        )
    if unused := len(report["unexpected_keys"]):
        log.warning("%s: %d tensors of the checkpoint have no place in the model and are not used", name, unused)
    return model


def _load_tokenizer(name: str, place: Path | None, trusted: bool) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(place or name, trust_remote_code=trusted)
    except _LOADING as error:
        if place is None or "trust_remote_code" in str(error):
            raise _refusal(name, place, error) from error
        raise ModelError(
            f"the model folder {name} has no tokenizer that can be loaded ({_first_line(error)}); save the model's "
            "tokenizer into the same folder (tokenizer.save_pretrained)"
        ) from error


def _refusal(name: str, place: Path | None, error: Exception) -> ModelError:
    """What to tell the user of `error`, which transformers raised."""
    if "trust_remote_code" in str(error):
        return ModelError(
            f"the model {name} brings code of its own, which is not run without permission; if you trust its authors, "
            "allow it where the model is loaded (--trust-remote-code, or trust_remote_code = true)"
        )
    if place is None and isinstance(error, OSError):
        return ModelError(
            f"{name} is neither a folder on this machine nor a model that can be had from the hub: "
            f"{_first_line(error)} Check the name and the network, or give a local folder (model = ...)"
        )
    return ModelError(f"the model {name} cannot be loaded: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    """The first line of an error's message; transformers' own go on for pages."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
