"""Descriptors: that as many are allowed as may be, and that a connection is taken hold of by one that is set aside."""

from __future__ import annotations

import os
import resource
import socket

from broker import descriptors
from broker.descriptors import Grip


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
