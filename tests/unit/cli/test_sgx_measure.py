"""``inclavare sgx measure`` and ``cmp`` on every kind of enclave file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from small_enclaves import Signers, sign_image, small_image

from inclavare.cli import main
from inclavare.sgx import sgxs
from inclavare.sgx.image import EnclaveImage
from inclavare.sgx.measure import measure
from inclavare.sgx.sdk import SdkEnclave

sys.path.extend(str(Path(__file__).resolve().parents[1] / name) for name in ("enclave", "sgx"))
from sdk_enclaves import Load, Sdk
from test_gramine import libpal, manifest


def run(*words: object) -> tuple[int, Any]:
    done = CliRunner().invoke(main, ["sgx", *map(str, words), "--json"], prog_name="inclavare")
    return done.exit_code, json.loads(done.stdout)


def key_file(directory: Path, signers: Signers) -> Path:
    key = directory / "key.pem"
    key.touch(0o600)
    key.write_bytes(signers.ours.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return key


def stream(path: Path, image: EnclaveImage) -> Path:
    with path.open("wb") as file:
        sgxs.write(image, file)
    return path


def test_a_stream_and_the_sigstruct_beside_it(tmp_path: Path, signers: Signers) -> None:
    image = small_image()
    enclave = stream(tmp_path / "a.sgxs", image)
    code, found = run("measure", enclave)
    assert (code, found["mrenclave"], found["kind"]) == (0, measure(image).hex(), "sgxs") and "matches" not in found
    (tmp_path / "a.sig").write_bytes(sign_image(image, signers.ours).to_bytes())
    code, found = run("measure", enclave)
    assert (code, found["matches"], found["enclavehash"]) == (0, True, measure(image).hex())


def test_a_stream_on_standard_input(tmp_path: Path, signers: Signers) -> None:
    image = small_image()
    data = stream(tmp_path / "a.sgxs", image).read_bytes()
    (tmp_path / "a.sig").write_bytes(sign_image(image, signers.ours).to_bytes())
    words = ["sgx", "measure", "-", "--sigstruct", str(tmp_path / "a.sig"), "--json"]
    done = CliRunner().invoke(main, words, input=data)
    assert done.exit_code == 0 and json.loads(done.stdout)["mrenclave"] == measure(image).hex()
    assert CliRunner().invoke(main, words, input=data[:-1]).exit_code == 7


def test_an_enclave_of_the_sdk(tmp_path: Path, signers: Signers) -> None:
    enclave = tmp_path / "enclave.signed.so"
    code = Load(0, 5, b"\x90" * 4096, 4096)
    unsigned = Sdk([code])
    image = SdkEnclave(unsigned.file()).image()
    enclave.write_bytes(Sdk([code], sigstruct=sign_image(image, signers.ours).to_bytes()).file())
    code_, found = run("measure", enclave)
    assert (code_, found["kind"], found["matches"], found["mrenclave"]) == (0, "sdk", True, measure(image).hex())
    other = tmp_path / "other.signed.so"
    other.write_bytes(enclave.read_bytes().replace(b"\x90" * 4096, b"\x91" * 4096))
    assert run("measure", other)[0] == 7
    assert [(p["offset"], p["what"]) for p in run("cmp", enclave, other)[1]["pages"]] == [(0, "contents")]


def test_a_sigstruct_of_another_enclave(tmp_path: Path, signers: Signers) -> None:
    enclave = stream(tmp_path / "a.sgxs", small_image())
    other = tmp_path / "other"
    other.write_bytes(sign_image(small_image(b"other"), signers.ours).to_bytes())
    code, found = run("measure", enclave, "--sigstruct", other)
    assert (code, found["matches"], found["problem"]["id"]) == (7, False, "sgx.measure.enclavehash")
    done = CliRunner().invoke(main, ["sgx", "measure", str(enclave), "--sigstruct", str(other)])
    assert done.exit_code == 7 and "sign it again" in done.stderr


def test_a_signature_that_does_not_hold(tmp_path: Path, signers: Signers) -> None:
    enclave = stream(tmp_path / "a.sgxs", small_image())
    signed = bytearray(sign_image(small_image(), signers.ours).to_bytes())
    signed[600] ^= 1
    (tmp_path / "a.sigstruct").write_bytes(signed)
    code, found = run("measure", enclave)
    assert (code, found["problem"]["id"]) == (7, "sgx.sigstruct.signature")


@pytest.mark.parametrize(
    ("name", "content", "id"),
    [
        ("missing", None, "cli.enclave.file"),
        ("x", b"", "cli.enclave.kind"),
        ("x", b"MZ" * 40, "cli.enclave.kind"),
        ("x", b"\x7fELF" + bytes(60), "sgx.elf.header"),
        ("x.sgxs", b"ECREATE\0" + bytes(10), "sgx.sgxs.size"),
        ("x.manifest.sgx", b"[sgx]\n", "cli.enclave.libpal"),
    ],
)
def test_what_is_no_enclave(tmp_path: Path, name: str, content: bytes | None, id: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    code, found = run("measure", path)
    assert code in (2, 7) and found["error"]["id"] == id and found["error"]["message"]


@pytest.fixture
def gramine(tmp_path: Path) -> tuple[Path, Path]:
    pal = tmp_path / "libpal.so"
    pal.write_bytes(libpal())
    text = tmp_path / "app.manifest.sgx"
    text.write_bytes(manifest())
    return text, pal


def test_a_gramine_manifest(gramine: tuple[Path, Path], tmp_path: Path, signers: Signers) -> None:
    text, pal = gramine
    key = key_file(tmp_path, signers)
    code, found = run("sign", text, "--libpal", pal, "--key", key, "-o", tmp_path / "app.sig")
    assert code == 0, found
    code, measured = run("measure", text, "--libpal", pal)
    assert (code, measured["matches"], measured["mrenclave"]) == (0, True, found["mrenclave"])
    text.write_bytes(text.read_bytes() + b"\n")
    assert run("measure", text, "--libpal", pal)[0] == 7


def test_a_gramine_manifest_without_hashes(gramine: tuple[Path, Path], tmp_path: Path, signers: Signers) -> None:
    """It is another enclave than the one that Gramine's signing tool makes of it."""
    text, pal = gramine
    trusted = tmp_path / "trusted"
    trusted.write_bytes(b"trusted")
    text.write_bytes(manifest(f'trusted_files = ["file:{trusted}"]'))
    key, out, signed = key_file(tmp_path, signers), tmp_path / "out.sig", tmp_path / "out.manifest.sgx"
    for words in (("measure", text), ("sign", text, "--key", key, "-o", out)):
        code, found = run(*words, "--libpal", pal)
        assert (code, found["error"]["id"]) == (2, "gramine.unsigned")
    assert not out.exists()
    assert run("sign", text, "--libpal", pal, "--key", key, "-o", out, "--manifest-out", signed)[0] == 0
    assert run("measure", signed, "--libpal", pal)[1]["matches"] is True


def test_cmp_of_streams(tmp_path: Path, signers: Signers) -> None:
    left, right = (
        stream(tmp_path / "a.sgxs", small_image()),
        stream(tmp_path / "b.sgxs", small_image(b"other", heap_pages=6)),
    )
    code, found = run("cmp", left, left)
    assert (code, found["same"]) == (0, True)
    code, found = run("cmp", left, right)
    assert (code, found["same"]) == (1, False)
    assert found["secs"] == [{"name": "size", "left": 0x8000, "right": 0x10000}]
    assert [(p["offset"], p["count"], p["what"]) for p in found["pages"]] == [
        (0, 1, "contents"),
        (0x7000, 2, "only right"),
    ]
    shown = CliRunner().invoke(main, ["sgx", "cmp", str(left), str(right)])
    assert shown.exit_code == 1 and "contents" in shown.stdout and "0x7000–0x9000 (2)" in shown.stdout
    for path, key in ((left, signers.ours), (right, signers.theirs)):
        path.with_suffix(".sig").write_bytes(sign_image(small_image(), key).to_bytes())
    assert [field["name"] for field in run("cmp", left, right)[1]["sigstruct"]] == ["modulus"]
    shown = CliRunner().invoke(main, ["sgx", "cmp", str(left), str(right)])
    assert "modulus" in shown.stdout and max(map(len, shown.stdout.splitlines())) < 200


def test_cmp_of_gramine_manifests(gramine: tuple[Path, Path], tmp_path: Path) -> None:
    text, pal = gramine
    other = tmp_path / "other.manifest.sgx"
    other.write_bytes(manifest("debug = true"))
    code, found = run("cmp", text, other, "--libpal", pal)
    assert code == 1
    assert found["manifest"] == [{"name": "sgx.debug", "left": None, "right": True}]
    assert found["secs"] == [{"name": "attributes", "left": 4, "right": 6}]


def test_cmp_of_enclave_images(tmp_path: Path, signers: Signers) -> None:
    roots, key = [], key_file(tmp_path, signers)
    for name, greeting in (("one", "hello"), ("two", "hullo")):
        root = tmp_path / name / "source"
        (root / "etc").mkdir(parents=True)
        (root / "etc/greeting").write_text(greeting)
        toml = tmp_path / f"{name}.toml"
        toml.write_text(f'[enclave]\ntee = ["sgx-sim"]\n[process]\nargs = ["/bin/{name}"]\n')
        built = tmp_path / name / "built"
        done = CliRunner().invoke(main, ["build", str(root), str(built), "-m", str(toml), "--key", str(key)])
        assert done.exit_code == 0, done.output
        roots.append(built)
    code, found = run("cmp", *roots)
    assert code == 1
    assert found["manifest"] == [{"name": "process.args", "left": ["/bin/one"], "right": ["/bin/two"]}]
    assert len(found["files"]) == 1 and "/etc/greeting" in found["files"][0]["name"]
    assert [field["name"] for field in found["sigstruct"]] == ["enclave_hash"]
    assert run("cmp", roots[0], roots[0])[0] == 0
    assert run("cmp", roots[0], tmp_path)[0] == 2
