"""X.509 as the verifiers use it: certificates and CRLs that are checked once, and when they are valid."""

from __future__ import annotations

import base64
import datetime
import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.hashes import SHA256, HashAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from ...errors import EvidenceError

#: How many certificates and signatures of certificates are remembered: authorities return with every platform.
_CERTIFICATES = 512
_PEM_BLOCK = re.compile(rb"-----BEGIN CERTIFICATE-----\n([A-Za-z0-9+/=\n]+?)\n-----END CERTIFICATE-----\n?")


def refused(event: str, what: str, found: object, expected: object = None, remedy: str | None = None) -> EvidenceError:
    """The error ``evidence.<event>``."""
    return EvidenceError(what, id=f"evidence.{event}", found=found, expected=expected, remedy=remedy)


@dataclass(frozen=True, slots=True)
class Period:
    """When one thing is valid; seconds since 1970, both ends included.

    Attributes:
        kind: what the error's id says: ``certificate`` or ``collateral``.
        what: its name.
        start: first second.
        end: last second.
    """

    kind: Literal["certificate", "collateral"]
    what: str
    start: int
    end: int

    @classmethod
    def of(cls, certificate: x509.Certificate) -> Period:
        """A certificate's."""
        start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        return cls("certificate", common_name(certificate), int(start.timestamp()), int(end.timestamp()))


class Validity:
    """When all of several things are valid: certificates are asked first, so that their fault is named first."""

    def __init__(self, periods: Iterable[Period]) -> None:
        self._periods = sorted(periods, key=lambda period: period.kind)
        self._start = max(period.start for period in self._periods)
        self._end = min(period.end for period in self._periods)
        dated = [period for period in self._periods if period.kind == "collateral"] or self._periods
        #: When the oldest piece of collateral was issued, and the first one expires.
        self.issued = min(period.start for period in dated)
        self.expires = min(period.end for period in dated)

    @property
    def periods(self) -> tuple[Period, ...]:
        """All of them."""
        return tuple(self._periods)

    def check(self, now: int) -> None:
        """Refuses with ``evidence.<kind>.expired`` or ``.not_yet_valid``."""
        if self._start <= now <= self._end:
            return
        for period in self._periods:
            if now < period.start:
                raise refused(
                    f"{period.kind}.not_yet_valid",
                    f"{period.what} is not valid yet",
                    iso(now),
                    f"{iso(period.start)} or later",
                    "check this machine's clock",
                )
            if now > period.end:
                raise refused(
                    f"{period.kind}.expired",
                    f"{period.what} has expired",
                    iso(now),
                    f"{iso(period.end)} or earlier",
                    "fetch fresh collateral" if period.kind == "collateral" else "the platform needs new certificates",
                )


def iso(moment: int) -> str:
    """Seconds since 1970 as ISO 8601."""
    return datetime.datetime.fromtimestamp(moment, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@functools.lru_cache(maxsize=_CERTIFICATES)
def load(data: bytes) -> x509.Certificate:
    """A certificate from DER. Refuses with ``evidence.certificate.malformed``."""
    try:
        certificate = x509.load_der_x509_certificate(data)
        # The library parses these when they are first asked for; afterwards they cannot fail.
        _ = certificate.subject, certificate.issuer, certificate.extensions, certificate.public_key()
        _ = certificate.not_valid_before_utc, certificate.not_valid_after_utc, certificate.signature_hash_algorithm
    except Exception as error:  # The library has a dozen unrelated exceptions for what is wrong with a certificate.
        raise refused("certificate.malformed", "a certificate cannot be parsed", str(error)) from None
    return certificate


def pem_chain(pem: bytes, what: str) -> tuple[x509.Certificate, ...]:
    """The certificates of a PEM text that has nothing else in it, not even other spelling.

    Refuses with ``evidence.certificate.malformed``.
    """
    found: list[x509.Certificate] = []
    rebuilt = b""
    for match in _PEM_BLOCK.finditer(pem):
        try:
            data = base64.b64decode(match[1].replace(b"\n", b""), validate=True)
        except ValueError:
            raise refused("certificate.malformed", f"{what} is not base64", None) from None
        found.append(load(data))
        rebuilt += found[-1].public_bytes(Encoding.PEM)
    # Canonical text leaves no bit in which two accepted chains could differ.
    if rebuilt.rstrip(b"\n") != pem.rstrip(b"\n"):
        raise refused("certificate.malformed", f"{what} is not plain PEM", f"{len(pem)} bytes")
    return tuple(found)


def chain(pem: bytes, anchor: x509.Certificate, what: str, *, length: int = 2) -> tuple[x509.Certificate, ...]:
    """The certificates of a PEM chain below the root, which must be the anchor itself; any order after the leaf.

    Refuses with ``evidence.certificate.malformed`` or ``evidence.root.untrusted``.
    """
    found = pem_chain(pem, what)
    roots = [certificate for certificate in found if certificate.subject == certificate.issuer]
    others = [certificate for certificate in found if certificate.subject != certificate.issuer]
    if len(roots) != 1 or len(others) != length:
        raise refused(
            "certificate.malformed",
            f"{what} has the wrong length",
            f"{len(others)} and {len(roots)} self-signed",
            f"{length} and the root",
        )
    if roots[0] != anchor:
        raise refused(
            "root.untrusted",
            f"{what} ends in a root that is not trusted",
            f"{common_name(roots[0])}, SHA-256 {fingerprint(roots[0])}",
            f"{common_name(anchor)}, SHA-256 {fingerprint(anchor)}",
            'evidence of a simulated platform needs simulated = "allow" and its root as trust_anchor',
        )
    return tuple(others)


@functools.lru_cache(maxsize=_CERTIFICATES)
def check_issued(certificate: x509.Certificate, issuer: x509.Certificate) -> None:
    """Refuses with ``evidence.certificate.signature``."""
    try:
        certificate.verify_directly_issued_by(issuer)
    except Exception as error:  # As with parsing: whatever the library objects to, the certificate is not accepted.
        raise refused(
            "certificate.signature",
            f"the certificate {common_name(certificate)} is not signed by {common_name(issuer)}",
            str(error) or "the signature does not verify",
        ) from None


def check_purpose(certificate: x509.Certificate, names: tuple[str, ...], *, is_ca: bool) -> None:
    """BasicConstraints, KeyUsage, and how the common name ends. Refuses with ``evidence.certificate.purpose``."""
    name = common_name(certificate)
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
        fits = constraints.ca is is_ca and (usage.key_cert_sign if is_ca else usage.digital_signature)
    except x509.ExtensionNotFound:
        fits = False
    if not fits or not name.endswith(names):
        raise refused(
            "certificate.purpose",
            "a certificate is used for something else than it was issued for",
            name,
            " or ".join(names),
        )


def revocation_list(data: bytes, name: str, issuer: x509.Certificate) -> tuple[x509.CertificateRevocationList, Period]:
    """A CRL of this issuer, and when it is valid.

    Refuses with ``evidence.collateral.signature`` or ``.malformed``.
    """
    try:
        crl = x509.load_der_x509_crl(data)
        signed = crl.issuer == issuer.subject and crl.is_signature_valid(issuer.public_key())  # type: ignore[arg-type]
        # Forces the library to parse the list now.
        crl.get_revoked_certificate_by_serial_number(0)
        issued, until = crl.last_update_utc, crl.next_update_utc
    except Exception as error:  # As with certificates.
        raise refused("collateral.malformed", f"{name} cannot be parsed", str(error)) from None
    if not signed:
        raise refused("collateral.signature", f"{name} is not signed by {common_name(issuer)}", None)
    if until is None:
        raise refused("collateral.malformed", f"{name} never expires", None, "a date of the next update")
    return crl, Period("collateral", name, int(issued.timestamp()), int(until.timestamp()))


def check_not_revoked(crl: x509.CertificateRevocationList, certificate: x509.Certificate) -> None:
    """Refuses with ``evidence.certificate.revoked``."""
    if crl.get_revoked_certificate_by_serial_number(certificate.serial_number) is not None:
        raise refused(
            "certificate.revoked",
            f"the certificate {common_name(certificate)} is revoked",
            f"serial {certificate.serial_number:x}",
            None,
            "do not trust this platform",
        )


def crl_number(crl: x509.CertificateRevocationList) -> int | None:
    """The CRL number, if it has one."""
    try:
        return int(crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number)
    except x509.ExtensionNotFound:
        return None


def signature_valid(key: object, signature: bytes, message: bytes, hash_algorithm: HashAlgorithm | None = None) -> bool:
    """Whether r‖s (big-endian, each half the signature's length) is an ECDSA signature of this key."""
    if not isinstance(key, ec.EllipticCurvePublicKey) or len(signature) != 2 * ((key.curve.key_size + 7) // 8):
        return False
    half = len(signature) // 2
    encoded = utils.encode_dss_signature(
        int.from_bytes(signature[:half], "big"), int.from_bytes(signature[half:], "big")
    )
    try:
        key.verify(encoded, message, ec.ECDSA(hash_algorithm or SHA256()))
    except InvalidSignature:
        return False
    return True


def common_name(certificate: x509.Certificate) -> str:
    """The subject's."""
    return common_name_of(certificate.subject)


def common_name_of(name: x509.Name) -> str:
    """The common name in a subject or issuer."""
    names = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else "(no name)"


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256, hexadecimal."""
    return certificate.fingerprint(SHA256()).hex()
