"""CPUID of machines with SGX, register by register."""

from __future__ import annotations

import struct

from inclavare.tee.sgx import cpuid

INTEL = struct.unpack("<3I", b"GenuineIntel")


def processor(
    *,
    highest: int = 0x20,
    features: tuple[int, int] = (1 << 2, 1 << 30),
    sgx: tuple[int, int, int] = (0b11, 1, 0x241F),
    attributes: tuple[int, int] = (0x36 | 1 << 7, 0),
    xfrm: tuple[int, int] = (0xE7, 0),
    epc: tuple[tuple[int, int, int, int], ...] = ((0x80000001, 0x20, 0x10000001, 0x3),),
) -> cpuid.Cpuid:
    """CPUID of a machine; ``epc`` are the registers of leaf 12H's subleaves from 2 on."""

    def answer(leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        if leaf == 0:
            return highest, INTEL[0], INTEL[2], INTEL[1]
        assert leaf <= highest, "a leaf beyond the highest"
        if leaf == 7:
            return 0, features[0], features[1], 0
        assert leaf == 0x12 and features[0] & 4, "undefined without the feature flag"
        if subleaf == 0:
            return sgx[0], sgx[1], 0, sgx[2]
        if subleaf == 1:
            return attributes[0], attributes[1], xfrm[0], xfrm[1]
        return epc[subleaf - 2] if subleaf - 2 < len(epc) else (0, 0, 0, 0)

    return answer
