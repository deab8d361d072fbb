"""EGETKEY and EREPORT: whom a key depends on, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from inclavare.errors import EvidenceError, PolicyError
from inclavare.sgx import keys, report
from inclavare.sgx.keys import Identity, RootKeys, aes_cmac, egetkey
from inclavare.sgx.structs import ATTRIBUTE_DEBUG, ATTRIBUTE_INIT, ATTRIBUTE_KSS, Attributes, KeyRequest

ROOTS = RootKeys(provisioning=b"p" * 16, seal=b"s" * 16, owner_epoch=b"o" * 16, cpusvn=bytes([2] * 16))
ENCLAVE = Identity(
    mrenclave=b"e" * 32, mrsigner=b"g" * 32, attributes=Attributes(ATTRIBUTE_INIT | 4, 3), isv_prod_id=7, isv_svn=3
)
MASK = Attributes(ATTRIBUTE_INIT | ATTRIBUTE_DEBUG, 0).to_bytes()
REQUEST = KeyRequest(
    key_name=keys.KEY_SEAL, key_policy=keys.POLICY_MRENCLAVE, isv_svn=3, cpusvn=ROOTS.cpusvn, attribute_mask=MASK
)
BY_SIGNER = replace(REQUEST, key_policy=keys.POLICY_MRSIGNER)
OTHER = replace(ENCLAVE, mrenclave=b"f" * 32)


def test_cmac_against_rfc_4493() -> None:
    key = bytes.fromhex("2b7e151628aed2a6abf7158809cf4f3c")
    assert aes_cmac(key, b"").hex() == "bb1d6929e95937287fa37d129b756746"
    message = bytes.fromhex("6bc1bee22e409f96e93d7e117393172a")
    assert aes_cmac(key, message).hex() == "070a16b46b4d4144f79bdd9dd04a287c"


def test_same_enclave_same_key() -> None:
    assert egetkey(ROOTS, ENCLAVE, REQUEST) == egetkey(ROOTS, ENCLAVE, REQUEST)
    assert len(egetkey(ROOTS, ENCLAVE, REQUEST)) == 16


def test_mrenclave_policy_separates_and_mrsigner_policy_shares() -> None:
    assert egetkey(ROOTS, ENCLAVE, REQUEST) != egetkey(ROOTS, OTHER, REQUEST)
    assert egetkey(ROOTS, ENCLAVE, BY_SIGNER) == egetkey(ROOTS, OTHER, BY_SIGNER)


@pytest.mark.parametrize(
    "other",
    [
        replace(ENCLAVE, mrsigner=b"h" * 32),
        replace(ENCLAVE, isv_prod_id=8),
        replace(ENCLAVE, attributes=Attributes(ATTRIBUTE_INIT | ATTRIBUTE_DEBUG | 4, 3)),
    ],
    ids=["signer", "product", "debug"],
)
def test_signer_key_depends_on(other: Identity) -> None:
    assert egetkey(ROOTS, other, BY_SIGNER) != egetkey(ROOTS, ENCLAVE, BY_SIGNER)


def test_debug_is_bound_even_if_the_mask_leaves_it_out() -> None:
    request = replace(BY_SIGNER, attribute_mask=bytes(16))
    debug = replace(ENCLAVE, attributes=Attributes(ATTRIBUTE_INIT | ATTRIBUTE_DEBUG | 4, 3))
    assert egetkey(ROOTS, debug, request) != egetkey(ROOTS, ENCLAVE, request)


@pytest.mark.parametrize(
    "request_",
    [
        replace(REQUEST, key_id=b"k" * 32),
        replace(REQUEST, isv_svn=2),
        replace(REQUEST, cpusvn=bytes(16)),
        replace(REQUEST, attribute_mask=bytes(16)),
        replace(REQUEST, key_policy=3),
        replace(REQUEST, misc_mask=1),
    ],
)
def test_every_part_of_the_request_counts(request_: KeyRequest) -> None:
    assert egetkey(ROOTS, ENCLAVE, request_) != egetkey(ROOTS, ENCLAVE, REQUEST)


@pytest.mark.parametrize("roots", [replace(ROOTS, seal=b"t" * 16), replace(ROOTS, owner_epoch=b"t" * 16)])
def test_seal_keys_are_the_platforms_own(roots: RootKeys) -> None:
    assert egetkey(roots, ENCLAVE, REQUEST) != egetkey(ROOTS, ENCLAVE, REQUEST)


def test_older_versions_keys_can_be_had_and_newer_ones_cannot() -> None:
    newer = replace(ENCLAVE, isv_svn=4)
    assert egetkey(ROOTS, newer, BY_SIGNER) == egetkey(ROOTS, ENCLAVE, BY_SIGNER)


@pytest.mark.parametrize(
    ("id", "request_"),
    [
        ("sgx.egetkey.isvsvn", replace(REQUEST, isv_svn=4)),
        ("sgx.egetkey.cpusvn", replace(REQUEST, cpusvn=bytes([2] * 15 + [3]))),
        ("sgx.egetkey.keyname", replace(REQUEST, key_name=9)),
        ("sgx.egetkey.keypolicy", replace(REQUEST, key_policy=1 << 6)),
        ("sgx.egetkey.keypolicy", replace(REQUEST, key_policy=keys.POLICY_CONFIGID)),
        ("sgx.egetkey.attribute", replace(REQUEST, key_name=keys.KEY_PROVISION)),
        ("sgx.egetkey.attribute", replace(REQUEST, key_name=keys.KEY_PROVISION_SEAL)),
        ("sgx.egetkey.attribute", replace(REQUEST, key_name=keys.KEY_EINITTOKEN)),
    ],
)
def test_refusals(id: str, request_: KeyRequest) -> None:
    with pytest.raises(PolicyError) as caught:
        egetkey(ROOTS, ENCLAVE, request_)
    assert caught.value.id == id


def test_key_separation_and_sharing_policies() -> None:
    enclave = replace(ENCLAVE, attributes=Attributes(ATTRIBUTE_INIT | ATTRIBUTE_KSS | 4, 3), config_id=b"c" * 64)
    request = replace(BY_SIGNER, key_policy=keys.POLICY_MRSIGNER | keys.POLICY_CONFIGID)
    other = replace(enclave, config_id=b"d" * 64)
    assert egetkey(ROOTS, enclave, request) != egetkey(ROOTS, other, request)
    without_product = replace(BY_SIGNER, key_policy=keys.POLICY_MRSIGNER | keys.POLICY_NOISVPRODID)
    assert egetkey(ROOTS, enclave, without_product) == egetkey(ROOTS, replace(enclave, isv_prod_id=9), without_product)


def test_report_is_for_its_addressee_only() -> None:
    made = report.ereport(ROOTS, ENCLAVE, report.target_info(OTHER), b"d" * 64, b"i" * 32)
    assert report.verify(ROOTS, OTHER, made).report_data == b"d" * 64
    for verifier in (ENCLAVE, replace(OTHER, attributes=Attributes(ATTRIBUTE_INIT, 3))):
        with pytest.raises(EvidenceError) as caught:
            report.verify(ROOTS, verifier, made)
        assert caught.value.id == "evidence.report.mac"


def test_report_of_another_platform_is_refused() -> None:
    elsewhere = replace(ROOTS, seal=b"x" * 16)
    made = report.ereport(elsewhere, ENCLAVE, report.target_info(OTHER), b"d" * 64, b"i" * 32)
    with pytest.raises(EvidenceError):
        report.verify(ROOTS, OTHER, made)


def test_every_byte_of_a_report_is_covered() -> None:
    made = report.ereport(ROOTS, ENCLAVE, report.target_info(OTHER), b"d" * 64, b"i" * 32).to_bytes()
    for at in range(len(made)):
        damaged = bytearray(made)
        damaged[at] ^= 1
        with pytest.raises(EvidenceError):
            report.verify(ROOTS, OTHER, report.Report.from_bytes(bytes(damaged)))


def test_root_keys_do_not_show_in_their_repr() -> None:
    assert "pppp" not in repr(ROOTS) and "ssss" not in repr(ROOTS)
