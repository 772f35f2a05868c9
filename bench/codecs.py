"""What codecs cost in loss, and save in bytes: the quickstart's problem with each, at equal rounds, over several seeds.

    python -m bench.codecs --seeds 0,1,2 --out codecs.json
    python -m bench.codecs --quick

Each run is a broker and two workers as real processes. Compared are the final held-out losses, seed by seed, with the
float32 run of the same seed; the spread between float32's own seeds says what a difference means. Beside it the speed
of each codec on one thread, in bytes of float32 per second.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from bench import results
from bench.processes import ChildError, Children
from parablock import config
from parablock.codec import codec_of
from parablock.run_folder import METRICS, RunFolder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parablock.codec import CodecName

CASES = ("float32", "bfloat16", "int8", "int4", "int4-")
"""Of both directions; a minus: without error feedback."""

_PATIENCE_S = 120.0
_CHUNK = 1 << 18  # elements

_console = Console(stderr=True)


@dataclass(frozen=True)
class Trained:
    """One run. loss_by_round: of training, in nats per token. nbytes: up and down, all clients."""

    final_loss: float
    loss_by_round: list[float]
    nbytes: int


def train(case: str, seed: int, overrides: Sequence[str], folder: Path) -> Trained:
    """The quickstart's problem with a codec. Raises ChildError, ConfigError."""
    name = case.removesuffix("-")
    codec = [f"codec.up={name}", f"codec.down={name}", f"codec.error_feedback={str(case == name).lower()}"]
    folder.mkdir()
    with resources.as_file(resources.files("parablock") / "quickstart.toml") as path:
        settings = config.load(path, ["eval.generate=0", *overrides, f"seed={seed}", *codec])
    (folder / "config.toml").write_text(config.to_toml(settings), encoding="utf-8")
    run = folder / "run"

    def progress() -> int:
        return (run / METRICS).stat().st_size if (run / METRICS).exists() else 0

    with Children(folder) as children:
        command = [sys.executable, "-m", "parablock.cli", "run", str(folder / "config.toml"), "--out", str(run)]
        started = children.start("run", command, {})
        children.wait(started, progress, _PATIENCE_S)
    rows = RunFolder.open(run).read_metrics()
    rounds = [row for row in rows if row["kind"] == "round"]
    return Trained(
        final_loss=[row["eval_loss"] for row in rows if row["kind"] == "evaluation"][-1],
        loss_by_round=[row["loss"] for row in rounds],
        nbytes=sum(row["bytes_up"] + row["bytes_down"] for row in rounds),
    )


def speed(name: CodecName, seconds: float = 0.3) -> tuple[float, float]:
    """(encoding, decoding) of chunks of 1 MiB of float32 on this thread, in MB/s of float32."""
    codec, values = codec_of(name), np.random.default_rng(0).standard_normal(_CHUNK, np.float32) * np.float32(1e-4)
    payload = codec.encode(values)
    found = []
    out = np.empty_like(values)

    def encode() -> None:
        codec.encode(values)

    def decode() -> None:
        out[...] = codec.decode(payload, values.size)

    for act in (encode, decode):
        count, began = 0, time.perf_counter()
        while time.perf_counter() < began + seconds:
            act()
            count += 1
        found.append(count * values.nbytes / (time.perf_counter() - began) / 1e6)
    return found[0], found[1]


def row(case: str, trained: Sequence[Trained], baseline: Sequence[Trained]) -> dict[str, Any]:
    """A case against float32, seed by seed. gap_pct: of the mean final losses; above zero is worse."""
    losses = [each.final_loss for each in trained]
    reference = [each.final_loss for each in baseline]
    encode, decode = speed(codec_of(case.removesuffix("-")).name)  # type: ignore[arg-type]
    return {
        "codec": case.removesuffix("-"),
        "error_feedback": not case.endswith("-"),
        "final_loss": statistics.fmean(losses),
        "final_losses": losses,
        "spread": statistics.stdev(losses) if len(losses) > 1 else None,
        "gap_pct": 100 * (statistics.fmean(losses) / statistics.fmean(reference) - 1),
        "gap_pct_by_seed": [100 * (a / b - 1) for a, b in zip(losses, reference, strict=True)],
        "bytes": trained[0].nbytes,
        "bytes_ratio": trained[0].nbytes / baseline[0].nbytes,
        "encode_mb_s": encode,
        "decode_mb_s": decode,
        "loss_by_round": [statistics.fmean(each) for each in zip(*(t.loss_by_round for t in trained), strict=True)],
    }


def table(rows: Sequence[dict[str, Any]]) -> Table:
    shown = Table(box=box.SIMPLE, caption="final held-out loss: mean over seeds; gap: to float32, in per cent")
    for name in ("codec", "feedback", "final loss", "spread", "gap %", "bytes", "encode MB/s", "decode MB/s"):
        shown.add_column(name, justify="left" if name == "codec" else "right")
    for each in rows:
        shown.add_row(
            each["codec"],
            "yes" if each["error_feedback"] else "no",
            f"{each['final_loss']:.5f}",
            "" if each["spread"] is None else f"{each['spread']:.5f}",
            f"{each['gap_pct']:+.2f}",
            f"{each['bytes_ratio']:.3f}",
            f"{each['encode_mb_s']:.0f}",
            f"{each['decode_mb_s']:.0f}",
        )
    return shown


def plot(rows: Sequence[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for each in rows:
        label = each["codec"] + ("" if each["error_feedback"] else " without feedback")
        axes.plot(range(1, len(each["loss_by_round"]) + 1), each["loss_by_round"], label=label, linewidth=1)
    axes.set(xlabel="round", ylabel="training loss (nats per token)", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Exit codes: 0; 1 where a run failed (the ends of the logs are shown); 2 for wrong input."""
    parser = argparse.ArgumentParser(prog="python -m bench.codecs", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="float32 and int4, one seed, eight rounds: within 60 s")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="keep the result here, a plot beside it")
    parser.add_argument("--seeds", default="0,1,2", help="seeds of the runs (default: 0,1,2)")
    parser.add_argument("--codecs", default=",".join(CASES), help=f"of {', '.join(CASES)}; float32 is always run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of every run")
    options = parser.parse_args(argv)
    try:
        results.check_out(options.out)
        seeds = [int(text) for text in ("0" if options.quick else options.seeds).split(",")]
        asked = ("float32", "int4") if options.quick else tuple(options.codecs.split(","))
        unknown = [case for case in asked if case not in CASES]
        if unknown:
            raise ValueError(f"--codecs takes {', '.join(CASES)}, separated by commas; got {', '.join(unknown)}")
        overrides = [*(["rounds=8"] if options.quick else []), *options.set]
        config.load(None, overrides)
    except ValueError as error:
        print(f"bench.codecs: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    cases = ["float32", *(case for case in asked if case != "float32")]
    trained: dict[str, list[Trained]] = {case: [] for case in cases}
    try:
        with tempfile.TemporaryDirectory(prefix="parablock-codecs-") as temporary:
            for seed in seeds:
                for case in cases:
                    _console.print(f"seed {seed}: {case}")
                    trained[case].append(train(case, seed, overrides, Path(temporary) / f"{case}-{seed}"))
                    _console.print(f"  final held-out loss {trained[case][-1].final_loss:.5f}")
    except KeyboardInterrupt:
        return 130
    except ChildError as error:
        print(f"bench.codecs failed: {error}", file=sys.stderr)
        return 1
    rows = [row(case, trained[case], trained["float32"]) for case in cases]
    _console.print(table(rows))
    result = {"bench": "codecs", "rows": rows, "seeds": seeds, "overrides": overrides, "machine": results.machine()}
    results.emit(result, plot(rows), options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
