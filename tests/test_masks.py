"""Masks that cancel, keys that agree, and texts that only one other can read."""

from __future__ import annotations

import random

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from hypothesis import given, settings
from hypothesis import strategies as st

from parablock import masks
from parablock.masks import Keys, Mask, MaskError, agreed_key, apply, own_key, public_key, seal, unseal, usable

RNG = random.Random(5)
SECRETS = [RNG.randbytes(32) for _ in range(5)]
SEEDS = [RNG.randbytes(32) for _ in range(5)]
PUBLIC = [public_key(secret) for secret in SECRETS]


def keys(place: int, context: bytes = b"run/1/0/0") -> Keys:
    return Keys(SEEDS[place], SECRETS[place], tuple(PUBLIC[:place]), tuple(PUBLIC[place + 1 :]), context)


@settings(max_examples=20)
@given(chunk=st.integers(0, 2**40), numel=st.integers(1, 300), seed=st.integers(0, 2**32))
def test_the_masks_of_all_add_up_to_their_own_ones(chunk: int, numel: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = [rng.integers(0, 2**32, numel, np.uint32) for _ in SECRETS]
    total = np.zeros(numel, np.uint32)
    for place, plain in enumerate(values):
        masked = plain.copy()
        apply(masked, keys(place).masks, chunk)
        total += masked
    own = [Mask(own_key(seed, b"run/1/0/0"), plus=False) for seed in SEEDS]
    apply(total, own, chunk)
    assert total.tolist() == np.sum(values, axis=0, dtype=np.uint32).tolist()


def test_a_mask_is_the_ciphers_stream_however_long() -> None:
    numel = 2 * (1 << 16) + 33
    words = np.zeros(numel, np.uint32)
    apply(words, [Mask(SEEDS[0], plus=True)], 7)
    place = bytes(4) + (7).to_bytes(12, "little")
    stream = Cipher(ChaCha20(SEEDS[0], place), mode=None).encryptor().update(bytes(4 * numel))
    assert words.tobytes() == stream
    apply(words, [Mask(SEEDS[0], plus=False)], 7)
    assert not words.any()


def test_no_two_streams_are_alike() -> None:
    """By client, by pair, by chunk, by what they are for."""
    streams = set()
    for context in (b"run/1/0/0", b"run/1/0/1", b"run/1/1/0", b"run/2/0/0"):
        for place in range(5):
            for mask in keys(place, context).masks:
                for chunk in range(2):
                    words = np.zeros(16, np.uint32)
                    apply(words, [mask], chunk)
                    streams.add(words.tobytes() if mask.plus else (-words.astype(np.uint32)).tobytes())
    pairs, own = 10, 5
    assert len(streams) == 4 * 2 * (pairs + own)


def test_both_ends_agree_and_nobody_else() -> None:
    assert agreed_key(SECRETS[0], PUBLIC[1], b"x") == agreed_key(SECRETS[1], PUBLIC[0], b"x")
    assert agreed_key(SECRETS[0], PUBLIC[1], b"x") != agreed_key(SECRETS[1], PUBLIC[0], b"y")
    assert agreed_key(SECRETS[2], PUBLIC[1], b"x") != agreed_key(SECRETS[1], PUBLIC[0], b"x")


@pytest.mark.parametrize("public", sorted(masks._LOW_ORDER))
@pytest.mark.parametrize("top", [0, 0x80])
def test_a_public_key_of_low_order_is_refused(public: bytes, top: int) -> None:
    public = public[:-1] + bytes([public[-1] | top])
    assert not usable(public)
    with pytest.raises(MaskError, match="no key can be agreed"):
        agreed_key(SECRETS[0], public, b"x")


def test_other_public_keys_are_taken() -> None:
    assert all(map(usable, PUBLIC))


def test_a_sealed_text_opens_with_its_key_only() -> None:
    sealed = seal(SEEDS[0], b"shares")
    assert b"shares" not in sealed
    assert unseal(SEEDS[0], sealed) == b"shares"
    for key, text in ((SEEDS[1], sealed), (SEEDS[0], sealed[:-1] + bytes([sealed[-1] ^ 1]))):
        with pytest.raises(MaskError, match="not for us, or was changed"):
            unseal(key, text)
