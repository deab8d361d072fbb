"""Temporary directories, and how skopeo is called."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from inclavare.enclave import programs


def _age(path: Path) -> None:
    past = time.time() - 3600
    os.utime(path, (past, past))


def test_what_a_killed_owner_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    code = "from inclavare.enclave.programs import work_directory\nimport os\n"
    code += "with work_directory() as work:\n (work / 'x').mkdir(mode=0)\n os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    (left,) = tmp_path.iterdir()
    other = tmp_path / "inclavare-other"
    other.mkdir()
    _age(other)
    with programs.work_directory():
        assert left.exists(), "it is young: its owner may be about to lock it"
    _age(left)
    with programs.work_directory() as mine:
        assert not left.exists() and other.exists()
        _age(mine)
        with programs.work_directory():
            assert mine.exists(), "its owner lives"
    assert list(tmp_path.iterdir()) == [other]


def test_skopeo_asks_the_daemon_that_docker_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = tmp_path / "argv"
    skopeo = tmp_path / "skopeo"
    skopeo.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {argv}\n')
    skopeo.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("DOCKER_HOST", "unix:///run/other.sock")
    programs.skopeo_copy("reading", "docker-daemon:a:b", "oci:/x:y")
    assert "--src-daemon-host=unix:///run/other.sock" in argv.read_text().split()
    programs.skopeo_copy("writing", "oci:/x:y", "docker-daemon:a:b")
    assert "--dest-daemon-host=unix:///run/other.sock" in argv.read_text().split()
    programs.skopeo_copy("writing", "oci:/x:y", "oci:/z:y")
    assert "daemon-host" not in argv.read_text()
