"""The door of the broker's socket: whose key is let in, and whose it is. Nobody gets past the handshake without it.

libzmq encrypts and proves keys (CURVE); what a key may do it asks here (ZAP, RFC 27), once for each connection, before
anything of it is read. Who is not on the allow-list is refused. The list is looked at for each answer, and each second;
when a client's key is no longer on it, its frames are nobody's from that moment on, and the broker hears of it. A list
that is gone, or empty, ends everybody's session, and may be so only while an editor saves it: that holds if the look a
moment later finds the same.

A thread of its own, so that the door stands while a model is being loaded and the event loop has not begun. Should it
fail, everybody is refused, and the broker is told, if need be when it begins to listen.
"""

from __future__ import annotations

import math
import os
import socket
import threading
import time
from typing import TYPE_CHECKING

import zmq
from zmq.utils import z85

from parablock import keys
from parablock.allow_list import FILE, AllowList
from parablock.keys import KeyFileError, SecretKey

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DOMAIN = b"parablock"

_HANDLER = "inproc://zeromq.zap.01"
_LOOK_MS = 1000
_MOMENT_S = 0.9
"""So long nobody may have been on the list before that is believed."""
_MOST_STRANGERS = 64
"""So many keys that are on no list are told of; whoever makes new ones all day fills no log."""

_ALLOWED, _FOR_NOW, _REFUSED = b"200", b"300", b"400"
"""300 closes the connection without a word, so that the client comes again; 400 tells it that it is refused."""


class Authenticator:
    """folder: the broker's keys folder, with its secret key and the allow-list."""

    def __init__(self, folder: Path) -> None:
        """Raises KeyFileError where a file is missing or wrong."""
        self.secret: SecretKey = keys.read_secret(folder / f"{keys.BROKER}{keys.SECRET}")
        self.public: str = zmq.curve_public(self.secret.key.encode()).decode()
        self.folder = folder
        self._path = folder / FILE
        self._seen = _stamp(self._path)
        self._read = True  # what was seen; else it is to be read again
        self._trouble = ""  # why it could not be read, as was told
        self._emptied_at: float | None = None  # when nobody was found on it, on the monotonic clock
        self._list = AllowList.read(folder)
        self._barred: dict[str, float] = {}  # by key: until when, on the monotonic clock
        self._lock = threading.Lock()
        self._strangers: set[bytes] = set()
        self._say: Callable[[str], object] = lambda _text: None
        self._on_revoked: Callable[[str], object] = lambda _client: None
        self._on_failure: Callable[[BaseException], object] = lambda _error: None
        self._failure: BaseException | None = None  # before anybody listened
        self._waiting: list[tuple[bool, str]] = []  # what happened before anybody listened: (revoked, text)
        self._heard = False
        self._wake, self._woken = socket.socketpair()
        self._thread: threading.Thread | None = None

    def open(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        """Stand at the door of `context`: to be called before any socket of it is bound."""
        handler = context.socket(zmq.REP)
        handler.set(zmq.LINGER, 0)
        handler.bind(_HANDLER)
        self._thread = threading.Thread(target=self._run, args=(handler,), name="door", daemon=True)
        self._thread.start()

    def listen(
        self,
        on_revoked: Callable[[str], object],
        say: Callable[[str], object],
        on_failure: Callable[[BaseException], object],
    ) -> None:
        """From now on be told, on the door's thread, of clients that are no longer let in, and what people should read;
        and of what happened before."""
        with self._lock:
            self._on_revoked, self._say, self._on_failure, self._heard = on_revoked, say, on_failure, True
            waiting, self._waiting = self._waiting, []
            failure = self._failure
        for revoked, text in waiting:
            (on_revoked if revoked else say)(text)
        if failure is not None:
            on_failure(failure)

    @property
    def clients(self) -> list[str]:
        """Names of those that are let in."""
        return sorted(self._list.names.values())

    def client(self, user: str) -> str | None:
        """Whose the frames with this User-Id are: the name on the list as it is now; None: nobody's any more."""
        return self._list.names.get(user)

    def bar(self, client: str, until: float) -> None:
        """Let a client's key in no more before `until`, on the monotonic clock; connections that it has are not
        touched. Whoever has its name with another key is another one."""
        with self._lock:
            self._barred.update({key: until for key, name in self._list.names.items() if name == client})

    def close(self) -> None:
        """Closing again does nothing."""
        if self._thread is not None:
            self._wake.send(b"\0")
            self._thread.join()
            self._thread = None
        self._wake.close()
        self._woken.close()

    # On the door's thread

    def _run(self, handler: zmq.Socket[bytes]) -> None:
        poller = zmq.Poller()
        poller.register(handler, zmq.POLLIN)
        poller.register(self._woken.fileno(), zmq.POLLIN)
        try:
            while True:
                ready = dict(poller.poll(_LOOK_MS))
                if self._woken.fileno() in ready:
                    return
                self._look()  # each answer is by the list as it is
                if handler in ready:
                    handler.send_multipart(self._answer(handler.recv_multipart()))
        except Exception as error:
            with self._lock:
                heard, self._failure = self._heard, error
            if heard:
                self._on_failure(error)
        finally:
            handler.close()

    def _answer(self, request: list[bytes]) -> list[bytes]:
        """The reply to a request of ZAP 1.0: version, number, domain, address, routing id, mechanism, credentials."""
        version, number, domain, address, _, mechanism, *credentials = request
        code, text, user = self._judge(domain, mechanism, credentials, address.decode(errors="replace"))
        return [version, number, code, text.encode(), user, b""]

    def _judge(
        self, domain: bytes, mechanism: bytes, credentials: list[bytes], address: str
    ) -> tuple[bytes, str, bytes]:
        """Status code and text, and the User-Id that the connection's frames will bear."""
        if domain != DOMAIN or mechanism != b"CURVE" or len(credentials) != 1 or len(credentials[0]) != 32:
            return _REFUSED, "CURVE only", b""
        key = z85.encode(credentials[0])
        client = self._list.names.get(key.decode())
        if client is None:
            self._refused(credentials[0], key.decode(), address)
            return _REFUSED, "this key is not allowed", b""
        with self._lock:
            if time.monotonic() < self._barred.get(key.decode(), -math.inf):
                return _FOR_NOW, "barred for a while", b""
            self._barred.pop(key.decode(), None)
        return _ALLOWED, client, key

    def _refused(self, raw: bytes, key: str, address: str) -> None:
        if raw in self._strangers or len(self._strangers) >= _MOST_STRANGERS:
            return
        self._strangers.add(raw)
        more = "; of others nothing will be said" if len(self._strangers) == _MOST_STRANGERS else ""
        self._tell(
            f"refused a connection from {address}: the key with the fingerprint {keys.fingerprint(key)} is not on the "
            f"list; if it is a client's, let it in: parablock keys allow FILE.public{more}"
        )

    def _look(self) -> None:
        """Read the list if it has changed, or could not be read. As long as it cannot, nothing changes."""
        stamp = _stamp(self._path)
        if self._read and stamp == self._seen:
            return
        self._seen, self._read = stamp, False
        try:
            newer = AllowList.read(self.folder)
        except KeyFileError as error:
            if self._trouble != str(error):
                self._trouble = str(error)
                self._tell(f"the list of clients stays as it was: {error}")
            return
        self._trouble = ""
        if not newer.clients and not self._is_believed():
            return
        self._read, self._emptied_at = True, None
        gone = self._list.gone(newer)
        with self._lock:
            self._barred = {key: until for key, until in self._barred.items() if self._list.same(newer, key)}
            self._list = newer
        for client in gone:
            self._tell(client, revoked=True)

    def _is_believed(self) -> bool:
        """That nobody is on the list, which has just been found."""
        if not self._list.clients:
            return True
        now = time.monotonic()
        if self._emptied_at is None:
            self._emptied_at = now
            self._tell(
                f"NOBODY IS ON THE LIST OF CLIENTS any more ({self._path} is {'empty' if self._seen else 'gone'}): if "
                f"that is so in a second, the sessions end of {', '.join(self.clients)}"
            )
        return now >= self._emptied_at + _MOMENT_S

    def _tell(self, text: str, *, revoked: bool = False) -> None:
        with self._lock:
            if not self._heard:
                self._waiting.append((revoked, text))
                return
        (self._on_revoked if revoked else self._say)(text)


def _stamp(path: Path) -> tuple[int, int, int, int] | None:
    """What changes with a file, its mode and owner included; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino
