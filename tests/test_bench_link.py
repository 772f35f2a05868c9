"""Shaped links: the arithmetic under a clock moved by hand, the proxy and the kernel's links on real sockets."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from bench.link import Link
from bench.link import main as link_main
from bench.netns import BROKER_HOST, FRAMING, KernelLinks, LinkError, kernel_links_available
from bench.network import NetworkError, choose, network
from bench.shaping import BURST_S, Cut, Lane, Shape, TokenBucket

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

TIMEOUT_S = 20.0


# Arithmetic ---------------------------------------------------------------------------------------------------


def test_a_bucket_gives_the_rate_whatever_the_pieces() -> None:
    rng = random.Random(3)
    bucket = TokenBucket(rate=1e6, burst=10_000, now=0.0)
    now, sent = 0.0, 0
    while now < 5.0:
        nbytes = rng.randint(1, 4000)
        now = bucket.depart(nbytes, now)  # the sender is held back until its bytes have left
        sent += nbytes
    assert sent / now == pytest.approx(1e6, rel=1e-9)


def test_an_idle_bucket_saves_up_no_more_than_its_burst() -> None:
    bucket = TokenBucket(rate=1000.0, burst=10, now=0.0)
    assert bucket.depart(100, 50.0) == pytest.approx(50.0 + 0.090)  # 10 bytes at once, 90 at the rate


def test_a_late_clock_costs_no_throughput() -> None:
    bucket = TokenBucket(rate=1e6, burst=1e6 * BURST_S, now=0.0)
    now = 0.0
    for _ in range(1000):
        now = bucket.depart(2000, now + 0.001)  # wakes 1 ms late every time
    assert now == pytest.approx(2.0, abs=0.002)


def test_a_lane_fires_each_cut_at_its_byte_and_forwards_the_rest() -> None:
    first, second = Cut("stall", after_bytes=10), Cut("reset", after_bytes=25)
    lane = Lane(Shape(), [second, first, Cut("reset", after_s=1.0)], now=0.0)
    assert lane.admit(4) == (4, None)
    assert lane.admit(30) == (6, first)
    assert lane.admit(24) == (15, second)
    assert lane.admit(9) == (9, None)


def test_the_delay_line_holds_what_the_delay_is_worth() -> None:
    lane = Lane(Shape(rate=1e6, delay_s=0.5), (), now=0.0)
    assert 500_000 <= lane.capacity <= 500_000 + 1e6 * BURST_S + lane.quantum
    assert lane.quantum <= 1e6 * BURST_S


def test_shapes_and_cuts_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="above zero"):
        Shape(rate=0.0)
    with pytest.raises(ValueError, match="negative"):
        Shape(delay_s=-1.0)
    with pytest.raises(ValueError, match="exactly one"):
        Cut("reset")
    with pytest.raises(ValueError, match="exactly one"):
        Cut("reset", after_bytes=1, after_s=1.0)


# The link in user space ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def through(link: Link, server: socket.socket) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection through the link: the client's end and the server's."""
    with socket.create_connection(link.address, TIMEOUT_S) as client:
        end, _ = server.accept()
        with end:
            end.settimeout(TIMEOUT_S)
            yield client, end


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(TIMEOUT_S)
        yield listening


def receive(end: socket.socket, nbytes: int) -> bytes:
    """Exactly so many bytes, or fewer where the stream ends."""
    data = bytearray()
    while len(data) < nbytes and (piece := end.recv(nbytes - len(data))):
        data += piece
    return bytes(data)


def until_reset(end: socket.socket) -> bytes:
    """Everything that comes before the reset, which must come."""
    data = bytearray()
    try:
        while piece := end.recv(1 << 16):
            data += piece
    except ConnectionResetError:
        return bytes(data)
    pytest.fail(f"the stream ended in good order after {len(data)} bytes")


def test_bytes_pass_unchanged_both_ways_and_the_end_is_told(server: socket.socket) -> None:
    payload = random.Random(1).randbytes(300_000)
    with Link(server.getsockname()) as link, through(link, server) as (client, end):
        client.sendall(payload)
        assert receive(end, len(payload)) == payload
        client.shutdown(socket.SHUT_WR)
        assert end.recv(1) == b""
        end.sendall(payload[::-1])  # the other direction is open still
        end.shutdown(socket.SHUT_WR)
        assert receive(client, len(payload) + 1) == payload[::-1]
    assert link.delivered == (len(payload), len(payload))


@pytest.mark.parametrize("delay_s", [0.0, 0.05])
def test_the_rate_holds_with_and_without_delay(server: socket.socket, delay_s: float) -> None:
    rate, nbytes = 4e6, 1_600_000
    with Link(server.getsockname(), Shape(rate, delay_s)) as link, through(link, server) as (client, end):
        # From the far end to the near one, so that the bytes wait in kernel buffers and no thread is needed.
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * nbytes)
        end.setblocking(False)
        start = time.monotonic()
        sent = end.send(bytes(nbytes))
        receive(client, 1)
        first = time.monotonic() - start
        receive(client, sent - 1)
        took = time.monotonic() - start - delay_s
    assert sent > 200_000
    # Never faster than the rate and its burst allow; how much slower depends on who else uses the machine.
    assert sent / rate - BURST_S <= took <= 1.5 * sent / rate + 0.2
    assert delay_s <= first <= delay_s + 0.5


def test_a_sender_feels_a_receiver_that_does_not_read(server: socket.socket) -> None:
    with Link(server.getsockname(), Shape(rate=1e9)) as link, through(link, server) as (client, end):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        client.settimeout(0.5)
        with pytest.raises(TimeoutError):
            client.sendall(bytes(64 << 20))


def test_each_direction_has_a_rate_of_its_own(server: socket.socket) -> None:
    up, down = Shape(rate=100e6), Shape(rate=0.5e6)
    with Link(server.getsockname(), up, down) as link, through(link, server) as (client, end):
        start = time.monotonic()
        client.sendall(bytes(100_000))
        receive(end, 100_000)
        took_up = time.monotonic() - start
        end.sendall(bytes(100_000))
        receive(client, 100_000)
        took_down = time.monotonic() - start - took_up
    assert took_down >= 0.2 - BURST_S > took_up


def test_a_reset_comes_after_exactly_so_many_bytes(server: socket.socket) -> None:
    payload = random.Random(2).randbytes(50_000)
    cuts = [Cut("reset", after_bytes=10_001), Cut("reset", after_bytes=10_002)]
    with Link(server.getsockname(), Shape(rate=50e6), cuts=cuts) as link:
        with through(link, server) as (client, end):
            client.sendall(payload)
            assert until_reset(end) == payload[:10_001]
            until_reset(client)
        with through(link, server) as (client, end):  # the count goes on over the next connection
            client.sendall(payload)
            assert until_reset(end) == payload[:1]
        with through(link, server) as (client, end):  # and no cut is left for this one
            client.sendall(payload)
            assert receive(end, len(payload)) == payload


def test_a_reset_of_the_way_down(server: socket.socket) -> None:
    with (
        Link(server.getsockname(), cuts=[Cut("reset", after_bytes=5, direction="down")]) as link,
        through(link, server) as (client, end),
    ):
        client.sendall(b"up is not counted")
        assert receive(end, 17) == b"up is not counted"
        end.sendall(b"downwards")
        assert until_reset(client) == b"downw"


def test_a_reset_after_a_time(server: socket.socket) -> None:
    with (
        Link(server.getsockname(), cuts=[Cut("reset", after_s=0.05)]) as link,
        through(link, server) as (client, end),
    ):
        assert until_reset(client) == until_reset(end) == b""


def test_a_stalled_connection_is_half_open_and_a_new_one_is_not(server: socket.socket) -> None:
    with (
        Link(server.getsockname(), cuts=[Cut("stall", after_bytes=4)]) as link,
        through(link, server) as (client, end),
    ):
        client.sendall(b"goneunheard")
        assert receive(end, 4) == b"gone"
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()  # with a reset, of which the server must not hear
        with through(link, server) as (again, other):
            again.sendall(b"back")
            assert receive(other, 4) == b"back"
        end.setblocking(False)
        with pytest.raises(BlockingIOError):
            end.recv(1)


def test_a_stall_that_ends_has_lost_nothing(server: socket.socket) -> None:
    payload = random.Random(4).randbytes(200_000)
    with (
        Link(server.getsockname(), cuts=[Cut("stall", after_bytes=100)]) as link,
        through(link, server) as (client, end),
    ):
        client.sendall(payload)
        assert receive(end, 100) == payload[:100]
        end.settimeout(0.05)
        with pytest.raises(TimeoutError):
            end.recv(1)
        link.resume()
        end.settimeout(TIMEOUT_S)
        assert receive(end, len(payload) - 100) == payload[100:]


def test_faults_by_hand(server: socket.socket) -> None:
    with Link(server.getsockname()) as link, through(link, server) as (client, end):
        client.sendall(b"1")
        assert receive(end, 1) == b"1"
        link.stall()
        end.settimeout(0.05)
        client.sendall(b"2")
        with pytest.raises(TimeoutError):
            end.recv(1)
        link.reset()
        end.settimeout(TIMEOUT_S)
        until_reset(end)


def test_a_target_that_refuses_is_a_reset_and_not_the_links_end() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        target = gone.getsockname()
    with Link(target) as link:
        with socket.socket() as client, contextlib.suppress(ConnectionResetError):
            client.settimeout(TIMEOUT_S)
            client.connect(link.address)  # the reset may come as early as this
            assert client.recv(1) != b"", "the stream ended in good order"
        with socket.create_server(target) as back, through(link, back) as (client, end):
            client.sendall(b"the target is back")
            assert receive(end, 18) == b"the target is back"


def test_leaving_resets_what_is_open(server: socket.socket) -> None:
    with Link(server.getsockname()) as link:
        client = socket.create_connection(link.address, TIMEOUT_S)
        end, _ = server.accept()
    with client, end:
        until_reset(end)
        until_reset(client)


def test_a_port_in_use_is_told(server: socket.socket) -> None:
    with pytest.raises(OSError, match="in use"), Link(("127.0.0.1", 1), listen=server.getsockname()):
        pass


def test_the_command_line_runs_until_it_is_told_to_end(server: socket.socket) -> None:
    host, port = server.getsockname()
    command = [sys.executable, "-m", "bench.link", "--to", f"{host}:{port}", "--rate", "800mbit", "--delay", "1ms"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        assert said.endswith("800 Mbit/s, 1 ms each way\n")
        listening = int(said.split()[0].rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", listening), TIMEOUT_S) as client:
            end, _ = server.accept()
            with end:
                client.sendall(b"hello")
                assert receive(end, 5) == b"hello"
                process.send_signal(signal.SIGTERM)
                assert process.stdout.read() == "carried 5 bytes up, 0 bytes down\n"
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--to", "nowhere"], "'nowhere' is not an address"),
        (["--to", "127.0.0.1:1", "--rate", "0mbit"], "above zero"),
        (["--to", "127.0.0.1:1", "--cut", "explode@5MB"], "is not a cut"),
        (["--to", "127.0.0.1:1", "--cut", "reset@never"], "is not a size"),
    ],
)
def test_the_command_line_says_what_is_wrong(
    arguments: Sequence[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        link_main(arguments)
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err


# Which link ---------------------------------------------------------------------------------------------------


def test_a_delay_is_the_user_space_links_alone() -> None:
    assert choose("auto", 0.05)[0] == "user"
    with pytest.raises(NetworkError, match="--link user"):
        choose("kernel", 0.05)


def test_without_root_there_are_no_kernel_links_and_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "need root" in (kernel_links_available() or "")
    assert choose("auto", 0.0)[0] == "user"
    with pytest.raises(NetworkError, match="need root"):
        choose("kernel", 0.0)


def test_a_user_space_network_has_a_link_of_its_own_for_each_client() -> None:
    with network("user", [1e6, 2e6, 3e6]) as links:
        assert len({links.bind, *links.endpoints}) == 4
        assert links.client_prefixes == ((), (), ())


# Links made by the kernel -------------------------------------------------------------------------------------

_unavailable = kernel_links_available()
kernel = pytest.mark.skipif(_unavailable is not None, reason=f"no kernel links: {_unavailable}")

_SERVER = f"""
import socket, time
with socket.create_server(("{BROKER_HOST}", 5557)) as server:
    print("listening", flush=True)
    end, _ = server.accept()
    total, began = len(end.recv(1)), time.monotonic()
    while piece := end.recv(1 << 20):
        total += len(piece)
    print((total - 1) / (time.monotonic() - began))
"""
_CLIENT = f"""
import socket
with socket.create_connection(("{BROKER_HOST}", 5557)) as client:
    client.sendall(bytes(NBYTES))
    client.shutdown(socket.SHUT_WR)
    client.recv(1)
"""


@kernel
@pytest.mark.slow
@pytest.mark.parametrize("rate", [2e6, 20e6])
def test_a_kernel_link_has_its_rate(rate: float) -> None:
    with (
        KernelLinks([1e6, rate]) as links,
        subprocess.Popen(
            [*links.broker_prefix, sys.executable, "-c", _SERVER], stdout=subprocess.PIPE, text=True
        ) as server,
    ):
        assert server.stdout is not None
        assert server.stdout.readline() == "listening\n"
        program = _CLIENT.replace("NBYTES", str(int(1.5 * rate)))
        subprocess.run([*links.client_prefix(1), sys.executable, "-c", program], check=True, timeout=60)
        measured = float(server.stdout.read())
    assert measured == pytest.approx(rate * FRAMING, rel=0.03)


@kernel
@pytest.mark.slow
def test_kernel_links_leave_nothing_behind_whatever_happens() -> None:
    def interrupted() -> None:
        with KernelLinks([1e6, 1e6]):
            assert len(_namespaces()) == 3
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert _namespaces() == []
    with pytest.raises(LinkError, match="tbf"), KernelLinks([1e6, 1e30]):
        pass
    assert _namespaces() == []


@kernel
@pytest.mark.slow
def test_what_a_killed_run_left_is_removed_by_the_next() -> None:
    program = (
        "import os, signal; from bench.netns import KernelLinks; "
        "KernelLinks([1e6]).__enter__(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.Popen([sys.executable, "-c", program])
    assert killed.wait(timeout=60) == -signal.SIGKILL
    assert len(_namespaces(killed.pid)) == 2
    with KernelLinks([1e6]):
        assert _namespaces(killed.pid) == []


def _namespaces(pid: int | None = None) -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if line.startswith(f"parablock-bench-{pid or os.getpid()}-")]
