"""A client's parts in secure sums over several brokers: what it says again, and what it does not give twice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from parablock.config import from_dict
from parablock.layout import Layout
from parablock.memberships import Memberships
from parablock.messages import Dealt, Keys, Roll, Shares, Unmask, Unmasked
from parablock.sum_member import Occasion, SumMember
from tests.network import manifest_of

if TYPE_CHECKING:
    from parablock.participant_events import Mask

CONFIG = from_dict({"secure": {"enabled": True}, "round": {"clients": 3}, "network": {"chunk_bytes": 1024}})
MANIFEST = manifest_of()
EVERYBODY = ("a", "b", "c")
ROUND, BLOCK = 4, 1


def occasion_of(epoch: int) -> Occasion:
    chunks = Layout.up(CONFIG, MANIFEST.blocks[BLOCK].numel).count
    return Occasion("run", epoch, ROUND, chunks, CONFIG.secure, fewest=2)


class Client:
    """`a`, whose words and wishes are kept, between two others that play along."""

    def __init__(self) -> None:
        self.said: list[tuple[Any, bytes]] = []
        self.masks: list[Mask] = []
        self.withheld: list[tuple[int, str]] = []
        self.sums = Memberships(
            CONFIG,
            MANIFEST,
            "a",
            lambda message, payload: self.said.append((message, bytes(payload or b""))),
            self.masks.append,
            lambda *why: self.withheld.append(why),
        )

    def take(self) -> list[tuple[Any, bytes]]:
        said, self.said = self.said, []
        return said

    def exchange(self, epoch: int, clients: tuple[str, ...] = EVERYBODY) -> bool:
        """Keys and shares with this broker, whether a contribution can leave then."""
        self.sums.greet("run", epoch)
        self.sums.begin(ROUND, BLOCK)
        ((message, keys),) = self.take()
        assert message == Keys(ROUND)
        occasion = occasion_of(epoch)
        others = {name: SumMember(occasion, name) for name in clients if name != "a"}
        roll = b"".join(keys if name == "a" else others[name].keys for name in clients)
        assert not self.sums.hear(Roll(ROUND, clients), memoryview(roll))
        ((message, _),) = self.take()
        assert message == Shares(ROUND)
        size = occasion.sealed_bytes
        sealed = b"".join(other.deal(clients, roll)[:size] for other in others.values())  # a is the first
        return self.sums.hear(Dealt(ROUND, clients), memoryview(sealed))

    def unmasks(self, slice: int, clients: tuple[str, ...]) -> bool:
        """Or else it is said that we refuse."""
        self.sums.hear(Unmask(ROUND, slice, clients), None)
        ((message, shares),) = self.take()
        assert message == Unmasked(ROUND, slice)
        return bool(shares)


def test_a_round_is_masked_once_it_is_dealt() -> None:
    client = Client()
    assert client.sums.waits(ROUND)
    assert client.exchange(1)
    assert not client.sums.waits(ROUND)
    (mask,) = client.masks
    assert mask.round == ROUND
    assert mask.masker is not None
    assert client.unmasks(0, EVERYBODY)
    assert client.unmasks(1, ("a", "c")), "of another slice others may be added up"


def test_another_broker_has_other_masks_and_the_same_sum() -> None:
    client = Client()
    client.exchange(1)
    assert client.unmasks(0, EVERYBODY)
    assert client.exchange(2)
    assert [mask.masker is None for mask in client.masks] == [False, True, False]
    assert client.masks[0] != client.masks[2]
    assert not client.unmasks(0, ("a", "b")), "an earlier broker has added it up with c's"
    assert client.unmasks(0, EVERYBODY)
    assert client.unmasks(1, ("a", "b"))
    assert not client.withheld


def test_what_one_broker_did_not_want_the_next_one_may() -> None:
    client = Client()
    client.sums.greet("run", 1)
    client.sums.refuse(ROUND)
    client.sums.begin(ROUND, BLOCK)
    assert client.take() == []
    assert client.exchange(2)


def test_with_others_than_before_it_is_not_given_again() -> None:
    client = Client()
    client.exchange(1)
    assert client.unmasks(0, EVERYBODY)
    assert not client.exchange(2, ("a", "b"))
    ((round, why),) = client.withheld
    assert round == ROUND
    assert "another sum would tell more" in why
    assert not client.sums.waits(ROUND)


def test_what_was_not_unmasked_may_be_given_with_others() -> None:
    client = Client()
    client.exchange(1)
    assert client.exchange(2, ("a", "b"))


def test_what_overtakes_or_outlives_its_turn_is_passed_over() -> None:
    client = Client()
    client.sums.greet("run", 1)
    for message in (Roll(ROUND, EVERYBODY), Dealt(ROUND, EVERYBODY), Unmask(ROUND, 0, EVERYBODY)):
        assert not client.sums.hear(message, memoryview(b"x"))
    client.sums.begin(ROUND, BLOCK)
    client.take()
    for message in (Dealt(ROUND, EVERYBODY), Unmask(ROUND, 0, EVERYBODY)):
        assert not client.sums.hear(message, memoryview(b"x"))
    assert client.take() == []


def test_what_is_not_answered_is_said_again_but_not_at_once() -> None:
    client = Client()
    client.sums.greet("run", 1)
    client.sums.begin(ROUND, BLOCK)
    first = client.take()
    client.sums.remind()
    assert client.take() == []
    client.sums.remind()
    assert client.take() == first
    client.sums.refuse(ROUND)
    client.sums.remind()
    client.sums.remind()
    assert client.take() == []


def test_a_closed_round_is_forgotten() -> None:
    client = Client()
    client.exchange(1)
    client.sums.forget(ROUND + 1)
    client.sums.hear(Unmask(ROUND, 0, EVERYBODY), None)
    assert client.take() == []


@pytest.mark.parametrize("changed", [0, -1])
def test_shares_that_cannot_be_read_keep_the_client_out(changed: int) -> None:
    client = Client()
    client.sums.greet("run", 1)
    client.sums.begin(ROUND, BLOCK)
    ((_, keys),) = client.take()
    other = SumMember(occasion_of(1), "b")
    roll = keys + other.keys
    client.sums.hear(Roll(ROUND, ("a", "b")), memoryview(roll))
    sealed = bytearray(other.deal(("a", "b"), roll))
    sealed[changed] ^= 1
    assert not client.sums.hear(Dealt(ROUND, ("a", "b")), memoryview(bytes(sealed)))
    assert "b has dealt" in client.withheld[0][1]
