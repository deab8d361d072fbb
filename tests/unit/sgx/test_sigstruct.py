"""SIGSTRUCT: real ones verify, ours verify, and no field of either can be changed."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace
from pathlib import Path
from subprocess import run
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st
from small_enclaves import Signers, sign_image, small_image

from inclavare.errors import IntegrityError, UsageError
from inclavare.sgx.sigstruct import catsig, mrsigner, parse_gendata, public_modulus, q1_q2, sign, unsigned, verify
from inclavare.sgx.structs import (
    ATTRIBUTE_CET,
    ATTRIBUTE_KSS,
    ATTRIBUTE_MODE64BIT,
    Attributes,
    Sigstruct,
    StructureError,
)


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


_REAL = ["fortanix_test_enclave.sig", "fortanix_sgxstools_sig1.sigstruct.bin"]


@pytest.mark.parametrize("name", _REAL)
@settings(max_examples=300, deadline=None)
@given(at=st.integers(0, 1807), change=st.integers(1, 255))
def test_every_byte_of_a_real_one_counts(vectors: Path, name: str, at: int, change: int) -> None:
    damaged = bytearray((vectors / "measure" / name).read_bytes())
    damaged[at] ^= change
    with pytest.raises(IntegrityError):
        verify(Sigstruct.from_bytes(bytes(damaged)))


def test_modulus_is_odd_and_of_3072_bits(signers: Signers) -> None:
    signed = sign_image(small_image(), signers.ours)
    modulus = int.from_bytes(signed.modulus, "little")
    for wrong in (modulus - 1, modulus >> 1 | 1):
        with pytest.raises(IntegrityError) as caught:
            verify(replace(signed, modulus=wrong.to_bytes(384, "little")))
        assert caught.value.id == "sgx.sigstruct.modulus"


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
    tries = (
        sign_image(small_image(), key, swdefined=number)
        for number in range(1000)
        for key in (signers.ours, signers.theirs)
    )
    # Only a small s leaves room for s + n in 3072 bits.
    signed, wrapped = next(
        (signed, total)
        for signed in tries
        if (total := sum(int.from_bytes(part, "little") for part in (signed.signature, signed.modulus))) >> 3072 == 0
    )
    with pytest.raises(IntegrityError) as caught:
        verify(replace(signed, signature=wrapped.to_bytes(384, "little")))
    assert caught.value.id == "sgx.sigstruct.signature"


def test_mrsigner_is_over_the_whole_modulus() -> None:
    for size in (383, 385):
        with pytest.raises(ValueError, match="384"):
            mrsigner(bytes(size))


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


#: Every field at a value that no other has.
FIELDS: dict[str, Any] = {
    "attributes": ATTRIBUTE_MODE64BIT | ATTRIBUTE_KSS | ATTRIBUTE_CET,
    "attribute_mask": (1 << 64) - 1,
    "xfrm": 0xE7,
    "xfrm_mask": 0xFFFFFFFFFFFFFF1B,
    "miscselect": 1,
    "misc_mask": 0xFFFFFFFD,
    "isv_prod_id": 0x1234,
    "isv_svn": 0x5678,
    "date": 0x20260131,
    "vendor": 0x8086,
    "swdefined": 0xCAFE,
    "isv_family_id": bytes(range(16)),
    "isv_ext_prod_id": bytes(range(16, 32)),
    "cet_attributes": 0x11,
    "cet_attributes_mask": 0xFE,
}
_HASH = bytes(range(32, 64))


def test_sdm_38_13_every_field_at_its_offset(signers: Signers) -> None:
    raw = sign(_HASH, signers.ours, **FIELDS).to_bytes()
    verify(Sigstruct.from_bytes(raw))
    expected = {
        0: "06000000e10000000000010000000000",
        16: "86800000",
        20: "31012620",
        24: "01010000600000006000000001000000",
        40: "feca0000",
        44: "00" * 84,
        512: "03000000",
        900: "01000000",
        904: "fdffffff",
        908: "11fe0000",
        912: bytes(range(16)).hex(),
        928: "c400000000000000e700000000000000",
        944: "ffffffffffffffff1bffffffffffffff",
        960: _HASH.hex(),
        992: "00" * 16,
        1008: bytes(range(16, 32)).hex(),
        1024: "34127856",
        1028: "00" * 12,
    }
    for offset, value in expected.items():
        assert raw[offset : offset + len(value) // 2].hex() == value, offset


def test_fields_that_a_signer_leaves_out_are_zero(signers: Signers) -> None:
    signed = sign_image(small_image(), signers.ours)
    assert (signed.vendor, signed.swdefined, signed.cet_attributes, signed.cet_attributes_mask) == (0, 0, 0, 0)
    assert (signed.isv_family_id, signed.isv_ext_prod_id) == (bytes(16), bytes(16))


@pytest.mark.parametrize("field", ["isv_family_id", "isv_ext_prod_id"])
def test_kss_fields_need_kss(field: str) -> None:
    zero = {"isv_family_id": bytes(16), "isv_ext_prod_id": bytes(16)}
    without = {**FIELDS, **zero, "attributes": ATTRIBUTE_MODE64BIT}
    unsigned(_HASH, **without)
    with pytest.raises(UsageError) as caught:
        unsigned(_HASH, **{**without, field: b"\0" * 15 + b"\1"})
    assert caught.value.id == "sgx.sigstruct.kss"
    # Where the signer leaves KSS open, whoever loads the enclave decides.
    open_mask = {"attribute_mask": FIELDS["attribute_mask"] & ~ATTRIBUTE_KSS}
    unsigned(_HASH, **{**without, **open_mask, field: b"\1" * 16})


def _pem(key: Any) -> bytes:
    pem: bytes = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return pem


@pytest.fixture(scope="module")
def elsewhere(signers: Signers, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """gendata, and its signature by OpenSSL, as a signer elsewhere makes it."""
    at = tmp_path_factory.mktemp("hsm")
    (at / "key.pem").write_bytes(
        signers.ours.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    )
    data = unsigned(_HASH, **FIELDS).signed_bytes()
    (at / "data").write_bytes(data)
    made = run(["openssl", "dgst", "-sha256", "-sign", at / "key.pem", at / "data"], capture_output=True, check=True)
    return data, made.stdout


@pytest.mark.parametrize("order", [1, -1], ids=["big-endian", "little-endian"])
def test_catsig_completes_what_was_signed_elsewhere(
    signers: Signers, elsewhere: tuple[bytes, bytes], order: int
) -> None:
    data, signature = elsewhere
    made = catsig(data, signature[::order], public_modulus(_pem(signers.ours.public_key())))
    assert made == sign(_HASH, signers.ours, **FIELDS)
    verify(made)


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, 639), change=st.integers(1, 255))
def test_catsig_refuses_every_changed_byte(
    signers: Signers, elsewhere: tuple[bytes, bytes], at: int, change: int
) -> None:
    """Of the data (256 bytes), or of the signature (384)."""
    damaged = bytearray(b"".join(elsewhere))
    damaged[at] ^= change
    modulus = signers.ours.public_key().public_numbers().n
    with pytest.raises(IntegrityError) as caught:
        catsig(bytes(damaged[:256]), bytes(damaged[256:]), modulus)
    assert caught.value.id in ("sgx.sigstruct.signature", "sgx.sigstruct.reserved", "sgx.sigstruct.constant")


def test_catsig_refuses_other_keys_and_lengths(signers: Signers, elsewhere: tuple[bytes, bytes]) -> None:
    data, signature = elsewhere
    for modulus in (signers.theirs.public_key().public_numbers().n, 1 << 3071 | 1):
        with pytest.raises(IntegrityError) as caught:
            catsig(data, signature, modulus)
        assert caught.value.id == "sgx.sigstruct.signature"
    modulus = signers.ours.public_key().public_numbers().n
    for wrong in (b"", signature[:-1], b"\0" + signature, b"\xff" * 384):
        with pytest.raises(IntegrityError) as caught:
            catsig(data, wrong, modulus)
        assert caught.value.id == "sgx.sigstruct.signature"


@pytest.mark.parametrize("name", _REAL)
def test_gendata_of_real_ones(vectors: Path, name: str) -> None:
    """Taken apart and put together again, they are the same bytes."""
    raw = (vectors / "measure" / name).read_bytes()
    signed = Sigstruct.from_bytes(raw)
    data = signed.signed_bytes()
    parsed = parse_gendata(data)
    assert (parsed.enclave_hash, parsed.isv_svn, parsed.modulus) == (signed.enclave_hash, signed.isv_svn, bytes(384))
    assert parsed.signed_bytes() == data
    modulus = int.from_bytes(signed.modulus, "little")
    assert catsig(data, signed.signature[::-1], modulus).to_bytes() == raw


@given(st.binary(max_size=300))
def test_rubbish_is_no_gendata(data: bytes) -> None:
    with pytest.raises(StructureError) as caught:
        parse_gendata(data)
    assert (caught.value.id == "sgx.sigstruct.gendata") == (len(data) != 256)


@pytest.mark.parametrize("at", [0, 15, 24, 39, 44, 127, 128 + 10, 128 + 11, 128 + 92, 128 + 107])
def test_gendata_header_and_reserved_bytes(at: int) -> None:
    damaged = bytearray(unsigned(_HASH, **FIELDS).signed_bytes())
    damaged[at] ^= 1
    with pytest.raises(StructureError):
        parse_gendata(bytes(damaged))


def test_only_an_enclave_signers_public_key_will_do(signers: Signers) -> None:
    assert public_modulus(_pem(signers.ours.public_key())) == signers.ours.public_key().public_numbers().n
    private = signers.ours.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    others = [
        _pem(rsa.generate_private_key(65537, 3072).public_key()),
        _pem(rsa.generate_private_key(3, 2048).public_key()),
        _pem(ec.generate_private_key(ec.SECP256R1()).public_key()),
        private,
        b"rubbish",
        b"",
    ]
    for pem in others:
        with pytest.raises(UsageError) as caught:
            public_modulus(pem)
        assert caught.value.id == "sgx.sigstruct.publickey"


def test_attributes_and_masks_are_the_signers(signers: Signers) -> None:
    signed = sign(_HASH, signers.ours, **FIELDS)
    assert signed.attributes == Attributes(FIELDS["attributes"], 0xE7).to_bytes()
    assert signed.attribute_mask == Attributes(FIELDS["attribute_mask"], FIELDS["xfrm_mask"]).to_bytes()
