"""``inclavare sgx sign`` on enclave files of Intel's SDK."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from sdk_enclaves import PAGE, REG, TCS, Entry, Load, R, Sdk, W, X
from small_enclaves import Signers

from inclavare.cli import main
from inclavare.sgx.measure import measure
from inclavare.sgx.sdk import SdkEnclave
from inclavare.sgx.sigstruct import sign, verify
from inclavare.sgx.structs import ATTRIBUTE_DEBUG, Attributes, Sigstruct

_ALL = (1 << 64) - 1
#: As sgx_sign does by default: DEBUG and the extended XFRM are left open.
_BEFORE: dict[str, Any] = {
    "attributes": 0x84,
    "attribute_mask": _ALL & ~ATTRIBUTE_DEBUG,
    "xfrm": 3,
    "xfrm_mask": _ALL & ~0xE4,
    "miscselect": 0,
    "misc_mask": 0xFFFFFFFE,
    "isv_prod_id": 9,
    "isv_svn": 4,
    "isv_family_id": b"f" * 16,
    "isv_ext_prod_id": b"x" * 16,
    "cet_attributes_mask": 1,
    "date": 0x20200101,
}


def _file(sigstruct: bytes = bytes(1808)) -> bytes:
    return Sdk(
        loads=[Load(0, R | X, b"code", PAGE)],
        layout=[Entry(0x10000, 1, R | W | REG), Entry(0x20000, 1, TCS)],
        sigstruct=sigstruct,
        attributes=0x84,
    ).file()


def _sign(tmp_path: Path, signers: Signers, file: bytes, *options: str) -> Sigstruct:
    (tmp_path / "key.pem").write_bytes(signers.theirs.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (tmp_path / "enclave.so").write_bytes(file)
    arguments = ["sgx", "sign", str(tmp_path / "enclave.so"), "--key", str(tmp_path / "key.pem"), *options]
    result = CliRunner().invoke(main, [*arguments, "-o", str(tmp_path / "out.sig")])
    assert result.exit_code == 0, result.output
    found = Sigstruct.from_bytes((tmp_path / "out.sig").read_bytes())
    verify(found)
    assert found.enclave_hash == measure(SdkEnclave(file).image())
    return found


def test_a_signed_file_keeps_what_its_signer_said_but_for_debug(tmp_path: Path, signers: Signers) -> None:
    before = sign(measure(SdkEnclave(_file()).image()), signers.ours, **_BEFORE)
    file = _file(before.to_bytes())
    after = _sign(tmp_path, signers, file, "--date", "2026-01-31")
    kept = [name for name in Sigstruct.LAYOUT.names if getattr(before, name) == getattr(after, name)]
    assert set(Sigstruct.LAYOUT.names) - set(kept) == {"date", "modulus", "signature", "attribute_mask", "q1", "q2"}
    assert after.attribute_mask == Attributes(_ALL, _BEFORE["xfrm_mask"]).to_bytes()


@pytest.mark.parametrize("name", ["isv_svn", "isv_prod_id"])
def test_what_is_given_goes_before_it(tmp_path: Path, signers: Signers, name: str) -> None:
    before = sign(measure(SdkEnclave(_file()).image()), signers.ours, **_BEFORE)
    after = _sign(tmp_path, signers, _file(before.to_bytes()), f"--{name.replace('_', '-')}", "77")
    assert getattr(after, name) == 77


def test_metadata_without_a_signature(tmp_path: Path, signers: Signers) -> None:
    after = _sign(tmp_path, signers, _file())
    assert after.attributes == Attributes(0x84, 3).to_bytes()
    assert after.attribute_mask == b"\xff" * 16
    assert (after.isv_prod_id, after.isv_svn) == (0, 0)
