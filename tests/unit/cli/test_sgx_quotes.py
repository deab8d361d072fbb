"""inclavare sgx gen-qe-target-info, gen-quote and verify-quote on the simulated platform."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from small_enclaves import Signers, sign_image, small_image

from inclavare.cli import main
from inclavare.config import Config, load
from inclavare.sgx.structs import Report, ReportBody
from inclavare.tee.sgx_sim import SimulatedEnclave, create

SIM = ("--tee", "sgx-sim")


def call(*arguments: str | Path, input: bytes | None = None) -> Result:
    return CliRunner().invoke(main, ["sgx", *(str(argument) for argument in arguments)], input=input)


def refused(id: str, exit_code: int, *arguments: str | Path, input: bytes | None = None) -> dict[str, Any]:
    done = call(*arguments, "--json", input=input)
    error: dict[str, Any] = json.loads(done.stdout)["error"]
    assert (error["id"], done.exit_code) == (id, exit_code), done.output
    return error


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("node")
    (base / "config.toml").write_text("".join(f'{key}_dir = "{base / key}"\n' for key in ("state", "run", "log")))
    return base


@pytest.fixture(autouse=True)
def here(node: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """The node's configuration; the working directory is a fresh one."""
    monkeypatch.setenv("INCLAVARE_CONFIG", str(node / "config.toml"))
    monkeypatch.chdir(tmp_path)
    return load()


@pytest.fixture
def enclave(here: Config, signers: Signers) -> SimulatedEnclave:
    image = small_image(b"quoted")
    return create(here).load(image, sign_image(image, signers.ours).to_bytes(), label="test")


@pytest.fixture
def policy(enclave: SimulatedEnclave, here: Config, tmp_path: Path) -> tuple[str | Path, ...]:
    path, root = tmp_path / "policy.toml", tmp_path / "root.der"
    path.write_text(f'simulated = "allow"\nmrenclave = ["{enclave.mrenclave.hex()}"]\n')
    root.write_bytes(create(here).root_ca())
    return "--policy", path, "--root-ca", root


def quoted(enclave: SimulatedEnclave, data: bytes = bytes(64)) -> bytes:
    """What a user of sgx-tools does: TARGETINFO, report, quote."""
    assert call("gen-qe-target-info", *SIM, "--targetinfo", "ti").exit_code == 0
    Path("report").write_bytes(enclave.report(Path("ti").read_bytes(), data))
    done = call("gen-quote", *SIM, "--quote-type", "ecdsa", "--report", "report", "--quote", "q")
    assert done.exit_code == 0, done.output
    return Path("q").read_bytes()


def test_from_target_info_to_verdict(enclave: SimulatedEnclave, policy: tuple[str | Path, ...]) -> None:
    quote = quoted(enclave, b"challenge".ljust(64, b"\0"))
    assert quote[48 : 48 + 384] == Path("report").read_bytes()[:384]
    data = b"challenge".hex()
    done = call("verify-quote", "--quote", "q", *SIM, *policy, "--report-data", data, "--json")
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)
    assert shown["claims"]["mrenclave"] == enclave.mrenclave.hex()
    assert call("verify-quote", "--quote", "-", *SIM, *policy, input=quote).exit_code == 0
    other = call("verify-quote", "--quote", "q", *SIM, *policy, "--report-data", b"other".hex())
    assert other.exit_code == 3, other.output


def test_names_of_files_are_those_of_sgx_tools(enclave: SimulatedEnclave, here: Config) -> None:
    assert call("gen-qe-target-info", *SIM).exit_code == 0
    found = Path("qe_targetinfo.bin").read_bytes()
    assert found == create(here).quote_target_info() and len(found) == 512
    Path("r").write_bytes(enclave.report(found, bytes(64)))
    assert call("gen-quote", *SIM, "--report", "r").exit_code == 0
    assert Path("quote.bin").read_bytes()[:2] == b"\x03\x00"
    assert Path("quote.bin").stat().st_mode & 0o777 == 0o644


def test_standard_streams_and_json(enclave: SimulatedEnclave) -> None:
    found = call("gen-qe-target-info", *SIM, "-o", "-").stdout_bytes
    shown = json.loads(call("gen-qe-target-info", *SIM, "--json").stdout)
    assert bytes.fromhex(shown["targetinfo"]) == found
    report = enclave.report(found, b"d" * 64)
    quote = call("gen-quote", *SIM, "--report", "-", "-o", "-", input=report).stdout_bytes
    shown = json.loads(call("gen-quote", *SIM, "--report", "-", "--json", input=report).stdout)
    assert bytes.fromhex(shown["quote"])[48:432] == quote[48:432] == report[:384]
    assert (shown["mrenclave"], shown["report_data"]) == (enclave.mrenclave.hex(), (b"d" * 64).hex())
    assert not Path("quote.bin").exists() and not Path("qe_targetinfo.bin").exists()


def test_reports_that_are_not_quoted(enclave: SimulatedEnclave, here: Config, tmp_path: Path) -> None:
    good = enclave.report(create(here).quote_target_info(), bytes(64))
    damaged = bytearray(good)
    damaged[330] ^= 1
    for report in (bytes(damaged), enclave.report(enclave.target_info(), bytes(64))):
        refused("evidence.report.mac", 4, "gen-quote", *SIM, "--report", "-", "-o", tmp_path / "q", input=report)
    for report in (b"", good[:-1], good + b"\0"):
        refused("sgx.report.size", 7, "gen-quote", *SIM, "--report", "-", "-o", tmp_path / "q", input=report)
    refused("cli.input.file", 2, "gen-quote", *SIM, "--report", tmp_path / "missing")
    assert not (tmp_path / "q").exists()


def test_hardware_is_the_default_and_never_replaced_by_the_simulation() -> None:
    if Path("/dev/sgx_enclave").exists():
        pytest.skip("this machine has SGX")
    refused("tee.platform.unusable", 5, "gen-qe-target-info")
    refused("tee.platform.unusable", 5, "gen-quote", "--report", "-", input=bytes(432))
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("option", [("--quote-type", "epidUnlinkable"), ("--quote-type", "EPIDLinkable"),
                                    ("--spid", "00" * 16)])  # fmt: skip
@pytest.mark.parametrize("command", [("gen-quote", "--report", "-"), ("verify-quote", "--quote", "-"),
                                     ("gen-qe-target-info",)])  # fmt: skip
def test_epid(command: tuple[str, ...], option: tuple[str, str]) -> None:
    error = refused("cli.sgx.epid", 5, *command, *SIM, *option)
    assert "DCAP" in error["remedy"]


def test_quotes_that_are_not_accepted(enclave: SimulatedEnclave, policy: tuple[str | Path, ...], here: Config) -> None:
    quote = quoted(enclave)
    damaged = bytearray(quote)
    damaged[48 + 64] ^= 1
    assert call("verify-quote", "--quote", "-", *SIM, *policy, input=bytes(damaged)).exit_code == 4
    # Without the root nobody believes a simulation; without a policy nobody is expected.
    assert call("verify-quote", "--quote", "q", *SIM, *policy[:2]).exit_code == 4
    assert call("verify-quote", "--quote", "q", *SIM).exit_code == 4
    Path("other.toml").write_text(f'simulated = "allow"\nmrenclave = ["{"0" * 64}"]\n')
    done = call("verify-quote", "--quote", "q", *SIM, "--policy", "other.toml", *policy[2:])
    assert done.exit_code == 3 and "mrenclave" in done.output
    for wrong in (b"", b"x" * 2000):
        assert call("verify-quote", "--quote", "-", *SIM, *policy, input=wrong).exit_code == 4
    refused("cli.input.size", 2, "verify-quote", "--quote", "-", *SIM, *policy, input=bytes((1 << 20) + 1))


def test_where_collateral_comes_from(
    enclave: SimulatedEnclave, policy: tuple[str | Path, ...], here: Config, tmp_path: Path
) -> None:
    quoted(enclave)
    error = refused("cli.sgx.tee", 2, "verify-quote", "--quote", "q", *policy)
    assert (error["found"], error["expected"]) == ("sgx-sim", "sgx")
    file = tmp_path / "collateral.json"
    file.write_text(json.dumps(create(here).collateral()))
    assert call("verify-quote", "--quote", "q", "--collateral", file, *policy).exit_code == 0
    file.write_text("{}")
    assert call("verify-quote", "--quote", "q", "--collateral", file, *policy).exit_code == 4
    file.write_text("nothing")
    refused("cli.verify.collateral", 2, "verify-quote", "--quote", "q", "--collateral", file, *policy)
    refused("cli.sgx.pccs", 2, "verify-quote", "--quote", "q", "--pccs", "localhost", *policy)
    refused("tee.sgx.pccs", 5, "verify-quote", "--quote", "q", "--pccs", "http://127.0.0.1:9", *policy)
    report = ReportBody.from_bytes(Report.from_bytes(Path("report").read_bytes()).body)
    assert report.mrenclave == enclave.mrenclave


def test_collateral_from_a_pccs(enclave: SimulatedEnclave, policy: tuple[str | Path, ...], here: Config) -> None:
    pytest.importorskip("uvicorn")
    from inclavare.tee.sgx_sim import pccs

    quoted(enclave)
    listening = pccs.listen("127.0.0.1", 0, plain=True)
    server = pccs.server(here, None)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        for form in (url, f"{url}/", f"{url}/sgx/certification/v4/"):
            done = call("verify-quote", "--quote", "q", "--pccs", form, *policy)
            assert done.exit_code == 0, done.output
        # Collateral proves itself: who answers is not trusted, and without the root nothing is accepted.
        assert call("verify-quote", "--quote", "q", "--pccs", url, *policy[:2]).exit_code == 4
    finally:
        server.should_exit = True
        thread.join(10)
        listening.close()
    assert not thread.is_alive()


def test_a_real_quote_with_its_collateral(vectors: Path) -> None:
    quote = vectors / "sgx/phala_sgx_quote.bin"
    collateral = vectors / "collateral/phala_sgx_quote_collateral.json"
    arguments = ("verify-quote", "--quote", quote, "--collateral", collateral, "--at", "1751624924")
    done = call(*arguments)
    assert done.exit_code == 3 and "ConfigurationAndSWHardeningNeeded" in done.output
    assert call(*arguments[:-1], "1800000000").exit_code == 4
