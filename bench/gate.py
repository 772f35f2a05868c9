"""A gate between rounds: whoever comes waits until all have come. It keeps rounds apart that a benchmark times.

The gate stands in the benchmark's own process, and what it costs is outside of what is timed: a client comes to it
when it holds its block, and starts its clock when it is let through.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Self

import zmq
import zmq.asyncio

if TYPE_CHECKING:
    from pathlib import Path

_POLL_MS = 100


class Gate:
    """Open while the `with` block lasts. `path`: of a socket in the file system, which namespaces share too."""

    def __init__(self, path: Path, parties: int) -> None:
        self.endpoint = f"ipc://{path}"
        self.passed = 0
        """How often all have been let through: what a benchmark may take for progress."""
        self._parties = parties
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gate")
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.bind(self.endpoint)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._closed.set()
        self._thread.join()
        self._context.destroy(linger=0)

    def _run(self) -> None:
        waiting: list[bytes] = []
        while not self._closed.is_set():
            if not self._socket.poll(_POLL_MS):
                continue
            peer, _ = self._socket.recv_multipart()
            waiting.append(peer)
            if len(waiting) == self._parties:
                self.passed += 1  # before anyone is through who may look
                for each in waiting:
                    self._socket.send_multipart([each, b""])
                waiting.clear()


class Visitor:
    """One party's way through the gate, for a process without an event loop."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
        self._socket = context.socket(zmq.DEALER)
        self._socket.connect(endpoint)

    def wait(self) -> None:
        self._socket.send(b"")
        self._socket.recv()

    def close(self) -> None:
        self._socket.close(linger=0)


class AsyncVisitor:
    """One party's way through the gate, on the running event loop."""

    def __init__(self, context: zmq.asyncio.Context, endpoint: str) -> None:
        self._socket = context.socket(zmq.DEALER)
        self._socket.connect(endpoint)

    async def wait(self) -> None:
        await self._socket.send(b"")
        await self._socket.recv()

    def close(self) -> None:
        self._socket.close(linger=0)
