"""A hostile peer, or many: raw bytes, broken handshakes, endless messages, and every message at the wrong moment.

An attack is what one connection does. It counts what it has sent: a message, or whatever stands for one below messages.
What the broker does about it is measured elsewhere; here nothing is expected of it but that each wait ends.
"""

from __future__ import annotations

import random
import secrets
import time
from collections import Counter
from typing import TYPE_CHECKING

from zmq.utils import z85

from bench import mutations, synthetic, zmtp
from bench.zmtp import Closed, Raw
from parablock import keys, wire
from parablock.messages import PROTOCOL, Chunk, Credit, Heartbeat, Hello, Join, Offer, Probe

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable
    from pathlib import Path

    from parablock.manifest import Manifest
    from parablock.messages import FromWorker

_ENDLESS_BYTES = 256 << 20
_PATIENCE_S = 0.25  # a key that is barred is left without an answer
_PORTION = 16
"""Messages of one connection, about."""


class Attacker:
    """Attacks the broker at `endpoint`, from a thread, so fast as `rate` says, while it is `let`.

    folder: the keys folder, in which the secrets of `guests` lie, who are on the list; None: nothing is encrypted. run:
    the name of what the broker serves.
    """

    def __init__(
        self, endpoint: str, manifest: Manifest, folder: Path | None, guests: list[str], run: str, seed: int
    ) -> None:
        self.sent: Counter[str] = Counter()
        self._address = zmtp.address(endpoint)
        self._manifest = manifest
        self._rng = random.Random(seed)
        self._server = b""
        self._pairs: list[tuple[bytes, bytes]] = []
        if folder is not None:
            self._server = z85.decode(keys.read_public(folder / f"{keys.BROKER}{keys.PUBLIC}").key)
            for name in guests:
                secret = keys.read_secret(folder / f"{name}{keys.SECRET}")
                public = keys.read_public(folder / f"{name}{keys.PUBLIC}")
                self._pairs.append((z85.decode(secret.key), z85.decode(public.key)))
        self._run, self._epoch = run, 1
        self._guest = 0

    def attack(self, count: int, rate: float, let: Callable[[], bool], over: threading.Event) -> None:
        """Until so many were sent, or it is over. let: whether it may go on now; else it waits."""
        began, before = time.monotonic(), 0
        while self.total < count and not over.is_set():
            if not let():
                time.sleep(0.01)
                began, before = time.monotonic(), self.total
                continue
            self._once()
            ahead_s = (self.total - before) / rate - (time.monotonic() - began)
            if ahead_s > 0:
                time.sleep(min(ahead_s, 0.05))

    @property
    def total(self) -> int:
        return sum(self.sent.values())

    def _once(self) -> None:
        kinds: list[Callable[[], None]] = [self._garbage, self._greetings, self._half, *[self._session] * 6]
        if self._server:
            kinds += [self._stranger, self._handshake]
        kind = self._endless if self._rng.random() < 0.01 else self._rng.choice(kinds)
        try:
            kind()
        except (TimeoutError, Closed, ConnectionError):
            self.sent[kind.__name__.strip("_")] += 1  # it was cut off, which is an answer

    # Below messages

    def _garbage(self) -> None:
        with Raw(self._address, _PATIENCE_S) as raw:
            raw.put(self._rng.choice((b"GET / HTTP/1.1\r\n\r\n", self._rng.randbytes(300), bytes(5000), b"\xff" * 10)))
            self.sent["garbage"] += 1

    def _greetings(self) -> None:
        """A greeting with something wrong, and something behind it."""
        rng = self._rng
        mechanism = rng.choice((b"NULL", b"PLAIN", b"CURVE", b"GSSAPI", b"", b"\xff" * 20, rng.randbytes(20)))
        spoilt = bytearray(zmtp.greeting(mechanism, (rng.choice((0, 1, 2, 3, 255)), rng.randrange(3))))
        if rng.random() < 0.5:
            spoilt[rng.randrange(len(spoilt))] ^= 1 << rng.randrange(8)
        behind = rng.choice(
            (
                zmtp.command(b"READY", zmtp.metadata(b"x" * 255)),
                zmtp.command(b"READY", b"\x05Socke" + b"\xff\xff\xff\xff"),
                zmtp.command(
                    rng.choice((b"", b"PING", b"ERROR", b"SUBSCRIBE", b"HELLO")), rng.randbytes(rng.randrange(250))
                ),
                zmtp.header(2**63 - 1, zmtp.COMMAND),
                zmtp.header(1 << 40, zmtp.MORE),
                zmtp.header(wire.MAX_PAYLOAD_BYTES, 0) + rng.randbytes(100),
                zmtp.frame(b"a message before the handshake"),
                rng.randbytes(200),
            )
        )
        with Raw(self._address, _PATIENCE_S) as raw:
            raw.put(bytes(spoilt) + behind)
            self.sent["greetings"] += 1

    def _half(self) -> None:
        """Some of a handshake."""
        with Raw(self._address, _PATIENCE_S) as raw:
            raw.put(zmtp.greeting(b"CURVE" if self._server else b"NULL")[: self._rng.randrange(65)])
            self.sent["half"] += 1

    def _handshake(self) -> None:
        """CURVE's, with a command that is spoilt."""
        rng = self._rng
        with Raw(self._address, _PATIENCE_S) as raw:
            self.sent["handshake"] += 1
            if rng.random() < 0.4:
                raw.put(zmtp.greeting(b"CURVE"))
                raw.get(64)
                raw.put(zmtp.command(b"HELLO", rng.randbytes(rng.choice((0, 10, 194, 195, 250)))))
                return
            boxes = raw.hello(self._server)
            _, body = raw.get_command()
            secret, public = self._next_pair()
            initiate = bytearray(
                boxes.initiate(body, secret, public, zmtp.metadata(b"x", rng.choice((b"PUB", b"DEALER"))))
            )
            initiate[rng.randrange(2, len(initiate))] ^= 1 << rng.randrange(8)
            raw.put(bytes(initiate))

    def _stranger(self) -> None:
        """A key that is on no list, or no key at all."""
        with Raw(self._address, _PATIENCE_S) as raw:
            self.sent["stranger"] += 1
            if self._rng.random() < 0.5:
                raw.null(b"nobody")
                raw.put(zmtp.frame(mutations.nasty(self._rng)))
            else:
                public, secret = zmtp.key_pair()
                raw.curve(b"nobody", secret, public, self._server)

    def _endless(self) -> None:
        """A message whose last frame never comes."""
        with self._greeted(b"endless") as raw:
            piece, sent = bytes(1 << 20), 0
            self.sent["endless"] += 1
            while sent < _ENDLESS_BYTES:
                raw.send(piece, more=True)
                sent += len(piece)
                time.sleep(0.002)  # what is measured is the broker, not how fast two cores can copy

    # Messages

    def _session(self) -> None:
        """A connection that behaves for a while, and then does not."""
        rng = self._rng
        with self._greeted(rng.choice((b"w" + secrets.token_bytes(16), b"", b"w", b"\0zero"))) as raw:
            if rng.random() < 0.7:
                self._learn(raw)
            for _ in range(rng.randint(1, 2 * _PORTION)):
                frames = (
                    mutations.message(rng, self._run, self._epoch)
                    if rng.random() < 0.5
                    else mutations.frames_of(*self._plausible(), self._run, self._epoch)
                ) or [b""]
                raw.put(b"".join(raw.sealed(f, more=index + 1 < len(frames)) for index, f in enumerate(frames)))
                self.sent["session"] += 1

    def _learn(self, raw: Raw) -> None:
        """Greet, so that what follows has the run's name and is of a session."""
        rng = self._rng
        for message in (Hello("mallory", f"{rng.getrandbits(64):x}", PROTOCOL), self._join()):
            frame = mutations.frames_of(message, None, self._run, self._epoch)[0]
            raw.send(frame)
            self.sent["session"] += 1
            if rng.random() < 0.3:
                return

    def _join(self) -> Join:
        versions = (0,) * len(self._manifest.blocks)
        return Join(
            self._manifest.digest, synthetic.WEIGHTS, synthetic.TOKENIZER, 5, versions, self._rng.choice((-1, 0, 3))
        )

    def _plausible(self) -> tuple[FromWorker, bytes | None]:
        """What a worker could say, at another moment."""
        rng = self._rng
        round, block = rng.randrange(200), rng.randrange(len(self._manifest.blocks))
        nbytes = 4 * self._manifest.blocks[block].numel
        payload = rng.randbytes(rng.choice((4, min(nbytes, 1 << 16))))
        return rng.choice(
            (
                (Offer(round, block, nbytes, 1, 1, 0.5), None),
                (Chunk(round, block, 0, 0, wire.checksum(memoryview(payload))), payload),
                (Credit(round, block, rng.randrange(3), nbytes, nbytes), None),
                (Heartbeat(rng.uniform(-1e9, 1e9), round, 0, rng.choice(("training", "waiting", "calling"))), None),
                (Probe(1, rng.choice((0, 1 << 16))), None),
                (self._join(), None),
            )
        )

    def _greeted(self, routing_id: bytes) -> Raw:
        raw = Raw(self._address, _PATIENCE_S)
        try:
            if self._server:
                raw.curve(routing_id, *self._next_pair(), self._server)
            else:
                raw.null(routing_id)
        except BaseException:
            raw.close()
            raise
        return raw

    def _next_pair(self) -> tuple[bytes, bytes]:
        """(secret, public) of a guest, each in turn: one that was barred has time."""
        self._guest += 1
        return self._pairs[self._guest % len(self._pairs)]
