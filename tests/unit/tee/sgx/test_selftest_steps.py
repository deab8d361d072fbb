"""The self-test's hardware steps, all of them, on the machine that the tests make."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aesm_service import AesmService, key_id
from sgx_kernel import HEADER

from inclavare.attestation.verifiers import sgx as verifier
from inclavare.cli.sgx._steps import FAIL, PASS, SKIP, Hardware, perform
from inclavare.config import Config
from inclavare.tee.sgx import pccs, vdso
from inclavare.tee.sgx_sim import SimulatedPlatform, fuses

pytest.importorskip("unicorn", reason="the extra emulator is not installed")
pytestmark = pytest.mark.skipif(not HEADER.exists(), reason=f"no {HEADER} (linux-libc-dev)")


@pytest.fixture
def sgx(
    tmp_path: Path, shared_config: Config, platform: SimulatedPlatform, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:
    from driver_machine import SgxMachine

    platform.quote_target_info()
    made = SgxMachine(fuses.load(shared_config.platform_dir), tmp_path)
    monkeypatch.setattr(vdso, "enter_function", lambda: 1)
    for place, text in (
        ("proc/self/mountinfo", "1 0 0:1 / / rw - ext4 x rw\n2 1 0:2 / /sys/fs/cgroup rw - cgroup2 x rw\n"),
        ("proc/self/cgroup", "0::/\n"),
        ("sys/fs/cgroup/misc.capacity", "sgx_epc 8388608\n"),
        ("sys/fs/cgroup/misc.current", "sgx_epc 4096\n"),
        ("sys/devices/system/node/node0/x86/sgx_total_bytes", "8388608\n"),
    ):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(text)
    import platform as machine

    (tmp_path / "boot").mkdir()
    monkeypatch.setattr(machine, "release", lambda: "6.8.0")
    (tmp_path / "boot/config-6.8.0").write_text("CONFIG_X86_SGX=y\n")
    yield made
    if made.errors:
        raise made.errors[0]
    assert not made.files, "the enclave is gone"


@pytest.fixture
def aesm(sgx: Any, platform: SimulatedPlatform) -> Iterator[AesmService]:
    with AesmService(sgx.root / "var/run/aesmd/aesm.socket") as made:
        made.answers = {
            21: lambda _: {2: 1},
            22: lambda _: {2: key_id(2)},
            15: lambda _: {2: platform.quote_target_info()},
            16: lambda _: {2: 8192},
            17: lambda fields: {2: platform.quote(fields[1]).ljust(8192, b"\0")},  # type: ignore[arg-type]
        }
        yield made


def statuses(sgx: Any) -> dict[str, tuple[str, str]]:
    return {step.name: (step.status, step.detail) for step in perform(Hardware(sgx.platform, sgx.root))}


def test_everything_up_to_the_quote_passes(sgx: Any, aesm: AesmService) -> None:
    found = statuses(sgx)
    assert {name for name, (status, _) in found.items() if status == FAIL} == set()
    skipped = {name: detail for name, (status, detail) in found.items() if status == SKIP}
    assert set(skipped) == {"full EPC", "quote verified"}
    assert "sgx_default_qcnl.conf" in skipped["quote verified"]
    assert found["cpuid"][1].startswith("SGX1, SGX2, FLC, KSS, no EDECCSSA")
    assert "node 0: 8.0 MiB" in found["epc"][1] and "no limit" in found["epc cgroup"][1]
    assert "RESTRICT_PERMISSIONS" in sgx.calls


def test_a_simulated_quote_does_not_pass_for_hardware(
    sgx: Any, aesm: AesmService, platform: SimulatedPlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its root is not Intel's: the last step fails, whatever AESM and PCCS say."""
    (sgx.root / "etc").mkdir()
    (sgx.root / pccs.CONFIGURATION).write_text(json.dumps({"pccs_url": "https://pccs.example/sgx/certification/v4/"}))
    monkeypatch.setattr(pccs, "collateral", lambda url, quote, *, check_certificate: platform.collateral())
    status, detail = statuses(sgx)["quote verified"]
    assert status == FAIL and "simulated" in detail
    assert sgx.platform.root_ca() == verifier.INTEL_ROOT_CA


def test_without_sgx2_and_without_aesm(sgx: Any) -> None:
    sgx.sgx2 = False
    found = statuses(sgx)
    assert found["EDMM"][0] == SKIP and found["REPORT"][0] == PASS
    assert found["quoting enclave"][0] == FAIL and "sgx-aesm-service" in found["quoting enclave"][1]
    assert found["quote"][0] == SKIP


def test_a_sick_driver_shows(sgx: Any) -> None:
    sgx.free = 2
    found = statuses(sgx)
    assert found["load and EINIT"][0] == FAIL and "tee.epc.full" in found["load and EINIT"][1]
    assert found["REPORT"][0] == SKIP
