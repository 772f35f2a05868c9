"""The task files of lm-evaluation-harness in a folder: whether they hold only data, or bring code that would run.

A task file is YAML. It may name Python functions beside it (`!function utils.score`), ask for metrics that are code of
the hub, or let what a model wrote be run. None of that happens unless the user has agreed to run code of others; and
no file is taken for granted: all in the folder are looked through, with those that they include.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

from workers.sources import DataError

if TYPE_CHECKING:
    from collections.abc import Container, Iterator
    from pathlib import Path

_SETTINGS = {
    "unsafe_code": "lets answers be run as code",
    "hf_evaluate": "takes a metric from the hub, which is code",
    "use_prompt": "takes its prompt from another library or file",
}


class TaskFileError(DataError):
    """The task files cannot be used. The message names the file and says what to do."""


class _Tagged:
    """What has a tag of its own in the file, as `!function`."""

    def __init__(self, tag: str) -> None:
        self.tag = tag


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Makes nothing but data of a file."""


_Loader.add_multi_constructor("!", lambda _loader, suffix, _node: _Tagged(f"!{suffix}"))


def check(folder: Path, metrics: Container[str], *, trusted: bool) -> None:
    """Raises TaskFileError where `folder` holds no task file, one that is no YAML, or, unless `trusted`, one that
    brings code. metrics: the names of those that are the harness's own."""
    if not folder.is_dir():
        raise TaskFileError(f"--tasks-dir is a folder of task files (.yaml); there is no folder {folder}")
    paths = sorted(folder.rglob("*.yaml"))
    if not paths:
        raise TaskFileError(f"{folder} holds no task file: none ends in .yaml")
    seen: set[Path] = set()
    while paths:
        path = paths.pop().resolve()
        if path in seen:
            continue
        seen.add(path)
        tree = _parsed(path)
        includes = tree.get("include", [])
        paths += [path.parent / str(name) for name in (includes if isinstance(includes, list) else [includes])]
        reason = next(_code(tree, metrics, set()), None)
        if reason is not None and not trusted:
            raise TaskFileError(
                f"{path} {reason}; where you trust its authors, allow that with --set trust_remote_code=true"
            )


def _parsed(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_bytes(), _Loader)  # a SafeLoader, which knows more tags
    except OSError as error:
        raise TaskFileError(f"cannot read the task file {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        first = str(error).partition("\n")[0]
        raise TaskFileError(
            f"{path} is no YAML that a task file may hold: {first}; mend it, or move it away"
        ) from error
    if not isinstance(tree, dict):
        raise TaskFileError(f"{path} is no task file: it holds no settings; mend it, or move it away")
    return tree


def _code(node: Any, metrics: Container[str], seen: set[int]) -> Iterator[str]:
    """How a part of a file brings code, as the end of a sentence. seen: parts that need no second look; by its aliases
    a file can hold one part in many places, or in itself."""
    if isinstance(node, _Tagged):
        yield f"names code by {node.tag}"
    elif isinstance(node, dict | list) and id(node) not in seen:
        seen.add(id(node))
        parts = [*node, *node.values()] if isinstance(node, dict) else node
        if isinstance(node, dict):
            for name, meaning in _SETTINGS.items():
                if node.get(name):
                    yield f"{meaning} ({name})"
            if isinstance(metric := node.get("metric"), str) and metric not in metrics:
                yield f"has the metric {metric!r}, which is not the harness's own and would be fetched as code"
        for part in parts:
            yield from _code(part, metrics, seen)
