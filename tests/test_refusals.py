"""A refusal in the handshake, which anybody on the way can forge: how often it is heard before it is believed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from typing import TYPE_CHECKING

import pytest

from broker.pairs import new_pair
from parablock import allow_list
from parablock.participant_events import End
from tests.test_authenticator import Desk, credentials, until
from workers.handshakes import Refusals
from workers.link import Link

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

GREETING = b"\xff" + b"\0" * 7 + b"\x01\x7f\x03\x00" + b"CURVE".ljust(20, b"\0") + b"\x01" + b"\0" * 31
ERROR = b"\x04\x0a\x05ERROR\x03400"


class Forger:
    """Sits on the way to `target`, and answers every HELLO by a refusal, while it is on: no key is needed for that."""

    def __init__(self, target: str = "") -> None:
        self.on = True
        self.times = 0
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._one, args=(self._listener.accept()[0],), daemon=True).start()

    def _one(self, near: socket.socket) -> None:
        with near, contextlib.suppress(OSError):
            if not self.on:
                host, port = self._target.removeprefix("tcp://").split(":")
                with socket.create_connection((host, int(port))) as far:
                    threading.Thread(target=_pass_on, args=(far, near), daemon=True).start()
                    self.far = far
                    _pass_on(near, far)
                return
            near.sendall(GREETING)
            heard = b""
            while len(heard) < 64 + 200:
                if not (data := near.recv(4096)):
                    return
                heard += data
            self.times += 1
            near.sendall(ERROR)
            near.recv(1)

    def close(self) -> None:
        self._listener.close()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)


@pytest.fixture
def ring(tmp_path: Path) -> Path:
    new_pair(tmp_path, "broker")
    allow_list.allow(tmp_path, new_pair(tmp_path, "a"), "noon")
    return tmp_path


@contextlib.contextmanager
def linked(ring: Path, endpoint: str, refused_s: float, patience_s: float = 60.0) -> Iterator[Link]:
    link = Link(endpoint, "a", "ab" * 16, patience_s, lambda: None, None, credentials(ring, "a"), refused_s=refused_s)
    try:
        yield link
    finally:
        link.close()


def test_so_many_and_later_each_time() -> None:
    refusals = Refusals(1.0, 5.0)
    assert [refusals.denied() for _ in range(3)] == [1.0, 2.0, None]
    refusals = Refusals(1.0, 5.0)
    assert (refusals.denied(), refusals.new, refusals.denied(), refusals.new) == (1.0, True, 2.0, False)
    refusals.done()
    assert [refusals.denied() for _ in range(6)] == [1.0, 2.0, 4.0, 5.0, 5.0, 5.0], "for as long as there is patience"
    refusals.done()
    assert refusals.denied() == 1.0


def test_what_is_said_between_a_refusal_and_the_next_try_is_lost_and_no_more(ring: Path) -> None:
    async def scenario() -> None:
        forger = Forger()
        with linked(ring, forger.endpoint, 60.0) as link:
            await until(lambda: link._again is not None)
            for _ in range(3):
                link._socket.send([b"header", memoryview(b"payload")])
            assert link.gone is None
        forger.close()

    asyncio.run(scenario())


def test_who_was_never_let_in_believes_the_third_one(ring: Path) -> None:
    async def scenario() -> None:
        forger = Forger()
        with linked(ring, forger.endpoint, 0.05) as link:
            await until(lambda: link.gone is not None)
            assert link.gone is not None
            assert link.gone.end is End.REFUSED
            assert "does not let our key in" in link.gone.reason
        assert forger.times == 3
        forger.close()

    asyncio.run(scenario())


def test_a_forged_refusal_ends_nobody_who_can_still_get_through(ring: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "worker")

    async def scenario() -> None:
        desk = Desk(ring)
        forger = Forger(desk.router.endpoint)
        with linked(ring, forger.endpoint, 0.3) as link:
            await until(lambda: forger.times == 1)
            forger.on = False
            await until(lambda: len(desk.got) > 0)  # it has come again, and greets
            # In session once, it is not put off by any number of them.
            forger.on = True
            forger.far.shutdown(socket.SHUT_RDWR)
            link._refusals._first_s = 0.01
            link._refusals._longest_s = 0.02
            await until(lambda: forger.times >= 6)
            assert link.gone is None
            forger.on = False
            before = len(desk.got)
            await until(lambda: len(desk.got) > before)
        assert sum("does not let our key in" in record.message for record in caplog.records) == 2, "once each time"
        desk.router.close()
        forger.close()

    asyncio.run(scenario())


def test_patience_ends_it(ring: Path) -> None:
    async def scenario() -> None:
        forger = Forger()
        with linked(ring, forger.endpoint, 0.05, patience_s=0.5) as link:
            link._refusals.done()
            await until(lambda: link.gone is not None)
            assert link.gone is not None
            assert link.gone.end is End.LOST
        forger.close()

    asyncio.run(scenario())
