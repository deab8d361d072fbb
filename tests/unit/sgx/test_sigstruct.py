"""SIGSTRUCT: real ones verify, ours verify, and no field of either can be changed."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace
from pathlib import Path
from subprocess import run

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from small_enclaves import Signers, sign_image, small_image

from inclavare.errors import IntegrityError, UsageError
from inclavare.sgx.sigstruct import mrsigner, q1_q2, verify
from inclavare.sgx.structs import Sigstruct


@pytest.mark.parametrize("name", ["fortanix_test_enclave.sig", "fortanix_sgxstools_sig1.sigstruct.bin"])
def test_real_sigstructs_verify(vectors: Path, name: str) -> None:
    raw = (vectors / "measure" / name).read_bytes()
    signed = Sigstruct.from_bytes(raw)
    verify(signed)
    assert signed.to_bytes() == raw


def test_ours_verify(signers: Signers) -> None:
    image = small_image()
    signed = sign_image(image, signers.ours)
    verify(Sigstruct.from_bytes(signed.to_bytes()))
    n = signers.ours.public_key().public_numbers().n
    assert mrsigner(signed.modulus) == hashlib.sha256(n.to_bytes(384, "little")).digest()
    assert (signed.isv_prod_id, signed.isv_svn, signed.date) == (7, 3, 0x20260131)


@pytest.mark.parametrize("field", Sigstruct.LAYOUT.names)
def test_no_field_can_be_changed(signers: Signers, field: str) -> None:
    raw = sign_image(small_image(), signers.ours).to_bytes()
    start, size = Sigstruct.LAYOUT.offsets[field], Sigstruct.LAYOUT.sizes[field]
    for at in (start, start + size // 2, start + size - 1):
        for bit in (0x01, 0x80):
            damaged = bytearray(raw)
            damaged[at] ^= bit
            with pytest.raises(IntegrityError) as caught:
                verify(Sigstruct.from_bytes(bytes(damaged)))
            assert caught.value.id.startswith("sgx.sigstruct.")


def test_causes_are_told_apart(signers: Signers) -> None:
    signed = sign_image(small_image(), signers.ours)
    other = sign_image(small_image(), signers.theirs)
    causes = {
        "sgx.sigstruct.exponent": replace(signed, exponent=65537),
        "sgx.sigstruct.modulus": replace(signed, modulus=bytes(384)),
        "sgx.sigstruct.signature": replace(signed, signature=other.signature),
        "sgx.sigstruct.q1": replace(signed, q1=other.q1),
        "sgx.sigstruct.q2": replace(signed, q2=other.q2),
    }
    for id, damaged in causes.items():
        with pytest.raises(IntegrityError) as caught:
            verify(damaged)
        assert caught.value.id == id


def test_signature_that_wraps_around_the_modulus_is_refused(signers: Signers) -> None:
    """s + n has the same cube modulo n; only the canonical s counts."""
    signed = sign_image(small_image(), signers.ours)
    modulus = int.from_bytes(signed.modulus, "little")
    signature = int.from_bytes(signed.signature, "little") + modulus
    if signature.bit_length() > 3072:
        signature = int.from_bytes(b"\xff" * 384, "little")
    with pytest.raises(IntegrityError) as caught:
        verify(replace(signed, signature=signature.to_bytes(384, "little")))
    assert caught.value.id == "sgx.sigstruct.signature"


def test_q1_and_q2_are_the_quotients_of_the_manual() -> None:
    s, m = 987654321987654321, 1234567890123456789
    q1, q2 = q1_q2(s, m)
    assert q1 == s**2 // m
    assert q2 == (s**3 - q1 * s * m) // m


@pytest.mark.parametrize(("size", "exponent"), [(2048, 3), (3072, 65537)])
def test_other_keys_cannot_sign(size: int, exponent: int) -> None:
    key = rsa.generate_private_key(public_exponent=exponent, key_size=size)
    with pytest.raises(UsageError) as caught:
        sign_image(small_image(), key)
    assert caught.value.id == "sgx.sigstruct.key"


def test_verifying_imports_no_cryptographic_library(signers: Signers) -> None:
    raw = sign_image(small_image(), signers.ours).to_bytes().hex()
    code = (
        "import sys; from inclavare.sgx.sigstruct import verify; from inclavare.sgx.structs import Sigstruct; "
        f"verify(Sigstruct.from_bytes(bytes.fromhex('{raw}'))); assert 'cryptography' not in sys.modules"
    )
    assert run([sys.executable, "-c", code], check=False).returncode == 0


def test_unsigned_bytes_are_the_manuals(signers: Signers) -> None:
    signed = sign_image(small_image(), signers.ours)
    raw = signed.to_bytes()
    assert signed.signed_bytes() == raw[:128] + raw[900:1028]
    assert len(signed.signed_bytes()) == 256
