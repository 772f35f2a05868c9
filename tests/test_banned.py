"""What must not be in the code, because it runs what is data: every file is read, and planted lines are found.

By syntax trees, so that a comment or a docstring may name what is banned. What may be where is listed here, with why.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("parablock", "broker", "workers", "bench", "tests")

MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle"}
"""Whose loading runs what is loaded."""

BUILTINS = {"eval", "exec", "compile", "__import__"}

METHODS = {
    "recv_pyobj": "pyzmq unpickles",
    "send_pyobj": "pyzmq pickles",
    "recv_serialized": "it runs a function on frames of any length",
    "read_pickle": "pandas unpickles",
    "to_pickle": "pandas pickles",
    "unsafe_load": "yaml makes objects",
    "full_load": "yaml makes objects",
    "popen": "a shell",
    "system": "a shell",
    "getoutput": "a shell",
    "getstatusoutput": "a shell",
}

DOTTED = {("torch", "load"): "it unpickles", ("torch", "save"): "it pickles", ("np", "load"): "", ("numpy", "load"): ""}

ALLOWED = {
    ("workers/task_files.py", "yaml.load"): "with a Loader of ours that is a SafeLoader",
    ("tests/test_models.py", "torch.save"): "a model in that form is to be refused",
}


def found(text: str) -> Iterator[str]:
    """What is banned in a file, each by its name."""
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Import(names):
                yield from (name.name for name in names if name.name.split(".")[0] in MODULES)
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in MODULES:
                yield module
            case ast.ImportFrom(module="torch", names=names):
                yield from (f"torch.{name.name}" for name in names if name.name in ("load", "save"))
            case ast.ImportFrom(module="os" | "subprocess", names=names):
                yield from (name.name for name in names if name.name in METHODS)
            case ast.Call(func=ast.Name(name)) if name in BUILTINS:
                yield name
            case ast.Attribute(value=ast.Name(owner), attr=name) if (owner, name) in DOTTED:
                yield f"{owner}.{name}"
            case ast.Attribute(value=ast.Name("yaml"), attr="load" | "load_all" as name):
                yield f"yaml.{name}"
            case ast.Attribute(value=ast.Name("platform"), attr="system"):
                pass  # which system this is
            case ast.Attribute(attr=name) if name in METHODS:
                yield name
            case ast.keyword(arg="shell" as name, value=ast.Constant(value)) if value:
                yield f"{name}={value}"
            case ast.keyword(arg="shell", value=value) if not isinstance(value, ast.Constant):
                yield "shell=..."
            case ast.keyword(arg="allow_pickle", value=value) if not _is(value, False):
                yield "allow_pickle"
            case ast.keyword(arg="weights_only", value=value) if not _is(value, True):
                yield "weights_only"
            case ast.keyword(arg="trust_remote_code", value=value) if _is(value, True):
                yield "trust_remote_code=True"
            case ast.Dict(keys, values):
                for key, value in zip(keys, values, strict=True):
                    if isinstance(key, ast.Constant) and key.value == "trust_remote_code" and _is(value, True):
                        yield "trust_remote_code=True"
            case ast.arguments(args=args, kwonlyargs=more, defaults=defaults, kw_defaults=others):
                named = [
                    *zip(args[len(args) - len(defaults) :], defaults, strict=True),
                    *zip(more, others, strict=True),
                ]
                yield from (
                    "trust_remote_code=True"
                    for argument, value in named
                    if argument.arg == "trust_remote_code" and _is(value, True)
                )


def _is(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def test_nothing_that_is_banned_is_in_the_code() -> None:
    seen = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in sources()
        for name in found(path.read_text(encoding="utf-8"))
    }
    assert len(sources()) > 250, "they are all read"
    assert seen - ALLOWED.keys() == set()
    assert ALLOWED.keys() - seen == set(), "an exception that nothing needs any more"


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("import pickle", "pickle"),
        ("import pickle as p", "pickle"),
        ("from pickle import loads", "pickle"),
        ("import cloudpickle.cloudpickle", "cloudpickle.cloudpickle"),
        ("from marshal import loads", "marshal"),
        ("import shelve", "shelve"),
        ("x = torch.load(path)", "torch.load"),
        ("load = torch.load", "torch.load"),
        ("from torch import load", "torch.load"),
        ("torch.save(x, path)", "torch.save"),
        ("np.load(path)", "np.load"),
        ("f(path, allow_pickle=True)", "allow_pickle"),
        ("f(path, allow_pickle=flag)", "allow_pickle"),
        ("f(path, weights_only=False)", "weights_only"),
        ("socket.recv_pyobj()", "recv_pyobj"),
        ("self._socket.send_pyobj(x)", "send_pyobj"),
        ("eval('1')", "eval"),
        ("exec(text)", "exec"),
        ("compile(text, '', 'exec')", "compile"),
        ("__import__(name)", "__import__"),
        ("subprocess.run('ls', shell=True)", "shell=True"),
        ("subprocess.run('ls', shell=flag)", "shell=..."),
        ("os.system('ls')", "system"),
        ("from os import system", "system"),
        ("os.popen('ls')", "popen"),
        ("subprocess.getoutput('ls')", "getoutput"),
        ("yaml.load(text)", "yaml.load"),
        ("yaml.unsafe_load(text)", "unsafe_load"),
        ("AutoModel.from_pretrained(name, trust_remote_code=True)", "trust_remote_code=True"),
        ("settings = {'trust_remote_code': True}", "trust_remote_code=True"),
        ("def load(name, trust_remote_code=True): ...", "trust_remote_code=True"),
        ("def load(name, *, trust_remote_code=True): ...", "trust_remote_code=True"),
        ("pandas.read_pickle(path)", "read_pickle"),
    ],
)
def test_a_planted_line_is_found(line: str, name: str) -> None:
    assert list(found(f"def f():\n    x = 1\n    {line}\n")) == [name]


@pytest.mark.parametrize(
    "line",
    [
        '"pickle.loads and eval() are banned"  # torch.load',
        "subprocess.run(['ls'], shell=False)",
        "model.eval()",
        "re.compile('x')",
        "platform.system()",
        "f(path, weights_only=True, allow_pickle=False)",
        "f(name, trust_remote_code=trusted)",
        "json.loads(text)",
        "safetensors.numpy.load(data)",
    ],
)
def test_what_is_allowed_is_not_found(line: str) -> None:
    assert list(found(f"def f():\n    {line}\n")) == []
