"""What the processor says about SGX: CPUID leaves 07H and 12H (SDM vol. 3D, "Enumeration of Intel SGX").

The instruction is executed; where executable memory is forbidden, the kernel's ``/dev/cpu/0/cpuid`` is read.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from ...errors import PlatformError
from ...sgx.image import EnclaveImage
from .syscalls import executable

#: ``(leaf, subleaf) -> (eax, ebx, ecx, edx)``.
Cpuid = Callable[[int, int], tuple[int, int, int, int]]

LEAF_FEATURES = 0x07
LEAF_SGX = 0x12
_DEVICE = "/dev/cpu/0/cpuid"

# void f(edi leaf, esi subleaf, rdx out): push rbx; mov eax,edi; mov ecx,esi; mov r8,rdx; cpuid;
# mov [r8],eax; mov [r8+4],ebx; mov [r8+8],ecx; mov [r8+12],edx; pop rbx; ret
_CODE = bytes.fromhex("53 89f8 89f1 4989d0 0fa2 418900 41895804 41894808 4189500c 5b c3")


@cache
def _function() -> Callable[[int, int, int], None]:
    prototype = ctypes.CFUNCTYPE(None, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p)
    return prototype(executable(_CODE))


def execute(leaf: int, subleaf: int) -> tuple[int, int, int, int]:
    """CPUID on the current processor: EAX, EBX, ECX, EDX.

    Raises:
        PlatformError: this process may neither execute code that it makes nor read ``/dev/cpu/0/cpuid``.
    """
    out = (ctypes.c_uint32 * 4)()
    try:
        _function()(leaf, subleaf, ctypes.addressof(out))
    except OSError as error:
        return _from_device(leaf, subleaf, error)
    return out[0], out[1], out[2], out[3]


def _from_device(leaf: int, subleaf: int, error: OSError) -> tuple[int, int, int, int]:
    try:
        fd = os.open(_DEVICE, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # The position is the leaf, with the subleaf in its upper half (cpuid(4)).
            eax, ebx, ecx, edx = struct.unpack("<4I", os.pread(fd, 16, subleaf << 32 | leaf))
        finally:
            os.close(fd)
    except (OSError, struct.error):
        raise PlatformError(
            "CPUID cannot be executed",
            id="tee.sgx.cpuid",
            found=f"executable memory is refused ({error.strerror}), and {_DEVICE} cannot be read",
            remedy="allow this process executable memory (SELinux: execmem), or load the module cpuid",
        ) from None
    return eax, ebx, ecx, edx


@dataclass(frozen=True, slots=True)
class EpcSection:
    """Physical memory reserved for the EPC: address and size in bytes."""

    address: int
    size: int


@dataclass(frozen=True, slots=True)
class SgxCpu:
    """CPUID's answer.

    Attributes:
        vendor: the 12 characters of leaf 0.
        sgx: leaf 7, EBX bit 2: the processor has SGX. Firmware may have it switched off all the same.
        flc: leaf 7, ECX bit 30: flexible launch control, without which Linux loads no enclaves.
        sgx1: the leaf functions of SGX1 can be used.
        sgx2: EAUG, EMODT and the other leaf functions of SGX2.
        edeccssa: EDECCSSA, with AEX-Notify.
        miscselect: the bits that SECS.MISCSELECT may have.
        max_size_32: greatest enclave outside 64-bit mode, bytes.
        max_size_64: greatest 64-bit enclave, bytes.
        attributes: the bits that SECS.ATTRIBUTES.FLAGS may have.
        xfrm: the bits that SECS.ATTRIBUTES.XFRM may have.
        epc: the EPC's sections.
    """

    vendor: str
    sgx: bool = False
    flc: bool = False
    sgx1: bool = False
    sgx2: bool = False
    edeccssa: bool = False
    miscselect: int = 0
    max_size_32: int = 0
    max_size_64: int = 0
    attributes: int = 0
    xfrm: int = 0
    epc: tuple[EpcSection, ...] = ()

    @property
    def kss(self) -> bool:
        """Key separation and sharing: ATTRIBUTES bit 7."""
        return bool(self.attributes >> 7 & 1)

    @property
    def epc_size(self) -> int:
        """Bytes of EPC in all sections."""
        return sum(section.size for section in self.epc)


def enumerate_sgx(cpuid: Cpuid = execute) -> SgxCpu:
    """Ask the processor.

    Raises:
        PlatformError: see :func:`execute`.
    """
    highest, ebx, ecx, edx = cpuid(0, 0)
    vendor = struct.pack("<3I", ebx, edx, ecx).decode("latin-1")
    if highest < LEAF_FEATURES:
        return SgxCpu(vendor)
    _, ebx, ecx, _ = cpuid(LEAF_FEATURES, 0)
    sgx, flc = bool(ebx >> 2 & 1), bool(ecx >> 30 & 1)
    # Without the feature flag the contents of leaf 12H are undefined.
    if not sgx or highest < LEAF_SGX:
        return SgxCpu(vendor, sgx, flc)
    eax, miscselect, _, sizes = cpuid(LEAF_SGX, 0)
    attributes_low, attributes_high, xfrm_low, xfrm_high = cpuid(LEAF_SGX, 1)
    return SgxCpu(
        vendor,
        sgx,
        flc,
        sgx1=bool(eax & 1),
        sgx2=bool(eax >> 1 & 1),
        edeccssa=bool(eax >> 11 & 1),
        miscselect=miscselect,
        max_size_32=1 << (sizes & 0xFF),
        max_size_64=1 << (sizes >> 8 & 0xFF),
        attributes=attributes_high << 32 | attributes_low,
        xfrm=xfrm_high << 32 | xfrm_low,
        epc=_sections(cpuid),
    )


def _sections(cpuid: Cpuid) -> tuple[EpcSection, ...]:
    found = []
    # Subleaf 2 and up, until the first that is not valid; the bound is against a hypervisor that never ends the list.
    for subleaf in range(2, 2 + 64):
        eax, ebx, ecx, edx = cpuid(LEAF_SGX, subleaf)
        if eax & 0xF == 0:
            break
        if eax & 0xF == 1:
            size = (edx & 0xFFFFF) << 32 | ecx & 0xFFFFF000
            if size:
                found.append(EpcSection((ebx & 0xFFFFF) << 32 | eax & 0xFFFFF000, size))
    return tuple(found)


def lacking(cpu: SgxCpu, image: EnclaveImage) -> list[str]:
    """What an enclave asks for in its SECS that the processor has not; ECREATE would fault without saying which."""
    missing = []
    if image.size > cpu.max_size_64:
        missing.append(f"enclaves of {image.size:#x} bytes (at most {cpu.max_size_64:#x})")
    for name, asked, offered in (
        ("ATTRIBUTES", image.attributes, cpu.attributes),
        ("XFRM", image.xfrm, cpu.xfrm),
        ("MISCSELECT", image.miscselect, cpu.miscselect),
    ):
        if asked & ~offered:
            missing.append(f"{name} {asked & ~offered:#x}")
    return missing
