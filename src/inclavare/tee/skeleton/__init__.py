"""The skeleton enclave: our own, in assembly, the same bytes on the emulator and on SGX hardware.

``skeleton.S`` is its source, ``skeleton.bin`` the page of code that it assembles to, ``skeleton.lst`` the listing of
that. One thread, two SSA frames, no SDK. What it does is said in :mod:`.protocol`.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files

from ...sgx.image import PAGE_SIZE, PT_REG, PT_TCS, SECINFO_R, SECINFO_W, SECINFO_X, EnclaveImage, PageRun
from ...sgx.structs import ATTRIBUTE_DEBUG, ATTRIBUTE_MODE64BIT, XFRM_LEGACY, Tcs

#: SECS.SIZE in bytes.
SIZE = 0x10000
#: Offsets in bytes from the enclave's base, as in ``skeleton.S``.
CODE = 0
DATA = 0x1000
INPUT = 0x2000
OUTPUT = 0x4000
STACK_TOP = 0x8000
SSA = 0x8000
TCS = 0xA000
#: SSA frames, of one page each.
NSSA = 2


@cache
def code() -> bytes:
    """The page of code, 4096 bytes; the entry point is its first byte."""
    return files(__name__).joinpath("skeleton.bin").read_bytes()


@cache
def symbols() -> dict[int, str]:
    """The labels of the code by their offsets in bytes, from the listing."""
    listing = files(__name__).joinpath("skeleton.lst").read_text(encoding="utf-8")
    return {int(offset, 16): name for offset, name in re.findall(r"^([0-9a-f]{16}) <(\w+)>:$", listing, re.MULTILINE)}


def image(*, debug: bool = False) -> EnclaveImage:
    """The enclave as it is loaded: 11 pages with its SECS.

    Args:
        debug: set ATTRIBUTES.DEBUG. MRENCLAVE stays the same; keys and reports do not, and the debug operations work.
    """
    tcs = Tcs(ossa=SSA, nssa=NSSA, oentry=CODE, ofsbase=DATA, ogsbase=DATA)
    writable = PT_REG | SECINFO_R | SECINFO_W
    return EnclaveImage(
        size=SIZE,
        ssa_frame_size=1,
        attributes=ATTRIBUTE_MODE64BIT | (ATTRIBUTE_DEBUG if debug else 0),
        xfrm=XFRM_LEGACY,
        miscselect=0,
        runs=(
            PageRun(CODE, PT_REG | SECINFO_R | SECINFO_X, 1, code()),
            PageRun(DATA, writable, 5),
            PageRun(STACK_TOP - PAGE_SIZE, writable, 1),
            PageRun(SSA, writable, NSSA),
            PageRun(TCS, PT_TCS, 1, tcs.to_bytes()),
        ),
    )
