"""The hardware platform says what is missing, and never becomes the simulated one."""

from __future__ import annotations

import platform as machine
from pathlib import Path

import pytest
from small_enclaves import small_image

from inclavare.config import Config
from inclavare.errors import PlatformError
from inclavare.tee import base
from inclavare.tee.sgx import HardwarePlatform, create

pytestmark = pytest.mark.skipif(machine.machine() != "x86_64", reason="describes x86-64 machines")


def machine_with(tmp_path: Path, *, flags: str = "", device: str | None = None) -> HardwarePlatform:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(f"processor\t: 0\nflags\t\t: fpu {flags}\n")
    if device:
        (tmp_path / device).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / device).touch(mode=0o600)
    return HardwarePlatform(tmp_path)


def test_no_sgx_at_all(tmp_path: Path) -> None:
    found = machine_with(tmp_path).probe()
    assert not found.usable and "no sgx flag" in found.reason and "sgx-sim" in found.remedy


def test_processor_without_driver(tmp_path: Path) -> None:
    found = machine_with(tmp_path, flags="sgx").probe()
    assert not found.usable and "/dev/sgx_enclave" in found.reason
    assert "CONFIG_X86_SGX" in found.remedy and "does not show" in found.remedy


def test_processor_with_flexible_launch_control_but_no_driver(tmp_path: Path) -> None:
    assert "does not show" not in machine_with(tmp_path, flags="sgx sgx_lc").probe().remedy


@pytest.mark.parametrize("device", ["dev/sgx/enclave", "dev/isgx", "dev/sgx"])
def test_drivers_that_are_not_the_kernels_are_refused(tmp_path: Path, device: str) -> None:
    found = machine_with(tmp_path, flags="sgx sgx_lc", device=device).probe()
    assert not found.usable and f"/{device} belongs to" in found.reason and "CONFIG_X86_SGX" in found.remedy


def test_every_use_is_refused_with_the_reason(tmp_path: Path) -> None:
    platform = machine_with(tmp_path)
    calls = [
        lambda: platform.load(small_image(), bytes(1808), label="x"),
        platform.quote_target_info,
        lambda: platform.quote(bytes(432)),
        platform.collateral,
    ]
    for call in calls:
        with pytest.raises(PlatformError) as caught:
            call()
        assert caught.value.id == "tee.sgx.unavailable" and caught.value.exit_code == 5
        assert "no sgx flag" in str(caught.value.found) and caught.value.remedy


def test_never_a_silent_downgrade() -> None:
    config = Config()
    assert base.canonical_name("intelSgx") == "sgx"
    platform = base.platform("intelSgx", config)
    assert (platform.name, platform.simulated) == ("sgx", False)
    if not create(config).probe().usable:
        with pytest.raises(PlatformError) as caught:
            base.usable_platform("intelSgx", config)
        assert caught.value.id == "tee.platform.unusable"
