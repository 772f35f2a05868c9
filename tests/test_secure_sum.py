"""The secure sum of one round: members and the broker's half joined in memory, with clients that fall out anywhere."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parablock import slices
from parablock.masks import KEY_BYTES, Keys, apply
from parablock.messages import Dealt, Roll, Unmask
from parablock.secure_settings import Secure
from parablock.shamir import SHARE_BYTES
from parablock.sum_member import Occasion, SumError, SumMember, UnreadableSharesError
from parablock.sum_round import Phase, SumRound
from parablock.transfer import TransferError

CHUNKS, NUMEL = 5, 40
PATIENCE_S = 10.0


class Table:
    """One round: everybody's values, and what is said, by hand. Client c has `slice_of_client[c]` slices arrive."""

    def __init__(self, clients: int, secure: Secure | None = None, chunks: int = CHUNKS, epoch: int = 1) -> None:
        rng = random.Random(clients)
        self.secure = secure or Secure(enabled=True)
        self.occasion = Occasion("run-1", epoch, 3, chunks, self.secure, self.secure.needed(clients))
        self.names = [f"c{index:02d}" for index in range(clients)]
        self.members = {n: SumMember(self.occasion, n, rng.randbytes) for n in self.names}
        self.round = SumRound(self.occasion, PATIENCE_S, PATIENCE_S, self._say)
        self.inbox: dict[str, list[tuple[Any, bytes]]] = {name: [] for name in self.names}
        self.here = {name: f"token of {name}" for name in self.names}
        self.values = {
            n: np.random.default_rng(i).integers(0, 2**32, (chunks, NUMEL), np.uint32) for i, n in enumerate(self.names)
        }
        self.masked: dict[tuple[str, int], memoryview] = {}  # by client and chunk
        self.keys: dict[str, tuple[Keys, ...]] = {}
        self.answers: list[tuple[str, int, bytes]] = []

    def _say(self, name: str, token: str, message: Any, payload: bytes | None) -> None:
        if self.here.get(name) == token:
            self.inbox[name].append((message, payload or b""))

    def leave(self, names: list[str]) -> None:
        for name in names:
            self.here.pop(name, None)

    def advance(self, now: float = 0.0) -> None:
        self.round.advance(self.here, frozenset(self.here), True, now)

    def show_keys(self) -> None:
        for name in list(self.here):
            assert self.round.keys(name, self.here[name], self.members[name].keys, 0.0) is None
        self.advance()

    def deal(self, mute: list[str] | None = None) -> None:
        for name, (message, payload) in self.taken(Roll):
            if name not in (mute or []):
                shares = self.members[name].deal(message.clients, payload)
                assert self.round.shares(name, self.here[name], shares, 0.0) is None
        self.leave(mute or [])
        self.advance()

    def settle(self) -> None:
        for name, (message, payload) in self.taken(Dealt):
            self.keys[name] = self.members[name].settle(message.clients, payload)

    def taken(self, kind: type) -> list[tuple[str, tuple[Any, bytes]]]:
        found = [(n, said) for n in self.here for said in self.inbox[n] if isinstance(said[0], kind)]
        for name in self.here:
            self.inbox[name] = [said for said in self.inbox[name] if not isinstance(said[0], kind)]
        return found

    def upload(self, slice: int, names: list[str]) -> None:
        for name in names:
            for chunk in slices.chunks_of(slice, self.occasion.chunks):
                words = self.values[name][chunk].copy()
                apply(words, self.keys[name][slice].masks, chunk)
                assert words.tobytes() != self.values[name][chunk].tobytes()
                self.masked[name, chunk] = words.data.cast("B")

    def unmask(self, mute: list[str] | None = None) -> None:
        """Everybody who is there answers what they were asked."""
        for name, (message, _) in self.taken(Unmask):
            if name not in (mute or []) and self.round.phase is not Phase.FAILED:
                answer = self.members[name].answer(message.slice, message.clients)
                self.answers.append((name, message.slice, answer))
                self.round.answer(name, self.here[name], message.slice, answer)
        self.leave(mute or [])
        self.advance()

    def check(self, slice: int, clients: list[str]) -> None:
        """What comes off the masks is the plain sum."""
        unmasking = self.round.unmasking(slice)
        assert unmasking is not None
        for chunk in slices.chunks_of(slice, self.occasion.chunks):
            total = unmasking.total([self.masked[name, chunk] for name in clients], chunk)
            plain = sum((self.values[name][chunk] for name in clients), start=np.zeros(NUMEL, np.uint32))
            assert total.tolist() == plain.astype(np.uint32).tolist()


@settings(max_examples=60, deadline=None)
@given(clients=st.integers(2, 7), data=st.data())
def test_the_sum_is_exact_whoever_falls_out_when_and_else_nothing_is_counted(clients: int, data: st.DataObject) -> None:
    """Before the keys, between keys and shares, in the middle of the upload, and before the answers."""
    table = Table(clients)
    order = data.draw(st.permutations(table.names))
    fates = {name: data.draw(st.integers(0, 3 + CHUNKS + 4)) for name in order}  # 0: before its keys; ...; high: stays
    table.leave([name for name, fate in fates.items() if fate == 0])
    if not table.here:
        return
    table.show_keys()
    needed = table.secure.needed(clients)
    if len(table.here) < needed:
        assert table.round.phase is Phase.FAILED
        assert f"a secure sum takes {needed}" in table.round.reason
        return
    table.deal(mute=[name for name, fate in fates.items() if fate == 1])
    if len(table.here) < needed:
        assert table.round.phase is Phase.FAILED
        assert f"{needed} are needed" in table.round.reason
        return
    table.settle()
    uploading = sorted(table.here)
    for slice in range(CHUNKS):
        uploading = [name for name in uploading if fates[name] != 2 + slice]
        table.leave([name for name, fate in fates.items() if fate == 2 + slice])
        table.upload(slice, uploading)
        if len(uploading) < needed:
            return  # the broker has nothing to name
        table.round.name(tuple(uploading), 0.0)
        mute = [name for name in uploading if fates[name] == 2 + CHUNKS] if slice == CHUNKS - 1 else []
        table.unmask(mute=mute)
        if len(set(table.here)) < needed and table.round.phase is Phase.FAILED:
            assert "have answered" in table.round.reason
            assert len(uploading) - len(mute) < needed
            return
        table.check(slice, uploading)
    assert table.round.phase is Phase.MASKED


@pytest.mark.parametrize("clients", [3, 4, 6, 9])
def test_as_many_may_fall_out_as_the_threshold_leaves(clients: int) -> None:
    table = Table(clients)
    lost = clients - table.secure.needed(clients)
    assert lost == clients // 3
    table.show_keys()
    table.deal()
    table.settle()
    table.upload(0, table.names)
    table.leave(table.names[:lost])  # after their upload, before they answer
    table.round.name(tuple(table.names), 0.0)
    table.unmask()
    table.check(0, table.names)
    table.upload(1, table.names[lost:])
    table.round.name(tuple(table.names[lost:]), 0.0)
    table.unmask()
    table.check(1, table.names[lost:])
    table.leave(table.names[lost : lost + 1])  # one more
    table.upload(2, table.names[lost:])
    table.round.name(tuple(table.names[lost:]), 0.0)
    table.unmask()
    assert table.round.phase is Phase.FAILED
    assert table.round.unmasking(2) is None


def test_a_member_answers_for_one_set_of_a_slice_and_gives_one_share_of_each() -> None:
    table = Table(5)
    table.show_keys()
    table.deal()
    table.settle()
    everybody, fewer = tuple(table.names), tuple(table.names[1:])
    member = table.members["c02"]
    answer = member.answer(0, everybody)
    assert member.answer(0, everybody) == answer, "said again, it is the same"
    with pytest.raises(SumError, match="a second, different sum of slice 0"):
        member.answer(0, fewer)
    other = member.answer(1, fewer)
    held = member._held
    for number, name in enumerate(table.names):
        parts = [held[name][at : at + SHARE_BYTES] for at in range(0, len(held[name]), SHARE_BYTES)]
        given = [(answer + other)[at : at + SHARE_BYTES] for at in range(0, 2 * len(answer), SHARE_BYTES)]
        assert given[number] == parts[0], "of slice 0 the own mask's"
        assert given[5 + number] == (parts[3] if number == 0 else parts[2]), "of slice 1 the lost one's secret"
        assert parts[1] not in given, "never both"


@pytest.mark.parametrize("clients", [(), ("c00",), ("c00", "c01"), ("c01", "c00", "c02"), ("c00", "c01", "zz")])
def test_a_member_answers_for_no_sum_of_few_and_of_no_strangers(clients: tuple[str, ...]) -> None:
    table = Table(4)  # three are needed
    table.show_keys()
    table.deal()
    table.settle()
    with pytest.raises(SumError, match="too few or others"):
        table.members["c00"].answer(0, clients)


def test_a_member_takes_one_roll_and_one_list() -> None:
    table = Table(3)
    table.show_keys()
    (message, payload) = table.inbox["c00"][0]
    member, names = table.members["c00"], table.names
    size = table.occasion.keys_bytes
    for clients, keys, what in (
        (names, payload[:-1], "is none"),
        (names[:1], payload[:size], "it takes 2 to make a sum"),
        ([*names[1:], names[0]], payload, "is none"),
        (names[1:], payload[size:], "not on the roll"),
        (names, bytes(size) + payload[size:], "not with our own keys"),
        (names, payload[:size] + bytes(size) + payload[2 * size :], "no other key can be agreed"),
    ):
        with pytest.raises(SumError, match=what):
            member.deal(clients, keys)
    shares = member.deal(message.clients, payload)
    assert member.deal(message.clients, payload) == shares
    with pytest.raises(SumError, match="a second, different roll"):
        member.deal(names[:2], payload[: 2 * size])
    table.deal()
    dealt, sealed = next(said for _, said in table.taken(Dealt))
    with pytest.raises(SumError, match="too few"):
        member.settle(dealt.clients, sealed[:-1])
    with pytest.raises(SumError, match="not on the roll"):
        member.settle(("c00", "c01", "zz"), sealed)
    assert member.settle(dealt.clients, sealed) == member.settle(dealt.clients, sealed)
    with pytest.raises(SumError, match="different list"):
        member.settle(("c00", "c01"), sealed[: len(sealed) // 2])


def test_shares_that_were_changed_on_the_way_are_seen() -> None:
    table = Table(3)
    table.show_keys()
    table.deal()
    dealt, sealed = next(said for name, said in table.taken(Dealt) if name == "c00")
    with pytest.raises(UnreadableSharesError, match="c02 has dealt"):
        table.members["c00"].settle(dealt.clients, sealed[:-1] + bytes([sealed[-1] ^ 1]))


def test_what_the_broker_gets_tells_nothing_of_the_shares() -> None:
    table = Table(3)
    table.show_keys()
    table.deal()
    table.settle()
    passed_on = b"".join(table.round._sealed.values()) + b"".join(table.round._keys.values())
    for member in table.members.values():
        for secret in (member._channel, *member._secrets, *member._seeds, *member._held.values()):
            assert secret[:16] not in passed_on


def test_wrong_shares_of_a_lost_client_are_found() -> None:
    table = Table(4)
    table.show_keys()
    table.deal()
    table.settle()
    table.upload(0, table.names[1:])
    table.round.name(tuple(table.names[1:]), 0.0)
    for name in table.names[1:]:
        answer = bytearray(table.members[name].answer(0, tuple(table.names[1:])))
        answer[5] ^= 1  # of the first client's secret
        table.round.answer(name, table.here[name], 0, bytes(answer))
    assert table.round.phase is Phase.FAILED
    assert "c00's secret do not fit together" in table.round.reason


def test_who_is_slow_is_waited_for_and_then_not() -> None:
    table = Table(6)
    for name in table.names[:5]:
        table.round.keys(name, table.here[name], table.members[name].keys, 1.0)
    table.advance(1.0)
    assert table.round.phase is Phase.KEYS
    assert table.round.due() == 1.0 + PATIENCE_S
    table.advance(table.round.due())
    assert table.round.phase is Phase.SHARES
    late = table.round.keys("c05", table.here["c05"], table.members["c05"].keys, 12.0)
    assert late is not None
    assert "settled before this client's keys" in late
    for name, (message, payload) in table.taken(Roll)[:4]:
        table.round.shares(name, table.here[name], table.members[name].deal(message.clients, payload), 12.0)
    table.advance(12.0)
    assert table.round.phase is Phase.SHARES
    table.advance(12.0 + PATIENCE_S)
    assert table.round.phase is Phase.MASKED
    assert list(table.round.members) == table.names[:4]


def test_no_roll_is_called_of_fewer_than_the_settings_need() -> None:
    """Two of eight have shown their keys, and patience is over: they are not a group of their own."""
    table = Table(8)
    for name in table.names[:2]:
        table.round.keys(name, table.here[name], table.members[name].keys, 0.0)
    table.advance(PATIENCE_S)
    assert table.round.phase is Phase.KEYS
    assert not table.taken(Roll)
    table.leave(table.names[2:])
    table.advance(PATIENCE_S)
    assert table.round.phase is Phase.FAILED
    assert table.round.reason == "2 clients can take part, and a secure sum takes 6"


@pytest.mark.parametrize("threshold", [0, 5])
def test_a_member_has_no_part_in_a_roll_of_fewer_than_the_settings_need(threshold: int) -> None:
    table = Table(8, Secure(enabled=True, threshold=threshold))
    fewest = table.secure.needed(8)
    size, keys = table.occasion.keys_bytes, b"".join(table.members[name].keys for name in table.names)
    member = table.members["c00"]
    with pytest.raises(SumError, match=f"by the run's settings it takes {fewest}"):
        member.deal(table.names[: fewest - 1], keys[: size * (fewest - 1)])
    assert not member.dealt
    member.deal(table.names[:fewest], keys[: size * fewest])
    assert member.needed == fewest, "of so few all that the settings need, not two thirds"


def test_what_was_lost_is_said_again() -> None:
    table = Table(3)
    table.show_keys()
    first = table.taken(Roll)
    for name in table.names:
        table.round.keys(name, table.here[name], table.members[name].keys, 1.0)
    assert table.taken(Roll) == first
    for name, (message, payload) in first:
        table.round.shares(name, table.here[name], table.members[name].deal(message.clients, payload), 1.0)
    table.advance(1.0)
    dealt = table.taken(Dealt)
    for name in table.names:
        table.round.shares(name, table.here[name], table.members[name].dealt, 2.0)
    assert table.taken(Dealt) == dealt
    table.round.name(tuple(table.names), 3.0)
    asked = table.taken(Unmask)
    assert len(asked) == 3
    table.round.remind("c01", table.here["c01"])
    assert table.taken(Unmask) == asked[1:2]
    table.round.remind("c01", "another process")
    assert not table.taken(Unmask)


def test_a_sum_that_too_many_refuse_is_given_up_at_once_with_the_reason() -> None:
    table = Table(4)
    table.show_keys()
    table.deal()
    table.settle()
    table.round.name(tuple(table.names), 0.0)
    asked = [name for name, _ in table.taken(Unmask)]
    table.round.answer("c00", table.here["c00"], 0, b"")
    table.advance(0.0)
    assert table.round.phase is Phase.MASKED, "three are left, and three are needed"
    for name in asked:
        table.round.remind(name, table.here[name])
    assert [name for name, _ in table.taken(Unmask)] == asked[1:], "it has said so"
    table.round.answer("c01", table.here["c01"], 0, table.members["c01"].answer(0, tuple(table.names)))
    table.round.answer("c02", table.here["c02"], 0, b"")
    table.advance(0.0)
    assert table.round.phase is Phase.FAILED
    assert "1 have answered, and c00, c02 will not: an earlier broker has added it up with others" in table.round.reason


def test_another_process_of_a_client_is_not_the_one_that_was_dealt_with() -> None:
    table = Table(3)
    table.show_keys()
    assert table.round.keys("c01", "another", SumMember(table.occasion, "c01").keys, 0.0) is not None
    assert table.round.shares("c01", "another", bytes(2 * table.occasion.sealed_bytes), 0.0) is not None
    table.here["c01"] = "another"
    table.inbox["c01"].clear()
    table.deal()
    assert table.round.phase is Phase.MASKED, "the process that is gone is not waited for"
    assert list(table.round.members) == ["c00", "c02"]


def test_frames_of_the_wrong_length_break_the_protocol() -> None:
    table = Table(3)
    with pytest.raises(TransferError, match=r"keys for round 3 are \d+ bytes; got 7"):
        table.round.keys("c00", "t", bytes(7), 0.0)
    with pytest.raises(TransferError, match="no other key can be agreed"):
        table.round.keys("c00", "t", bytes(table.occasion.keys_bytes), 0.0)
    with pytest.raises(TransferError, match="after the roll"):
        table.round.shares("c00", table.here["c00"], bytes(7), 0.0)
    table.show_keys()
    other = SumMember(table.occasion, "c00").keys
    with pytest.raises(TransferError, match="other keys"):
        table.round.keys("c00", table.here["c00"], other, 0.0)
    with pytest.raises(TransferError, match="got 7"):
        table.round.shares("c00", table.here["c00"], bytes(7), 0.0)
    table.deal()
    with pytest.raises(TransferError, match="bytes of shares"):
        table.round.answer("c00", table.here["c00"], 0, bytes(SHARE_BYTES * 3))
    table.round.name(tuple(table.names), 0.0)
    with pytest.raises(TransferError, match="bytes of shares"):
        table.round.answer("c00", table.here["c00"], 0, bytes(SHARE_BYTES))


def test_in_another_epoch_all_masks_are_others() -> None:
    """The same clients, the same randomness: what is derived has the broker's epoch in it."""
    found = []
    for epoch in (1, 2):
        table = Table(3, epoch=epoch)
        table.show_keys()
        table.deal()
        table.settle()
        found.append({mask.key for keys in table.keys.values() for each in keys for mask in each.masks})
    assert not found[0] & found[1]
    assert len(next(iter(found[0]))) == KEY_BYTES


@pytest.mark.parametrize(
    ("threshold", "clients", "needed"), [(0, 2, 2), (0, 3, 2), (0, 8, 6), (5, 8, 5), (5, 12, 7), (8, 8, 8)]
)
def test_more_than_half_are_always_needed(threshold: int, clients: int, needed: int) -> None:
    assert Secure(enabled=True, threshold=threshold).needed(clients) == needed
