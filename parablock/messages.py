"""What broker and workers say to each other: one frozen dataclass per message, with the bounds of every field.

A message is data only. `parablock.wire` turns it into a header frame and back, and checks each field against the
bounds written here, so that a handler never meets a value of the wrong type, sign or size.

The conversation, W a worker and B the broker:

    W Hello            B Terms            the settings of the run; the worker now loads its model and data
    W Join             B Welcome          same model, same blocks, same tokenizer; or B Refused
                       B Start            train from this round on, and what is decided of the next ones
    W Keys             B Roll             (secure.enabled) public keys for a round ahead; everybody's
    W Shares           B Dealt            shares of the secrets behind them, sealed for each other client; those for W
    W Offer, Chunk ... B Credit ...       a contribution goes up; Credit says what is held and what more may come
    W Unmasked         B Unmask           whose contributions to a slice of the round are added up; the shares for that
    W Abstain                             no contribution to this round (the loss diverged)
                       B Chunk ...        the new block comes down, as far as it is made; W Credit ...
                       B Commit           the round is closed, and what came of this attempt is the new block
                       B Rejected         a contribution was not counted, and why
                       B Late             it missed its round, and may count, or has counted, in a later one
    W Landed                              the block is in the model; what the round took
    W Evaluated                           a share of the held-out rows
    W Waiting                             training stands still for a block that is not here yet
    W Heartbeat        B Heartbeat        alive, and where
    W Leave            B Goodbye          done, or interrupted
                       B Rejoin           the broker does not know this session (any more): join again
                       B Stopped          the broker goes down before the end of the run

Outside any conversation, from anybody:

    W Probe            B Probed           so many bytes up, so many down: what the link between the two is like
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

PROTOCOL = 8
"""Version of the messages. Both sides must speak the same."""

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
"""What a name is, as a pattern: it names folders too, and so must not begin with a dot, nor with a dash."""
MAX_NAME = 64
"""Characters of a name."""
MAX_BLOCKS = 8192
MAX_IN_FLIGHT = 64
"""Bound of `pipeline.max_in_flight`."""
MAX_BLOCK_BYTES = 1 << 40
MAX_CHUNK_BYTES = 8 << 20
"""One chunk's payload at most; `network.chunk_bytes` is bounded by it."""
MAX_PROBE_BYTES = 1 << 20
MAX_TASKS = 128
"""Tasks that a client's share of an evaluation tells apart: so many labels fit into one header."""
MAX_LABEL = 64
"""Characters of a task's label."""
MAX_SUMMED = 128
"""Clients whose contributions to a round are added up under masks."""
MAX_SLICES = 16
"""Parts of a contribution that are added up one by one (`parablock.slices`)."""


@dataclass(frozen=True)
class Whole:
    """Bounds of an integer, inclusive."""

    low: int
    high: int


@dataclass(frozen=True)
class Real:
    """Bounds of a finite float, inclusive."""

    low: float
    high: float


@dataclass(frozen=True)
class Text:
    """Longest text in characters, and what it may consist of: `name` (see NAME), `run` (the same characters, in any
    order), `hex`, or `any`."""

    longest: int
    alphabet: str = "any"


@dataclass(frozen=True)
class Items:
    """Most items of a tuple."""

    most: int


@dataclass(frozen=True)
class Payload:
    """Most bytes of a message's payload, and whether there must be one. An empty payload is none."""

    most: int
    required: bool


Round = Annotated[int, Whole(-1, 2**31)]
BlockIndex = Annotated[int, Whole(0, MAX_BLOCKS - 1)]
Attempt = Annotated[int, Whole(0, 2**31)]
Bytes = Annotated[int, Whole(0, MAX_BLOCK_BYTES)]
Count = Annotated[int, Whole(0, 2**53)]
Seconds = Annotated[float, Real(-1e12, 1e12)]
Number = Annotated[float, Real(-1e38, 1e38)]
Name = Annotated[str, Text(MAX_NAME, "name")]
Digest = Annotated[str, Text(64, "hex")]
Reason = Annotated[str, Text(1000)]
Clients = Annotated[tuple[Name, ...], Items(MAX_SUMMED)]
Slice = Annotated[int, Whole(0, MAX_SLICES - 1)]


# From a worker


@dataclass(frozen=True)
class Hello:
    """First words. `session` tells one process of a name from the next. On an encrypted connection the name is not
    what counts: a client is called what the broker's list says of its key."""

    name: Name
    session: Digest
    protocol: Annotated[int, Whole(0, 2**31)]


@dataclass(frozen=True)
class Join:
    """The worker has loaded everything; the digests say what.

    versions: per block, the number of the round that made it plus one; 0 for the base model's.
    rows: 1 for any number of them where `privacy.where = "local"`, in which `Offer.weight` is 1 and `Offer.loss` 0, and
    the first three of `Landed`'s numbers are 0 too.
    position: the first round that it has neither trained nor passed, in this process or in one before it that has kept
    what it had; −1: it has not begun.
    """

    manifest: Digest
    base: Digest
    tokenizer: Digest
    rows: Count
    versions: Annotated[tuple[Annotated[int, Whole(0, 2**31)], ...], Items(MAX_BLOCKS)]
    position: Round


@dataclass(frozen=True)
class Offer:
    """A contribution: `nbytes` of encoded delta follow in chunks. `weight`: tokens trained on, in `steps` steps."""

    round: Round
    block: BlockIndex
    nbytes: Bytes
    weight: Annotated[int, Whole(1, 2**53)]
    steps: Annotated[int, Whole(1, 2**31)]
    loss: Number


@dataclass(frozen=True)
class Abstain:
    round: Round
    reason: Reason


@dataclass(frozen=True)
class Keys:
    """The client takes part in a round's secure sum. Payload: its public keys, one for sealed shares, then one a slice
    (`parablock.sum_member`)."""

    round: Round


@dataclass(frozen=True)
class Shares:
    """The answer to `Roll`. Payload: for each of the others on it, in order, their shares of this client's secrets,
    sealed for them."""

    round: Round


@dataclass(frozen=True)
class Unmasked:
    """The answer to `Unmask`. Payload: a share for each client whose shares were dealt, in order: of its own mask's
    seed if its contribution is added up, of its secret key if not. None: the client gives no share for this sum, as it
    has helped an earlier broker to another one of the slice."""

    round: Round
    slice: Slice


@dataclass(frozen=True)
class Landed:
    """A round as one client saw it. Times are readings of its monotonic clock.

    waiting: when training stood still for this block. alpha: the share of the own delta that the guess kept.
    drift: ‖Δ_i − s‖ / ‖s‖. miss: ‖α Δ_i − s‖ / ‖s‖. s = x′ − x is the server's step, what the round did to the block:
    Δ̄ only where server.optimizer = average with server.lr = 1. steps: of the optimizer. All four are 0 where the client
    took no part. An interval that did not take place is (0, 0).
    """

    round: Round
    computing: Annotated[tuple[Seconds, ...], Items(2)]
    uploading: Annotated[tuple[Seconds, ...], Items(2)]
    downloading: Annotated[tuple[Seconds, ...], Items(2)]
    waiting: Annotated[tuple[Seconds, ...], Items(2)]
    alpha: Number
    drift: Number
    miss: Number
    steps: Count
    staleness: Annotated[int, Whole(0, 2**31)]
    loop_lag_ms: Number


@dataclass(frozen=True)
class Evaluated:
    """Sums over a client's share of the held-out rows, one for each of its tasks; without any row, none.

    round: the last one that the model holds; −1: none. tasks: "" alone where they are not told apart. Every other list
    has a number for each of them.
    """

    round: Round
    tasks: Annotated[tuple[Annotated[str, Text(MAX_LABEL)], ...], Items(MAX_TASKS)]
    rows: Annotated[tuple[Count, ...], Items(MAX_TASKS)]
    loss_sums: Annotated[tuple[Number, ...], Items(MAX_TASKS)]
    tokens: Annotated[tuple[Count, ...], Items(MAX_TASKS)]
    correct: Annotated[tuple[Count, ...], Items(MAX_TASKS)]
    answered: Annotated[tuple[Count, ...], Items(MAX_TASKS)]


@dataclass(frozen=True)
class Waiting:
    """Training stands still until what `round` makes of its block is here: to keep the round open has a price now.

    Said when the wait begins, and again with each heartbeat until that round is known to be committed.
    """

    round: Round


@dataclass(frozen=True)
class Leave:
    reason: Reason


@dataclass(frozen=True)
class Probe:
    """Measures the link: answer this with `answer` bytes. Its own payload is of no meaning."""

    sequence: Count
    answer: Annotated[int, Whole(0, MAX_PROBE_BYTES)]


# From the broker


@dataclass(frozen=True)
class Terms:
    """The run's settings as JSON (without those that stay on their machine). name: what this worker is called here."""

    config: Annotated[str, Text(32_768)]
    name: Name


@dataclass(frozen=True)
class Welcome:
    """The worker is on the roster."""

    clients: Count


@dataclass(frozen=True)
class Refused:
    reason: Reason


@dataclass(frozen=True)
class Start:
    """Train from `round` on; `clients` take part.

    next: the first round that was not committed when this was said; every commit from there on will be told.
    pending: rounds before that whose blocks are on their way, because the worker held older versions.
    blocks, trains: of the rounds from `next` on that are decided, which block each trains and whether this worker takes
    part. Both are empty where that follows from the settings.
    """

    round: Round
    clients: Annotated[int, Whole(1, 2**31)]
    next: Round
    pending: Annotated[tuple[Round, ...], Items(MAX_BLOCKS)]
    blocks: Annotated[tuple[BlockIndex, ...], Items(MAX_IN_FLIGHT + 1)] = ()
    trains: Annotated[tuple[bool, ...], Items(MAX_IN_FLIGHT + 1)] = ()


@dataclass(frozen=True)
class Commit:
    """A round is closed. `contributors` were counted (0: the block stays as it was); `counted`: this worker too.

    What counts late, of an earlier round, is among the former and has no part in the latter.
    attempt: whose chunks are the new block. 0: those of a transfer in full, in float32. With a lossy codec the chunks
    of any other attempt hold the change since round `base`, the one that made the block's version before (−1: none).
    blocks, trains: as in Start, of the round that comes rounds in flight + 1 after this one. ahead_s: if counted, for
    how long this worker's contribution had been complete when the last one that counts was; else 0, and so where the
    commit is told again in a new session.
    """

    round: Round
    block: BlockIndex
    attempt: Attempt
    base: Round
    nbytes: Bytes
    contributors: Count
    counted: bool
    blocks: Annotated[tuple[BlockIndex, ...], Items(1)] = ()
    trains: Annotated[tuple[bool, ...], Items(1)] = ()
    ahead_s: Annotated[float, Real(0.0, 1e12)] = 0.0


@dataclass(frozen=True)
class Roll:
    """Who takes part in a round's secure sum, in order of names. Payload: the payload of each one's `Keys`."""

    round: Round
    clients: Clients


@dataclass(frozen=True)
class Dealt:
    """Those on the `Roll` whose shares have come: the others' keys mask nothing. Payload: of each of them but the
    receiver, in order, what it has sealed for the receiver."""

    round: Round
    clients: Clients


@dataclass(frozen=True)
class Unmask:
    """Whose contributions to a slice are added up; said once, and never of others for the same slice."""

    round: Round
    slice: Slice
    clients: Clients


@dataclass(frozen=True)
class Rejected:
    round: Round
    reason: Reason


@dataclass(frozen=True)
class Late:
    """A contribution that missed its round (`round.late = "fold"`). into: the round that it has counted in; −1: it is
    still taken, and counts in the next round of its block if all of it has come by then. If it does not, Rejected says
    so.
    """

    round: Round
    into: Round


@dataclass(frozen=True)
class Rejoin:
    reason: Reason


@dataclass(frozen=True)
class Goodbye:
    reason: Reason


@dataclass(frozen=True)
class Stopped:
    """returns: another broker is to go on with the run; wait for it."""

    reason: Reason
    returns: bool


@dataclass(frozen=True)
class Probed:
    """The answer to the Probe of this sequence, with as many bytes of payload as it asked for."""

    sequence: Count


# From both


@dataclass(frozen=True)
class Chunk:
    """Bytes [offset, offset + len(payload)) of a transfer: of a contribution upwards, of a new block downwards.

    attempt: downwards, which fold made it; a higher one takes the place of a lower one. Upwards 0.
    checksum: of the payload, `wire.checksum`.
    """

    round: Round
    block: BlockIndex
    attempt: Attempt
    offset: Bytes
    checksum: Annotated[int, Whole(0, 2**64 - 1)]


@dataclass(frozen=True)
class Credit:
    """The receiver of a transfer holds its first `held` bytes and takes more up to `until`.

    That it holds all of a new block a worker says only when it has the commit as well.
    """

    round: Round
    block: BlockIndex
    attempt: Attempt
    held: Bytes
    until: Bytes


@dataclass(frozen=True)
class Heartbeat:
    """`clock` is the sender's monotonic clock; `round` and `step` where its training is; `state` its machine's."""

    clock: Seconds
    round: Round
    step: Count
    state: Name


FromWorker = (
    Hello | Join | Offer | Abstain | Landed | Evaluated | Waiting | Leave | Probe | Chunk | Credit | Heartbeat
    | Keys | Shares | Unmasked
)  # fmt: skip
FromBroker = (
    Terms | Welcome | Refused | Start | Commit | Rejected | Late | Rejoin | Goodbye | Stopped | Probed | Chunk | Credit
    | Heartbeat | Roll | Dealt | Unmask
)  # fmt: skip
Message = FromWorker | FromBroker

_KEYS_BYTES = 32 * (1 + MAX_SLICES)
_SEALED_BYTES = 2 * 33 * MAX_SLICES + 16  # two shares a slice, and what sealing adds

PAYLOADS: dict[type[Any], Payload] = {
    Chunk: Payload(MAX_CHUNK_BYTES, required=True),
    Probe: Payload(MAX_PROBE_BYTES, required=False),
    Probed: Payload(MAX_PROBE_BYTES, required=False),
    Keys: Payload(_KEYS_BYTES, required=True),
    Roll: Payload(MAX_SUMMED * _KEYS_BYTES, required=True),
    Shares: Payload(MAX_SUMMED * _SEALED_BYTES, required=True),
    Dealt: Payload(MAX_SUMMED * _SEALED_BYTES, required=True),
    Unmasked: Payload(MAX_SUMMED * 33, required=False),
}
"""The messages that have a payload; the others have none."""

COLUMNS: dict[type[Any], tuple[str, ...]] = {
    Evaluated: ("tasks", "rows", "loss_sums", "tokens", "correct", "answered"),
}
"""The lists of a message that are of one length."""
