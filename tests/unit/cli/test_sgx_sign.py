"""``inclavare sgx sign`` as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from small_enclaves import Signers, small_image

from inclavare.cli import main
from inclavare.sgx import sgxs
from inclavare.sgx.measure import measure
from inclavare.sgx.sigstruct import verify
from inclavare.sgx.structs import Attributes, Sigstruct

MRENCLAVE = "784acfd7d5096a8f0fbd3265760bff21b120f62407a9a9e5ba31aa3c8ed198fc"


def _call(*arguments: str | Path, **more: Any) -> Result:
    return CliRunner().invoke(main, ["sgx", "sign", *(str(argument) for argument in arguments)], **more)


def test_an_output_that_cannot_be_written_is_named(stream: Path, key: Path, tmp_path: Path) -> None:
    result = _call(stream, "--key", key, "-o", tmp_path / "no" / "out.sig")
    assert result.exit_code != 0
    assert str(tmp_path / "no" / "out.sig") in result.stderr and ".new" not in result.stderr


def _signed(path: Path) -> Sigstruct:
    found = Sigstruct.from_bytes(path.read_bytes())
    verify(found)
    return found


@pytest.fixture
def key(tmp_path: Path, signers: Signers) -> Path:
    path = tmp_path / "key.pem"
    path.write_bytes(signers.ours.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (tmp_path / "public.pem").write_bytes(
        signers.ours.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    return path


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    path = tmp_path / "enclave.sgxs"
    with path.open("wb") as file:
        sgxs.write(small_image(), file)
    return path


def test_an_sgxs_stream_of_others(vectors: Path, key: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.sig"
    result = _call(vectors / "measure/fortanix_test_enclave.sgxs", "--key", key, "-o", out)
    assert result.exit_code == 0, result.output
    assert f"MRENCLAVE  {MRENCLAVE}" in result.stdout
    signed = _signed(out)
    assert signed.enclave_hash.hex() == MRENCLAVE
    assert signed.attributes == Attributes(4, 3).to_bytes()
    assert signed.attribute_mask == b"\xff" * 16


def test_standard_input_and_output(stream: Path, key: Path) -> None:
    result = _call("-", "--key", key, input=stream.read_bytes())
    assert result.exit_code == 0, result.output
    signed = Sigstruct.from_bytes(result.stdout_bytes)
    verify(signed)
    assert signed.enclave_hash == measure(small_image())


@pytest.mark.parametrize(
    ("words", "id"),
    [
        (("--vendor", "5"), "sgx.sign.vendor"),
        (("--xfrm", "4"), "sgx.sign.xfrm"),
        (("--xfrm", "1", "--xfrm-mask", "2"), "sgx.sign.xfrm"),
        (("--attributes", "5"), "sgx.sign.attributes"),
    ],
)
def test_what_no_processor_accepts_is_not_signed(
    stream: Path, key: Path, tmp_path: Path, words: tuple[str, ...], id: str
) -> None:
    out = tmp_path / "out.sig"
    for way in (("--key", key, "-o", out), ("--gendata", out)):
        result = _call(stream, *way, *words, "--json")
        assert (result.exit_code, json.loads(result.stdout)["error"]["id"]) == (2, id)
        assert not out.exists()
    # What the mask leaves open is nobody's affair.
    assert _call(stream, "--key", key, "-o", out, "--xfrm", "4", "--xfrm-mask", "0xfffffffffffffffc").exit_code == 0


def test_every_field(key: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.sig"
    values = {
        "attributes": "0xc4",
        "attribute-mask": "0xfffffffffffffffd",
        "xfrm": "0xe7",
        "xfrm-mask": "0xffffffffffffff1b",
        "miscselect": "1",
        "misc-mask": "0xfffffffd",
        "isv-prod-id": "4660",
        "isv-svn": "22136",
        "date": "2026-01-31",
        "vendor": "0x8086",
        "swdefined": "51966",
        "isv-family-id": "01" * 16,
        "isv-ext-prod-id": "02" * 16,
        "cet-attributes": "0x11",
        "cet-attributes-mask": "0xfe",
    }
    options = [text for name, value in values.items() for text in (f"--{name}", value)]
    result = _call("--mrenclave", MRENCLAVE, "--key", key, "-o", out, *options)
    assert result.exit_code == 0, result.output
    config = tmp_path / "sign.toml"
    config.write_text(
        "".join(
            f"{name.replace('-', '_')} = {value if value[:1].isdigit() and '-' not in value and len(value) < 30 else repr(value)}\n"
            for name, value in values.items()
            if name != "isv-svn"
        ).replace("'2026-01-31'", "2026-01-31")
        + "isv_svn = 1\n"
    )
    # What is on the command line goes before the file.
    again = tmp_path / "again.sig"
    result = _call("--mrenclave", MRENCLAVE, "--key", key, "-o", again, "--config", config, "--isv-svn", "0x5678")
    assert result.exit_code == 0, result.output
    for signed in (_signed(out), _signed(again)):
        assert signed.attributes == Attributes(0xC4, 0xE7).to_bytes()
        assert signed.attribute_mask == Attributes(0xFFFFFFFFFFFFFFFD, 0xFFFFFFFFFFFFFF1B).to_bytes()
        assert (signed.miscselect, signed.misc_mask) == (1, 0xFFFFFFFD)
        assert (signed.isv_prod_id, signed.isv_svn, signed.date) == (0x1234, 0x5678, 0x20260131)
        assert (signed.vendor, signed.swdefined) == (0x8086, 0xCAFE)
        assert (signed.isv_family_id, signed.isv_ext_prod_id) == (b"\1" * 16, b"\2" * 16)
        assert (signed.cet_attributes, signed.cet_attributes_mask) == (0x11, 0xFE)


@pytest.mark.parametrize(
    "config",
    ["isv_svn = 65536", "isv_svn = -1", "isv_svn = true", "color = 1", "isv_family_id = '00'", "date = 'today'", "= ="],
)
def test_a_configuration_that_cannot_be(key: Path, tmp_path: Path, config: str) -> None:
    path = tmp_path / "sign.toml"
    path.write_text(config)
    result = _call("--mrenclave", MRENCLAVE, "--key", key, "-o", tmp_path / "out", "--config", path, "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["id"] == "sgx.sign.config"
    assert not (tmp_path / "out").exists()


def test_with_a_key_that_is_kept_elsewhere(stream: Path, key: Path, tmp_path: Path) -> None:
    data, signature, out = tmp_path / "data", tmp_path / "signature", tmp_path / "out.sig"
    fields = ("--isv-svn", "5", "--date", "2025-05-05")
    result = _call(stream, "--gendata", data, *fields, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["mrenclave"] == measure(small_image()).hex()
    assert data.stat().st_size == 256
    subprocess.run(["openssl", "dgst", "-sha256", "-sign", key, "-out", signature, data], check=True)
    public = ("--public-key", tmp_path / "public.pem")
    for swapped in (signature.read_bytes(), signature.read_bytes()[::-1]):
        signature.write_bytes(swapped)
        for more in ((), (stream,), ("--mrenclave", measure(small_image()).hex())):
            result = _call(*more, "--catsig", data, signature, *public, "-o", out)
            assert result.exit_code == 0, result.output
            local = tmp_path / "local.sig"
            _call(stream, "--key", key, *fields, "-o", local)
            assert out.read_bytes() == local.read_bytes()
    other = _call("--mrenclave", MRENCLAVE, "--catsig", data, signature, *public, "-o", out, "--json")
    assert other.exit_code == 7
    assert json.loads(other.stdout)["error"]["id"] == "sgx.sign.enclavehash"
    signature.write_bytes(bytes(384))
    assert _call("--catsig", data, signature, *public, "-o", out).exit_code == 7


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--mrenclave", MRENCLAVE], "Give one of --key"),
        (["--mrenclave", MRENCLAVE, "--key", "KEY", "--gendata", "x"], "Give one of --key"),
        (["--key", "KEY"], "Give SOURCE or --mrenclave"),
        (["KEY", "--mrenclave", MRENCLAVE, "--key", "KEY"], "Give SOURCE or --mrenclave"),
        (["--mrenclave", "00", "--key", "KEY"], "is not 32 bytes"),
        (["--mrenclave", MRENCLAVE, "--key", "KEY", "--isv-svn", "65536"], "does not fit into 16 bits"),
        (["--mrenclave", MRENCLAVE, "--key", "KEY", "--isv-svn", "x"], "is not a number"),
        (["--mrenclave", MRENCLAVE, "--key", "KEY", "--date", "1.2.2026"], "is not a date"),
        (["--mrenclave", MRENCLAVE, "--key", "KEY", "--public-key", "KEY"], "--public-key belongs to"),
        (["--mrenclave", MRENCLAVE, "--key", "KEY", "--json"], "give -o"),
        (["--mrenclave", MRENCLAVE, "--key", "KEY", "--ca", "KEY"], "belong to --signing-service"),
        (["--catsig", "KEY", "KEY"], "--catsig needs --public-key"),
        (["--catsig", "KEY", "KEY", "--public-key", "KEY", "--isv-svn", "1"], "all fields are those of DATA"),
    ],
)
def test_command_lines_that_mean_nothing(key: Path, arguments: list[str], said: str) -> None:
    result = _call(*(str(key) if argument == "KEY" else argument for argument in arguments))
    assert result.exit_code == 2
    assert said in result.output


def test_what_is_no_enclave(key: Path, tmp_path: Path) -> None:
    for content in (b"", b"rubbish", b"\x7fELF"):
        (tmp_path / "rubbish").write_bytes(content)
        result = _call(tmp_path / "rubbish", "--key", key, "-o", tmp_path / "out")
        assert result.exit_code in (2, 7), result.output
        assert not (tmp_path / "out").exists()


def test_kss_fields_need_kss(key: Path, tmp_path: Path) -> None:
    result = _call("--mrenclave", MRENCLAVE, "--key", key, "-o", tmp_path / "out", "--isv-family-id", "01" * 16)
    assert result.exit_code == 2
    assert "sgx.sigstruct.kss" in result.stderr


def test_binary_is_not_written_to_a_terminal(key: Path) -> None:
    """In a pseudo-terminal of its own, as ``script`` makes one."""
    code = "import sys; from inclavare.cli import main; main()"
    command = f"{sys.executable} -c '{code}' sgx sign --mrenclave {MRENCLAVE} --key {key}"
    shown = subprocess.run(["script", "-qec", command, "/dev/null"], capture_output=True, stdin=subprocess.DEVNULL)
    assert shown.returncode == 2
    assert b"binary data are not written to a terminal" in shown.stdout
