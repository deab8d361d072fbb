"""EGETKEY: which keys an enclave may derive, and how (SDM vol. 3D, EGETKEY and 38.18).

The derivation binds a key to the enclave's identity by the rules of KEYREQUEST. The processor's own pseudo-random
function is not architectural; this module uses AES-128-CMAC over a fixed layout of the architectural inputs.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from ..errors import PolicyError
from .structs import (
    ATTRIBUTE_DEBUG,
    ATTRIBUTE_EINITTOKENKEY,
    ATTRIBUTE_INIT,
    ATTRIBUTE_KSS,
    ATTRIBUTE_PROVISIONKEY,
    Attributes,
    KeyRequest,
)

#: KEYREQUEST.KEYNAME, SDM table 38-40.
KEY_EINITTOKEN = 0
KEY_PROVISION = 1
KEY_PROVISION_SEAL = 2
KEY_REPORT = 3
KEY_SEAL = 4

#: KEYREQUEST.KEYPOLICY.
POLICY_MRENCLAVE = 1 << 0
POLICY_MRSIGNER = 1 << 1
POLICY_NOISVPRODID = 1 << 2
POLICY_CONFIGID = 1 << 3
POLICY_ISVFAMILYID = 1 << 4
POLICY_ISVEXTPRODID = 1 << 5
_POLICY_KNOWN = 0x3F
_POLICY_KSS = POLICY_NOISVPRODID | POLICY_CONFIGID | POLICY_ISVFAMILYID | POLICY_ISVEXTPRODID

#: ATTRIBUTES that always enter a seal or provisioning key, whatever the mask: a debug enclave never shares a key.
_ALWAYS = ATTRIBUTE_INIT | ATTRIBUTE_DEBUG


@dataclass(frozen=True, slots=True)
class Identity:
    """What an initialised enclave's SECS says about it."""

    mrenclave: bytes
    mrsigner: bytes
    attributes: Attributes
    isv_prod_id: int
    isv_svn: int
    miscselect: int = 0
    cet_attributes: int = 0
    config_id: bytes = bytes(64)
    config_svn: int = 0
    isv_family_id: bytes = bytes(16)
    isv_ext_prod_id: bytes = bytes(16)


@dataclass(frozen=True, slots=True)
class RootKeys:
    """The processor's secrets and its security version.

    Attributes:
        provisioning: root provisioning key, 16 bytes.
        seal: root seal key, 16 bytes.
        owner_epoch: 16 bytes.
        cpusvn: the current CPUSVN, 16 bytes; this processor compares it byte by byte.
    """

    provisioning: bytes = field(repr=False)
    seal: bytes = field(repr=False)
    owner_epoch: bytes = field(repr=False)
    cpusvn: bytes


_DERIVATION = struct.Struct("<H2x16sHHBB2x16s16s16s32s32s32s16sIIH2x64sH16s")


def aes_cmac(key: bytes, message: bytes) -> bytes:
    """AES-128-CMAC (NIST SP 800-38B), 16 bytes."""
    from cryptography.hazmat.primitives.ciphers.algorithms import AES
    from cryptography.hazmat.primitives.cmac import CMAC

    mac = CMAC(AES(key))
    mac.update(message)
    return mac.finalize()


def report_key(roots: RootKeys, target: Identity, key_id: bytes) -> bytes:
    """The key with which EREPORT makes, and ``target`` checks, a report's MAC; 16 bytes."""
    return _derive(
        roots,
        KEY_REPORT,
        attributes=target.attributes,
        mrenclave=target.mrenclave,
        miscselect=target.miscselect,
        cet_attributes=target.cet_attributes,
        config_id=target.config_id,
        config_svn=target.config_svn,
        cpusvn=roots.cpusvn,
        key_id=key_id,
    )


def egetkey(roots: RootKeys, enclave: Identity, request: KeyRequest) -> bytes:
    """The key that ``enclave`` gets for ``request``, 16 bytes.

    Raises:
        PolicyError: EGETKEY's own refusals: ``sgx.egetkey.attribute`` (INVALID_ATTRIBUTE), ``.cpusvn``
            (INVALID_CPUSVN), ``.isvsvn`` (INVALID_ISVSVN), ``.keyname`` (INVALID_KEYNAME), ``.keypolicy``.
    """
    if request.key_policy & ~_POLICY_KNOWN or (
        request.key_policy & _POLICY_KSS and not enclave.attributes.flags & ATTRIBUTE_KSS
    ):
        raise _refused("keypolicy", "a key policy bit is reserved or needs ATTRIBUTES.KSS", f"{request.key_policy:#x}")
    if request.key_name == KEY_REPORT:
        return report_key(roots, enclave, request.key_id)
    if request.key_name == KEY_SEAL:
        return _seal_key(roots, enclave, request)
    needed = {
        KEY_EINITTOKEN: ATTRIBUTE_EINITTOKENKEY,
        KEY_PROVISION: ATTRIBUTE_PROVISIONKEY,
        KEY_PROVISION_SEAL: ATTRIBUTE_PROVISIONKEY,
    }.get(request.key_name)
    if needed is None:
        raise _refused("keyname", "no such key", request.key_name)
    if not enclave.attributes.flags & needed:
        raise _refused("attribute", "the enclave's attributes do not entitle it to this key", request.key_name)
    _check_svn(roots, enclave, request)
    mask = Attributes.from_bytes(request.attribute_mask)
    with_seal_root = request.key_name != KEY_PROVISION
    return _derive(
        roots,
        request.key_name,
        root=roots.provisioning,
        attributes=enclave.attributes.masked(Attributes(mask.flags | _ALWAYS, mask.xfrm)),
        attribute_mask=request.attribute_mask,
        mrsigner=enclave.mrsigner,
        isv_prod_id=enclave.isv_prod_id,
        isv_svn=request.isv_svn,
        cpusvn=request.cpusvn,
        seal_fuses=roots.seal if with_seal_root else bytes(16),
        miscselect=enclave.miscselect & request.misc_mask,
        misc_mask=request.misc_mask,
    )


def _seal_key(roots: RootKeys, enclave: Identity, request: KeyRequest) -> bytes:
    _check_svn(roots, enclave, request)
    policy = request.key_policy
    mask = Attributes.from_bytes(request.attribute_mask)
    with_config = bool(policy & POLICY_CONFIGID)
    if with_config and request.config_svn > enclave.config_svn:
        raise _refused("configsvn", "CONFIGSVN is above the enclave's", request.config_svn, enclave.config_svn)
    return _derive(
        roots,
        KEY_SEAL,
        attributes=enclave.attributes.masked(Attributes(mask.flags | _ALWAYS, mask.xfrm)),
        attribute_mask=request.attribute_mask,
        mrenclave=enclave.mrenclave if policy & POLICY_MRENCLAVE else bytes(32),
        mrsigner=enclave.mrsigner if policy & POLICY_MRSIGNER else bytes(32),
        isv_prod_id=0 if policy & POLICY_NOISVPRODID else enclave.isv_prod_id,
        isv_svn=request.isv_svn,
        owner_epoch=roots.owner_epoch,
        cpusvn=request.cpusvn,
        key_id=request.key_id,
        miscselect=enclave.miscselect & request.misc_mask,
        misc_mask=request.misc_mask,
        cet_attributes=enclave.cet_attributes & request.cet_attributes_mask,
        cet_mask=request.cet_attributes_mask,
        policy=policy,
        config_id=enclave.config_id if with_config else bytes(64),
        config_svn=request.config_svn if with_config else 0,
        isv_family_id=enclave.isv_family_id if policy & POLICY_ISVFAMILYID else bytes(16),
        isv_ext_prod_id=enclave.isv_ext_prod_id if policy & POLICY_ISVEXTPRODID else bytes(16),
    )


def _check_svn(roots: RootKeys, enclave: Identity, request: KeyRequest) -> None:
    """A key of this security version or an older one; never of a newer one."""
    if any(asked > current for asked, current in zip(request.cpusvn, roots.cpusvn, strict=True)):
        raise _refused("cpusvn", "CPUSVN is above the processor's", request.cpusvn.hex(), roots.cpusvn.hex())
    if request.isv_svn > enclave.isv_svn:
        raise _refused("isvsvn", "ISVSVN is above the enclave's", request.isv_svn, enclave.isv_svn)


def _derive(
    roots: RootKeys,
    name: int,
    *,
    attributes: Attributes,
    cpusvn: bytes,
    root: bytes | None = None,
    attribute_mask: bytes = bytes(16),
    mrenclave: bytes = bytes(32),
    mrsigner: bytes = bytes(32),
    isv_prod_id: int = 0,
    isv_svn: int = 0,
    owner_epoch: bytes = bytes(16),
    seal_fuses: bytes = bytes(16),
    key_id: bytes = bytes(32),
    miscselect: int = 0,
    misc_mask: int = 0,
    cet_attributes: int = 0,
    cet_mask: int = 0,
    policy: int = 0,
    config_id: bytes = bytes(64),
    config_svn: int = 0,
    isv_family_id: bytes = bytes(16),
    isv_ext_prod_id: bytes = bytes(16),
) -> bytes:
    inputs = _DERIVATION.pack(
        name,
        isv_ext_prod_id,
        isv_prod_id,
        isv_svn,
        cet_attributes,
        cet_mask,
        owner_epoch,
        attributes.to_bytes(),
        attribute_mask,
        mrenclave,
        mrsigner,
        key_id,
        cpusvn,
        miscselect,
        misc_mask,
        policy,
        config_id,
        config_svn,
        isv_family_id,
    )
    return aes_cmac(roots.seal if root is None else root, seal_fuses + inputs)


def _refused(event: str, what: str, found: object, expected: object = None) -> PolicyError:
    return PolicyError(f"EGETKEY refused: {what}", id=f"sgx.egetkey.{event}", found=found, expected=expected)
