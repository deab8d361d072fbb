"""Envelope encryption: each value under a data key of its own, each data key under a root key.

AES-256-GCM throughout (NIST SP 800-38D), random 96-bit nonces. A data key encrypts one value once, so its nonce cannot
come twice; a root key wraps far fewer than the 2^32 data keys that random nonces allow. What a ciphertext belongs to
(store, tenant, path, version, and what decides on its release) is authenticated with it: a row that is moved to another
place, or whose policy is exchanged, does not open.
"""

from __future__ import annotations

import hmac
import os
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from .errors import Damaged

KEY_SIZE = 32
NONCE_SIZE = 12
TAG_SIZE = 16


@dataclass(frozen=True, slots=True)
class Envelope:
    """An encrypted value.

    Attributes:
        generation: of the root key.
        wrapped_key: nonce, data key, tag: 60 bytes.
        sealed: nonce, value, tag: 28 bytes longer than the value.
    """

    generation: int
    wrapped_key: bytes
    sealed: bytes


def context(*parts: object) -> bytes:
    """Additional data from parts, unambiguous: each is preceded by its length (4 bytes, big endian)."""
    encoded = [part if isinstance(part, bytes) else str(part).encode() for part in parts]
    return b"".join(len(part).to_bytes(4) + part for part in encoded)


def encrypt(key: bytes, data: bytes, aad: bytes) -> bytes:
    """AES-256-GCM under a 32-byte key: nonce (12 bytes), ciphertext, tag (16 bytes)."""
    nonce = os.urandom(NONCE_SIZE)
    return nonce + AESGCM(key).encrypt(nonce, data, aad)


def decrypt(key: bytes, blob: bytes, aad: bytes) -> bytes:
    """The opposite of :func:`encrypt`.

    Raises:
        InvalidTag: another key, other additional data, or damage.
    """
    if len(blob) < NONCE_SIZE + TAG_SIZE:
        raise InvalidTag
    return AESGCM(key).decrypt(blob[:NONCE_SIZE], blob[NONCE_SIZE:], aad)


def seal(root: bytes, generation: int, value: bytes, aad: bytes) -> Envelope:
    """Encrypt a value under a new data key."""
    key = os.urandom(KEY_SIZE)
    return Envelope(generation, wrap(root, generation, key, aad), encrypt(key, value, aad))


def unseal(root: bytes, envelope: Envelope, aad: bytes) -> bytes:
    """Decrypt a value.

    Raises:
        Damaged: it was changed, or belongs elsewhere.
    """
    key = unwrap(root, envelope.generation, envelope.wrapped_key, aad)
    try:
        return decrypt(key, envelope.sealed, aad)
    except InvalidTag:
        raise damaged() from None


def wrap(root: bytes, generation: int, key: bytes, aad: bytes) -> bytes:
    """Wrap a data key: 60 bytes."""
    return encrypt(root, key, context("data key", generation) + aad)


def unwrap(root: bytes, generation: int, wrapped: bytes, aad: bytes) -> bytes:
    """A data key.

    Raises:
        Damaged: it was changed, or belongs elsewhere.
    """
    try:
        return decrypt(root, wrapped, context("data key", generation) + aad)
    except InvalidTag:
        raise damaged() from None


def derive(key: bytes, purpose: str, salt: bytes | None = None) -> bytes:
    """A 32-byte key for another purpose (HKDF-SHA256, RFC 5869)."""
    return HKDF(SHA256(), KEY_SIZE, salt, b"inclavare verdict store: " + purpose.encode()).derive(key)


def mac(key: bytes, *parts: object) -> bytes:
    """HMAC-SHA256 over parts: 32 bytes."""
    return hmac.digest(key, context(*parts), "sha256")


def damaged() -> Damaged:
    """What does not authenticate."""
    return Damaged(
        "something in the store was changed behind its back",
        id="verdict.store.ciphertext.damaged",
        found="a ciphertext that does not belong where it is",
        remedy="restore a backup, verify the audit trail, and find out who can write to the database",
    )
