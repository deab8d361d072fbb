"""``inclavare sgx gen-token`` as a user of sgx-tools calls it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from small_enclaves import Signers, sign_image, small_image

from inclavare.cli import main
from inclavare.sgx.launch import EinitToken
from inclavare.sgx.sigstruct import mrsigner
from inclavare.sgx.structs import ATTRIBUTE_DEBUG, ATTRIBUTE_PROVISIONKEY, Attributes, Sigstruct
from inclavare.sgx.tokens import check_token
from inclavare.tee.sgx_sim import fuses, launch_enclave


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    config = tmp_path / "inclavare.toml"
    config.write_text(f'state_dir = "{tmp_path}/state"\nrun_dir = "{tmp_path}/run"\nlog_dir = "{tmp_path}/log"\n')
    monkeypatch.setenv("INCLAVARE_CONFIG", str(config))
    return tmp_path / "state" / "sgx-sim"


@pytest.fixture
def signature(tmp_path: Path, signers: Signers) -> Path:
    path = tmp_path / "hello.sig"
    path.write_bytes(sign_image(small_image(), signers.ours).to_bytes())
    return path


def _call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["sgx", "gen-token", *(str(argument) for argument in arguments)])


def _check(token: bytes, state: Path, signature: Path, attributes: Attributes) -> None:
    signed = Sigstruct.from_bytes(signature.read_bytes())
    check_token(
        token,
        fuses.load(state),
        launch_enclave.key_hash(state),
        mrenclave=signed.enclave_hash,
        mrsigner=mrsigner(signed.modulus),
        attributes=attributes,
    )


def test_as_sgx_tools_has_it(state: Path, signature: Path) -> None:
    """``--signature foo.sig`` gives foo.token."""
    result = _call("--signature", signature, "--tee", "sgx-sim")
    assert result.exit_code == 0, result.output
    token = signature.with_name("hello.token").read_bytes()
    assert len(token) == 304
    _check(token, state, signature, Attributes(4, 3))


def test_where_it_goes_and_what_is_shown(state: Path, signature: Path, tmp_path: Path) -> None:
    out = tmp_path / "elsewhere"
    result = _call("--signature", signature, "--token", out, "--tee", "sgx-sim", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    parsed = EinitToken.from_bytes(out.read_bytes())
    assert document["mrenclave"] == parsed.mrenclave.hex()
    assert (document["isv_prod_id_le"], document["masked_attributes_le"]) == (0x20, "0x21")
    verbose = _call("--signature", signature, "--token", out, "--tee", "sgx-sim", "--verbose")
    assert "masked_attributes_le" in verbose.stdout
    piped = _call("--signature", signature, "--token", "-", "--tee", "sgx-sim")
    _check(piped.stdout_bytes, state, signature, Attributes(4, 3))


def test_what_the_signer_leaves_open_can_be_chosen(state: Path, signature: Path, tmp_path: Path) -> None:
    """The small enclave's signer leaves DEBUG and the extended XFRM open."""
    out = tmp_path / "out"
    result = _call("--signature", signature, "--token", out, "--tee", "sgx-sim", "--debug", "--xfrm", "0xe7")
    assert result.exit_code == 0, result.output
    _check(out.read_bytes(), state, signature, Attributes(4 | ATTRIBUTE_DEBUG, 0xE7))


@pytest.mark.parametrize(
    ("overrides", "options"),
    [({"attribute_mask": (1 << 64) - 1}, ["--debug"]), ({"xfrm_mask": (1 << 64) - 1}, ["--xfrm", "7"])],
)
def test_what_the_signer_has_fixed_cannot(
    state: Path, tmp_path: Path, signers: Signers, overrides: dict[str, Any], options: list[str]
) -> None:
    path = tmp_path / "fixed.sig"
    path.write_bytes(sign_image(small_image(), signers.ours, **overrides).to_bytes())
    result = _call("--signature", path, "--tee", "sgx-sim", "--json", *options)
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["id"] == "sgx.token.attributes"
    assert _call("--signature", path, "--tee", "sgx-sim").exit_code == 0


def test_what_the_launch_enclave_permits_to_nobody(state: Path, tmp_path: Path, signers: Signers) -> None:
    path = tmp_path / "greedy.sig"
    path.write_bytes(sign_image(small_image(), signers.ours, attributes=4 | ATTRIBUTE_PROVISIONKEY).to_bytes())
    result = _call("--signature", path, "--tee", "sgx-sim")
    assert result.exit_code == 8
    assert "tee.launch.attributes" in result.stderr
    assert not path.with_name("greedy.token").exists()


def test_signatures_that_are_none(state: Path, signature: Path, tmp_path: Path) -> None:
    good = signature.read_bytes()
    for content in (b"", good[:-1], good + b"\0", good[:600] + bytes([good[600] ^ 1]) + good[601:]):
        signature.write_bytes(content)
        assert _call("--signature", signature, "--tee", "sgx-sim").exit_code == 7
    assert _call("--signature", tmp_path / "missing").exit_code == 2
    assert _call().exit_code == 2


def test_hardware_is_never_the_simulation(state: Path, signature: Path) -> None:
    """With flexible launch control it needs none; without SGX, or without AESM, there is none."""
    if Path("/var/run/aesmd/aesm.socket").exists():
        pytest.skip("this machine has AESM")
    result = _call("--signature", signature, "--json")
    assert result.exit_code == 5
    assert json.loads(result.stdout)["error"]["id"].startswith(("sgx.token.flc", "tee.aesm.", "tee.cpuid."))
    assert not state.exists()
    assert not signature.with_name("hello.token").exists()
