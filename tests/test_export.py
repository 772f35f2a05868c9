"""The export: what the run trained is what transformers loads, or the user hears why not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from parablock import builtin, export, models
from parablock.block_file import Label
from parablock.blocks import partition, read_block
from parablock.config import Config, from_dict
from parablock.export import ExportError, load_trained
from parablock.run_folder import RunFolder, RunFolderError
from tests import families

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

SHAPES = {"blocks": {"num_blocks": 2, "embeddings": "own", "head": "join"}}


def build(family: str = "llama-tied", dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A tiny model of random weights that embeds the tokens of the built-in tokenizer."""
    return families.build(family, dtype, **{"vocab_size": 259, **changes})


def save_base(path: Path, family: str = "llama-tied", dtype: torch.dtype = torch.float32) -> Config:
    """A base model in a local folder, and the settings of a run on it."""
    build(family, dtype).save_pretrained(path)
    builtin.tokenizer().save_pretrained(path)
    name = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[dtype]
    return from_dict({"model": str(path), "dtype": name, **SHAPES})


def train(folder: RunFolder, base: PreTrainedModel, only: set[int] | None = None) -> dict[int, torch.Tensor]:
    """Store random values, which bfloat16 could not hold, for the blocks of a base model; returns what is stored."""
    manifest = partition(base, folder.config().blocks)
    generator = torch.Generator().manual_seed(1)
    stored = {}
    for block in manifest.blocks:
        if only is None or block.index in only:
            stored[block.index] = 0.1 * torch.randn(block.numel, generator=generator)
            folder.blocks.save(Label(block.index, 1, manifest.digest), {"block": stored[block.index].numpy()})
    return stored


def logits(model: PreTrainedModel) -> torch.Tensor:
    """Float32, of shape (rows, tokens, vocabulary), of a fixed batch."""
    batch = families.batch(seed=3)
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return found


@pytest.mark.parametrize("family", families.CONFIGS)
def test_what_was_trained_is_what_transformers_loads(family: str, tmp_path: Path) -> None:
    config = save_base(tmp_path / "base", family)
    folder = RunFolder.create(tmp_path / "run", config)
    stored = train(folder, build(family))
    assert export.main([str(folder.path)]) == 0

    loaded = AutoModelForCausalLM.from_pretrained(folder.model_path)
    assert loaded.dtype == torch.float32
    manifest = partition(loaded, config.blocks)
    assert len(manifest.blocks) == len(stored) == 3
    for block in manifest.blocks:
        assert torch.equal(read_block(loaded, block), stored[block.index])
    torch.testing.assert_close(logits(loaded), logits(load_trained(folder).model), rtol=0, atol=0)
    tokenizer = AutoTokenizer.from_pretrained(folder.model_path)
    assert tokenizer.decode(tokenizer("3 + 4 = ü")["input_ids"]) == "3 + 4 = ü"


def test_the_builtin_model_is_exported_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder.create(tmp_path / "run", from_dict({"seed": 5, **SHAPES}))
    stored = train(folder, builtin.model(5))
    assert export.main([str(folder.path), "--out", str(tmp_path / "there" / "model")]) == 0
    assert capsys.readouterr().out.endswith(f"model: {tmp_path / 'there' / 'model'} (float32)\n")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "there" / "model")
    blocks = partition(loaded, folder.config().blocks).blocks
    assert all(torch.equal(read_block(loaded, block), stored[block.index]) for block in blocks)
    assert not folder.model_path.exists()
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["model"]


def test_a_block_that_was_not_trained_yet_stays_the_bases(tmp_path: Path) -> None:
    base = build("llama")
    folder = RunFolder.create(tmp_path / "run", save_base(tmp_path / "base", "llama"))
    stored = train(folder, base, only={1})
    trained = load_trained(folder).model
    for block in partition(base, folder.config().blocks).blocks:
        expected = stored[1] if block.index == 1 else read_block(base, block)
        assert torch.equal(read_block(trained, block), expected)


def test_blocks_of_a_bfloat16_run_lose_nothing(tmp_path: Path) -> None:
    config = save_base(tmp_path / "base", "llama", torch.bfloat16)
    folder = RunFolder.create(tmp_path / "run", config)
    stored = train(folder, build("llama", torch.bfloat16))
    assert export.main([str(folder.path)]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(folder.model_path, dtype="auto")
    assert loaded.dtype == torch.float32
    for block in partition(loaded, config.blocks).blocks:
        assert torch.equal(read_block(loaded, block), stored[block.index])


def test_the_dtype_asked_for_is_saved_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder.create(tmp_path / "run", save_base(tmp_path / "base"))
    stored = train(folder, build())
    assert export.main([str(folder.path), "--dtype", "bfloat16"]) == 0
    assert "(bfloat16)" in capsys.readouterr().out
    loaded = AutoModelForCausalLM.from_pretrained(folder.model_path, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    for block in partition(loaded, folder.config().blocks).blocks:
        assert torch.equal(read_block(loaded, block), stored[block.index].bfloat16().float())


def test_a_base_that_moved_is_named_on_the_command_line(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", save_base(tmp_path / "base"))
    train(folder, build())
    (tmp_path / "base").rename(tmp_path / "moved")
    assert export.main([str(folder.path)]) == 2
    assert export.main([str(folder.path), "--model", str(tmp_path / "moved")]) == 0


def test_another_base_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder.create(tmp_path / "run", save_base(tmp_path / "base"))
    train(folder, build(hidden_size=32))
    with pytest.raises(ExportError, match=r"is not the one that this run trained.*name it with --model"):
        load_trained(folder)
    assert export.main([str(folder.path)]) == 2
    assert "parablock export: the base model" in capsys.readouterr().err
    assert not folder.model_path.exists()


def test_another_checkpoint_of_the_same_shapes_is_refused(tmp_path: Path) -> None:
    base = build()
    folder = RunFolder.create(tmp_path / "run", save_base(tmp_path / "base"))
    train(folder, base, only={1})
    folder.write_manifest(partition(base, folder.config().blocks), models.weights_digest(base))
    load_trained(folder)
    with torch.no_grad():
        base.get_input_embeddings().weight[0, 0] += 1
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(ExportError, match=r"its weights are others.*name it with --model"):
        load_trained(folder)


def test_a_run_without_a_block_has_nothing_to_export(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", save_base(tmp_path / "base"))
    with pytest.raises(RunFolderError, match="holds no trained block"):
        load_trained(folder)


def test_a_damaged_block_is_never_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder.create(tmp_path / "run", save_base(tmp_path / "base"))
    train(folder, build())
    path = folder.path / "blocks" / "0001-000001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert export.main([str(folder.path)]) == 2
    assert "0001-000001.safetensors is damaged" in capsys.readouterr().err
    assert not folder.model_path.exists()


def test_nothing_of_the_users_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder.create(tmp_path / "run", save_base(tmp_path / "base"))
    train(folder, build())
    folder.model_path.mkdir()
    (folder.model_path / "mine").write_text("mine")
    assert export.main([str(folder.path)]) == 2
    assert "is not empty; choose another --out, or delete it" in capsys.readouterr().err
    assert export.main([str(folder.path), "--out", str(folder.model_path / "mine")]) == 2
    assert "is a file, not a folder" in capsys.readouterr().err
    assert export.main([str(folder.path), "--out", str(folder.model_path / "mine" / "model")]) == 2
    assert "cannot write" in capsys.readouterr().err
    assert (folder.model_path / "mine").read_text() == "mine"
    (folder.model_path / "mine").unlink()
    assert export.main([str(folder.path)]) == 0  # an empty folder is fine


def test_what_is_no_run_ends_with_2_and_a_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export.main([str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err
