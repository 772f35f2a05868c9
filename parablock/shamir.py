"""Shamir's secret sharing (1979): a secret in n shares, of which any t give it back and fewer say nothing about it.

The secret is the constant term of a random polynomial of degree t − 1 over the integers modulo `PRIME`; share i is its
value at i, 1 ≤ i ≤ n.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Randomness = Callable[[int], bytes]

PRIME = 2**256 + 297
"""The smallest one above 2²⁵⁶, so that every secret of 32 bytes is below it."""

SECRET_BYTES, SHARE_BYTES = 32, 33


class ShamirError(ValueError):
    """Shares that belong to no secret."""


def split(secret: bytes, threshold: int, count: int, random: Randomness) -> list[bytes]:
    """`count` shares of `SHARE_BYTES` each, in order, any `threshold` of which give `secret` back.

    secret: of `SECRET_BYTES`. random: gives that many secret random bytes.
    """
    assert len(secret) == SECRET_BYTES
    assert 1 <= threshold <= count
    # 128 bits more than the prime has: what is left of the division is uniform but for 2^-128.
    higher = [int.from_bytes(random(SHARE_BYTES + 16)) % PRIME for _ in range(threshold - 1)]
    shares = []
    for place in range(1, count + 1):
        value = 0
        for coefficient in higher:
            value = (value + coefficient) * place % PRIME
        shares.append(((value + int.from_bytes(secret)) % PRIME).to_bytes(SHARE_BYTES))
    return shares


def coefficients(places: Sequence[int]) -> dict[int, int]:
    """By place i, λ_i with secret = Σ λ_i · share_i: Lagrange's polynomials at 0. places: distinct ones, from 1 on."""
    found = {}
    for place in places:
        above = below = 1
        for other in places:
            if other != place:
                above = above * other % PRIME
                below = below * (other - place) % PRIME
        found[place] = above * pow(below, -1, PRIME) % PRIME
    return found


def combine(shares: Mapping[int, bytes], weights: Mapping[int, int]) -> bytes:
    """The secret. shares: by place, as many as the threshold; weights: `coefficients` of those places.

    Raises ShamirError where they belong to none, which is not always seen.
    """
    secret = sum(weights[place] * int.from_bytes(share) for place, share in shares.items()) % PRIME
    if secret >> (8 * SECRET_BYTES):
        raise ShamirError("the shares belong to no secret")
    return secret.to_bytes(SECRET_BYTES)
