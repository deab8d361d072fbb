"""SIGSTRUCT: the enclave signer's certificate over MRENCLAVE (SDM vol. 3D, 38.13).

Signing takes a private key of the ``cryptography`` package. Verifying is plain arithmetic, so that EINIT needs no
cryptographic library: with exponent 3 it is three multiplications of 3072-bit numbers.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import IntegrityError, UsageError
from .structs import SIGSTRUCT_HEADER, SIGSTRUCT_HEADER2, Attributes, Sigstruct

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

#: Bytes of modulus, signature, Q1 and Q2.
RSA_SIZE = 384
RSA_EXPONENT = 3
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


def sign(
    image_mrenclave: bytes,
    private_key: RSAPrivateKey,
    *,
    attributes: int,
    attribute_mask: int,
    xfrm: int,
    xfrm_mask: int,
    miscselect: int,
    misc_mask: int,
    isv_prod_id: int,
    isv_svn: int,
    vendor: int = 0,
    date: int,
    swdefined: int = 0,
) -> Sigstruct:
    """Sign an enclave.

    Args:
        image_mrenclave: MRENCLAVE, 32 bytes.
        private_key: RSA-3072 with public exponent 3.
        attributes: ATTRIBUTES.FLAGS that the enclave must have in the bits that ``attribute_mask`` selects.
        xfrm: likewise ATTRIBUTES.XFRM, with ``xfrm_mask``.
        miscselect: likewise MISCSELECT, with ``misc_mask``.
        date: the signing date as BCD, for example ``0x20260131``.

    Raises:
        UsageError: the key is not RSA-3072 with exponent 3.
    """
    from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
    from cryptography.hazmat.primitives.hashes import SHA256

    numbers = private_key.public_key().public_numbers()
    if private_key.key_size != RSA_SIZE * 8 or numbers.e != RSA_EXPONENT:
        raise UsageError(
            "this key cannot sign enclaves",
            id="sgx.sigstruct.key",
            found=f"RSA-{private_key.key_size}, exponent {numbers.e}",
            expected="RSA-3072, exponent 3",
            remedy="make one with: openssl genrsa -3 -out key.pem 3072",
        )
    empty = bytes(RSA_SIZE)
    unsigned = Sigstruct(
        header=SIGSTRUCT_HEADER,
        vendor=vendor,
        date=date,
        header2=SIGSTRUCT_HEADER2,
        swdefined=swdefined,
        modulus=numbers.n.to_bytes(RSA_SIZE, "little"),
        exponent=RSA_EXPONENT,
        signature=empty,
        miscselect=miscselect,
        misc_mask=misc_mask,
        cet_attributes=0,
        cet_attributes_mask=0,
        isv_family_id=bytes(16),
        attributes=Attributes(attributes, xfrm).to_bytes(),
        attribute_mask=Attributes(attribute_mask, xfrm_mask).to_bytes(),
        enclave_hash=image_mrenclave,
        isv_ext_prod_id=bytes(16),
        isv_prod_id=isv_prod_id,
        isv_svn=isv_svn,
        q1=empty,
        q2=empty,
    )
    signature = int.from_bytes(private_key.sign(unsigned.signed_bytes(), PKCS1v15(), SHA256()), "big")
    q1, q2 = q1_q2(signature, numbers.n)
    return replace(
        unsigned,
        signature=signature.to_bytes(RSA_SIZE, "little"),
        q1=q1.to_bytes(RSA_SIZE, "little"),
        q2=q2.to_bytes(RSA_SIZE, "little"),
    )


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
