"""Small enclaves and their signatures, for tests that load them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from cryptography.hazmat.primitives.asymmetric import rsa

from inclavare.sgx.image import PAGE_SIZE, PT_REG, PT_TCS, SECINFO_R, SECINFO_W, SECINFO_X, EnclaveImage, PageRun
from inclavare.sgx.measure import measure
from inclavare.sgx.sigstruct import sign
from inclavare.sgx.structs import ATTRIBUTE_DEBUG, ATTRIBUTE_MODE64BIT, XFRM_LEGACY, Sigstruct, Tcs

ALL_BUT_DEBUG = (1 << 64) - 1 & ~ATTRIBUTE_DEBUG


@dataclass(frozen=True)
class Signers:
    """Two enclave signers."""

    ours: rsa.RSAPrivateKey
    theirs: rsa.RSAPrivateKey


def small_image(content: bytes = b"code", *, debug: bool = False, heap_pages: int = 4) -> EnclaveImage:
    """A 64-bit enclave with a page of code, one thread and some heap."""
    heap = 3 * PAGE_SIZE
    size = 1 << max(14, (heap + heap_pages * PAGE_SIZE - 1).bit_length())
    return EnclaveImage(
        size=size,
        ssa_frame_size=1,
        attributes=ATTRIBUTE_MODE64BIT | (ATTRIBUTE_DEBUG if debug else 0),
        xfrm=XFRM_LEGACY,
        miscselect=0,
        runs=(
            PageRun(0, PT_REG | SECINFO_R | SECINFO_X, 1, content.ljust(PAGE_SIZE, b"\0")),
            PageRun(PAGE_SIZE, PT_TCS, 1, Tcs(ossa=2 * PAGE_SIZE).to_bytes()),
            PageRun(2 * PAGE_SIZE, PT_REG | SECINFO_R | SECINFO_W, 1),
            PageRun(heap, PT_REG | SECINFO_R | SECINFO_W, heap_pages, None, measured=False),
        ),
    )


def sign_image(image: EnclaveImage, key: rsa.RSAPrivateKey, **overrides: Any) -> Sigstruct:
    """A SIGSTRUCT over the image, as its signer would make it; ``overrides`` replace arguments of ``sign``."""
    arguments: dict[str, Any] = {
        "attributes": image.attributes,
        "attribute_mask": ALL_BUT_DEBUG,
        "xfrm": image.xfrm,
        "xfrm_mask": XFRM_LEGACY,
        "miscselect": image.miscselect,
        "misc_mask": 0xFFFFFFFF,
        "isv_prod_id": 7,
        "isv_svn": 3,
        "date": 0x20260131,
    }
    return sign(measure(image), key, **{**arguments, **overrides})


def resigned(signed: Sigstruct, **fields: Any) -> bytes:
    """The SIGSTRUCT with other fields and the old signature."""
    return replace(signed, **fields).to_bytes()
