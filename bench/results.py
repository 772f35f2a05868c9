"""A benchmark's result on its way out: the machine that gave it, a table, a line of JSON, a file, a plot beside it."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from matplotlib.figure import Figure


class OutputError(ValueError):
    """The result cannot be written where it was asked for."""


def machine() -> dict[str, Any]:
    """What a figure depends on: processor, cores that may be used, GPU, operating system, versions, date (UTC)."""
    return {
        "cpu": _cpu(),
        "cores": cores(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **_gpu(),
        **{name: _version(name) for name in ("torch", "transformers", "peft", "pyzmq", "uvloop", "parablock")},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def cores() -> int:
    """Cores that this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_out(out: Path | None) -> None:
    """Raise OutputError now, rather than after minutes of work, where `out` cannot be written."""
    if out is None:
        return
    if out.suffix != ".json":
        raise OutputError(f"--out names the JSON file of the result, got {out}; end it in .json")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise OutputError(f"cannot write to the folder {out.parent}; make it first, or choose another --out")


def headline(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as it stands for all in front of a result: without its lists, which are in `rows`."""
    return {key: value for key, value in row.items() if not isinstance(value, list)}


def conditions(repeat: int, where: Path | None) -> dict[str, Any]:
    """What a result holds for: repetitions, the folder of the runs (None: the usual temporary one), the machine."""
    return {"repeat": repeat, "folder": str(where or tempfile.gettempdir()), "machine": machine()}


def table(
    columns: Mapping[str, Callable[[dict[str, Any]], str]], rows: Iterable[dict[str, Any]], caption: str
) -> Table:
    """The rows for people. columns: by heading, what a row shows there."""
    shown = Table(box=box.SIMPLE, padding=(0, 0), caption=caption)
    for heading in columns:
        shown.add_column(heading, justify="right")
    for row in rows:
        shown.add_row(*(text(row) for text in columns.values()))
    return shown


def emit(result: Mapping[str, Any], plot: Figure, out: Path | None) -> None:
    """Write OUT.json and OUT.png where asked, and print the result as one line of JSON, the last on stdout."""
    if out is not None:
        out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        plot.savefig(out.with_suffix(".png"), dpi=120)
    print(json.dumps(result, allow_nan=False), flush=True)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu() -> dict[str, Any]:
    """The first GPU that torch sees, if any, how many there are, and the versions of its driver and of CUDA."""
    import torch  # some benchmarks need none of it while they run

    if not torch.cuda.is_available():
        return {}
    found = torch.cuda.get_device_properties(0)
    version = Path("/proc/driver/nvidia/version")
    driver = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", version.read_text(encoding="utf-8")) if version.exists() else None
    return {
        "gpu": found.name,
        "gpus": torch.cuda.device_count(),
        "gpu_bytes": found.total_memory,
        "driver": driver[0] if driver else None,
        "cuda": torch.version.cuda,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
