"""Shaped links made by the kernel: one network namespace per machine, joined by veth pairs with tbf on both ends.

    with KernelLinks([5.6e6, 5.6e6]) as links:
        subprocess.Popen([*links.broker_prefix, *broker_argv])     # binds tcp://10.77.0.1:PORT
        subprocess.Popen([*links.client_prefix(0), *worker_argv])

The broker has a namespace of its own with one address, `BROKER_HOST`; every client has one, and a link of its
own to the broker, so that clients share nothing but the broker. Upload and download do not share a rate. Needs
root, `ip` and `tc`. tbf gives rates only: delay and faults are the user-space `bench.link`'s.
"""

from __future__ import annotations

import ipaddress
import os
import re
import shutil
import subprocess
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Sequence

BROKER_HOST = "10.77.0.1"

FRAMING = 1448 / 1514
"""Payload of a full TCP segment over what tbf counts for it (MTU 1500, timestamps, Ethernet header)."""

_BURST_S = 0.010
_SEGMENT_BYTES = 16 << 10
"""Most that TCP hands down at once, which a network card cuts into packets. tbf would cut what is more than its bucket
holds, by the cores that train, and wake for each packet: at 20 Mbit/s that cost two clients 5 to 10 % of their compute,
which no real link does. In whole segments of 64 KiB, acknowledgements wait so long behind data that a link that is used
both ways carries 5 % less."""

_MIN_BURST_BYTES = 2 * _SEGMENT_BYTES
_QUEUE_S = 0.050
_NAME = "parablock-bench"


class LinkError(RuntimeError):
    """The kernel refused a part of the link. The message has the command and what it said."""


def kernel_links_available() -> str | None:
    """None where namespaces, veth and tbf work here; otherwise the reason why they do not."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"the program {tool} (package iproute2) is not installed"
    try:
        with KernelLinks([1e6]):
            return None
    except LinkError as error:
        return str(error)


class KernelLinks:
    """One link per entry of `rates` (bytes per second of Ethernet frames, each way), while the `with` lasts.

    Raises LinkError where the kernel refuses; whatever was made by then is removed, as it is on any exit.
    Processes inside must have ended first. Namespaces that a killed run left behind are removed on the way in.
    """

    def __init__(self, rates: Sequence[float]) -> None:
        if not all(rate > 0 for rate in rates):
            raise ValueError(f"a link's rate must be above zero bytes per second, got {list(rates)}")
        self._rates = tuple(rates)
        self._made: list[str] = []

    @property
    def broker_prefix(self) -> list[str]:
        """What to put before the broker's command."""
        return ["ip", "netns", "exec", self._name("broker")]

    def client_prefix(self, client: int) -> list[str]:
        """What to put before the command of client 0, 1, ..."""
        return ["ip", "netns", "exec", self._name(f"client{client}")]

    def __enter__(self) -> Self:
        _remove_stale()
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        while self._made:
            _run("ip", "netns", "del", self._made[-1])  # its interfaces, qdiscs and routes go with it
            self._made.pop()

    def _make(self) -> None:
        broker = self._namespace("broker")
        _run("ip", "-n", broker, "address", "add", f"{BROKER_HOST}/32", "dev", "lo")
        for index, rate in enumerate(self._rates):
            client = self._namespace(f"client{index}")
            near, far = "eth0", f"eth{index}"
            subnet = f"10.77.{1 + index // 64}.{4 * (index % 64)}"
            broker_address, client_address = (str(ipaddress.ip_address(subnet) + host) for host in (1, 2))
            _run("ip", "-n", client, "link", "add", near, "type", "veth", "peer", "name", far, "netns", broker)
            for namespace, device, address in (
                (client, near, client_address),
                (broker, far, broker_address),
            ):
                _run("ip", "-n", namespace, "address", "add", f"{address}/30", "dev", device)
                _run("ip", "-n", namespace, "link", "set", device, "gso_max_size", str(_SEGMENT_BYTES), "up")
                _run("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf", *_tbf(rate))
            _run("ip", "-n", client, "route", "add", "default", "via", broker_address)

    def _namespace(self, role: str) -> str:
        name = self._name(role)
        _run("ip", "netns", "add", name)
        self._made.append(name)
        _run("ip", "-n", name, "link", "set", "lo", "up")
        return name

    def _name(self, role: str) -> str:
        return f"{_NAME}-{os.getpid()}-{role}"


def _tbf(rate: float) -> list[str]:
    """tbf's arguments: a burst short enough to be smooth, a queue short enough not to hide a block."""
    burst = max(round(rate * _BURST_S), _MIN_BURST_BYTES)
    return ["rate", f"{round(rate * 8)}bit", "burst", f"{burst}b", "latency", f"{round(_QUEUE_S * 1e6)}us"]


def _remove_stale() -> None:
    listed = _run("ip", "netns", "list")
    for name, pid in re.findall(rf"^({_NAME}-(\d+)-\w+)", listed, re.MULTILINE):
        if not os.path.exists(f"/proc/{pid}"):
            _run("ip", "netns", "del", name)


def _run(*command: str) -> str:
    # A signal from the terminal goes to the whole group; here it must not break a command in the middle.
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
        raise LinkError(f"`{' '.join(command)}` failed: {said}")
    return done.stdout
