"""RA-TLS certificates: made inside an enclave, and what is read from a peer's besides its evidence.

The format is Interoperable RA-TLS (CCC Attestation SIG): the TCG DICE extension with CBOR tag 60000 [quote, claims],
where the claims name the digest of the certificate's public key and, in an answer to a challenge, a nonce; the quote's
report data is the SHA-256 of the claims. Collateral travels in the endorsements extension, in Open Enclave's order.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ...errors import EvidenceError, UsageError
from ...sgx import der
from ..evidence import CBOR_TAG_INTEL_QUOTE, OID_DICE_EVIDENCE, OIDS_LEGACY, Evidence

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

    from ...tee.base import Enclave, Platform

OID_ENDORSEMENTS = "2.23.133.5.4.2"
#: Seconds that a certificate is valid; the key lives as long.
LIFETIME = 3600
#: Seconds that two machines' clocks may differ.
CLOCK_SKEW = 300
#: Bytes of a peer's certificate. Collateral has some 15 KB; a PCK CRL can have much more.
MAX_CERTIFICATE = 1 << 20

#: Seconds for which a platform's collateral is not asked for again.
_COLLATERAL_AGE = 60
_SHA256 = 1  # IANA Named Information hash algorithm
_ENDORSEMENTS_VERSION = 1
#: PCS bodies: the signature is over the exact bytes of the first member.
_SIGNED = re.compile(
    r'\s*\{\s*"(tcbInfo|enclaveIdentity)"\s*:\s*(\{.*\})\s*,\s*"signature"\s*:\s*"([0-9a-fA-F]+)"\s*\}\s*', re.S
)
_UTC_TIME, _GENERALIZED_TIME = 0x17, 0x18


class Attester(Protocol):
    """Who quotes for the enclave that this process runs in."""

    def quote(self, report_data: bytes) -> bytes:
        """A quote over 32 or 64 bytes of report data, zero-padded to 64. Called from several threads.

        Raises:
            InclavareError: the platform does not quote.
        """

    def collateral(self) -> dict[str, Any] | None:
        """Collateral for these quotes in dcap-qvl's layout, or ``None`` if verifiers have to have it from elsewhere."""


class PlatformAttester:
    """An enclave that this process has loaded itself."""

    def __init__(self, platform: Platform, enclave: Enclave) -> None:
        self._platform = platform
        self._enclave = enclave
        # A platform object is one thread's at a time; several of them share the platform by files.
        self._lock = threading.Lock()
        self._collateral: tuple[float, dict[str, Any]] | None = None

    def quote(self, report_data: bytes) -> bytes:
        """See :class:`Attester`."""
        with self._lock:
            report = self._enclave.report(self._platform.quote_target_info(), report_data.ljust(64, b"\0"))
            return self._platform.quote(report)

    def collateral(self) -> dict[str, Any] | None:
        """See :class:`Attester`."""
        with self._lock:
            if self._collateral is None or time.monotonic() - self._collateral[0] > _COLLATERAL_AGE:
                self._collateral = (time.monotonic(), self._platform.collateral())
            return self._collateral[1]


@dataclass(frozen=True, slots=True)
class Credential:
    """A key that lives in memory only, and the certificate that vouches for it."""

    key: EllipticCurvePrivateKey = field(repr=False)
    certificate: bytes
    renew_at: float


class Identity:
    """An enclave's RA-TLS key and certificate; both are replaced when half of the lifetime is over.

    Args:
        attester: who quotes.
        lifetime: seconds that a certificate is valid.
        legacy: certificates carry Gramine's extension, too, for peers older than Gramine 1.8; costs a second quote.
        endorsements: certificates carry the collateral, for peers that neither challenge nor have a source of it.
    """

    def __init__(
        self, attester: Attester, *, lifetime: int = LIFETIME, legacy: bool = False, endorsements: bool = False
    ) -> None:
        if lifetime < 1:
            raise UsageError("a certificate must be valid for a second", id="ratls.lifetime", found=lifetime)
        self._attester = attester
        self._lifetime = lifetime
        self._legacy = legacy
        self._endorsements = endorsements
        self._lock = threading.Lock()
        self._credential: Credential | None = None

    def current(self) -> Credential:
        """The key and certificate for new connections.

        Raises:
            InclavareError: the platform does not quote.
        """
        with self._lock:
            if self._credential is None or time.monotonic() >= self._credential.renew_at:
                from cryptography.hazmat.primitives.asymmetric import ec

                key = ec.generate_private_key(ec.SECP256R1())
                certificate = make(
                    self._attester,
                    key,
                    lifetime=self._lifetime,
                    legacy=self._legacy,
                    endorsements=self._endorsements,
                )
                self._credential = Credential(key, certificate, time.monotonic() + self._lifetime / 2)
            return self._credential

    def answer(self, credential: Credential, nonce: bytes) -> bytes:
        """A certificate (DER) for the same key whose evidence bears this nonce, with collateral.

        Raises:
            InclavareError: the platform does not quote.
        """
        return make(self._attester, credential.key, nonce=nonce, lifetime=self._lifetime, endorsements=True)


def make(
    attester: Attester,
    key: EllipticCurvePrivateKey,
    *,
    nonce: bytes | None = None,
    lifetime: int = LIFETIME,
    legacy: bool = False,
    endorsements: bool = False,
    now: float | None = None,
) -> bytes:
    """A self-signed RA-TLS certificate, DER.

    Args:
        nonce: a challenge that the evidence answers.
        lifetime: seconds.
        legacy: with Gramine's extension.
        endorsements: with collateral, if the attester has it.
        now: seconds since 1970.

    Raises:
        InclavareError: the platform does not quote.
    """
    import cbor2
    from cryptography import x509
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    public = key.public_key()
    spki = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    digest = hashlib.sha256(spki).digest()
    claims = {"pubkey-hash": cbor2.dumps([_SHA256, digest])}
    if nonce is not None:
        claims["nonce"] = nonce
    buffer = cbor2.dumps(claims)
    quote = attester.quote(hashlib.sha256(buffer).digest())
    values = {OID_DICE_EVIDENCE: cbor2.dumps(cbor2.CBORTag(CBOR_TAG_INTEL_QUOTE, [quote, buffer]))}
    if legacy:
        values[OIDS_LEGACY[1]] = attester.quote(digest)
    collateral = attester.collateral() if endorsements else None
    if collateral is not None:
        values[OID_ENDORSEMENTS] = endorsements_value(collateral)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "RA-TLS")])
    start = datetime.datetime.fromtimestamp(int(time.time() if now is None else now), datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - datetime.timedelta(seconds=CLOCK_SKEW))
        .not_valid_after(start + datetime.timedelta(seconds=lifetime))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
    )
    # Not critical, as Interoperable RA-TLS asks: OpenSSL and mbedTLS refuse critical extensions that they do not know.
    for oid, value in values.items():
        builder = builder.add_extension(x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value), critical=False)
    return builder.sign(key, SHA256()).public_bytes(Encoding.DER)


def read(certificate: bytes) -> Evidence:
    """A peer's evidence, with the collateral that its certificate carries.

    Raises:
        EvidenceError: see :meth:`Evidence.from_certificate`; ``evidence.collateral.malformed``.
    """
    if len(certificate) > MAX_CERTIFICATE:
        raise EvidenceError(
            "the certificate is too large",
            id="evidence.certificate.malformed",
            found=f"{len(certificate)} bytes",
            expected=f"at most {MAX_CERTIFICATE}",
        )
    evidence = Evidence.from_certificate(certificate)
    value = der.certificate_parts(certificate)[1].get(OID_ENDORSEMENTS)
    return evidence if value is None else evidence.with_collateral(collateral_of(value))


def endorsements_value(collateral: dict[str, Any]) -> bytes:
    """The endorsements extension's value for collateral in dcap-qvl's layout."""
    import cbor2

    def signed(member: str, text: str, signature: str) -> bytes:
        return f'{{"{member}":{text},"signature":"{signature}"}}'.encode()

    return cbor2.dumps(
        cbor2.CBORTag(
            CBOR_TAG_INTEL_QUOTE,
            [
                _ENDORSEMENTS_VERSION,
                signed("tcbInfo", collateral["tcb_info"], collateral["tcb_info_signature"]),
                collateral["tcb_info_issuer_chain"].encode(),
                bytes.fromhex(collateral["pck_crl"]),
                bytes.fromhex(collateral["root_ca_crl"]),
                collateral["pck_crl_issuer_chain"].encode(),
                signed("enclaveIdentity", collateral["qe_identity"], collateral["qe_identity_signature"]),
                collateral["qe_identity_issuer_chain"].encode(),
            ],
        )
    )


def collateral_of(value: bytes) -> dict[str, str]:
    """Collateral in dcap-qvl's layout from an endorsements extension's value; nothing in it is trusted.

    Raises:
        EvidenceError: ``evidence.collateral.malformed``.
    """
    import cbor2

    try:
        tagged = cbor2.loads(value)
        if not isinstance(tagged, cbor2.CBORTag) or tagged.tag != CBOR_TAG_INTEL_QUOTE:
            raise ValueError("not CBOR tag 60000")
        # A ninth entry, when they were made, is optional.
        version, *parts = tagged.value[:8]
        if version != _ENDORSEMENTS_VERSION or len(parts) != 7 or not all(isinstance(part, bytes) for part in parts):
            raise ValueError("not seven byte strings of version 1")
        tcb_info, tcb_chain, pck_crl, root_crl, crl_chain, identity, identity_chain = (
            part.rstrip(b"\0") if index not in (2, 3) else part for index, part in enumerate(parts)
        )
        tcb_info_text, tcb_info_signature = _signed("tcbInfo", tcb_info)
        identity_text, identity_signature = _signed("enclaveIdentity", identity)
        return {
            "pck_crl_issuer_chain": crl_chain.decode(),
            "root_ca_crl": root_crl.hex(),
            "pck_crl": pck_crl.hex(),
            "tcb_info_issuer_chain": tcb_chain.decode(),
            "tcb_info": tcb_info_text,
            "tcb_info_signature": tcb_info_signature,
            "qe_identity_issuer_chain": identity_chain.decode(),
            "qe_identity": identity_text,
            "qe_identity_signature": identity_signature,
        }
    except (cbor2.CBORDecodeError, ValueError, TypeError, RecursionError) as error:
        raise EvidenceError(
            "the certificate's endorsements cannot be parsed",
            id="evidence.collateral.malformed",
            found=f"{type(error).__name__}: {error}",
            expected="CBOR tag 60000 [1, TCB info, chain, PCK CRL, root CRL, chain, QE identity, chain]",
        ) from None


def _signed(member: str, body: bytes) -> tuple[str, str]:
    text = body.decode()
    found = _SIGNED.fullmatch(text)
    if found is None or found[1] != member:
        raise ValueError(f"not a signed {member}")
    json.loads(text)
    return found[2], found[3]


def public_key(certificate: bytes) -> bytes:
    """A certificate's SubjectPublicKeyInfo, DER.

    Raises:
        EvidenceError: ``evidence.certificate.malformed``.
    """
    try:
        return der.certificate_parts(certificate)[0]
    except ValueError as error:
        raise EvidenceError(
            "the certificate cannot be parsed", id="evidence.certificate.malformed", found=str(error)
        ) from None


def validity(certificate: bytes) -> tuple[float, float]:
    """When a certificate's key holder says that it is valid: both ends, seconds since 1970 (negative before).

    Raises:
        EvidenceError: ``evidence.certificate.malformed``.
    """
    try:
        body = [part for part in der.only(certificate, der.SEQUENCE).children()[0].children() if part.tag != 0xA0]
        start, end = (_moment(part) for part in body[3].children())
    except (ValueError, IndexError) as error:
        raise EvidenceError(
            "the certificate's dates cannot be parsed", id="evidence.certificate.malformed", found=str(error)
        ) from None
    return start, end


def _moment(element: der.Element) -> float:
    text = element.value.decode("ascii")
    if element.tag == _UTC_TIME:
        # RFC 5280, 4.1.2.5.1: years 50 to 99 are of the last century.
        text = ("19" if text[:2] >= "50" else "20") + text
    elif element.tag != _GENERALIZED_TIME:
        raise ValueError("not a time")
    found = datetime.datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=datetime.UTC)
    return (found - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)).total_seconds()
