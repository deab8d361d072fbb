"""EINITTOKEN: made as a launch enclave makes it, checked as EINIT does (SDM vol. 3D, EINIT)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inclavare.errors import PolicyError
from inclavare.sgx.codes import Status
from inclavare.sgx.keys import Identity, KeyRefused, RootKeys, egetkey
from inclavare.sgx.launch import EinitToken
from inclavare.sgx.structs import (
    ATTRIBUTE_DEBUG,
    ATTRIBUTE_EINITTOKENKEY,
    ATTRIBUTE_INIT,
    ATTRIBUTE_KSS,
    ATTRIBUTE_MODE64BIT,
    Attributes,
)
from inclavare.sgx.tokens import TokenRefused, check_token, make_token

ROOTS = RootKeys(provisioning=b"p" * 16, seal=b"s" * 16, owner_epoch=b"o" * 16, cpusvn=bytes([2] * 16))
LE = Identity(
    mrenclave=b"l" * 32,
    mrsigner=b"h" * 32,
    attributes=Attributes(ATTRIBUTE_INIT | ATTRIBUTE_MODE64BIT | ATTRIBUTE_EINITTOKENKEY, 0xE7),
    isv_prod_id=0x20,
    isv_svn=3,
    miscselect=1,
)
ENCLAVE: dict[str, Any] = {
    "mrenclave": b"e" * 32,
    "mrsigner": b"g" * 32,
    "attributes": Attributes(ATTRIBUTE_MODE64BIT, 0x7),
}


def _token(launch: Identity = LE, roots: RootKeys = ROOTS, **changes: Any) -> EinitToken:
    return make_token(
        lambda request: egetkey(roots, launch, request), launch, roots.cpusvn, b"i" * 32, **{**ENCLAVE, **changes}
    )


TOKEN = _token().to_bytes()


def _check(token: bytes, roots: RootKeys = ROOTS, launch_key_hash: bytes = LE.mrsigner, **changes: Any) -> None:
    check_token(token, roots, launch_key_hash, **{**ENCLAVE, **changes})


def _refusal(*args: Any, **changes: Any) -> tuple[str, Status]:
    with pytest.raises(TokenRefused) as caught:
        _check(*args, **changes)
    assert isinstance(caught.value, PolicyError)
    return caught.value.id.removeprefix("sgx.einittoken."), caught.value.status


def test_a_token_permits_the_start() -> None:
    _check(TOKEN)
    parsed = EinitToken.from_bytes(TOKEN)
    assert (parsed.valid, parsed.isv_prod_id_le, parsed.isv_svn_le, parsed.cpusvn_le) == (1, 0x20, 3, ROOTS.cpusvn)
    # As Intel's launch enclave has it: INIT and EINITTOKENKEY, neither MODE64BIT nor XFRM.
    assert Attributes.from_bytes(parsed.masked_attributes_le) == Attributes(0x21, 0)
    assert parsed.masked_miscselect_le == 1


def test_einit_valid_0_needs_the_authorised_signer() -> None:
    assert _refusal(bytes(304)) == ("missing", Status.SGX_INVALID_EINITTOKEN)
    _check(bytes(304), mrsigner=LE.mrsigner)
    # What else stands in such a token does not count.
    _check(b"\xfe" + b"\xff" * 303, mrsigner=LE.mrsigner)


def test_einit_valid_1_is_checked_even_for_the_authorised_signer() -> None:
    assert _refusal(TOKEN, mrsigner=LE.mrsigner) == ("measurement", Status.SGX_INVALID_MEASUREMENT)


def test_einit_debug_launch_enclave_cannot_launch_production_enclaves() -> None:
    launch = replace(LE, attributes=Attributes(LE.attributes.flags | ATTRIBUTE_DEBUG, 0xE7))
    assert _refusal(_token(launch).to_bytes()) == ("debug", Status.SGX_INVALID_EINITTOKEN)
    debug = Attributes(ATTRIBUTE_MODE64BIT | ATTRIBUTE_DEBUG, 0x7)
    _check(_token(launch, attributes=debug).to_bytes(), attributes=debug)
    # The other way round is allowed: a production launch enclave permits debug enclaves.
    _check(_token(attributes=debug).to_bytes(), attributes=debug)


@pytest.mark.parametrize("at", [1, 3, 4, 47, 96, 127, 160, 191, 213, 235])
def test_einit_reserved_space_must_be_clear(at: int) -> None:
    damaged = bytearray(TOKEN)
    damaged[at] ^= 0x80
    assert _refusal(bytes(damaged)) == ("reserved", Status.SGX_INVALID_EINITTOKEN)


@pytest.mark.parametrize("bit", range(1, 32))
def test_einit_upper_bits_of_valid_must_be_clear(bit: int) -> None:
    damaged = (1 | 1 << bit).to_bytes(4, "little") + TOKEN[4:]
    assert _refusal(damaged) == ("reserved", Status.SGX_INVALID_EINITTOKEN)


@pytest.mark.parametrize("component", [0, 15])
def test_einit_cpusvnle_must_not_be_beyond_the_processors(component: int) -> None:
    newer = bytes(3 if at == component else 0 for at in range(16))
    made = _token(roots=replace(ROOTS, cpusvn=newer)).to_bytes()
    assert _refusal(made) == ("cpusvn", Status.SGX_INVALID_CPUSVN)


def test_einit_a_token_of_an_older_tcb_is_good() -> None:
    _check(_token(roots=replace(ROOTS, cpusvn=bytes([1] * 16))).to_bytes())


@pytest.mark.parametrize(
    "field",
    ["isv_prod_id_le", "isv_svn_le", "masked_miscselect_le", "cet_masked_attributes_le"],
)
def test_einit_fields_of_the_launch_enclave_enter_its_key(field: str) -> None:
    parsed = EinitToken.from_bytes(TOKEN)
    damaged = replace(parsed, **{field: getattr(parsed, field) ^ 1}).to_bytes()
    assert _refusal(damaged) == ("mac", Status.SGX_INVALID_EINITTOKEN)


@pytest.mark.parametrize("other", ["provisioning", "seal", "owner_epoch"])
def test_einit_a_token_of_another_platform_or_owner(other: str) -> None:
    assert _refusal(TOKEN, replace(ROOTS, **{other: b"x" * 16})) == ("mac", Status.SGX_INVALID_EINITTOKEN)


def test_einit_a_token_of_another_launch_enclaves_signer() -> None:
    assert _refusal(TOKEN, ROOTS, b"x" * 32) == ("mac", Status.SGX_INVALID_EINITTOKEN)


@pytest.mark.parametrize("name", ["mrenclave", "mrsigner"])
def test_einit_a_token_is_for_one_enclave(name: str) -> None:
    assert _refusal(TOKEN, **{name: b"x" * 32}) == ("measurement", Status.SGX_INVALID_MEASUREMENT)


@pytest.mark.parametrize(
    "attributes", [Attributes(ATTRIBUTE_MODE64BIT | ATTRIBUTE_KSS, 0x7), Attributes(ATTRIBUTE_MODE64BIT, 0x3)]
)
def test_einit_a_token_is_for_these_attributes(attributes: Attributes) -> None:
    assert _refusal(TOKEN, attributes=attributes) == ("attributes", Status.SGX_INVALID_ATTRIBUTE)


def test_only_a_launch_enclave_can_make_one() -> None:
    other = replace(LE, attributes=Attributes(ATTRIBUTE_INIT | ATTRIBUTE_MODE64BIT, 3))
    with pytest.raises(KeyRefused) as caught:
        _token(other)
    assert caught.value.status is Status.SGX_INVALID_ATTRIBUTE


def test_no_bit_of_a_token_can_be_changed() -> None:
    for bit in range(len(TOKEN) * 8):
        damaged = bytearray(TOKEN)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(TokenRefused):
            _check(bytes(damaged))


@given(st.binary(max_size=400))
def test_rubbish_is_no_token(data: bytes) -> None:
    with pytest.raises(TokenRefused):
        _check(data)
