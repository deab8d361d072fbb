"""A channel into an enclave that its quote vouches for: an ephemeral key, bound by report data, and JWE to it.

Names, encodings and algorithms are those of the Trustee key broker protocol (KBS, version 0.4.0), so that its clients
and servers understand them.
"""

from __future__ import annotations

import base64
import hashlib
import json
from typing import TYPE_CHECKING, Any

from ..errors import EvidenceError

if TYPE_CHECKING:
    from joserfc.jwk import ECKey

KEY_WRAPPING = "ECDH-ES+A256KW"
CONTENT_ENCRYPTION = "A256GCM"
#: Largest secret in bytes.
MAX_SECRET = 1 << 20
#: Members of a flattened JWE (RFC 7516, 7.2.2) as the KBS protocol uses it, in the order of the compact form.
_JWE_KEYS = ("protected", "encrypted_key", "iv", "ciphertext", "tag")
_RUNTIME_KEYS = frozenset({"additional-evidence", "nonce", "tee-pubkey"})


def runtime_data(nonce: bytes, public_jwk: dict[str, str]) -> dict[str, Any]:
    """What an enclave answers a challenge with: the nonce and its public key.

    Args:
        nonce: the relying party's, at least 16 bytes.
        public_jwk: EC public key, RFC 7517.
    """
    return {
        "additional-evidence": "",
        "nonce": base64.b64encode(nonce).decode(),
        "tee-pubkey": public_jwk,
    }


def report_data(data: dict[str, Any]) -> bytes:
    """The report data that binds runtime data: SHA-384 of its canonical JSON (RFC 8785), zero-padded to 64 bytes.

    Raises:
        EvidenceError: ``evidence.runtime_data.malformed``: members other than ``nonce``, ``tee-pubkey`` and
            ``additional-evidence``, or values without a canonical form.
    """
    import rfc8785

    complete = {"additional-evidence": "", **data}
    try:
        if set(complete) != _RUNTIME_KEYS:
            raise ValueError(", ".join(sorted(map(str, set(complete) ^ _RUNTIME_KEYS))))
        canonical = rfc8785.dumps(complete)
    except (rfc8785.CanonicalizationError, ValueError, RecursionError) as error:
        raise EvidenceError(
            "the runtime data is malformed",
            id="evidence.runtime_data.malformed",
            found=str(error),
            expected=", ".join(sorted(_RUNTIME_KEYS)),
        ) from None
    return hashlib.sha384(canonical).digest() + bytes(16)


def report_data_for(nonce: bytes, public_jwk: dict[str, str]) -> bytes:
    """The 64 bytes of report data for a challenge; see :func:`report_data`."""
    return report_data(runtime_data(nonce, public_jwk))


class EnclaveChannel:
    """The enclave's end: an ephemeral P-256 key that never leaves the process."""

    def __init__(self, key: ECKey) -> None:
        self._key = key

    @classmethod
    def new(cls) -> EnclaveChannel:
        """Draw a fresh key."""
        from joserfc.jwk import ECKey

        return cls(ECKey.generate_key("P-256", auto_kid=False))

    @property
    def public_jwk(self) -> dict[str, str]:
        """The public key as a JWK with ``kty``, ``crv``, ``alg``, ``x`` and ``y``."""
        public = self._key.as_dict(private=False)
        return {
            "kty": "EC",
            "crv": "P-256",
            "alg": KEY_WRAPPING,
            "x": str(public["x"]),
            "y": str(public["y"]),
        }

    def private_pem(self) -> bytes:
        """The private key, PKCS #8 in PEM: for an application of this enclave that speaks the protocol itself."""
        return self._key.as_pem(private=True)

    def decrypt(self, jwe: dict[str, Any]) -> bytes:
        """Open a flattened JWE that was made for this key.

        Raises:
            EvidenceError: ``evidence.channel.jwe``: malformed, other algorithms, changed, or made for another key.
        """
        from joserfc import jwe as jose
        from joserfc.errors import JoseError

        registry = jose.JWERegistry(algorithms=[KEY_WRAPPING, CONTENT_ENCRYPTION])
        registry.max_ciphertext_length = -(-MAX_SECRET * 4 // 3)  # joserfc's own limit is 64 KB
        try:
            if not isinstance(jwe, dict) or set(jwe) != set(_JWE_KEYS):
                raise ValueError("other members than those of a flattened JWE")
            # With every header protected, a flattened JWE is a compact one with its parts named.
            compact = ".".join(jwe[part] for part in _JWE_KEYS)
            opened = jose.decrypt_compact(compact, self._key, registry=registry)
        except (JoseError, ValueError, TypeError, KeyError) as error:
            raise EvidenceError(
                "the encrypted message cannot be opened",
                id="evidence.channel.jwe",
                found=f"{type(error).__name__}: {error}",
                expected=f"a flattened JWE, {KEY_WRAPPING} and {CONTENT_ENCRYPTION}, for this enclave's key",
                remedy="challenge the enclave again: its key is new in every session",
            ) from None
        return opened.plaintext or b""


def encrypt(public_jwk: dict[str, str], secret: bytes) -> dict[str, str]:
    """Encrypt a secret to an enclave's key, as a flattened JWE (RFC 7516) in the KBS protocol's form.

    Args:
        public_jwk: ``tee-pubkey`` out of accepted evidence.

    Raises:
        EvidenceError: ``evidence.channel.key``: not a key that :meth:`inclavare.attestation.jwe.TeeKey.parse` takes.
    """
    from .jwe import TeeKey

    try:
        key = TeeKey.parse(public_jwk)
    except EvidenceError as error:
        raise EvidenceError(
            "the enclave's public key cannot be used",
            id="evidence.channel.key",
            found=error.found,
            expected=error.expected,
        ) from None
    made: dict[str, str] = json.loads(key.encrypt(secret))
    return made
