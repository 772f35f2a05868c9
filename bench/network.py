"""Shaped links from a broker to its clients, made by the kernel or in user space, behind one description.

A benchmark asks for so many links of such a rate and gets back where the broker binds, where each client
connects, and what goes before their commands. How a link is made is in `bench.netns` and `bench.link`.
"""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from bench.link import Link
from bench.netns import BROKER_HOST, KernelLinks, kernel_links_available
from bench.shaping import Shape

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Kind = Literal["kernel", "user", "loopback"]

_PORT = 5557  # free by construction: the namespace is new


class NetworkError(ValueError):
    """The links that were asked for cannot be had here. The message says why and what to ask for instead."""


@dataclass(frozen=True)
class Network:
    """Links that exist: index i of the tuples is client i."""

    kind: Kind
    bind: str
    """Where the broker listens."""
    endpoints: tuple[str, ...]
    broker_prefix: tuple[str, ...]
    client_prefixes: tuple[tuple[str, ...], ...]


def choose(kind: Literal["kernel", "user", "auto"], delay_s: float) -> tuple[Kind, str]:
    """Which kind of link to use, and a sentence that says why. Raises NetworkError where it cannot be had."""
    if kind == "user":
        return "user", "user-space links, as asked"
    if delay_s:
        if kind == "kernel":
            raise NetworkError(f"a kernel link has no delay (asked: {delay_s:g} s); use --link user")
        return "user", "user-space links: only they have a delay"
    reason = kernel_links_available()
    if reason is None:
        return "kernel", "network namespaces, veth and tbf"
    if kind == "kernel":
        raise NetworkError(f"no kernel links here: {reason}; use --link user")
    return "user", f"user-space links, for there are no kernel links here: {reason}"


def loopback(clients: int) -> Network:
    """No links at all: so many clients and their broker on this machine, as fast as it is."""
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    return Network("loopback", endpoint, (endpoint,) * clients, (), ((),) * clients)


@contextlib.contextmanager
def network(kind: Kind, rates: Sequence[float], delay_s: float = 0.0) -> Iterator[Network]:
    """One link per rate (bytes per second each way), gone when the block ends.

    A kernel rate counts Ethernet frames, a user-space rate TCP payload: see `bench.netns.FRAMING`. End the
    processes that use the links within the block.
    """
    if kind == "kernel":
        assert not delay_s, "the kernel's tbf has no delay; `choose` refuses it"
        with KernelLinks(rates) as links:
            yield Network(
                kind=kind,
                bind=f"tcp://{BROKER_HOST}:{_PORT}",
                endpoints=(f"tcp://{BROKER_HOST}:{_PORT}",) * len(rates),
                broker_prefix=tuple(links.broker_prefix),
                client_prefixes=tuple(tuple(links.client_prefix(client)) for client in range(len(rates))),
            )
        return
    port = free_port()
    with contextlib.ExitStack() as stack:
        target = ("127.0.0.1", port)
        proxies = [stack.enter_context(Link(target, Shape(rate, delay_s))) for rate in rates]
        yield Network(
            kind=kind,
            bind=f"tcp://127.0.0.1:{port}",
            endpoints=tuple(link.endpoint for link in proxies),
            broker_prefix=(),
            client_prefixes=((),) * len(rates),
        )


def free_port() -> int:
    """A loopback port that nothing listens on now; somebody else could take it before the broker does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
