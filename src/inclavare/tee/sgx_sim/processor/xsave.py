"""XSAVE state components in the standard (non-compacted) format, as SSA frames hold them (SDM vol. 1, chapter 13)."""

from __future__ import annotations

import struct

from ....sgx.ssa import XSAVE_COMPONENTS, XSAVE_LEGACY_SIZE, XSAVE_MINIMUM, xsave_size
from .faults import GeneralProtection

#: Every component that this processor has: x87, SSE, AVX, AVX-512, PKRU, AMX.
XFRM_SUPPORTED = 0x602E7

_X87, _SSE = 1 << 0, 1 << 1
_HEADER = struct.Struct("<QQ48x")
_MXCSR = slice(24, 28)
_MXCSR_RESERVED = 0xFFFF_0000
#: Where the legacy region keeps x87 (control, status, tag, pointers; then ST0–7) and SSE (MXCSR and its mask; XMM0–15).
_X87_PARTS = (slice(0, 24), slice(32, 160))
_SSE_PARTS = (_MXCSR, slice(160, 416))


def _init_image() -> bytes:
    image = bytearray(xsave_size(XFRM_SUPPORTED))
    image[0:2] = (0x037F).to_bytes(2, "little")
    image[_MXCSR] = (0x1F80).to_bytes(4, "little")
    return bytes(image)


#: The INIT state: FCW 37FH, MXCSR 1F80H, everything else zero.
INIT_IMAGE = _init_image()


def _parts(bit: int) -> tuple[slice, ...]:
    if bit == 0:
        return _X87_PARTS
    if bit == 1:
        return _SSE_PARTS
    _, offset, size = XSAVE_COMPONENTS[bit]
    return (slice(offset, offset + size),)


def _bits(mask: int) -> list[int]:
    return [bit for bit in range(mask.bit_length()) if mask >> bit & 1]


def save(image: bytes, area: bytes, xfrm: int) -> bytes:
    """XSAVE: ``area`` (``xsave_size(xfrm)`` bytes) with the components of ``xfrm`` written into it.

    A component in its INIT state is stored like the others, but XSTATE_BV tells that it is not in use.
    """
    out = bytearray(area)
    in_use = 0
    for bit in _bits(xfrm):
        for part in _parts(bit):
            out[part] = image[part]
            if image[part] != INIT_IMAGE[part]:
                in_use |= 1 << bit
    out[XSAVE_LEGACY_SIZE:XSAVE_MINIMUM] = _HEADER.pack(in_use, 0)
    return bytes(out)


def restore(image: bytes, area: bytes, xfrm: int) -> bytes:
    """XRSTOR: ``image`` with the components of ``xfrm`` taken from ``area``, or initialised where it holds none.

    Raises:
        GeneralProtection: the header names components outside of ``xfrm``, is compacted or has a reserved byte set,
            or MXCSR has a reserved bit.
    """
    header = area[XSAVE_LEGACY_SIZE:XSAVE_MINIMUM]
    in_use, compacted = _HEADER.unpack(header)
    if in_use & ~xfrm:
        raise GeneralProtection("xrstor.xstate_bv")
    if compacted or any(header[16:]):
        raise GeneralProtection("xrstor.header")
    if int.from_bytes(area[_MXCSR], "little") & _MXCSR_RESERVED:
        raise GeneralProtection("xrstor.mxcsr")
    out = bytearray(image)
    for bit in _bits(xfrm):
        source = area if in_use >> bit & 1 else INIT_IMAGE
        for part in _parts(bit):
            out[part] = source[part]
    return bytes(out)


def initialise(image: bytes, xfrm: int) -> bytes:
    """``image`` with the components of ``xfrm`` in their INIT state."""
    out = bytearray(image)
    for bit in _bits(xfrm):
        for part in _parts(bit):
            out[part] = INIT_IMAGE[part]
    return bytes(out)


def is_legal(xfrm: int) -> bool:
    """Whether XSETBV would accept ``xfrm`` for XCR0 (SDM vol. 1, 13.3) and SGX for XFRM (x87 and SSE are set)."""
    if xfrm & (_X87 | _SSE) != _X87 | _SSE or xfrm & ~XFRM_SUPPORTED:
        return False
    avx512, amx = xfrm >> 5 & 7, xfrm >> 17 & 3
    return avx512 in (0, 7) and amx in (0, 3) and not (avx512 and not xfrm & 1 << 2)
