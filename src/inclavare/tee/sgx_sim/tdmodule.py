"""The simulated TDX module: the reports that it makes for trust domains, and what the manufacturer says about it.

There is no trust domain behind a report: whoever asks says what its measurements are to be. It serves to test
verifiers of TDX quotes.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Sequence
from typing import Any

from ...errors import EvidenceError, UsageError
from ...sgx.tdx import (
    REPORT_TYPE_TDX,
    TD_SEPT_VE_DISABLE,
    ReportMacStruct,
    TdInfo,
    TdReport,
    TdReport15,
    TeeTcbInfo,
)

#: TEE_TCB_SVN of trust domains: the module's ISVSVN, its major version, then other components; 16 bytes.
TCB_SVN = bytes((3, 1)) + bytes(14)
#: Measurement of the module and its signer, 48 bytes each. Intel's own signer is written as zeros.
MRSEAM = hashlib.sha384(b"inclavare sgx-sim TDX module, no hardware protection").digest()
MRSIGNERSEAM = hashlib.sha384(b"SIMULATED TDX module signer").digest()


#: TEE_TCB_INFO.VALID: every field but TEE_TCB_SVN2, which belongs to TDX 1.5.
_VALID = 0xFFFF
_MAC_AT = ReportMacStruct.LAYOUT.offsets["mac"]
#: x87, SSE, AVX, AVX-512, PKRU, AMX.
_XFAM = 0x602E7
_RTMRS = 4


def domain(
    mrtd: bytes,
    rtmrs: Sequence[bytes] = (),
    *,
    attributes: int = TD_SEPT_VE_DISABLE,
    xfam: int = _XFAM,
    config_id: bytes = bytes(48),
    owner: bytes = bytes(48),
    owner_config: bytes = bytes(48),
) -> TdInfo:
    """A trust domain of TDX 1.0 by its measurements.

    Args:
        mrtd: 48 bytes, as everything that is bytes here.
        rtmrs: up to four; the others are zero.
        attributes: 64 bits.
        xfam: extended features, 64 bits.
        config_id: MRCONFIGID; then MROWNER and MROWNERCONFIG.

    Raises:
        UsageError: ``tee.td.length``, ``.rtmrs`` or ``.bits``.
    """
    if len(rtmrs) > _RTMRS:
        raise _wrong("rtmrs", "a trust domain has four RTMRs", len(rtmrs), "at most 4")
    registers = [f"RTMR{at}" for at in range(len(rtmrs))]
    names = ("MRTD", "MRCONFIGID", "MROWNER", "MROWNERCONFIG", *registers)
    for name, value in zip(names, (mrtd, config_id, owner, owner_config, *rtmrs), strict=True):
        _check_length(name, value, 48)
    for name, number in (("ATTRIBUTES", attributes), ("XFAM", xfam)):
        if not 0 <= number < 1 << 64:
            raise _wrong("bits", f"{name} is no 64-bit number", number, "0 to 2^64 - 1")
    filled = (*rtmrs, *[bytes(48)] * (_RTMRS - len(rtmrs)))
    return TdInfo(attributes, xfam, mrtd, config_id, owner, owner_config, *filled)


class TdxModule:
    """The module, and the processor's part in its reports: a MAC key that exists for one session.

    Args:
        cpusvn: the processor's, 16 bytes.
    """

    def __init__(self, cpusvn: bytes) -> None:
        self._cpusvn = cpusvn
        self._mac_key = os.urandom(32)

    def report(self, domain: TdInfo, report_data: bytes) -> bytes:
        """TDG.MR.REPORT: a TDREPORT, 1024 bytes.

        Args:
            domain: the trust domain's measurements.
            report_data: 64 bytes.

        Raises:
            UsageError: ``tee.td.length``.
        """
        _check_length("REPORTDATA", report_data, 64)
        tcb = TeeTcbInfo(
            valid=_VALID, tee_tcb_svn=TCB_SVN, mr_seam=MRSEAM, mr_signer_seam=MRSIGNERSEAM, attributes=0
        ).to_bytes()
        info = domain.to_bytes()
        unsigned = ReportMacStruct(
            type=REPORT_TYPE_TDX,
            subtype=0,
            version=0,
            cpusvn=self._cpusvn,
            tee_tcb_info_hash=hashlib.sha384(tcb).digest(),
            tee_info_hash=hashlib.sha384(info).digest(),
            report_data=report_data,
            mac=bytes(32),
        ).to_bytes()
        return TdReport(unsigned[:_MAC_AT] + self._mac(unsigned), tcb, info).to_bytes()

    def verify(self, received: bytes) -> TdReport15:
        """EVERIFYREPORT2: what a 1024-byte TDREPORT of this module says.

        Raises:
            EvidenceError: ``evidence.report.mac``: of another module, session or platform, or changed.
            IntegrityError: not a TDREPORT.
        """
        parsed = TdReport.from_bytes(received)
        mac = parsed.report_mac_struct
        if not hmac.compare_digest(self._mac(mac), mac[_MAC_AT:]):
            raise EvidenceError(
                "the TD report was not made on this platform",
                id="evidence.report.mac",
                remedy="report and quote in one session of one platform",
            )
        return parsed.body()

    def _mac(self, structure: bytes) -> bytes:
        return hmac.digest(self._mac_key, structure[:_MAC_AT], "sha256")


def collateral(date: str) -> dict[str, Any]:
    """Its part of a TDX TCB info, version 3: ``tdxModule`` and ``tdxModuleIdentities``.

    Args:
        date: of its TCB level, ISO 8601.
    """
    identity = {"mrsigner": MRSIGNERSEAM.hex().upper(), "attributes": "00" * 8, "attributesMask": "FF" * 8}
    level = {"tcb": {"isvsvn": TCB_SVN[0]}, "tcbDate": date, "tcbStatus": "UpToDate"}
    return {
        "tdxModule": identity,
        "tdxModuleIdentities": [{"id": f"TDX_{TCB_SVN[1]:02X}", **identity, "tcbLevels": [level]}],
    }


def _check_length(name: str, value: bytes, size: int) -> None:
    if len(value) != size:
        raise _wrong("length", f"{name} has the wrong length", f"{len(value)} bytes", f"{size} bytes")


def _wrong(event: str, what: str, found: object, expected: str) -> UsageError:
    return UsageError(what, id=f"tee.td.{event}", found=found, expected=expected)
