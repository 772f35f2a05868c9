"""Nothing of a client's text leaves it: sentences are planted in its rows, and looked for in all that a broker gets.

Two workers train on them beside a broker that is not encrypted, through a link that writes down every byte, both ways.
Looked for are the planted words, their tokens' ids in each form in which numbers are written, and the names of files:
in the bytes of the link and in everything the broker leaves: its folder with journal, events, metrics, trace and
blocks, its log, and the report made of it. (Labels of tasks and of `partition.field` are told, as the README says;
here there are none.)
"""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import struct
import threading
from typing import TYPE_CHECKING, Self

import msgpack
import pytest

from parablock import models, report
from parablock.run_folder import RunFolder
from tests.processes import SMALL, Process, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.timeout(300)

WORDS = ("Zephyrine", "Quillfeather", "xanthic", "Oubliette")
SENTENCE = f"{WORDS[0]} {WORDS[1]} was seen with {WORDS[2]} spots in {WORDS[3]}."
FILE_NAME = "patients-of-ward-seven.jsonl"


class Recorder:
    """A link that is in the way: a TCP port here, the broker's there, and all bytes that pass either way."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self.heard: list[bytes] = []
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for each in self._sockets:
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it was closed
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                self._sockets += near, far
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._pass, args=(one, other), daemon=True).start()

    def _pass(self, one: socket.socket, other: socket.socket) -> None:
        pieces: list[bytes] = []
        with contextlib.suppress(OSError):
            while piece := one.recv(1 << 16):
                pieces.append(piece)
                other.sendall(piece)
            other.shutdown(socket.SHUT_WR)
        self.heard.append(b"".join(pieces))  # a needle may be in two of them


def needles() -> dict[str, bytes]:
    """What must be nowhere, by what it is."""
    found = {f"the word {word}": word.encode() for word in WORDS}
    found |= {f"the word {word} in UTF-16": word.encode("utf-16-le") for word in WORDS}
    found |= {f"the word {word} in hexadecimal": word.encode().hex().encode() for word in WORDS}
    for shift in range(3):  # of six bits to a letter, wherever the word begins
        inner = base64.b64encode(bytes(shift) + SENTENCE.encode())[4:-4]
        found[f"the sentence in base64, shifted by {shift}"] = inner[:24]
    found["the name of the file"] = FILE_NAME.encode()
    found["the name of its folder"] = b"from-ward-seven"
    ids = models.load("builtin", dtype="float32", seed=0).tokenizer(SENTENCE)["input_ids"][2:10]
    assert len(set(ids)) > 3, "the numbers say something"
    for letter, name in (("q", "int64"), ("i", "int32"), ("h", "int16")):
        for order in "<>":
            found[f"token ids as {name} ({order})"] = struct.pack(f"{order}{len(ids)}{letter}", *ids)
    found["token ids as float32"] = struct.pack(f"<{len(ids)}f", *ids)
    found["token ids in msgpack"] = b"".join(msgpack.packb(each) for each in ids)
    for comma in (",", ", ", " "):
        found[f"token ids as text, with {comma!r}"] = comma.join(map(str, ids)).encode()
    return found


def leaks(places: Iterator[tuple[str, bytes]]) -> list[tuple[str, str]]:
    """(where, what)."""
    looked_for = needles()
    return [(place, what) for place, data in places for what, needle in looked_for.items() if needle in data]


def left_behind(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield str(path.relative_to(folder)), path.read_bytes()
        yield f"the name {path.name}", path.name.encode()


def test_nothing_of_a_clients_text_is_on_the_wire_or_at_the_broker(tmp_path: Path) -> None:
    theirs = tmp_path / "from-ward-seven"
    theirs.mkdir()
    rows = [{"question": f"{SENTENCE} How many? {number}", "answer": f"{number} {SENTENCE}"} for number in range(60)]
    data = theirs / FILE_NAME
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    broker_side = tmp_path / "broker"
    broker_side.mkdir()
    out, log = broker_side / "run", broker_side / "broker.log"
    settings = SMALL | {"network.bind": "tcp://127.0.0.1:*", "rounds": 2, "eval.rows": 8}
    settings |= {"data.prompt": "question", "data.completion": "answer", "data.max_tokens": 256}
    overrides = [f"--set={key}={value}" for key, value in settings.items() if key != "data.eval"]
    processes = [Process("broker", ["--out", str(out), "--allow-plain-tcp", *overrides], log)]
    try:
        wait_for((out / "endpoint").exists)
        host, _, port = (out / "endpoint").read_text().strip().removeprefix("tcp://").rpartition(":")
        with Recorder((host, int(port))) as recorder:
            for index in range(2):
                arguments = ["--broker", recorder.endpoint, "--allow-plain-tcp", "--name", f"w{index}"]
                arguments += ["--data", str(data), "--shard", f"{index}/2", "--eval", str(data)]
                arguments += ["--threads", "1", "--device", "cpu", "--state", str(tmp_path / f"state-{index}")]
                processes.append(Process("workers", arguments, tmp_path / f"worker-{index}.log"))
            assert processes[0].wait(timeout=120) == 0, log.read_text()
            logs = [(tmp_path / f"worker-{index}.log").read_text() for index in range(2)]
            assert [process.wait(timeout=30) for process in processes[1:]] == [0, 0], logs
            wait_for(lambda: len(recorder.heard) == 4)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    with RunFolder.open(out) as folder:
        rounds = [row for row in folder.read_metrics() if row["kind"] == "round"]
    assert len(rounds) == 2
    assert all(row["contributors"] == ["w0", "w1"] for row in rounds), "they have trained on it"
    assert report.main([str(out)]) == 0
    wire = b"".join(recorder.heard)
    assert len(wire) > sum(row["bytes_up"] for row in rounds), "all of it was written down"
    assert all(kind in wire for kind in (b"Offer", b"Chunk", b"Landed", b"Evaluated", b"Heartbeat"))
    behind = list(left_behind(broker_side))
    assert {"broker.log", "run/journal.sqlite", "run/events.jsonl", "run/trace.json", "run/report/index.html"} <= {
        place for place, _ in behind
    }
    assert leaks(iter([("the wire", wire), *behind])) == []


def test_what_is_looked_for_is_found_where_it_is() -> None:
    for what, needle in needles().items():
        assert leaks(iter([("here", b"before" + needle + b"behind")])), what
    assert leaks(iter([("here", json.dumps({"text": SENTENCE}).encode())]))
    assert leaks(iter([("here", b"nothing")])) == []
