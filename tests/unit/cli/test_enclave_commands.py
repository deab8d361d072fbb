"""build, measure, sign and inspect as a user calls them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from inclavare.cli import main
from inclavare.sgx.sigstruct import mrsigner
from inclavare.sgx.structs import Sigstruct


@pytest.fixture
def rootfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    root = tmp_path / "rootfs"
    (root / "bin").mkdir(parents=True)
    (root / "bin/app").write_bytes(b"\x7fELF")
    (root / "bin/sh").symlink_to("app")
    (tmp_path / "enclave.toml").write_text('[enclave]\nsize = "4M"\nthreads = 2\n[process]\nargs = ["/bin/app"]\n')
    return root


def _call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def _json(*arguments: str | Path) -> Any:
    result = _call(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def built(rootfs: Path, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    out = tmp_path / "out"
    return out, _json("build", rootfs, out, "-m", tmp_path / "enclave.toml", "--tee", "sgx-sim")


def test_build_makes_a_developer_key_once_and_says_so(rootfs: Path, tmp_path: Path) -> None:
    arguments = ("build", rootfs, tmp_path / "out", "-m", tmp_path / "enclave.toml", "--force")
    first = _call(*arguments)
    key = tmp_path / "home/.config/inclavare/signing-key.pem"
    assert first.exit_code == 0
    assert f"made a developer key, {key}" in first.stderr
    assert key.stat().st_mode & 0o777 == 0o600
    assert "MRENCLAVE" in first.stdout
    if not Path("/dev/sgx_enclave").exists():
        assert "--tee sgx-sim" in first.stderr
    assert f"signing with the developer key {key}" in _call(*arguments).stderr


def test_build_measure_inspect_agree(built: tuple[Path, dict[str, Any]]) -> None:
    out, made = built
    measured = _json("measure", out)
    inspected = _json("inspect", out)
    assert measured["mrenclave"] == made["mrenclave"] == inspected["identity"]["mrenclave"]
    assert measured["mrsigner"] == made["mrsigner"] == inspected["sigstruct"]["mrsigner"]
    assert measured["sigstruct"] == "matches"
    assert inspected["sigstruct"]["signature"] == "good"
    assert inspected["sigstruct"]["over_this_enclave"] is True
    assert inspected["manifest"]["process"]["args"] == ["/bin/app"]
    assert inspected["tree"] == {
        "paths": 4, "directories": 2, "files": 1, "links": 1, "devices": 0, "fifos": 0, "sockets": 0,
        "bytes": 4, "blocks": 1, "setuid": 0,
    }  # fmt: skip
    for words in (["MRENCLAVE", "matches"], ["Manifest", "SIGSTRUCT", "File tree"]):
        shown = _call("measure" if "matches" in words else "inspect", out)
        assert shown.exit_code == 0
        assert all(word in shown.stdout for word in words)


def test_measure_before_and_after_build_agree(rootfs: Path, tmp_path: Path, built: tuple[Path, dict[str, Any]]) -> None:
    measured = _json("measure", rootfs, "-m", tmp_path / "enclave.toml", "--tee", "sgx-sim")
    assert measured["mrenclave"] == built[1]["mrenclave"]
    assert "sigstruct" not in measured
    other = _json("measure", rootfs, "-m", tmp_path / "enclave.toml", "--tee", "sgx-sim", "--debug")
    assert other["mrenclave"] != built[1]["mrenclave"]


def test_measure_names_what_changed(built: tuple[Path, dict[str, Any]]) -> None:
    out, _ = built
    (out / "bin/app").write_bytes(b"\x7fELG")
    (out / "bin/sh").unlink()
    (out / "bin/new").touch()
    result = _call("measure", out)
    assert result.exit_code == 7
    assert "/bin/app: content" in result.stdout
    assert "/bin/sh: missing" in result.stdout
    assert "/bin/new: added" in result.stdout
    assert "ENCLAVEHASH differs" in result.stderr
    as_json = _call("measure", out, "--json")
    assert as_json.exit_code == 7
    document = json.loads(as_json.stdout)
    assert document["sigstruct"] == "differs"
    assert document["problem"]["id"] == "enclave.signing.enclavehash"


def test_a_damaged_tree_or_manifest(built: tuple[Path, dict[str, Any]]) -> None:
    out, _ = built
    good = (out / ".inclavare/tree").read_bytes()
    (out / ".inclavare/tree").write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    result = _call("inspect", out)
    assert result.exit_code == 7 and "the file tree is damaged" in result.stderr
    (out / ".inclavare/tree").write_bytes(good)
    (out / ".inclavare/manifest.json").write_bytes(b"{}")
    result = _call("inspect", out)
    assert result.exit_code == 7 and "the stored manifest is damaged" in result.stderr


def test_an_image_built_by_other_code_says_so(built: tuple[Path, dict[str, Any]]) -> None:
    out, _ = built
    build = json.loads((out / ".inclavare/build.json").read_bytes())
    (out / ".inclavare/build.json").write_text(json.dumps({**build, "runtime_digest": "00" * 32}))
    assert "built by inclavare" in _call("inspect", out).stderr


def test_inspect_files(built: tuple[Path, dict[str, Any]]) -> None:
    out, _ = built
    lines = _call("inspect", "--files", out).stdout.splitlines()
    assert [line.split("\t")[4] for line in lines] == ["/", "/bin", "/bin/app", "/bin/sh -> app"]
    listed = _json("inspect", "--files", out)
    assert [entry["kind"] for entry in listed] == ["d", "d", "f", "l"]
    assert listed[2]["size"] == 4


def test_not_an_enclave_image(rootfs: Path) -> None:
    for command in ("inspect", "sign"):
        result = _call(command, rootfs)
        assert result.exit_code == 2
        assert "not an enclave image" in result.stderr
        assert "inclavare build" in result.stderr


def test_sign_again_with_another_key(built: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, made = built
    key = tmp_path / "other.pem"
    subprocess.run(["openssl", "genrsa", "-3", "-out", key, "3072"], check=True, capture_output=True)
    signed = _json("sign", out, "--key", key)
    assert signed["mrenclave"] == made["mrenclave"]
    assert signed["mrsigner"] != made["mrsigner"]
    assert _json("measure", out)["mrsigner"] == signed["mrsigner"]


def test_sign_elsewhere(built: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, _ = built
    key, public, data, signature = (tmp_path / name for name in ("k.pem", "p.pem", "data", "signature"))
    openssl = lambda *argv: subprocess.run(["openssl", *map(str, argv)], check=True, capture_output=True)  # noqa: E731
    openssl("genrsa", "-3", "-out", key, "3072")
    openssl("rsa", "-in", key, "-pubout", "-out", public)
    before = (out / ".inclavare/sigstruct").read_bytes()
    assert _call("sign", out, "--gendata", data).exit_code == 0
    assert (out / ".inclavare/sigstruct").read_bytes() == before
    openssl("dgst", "-sha256", "-sign", key, "-out", signature, data)
    signed = _json("sign", out, "--catsig", data, signature, "--public-key", public)
    parsed = Sigstruct.from_bytes((out / ".inclavare/sigstruct").read_bytes())
    assert mrsigner(parsed.modulus).hex() == signed["mrsigner"]
    assert _json("measure", out)["sigstruct"] == "matches"
    signature.write_bytes(bytes(384))
    assert _call("sign", out, "--catsig", data, signature, "--public-key", public).exit_code == 7


def test_contradictions_are_usage_errors(built: tuple[Path, dict[str, Any]], rootfs: Path, tmp_path: Path) -> None:
    out, _ = built
    for arguments in (
        ["build", rootfs],
        ["build", rootfs, out, "--in-place"],
        ["sign", out, tmp_path / "elsewhere"],
        ["sign", out, "--gendata", tmp_path / "a", "--key", tmp_path / "b"],
        ["sign", out, "--public-key", tmp_path / "enclave.toml"],
        ["measure", tmp_path / "missing"],
    ):
        assert _call(*arguments).exit_code == 2, arguments


def test_errors_keep_their_exit_codes(rootfs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.toml").write_text("[enclave]\nthreats = 1\n")
    result = _call("build", rootfs, tmp_path / "o", "-m", tmp_path / "bad.toml")
    assert result.exit_code == 2
    assert "bad.toml:2: enclave.threats: unknown key" in result.stderr
    monkeypatch.setenv("PATH", str(tmp_path))
    result = _call("build", "docker-daemon:x:1", tmp_path / "o", "--json")
    assert result.exit_code == 5
    assert json.loads(result.stdout)["error"]["remedy"] == "apt-get install skopeo umoci"


@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("skopeo") or not shutil.which("umoci"), reason="needs root, skopeo and umoci"
)
def test_an_oci_image_through_all_commands(rootfs: Path, tmp_path: Path) -> None:
    image = f"oci:{tmp_path}/layout:one"
    made = _json("build", rootfs, image, "-m", tmp_path / "enclave.toml", "--tee", "sgx-sim")
    assert _json("measure", image)["mrenclave"] == made["mrenclave"]
    assert _json("inspect", image)["sigstruct"]["over_this_enclave"] is True
    key = tmp_path / "other.pem"
    subprocess.run(["openssl", "genrsa", "-3", "-out", key, "3072"], check=True, capture_output=True)
    signed = _json("sign", image, "--key", key)
    assert _json("inspect", image)["sigstruct"]["mrsigner"] == signed["mrsigner"] != made["mrsigner"]
    copied = _json("sign", image, f"docker-archive:{tmp_path}/copy.tar:a:b")
    assert _json("measure", f"docker-archive:{tmp_path}/copy.tar")["mrsigner"] == copied["mrsigner"]
    assert _call("sign", image, f"docker-archive:{tmp_path}/copy.tar:a:b").exit_code == 2
    assert _call("sign", image, tmp_path / "directory").exit_code == 2
