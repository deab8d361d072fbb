"""EINITTOKEN: how a launch enclave makes one, and how EINIT checks it (SDM vol. 3D, EINIT and 38.14)."""

from __future__ import annotations

import hmac
from collections.abc import Callable

from ..errors import PolicyError
from .codes import Status
from .keys import KEY_EINITTOKEN, Identity, RootKeys, aes_cmac, cpusvn_beyond, einittoken_key
from .launch import EINITTOKEN_VALID, EinitToken
from .structs import ATTRIBUTE_MODE64BIT, Attributes, KeyRequest, StructureError

#: What Intel's launch enclave lets into its key: every flag but MODE64BIT, no XFRM, all of MISCSELECT.
_ATTRIBUTE_MASK = Attributes((1 << 64) - 1 & ~ATTRIBUTE_MODE64BIT, 0)
_MISC_MASK = 0xFFFFFFFF

_STATUS = {
    "sgx.einittoken.cpusvn": Status.SGX_INVALID_CPUSVN,
    "sgx.einittoken.measurement": Status.SGX_INVALID_MEASUREMENT,
    "sgx.einittoken.attributes": Status.SGX_INVALID_ATTRIBUTE,
}


class TokenRefused(PolicyError):
    """EINIT's refusal of a token."""

    @property
    def status(self) -> Status:
        """What EINIT leaves in RAX."""
        return _STATUS.get(self.id, Status.SGX_INVALID_EINITTOKEN)


def make_token(
    egetkey: Callable[[KeyRequest], bytes],
    launch_enclave: Identity,
    cpusvn: bytes,
    key_id: bytes,
    *,
    mrenclave: bytes,
    mrsigner: bytes,
    attributes: Attributes,
) -> EinitToken:
    """What code in a launch enclave does to permit another enclave's start.

    Args:
        egetkey: the launch enclave's EGETKEY: a KEYREQUEST in, 16 bytes out.
        launch_enclave: what the launch enclave's own REPORT says of it.
        cpusvn: the processor's, 16 bytes, from that REPORT.
        key_id: 32 random bytes.
        mrenclave: of the enclave that may start, 32 bytes; ``mrsigner`` likewise.
        attributes: its SECS.ATTRIBUTES before EINIT, every bit of them.

    Raises:
        KeyRefused: the launch enclave is none (ATTRIBUTES.EINITTOKENKEY).
    """
    request = KeyRequest(
        key_name=KEY_EINITTOKEN,
        isv_svn=launch_enclave.isv_svn,
        cpusvn=cpusvn,
        attribute_mask=_ATTRIBUTE_MASK.to_bytes(),
        key_id=key_id,
        misc_mask=_MISC_MASK,
    )
    fields = {
        "valid": EINITTOKEN_VALID,
        "attributes": attributes.to_bytes(),
        "mrenclave": mrenclave,
        "mrsigner": mrsigner,
        "cpusvn_le": cpusvn,
        "isv_prod_id_le": launch_enclave.isv_prod_id,
        "isv_svn_le": launch_enclave.isv_svn,
        "cet_masked_attributes_le": 0,
        "masked_miscselect_le": launch_enclave.miscselect & _MISC_MASK,
        "masked_attributes_le": launch_enclave.attributes.masked(_ATTRIBUTE_MASK).to_bytes(),
        "key_id": key_id,
    }
    return EinitToken(**fields, mac=aes_cmac(egetkey(request), EinitToken(**fields).maced_bytes()))  # type: ignore[arg-type]


def check_token(
    token: bytes,
    roots: RootKeys,
    launch_key_hash: bytes,
    *,
    mrenclave: bytes,
    mrsigner: bytes,
    attributes: Attributes,
) -> None:
    """Launch control, as EINIT does it: the signer is the authorised one, or the token permits the start.

    Args:
        token: 304 bytes; all zero for none.
        roots: the processor's secrets and CPUSVN.
        launch_key_hash: IA32_SGXLEPUBKEYHASH, 32 bytes: MRSIGNER of the launch enclave.
        mrenclave: of the enclave to be initialised, 32 bytes; ``mrsigner`` likewise.
        attributes: its SECS.ATTRIBUTES before EINIT.

    Raises:
        TokenRefused: ``sgx.einittoken.missing``, ``.debug``, ``.reserved``, ``.cpusvn``, ``.mac``, ``.measurement`` or
            ``.attributes``.
    """
    if not int.from_bytes(token[:4], "little") & EINITTOKEN_VALID:
        if mrsigner != launch_key_hash:
            raise _refused(
                "missing",
                "there is none, and the enclave's signer is not the authorised one",
                mrsigner.hex(),
                launch_key_hash.hex(),
                "get a token with: inclavare sgx gen-token",
            )
        return
    try:
        parsed = EinitToken.from_bytes(token)
    except StructureError as error:
        raise _refused("reserved", "it has a reserved byte that is not zero", error.found, error.expected) from None
    if parsed.valid != EINITTOKEN_VALID:
        raise _refused("reserved", "a reserved bit of VALID is set", f"{parsed.valid:#x}", "0x1")
    if Attributes.from_bytes(parsed.masked_attributes_le).debug and not attributes.debug:
        raise _refused("debug", "a debug launch enclave cannot permit the start of a production enclave", "DEBUG")
    if cpusvn_beyond(parsed.cpusvn_le, roots.cpusvn):
        raise _refused("cpusvn", "CPUSVNLE is above the processor's", parsed.cpusvn_le.hex(), roots.cpusvn.hex())
    key = einittoken_key(
        roots,
        mrsigner=launch_key_hash,
        isv_prod_id=parsed.isv_prod_id_le,
        isv_svn=parsed.isv_svn_le,
        attributes=parsed.masked_attributes_le,
        miscselect=parsed.masked_miscselect_le,
        cet_attributes=parsed.cet_masked_attributes_le,
        cpusvn=parsed.cpusvn_le,
        key_id=parsed.key_id,
    )
    if not hmac.compare_digest(aes_cmac(key, parsed.maced_bytes()), parsed.mac):
        raise _refused(
            "mac", "its MAC does not verify", remedy="get a token on this machine with: inclavare sgx gen-token"
        )
    for name, found, expected in (
        ("MRENCLAVE", mrenclave, parsed.mrenclave),
        ("MRSIGNER", mrsigner, parsed.mrsigner),
    ):
        if found != expected:
            raise _refused("measurement", f"it is for another enclave: {name} differs", found.hex(), expected.hex())
    permitted = Attributes.from_bytes(parsed.attributes)
    if attributes != permitted:
        raise _refused("attributes", "it is for other ATTRIBUTES", str(attributes), str(permitted))


def _refused(
    event: str, what: str, found: object = None, expected: object = None, remedy: str | None = None
) -> TokenRefused:
    return TokenRefused(
        f"EINITTOKEN refused: {what}",
        id=f"sgx.einittoken.{event}",
        found=found,
        expected=expected,
        remedy=remedy,
    )
