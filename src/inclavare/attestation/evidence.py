"""Evidence: a quote or SEV-SNP report, what is needed to verify it, and what its report data is bound to.

The JSON envelope::

    {"version": 1, "tee": "sgx-sim", "quote": "<base64>",
     "collateral": {"pck_crl": "<hex>", "tcb_info": "{…}", …},
     "runtime-data": {"nonce": "<base64>", "tee-pubkey": {"kty": "EC", …}, "additional-evidence": ""}}

All but the first three may be absent, as may ``event-log`` (base64) and ``init-data`` (text). Nothing in it is trusted
before :func:`inclavare.attestation.verify`.
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
from ..sgx.quote import TEE_SGX, Quote
from . import eventlog
from .collateral import SNP_CERTIFICATES_KEY, Collateral, check_collateral
from .snp_report import SnpReport, is_report

VERSION = 1
#: Real collateral has some 15 KB, a chain some 4 KB.
MAX_ENVELOPE = 1 << 20

#: TCG DICE conceptual message wrapper (Interoperable RA-TLS), and Gramine's legacy extension: as intended and as it is
#: on the wire, where a stray tag and length precede the identifier.
OID_DICE_EVIDENCE = "2.23.133.5.4.9"
OIDS_LEGACY = ("1.2.840.113741.1337.6", "0.6.9.42.840.113741.1337.6")
CBOR_TAG_INTEL_QUOTE = 60000
CBOR_TAG_SNP_REPORT = 0x1A7504
_CBOR_TAGS = {CBOR_TAG_INTEL_QUOTE: "an Intel quote", CBOR_TAG_SNP_REPORT: "an SEV-SNP report"}
#: Certificates in an SNP evidence's chain that count, by the names that AMD's certificate table has for them.
_SNP_CERTIFICATES = frozenset({"ARK", "ASK", "VCEK", "VLEK"})
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
        quote: the raw quote or SEV-SNP report.
        collateral: see :mod:`inclavare.attestation.collateral`; ``None`` if the verifier has to have it from elsewhere.
        runtime_data: what the report data is the digest of (see :mod:`inclavare.attestation.channel`).
        certificate: set if the evidence came in a certificate.
        event_log: of a trust domain (see :mod:`inclavare.attestation.eventlog`).
        init_data: text that the host launched the TEE with (Confidential Containers' init-data).
        collateral_source: where the collateral came from.
    """

    tee: str
    quote: bytes
    collateral: dict[str, str] | None = None
    runtime_data: dict[str, Any] | None = None
    certificate: CertificateBinding | None = None
    event_log: bytes | None = None
    init_data: str | None = None
    collateral_source: str | None = "embedded"

    def with_collateral(self, collateral: dict[str, Any] | Collateral) -> Evidence:
        """The same evidence with collateral from elsewhere.

        Raises:
            EvidenceError: ``evidence.collateral.malformed``.
        """
        if isinstance(collateral, Collateral):
            return replace(self, collateral=collateral.parts, collateral_source=collateral.source)
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
        if self.event_log is not None:
            envelope["event-log"] = base64.b64encode(self.event_log).decode()
        if self.init_data is not None:
            envelope["init-data"] = self.init_data
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
        unknown = set(envelope) - {"version", "tee", "quote", "collateral", "runtime-data", "event-log", "init-data"}
        if unknown:
            _malformed("unknown key", ", ".join(sorted(unknown)))
        if envelope.get("version") != VERSION or isinstance(envelope.get("version"), bool):
            _malformed("unknown version", envelope.get("version"), VERSION)
        tee, quote = envelope.get("tee"), envelope.get("quote")
        if not isinstance(tee, str) or not isinstance(quote, str):
            _malformed("tee and quote must be strings", None)
        collateral, runtime_data = envelope.get("collateral"), envelope.get("runtime-data")
        if runtime_data is not None and not isinstance(runtime_data, dict):
            _malformed("runtime-data must be an object", type(runtime_data).__name__)
        return cls(
            tee=tee,
            quote=_base64("quote", quote),
            collateral=None if collateral is None else check_collateral(collateral),
            runtime_data=runtime_data,
            event_log=None if envelope.get("event-log") is None else _base64("event-log", envelope["event-log"]),
            init_data=_optional_text("init-data", envelope.get("init-data")),
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
        """A bare quote or SEV-SNP report; what it is and its certificate chain tell which verifier to ask.

        Raises:
            EvidenceError: the quote cannot be parsed, or ``evidence.collateral.malformed``.
        """
        tee, raw = _kind(quote)
        return cls(tee, raw, None if collateral is None else check_collateral(collateral))

    @classmethod
    def from_kbs(
        cls, tee: str, primary_evidence: Any, runtime_data: dict[str, Any] | None, init_data: str | None = None
    ) -> Evidence:
        """Evidence as Confidential Containers' attesters send it to a key broker service.

        Args:
            tee: ``sgx``, ``tdx`` or ``snp``; ``sgx-sim`` and ``tdx-sim`` say that the platform is simulated.
            primary_evidence: SGX ``{quote}``; TDX ``{quote, cc_eventlog}``; SNP ``{attestation_report, cert_chain}``,
                the report as JSON of its fields, or base64. ``collateral`` beside them is an addition of ours.
            runtime_data: what the report data is the digest of.
            init_data: text of the init-data, which the TEE's measured configuration must be the digest of.

        Raises:
            EvidenceError: ``evidence.envelope.malformed``, ``evidence.tee.unknown``, or the quote cannot be parsed.
        """
        family = tee.removesuffix("-sim")
        if family not in ("sgx", "tdx", "snp"):
            raise EvidenceError(
                "there is no verifier for this kind of evidence",
                id="evidence.tee.unknown",
                found=tee,
                expected="sgx, tdx or snp",
            )
        if not isinstance(primary_evidence, dict):
            _malformed("the evidence is not a JSON object", type(primary_evidence).__name__)
        collateral = primary_evidence.get("collateral")
        if family == "snp":
            made = cls._snp(primary_evidence)
        else:
            made = cls.from_quote(_base64("quote", primary_evidence.get("quote")))
        if made.tee != tee and (made.tee.removesuffix("-sim") != family or tee.endswith("-sim")):
            raise EvidenceError(
                "the evidence is of another TEE than it says", id="evidence.quote.tee", found=made.tee, expected=tee
            )
        log = primary_evidence.get("cc_eventlog") if family == "tdx" else None
        return replace(
            made,
            collateral=made.collateral if collateral is None else check_collateral(collateral),
            runtime_data=runtime_data,
            event_log=eventlog.trim(_base64("cc_eventlog", log)) if log else None,
            init_data=init_data,
        )

    @classmethod
    def _snp(cls, evidence: dict[str, Any]) -> Evidence:
        import ssl

        report = evidence.get("attestation_report")
        raw = (
            _base64("attestation_report", report) if isinstance(report, str) else SnpReport.from_json(report).to_bytes()
        )
        chain = evidence.get("cert_chain")
        try:
            found = [bytes(one["data"]) for one in chain or () if one["cert_type"] in _SNP_CERTIFICATES]
        except (KeyError, TypeError, ValueError) as error:
            _malformed("cert_chain is not understood", repr(error))
        pem = "".join(
            one.decode("ascii", "replace") if one.startswith(b"-----BEGIN") else ssl.DER_cert_to_PEM_cert(one)
            for one in found
        )
        return cls.from_quote(raw, {SNP_CERTIFICATES_KEY: pem} if pem else None)

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
            "the certificate carries no evidence",
            id="evidence.certificate.absent",
            found=", ".join(sorted(extensions)) or "no extensions",
            expected=f"an extension {OID_DICE_EVIDENCE} or {OIDS_LEGACY[0]}",
            remedy="ask the server for an RA-TLS certificate",
        )

    @classmethod
    def _from_legacy(cls, public_key: bytes, quote: bytes) -> Evidence:
        evidence = cls.from_quote(quote)
        _bind(
            evidence.tee,
            evidence.quote,
            hashlib.sha256(public_key).digest(),
            "the SHA-256 of the certificate's public key",
        )
        return replace(evidence, certificate=CertificateBinding(public_key, "legacy"))

    @classmethod
    def _from_dice(cls, public_key: bytes, value: bytes) -> Evidence:
        import cbor2

        try:
            tagged = cbor2.loads(value)
            if not isinstance(tagged, cbor2.CBORTag) or tagged.tag not in _CBOR_TAGS:
                raise ValueError("neither an Intel quote (CBOR tag 60000) nor an SEV-SNP report (0x1a7504)")
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
        if (tagged.tag == CBOR_TAG_SNP_REPORT) is not (evidence.tee == "snp"):
            raise EvidenceError(
                "the certificate's DICE evidence is not what its CBOR tag says",
                id="evidence.certificate.malformed",
                found=evidence.tee,
                expected=_CBOR_TAGS[tagged.tag],
            )
        _bind(
            evidence.tee, evidence.quote, hashlib.sha256(raw_claims).digest(), "the SHA-256 of the certificate's claims"
        )
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


def report_data(tee: str, raw: bytes) -> bytes:
    """The 64 bytes of report data of a quote or SEV-SNP report; not authentic before verification.

    Raises:
        EvidenceError: it cannot be parsed.
    """
    if tee == "snp":
        return SnpReport.from_bytes(raw).report_data
    quote = Quote.from_bytes(raw)
    return quote.report_body().report_data if quote.header.tee_type == TEE_SGX else quote.td_report().report_data


def _kind(raw: bytes) -> tuple[str, bytes]:
    """Which verifier to ask, and the evidence without padding. A lie leads to a verifier whose root does not fit."""
    if is_report(raw):
        return "snp", bytes(raw)
    quote, rest = Quote.split(raw)
    tee = "sgx" if quote.header.tee_type == TEE_SGX else "tdx"
    # A trust domain gets its quote in a buffer of fixed size (GHCI, TDG.VP.VMCALL<GetQuote>), filled up with zeros.
    if rest and (tee == "sgx" or any(rest)):
        Quote.from_bytes(raw)
    if quote.cert_type == CERT_PCK_CHAIN:
        body = quote.cert_data.partition(b"-----BEGIN CERTIFICATE-----")[2].partition(b"-----END")[0]
        try:
            if b"SIMULATED SGX" in base64.b64decode(b"".join(body.split()), validate=True):
                tee += "-sim"
        except binascii.Error:
            pass
    return tee, bytes(raw[: len(raw) - len(rest)])


def _bind(tee: str, raw: bytes, digest: bytes, what: str) -> None:
    found = report_data(tee, raw)
    if found != digest + bytes(64 - len(digest)):
        raise _unbound(found.hex(), f"{digest.hex()}, {what}, zero padded")


def _unbound(found: str, expected: str) -> EvidenceError:
    return EvidenceError(
        "the certificate's evidence does not vouch for its public key",
        id="evidence.key.binding",
        found=found,
        expected=expected,
        remedy="do not talk to this server: its evidence was made for another key",
    )


def _base64(name: str, value: object) -> bytes:
    try:
        return (
            base64.b64decode(value, validate=True)
            if isinstance(value, str)
            else _malformed(f"{name} is not text", None)
        )
    except (binascii.Error, ValueError):
        _malformed(f"the {name} is not base64", str(value)[:16])


def _optional_text(name: str, value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        _malformed(f"{name} is not text", type(value).__name__)
    return value


def _malformed(what: str, found: object, expected: object = None) -> NoReturn:
    raise EvidenceError(
        f"the evidence is malformed: {what}",
        id="evidence.envelope.malformed",
        found=found,
        expected=expected,
        remedy="pass the file that `inclavare attest` wrote, a quote, or an RA-TLS certificate",
    )
