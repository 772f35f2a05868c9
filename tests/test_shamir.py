"""Shares: any t give the secret back, fewer do not determine it."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parablock.shamir import PRIME, SHARE_BYTES, ShamirError, coefficients, combine, split

secrets = st.binary(min_size=32, max_size=32)


def test_the_modulus_is_the_first_prime_above_every_secret() -> None:
    def probably_prime(n: int) -> bool:
        """Miller and Rabin's test, 40 bases drawn by a seed."""
        rng = random.Random(0)
        odd, twos = n - 1, 0
        while odd % 2 == 0:
            odd, twos = odd // 2, twos + 1
        for _ in range(40):
            x = pow(rng.randrange(2, n - 1), odd, n)
            if x not in (1, n - 1) and all((x := x * x % n) != n - 1 for _ in range(twos - 1)):
                return False
        return True

    assert probably_prime(PRIME)
    assert not any(probably_prime(n) for n in range(2**256 + 1, PRIME, 2))


@given(secret=secrets, seed=st.integers(0, 2**32), data=st.data())
def test_any_t_shares_give_the_secret(secret: bytes, seed: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 9))
    threshold = data.draw(st.integers(1, count))
    shares = split(secret, threshold, count, random.Random(seed).randbytes)
    assert len(shares) == count
    assert {len(share) for share in shares} == {SHARE_BYTES}
    places = data.draw(st.permutations(range(1, count + 1)))[:threshold]
    assert combine({place: shares[place - 1] for place in places}, coefficients(places)) == secret


@given(secret=secrets, other=secrets, seed=st.integers(0, 2**32))
def test_with_one_share_fewer_every_secret_fits(secret: bytes, other: bytes, seed: int) -> None:
    """Two shares of three needed: for any other secret there is a third share with which they give it."""
    shares = split(secret, 3, 3, random.Random(seed).randbytes)
    weights = coefficients([1, 2, 3])
    known = sum(weights[place] * int.from_bytes(shares[place - 1]) for place in (1, 2))
    third = (int.from_bytes(other) - known) * pow(weights[3], -1, PRIME) % PRIME
    assert combine({1: shares[0], 2: shares[1], 3: third.to_bytes(SHARE_BYTES)}, weights) == other


def test_shares_of_no_secret_are_refused() -> None:
    weights = coefficients([1])
    with pytest.raises(ShamirError, match="no secret"):
        combine({1: (2**256 + 5).to_bytes(SHARE_BYTES)}, weights)
