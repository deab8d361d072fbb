"""State save area: where an asynchronous exit leaves an enclave thread's state (SDM vol. 3D, 38.9).

A frame is SECS.SSAFRAMESIZE pages: the XSAVE area at its start, GPRSGX at its end, MISC right below GPRSGX, and
padding between.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from .paging import PAGE_SIZE
from .structs import Layout, Structure, StructureError

#: SECS.MISCSELECT: which exceptions are described in the frame.
MISC_EXINFO = 1 << 0
MISC_CPINFO = 1 << 1
MISC_KNOWN = MISC_EXINFO | MISC_CPINFO

GPRSGX_SIZE = 184
EXINFO_SIZE = 16

#: EXITINFO.EXIT_TYPE.
EXIT_HARDWARE = 0b011
EXIT_SOFTWARE = 0b110
#: Exceptions that EXITINFO reports, by vector.
EXIT_VECTORS = {
    0: "#DE",
    1: "#DB",
    3: "#BP",
    5: "#BR",
    6: "#UD",
    13: "#GP",
    14: "#PF",
    16: "#MF",
    17: "#AC",
    19: "#XM",
    21: "#CP",
}
#: Those that are reported only if MISCSELECT asks for them.
_SELECTED = {13: MISC_EXINFO, 14: MISC_EXINFO, 21: MISC_CPINFO}

#: XSAVE's legacy region and header.
XSAVE_LEGACY_SIZE = 512
XSAVE_MINIMUM = XSAVE_LEGACY_SIZE + 64
#: Name, offset and size in bytes of each extended state component in the standard format (SDM vol. 1, 13.4 and 13.5;
#: CPUID leaf 0DH reports the same on every processor with SGX), by its bit in XFRM.
XSAVE_COMPONENTS = {
    2: ("AVX", 576, 256),
    3: ("BNDREGS", 960, 64),
    4: ("BNDCSR", 1024, 64),
    5: ("OPMASK", 1088, 64),
    6: ("ZMM_HI256", 1152, 512),
    7: ("HI16_ZMM", 1664, 1024),
    9: ("PKRU", 2688, 8),
    17: ("TILECFG", 2752, 64),
    18: ("TILEDATA", 2816, 8192),
}


@dataclass(frozen=True, slots=True)
class ExitInfo:
    """EXITINFO (SDM 38.9.1.1), 4 bytes in GPRSGX: why the last asynchronous exit happened.

    Attributes:
        vector: exception vector, 8 bits.
        exit_type: ``EXIT_HARDWARE`` or ``EXIT_SOFTWARE``, 3 bits.
        valid: whether the exit was an exception that is reported; vector and type are zero otherwise.
    """

    vector: int = 0
    exit_type: int = 0
    valid: bool = False

    def to_int(self) -> int:
        """The 32-bit field.

        Raises:
            ValueError: a field is out of range.
        """
        if not 0 <= self.vector <= 0xFF or not 0 <= self.exit_type <= 0x7:
            raise ValueError(f"exitinfo: vector {self.vector} or type {self.exit_type} is out of range")
        return self.vector | self.exit_type << 8 | self.valid << 31

    @classmethod
    def from_int(cls, value: int) -> Self:
        """The fields of the 32-bit field.

        Raises:
            StructureError: ``sgx.exitinfo.reserved``: a bit of 11–30 is set.
        """
        if value & 0x7FFF_F800 or value >> 32:
            raise StructureError(
                "EXITINFO has a reserved bit that is not zero",
                id="sgx.exitinfo.reserved",
                found=f"{value:#010x}",
                expected="bits 11–30 zero",
            )
        return cls(value & 0xFF, value >> 8 & 0x7, bool(value >> 31))

    @classmethod
    def of_exception(cls, vector: int, miscselect: int = 0) -> Self:
        """What AEX writes for an exception; nothing is valid for interrupts and exceptions that are not reported."""
        if vector not in EXIT_VECTORS or (vector in _SELECTED and not miscselect & _SELECTED[vector]):
            return cls()
        return cls(vector, EXIT_SOFTWARE if vector == 3 else EXIT_HARDWARE, True)


@dataclass(frozen=True, slots=True)
class GprSgx(Structure):
    """GPRSGX (SDM 38.9.1), 184 bytes: general registers at the exit, and the untrusted stack pointers.

    ``exitinfo`` is the 32-bit :class:`ExitInfo`; ``aexnotify`` bit 0 asks ERESUME to enter instead (AEX-Notify).
    """

    LAYOUT: ClassVar[Layout] = Layout(
        "gprsgx",
        GPRSGX_SIZE,
        (
            ("rax", 0, "Q"),
            ("rcx", 8, "Q"),
            ("rdx", 16, "Q"),
            ("rbx", 24, "Q"),
            ("rsp", 32, "Q"),
            ("rbp", 40, "Q"),
            ("rsi", 48, "Q"),
            ("rdi", 56, "Q"),
            ("r8", 64, "Q"),
            ("r9", 72, "Q"),
            ("r10", 80, "Q"),
            ("r11", 88, "Q"),
            ("r12", 96, "Q"),
            ("r13", 104, "Q"),
            ("r14", 112, "Q"),
            ("r15", 120, "Q"),
            ("rflags", 128, "Q"),
            ("rip", 136, "Q"),
            ("ursp", 144, "Q"),
            ("urbp", 152, "Q"),
            ("exitinfo", 160, "I"),
            ("aexnotify", 167, "B"),
            ("fsbase", 168, "Q"),
            ("gsbase", 176, "Q"),
        ),
    )

    rax: int = 0
    rcx: int = 0
    rdx: int = 0
    rbx: int = 0
    rsp: int = 0
    rbp: int = 0
    rsi: int = 0
    rdi: int = 0
    r8: int = 0
    r9: int = 0
    r10: int = 0
    r11: int = 0
    r12: int = 0
    r13: int = 0
    r14: int = 0
    r15: int = 0
    rflags: int = 0
    rip: int = 0
    ursp: int = 0
    urbp: int = 0
    exitinfo: int = 0
    aexnotify: int = 0
    fsbase: int = 0
    gsbase: int = 0

    @property
    def exit_info(self) -> ExitInfo:
        """EXITINFO's fields.

        Raises:
            StructureError: ``sgx.exitinfo.reserved``.
        """
        return ExitInfo.from_int(self.exitinfo)


@dataclass(frozen=True, slots=True)
class ExInfo(Structure):
    """EXINFO (SDM 38.9.2.1), 16 bytes in MISC: a page fault's linear address, and the error code of #PF, #GP or #CP."""

    LAYOUT: ClassVar[Layout] = Layout("exinfo", EXINFO_SIZE, (("maddr", 0, "Q"), ("errcd", 8, "I")))

    maddr: int = 0
    errcd: int = 0


@dataclass(frozen=True, slots=True)
class Frame:
    """Where the parts of an SSA frame lie: offsets from the frame's start and sizes, in bytes."""

    size: int
    xsave_size: int
    misc_offset: int
    misc_size: int
    gprsgx_offset: int

    #: The XSAVE area is first.
    xsave_offset: ClassVar[int] = 0

    @property
    def pad_offset(self) -> int:
        """Where the padding begins."""
        return self.xsave_size

    @property
    def pad_size(self) -> int:
        """Bytes of padding."""
        return self.misc_offset - self.xsave_size


def xsave_size(xfrm: int) -> int:
    """Bytes of the XSAVE area for ``xfrm``.

    Raises:
        ValueError: a component without a place in the area.
    """
    end = XSAVE_MINIMUM
    for bit in range(2, max(xfrm.bit_length(), 2)):
        if xfrm >> bit & 1:
            if bit not in XSAVE_COMPONENTS:
                raise ValueError(f"XFRM bit {bit} names no state component that XSAVE stores")
            _, offset, size = XSAVE_COMPONENTS[bit]
            end = max(end, offset + size)
    return end


def misc_size(miscselect: int) -> int:
    """Bytes of the MISC region: EXINFO, which #CP uses as well.

    Raises:
        ValueError: a reserved bit.
    """
    if miscselect & ~MISC_KNOWN:
        raise ValueError(f"MISCSELECT {miscselect:#x} has a reserved bit")
    return EXINFO_SIZE if miscselect else 0


def frame_layout(ssa_frame_size: int, xfrm: int, miscselect: int) -> Frame:
    """The layout of a frame of ``ssa_frame_size`` pages.

    Raises:
        ValueError: the state does not fit (ECREATE refuses it), or a reserved bit of XFRM or MISCSELECT.
    """
    size, state, misc = ssa_frame_size * PAGE_SIZE, xsave_size(xfrm), misc_size(miscselect)
    if state + misc + GPRSGX_SIZE > size:
        raise ValueError(f"an SSA frame of {size} bytes is too small for {state + misc + GPRSGX_SIZE} bytes of state")
    gprsgx = size - GPRSGX_SIZE
    return Frame(size, state, gprsgx - misc, misc, gprsgx)
