"""The broker's half of the secure sum of one round (Bonawitz et al., CCS 2017), without I/O.

    KEYS ──roll──▸ SHARES ──deal──▸ MASKED        any ──fail──▸ FAILED: nothing of the round is counted
      everybody's keys  everybody's shares  slices are named, each once, and unmasked by the answers of `needed` clients

It waits for everybody who is there and takes part, but in the first two phases for nobody longer than `patience_s`, and
for answers no longer than `answer_s`. Who has missed a phase is
out of the round. One process of a client is one member: another one under its name does not have its secrets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from parablock.fixed_point import exponent
from parablock.masks import KEY_BYTES, MaskError, public_key
from parablock.messages import MAX_SUMMED, Dealt, Roll, Unmask
from parablock.shamir import SHARE_BYTES, ShamirError, coefficients, combine
from parablock.transfer import TransferError
from parablock.unmasking import Unmasking

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from parablock.sum_member import Occasion

    Say = Callable[[str, str, Roll | Dealt | Unmask, bytes | None], None]


class Phase(Enum):
    KEYS = "keys"
    SHARES = "shares"
    MASKED = "masked"
    FAILED = "failed"


@dataclass
class _Slice:
    """A slice whose contributors are named. answers: by client, its shares. refused: who gives none."""

    clients: tuple[str, ...]
    named_at: float
    answers: dict[str, bytes] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    unmasking: Unmasking | None = None


class SumRound:
    """say(client, token, message, payload): to that process of the client, if it is there. Times in seconds."""

    def __init__(self, occasion: Occasion, patience_s: float, answer_s: float, say: Say) -> None:
        self.phase = Phase.KEYS
        self.reason = ""  # why it has failed
        self.needed = 0  # clients that must be left, from SHARES on
        self._occasion = occasion
        self._patience_s = patience_s
        self._answer_s = answer_s
        self._say = say
        self._began = math.inf  # when the first word of the present phase came
        self._tokens: dict[str, str] = {}  # of those that are in the round so far, by name, in order from SHARES on
        self._roll: dict[str, int] = {}  # by name, its place from 1 on
        self._keys: dict[str, bytes] = {}
        self._sealed: dict[str, bytes] = {}
        self._slices: list[_Slice] = []

    # What clients say

    def keys(self, name: str, token: str, payload: bytes, now: float) -> str | None:
        """A client takes part. Why it cannot, if it cannot. Raises TransferError for what cannot be."""
        if len(payload) != self._occasion.keys_bytes:
            raise TransferError(
                f"keys for round {self._occasion.round} are {self._occasion.keys_bytes} bytes; got {len(payload)}"
            )
        if not self._occasion.usable(payload):
            raise TransferError(f"keys for round {self._occasion.round} with which no other key can be agreed")
        if self.phase is Phase.KEYS:
            self._tokens[name], self._keys[name] = token, payload
            self._began = min(self._began, now)
            return None
        if self.phase is Phase.FAILED or self._tokens.get(name) != token:
            return self.reason or "who adds up in this round was settled before this client's keys came"
        if self._keys[name] != payload:
            raise TransferError(f"other keys for round {self._occasion.round} than before")
        self._say_roll(name)
        return None

    def shares(self, name: str, token: str, payload: bytes, now: float) -> str | None:
        """As `keys`, of the shares that it deals."""
        expected = self._occasion.sealed_bytes * (len(self._roll) - 1)
        if self.phase is Phase.KEYS or (self.phase is not Phase.FAILED and len(payload) != expected):
            raise TransferError(
                f"shares for round {self._occasion.round} are {max(expected, 0)} bytes, after the roll; "
                f"got {len(payload)}"
            )
        if self.phase is Phase.FAILED or self._tokens.get(name) != token:
            return self.reason or "who adds up in this round was settled before this client's shares came"
        if self.phase is Phase.SHARES:
            self._sealed.setdefault(name, payload)
            self._began = min(self._began, now)
        else:
            self._say_dealt(name)
        return None

    def answer(self, name: str, token: str, slice: int, payload: bytes) -> None:
        """A client's shares for a slice; b"": it gives none. Raises TransferError for what cannot be."""
        if self.phase is Phase.FAILED or self._tokens.get(name) != token:
            return  # of a round that was given up
        if slice >= len(self._slices) or len(payload) not in (0, SHARE_BYTES * len(self._tokens)):
            raise TransferError(f"{len(payload)} bytes of shares for slice {slice} of round {self._occasion.round}")
        named = self._slices[slice]
        if not payload:
            named.refused.add(name)
        elif named.unmasking is None:
            named.answers.setdefault(name, payload)
            if len(named.answers) == self.needed:
                self._unmask(slice, named)

    # What becomes of it

    @property
    def members(self) -> Mapping[str, str]:
        """Tokens of those in the round, by name; of those that have come so far, in KEYS."""
        return self._tokens

    def due(self) -> float:
        """When `advance` must be called though nothing comes."""
        if self.phase in (Phase.KEYS, Phase.SHARES):
            return self._began + self._patience_s
        asked = [each.named_at for each in self._slices if each.unmasking is None]
        return min(asked, default=math.inf) + self._answer_s if self.phase is Phase.MASKED else math.inf

    def advance(self, here: Mapping[str, str], awaited: Collection[str], quorate: bool, now: float) -> None:
        """Go on to the next phase if everybody has spoken, or patience is over.

        here: tokens of the clients that are in session, by name. awaited: who shall take part in the round and has not
        given it up; quorate: whether enough clients are there for any round, so that the round need not wait for more.
        """
        over = now >= self.due()
        lacking = [name for name in awaited if self._tokens.get(name, "") != here.get(name)]
        if self.phase is Phase.KEYS and (over or not lacking):
            there = {name: token for name, token in self._tokens.items() if here.get(name) == token and name in awaited}
            chosen = sorted(there)[:MAX_SUMMED]
            if len(chosen) >= self._occasion.fewest:
                self._call_roll({name: there[name] for name in chosen})
            elif quorate and not lacking:
                self.fail(f"{len(chosen)} clients can take part, and a secure sum takes {self._occasion.fewest}")
        elif self.phase is Phase.SHARES:
            silent = [name for name in self._tokens.keys() & awaited if name not in self._sealed]
            if over or not any(here.get(name) == self._tokens[name] for name in silent):
                self._deal(now)
        elif self.phase is Phase.MASKED:
            for number, each in enumerate(self._slices):
                present = {name for name, token in self._tokens.items() if here.get(name) == token}
                can = (present - each.refused) | each.answers.keys()
                if each.unmasking is None and (len(can) < self.needed or now >= each.named_at + self._answer_s):
                    reason = (
                        f"of the {self.needed} clients that it takes to unmask slice {number} of the sum, "
                        f"{len(each.answers)} have answered"
                    )
                    if each.refused:
                        reason += (
                            f", and {', '.join(sorted(each.refused))} will not: an earlier broker has added it up with "
                            "others, and another sum would tell more"
                        )
                    self.fail(reason)
                    return

    def name(self, clients: tuple[str, ...], now: float) -> None:
        """It is settled whose contributions to the next slice are added up: ask for what unmasks their sum."""
        assert self.phase is Phase.MASKED
        assert len(clients) >= self.needed
        assert set(clients) <= set(self.left)
        self._slices.append(_Slice(clients, now))
        for name in self._tokens:
            self._ask(name, len(self._slices) - 1)

    @property
    def named(self) -> int:
        """Slices of which it is settled whose contributions are added up."""
        return len(self._slices)

    @property
    def complete(self) -> bool:
        """Whether that is all of them."""
        return len(self._slices) == self._occasion.slices

    @property
    def left(self) -> tuple[str, ...]:
        """Whose contributions can be in the next slice: those that are in the last one that was named."""
        return self._slices[-1].clients if self._slices else tuple(self._tokens)

    def unmasking(self, slice: int) -> Unmasking | None:
        """What takes the masks off the sum of a slice; None: too few have answered yet."""
        return self._slices[slice].unmasking

    def remind(self, name: str, token: str) -> None:
        """Ask this client again for what it has not answered."""
        if self.phase is Phase.MASKED and self._tokens.get(name) == token:
            for slice, named in enumerate(self._slices):
                if named.unmasking is None and name not in named.answers and name not in named.refused:
                    self._ask(name, slice)

    def fail(self, reason: str) -> None:
        """Nothing of the round is counted: of what it has unmasked no other sum may be made."""
        self.phase, self.reason = Phase.FAILED, reason
        for each in self._slices:
            each.answers.clear()

    def _call_roll(self, tokens: dict[str, str]) -> None:
        self.phase, self._tokens, self._began = Phase.SHARES, tokens, math.inf
        self._roll = {name: place for place, name in enumerate(tokens, start=1)}
        self.needed = self._occasion.needed(len(tokens))
        for name in tokens:
            self._say_roll(name)

    def _deal(self, now: float) -> None:
        there = {name: token for name, token in self._tokens.items() if name in self._sealed}
        if len(there) < self.needed:
            self.fail(f"{len(there)} clients have dealt their shares, and {self.needed} are needed")
            return
        self.phase, self._tokens, self._began = Phase.MASKED, there, now
        for name in there:
            self._say_dealt(name)

    def _say_roll(self, name: str) -> None:
        payload = b"".join(self._keys[each] for each in self._roll)
        self._say(name, self._tokens[name], Roll(self._occasion.round, tuple(self._roll)), payload)

    def _say_dealt(self, name: str) -> None:
        size, payload = self._occasion.sealed_bytes, []
        for other in self._tokens:
            if other != name:
                place = self._roll[name] - 1 - (self._roll[name] > self._roll[other])  # it has none for itself
                payload.append(self._sealed[other][size * place : size * (place + 1)])
        self._say(name, self._tokens[name], Dealt(self._occasion.round, tuple(self._tokens)), b"".join(payload))

    def _ask(self, name: str, slice: int) -> None:
        message = Unmask(self._occasion.round, slice, self._slices[slice].clients)
        self._say(name, self._tokens[name], message, None)

    def _unmask(self, slice: int, named: _Slice) -> None:
        """Put together, of each client in the round, the secret that its shares are of."""
        weights = coefficients([self._roll[name] for name in named.answers])
        begin = KEY_BYTES * (1 + slice)
        public = {name: self._keys[name][begin : begin + KEY_BYTES] for name in self._tokens}
        seeds, lost = [], []
        for number, name in enumerate(self._tokens):
            part = slice_of_answer(number)
            shares = {self._roll[other]: answer[part] for other, answer in named.answers.items()}
            try:
                secret = combine(shares, weights)
                if name in named.clients:
                    seeds.append(secret)
                    continue
                if public_key(secret) != public[name]:
                    raise MaskError("another key")
            except (ShamirError, MaskError):
                self.fail(f"the shares of {name}'s secret do not fit together: a client has dealt or given wrong ones")
                return
            earlier = tuple(public[other] for other in named.clients if other < name)
            later = tuple(public[other] for other in named.clients if other > name)
            lost.append((secret, earlier, later))
        bits = exponent(len(self._tokens), self._occasion.secure.range)
        named.unmasking = Unmasking(self._occasion.masks(slice), bits, tuple(seeds), tuple(lost))


def slice_of_answer(number: int) -> slice:
    """Where in an answer the share of the client of this number is."""
    return slice(SHARE_BYTES * number, SHARE_BYTES * (number + 1))
