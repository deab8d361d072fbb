"""DCAP quotes, versions 3, 4 and 5, of SGX enclaves and TDs, byte-exact both ways.

Sources: Intel "SGX ECDSA QuoteLibReference", appendix A, and "TDX DCAP Quoting Library API", appendix 3. Parsing is
strict: every length must fit and nothing may follow. It says nothing about authenticity.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar

from .certification import CERT_QE_REPORT, QeReportCertification, Reader, refused
from .structs import Layout, ReportBody, Structure, StructureError
from .tdx import TdReport10, TdReport15

HEADER_SIZE = 48
#: What the signature of an SGX quote of version 3 or 4 covers: header and report body.
SIGNED_SIZE = HEADER_SIZE + 384
#: Quotes grow with their certificate chain only; nothing real comes near this.
MAX_SIZE = 64 << 10

VERSION_3 = 3
VERSION_4 = 4
VERSION_5 = 5
ATTESTATION_KEY_ECDSA_P256 = 2
ATTESTATION_KEY_TYPES = {
    0: "EPID, unlinkable",
    1: "EPID, linkable",
    ATTESTATION_KEY_ECDSA_P256: "ECDSA-256-with-P-256",
    3: "ECDSA-384-with-P-384",
}
TEE_SGX = 0
TEE_TDX = 0x81
TEE_TYPES = {TEE_SGX: "SGX", TEE_TDX: "TDX"}
#: Quote body types of version 5.
BODY_SGX = 1
BODY_TD10 = 2
BODY_TD15 = 3
#: TEE and class of each.
BODIES: dict[int, tuple[int, type[ReportBody] | type[TdReport10]]] = {
    BODY_SGX: (TEE_SGX, ReportBody),
    BODY_TD10: (TEE_TDX, TdReport10),
    BODY_TD15: (TEE_TDX, TdReport15),
}
#: The QE vendor id of Intel's quoting enclave format.
QE_VENDOR_INTEL = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")

_DESCRIPTOR = struct.Struct("<HI")


@dataclass(frozen=True, slots=True)
class QuoteHeader(Structure):
    """The 48-byte header. ``qe_svn`` and ``pce_svn`` are zero in quotes of version 4 and 5."""

    LAYOUT: ClassVar[Layout] = Layout(
        "quote",
        HEADER_SIZE,
        (
            ("version", 0, "H"),
            ("attestation_key_type", 2, "H"),
            ("tee_type", 4, "I"),
            ("qe_svn", 8, "H"),
            ("pce_svn", 10, "H"),
            ("qe_vendor_id", 12, "16s"),
            ("user_data", 28, "20s"),
        ),
    )

    version: int
    attestation_key_type: int
    tee_type: int
    qe_svn: int
    pce_svn: int
    qe_vendor_id: bytes
    user_data: bytes


@dataclass(frozen=True, slots=True)
class Quote:
    """A quote whose attestation key is an ECDSA P-256 key.

    Attributes:
        header: 48 bytes.
        body: report body of an enclave (384 bytes) or TD (584 or 648 bytes).
        signature: ECDSA P-256 over :meth:`signed_bytes`, r‖s big-endian, 64 bytes.
        attestation_key: its public key, x‖y big-endian, 64 bytes.
        qe_report: the quoting enclave's report body, 384 bytes.
        qe_report_signature: by the PCK, r‖s, 64 bytes.
        qe_auth_data: authentication data of the quoting enclave.
        cert_type: certification data type of the quoting enclave's report, never 6.
        cert_data: for type 5 the PCK certificate chain, PEM, leaf first; see :func:`inclavare.sgx.certification.parse`.
    """

    header: QuoteHeader
    body: bytes
    signature: bytes
    attestation_key: bytes
    qe_report: bytes
    qe_report_signature: bytes
    qe_auth_data: bytes
    cert_type: int
    cert_data: bytes

    @property
    def body_type(self) -> int:
        """``BODY_SGX``, ``BODY_TD10`` or ``BODY_TD15``.

        Raises:
            ValueError: a body of another size than the header's TEE has, or than the version can carry.
        """
        for kind, (tee, body) in BODIES.items():
            fits = (tee, body.LAYOUT.size) == (self.header.tee_type, len(self.body))
            if fits and kind in _body_types(self.header.version):
                return kind
        raise ValueError(f"no body of a version {self.header.version} quote has {len(self.body)} bytes")

    def signed_bytes(self) -> bytes:
        """What the attestation key signs: header and body, from version 5 on with the body's type and size between."""
        kind, descriptor = self.body_type, b""
        if self.header.version >= VERSION_5:
            descriptor = _DESCRIPTOR.pack(kind, len(self.body))
        return self.header.to_bytes() + descriptor + self.body

    def report_body(self) -> ReportBody:
        """The enclave's report body.

        Raises:
            EvidenceError: ``evidence.quote.tee``: a TD's quote; ``evidence.quote.body``: a reserved byte is not zero.
        """
        if self.header.tee_type != TEE_SGX:
            raise refused("tee", "the quote is a TD's, not an enclave's", "TDX", "SGX")
        return _body(self.body)

    def td_report(self) -> TdReport10:
        """The TD's report, a :class:`TdReport15` if the quote has one.

        Raises:
            EvidenceError: ``evidence.quote.tee``: an enclave's quote.
        """
        if self.header.tee_type != TEE_TDX:
            raise refused("tee", "the quote is an enclave's, not a TD's", "SGX", "TDX")
        return (TdReport15 if self.body_type == BODY_TD15 else TdReport10).from_bytes(self.body)

    def qe_report_body(self) -> ReportBody:
        """The quoting enclave's report body.

        Raises:
            EvidenceError: ``evidence.quote.body``: a reserved byte is not zero.
        """
        return _body(self.qe_report)

    def to_bytes(self) -> bytes:
        """The quote on the wire.

        Raises:
            ValueError: see :attr:`body_type`.
        """
        certification = QeReportCertification(
            self.qe_report, self.qe_report_signature, self.qe_auth_data, self.cert_type, self.cert_data
        ).to_bytes()
        if self.header.version >= VERSION_4:
            certification = _DESCRIPTOR.pack(CERT_QE_REPORT, len(certification)) + certification
        data = self.signature + self.attestation_key + certification
        return self.signed_bytes() + struct.pack("<I", len(data)) + data

    @classmethod
    def from_bytes(cls, data: bytes) -> Quote:
        """Parse a quote.

        Raises:
            EvidenceError: ``evidence.quote.truncated``, ``.trailing``, ``.size``, ``.version``, ``.key_type``,
                ``.header``, ``.tee``, ``.body_type`` or ``.certification``.
        """
        quote, rest = cls.split(data)
        if rest:
            raise refused("trailing", "bytes follow the quote", f"{len(rest)} bytes", "none")
        return quote

    @classmethod
    def split(cls, data: bytes) -> tuple[Quote, bytes]:
        """Parse a quote at the start of ``data``, and what follows: services hand out quotes in larger buffers.

        Raises:
            EvidenceError: see :meth:`from_bytes`.
        """
        if len(data) > MAX_SIZE:
            raise refused("size", "the quote is too large", f"{len(data)} bytes", f"at most {MAX_SIZE} bytes")
        reader = Reader(data)
        header = QuoteHeader.from_bytes(reader.take(HEADER_SIZE, "header"))
        body = reader.take(_body_size(header, reader), "report body")
        signed = Reader(reader.take(reader.number("I", "length of the signature data"), "signature data"))
        signature = signed.take(64, "signature")
        attestation_key = signed.take(64, "attestation key")
        if header.version >= VERSION_4:
            kind = signed.number("H", "certification data type")
            if kind != CERT_QE_REPORT:
                raise refused(
                    "certification",
                    f"a version {header.version} quote is certified by a QE report",
                    f"type {kind}",
                    f"type {CERT_QE_REPORT}",
                )
            size = signed.number("I", "length of the certification data")
            certification = signed.take(size, "certification data")
            signed.end("certification data")
        else:
            certification = signed.take(signed.left, "certification data")
        by = QeReportCertification.from_bytes(certification)
        quote = cls(
            header=header,
            body=body,
            signature=signature,
            attestation_key=attestation_key,
            qe_report=by.qe_report,
            qe_report_signature=by.qe_report_signature,
            qe_auth_data=by.qe_auth_data,
            cert_type=by.cert_type,
            cert_data=by.cert_data,
        )
        return quote, reader.take(reader.left, "rest")


def _body_types(version: int) -> tuple[int, ...]:
    """The bodies that a version carries."""
    return {VERSION_3: (BODY_SGX,), VERSION_4: (BODY_SGX, BODY_TD10)}.get(version, tuple(BODIES))


def _body_size(header: QuoteHeader, reader: Reader) -> int:
    """The body's size in bytes; checks the header, and takes a version 5 quote's body descriptor from ``reader``."""
    if header.version not in (VERSION_3, VERSION_4, VERSION_5):
        raise refused("version", "the quote's version is not supported", header.version, "3, 4 or 5")
    if header.attestation_key_type != ATTESTATION_KEY_ECDSA_P256:
        found = ATTESTATION_KEY_TYPES.get(header.attestation_key_type, "unknown")
        raise refused(
            "key_type",
            "the attestation key's type is not supported",
            f"{header.attestation_key_type} ({found})",
            f"{ATTESTATION_KEY_ECDSA_P256} ({ATTESTATION_KEY_TYPES[ATTESTATION_KEY_ECDSA_P256]})",
        )
    if header.version == VERSION_5:
        kind = reader.number("H", "body type")
        if kind not in BODIES:
            raise refused("body_type", "the quote's body type is not supported", kind, f"one of {sorted(BODIES)}")
        size = reader.number("I", "body size")
    else:
        kind = BODY_TD10 if header.tee_type == TEE_TDX else BODY_SGX
        size = BODIES[kind][1].LAYOUT.size
    tee, body = BODIES[kind]
    if header.tee_type != tee or kind not in _body_types(header.version):
        raise refused(
            "tee",
            f"a version {header.version} quote with a body of {body.LAYOUT.size} bytes is not of this TEE",
            f"TEE type {header.tee_type:#x}",
            f"{tee:#x}",
        )
    if size != body.LAYOUT.size:
        raise refused("body_type", f"a body of type {kind} has a fixed size", f"{size} bytes", f"{body.LAYOUT.size}")
    return size


def _body(data: bytes) -> ReportBody:
    try:
        return ReportBody.from_bytes(data)
    except StructureError as error:
        raise refused("body", error.message, error.found, error.expected) from None
