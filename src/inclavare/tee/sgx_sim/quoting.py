"""Quotes: a quoting enclave checks a report and signs it; the PCE vouches for the quoting enclave's key."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

from ...sgx import report
from ...sgx.certification import CERT_PCK_CHAIN
from ...sgx.quote import (
    ATTESTATION_KEY_ECDSA_P256,
    QE_VENDOR_INTEL,
    TEE_SGX,
    TEE_TDX,
    VERSION_3,
    VERSION_4,
    Quote,
    QuoteHeader,
)
from ...sgx.structs import Report
from ...sgx.tdx import TdReport10
from . import architectural
from .cpu import Processor, Secs, identity

if TYPE_CHECKING:
    from .provisioning import Provisioning
    from .tdmodule import TdxModule

#: Authentication data of Intel's QE: the bytes 0 to 31.
_AUTH_DATA = bytes(range(32))


def target_info() -> bytes:
    """TARGETINFO of the quoting enclave, 512 bytes."""
    return architectural.target_info(architectural.QE).to_bytes()


class _Certified:
    """A quoting enclave, loaded, with an attestation key for which the PCE vouches."""

    def __init__(
        self,
        processor: Processor,
        provisioning: Provisioning,
        enclave: architectural.Architectural,
        sigstruct: bytes,
        header: QuoteHeader,
    ) -> None:
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        self._cert_data = provisioning.pck_chain
        self._secs = architectural.load(processor, enclave, sigstruct)
        self._key = architectural.attestation_key(processor, self._secs)
        point = self._key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        self._public_key = point[1:]
        self._header = replace(header, user_data=architectural.qe_id(processor, self._secs) + bytes(4))
        binding = hashlib.sha256(self._public_key + _AUTH_DATA).digest() + bytes(32)
        with architectural.loaded(processor, architectural.PCE, provisioning.pce_sigstruct) as pce:
            own_report = processor.ereport(self._secs, report.target_info(identity(pce)), binding)
            self._qe_report = own_report.body
            self._qe_report_signature = _certify(processor, pce, own_report)

    def _sign(self, body: bytes) -> bytes:
        from .provisioning import sign_raw

        quote = Quote(
            header=self._header,
            body=body,
            signature=bytes(64),
            attestation_key=self._public_key,
            qe_report=self._qe_report,
            qe_report_signature=self._qe_report_signature,
            qe_auth_data=_AUTH_DATA,
            cert_type=CERT_PCK_CHAIN,
            cert_data=self._cert_data,
        )
        return replace(quote, signature=sign_raw(self._key, quote.signed_bytes())).to_bytes()


class QuotingEnclave(_Certified):
    """The QE, loaded and certified.

    Args:
        processor: where it runs, together with the enclaves that it quotes.
        provisioning: the platform's certificates.
    """

    def __init__(self, processor: Processor, provisioning: Provisioning) -> None:
        header = QuoteHeader(
            version=VERSION_3,
            attestation_key_type=ATTESTATION_KEY_ECDSA_P256,
            tee_type=TEE_SGX,
            qe_svn=architectural.QE.isv_svn,
            pce_svn=architectural.PCE.isv_svn,
            qe_vendor_id=QE_VENDOR_INTEL,
            user_data=bytes(20),
        )
        super().__init__(processor, provisioning, architectural.QE, provisioning.qe_sigstruct, header)
        self._processor = processor

    def quote(self, received: bytes) -> bytes:
        """A quote, version 3, over a 432-byte REPORT.

        Raises:
            EvidenceError: ``evidence.report.mac``: not made on this platform for the quoting enclave.
            IntegrityError: not a REPORT.
        """
        parsed = Report.from_bytes(received)
        self._processor.verify_report(self._secs, parsed)
        return self._sign(parsed.body)


class TdQuotingEnclave(_Certified):
    """The TD QE, loaded and certified.

    Args:
        processor: where it runs.
        provisioning: the platform's certificates, with the TD QE's SIGSTRUCT.
        module: checks the reports, as EVERIFYREPORT2 would.
    """

    def __init__(self, processor: Processor, provisioning: Provisioning, module: TdxModule) -> None:
        # QE and PCE SVN have no place in version 4: the QE's report and the PCK certificate say them.
        header = QuoteHeader(
            version=VERSION_4,
            attestation_key_type=ATTESTATION_KEY_ECDSA_P256,
            tee_type=TEE_TDX,
            qe_svn=0,
            pce_svn=0,
            qe_vendor_id=QE_VENDOR_INTEL,
            user_data=bytes(20),
        )
        super().__init__(processor, provisioning, architectural.TD_QE, provisioning.td_qe_sigstruct, header)
        self._module = module

    def quote(self, received: bytes) -> bytes:
        """A quote, version 4, over a 1024-byte TDREPORT.

        Raises:
            EvidenceError: ``evidence.report.mac``: not made by this platform's TDX module.
            IntegrityError: not a TDREPORT.
        """
        return self._sign(self._module.verify(received).to_bytes()[: TdReport10.LAYOUT.size])


def _certify(processor: Processor, pce: Secs, received: Report) -> bytes:
    """What the PCE does: sign the report of an enclave of this platform that may use the provisioning key."""
    from .provisioning import sign_raw

    processor.verify_report(pce, received)
    return sign_raw(architectural.pck_key(processor, pce), received.body)
