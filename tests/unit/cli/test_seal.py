"""inclavare seal and unseal, through a mounted ``/dev/attestation``."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from attestation_files import calls_of, mounted, needs_fuse
from click.testing import CliRunner, Result
from small_enclaves import Signers, sign_image, small_image

from inclavare.cli import main
from inclavare.config import Config
from inclavare.sdk import attest
from inclavare.tee.sgx_sim import create

Enter = Callable[..., Path]


@pytest.fixture
def enter(config: Config, signers: Signers, monkeypatch: pytest.MonkeyPatch) -> Iterator[Enter]:
    """Be in an enclave; each call is a new session of the same platform."""
    with ExitStack() as stack:

        def go(content: bytes = b"code", **fields: Any) -> Path:
            image = small_image(content)
            signed = sign_image(image, signers.ours, **fields).to_bytes()
            enclave = create(config).load(image, signed, label="test")
            point = stack.enter_context(mounted(calls_of(enclave), []))
            monkeypatch.setattr(attest, "DIRECTORY", point)
            return point

        yield go


def call(*arguments: str | Path, input: bytes | None = None) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=input)


def refused(id: str, exit_code: int, *arguments: str | Path, input: bytes | None = None) -> dict[str, Any]:
    done = call(*arguments, "--json", input=input)
    error: dict[str, Any] = json.loads(done.stdout)["error"]
    assert (error["id"], done.exit_code) == (id, exit_code), done.output
    return error


@needs_fuse
def test_files(enter: Enter, tmp_path: Path) -> None:
    enter()
    plain, sealed, back = tmp_path / "plain", tmp_path / "sealed", tmp_path / "back"
    plain.write_bytes(bytes(range(256)) * 100)
    assert call("seal", plain, "-o", sealed).output == ""
    assert call("unseal", sealed, "-o", back).output == ""
    assert back.read_bytes() == plain.read_bytes()
    assert [path.stat().st_mode & 0o777 for path in (sealed, back)] == [0o600, 0o600]
    assert sealed.stat().st_size == plain.stat().st_size + 656


@needs_fuse
def test_standard_input_and_output(enter: Enter) -> None:
    enter()
    blob = call("seal", "--policy", "mrsigner", "--aad", "näme", input=b"state").stdout_bytes
    assert call("unseal", "--aad", "näme", input=blob).stdout_bytes == b"state"
    assert call("unseal", "-", "-o", "-", "--aad", "näme", input=blob).stdout_bytes == b"state"
    assert call("seal", input=b"").exit_code == 0


@needs_fuse
def test_additional_data(enter: Enter, tmp_path: Path) -> None:
    enter()
    file = tmp_path / "aad"
    file.write_bytes(b"name")
    blob = call("seal", "--aad-file", file, input=b"state").stdout_bytes
    assert call("unseal", "--aad", "name", input=blob).stdout_bytes == b"state"
    refused("sealing.open.tag", 7, "unseal", "-o", tmp_path / "x", "--aad", "nama", input=blob)
    refused("sealing.open.aad", 7, "unseal", "-o", tmp_path / "x", input=blob)
    assert not (tmp_path / "x").exists()
    assert call("seal", "--aad", "a", "--aad-file", file, input=b"").exit_code == 2


@needs_fuse
def test_counter(enter: Enter, tmp_path: Path) -> None:
    enter()
    state = tmp_path / "sealed"
    assert call("seal", "--counter", "state", "-o", state, input=b"one").exit_code == 0
    old = state.read_bytes()
    assert call("seal", "--counter", "state", "-o", state, input=b"two").exit_code == 0
    assert state.stat().st_mode & 0o777 == 0o600
    enter()
    assert call("unseal", state, "--counter", "state").stdout_bytes == b"two"
    state.write_bytes(old)
    error = refused("sealing.counter.rollback", 7, "unseal", state, "-o", tmp_path / "x")
    assert (error["found"], error["expected"]) == ("counter 1", "counter 2 or above")
    assert not (tmp_path / "x").exists()
    refused("cli.seal.output", 2, "seal", "--counter", "state", input=b"x")
    refused("sealing.require.counter", 8, "unseal", "--counter", "c", "-o", tmp_path / "x",
            input=call("seal", input=b"x").stdout_bytes)  # fmt: skip


@needs_fuse
def test_who_opens_it(enter: Enter, tmp_path: Path) -> None:
    enter(isv_svn=3)
    mine, signers = tmp_path / "mine", tmp_path / "signers"
    call("seal", "-o", mine, input=b"mine")
    call("seal", "--policy", "mrsigner", "-o", signers, input=b"the signer's")
    enter(b"other", isv_svn=4)
    assert call("unseal", signers).stdout_bytes == b"the signer's"
    error = refused("sealing.open.tag", 7, "unseal", mine, "-o", tmp_path / "x")
    assert "look alike" in error["remedy"]
    refused("sealing.require.policy", 8, "unseal", signers, "--policy", "mrenclave", "-o", tmp_path / "x")
    refused("sealing.require.isvsvn", 8, "unseal", signers, "--min-isv-svn", "4", "-o", tmp_path / "x")
    enter(b"older", isv_svn=2)
    refused("sealing.open.isvsvn", 8, "unseal", signers, "-o", tmp_path / "x")
    assert not (tmp_path / "x").exists()


@needs_fuse
def test_the_header(enter: Enter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(isv_svn=3)
    state = tmp_path / "sealed"
    done = call("seal", "--counter", "state", "--aad", "abc", "-o", state, "--json", input=b"one")
    shown = json.loads(done.stdout)
    monkeypatch.setattr(attest, "DIRECTORY", tmp_path / "nowhere")
    info = json.loads(call("unseal", "--info", state, "--json").stdout)
    assert {"sealed": str(state), **info} == shown
    assert (info["policy"], info["isv_svn"], info["bytes"], info["aad_bytes"]) == ("mrenclave", 3, 3, 3)
    assert info["counter"]["name"] == "state"
    text = call("unseal", "--info", state).stdout
    assert "state, number 1, id " in text and "as they say themselves" in text


def test_outside_of_an_enclave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attest, "DIRECTORY", tmp_path / "nowhere")
    error = refused("sdk.seal.outside", 5, "seal", "-o", tmp_path / "x", input=b"state")
    assert "ENCLAVE_TYPE" in error["remedy"] and not (tmp_path / "x").exists()
    refused("sealing.blob.magic", 7, "unseal", "-o", tmp_path / "x", input=b"not sealed")


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    refused("cli.input.file", 2, "unseal", tmp_path / "missing", "-o", tmp_path / "x")
    refused("cli.unseal.output", 2, "unseal", input=b"x")
    refused("cli.seal.output", 2, "seal", input=b"x")


@needs_fuse
def test_devices_are_written_to_and_not_replaced(enter: Enter, tmp_path: Path) -> None:
    enter()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE)
    assert call("seal", "-o", pipe, input=b"state").exit_code == 0
    assert len(reader.communicate(timeout=20)[0]) == 661
    assert pipe.is_fifo()


_TERMINAL = """
import sys
from pathlib import Path
from inclavare.sdk import attest
attest.DIRECTORY = Path(sys.argv.pop(1))
from inclavare.cli import main
main(prog_name="inclavare")
"""


@needs_fuse
def test_a_terminal_is_spared(enter: Enter, tmp_path: Path) -> None:
    point = enter()
    text, binary = tmp_path / "text", tmp_path / "binary"
    call("seal", "-o", text, input="Grüße\n".encode())
    call("seal", "-o", binary, input=b"\x1b[2Jowned")

    def shown(*arguments: str | Path) -> tuple[int, str]:
        master, slave = pty.openpty()
        done = subprocess.run(
            [sys.executable, "-c", _TERMINAL, point, *arguments],
            stdout=slave, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, timeout=60,
        )  # fmt: skip
        os.close(slave)
        try:
            seen = os.read(master, 10000)
        except OSError:
            seen = b""
        os.close(master)
        return done.returncode, (seen + done.stderr).decode().replace("\r\n", "\n")

    assert shown("unseal", text) == (0, "Grüße\n")
    for arguments in (("unseal", binary), ("seal", text)):
        code, seen = shown(*arguments)
        assert code == 2 and "cli.output.terminal" in seen and "owned" not in seen and "INCLSEAL" not in seen
