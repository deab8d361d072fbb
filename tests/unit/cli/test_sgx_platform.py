"""``inclavare sgx platform``: what it prints, what it refuses, and its service as a process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner, Result
from cryptography import x509
from small_enclaves import Signers, sign_image, small_image

from inclavare.cli import main
from inclavare.config import load
from inclavare.sgx.quote import Quote
from inclavare.tee.sgx_sim import create, fuses, tcb

NEWER = "03020202020100000000000000000000"


@pytest.fixture(autouse=True)
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "config.toml"
    file.write_text(
        f'state_dir = "{tmp_path}/lib"\nrun_dir = "{tmp_path}/run"\nlog_dir = "{tmp_path}/log"\n[sgx_sim]\nepc_size = "64M"\n'
    )
    monkeypatch.setenv("INCLAVARE_CONFIG", str(file))
    return tmp_path


def call(*words: str, answer: str = "") -> Result:
    return CliRunner().invoke(main, ["sgx", "platform", *words], input=answer, prog_name="inclavare")


def document(*words: str) -> dict[str, Any]:
    done = call(*words, "--json")
    assert done.exit_code == 0, done.output
    parsed: dict[str, Any] = json.loads(done.stdout)
    return parsed


def refusal(*words: str, code: int) -> str:
    done = call(*words, "--json")
    assert done.exit_code == code, done.output
    return str(json.loads(done.stdout)["error"]["id"])


def test_init_show_reset() -> None:
    made = document("init", "--epc-size", "16M", "--cpusvn", NEWER, "--fmspc", "53494D0000AA")
    assert (made["cpusvn"], made["fmspc"], made["epc_bytes"]) == (NEWER, "53494d0000aa", 16 << 20)
    assert (made["tee"], made["simulated"]) == ("sgx-sim", True)
    assert made["root_ca_sha256"] == made["root_ca"]["sha256"]
    assert document("show") == made
    assert refusal("init", code=5) == "tee.platform.exists"
    assert document("reset", "--yes")["removed"] is True
    assert document("reset")["removed"] is False, "nothing to ask about"
    again = document("show")
    assert again["root_ca_sha256"] != made["root_ca_sha256"] and again["epc_bytes"] == 64 << 20


def test_a_table_for_people(signers: Signers) -> None:
    image = small_image(b"x")
    enclave = create(load()).load(image, sign_image(image, signers.ours).to_bytes(), label="some-container")
    call("set-tcb", "--status", "OutOfDate", "--advisory", "INTEL-SA-00615", "--pck-revoked", "--collateral-expired")
    shown = call("show").stdout
    for text in (
        "64.0 MiB",
        "[mem 0x0000004000000000-0x0000004003ffffff] reserved",
        fuses.CPUSVN.hex(),
        fuses.FMSPC.hex(),
        "OutOfDate (INTEL-SA-00615)",
        "REVOKED",
        "EXPIRED",
        "some-container",
        "nothing here proves anything about hardware",
    ):
        assert text in shown
    assert document("show")["epc"]["holders"][0]["label"] == "some-container"
    enclave.destroy()
    call("set-tcb", "--status", "UpToDate", "--pck-valid", "--collateral-fresh")
    shown = call("show").stdout
    assert not any(text in shown for text in ("OutOfDate", "INTEL-SA", "REVOKED", "EXPIRED", "some-container"))


def test_anchors_and_collateral() -> None:
    root = x509.load_pem_x509_certificate(call("show", "--root-ca").stdout.encode())
    assert "SIMULATED" in root.subject.rfc4514_string()
    assert json.loads(json.loads(call("show", "--collateral").stdout)["tcb_info"])["id"] == "SGX"
    assert json.loads(json.loads(call("show", "--collateral", "--tdx").stdout)["tcb_info"])["id"] == "TDX"
    assert call("show", "--tdx").exit_code == 2
    assert call("show", "--tee", "sgx", "--collateral", "--tdx").exit_code == 2


def test_reset_asks() -> None:
    root = document("show")["root_ca_sha256"]
    refused = call("reset", answer="n\n")
    assert refused.exit_code == 1
    for lost in ("sealed", "counters", "root CA"):
        assert lost in refused.stderr
    assert call("reset").exit_code == 1, "no answer is no consent"
    assert document("show")["root_ca_sha256"] == root
    assert call("reset", answer="y\n").exit_code == 0
    assert document("show")["root_ca_sha256"] != root


def test_reset_and_microcode_wait_for_enclaves(signers: Signers) -> None:
    image = small_image(b"x")
    enclave = create(load()).load(image, sign_image(image, signers.ours).to_bytes(), label="running")
    assert refusal("reset", "--yes", code=5) == "tee.epc.busy"
    assert refusal("set-tcb", "--cpusvn", NEWER, code=5) == "tee.epc.busy"
    enclave.destroy()
    assert document("set-tcb", "--cpusvn", NEWER)["cpusvn"] == NEWER


def test_set_tcb_changes_what_is_named() -> None:
    words = ["--status", "ConfigurationNeeded", "--advisory", "INTEL-SA-00289", "--advisory", "INTEL-SA-00615"]
    assert document("set-tcb", *words)["tcb"]["advisories"] == ["INTEL-SA-00289", "INTEL-SA-00615"]
    both = document("set-tcb", "--qe-status", "OutOfDate", "--qe-advisory", "INTEL-SA-00700")
    assert both["tcb"]["status"] == "ConfigurationNeeded" and both["tcb"]["advisories"] != []
    assert both["qe"] == {"svn": 1, "status": "OutOfDate", "advisories": ["INTEL-SA-00700"]}
    assert document("set-tcb", "--advisory", "INTEL-SA-00001")["tcb"]["advisories"] == ["INTEL-SA-00001"]
    back = document("set-tcb", "--status", "UpToDate", "--qe-status", "UpToDate")
    assert back["tcb"]["advisories"] == back["qe"]["advisories"] == []
    assert tcb.load(load().platform_dir) == tcb.Tcb()
    assert document("set-tcb", "--evaluation-number", "17")["tcb"]["evaluation_number"] == 17


@pytest.mark.parametrize(
    ("words", "id"),
    [
        (("set-tcb", "--status", "Fine"), "tee.tcb.status"),
        (("set-tcb", "--qe-status", "ConfigurationNeeded"), "tee.tcb.status"),
        (("set-tcb", "--advisory", "615"), "tee.tcb.advisory"),
        (("set-tcb", "--evaluation-number", "0"), "tee.tcb.evaluation_number"),
        (("set-tcb", "--cpusvn", "00"), "cli.usage"),
        (("init", "--epc-size", "1000"), "tee.platform.epc_size"),
        (("init", "--epc-size", "much"), "cli.usage"),
        (("init", "--fmspc", "00A0671100"), "cli.usage"),
        (("serve", "--host", "0.0.0.0"), "tee.pccs.plain"),
        (("serve", "--tls-cert", __file__), "cli.usage"),
        (("serve", "--tls-cert", __file__, "--tls-key", __file__), "serving.tls"),
    ],
)
def test_wrong_values(words: tuple[str, ...], id: str) -> None:
    assert refusal(*words, code=2) == id


def test_td_quote(node: Path) -> None:
    file = node / "quote"
    words = ["--mrtd", "ab" * 48, "--rtmr", "01" * 48, "--rtmr", "02" * 48, "--report-data", "c0ffee"]
    assert call("td-quote", *words, "--mr-owner", "03" * 48, "--debug", "-o", str(file)).exit_code == 0
    report = Quote.from_bytes(file.read_bytes()).td_report()
    assert (report.mr_td, report.rtmr0, report.rtmr1, report.rtmr2) == (
        b"\xab" * 48,
        b"\x01" * 48,
        b"\x02" * 48,
        bytes(48),
    )
    assert report.report_data == b"\xc0\xff\xee" + bytes(61) and report.mr_owner == b"\x03" * 48 and report.debug
    piped = call("td-quote", "--mrtd", "ab" * 48)
    assert Quote.from_bytes(piped.stdout_bytes).td_report().mr_td == b"\xab" * 48
    assert call("td-quote", "--mrtd", "ab" * 47).exit_code == 2
    for wrong in ("00" * 65, "zz", "0x00", "hello world"):
        assert call("td-quote", "--mrtd", "ab" * 48, "--report-data", wrong).exit_code == 2
    assert call("td-quote", "--mrtd", "ab" * 48, *["--rtmr", "00" * 48] * 5).exit_code == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_service_as_a_process(number: signal.Signals) -> None:
    root_crl = json.loads(call("show", "--collateral").stdout)["root_ca_crl"]
    code = "from inclavare.cli import main; main()"
    words = [sys.executable, "-c", code, "sgx", "platform", "serve", "--port", "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            name, url = process.stdout.readline().split()
            assert name == "pccs_url" and url.startswith("http://127.0.0.1:")
            assert httpx.get(f"{url}rootcacrl", trust_env=False).text == root_crl
            process.send_signal(number)
            _, errors = process.communicate(timeout=15)
        finally:
            process.kill()
    assert (process.returncode, errors) == (0, "")
