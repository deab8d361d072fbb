"""``inclavare sgx signing-service`` as a process, and signing with it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from small_enclaves import Signers

from inclavare.cli import main
from inclavare.enclave.signing_service import PREFIX
from inclavare.sgx.sigstruct import mrsigner, verify
from inclavare.sgx.structs import Sigstruct

MRENCLAVE = "e0" * 32
_CODE = "import sys; from inclavare.cli import main; main(prog_name='inclavare')"


def _call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def key(tmp_path: Path, signers: Signers) -> Path:
    path = tmp_path / "key.pem"
    path.touch(0o600)
    path.write_bytes(signers.ours.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return path


@pytest.fixture
def token(tmp_path: Path) -> Path:
    made = _call("sgx", "signing-service", "add-token", "ci", "--token-file", tmp_path / "tokens")
    assert made.exit_code == 0, made.output
    path = tmp_path / "ci.token"
    path.touch(0o600)
    path.write_text(made.stdout)
    return path


Start = Callable[..., tuple[subprocess.Popen[str], str]]


@pytest.fixture
def start(tmp_path: Path, key: Path, token: Path) -> Iterator[Start]:
    with contextlib.ExitStack() as stack:

        def run(*options: str | Path) -> tuple[subprocess.Popen[str], str]:
            service = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", _CODE, "sgx", "signing-service", "serve", "--key", key, "--port", "0",
                     "--token-file", tmp_path / "tokens", "--state", tmp_path / "state", *options],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )  # fmt: skip
            stack.callback(service.kill)
            assert service.stdout is not None
            line = service.stdout.readline()
            assert line.startswith("listening on https://"), service.communicate()
            return service, line.split()[-1]

        yield run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_from_start_to_end(start: Start, tmp_path: Path, token: Path, signers: Signers, number: int) -> None:
    service, url = start("--audit-log", tmp_path / "audit")
    out = tmp_path / "out.sig"
    signed = _call(
        "sgx", "sign", "--mrenclave", MRENCLAVE, "-o", out,
        "--signing-service", url, "--token-file", token, "--ca", tmp_path / "state/tls-cert.pem",
    )  # fmt: skip
    assert signed.exit_code == 0, signed.output
    parsed = Sigstruct.from_bytes(out.read_bytes())
    verify(parsed)
    modulus = signers.ours.public_key().public_numbers().n.to_bytes(384, "little")
    assert (parsed.enclave_hash.hex(), mrsigner(parsed.modulus)) == (MRENCLAVE, mrsigner(modulus))
    assert MRENCLAVE in (tmp_path / "audit").read_text()
    service.send_signal(number)
    _, said = service.communicate(timeout=30)
    assert service.returncode == 0, said
    assert "SHA-256 " in said and "Traceback" not in said
    assert token.read_text().strip() not in said + (tmp_path / "audit").read_text()


def test_a_request_under_way_is_answered_before_the_end(start: Start, tmp_path: Path, token: Path) -> None:
    service, url = start()
    data = tmp_path / "data"
    assert _call("sgx", "sign", "--mrenclave", MRENCLAVE, "--gendata", data).exit_code == 0
    context = ssl.create_default_context(cafile=str(tmp_path / "state/tls-cert.pem"))
    raw = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=20)
    with context.wrap_socket(raw, server_hostname="127.0.0.1") as tls:
        head = f"POST {PREFIX}/pkcs1 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token.read_text().strip()}\r\n"
        # The service has begun with this request when it asks for the body.
        tls.sendall(f"{head}Expect: 100-continue\r\nContent-Length: 256\r\n\r\n".encode())
        assert tls.recv(100).startswith(b"HTTP/1.1 100 ")
        service.terminate()
        tls.sendall(data.read_bytes())
        assert tls.recv(100).startswith(b"HTTP/1.1 200 ")
    service.communicate(timeout=30)
    assert service.returncode == 0


def test_the_policys_options(start: Start, tmp_path: Path, token: Path) -> None:
    listed = tmp_path / "enclaves"
    listed.write_text(f"{'a1' * 32}\n{'a2' * 32}\n")
    _, url = start("--allow", "DEBUG", "--isv-prod-id", "7", "--mrenclave", MRENCLAVE, "--mrenclave-file", listed)

    def sign(*options: str) -> Result:
        return _call(
            "sgx", "sign", "--signing-service", url, "--token-file", token, "--ca", tmp_path / "state/tls-cert.pem",
            "-o", tmp_path / "out", *options,
        )  # fmt: skip

    for mrenclave in (MRENCLAVE, "a1" * 32, "a2" * 32):
        assert sign("--mrenclave", mrenclave, "--isv-prod-id", "7", "--attributes", "6").exit_code == 0
    refused = {
        "signing.policy.mrenclave": ("--mrenclave", "a3" * 32, "--isv-prod-id", "7"),
        "signing.policy.isvprodid": ("--mrenclave", MRENCLAVE),
        "signing.policy.attributes": ("--mrenclave", MRENCLAVE, "--isv-prod-id", "7", "--attributes", "0x14"),
        "signing.policy.vendor": ("--mrenclave", MRENCLAVE, "--isv-prod-id", "7", "--vendor", "0x8086"),
    }
    for id, options in refused.items():
        result = sign(*options)
        assert result.exit_code == 8
        assert id in result.stderr


def test_an_enclave_image_is_signed_by_the_service(
    start: Start, tmp_path: Path, token: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "rootfs").mkdir()
    (tmp_path / "rootfs/app").write_bytes(b"\x7fELF")
    (tmp_path / "enclave.toml").write_text('[enclave]\nsize = "4M"\n[process]\nargs = ["/app"]\n')
    built = _call("build", tmp_path / "rootfs", tmp_path / "out", "-m", tmp_path / "enclave.toml", "--tee", "sgx-sim")
    assert built.exit_code == 0, built.output
    before = (tmp_path / "out/.inclavare/sigstruct").read_bytes()
    _, url = start()
    result = _call(
        "sign", tmp_path / "out",
        "--signing-service", url, "--token-file", token, "--ca", tmp_path / "state/tls-cert.pem",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    after = Sigstruct.from_bytes((tmp_path / "out/.inclavare/sigstruct").read_bytes())
    verify(after)
    assert after.enclave_hash == Sigstruct.from_bytes(before).enclave_hash
    assert after.modulus != Sigstruct.from_bytes(before).modulus


def test_starts_that_are_refused(tmp_path: Path, key: Path, token: Path) -> None:
    serve = ("sgx", "signing-service", "serve", "--port", "0")
    tokens = ("--token-file", tmp_path / "tokens")
    assert "must know its callers" in _call(*serve, "--key", key).output
    assert "belong together" in _call(*serve, "--key", key, *tokens, "--tls-cert", key).output
    assert "is not 32 bytes" in _call(*serve, "--key", key, *tokens, "--mrenclave", "00").output
    key.chmod(0o644)
    readable = _call(*serve, "--key", key, *tokens)
    assert (readable.exit_code, "is not private" in readable.stderr) == (2, True)
    key.chmod(0o600)
    (tmp_path / "tokens").chmod(0o644)
    readable = _call(*serve, "--key", key, *tokens)
    assert (readable.exit_code, "is not private" in readable.stderr) == (2, True)
    key.write_bytes(b"rubbish")
    assert _call(*serve, "--key", key, *tokens).exit_code == 2


def test_tokens_are_added_and_removed(tmp_path: Path, token: Path) -> None:
    tokens = tmp_path / "tokens"
    assert tokens.stat().st_mode & 0o777 == 0o600
    assert token.read_text().strip() not in tokens.read_text()
    group = ("sgx", "signing-service")
    assert _call(*group, "add-token", "ci", "--token-file", tokens).exit_code == 2
    assert _call(*group, "remove-token", "ci", "--token-file", tokens).exit_code == 0
    assert _call(*group, "remove-token", "ci", "--token-file", tokens).exit_code == 2
    assert tokens.read_text() == ""
    assert os.stat(tokens).st_mode & 0o777 == 0o600
