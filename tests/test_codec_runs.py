"""A run with lossy codecs as real processes: as many bytes as the codecs promise, and workers that hold the same."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from parablock.codec import NAMES, codec_of
from tests.processes import SMALL, finished, run
from workers import evaluate_command

if TYPE_CHECKING:
    from pathlib import Path

    from parablock.codec import CodecName

pytestmark = pytest.mark.timeout(300)

ROUNDS = 6


def nbytes(name: CodecName, numel: int) -> int:
    full, rest = divmod(numel, SMALL["network.chunk_bytes"] // 4)  # type: ignore[operator]
    return full * codec_of(name).nbytes(16384) + codec_of(name).nbytes(rest)


def test_a_run_with_int8_up_and_int4_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = finished(tmp_path, **{"codec.up": "int8", "codec.down": "int4"})
    rows = folder.read_metrics()
    rounds = [row for row in rows if row["kind"] == "round"]
    manifest = folder.manifest()
    assert [row["round"] for row in rounds] == list(range(ROUNDS))
    for row in rounds:
        assert row["contributors"] == ["worker-0", "worker-1"]
        numel = manifest.blocks[row["block"]].numel
        assert row["bytes_up"] == 2 * nbytes("int8", numel)
        assert row["bytes_down"] == 2 * nbytes("int4", numel)
    before, after = (row["eval_loss"] for row in rows if row["kind"] == "evaluation")
    assert after < before
    # Each worker has scored its share of the rows, with the model that it holds; here one model scores them all, that
    # of the blocks which the broker has stored.
    assert evaluate_command.main([str(folder.path), "--set", "eval.generate=0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(after, abs=1e-6)


def test_a_codec_that_does_not_exist_is_refused_with_the_names_of_those_that_do(tmp_path: Path) -> None:
    done = run(tmp_path / "run", **{"codec.up": "int5"})
    assert done.returncode == 2
    assert f"codec.up must be one of {', '.join(NAMES)}; got 'int5'" in done.stderr
    assert not (tmp_path / "run").exists()
