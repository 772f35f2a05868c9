"""Frames that no honest peer sends, by a seed: valid messages of every kind with something wrong, and made-up ones.

    rng = random.Random(seed)
    frames = mutations.message(rng)        header and payload, one time in ten left as they are
    header = mutations.nasty(rng)          of a list of what a parser may stumble over

What may be in a field is read off `parablock.messages`, so that a new message is covered without a word here.
"""

from __future__ import annotations

import dataclasses
import string
import typing
from typing import TYPE_CHECKING, Any

import msgpack

from parablock import wire
from parablock.messages import COLUMNS, PAYLOADS, PROTOCOL, Chunk, FromBroker, FromWorker, Items, Real, Text, Whole
from parablock.wire import Envelope

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from parablock.messages import Message

KINDS: tuple[type[Any], ...] = tuple(dict.fromkeys((*typing.get_args(FromWorker), *typing.get_args(FromBroker))))
_ALPHABETS = {"name": string.ascii_letters + string.digits, "run": string.ascii_letters, "hex": "0123456789abcdef"}

_STRANGE: tuple[Any, ...] = (
    None, True, False, 0, -1, 2**31, 2**63, 2**64 - 1, -(2**63), 0.0, -0.0, 1e308, float("nan"), float("inf"),
    float("-inf"), "", "a" * 70_000, "\0", "../../etc/passwd", b"", b"\xff",
    [], {}, [[]], [None] * 9000, {"a": 1}, {1: 2}, msgpack.ExtType(5, b"x"), msgpack.Timestamp(1, 2),
)  # fmt: skip
"""Values for a field, of which most fit nowhere."""


def valid(rng: random.Random, kind: type[Any] | None = None) -> tuple[Message, bytes | None]:
    """A message that can be sent, and its payload."""
    kind = kind or rng.choice(KINDS)
    hints = typing.get_type_hints(kind, include_extras=True)
    made = kind(**{field.name: _value(hints[field.name], rng) for field in dataclasses.fields(kind)})
    columns = COLUMNS.get(kind, ())
    shortest = min((len(getattr(made, name)) for name in columns), default=0)
    made = dataclasses.replace(made, **{name: getattr(made, name)[:shortest] for name in columns})
    bounds = PAYLOADS.get(kind)
    if bounds is None or not (bounds.required or rng.random() < 0.5):
        return made, None
    payload = rng.randbytes(min(rng.choice((1, 7, 64, 4096)), bounds.most))
    if kind is Chunk:
        made = dataclasses.replace(made, checksum=wire.checksum(memoryview(payload)))
    return made, payload


def frames_of(message: Message, payload: bytes | None, run: str = "", epoch: int = 0) -> list[bytes]:
    view = None if payload is None else memoryview(payload)
    return [bytes(frame) for frame in wire.encode(Envelope(run, epoch, message, view))]


def message(rng: random.Random, run: str = "", epoch: int = 0) -> list[bytes]:
    """The frames of some message, with something wrong most of the time."""
    if rng.random() < 0.15:
        return [nasty(rng), *([rng.randbytes(8)] if rng.random() < 0.3 else [])]
    frames = frames_of(*valid(rng), run, epoch)
    return rng.choice(_MUTATIONS)(rng, frames)


def nasty(rng: random.Random) -> bytes:
    """A header that was never one."""
    return rng.choice(_NASTY)(rng)


def _value(hint: Any, rng: random.Random) -> Any:
    if hint is bool:
        return rng.random() < 0.5
    base, bounds = typing.get_args(hint)
    match bounds:
        case Whole(low, high):
            return rng.choice((low, high, max(low, min(high, rng.randint(-1, 9))), rng.randint(low, high)))
        case Real(low, high):
            return rng.choice(
                (low, high, 0.0, max(low, min(high, rng.uniform(-1.0, 1.0))), rng.uniform(low / 2, high / 2))
            )
        case Text(longest, "any"):
            return "".join(chr(rng.randrange(1, 0xD7FF)) for _ in range(rng.randint(0, min(longest, 20))))
        case Text(longest, alphabet):
            return "".join(rng.choices(_ALPHABETS[alphabet], k=rng.randint(1, min(longest, 20))))
        case Items(most):
            item = typing.get_args(base)[0]
            return tuple(_value(item, rng) for _ in range(rng.choice((0, 1, min(most, 2), min(most, 40)))))
    raise AssertionError(f"no value for {hint}")


def _repacked(rng: random.Random, frames: list[bytes], change: Callable[[dict[str, Any]], None]) -> list[bytes]:
    del rng
    header = msgpack.unpackb(frames[0])
    change(header)
    return [msgpack.packb(header, default=repr), *frames[1:]]


def _another_value(rng: random.Random, frames: list[bytes]) -> list[bytes]:
    def change(header: dict[str, Any]) -> None:
        header[rng.choice(list(header))] = rng.choice(_STRANGE)

    return _repacked(rng, frames, change)


def _another_item(rng: random.Random, frames: list[bytes]) -> list[bytes]:
    def change(header: dict[str, Any]) -> None:
        lists = [name for name, value in header.items() if isinstance(value, list) and value]
        if lists:
            name = rng.choice(lists)
            header[name][rng.randrange(len(header[name]))] = rng.choice(_STRANGE)

    return _repacked(rng, frames, change)


def _one_field_less(rng: random.Random, frames: list[bytes]) -> list[bytes]:
    return _repacked(rng, frames, lambda header: header.pop(rng.choice(list(header))))


def _one_field_more(rng: random.Random, frames: list[bytes]) -> list[bytes]:
    return _repacked(rng, frames, lambda header: header.update({rng.choice("abxyz") * 3: rng.choice(_STRANGE)}))


def _a_field_twice(rng: random.Random, frames: list[bytes]) -> list[bytes]:
    header = msgpack.unpackb(frames[0])
    name = rng.choice(list(header))
    pair = msgpack.packb(name) + msgpack.packb(rng.choice((header[name], 0)), default=repr)
    length = len(header)
    body = frames[0][1 if length < 16 else 3 :]
    return [b"\xde" + (length + 1).to_bytes(2, "big") + body + pair, *frames[1:]]


def _a_flipped_bit(rng: random.Random, frames: list[bytes]) -> list[bytes]:
    which = rng.randrange(len(frames))
    spoilt = bytearray(frames[which])
    for _ in range(rng.choice((1, 1, 1, 4))):
        spoilt[rng.randrange(len(spoilt))] ^= 1 << rng.randrange(8)
    return [*frames[:which], bytes(spoilt), *frames[which + 1 :]]


def _cut(rng: random.Random, frames: list[bytes]) -> list[bytes]:
    which = rng.randrange(len(frames))
    return [*frames[:which], frames[which][: rng.randrange(len(frames[which]) + 1)], *frames[which + 1 :]]


def _longer(rng: random.Random, frames: list[bytes]) -> list[bytes]:
    which = rng.randrange(len(frames))
    return [*frames[:which], frames[which] + rng.randbytes(rng.choice((1, 9, 5000))), *frames[which + 1 :]]


def _other_frames(rng: random.Random, frames: list[bytes]) -> list[bytes]:
    return rng.choice(([], frames[1:], [*frames, b""], [*frames, b"x"], [*frames] * 2, frames[::-1], [b""] * 5))


def _as_it_is(rng: random.Random, frames: list[bytes]) -> list[bytes]:
    del rng
    return frames


_MUTATIONS: tuple[Callable[[random.Random, list[bytes]], list[bytes]], ...] = (
    _another_value, _another_value, _another_item, _one_field_less, _one_field_more, _a_field_twice, _a_flipped_bit,
    _a_flipped_bit, _cut, _longer, _other_frames, _as_it_is,
)  # fmt: skip

_NASTY: tuple[Callable[[random.Random], bytes], ...] = (
    lambda rng: rng.randbytes(rng.choice((0, 1, 40, 700))),
    lambda rng: b"\x91" * rng.choice((100, 1000, 60_000)) + b"\xc0",  # nested lists
    lambda rng: b"\x81\xa1a" * rng.choice((100, 1000, 20_000)) + b"\xc0",  # nested maps
    lambda rng: b"\xdd" + rng.choice((b"\xff\xff\xff\xff", b"\x00\xff\xff\xff")),  # lists that hold less than they say
    lambda rng: b"\xdf\xff\xff\xff\xff" + rng.randbytes(20),
    lambda rng: b"\xdc\xff\xff" * rng.choice((1, 170, 20_000)),
    lambda rng: b"\x81\xa1v\xdb\xff\xff\xff\xff" + rng.randbytes(20),  # text, bytes, extensions that are 4 GiB long
    lambda rng: b"\x81\xa1v\xc6\xff\xff\xff\xff" + rng.randbytes(20),
    lambda rng: b"\x81\xa1v\xc9\xff\xff\xff\xff\x05" + rng.randbytes(20),
    lambda rng: rng.choice(
        (b"\x81\xa1v\xd9\x04\xff\xfe\xfd\xfc", b"\x81\xc0\xc0", b"\xc1")
    ),  # text that is no UTF-8; no type
    lambda rng: bytes(rng.choice(((64 << 10) + 1, 1 << 20))),  # longer than a header may be
    lambda rng: msgpack.packb(
        {"v": PROTOCOL, "k": "Hello", "r": "", "e": 0} | {f"f{i}": i for i in range(rng.randrange(99))}
    ),
    lambda rng: msgpack.packb({"v": rng.choice((0, PROTOCOL + 1, True, "5", 5.0)), "k": "Hello", "r": "", "e": 0}),
    lambda rng: msgpack.packb(
        {"v": PROTOCOL, "k": rng.choice(("", "Exec", "__class__", None, [], 7)), "r": "", "e": 0}
    ),
)
