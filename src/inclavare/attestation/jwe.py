"""The key that a TEE is answered to, and answers encrypted to it: flattened JWE in the KBS protocol's form.

EC P-256 and P-521 with ``ECDH-ES+A256KW``, RSA with ``RSA-OAEP-256``; content always ``A256GCM`` (RFC 7518).
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, NoReturn

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.concatkdf import ConcatKDFHash
from cryptography.hazmat.primitives.keywrap import aes_key_wrap
from joserfc.errors import JoseError
from joserfc.jwk import ECKey, RSAKey

from ..errors import EvidenceError
from .channel import CONTENT_ENCRYPTION, KEY_WRAPPING

OAEP = "RSA-OAEP-256"
#: Bytes of a coordinate.
_CURVES = {"P-256": 32, "P-521": 66}
_EC_MEMBERS = frozenset({"kty", "crv", "alg", "x", "y"})
_RSA_MEMBERS = frozenset({"kty", "alg", "n", "e"})
_RSA_BITS = range(2048, 8193)
#: RFC 7518, 4.6.2: AlgorithmID, PartyUInfo, PartyVInfo and SuppPubInfo, for 256 bits.
_OTHER_INFO = len(KEY_WRAPPING).to_bytes(4, "big") + KEY_WRAPPING.encode() + bytes(8) + (256).to_bytes(4, "big")


@dataclass(frozen=True, slots=True)
class TeeKey:
    """A TEE's public key.

    Attributes:
        jwk: its members, as they came.
        holder: SHA-256 of its required members in canonical form (RFC 7638), hexadecimal.
    """

    jwk: dict[str, str]
    holder: str
    _key: ECKey | RSAKey = field(repr=False)

    @classmethod
    def parse(cls, jwk: Any) -> TeeKey:
        """Read ``tee-pubkey``.

        Raises:
            EvidenceError: ``kbs.tee_pubkey``: other members or algorithms, a point not on the curve, an RSA key of less
                than 2048 bits or more than 8192.
        """
        if not isinstance(jwk, dict) or not all(isinstance(value, str) for value in jwk.values()):
            _refuse("not an object of strings")
        kind = tuple(jwk.get(name) for name in ("kty", "alg"))
        key: ECKey | RSAKey
        try:
            if kind == ("EC", KEY_WRAPPING) and set(jwk) == _EC_MEMBERS and jwk["crv"] in _CURVES:
                if any(len(_bytes(jwk[name])) != _CURVES[jwk["crv"]] for name in ("x", "y")):
                    _refuse("coordinates of another curve's size")
                required = {name: jwk[name] for name in ("crv", "kty", "x", "y")}
                key = ECKey.import_key(required)
            elif kind == ("RSA", OAEP) and set(jwk) == _RSA_MEMBERS:
                modulus, exponent = (int.from_bytes(_bytes(jwk[name]), "big") for name in ("n", "e"))
                if modulus.bit_length() not in _RSA_BITS or not 3 <= exponent < 1 << 32:
                    _refuse(f"an RSA key of {modulus.bit_length()} bits, exponent {exponent}")
                required = {name: jwk[name] for name in ("e", "kty", "n")}
                key = RSAKey.import_key(required)
            else:
                _refuse(", ".join(f"{name} {jwk[name][:32]}" for name in ("kty", "crv", "alg") if name in jwk))
            _ = key.public_key  # checks that the point lies on the curve
        except (JoseError, ValueError) as error:
            _refuse(str(error))
        canonical = json.dumps(required, separators=(",", ":")).encode()
        return cls(dict(jwk), sha256(canonical).hexdigest(), key)

    @property
    def public_key(self) -> Any:
        """As the library ``cryptography`` has it."""
        return self._key.public_key

    def encrypt(self, value: bytes) -> bytes:
        """A flattened JWE (RFC 7516, 7.2.2) as JSON: only the TEE can read it."""
        content_key, iv = os.urandom(32), os.urandom(12)
        header: dict[str, Any] = {"alg": self.jwk["alg"], "enc": CONTENT_ENCRYPTION}
        public = self._key.public_key
        if isinstance(public, rsa.RSAPublicKey):
            encrypted_key = public.encrypt(content_key, padding.OAEP(padding.MGF1(SHA256()), SHA256(), None))
        else:
            ephemeral = ec.generate_private_key(public.curve)
            shared = ephemeral.exchange(ec.ECDH(), public)
            encrypted_key = aes_key_wrap(ConcatKDFHash(SHA256(), 32, _OTHER_INFO).derive(shared), content_key)
            numbers, size = ephemeral.public_key().public_numbers(), _CURVES[self.jwk["crv"]]
            point = {name: _text(getattr(numbers, name).to_bytes(size, "big")) for name in ("x", "y")}
            header["epk"] = {"crv": self.jwk["crv"], "kty": "EC", **point}
        # CoCo's client authenticates not these bytes but what it writes itself of what it has read in them: compact,
        # alg and enc first, the rest by name. A JOSE library's header, in another order, would not open.
        protected = _text(json.dumps(header, separators=(",", ":")).encode())
        sealed = AESGCM(content_key).encrypt(iv, value, protected.encode())
        parts = {"encrypted_key": encrypted_key, "iv": iv, "ciphertext": sealed[:-16], "tag": sealed[-16:]}
        return msgspec.json.encode({"protected": protected, **{name: _text(part) for name, part in parts.items()}})


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _bytes(text: str) -> bytes:
    # Strict, so that one key has one spelling, and so one holder.
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except binascii.Error:
        data = b""
    if not data or _text(data) != text:
        raise ValueError("not base64url without padding")
    return data


def _refuse(found: str) -> NoReturn:
    raise EvidenceError(
        "the TEE's public key cannot be used",
        id="kbs.tee_pubkey",
        found=found,
        expected=f"EC P-256 or P-521 for {KEY_WRAPPING}, or RSA of at least 2048 bits for {OAEP}",
    )
