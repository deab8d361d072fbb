"""SGX ECDSA quotes, version 3 (Intel SGX ECDSA QuoteLibReference, appendix A), byte-exact both ways.

Parsing is strict: every length must fit and nothing may follow. It says nothing about authenticity.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar

from ..errors import EvidenceError
from .structs import Layout, ReportBody, Structure, StructureError

#: Bytes before the signature data: header (48), report body (384) and the length of the signature data (4).
HEADER_SIZE = 48
SIGNED_SIZE = HEADER_SIZE + 384
#: Quotes grow with their certificate chain only; nothing real comes near this.
MAX_SIZE = 64 << 10

VERSION_3 = 3
ATTESTATION_KEY_ECDSA_P256 = 2
#: The QE vendor id of Intel's quoting enclave format.
QE_VENDOR_INTEL = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")

#: Certification data types (appendix A.4, table 9).
CERT_PPID_PLAIN = 1
CERT_PPID_RSA2048 = 2
CERT_PPID_RSA3072 = 3
CERT_PCK_LEAF = 4
CERT_PCK_CHAIN = 5


@dataclass(frozen=True, slots=True)
class QuoteHeader(Structure):
    """The 48-byte header of a version 3 quote."""

    LAYOUT: ClassVar[Layout] = Layout(
        "quote",
        HEADER_SIZE,
        (
            ("version", 0, "H"),
            ("attestation_key_type", 2, "H"),
            ("qe_svn", 8, "H"),
            ("pce_svn", 10, "H"),
            ("qe_vendor_id", 12, "16s"),
            ("user_data", 28, "20s"),
        ),
    )

    version: int
    attestation_key_type: int
    qe_svn: int
    pce_svn: int
    qe_vendor_id: bytes
    user_data: bytes


@dataclass(frozen=True, slots=True)
class Quote:
    """A version 3 quote.

    Attributes:
        header: 48 bytes.
        body: the enclave's report body, 384 bytes.
        signature: ECDSA P-256 over header and body, r‖s big-endian, 64 bytes.
        attestation_key: its public key, x‖y big-endian, 64 bytes.
        qe_report: the quoting enclave's report body, 384 bytes.
        qe_report_signature: by the PCK, r‖s, 64 bytes.
        qe_auth_data: authentication data of the quoting enclave.
        cert_type: certification data type.
        cert_data: for type 5 the PCK certificate chain, PEM, leaf first.
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

    def signed_bytes(self) -> bytes:
        """The 432 bytes that the attestation key signs."""
        return self.header.to_bytes() + self.body

    def report_body(self) -> ReportBody:
        """The enclave's report body.

        Raises:
            EvidenceError: ``evidence.quote.body``: a reserved byte is not zero.
        """
        return _body(self.body)

    def qe_report_body(self) -> ReportBody:
        """The quoting enclave's report body.

        Raises:
            EvidenceError: ``evidence.quote.body``: a reserved byte is not zero.
        """
        return _body(self.qe_report)

    def to_bytes(self) -> bytes:
        """The quote on the wire."""
        data = b"".join(
            (
                self.signature,
                self.attestation_key,
                self.qe_report,
                self.qe_report_signature,
                struct.pack("<H", len(self.qe_auth_data)),
                self.qe_auth_data,
                struct.pack("<HI", self.cert_type, len(self.cert_data)),
                self.cert_data,
            )
        )
        return self.signed_bytes() + struct.pack("<I", len(data)) + data

    @classmethod
    def from_bytes(cls, data: bytes) -> Quote:
        """Parse a version 3 quote.

        Raises:
            EvidenceError: ``evidence.quote.truncated``, ``.trailing``, ``.size``, ``.version``, ``.key_type`` or
                ``.header``.
        """
        if len(data) > MAX_SIZE:
            raise _refused("size", "the quote is too large", f"{len(data)} bytes", f"at most {MAX_SIZE} bytes")
        reader = _Reader(data)
        raw_header = reader.take(HEADER_SIZE, "header")
        version, key_type, tee_type = struct.unpack_from("<HHI", raw_header)
        if version != VERSION_3:
            raise _refused("version", "the quote's version is not supported", version, VERSION_3)
        if key_type != ATTESTATION_KEY_ECDSA_P256:
            raise _refused("key_type", "the attestation key is not ECDSA P-256", key_type, ATTESTATION_KEY_ECDSA_P256)
        if tee_type:
            raise _refused("header", "the quote is not an SGX quote", f"TEE type {tee_type:#x}", "0")
        header = QuoteHeader.from_bytes(raw_header)
        body = reader.take(384, "report body")
        size = reader.number("<I", "length of the signature data")
        if size > reader.left:
            raise _truncated("signature data", size, reader.left)
        if size < reader.left:
            raise _refused("trailing", "bytes follow the quote", f"{reader.left - size} bytes", "none")
        quote = cls(
            header=header,
            body=body,
            signature=reader.take(64, "signature"),
            attestation_key=reader.take(64, "attestation key"),
            qe_report=reader.take(384, "QE report"),
            qe_report_signature=reader.take(64, "QE report signature"),
            qe_auth_data=reader.take(reader.number("<H", "length of the QE authentication data"), "QE auth data"),
            cert_type=reader.number("<H", "certification data type"),
            cert_data=reader.take(reader.number("<I", "length of the certification data"), "certification data"),
        )
        if reader.left:
            raise _refused("trailing", "bytes follow the certification data", f"{reader.left} bytes", "none")
        return quote


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = bytes(data)
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, size: int, what: str) -> bytes:
        if size > self.left:
            raise _truncated(what, size, self.left)
        self._at += size
        return self._data[self._at - size : self._at]

    def number(self, code: str, what: str) -> int:
        value: int = struct.unpack(code, self.take(struct.calcsize(code), what))[0]
        return value


def _body(data: bytes) -> ReportBody:
    try:
        return ReportBody.from_bytes(data)
    except StructureError as error:
        raise _refused("body", error.message, error.found, error.expected) from None


def _truncated(what: str, needed: int, left: int) -> EvidenceError:
    return _refused("truncated", f"the quote ends within its {what}", f"{left} bytes", f"{needed} bytes")


def _refused(event: str, what: str, found: object, expected: object) -> EvidenceError:
    return EvidenceError(
        what,
        id=f"evidence.quote.{event}",
        found=found,
        expected=expected,
        remedy="fetch the quote again; it must be an SGX ECDSA quote, version 3, with nothing around it",
    )
