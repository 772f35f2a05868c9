"""Masks: streams of numbers that hide a vector modulo 2³², and that cancel out between two clients.

    y_u = x_u + PRG(b_u) + Σ_{v after u} PRG(s_uv) − Σ_{v before u} PRG(s_uv)   (mod 2³²)

(Bonawitz et al., CCS 2017, section 4.) s_uv is agreed between u and v (X25519), b_u is u's own; PRG is ChaCha20, by
chunk, so that any chunk can be masked or unmasked by itself. Keys are for one slice of one round in one epoch of the
broker (`parablock.slices`): HKDF-SHA-256 has that in its context, and nobody derives them for another.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Words = npt.NDArray[np.uint32]

KEY_BYTES = 32
SEAL_BYTES = 16
"""What a sealed text is longer than the text."""

_PIECE = 1 << 16
"""Elements masked at a time: what a stream and a part of the vector take together stays in the cache."""
_ZEROS = bytes(4 * _PIECE)
_NONCE = bytes(12)


class MaskError(ValueError):
    """A key or a sealed text of a peer that cannot be."""


_LOW_ORDER = frozenset(
    bytes.fromhex(text)
    for text in (
        "00" * 32,
        "01" + "00" * 31,
        "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
        "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
        "ec" + "ff" * 30 + "7f",
        "ed" + "ff" * 30 + "7f",
        "ee" + "ff" * 30 + "7f",
    )
)
"""Points with which every secret gives the same, which is no secret (RFC 7748, section 6.1); without the top bit."""


def usable(public: bytes) -> bool:
    """Whether a key can be agreed with the owner of this public key."""
    return public[:-1] + bytes([public[-1] & 0x7F]) not in _LOW_ORDER


def public_key(secret: bytes) -> bytes:
    """X25519's, of a secret of `KEY_BYTES` random bytes."""
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def agreed_key(secret: bytes, public: bytes, context: bytes) -> bytes:
    """What the owners of two pairs both get for a context. Raises MaskError for a public key that gives none."""
    try:
        shared = X25519PrivateKey.from_private_bytes(secret).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise MaskError("a public key with which no key can be agreed") from error
    return _derived(shared, context)


def own_key(seed: bytes, context: bytes) -> bytes:
    """The key of the mask that is one client's own."""
    return _derived(seed, context)


def _derived(material: bytes, context: bytes) -> bytes:
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=b"parablock " + context).derive(material)


def seal(key: bytes, text: bytes) -> bytes:
    """Encrypted and authenticated. A key seals one text only."""
    return ChaCha20Poly1305(key).encrypt(_NONCE, text, None)


def unseal(key: bytes, sealed: bytes) -> bytes:
    """Raises MaskError where it was not sealed with this key, or was changed since."""
    try:
        return ChaCha20Poly1305(key).decrypt(_NONCE, sealed, None)
    except InvalidTag as error:
        raise MaskError("a sealed text that is not for us, or was changed") from error


@dataclass(frozen=True)
class Mask:
    """One stream. plus: it is added, or else subtracted."""

    key: bytes
    plus: bool


def apply(words: Words, masks: Sequence[Mask], chunk: int) -> None:
    """Add to the words of a chunk, in place, what these masks have for it."""
    streams = [(Cipher(ChaCha20(mask.key, _place(chunk)), mode=None).encryptor(), mask.plus) for mask in masks]
    scratch = bytearray(4 * min(_PIECE, max(words.size, 1)))
    stream = np.frombuffer(scratch, np.uint32)
    for start in range(0, words.size, _PIECE):
        part = words[start : start + _PIECE]
        for encryptor, plus in streams:
            encryptor.update_into(memoryview(_ZEROS)[: part.nbytes], scratch)
            if plus:
                part += stream[: part.size]
            else:
                part -= stream[: part.size]


def _place(chunk: int) -> bytes:
    """ChaCha20's block counter and nonce: each chunk has a stream of its own, of up to 256 GiB."""
    return bytes(4) + chunk.to_bytes(12, "little")


@dataclass(frozen=True)
class Keys:
    """What masks one slice of a client's contribution. before, after: public keys of the others, by place in the
    round's list."""

    seed: bytes
    secret: bytes
    before: tuple[bytes, ...]
    after: tuple[bytes, ...]
    context: bytes

    @cached_property
    def masks(self) -> tuple[Mask, ...]:
        """Derived when they are needed, on the thread that needs them. Raises MaskError."""
        return (
            Mask(own_key(self.seed, self.context), plus=True),
            *(Mask(agreed_key(self.secret, public, self.context), plus=False) for public in self.before),
            *(Mask(agreed_key(self.secret, public, self.context), plus=True) for public in self.after),
        )
