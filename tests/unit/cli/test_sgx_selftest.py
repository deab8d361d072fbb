"""inclavare sgx selftest: on this machine, and on the software platform."""

from __future__ import annotations

import gzip
import json
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from inclavare.cli import main
from inclavare.cli.sgx import _steps
from inclavare.cli.sgx._steps import FAIL, PASS, SKIP, Hardware, Step, Subject, describe, kernel_option, perform
from inclavare.config import Config
from inclavare.errors import PlatformError
from inclavare.tee.sgx import HardwarePlatform

usable = HardwarePlatform().probe().usable


@pytest.fixture(autouse=True)
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.toml"
    file.write_text(
        f'state_dir = "{tmp_path}/lib"\nrun_dir = "{tmp_path}/run"\nlog_dir = "{tmp_path}/log"\n[sgx_sim]\nepc_size = "8M"\n'
    )
    monkeypatch.setenv("INCLAVARE_CONFIG", str(file))


@pytest.mark.skipif(usable, reason="this machine has SGX")
def test_a_machine_without_sgx_is_told_so() -> None:
    result = CliRunner().invoke(main, ["sgx", "selftest"])
    assert result.exit_code == 5
    reason = HardwarePlatform().probe().reason
    assert result.stdout.splitlines()[-1].endswith(f"SGX hardware cannot be used on this machine: {reason}.")
    report = json.loads(CliRunner().invoke(main, ["sgx", "selftest", "--json"]).stdout)
    steps = {step["name"]: step for step in report["steps"]}
    assert not report["passed"] and steps["platform"]["status"] == FAIL
    for name in ("load and EINIT", "INIT", "REPORT", "SEAL and UNSEAL", "EDMM", "quote", "quote verified"):
        assert steps[name]["status"] == SKIP and steps[name]["detail"]


@pytest.mark.skipif(not usable, reason="this machine has no SGX")
def test_this_machines_sgx() -> None:
    result = CliRunner().invoke(main, ["sgx", "selftest"])
    assert result.exit_code == 0, result.stdout


def test_the_software_platform_passes() -> None:
    pytest.importorskip("unicorn", reason="the extra emulator is not installed")
    result = CliRunner().invoke(main, ["sgx", "selftest", "--tee", "sgx-sim", "--json"])
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and report["passed"]
    found = {step["name"]: step["status"] for step in report["steps"]}
    assert [name for name, status in found.items() if status != PASS] == ["EDMM"]
    details = {step["name"]: step["detail"] for step in report["steps"]}
    assert "TCB UpToDate" in details["quote verified"] and "full" in details["full EPC"]
    assert "proves nothing about hardware" in report["verdict"]
    assert all(step["milliseconds"] >= 0 for step in report["steps"])


def test_without_the_emulator_its_steps_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "unicorn" else real(name, *more)
    )
    report = json.loads(CliRunner().invoke(main, ["sgx", "selftest", "--tee", "sgx-sim", "--json"]).stdout)
    steps = {step["name"]: step for step in report["steps"]}
    assert steps["load and EINIT"]["status"] == SKIP and "inclavare[emulator]" in steps["load and EINIT"]["detail"]
    assert steps["REPORT"]["status"] == SKIP and steps["full EPC"]["status"] == PASS


def test_the_report_names_no_host(tmp_path: Path) -> None:
    output = CliRunner().invoke(main, ["sgx", "selftest"]).stdout
    words = set(output.replace(",", " ").split())
    assert socket.gethostname() not in words and str(tmp_path) not in output
    (tmp_path / "sys/class/dmi/id").mkdir(parents=True)
    (tmp_path / "proc").mkdir()
    for name in ("product_name", "bios_version", "product_serial", "product_uuid"):
        (tmp_path / "sys/class/dmi/id" / name).write_text(f"<{name}>\n")
    (tmp_path / "proc/cpuinfo").write_text("model name\t: X 9\nmicrocode\t: 0x2b\nflags\t: sgx hypervisor\n")
    about = describe(tmp_path)
    assert (about["processor"], about["microcode"], about["virtual"]) == ("X 9", "0x2b", "yes")
    assert (about["product"], about["firmware"]) == ("<product_name>", "<bios_version>")
    assert not {"<product_serial>", "<product_uuid>"} & set(about.values())


class Broken(Subject):
    """A platform whose enclaves answer wrongly."""

    def load(self, image: object, sigstruct: bytes) -> _steps.Enclave:
        class Wrong:
            def enter(self, request: bytes) -> bytes:
                return bytes(16)

            def target_info(self) -> bytes:
                return b"short"

            def destroy(self) -> None:
                destroyed.append(True)

        destroyed: list[bool] = self.__dict__.setdefault("destroyed", [])
        return Wrong()


def test_wrong_answers_fail_and_do_not_stop_the_report(tmp_path: Path) -> None:
    subject = Broken(Config(state_dir=tmp_path / "s", run_dir=tmp_path / "r", log_dir=tmp_path / "l", epc_size=1 << 20))
    steps = {step.name: step for step in perform(subject)}
    for name in ("ECHO", "REPORT", "SEAL and UNSEAL", "quote"):
        assert steps[name].status == FAIL, name
    assert "brought other bytes" in steps["ECHO"].detail
    assert steps["quote verified"].status == SKIP
    assert subject.__dict__["destroyed"] == [True]


def test_a_step_that_raises_anything_is_a_failed_step() -> None:
    def defect() -> str:
        raise ZeroDivisionError("oops")

    def refusal() -> str:
        raise PlatformError("no", id="a.b", remedy="do c")

    assert _steps._timed("x", defect).detail == "unexpected ZeroDivisionError: oops"
    found = _steps._timed("x", refusal)
    assert isinstance(found, Step) and found.status == FAIL and found.detail == "no. Do c [a.b]"


def test_kernel_options(tmp_path: Path) -> None:
    assert kernel_option("CONFIG_X86_SGX", tmp_path, "6.1") is None
    (tmp_path / "boot").mkdir()
    (tmp_path / "boot/config-6.1").write_text("CONFIG_X86_SGX_KVM=y\n# CONFIG_X86_SGX is not set\n")
    assert kernel_option("CONFIG_X86_SGX", tmp_path, "6.1") == ""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/config.gz").write_bytes(gzip.compress(b"CONFIG_X86_SGX=y\n"))
    assert kernel_option("CONFIG_X86_SGX", tmp_path, "6.1") == "y"
    (tmp_path / "proc/config.gz").write_bytes(b"damaged")
    assert kernel_option("CONFIG_X86_SGX", tmp_path, "6.1") == ""


def test_a_dev_without_exec_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/sgx_enclave").touch()
    mounts = tmp_path / "proc/self/mountinfo"
    subject = Hardware(HardwarePlatform(tmp_path), tmp_path)
    mounts.write_text("1 0 0:1 / / rw - ext4 x rw\n2 1 0:2 / /dev rw,nosuid,noexec - devtmpfs x rw\n")
    with pytest.raises(PlatformError) as caught:
        subject._device()
    assert caught.value.id == "cli.selftest.noexec" and "remount,exec /dev" in str(caught.value.remedy)
    mounts.write_text("1 0 0:1 / / rw - ext4 x rw\n2 1 0:2 / /dev rw,nosuid - devtmpfs x rw\n")
    assert "/dev/sgx_enclave opens" in subject._device()
