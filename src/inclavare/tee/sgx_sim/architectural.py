"""The platform's own enclaves: the quoting enclaves (QE, TD QE) and the provisioning certification enclave (PCE).

They are loaded on the simulated processor like any other enclave, but into memory of their own, outside of the EPC
ledger.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from ...sgx import sigstruct
from ...sgx.image import PAGE_SIZE, PT_REG, PT_TCS, SECINFO_R, SECINFO_W, SECINFO_X, EnclaveImage, PageRun
from ...sgx.keys import KEY_PROVISION_SEAL, KEY_SEAL, POLICY_MRSIGNER
from ...sgx.measure import measure
from ...sgx.structs import (
    ATTRIBUTE_DEBUG,
    ATTRIBUTE_INIT,
    ATTRIBUTE_MODE64BIT,
    ATTRIBUTE_PROVISIONKEY,
    XFRM_LEGACY,
    Attributes,
    KeyRequest,
    Sigstruct,
    TargetInfo,
    Tcs,
)
from .cpu import Processor, Secs, identity

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

_FLAGS = ATTRIBUTE_MODE64BIT | ATTRIBUTE_PROVISIONKEY
#: What the QE identity asks of the QE's ATTRIBUTES.FLAGS, as Intel's does: MODE64BIT is left open.
QE_FLAGS_IDENTITY = ATTRIBUTE_INIT | ATTRIBUTE_PROVISIONKEY
QE_FLAGS_MASK = (1 << 64) - 1 & ~ATTRIBUTE_MODE64BIT


@dataclass(frozen=True, slots=True)
class Architectural:
    """An architectural enclave's name and version."""

    name: str
    isv_prod_id: int
    isv_svn: int


QE = Architectural("quoting enclave", isv_prod_id=1, isv_svn=1)
TD_QE = Architectural("TD quoting enclave", isv_prod_id=2, isv_svn=1)
PCE = Architectural("provisioning certification enclave", isv_prod_id=2, isv_svn=1)


@cache
def image(enclave: Architectural) -> EnclaveImage:
    """Its pages: one that names it, and one thread."""
    text = f"inclavare sgx-sim {enclave.name} {enclave.isv_svn}".encode().ljust(PAGE_SIZE, b"\0")
    tcs = Tcs(ossa=2 * PAGE_SIZE, nssa=1)
    return EnclaveImage(
        size=4 * PAGE_SIZE,
        ssa_frame_size=1,
        attributes=_FLAGS,
        xfrm=XFRM_LEGACY,
        miscselect=0,
        runs=(
            PageRun(0, PT_REG | SECINFO_R | SECINFO_X, 1, text),
            PageRun(PAGE_SIZE, PT_TCS, 1, tcs.to_bytes()),
            PageRun(2 * PAGE_SIZE, PT_REG | SECINFO_R | SECINFO_W, 1),
        ),
    )


def sign(enclave: Architectural, signer: RSAPrivateKey) -> bytes:
    """Its SIGSTRUCT, 1808 bytes."""
    pages = image(enclave)
    return sigstruct.sign(
        measure(pages),
        signer,
        attributes=_FLAGS,
        attribute_mask=(1 << 64) - 1,
        xfrm=XFRM_LEGACY,
        xfrm_mask=XFRM_LEGACY,
        miscselect=0,
        misc_mask=0xFFFFFFFF,
        isv_prod_id=enclave.isv_prod_id,
        isv_svn=enclave.isv_svn,
        date=0x20250101,
    ).to_bytes()


def load(processor: Processor, enclave: Architectural, signature: bytes) -> Secs:
    """Load it on the processor.

    Raises:
        IntegrityError: the SIGSTRUCT is not this enclave's.
    """
    return processor.load(image(enclave), signature, architectural=True)


@contextlib.contextmanager
def loaded(processor: Processor, enclave: Architectural, signature: bytes) -> Iterator[Secs]:
    """Like :func:`load`, and removed afterwards."""
    secs = load(processor, enclave, signature)
    try:
        yield secs
    finally:
        processor.eremove(secs)


def target_info(enclave: Architectural) -> TargetInfo:
    """Its TARGETINFO, which depends on its pages and attributes only."""
    pages = image(enclave)
    return TargetInfo(
        mrenclave=measure(pages),
        attributes=Attributes(pages.attributes | ATTRIBUTE_INIT, pages.xfrm).to_bytes(),
        miscselect=pages.miscselect,
    )


def mrsigner(signature: bytes) -> bytes:
    """MRSIGNER of a 1808-byte SIGSTRUCT."""
    return sigstruct.mrsigner(Sigstruct.from_bytes(signature).modulus)


def pck_key(processor: Processor, pce: Secs) -> EllipticCurvePrivateKey:
    """The provisioning certification key of the processor's CPUSVN, which the PCE derives from its provisioning seal
    key."""
    return _ec_key(_own_key(processor, pce, KEY_PROVISION_SEAL), b"PCK")


def ppid(processor: Processor, pce: Secs) -> bytes:
    """The platform provisioning id, 16 bytes, the same under every CPUSVN."""
    return hashlib.sha256(b"PPID" + _own_key(processor, pce, KEY_PROVISION_SEAL, cpusvn=bytes(16))).digest()[:16]


def attestation_key(processor: Processor, qe: Secs) -> EllipticCurvePrivateKey:
    """The key that signs quotes, which the QE derives from its seal key."""
    return _ec_key(_own_key(processor, qe, KEY_SEAL), b"attestation key")


def qe_id(processor: Processor, qe: Secs) -> bytes:
    """The QE's id on this platform, 16 bytes, for the quote header's user data; the same under every CPUSVN."""
    return hashlib.sha256(b"QE-ID" + _own_key(processor, qe, KEY_SEAL, cpusvn=bytes(16))).digest()[:16]


def _own_key(processor: Processor, enclave: Secs, name: int, *, cpusvn: bytes | None = None) -> bytes:
    request = KeyRequest(
        key_name=name,
        key_policy=POLICY_MRSIGNER if name == KEY_SEAL else 0,
        isv_svn=identity(enclave).isv_svn,
        cpusvn=processor.cpusvn if cpusvn is None else cpusvn,
        attribute_mask=Attributes(ATTRIBUTE_INIT | ATTRIBUTE_DEBUG | ATTRIBUTE_PROVISIONKEY, 0).to_bytes(),
    )
    return processor.egetkey(enclave, request)


def _ec_key(secret: bytes, purpose: bytes) -> EllipticCurvePrivateKey:
    """A P-256 key from 16 secret bytes (FIPS 186-5, A.2.1: 64 extra bits make the bias negligible)."""
    from cryptography.hazmat.primitives.asymmetric import ec

    order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
    wide = int.from_bytes(hashlib.sha512(purpose + b"\0" + secret).digest()[:40], "big")
    return ec.derive_private_key(wide % (order - 1) + 1, ec.SECP256R1())
