"""The bare exchange: the same bytes over pyzmq alone, as fast as it moves them: what parablock's is measured against.

    python -m bench.raw serve --endpoint-file FILE              # a ROUTER that sends every chunk back to its sender
    python -m bench.raw client --server ENDPOINT --gate ENDPOINT --nbytes N --chunk-bytes N --rounds N --report FILE

Encrypted as parablock's own connections are, by keys that both sides read in --keys; without it on neither side.

Blocking sockets, one frame a chunk, nothing copied, no high-water marks, no headers, checks, acknowledgements or
folds. The ROUTER returns the frame that it received, while it is in the cache: the echo is a block's worth for each
client, and up and down overlap as much as they can.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

import zmq

from bench.exchange import ENVIRONMENT, Client, exchange_s, read_clients
from bench.gate import Gate, Visitor
from bench.keyring import Keyring
from bench.processes import Children
from broker.authenticator import DOMAIN, Authenticator
from parablock import keys

if TYPE_CHECKING:
    from collections.abc import Sequence

_PATIENCE_S = 60.0


def measure(
    clients: int, nbytes: int, chunk_bytes: int, rounds: int, warm_up: int, folder: Path, *, plain: bool = False
) -> list[float]:
    """Seconds of each round after the warm-up, from the first client's first chunk to the last client's last one.

    folder: for sockets, logs and reports. Raises ChildError where a process fails, FiguresError as `exchange_s` does.
    """
    python = (sys.executable, "-m", "bench.raw")
    with tempfile.TemporaryDirectory(dir=folder, prefix="raw-") as temporary:
        place = Path(temporary)
        endpoint = place / "endpoint"
        reports = [place / f"client-{index}.json" for index in range(clients)]
        names = [report.stem for report in reports]
        ring = Keyring(place / "keys", names, plain=plain)
        with Gate(place / "gate", clients) as gate, Children(place) as children:
            children.start("server", [*python, "serve", "--endpoint-file", str(endpoint), *ring.light], ENVIRONMENT)
            children.until(endpoint.exists, _PATIENCE_S)
            sizes = ("--nbytes", str(nbytes), "--chunk-bytes", str(chunk_bytes), "--rounds", str(rounds))
            where = ("--server", endpoint.read_text(encoding="utf-8"), "--gate", gate.endpoint, *ring.light)
            started = [
                children.start(report.stem, [*python, "client", *where, *sizes, "--report", str(report)], ENVIRONMENT)
                for report in reports
            ]
            for child in started:
                children.wait(child, lambda: gate.passed, _PATIENCE_S)
        found: list[Client] = []
        for report in reports:
            found += read_clients(json.loads(report.read_text(encoding="utf-8")))
    return exchange_s(found, warm_up)


def serve(endpoint_file: Path, folder: Path | None) -> None:
    """Send every frame back to where it came from, until the process is ended. folder: keys; None: unencrypted."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    door = Authenticator(folder) if folder is not None else None
    router = context.socket(zmq.ROUTER)
    if door is not None:
        door.open(context)
        router.set(zmq.CURVE_SERVER, 1)
        router.set(zmq.CURVE_SECRETKEY, door.secret.key.encode())
        router.set(zmq.ZAP_DOMAIN, DOMAIN)
    _no_limits(router)
    router.bind("tcp://127.0.0.1:*")
    partial = endpoint_file.with_suffix(".partial")
    partial.write_bytes(cast("bytes", router.get(zmq.LAST_ENDPOINT)).rstrip(b"\0"))
    partial.rename(endpoint_file)
    while True:
        router.send_multipart(router.recv_multipart(copy=False), copy=False)


def take_part(options: argparse.Namespace) -> None:
    """Send a block up and take one down, `rounds` times."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    if options.keys is not None:
        own = keys.read_secret(options.keys / f"{options.report.stem}{keys.SECRET}").key.encode()
        broker = keys.read_public(options.keys / f"{keys.BROKER}{keys.PUBLIC}")
        dealer.set(zmq.CURVE_SERVERKEY, broker.key.encode())
        dealer.set(zmq.CURVE_SECRETKEY, own)
        dealer.set(zmq.CURVE_PUBLICKEY, zmq.curve_public(own))
    _no_limits(dealer)
    dealer.connect(options.server)
    visitor = Visitor(context, options.gate)
    block = memoryview(b"\x5a" * options.nbytes)
    chunks = [block[start : start + options.chunk_bytes] for start in range(0, options.nbytes, options.chunk_bytes)]
    dealer.send(b"hello")  # the connection stands before the clock runs
    dealer.recv()
    began, held = [], []
    for round in range(options.rounds):
        visitor.wait()
        began.append((round, time.monotonic()))
        for chunk in chunks:
            dealer.send(chunk, copy=False)
        missing = options.nbytes
        while missing:
            missing -= len(dealer.recv(copy=False))
        held.append((round, time.monotonic()))
    report = {"clients": [{"name": options.report.stem, "began": began, "held": held}]}
    options.report.write_text(json.dumps(report), encoding="utf-8")
    visitor.close()
    context.destroy(linger=0)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.raw", description=(__doc__ or "").partition("\n")[0])
    roles = parser.add_subparsers(dest="role", required=True)
    server = roles.add_parser("serve", help="the ROUTER")
    server.add_argument("--endpoint-file", type=Path, required=True, help="where to write the endpoint")
    client = roles.add_parser("client", help="a DEALER")
    client.add_argument("--server", required=True, metavar="ENDPOINT", help="the ROUTER's")
    client.add_argument("--gate", required=True, metavar="ENDPOINT", help="wait here before each round")
    client.add_argument("--nbytes", type=int, required=True, help="bytes of a block")
    client.add_argument("--chunk-bytes", type=int, required=True, help="bytes of a message")
    client.add_argument("--rounds", type=int, required=True, help="how often")
    client.add_argument("--report", type=Path, required=True, metavar="FILE", help="where to write the times, JSON")
    for role in (server, client):
        role.add_argument("--keys", type=Path, metavar="DIR", help="keys of both sides; without: unencrypted")
    options = parser.parse_args(argv)
    if options.role == "serve":
        serve(options.endpoint_file, options.keys)
    else:
        take_part(options)
    return 0


def _no_limits(socket: zmq.Socket[bytes]) -> None:
    """No high-water marks: what is under way is bounded by the blocks, and nothing blocks or is dropped."""
    socket.set(zmq.SNDHWM, 0)
    socket.set(zmq.RCVHWM, 0)


if __name__ == "__main__":
    sys.exit(main())
