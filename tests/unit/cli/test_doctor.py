"""doctor tells the truth of this machine, of a machine without programs, and of a wrong configuration."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from inclavare.cli import main
from inclavare.config import load
from inclavare.tee.sgx_sim import epc


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "config.toml"
    write(file)
    monkeypatch.setenv("INCLAVARE_CONFIG", str(file))
    return file


def write(file: Path, more: str = "") -> None:
    directory = file.parent
    file.write_text(
        f'state_dir = "{directory}/lib"\nrun_dir = "{directory}/run"\nlog_dir = "{directory}/log"\n{more}[sgx_sim]\nepc_size = "64M"\n'
    )


def doctor() -> tuple[int, dict[str, dict[str, Any]]]:
    """The exit code and the findings by id."""
    done = CliRunner().invoke(main, ["doctor", "--json"])
    document = json.loads(done.stdout)
    findings = {finding["id"]: finding for finding in document["findings"]}
    missing = [finding for finding in findings.values() if finding["status"] == "missing"]
    assert document["ready"] is (not missing)
    assert done.exit_code == (5 if missing else 0)
    assert len(findings) == len(document["findings"]), "ids are unique"
    for finding in findings.values():
        assert finding["status"] == "ok" or finding["fix"], f"{finding['id']} names no fix"
    return done.exit_code, findings


def test_this_machine(config: Path) -> None:
    _, findings = doctor()
    assert findings["configuration"]["found"] == str(config)
    assert findings["kernel"]["found"] == os.uname().release
    assert (findings["root"]["status"] == "ok") is (os.geteuid() == 0)
    assert (findings["sgx"]["status"] == "ok") is False, (
        "hardware loading is not there yet, and doctor does not claim it"
    )
    assert "proves nothing" in findings["sgx-sim"]["found"]


def test_without_programs_each_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    code, findings = doctor()
    assert code == 5
    assert findings["gocryptfs"]["status"] == "missing"
    assert findings["gocryptfs"]["fix"] == "apt-get install gocryptfs"
    assert findings["low-level runtime"]["status"] == "missing"
    assert findings["docker"]["fix"] == "apt-get install docker.io"


def test_a_configured_runtime_that_is_not_there(config: Path) -> None:
    write(config, '[runtime]\nlow_level = "/nonexistent/crun"\n')
    code, findings = doctor()
    assert code == 5
    assert findings["low-level runtime"]["status"] == "missing"
    assert str(config) in findings["low-level runtime"]["fix"]


def test_epc_in_use_is_counted() -> None:
    held = epc.reserve(load(), 15_000, "some-container")
    try:
        _, findings = doctor()
        assert findings["sgx-sim EPC"]["status"] == "warning"
        assert findings["sgx-sim EPC"]["found"] == "58.6 MiB of 64.0 MiB used by 1 enclaves"
    finally:
        held.release()
    _, findings = doctor()
    assert findings["sgx-sim EPC"]["found"].startswith("0 B of 64.0 MiB")


def test_on_node_signing_switched_off_is_told(config: Path) -> None:
    write(config, "[signing]\non_node = []\n")
    assert doctor()[1]["on-node signing"]["status"] == "absent"


def test_a_wrong_configuration_is_an_error_with_its_line(config: Path) -> None:
    config.write_text("[sgx_sim]\nepc_sise = 3\n")
    done = CliRunner().invoke(main, ["doctor"])
    assert done.exit_code == 2
    assert "sgx_sim.epc_sise" in done.output


def test_for_people_it_says_what_is_what() -> None:
    done = CliRunner().invoke(main, ["doctor"])
    assert "Enclave containers" in done.output
    assert "low-level runtime\t" in done.output


def test_sgx_hardware_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a machine with SGX shows: processor, EPC, the cgroup's share of it, AESM."""
    from inclavare.cli import doctor
    from inclavare.tee.base import Availability
    from inclavare.tee.sgx import HardwarePlatform, sysfs
    from inclavare.tee.sgx.cpuid import EpcSection, SgxCpu

    monkeypatch.setattr(HardwarePlatform, "probe", lambda self: Availability(True))
    monkeypatch.setattr(
        HardwarePlatform, "cpu", lambda self: SgxCpu("x", True, True, True, sgx2=True, epc=(EpcSection(0, 1 << 30),))
    )
    group = sysfs.EpcGroup("/a", 4096, 8192, 0)
    monkeypatch.setattr(sysfs, "epc_accounting", lambda: sysfs.EpcAccounting(1 << 30, (group,)))
    found = {finding.id: finding for finding in doctor._hardware(load())}
    assert found["sgx"].found == "Intel SGX2, 1.0 GiB of EPC"
    assert found["sgx EPC"].found == "4.0 KiB of 8.0 KiB used by cgroup /a"
    assert found["AESM"].status in ("ok", "warning")


def test_directories_that_cannot_be_written(config: Path) -> None:
    (config.parent / "log").write_text("a file")
    config.write_text(
        f'state_dir = "/proc/inclavare"\nrun_dir = "{config.parent}/run"\nlog_dir = "{config.parent}/log"\n'
    )
    code, findings = doctor()
    assert code == 5
    assert findings["run_dir"] == {
        "id": "run_dir",
        "status": "ok",
        "found": f"{config.parent}/run, made when it is needed",
        "fix": "",
    }
    assert findings["log_dir"]["found"] == f"{config.parent}/log is not a directory"
    if not os.access("/proc", os.W_OK):
        assert findings["state_dir"]["found"] == "/proc cannot be written"


def test_the_epc_is_the_platforms(config: Path) -> None:
    assert CliRunner().invoke(main, ["sgx", "platform", "init", "--epc-size", "16M"]).exit_code == 0
    _, findings = doctor()
    assert findings["sgx-sim EPC"]["found"].startswith("0 B of 16.0 MiB")
