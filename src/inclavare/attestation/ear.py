"""EAR, the attestation result as a signed token (draft-ietf-rats-ear, a profile of RFC 9711), as Trustee writes it.

A JWT with ES256. The header carries the public key (``jwk``, with ``x5c`` inside it where there is a certificate) and
its ``kid``. ``submods.cpu0`` has the status, the trustworthiness vector, the policy's id, and as annotated evidence the
claims and the TEE's public key, which is what secrets are wrapped for.

A header's key is only a hint: :class:`EarVerifier` accepts keys that it was given, or whose certificates chain to
anchors that it was given.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any, NoReturn

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from .. import __version__
from ..errors import EvidenceError, UsageError
from .annotated import annotated_evidence
from .appraisal import Appraisal, Context
from .trust import Tier, TrustVector

PROFILE = "tag:github.com,2024:confidential-containers/Trustee"
ISSUER = "CoCo-Attestation-Service"
DEVELOPER = "https://inclavare-containers.io"
SUBMODULE = "cpu0"
EVIDENCE = "ear.veraison.annotated-evidence"
#: Seconds.
LIFETIME = 300
MAX_LIFETIME = 86400
SKEW = 60
#: A token without event logs has some 5 KB; Trustee's, with them, up to some hundred.
MAX_TOKEN = 256 << 10
MAX_CHAIN = 5

_STATUSES = {level.text: level for level in Tier}
_COORDINATE = 32


@dataclass(frozen=True)
class EarKey:
    """A signing key: ECDSA P-256.

    Attributes:
        private: the key.
        chain: certificates, DER, the key's own first; empty for none. CoCo's key broker asks for them.
    """

    private: ec.EllipticCurvePrivateKey
    chain: tuple[bytes, ...] = ()

    @classmethod
    def generate(cls) -> EarKey:
        """A new key, without certificates."""
        return cls(ec.generate_private_key(ec.SECP256R1()))

    @classmethod
    def from_pem(cls, pem: bytes, chain: bytes = b"") -> EarKey:
        """Read a key and, in PEM, its certificates.

        Raises:
            UsageError: ``ear.key``: not such a key, or the first certificate is another key's.
        """
        try:
            key = load_pem_private_key(pem, None)
            certificates = x509.load_pem_x509_certificates(chain) if chain.strip() else []
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise _key_error(str(error)) from None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
            raise _key_error(type(key).__name__)
        if certificates and certificates[0].public_key() != key.public_key():
            raise _key_error("a certificate of another key")
        return cls(key, tuple(certificate.public_bytes(Encoding.DER) for certificate in certificates))

    def to_pem(self) -> bytes:
        """The private key, PKCS#8: a secret."""
        return self.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def self_signed(self, common_name: str = "verdictd attestation tokens", days: int = 3650) -> EarKey:
        """The same key with a certificate of its own making, to be trusted as it stands by CoCo's key broker."""
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)])
        start = datetime.now(UTC) - timedelta(minutes=5)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self.private.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(start + timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .sign(self.private, SHA256())
        )
        return replace(self, chain=(certificate.public_bytes(Encoding.DER),))

    @cached_property
    def kid(self) -> str:
        """Thumbprint (RFC 7638), base64url."""
        return thumbprint(_public_jwk(self.private.public_key()))

    @cached_property
    def jwk(self) -> dict[str, Any]:
        """The public key (RFC 7517)."""
        made = {**_public_jwk(self.private.public_key()), "alg": "ES256", "use": "sig", "kid": self.kid}
        return made | ({"x5c": [base64.b64encode(one).decode() for one in self.chain]} if self.chain else {})


def thumbprint(jwk: Mapping[str, Any]) -> str:
    """RFC 7638, SHA-256, of an elliptic-curve key; base64url without padding."""
    needed = {name: jwk[name] for name in ("crv", "kty", "x", "y")}
    return _base64url(hashlib.sha256(json.dumps(needed, separators=(",", ":"), sort_keys=True).encode()).digest())


class EarIssuer:
    """Issues tokens.

    Args:
        keys: the first one signs. The others are published, too: the next one, so that verifiers know it before it is
            used, and former ones until the last token of theirs has expired.
        issuer: ``iss``.
        developer: who answers for the verifier (``ear.verifier-id``).
        build: what it is; by default this package's version.
    """

    def __init__(
        self,
        keys: Sequence[EarKey],
        *,
        issuer: str = ISSUER,
        developer: str = DEVELOPER,
        build: str = f"inclavare {__version__}",
    ) -> None:
        if not keys:
            raise _key_error("no key")
        self._keys = tuple(keys)
        self._issuer = issuer
        self._verifier_id = {"build": build, "developer": developer}
        self._header = _segment({"alg": "ES256", "typ": "JWT", "kid": keys[0].kid, "jwk": keys[0].jwk})

    def jwks(self) -> dict[str, Any]:
        """The public keys (RFC 7517, section 5)."""
        return {"keys": [key.jwk for key in self._keys]}

    def issue(
        self,
        appraisal: Appraisal,
        *,
        tee_pubkey: Mapping[str, Any] | None,
        policy_ids: Sequence[str],
        lifetime: int = LIFETIME,
        context: Context | None = None,
        verbose: bool = False,
        now: int | None = None,
    ) -> str:
        """A token for an appraisal, accepted or not: its status says which.

        Args:
            tee_pubkey: the key that the evidence vouches for, as a JWK; ``None`` if there is none.
            policy_ids: the first one is the token's.
            lifetime: seconds.
            context: data that the evidence vouches for.
            verbose: put event logs and additional evidence into the token.
            now: seconds since 1970; by default the present.

        Raises:
            UsageError: ``ear.lifetime``, ``ear.policy``, or ``ear.tee_pubkey``: another key than the evidence's.
        """
        moment = int(time.time()) if now is None else now
        if not 0 < lifetime <= MAX_LIFETIME:
            raise UsageError(
                "a token cannot live that long",
                id="ear.lifetime",
                found=f"{lifetime} seconds",
                expected=f"1 to {MAX_LIFETIME}",
            )
        if not policy_ids:
            raise UsageError("a token names the policy that it is by", id="ear.policy", expected="a policy's id")
        runtime_data = dict((context.runtime_data if context else None) or {})
        if tee_pubkey is not None and runtime_data.setdefault("tee-pubkey", dict(tee_pubkey)) != dict(tee_pubkey):
            raise UsageError(
                "the token would be for another key than the evidence vouches for",
                id="ear.tee_pubkey",
                remedy="challenge the enclave again",
            )
        known = Context(runtime_data or None, context.init_data if context else None)
        trust = appraisal.trust
        submodule: dict[str, Any] = {
            "ear.status": trust.tier.text,
            "ear.trustworthiness-vector": trust.to_dict(),
            "ear.appraisal-policy-id": policy_ids[0],
            EVIDENCE: annotated_evidence(appraisal.claims, known, verbose=verbose),
            "ear.veraison.policy-claims": {
                "accepted": appraisal.accepted,
                "failures": [failure.id for failure in appraisal.failures],
                "references": list(appraisal.references),
                "policy-ids": list(policy_ids),
            },
        }
        submodule |= {extension["name"]: extension["value"] for extension in appraisal.extensions}
        claims = {
            "eat_profile": PROFILE,
            "iss": self._issuer,
            "iat": moment,
            "nbf": moment,
            "exp": moment + lifetime,
            "jti": secrets.token_urlsafe(16),
            "ear.verifier-id": self._verifier_id,
            "submods": {SUBMODULE: submodule},
        }
        return self._signed(_segment(claims))

    def _signed(self, payload: str) -> str:
        message = f"{self._header}.{payload}"
        r, s = decode_dss_signature(self._keys[0].private.sign(message.encode(), ec.ECDSA(SHA256())))
        return f"{message}.{_base64url(r.to_bytes(_COORDINATE, 'big') + s.to_bytes(_COORDINATE, 'big'))}"


class EarVerifier:
    """Verifies tokens, with the keys and anchors of one issuer or of several.

    Args:
        jwks: trusted keys (RFC 7517); those that are not for ES256 are left aside.
        anchors: certificates, DER, to which an ``x5c`` chain in a header may lead.
        issuers: accepted ``iss``; by default any, for the keys say who it is.
        profile: accepted ``eat_profile``.
        skew: seconds that clocks may differ.
    """

    def __init__(
        self,
        jwks: Mapping[str, Any] | None = None,
        *,
        anchors: Iterable[bytes] = (),
        issuers: Iterable[str] = (),
        profile: str = PROFILE,
        skew: int = SKEW,
    ) -> None:
        self._keys: dict[str, ec.EllipticCurvePublicKey] = {}
        for jwk in (jwks or {}).get("keys", ()):
            if jwk.get("kty") == "EC" and jwk.get("crv") == "P-256" and jwk.get("alg", "ES256") == "ES256":
                self._keys[str(jwk.get("kid") or thumbprint(jwk))] = _public_key(jwk)
        self._anchors = tuple(_certificate(anchor) for anchor in anchors)
        self._issuers = frozenset(issuers)
        self._profile, self._skew = profile, skew

    def verify(self, token: str, *, now: int | None = None) -> dict[str, Any]:
        """The claims of a good token.

        Args:
            now: seconds since 1970; by default the present.

        Raises:
            EvidenceError: ``ear.token.malformed``, ``.algorithm``, ``.key``, ``.signature``, ``.expired``,
                ``.not_yet_valid``, ``.lifetime``, ``.profile``, ``.issuer`` or ``.status``.
        """
        moment = int(time.time()) if now is None else now
        if len(token) > MAX_TOKEN:
            _malformed(f"{len(token)} bytes", f"at most {MAX_TOKEN}")
        parts = token.split(".")
        if len(parts) != 3 or not token.isascii():
            _malformed("not three parts", "a compact JWS")
        header = _object(parts[0])
        if header.get("alg") != "ES256":
            _refuse("algorithm", "the token's algorithm is not accepted", header.get("alg"), "ES256")
        if "crit" in header or header.get("typ", "JWT") != "JWT":
            _malformed(f"typ {header.get('typ')}, crit {header.get('crit')}", "typ JWT, no critical extensions")
        key = self._key(header, moment)
        signature = _decoded(parts[2])
        if len(signature) != 2 * _COORDINATE or not _holds(key, signature, f"{parts[0]}.{parts[1]}".encode()):
            _refuse("signature", "the token's signature does not verify", None, None, "attest again for a new token")
        claims = _object(parts[1])
        self._check_times(claims, moment)
        if claims.get("eat_profile") != self._profile:
            _refuse("profile", "the token is of another profile", claims.get("eat_profile"), self._profile)
        if self._issuers and claims.get("iss") not in self._issuers:
            _refuse("issuer", "the token is of another issuer", claims.get("iss"), " or ".join(sorted(self._issuers)))
        _check_submodules(claims)
        return claims

    def _key(self, header: dict[str, Any], now: int) -> ec.EllipticCurvePublicKey:
        embedded = header.get("jwk")
        kid = header.get("kid")
        if embedded is not None:
            if not isinstance(embedded, dict):
                _malformed("jwk", "an object")
            given = _public_key(embedded)
            for key in self._keys.values():
                if key == given:
                    return key
            if self._anchors and _chains(embedded.get("x5c"), given, self._anchors, now):
                return given
        elif isinstance(kid, str) and kid in self._keys:
            return self._keys[kid]
        raise EvidenceError(
            "the token is signed by a key that is not trusted",
            id="ear.token.key",
            found=kid or (None if embedded is None else thumbprint(embedded)),
            expected=" or ".join(self._keys) or "a certificate that chains to a trusted one",
            remedy="attest again; if the issuer changed its key, fetch its key set",
        )

    def _check_times(self, claims: dict[str, Any], now: int) -> None:
        times = {}
        for name, needed in (("iat", True), ("exp", True), ("nbf", False)):
            value = claims.get(name)
            if value is None and not needed:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                _malformed(f"{name} {value!r}", "seconds since 1970")
            times[name] = value
        if times["exp"] + self._skew <= now:
            _refuse("expired", "the token has expired", f"at {times['exp']}", f"after {now}", "attest again")
        start = max(times["iat"], times.get("nbf", times["iat"]))
        if start - self._skew > now:
            _refuse("not_yet_valid", "the token is of the future", f"from {start}", f"by {now}", "compare the clocks")
        if not 0 < times["exp"] - times["iat"] <= MAX_LIFETIME:
            _refuse("lifetime", "the token lives too long", f"{times['exp'] - times['iat']} seconds", MAX_LIFETIME)


def tee_public_key(claims: Mapping[str, Any]) -> dict[str, Any] | None:
    """The TEE's public key in a verified token's claims, as a JWK; ``None`` if it has none."""
    value: Any = claims
    for name in ("submods", SUBMODULE, EVIDENCE, "runtime_data_claims", "tee-pubkey"):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value if isinstance(value, dict) else None


def _check_submodules(claims: dict[str, Any]) -> None:
    submodules = claims.get("submods")
    if not isinstance(submodules, dict) or not submodules:
        _malformed("no submods", "at least one")
    for name, submodule in submodules.items():
        if not isinstance(submodule, dict) or submodule.get("ear.status") not in _STATUSES:
            _malformed(f"submods.{name}", f"ear.status: {', '.join(_STATUSES)}")
        vector = submodule.get("ear.trustworthiness-vector", {})
        try:
            if not isinstance(vector, dict):
                raise ValueError("not an object")
            worst = TrustVector.from_dict(vector).tier
        except ValueError as error:
            _malformed(f"submods.{name}: trustworthiness vector: {error}", "AR4SI claims")
        if _STATUSES[submodule["ear.status"]] < worst:
            _refuse(
                "status",
                "the token's status is better than its trustworthiness vector",
                submodule["ear.status"],
                worst.text,
            )


def _chains(x5c: Any, key: ec.EllipticCurvePublicKey, anchors: tuple[x509.Certificate, ...], now: int) -> bool:
    """Whether the first certificate is the key's, and each is signed by the next, up to an anchor, all in date."""
    if not isinstance(x5c, list) or not 1 <= len(x5c) <= MAX_CHAIN:
        return False
    try:
        chain = [_certificate(base64.b64decode(one, validate=True)) for one in x5c]
    except (binascii.Error, ValueError, TypeError, UsageError):
        return False
    moment = datetime.fromtimestamp(now, UTC)
    if chain[0].public_key() != key:
        return False
    for position, certificate in enumerate(chain):
        if not certificate.not_valid_before_utc <= moment <= certificate.not_valid_after_utc:
            return False
        if certificate in anchors:
            return True
        for issuer in (*chain[position + 1 : position + 2], *anchors):
            if _issued(certificate, issuer) and issuer in anchors:
                return issuer.not_valid_before_utc <= moment <= issuer.not_valid_after_utc
        if position + 1 == len(chain) or not _issued(certificate, chain[position + 1]):
            return False
    return False


def _issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        constraints = issuer.extensions.get_extension_for_class(x509.BasicConstraints).value
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
        return False
    return constraints.ca


def _certificate(data: bytes) -> x509.Certificate:
    try:
        certificate = x509.load_der_x509_certificate(data)
        _ = certificate.extensions, certificate.public_key()
    except Exception as error:  # The library has a dozen unrelated exceptions for what is wrong with a certificate.
        raise UsageError("a certificate cannot be parsed", id="ear.certificate", found=str(error)[:200]) from None
    return certificate


def _public_jwk(key: ec.EllipticCurvePublicKey) -> dict[str, Any]:
    numbers = key.public_numbers()
    x, y = (_base64url(number.to_bytes(_COORDINATE, "big")) for number in (numbers.x, numbers.y))
    return {"kty": "EC", "crv": "P-256", "x": x, "y": y}


def _public_key(jwk: Mapping[str, Any]) -> ec.EllipticCurvePublicKey:
    """Refuses with ``ear.token.malformed``, for it is mostly a token's."""
    if jwk.get("kty") != "EC" or jwk.get("crv") != "P-256":
        _refuse("algorithm", "the token's key is of another kind", f"{jwk.get('kty')} {jwk.get('crv')}", "EC P-256")
    x, y = (_decoded(jwk.get(name)) for name in ("x", "y"))
    if len(x) != _COORDINATE or len(y) != _COORDINATE:
        _malformed("a key's coordinates", f"{_COORDINATE} bytes")
    try:
        return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), b"\x04" + x + y)
    except ValueError:
        _malformed("a key that is no point of P-256", "a public key")


def _holds(key: ec.EllipticCurvePublicKey, signature: bytes, message: bytes) -> bool:
    r, s = (int.from_bytes(half, "big") for half in (signature[:_COORDINATE], signature[_COORDINATE:]))
    try:
        key.verify(encode_dss_signature(r, s), message, ec.ECDSA(SHA256()))
    except InvalidSignature:
        return False
    return True


def _segment(value: Mapping[str, Any]) -> str:
    return _base64url(json.dumps(value, separators=(",", ":"), allow_nan=False).encode())


def _object(segment: str) -> dict[str, Any]:
    try:
        found = json.loads(_decoded(segment), object_pairs_hook=_unique, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        _malformed(str(error)[:200], "JSON")
    if not isinstance(found, dict):
        _malformed(type(found).__name__, "an object")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name twice in one object")
    return found


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _decoded(segment: Any) -> bytes:
    """Base64url without padding, in its only form (RFC 7515, appendix C)."""
    try:
        data = base64.b64decode(segment + "=" * (-len(segment) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError, TypeError):
        _malformed("not base64url", "base64url without padding")
    if _base64url(data) != segment:
        _malformed("not base64url in its only form", "base64url without padding")
    return data


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _malformed(found: object, expected: object) -> NoReturn:
    _refuse("malformed", "the attestation token is malformed", found, expected, "attest again for a new token")


def _refuse(event: str, what: str, found: object, expected: object, remedy: str | None = None) -> NoReturn:
    raise EvidenceError(what, id=f"ear.token.{event}", found=found, expected=expected, remedy=remedy)


def _key_error(found: str) -> UsageError:
    return UsageError(
        "this key cannot sign attestation tokens",
        id="ear.key",
        found=found[:200],
        expected="an ECDSA P-256 key, PEM, and its certificate first in the chain",
    )
