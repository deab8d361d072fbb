"""Entering enclaves: the kernel's ``__vdso_sgx_enter_enclave``, found in this process's vDSO and called.

The function hands registers through to the enclave as they are and comes back on EEXIT, or on an exception in the
enclave, which it reports instead of raising a signal (kernel: ``arch/x86/entry/vdso/vsgx.S``, uapi ``asm/sgx.h``).
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from ...errors import PlatformError
from ...sgx.codes import Enclu
from .syscalls import LINUX, Syscalls, auxiliary_value, executable

SYMBOL = "__vdso_sgx_enter_enclave"
#: The version that the kernel gives its vDSO symbols (``arch/x86/entry/vdso/vdso.lds.S``).
VERSION = "LINUX_2.6"

_AT_SYSINFO_EHDR = 33
_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_HASH, _DT_STRTAB, _DT_SYMTAB = 4, 5, 6
_DT_GNU_HASH, _DT_VERSYM, _DT_VERDEF, _DT_VERDEFNUM = 0x6FFFFEF5, 0x6FFFFFF0, 0x6FFFFFFC, 0x6FFFFFFD
_ET_DYN, _EM_X86_64 = 3, 62
#: Symbol types NOTYPE, FUNC, GNU_IFUNC; bindings GLOBAL and WEAK.
_CODE_TYPES, _VISIBLE = (0, 2, 10), (1, 2)
#: A vDSO has two or three pages; what is larger is none.
_MAX_IMAGE = 1 << 20


class VdsoError(ValueError):
    """The image is not an ELF object that a symbol could be looked up in."""


class _Image:
    """A vDSO image: its dynamic section, symbols and versions. Every read is within the image."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        ident, kind, machine = self._unpack("<16sHH", 0)
        if ident[:6] != b"\x7fELF\x02\x01" or kind != _ET_DYN or machine != _EM_X86_64:
            raise VdsoError("not a 64-bit x86-64 shared object")
        (headers,) = self._unpack("<Q", 32)
        size, count = self._unpack("<HH", 54)
        segments = [self._unpack("<IIQQQQ", headers + index * size) for index in range(count)]
        load = next((segment for segment in segments if segment[0] == _PT_LOAD), None)
        dynamic = next((segment for segment in segments if segment[0] == _PT_DYNAMIC), None)
        if load is None or dynamic is None:
            raise VdsoError("no loadable or no dynamic segment")
        # Addresses are relative to where the first segment is loaded, which is the image's begin.
        self.bias = load[2] - load[3]
        self._tags: dict[int, int] = {}
        for offset in range(dynamic[2], dynamic[2] + dynamic[5], 16):
            tag, value = self._unpack("<QQ", offset)
            if tag == 0:
                break
            self._tags.setdefault(tag, value)

    def symbols(self) -> Iterator[tuple[int, str, int]]:
        """Index, name and address of each defined function."""
        table = self._address(_DT_SYMTAB)
        for index in range(1, self._symbol_count()):
            name, info, _, section, value = self._unpack("<IBBHQ", table + index * 24)
            if section and info & 0xF in _CODE_TYPES and info >> 4 in _VISIBLE:
                yield index, self._string(name), value

    def version(self, index: int) -> str | None:
        """A symbol's version; ``None`` where the image has no versions."""
        if _DT_VERSYM not in self._tags or _DT_VERDEF not in self._tags:
            return None
        (number,) = self._unpack("<H", self._address(_DT_VERSYM) + 2 * index)
        at = self._address(_DT_VERDEF)
        for _ in range(self._tags.get(_DT_VERDEFNUM, 0)):
            _, _, found, _, _, names, following = self._unpack("<HHHHIII", at)
            if found == number & 0x7FFF:
                return self._string(self._unpack("<I", at + names)[0])
            if not following:
                break
            at += following
        return ""

    def _symbol_count(self) -> int:
        if _DT_HASH in self._tags:
            return int(self._unpack("<II", self._address(_DT_HASH))[1])
        # Newer kernels link with the GNU hash only: the last symbol ends the last chain.
        at = self._address(_DT_GNU_HASH)
        buckets, first, words, _ = self._unpack("<4I", at)
        start = at + 16 + 8 * words
        last = max(self._unpack(f"<{min(buckets, _MAX_IMAGE)}I", start), default=0)
        if last < first:
            return int(first)
        while not self._unpack("<I", start + 4 * (buckets + last - first))[0] & 1:
            last += 1
        return int(last) + 1

    def _address(self, tag: int) -> int:
        if tag not in self._tags:
            raise VdsoError(f"the dynamic section lacks tag {tag:#x}")
        return int(self._tags[tag] + self.bias)

    def _string(self, offset: int) -> str:
        start = self._address(_DT_STRTAB) + offset
        end = self._data.find(b"\0", start)
        if not 0 <= start < len(self._data) or end < 0:
            raise VdsoError("a name outside the image")
        return self._data[start:end].decode("latin-1")

    def _unpack(self, layout: str, offset: int) -> tuple[Any, ...]:
        if not 0 <= offset <= len(self._data) - struct.calcsize(layout):
            raise VdsoError(f"ends before offset {offset:#x}")
        return struct.unpack_from(layout, self._data, offset)


def find_symbol(image: bytes, name: str, version: str = VERSION) -> int | None:
    """The offset in bytes of a function in a vDSO image, or ``None`` if it has none of that name and version.

    Args:
        version: ignored where the image has no symbol versions.

    Raises:
        VdsoError: the image is damaged.
    """
    elf = _Image(image)
    for index, found, value in elf.symbols():
        if found == name and elf.version(index) in (None, version):
            return int(value + elf.bias)
    return None


def process_vdso() -> tuple[int, bytes] | None:
    """Address and contents of this process's vDSO, or ``None`` where the kernel gives none."""
    base = auxiliary_value(_AT_SYSINFO_EHDR)
    if not base:
        return None
    with open("/proc/self/maps", encoding="ascii", errors="replace") as maps:
        for line in maps:
            start, _, end = line.partition(" ")[0].partition("-")
            if int(start, 16) == base:
                return base, ctypes.string_at(base, min(int(end, 16) - base, _MAX_IMAGE))
    return None


@cache
def enter_function() -> int:
    """The address of ``__vdso_sgx_enter_enclave``.

    Raises:
        PlatformError: ``tee.sgx.vdso``: the kernel's vDSO lacks it.
    """
    found = process_vdso()
    offset = None
    reason = "the kernel gives this process no vDSO"
    if found is not None:
        reason = f"the vDSO has no {SYMBOL}"
        try:
            offset = find_symbol(found[1], SYMBOL)
        except VdsoError as error:
            reason = f"the vDSO cannot be read: {error}"
    if found is None or offset is None:
        raise PlatformError(
            "enclaves cannot be entered on this kernel",
            id="tee.sgx.vdso",
            found=reason,
            remedy="use a kernel 5.11 or newer with CONFIG_X86_SGX, without the boot option vdso=0",
        )
    return found[0] + offset


class EnclaveRun(ctypes.Structure):
    """``struct sgx_enclave_run``, 256 bytes: the reserved bytes have to be zero."""

    _fields_ = (
        ("tcs", ctypes.c_uint64),
        ("function", ctypes.c_uint32),
        ("exception_vector", ctypes.c_uint16),
        ("exception_error_code", ctypes.c_uint16),
        ("exception_addr", ctypes.c_uint64),
        ("user_handler", ctypes.c_uint64),
        ("user_data", ctypes.c_uint64),
        ("reserved", ctypes.c_uint8 * 216),
    )


@dataclass(frozen=True, slots=True)
class Exit:
    """How an enclave was left.

    Attributes:
        function: EEXIT; or EENTER or ERESUME, the ENCLU that met the exception.
        vector: the exception's vector, where there was one.
        error_code: its error code, 16 bits; of a page fault bit 15 says that the EPCM refused.
        address: of a page fault, with the lower 12 bits zero where it was in the enclave.
        registers: RDI, RSI, RDX, R8 and R9 as the enclave left them.
    """

    function: int
    vector: int
    error_code: int
    address: int
    registers: tuple[int, int, int, int, int]

    @property
    def exited(self) -> bool:
        """Whether the enclave left by itself (EEXIT)."""
        return self.function == Enclu.EEXIT


# int f(rdi, rsi, rdx, function, r8, r9, run, target, out): calls target as the kernel declares it and keeps what an
# enclave may change although the x86-64 ABI wants it kept: rbx, r12–r15, MXCSR, the x87 control word and stack, DF.
_TRAMPOLINE = bytes.fromhex(
    "55 4889e5 53 4154 4155 4156 4157"  # push rbp; mov rbp,rsp; push rbx, r12, r13, r14, r15
    "4883ec18 0fae5dd0 d97dd4"  # sub rsp,24; stmxcsr [rbp-0x30]; fnstcw [rbp-0x2c]
    "ff7510 ff7510 ff5518"  # push [rbp+16] twice (the second is run, the stack stays aligned); call [rbp+24]
    "fc 488b5d20"  # cld; mov rbx,[rbp+32]
    "48893b 48897308 48895310 4c894318 4c894b20"  # mov [rbx],rdi; +8 rsi; +16 rdx; +24 r8; +32 r9
    "dbe3 d96dd4 0fae55d0"  # fninit; fldcw [rbp-0x2c]; ldmxcsr [rbp-0x30]
    "488d65d8 415f 415e 415d 415c 5b 5d c3"  # lea rsp,[rbp-0x28]; pop r15, r14, r13, r12, rbx, rbp; ret
)


@cache
def _trampoline(syscalls: Syscalls) -> int:
    return executable(_TRAMPOLINE, syscalls)


class Gate:
    """The way into enclaves.

    Args:
        target: address of the kernel's function, by default the vDSO's.

    Raises:
        PlatformError: ``tee.sgx.vdso``, or executable memory is forbidden.
    """

    def __init__(self, target: int | None = None, *, syscalls: Syscalls = LINUX) -> None:
        self._target = enter_function() if target is None else target
        try:
            address = _trampoline(syscalls)
        except OSError as error:
            raise PlatformError(
                "enclaves cannot be entered by this process",
                id="tee.sgx.executable",
                found=f"executable memory is refused: {error.strerror}",
                remedy="allow it (SELinux: execmem)",
            ) from None
        word = ctypes.c_uint64
        # ctypes releases the interpreter's lock for the time in the enclave.
        self._call = ctypes.CFUNCTYPE(
            ctypes.c_int,
            word,
            word,
            word,
            ctypes.c_uint32,
            word,
            word,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_void_p,
        )(address)

    def enter(
        self,
        tcs: int,
        *,
        rdi: int = 0,
        rsi: int = 0,
        rdx: int = 0,
        r8: int = 0,
        r9: int = 0,
        function: Enclu = Enclu.EENTER,
    ) -> Exit:
        """EENTER or ERESUME, until the enclave leaves. Interrupts are resumed by the vDSO itself.

        Args:
            tcs: linear address of the TCS.

        Raises:
            PlatformError: ``tee.sgx.vdso``: the kernel refuses the call.
        """
        run = EnclaveRun(tcs=tcs)
        out = (ctypes.c_uint64 * 5)()
        result = self._call(rdi, rsi, rdx, function, r8, r9, ctypes.addressof(run), self._target, ctypes.addressof(out))
        if result < 0:
            raise PlatformError(
                f"{SYMBOL} refuses the call", id="tee.sgx.vdso", found=os.strerror(-result), remedy="report this"
            )
        return Exit(
            run.function,
            run.exception_vector,
            run.exception_error_code,
            run.exception_addr,
            (out[0], out[1], out[2], out[3], out[4]),
        )


_EXCEPTIONS = {
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


def fault(left: Exit, base: int, size: int) -> PlatformError:
    """The error for an enclave that did not leave by itself.

    Args:
        base: the enclave's linear address.
        size: its size in bytes.
    """
    name = _EXCEPTIONS.get(left.vector, f"exception {left.vector}")
    where = ""
    if left.vector == 14:
        place = left.address - base
        where = f" at offset {place:#x}" if 0 <= place < size else f" at {left.address:#x}, outside the enclave"
        where += f", error code {left.error_code:#x}"
    # After a sleep the EPC is gone: entering faults with #GP or, as the EPCM refuses, with #PF and bit 15.
    lost = left.function == Enclu.EENTER or (left.vector == 14 and left.error_code >> 15)
    return PlatformError(
        "the enclave cannot be entered" if left.function == Enclu.EENTER else "the enclave's code failed",
        id="tee.sgx.fault",
        found=f"{name}{where}",
        remedy="start the enclave again: its memory is lost after the machine slept or a virtual machine moved"
        if lost
        else "start the enclave again; if it happens again, report this with the output of inclavare sgx selftest",
    )
