"""The door over real sockets: who is let in, as whom, for how long; that no session can be replayed."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import secrets
import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest
import zmq

from broker.authenticator import Authenticator, _stamp
from broker.pairs import new_pair
from broker.socket import RouterSocket
from parablock import allow_list, keys
from parablock.keys import KeyFileError
from workers.handshakes import Handshake
from workers.socket import Credentials, DealerSocket

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.timeout(60)
HERE = "tcp://127.0.0.1:*"


@pytest.fixture
def ring(tmp_path: Path) -> Path:
    """A broker's keys folder, with the clients a and b on its list, and a stranger's pair."""
    for name in ("broker", "a", "b", "stranger"):
        new_pair(tmp_path, name)
    for name in ("a", "b"):
        allow_list.allow(tmp_path, keys.read_public(tmp_path / f"{name}.public"), "noon")
    return tmp_path


def credentials(ring: Path, name: str, broker: str = "broker") -> Credentials:
    return Credentials(keys.read_secret(ring / f"{name}.secret"), keys.read_public(ring / f"{broker}.public").key)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - the sockets call back, they set no event
            await asyncio.sleep(0.002)


class Desk:
    """A broker's socket with a door, and what came of it."""

    def __init__(self, ring: Path) -> None:
        self.door = Authenticator(ring)
        self.router = RouterSocket(HERE, self.door)
        self.got: list[tuple[bytes, list[bytes], str | None]] = []
        self.revoked: list[str] = []
        self.said: list[str] = []
        self.router.listen(lambda peer, frames, client: self.got.append((peer, [bytes(f) for f in frames], client)))
        self.door.listen(self.revoked.append, self.said.append, _fail)

    def bodies(self) -> list[tuple[bytes, str | None]]:
        return [(frames[0], client) for _, frames, client in self.got]


class Client:
    def __init__(self, desk: Desk, who: Credentials | None, identity: bytes = b"", endpoint: str = "") -> None:
        self.handshakes: list[Handshake] = []
        self.got: list[bytes] = []
        identity = identity or b"w" + secrets.token_bytes(8)
        self.socket = DealerSocket(
            endpoint or desk.router.endpoint,
            identity,
            lambda frames: self.got.append(bytes(frames[0])),
            None,
            who,
            self.handshakes.append,
        )


def _fail(error: BaseException) -> None:
    raise error


@contextlib.asynccontextmanager
async def opened(ring: Path) -> AsyncIterator[tuple[Desk, Callable[..., Client]]]:
    desk, clients = Desk(ring), []

    def client(who: Credentials | None, **more: object) -> Client:
        clients.append(Client(desk, who, **more))  # type: ignore[arg-type]
        return clients[-1]

    try:
        yield desk, client
    finally:
        for each in clients:
            each.socket.close(0)
        desk.router.close()
        desk.router.close()  # again does nothing


def test_a_clients_name_is_what_the_list_says_of_its_key(ring: Path) -> None:
    async def scenario() -> None:
        async with opened(ring) as (desk, client):
            a = client(credentials(ring, "a"))
            a.socket.send([b"hello", memoryview(bytes(100_000))])
            await until(lambda: len(desk.got) == 1)
            peer, frames, who = desk.got[0]
            assert ([len(frame) for frame in frames], who) == ([5, 100_000], "a")
            assert desk.router.send(peer, [b"welcome", memoryview(bytes(100_000))])
            await until(lambda: a.got == [b"welcome"])
            assert a.handshakes == [Handshake.DONE]

    asyncio.run(scenario())


def test_an_unknown_key_is_refused_and_told(ring: Path) -> None:
    async def scenario() -> None:
        async with opened(ring) as (desk, client):
            stranger, plain = client(credentials(ring, "stranger")), client(None)
            for each in (stranger, plain):
                each.socket.send([b"let me in"])
            await until(lambda: stranger.handshakes == [Handshake.DENIED])
            client(credentials(ring, "a")).socket.send([b"last"])
            await until(lambda: len(desk.got) > 0)
            assert desk.bodies() == [(b"last", "a")]
            assert plain.got == []
            (said,) = desk.said
            assert keys.read_public(ring / "stranger.public").fingerprint in said
            assert "127.0.0.1" in said

    asyncio.run(scenario())


def test_nobody_is_let_in_where_there_is_no_list(ring: Path) -> None:
    async def scenario() -> None:
        async with opened(ring) as (desk, client):
            a = client(credentials(ring, "a"))
            await until(lambda: Handshake.DENIED in a.handshakes)
            assert desk.got == []

    (ring / "clients.toml").unlink()
    asyncio.run(scenario())


@pytest.mark.parametrize("early", [False, True])
def test_nobody_is_let_in_where_the_door_has_failed_and_the_broker_is_told(
    ring: Path, early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """early: before the broker listens, while it loads its model."""

    async def scenario() -> None:
        async with opened(ring) as (desk, client):
            failures: list[BaseException] = []
            desk.door._heard = not early
            desk.door._on_failure = failures.append
            client(credentials(ring, "a")).socket.send([b"before"])
            await until(lambda: desk.bodies() == [(b"before", "a")])
            monkeypatch.setattr(desk.door, "_answer", lambda _request: 1 / 0)
            b = client(credentials(ring, "b"))  # which is on the list
            b.socket.send([b"after"])
            await until(lambda: len(b.handshakes) >= 2)
            assert len(failures) == (0 if early else 1)
            if early:
                desk.door.listen(desk.revoked.append, desk.said.append, failures.append)
            assert [type(failure) for failure in failures] == [ZeroDivisionError]
            assert set(b.handshakes) == {Handshake.FAILED}
            assert desk.bodies() == [(b"before", "a")]

    monkeypatch.setattr("broker.socket.HANDSHAKE_MS", 200)
    asyncio.run(scenario())


def test_a_broker_with_another_key_is_not_spoken_to(ring: Path) -> None:
    async def scenario() -> None:
        async with opened(ring) as (desk, client):
            a = client(credentials(ring, "a", broker="b"))
            a.socket.send([b"a secret"])
            await until(lambda: len(a.handshakes) >= 3)
            assert set(a.handshakes) == {Handshake.FAILED}
            assert desk.got == []

    asyncio.run(scenario())


def test_a_change_of_the_list_holds_for_who_is_there_and_who_comes(ring: Path) -> None:
    async def scenario() -> None:
        async with opened(ring) as (desk, client):
            a, b = client(credentials(ring, "a")), client(credentials(ring, "b"))
            for each in (a, b):
                each.socket.send([b"1"])
            await until(lambda: len(desk.got) == 2)
            allow_list.revoke(ring, "a", "later")
            allow_list.allow(ring, keys.read_public(ring / "stranger.public"), "later", name="c")
            await until(lambda: desk.revoked == ["a"])
            a.socket.send([b"2"])  # on a connection that stands
            again, c = client(credentials(ring, "a")), client(credentials(ring, "stranger"))
            await until(lambda: Handshake.DENIED in again.handshakes)
            for each in (b, c):
                each.socket.send([b"2"])
            await until(lambda: len(desk.got) == 4)
            assert sorted(desk.bodies()[2:]) == [(b"2", "b"), (b"2", "c")]
            assert desk.door.clients == ["b", "c"]

    asyncio.run(scenario())


def rewrite(path: Path, text: str) -> None:
    """All at once: the door looks at any moment."""
    beside = path.with_name("beside")
    beside.touch(0o600)
    beside.write_text(text)
    beside.replace(path)


def test_a_list_that_cannot_be_read_changes_nothing_and_is_told(ring: Path) -> None:
    async def scenario() -> None:
        async with opened(ring) as (desk, client):
            intact = (ring / "clients.toml").read_text()
            rewrite(ring / "clients.toml", "[[client]")
            await until(lambda: len(desk.said) == 1)
            assert "the list of clients stays as it was: " in desk.said[0]
            client(credentials(ring, "a")).socket.send([b"still me"])
            await until(lambda: desk.bodies() == [(b"still me", "a")])
            rewrite(ring / "clients.toml", intact.replace('"a"', '"z"'))
            await until(lambda: desk.revoked == ["a"])
            assert desk.door.clients == ["b", "z"]

    asyncio.run(scenario())


def test_a_list_is_read_again_until_it_can_be_and_told_of_once(ring: Path) -> None:
    """The cause may not be in the file at all: here it is the folder's mode."""

    async def scenario() -> None:
        async with opened(ring) as (desk, client):
            b = client(credentials(ring, "b"))
            b.socket.send([b"hello"])
            await until(lambda: len(desk.got) == 1)
            text = (ring / "clients.toml").read_text().replace('"a"', '"z"')
            os.chmod(ring, 0o755)
            (ring / "clients.toml").write_text(text)
            await until(lambda: len(desk.said) == 1)
            assert f"the list of clients stays as it was: others may look into the keys folder {ring}" in desk.said[0]
            told = desk.door._seen
            os.chmod(ring, 0o700)
            await until(lambda: desk.revoked == ["a"])
            assert len(desk.said) == 1
            assert desk.door._seen == told, "nothing of the file has changed"

    asyncio.run(scenario())


def test_a_change_of_the_mode_alone_is_seen(ring: Path) -> None:
    before = _stamp(ring / "clients.toml")
    os.chmod(ring / "clients.toml", 0o400)
    assert _stamp(ring / "clients.toml") != before


@pytest.mark.parametrize("how", ["gone", "empty"])
def test_a_list_that_is_away_for_a_moment_ends_nobodys_session(
    ring: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    door = Authenticator(ring)
    said: list[str] = []
    revoked: list[str] = []
    door.listen(revoked.append, said.append, _fail)
    now = 0.0
    monkeypatch.setattr("broker.authenticator.time.monotonic", lambda: now)
    path = ring / "clients.toml"
    text = path.read_text()
    for _ in range(2):
        path.unlink() if how == "gone" else path.write_text("")
        for _ in range(3):  # looks at the same moment, as handshakes come
            door._look()
        (told,) = said
        assert told.startswith("NOBODY IS ON THE LIST OF CLIENTS any more")
        assert told.endswith(f"is {how}): if that is so in a second, the sessions end of a, b")
        path.write_text(text)
        path.chmod(0o600)
        now += 5
        door._look()
        assert (revoked, door.clients) == ([], ["a", "b"])
        said.clear()
    path.unlink()
    door._look()
    now += 1
    door._look()
    assert (revoked, door.clients) == (["a", "b"], [])
    door.close()


def test_a_bar_is_the_keys_and_lifted_when_that_is_revoked(ring: Path) -> None:
    door = Authenticator(ring)

    def answer(name: str) -> bytes:
        return door._judge(b"parablock", b"CURVE", [keys.raw(keys.read_public(ring / f"{name}.public").key)], "")[0]

    door.bar("a", time.monotonic() + 100)
    door.bar("b", time.monotonic() + 100)
    assert (answer("a"), answer("b")) == (b"300", b"300")
    allow_list.revoke(ring, "a", "later")
    allow_list.allow(ring, keys.read_public(ring / "stranger.public"), "later", name="a")
    door._look()
    assert (answer("stranger"), answer("a"), answer("b")) == (b"200", b"400", b"300")
    allow_list.allow(ring, keys.read_public(ring / "a.public"), "later", name="c")
    door._look()
    assert answer("a") == b"200"
    door.close()


def test_a_revoked_key_keeps_no_connection_that_has_said_nothing(ring: Path) -> None:
    async def scenario() -> None:
        async with opened(ring) as (desk, client):
            spoken, b = client(credentials(ring, "a")), client(credentials(ring, "b"), identity=b"b")
            silent = [client(credentials(ring, "a")) for _ in range(5)]
            honest = client(credentials(ring, "b"))
            for each in (spoken, b):
                each.socket.send([b"hello"])
            await until(lambda: len(desk.got) == 2)
            await until(lambda: all(Handshake.DONE in each.handshakes for each in (*silent, honest)))
            allow_list.revoke(ring, "a", "later")
            await until(lambda: desk.revoked == ["a"])
            desk.router.drop(b"", "a")  # as the coordinator has it done
            await until(lambda: all(Handshake.DENIED in each.handshakes for each in (spoken, *silent)))
            honest.socket.send([b"come again"])
            await until(lambda: (b"come again", "b") in desk.bodies())
            assert len(desk.router._guard._connections) == 2

    asyncio.run(scenario())


def test_what_comes_by_a_revoked_key_costs_its_connection_and_nobody_elses(ring: Path) -> None:
    async def scenario() -> None:
        async with opened(ring) as (desk, client):
            b, spoken = client(credentials(ring, "b"), identity=b"b's"), client(credentials(ring, "a"))
            for each in (b, spoken):
                each.socket.send([b"hello"])
            await until(lambda: len(desk.got) == 2)
            evil = client(credentials(ring, "a"), identity=b"b's")
            await until(lambda: Handshake.DONE in evil.handshakes)
            allow_list.revoke(ring, "a", "later")
            await until(lambda: desk.revoked == ["a"])
            for each in (evil, spoken):
                each.socket.send([b"flood", memoryview(bytes(1 << 20))])
            await until(lambda: all(Handshake.DENIED in each.handshakes for each in (evil, spoken)))
            await until(lambda: b.handshakes == [Handshake.DONE, Handshake.DONE])
            b.socket.send([b"mine again"])
            await until(lambda: len(desk.got) == 3)
            assert desk.bodies()[2] == (b"mine again", "b")
            assert desk.router.send(b"b's", [b"welcome back"])
            await until(lambda: b.got == [b"welcome back"])

    asyncio.run(scenario())


def test_who_is_barred_stays_out_until_the_time_is_over(ring: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.socket.HANDSHAKE_MS", 200)  # libzmq keeps a connection that is barred for so long

    async def scenario() -> None:
        async with opened(ring) as (desk, client):
            desk.door.bar("a", math.inf)
            a = client(credentials(ring, "a"))
            a.socket.send([b"now?"])
            await until(lambda: Handshake.FAILED in a.handshakes)
            assert (Handshake.DENIED in a.handshakes, desk.got) == (False, [])
            desk.door.bar("a", time.monotonic())
            await until(lambda: desk.bodies() == [(b"now?", "a")])
            assert a.handshakes[-1] is Handshake.DONE

    asyncio.run(scenario())


def test_a_valid_key_with_anothers_routing_id_is_told_apart(ring: Path) -> None:
    async def scenario() -> None:
        async with opened(ring) as (desk, client):
            a = client(credentials(ring, "a"), identity=b"stolen")
            a.socket.send([b"mine"])
            await until(lambda: len(desk.got) == 1)
            client(credentials(ring, "b"), identity=b"stolen").socket.send([b"mine too"])
            await until(lambda: (b"mine too", "b") in desk.bodies())
            assert {peer for peer, _, _ in desk.got} == {b"stolen"}
            assert desk.bodies()[0] == (b"mine", "a")

    asyncio.run(scenario())


def test_what_happened_before_anybody_listened_is_not_lost(ring: Path) -> None:
    async def scenario() -> None:
        door = Authenticator(ring)
        router = RouterSocket(HERE, door)
        denied: list[Handshake] = []
        who = credentials(ring, "stranger")
        dealer = DealerSocket(router.endpoint, b"x", lambda _: None, None, who, denied.append)
        await until(lambda: Handshake.DENIED in denied)
        allow_list.revoke(ring, "b", "later")
        await until(lambda: door.clients == ["a"])
        revoked: list[str] = []
        said: list[str] = []
        door.listen(revoked.append, said.append, _fail)
        assert (revoked, len(said)) == (["b"], 1)
        dealer.close(0)
        router.close()

    asyncio.run(scenario())


def test_nobody_gets_past_the_handshake_before_anybody_looks(ring: Path) -> None:
    """Until then nothing would limit what they send. They need not come again."""

    async def scenario() -> None:
        door = Authenticator(ring)
        router = RouterSocket(HERE, door)
        handshakes: list[Handshake] = []
        got: list[tuple[bytes, str | None]] = []
        a, b = (
            DealerSocket(router.endpoint, b"d" + name, lambda _: None, None, credentials(ring, name.decode()), said)
            for name, said in ((b"a", handshakes.append), (b"stranger", lambda _: handshakes.append(Handshake.DENIED)))
        )
        a.send([b"hello"])
        await until(lambda: handshakes == [Handshake.DENIED])  # the one after it; the door's thread takes them in turn
        await until(lambda: door._held is not None and len(door._held) == 1)
        router.listen(lambda _, frames, client: got.append((bytes(frames[0]), client)))
        await until(lambda: got == [(b"hello", "a")])
        assert sorted(handshakes, key=str) == [Handshake.DENIED, Handshake.DONE]
        for each in (a, b):
            each.close(0)
        router.close()

    asyncio.run(scenario())


class Tap:
    """Carries one connection to `port`, and keeps what went up."""

    def __init__(self, port: int) -> None:
        self.recorded = bytearray()
        self._target = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._carry, daemon=True).start()

    def _carry(self) -> None:
        with self._listener, self._listener.accept()[0] as near, socket.create_connection(self._target) as far:
            back = threading.Thread(target=_pass_on, args=(far, near, bytearray()), daemon=True)
            back.start()
            _pass_on(near, far, self.recorded)
            far.shutdown(socket.SHUT_WR)
            back.join()


def _pass_on(source: socket.socket, target: socket.socket, record: bytearray) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            record += data
            target.sendall(data)


def _answers(port: int, sent: bytes) -> Iterator[bytes]:
    """What the broker says to these bytes, until it closes the connection."""
    with socket.create_connection(("127.0.0.1", port)) as connection, contextlib.suppress(ConnectionResetError):
        connection.settimeout(20)
        yield connection.recv(10)  # its greeting begins before it has heard anything
        connection.sendall(sent)
        while data := connection.recv(1 << 16):
            yield data


def test_a_recorded_session_cannot_be_played_again_nor_read(ring: Path) -> None:
    async def scenario() -> None:
        async with opened(ring) as (desk, client):
            port = int(desk.router.endpoint.rpartition(":")[2])
            tap = Tap(port)
            a = client(credentials(ring, "a"), endpoint=tap.endpoint)
            a.socket.send([b"the words that nobody else shall read"])
            await until(lambda: len(desk.got) == 1)
            a.socket.close(1000)
            recorded = bytes(tap.recorded)
            assert b"CURVE" in recorded
            assert b"shall read" not in recorded
            answers = await asyncio.to_thread(lambda: b"".join(_answers(port, recorded)))
            assert answers
            client(credentials(ring, "b")).socket.send([b"after"])
            await until(lambda: len(desk.got) == 2)
            assert desk.bodies()[1] == (b"after", "b")

    asyncio.run(scenario())


def test_a_broker_without_keys_or_with_bad_ones_does_not_start(tmp_path: Path, ring: Path) -> None:
    with pytest.raises(KeyFileError, match=r"there is no key file .*broker\.secret; .*`parablock keys new broker`"):
        Authenticator(tmp_path / "elsewhere")
    os.chmod(ring / "broker.secret", 0o644)
    with pytest.raises(KeyFileError, match="may be read or changed by others"):
        Authenticator(ring)
    os.chmod(ring / "broker.secret", 0o600)
    (ring / "clients.toml").write_text("[[client]")
    with pytest.raises(KeyFileError, match="is damaged"):
        Authenticator(ring)


def test_a_key_of_anybody_is_taken_by_a_socket_without_a_door(ring: Path) -> None:
    """Why the door enforces its domain: libzmq by itself lets any key in."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router, context.socket(zmq.DEALER) as dealer:
        router.set(zmq.CURVE_SERVER, 1)
        router.set(zmq.CURVE_SECRETKEY, keys.read_secret(ring / "broker.secret").key.encode())
        port = router.bind_to_random_port("tcp://127.0.0.1")
        who = credentials(ring, "stranger")
        dealer.set(zmq.CURVE_SERVERKEY, who.broker.encode())
        dealer.set(zmq.CURVE_PUBLICKEY, who.public.encode())
        dealer.set(zmq.CURVE_SECRETKEY, who.secret.key.encode())
        dealer.connect(f"tcp://127.0.0.1:{port}")
        dealer.send(b"anybody")
        assert router.poll(20_000)
