"""The wire: every message comes back as it was, and no frame, however malformed, gives anything but a WireError."""

from __future__ import annotations

import dataclasses
import math
import random
import struct
import tracemalloc
import typing
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

import msgpack
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from parablock import messages, wire
from parablock.messages import (
    COLUMNS,
    PAYLOADS,
    PROTOCOL,
    Chunk,
    Commit,
    Evaluated,
    Heartbeat,
    Hello,
    Items,
    Join,
    Landed,
    Leave,
    Message,
    Offer,
    Payload,
    Probe,
    Probed,
    Real,
    Start,
    Terms,
    Text,
    Whole,
)
from parablock.wire import Envelope, WireError, decode, encode

if TYPE_CHECKING:
    from collections.abc import Callable

KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in get_args(Message)}
ALPHABETS = {
    "name": "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-",
    "hex": "0123456789abcdef",
}
FIRST = ALPHABETS["name"].rstrip("._-")  # of a name


# Values and messages, from the bounds that the messages declare


def values(hint: Any) -> st.SearchStrategy[Any]:
    """What a field of this type may hold."""
    if hint is bool:
        return st.booleans()
    base, bounds = get_args(hint)
    match bounds:
        case Whole(low, high):
            return st.integers(low, high) | st.sampled_from([low, high])
        case Real(low, high):
            return st.floats(low, high) | st.sampled_from([low, high, 0.0, -0.0])
        case Text(longest, "any"):
            return st.text(max_size=min(longest, 200))
        case Text(longest, "name"):
            more = st.text(ALPHABETS["name"], max_size=longest - 1)
            return st.builds(str.__add__, st.sampled_from(FIRST), more)
        case Text(longest, alphabet):
            return st.text(ALPHABETS[alphabet], min_size=1, max_size=longest)
        case Items(most):
            return st.lists(values(get_args(base)[0]), max_size=min(most, 50)).map(tuple)
    raise AssertionError(f"no strategy for {hint}")


def fields(kind: type[Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {item.name: hints[item.name] for item in dataclasses.fields(kind)}


def made(kind: type[Any]) -> st.SearchStrategy[Any]:
    return st.builds(kind, **{name: values(hint) for name, hint in fields(kind).items()})


payloads = st.binary(min_size=1, max_size=64)


@st.composite
def envelopes(draw: st.DrawFn, kind: type[Any] | None = None) -> Envelope:
    kind = kind or draw(st.sampled_from(list(KINDS.values())))
    message = draw(made(kind))
    columns = COLUMNS.get(kind, ())
    shortest = min((len(getattr(message, name)) for name in columns), default=0)
    message = dataclasses.replace(message, **{name: getattr(message, name)[:shortest] for name in columns})
    run = draw(st.just("") | st.text(ALPHABETS["name"], max_size=64))
    epoch = draw(st.integers(0, 2**63))
    if kind not in PAYLOADS or not (PAYLOADS[kind].required or draw(st.booleans())):
        return Envelope(run, epoch, message)
    payload = draw(payloads)
    if kind is not Chunk:
        return Envelope(run, epoch, message, memoryview(payload))
    return Envelope(run, epoch, dataclasses.replace(message, checksum=wire.checksum(payload)), memoryview(payload))


def simplest(kind: type[Any]) -> Envelope:
    """One valid envelope of this kind, the same in every run."""

    def value(hint: Any) -> Any:
        if hint is bool:
            return True
        base, bounds = get_args(hint)
        match bounds:
            case Whole(low, high):
                return max(low, min(1, high))
            case Real():
                return 1.5
            case Text(_, alphabet):
                return {"name": "a-1", "hex": "a1", "any": "any ü"}[alphabet]
            case Items(most):
                return (value(get_args(base)[0]),) * min(most, 2)

    message = kind(**{name: value(hint) for name, hint in fields(kind).items()})
    payload = b"payload!"
    if kind is not Chunk:
        required = kind in PAYLOADS and PAYLOADS[kind].required
        return Envelope("run", 7, message, memoryview(payload) if required else None)
    return Envelope("run", 7, dataclasses.replace(message, checksum=wire.checksum(payload)), memoryview(payload))


def header_of(envelope: Envelope) -> dict[str, Any]:
    header: dict[str, Any] = msgpack.unpackb(encode(envelope)[0])
    return header


def frames_of(header: Any, envelope: Envelope) -> list[bytes | memoryview]:
    """`header` in place of the envelope's own, with the envelope's payload."""
    packed: bytes = msgpack.packb(header)
    return [packed] if envelope.payload is None else [packed, envelope.payload]


def refused(frames: list[Any], *facts: str) -> str:
    with pytest.raises(WireError) as caught:
        decode(frames)
    for fact in facts:
        assert fact in str(caught.value)
    assert len(str(caught.value)) < 600  # a peer does not choose how much is logged
    return str(caught.value)


every_kind = pytest.mark.parametrize("kind", list(KINDS.values()), ids=list(KINDS))


def every_field(wanted: Callable[[Any], bool]) -> pytest.MarkDecorator:
    """Every field of every message whose bounds are `wanted`."""
    found = [(kind, name) for kind in KINDS.values() for name, hint in fields(kind).items() if wanted(bounds_of(hint))]
    assert found
    return pytest.mark.parametrize(("kind", "name"), found, ids=[f"{kind.__name__}.{name}" for kind, name in found])


def bounds_of(hint: Any) -> Any:
    return bool if hint is bool else get_args(hint)[1]


def with_field(kind: type[Any], name: str, value: Any) -> list[Any]:
    envelope = simplest(kind)
    return frames_of({**header_of(envelope), name: value}, envelope)


# What is right


@every_kind
@settings(max_examples=40)
@given(data=st.data())
def test_every_message_comes_back_as_it_was(kind: type[Any], data: st.DataObject) -> None:
    envelope = data.draw(envelopes(kind))
    decoded = decode(encode(envelope))
    assert decoded == envelope
    # Equal is not enough: 1 == True == 1.0, and a list would not be hashable.
    for name in fields(kind):
        assert type(getattr(decoded.message, name)) is type(getattr(envelope.message, name))
    assert hash(decoded.message) == hash(envelope.message)


@given(envelopes())
def test_frames_may_be_views_as_zeromq_gives_them(envelope: Envelope) -> None:
    assert decode([memoryview(bytes(frame)) for frame in encode(envelope)]) == envelope


def test_every_message_of_either_side_can_be_sent() -> None:
    both = set(get_args(messages.FromWorker)) | set(get_args(messages.FromBroker))
    declared = {kind for kind in vars(messages).values() if isinstance(kind, type)} - {
        Whole,
        Real,
        Text,
        Items,
        Payload,
    }
    assert set(KINDS.values()) == both
    assert {kind for kind in declared if kind.__module__ == messages.__name__} == both


@every_kind
def test_every_field_has_bounds(kind: type[Any]) -> None:
    for name, hint in fields(kind).items():
        assert hint is bool or get_origin(hint) is Annotated, name


def test_the_largest_messages_fit_into_a_header() -> None:
    most = 2**31
    join = Join("f" * 64, "f" * 64, "f" * 64, 2**53, (most,) * messages.MAX_BLOCKS, most)
    ahead = messages.MAX_IN_FLIGHT + 1
    last = messages.MAX_BLOCKS - 1
    start = Start(most, most, most, (most,) * messages.MAX_BLOCKS, (last,) * ahead, (True,) * ahead)
    terms = Terms("x" * 32_768, "a")
    leave = Leave("\U0001f984" * 1000)
    counts = (2**53,) * messages.MAX_TASKS
    labels = ("\U0001f984" * messages.MAX_LABEL,) * messages.MAX_TASKS
    evaluated = Evaluated(most, labels, counts, (1e38,) * messages.MAX_TASKS, counts, counts, counts)
    for message in (join, start, terms, leave, evaluated):
        envelope = Envelope("r" * 64, 2**63, message)
        assert decode(encode(envelope)) == envelope


def test_a_payload_is_passed_on_and_not_copied() -> None:
    buffer = bytearray(b"12345678")
    sent = encode(Envelope("run", 1, Chunk(3, 2, 1, 8, wire.checksum(memoryview(buffer))), memoryview(buffer)))
    assert isinstance(sent[1], memoryview)
    assert sent[1].obj is buffer
    received = decode(sent)
    assert received.payload is not None
    assert received.payload.obj is buffer
    assert received.message == Chunk(
        round=3, block=2, attempt=1, offset=8, checksum=xxhash.xxh3_64_intdigest(b"12345678")
    )


def test_a_payload_may_have_8_mib_and_not_a_byte_more() -> None:
    for nbytes, fits in ((wire.MAX_PAYLOAD_BYTES, True), (wire.MAX_PAYLOAD_BYTES + 1, False)):
        payload = memoryview(bytes(nbytes))
        frames = encode(Envelope("run", 1, Chunk(0, 0, 0, 0, wire.checksum(payload)), payload))
        if fits:
            assert decode(frames).payload == payload
        else:
            refused(list(frames), "the payload of a Chunk has 1 to 8388608 bytes", "8388609")


@pytest.mark.parametrize("message", [Probe(1, 0), Probed(1)])
def test_a_probe_has_at_most_1_mib_or_no_payload(message: Message) -> None:
    assert decode(encode(Envelope("", 0, message))).payload is None
    largest = memoryview(bytes(messages.MAX_PROBE_BYTES))
    assert decode(encode(Envelope("", 0, message, largest))).payload == largest
    frames = encode(Envelope("", 0, message, memoryview(bytes(messages.MAX_PROBE_BYTES + 1))))
    refused(list(frames), "1 to 1048576 bytes, got 1048577")


def test_a_whole_number_serves_where_a_real_one_is_expected() -> None:
    message = decode(with_field(Offer, "loss", 3)).message
    assert isinstance(message, Offer)
    assert (message.loss, type(message.loss)) == (3.0, float)


def test_what_we_send_ourselves_is_asserted() -> None:
    with pytest.raises(AssertionError, match="Leave has no payload"):
        encode(Envelope("run", 1, Leave("done"), memoryview(b"x")))
    with pytest.raises(AssertionError, match="Chunk has a payload"):
        encode(Envelope("run", 1, Chunk(0, 0, 0, 0, 0)))
    with pytest.raises(AssertionError, match=r"our own Terms\.config is text of at most 32768"):
        encode(Envelope("run", 1, Terms("x" * wire.MAX_HEADER_BYTES, "a")))
    with pytest.raises(AssertionError, match="our own header has"):
        encode(Envelope("run", 1, Terms("€" * 32_768, "a")))
    with pytest.raises(AssertionError, match=r"Evaluated\.loss_sums is a finite number"):
        encode(Envelope("run", 1, Evaluated(0, ("",), (1,), (float("nan"),), (1,), (0,), (0,))))


def test_the_lists_of_an_evaluation_are_of_one_length() -> None:
    for name, values in (("tasks", ["x"]), ("answered", []), ("rows", [1, 2, 3])):
        refused(with_field(Evaluated, name, values), "Evaluated: tasks, rows, loss_sums", "are of one length, got")
    with pytest.raises(AssertionError, match="our own Evaluated: tasks, rows, loss_sums"):
        encode(Envelope("run", 1, Evaluated(0, ("x", "y"), (1,), (0.5,), (1,), (0,), (0,))))


def test_a_message_without_bounds_is_our_own_bug() -> None:
    with pytest.raises(AssertionError, match="a field of a message has bounds"):
        wire._check_of("field", int)
    with pytest.raises(AssertionError, match="no check for"):
        wire._check_of("field", Annotated[int, "small"])


# Malformed frames: the number and size of frames


def test_one_or_two_frames_are_a_message() -> None:
    header = encode(simplest(Leave))[0]
    refused([], "got 0 frames")
    refused([header, b"", b""], "at most one payload frame, got 3 frames")


def test_a_header_that_is_too_long_is_refused_before_it_is_parsed() -> None:
    refused([bytes(wire.MAX_HEADER_BYTES + 1)], f"at most {wire.MAX_HEADER_BYTES} bytes")
    full = b"\xdb" + struct.pack(">I", wire.MAX_HEADER_BYTES - 5) + b"x" * (wire.MAX_HEADER_BYTES - 5)
    assert len(full) == wire.MAX_HEADER_BYTES
    refused([full], "not a map in valid msgpack")


@every_kind
def test_a_payload_comes_with_the_messages_that_have_one(kind: type[Any]) -> None:
    frames = encode(simplest(kind))
    if kind in PAYLOADS:
        refused([frames[0], b""], f"the payload of a {kind.__name__} has 1 to", "got 0")
        if PAYLOADS[kind].required:
            refused([frames[0]], f"{kind.__name__} has a payload, got none")
        else:
            assert decode([frames[0]]).payload is None
    else:
        refused([frames[0], b"extra"], f"{kind.__name__} has no payload, got one of 5 bytes")
        refused([frames[0], b""], f"{kind.__name__} has no payload")


def test_a_payload_that_was_changed_is_refused() -> None:
    header, payload = encode(simplest(Chunk))
    for position in range(len(payload) * 8):
        changed = bytearray(payload)
        changed[position // 8] ^= 1 << position % 8
        refused([header, bytes(changed)], "does not match its checksum")
    refused([header, bytes(payload)[:-1]], "does not match its checksum")
    refused(with_field(Chunk, "checksum", 0), "does not match its checksum")


# Malformed frames: the header's form


def test_a_header_is_a_map() -> None:
    for other in (1, "text", None, [1], ["v", 1], 1.5, True):
        refused([msgpack.packb(other)], "the header is not a map in valid msgpack")
    refused([b""], "the header is not a map in valid msgpack")
    refused([msgpack.packb({})], f"expected protocol version {PROTOCOL}, got None")


@every_kind
def test_a_header_that_was_cut_is_refused_at_every_length(kind: type[Any]) -> None:
    header, *payload = encode(simplest(kind))
    for length in range(len(header)):
        refused([bytes(header)[:length], *payload])


@every_kind
def test_a_header_with_something_behind_it_is_refused(kind: type[Any]) -> None:
    header, *payload = encode(simplest(kind))
    refused([bytes(header) + b"\xc0", *payload], "the header is not a map in valid msgpack: ExtraData")


def test_a_long_header_with_something_behind_it_is_refused() -> None:
    (header,) = encode(Envelope("run", 1, Terms("x" * 1000, "a")))
    refused([bytes(header) + b"\xc0"], f"the header ends after {len(header)} of {len(header) + 1} bytes")


@every_kind
def test_a_flipped_bit_is_refused_or_gives_another_valid_message(kind: type[Any]) -> None:
    header, *payload = encode(simplest(kind))
    for position in range(len(header) * 8):
        changed = bytearray(header)
        changed[position // 8] ^= 1 << position % 8
        try:
            decoded = decode([bytes(changed), *payload])
        except WireError:
            continue
        assert_in_bounds(decoded)


def assert_in_bounds(envelope: Envelope) -> None:
    """A decoded message holds nothing that its bounds do not allow."""

    def fits(hint: Any, value: Any) -> bool:
        if hint is bool:
            return type(value) is bool
        base, bounds = get_args(hint)
        match bounds:
            case Whole(low, high):
                return type(value) is int and low <= value <= high
            case Real(low, high):
                return type(value) is float and low <= value <= high
            case Text(longest, alphabet):
                allowed = ALPHABETS.get(alphabet)
                return (
                    type(value) is str
                    and len(value) <= longest
                    and (allowed is None or (value != "" and set(value) <= set(allowed)))
                    and (alphabet != "name" or value[0] in FIRST)
                )
            case Items(most):
                return (
                    type(value) is tuple
                    and len(value) <= most
                    and all(fits(get_args(base)[0], entry) for entry in value)
                )
        raise AssertionError(hint)

    for name, hint in fields(type(envelope.message)).items():
        assert fits(hint, getattr(envelope.message, name)), (name, envelope)
    assert set(envelope.run) <= set(ALPHABETS["name"])
    assert len(envelope.run) <= 64
    assert 0 <= envelope.epoch <= 2**63


def test_random_frames_are_refused() -> None:
    rng = random.Random("parablock/tests/wire")
    for _ in range(30_000):
        frames = [rng.randbytes(rng.randrange(40)) for _ in range(rng.choice([1, 1, 2]))]
        if rng.random() < 0.5:
            frames[0] = b"\x85\xa1v\x01\xa1k" + frames[0]  # far enough to meet the later checks too
        with pytest.raises(WireError):
            decode(frames)


def test_frames_with_random_changes_give_a_valid_message_or_are_refused() -> None:
    rng = random.Random("parablock/tests/wire/changes")
    originals = [encode(simplest(kind)) for kind in KINDS.values()]
    passed = 0
    for _ in range(20_000):
        header, *payload = rng.choice(originals)
        changed = bytearray(header)
        for _ in range(rng.randint(1, 3)):
            start = rng.randrange(len(changed) + 1)
            changed[start : start + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
        try:
            assert_in_bounds(decode([bytes(changed), *payload]))
        except WireError:
            continue
        passed += 1
    assert 0 < passed < 10_000


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=10)
    | st.binary(max_size=10)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=5)),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3) | st.integers(0, 3), inner, max_size=4)
    ),
    max_leaves=10,
)


@settings(max_examples=150)
@given(envelopes(), st.data())
def test_any_value_in_any_place_is_refused_or_allowed_there(envelope: Envelope, data: st.DataObject) -> None:
    header = header_of(envelope)
    header[data.draw(st.sampled_from([*header, "other"]))] = data.draw(anything)
    try:
        decoded = decode(frames_of(header, envelope))
    except WireError:
        return
    assert_in_bounds(decoded)


# Malformed frames: nesting, and what a few bytes can cost


@pytest.mark.parametrize("levels", [1, 2, 100, 990, 1000, 1020, 1024, 5000, 60_000])
@pytest.mark.parametrize("where", ["v", "k", "r", "e", "reason"])
@pytest.mark.parametrize(("opening", "inner"), [(b"\x91", b"\x01"), (b"\x81\xa1a", b"\x01"), (b"\x81", b"\x01\x01")])
def test_nesting_is_refused_at_any_depth(levels: int, where: str, opening: bytes, inner: bytes) -> None:
    if len(opening) * levels > wire.MAX_HEADER_BYTES - 100:
        levels = (wire.MAX_HEADER_BYTES - 100) // len(opening)
    header = header_of(simplest(Leave))
    frame = b"\x85" + b"".join(
        msgpack.packb(name) + (opening * levels + inner if name == where else msgpack.packb(value))
        for name, value in header.items()
    )
    refused([frame])


@pytest.mark.parametrize(
    "opening", [b"\xdc\x20\x00", b"\xdd\x00\x00\x20\x00", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff"]
)
def test_lists_that_announce_more_than_they_hold_cost_no_memory(opening: bytes) -> None:
    tracemalloc.start()
    try:
        refused([b"\x81\xa1v" + opening * 1000])
        refused([opening * 1000])
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_names_of_fields_are_text_and_come_once() -> None:
    refused([b"\x81\x01\x01"], "not a map in valid msgpack")
    refused([b"\x81\xc4\x00\x01"], "names of a header's fields are text")
    refused([b"\x82\xa1v\x01\xa1v\x01"], "each once; got")
    refused([b"\x81\x90\x01"])


def test_names_of_fields_are_text_and_come_once_in_long_headers_too() -> None:
    long = msgpack.packb("x" * 1000)
    refused([b"\x82\xa1v" + long + b"\x01\x01"], "the names of a header's fields are text, each once; got 1")
    refused([b"\x82\xa1v" + long + b"\xc4\x00\x01"], "names of a header's fields are text")
    refused([b"\x82\xa1v" + long + b"\xa1v\x01"], "each once; got")
    refused([b"\x82\xa1v" + long + b"\x90\x01"], "nested")


def test_an_empty_map_is_no_empty_list() -> None:
    refused(with_field(Start, "pending", {}), "Start.pending is a list of at most")
    assert decode(with_field(Start, "pending", [])).message == dataclasses.replace(simplest(Start).message, pending=())


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(b"\xc1", id="the byte that msgpack never uses"),
        pytest.param(b"\xc4\x01a", id="bytes"),
        pytest.param(b"\xd4\x01a", id="extension"),
        pytest.param(b"\xd6\xff\x00\x00\x00\x00", id="timestamp"),
        pytest.param(b"\xc7\x00\xff", id="empty timestamp"),
        pytest.param(b"\xc7\x00\x05", id="empty extension"),
        pytest.param(b"\xc4\x00", id="no bytes"),
        pytest.param(b"\xa1\xff", id="not UTF-8"),
        pytest.param(b"\xa3\xed\xa0\x80", id="surrogate"),
        pytest.param(b"\xdb\xff\xff\xff\xffx", id="text that announces 4 GiB"),
    ],
)
@pytest.mark.parametrize("where", ["v", "k", "r", "e", "reason"])
def test_forms_of_msgpack_that_no_field_has_are_refused(where: str, value: bytes) -> None:
    frame = b"\x85" + b"".join(
        msgpack.packb(name) + (value if name == where else msgpack.packb(own))
        for name, own in header_of(simplest(Leave)).items()
    )
    refused([frame])
    refused([b"\x81" + value + b"\x01"])


# Malformed frames: the frame's own fields, and each field of each message


@pytest.mark.parametrize(
    "version", [0, 1, PROTOCOL - 1, PROTOCOL + 1, True, float(PROTOCOL), str(PROTOCOL), None, [PROTOCOL]]
)
def test_another_version_is_refused(version: Any) -> None:
    refused(with_field(Leave, "v", version), f"expected protocol version {PROTOCOL}, got ")


@pytest.mark.parametrize("kind", ["", "leave", "Envelope", "Whole", "object", 1, None, True, ["Leave"]])
def test_another_kind_is_refused(kind: Any) -> None:
    refused(with_field(Leave, "k", kind), "there is no message of kind ")


def test_the_fields_of_the_frame_are_checked() -> None:
    for run in ("a b", "ü", "x" * 65, 1, None, "a\n"):
        refused(with_field(Leave, "r", run), "r ")
    for epoch in (-1, 2**63 + 1, True, 1.0, "1", None):
        refused(with_field(Leave, "e", epoch), "e is a whole number from 0 to ")


@every_kind
def test_a_missing_or_an_additional_field_is_refused(kind: type[Any]) -> None:
    envelope = simplest(kind)
    header = header_of(envelope)
    for name in header:
        left = {key: value for key, value in header.items() if key != name}
        refused(frames_of(left, envelope), *([f"{kind.__name__} has the fields "] if name in fields(kind) else []))
    refused(frames_of({**header, "other": 1}, envelope), f"{kind.__name__} has the fields ", "other")
    refused(frames_of({**header, "x" * 9999: 1}, envelope), f"{kind.__name__} has the fields ")


WRONG: list[Any] = [None, True, False, 1, -1, 1.5, "text", "", [], [1], ["text"], [None], [[1]], {}, {"a": 1}]


@every_kind
def test_a_value_of_another_type_is_refused_in_every_field(kind: type[Any]) -> None:
    envelope = simplest(kind)
    for name, hint in fields(kind).items():
        right: tuple[type, ...] = {Whole: (int,), Real: (int, float), Text: (str,), Items: (list,), type: (bool,)}[
            type(bounds_of(hint))
        ]
        for value in WRONG:
            if type(value) not in right:
                message = refused(frames_of({**header_of(envelope), name: value}, envelope))
                assert f"{kind.__name__}.{name} is " in message or "nested" in message


@every_field(lambda bounds: isinstance(bounds, Whole))
def test_a_whole_number_out_of_bounds_is_refused(kind: type[Any], name: str) -> None:
    bounds: Whole = bounds_of(fields(kind)[name])
    for value in (bounds.low - 1, bounds.high + 1, -(2**63), 2**64 - 1):
        if value >= 2**64 or bounds.low <= value <= bounds.high:
            continue  # msgpack has no larger ones, and a checksum may be any of 64 bits
        refused(with_field(kind, name, value), f"{kind.__name__}.{name} is a whole number from {bounds.low} to ")


@every_field(lambda bounds: isinstance(bounds, Real))
def test_a_number_that_is_not_finite_or_out_of_bounds_is_refused(kind: type[Any], name: str) -> None:
    bounds: Real = bounds_of(fields(kind)[name])
    below, above = math.nextafter(bounds.low, -math.inf), math.nextafter(bounds.high, math.inf)
    for value in (math.nan, math.inf, -math.inf, below, above, 1.7e308):
        refused(with_field(kind, name, value), f"{kind.__name__}.{name} is a finite number from ")


@every_field(lambda bounds: isinstance(bounds, Text))
def test_text_that_is_too_long_or_of_another_alphabet_is_refused(kind: type[Any], name: str) -> None:
    bounds: Text = bounds_of(fields(kind)[name])
    refused(with_field(kind, name, "a" * (bounds.longest + 1)), f"text of at most {bounds.longest} characters")
    if bounds.alphabet != "any":
        for value in ("", "a b", "ä", "a\n", "\n", "a/b", "\0"):
            refused(with_field(kind, name, value), f"{kind.__name__}.{name} has characters outside its alphabet")
    if bounds.alphabet == "name":
        for value in (".", "..", ".hidden", "-x", "_x"):
            refused(with_field(kind, name, value), "outside its alphabet (name)")
    if bounds.alphabet == "hex":
        refused(with_field(kind, name, "ABC"), "outside its alphabet (hex)")


@every_field(lambda bounds: isinstance(bounds, Items))
def test_a_list_that_is_too_long_or_holds_something_else_is_refused(kind: type[Any], name: str) -> None:
    bounds: Items = bounds_of(fields(kind)[name])
    item: Any = get_args(get_args(fields(kind)[name])[0])[0]  # of tuple[item, ...]
    fits, *others = {
        type: (True, 1, "1", -(2**63)),  # that is, bool
        Text: ("a", 1, True, "a" * 1000),
        Real: (1.5, True, "1", 1e300),
        Whole: (1, True, "1", -(2**63)),
    }[type(bounds_of(item))]
    refused(with_field(kind, name, [fits] * (bounds.most + 1)), f"a list of at most {bounds.most} items")
    for entry in (None, math.nan, *others):
        refused(with_field(kind, name, [entry] if bounds.most == 1 else [fits, entry]), f"{kind.__name__}.{name} is ")


@every_field(lambda bounds: bounds is bool)
def test_a_number_is_not_a_flag(kind: type[Any], name: str) -> None:
    for value in (0, 1, 1.0, "true", None):
        refused(with_field(kind, name, value), f"{kind.__name__}.{name} is true or false, got ")


def test_the_examples_of_this_file_are_valid() -> None:
    # Else the refusals above would prove nothing.
    for kind in KINDS.values():
        envelope = simplest(kind)
        assert decode(encode(envelope)) == envelope
        assert decode(frames_of(header_of(envelope), envelope)) == envelope
    assert isinstance(simplest(Hello).message, Hello)
    assert simplest(Heartbeat).message == Heartbeat(1.5, 1, 1, "a-1")
    assert simplest(Commit).message == Commit(1, 1, 1, 1, 1, 1, counted=True, blocks=(1,), trains=(True,), ahead_s=1.5)
    assert simplest(Landed).message == Landed(1, *((1.5, 1.5),) * 4, 1.5, 1.5, 1.5, 1, 1, 1.5)
