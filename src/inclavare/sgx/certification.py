"""Certification data of a quote: what vouches for its attestation key (Intel SGX ECDSA QuoteLibReference, A.4).

Types 1 to 3 identify the PCK certificate, 4 and 5 carry it, 6 is the quoting enclave's report with certification data
of its own, 7 is a platform manifest.
"""

from __future__ import annotations

import base64
import binascii
import struct
from dataclasses import dataclass
from typing import ClassVar

from ..errors import EvidenceError
from .structs import Layout, StructureError

CERT_PPID_PLAIN = 1
CERT_PPID_RSA2048 = 2
CERT_PPID_RSA3072 = 3
CERT_PCK_LEAF = 4
CERT_PCK_CHAIN = 5
CERT_QE_REPORT = 6
CERT_PLATFORM_MANIFEST = 7
CERT_TYPES = {
    CERT_PPID_PLAIN: "PPID in plain text, CPUSVN, PCESVN, PCE-ID",
    CERT_PPID_RSA2048: "PPID encrypted with RSA-2048-OAEP, CPUSVN, PCESVN, PCE-ID",
    CERT_PPID_RSA3072: "PPID encrypted with RSA-3072-OAEP, CPUSVN, PCESVN, PCE-ID",
    CERT_PCK_LEAF: "PCK certificate (PEM)",
    CERT_PCK_CHAIN: "PCK certificate chain (PEM)",
    CERT_QE_REPORT: "QE report certification data",
    CERT_PLATFORM_MANIFEST: "platform manifest",
}

_BEGIN, _END = b"-----BEGIN CERTIFICATE-----", b"-----END CERTIFICATE-----"


class Reader:
    """Takes a quote apart from its start.

    Raises (each method):
        EvidenceError: ``evidence.quote.truncated``.
    """

    def __init__(self, data: bytes) -> None:
        self._data = bytes(data)
        self._at = 0

    @property
    def left(self) -> int:
        """Bytes not yet taken."""
        return len(self._data) - self._at

    def take(self, size: int, what: str) -> bytes:
        """The next ``size`` bytes."""
        if size > self.left:
            raise refused("truncated", f"the quote ends within its {what}", f"{self.left} bytes", f"{size} bytes")
        self._at += size
        return self._data[self._at - size : self._at]

    def number(self, code: str, what: str) -> int:
        """The next number, by its :mod:`struct` code, little-endian."""
        value: int = struct.unpack("<" + code, self.take(struct.calcsize(code), what))[0]
        return value

    def end(self, what: str) -> None:
        """Nothing may follow: ``evidence.quote.trailing``."""
        if self.left:
            raise refused("trailing", f"bytes follow the {what}", f"{self.left} bytes", "none")


@dataclass(frozen=True, slots=True)
class PckIdentifier:
    """Certification data of types 1, 2 and 3: which PCK certificate belongs to the quote.

    Attributes:
        ppid: 16 bytes in plain text, or 256 or 384 bytes encrypted for Intel.
        cpusvn: 16 bytes.
        pce_svn: of the PCE that certified the quoting enclave.
        pce_id: 2 bytes.
    """

    LAYOUTS: ClassVar[dict[int, Layout]] = {
        kind: Layout(
            "pckidentifier",
            size + 20,
            (
                ("ppid", 0, f"{size}s"),
                ("cpusvn", size, "16s"),
                ("pce_svn", size + 16, "H"),
                ("pce_id", size + 18, "2s"),
            ),
        )
        for kind, size in ((CERT_PPID_PLAIN, 16), (CERT_PPID_RSA2048, 256), (CERT_PPID_RSA3072, 384))
    }

    ppid: bytes
    cpusvn: bytes
    pce_svn: int
    pce_id: bytes

    def to_bytes(self) -> bytes:
        """36, 276 or 404 bytes, by the PPID's size.

        Raises:
            ValueError: a field is out of range.
        """
        for layout in self.LAYOUTS.values():
            if layout.sizes["ppid"] == len(self.ppid):
                return layout.pack((self.ppid, self.cpusvn, self.pce_svn, self.pce_id))
        raise ValueError(f"pckidentifier.ppid is {len(self.ppid)} bytes, not 16, 256 or 384")


@dataclass(frozen=True, slots=True)
class QeReportCertification:
    """The quoting enclave's report and what vouches for it; all of a version 3 quote's, type 6 of a later one's.

    Attributes:
        qe_report: the quoting enclave's report body, 384 bytes.
        qe_report_signature: by the PCK, r‖s big-endian, 64 bytes.
        qe_auth_data: authentication data of the quoting enclave, at most 65535 bytes.
        cert_type: certification data type.
        cert_data: the data; see :func:`parse`.
    """

    qe_report: bytes
    qe_report_signature: bytes
    qe_auth_data: bytes
    cert_type: int
    cert_data: bytes

    def to_bytes(self) -> bytes:
        """As it stands in a quote."""
        return b"".join(
            (
                self.qe_report,
                self.qe_report_signature,
                struct.pack("<H", len(self.qe_auth_data)),
                self.qe_auth_data,
                struct.pack("<HI", self.cert_type, len(self.cert_data)),
                self.cert_data,
            )
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> QeReportCertification:
        """Parse it; nothing may follow.

        Raises:
            EvidenceError: ``evidence.quote.truncated``, ``.trailing``, or ``.certification`` for data of type 6 within.
        """
        reader = Reader(data)
        parsed = cls(
            qe_report=reader.take(384, "QE report"),
            qe_report_signature=reader.take(64, "QE report signature"),
            qe_auth_data=reader.take(reader.number("H", "length of the QE authentication data"), "QE auth data"),
            cert_type=reader.number("H", "certification data type"),
            cert_data=reader.take(reader.number("I", "length of the certification data"), "certification data"),
        )
        reader.end("certification data")
        if parsed.cert_type == CERT_QE_REPORT:
            raise refused("certification", "a QE report is certified by another QE report", "type 6 in type 6", None)
        return parsed


def parse(cert_type: int, data: bytes) -> PckIdentifier | tuple[bytes, ...] | QeReportCertification | bytes:
    """The certification data: an identifier (types 1–3), certificates in DER (4, 5), a QE report (6), a manifest (7).

    Raises:
        EvidenceError: ``evidence.quote.certification``: malformed, or an unknown type; for type 6 see
            :meth:`QeReportCertification.from_bytes`.
    """
    if cert_type in PckIdentifier.LAYOUTS:
        try:
            values = PckIdentifier.LAYOUTS[cert_type].unpack(data)
        except StructureError as error:
            raise refused("certification", error.message, error.found, error.expected) from None
        return PckIdentifier(*values)  # type: ignore[arg-type]
    if cert_type in (CERT_PCK_LEAF, CERT_PCK_CHAIN):
        found = certificates(data)
        if cert_type == CERT_PCK_LEAF and len(found) != 1:
            raise refused("certification", "certification data of type 4 is one certificate", len(found), 1)
        return found
    if cert_type == CERT_QE_REPORT:
        return QeReportCertification.from_bytes(data)
    if cert_type == CERT_PLATFORM_MANIFEST:
        return bytes(data)
    raise refused("certification", "the certification data's type is unknown", cert_type, "1 to 7")


def certificates(pem: bytes) -> tuple[bytes, ...]:
    """The certificates of a PEM chain, in DER: at least one, white space between them, one NUL at the end or none.

    Raises:
        EvidenceError: ``evidence.quote.certification``.
    """
    text, found, at = bytes(pem).removesuffix(b"\0").strip(), [], 0
    while at < len(text):
        end = text.find(_END, at)
        try:
            if not text.startswith(_BEGIN, at) or end < 0:
                raise ValueError("not a PEM certificate")
            found.append(base64.b64decode(b"".join(text[at + len(_BEGIN) : end].split()), validate=True))
        except (binascii.Error, ValueError) as error:
            raise refused("certification", "a certificate of the chain is not PEM", str(error), "PEM") from None
        at = end + len(_END)
        while text[at : at + 1].isspace():
            at += 1
    if not found:
        raise refused("certification", "there is no certificate", "nothing", "PEM")
    return tuple(found)


def refused(event: str, what: str, found: object, expected: object) -> EvidenceError:
    """The error for a quote that cannot be parsed."""
    return EvidenceError(
        what,
        id=f"evidence.quote.{event}",
        found=found,
        expected=expected,
        remedy="fetch the quote again; it must be an ECDSA quote of version 3, 4 or 5 with nothing around it",
    )
