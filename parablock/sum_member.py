"""A client's part in the secure sum of one round (Bonawitz et al., CCS 2017, semi-honest server), without I/O.

    keys ──Roll──▸ deal ──Dealt──▸ settle ──Unmask──▸ answer

Its secrets are drawn anew for every round and every broker, live in the memory of one process and are never written
down: nothing that is sent can be sent under the same masks with other contents. For each slice (`parablock.slices`) it
gives for each client a share of one secret only, that of its own mask or that of its pairs; for both, whoever collects
them could take its mask off. So the set of a slice, once answered for, stands.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

from parablock import slices
from parablock.masks import KEY_BYTES, SEAL_BYTES, Keys, MaskError, agreed_key, public_key, seal, unseal, usable
from parablock.shamir import SHARE_BYTES, split

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from parablock.secure_settings import Secure


class SumError(ValueError):
    """The broker broke the rules of a secure sum; the text says how."""


class UnreadableSharesError(ValueError):
    """Another client has dealt shares that cannot be read; the text names it."""


@dataclass(frozen=True)
class Occasion:
    """What a sum is of. chunks: of a contribution to the round. secure: the run's settings, with which both sides work
    out t; fewest: the least that it can be (`secure_settings.fewest`), whoever is there."""

    run: str
    epoch: int
    round: int
    chunks: int
    secure: Secure
    fewest: int

    def needed(self, clients: int) -> int:
        """t: how many of so many clients must be left to unmask a sum."""
        return max(self.fewest, self.secure.needed(clients))

    @property
    def slices(self) -> int:
        return slices.count(self.chunks)

    @property
    def keys_bytes(self) -> int:
        """Of the payload of `messages.Keys`."""
        return KEY_BYTES * (1 + self.slices)

    @property
    def sealed_bytes(self) -> int:
        """Of what one client seals for another."""
        return 2 * SHARE_BYTES * self.slices + SEAL_BYTES

    def usable(self, keys: bytes) -> bool:
        """Whether with all of a client's keys others can be agreed."""
        return all(usable(keys[at : at + KEY_BYTES]) for at in range(0, len(keys), KEY_BYTES))

    def masks(self, slice: int) -> bytes:
        """Context of the keys that mask a slice."""
        return f"masks {self.run} {self.epoch} {self.round} {slice}".encode()

    def shares(self, sender: str, receiver: str) -> bytes:
        """Context of the key with which shares are sealed."""
        return f"shares {self.run} {self.epoch} {self.round} {sender} {receiver}".encode()


class SumMember:
    """See the module. name: the client's. random: gives so many secret random bytes."""

    def __init__(self, occasion: Occasion, name: str, random: Callable[[int], bytes] = secrets.token_bytes) -> None:
        self.occasion = occasion
        self._name = name
        self._random = random
        self._channel = random(KEY_BYTES)
        self._secrets = [random(KEY_BYTES) for _ in range(occasion.slices)]
        self._seeds = [random(KEY_BYTES) for _ in range(occasion.slices)]
        self.keys = b"".join(map(public_key, [self._channel, *self._secrets]))
        self.dealt = b""  # what was sealed for the others, from `deal` on
        self.settled: tuple[str, ...] = ()  # whose masks there are, from `settle` on
        self.answered: dict[int, tuple[str, ...]] = {}  # by slice, whose contributions are added up
        self._roll: dict[str, bytes] = {}  # everybody's keys
        self._held: dict[str, bytes] = {}  # by client, its shares for us, unsealed

    def deal(self, clients: Sequence[str], keys: bytes) -> bytes:
        """The payload of `Shares`. clients, keys: as `Roll` says them. Raises SumError, also for a second roll."""
        size = self.occasion.keys_bytes
        if len(keys) != size * len(clients) or list(clients) != sorted(set(clients)):
            raise SumError(f"a roll of {len(clients)} clients with {len(keys)} bytes of keys is none")
        if len(clients) < self.occasion.fewest:
            raise SumError(
                f"a roll of {len(clients)} clients, and by the run's settings it takes {self.occasion.fewest} to make "
                "a sum"
            )
        roll = {name: keys[size * place : size * (place + 1)] for place, name in enumerate(clients)}
        if roll.get(self._name) != self.keys:
            raise SumError("we are not on the roll of a round, or not with our own keys")
        if self._roll and roll != self._roll:
            raise SumError("a second, different roll of a round")
        if unusable := [name for name in roll if not self.occasion.usable(roll[name])]:
            raise SumError(f"{unusable[0]} is on the roll with a public key with which no other key can be agreed")
        if not self.dealt:
            self._roll = roll
            self.dealt = self._deal()
        return self.dealt

    @property
    def needed(self) -> int:
        """t, from `deal` on."""
        return self.occasion.needed(len(self._roll))

    def _deal(self) -> bytes:
        count, needed = len(self._roll), self.needed
        columns = []  # one for each secret: a share for each client
        for seed, secret in zip(self._seeds, self._secrets, strict=True):
            columns += [split(seed, needed, count, self._random), split(secret, needed, count, self._random)]
        sealed = []
        for place, (name, keys) in enumerate(self._roll.items()):
            text = b"".join(column[place] for column in columns)
            if name == self._name:
                self._held[name] = text
                continue
            key = agreed_key(self._channel, keys[:KEY_BYTES], self.occasion.shares(self._name, name))
            sealed.append(seal(key, text))
        return b"".join(sealed)

    def settle(self, clients: tuple[str, ...], sealed: bytes) -> tuple[Keys, ...]:
        """What masks each slice. clients, sealed: as `Dealt` says them; said again, it must be the same.

        Raises SumError, and UnreadableSharesError.
        """
        size, others = self.occasion.sealed_bytes, [name for name in clients if name != self._name]
        if not self.dealt or len(clients) != len(others) + 1 or list(clients) != sorted(self._roll.keys() & clients):
            raise SumError("shares of clients that are not on the roll")
        if len(sealed) != size * len(others) or len(clients) < self.needed:
            raise SumError(f"shares of {len(clients)} clients in {len(sealed)} bytes are too few")
        if self.settled not in ((), clients):
            raise SumError("a second, different list of the clients whose shares were dealt")
        for place, name in enumerate(others):
            key = agreed_key(self._channel, self._roll[name][:KEY_BYTES], self.occasion.shares(name, self._name))
            try:
                self._held[name] = unseal(key, sealed[size * place : size * (place + 1)])
            except MaskError as error:
                raise UnreadableSharesError(f"{name} has dealt {error}") from error
        self.settled = clients
        return tuple(map(self._keys, range(self.occasion.slices)))

    def _keys(self, slice: int) -> Keys:
        own, begin = self.settled.index(self._name), KEY_BYTES * (1 + slice)
        public = [self._roll[name][begin : begin + KEY_BYTES] for name in self.settled]
        context = self.occasion.masks(slice)
        return Keys(self._seeds[slice], self._secrets[slice], tuple(public[:own]), tuple(public[own + 1 :]), context)

    def answer(self, slice: int, clients: tuple[str, ...]) -> bytes:
        """The payload of `Unmasked`. clients: whose contributions to the slice are added up.

        Raises SumError for too few of them, and for others than were answered for before.
        """
        if slice >= self.occasion.slices or not self.settled:
            raise SumError(f"slice {slice} of round {self.occasion.round} is asked for, which there is not")
        if len(clients) < self.needed or list(clients) != sorted(set(self.settled) & set(clients)):
            raise SumError(f"a sum of {len(clients)} clients is asked for, too few or others than there are")
        if self.answered.setdefault(slice, clients) != clients:
            raise SumError(f"a second, different sum of slice {slice} of round {self.occasion.round} is asked for")
        answer = []
        for name in self.settled:
            begin = SHARE_BYTES * (2 * slice + (name not in clients))
            answer.append(self._held[name][begin : begin + SHARE_BYTES])
        return b"".join(answer)
