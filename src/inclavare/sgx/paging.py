"""Structures of EPC pages: SECINFO's flags, PAGEINFO, PCMD, version arrays and RDINFO (SDM vol. 3D, 38.11 to 38.14)."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from .structs import Layout, SecInfo, Structure

PAGE_SIZE = 4096

#: SECINFO.FLAGS: permissions in bits 0–2, state in bits 3–5, page type in bits 8–15.
SECINFO_R = 1 << 0
SECINFO_W = 1 << 1
SECINFO_X = 1 << 2
SECINFO_PENDING = 1 << 3
SECINFO_MODIFIED = 1 << 4
SECINFO_PR = 1 << 5
SECINFO_RWX = SECINFO_R | SECINFO_W | SECINFO_X
SECINFO_PT = 0xFF << 8
SECINFO_KNOWN = SECINFO_RWX | SECINFO_PENDING | SECINFO_MODIFIED | SECINFO_PR | SECINFO_PT
#: Page types, in their place in SECINFO.FLAGS.
PT_SECS = 0 << 8
PT_TCS = 1 << 8
PT_REG = 2 << 8
PT_VA = 3 << 8
PT_TRIM = 4 << 8
PT_SS_FIRST = 5 << 8
PT_SS_REST = 6 << 8
PAGE_TYPES = {
    PT_SECS: "PT_SECS",
    PT_TCS: "PT_TCS",
    PT_REG: "PT_REG",
    PT_VA: "PT_VA",
    PT_TRIM: "PT_TRIM",
    PT_SS_FIRST: "PT_SS_FIRST",
    PT_SS_REST: "PT_SS_REST",
}
#: RDINFO.FLAGS has this bit besides those of SECINFO.FLAGS.
RDINFO_BLOCKED = 1 << 7
#: RDINFO.STATUS.
RDINFO_CHILDPRESENT = 1 << 0
RDINFO_VIRTCHILDPRESENT = 1 << 1

#: Version slots of 8 bytes in a VA page.
VA_SLOTS = 512


@dataclass(frozen=True, slots=True)
class PageInfo(Structure):
    """PAGEINFO (SDM 38.10), 32 bytes, aligned to 32: four linear addresses.

    ``secinfo`` is the address of a SECINFO, or of a PCMD for EWB and ELDB/ELDU.
    """

    LAYOUT: ClassVar[Layout] = Layout(
        "pageinfo", 32, (("linaddr", 0, "Q"), ("srcpge", 8, "Q"), ("secinfo", 16, "Q"), ("secs", 24, "Q"))
    )

    linaddr: int
    srcpge: int
    secinfo: int
    secs: int


@dataclass(frozen=True, slots=True)
class Pcmd(Structure):
    """PCMD (SDM 38.12), 128 bytes, aligned to 128: what EWB leaves beside an evicted page.

    Attributes:
        flags: SECINFO.FLAGS of the page; the rest of its SECINFO is zero.
        enclave_id: of the enclave that the page belongs to.
        mac: over page, SECINFO, linear address, enclave id and version; 16 bytes.
    """

    LAYOUT: ClassVar[Layout] = Layout("pcmd", 128, (("flags", 0, "Q"), ("enclave_id", 64, "Q"), ("mac", 112, "16s")))

    flags: int
    enclave_id: int
    mac: bytes

    @property
    def secinfo(self) -> SecInfo:
        """The page's SECINFO."""
        return SecInfo(self.flags)


@dataclass(frozen=True, slots=True)
class VersionArray(Structure):
    """A VA page (SDM 38.20), 4096 bytes: 512 slots of 8 bytes, zero where no evicted page has its version."""

    LAYOUT: ClassVar[Layout] = Layout("va", PAGE_SIZE, (("slots", 0, "4096s"),))

    slots: bytes = bytes(PAGE_SIZE)

    @property
    def versions(self) -> tuple[int, ...]:
        """The 512 versions."""
        return struct.unpack(f"<{VA_SLOTS}Q", self.slots)

    @classmethod
    def of(cls, versions: Sequence[int]) -> Self:
        """A VA page with these versions, at most 512, in its first slots.

        Raises:
            ValueError: too many, or out of range.
        """
        try:
            return cls(struct.pack(f"<{len(versions)}Q", *versions).ljust(PAGE_SIZE, b"\0"))
        except struct.error as error:
            raise ValueError(f"va: {error}") from None


@dataclass(frozen=True, slots=True)
class RdInfo(Structure):
    """RDINFO (SDM 38.13), 24 bytes, aligned to 32: what ERDINFO tells about an EPC page."""

    LAYOUT: ClassVar[Layout] = Layout(
        "rdinfo", 24, (("status", 0, "Q"), ("flags", 8, "Q"), ("enclave_context", 16, "Q"))
    )

    status: int = 0
    flags: int = 0
    enclave_context: int = 0
