"""EGETKEY and EREPORT: what each key depends on, and what is refused (SDM vol. 3D, EGETKEY)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from inclavare.errors import EvidenceError, PolicyError
from inclavare.sgx import keys, report
from inclavare.sgx.codes import Status
from inclavare.sgx.keys import Identity, KeyRefused, RootKeys, aes_cmac, egetkey
from inclavare.sgx.structs import (
    ATTRIBUTE_DEBUG,
    ATTRIBUTE_EINITTOKENKEY,
    ATTRIBUTE_INIT,
    ATTRIBUTE_KSS,
    ATTRIBUTE_MODE64BIT,
    ATTRIBUTE_PROVISIONKEY,
    Attributes,
    KeyRequest,
)

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

_FLAGS = ATTRIBUTE_INIT | ATTRIBUTE_MODE64BIT | ATTRIBUTE_PROVISIONKEY | ATTRIBUTE_EINITTOKENKEY | ATTRIBUTE_KSS
#: An enclave that may ask for every key, with every field set.
FULL = Identity(
    mrenclave=b"e" * 32,
    mrsigner=b"g" * 32,
    attributes=Attributes(_FLAGS, 0xE7),
    isv_prod_id=7,
    isv_svn=5,
    miscselect=0b11,
    cet_attributes=0b11,
    config_id=b"c" * 64,
    config_svn=9,
    isv_family_id=b"f" * 16,
    isv_ext_prod_id=b"x" * 16,
)
NAMES = {
    "EINITTOKEN": keys.KEY_EINITTOKEN,
    "PROVISION": keys.KEY_PROVISION,
    "PROVISION_SEAL": keys.KEY_PROVISION_SEAL,
    "REPORT": keys.KEY_REPORT,
    "SEAL": keys.KEY_SEAL,
}
EVERY_POLICY = 0x3F & ~keys.POLICY_NOISVPRODID


def _request(name: int, **fields: Any) -> KeyRequest:
    """Each field at a value that the enclave may ask for; the masks select the lowest bit, XFRM's AVX, and KSS."""
    base = KeyRequest(
        key_name=name,
        key_policy=EVERY_POLICY,
        isv_svn=4,
        cet_attributes_mask=0b01,
        cpusvn=bytes([1] * 16),
        attribute_mask=Attributes(ATTRIBUTE_KSS, 0x4).to_bytes(),
        key_id=b"k" * 32,
        misc_mask=0b01,
        config_svn=8,
    )
    return replace(base, **fields)


def _attributes(flags: int = _FLAGS, xfrm: int = 0xE7) -> Attributes:
    return Attributes(flags, xfrm)


#: The table "Key Derivation": what changes, and which keys change with it.
DEPENDENCIES: list[tuple[str, dict[str, Any], str]] = [
    # The package's own secrets. SEAL and REPORT hang on the seal fuses, PROVISION on what Intel knows, too.
    ("root provisioning key", {"roots": {"provisioning": b"q" * 16}}, "EINITTOKEN PROVISION PROVISION_SEAL"),
    ("CR_SEAL_FUSES", {"roots": {"seal": b"t" * 16}}, "EINITTOKEN PROVISION_SEAL REPORT SEAL"),
    ("CR_SGXOWNEREPOCH", {"roots": {"owner_epoch": b"u" * 16}}, "EINITTOKEN REPORT SEAL"),
    ("CR_CPUSVN", {"roots": {"cpusvn": bytes([3] * 16)}}, "REPORT"),
    # The enclave.
    ("SECS.MRENCLAVE", {"enclave": {"mrenclave": b"E" * 32}}, "REPORT SEAL"),
    ("SECS.MRSIGNER", {"enclave": {"mrsigner": b"G" * 32}}, "EINITTOKEN PROVISION PROVISION_SEAL SEAL"),
    ("SECS.ISVPRODID", {"enclave": {"isv_prod_id": 8}}, "EINITTOKEN PROVISION PROVISION_SEAL SEAL"),
    ("SECS.ISVSVN", {"enclave": {"isv_svn": 6}}, ""),
    ("SECS.ISVFAMILYID", {"enclave": {"isv_family_id": b"F" * 16}}, "PROVISION_SEAL SEAL"),
    ("SECS.ISVEXTPRODID", {"enclave": {"isv_ext_prod_id": b"X" * 16}}, "PROVISION_SEAL SEAL"),
    ("SECS.CONFIGID", {"enclave": {"config_id": b"C" * 64}}, "PROVISION_SEAL REPORT SEAL"),
    ("SECS.CONFIGSVN", {"enclave": {"config_svn": 10}}, "REPORT"),
    (
        "ATTRIBUTES.DEBUG, whatever the mask",
        {"enclave": {"attributes": _attributes(_FLAGS | ATTRIBUTE_DEBUG)}},
        " ".join(NAMES),
    ),
    (
        "ATTRIBUTES.INIT, whatever the mask",
        {"enclave": {"attributes": _attributes(_FLAGS & ~ATTRIBUTE_INIT)}},
        " ".join(NAMES),
    ),
    ("ATTRIBUTES.FLAGS outside the mask", {"enclave": {"attributes": _attributes(_FLAGS & ~4)}}, "REPORT"),
    ("ATTRIBUTES.XFRM inside the mask", {"enclave": {"attributes": _attributes(xfrm=0xE3)}}, " ".join(NAMES)),
    ("ATTRIBUTES.XFRM outside the mask", {"enclave": {"attributes": _attributes(xfrm=0x07)}}, "REPORT"),
    ("MISCSELECT inside the mask", {"enclave": {"miscselect": 0b10}}, " ".join(NAMES)),
    ("MISCSELECT outside the mask", {"enclave": {"miscselect": 0b01}}, "REPORT"),
    ("CET_ATTRIBUTES inside the mask", {"enclave": {"cet_attributes": 0b10}}, " ".join(NAMES)),
    ("CET_ATTRIBUTES outside the mask", {"enclave": {"cet_attributes": 0b01}}, "REPORT"),
    # The request.
    ("KEYREQUEST.ISVSVN", {"request": {"isv_svn": 3}}, "EINITTOKEN PROVISION PROVISION_SEAL SEAL"),
    ("KEYREQUEST.CPUSVN", {"request": {"cpusvn": bytes(16)}}, "EINITTOKEN PROVISION PROVISION_SEAL SEAL"),
    ("KEYREQUEST.KEYID", {"request": {"key_id": b"K" * 32}}, "EINITTOKEN REPORT SEAL"),
    ("KEYREQUEST.CONFIGSVN", {"request": {"config_svn": 7}}, "PROVISION_SEAL SEAL"),
    (
        "KEYREQUEST.ATTRIBUTEMASK, the mask itself",
        {"request": {"attribute_mask": Attributes(ATTRIBUTE_KSS | 1 << 63, 0x4).to_bytes()}},
        "PROVISION PROVISION_SEAL SEAL",
    ),
    (
        "KEYREQUEST.ATTRIBUTEMASK, what it selects",
        {"request": {"attribute_mask": Attributes(ATTRIBUTE_KSS | ATTRIBUTE_MODE64BIT, 0x4).to_bytes()}},
        "EINITTOKEN PROVISION PROVISION_SEAL SEAL",
    ),
    ("KEYREQUEST.MISCMASK, the mask itself", {"request": {"misc_mask": 0x8000_0001}}, "PROVISION PROVISION_SEAL SEAL"),
    (
        "KEYREQUEST.MISCMASK, what it selects",
        {"request": {"misc_mask": 0b11}},
        "EINITTOKEN PROVISION PROVISION_SEAL SEAL",
    ),
    (
        "KEYREQUEST.CET_ATTRIBUTES_MASK, the mask itself",
        {"request": {"cet_attributes_mask": 0x81}},
        "PROVISION PROVISION_SEAL SEAL",
    ),
    (
        "KEYREQUEST.CET_ATTRIBUTES_MASK, what it selects",
        {"request": {"cet_attributes_mask": 0b11}},
        "EINITTOKEN PROVISION PROVISION_SEAL SEAL",
    ),
    # Each policy is an input of its own: the bit counts even where the field that it selects is zero.
    ("KEYPOLICY.MRENCLAVE", {"request": {"key_policy": EVERY_POLICY & ~keys.POLICY_MRENCLAVE}}, "PROVISION_SEAL SEAL"),
]


@pytest.mark.parametrize("key", NAMES)
@pytest.mark.parametrize(("what", "change", "changed"), DEPENDENCIES, ids=[row[0] for row in DEPENDENCIES])
def test_egetkey_table_key_derivation(what: str, change: dict[str, Any], changed: str, key: str) -> None:
    """The whole table: each input changes exactly the keys that the SDM says."""
    request = _request(NAMES[key])
    before = egetkey(ROOTS, FULL, request)
    after = egetkey(
        replace(ROOTS, **change.get("roots", {})),
        replace(FULL, **change.get("enclave", {})),
        replace(request, **change.get("request", {})),
    )
    assert (before != after) == (key in changed.split()), what


#: A policy's bit, and the field of SECS that it lets into (NOISVPRODID: keeps out of) seal and provisioning seal keys.
POLICIES: dict[int, dict[str, Any]] = {
    keys.POLICY_NOISVPRODID: {"isv_prod_id": 8},
    keys.POLICY_CONFIGID: {"config_id": b"C" * 64},
    keys.POLICY_ISVFAMILYID: {"isv_family_id": b"F" * 16},
    keys.POLICY_ISVEXTPRODID: {"isv_ext_prod_id": b"X" * 16},
}


@pytest.mark.parametrize("name", [keys.KEY_SEAL, keys.KEY_PROVISION_SEAL])
@pytest.mark.parametrize("policy", POLICIES)
def test_egetkey_keypolicy_selects_the_field_of_secs(policy: int, name: int) -> None:
    other = replace(FULL, **POLICIES[policy])
    with_bit, without = _request(name, key_policy=policy), _request(name, key_policy=0)
    enters_with_bit = policy != keys.POLICY_NOISVPRODID
    assert (egetkey(ROOTS, FULL, with_bit) != egetkey(ROOTS, other, with_bit)) == enters_with_bit
    assert (egetkey(ROOTS, FULL, without) != egetkey(ROOTS, other, without)) != enters_with_bit


@pytest.mark.parametrize(
    ("policy", "change"),
    [(keys.POLICY_MRENCLAVE, {"mrenclave": b"E" * 32}), (keys.POLICY_MRSIGNER, {"mrsigner": b"G" * 32})],
)
def test_egetkey_seal_key_mrenclave_and_mrsigner_are_the_policys_choice(policy: int, change: dict[str, Any]) -> None:
    other = replace(FULL, **change)
    chosen, left_out = (_request(keys.KEY_SEAL, key_policy=value) for value in (policy, 0))
    assert egetkey(ROOTS, FULL, chosen) != egetkey(ROOTS, other, chosen)
    assert egetkey(ROOTS, FULL, left_out) == egetkey(ROOTS, other, left_out)


@pytest.mark.parametrize("name", [keys.KEY_SEAL, keys.KEY_PROVISION_SEAL])
def test_egetkey_configsvn_enters_with_configid_only(name: int) -> None:
    with_id, without = (_request(name, key_policy=policy) for policy in (keys.POLICY_CONFIGID, 0))
    assert egetkey(ROOTS, FULL, with_id) != egetkey(ROOTS, FULL, replace(with_id, config_svn=7))
    assert egetkey(ROOTS, FULL, without) == egetkey(ROOTS, FULL, replace(without, config_svn=7))


@pytest.mark.parametrize("name", [keys.KEY_SEAL, keys.KEY_PROVISION_SEAL])
@pytest.mark.parametrize("bit", range(6))
def test_egetkey_keypolicy_itself_is_a_dependency(name: int, bit: int) -> None:
    """Where the field that a policy selects is zero, the key under that policy still differs."""
    empty = replace(
        FULL, mrenclave=bytes(32), mrsigner=bytes(32), isv_prod_id=0, config_id=bytes(64), config_svn=0,
        isv_family_id=bytes(16), isv_ext_prod_id=bytes(16),
    )  # fmt: skip
    with_bit, without = (_request(name, key_policy=policy, config_svn=0) for policy in (1 << bit, 0))
    assert egetkey(ROOTS, empty, with_bit) != egetkey(ROOTS, empty, without)


@pytest.mark.parametrize("name", [keys.KEY_EINITTOKEN, keys.KEY_PROVISION, keys.KEY_REPORT])
def test_egetkey_keypolicy_does_not_matter_to(name: int) -> None:
    found = {egetkey(ROOTS, FULL, _request(name, key_policy=policy)) for policy in (0, 0x3F, keys.POLICY_NOISVPRODID)}
    assert len(found) == 1


def test_egetkey_each_keyname_is_another_key() -> None:
    one_root = replace(ROOTS, provisioning=ROOTS.seal)
    for roots in (ROOTS, one_root):
        assert len({egetkey(roots, FULL, _request(name)) for name in NAMES.values()}) == len(NAMES)


_SVN_KEYS = [name for label, name in NAMES.items() if label != "REPORT"]


def _refusal(enclave: Identity, request: KeyRequest) -> KeyRefused:
    with pytest.raises(KeyRefused) as caught:
        egetkey(ROOTS, enclave, request)
    assert isinstance(caught.value, PolicyError)
    return caught.value


@pytest.mark.parametrize("name", _SVN_KEYS)
@pytest.mark.parametrize("component", [0, 7, 15])
def test_egetkey_cpusvn_beyond_current_configuration(name: int, component: int) -> None:
    """One component above is beyond, however low the others are; equal and lower are not."""
    egetkey(ROOTS, FULL, _request(name, cpusvn=ROOTS.cpusvn))
    beyond = bytes(3 if at == component else 0 for at in range(16))
    refusal = _refusal(FULL, _request(name, cpusvn=beyond))
    assert (refusal.id, refusal.status) == ("sgx.egetkey.cpusvn", Status.SGX_INVALID_CPUSVN)


@pytest.mark.parametrize("name", _SVN_KEYS)
def test_egetkey_isvsvn_above_secs_isvsvn(name: int) -> None:
    egetkey(ROOTS, FULL, _request(name, isv_svn=5))
    refusal = _refusal(FULL, _request(name, isv_svn=6))
    assert (refusal.id, refusal.status) == ("sgx.egetkey.isvsvn", Status.SGX_INVALID_ISVSVN)
    assert (refusal.found, refusal.expected) == (6, 5)


@pytest.mark.parametrize("name", [keys.KEY_SEAL, keys.KEY_PROVISION_SEAL])
@pytest.mark.parametrize("policy", [0, keys.POLICY_CONFIGID])
def test_egetkey_configsvn_above_secs_configsvn(name: int, policy: int) -> None:
    """Whether or not CONFIGSVN enters the key."""
    egetkey(ROOTS, FULL, _request(name, key_policy=policy, config_svn=9))
    refusal = _refusal(FULL, _request(name, key_policy=policy, config_svn=10))
    assert (refusal.id, refusal.status) == ("sgx.egetkey.configsvn", Status.SGX_INVALID_ISVSVN)


@pytest.mark.parametrize("name", [keys.KEY_EINITTOKEN, keys.KEY_PROVISION, keys.KEY_REPORT])
def test_egetkey_configsvn_is_not_compared_for(name: int) -> None:
    assert egetkey(ROOTS, FULL, _request(name, config_svn=10)) == egetkey(ROOTS, FULL, _request(name))


def test_egetkey_report_key_has_no_svn_to_ask_for() -> None:
    asked = _request(keys.KEY_REPORT, isv_svn=99, cpusvn=b"\xff" * 16)
    assert egetkey(ROOTS, FULL, asked) == egetkey(ROOTS, FULL, _request(keys.KEY_REPORT))


@pytest.mark.parametrize(
    ("name", "attribute"),
    [
        (keys.KEY_EINITTOKEN, ATTRIBUTE_EINITTOKENKEY),
        (keys.KEY_PROVISION, ATTRIBUTE_PROVISIONKEY),
        (keys.KEY_PROVISION_SEAL, ATTRIBUTE_PROVISIONKEY),
    ],
)
def test_egetkey_attributes_entitle_to(name: int, attribute: int) -> None:
    refusal = _refusal(replace(FULL, attributes=_attributes(_FLAGS & ~attribute)), _request(name))
    assert (refusal.id, refusal.status) == ("sgx.egetkey.attribute", Status.SGX_INVALID_ATTRIBUTE)
    # That very attribute, and no other, is what it takes.
    only = replace(FULL, attributes=_attributes(ATTRIBUTE_INIT | ATTRIBUTE_KSS | attribute))
    assert len(egetkey(ROOTS, only, _request(name))) == 16


@pytest.mark.parametrize("name", [keys.KEY_SEAL, keys.KEY_REPORT])
def test_egetkey_every_enclave_may_ask_for(name: int) -> None:
    plain = replace(FULL, attributes=Attributes(ATTRIBUTE_INIT | ATTRIBUTE_KSS, 3))
    assert len(egetkey(ROOTS, plain, _request(name))) == 16


@pytest.mark.parametrize("name", [5, 0xFF, 0xFFFF])
def test_egetkey_invalid_keyname(name: int) -> None:
    refusal = _refusal(FULL, _request(name))
    assert (refusal.id, refusal.status) == ("sgx.egetkey.keyname", Status.SGX_INVALID_KEYNAME)


@pytest.mark.parametrize("name", NAMES.values())
@pytest.mark.parametrize("bit", range(6, 16))
def test_egetkey_reserved_keypolicy_bit_is_gp(bit: int, name: int) -> None:
    refusal = _refusal(FULL, _request(name, key_policy=1 << bit))
    assert (refusal.id, refusal.status) == ("sgx.egetkey.keypolicy", None)


_WITHOUT_KSS = replace(FULL, attributes=_attributes(_FLAGS & ~ATTRIBUTE_KSS))


@pytest.mark.parametrize("name", NAMES.values())
@pytest.mark.parametrize("bit", range(2, 6))
def test_egetkey_kss_policy_without_kss_is_gp(bit: int, name: int) -> None:
    refusal = _refusal(_WITHOUT_KSS, _request(name, key_policy=1 << bit, config_svn=0))
    assert (refusal.id, refusal.status) == ("sgx.egetkey.keypolicy", None)


@pytest.mark.parametrize("name", NAMES.values())
def test_egetkey_configsvn_without_kss_is_gp(name: int) -> None:
    egetkey(ROOTS, _WITHOUT_KSS, _request(name, key_policy=3, config_svn=0))
    refusal = _refusal(_WITHOUT_KSS, _request(name, key_policy=3, config_svn=1))
    assert (refusal.id, refusal.status) == ("sgx.egetkey.keypolicy", None)


def test_egetkey_gp_comes_before_error_codes() -> None:
    refusal = _refusal(FULL, _request(9, key_policy=1 << 6, isv_svn=99))
    assert refusal.status is None


_COUNTED = bytes(range(132))
_PLATFORM = RootKeys(_COUNTED[:16], _COUNTED[16:32], _COUNTED[32:48], bytes((2, 2, 2, 2, 2, 1)) + bytes(10))
_RESIDENT = Identity(
    mrenclave=_COUNTED[:32],
    mrsigner=_COUNTED[32:64],
    attributes=Attributes(0xB5, 0xE7),
    isv_prod_id=0x0102,
    isv_svn=5,
    miscselect=1,
    cet_attributes=3,
    config_id=_COUNTED[:64],
    config_svn=7,
    isv_family_id=_COUNTED[64:80],
    isv_ext_prod_id=_COUNTED[80:96],
)


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        *(
            (
                keys.KEY_SEAL,
                {
                    "key_policy": policy,
                    "key_id": _COUNTED[100:],
                    "misc_mask": 0xF0000001,
                    "config_svn": 6,
                    "cet_attributes_mask": 1,
                },
                expected,
            )
            for policy, expected in (
                (1, "5294141a11bc65f8d293ecc2e029fb22"),
                (2, "867551c14ef423d0b05bd9a15b748f16"),
                (63, "c2097c338a24cb6a2a18e983b669464a"),
                (0, "2ec50d73ff91e0c7d60cf49c4a0425c2"),
            )
        ),
        (keys.KEY_PROVISION, {}, "caeb3c87eea8860c2eb5e3c1311b4a9d"),
        (keys.KEY_PROVISION_SEAL, {}, "e992d25bb67155514dd2d4fba4c2c74e"),
        (keys.KEY_REPORT, {}, "71641813682fc301a0afed8f48e2c248"),
        (keys.KEY_EINITTOKEN, {}, "5fe8ad750662f79532d0842d77d9d759"),
    ],
)
def test_keys_of_platforms_in_use_stay_the_same(name: int, fields: dict[str, Any], expected: str) -> None:
    """What was sealed with the first release must open with every later one."""
    mask = Attributes(0xFF00000000000003, 0).to_bytes()
    request = KeyRequest(key_name=name, isv_svn=4, cpusvn=_PLATFORM.cpusvn, attribute_mask=mask, **fields)
    assert egetkey(_PLATFORM, _RESIDENT, request).hex() == expected


def test_what_an_identity_does_not_say_is_zero() -> None:
    assert replace(
        FULL,
        miscselect=0,
        cet_attributes=0,
        config_svn=0,
        config_id=bytes(64),
        isv_family_id=bytes(16),
        isv_ext_prod_id=bytes(16),
    ) == Identity(FULL.mrenclave, FULL.mrsigner, FULL.attributes, FULL.isv_prod_id, FULL.isv_svn)


def test_cmac_against_rfc_4493() -> None:
    key = bytes.fromhex("2b7e151628aed2a6abf7158809cf4f3c")
    assert aes_cmac(key, b"").hex() == "bb1d6929e95937287fa37d129b756746"
    message = bytes.fromhex("6bc1bee22e409f96e93d7e117393172a")
    assert aes_cmac(key, message).hex() == "070a16b46b4d4144f79bdd9dd04a287c"


def test_older_versions_keys_can_be_had_and_newer_ones_cannot() -> None:
    newer = replace(ENCLAVE, isv_svn=4)
    assert egetkey(ROOTS, newer, BY_SIGNER) == egetkey(ROOTS, ENCLAVE, BY_SIGNER)
    assert _refusal(ENCLAVE, replace(BY_SIGNER, isv_svn=4)).status is Status.SGX_INVALID_ISVSVN


def test_ereport_is_for_its_addressee_only() -> None:
    made = report.ereport(ROOTS, ENCLAVE, report.target_info(OTHER), b"d" * 64, b"i" * 32)
    assert report.verify(ROOTS, OTHER, made).report_data == b"d" * 64
    for verifier in (ENCLAVE, replace(OTHER, attributes=Attributes(ATTRIBUTE_INIT, 3))):
        with pytest.raises(EvidenceError) as caught:
            report.verify(ROOTS, verifier, made)
        assert caught.value.id == "evidence.report.mac"


def test_ereport_and_egetkey_agree_on_the_report_key() -> None:
    made = report.ereport(ROOTS, ENCLAVE, report.target_info(FULL), b"d" * 64, b"i" * 32)
    key = egetkey(ROOTS, FULL, KeyRequest(key_name=keys.KEY_REPORT, key_id=b"i" * 32))
    assert aes_cmac(key, made.body) == made.mac


@pytest.mark.parametrize("other", [{"seal": b"x" * 16}, {"owner_epoch": b"x" * 16}, {"cpusvn": bytes(16)}])
def test_ereport_of_another_platform_owner_or_tcb_is_refused(other: dict[str, bytes]) -> None:
    elsewhere = replace(ROOTS, **other)
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
    assert "pppp" not in repr(ROOTS) and "ssss" not in repr(ROOTS) and "oooo" not in repr(ROOTS)
