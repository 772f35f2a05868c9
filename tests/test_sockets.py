"""The two sockets on a real event loop over loopback: nothing is lost, copied apart, or blocked."""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import zmq

from broker.authenticator import Authenticator
from broker.pairs import new_pair
from broker.socket import BindError, RouterSocket
from parablock import wire
from parablock.allow_list import allow
from parablock.keys import read_secret
from workers.socket import DealerSocket

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = "tcp://127.0.0.1:*"


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - the sockets call back, they set no event
            await asyncio.sleep(0.002)


def test_a_burst_of_chunks_arrives_in_order_both_ways() -> None:
    async def scenario() -> None:
        up: list[tuple[bytes, list[bytes]]] = []
        down: list[list[bytes]] = []
        router = RouterSocket(HERE)
        router.listen(lambda peer, frames, _client: up.append((peer, [bytes(frame) for frame in frames])))
        dealer = DealerSocket(router.endpoint, b"worker", lambda frames: down.append([bytes(f) for f in frames]))
        payloads = [bytes([number]) * (1 << 20) for number in range(100)]  # more than one wake-up takes
        for number, payload in enumerate(payloads):
            dealer.send([b"%d" % number, memoryview(payload)])
        await until(lambda: len(up) == len(payloads))
        assert up == [(b"worker", [b"%d" % number, payload]) for number, payload in enumerate(payloads)]
        for number, payload in enumerate(payloads):
            assert router.send(b"worker", [b"%d" % number, memoryview(payload)])
        await until(lambda: len(down) == len(payloads))
        assert [hashlib.sha256(frames[1]).digest() for frames in down] == [hashlib.sha256(p).digest() for p in payloads]
        dealer.close(0)
        router.close()
        router.close()  # again does nothing

    asyncio.run(scenario())


@pytest.mark.parametrize(("clients", "longest"), [(1, 1 << 20), (4, 256 << 10), (8, 128 << 10), (1024, 128 << 10)])
@pytest.mark.parametrize("encrypted", [True, False])
def test_the_more_clients_the_less_libzmq_encrypts_at_once_for_each(
    tmp_path: Path, clients: int, longest: int, encrypted: bool
) -> None:
    """In plain it has nothing to encrypt, and a payload leaves whole."""
    pairs = {name: new_pair(tmp_path, name) for name in ("broker", "a", "b")} if encrypted else {}
    for name in ("a", "b") if encrypted else ():
        allow(tmp_path, pairs[name], "noon")

    async def scenario() -> None:
        router = RouterSocket(HERE, Authenticator(tmp_path) if encrypted else None)
        peers: list[bytes] = []
        router.listen(lambda peer, _frames, _client: peers.append(peer), clients=clients)
        payload = memoryview(os.urandom(3 * longest + 4))
        message: list[bytes | memoryview | zmq.Frame] = [b"header", payload]
        with zmq.Context() as context:
            raw = [context.socket(zmq.DEALER) for _ in range(2)]
            for socket, name in zip(raw, "ab", strict=True):
                socket.set(zmq.RCVTIMEO, 20_000)
                if encrypted:
                    socket.set(zmq.CURVE_SERVERKEY, pairs["broker"].key.encode())
                    socket.set(zmq.CURVE_PUBLICKEY, pairs[name].key.encode())
                    socket.set(zmq.CURVE_SECRETKEY, read_secret(tmp_path / f"{name}.secret").key.encode())
                socket.connect(router.endpoint)
                socket.send(b"hello")
            await until(lambda: len(peers) == len(raw))
            for peer in peers:
                assert router.send(peer, message)  # the second time as it was made for the first
            for socket in raw:
                header, *frames = socket.recv_multipart()
                assert header == b"header"
                assert [len(frame) for frame in frames] == ([longest] * 3 + [4] if encrypted else [payload.nbytes])
                assert b"".join(frames) == payload
                socket.close(0)
        router.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(("lengths", "come"), [((1 << 20, 1, 7), 2), ((wire.MAX_PAYLOAD_BYTES, 1), 3), ((), 1)])
def test_a_worker_puts_together_what_may_be_a_payload(lengths: tuple[int, ...], come: int) -> None:
    async def scenario() -> list[list[bytes]]:
        got: list[list[bytes]] = []
        with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
            router.set(zmq.LINGER, 0)
            port = router.bind_to_random_port("tcp://127.0.0.1")
            dealer = DealerSocket(
                f"tcp://127.0.0.1:{port}", b"worker", lambda frames: got.append([bytes(each) for each in frames])
            )
            dealer.send([b"hello"])
            await until(lambda: bool(router.poll(0)))
            router.recv_multipart()
            router.send_multipart([b"worker", b"header", *sent])
            await until(lambda: bool(got))
            dealer.close(0)
        return got

    sent = [bytes([number]) * length for number, length in enumerate(lengths)]
    (frames,) = asyncio.run(scenario())
    assert len(frames) == come
    assert frames[0] == b"header"
    assert b"".join(frames[1:]) == b"".join(sent)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_answers_that_nobody_reads_share_their_payload() -> None:
    async def scenario() -> int:
        router = RouterSocket(HERE)
        greeted: list[bytes] = []
        router.listen(lambda peer, _frames, _client: greeted.append(peer))
        with zmq.Context() as context, context.socket(zmq.DEALER) as lazy:
            lazy.set(zmq.LINGER, 0)
            lazy.set(zmq.RCVHWM, 1)
            lazy.connect(router.endpoint)
            lazy.send(b"hello")
            await until(lambda: len(greeted) == 1)
            shared = memoryview(bytes(60_000))
            before = resident_bytes()
            for _ in range(2000):  # 120 MB if each had its own
                assert router.send(greeted[0], [b"header", shared])
            grown = resident_bytes() - before
            router.close()
        return grown

    assert asyncio.run(scenario()) < 30e6


@pytest.mark.skipif(sys.platform != "linux", reason="scheduling policies are Linux's")
def test_the_threads_that_move_bytes_do_not_push_out_those_that_compute() -> None:
    def policies() -> dict[str, int]:
        tasks = [task for task in Path("/proc/self/task").iterdir() if (task / "comm").read_text().startswith("ZMQbg")]
        return {task.name: os.sched_getscheduler(int(task.name)) for task in tasks}

    async def scenario() -> list[int]:
        before = policies().keys()  # of other contexts in this process
        router = RouterSocket(HERE)
        router.listen(lambda _peer, _frames, _client: None)
        dealer = DealerSocket(router.endpoint, b"worker", lambda _frames: None)
        # Two sockets, each with a thread that moves bytes and one that closes; they name themselves when they run.
        await until(lambda: len(policies().keys() - before) == 4)
        found = [policy for task, policy in policies().items() if task not in before]
        dealer.close(0)
        router.close()
        return found

    assert asyncio.run(scenario()) == [os.SCHED_BATCH] * 4
    assert os.sched_getscheduler(0) != os.SCHED_BATCH


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_what_came_before_the_broker_listened_is_not_lost() -> None:
    async def scenario() -> None:
        got: list[list[bytes]] = []
        router = RouterSocket(HERE)
        dealer = DealerSocket(router.endpoint, b"early", lambda _frames: None)
        dealer.send([b"hello"])
        await asyncio.sleep(0)
        router.listen(lambda _peer, frames, _client: got.append([bytes(frame) for frame in frames]))
        await until(lambda: got == [[b"hello"]])
        dealer.close(0)
        router.close()

    asyncio.run(scenario())


def test_workers_of_one_process_may_share_a_context() -> None:
    async def scenario() -> None:
        got: list[tuple[bytes, bytes]] = []
        router = RouterSocket(HERE)
        router.listen(lambda peer, frames, _client: got.append((peer, bytes(frames[0]))))
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        names = [b"one", b"two"]
        dealers = [DealerSocket(router.endpoint, name, lambda _frames: None, context) for name in names]
        dealers[0].send([b"hello"])
        await until(lambda: len(got) == 1)
        dealers[0].close(0)
        dealers[1].send([b"still here"])  # the context is not the first one's to end
        await until(lambda: len(got) == 2)
        assert got == [(b"one", b"hello"), (b"two", b"still here")]
        dealers[1].close(0)
        context.term()
        router.close()

    asyncio.run(scenario())


def test_a_peer_that_is_not_there_is_told_apart() -> None:
    async def scenario() -> None:
        router = RouterSocket(HERE)
        router.listen(lambda _peer, _frames, _client: None)
        assert not router.send(b"nobody", [b"x"])
        router.close()

    asyncio.run(scenario())


def test_of_an_endless_message_only_the_first_frames_are_kept() -> None:
    async def scenario() -> None:
        got: list[int] = []
        router = RouterSocket(HERE)
        router.listen(lambda _peer, frames, _client: got.append(len(frames)))
        context = zmq.Context()
        raw = context.socket(zmq.DEALER)
        raw.connect(router.endpoint)
        raw.send_multipart([b"frame"] * 5000)
        raw.send_multipart([b"after"])
        await until(lambda: len(got) == 2)
        assert got == [3, 1]
        context.destroy(linger=0)
        router.close()

    asyncio.run(scenario())


def test_a_port_in_use_and_a_wrong_address_are_told() -> None:
    async def scenario() -> None:
        router = RouterSocket(HERE)
        with pytest.raises(BindError, match=r"is in use, perhaps by another broker; choose another port"):
            RouterSocket(router.endpoint)
        with pytest.raises(BindError, match=r"cannot listen on tcp://192\.0\.2\.1:5557: .*; expected tcp://ADDRESS"):
            RouterSocket("tcp://192.0.2.1:5557")  # not an address of this machine
        router.close()

    asyncio.run(scenario())


def test_a_message_of_very_many_frames_holds_up_nothing_and_the_next_one_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A million empty frames fit into what an honest client may have under way. They were taken in one go, for seconds
    in which nobody was answered."""
    monkeypatch.setattr("broker.socket._PASSED_OVER", 10)

    async def scenario() -> None:
        got: list[tuple[int, int]] = []  # frames of a message, and how often the loop had turned
        turns = 0
        router = RouterSocket(HERE)
        router.listen(lambda _peer, frames, _client: got.append((len(frames), turns)))
        with zmq.Context() as context, context.socket(zmq.DEALER) as many:
            many.set(zmq.LINGER, 0)
            many.connect(router.endpoint)
            many.send_multipart([b""] * 5000)
            many.send_multipart([b"header", b"payload"])
            while len(got) < 2:
                turns += 1
                await asyncio.sleep(0)
            ((first, before), (second, after)) = got
            assert (first, second) == (3, 2)
            assert after - before >= 200, "the reader is called once or twice a turn"
            router.close()

    asyncio.run(asyncio.wait_for(scenario(), 20))
