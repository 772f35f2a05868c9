"""A shaped link in user space: a TCP proxy with rate, delay and faults, for tests, benchmarks and by hand.

    with Link(("127.0.0.1", 5557), Shape(rate=5e6, delay_s=0.05)) as link:
        connect_to(link.endpoint)            # tcp://127.0.0.1:PORT

    python -m bench.link --listen 127.0.0.1:6000 --to 127.0.0.1:5557 --rate 10mbit --delay 50ms

"up" is from whoever connects to the target, "down" the way back. All connections of a link share its rate,
as they would share a cable. Socket buffers are small and nothing is read ahead, so that the sender feels the
rate. It moves bytes and knows no protocol; what it costs is one thread.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import signal
import socket
import sys
import threading
from typing import TYPE_CHECKING, Literal, Self

from bench.proxy import Address, Proxy, shrink
from bench.shaping import Cut, Shape
from parablock.units import UnitError, format_rate, parse_duration, parse_rate, parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Link:
    """A shaped link to `target`, open while its `with` block runs, in a thread with a loop of its own.

    `down` defaults to the same shape as `up`; `cuts` happen once each. Entering raises OSError where `listen`
    is taken. A target that refuses makes the link reset the connection, as a host without a listener would.
    """

    def __init__(
        self,
        target: Address,
        up: Shape | None = None,
        down: Shape | None = None,
        *,
        cuts: Sequence[Cut] = (),
        listen: Address = ("127.0.0.1", 0),
    ) -> None:
        self._target = target
        self._up = up or Shape()
        self._down = down or self._up
        self._cuts = tuple(cuts)
        self._listen = listen
        self._failure: BaseException | None = None

    def __enter__(self) -> Self:
        listener = socket.socket()
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # What is accepted inherits the buffers; later would be too late, the window is announced by then.
            shrink(listener, receive=self._up, send=self._down)
            listener.bind(self._listen)
            listener.listen(128)
            listener.setblocking(False)
        except BaseException:
            listener.close()
            raise
        self.address: Address = listener.getsockname()
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(listener, started), name="link", daemon=True)
        self._thread.start()
        started.wait()
        if self._failure is not None:
            raise self._failure
        return self

    def __exit__(self, *exc: object) -> None:
        self._call(self._proxy.stop.set)
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    @property
    def endpoint(self) -> str:
        """Where to connect, as ZeroMQ writes it."""
        return f"tcp://{self.address[0]}:{self.address[1]}"

    @property
    def delivered(self) -> tuple[int, int]:
        """Bytes handed over so far: (up, down)."""
        return self._proxy.up.delivered, self._proxy.down.delivered

    def reset(self) -> None:
        """Reset every open connection at both ends."""
        self._call(self._proxy.reset)

    def stall(self) -> None:
        """Make every open connection half-open: nothing passes, not even a close. New ones go through."""
        self._call(self._proxy.stall)

    def resume(self) -> None:
        """End a stall; what was on the way goes on, no byte is lost."""
        self._call(self._proxy.resume)

    def _call(self, action: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the link has ended by itself
            self._loop.call_soon_threadsafe(action)

    def _run(self, listener: socket.socket, started: threading.Event) -> None:
        async def main() -> None:
            self._loop = asyncio.get_running_loop()
            self._proxy = Proxy(self._target, self._up, self._down, self._cuts, self._loop.time())
            started.set()
            await self._proxy.serve(listener)

        try:
            asyncio.run(main())
        except BaseException as error:
            self._failure = error
        finally:
            listener.close()
            started.set()


def _parse_address(text: str) -> Address:
    host, _, port = text.removeprefix("tcp://").rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise UnitError(f"{text!r} is not an address; write it like 127.0.0.1:5557")
    return host, int(port)


def _parse_cut(text: str) -> Cut:
    match = re.fullmatch(r"(reset|stall)@([^:]+)(?::(up|down))?", text)
    if match is None:
        raise UnitError(f"{text!r} is not a cut; write it like reset@5MB, stall@30s or reset@5MB:down")
    kind: Literal["reset", "stall"] = "reset" if match[1] == "reset" else "stall"
    direction: Literal["up", "down"] = "down" if match[3] == "down" else "up"
    when = match[2]
    if when.endswith(("s", "min")):
        return Cut(kind, after_s=parse_duration(when))
    return Cut(kind, after_bytes=parse_size(when), direction=direction)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Exit codes: 0 at Ctrl-C or SIGTERM, 2 for a wrong argument or a taken port."""
    parser = argparse.ArgumentParser(prog="python -m bench.link", description="A shaped TCP link.")
    parser.add_argument("--listen", default="127.0.0.1:0", help="HOST:PORT (default: a free loopback port)")
    parser.add_argument("--to", required=True, help="where to connect to, as HOST:PORT")
    parser.add_argument("--rate", help="rate of each direction: 45mbit, 5MB/s (default: unlimited)")
    parser.add_argument("--rate-down", help="rate of the way back, where it differs")
    parser.add_argument("--delay", default="0", help="added to each direction: 50ms")
    parser.add_argument("--cut", action="append", default=[], help="reset@5MB, reset@5MB:down, stall@30s, ...")
    options = parser.parse_args(argv)
    try:
        delay_s = parse_duration(options.delay)
        rate = parse_rate(options.rate) if options.rate else None
        rate_down = parse_rate(options.rate_down) if options.rate_down else rate
        cuts = [_parse_cut(text) for text in options.cut]
        link = Link(
            _parse_address(options.to), Shape(rate, delay_s), Shape(rate_down, delay_s),
            cuts=cuts, listen=_parse_address(options.listen),
        )  # fmt: skip
    except ValueError as error:
        parser.error(str(error))
    stop = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop)  # before the thread starts, so that it inherits the mask
    try:
        with link:
            speed = format_rate(rate) if rate else "unlimited"
            print(f"{link.endpoint} -> {options.to}: {speed}, {delay_s * 1e3:g} ms each way", flush=True)
            signal.sigwait(stop)
    except OSError as error:
        print(f"cannot listen on {options.listen}: {error}; choose another port", file=sys.stderr)
        return 2
    print("carried {} bytes up, {} bytes down".format(*link.delivered))
    return 0


if __name__ == "__main__":
    sys.exit(main())
