"""The prober against a socket: what it makes of a link, and of those who do not answer as a broker does."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest

from bench.link import Link as ShapedLink
from bench.shaping import Shape
from broker.authenticator import Authenticator
from broker.pairs import new_pair
from broker.socket import RouterSocket
from parablock import keys, wire
from parablock.allow_list import allow
from parablock.coordinator_events import Received, Send
from parablock.messages import Probe, Probed, Refused, Rejoin
from parablock.network import EndpointError
from parablock.plan import Link
from parablock.wire import Envelope
from tests.test_coordinator import Desk
from workers import prober
from workers.prober import Prober, Refusal, Unanswered, rate
from workers.socket import Credentials

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from parablock.messages import Message


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prober, "STREAM_S", 0.4)
    monkeypatch.setattr(prober, "_ROUND_TRIPS_S", 0.1)
    monkeypatch.setattr(prober, "PAUSE_S", 0.01)


def probed(
    answer: Callable[[bytes, Envelope], list[Send]], shape: Shape | None = None, patience_s: float = 5.0
) -> Link:
    """What a prober finds of a peer that answers so, over a link of this shape."""

    async def scenario() -> Link:
        router = RouterSocket("tcp://127.0.0.1:*")

        def on_frames(peer: bytes, frames: list[memoryview], _client: str | None) -> None:
            for send in answer(peer, wire.decode(frames)):
                router.send(send.peer, wire.encode(send.envelope))

        router.listen(on_frames)
        port = int(router.endpoint.rpartition(":")[2])
        try:
            if shape is None:
                return await Prober(router.endpoint, 1 << 16, 1 << 20, patience_s).measure(lambda _what: None)
            with ShapedLink(("127.0.0.1", port), shape) as link:
                return await Prober(link.endpoint, 1 << 16, 1 << 20, patience_s).measure(lambda _what: None)
        finally:
            router.close()

    return asyncio.run(scenario())


def a_broker() -> Callable[[bytes, Envelope], list[Send]]:
    desk = Desk()
    return lambda peer, envelope: [
        effect for effect in desk.handle(Received(peer, envelope)) if isinstance(effect, Send)
    ]


def saying(message: Message) -> Callable[[bytes, Envelope], list[Send]]:
    return lambda peer, _envelope: [Send(peer, Envelope("", 0, message))]


@pytest.mark.slow
def test_a_slow_link_with_delay() -> None:
    link = probed(a_broker(), Shape(2e6, 0.03))
    assert 0.06 <= link.rtt_s < 0.08
    assert link.up_bytes_s == pytest.approx(2e6, rel=0.1)
    assert link.down_bytes_s == pytest.approx(2e6, rel=0.1)


@pytest.mark.slow
def test_it_ends_on_a_link_that_carries_next_to_nothing() -> None:
    # 12 pieces of 4 KiB each way are all that it insists on.
    link = probed(a_broker(), Shape(60e3, 0.0))
    assert link.up_bytes_s == pytest.approx(60e3, rel=0.2)
    assert link.down_bytes_s == pytest.approx(60e3, rel=0.2)


@pytest.mark.slow
def test_a_transfers_window_bounds_the_rate() -> None:
    # 1 MiB under way and 0.2 s to answer: 5 MiB/s, whatever the link carries.
    link = probed(a_broker(), Shape(1e9, 0.1))
    assert link.up_bytes_s < 6 * 2**20
    assert link.down_bytes_s < 6 * 2**20


def test_a_start_is_what_pieces_take_longer_after_a_pause_than_by_the_rates() -> None:
    class Late(Prober):
        """All that is asked is answered at once, so many seconds from now."""

        lateness = iter((0.0, 0.0, 1.0, 2.0, 1.5))

        async def _next(self) -> list[tuple[float, float]]:
            asked, late = list(self._sent.values()), next(self.lateness)
            self._sent.clear()
            return [(asked[0], time.monotonic() + late)] * len(asked)

    async def scenario() -> tuple[Link, Link]:
        late = Late("tcp://127.0.0.1:1", 8 << 10, 1 << 20, 1.0)
        try:
            # Two pieces to see how long one may be, and three starts: 13 pieces for half a second, and one more down.
            link = await late._started(Link(0.0, 204_800.0, 204_800.0))
            late.lateness = iter([0.0] * 5)
            return link, await late._started(Link(0.0, 204_800.0, 204_800.0))
        finally:
            late._socket.close(0)

    link, early = asyncio.run(scenario())
    assert link.start_s == pytest.approx(1.5 - 14 * 0.04, abs=0.05)
    assert early.start_s == 0.0


def test_nobody_answers() -> None:
    with pytest.raises(Unanswered, match=r"no broker answers at tcp://.* within 0\.1 s; start it"):
        probed(lambda _peer, _envelope: [], patience_s=0.1)


def test_what_is_no_answer_does_not_count_as_one() -> None:
    with pytest.raises(Unanswered, match="no broker answers"):
        probed(saying(Probed(99)), patience_s=0.1)
    with pytest.raises(Unanswered, match="no broker answers"):
        probed(saying(Rejoin("you are a stranger")), patience_s=0.1)


def test_a_broker_that_goes_away_is_not_waited_for() -> None:
    broker = a_broker()

    def answer(peer: bytes, envelope: Envelope) -> list[Send]:
        assert isinstance(envelope.message, Probe)
        return broker(peer, envelope) if envelope.message.sequence < 30 else []

    with pytest.raises(Unanswered, match=r"has stopped answering for 0\.2 s"):
        probed(answer, patience_s=0.2)


def test_a_refusal_is_passed_on() -> None:
    with pytest.raises(Refusal, match="refused: not you"):
        probed(saying(Refused("not you")))


def test_one_that_speaks_another_protocol_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "encode", lambda _envelope: [b"\x80"])
    with pytest.raises(Refusal, match="is no broker of this version"):
        asyncio.run(heard_by_an_echo())


async def heard_by_an_echo() -> None:
    router = RouterSocket("tcp://127.0.0.1:*")
    router.listen(lambda peer, frames, _client: router.send(peer, frames) and None)
    try:
        await Prober(router.endpoint, 1 << 16, 1 << 20, 5.0).measure(lambda _what: None)
    finally:
        router.close()


def test_an_address_that_zeromq_does_not_take_is_told() -> None:
    async def scenario() -> None:
        Prober("tcp://no", 1 << 16, 1 << 20, 1.0)

    with pytest.raises(EndpointError, match="cannot connect to tcp://no"):
        asyncio.run(scenario())


def test_the_rate_is_that_of_the_steady_part() -> None:
    steady = [0.1 * piece for piece in range(80)]
    assert rate(steady, 1000, 0, 2) == pytest.approx(10_000)
    burst = [1e-4 * piece for piece in range(20)]
    assert rate(burst + [1 + second for second in steady], 1000, 0, 2) == pytest.approx(10_000)
    growing = [0.5 * piece for piece in range(30)]
    assert rate(growing + [15 + second for second in steady], 1000, 30, 2) == pytest.approx(10_000)
    stalled = [second + (3.0 if second > 4 else 0.0) for second in steady]
    assert rate(stalled, 1000, 0, 2) == pytest.approx(10_000)


def test_windows_that_come_all_at_once_are_taken_whole() -> None:
    # 16 pieces in a moment, once a second.
    answers = [second + 1e-4 * piece for second in range(10) for piece in range(16)]
    assert rate(answers, 1000, 16, 16) == pytest.approx(16_000)
    # And all of a short stream in one wake-up of the loop, the last piece excepted.
    assert rate([0.0] * 11 + [1.0], 1000, 0, 16) == pytest.approx(5000)


@pytest.mark.parametrize("who", ["us", "stranger", "misled"])
def test_a_probe_shows_its_key(tmp_path: Path, who: str) -> None:
    broker, us, stranger = (new_pair(tmp_path, name) for name in ("broker", "us", "stranger"))
    allow(tmp_path, us, "noon")
    secret = keys.read_secret(tmp_path / f"{'stranger' if who == 'stranger' else 'us'}.secret")
    credentials = Credentials(secret, stranger.key if who == "misled" else broker.key)
    desk = a_broker()

    async def scenario() -> Link:
        router = RouterSocket("tcp://127.0.0.1:*", Authenticator(tmp_path))

        def on_frames(peer: bytes, frames: list[memoryview], client: str | None) -> None:
            assert client == "us"
            for send in desk(peer, wire.decode(frames)):
                router.send(send.peer, wire.encode(send.envelope))

        router.listen(on_frames)
        try:
            patience_s = 0.5 if who == "misled" else 5.0
            return await Prober(router.endpoint, 1 << 16, 1 << 20, patience_s, credentials).measure(lambda _what: None)
        finally:
            router.close()

    if who == "us":
        assert asyncio.run(scenario()).up_bytes_s > 0
    elif who == "stranger":
        with pytest.raises(Refusal, match=rf"does not let our key in \(fingerprint {stranger.fingerprint}\)"):
            asyncio.run(scenario())
    else:
        with pytest.raises(Unanswered, match="the broker has another key than the invite says"):
            asyncio.run(scenario())
