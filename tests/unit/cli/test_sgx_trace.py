"""sgx trace as a user calls it: the timeline, its JSON, and what is never in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from small_enclaves import Signers, sign_image, small_image

from inclavare.cli import main
from inclavare.sgx import sgxs
from inclavare.sgx.measure import measure
from inclavare.tee import skeleton

pytest.importorskip("unicorn", reason="needs the extra emulator")


@pytest.fixture(autouse=True)
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.toml"
    path.write_text("\n".join(f'{name} = "{tmp_path / name}"' for name in ("state_dir", "run_dir", "log_dir")))
    monkeypatch.setenv("INCLAVARE_CONFIG", str(path))


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["sgx", "trace", *map(str, arguments)])


def steps(*arguments: str | Path, exit_code: int = 0) -> list[dict[str, Any]]:
    result = call(*arguments, "--json")
    assert result.exit_code == exit_code, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def events(found: list[dict[str, Any]]) -> list[str]:
    return [step["event"] for step in found]


def test_default_run() -> None:
    result = call()
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["0", "ECREATE…EINIT"]
    assert any(measure(skeleton.image()).hex() in line for line in lines)
    assert any("EGETKEY" in line and "SEAL_KEY" in line and "policy MRENCLAVE" in line for line in lines)
    assert any("<egetkey+" in line for line in lines)
    assert lines[-1].endswith("answer 'secret'")


def test_one_event_a_line() -> None:
    found = steps("--op", "echo=hello")
    assert events(found) == ["LOADED", "CALL", "EENTER", "EEXIT", "ANSWER", "CALL", "EENTER", "EEXIT", "ANSWER"]
    assert found[0]["mrenclave"] == measure(skeleton.image()).hex()
    assert found[0]["leaves"] == "ECREATE×1 EPA×1 EADD×10 EEXTEND×160 EINIT×1"
    assert found[-1]["answer"] == "'hello'"
    counts = [step["instructions"] for step in found]
    assert counts == sorted(counts)
    assert counts[-1] > counts[0]


def test_interrupts() -> None:
    found = steps("--op", "echo=hello", "--aex-every", "100")
    exits = [step for step in found if step["event"] == "AEX"]
    assert len(exits) >= 6
    assert {step["reason"] for step in exits} == {"interrupt 32"}
    assert events(found).count("ERESUME") == len(exits)
    assert found[-1]["answer"] == "'hello'"


def test_eviction() -> None:
    found = steps("--op", "echo=hello", "--evict")
    written, loaded = (
        [step["page"] for step in found if step["event"] == name and step["status"] == "SGX_SUCCESS"]
        for name in ("EWB", "ELDU")
    )
    assert len(set(written)) == 10
    assert set(loaded) <= set(written)
    missed = [step for step in found if step["event"] == "#PF"]
    assert len(missed) == len(loaded)
    assert {step["by"] for step in missed} == {"host", "enclave"}
    assert all(step["why"] == "the page tables map nothing there" for step in missed)
    assert found[-1]["answer"] == "'hello'"


def test_fault_is_explained() -> None:
    found = steps("--debug", "--op", "peek=+0xa000", exit_code=5)
    fault = next(step for step in found if step["event"] == "#PF")
    assert fault["access"] == "read"
    assert fault["refused_by"] == "EPCM"
    assert fault["why"] == "EPCM: only the processor may access a page of this type"
    assert "<op_peek+" in fault["rip"]
    assert found[-1]["event"] == "REFUSED"
    assert found[-1]["id"] == "tee.emulator.exception"
    result = call("--debug", "--op", "jump=0x100000")
    assert result.exit_code == 5
    assert "an enclave executes nothing outside of itself" in result.stdout
    assert "tee.emulator.exception" in result.stderr


def test_exception_entry_is_shown() -> None:
    found = events(steps("--debug", "--op", "ud2"))
    at = found.index("#UD")
    assert found[at : at + 5] == ["#UD", "AEX", "EENTER", "EEXIT", "ERESUME"]


def test_every_instruction() -> None:
    found = [step for step in steps("--op", "info", "--instructions") if step["event"] == "INSTRUCTION"]
    assert (found[0]["text"], found[0]["enclave"]) == ("enclu", False)
    assert (found[1]["text"], found[1]["enclave"]) == ("test rax, rax", True)
    assert found[1]["rip"] == "0x200000000 <entry>"
    total = steps("--op", "info")[-1]["instructions"]
    assert len(found) == total


def test_no_key_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever EGETKEY derived in the run, no part of the output has it."""
    from inclavare.tee.sgx_sim.processor import enclu_identity

    derived: list[bytes] = []
    original = enclu_identity.keys.egetkey

    def watch(*arguments: Any) -> bytes:
        derived.append(original(*arguments))
        return derived[-1]

    monkeypatch.setattr(enclu_identity.keys, "egetkey", watch)
    for more in ((), ("--json",), ("--instructions", "--aex-every", "50")):
        result = call("--op", "seal=x", "--op", "unseal", *more)
        assert result.exit_code == 0
        assert derived
        assert not any(key.hex() in result.output or str(key) in result.output for key in derived)


def test_enclave_from_files(tmp_path: Path, signers: Signers) -> None:
    # mov edi, 42; mov rbx, rcx; mov eax, 4; enclu
    image = small_image(bytes.fromhex("bf2a000000 4889cb b804000000 0f01d7"))
    stream, signature = tmp_path / "enclave.sgxs", tmp_path / "enclave.sig"
    with stream.open("wb") as file:
        sgxs.write(image, file)
    signature.write_bytes(sign_image(image, signers.ours).to_bytes())
    found = steps(stream, "--sigstruct", signature)
    assert events(found) == ["LOADED", "EENTER", "EEXIT", "ANSWER"]
    assert found[-1]["answer"] == "rdi=0x2a rsi=0x0"
    assert steps(stream) == found, "beside it, as for sgx measure"
    signature.write_bytes(sign_image(skeleton.image(), signers.ours).to_bytes())
    assert call(stream, "--sigstruct", signature).exit_code == 7


def test_enclave_that_never_ends(tmp_path: Path, signers: Signers) -> None:
    image = small_image(bytes.fromhex("ebfe"))  # 1: jmp 1b
    stream, signature = tmp_path / "enclave.sgxs", tmp_path / "enclave.sig"
    with stream.open("wb") as file:
        sgxs.write(image, file)
    signature.write_bytes(sign_image(image, signers.ours).to_bytes())
    result = call(stream, "--sigstruct", signature, "--budget", "10000")
    assert result.exit_code == 6
    assert "tee.emulator.budget" in result.stderr


def test_what_cannot_be_traced_says_what_to_do(tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone.sgxs", tmp_path / "enclave.signed.so"
    with alone.open("wb") as file:
        sgxs.write(small_image(), file)
    shared.write_bytes(b"\x7fELF" + bytes(100))
    for path, id, remedy in ((alone, "cli.trace.sigstruct", "sgx sign"), (shared, "cli.trace.kind", "sgx measure")):
        result = call(path)
        assert result.exit_code == 2
        assert id in result.stderr and remedy in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("--op", "nothing"),
        ("--op", "unseal"),
        ("--debug", "--op", "peek=here"),
        ("--aex-every", "0"),
        ("--sigstruct", __file__),
        (__file__,),
    ],
)
def test_wrong_arguments(arguments: tuple[str, ...]) -> None:
    assert call(*arguments).exit_code == 2
