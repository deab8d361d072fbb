"""Checks that do not depend on how pages are kept, shared by both simulated processors.

Each function is one step of a leaf's pseudo-code (SDM vol. 3D, chapter 40). It raises a
:class:`~.faults.Fault` where the processor faults, and a :class:`~.faults.LeafError` where it reports a code in RAX;
both name the rule. This module imports neither the rest of the package nor a cryptographic library.
"""

from __future__ import annotations

from dataclasses import dataclass

from ....errors import IntegrityError
from ....sgx import sigstruct
from ....sgx.codes import Status
from ....sgx.image import PAGE_SIZE
from ....sgx.keys import RootKeys
from ....sgx.paging import PT_REG, PT_TCS, SECINFO_KNOWN, SECINFO_PT, SECINFO_R, SECINFO_RWX, SECINFO_W
from ....sgx.ssa import GPRSGX_SIZE, MISC_KNOWN, misc_size, xsave_size
from ....sgx.structs import (
    ATTRIBUTE_AEXNOTIFY,
    ATTRIBUTE_CET,
    ATTRIBUTE_EINITTOKENKEY,
    ATTRIBUTE_INIT,
    ATTRIBUTE_KSS,
    ATTRIBUTE_MODE64BIT,
    ATTRIBUTES_KNOWN,
    Attributes,
    SecInfo,
    Secs,
    Sigstruct,
    StructureError,
    Tcs,
)
from ....sgx.tokens import TokenRefused, check_token
from .faults import GeneralProtection, LeafError
from .space import is_canonical
from .xsave import XFRM_SUPPORTED, is_legal

#: TCS.FLAGS.
TCS_DBGOPTIN = 1 << 0
TCS_AEXNOTIFY = 1 << 1
TCS_FLAGS_KNOWN = TCS_DBGOPTIN | TCS_AEXNOTIFY

_VENDOR_INTEL = 0x8086


@dataclass(frozen=True, slots=True)
class Features:
    """What CPUID and IA32_FEATURE_CONTROL say about a processor.

    Attributes:
        sgx: CPUID.7.EBX[2]; without it ENCLS and ENCLU are #UD.
        enabled: IA32_FEATURE_CONTROL has LOCK and SGX_ENABLE; without them they are #GP.
        sgx2: EAUG, EMODPR, EMODT, EACCEPT, EACCEPTCOPY, EMODPE.
        oversub: ERDINFO, ETRACKC, ELDBC, ELDUC.
        aexnotify: EDECCSSA and ATTRIBUTES.AEXNOTIFY.
        kss: key separation and sharing.
        xfrm: state components, CPUID.12H.1:ECX and EDX.
        miscselect: CPUID.12H.0:EBX.
        max_size_32: CPUID.12H.0:EDX[7:0]: 32-bit enclaves are smaller than two to this power, in bytes.
        max_size_64: CPUID.12H.0:EDX[15:8], likewise for 64-bit enclaves.
    """

    sgx: bool = True
    enabled: bool = True
    sgx2: bool = True
    oversub: bool = True
    aexnotify: bool = True
    kss: bool = True
    xfrm: int = XFRM_SUPPORTED
    miscselect: int = MISC_KNOWN
    max_size_32: int = 31
    max_size_64: int = 56

    @property
    def attributes(self) -> int:
        """ATTRIBUTES.FLAGS that ECREATE accepts (CR_SGX_ATTRIBUTES_MASK). There is no CET."""
        mask = ATTRIBUTES_KNOWN & ~(ATTRIBUTE_INIT | ATTRIBUTE_CET | ATTRIBUTE_KSS | ATTRIBUTE_AEXNOTIFY)
        return mask | self.kss * ATTRIBUTE_KSS | self.aexnotify * ATTRIBUTE_AEXNOTIFY


def secinfo(data: bytes, rule: str) -> int:
    """SECINFO.FLAGS of 64 bytes.

    Raises:
        GeneralProtection: a reserved byte or flag is set.
    """
    try:
        flags = SecInfo.from_bytes(data).flags
    except StructureError:
        raise GeneralProtection(rule) from None
    if flags & ~SECINFO_KNOWN:
        raise GeneralProtection(rule)
    return flags


def check_secs(secs: Secs, features: Features) -> None:
    """ECREATE: the SECS in its source page, whose reserved bytes were seen to be zero.

    Raises:
        GeneralProtection: ``ecreate.xfrm``, ``.miscselect``, ``.ssaframesize``, ``.base``, ``.size``, ``.attributes``,
            ``.cet`` or ``.config``.
    """
    attributes = Attributes.from_bytes(secs.attributes)
    mode64 = bool(attributes.flags & ATTRIBUTE_MODE64BIT)
    if attributes.xfrm & ~features.xfrm or not is_legal(attributes.xfrm):
        raise GeneralProtection("ecreate.xfrm")
    if secs.miscselect & ~features.miscselect:
        raise GeneralProtection("ecreate.miscselect")
    state = xsave_size(attributes.xfrm) + GPRSGX_SIZE + misc_size(secs.miscselect)
    if secs.ssa_frame_size * PAGE_SIZE < state:
        raise GeneralProtection("ecreate.ssaframesize")
    if not is_canonical(secs.base) if mode64 else secs.base >> 32:
        raise GeneralProtection("ecreate.base")
    if secs.size >= 1 << (features.max_size_64 if mode64 else features.max_size_32):
        raise GeneralProtection("ecreate.size")
    if secs.size < 2 * PAGE_SIZE or secs.size & (secs.size - 1):
        raise GeneralProtection("ecreate.size")
    if secs.base & (secs.size - 1):
        raise GeneralProtection("ecreate.base")
    if attributes.flags & ~features.attributes:
        raise GeneralProtection("ecreate.attributes")
    if secs.cet_attributes or secs.cet_legacy_bitmap or secs.cet_leg_bitmap_size:
        raise GeneralProtection("ecreate.cet")
    if (any(secs.config_id) or secs.config_svn) and not attributes.flags & ATTRIBUTE_KSS:
        raise GeneralProtection("ecreate.config")


def check_secinfo_eadd(flags: int) -> None:
    """EADD: SECINFO.FLAGS, whose undefined bits were seen to be zero, describe a page that can be added.

    Raises:
        GeneralProtection: ``eadd.secinfo``: a page type or state that EADD does not know, or W without R.
    """
    kind = flags & SECINFO_PT
    if kind not in (PT_REG, PT_TCS) or flags & ~(SECINFO_RWX | SECINFO_PT):
        raise GeneralProtection("eadd.secinfo")
    if kind == PT_REG and flags & SECINFO_W and not flags & SECINFO_R:
        raise GeneralProtection("eadd.secinfo")


def check_tcs(data: bytes, *, mode64: bool, rule: str) -> Tcs:
    """EADD and EACCEPT: a TCS page of 4096 bytes has no reserved bit set and, for 32 bits, limits that end in FFFH.

    Raises:
        GeneralProtection: ``rule``.
    """
    try:
        tcs = Tcs.from_bytes(data)
    except StructureError:
        raise GeneralProtection(rule) from None
    if tcs.flags & ~TCS_FLAGS_KNOWN:
        raise GeneralProtection(rule)
    if not mode64 and (tcs.fslimit & 0xFFF != 0xFFF or tcs.gslimit & 0xFFF != 0xFFF):
        raise GeneralProtection(rule)
    return tcs


def check_sigstruct(data: bytes) -> Sigstruct:
    """EINIT: the SIGSTRUCT, 1808 bytes, is well-formed and its signature verifies.

    Raises:
        LeafError: SGX_INVALID_SIG_STRUCT or SGX_INVALID_SIGNATURE; ``sigstruct.`` and the field.
    """
    try:
        signed = Sigstruct.from_bytes(data)
    except StructureError as error:
        raise LeafError(Status.SGX_INVALID_SIG_STRUCT, error.id.removeprefix("sgx.")) from error
    if signed.vendor not in (0, _VENDOR_INTEL):
        raise LeafError(Status.SGX_INVALID_SIG_STRUCT, "sigstruct.vendor")
    if signed.exponent != sigstruct.RSA_EXPONENT:
        raise LeafError(Status.SGX_INVALID_SIG_STRUCT, "sigstruct.exponent")
    try:
        sigstruct.verify(signed)
    except IntegrityError as error:
        raise LeafError(Status.SGX_INVALID_SIGNATURE, error.id.removeprefix("sgx.")) from error
    return signed


def check_family(attributes: Attributes, signed: Sigstruct) -> None:
    """EINIT: ISVFAMILYID needs an enclave with KSS.

    Raises:
        LeafError: SGX_INVALID_SIG_STRUCT; ``einit.isvfamilyid``.
    """
    if any(signed.isv_family_id) and not attributes.flags & ATTRIBUTE_KSS:
        raise LeafError(Status.SGX_INVALID_SIG_STRUCT, "einit.isvfamilyid")


def check_measurement(signed: Sigstruct, mrenclave: bytes) -> None:
    """EINIT: the signer meant this enclave.

    Raises:
        LeafError: SGX_INVALID_MEASUREMENT; ``einit.enclavehash``.
    """
    if signed.enclave_hash != mrenclave:
        raise LeafError(Status.SGX_INVALID_MEASUREMENT, "einit.enclavehash")


def check_controlled_attributes(attributes: Attributes, mrsigner: bytes, le_pubkey_hash: bytes) -> None:
    """EINIT: only the launch enclave may have the key that EINITTOKENs are made with.

    Raises:
        LeafError: SGX_INVALID_ATTRIBUTE; ``einit.controlled``.
    """
    if attributes.flags & ATTRIBUTE_EINITTOKENKEY and mrsigner != le_pubkey_hash:
        raise LeafError(Status.SGX_INVALID_ATTRIBUTE, "einit.controlled")


def check_signed_attributes(attributes: Attributes, miscselect: int, signed: Sigstruct) -> None:
    """EINIT: the enclave is what its signer allows, in the bits that the masks select.

    Raises:
        LeafError: SGX_INVALID_ATTRIBUTE; ``einit.attributes``, ``einit.cet`` or ``einit.miscselect``.
    """
    mask = Attributes.from_bytes(signed.attribute_mask)
    if attributes.masked(mask) != Attributes.from_bytes(signed.attributes).masked(mask):
        raise LeafError(Status.SGX_INVALID_ATTRIBUTE, "einit.attributes")
    # SECS.CET_ATTRIBUTES is zero on a processor without CET.
    if signed.cet_attributes & signed.cet_attributes_mask:
        raise LeafError(Status.SGX_INVALID_ATTRIBUTE, "einit.cet")
    if miscselect & signed.misc_mask != signed.miscselect & signed.misc_mask:
        raise LeafError(Status.SGX_INVALID_ATTRIBUTE, "einit.miscselect")


def check_launch(
    attributes: Attributes, mrenclave: bytes, mrsigner: bytes, token: bytes, roots: RootKeys, le_pubkey_hash: bytes
) -> None:
    """EINIT: launch control. Without a valid token the signer must be the one of IA32_SGXLEPUBKEYHASH.

    Args:
        token: EINITTOKEN, 304 bytes.

    Raises:
        LeafError: SGX_INVALID_EINITTOKEN, SGX_INVALID_CPUSVN, SGX_INVALID_MEASUREMENT or SGX_INVALID_ATTRIBUTE;
            ``einittoken.`` and what is wrong (:func:`inclavare.sgx.tokens.check_token`).
    """
    try:
        check_token(token, roots, le_pubkey_hash, mrenclave=mrenclave, mrsigner=mrsigner, attributes=attributes)
    except TokenRefused as error:
        raise LeafError(error.status, error.id.removeprefix("sgx.")) from error
