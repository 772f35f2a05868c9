"""Connections that must go: dropped ones, endless messages, too many that say nothing, readers that do not read. Over
real sockets, with peers that speak ZMTP by hand; the honest ones beside them notice nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket as net
import threading
import time
from typing import TYPE_CHECKING

import pytest

from bench.zmtp import Closed, Raw, address
from broker import guard, socket
from broker.socket import RouterSocket
from tests.test_sockets import HERE, until
from workers.socket import DealerSocket

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from broker.guard import Guard

WINDOW = 1 << 20
MOST_BEHIND = guard.WINDOWS * WINDOW + socket._MOST_MESSAGE_BYTES


class Door:
    """A router socket, and what was heard there."""

    def __init__(self, clients: int = 1) -> None:
        self.router = RouterSocket(HERE)
        self.dealers: list[DealerSocket] = []
        self.messages: list[tuple[bytes, bytes]] = []
        self.broken: list[tuple[bytes, str]] = []
        self.router.listen(
            lambda peer, frames, _client: self.messages.append((peer, bytes(frames[0]))),
            lambda peer, reason, _client: self.broken.append((peer, reason)),
            WINDOW,
            clients,
        )

    @property
    def guard(self) -> Guard:
        return self.router._guard

    def dealer(self, identity: bytes) -> tuple[DealerSocket, list[bytes]]:
        """An honest client, and what it hears."""
        heard: list[bytes] = []
        self.dealers.append(DealerSocket(self.router.endpoint, identity, lambda frames: heard.append(bytes(frames[0]))))
        return self.dealers[-1], heard

    async def heard(self, peer: bytes) -> None:
        await until(lambda: peer in [other for other, _ in self.messages])


@contextlib.asynccontextmanager
async def opened(clients: int = 1) -> AsyncIterator[Door]:
    door = Door(clients)
    try:
        yield door
    finally:
        for dealer in door.dealers:
            dealer.close(0)
        door.router.close()


async def by_hand(door: Door, peer: bytes) -> Raw:
    """A connection that has said something."""
    raw = await asyncio.to_thread(Raw, address(door.router.endpoint))
    await asyncio.to_thread(raw.null, peer)
    raw.send(b"hello")
    await door.heard(peer)
    return raw


def test_a_dropped_peer_hears_why_and_is_cut_off_alone() -> None:
    async def scenario() -> None:
        async with opened() as door:
            honest, heard = door.dealer(b"honest")
            honest.send([b"hello"])
            await door.heard(b"honest")
            with await by_hand(door, b"evil") as raw:
                assert door.router.send(b"evil", [b"go away"])
                door.router.drop(b"evil", None)
                raw.send(b"more of it")
                assert await asyncio.to_thread(raw.get_frame) == (0, b"go away")
                assert await asyncio.to_thread(raw.closed)
            assert door.router.send(b"honest", [b"still there"])
            honest.send([b"so are you"])
            await until(lambda: (b"honest", b"so are you") in door.messages)
            await until(lambda: heard == [b"still there"])
            assert (b"evil", b"more of it") not in door.messages
            assert not door.router.send(b"evil", [b"nobody there"])
            with await by_hand(door, b"evil"):  # a new connection is a new one
                pass
            assert door.broken == []

    asyncio.run(scenario())


def test_who_is_dropped_has_a_moment_to_hear_why(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with opened() as door:
            with await by_hand(door, b"evil") as raw:
                monkeypatch.setattr(guard, "_LAST_WORDS_S", 1e9)
                door.router.drop(b"evil", None)
                raw._socket.settimeout(5 * guard.LOOK_S)
                assert not await asyncio.to_thread(raw.closed)
                monkeypatch.setattr(guard, "_LAST_WORDS_S", 0.0)
                raw._socket.settimeout(20)
                assert await asyncio.to_thread(raw.closed)

    asyncio.run(scenario())


def test_who_takes_over_an_address_is_cut_off_and_not_its_owner() -> None:
    async def scenario() -> None:
        async with opened() as door:
            honest, heard = door.dealer(b"token")
            honest.send([b"hello"])
            await door.heard(b"token")
            with await asyncio.to_thread(Raw, address(door.router.endpoint)) as thief:
                await asyncio.to_thread(thief.null, b"token")
                thief.send(b"stolen")
                await until(lambda: (b"token", b"stolen") in door.messages)
                door.router.drop(b"token", None)
                assert await asyncio.to_thread(thief.closed)
            honest.send([b"back"])  # ZeroMQ has connected it anew
            await until(lambda: (b"token", b"back") in door.messages)
            assert door.router.send(b"token", [b"welcome back"])
            await until(lambda: heard == [b"welcome back"])

    asyncio.run(scenario())


@pytest.mark.skipif(not guard.WATCHES, reason="this system does not tell how much has come")
@pytest.mark.parametrize("frame", [1 << 20, 200])
def test_a_message_without_an_end_is_cut_off(frame: int) -> None:
    """And that with less than half as much more than is allowed, however fast it comes."""
    piece = bytes(frame)

    def flood(raw: Raw) -> int:
        sent = 0
        block = raw.sealed(piece, more=True) * max((1 << 16) // frame, 1)
        with contextlib.suppress(Closed):
            while sent < 1 << 30:
                raw.put(block)
                sent += len(block)
        return sent

    async def scenario() -> None:
        async with opened() as door:
            with await by_hand(door, b"evil") as raw:
                sent = await asyncio.to_thread(flood, raw)
            await until(lambda: bool(door.broken))
            assert sent < 1 << 29
            ((peer, reason),) = door.broken
            assert peer == b"evil"
            assert reason.endswith("MiB of messages without an end, or faster than they can be read")
            assert [message for other, message in door.messages if other == b"evil"] == [b"hello"]

    asyncio.run(scenario())


@pytest.mark.skipif(not guard.WATCHES, reason="this system does not tell how much has come")
def test_what_is_taken_as_it_comes_is_never_too_much() -> None:
    """Nine times what may be waiting; frames of all lengths are counted as they travel, or what seems to wait grows."""

    async def scenario() -> None:
        async with opened() as door:
            dealer, _ = door.dealer(b"busy")
            for number in range(1000):
                dealer.send([b"%d" % number, memoryview(bytes(number * 250))])
                await until(lambda: len(door.messages) >= number - 4)  # noqa: B023
            await until(lambda: len(door.messages) == 1000)
            (connection,) = door.guard._connections.values()
            received = guard._received(connection)
            assert received is not None
            assert received > 1.2e8 > 9 * MOST_BEHIND
            assert 0 <= connection.taken - received < 2048, "but for the greeting"
            assert door.broken == []

    asyncio.run(scenario())


def test_of_many_that_say_nothing_the_newest_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MOST_SILENT", 8)

    async def scenario() -> None:
        async with opened() as door:
            with await by_hand(door, b"one that has spoken") as spoken, contextlib.ExitStack() as stack:
                silent = []
                for _ in range(12):
                    silent.append(stack.enter_context(await asyncio.to_thread(Raw, address(door.router.endpoint))))
                    count = len(silent)
                    await until(lambda: len(door.broken) == max(count - 8, 0))  # noqa: B023
                for raw in silent[8:]:
                    assert await asyncio.to_thread(raw.closed)
                assert {peer for peer, _ in door.broken} == {b""}
                reason = "too many connections that say nothing, most of them from 127.0.0.1"
                assert {said for _, said in door.broken} == {reason}
                spoken.send(b"still there")
                await until(lambda: (b"one that has spoken", b"still there") in door.messages)
                await asyncio.to_thread(silent[7].null, b"slow to greet")
                silent[7].send(b"here I am")
                await door.heard(b"slow to greet")

    asyncio.run(scenario())


def test_of_many_clients_as_many_may_be_about_to_say_something(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two for each that the run awaits, or they would keep each other out when all of them come at once."""
    monkeypatch.setattr(guard, "MOST_SILENT", 2)

    async def scenario() -> None:
        async with opened(clients=3) as door:
            with contextlib.ExitStack() as stack:
                for _ in range(7):
                    stack.enter_context(await asyncio.to_thread(Raw, address(door.router.endpoint)))
                await until(lambda: len(door.guard._connections) + len(door.broken) >= 7)
                assert sum(each.condemned is None for each in door.guard._connections.values()) == 6

    asyncio.run(scenario())


def test_who_says_nothing_for_long_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MOST_SILENT", 2)
    monkeypatch.setattr(guard, "LONG_S", 0.0)

    async def scenario() -> None:
        async with opened() as door:
            with contextlib.ExitStack() as stack:
                raws = []
                for number in range(3):
                    raws.append(stack.enter_context(await asyncio.to_thread(Raw, address(door.router.endpoint))))
                    await until(lambda: len(door.guard._connections) + len(door.broken) > number)  # noqa: B023
                assert await asyncio.to_thread(raws[0].closed)

    asyncio.run(scenario())


def test_of_a_burst_no_more_go_than_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are cut off already, and not yet closed by libzmq, count no more."""
    monkeypatch.setattr(guard, "MOST_SILENT", 32)

    async def scenario() -> None:
        async with opened() as door:
            with contextlib.ExitStack() as stack:
                for _ in range(100):  # while the loop stands still
                    stack.enter_context(Raw(address(door.router.endpoint)))
                await until(lambda: len(door.guard._connections) + len(door.broken) >= 100)
                await until(lambda: len(door.guard._connections) == 32)
                assert len(door.broken) == 68
                assert not [each for each in door.guard._connections.values() if each.condemned is not None]

    asyncio.run(scenario())


def test_who_is_to_go_already_takes_nobodys_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MOST_SILENT", 2)

    async def scenario() -> None:
        async with opened() as door:
            with contextlib.ExitStack() as stack:
                for _ in range(2):
                    stack.enter_context(await asyncio.to_thread(Raw, address(door.router.endpoint)))
                await until(lambda: len(door.guard._connections) == 2)
                for connection in door.guard._connections.values():
                    connection.condemned = time.monotonic()  # last words are still on their way to it
                stack.enter_context(await by_hand(door, b"honest"))
                assert door.broken == []

    asyncio.run(scenario())


def test_where_no_descriptor_is_left_connections_can_still_be_cut_off() -> None:
    async def scenario() -> None:
        async with opened() as door:
            with await by_hand(door, b"evil") as raw:
                soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
                (connection,) = door.guard._connections.values()
                taken = [os.dup(0)]
                resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/dev/fd"))) + 1, hard))
                try:
                    with contextlib.suppress(OSError):
                        while True:
                            taken.append(os.dup(0))
                    with pytest.raises(OSError, match="Too many open files"):
                        os.dup(connection.descriptor)
                    door.guard._break(connection, "it must go")
                finally:
                    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                    for descriptor in taken:
                        os.close(descriptor)
                await until(lambda: door.broken == [(b"evil", "it must go")])
                assert await asyncio.to_thread(raw.closed)

    asyncio.run(scenario())


def test_hundreds_behind_one_address_and_a_slow_link_get_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them needs a while for its handshake, and comes again until it is let in."""
    monkeypatch.setattr(guard, "MOST_SILENT", 16)
    delay_s = 0.05

    async def scenario() -> None:
        async with opened() as door:
            near = address(door.router.endpoint)
            tasks: set[asyncio.Task[None]] = set()

            async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                with contextlib.suppress(ConnectionError):
                    while data := await reader.read(1 << 16):
                        await asyncio.sleep(delay_s)
                        writer.write(data)
                writer.close()

            async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                far = await asyncio.open_connection(*near)
                for task in (carry(reader, far[1]), carry(far[0], writer)):
                    tasks.add(asyncio.create_task(task))

            link = await asyncio.start_server(connected, "127.0.0.1", 0, backlog=512)
            endpoint = f"tcp://127.0.0.1:{link.sockets[0].getsockname()[1]}"
            peers = [b"w%d" % number for number in range(120)]
            for peer in peers:
                door.dealers.append(DealerSocket(endpoint, peer, lambda _: None))
                door.dealers[-1].send([b"hello"])
            await until(lambda: {peer for peer, _ in door.messages} == set(peers))
            assert door.broken, "else there was room for all of them at once"
            for dealer in door.dealers:
                dealer.close(0)
            link.close()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(scenario())


@pytest.mark.skipif(not guard.WATCHES, reason="this system does not tell how much has come")
def test_nobody_is_blamed_for_who_has_its_descriptor_afterwards() -> None:
    """An honest client's last messages are read when its connection has ended and its descriptor is a hostile one's."""
    hostile: list[Raw] = []

    def come_and_go(endpoint: tuple[str, int]) -> None:
        with Raw(endpoint) as honest:
            honest.null(b"honest")
            for _ in range(3):
                honest.send(b"hello")
            honest.end()
            assert honest.closed()  # libzmq has read them, and closed what has ended
        hostile.append(Raw(endpoint, patience_s=0.5))
        hostile[0].null(b"evil")

    def flood() -> None:
        with contextlib.suppress(Closed):
            for _ in range(1 << 10):
                hostile[0].send(bytes(1 << 20), more=True)

    async def scenario() -> None:
        async with opened() as door:
            thread = threading.Thread(target=come_and_go, args=(address(door.router.endpoint),))
            thread.start()
            thread.join()  # the loop stands still
            await until(lambda: len(door.messages) == 3)
            (connection,) = door.guard._connections.values()
            assert connection.claimed == (b"honest", None), "else the descriptor was not given away again"
            await asyncio.to_thread(flood)
            await until(lambda: bool(door.broken))
            assert [peer for peer, _ in door.broken] == [b""]
            assert b"honest" not in door.guard._speaking
            hostile[0].close()

    asyncio.run(scenario())


@pytest.mark.skipif(not guard.WATCHES, reason="this system does not tell how much has come")
def test_before_anything_is_said_a_flood_is_cut_off_too() -> None:
    def flood(raw: Raw) -> int:
        sent = 0
        with contextlib.suppress(Closed):
            raw.null(b"never says anything")
            block = raw.sealed(bytes(1 << 18), more=True)
            while sent < 1 << 30:
                raw.put(block)
                sent += len(block)
        return sent

    async def scenario() -> None:
        async with opened() as door:
            with await asyncio.to_thread(Raw, address(door.router.endpoint)) as raw:
                assert await asyncio.to_thread(flood, raw) < 1 << 29
            await until(lambda: bool(door.broken))
            assert [peer for peer, _ in door.broken] == [b""]

    asyncio.run(scenario())


def test_who_reads_nothing_is_cut_off_when_its_queue_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "_MOST_UNREAD", 16)

    async def scenario() -> None:
        async with opened() as door:
            with await by_hand(door, b"lazy") as raw:
                block = memoryview(bytes(1 << 20))
                sent = 0
                while door.router.send(b"lazy", [b"header", block]):
                    sent += 1
                    await asyncio.sleep(0)
                assert 16 <= sent < 100
                await until(lambda: door.broken == [(b"lazy", "it does not read what is sent to it")])
                assert await asyncio.to_thread(raw.closed)
                assert not door.router.send(b"lazy", [b"header"])

    asyncio.run(scenario())


def test_a_client_has_so_many_connections_and_the_newest_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MOST_OF_CLIENT", 2)

    async def scenario() -> None:
        async with opened() as door:
            with contextlib.ExitStack() as stack:
                raws = [stack.enter_context(await by_hand(door, b"%d" % number)) for number in range(4)]
                for connection in list(door.guard._connections.values()):
                    assert door.guard.took(connection.descriptor, b"of us %d" % connection.descriptor, "us", ())
                for raw in raws[:2]:
                    assert await asyncio.to_thread(raw.closed)
                door.router.drop(b"", "us")
                for raw in raws[2:]:
                    assert await asyncio.to_thread(raw.closed), "all of a client's connections go with one"

    asyncio.run(scenario())


def test_connections_that_end_are_forgotten() -> None:
    async def scenario() -> None:
        async with opened() as door:
            for number in range(20):
                with await by_hand(door, b"%d" % number):
                    pass
            await until(lambda: not door.guard._connections)
            assert not door.guard._speaking
            with await by_hand(door, b"same"), await asyncio.to_thread(Raw, address(door.router.endpoint)) as other:
                await asyncio.to_thread(other.null, b"same")  # to whom libzmq hands the name over
                other.send(b"now me")
                await until(lambda: (b"same", b"now me") in door.messages)
                await until(lambda: len(door.guard._connections) == 1)

    asyncio.run(scenario())


def test_a_descriptor_that_is_anothers_by_now_is_left_alone() -> None:
    async def scenario() -> None:
        async with opened() as door:
            with await by_hand(door, b"a") as raw:
                (connection,) = door.guard._connections.values()
                connection.socket = (connection.socket[0], connection.socket[1] + 1)
                assert not door.guard._shut_down(connection)
                door.router.drop(b"a", None)
                raw._socket.settimeout(1.0)
                assert not await asyncio.to_thread(raw.closed)

    asyncio.run(scenario())


def test_a_descriptor_that_is_a_socket_of_another_family_by_now_is_no_connection() -> None:
    """As that of a pair, whose peer has no name."""

    async def scenario() -> None:
        async with opened() as door:
            near, far = net.socketpair()
            with near, far:
                assert door.guard._accepted(near.fileno()) is None
                assert not door.guard._connections
                near.send(b"still open")
                assert far.recv(10) == b"still open"

    asyncio.run(scenario())


def test_an_owner_who_is_not_sure_yet_is_cut_off_as_well_where_another_takes_its_routing_id() -> None:
    """Or it would stay connected and mute. It comes again."""

    async def scenario() -> None:
        async with opened() as door:
            with await by_hand(door, b"a") as owner:
                (connection,) = door.guard._connections.values()
                door.guard._speaking.clear()
                connection.sure, connection.peer, connection.claimed = False, None, (b"a", None)
                with await by_hand(door, b"a"):
                    assert await asyncio.to_thread(owner.closed)

    asyncio.run(scenario())


def test_a_peer_of_an_older_zeromq_is_not_heard() -> None:
    """Without encryption libzmq takes it, and does not say on which connection. Found by `bench.fuzz`."""

    async def scenario() -> None:
        async with opened() as door:
            with await asyncio.to_thread(Raw, address(door.router.endpoint)) as raw:
                raw.put(b"\x01\x00" + b"\x06\x00hello")  # ZMTP 1.0: no routing id, one frame
                honest, _ = door.dealer(b"honest")
                for number in range(20):
                    honest.send([b"%d" % number])
                await until(lambda: len(door.messages) == 20)
                assert {peer for peer, _ in door.messages} == {b"honest"}

    asyncio.run(scenario())


def test_a_port_scan_of_garbage_disturbs_nobody() -> None:
    def garbage(endpoint: str) -> None:
        for number in range(60):
            with contextlib.suppress(Closed), Raw(address(endpoint), patience_s=0.2) as raw:
                raw.put(
                    (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"\xff" * 64, b"\0" * 4096)[number % 4]
                )

    async def scenario() -> None:
        async with opened() as door:
            dealer, _ = door.dealer(b"honest")
            thread = threading.Thread(target=garbage, args=(door.router.endpoint,))
            thread.start()
            number = 0
            while thread.is_alive() or not number:
                dealer.send([b"%d" % number])
                number += 1
                await until(lambda: len(door.messages) == number)  # noqa: B023
            assert {peer for peer, _ in door.messages} == {b"honest"}

    asyncio.run(scenario())
