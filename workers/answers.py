"""The file of generated answers, by which an evaluation that was interrupted goes on where it stopped.

Its first line says of which model, rows and settings the answers are, and no others are ever added to it. Each line
after it is an answer, with its grades for whoever reads the file; when it is read back, only the text counts.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from typing import TYPE_CHECKING, Any, Self

from parablock import models
from parablock.append_file import AppendFile, cut_torn_line
from workers.evaluation import end_tokens

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch

    from parablock import sections
    from workers.grades import Answer
    from workers.rows import Row

_VERSION = 2
# Of a model's config: where it came from and by what it was written. Its dtypes are in the digest of its weights.
_NO_MATTER = {
    "_name_or_path", "_commit_hash", "_from_model_config", "transformers_version", "architectures", "dtype",
    "torch_dtype",
}  # fmt: skip
_MEANINGS = {
    "weights": "the model's weights",
    "model_config": "the model's config",
    "generation_config": "the model's generation config",
    "tokenizer": "the tokenizer",
    "end_tokens": "the tokens that end an answer",
    "max_new_tokens": "eval.max_new_tokens",
    "batch_size": "eval.batch_size",
    "device": "the device",
    "files": "the names of the data",
    "rows": "the rows that are asked (the data, settings of data, eval.task or eval.generate)",
}


class AnswerFileError(ValueError):
    """The file cannot take these answers. The message names it, says why, and what to do."""


def identity(
    loaded: models.Loaded, questions: Mapping[str, Sequence[Row]], settings: sections.Evaluation, device: torch.device
) -> dict[str, Any]:
    """All that decides the answers to `questions`, which are by the name of their data, as the file's first line."""
    model = loaded.model
    attention = getattr(model.config, "_attn_implementation", None)  # no part of its tree
    generation = None if model.generation_config is None else model.generation_config.to_dict()
    rows = hashlib.sha256()
    for name, asked in questions.items():
        for row in asked:
            said = [name, row.place, row.task, row.answer, row.tokens[: row.prompt].tolist()]
            rows.update(json.dumps(said).encode() + b"\n")
    return {
        "answers": _VERSION,
        "weights": models.weights_digest(model),
        "model_config": _digest([model.config.to_dict(), attention]),
        "generation_config": _digest(generation),
        "tokenizer": models.tokenizer_digest(loaded.tokenizer),
        "end_tokens": end_tokens(model, loaded.tokenizer),
        "max_new_tokens": settings.max_new_tokens,
        "batch_size": settings.batch_size,  # padding changes the last bits of logits, and with them an answer
        "device": device.type,  # and so does other arithmetic
        "files": list(questions),
        "rows": rows.hexdigest(),
    }


class AnswerFile:
    """Open for more answers. torn: bytes of a last line that was cut off, and has been dropped."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Go on with the answers in `path`, or begin it.

        Raises AnswerFileError, and leaves the file as it is, where it holds anything else than answers of `identity`,
        or where another evaluation has it open.
        """
        self.torn = 0
        self._path = path
        self._known: dict[str, dict[int, str]] = {}
        self._lock = _locked(path)
        try:
            self._file = self._opened(path, identity)
        except BaseException:
            os.close(self._lock)
            raise

    def _opened(self, path: Path, identity: Mapping[str, Any]) -> AppendFile:
        header = json.dumps(identity) + "\n"
        try:
            content = path.read_bytes()
            # What was begun and cut off within its first line holds nothing yet.
            fresh = content != header.encode() and header.encode().startswith(content)
            if fresh:
                self.torn = len(content)
            else:
                self._read(content, identity)
                self.torn = cut_torn_line(path)
            file = AppendFile(path, truncate=fresh)
            if fresh:
                file.append(header)
        except OSError as error:
            raise _unwritable(path, error) from error
        return file

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        os.close(self._lock)

    def __len__(self) -> int:
        """How many answers it held when it was opened."""
        return sum(map(len, self._known.values()))

    def known(self, name: str) -> Mapping[int, str]:
        """The answers that it held to the rows of the data called `name`, by place."""
        return self._known.get(name, {})

    def append(self, name: str, answers: Sequence[Answer]) -> None:
        """Add a batch. Raises AnswerFileError, and adds none of it, where the disk is full."""
        lines = [
            json.dumps(
                {
                    "data": name,
                    "place": answer.place,
                    "task": answer.task,
                    "answer": answer.text,
                    "right": answer.right,
                    "rouge_l": answer.rouge_l,
                },
                ensure_ascii=False,
            )
            for answer in answers
        ]
        # A name that is no UTF-8 has halves of surrogate pairs, which are written as JSON escapes them.
        text = "".join(line + "\n" for line in lines).encode(errors="backslashreplace").decode()
        try:
            self._file.append(text)
        except OSError as error:
            raise AnswerFileError(
                f"cannot write {self._path}: {error.strerror or error}; make room, and the same command goes on"
            ) from error

    def _read(self, content: bytes, identity: Mapping[str, Any]) -> None:
        first, *lines = content.split(b"\n")[:-1] or [content]
        header = _object(first)
        if header is None or "answers" not in header:
            raise AnswerFileError(f"{self._path} holds something else than answers; choose another --answers")
        if header["answers"] != _VERSION:
            raise AnswerFileError(f"{self._path} was written by another version; choose another --answers")
        other = [name for name in _MEANINGS if header.get(name) != identity[name]]
        if other:
            differences = "; ".join(
                f"{_MEANINGS[name]} ({_short(header.get(name))} there, {_short(identity[name])} here)" for name in other
            )
            raise AnswerFileError(
                f"{self._path} holds answers of another evaluation. What differs: {differences}. "
                "Choose another --answers, or delete the file to begin anew"
            )
        for number, line in enumerate(lines, start=2):
            match _object(line):
                case {"data": str(name), "place": int(place), "answer": str(text)}:
                    self._known.setdefault(name, {})[place] = text
                case _:
                    raise AnswerFileError(f"{self._path}, line {number} is no answer; delete that line")


def _locked(path: Path) -> int:
    """A descriptor of `path`, created if it is not there, locked until it is closed. Raises AnswerFileError."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise AnswerFileError(
                f"{path} is being written by another `parablock evaluate` that still runs; wait for its end, then the "
                "same command goes on with its answers, or choose another --answers"
            ) from None
        raise _unwritable(path, error) from error
    return descriptor


def _unwritable(path: Path, error: OSError) -> AnswerFileError:
    return AnswerFileError(f"cannot write {path}: {error.strerror or error}; choose another --answers")


def _digest(tree: Any) -> str:
    return hashlib.sha256(json.dumps(_what_matters(tree), sort_keys=True, default=str).encode()).hexdigest()


def _what_matters(tree: Any) -> Any:
    """Without `_NO_MATTER` at any depth; keys as text, as JSON has them: those of two types cannot be sorted."""
    if isinstance(tree, dict):
        return {str(name): _what_matters(value) for name, value in tree.items() if name not in _NO_MATTER}
    if isinstance(tree, list | tuple):
        return [_what_matters(value) for value in tree]
    return tree


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:  # also bytes that are not UTF-8
        return None
    return value if isinstance(value, dict) else None


def _short(value: Any) -> str:
    """A digest by its first characters, anything else as it is."""
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else f"{value}"
