"""Frames: one msgpack header and at most one payload of raw bytes, both ways.

A payload is one frame here; on its way to a worker it may be several, of which the two sockets alone know.

Encoding is total. Decoding trusts nothing: sizes are checked before anything is parsed, the header's keys and types
against the message's dataclass, a payload against its checksum, and whatever does not fit is a `WireError` that says
why. Nothing is ever unpickled or inflated.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, cast

import msgpack
import xxhash

from parablock import messages
from parablock.messages import COLUMNS, NAME, PAYLOADS, Chunk, Items, Message, Real, Text, Whole

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Check = Callable[[Any], Any]

MAX_HEADER_BYTES = 64 << 10
MAX_PAYLOAD_BYTES = max(payload.most for payload in PAYLOADS.values())

Buffer = memoryview


class WireError(ValueError):
    """Frames that are no message of this protocol. The text says what was expected and what came."""


@dataclass(frozen=True)
class Envelope:
    """A message and the frame around it. run: the run's identity ("" before Terms); epoch: the broker's incarnation."""

    run: str
    epoch: int
    message: Message
    payload: Buffer | None = None

    @cached_property
    def frames(self) -> list[Any]:
        """Encoded once, also where it is sent to many. The transport may put frames of its own kind in the list."""
        return encode(self)


_ALPHABETS = {
    "name": re.compile(NAME),
    "run": re.compile(r"[A-Za-z0-9._-]+"),
    "hex": re.compile(r"[0-9a-f]+"),
    "any": re.compile(r"(?s).*"),
}
_LISTS = frozenset([*range(0x90, 0xA0), 0xDC, 0xDD])  # first bytes, in msgpack's specification
_MAPS = frozenset([*range(0x80, 0x90), 0xDE, 0xDF])
_CONTAINERS = _LISTS | _MAPS
_SHORT = 512  # bytes; the headers of chunks, credits and most others


def encode(envelope: Envelope) -> list[bytes | Buffer]:
    """The frames of a message: [header] or [header, payload]. The payload is passed on, not copied.

    A field out of its bounds is our own bug, and shows here rather than as the other side's refusal.
    """
    message = envelope.message
    header: dict[str, Any] = {"v": messages.PROTOCOL, "k": type(message).__name__}
    header["r"], header["e"] = envelope.run, envelope.epoch
    try:
        for name, check in _CHECKS[type(message).__name__].items():
            header[name] = check(getattr(message, name))
        _check_columns(message)
    except WireError as error:
        raise AssertionError(f"our own {error}") from error
    packed: bytes = msgpack.packb(header)
    assert len(packed) <= MAX_HEADER_BYTES, f"our own header has {len(packed)} bytes"
    bounds = PAYLOADS.get(type(message))
    if envelope.payload is None:
        assert bounds is None or not bounds.required, f"{type(message).__name__} has a payload"
        return [packed]
    assert bounds is not None, f"{type(message).__name__} has no payload"
    return [packed, envelope.payload]


def decode(frames: Sequence[bytes | Buffer]) -> Envelope:
    """The message in `frames`, checked. The payload is a view of the frame, not a copy. Raises WireError."""
    if not 1 <= len(frames) <= 2:
        raise WireError(f"expected a header frame and at most one payload frame, got {len(frames)} frames")
    if len(frames[0]) > MAX_HEADER_BYTES:
        raise WireError(f"a header has at most {MAX_HEADER_BYTES} bytes, got {len(frames[0])}")
    header = _unpack(frames[0])
    version = header.pop("v", None)
    if type(version) is not int or version != messages.PROTOCOL:
        raise WireError(f"expected protocol version {messages.PROTOCOL}, got {version!r:.20}")
    kind = header.pop("k", None)
    checks = _CHECKS.get(kind) if isinstance(kind, str) else None
    if checks is None:
        raise WireError(f"there is no message of kind {kind!r:.40}")
    run = _run(header.pop("r", None))
    epoch = _epoch(header.pop("e", None))
    if header.keys() != checks.keys():
        raise WireError(f"{kind} has the fields {', '.join(checks)}; got {', '.join(map(str, header)):.200}")
    values = {name: check(header[name]) for name, check in checks.items()}
    message = cast("Message", _KINDS[kind](**values))
    _check_columns(message)
    return Envelope(run, epoch, message, _payload(message, frames))


def checksum(payload: Buffer) -> int:
    """XXH3 of a payload, 64 bits: against torn buffers of our own making, which TCP would not see."""
    return xxhash.xxh3_64_intdigest(payload)


def _unpack(frame: bytes | Buffer) -> dict[str, Any]:
    """The fields of a header: a map from text to scalars and flat lists."""
    return _unpack_short(frame) if len(frame) <= _SHORT else _unpack_long(frame)


class _Pairs(tuple[tuple[Any, Any], ...]):
    """A map as it was packed; no field of a message is one, and none is taken for a list."""


def _unpack_short(frame: bytes | Buffer) -> dict[str, Any]:
    """At once: in so few bytes nothing can be announced that would hurt. Deeper nesting fails the fields' checks."""
    try:
        pairs = msgpack.unpackb(
            frame, use_list=False, object_pairs_hook=_Pairs, max_bin_len=0, max_ext_len=0, max_array_len=_SHORT
        )
    except (ValueError, msgpack.UnpackException) as error:
        raise WireError(f"the header is not a map in valid msgpack: {type(error).__name__}") from error
    if type(pairs) is not _Pairs:
        raise WireError("the header is not a map in valid msgpack")
    header = dict(pairs)
    if len(header) != len(pairs) or set(map(type, header)) - {str}:
        raise WireError(f"the names of a header's fields are text, each once; got {[name for name, _ in pairs]!r:.80}")
    return header


def _unpack_long(frame: bytes | Buffer) -> dict[str, Any]:
    """Piece by piece.

    What is nested deeper is refused before it is built: a list announces its length, memory is set aside for it at
    once, and a thousand long lists inside each other, all of them unfinished, fit into a few kilobytes.
    """
    unpacker = msgpack.Unpacker(
        max_buffer_size=MAX_HEADER_BYTES, max_str_len=MAX_HEADER_BYTES, max_bin_len=0, max_ext_len=0
    )
    unpacker.feed(frame)
    header: dict[str, Any] = {}
    try:
        for _ in range(unpacker.read_map_header()):
            name = _scalar(unpacker, frame)
            if type(name) is not str or name in header:
                raise WireError(f"the names of a header's fields are text, each once; got {name!r:.40}")
            if frame[unpacker.tell()] in _LISTS:
                header[name] = tuple(_scalar(unpacker, frame) for _ in range(unpacker.read_array_header()))
            else:
                header[name] = _scalar(unpacker, frame)
    except WireError:
        raise
    except (ValueError, IndexError, msgpack.UnpackException) as error:
        raise WireError(f"the header is not a map in valid msgpack: {type(error).__name__}") from error
    if unpacker.tell() != len(frame):
        raise WireError(f"the header ends after {unpacker.tell()} of {len(frame)} bytes")
    return header


def _scalar(unpacker: msgpack.Unpacker, frame: bytes | Buffer) -> Any:
    if frame[unpacker.tell()] in _CONTAINERS:
        raise WireError("a field of a header is a scalar or a flat list of scalars, got one that is nested")
    return unpacker.unpack()


def _payload(message: Message, frames: Sequence[bytes | Buffer]) -> Buffer | None:
    kind, bounds = type(message).__name__, PAYLOADS.get(type(message))
    if len(frames) == 1:
        if bounds is not None and bounds.required:
            raise WireError(f"{kind} has a payload, got none")
        return None
    if bounds is None:
        raise WireError(f"{kind} has no payload, got one of {len(frames[1])} bytes")
    payload = memoryview(frames[1])
    if not 1 <= payload.nbytes <= bounds.most:
        raise WireError(f"the payload of a {kind} has 1 to {bounds.most} bytes, got {payload.nbytes}")
    if isinstance(message, Chunk) and checksum(payload) != message.checksum:
        raise WireError("the payload does not match its checksum")
    return payload


def _check_columns(message: Message) -> None:
    """Raises WireError."""
    names = COLUMNS.get(type(message))
    if names is None:
        return
    lengths = [len(getattr(message, name)) for name in names]
    if len(set(lengths)) > 1:
        raise WireError(f"{type(message).__name__}: {', '.join(names)} are of one length, got lengths {lengths}")


def _whole(name: str, bounds: Whole) -> Check:
    low, high = bounds.low, bounds.high

    def check(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise WireError(f"{name} is a whole number from {low} to {high}, got {value!r:.40}")
        return value

    return check


def _real(name: str, bounds: Real) -> Check:
    low, high = bounds.low, bounds.high

    def check(value: Any) -> float:
        if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
            raise WireError(f"{name} is a finite number from {low} to {high}, got {value!r:.40}")
        return float(value)

    return check


def _text(name: str, bounds: Text, *, empty: bool = False) -> Check:
    longest, fits = bounds.longest, _ALPHABETS[bounds.alphabet].fullmatch

    def check(value: Any) -> str:
        if type(value) is not str or len(value) > longest:
            raise WireError(f"{name} is text of at most {longest} characters, got {value!r:.40}")
        if not (empty and not value) and not fits(value):
            raise WireError(f"{name} has characters outside its alphabet ({bounds.alphabet}): {value!r:.40}")
        return value

    return check


def _flag(name: str) -> Check:
    def check(value: Any) -> bool:
        if type(value) is not bool:
            raise WireError(f"{name} is true or false, got {value!r:.40}")
        return value

    return check


def _tuple(name: str, bounds: Items, item: Check) -> Check:
    def check(value: Any) -> tuple[Any, ...]:
        if type(value) is not tuple or len(value) > bounds.most:
            raise WireError(f"{name} is a list of at most {bounds.most} items, got {value!r:.40}")
        return tuple(map(item, value))

    return check


def _check_of(name: str, hint: Any) -> Check:
    """What takes a field's value and returns it, or raises WireError. name: of the field, for the message."""
    if hint is bool:
        return _flag(name)
    assert typing.get_origin(hint) is Annotated, f"a field of a message has bounds: {hint}"
    base, bounds = typing.get_args(hint)
    match bounds:
        case Whole():
            return _whole(name, bounds)
        case Real():
            return _real(name, bounds)
        case Text():
            return _text(name, bounds)
        case Items():
            return _tuple(name, bounds, _check_of(name, typing.get_args(base)[0]))  # of tuple[item, ...]
    raise AssertionError(f"no check for {hint}")


def _checks_of(kind: type[Any]) -> dict[str, Check]:
    hints = typing.get_type_hints(kind, include_extras=True)
    names = [field.name for field in dataclasses.fields(kind)]
    return {name: _check_of(f"{kind.__name__}.{name}", hints[name]) for name in names}


_run = _text("r", Text(64, "run"), empty=True)
_epoch = _whole("e", Whole(0, 2**63))
_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in typing.get_args(Message)}
_CHECKS = {name: _checks_of(kind) for name, kind in _KINDS.items()}
