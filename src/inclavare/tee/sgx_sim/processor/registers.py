"""The registers of one logical processor, as far as SGX touches them (64-bit mode)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .xsave import INIT_IMAGE

RFLAGS_CF = 1 << 0
RFLAGS_RESERVED = 1 << 1
RFLAGS_PF = 1 << 2
RFLAGS_AF = 1 << 4
RFLAGS_ZF = 1 << 6
RFLAGS_SF = 1 << 7
RFLAGS_TF = 1 << 8
RFLAGS_IF = 1 << 9
RFLAGS_DF = 1 << 10
RFLAGS_OF = 1 << 11
RFLAGS_IOPL = 3 << 12
RFLAGS_NT = 1 << 14
RFLAGS_RF = 1 << 16
RFLAGS_AC = 1 << 18
RFLAGS_ID = 1 << 21
#: What every leaf function with a code in RAX sets or clears.
RFLAGS_STATUS = RFLAGS_CF | RFLAGS_PF | RFLAGS_AF | RFLAGS_ZF | RFLAGS_SF | RFLAGS_OF

#: General registers, in the order of GPRSGX.
GENERAL = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{number}" for number in range(8, 16)))


@dataclass(slots=True)
class Registers:
    """General registers, RIP, RFLAGS, the bases of FS and GS, and the XSAVE state.

    Attributes:
        xsave: state components in XSAVE's standard format, ``len(INIT_IMAGE)`` bytes.
    """

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
    rip: int = 0
    rflags: int = RFLAGS_RESERVED | RFLAGS_IF
    fs_base: int = 0
    gs_base: int = 0
    xsave: bytes = INIT_IMAGE

    def copy(self) -> Registers:
        """The same values, independent of these."""
        return replace(self)

    def set_status(self, flags: int) -> None:
        """Set the status flags that ``flags`` names and clear the others."""
        self.rflags = self.rflags & ~RFLAGS_STATUS | flags
