"""How much a client may say: what costs tokens, what gives them back, and that honest clients never run out."""

from __future__ import annotations

import dataclasses

import pytest

from parablock.messages import Credit, Heartbeat, Hello
from parablock.quota import Bucket, Quotas
from tests.network import config_of, manifest_of

BEAT = Heartbeat(0.0, 0, 0, "training")
GREETING = Hello("a", "0a", 4)


def quotas() -> Quotas:
    return Quotas(config_of(2), manifest_of())


def test_tokens_come_back_with_time_up_to_the_burst() -> None:
    bucket = Bucket(rate=2.0, burst=10.0, now=5.0)
    assert bucket.take(10, 5.0)
    assert not bucket.take(1, 5.0)
    assert not bucket.take(1, 5.4)
    assert bucket.take(1, 5.5), "a refusal has cost nothing"
    assert not bucket.full(9.0)
    assert bucket.full(1000.0)
    assert not bucket.take(11, 1000.0)
    bucket.give(5)
    assert not bucket.take(11, 1000.0), "never more than the burst"


def test_what_nothing_asked_for_is_limited_by_number_and_by_rate() -> None:
    found = quotas()
    said = 0
    while (reason := found.spend("a", BEAT, 0.0)) is None:
        said += 1
    assert said == int(found.burst)
    assert reason == (
        f"more than {found.burst:.0f} messages at once, or {found.rate:.0f} a second, that nothing asked for"
    )
    assert found.spend("b", BEAT, 0.0) is None, "each has its own"
    assert found.spend("a", BEAT, 1.0) is None
    again = 1
    while found.spend("a", BEAT, 1.0) is None:
        again += 1
    assert again == pytest.approx(found.rate, abs=1)


def test_a_greeting_costs_what_it_may_have_sent() -> None:
    found = quotas()
    greeted = 0
    while found.spend("a", GREETING, 0.0) is None:
        greeted += 1
    assert greeted == found.burst // (found.window + 8)
    assert found.rate / (found.window + 8) >= 2, "a Hello and a Join a second are within it"


def test_who_answers_what_was_sent_may_do_so_for_ever() -> None:
    found = quotas()
    for _ in range(10 * int(found.burst)):
        found.sent_chunk("a")
        assert found.spend("a", Credit(0, 0, 1, 1024, 2048), 0.0) is None
    for _ in range(10 * int(found.burst)):
        assert found.spend("a", BEAT, 0.0) is None
        found.took_chunk("a")
    for _ in range(int(found.burst)):
        found.sent_commit("a")
        for _ in range(found.window + 8):
            assert found.spend("a", BEAT, 0.0) is None


def test_probes_are_counted_by_their_bytes_both_ways() -> None:
    found = quotas()
    probes = 0
    while (reason := found.spend_probe(b"p", 2 << 20, 0.0)) is None:
        probes += 1
    assert 1000 <= probes <= 1024
    assert reason == "more probes than 2 GiB, or 16 MiB a second; try again later"
    assert found.spend_probe(b"p", 2 << 20, 1.0) is None
    nothing = quotas()
    assert sum(nothing.spend_probe(b"p", 0, 0.0) is None for _ in range(600_000)) == (2 << 30) // (4 << 10)


def test_holders_that_have_all_their_tokens_are_forgotten() -> None:
    found = quotas()
    for number in range(5000):
        assert found.spend(number.to_bytes(4, "big"), BEAT, float(number)) is None
    assert len(found._said) <= 1024
    for _ in range(int(found.burst)):
        found.spend(b"greedy", BEAT, 6000.0)
    for number in range(2000):
        found.spend(number.to_bytes(4, "big"), BEAT, 6000.5)
    assert found.spend(b"greedy", GREETING, 6000.5) is None, "half a second's worth has come back"
    assert sum(found.spend(b"greedy", BEAT, 6000.5) is None for _ in range(1000)) < found.rate, "not forgotten"


def test_a_window_of_messages_is_that_of_the_largest_block() -> None:
    assert quotas().window == 2  # 2048 bytes in chunks of 1024
    assert Quotas(config_of(2, window=1 << 20), manifest_of((300,))).window == 2  # the block has no more
    assert Quotas(config_of(2), manifest_of(())).window == 1


def test_who_answers_what_is_sent_again_of_a_stalled_block_is_within_it() -> None:
    config = config_of(2)
    often = dataclasses.replace(config, network=dataclasses.replace(config.network, resend_s=0.01))
    assert Quotas(often, manifest_of()).rate >= 2 / 0.01
