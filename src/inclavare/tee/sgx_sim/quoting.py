"""Quotes: the quoting enclave checks a report and signs it; the PCE vouches for the quoting enclave's key."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from ...sgx import report
from ...sgx.certification import CERT_PCK_CHAIN
from ...sgx.quote import (
    ATTESTATION_KEY_ECDSA_P256,
    QE_VENDOR_INTEL,
    TEE_SGX,
    VERSION_3,
    Quote,
    QuoteHeader,
)
from ...sgx.structs import Report
from . import architectural
from .cpu import Processor, Secs, identity

if TYPE_CHECKING:
    from .provisioning import Provisioning

#: Authentication data of Intel's QE: the bytes 0 to 31.
_AUTH_DATA = bytes(range(32))


def target_info() -> bytes:
    """TARGETINFO of the quoting enclave, 512 bytes."""
    return architectural.target_info(architectural.QE).to_bytes()


class QuotingEnclave:
    """The QE, loaded and certified.

    Args:
        processor: where it runs, together with the enclaves that it quotes.
        provisioning: the platform's certificates.
    """

    def __init__(self, processor: Processor, provisioning: Provisioning) -> None:
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        self._processor = processor
        self._cert_data = provisioning.pck_chain
        self._secs = architectural.load(processor, architectural.QE, provisioning.qe_sigstruct)
        self._key = architectural.attestation_key(processor, self._secs)
        point = self._key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        self._public_key = point[1:]
        self._header = QuoteHeader(
            version=VERSION_3,
            attestation_key_type=ATTESTATION_KEY_ECDSA_P256,
            tee_type=TEE_SGX,
            qe_svn=architectural.QE.isv_svn,
            pce_svn=architectural.PCE.isv_svn,
            qe_vendor_id=QE_VENDOR_INTEL,
            user_data=architectural.qe_id(processor, self._secs) + bytes(4),
        )
        binding = hashlib.sha256(self._public_key + _AUTH_DATA).digest() + bytes(32)
        pce = architectural.load(processor, architectural.PCE, provisioning.pce_sigstruct)
        own_report = processor.ereport(self._secs, report.target_info(identity(pce)), binding)
        self._qe_report = own_report.body
        self._qe_report_signature = _certify(processor, pce, own_report)

    def quote(self, received: bytes) -> bytes:
        """A quote over a 432-byte REPORT.

        Raises:
            EvidenceError: ``evidence.report.mac``: not made on this platform for the quoting enclave.
            IntegrityError: not a REPORT.
        """
        from .provisioning import sign_raw

        parsed = Report.from_bytes(received)
        self._processor.verify_report(self._secs, parsed)
        signed = self._header.to_bytes() + parsed.body
        return Quote(
            header=self._header,
            body=parsed.body,
            signature=sign_raw(self._key, signed),
            attestation_key=self._public_key,
            qe_report=self._qe_report,
            qe_report_signature=self._qe_report_signature,
            qe_auth_data=_AUTH_DATA,
            cert_type=CERT_PCK_CHAIN,
            cert_data=self._cert_data,
        ).to_bytes()


def _certify(processor: Processor, pce: Secs, received: Report) -> bytes:
    """What the PCE does: sign the report of an enclave of this platform that may use the provisioning key."""
    from .provisioning import sign_raw

    processor.verify_report(pce, received)
    return sign_raw(architectural.pck_key(processor, pce), received.body)
