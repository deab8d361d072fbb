"""Memory encryption of the simulated EPC: page contents exist outside of use only as ciphertext with a tag.

The key is drawn for each processor session and never stored, so pages do not outlive the process. SHAKE-256 gives the
key stream and keyed BLAKE2s the tag (encrypt-then-MAC), because both come with the interpreter: loading an enclave
imports no cryptographic library.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from dataclasses import dataclass

from ...errors import IntegrityError
from ...sgx.image import PAGE_SIZE

ZERO_PAGE = bytes(PAGE_SIZE)


@dataclass(frozen=True, slots=True)
class SealedPage:
    """One encrypted page: ciphertext (4096 bytes), version and tag (16 bytes)."""

    version: int
    ciphertext: bytes
    tag: bytes


class MemoryEncryption:
    """A memory-encryption engine with its own session key."""

    def __init__(self) -> None:
        self._stream_key = os.urandom(32)
        self._tag_key = os.urandom(32)
        self._version = 0

    def encrypt(self, address: int, page: bytes | memoryview) -> SealedPage:
        """Encrypt 4096 bytes for ``address``; a version number makes each key stream unique."""
        self._version += 1
        ciphertext = self._mix(address, self._version, page)
        return SealedPage(self._version, ciphertext, self._tag(address, self._version, ciphertext))

    def decrypt(self, address: int, page: SealedPage) -> bytes:
        """The 4096 bytes written at ``address``.

        Raises:
            IntegrityError: ``tee.memory.integrity``: changed, moved, replayed, or of another session.
        """
        if not hmac.compare_digest(self._tag(address, page.version, page.ciphertext), page.tag):
            raise IntegrityError(
                f"enclave memory at {address:#x} was changed from outside",
                id="tee.memory.integrity",
                remedy="the enclave cannot continue; start it again",
            )
        return self._mix(address, page.version, page.ciphertext)

    def _mix(self, address: int, version: int, data: bytes | memoryview) -> bytes:
        nonce = address.to_bytes(8, "little") + version.to_bytes(8, "little")
        stream = hashlib.shake_256(self._stream_key + nonce).digest(PAGE_SIZE)
        mixed = int.from_bytes(stream, "little") ^ int.from_bytes(data, "little")
        return mixed.to_bytes(PAGE_SIZE, "little")

    def _tag(self, address: int, version: int, ciphertext: bytes) -> bytes:
        tag = hashlib.blake2s(ciphertext, key=self._tag_key, digest_size=16)
        tag.update(address.to_bytes(8, "little") + version.to_bytes(8, "little"))
        return tag.digest()
