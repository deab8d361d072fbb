"""The software platform's launch enclave."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from small_enclaves import Signers, sign_image, small_image

from inclavare.errors import IntegrityError, PlatformError, PolicyError
from inclavare.sgx.keys import RootKeys
from inclavare.sgx.sigstruct import mrsigner
from inclavare.sgx.structs import (
    ATTRIBUTE_DEBUG,
    ATTRIBUTE_EINITTOKENKEY,
    ATTRIBUTE_INIT,
    ATTRIBUTE_MODE64BIT,
    ATTRIBUTE_PROVISIONKEY,
    Attributes,
    Sigstruct,
)
from inclavare.sgx.tokens import TokenRefused, check_token
from inclavare.tee.sgx_sim import fuses, launch_enclave
from inclavare.tee.sgx_sim import processor as full
from inclavare.tee.sgx_sim.cpu import Processor

_ENCLAVE = {"mrenclave": b"e" * 32, "mrsigner": b"g" * 32}
_PRODUCTION = Attributes(ATTRIBUTE_MODE64BIT, 3)


@pytest.fixture
def roots(tmp_path: Path) -> RootKeys:
    return fuses.load(tmp_path)


@pytest.mark.parametrize("attributes", [_PRODUCTION, Attributes(ATTRIBUTE_MODE64BIT | ATTRIBUTE_DEBUG, 0xE7)])
def test_its_tokens_hold_on_its_platform_only(tmp_path: Path, roots: RootKeys, attributes: Attributes) -> None:
    token = launch_enclave.get_token(tmp_path, Processor(roots), **_ENCLAVE, attributes=attributes)
    raw, authorised = token.to_bytes(), launch_enclave.key_hash(tmp_path)
    check_token(raw, roots, authorised, **_ENCLAVE, attributes=attributes)
    # Another session of the same platform.
    check_token(raw, fuses.load(tmp_path), launch_enclave.key_hash(tmp_path), **_ENCLAVE, attributes=attributes)
    elsewhere = fuses.load(tmp_path / "other")
    with pytest.raises(TokenRefused):
        check_token(raw, elsewhere, authorised, **_ENCLAVE, attributes=attributes)
    again = launch_enclave.get_token(tmp_path, Processor(roots), **_ENCLAVE, attributes=attributes)
    assert again.key_id != token.key_id


@pytest.mark.parametrize(
    "flag", [ATTRIBUTE_PROVISIONKEY, ATTRIBUTE_EINITTOKENKEY, ATTRIBUTE_INIT, 1 << 3, 1 << 63], ids=hex
)
def test_what_it_permits_to_nobody(tmp_path: Path, roots: RootKeys, flag: int) -> None:
    with pytest.raises(PolicyError) as caught:
        launch_enclave.get_token(
            tmp_path, Processor(roots), **_ENCLAVE, attributes=Attributes(ATTRIBUTE_MODE64BIT | flag, 3)
        )
    assert caught.value.id == "tee.launch.attributes"


def test_it_is_signed_once(tmp_path: Path) -> None:
    directory = tmp_path / "platform"
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: launch_enclave.signature(directory), range(4)))
    assert len(found) == 1
    assert (directory / launch_enclave.FILE).stat().st_mode & 0o777 == 0o600
    signed = Sigstruct.from_bytes(found.pop())
    assert (signed.isv_prod_id, signed.isv_svn) == (0x20, 1)
    assert signed.attributes == Attributes(ATTRIBUTE_MODE64BIT | ATTRIBUTE_EINITTOKENKEY, 3).to_bytes()


def test_a_damaged_one_is_refused(tmp_path: Path) -> None:
    good = launch_enclave.signature(tmp_path)
    for damaged in (b"", good[:-1], good[:960] + bytes(32) + good[992:]):
        (tmp_path / launch_enclave.FILE).write_bytes(damaged)
        with pytest.raises(PlatformError) as caught:
            launch_enclave.signature(tmp_path)
        assert caught.value.id == "tee.launch.damaged"


def test_launch_control_of_the_full_processor_honours_its_tokens(
    tmp_path: Path, roots: RootKeys, signers: Signers
) -> None:
    """IA32_SGXLEPUBKEYHASH stays the launch enclave's: what starts the other enclave is the token."""
    driver = full.Driver(full.Processor(roots, epc_pages=32), full.AddressSpace())
    driver.load(launch_enclave.image(), launch_enclave.signature(tmp_path), base=0x10000000)
    assert driver.processor.le_pubkey_hash == launch_enclave.key_hash(tmp_path)
    image = small_image()
    signed = sign_image(image, signers.ours)
    token = launch_enclave.get_token(
        tmp_path,
        Processor(roots),
        mrenclave=signed.enclave_hash,
        mrsigner=mrsigner(signed.modulus),
        attributes=Attributes(image.attributes, image.xfrm),
    ).to_bytes()
    started = driver.load(image, signed.to_bytes(), base=0x20000000, token=token)
    assert driver.processor.le_pubkey_hash == launch_enclave.key_hash(tmp_path)
    driver.remove(started)
    for damaged, id in (
        (token[:-1] + bytes([token[-1] ^ 1]), "sgx.einittoken.mac"),
        (token[:4] + b"\1" + token[5:], "sgx.einittoken.reserved"),
    ):
        with pytest.raises(IntegrityError) as caught:
            driver.load(image, signed.to_bytes(), base=0x20000000, token=damaged)
        assert caught.value.id == id
    other = sign_image(small_image(b"other"), signers.ours)
    with pytest.raises(IntegrityError) as caught:
        driver.load(small_image(b"other"), other.to_bytes(), base=0x20000000, token=token)
    assert caught.value.id == "sgx.einittoken.measurement"
