"""Descriptors: that as many are allowed as may be, and that a connection is taken hold of by one that is set aside."""

from __future__ import annotations

import fcntl
import os
import resource
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

from broker import descriptors
from broker.descriptors import Grip

if TYPE_CHECKING:
    from pathlib import Path


def test_as_many_are_allowed_as_the_system_lets_it() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = max(map(int, os.listdir("/dev/fd"))) + 10
    resource.setrlimit(resource.RLIMIT_NOFILE, (low, hard))
    try:
        assert descriptors.allowed() == low
        most = descriptors.allow_all()
        assert most == descriptors.allowed() > low
        assert hard in (resource.RLIM_INFINITY, most) or most == 1 << 16
        assert descriptors.allow_all() == most
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_connection_is_held_no_longer_than_asked() -> None:
    grip = Grip()
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as near:
        far = server.accept()[0]
        number = far.fileno()
        with grip.hold(number) as held:
            assert held is not None
            assert held[1] == descriptors.identity(number)
            assert held[0].getpeername() == near.getsockname()
        far.close()
        assert near.recv(1) == b"", "nothing of it is kept open"
    with grip.hold(number) as held:
        assert held is None
    assert descriptors.identity(number) is None
    grip.close()


def test_what_is_a_file_by_now_is_not_taken_hold_of_and_keeps_its_locks(tmp_path: Path) -> None:
    """A connection's descriptor was a block's file by the time its closing was looked at, which ended a broker."""
    grip = Grip()
    with (tmp_path / "some").open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        with grip.hold(file.fileno()) as held:
            assert held is None
        check = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        other = subprocess.run([sys.executable, "-c", check, file.name], capture_output=True, text=True, check=False)
        assert "BlockingIOError" in other.stderr, "it would be free had the descriptor been duplicated and closed"
    reading, writing = os.pipe()
    with grip.hold(reading) as held:
        assert held is None
    os.close(reading)
    os.close(writing)
    grip.close()
