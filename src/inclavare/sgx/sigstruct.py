"""SIGSTRUCT: the enclave signer's certificate over MRENCLAVE (SDM vol. 3D, 38.13).

A signer signs 256 of its 1808 bytes ("gendata"), here or elsewhere; the signature and public key complete it
("catsig"). Signing takes a private key of the ``cryptography`` package. Verifying is plain arithmetic, so that EINIT
needs no cryptographic library: with exponent 3 it is three multiplications of 3072-bit numbers.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, NotRequired, TypedDict, Unpack

from ..errors import IntegrityError, UsageError
from .structs import ATTRIBUTE_KSS, SIGSTRUCT_HEADER, SIGSTRUCT_HEADER2, Attributes, Sigstruct, StructureError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey


class SignedFields(TypedDict):
    """What a signer says of an enclave besides its MRENCLAVE; see :func:`unsigned`."""

    attributes: int
    attribute_mask: int
    xfrm: int
    xfrm_mask: int
    miscselect: int
    misc_mask: int
    isv_prod_id: int
    isv_svn: int
    date: int
    vendor: NotRequired[int]
    swdefined: NotRequired[int]
    isv_family_id: NotRequired[bytes]
    isv_ext_prod_id: NotRequired[bytes]
    cet_attributes: NotRequired[int]
    cet_attributes_mask: NotRequired[int]


#: Bytes of SIGSTRUCT that the signature covers: 0–127 and 900–1027.
SIGNED_SIZE = 256
#: Bytes of modulus, signature, Q1 and Q2.
RSA_SIZE = 384
RSA_EXPONENT = 3
_ORDERS: tuple[Literal["big"], Literal["little"]] = ("big", "little")
#: EMSA-PKCS1-v1_5 (RFC 8017, 9.2) up to the SHA-256 digest, for 384 bytes.
_PKCS1_PREFIX = (
    b"\x00\x01" + b"\xff" * (RSA_SIZE - 3 - 19 - 32) + b"\x00" + bytes.fromhex("3031300d060960864801650304020105000420")
)


def mrsigner(modulus_le: bytes) -> bytes:
    """MRSIGNER: SHA-256 of the 384-byte little-endian modulus; 32 bytes."""
    if len(modulus_le) != RSA_SIZE:
        raise ValueError(f"modulus of {len(modulus_le)} bytes, not {RSA_SIZE}")
    return hashlib.sha256(modulus_le).digest()


def q1_q2(signature: int, modulus: int) -> tuple[int, int]:
    """Q1 = ⌊s²/m⌋ and Q2 = ⌊s·(s² mod m)/m⌋, with which the processor verifies without dividing."""
    q1, remainder = divmod(signature * signature, modulus)
    return q1, signature * remainder // modulus


def unsigned(
    mrenclave: bytes,
    *,
    attributes: int,
    attribute_mask: int,
    xfrm: int,
    xfrm_mask: int,
    miscselect: int,
    misc_mask: int,
    isv_prod_id: int,
    isv_svn: int,
    date: int,
    vendor: int = 0,
    swdefined: int = 0,
    isv_family_id: bytes = bytes(16),
    isv_ext_prod_id: bytes = bytes(16),
    cet_attributes: int = 0,
    cet_attributes_mask: int = 0,
) -> Sigstruct:
    """A SIGSTRUCT without key and signature; its :meth:`Sigstruct.signed_bytes` are what a signer signs.

    Args:
        mrenclave: 32 bytes.
        attributes: ATTRIBUTES.FLAGS that the enclave must have in the bits that ``attribute_mask`` selects.
        xfrm: likewise ATTRIBUTES.XFRM, with ``xfrm_mask``.
        miscselect: likewise MISCSELECT, with ``misc_mask``.
        date: the signing date as BCD, for example ``0x20260131``.
        vendor: 0, or 0x8086 for Intel's own enclaves.
        swdefined: 32 bits of the signer's own.
        isv_family_id: 16 bytes; needs ATTRIBUTES.KSS, as ``isv_ext_prod_id`` (16 bytes).
        cet_attributes: CET_ATTRIBUTES that the enclave must have in the bits that ``cet_attributes_mask`` selects.

    Raises:
        UsageError: ``sgx.sigstruct.kss``: KSS fields, where the signer rules KSS out: EINIT would refuse.
        ValueError: a value out of range.
    """
    kss_ruled_out = attribute_mask & ~attributes & ATTRIBUTE_KSS
    if kss_ruled_out and (any(isv_family_id) or any(isv_ext_prod_id)):
        raise UsageError(
            "ISVFAMILYID and ISVEXTPRODID need an enclave with ATTRIBUTES.KSS",
            id="sgx.sigstruct.kss",
            found=f"flags {attributes:#x} under mask {attribute_mask:#x}",
            expected=f"bit {ATTRIBUTE_KSS:#x} in the flags",
            remedy="set ATTRIBUTES.KSS, or leave the two ids zero",
        )
    empty = bytes(RSA_SIZE)
    return Sigstruct(
        header=SIGSTRUCT_HEADER,
        vendor=vendor,
        date=date,
        header2=SIGSTRUCT_HEADER2,
        swdefined=swdefined,
        modulus=empty,
        exponent=RSA_EXPONENT,
        signature=empty,
        miscselect=miscselect,
        misc_mask=misc_mask,
        cet_attributes=cet_attributes,
        cet_attributes_mask=cet_attributes_mask,
        isv_family_id=isv_family_id,
        attributes=Attributes(attributes, xfrm).to_bytes(),
        attribute_mask=Attributes(attribute_mask, xfrm_mask).to_bytes(),
        enclave_hash=mrenclave,
        isv_ext_prod_id=isv_ext_prod_id,
        isv_prod_id=isv_prod_id,
        isv_svn=isv_svn,
        q1=empty,
        q2=empty,
    )


def sign(image_mrenclave: bytes, private_key: RSAPrivateKey, **fields: Unpack[SignedFields]) -> Sigstruct:
    """Sign an enclave.

    Args:
        image_mrenclave: MRENCLAVE, 32 bytes.
        private_key: RSA-3072 with public exponent 3.
        fields: as :func:`unsigned` takes them.

    Raises:
        UsageError: the key is not RSA-3072 with exponent 3, or KSS fields without KSS.
    """
    numbers = private_key.public_key().public_numbers()
    if private_key.key_size != RSA_SIZE * 8 or numbers.e != RSA_EXPONENT:
        raise UsageError(
            "this key cannot sign enclaves",
            id="sgx.sigstruct.key",
            found=f"RSA-{private_key.key_size}, exponent {numbers.e}",
            expected="RSA-3072, exponent 3",
            remedy="make one with: openssl genrsa -3 -out key.pem 3072",
        )
    made = unsigned(image_mrenclave, **fields)
    return _complete(made, int.from_bytes(pkcs1_sign(made.signed_bytes(), private_key), "big"), numbers.n)


def pkcs1_sign(data: bytes, private_key: RSAPrivateKey) -> bytes:
    """RSASSA-PKCS1-v1_5 with SHA-256 over the 256 bytes of gendata; 384 bytes, big-endian."""
    from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
    from cryptography.hazmat.primitives.hashes import SHA256

    return private_key.sign(data, PKCS1v15(), SHA256())


def parse_gendata(data: bytes) -> Sigstruct:
    """The SIGSTRUCT without key and signature whose 256 signed bytes these are (``sgx_sign gendata`` writes them).

    Raises:
        StructureError: not 256 bytes, a wrong HEADER, or a reserved byte that is not zero.
    """
    if len(data) != SIGNED_SIZE:
        raise StructureError(
            "this is not what a SIGSTRUCT's signature covers",
            id="sgx.sigstruct.gendata",
            found=f"{len(data)} bytes",
            expected=f"{SIGNED_SIZE} bytes: SIGSTRUCT's 0–127 and 900–1027",
        )
    key = bytes(RSA_SIZE) + RSA_EXPONENT.to_bytes(4, "little") + bytes(RSA_SIZE)
    return Sigstruct.from_bytes(data[:128] + key + data[128:] + bytes(12 + 2 * RSA_SIZE))


def catsig(data: bytes, signature: bytes, modulus: int) -> Sigstruct:
    """A complete SIGSTRUCT from what was signed elsewhere, as ``sgx_sign catsig`` makes it.

    Args:
        data: the 256 bytes that were signed.
        signature: 384 bytes, big-endian as OpenSSL, ``sgx_sign`` and PKCS #11 have it, or little-endian as SIGSTRUCT.
        modulus: of the signer's public key; see :func:`public_modulus`.

    Raises:
        StructureError: ``data`` is not gendata.
        IntegrityError: ``sgx.sigstruct.signature``: the signature is not this key's over these bytes.
    """
    made = parse_gendata(data)
    if len(signature) != RSA_SIZE:
        raise _not_signed(f"{len(signature)} bytes", f"{RSA_SIZE} bytes")
    # No signature verifies in both orders: e³ mod n of a reversed one is as good as random.
    for order in _ORDERS:
        try:
            complete = _complete(made, int.from_bytes(signature, order), modulus)
            verify(complete)
        except IntegrityError:
            continue
        return complete
    raise _not_signed("another key's, or over other bytes", "this public key's over these 256 bytes")


def _not_signed(found: str, expected: str) -> IntegrityError:
    return IntegrityError(
        "the signature that was made elsewhere does not fit",
        id="sgx.sigstruct.signature",
        found=found,
        expected=expected,
        remedy="sign the file from --gendata with RSA-3072 (exponent 3), PKCS#1 v1.5, SHA-256, and name that key",
    )


def public_modulus(pem: bytes) -> int:
    """The modulus of a public key for enclave signatures.

    Raises:
        UsageError: ``sgx.sigstruct.publickey``: not an RSA-3072 public key with exponent 3, PEM.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if isinstance(key, RSAPublicKey) and key.key_size == RSA_SIZE * 8 and key.public_numbers().e == RSA_EXPONENT:
        return key.public_numbers().n
    raise UsageError(
        "the public key cannot belong to an enclave signer",
        id="sgx.sigstruct.publickey",
        expected="an RSA-3072 public key with exponent 3, PEM",
        remedy="export it with: openssl rsa -in key.pem -pubout",
    )


def _complete(made: Sigstruct, signature: int, modulus: int) -> Sigstruct:
    if signature >= modulus:
        raise _refusal("signature", "the signature is not smaller than the modulus")
    q1, q2 = q1_q2(signature, modulus)
    fields = {"modulus": modulus, "signature": signature, "q1": q1, "q2": q2}
    return replace(made, **{name: value.to_bytes(RSA_SIZE, "little") for name, value in fields.items()})  # type: ignore[arg-type]


def verify(sigstruct: Sigstruct) -> None:
    """Check exponent, signature, Q1 and Q2, as EINIT does.

    Raises:
        IntegrityError: ``sgx.sigstruct.exponent``, ``.modulus``, ``.signature``, ``.q1`` or ``.q2``.
    """
    if sigstruct.exponent != RSA_EXPONENT:
        raise _refusal("exponent", "the exponent is wrong", found=sigstruct.exponent, expected=RSA_EXPONENT)
    modulus = int.from_bytes(sigstruct.modulus, "little")
    signature = int.from_bytes(sigstruct.signature, "little")
    if modulus.bit_length() != RSA_SIZE * 8 or not modulus & 1:
        raise _refusal("modulus", "the modulus is not an odd 3072-bit number", found=f"{modulus.bit_length()} bits")
    if signature >= modulus:
        raise _refusal("signature", "the signature is not smaller than the modulus")
    digest = hashlib.sha256(sigstruct.signed_bytes()).digest()
    if pow(signature, RSA_EXPONENT, modulus) != int.from_bytes(_PKCS1_PREFIX + digest, "big"):
        raise _refusal("signature", "the signature does not verify")
    q1, q2 = q1_q2(signature, modulus)
    if int.from_bytes(sigstruct.q1, "little") != q1:
        raise _refusal("q1", "Q1 does not belong to the signature")
    if int.from_bytes(sigstruct.q2, "little") != q2:
        raise _refusal("q2", "Q2 does not belong to the signature")


def _refusal(event: str, what: str, *, found: object = None, expected: object = None) -> IntegrityError:
    return IntegrityError(
        f"SIGSTRUCT is damaged: {what}",
        id=f"sgx.sigstruct.{event}",
        found=found,
        expected=expected,
        remedy="sign the enclave again",
    )
