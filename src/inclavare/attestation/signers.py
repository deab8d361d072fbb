"""Who may sign reference values: keys (ECDSA P-256 or Ed25519), or identities that sigstore certifies."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from ..errors import IntegrityError, UsageError

PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey
PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey

_EXPECTED = "an ECDSA P-256 or Ed25519 key, PEM"


def key_id(key: PublicKey) -> str:
    """SHA-256 of the SubjectPublicKeyInfo, hexadecimal."""
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def load_public_key(pem: bytes, name: str = "the key") -> PublicKey:
    """A public key, or the public half of a private one.

    Raises:
        UsageError: ``reference.key``.
    """
    try:
        key = load_pem_private_key(pem, None).public_key() if b"PRIVATE KEY" in pem else load_pem_public_key(pem)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _unusable(name, str(error)) from None
    if isinstance(key, ed25519.Ed25519PublicKey) or (
        isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)
    ):
        return key
    raise _unusable(name, type(key).__name__)


@dataclass(frozen=True)
class KeySigner:
    """Signs with a key in memory. Implements :class:`inclavare.attestation.references.Signer`."""

    key: PrivateKey

    @property
    def key_id(self) -> str:
        """See :func:`key_id`."""
        return key_id(self.key.public_key())

    def sign(self, message: bytes) -> bytes:
        """ECDSA (DER) or Ed25519."""
        if isinstance(self.key, ed25519.Ed25519PrivateKey):
            return self.key.sign(message)
        return self.key.sign(message, ec.ECDSA(SHA256()))

    def public_pem(self) -> bytes:
        """For those who trust it."""
        return self.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    @classmethod
    def load(cls, path: Path) -> KeySigner:
        """Read a private key.

        Raises:
            UsageError: ``reference.key``: unreadable, encrypted, of another kind, or readable by others.
        """
        try:
            pem = path.read_bytes()
            mode = path.stat().st_mode
        except OSError as error:
            raise _unusable(str(path), error.strerror) from None
        if mode & 0o077:
            raise UsageError(
                f"{path} can be read by others",
                id="reference.key.mode",
                found=f"mode {mode & 0o777:04o}",
                expected="mode 0600",
                remedy=f"chmod 600 {path}; if others had access, make a new key",
            )
        try:
            key = load_pem_private_key(pem, None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise _unusable(str(path), str(error)) from None
        load_public_key(pem, str(path))
        assert isinstance(key, ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey)
        return cls(key)

    @classmethod
    def load_or_make(cls, path: Path) -> tuple[KeySigner, bool]:
        """Read a private key, or make one (ECDSA P-256, mode 0600) where there is none.

        Returns:
            the signer, and whether the key was made now.

        Raises:
            UsageError: ``reference.key``.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Exclusive: of two that make it at once, one reads what the other wrote.
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            return cls.load(path), False
        except OSError as error:
            raise _unusable(str(path), error.strerror) from None
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(pem)
        return cls(key), True


@dataclass(frozen=True)
class SigstoreIdentity:
    """A signer whom sigstore certifies.

    Attributes:
        trusted_root: path of the sigstore instance's ``trusted_root.json``: its authorities and logs.
        identity: what the certificate names: an e-mail address or a workflow's URL.
        issuer: the OpenID Connect provider that vouched for it.
    """

    trusted_root: Path
    identity: str
    issuer: str


class TrustedSigners:
    """Whose signatures count.

    Args:
        keys: public keys.
        sigstore: identities, each with the trusted root that the caller chose.
    """

    def __init__(self, keys: Iterable[PublicKey] = (), sigstore: Iterable[SigstoreIdentity] = ()) -> None:
        self._keys = {key_id(key): key for key in keys}
        self._sigstore = tuple(sigstore)

    @classmethod
    def from_pem(cls, *pems: bytes) -> TrustedSigners:
        """Public keys in PEM.

        Raises:
            UsageError: ``reference.key``.
        """
        return cls(load_public_key(pem) for pem in pems)

    def verify(self, message: bytes, signatures: Sequence[tuple[str | None, bytes]]) -> tuple[str, ...]:
        """Ids of the trusted keys whose signature over a message holds.

        Args:
            signatures: key id, if it says one (a hint only), and signature.

        Raises:
            IntegrityError: ``reference.signer`` where no trusted key is even named, else ``reference.signature``.
        """
        held: list[str] = []
        tried = False
        for hint, signature in signatures:
            for known, key in self._keys.items():
                if hint is not None and hint != known:
                    continue
                tried = True
                if known not in held and _holds(key, signature, message):
                    held.append(known)
        if held:
            return tuple(held)
        raise IntegrityError(
            "the reference bundle's signature does not verify"
            if tried
            else "the reference bundle is signed by nobody who is trusted",
            id="reference.signature" if tried else "reference.signer",
            found=", ".join(hint or "a signature without key id" for hint, _ in signatures)[:400],
            expected=" or ".join(self._keys) or "no key is trusted here",
            remedy="it was damaged or forged: get it again from who builds the image"
            if tried
            else "have it signed by a trusted key, or trust this one if you know whose it is",
        )

    def verify_sigstore(self, data: bytes) -> tuple[str, bytes, tuple[str, ...]]:
        """Verify a sigstore bundle without any network: certificate, transparency log and time.

        Returns:
            payload type, payload, and who signed it.

        Raises:
            IntegrityError: ``reference.signature`` or ``reference.signer``.
            UsageError: ``reference.sigstore``: the extra is not installed, or the trusted root is none.
        """
        if not self._sigstore:
            raise IntegrityError(
                "the reference bundle is signed through sigstore, and no identity is trusted",
                id="reference.signer",
                found="a sigstore bundle",
                expected=" or ".join(self._keys) or "no key is trusted here",
                remedy="name the identity, its issuer and the trusted root that you accept",
            )
        try:
            from sigstore import errors, models, verify
        except ImportError:
            raise UsageError(
                "sigstore bundles cannot be verified here",
                id="reference.sigstore",
                expected="the extra sigstore",
                remedy="pip install 'inclavare[sigstore]'",
            ) from None
        causes = []
        for signer in self._sigstore:
            try:
                root = models.TrustedRoot.from_file(str(signer.trusted_root))
            except (ValueError, OSError, errors.Error) as error:
                raise UsageError(
                    "the sigstore trusted root cannot be read", id="reference.sigstore", found=str(error)[:200]
                ) from None
            policy = verify.policy.Identity(identity=signer.identity, issuer=signer.issuer)
            try:
                bundle = models.Bundle.from_json(data)
                kind, payload = verify.Verifier(trusted_root=root).verify_dsse(bundle, policy)
                return kind, payload, (f"{signer.identity} ({signer.issuer})",)
            except Exception as error:  # Whatever a parser below says about a bundle, it is not verified.
                causes.append(str(error))
        raise IntegrityError(
            "the sigstore bundle does not verify",
            id="reference.signature",
            found="; ".join(causes)[:400],
            expected=" or ".join(f"{signer.identity} ({signer.issuer})" for signer in self._sigstore),
            remedy="get it again from who builds the image, or trust this identity if you know whose it is",
        )


def _holds(key: PublicKey, signature: bytes, message: bytes) -> bool:
    try:
        if isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(signature, message)
        else:
            key.verify(signature, message, ec.ECDSA(SHA256()))
    except InvalidSignature:
        return False
    return True


def _unusable(name: str, found: object) -> UsageError:
    return UsageError(f"{name} cannot be used", id="reference.key", found=found, expected=_EXPECTED)
