"""Evidence: a quote, what is needed to verify it, and what its report data is bound to.

The JSON envelope::

    {"version": 1, "tee": "sgx-sim", "quote": "<base64>",
     "collateral": {"pck_crl": "<hex>", "tcb_info": "{…}", …},
     "runtime-data": {"nonce": "<base64>", "tee-pubkey": {"kty": "EC", …}, "additional-evidence": ""}}

``collateral`` and ``runtime-data`` may be absent. Nothing in it is trusted before :func:`inclavare.attestation.verify`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from ..errors import EvidenceError
from ..sgx import der
from ..sgx.certification import CERT_PCK_CHAIN
from ..sgx.quote import TEE_SGX, TEE_TYPES, VERSION_3, Quote

VERSION = 1
#: Real collateral has some 15 KB, a chain some 4 KB.
MAX_ENVELOPE = 1 << 20

COLLATERAL_KEYS = (
    "pck_crl_issuer_chain",
    "root_ca_crl",
    "pck_crl",
    "tcb_info_issuer_chain",
    "tcb_info",
    "tcb_info_signature",
    "qe_identity_issuer_chain",
    "qe_identity",
    "qe_identity_signature",
)
#: Those of them that are hexadecimal.
COLLATERAL_HEX_KEYS = ("root_ca_crl", "pck_crl", "tcb_info_signature", "qe_identity_signature")

#: TCG DICE conceptual message wrapper (Interoperable RA-TLS), and Gramine's legacy extension: as intended and as it is
#: on the wire, where a stray tag and length precede the identifier.
OID_DICE_EVIDENCE = "2.23.133.5.4.9"
OIDS_LEGACY = ("1.2.840.113741.1337.6", "0.6.9.42.840.113741.1337.6")
CBOR_TAG_INTEL_QUOTE = 60000
#: IANA Named Information hash algorithms that may stand in ``pubkey-hash``.
_HASHES = {1: "sha256", 7: "sha384", 8: "sha512"}


@dataclass(frozen=True, slots=True)
class CertificateBinding:
    """What an RA-TLS certificate's evidence vouches for; checked against the quote's report data when it was read.

    Attributes:
        public_key: SubjectPublicKeyInfo, DER.
        extension: ``dice`` or ``legacy``.
        nonce: the nonce in the certificate's claims, if there is one.
    """

    public_key: bytes
    extension: str
    nonce: bytes | None = None


@dataclass(frozen=True, slots=True)
class Evidence:
    """Evidence as it arrived.

    Attributes:
        tee: which verifier it asks for; the verifier decides whether it really is of that kind.
        quote: the raw quote.
        collateral: in dcap-qvl's JSON layout, or ``None`` if the verifier has to have it from elsewhere.
        runtime_data: what the report data is the digest of (see :mod:`inclavare.attestation.channel`).
        certificate: set if the evidence came in a certificate.
    """

    tee: str
    quote: bytes
    collateral: dict[str, str] | None = None
    runtime_data: dict[str, Any] | None = None
    certificate: CertificateBinding | None = None

    def with_collateral(self, collateral: dict[str, Any]) -> Evidence:
        """The same evidence with collateral from elsewhere.

        Raises:
            EvidenceError: ``evidence.collateral.malformed``.
        """
        return replace(self, collateral=check_collateral(collateral))

    def to_dict(self) -> dict[str, Any]:
        """The JSON envelope. A certificate's binding is not part of it: keep the certificate for that."""
        envelope: dict[str, Any] = {
            "version": VERSION,
            "tee": self.tee,
            "quote": base64.b64encode(self.quote).decode(),
        }
        if self.collateral is not None:
            envelope["collateral"] = self.collateral
        if self.runtime_data is not None:
            envelope["runtime-data"] = self.runtime_data
        return envelope

    def to_json(self) -> str:
        """The JSON envelope as text."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, envelope: Any) -> Evidence:
        """Read a JSON envelope.

        Raises:
            EvidenceError: ``evidence.envelope.malformed`` or ``evidence.collateral.malformed``.
        """
        if not isinstance(envelope, dict):
            _malformed("not a JSON object", type(envelope).__name__)
        unknown = set(envelope) - {"version", "tee", "quote", "collateral", "runtime-data"}
        if unknown:
            _malformed("unknown key", ", ".join(sorted(unknown)))
        if envelope.get("version") != VERSION or isinstance(envelope.get("version"), bool):
            _malformed("unknown version", envelope.get("version"), VERSION)
        tee, quote = envelope.get("tee"), envelope.get("quote")
        if not isinstance(tee, str) or not isinstance(quote, str):
            _malformed("tee and quote must be strings", None)
        try:
            raw = base64.b64decode(quote, validate=True)
        except (binascii.Error, ValueError):
            _malformed("the quote is not base64", quote[:16])
        collateral, runtime_data = envelope.get("collateral"), envelope.get("runtime-data")
        if runtime_data is not None and not isinstance(runtime_data, dict):
            _malformed("runtime-data must be an object", type(runtime_data).__name__)
        return cls(
            tee=tee,
            quote=raw,
            collateral=None if collateral is None else check_collateral(collateral),
            runtime_data=runtime_data,
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> Evidence:
        """Read a JSON envelope from text.

        Raises:
            EvidenceError: ``evidence.envelope.malformed`` or ``evidence.collateral.malformed``.
        """
        if len(text) > MAX_ENVELOPE:
            _malformed("too large", f"{len(text)} bytes", f"at most {MAX_ENVELOPE}")
        try:
            envelope = json.loads(text)
        except (ValueError, RecursionError) as error:
            _malformed("not JSON", str(error))
        return cls.from_dict(envelope)

    @classmethod
    def from_quote(cls, quote: bytes, collateral: dict[str, Any] | None = None) -> Evidence:
        """A bare quote; its certificate chain tells which verifier to ask.

        Raises:
            EvidenceError: the quote cannot be parsed, or ``evidence.collateral.malformed``.
        """
        return cls(
            tee=_kind(sgx_quote(quote)),
            quote=bytes(quote),
            collateral=None if collateral is None else check_collateral(collateral),
        )

    @classmethod
    def from_certificate(cls, data: bytes) -> Evidence:
        """Evidence in an RA-TLS certificate (DER): the DICE extension if it is there, else Gramine's legacy one.

        The quote's report data must vouch for the certificate's public key. The certificate's own signature, names and
        dates mean nothing here: TLS proves possession of the key, and the quote vouches for the key.

        Raises:
            EvidenceError: ``evidence.certificate.malformed``, ``.absent``, or ``evidence.key.binding``.
        """
        try:
            public_key, extensions = der.certificate_parts(bytes(data))
        except ValueError as error:
            raise EvidenceError(
                "the certificate cannot be parsed", id="evidence.certificate.malformed", found=str(error)
            ) from None
        if OID_DICE_EVIDENCE in extensions:
            return cls._from_dice(public_key, extensions[OID_DICE_EVIDENCE])
        for oid in OIDS_LEGACY:
            if oid in extensions:
                return cls._from_legacy(public_key, extensions[oid])
        raise EvidenceError(
            "the certificate carries no SGX evidence",
            id="evidence.certificate.absent",
            found=", ".join(sorted(extensions)) or "no extensions",
            expected=f"an extension {OID_DICE_EVIDENCE} or {OIDS_LEGACY[0]}",
            remedy="ask the server for an RA-TLS certificate",
        )

    @classmethod
    def _from_legacy(cls, public_key: bytes, quote: bytes) -> Evidence:
        evidence = cls.from_quote(quote)
        _bind(quote, hashlib.sha256(public_key).digest(), "the SHA-256 of the certificate's public key")
        return replace(evidence, certificate=CertificateBinding(public_key, "legacy"))

    @classmethod
    def _from_dice(cls, public_key: bytes, value: bytes) -> Evidence:
        import cbor2

        try:
            tagged = cbor2.loads(value)
            if not isinstance(tagged, cbor2.CBORTag) or tagged.tag != CBOR_TAG_INTEL_QUOTE:
                raise ValueError("not an Intel quote (CBOR tag 60000)")
            quote, raw_claims = tagged.value
            claims = cbor2.loads(raw_claims)
            algorithm, digest = cbor2.loads(claims["pubkey-hash"])
            nonce = claims.get("nonce")
            if not isinstance(quote, bytes) or not isinstance(raw_claims, bytes) or not isinstance(digest, bytes):
                raise ValueError("not byte strings")
            if nonce is not None and not isinstance(nonce, bytes):
                raise ValueError("the nonce is not a byte string")
            expected = hashlib.new(_HASHES[algorithm], public_key).digest()
        except (cbor2.CBORDecodeError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise EvidenceError(
                "the certificate's DICE evidence cannot be parsed",
                id="evidence.certificate.malformed",
                found=f"{type(error).__name__}: {error}",
                expected="CBOR tag 60000 [quote, claims with pubkey-hash]",
            ) from None
        evidence = cls.from_quote(quote)
        _bind(quote, hashlib.sha256(raw_claims).digest(), "the SHA-256 of the certificate's claims")
        if digest != expected:
            raise _unbound(digest.hex(), f"{expected.hex()}, the digest of the certificate's public key")
        return replace(evidence, certificate=CertificateBinding(public_key, "dice", nonce))

    @classmethod
    def load(cls, data: bytes) -> Evidence:
        """Whatever a file holds: a JSON envelope, a PEM or DER certificate, or a raw quote.

        Raises:
            EvidenceError: see :meth:`from_json`, :meth:`from_certificate` and :meth:`from_quote`.
        """
        start = data.lstrip()[:32]
        if start.startswith(b"{"):
            return cls.from_json(data)
        if start.startswith(b"-----BEGIN CERTIFICATE-----"):
            body = data.partition(b"-----BEGIN CERTIFICATE-----")[2].partition(b"-----END CERTIFICATE-----")[0]
            try:
                return cls.from_certificate(base64.b64decode(b"".join(body.split()), validate=True))
            except binascii.Error as error:
                raise EvidenceError(
                    "the certificate is not PEM", id="evidence.certificate.malformed", found=str(error)
                ) from None
        if data[:1] == bytes([der.SEQUENCE]):
            return cls.from_certificate(data)
        return cls.from_quote(data)


def check_collateral(value: Any) -> dict[str, str]:
    """Collateral with exactly the nine keys of dcap-qvl's layout, all strings.

    Raises:
        EvidenceError: ``evidence.collateral.malformed``.
    """
    problem = None
    if not isinstance(value, dict):
        problem = f"a {type(value).__name__}"
    elif set(value) != set(COLLATERAL_KEYS):
        problem = "keys: " + (", ".join(sorted(map(str, set(value) ^ set(COLLATERAL_KEYS)))))
    elif not all(isinstance(item, str) for item in value.values()):
        problem = "a value that is not a string"
    else:
        try:
            for key in COLLATERAL_HEX_KEYS:
                bytes.fromhex(value[key])
        except ValueError:
            problem = f"{key} is not hexadecimal"
    if problem is not None:
        raise EvidenceError(
            "the collateral is malformed",
            id="evidence.collateral.malformed",
            found=problem,
            expected="exactly " + ", ".join(COLLATERAL_KEYS),
            remedy="fetch it again from a PCCS or from the platform",
        )
    return dict(value)


def sgx_quote(raw: bytes) -> Quote:
    """An SGX quote of version 3, the only kind that there is a verifier for.

    Raises:
        EvidenceError: ``evidence.quote.tee`` or ``.version`` for another kind; else see :meth:`Quote.from_bytes`.
    """
    quote = Quote.from_bytes(raw)
    header = quote.header
    for event, what, found, expected, remedy in (
        ("tee", "a quote of this TEE", TEE_TYPES[header.tee_type], TEE_TYPES[TEE_SGX], "use a verifier for that TEE"),
        ("version", "an SGX quote of this version", header.version, VERSION_3, "ask the platform for version 3"),
    ):
        if found != expected:
            raise EvidenceError(
                f"{what} can be read, but not verified",
                id=f"evidence.quote.{event}",
                found=found,
                expected=expected,
                remedy=remedy,
            )
    return quote


def _kind(quote: Quote) -> str:
    """Which verifier to ask. A lie here leads to a verifier whose root does not fit."""
    if quote.cert_type == CERT_PCK_CHAIN:
        body = quote.cert_data.partition(b"-----BEGIN CERTIFICATE-----")[2].partition(b"-----END")[0]
        try:
            if b"SIMULATED SGX" in base64.b64decode(b"".join(body.split()), validate=True):
                return "sgx-sim"
        except binascii.Error:
            pass
    return "sgx"


def _bind(quote: bytes, digest: bytes, what: str) -> None:
    report_data = sgx_quote(quote).report_body().report_data
    if report_data != digest + bytes(64 - len(digest)):
        raise _unbound(report_data.hex(), f"{digest.hex()}, {what}, zero padded")


def _unbound(found: str, expected: str) -> EvidenceError:
    return EvidenceError(
        "the certificate's evidence does not vouch for its public key",
        id="evidence.key.binding",
        found=found,
        expected=expected,
        remedy="do not talk to this server: its evidence was made for another key",
    )


def _malformed(what: str, found: object, expected: object = None) -> NoReturn:
    raise EvidenceError(
        f"the evidence is malformed: {what}",
        id="evidence.envelope.malformed",
        found=found,
        expected=expected,
        remedy="pass the file that `inclavare attest` wrote, a quote, or an RA-TLS certificate",
    )
