"""Settings: one frozen tree, read from one TOML file, every key settable on the command line.

This module says which keys exist, their defaults, units, ranges and meanings, and turns text into a checked
`Config` or into a `ConfigError` that says what to do. It opens no model, no data and no socket. Keys marked
`local` stay on the machine that reads them: the broker never sends them (paths, and the right to run code).
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import tomllib
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from parablock.codec import GROUP, CodecName
from parablock.messages import MAX_IN_FLIGHT
from parablock.privacy_settings import Privacy
from parablock.privacy_settings import objection as privacy_objection
from parablock.robust_settings import Robust
from parablock.robust_settings import objection as robust_objection
from parablock.secure_settings import Secure, missing
from parablock.secure_settings import objection as secure_objection
from parablock.setting import key as _key

Scalar = bool | int | float | str
Mode = Literal["parablock", "fedbcd", "fedcybgd", "fedavg", "lora", "ffa-lora", "lisa"]

_LONGEST_TEXT = 4096


class ConfigError(ValueError):
    """A setting is wrong. The message names the key, what was expected, what came, and what to do."""


@dataclass(frozen=True)
class Blocks:
    """How the trainable parameters are partitioned."""

    num_blocks: int = _key(0, "decoder layers are grouped into this many blocks; 0: one layer a block", low=0)
    max_block_mb: float = _key(
        0.0,
        "instead of num_blocks: as many layers a block as stay under this size in float32; 0: off",
        unit="MB (1e6 bytes)",
        low=0,
    )
    embeddings: Literal["join", "own", "freeze"] = _key(
        "join", "input (and position) embeddings: with the first decoder block, a block of their own, or frozen"
    )
    final_norm: Literal["join", "own", "freeze"] = _key(
        "join", "the norm after the last layer: with the last decoder block, a block of its own, or frozen"
    )
    head: Literal["join", "own", "freeze"] = _key(
        "join", "output head where it is not tied to the embeddings: with the last block, its own, or frozen"
    )


@dataclass(frozen=True)
class Lora:
    """The adapters of the modes that train no parameter of the model itself (lora, ffa-lora)."""

    rank: int = _key(8, "rank of each adapter", low=1, high=4096)
    alpha: float = _key(16.0, "an adapter's output counts alpha / rank times", above=0)
    targets: str = _key(
        "all-linear",
        "linear layers with an adapter: all of the decoder's, or endings of their names, as q_proj,v_proj",
    )


@dataclass(frozen=True)
class Schedule:
    """Which block is trained in which round."""

    order: Literal["cyclic", "descending", "random", "importance"] = _key(
        "descending",
        "order of blocks in a sweep (lisa: its own): first to last, last to first, or a seeded permutation per sweep; "
        "importance: after the first sweep, blocks that moved more at their last visit come more often, each at least "
        "once in the time of two sweeps",
    )


@dataclass(frozen=True)
class Solver:
    """The local optimizer of one block."""

    steps: int = _key(8, "optimizer steps per round, K; the first rounds' where adaptive", low=1)
    adaptive: bool = _key(
        False, "each client takes as many steps as its exchange lasts (parablock only; not reproducible)"
    )
    min_steps: int = _key(1, "fewest steps per round (adaptive)", low=1)
    max_steps: int = _key(64, "most steps per round (adaptive)", low=1)
    batch_size: int = _key(4, "rows per micro-batch", low=1)
    accumulate: int = _key(1, "micro-batches per optimizer step", low=1)
    optimizer: Literal["adamw", "sgd", "adafactor"] = _key(
        "adamw", "what a step is: AdamW's, SGD's (with momentum, if set), or Adafactor's, which keeps next to nothing"
    )
    state: Literal["reset", "keep"] = _key(
        "reset",
        "what the optimizer has learnt of a block when its round ends: forgotten, or kept in host memory for its next "
        "one (float32 copies of every block that was trained: two for adamw, one for sgd with momentum)",
    )
    lr: float = _key(
        1e-4,
        "peak learning rate; sgd wants far more than adamw; adafactor moves a parameter by at most this share of its "
        "own root mean square, or of 0.001 where that is less",
        above=0,
    )
    lr_schedule: Literal["constant", "cosine", "linear"] = _key("cosine", "learning rate over rounds after the warm-up")
    lr_final: float = _key(
        0.0, "where the rate would be one round after the last, as a fraction of lr (cosine, linear)", low=0, high=1
    )
    warmup_rounds: int = _key(0, "rounds over which the learning rate rises linearly to lr", low=0)
    weight_decay: float = _key(
        0.0,
        "a step shrinks the weights by lr times this (sgd: as part of the gradient, so that momentum has it too); "
        "never applied to norms and biases",
        low=0,
    )
    beta1: float = _key(0.9, "decay of the first moment (adamw only)", low=0, high=0.999999)
    beta2: float = _key(0.999, "decay of the second moment (adamw only)", low=0, high=0.999999)
    eps: float = _key(1e-8, "term of the denominator (adamw only)", above=0)
    momentum: float = _key(0.0, "decay of the momentum buffer; 0: none (sgd only)", low=0, high=0.999999)
    clip: float = _key(1.0, "gradient norm of the block is clipped to this; 0: no clipping", low=0)
    gradient_checkpointing: bool = _key(False, "recompute activations in the backward pass to save memory")

    @property
    def step_bounds(self) -> tuple[int, int]:
        """Fewest and most optimizer steps that a client may take in a round."""
        return (self.min_steps, self.max_steps) if self.adaptive else (self.steps, self.steps)


@dataclass(frozen=True)
class Pipeline:
    """How communication hides behind computation (mode = "parablock")."""

    correction: Literal["shrink", "own", "stale"] = _key(
        "shrink",
        "what stands for a block until its mean lands: x + alpha*delta with alpha learnt per block, x + delta, or x",
    )
    land: Literal["boundary", "arrival"] = _key(
        "boundary",
        "a block lands when round t + max_in_flight ends (reproducible), or at the next step after it arrives",
    )
    max_in_flight: int = _key(
        1, "rounds whose blocks may be on the way while the next one trains", low=1, high=MAX_IN_FLIGHT
    )
    smoothing: float = _key(
        0.5, "weight of the newest observation in a block's alpha (shrink); 1: only the last visit", above=0, high=1
    )
    max_miss: float = _key(
        1.25,
        "guard: where a guess was off by more than so many lengths of what the broker did to the block (no guess is "
        "off by 1; a small server.lr makes any guess too long), the client's next round is synchronous; 0: no guard",
        low=0,
    )


@dataclass(frozen=True)
class Server:
    """The optimizer that the broker applies to the mean delta of a block."""

    optimizer: Literal["average", "momentum", "nesterov", "adam", "yogi"] = _key(
        "average",
        "how the mean delta moves the block; of every block that was trained the broker keeps one more float32 copy "
        "for momentum and nesterov, two for adam and yogi",
    )
    lr: float = _key(
        1.0,
        "step size on the mean delta; with adam and yogi a value moves by about this much in a round, whatever the "
        "delta, so that 1.0 is far too much",
        above=0,
    )
    momentum: float = _key(0.9, "decay of the momentum buffer (momentum, nesterov)", low=0, high=0.999999)
    beta1: float = _key(0.9, "decay of the first moment (adam, yogi)", low=0, high=0.999999)
    beta2: float = _key(0.99, "decay of the second moment (adam, yogi)", low=0, high=0.999999)
    tau: float = _key(
        1e-3,
        "term of the denominator, and root of the second moment's first value: far larger deltas move a value by about "
        "lr whatever their size, far smaller ones in proportion to it (adam, yogi)",
        low=1e-9,
        high=1e9,
    )


@dataclass(frozen=True)
class Rounds:
    """Who takes part in a round, when it closes, and what counts how much in it."""

    clients: int = _key(2, "workers that the run waits for before its first round", low=1, high=100_000)
    fraction: float = _key(
        1.0,
        "share of the clients that trains in a round, drawn anew for each, at least one and at least the quorum; the "
        "others only take over the new blocks",
        above=0,
        high=1,
    )
    quorum: int = _key(
        0,
        "clients that must be there for a round to close, contributions at its deadline; 0: more than half of those "
        "drawn for a round, and as many as robust.rule needs",
        low=0,
    )
    deadline_s: float = _key(
        0.0,
        "after a round's first contribution, how long it waits for the rest; 0: as long as they are alive",
        unit="s",
        low=0,
    )
    grace: bool = _key(
        True,
        "past its deadline a round stays open for those who are still at it, as long as nobody's training stands still "
        "for its block",
    )
    late: Literal["discard", "fold"] = _key(
        "discard",
        "what becomes of a contribution that misses its round: nothing, or it is part of the next round's mean that "
        "trains its block, if all of it has come by then; of each client one is kept at a time, at the broker",
    )
    late_decay: float = _key(
        0.5,
        "what a late contribution's tokens count for, times this again for each round of its block that it missed "
        "(fold)",
        above=0,
        high=1,
    )
    quorum_lost: Literal["wait", "fewer", "stop"] = _key(
        "wait",
        "when for quorum_lost_s fewer clients than the quorum have been there: wait for them; close rounds with those "
        "that are there, if there are any; or stop the run, which can be resumed",
    )
    quorum_lost_s: float = _key(60.0, "how long the quorum may be missing before that (fewer, stop)", unit="s", low=0)
    weights: Literal["normalised", "tokens"] = _key(
        "normalised",
        "a client's weight in the mean delta: its tokens per step, and its delta per step (FedNova), so that one that "
        "takes more steps does not drag the mean; or its tokens, whatever its steps. With equal steps there is no "
        "difference",
    )


@dataclass(frozen=True)
class Data:
    """Where rows come from and how a row becomes tokens."""

    train: str = _key(
        "builtin",
        "training rows: a .jsonl, .json, .csv or .parquet file, a hub name as NAME[:CONFIG][@SPLIT], or builtin",
        local=True,
    )
    eval: str = _key("", "held-out rows, as for train; empty: no evaluation", local=True)
    split: str = _key("train", "split, where the source is a datasets name")
    format: Literal["prompt", "chat", "text"] = _key(
        "prompt", "prompt and completion fields, a field of chat messages, or one field of plain text"
    )
    prompt: str = _key("prompt", "name of the prompt field (format = prompt)")
    completion: str = _key("completion", "name of the completion field (format = prompt)")
    messages: str = _key("messages", "name of the messages field (format = chat)")
    text: str = _key("text", "name of the text field (format = text)")
    template: str = _key(
        "{prompt}", "text before the completion, {prompt} standing for the prompt field and {NAME} for field NAME"
    )
    use_chat_template: bool = _key(False, "wrap prompt and completion in the tokenizer's chat template")
    max_tokens: int = _key(512, "longer rows are truncated (and counted)", unit="tokens", low=2)


@dataclass(frozen=True)
class Partition:
    """How `parablock run` divides one source of rows over its workers, to simulate clients whose data differ."""

    method: Literal["iid", "dirichlet", "field", "quantity"] = _key(
        "iid",
        "rows in turn; each label's rows by Dirichlet shares; each value to one client; or sizes by Dirichlet shares",
    )
    alpha: float = _key(
        0.5, "of the Dirichlet shares: the smaller, the more uneven (dirichlet, quantity)", above=0, high=1e6
    )
    field: str = _key("", "name of the field that labels a row (dirichlet, field; otherwise only shown)")


@dataclass(frozen=True)
class Evaluation:
    """Held-out evaluation by the workers, each on its share of the rows."""

    rows: int = _key(64, "held-out rows for the loss; 0: all", low=0)
    every: int = _key(0, "also evaluate after every so many rounds; 0: only before the first and after the last", low=0)
    generate: int = _key(
        0,
        "held-out rows answered by generation for exact match of `#### N`, by `parablock evaluate` also the others, "
        "for exact match and ROUGE-L; 0: none",
        low=0,
    )
    max_new_tokens: int = _key(256, "longest generated answer", unit="tokens", low=1)
    batch_size: int = _key(8, "rows per evaluation batch", low=1)
    task: str = _key(
        "",
        "name of the field that says a row's task, for scores by task of `parablock evaluate`, and of a run's "
        "evaluations where a worker has agreed by --tell-tasks; empty: none",
    )


@dataclass(frozen=True)
class Codecs:
    """What values become on the wire; see parablock.codec."""

    up: CodecName = _key("float32", "codec of the contributions")
    down: CodecName = _key("float32", "codec of the new blocks; a lossy one sends the change, not the value")
    error_feedback: bool = _key(
        True, "what a lossy codec rounds away is added to the next transfer of the block; costs a float32 copy of it"
    )


@dataclass(frozen=True)
class Network:
    """The link between broker and workers."""

    bind: str = _key(
        "tcp://127.0.0.1:5557", "where the broker listens; tcp://127.0.0.1:* takes a free port", local=True
    )
    chunk_bytes: int = _key(
        2 << 20,
        "at most so much of a block, in float32, travels as one message: an eighth of it, within 1 MiB and this",
        unit="bytes",
        low=1 << 10,
        high=8 << 20,
    )
    window_bytes: int = _key(
        16 << 20, "bytes that a receiver grants ahead of what it holds, per transfer", unit="bytes", low=1 << 10
    )
    heartbeat_s: float = _key(2.0, "each side says that it is alive this often", unit="s", above=0)
    timeout_s: float = _key(
        30.0,
        "silence after which the other side is taken for gone, and an upload of which nothing more comes is dropped",
        unit="s",
        above=0,
    )
    resend_s: float = _key(
        15.0, "a transfer without progress for this long is resumed; at most half of timeout_s", unit="s", above=0
    )


@dataclass(frozen=True)
class Journal:
    """What the broker keeps on disk."""

    keep: int = _key(
        2,
        "newest versions of each block that stay in the run's folder, with the server optimizer's state of them; where "
        "the newest is found damaged, a resumed broker goes back to the one before it",
        low=2,
        high=1_000_000,
        local=True,
    )


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

    @property
    def in_flight(self) -> int:
        """How many rounds a client may be ahead of the next commit: 0 in a synchronous mode, but for those rounds that
        are trained `together`."""
        return self.pipeline.max_in_flight if self.mode == "parablock" else self.together - 1

    @property
    def together(self) -> int:
        """Rounds whose blocks are trained at once, and exchanged one after the other: r to r + together − 1, for every
        multiple r of it."""
        return 2 if self.mode == "lisa" else 1

    @property
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

    @property
    def quorum(self) -> int:
        """Fewest clients that must be there for a round to close, and contributions to it at its deadline."""
        drawn = self.drawn(self.round.clients)
        least = self.secure.needed(drawn) if self.secure.enabled else drawn // 2 + 1
        return self.round.quorum or max(least, self.robust.fewest)

    @property
    def measured(self) -> bool:
        """Whether all of every contribution must be seen before any of it is folded (`parablock.measurement`)."""
        return self.robust.measured or self.privacy.central

    @property
    def announced(self) -> bool:
        """Whether the broker says as the run goes on what a round trains and who; else it follows from the settings."""
        return self.schedule.order == "importance" or self.mode == "fedcybgd" or self.round.fraction < 1.0

    def sampled(self, clients: int) -> int:
        """How many of so many clients train in a round."""
        return min(max(self.drawn(clients), self.quorum), clients)

    def drawn(self, clients: int) -> int:
        """How many of so many clients `round.fraction` or the mode draws for a round, whatever the quorum."""
        return 1 if self.mode == "fedcybgd" else max(int(self.round.fraction * clients + 0.5), 1)


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
    _check_together(config)
    return config


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


def _build(cls: type[Any], tree: Any, prefix: str) -> Any:
    if not isinstance(tree, dict):
        raise ConfigError(f"{prefix.rstrip('.') or 'a config'} is a table of settings, got {tree!r}")
    hints = _hints(cls)  # type: ignore[arg-type]  # of the class itself, which is hashable
    fields = {item.name: item for item in dataclasses.fields(cls)}
    for name in tree:
        if name not in fields:
            raise ConfigError(_unknown(f"{prefix}{name}"))
    values = {}
    for name, value in tree.items():
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
    wrong = ConfigError(f"{path} must be {_expected(item, hint)}; got {value!r:.200}")
    if hint is float and type(value) is int:
        value = float(value) if abs(value) < 2**1023 else math.inf
    if type(value) is not hint:
        raise wrong
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
            raise wrong
    return typing.cast("Scalar", value)


def _check_together(config: Config) -> None:
    if config.blocks.num_blocks and config.blocks.max_block_mb:
        raise ConfigError("blocks.num_blocks and blocks.max_block_mb exclude each other; set one of them to 0")
    if config.round.quorum > config.round.clients:
        raise ConfigError(
            f"round.quorum = {config.round.quorum} can never be reached with round.clients = {config.round.clients}; "
            "lower the quorum or expect more clients"
        )
    if config.mode == "fedcybgd":
        _check_fedcybgd(config)
    _check_sampled(config)
    if config.solver.warmup_rounds >= config.rounds:
        raise ConfigError(
            f"solver.warmup_rounds = {config.solver.warmup_rounds} must be below rounds = {config.rounds}"
        )
    if config.mode == "lisa":
        _check_lisa(config)
    if config.solver.adaptive:
        _check_adaptive(config)
    if (reason := robust_objection(config) or privacy_objection(config) or secure_objection(config)) is not None:
        raise ConfigError(reason)
    if config.partition.method in ("dirichlet", "field") and not config.partition.field:
        raise ConfigError(
            f"partition.method = {config.partition.method} divides rows by a field, and partition.field names none; "
            "name the one that labels your rows, as in --set partition.field=task"
        )
    if config.solver.momentum and config.solver.optimizer != "sgd":
        raise ConfigError(
            f"solver.momentum = {config.solver.momentum} is for sgd only, and solver.optimizer = "
            f"{config.solver.optimizer}; set solver.momentum to 0, or solver.optimizer to sgd"
        )
    if config.network.timeout_s <= 2 * config.network.heartbeat_s:
        raise ConfigError(
            f"network.timeout_s = {config.network.timeout_s} must be more than twice "
            f"network.heartbeat_s = {config.network.heartbeat_s}, or one late heartbeat ends a session"
        )
    if config.network.timeout_s < 2 * config.network.resend_s:
        raise ConfigError(
            f"network.timeout_s = {config.network.timeout_s} must be at least twice "
            f"network.resend_s = {config.network.resend_s}, or an upload is dropped before it was resumed; "
            "raise the one or lower the other"
        )
    if config.network.chunk_bytes % (4 * GROUP):
        raise ConfigError(
            f"network.chunk_bytes = {config.network.chunk_bytes} must be a multiple of {4 * GROUP}, "
            f"so that no group of {GROUP} values with a common scale is cut in two"
        )
    if config.network.window_bytes < config.network.chunk_bytes:
        raise ConfigError(
            f"network.window_bytes = {config.network.window_bytes} is smaller than one chunk "
            f"(network.chunk_bytes = {config.network.chunk_bytes}); raise it to at least one chunk"
        )


def _check_fedcybgd(config: Config) -> None:
    policy, order = config.round, config.schedule.order
    if policy.fraction < 1.0:
        raise ConfigError(
            f"round.fraction = {policy.fraction} has no meaning with mode = fedcybgd, in which one client trains "
            "in each round; set it to 1"
        )
    if policy.quorum > 1:
        raise ConfigError(
            f"round.quorum = {policy.quorum} can never be reached with mode = fedcybgd, in which one client trains "
            "in each round; set it to 1, or to 0"
        )
    if policy.late == "fold":
        raise ConfigError(
            "round.late = fold does not go with mode = fedcybgd, in which a round is one client's alone; "
            "set round.late to discard"
        )
    if order not in ("cyclic", "descending"):
        raise ConfigError(
            f"schedule.order = {order} does not go with mode = fedcybgd, in which each client trains each block once "
            "in a cycle of clients and blocks; set schedule.order to cyclic or descending"
        )


def _check_sampled(config: Config) -> None:
    policy = config.round
    drawn = config.drawn(policy.clients)
    if policy.quorum > drawn:
        raise ConfigError(
            f"round.quorum = {policy.quorum} is more than the {drawn} of round.clients = {policy.clients} that "
            f"round.fraction = {policy.fraction} draws for a round; lower the quorum or raise the fraction"
        )


def _check_lisa(config: Config) -> None:
    for name, number in (("rounds", config.rounds), ("eval.every", config.eval.every)):
        if number % config.together:
            raise ConfigError(
                f"{name} = {number} must be even with mode = lisa, where two rounds exchange what was trained at once"
            )
    if config.round.fraction < 1.0:
        raise ConfigError(
            f"round.fraction = {config.round.fraction} does not go with mode = lisa, where a client trains two "
            "rounds at once, and would be drawn for each by itself; set it to 1"
        )
    if config.schedule.order == "importance":
        raise ConfigError(
            "schedule.order = importance does not go with mode = lisa, which draws its blocks; leave schedule.order out"
        )


def _check_adaptive(config: Config) -> None:
    low, steps, high = config.solver.min_steps, config.solver.steps, config.solver.max_steps
    if config.mode != "parablock":
        raise ConfigError(
            f"solver.adaptive needs an exchange that hides behind training, and mode = {config.mode} hides none; "
            "set solver.adaptive to false, or mode to parablock"
        )
    if low > high:
        raise ConfigError(
            f"solver.min_steps = {low} is above solver.max_steps = {high}; lower the one or raise the other"
        )
    if not low <= steps <= high:
        raise ConfigError(
            f"solver.steps = {steps}, with which solver.adaptive begins, must be from solver.min_steps = {low} "
            f"to solver.max_steps = {high}; move it there, or widen the bounds"
        )


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
