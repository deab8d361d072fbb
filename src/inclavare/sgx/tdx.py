"""TDX reports: the bodies of TD quotes, and TDREPORT_STRUCT as TDG.MR.REPORT gives it to a TD.

Sources: Intel "TDX Module ABI Specification" (TDREPORT_STRUCT) and "TDX DCAP Quoting Library API", appendix 3 (bodies).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

from .structs import Layout, Structure, StructureError

#: ATTRIBUTES of a TD.
TD_DEBUG = 1 << 0
TD_SEPT_VE_DISABLE = 1 << 28
TD_MIGRATABLE = 1 << 29
TD_PKS = 1 << 30
TD_KL = 1 << 31
TD_PERFMON = 1 << 63

#: REPORTTYPE.TYPE of a TDREPORT.
REPORT_TYPE_TDX = 0x81

_BODY = (
    ("tee_tcb_svn", 0, "16s"),
    ("mr_seam", 16, "48s"),
    ("mr_signer_seam", 64, "48s"),
    ("seam_attributes", 112, "Q"),
    ("td_attributes", 120, "Q"),
    ("xfam", 128, "Q"),
    ("mr_td", 136, "48s"),
    ("mr_config_id", 184, "48s"),
    ("mr_owner", 232, "48s"),
    ("mr_owner_config", 280, "48s"),
    ("rtmr0", 328, "48s"),
    ("rtmr1", 376, "48s"),
    ("rtmr2", 424, "48s"),
    ("rtmr3", 472, "48s"),
    ("report_data", 520, "64s"),
)


@dataclass(frozen=True, slots=True)
class TdReport10(Structure):
    """TD report of TDX 1.0, 584 bytes: the body of a TDX quote of version 4, or of version 5 with body type 2."""

    LAYOUT: ClassVar[Layout] = Layout("tdreport10", 584, _BODY)

    tee_tcb_svn: bytes
    mr_seam: bytes
    mr_signer_seam: bytes
    seam_attributes: int
    td_attributes: int
    xfam: int
    mr_td: bytes
    mr_config_id: bytes
    mr_owner: bytes
    mr_owner_config: bytes
    rtmr0: bytes
    rtmr1: bytes
    rtmr2: bytes
    rtmr3: bytes
    report_data: bytes

    @property
    def debug(self) -> bool:
        """Whether the host can read and write the TD's memory."""
        return bool(self.td_attributes & TD_DEBUG)


@dataclass(frozen=True, slots=True)
class TdReport15(TdReport10):
    """TD report of TDX 1.5, 648 bytes: the body of a quote of version 5 with body type 3."""

    LAYOUT: ClassVar[Layout] = Layout(
        "tdreport15", 648, (*_BODY, ("tee_tcb_svn2", 584, "16s"), ("mr_service_td", 600, "48s"))
    )

    tee_tcb_svn2: bytes
    mr_service_td: bytes


@dataclass(frozen=True, slots=True)
class ReportMacStruct(Structure):
    """REPORTMACSTRUCT, 256 bytes: what EVERIFYREPORT2 checks. Hashes are SHA-384, the MAC is HMAC-SHA-256."""

    LAYOUT: ClassVar[Layout] = Layout(
        "reportmacstruct",
        256,
        (
            ("type", 0, "B"),
            ("subtype", 1, "B"),
            ("version", 2, "B"),
            ("cpusvn", 16, "16s"),
            ("tee_tcb_info_hash", 32, "48s"),
            ("tee_info_hash", 80, "48s"),
            ("report_data", 128, "64s"),
            ("mac", 224, "32s"),
        ),
    )

    type: int
    subtype: int
    version: int
    cpusvn: bytes
    tee_tcb_info_hash: bytes
    tee_info_hash: bytes
    report_data: bytes
    mac: bytes


@dataclass(frozen=True, slots=True)
class TeeTcbInfo(Structure):
    """TEE_TCB_INFO, 239 bytes: the TDX module. Bit i of ``valid`` says that the field at offset 8·i is populated."""

    LAYOUT: ClassVar[Layout] = Layout(
        "teetcbinfo",
        239,
        (
            ("valid", 0, "Q"),
            ("tee_tcb_svn", 8, "16s"),
            ("mr_seam", 24, "48s"),
            ("mr_signer_seam", 72, "48s"),
            ("attributes", 120, "Q"),
            ("tee_tcb_svn2", 128, "16s"),
        ),
    )

    valid: int
    tee_tcb_svn: bytes
    mr_seam: bytes
    mr_signer_seam: bytes
    attributes: int
    tee_tcb_svn2: bytes = bytes(16)


@dataclass(frozen=True, slots=True)
class TdInfo(Structure):
    """TDINFO_STRUCT, 512 bytes: the TD. ``mr_service_td`` is zero under TDX 1.0."""

    LAYOUT: ClassVar[Layout] = Layout(
        "tdinfo",
        512,
        (
            ("attributes", 0, "Q"),
            ("xfam", 8, "Q"),
            ("mr_td", 16, "48s"),
            ("mr_config_id", 64, "48s"),
            ("mr_owner", 112, "48s"),
            ("mr_owner_config", 160, "48s"),
            ("rtmr0", 208, "48s"),
            ("rtmr1", 256, "48s"),
            ("rtmr2", 304, "48s"),
            ("rtmr3", 352, "48s"),
            ("mr_service_td", 400, "48s"),
        ),
    )

    attributes: int
    xfam: int
    mr_td: bytes
    mr_config_id: bytes
    mr_owner: bytes
    mr_owner_config: bytes
    rtmr0: bytes
    rtmr1: bytes
    rtmr2: bytes
    rtmr3: bytes
    mr_service_td: bytes = bytes(48)


@dataclass(frozen=True, slots=True)
class TdReport(Structure):
    """TDREPORT_STRUCT, 1024 bytes, with its parts as bytes: REPORTMACSTRUCT, TEE_TCB_INFO and TDINFO_STRUCT."""

    LAYOUT: ClassVar[Layout] = Layout(
        "tdreport", 1024, (("report_mac_struct", 0, "256s"), ("tee_tcb_info", 256, "239s"), ("td_info", 512, "512s"))
    )

    report_mac_struct: bytes
    tee_tcb_info: bytes
    td_info: bytes

    def parts(self) -> tuple[ReportMacStruct, TeeTcbInfo, TdInfo]:
        """The three parts; the first vouches for the other two. Its MAC is only for the processor to check.

        Raises:
            StructureError: ``sgx.tdreport.type`` or ``.hash``, or a part's own reserved bytes.
        """
        mac = ReportMacStruct.from_bytes(self.report_mac_struct)
        if (mac.type, mac.subtype) != (REPORT_TYPE_TDX, 0):
            raise StructureError(
                "REPORTTYPE is not that of a TD",
                id="sgx.tdreport.type",
                found=f"type {mac.type:#x}, subtype {mac.subtype}",
                expected=f"type {REPORT_TYPE_TDX:#x}, subtype 0",
            )
        for name, part, expected in (
            ("TEE_TCB_INFO", self.tee_tcb_info, mac.tee_tcb_info_hash),
            ("TDINFO_STRUCT", self.td_info, mac.tee_info_hash),
        ):
            found = hashlib.sha384(part).digest()
            if found != expected:
                raise StructureError(
                    f"{name} is not the one that REPORTMACSTRUCT vouches for",
                    id="sgx.tdreport.hash",
                    found=found.hex(),
                    expected=expected.hex(),
                )
        return mac, TeeTcbInfo.from_bytes(self.tee_tcb_info), TdInfo.from_bytes(self.td_info)

    def body(self) -> TdReport15:
        """What a quoting enclave puts into a quote; its first 584 bytes are the report of TDX 1.0.

        Raises:
            StructureError: see :meth:`parts`.
        """
        mac, tcb, td = self.parts()
        return TdReport15(
            tee_tcb_svn=tcb.tee_tcb_svn,
            mr_seam=tcb.mr_seam,
            mr_signer_seam=tcb.mr_signer_seam,
            seam_attributes=tcb.attributes,
            td_attributes=td.attributes,
            xfam=td.xfam,
            mr_td=td.mr_td,
            mr_config_id=td.mr_config_id,
            mr_owner=td.mr_owner,
            mr_owner_config=td.mr_owner_config,
            rtmr0=td.rtmr0,
            rtmr1=td.rtmr1,
            rtmr2=td.rtmr2,
            rtmr3=td.rtmr3,
            report_data=mac.report_data,
            tee_tcb_svn2=tcb.tee_tcb_svn2,
            mr_service_td=td.mr_service_td,
        )
