"""Settings: one frozen tree, read from one TOML file, every key settable on the command line.

This module says which keys exist, their defaults, units, ranges and meanings, and turns text into a checked
`Config` or into a `ConfigError` that says what to do. It opens no model, no data and no socket. Keys marked
`local` stay on the machine that reads them: the broker never sends them (paths, and the right to run code).
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import tomllib
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from parablock.agreement import objection
from parablock.privacy_settings import Privacy
from parablock.robust_settings import Robust
from parablock.sections import (
    Blocks,
    Codecs,
    Data,
    Evaluation,
    Journal,
    Lora,
    Network,
    Partition,
    Pipeline,
    Rounds,
    Schedule,
    Server,
    Solver,
)
from parablock.secure_settings import Secure, missing
from parablock.setting import key as _key

Scalar = bool | int | float | str
Mode = Literal["parablock", "fedbcd", "fedcybgd", "fedavg", "lora", "ffa-lora", "lisa"]

_LONGEST_TEXT = 4096


class ConfigError(ValueError):
    """A setting is wrong. The message names the key, what was expected, what came, and what to do."""


@dataclass(frozen=True)
class Config:
    """Every setting of a run. Built by `load` and `from_dict`, which check it; never changed afterwards."""

    model: str = _key("builtin", "a local folder or hub name of a Hugging Face causal LM, or the built-in tiny Llama")
    mode: Mode = _key(
        "parablock",
        "blocks with overlapped exchange (parablock) or in synchronous rounds (fedbcd); baselines in synchronous "
        "rounds: blocks by one client a round, in turn (fedcybgd), the whole model (fedavg), adapters (lora), only "
        "their second matrices (ffa-lora), or embeddings, final norm and head at once with one drawn block of layers "
        "(lisa: an even round exchanges the former, the next one the latter)",
    )
    rounds: int = _key(40, "rounds of the run", low=1, high=10_000_000)
    seed: int = _key(0, "seed of everything random", low=0, high=2**31 - 1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _key(
        "float32", "dtype of the frozen parameters; the active block always has float32 masters; auto: as stored"
    )
    trust_remote_code: bool = _key(
        False, "run code that comes with a model's repository; only if you trust its authors", local=True
    )
    blocks: Blocks = field(default_factory=Blocks)
    lora: Lora = field(default_factory=Lora)
    schedule: Schedule = field(default_factory=Schedule)
    solver: Solver = field(default_factory=Solver)
    pipeline: Pipeline = field(default_factory=Pipeline)
    server: Server = field(default_factory=Server)
    round: Rounds = field(default_factory=Rounds)
    robust: Robust = field(default_factory=Robust)
    data: Data = field(default_factory=Data)
    partition: Partition = field(default_factory=Partition)
    eval: Evaluation = field(default_factory=Evaluation)
    codec: Codecs = field(default_factory=Codecs)
    privacy: Privacy = field(default_factory=Privacy)
    network: Network = field(default_factory=Network)
    secure: Secure = field(default_factory=Secure)
    journal: Journal = field(default_factory=Journal)

    @functools.cached_property
    def in_flight(self) -> int:
        """How many rounds a client may be ahead of the next commit: 0 in a synchronous mode, but for those rounds that
        are trained `together`."""
        return self.pipeline.max_in_flight if self.mode == "parablock" else self.together - 1

    @functools.cached_property
    def together(self) -> int:
        """Rounds whose blocks are trained at once, and exchanged one after the other: r to r + together − 1, for every
        multiple r of it."""
        return 2 if self.mode == "lisa" else 1

    @functools.cached_property
    def delay(self) -> int:
        """Rounds that may be on the way while the next ones train: 0 in every synchronous mode."""
        return self.in_flight + 1 - self.together

    @property
    def knows_blocks(self) -> bool:
        """Whether a round trains one of several blocks, and the next one another."""
        return self.mode in ("parablock", "fedbcd", "fedcybgd")

    @property
    def adapters(self) -> bool:
        """Whether adapters are trained, and nothing of the model itself."""
        return self.mode in ("lora", "ffa-lora")

    @property
    def block_settings(self) -> Blocks:
        """How what is trained is cut: as `blocks` says, or in one piece where the mode knows no blocks.

        What `blocks` freezes is not in the piece either; adapters are all in it. In lisa what is in no layer is apart.
        """
        if self.knows_blocks:
            return self.blocks
        if self.adapters:
            return Blocks(num_blocks=1)
        apart = self.mode == "lisa"

        def treated(part: Literal["join", "own", "freeze"]) -> Literal["join", "own", "freeze"]:
            return "freeze" if part == "freeze" else "own" if apart else "join"

        return dataclasses.replace(
            self.blocks if apart else Blocks(num_blocks=1),
            embeddings=treated(self.blocks.embeddings),
            final_norm=treated(self.blocks.final_norm),
            head=treated(self.blocks.head),
        )

    @functools.cached_property
    def quorum(self) -> int:
        """Fewest clients that must be there for a round to close, and contributions to it at its deadline."""
        drawn = self.drawn(self.round.clients)
        least = self.secure.needed(drawn) if self.secure.enabled else drawn // 2 + 1
        return self.round.quorum or max(least, self.robust.fewest)

    @functools.cached_property
    def measured(self) -> bool:
        """Whether all of every contribution must be seen before any of it is folded (`parablock.measurement`)."""
        return self.robust.measured or self.privacy.central

    @functools.cached_property
    def announced(self) -> bool:
        """Whether the broker says as the run goes on what a round trains and who; else it follows from the settings."""
        return self.schedule.order == "importance" or self.mode == "fedcybgd" or self.round.fraction < 1.0

    def sampled(self, clients: int) -> int:
        """How many of so many clients train in a round."""
        return min(max(self.drawn(clients), self.quorum), clients)

    def drawn(self, clients: int) -> int:
        """How many of so many clients `round.fraction` or the mode draws for a round, whatever the quorum."""
        return 1 if self.mode == "fedcybgd" else max(int(self.round.fraction * clients + 0.5), 1)


_REMOVED: dict[str, tuple[Scalar, str]] = {
    "solver.warmup_rounds": (0, "solver.warmup now, a share of the rounds: 8 of 64 rounds are 0.125"),
}
"""By the name of a setting that there is no longer: its default, and what to set now."""

MAY_CHANGE = frozenset(
    {
        "network.bind",
        "network.heartbeat_s",
        "network.timeout_s",
        "network.resend_s",
        "round.quorum",
        "round.deadline_s",
        "round.grace",
        "round.quorum_lost",
        "round.quorum_lost_s",
        "journal.keep",
        "data.train",
        "data.eval",
        "trust_remote_code",
    }
)
"""Keys that a resumed run may have otherwise than before: when to stop waiting, and where things are on a machine.
Every other one has a part in what the rounds before have made, or in what clients that are still there were told."""


@dataclass(frozen=True)
class Key:
    """One setting, as `parablock config --explain` shows it."""

    path: str
    default: Scalar
    kind: str
    unit: str
    meaning: str
    local: bool


def load(path: Path | str | None, overrides: typing.Iterable[str] = ()) -> Config:
    """Read `path` (TOML; None: all defaults), then apply `overrides` of the form KEY=VALUE in order.

    Raises ConfigError for an unreadable file, an unknown key, a wrong type, a number out of range, or settings
    that contradict each other.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read the config file {path}: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:  # also bytes that are not UTF-8, and numbers of 5,000 digits
            raise ConfigError(f"{path} is not valid TOML: {error}") from error
    for override in overrides:
        _apply(tree, override)
    return from_dict(tree)


def from_dict(tree: dict[str, Any]) -> Config:
    """A checked `Config` from nested dictionaries, as TOML and the wire give them. Raises ConfigError."""
    config: Config = _build(Config, tree, "")
    if (reason := objection(config)) is not None:
        raise ConfigError(reason)
    return config


def from_json(text: str) -> Config:
    """A checked `Config` from the words of a broker, which may be anything. Raises ConfigError."""
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"the broker's settings are no JSON that can be read ({str(error)[:200]}); install the same version of "
            "parablock on both sides, or ask the broker's owner"
        ) from error
    return from_dict(tree)


def check_installed(config: Config) -> None:
    """Raise ConfigError where these settings need a package that is not installed on this machine."""
    if config.secure.enabled and (told := missing()) is not None:
        raise ConfigError(told)


def to_dict(config: Config, *, shared_only: bool = False) -> dict[str, Any]:
    """Nested dictionaries of plain values; with `shared_only` without the keys that stay on their machine."""

    def walk(node: Any) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for item in dataclasses.fields(node):
            value = getattr(node, item.name)
            if dataclasses.is_dataclass(value):
                result[item.name] = walk(value)
            elif not (shared_only and item.metadata["local"]):
                result[item.name] = value
        return result

    return walk(config)


def check_resumed(before: dict[str, Any], config: Config) -> None:
    """Raise ConfigError where a run that was begun with the settings `before` (nested) cannot go on with these.

    A key that `before` lacks, because it is younger than the run, counts as at its default.
    """
    old, new = to_dict(from_dict(before)), to_dict(config)
    for key in keys():
        if key.path not in MAY_CHANGE and (was := _at(old, key.path)) != (is_now := _at(new, key.path)):
            raise ConfigError(
                f"{key.path} was {toml_value(was)} when the run began, and would be {toml_value(is_now)} now; leave it "
                f"as it was (what may change: {', '.join(sorted(MAY_CHANGE))})"
            )


def _at(tree: dict[str, Any], path: str) -> Scalar:
    for name in path.split("."):
        tree = tree[name]
    return typing.cast("Scalar", tree)


def to_toml(config: Config) -> str:
    """The config as a TOML file that `load` reads back to an equal tree."""
    tree = to_dict(config)
    lines = [f"{name} = {toml_value(value)}" for name, value in tree.items() if not isinstance(value, dict)]
    for name, table in tree.items():
        if isinstance(table, dict):
            lines += ["", f"[{name}]"]
            lines += [f"{key} = {toml_value(value)}" for key, value in table.items()]
    return "\n".join(lines) + "\n"


def keys() -> list[Key]:
    """Every setting, in the order of the tree."""
    found: list[Key] = []

    def walk(cls: type[Any], prefix: str) -> None:
        hints = typing.get_type_hints(cls)
        for item in dataclasses.fields(cls):
            if dataclasses.is_dataclass(hints[item.name]):
                walk(hints[item.name], f"{prefix}{item.name}.")
                continue
            meta = item.metadata
            found.append(
                Key(prefix + item.name, typing.cast("Scalar", item.default), _expected(item, hints[item.name]),
                    meta["unit"], meta["meaning"], meta["local"])
            )  # fmt: skip

    walk(Config, "")
    return found


def _apply(tree: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator or not path.strip():
        raise ConfigError(f"--set expects KEY=VALUE, got {override!r}; for example --set solver.lr=1e-4")
    *tables, name = path.strip().split(".")
    node = tree
    for table in tables:
        node = node.setdefault(table, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--set {override}: {table!r} is a value, not a table")
    node[name] = _parse(text.strip(), is_text=path.strip() in _text_keys())


def _parse(text: str, *, is_text: bool) -> Scalar:
    """A TOML value where the text is one, else the text itself: paths need no quotes on a command line.

    is_text: the key takes text, so that only quotes are read as TOML; a folder may be called 2024, true or 1#2.
    """
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    value = parsed.pop("value")
    if parsed or not isinstance(value, str if is_text else bool | int | float | str):
        return text
    return typing.cast("Scalar", value)


@functools.cache
def _text_keys() -> frozenset[str]:
    return frozenset(key.path for key in keys() if key.kind == "text")


@functools.cache
def _hints(cls: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _was_default(path: str, value: Any) -> bool:
    """Whether this is a setting of earlier versions, at their default: folders of runs hold all settings.

    Raises ConfigError where it is at another value.
    """
    if path not in _REMOVED:
        return False
    default, instead = _REMOVED[path]
    if value != default:
        raise ConfigError(
            f"{path} = {toml_value(value)}: it is {instead}; a run that was begun with {path} goes on with the "
            "version of parablock that began it"
        )
    return True


def _build(cls: type[Any], tree: Any, prefix: str) -> Any:
    if not isinstance(tree, dict):
        raise ConfigError(f"{prefix.rstrip('.') or 'a config'} is a table of settings, got {tree!r}")
    hints = _hints(cls)  # type: ignore[arg-type]  # of the class itself, which is hashable
    fields = {item.name: item for item in dataclasses.fields(cls)}
    for name, value in tree.items():
        if name not in fields and not _was_default(f"{prefix}{name}", value):
            raise ConfigError(_unknown(f"{prefix}{name}"))
    values = {}
    for name, value in tree.items():
        if name not in fields:
            continue
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            values[name] = _build(typing.cast("type[Any]", hint), value, f"{prefix}{name}.")
        else:
            values[name] = _check(f"{prefix}{name}", fields[name], hint, value)
    return cls(**values)


def _check(path: str, item: dataclasses.Field[Any], hint: Any, value: Any) -> Scalar:
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if not isinstance(value, str) or value not in choices:
            raise ConfigError(f"{path} must be one of {', '.join(choices)}; got {value!r}")
        return value
    given = value
    if hint is float and type(value) is int:
        value = float(value) if abs(value) < 2**1023 else math.inf
    if type(value) is not hint:
        raise _wrong(path, item, hint, given)
    if isinstance(value, str) and len(value) > _LONGEST_TEXT:
        raise ConfigError(f"{path} has {len(value)} characters; at most {_LONGEST_TEXT} are possible")
    if isinstance(value, str) and any("\ud800" <= char <= "\udfff" for char in value):
        raise ConfigError(f"{path} must be valid Unicode, got {value!r:.200}; rename the file or folder")
    if isinstance(value, int | float) and not isinstance(value, bool):
        meta = item.metadata
        too_low = (meta["low"] is not None and value < meta["low"]) or (
            meta["above"] is not None and value <= meta["above"]
        )
        too_high = meta["high"] is not None and value > meta["high"]
        if too_low or too_high or not math.isfinite(value):
            raise _wrong(path, item, hint, given)
    return typing.cast("Scalar", value)


def _wrong(path: str, item: dataclasses.Field[Any], hint: Any, value: Any) -> ConfigError:
    return ConfigError(f"{path} must be {_expected(item, hint)}; got {value!r:.200}")


def _expected(item: dataclasses.Field[Any], hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(typing.get_args(hint))
    meta = item.metadata
    name = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[hint]
    bounds = []
    if meta["above"] is not None:
        bounds.append(f"above {meta['above']:.10g}")
    if meta["low"] is not None:
        bounds.append(f"at least {meta['low']:.10g}")
    if meta["high"] is not None:
        bounds.append(f"at most {meta['high']:.10g}")
    return " ".join([name, ", ".join(bounds)]).strip()


def _unknown(path: str) -> str:
    known = [key.path for key in keys()] + sorted(
        name for name, hint in typing.get_type_hints(Config).items() if dataclasses.is_dataclass(hint)
    )
    same_leaf = [key for key in known if key.split(".")[-1] == path.split(".")[-1]]
    close = difflib.get_close_matches(path, same_leaf or known, n=1, cutoff=0.0 if same_leaf else 0.5)
    guess = (close or [""])[0]
    hint = f" Did you mean {guess}?" if guess else ""
    return f"there is no setting {path}.{hint} `parablock config --explain` lists them all"


def toml_value(value: Scalar) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t", "\r": "\\r"}
        body = "".join(escapes.get(char, char if char.isprintable() else f"\\U{ord(char):08x}") for char in value)
        return f'"{body}"'
    return repr(value)
