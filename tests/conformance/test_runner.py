"""The runner itself: it reads TAP right, and what runs in it cannot touch the host's devices."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("conformance_run", HERE / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tap(runner: ModuleType) -> None:
    text = "1..6\nok 1 - a thing\nnot ok 2 - another # 0.008s\nok 3 - third #SKIP no TTY # 0.0s\nok - third\n# ok 9 - comment\nok 5\nnoise ok\n"
    assert runner.tap(text) == {"a thing": "ok", "another": "not ok", "third": "skip", "third #2": "ok", "5": "ok"}


def test_comparison_names_what_only_one_passes(runner: ModuleType) -> None:
    text = runner.compare({"/a/crun": {"p": {"x": "ok", "y": "not ok"}}, "/b/rune": {"p": {"x": "skip", "y": "ok"}}})
    assert "passed by crun, not by rune: 1\n  p: x: skip" in text
    assert "passed by rune, not by crun: 1\n  p: y: not ok" in text


SUITE = """\
import os
os.unlink("/dev/null")
os.mkdir("/run/left-behind")
print("ok 1 - with " + os.path.basename(os.environ["OCI_RUNTIME"]))
print("not ok 2 - always", flush=True)
if not os.fork():
    import time
    os.closerange(0, 3)
    time.sleep(1000)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_wild_suite_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_wild.py").write_text(SUITE)
    (tmp_path / "tests" / "init").write_text("")
    (tmp_path / "tests" / "init").chmod(0o755)
    runtime = tmp_path / "some-runtime"
    runtime.write_text("#!/bin/sh\n")
    runtime.chmod(0o755)
    argv = [sys.executable, str(HERE / "run.py"), "crun", "--path", str(tmp_path), "--runtime", str(runtime), "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {str(runtime): {"test_wild": {"with some-runtime": "ok", "always": "not ok"}}}
    assert Path("/dev/null").is_char_device()
    assert not Path("/run/left-behind").exists()
    assert (
        str(tmp_path / "tests" / "test_wild.py")
        not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    )
