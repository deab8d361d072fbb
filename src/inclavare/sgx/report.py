"""REPORT: local attestation between enclaves of one platform (SDM vol. 3D, EREPORT and 38.15)."""

from __future__ import annotations

import hmac

from ..errors import EvidenceError
from .keys import Identity, RootKeys, aes_cmac, report_key
from .structs import Attributes, Report, ReportBody, TargetInfo


def target_info(enclave: Identity) -> TargetInfo:
    """The TARGETINFO with which another enclave directs a report at ``enclave``."""
    return TargetInfo(
        mrenclave=enclave.mrenclave,
        attributes=enclave.attributes.to_bytes(),
        cet_attributes=enclave.cet_attributes,
        config_svn=enclave.config_svn,
        miscselect=enclave.miscselect,
        config_id=enclave.config_id,
    )


def ereport(roots: RootKeys, enclave: Identity, target: TargetInfo, report_data: bytes, key_id: bytes) -> Report:
    """EREPORT: ``enclave``'s identity and 64 bytes of its own, with a MAC that only ``target`` can check.

    Args:
        key_id: the processor's current KEYID, 32 bytes.

    Raises:
        ValueError: ``report_data`` is not 64 bytes.
    """
    body = ReportBody(
        cpusvn=roots.cpusvn,
        miscselect=enclave.miscselect,
        cet_attributes=enclave.cet_attributes,
        isv_ext_prod_id=enclave.isv_ext_prod_id,
        attributes=enclave.attributes.to_bytes(),
        mrenclave=enclave.mrenclave,
        mrsigner=enclave.mrsigner,
        config_id=enclave.config_id,
        isv_prod_id=enclave.isv_prod_id,
        isv_svn=enclave.isv_svn,
        config_svn=enclave.config_svn,
        isv_family_id=enclave.isv_family_id,
        report_data=report_data,
    ).to_bytes()
    addressee = Identity(
        mrenclave=target.mrenclave,
        mrsigner=bytes(32),
        attributes=Attributes.from_bytes(target.attributes),
        isv_prod_id=0,
        isv_svn=0,
        miscselect=target.miscselect,
        cet_attributes=target.cet_attributes,
        config_id=target.config_id,
        config_svn=target.config_svn,
    )
    return Report(body=body, key_id=key_id, mac=aes_cmac(report_key(roots, addressee, key_id), body))


def verify(roots: RootKeys, verifier: Identity, report: Report) -> ReportBody:
    """Check, inside ``verifier``, a report that was directed at it.

    Raises:
        EvidenceError: ``evidence.report.mac``: damaged, made on another platform, or directed at another enclave.
    """
    expected = aes_cmac(report_key(roots, verifier, report.key_id), report.body)
    if not hmac.compare_digest(expected, report.mac):
        raise EvidenceError(
            "the report's MAC does not verify",
            id="evidence.report.mac",
            remedy="make the report on this platform, with this enclave's TARGETINFO",
        )
    return ReportBody.from_bytes(report.body)
