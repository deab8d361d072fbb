"""inclavare verify for trust domains and SEV-SNP guests: what it takes, what it shows, and where it looks."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from inclavare.attestation import Policy
from inclavare.cli import main
from inclavare.config import load
from inclavare.sgx.quote import Quote
from inclavare.tee.sgx_sim import SimulatedPlatform, create

AT = ("--at", "1751624191")
#: AMD numbers its VCEKs with 0.
pytestmark = pytest.mark.filterwarnings("ignore:Parsed a serial number")


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["verify", *(str(argument) for argument in arguments)])


def claims(done: Result) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(done.stdout)["claims"]
    return found


@pytest.fixture(autouse=True)
def platform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimulatedPlatform:
    config = tmp_path / "config.toml"
    config.write_text("".join(f'{key}_dir = "{tmp_path / key}"\n' for key in ("state", "run", "log")))
    monkeypatch.setenv("INCLAVARE_CONFIG", str(config))
    monkeypatch.chdir(tmp_path)
    return create(load())


@pytest.fixture
def looking(platform: SimulatedPlatform) -> tuple[str, ...]:
    Path("policy.toml").write_text('any_enclave = "allow"\nsimulated = "allow"\n')
    Path("root.der").write_bytes(platform.root_ca())
    return "--policy", "policy.toml", "--root-ca", "root.der"


def test_a_real_trust_domain(vectors: Path, looking: tuple[str, ...]) -> None:
    quote = vectors / "tdx" / "phala_tdx_quote.bin"
    collateral = vectors / "collateral" / "phala_tdx_quote_collateral.json"
    done = call(quote, "--collateral", collateral, *looking[:2], *AT)
    assert done.exit_code == 0, done.output
    assert "accepted: a trust domain on tdx, MRTD 91eb2b44d141d4ec" in done.output
    assert "checked with tcb_info" in done.output and "number 17, by Intel SGX TCB Signing" in done.output
    found = claims(call(quote, "--collateral", collateral, *looking[:2], *AT, "--json"))
    assert found["tdx"]["module_status"] == "UpToDate" and found["collateral_source"] == str(collateral)
    assert call(quote, *looking[:2], *AT).exit_code == 4


@pytest.mark.parametrize("form", ["der", "pem", "json"])
def test_a_real_snp_guest(vectors: Path, form: str) -> None:
    import ssl

    report = vectors / "sev-snp" / "trustee_test-report.bin"
    vcek = (vectors / "sev-snp" / "trustee_test-vcek.der").read_bytes()
    pem = ssl.DER_cert_to_PEM_cert(vcek)
    path = Path(f"vcek.{form}")
    path.write_bytes({"der": vcek, "pem": pem.encode(), "json": json.dumps({"certificates": pem}).encode()}[form])
    done = call(report, "--collateral", path, *AT)
    assert done.exit_code == 3 and "an SEV-SNP guest on snp, launch digest a1f39304" in done.output
    assert "snp.reported_tcb.microcode" in done.output and "by SEV-Milan" in done.output
    assert claims(call(report, "--collateral", path, *AT, "--json"))["snp"]["processor"] == "Milan"
    other = vectors / "collateral" / "phala_sgx_quote_collateral.json"
    mistaken = call(report, "--collateral", other, *AT)
    assert mistaken.exit_code == 4 and "evidence.collateral.mismatch" in mistaken.output
    damaged = bytearray(report.read_bytes())
    damaged[0x90] ^= 1
    Path("damaged").write_bytes(damaged)
    assert call("damaged", "--collateral", path, *AT).exit_code == 4


def test_event_log(vectors: Path, platform: SimulatedPlatform, looking: tuple[str, ...]) -> None:
    document = json.loads((vectors / "tdx" / "dstack_verifier_quote-report.json").read_text())
    body = Quote.split(bytes.fromhex(document["quote"]))[0].td_report()
    rtmrs = (body.rtmr0, body.rtmr1, body.rtmr2, body.rtmr3)
    Path("log").write_text(document["event_log"])
    Path("collateral").write_text(json.dumps(platform.td_collateral()))
    for name, registers, code in (("good", rtmrs, 0), ("other", (*rtmrs[:3], bytes(48)), 4)):
        Path(name).write_bytes(platform.td_quote(bytes(64), bytes(48), registers))
        done = call(name, "--collateral", "collateral", "--event-log", "log", *looking)
        assert done.exit_code == code, done.output
        assert ("28 events, which give the RTMRs" in done.output) is (code == 0)


def test_a_pccs(platform: SimulatedPlatform, looking: tuple[str, ...]) -> None:
    pytest.importorskip("uvicorn")
    from inclavare.tee.sgx_sim import pccs

    Path("quote").write_bytes(platform.td_quote(bytes(64), bytes(48)))
    listening = pccs.listen("127.0.0.1", 0, plain=True)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    server = pccs.server(load(), None)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        done = call("quote", "--pccs", url, *looking, "--json")
        assert done.exit_code == 0 and claims(done)["collateral_source"] == url
        assert claims(done)["tee"] == "tdx-sim"
    finally:
        server.should_exit = True
        thread.join(10)
        listening.close()
    assert call("quote", "--pccs", url, *looking).exit_code == 5
    assert call("quote", "--pccs", "localhost", *looking).exit_code == 2


def test_the_default_policy_names_nobody(platform: SimulatedPlatform) -> None:
    Path("quote").write_bytes(platform.td_quote(bytes(64), bytes(48)))
    Path("collateral").write_text(json.dumps(platform.td_collateral()))
    assert call("quote", "--collateral", "collateral").exit_code == 4
    Path("root.der").write_bytes(platform.root_ca())
    done = call("quote", "--collateral", "collateral", "--root-ca", "root.der", "--json")
    found = {failure["id"] for failure in json.loads(done.stdout)["failures"]}
    assert done.exit_code == 3 and {"policy.simulated", "policy.identity"} <= found
    assert not Policy().allow_simulated
