"""A bundle of a newer runtime-spec, shown to a crun that refuses it by its number alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from inclavare.rune import launcher
from inclavare.rune.low_level import KNOWN_VERSION, with_known_version


def shown(tmp_path: Path, text: str, version: object, path: str = "/usr/bin/crun") -> str | None:
    """What the low-level runtime is shown in place of a configuration, ``None`` if that itself."""
    (tmp_path / "config.json").write_text(text)
    rest = with_known_version(path, str(tmp_path / "config.json"), version, ["--bundle", "/b", "c"])
    assert rest[-3:] == ["--bundle", "/b", "c"]
    assert (tmp_path / "config.json").read_text() == text
    if len(rest) == 3:
        return None
    assert rest[0] == "--config"
    fd = int(rest[1].rpartition("/")[2])
    try:
        return Path(f"/proc/self/fd/{fd}").read_text()
    finally:
        os.close(fd)


@pytest.mark.parametrize("version", ["1.1.0", "1.2.0", "1.2.1", "1.3.0-rc.1"])
@pytest.mark.parametrize(
    "form", ['{{"ociVersion":"{}","x":"{}"}}', '{{ "x" : "1.2.0", "ociVersion" : \n"{}", "y": "{}" }}']
)
def test_only_the_version_differs(tmp_path: Path, version: str, form: str) -> None:
    text = form.format(version, version)
    seen = shown(tmp_path, text, version)
    assert seen is not None
    assert json.loads(seen) == {**json.loads(text), "ociVersion": KNOWN_VERSION}


@pytest.mark.parametrize("version", ["1.0.0", "1.0.2-dev", "2.0.0", "", None, 3])
def test_other_versions_are_the_low_level_runtimes_business(tmp_path: Path, version: object) -> None:
    assert shown(tmp_path, json.dumps({"ociVersion": version}), version) is None


def test_runc_and_odd_spellings_get_what_the_caller_wrote(tmp_path: Path) -> None:
    assert shown(tmp_path, '{"ociVersion": "1.2.0"}', "1.2.0", "/usr/bin/runc") is None
    assert shown(tmp_path, '{"ociVersi\\u006fn": "1.2.0", "x": "1.2.0"}', "1.2.0") is None


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("crun") is None, reason="needs root and crun")
def test_an_ordinary_container_of_the_newest_spec_runs(tmp_path: Path) -> None:
    if not Path("/bin/busybox").exists() or shutil.which("runc") is None:
        pytest.skip("needs busybox-static and runc")
    rune = launcher.write(tmp_path / "rune")
    (tmp_path / "b/rootfs/bin").mkdir(parents=True)
    shutil.copy("/bin/busybox", tmp_path / "b/rootfs/bin/echo")
    subprocess.run(["runc", "spec"], cwd=tmp_path / "b", check=True)
    config = json.loads((tmp_path / "b/config.json").read_text())
    config["ociVersion"] = "1.2.1"
    config["process"].update(terminal=False, args=["/bin/echo", "new"])
    (tmp_path / "b/config.json").write_text(json.dumps(config))
    command = [rune, "--root", tmp_path / "root", "run", "--bundle", tmp_path / "b", f"version-{os.getpid()}"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert (done.stdout, done.returncode) == ("new\n", 0), done.stderr
