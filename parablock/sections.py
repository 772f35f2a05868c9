"""The sections of the settings: which keys each has, with their defaults, units, ranges and meanings.

Data only; `parablock.config` makes the tree of them, and `parablock.agreement` says which go together. The sections of
robust aggregation, privacy and secure sums stand with what they do not go with, in modules of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from parablock.codec import CodecName  # noqa: TC001 - `parablock.config` reads the hints
from parablock.messages import MAX_IN_FLIGHT
from parablock.setting import key as _key


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
    warmup: float = _key(
        0.0,
        "share of the rounds, rounded down, over which the learning rate rises linearly to lr; from scratch 0.25 is "
        "worth a try",
        low=0,
        high=0.99,
    )
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
        "what stands for a block until its mean lands: x + alpha*delta with an alpha learnt for each tensor, x + "
        "delta, or x",
    )
    land: Literal["boundary", "arrival"] = _key(
        "boundary",
        "a block lands when round t + max_in_flight ends (reproducible), or at the next step after it arrives",
    )
    max_in_flight: int = _key(
        1, "rounds whose blocks may be on the way while the next one trains", low=1, high=MAX_IN_FLIGHT
    )
    smoothing: float = _key(
        0.5,
        "weight of the newest observation in a tensor's alpha (shrink); 1: only the block's last visit",
        above=0,
        high=1,
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
        "what a client's delta counts in the mean: its tokens, the delta being divided by its steps (FedNova), so that "
        "one that takes twice the steps counts for twice the tokens, and not for the longer delta as well; or its "
        "tokens, however long the delta. With equal steps there is no difference",
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

    @property
    def shown(self) -> bool:
        """Whether there is something to see in who has which rows."""
        return self.method != "iid" or self.field != ""


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
        "at most so much of a block, in float32, travels as one message: an eighth of it, within 512 KiB and this",
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
