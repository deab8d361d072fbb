"""What the emulator does not leave to unicorn: instructions that are illegal, privileged, or SGX's to define."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Action(Enum):
    """What happens instead."""

    ILLEGAL = "#UD in an enclave"
    PRIVILEGED = "#GP above CPL 0"
    BREAKPOINT = "#BP"
    SYSTEM_CALL = "goes to the operating system"
    RANDOM = "the machine's random numbers"
    XGETBV = "XCR0"
    FOREIGN = "not emulated"


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction, disassembled.

    Attributes:
        address: linear address.
        size: bytes.
        mnemonic: as capstone writes it; ``operands`` likewise.
        action: what happens instead in an enclave; ``outside``: in ordinary code.
    """

    address: int
    size: int
    mnemonic: str
    operands: str
    action: Action | None
    outside: Action | None

    def __str__(self) -> str:
        return f"{self.mnemonic} {self.operands}".rstrip()


_SEGMENTS = frozenset(("ds", "es", "ss", "fs", "gs"))
_SYSTEM_CALLS = frozenset(("syscall", "sysenter", "int", "into"))
_LOADS_SEGMENT = frozenset(
    ("lcall", "ljmp", "retf", "retfq", "iret", "iretd", "iretq", "lds", "les", "lfs", "lgs", "lss")
)
#: SDM vol. 3D, table 36-1, but for those that move into segment registers.
_ILLEGAL = frozenset(
    (
        *("cpuid", "getsec", "rdpmc", "sgdt", "sidt", "sldt", "str", "vmcall", "vmfunc", "smsw"),
        *("in", "insb", "insw", "insd", "out", "outsb", "outsw", "outsd"),
    )
)
_PORTS = frozenset(("in", "insb", "insw", "insd", "out", "outsb", "outsw", "outsd"))
_PRIVILEGED = frozenset(
    (
        *("hlt", "cli", "sti", "lgdt", "lidt", "lldt", "ltr", "lmsw", "clts", "invd", "wbinvd", "wbnoinvd", "invlpg"),
        *("rdmsr", "wrmsr", "rdpmc", "swapgs", "sysret", "sysretq", "sysexit", "sysexitq", "monitor", "mwait"),
        *("invpcid", "monitorx", "mwaitx"),
        *("xsetbv", "clac", "stac", "getsec", "vmcall", "vmfunc", "vmlaunch", "vmresume", "vmxoff", "vmxon"),
        *("vmread", "vmwrite", "vmptrld", "vmptrst", "vmclear", "invept", "invvpid", "vmrun", "vmload", "vmsave"),
        *("stgi", "clgi", "skinit", "invlpga", "vmmcall", "rsm"),
    )
)


def classify(address: int, size: int, mnemonic: str, operands: str, *, sgx2: bool) -> Instruction:
    """An instruction, with what happens instead of it in an enclave and outside.

    Args:
        sgx2: RDTSC and RDTSCP are legal in enclaves of processors with SGX2.
    """
    # A prefix is a word of its own in capstone's mnemonic ("rep insb").
    name = mnemonic.rpartition(" ")[2]
    first = operands.partition(",")[0].strip()
    # capstone calls a far jump or call through memory of 48 bits "jmp ptr […]", those of other widths "ljmp […]".
    loads_segment = (
        name in _LOADS_SEGMENT
        or (name in ("mov", "pop") and first in _SEGMENTS)
        or (name in ("jmp", "call") and operands.startswith("ptr "))
    )
    action: Action | None = None
    outside: Action | None = None
    if name in ("rdrand", "rdseed"):
        action = outside = Action.RANDOM
    elif name == "xgetbv":
        action = outside = Action.XGETBV
    elif name == "int3":
        action = outside = Action.BREAKPOINT
    elif name in _SYSTEM_CALLS:
        action, outside = Action.ILLEGAL, Action.SYSTEM_CALL
    elif loads_segment:
        action, outside = Action.ILLEGAL, Action.FOREIGN
    elif name == "mov" and any(part.strip()[:2] in ("cr", "dr") for part in operands.split(",")):
        action = outside = Action.PRIVILEGED
    else:
        if name in _PRIVILEGED or name in _PORTS:
            action = outside = Action.PRIVILEGED
        if name in _ILLEGAL or (name in ("rdtsc", "rdtscp") and not sgx2):
            action = Action.ILLEGAL
    return Instruction(address, size, mnemonic, operands, action, outside)
