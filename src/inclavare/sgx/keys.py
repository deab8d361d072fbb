"""EGETKEY: which keys an enclave may derive, and how (SDM vol. 3D, EGETKEY, table "Key Derivation", and 38.18).

The derivation binds a key to the enclave's identity by the rules of KEYREQUEST. The processor's own pseudo-random
function is not architectural; this module uses AES-128-CMAC over a fixed layout of the architectural inputs. Two of
these say the same in another form: MISCMASK stands for ~MISCMASK, and SECS.PADDING is left out, because EINIT lets no
SIGSTRUCT pass whose padding is not the constant one.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from ..errors import PolicyError
from .codes import Status
from .structs import (
    ATTRIBUTE_DEBUG,
    ATTRIBUTE_EINITTOKENKEY,
    ATTRIBUTE_INIT,
    ATTRIBUTE_KSS,
    ATTRIBUTE_PROVISIONKEY,
    Attributes,
    KeyRequest,
    Layout,
    Structure,
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

#: REQUIRED_SEALING_MASK: these enter every masked key, whatever the mask: a debug enclave never shares a key.
_REQUIRED = ATTRIBUTE_INIT | ATTRIBUTE_DEBUG
#: Keys that only some enclaves get, and the attribute that entitles them.
_ENTITLED = {
    KEY_EINITTOKEN: ATTRIBUTE_EINITTOKENKEY,
    KEY_PROVISION: ATTRIBUTE_PROVISIONKEY,
    KEY_PROVISION_SEAL: ATTRIBUTE_PROVISIONKEY,
}
_STATUS = {
    "sgx.egetkey.attribute": Status.SGX_INVALID_ATTRIBUTE,
    "sgx.egetkey.cpusvn": Status.SGX_INVALID_CPUSVN,
    "sgx.egetkey.isvsvn": Status.SGX_INVALID_ISVSVN,
    "sgx.egetkey.configsvn": Status.SGX_INVALID_ISVSVN,
    "sgx.egetkey.keyname": Status.SGX_INVALID_KEYNAME,
}


class KeyRefused(PolicyError):
    """EGETKEY's refusal."""

    @property
    def status(self) -> Status | None:
        """What EGETKEY leaves in RAX; ``None`` where it faults with #GP(0) (``sgx.egetkey.keypolicy``)."""
        return _STATUS.get(self.id)


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


_KEY_DEPENDENCIES = Layout(
    "keydependencies",
    298,
    (
        ("seal_key_fuses", 0, "16s"),
        ("key_name", 16, "H"),
        ("isv_ext_prod_id", 20, "16s"),
        ("isv_prod_id", 36, "H"),
        ("isv_svn", 38, "H"),
        ("cet_attributes", 40, "B"),
        ("cet_attributes_mask", 41, "B"),
        ("owner_epoch", 44, "16s"),
        ("attributes", 60, "16s"),
        ("attribute_mask", 76, "16s"),
        ("mrenclave", 92, "32s"),
        ("mrsigner", 124, "32s"),
        ("key_id", 156, "32s"),
        ("cpusvn", 188, "16s"),
        ("miscselect", 204, "I"),
        ("misc_mask", 208, "I"),
        ("key_policy", 212, "H"),
        ("config_id", 216, "64s"),
        ("config_svn", 280, "H"),
        ("isv_family_id", 282, "16s"),
    ),
)


@dataclass(frozen=True, slots=True)
class KeyDependencies(Structure):
    """TMP_KEYDEPENDENCIES of EGETKEY, EREPORT and EINIT: what a key is derived from; all zero but what is set.

    The layout is this processor's own. Sealed data depends on it.
    """

    LAYOUT: ClassVar[Layout] = _KEY_DEPENDENCIES

    seal_key_fuses: bytes = bytes(16)
    key_name: int = 0
    isv_ext_prod_id: bytes = bytes(16)
    isv_prod_id: int = 0
    isv_svn: int = 0
    cet_attributes: int = 0
    cet_attributes_mask: int = 0
    owner_epoch: bytes = bytes(16)
    attributes: bytes = bytes(16)
    attribute_mask: bytes = bytes(16)
    mrenclave: bytes = bytes(32)
    mrsigner: bytes = bytes(32)
    key_id: bytes = bytes(32)
    cpusvn: bytes = bytes(16)
    miscselect: int = 0
    misc_mask: int = 0
    key_policy: int = 0
    config_id: bytes = bytes(64)
    config_svn: int = 0
    isv_family_id: bytes = bytes(16)


def aes_cmac(key: bytes, message: bytes) -> bytes:
    """AES-128-CMAC (NIST SP 800-38B), 16 bytes."""
    from cryptography.hazmat.primitives.ciphers.algorithms import AES
    from cryptography.hazmat.primitives.cmac import CMAC

    mac = CMAC(AES(key))
    mac.update(message)
    return mac.finalize()


def report_key(roots: RootKeys, target: Identity, key_id: bytes) -> bytes:
    """The key with which EREPORT makes, and ``target`` checks, a report's MAC; 16 bytes."""
    dependencies = KeyDependencies(
        key_name=KEY_REPORT,
        owner_epoch=roots.owner_epoch,
        attributes=target.attributes.to_bytes(),
        mrenclave=target.mrenclave,
        key_id=key_id,
        cpusvn=roots.cpusvn,
        miscselect=target.miscselect,
        cet_attributes=target.cet_attributes,
        config_id=target.config_id,
        config_svn=target.config_svn,
    )
    # The seal fuses are the root itself, as for seal keys.
    return aes_cmac(roots.seal, dependencies.to_bytes())


def einittoken_key(
    roots: RootKeys,
    *,
    mrsigner: bytes,
    isv_prod_id: int,
    isv_svn: int,
    attributes: bytes,
    miscselect: int,
    cet_attributes: int,
    cpusvn: bytes,
    key_id: bytes,
) -> bytes:
    """The launch key, with which a launch enclave makes, and EINIT checks, an EINITTOKEN's MAC; 16 bytes.

    Args:
        mrsigner: the launch enclave's, 32 bytes; for EINIT it is IA32_SGXLEPUBKEYHASH.
        attributes: the launch enclave's ATTRIBUTES under its KEYREQUEST's mask, 16 bytes; ``miscselect`` and
            ``cet_attributes`` likewise.
    """
    dependencies = KeyDependencies(
        seal_key_fuses=roots.seal,
        key_name=KEY_EINITTOKEN,
        isv_prod_id=isv_prod_id,
        isv_svn=isv_svn,
        owner_epoch=roots.owner_epoch,
        attributes=attributes,
        mrsigner=mrsigner,
        key_id=key_id,
        cpusvn=cpusvn,
        miscselect=miscselect,
        cet_attributes=cet_attributes,
    )
    return aes_cmac(roots.provisioning, dependencies.to_bytes())


def egetkey(roots: RootKeys, enclave: Identity, request: KeyRequest) -> bytes:
    """The key that ``enclave`` gets for ``request``, 16 bytes.

    Raises:
        KeyRefused: EGETKEY's own refusals: ``sgx.egetkey.keypolicy`` (#GP), ``.keyname``
            (INVALID_KEYNAME), ``.attribute`` (INVALID_ATTRIBUTE), ``.cpusvn`` (INVALID_CPUSVN), ``.isvsvn`` and
            ``.configsvn`` (INVALID_ISVSVN).
    """
    name, policy = request.key_name, request.key_policy
    if policy & ~_POLICY_KNOWN:
        raise _refused("keypolicy", "a reserved bit of KEYPOLICY is set", f"{policy:#x}")
    if not enclave.attributes.flags & ATTRIBUTE_KSS and (policy & _POLICY_KSS or request.config_svn):
        raise _refused(
            "keypolicy",
            "KEYPOLICY or CONFIGSVN needs an enclave with ATTRIBUTES.KSS",
            f"KEYPOLICY {policy:#x}, CONFIGSVN {request.config_svn}",
        )
    if name == KEY_REPORT:
        return report_key(roots, enclave, request.key_id)
    if name != KEY_SEAL:
        if name not in _ENTITLED:
            raise _refused("keyname", "no such key", name)
        if not enclave.attributes.flags & _ENTITLED[name]:
            raise _refused("attribute", "the enclave's attributes do not entitle it to this key", name)
    _check_svn(roots, enclave, request)

    mask = Attributes.from_bytes(request.attribute_mask)
    attributes = enclave.attributes.masked(Attributes(mask.flags | _REQUIRED, mask.xfrm)).to_bytes()
    miscselect = enclave.miscselect & request.misc_mask
    cet_attributes = enclave.cet_attributes & request.cet_attributes_mask
    if name == KEY_EINITTOKEN:
        return einittoken_key(
            roots,
            mrsigner=enclave.mrsigner,
            isv_prod_id=enclave.isv_prod_id,
            isv_svn=request.isv_svn,
            attributes=attributes,
            miscselect=miscselect,
            cet_attributes=cet_attributes,
            cpusvn=request.cpusvn,
            key_id=request.key_id,
        )
    dependencies = KeyDependencies(
        key_name=name,
        isv_prod_id=enclave.isv_prod_id,
        isv_svn=request.isv_svn,
        attributes=attributes,
        attribute_mask=request.attribute_mask,
        mrsigner=enclave.mrsigner,
        cpusvn=request.cpusvn,
        miscselect=miscselect,
        misc_mask=request.misc_mask,
        cet_attributes=cet_attributes,
        cet_attributes_mask=request.cet_attributes_mask,
    )
    if name == KEY_PROVISION:
        # Neither the seal fuses nor the owner: Intel can derive it, too, and it outlives a change of owner.
        return aes_cmac(roots.provisioning, dependencies.to_bytes())

    dependencies = replace(
        dependencies,
        isv_family_id=enclave.isv_family_id if policy & POLICY_ISVFAMILYID else bytes(16),
        isv_ext_prod_id=enclave.isv_ext_prod_id if policy & POLICY_ISVEXTPRODID else bytes(16),
        isv_prod_id=0 if policy & POLICY_NOISVPRODID else enclave.isv_prod_id,
        config_id=enclave.config_id if policy & POLICY_CONFIGID else bytes(64),
        config_svn=request.config_svn if policy & POLICY_CONFIGID else 0,
        key_policy=policy,
    )
    if name == KEY_PROVISION_SEAL:
        return aes_cmac(roots.provisioning, replace(dependencies, seal_key_fuses=roots.seal).to_bytes())
    dependencies = replace(
        dependencies,
        mrenclave=enclave.mrenclave if policy & POLICY_MRENCLAVE else bytes(32),
        mrsigner=enclave.mrsigner if policy & POLICY_MRSIGNER else bytes(32),
        owner_epoch=roots.owner_epoch,
        key_id=request.key_id,
    )
    return aes_cmac(roots.seal, dependencies.to_bytes())


def cpusvn_beyond(asked: bytes, current: bytes) -> bool:
    """Whether a CPUSVN (16 bytes) is above the processor's in any of its components."""
    return any(one > other for one, other in zip(asked, current, strict=True))


def _check_svn(roots: RootKeys, enclave: Identity, request: KeyRequest) -> None:
    """A key of this security version or an older one; never of a newer one."""
    if cpusvn_beyond(request.cpusvn, roots.cpusvn):
        raise _refused("cpusvn", "CPUSVN is above the processor's", request.cpusvn.hex(), roots.cpusvn.hex())
    if request.isv_svn > enclave.isv_svn:
        raise _refused("isvsvn", "ISVSVN is above the enclave's", request.isv_svn, enclave.isv_svn)
    if request.key_name in (KEY_SEAL, KEY_PROVISION_SEAL) and request.config_svn > enclave.config_svn:
        raise _refused("configsvn", "CONFIGSVN is above the enclave's", request.config_svn, enclave.config_svn)


def _refused(event: str, what: str, found: object, expected: object = None) -> KeyRefused:
    return KeyRefused(f"EGETKEY refused: {what}", id=f"sgx.egetkey.{event}", found=found, expected=expected)
