"""Ways in that a host might try, and mounts that ordinary images need, through rune and crun."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from runebox import RuneBox

pytestmark = pytest.mark.crun


def bind(destination: str, source: Path | str) -> dict[str, Any]:
    return {"destination": destination, "type": "bind", "source": str(source), "options": ["rbind", "rw"]}


def test_a_relative_source_starts_at_the_callers_bundle(box: RuneBox) -> None:
    bundle = box.bundle("/bin/cat", "/data/in", change=lambda config: config["mounts"].append(bind("/data", "shared")))
    (bundle / "shared").mkdir()
    (bundle / "shared/in").write_text("beside the configuration\n")
    done = box.run(bundle)
    assert (done.returncode, done.stdout) == (0, "beside the configuration\n"), done.stderr


def test_a_mount_through_a_link_of_the_image(box: RuneBox) -> None:
    bundle = box.bundle("/bin/cat", "/var/run/app/in", "/run/app/in",
                        change=lambda config: config["mounts"].append(bind("/var/run/app", "shared")))  # fmt: skip
    (bundle / "rootfs/var").mkdir()
    (bundle / "rootfs/run").mkdir()
    (bundle / "rootfs/var/run").symlink_to("/run")
    (bundle / "shared").mkdir()
    (bundle / "shared/in").write_text("x")
    done = box.run(bundle)
    assert (done.returncode, done.stdout) == (0, "xx"), done.stderr


def test_a_link_of_the_host_does_not_lead_a_mount_over_a_measured_file(box: RuneBox) -> None:
    evil = box.base / "evil"
    evil.mkdir()
    (evil / "greeting").write_text("tampered\n")
    shared = box.base / "shared"
    shared.mkdir()
    (shared / "link").symlink_to("/etc")

    def change(config: dict[str, Any]) -> None:
        config["mounts"] += [bind("/data", shared), bind("/data/link", evil)]

    done = box.run(box.bundle("/bin/cat", "/etc/greeting", change=change))
    assert done.returncode == 1
    assert "tampered" not in done.stdout
    assert "admission.mount.nested" in done.stderr


def test_a_refusal_with_a_very_long_value_is_still_said(box: RuneBox) -> None:
    def change(config: dict[str, Any]) -> None:
        config["linux"]["maskedPaths"] = ["/etc/" + "x" * 300_000]

    done = box.run(box.bundle(change=change))
    assert done.returncode == 1
    assert "admission.mask.refused" in done.stderr
    assert len(done.stderr) < 10_000


def test_devices_among_the_measured_files(box: RuneBox) -> None:
    def change(config: dict[str, Any]) -> None:
        config["linux"]["devices"] = [{"path": "/etc/greeting2", "type": "c", "major": 1, "minor": 5}]

    assert "admission.device.refused" in box.run(box.bundle(change=change)).stderr


def test_debug_that_is_switched_off_is_not_asked_for(box: RuneBox) -> None:
    box.create(box.bundle("/bin/sleep", "100", env=("ENCLAVE_DEBUG=false",)), "undebugged")
    assert box.meta("undebugged")["debug"] is False
