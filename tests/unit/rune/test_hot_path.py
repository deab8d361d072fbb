"""What the forwarding path imports: the list is held, because every module costs each ordinary container its time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from inclavare.rune import launcher

#: Modules beyond what a bare ``python -IS`` has loaded. A new one needs a reason that is worth its milliseconds.
ALLOWED = {
    "__future__",
    "_ctypes",  # unshare and mount, only where crun needs a private view of the cgroups
    "_json",  # config.json
    "_struct",  # comes with _ctypes
    "struct",
    "inclavare",
    "inclavare.rune",
    "inclavare.rune.kernel",
    "inclavare.rune.low_level",
    "inclavare.rune.main",
    "inclavare.rune.settings",
    "os", "stat", "_stat", "posixpath", "genericpath", "os.path", "abc", "_abc", "_collections_abc",  # os itself
}  # fmt: skip

_PROBE = """
import sys
before = set(sys.modules)
sys.path.insert(0, {source!r})
import posix
def report(path, argv):
    sys.stdout.write("\\n".join([repr([path, *argv]), *sorted(set(sys.modules) - before)]))
    sys.stdout.flush()
    posix._exit(0)
import os
os.execv = report
sys.argv = ["rune", *{words!r}]
from inclavare.rune.main import main
main(None)
"""


def forwarded(words: list[str], env: dict[str, str]) -> tuple[list[str], set[str]]:
    """What rune would have executed for a command line, and the modules that were imported until then."""
    source = str(Path(launcher.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-IS", "-c", _PROBE.format(source=source, words=words)],
        env=env, capture_output=True, text=True, check=True, timeout=30,
    )  # fmt: skip
    argv, *modules = done.stdout.split("\n")
    return eval(argv), set(modules)


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """A PATH with a runtime of its own, and no configuration of the machine's."""
    (tmp_path / "bin").mkdir()
    for name in ("crun", "runc"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return {"PATH": str(tmp_path / "bin")}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    (tmp_path / "rootfs").mkdir()
    config = {"process": {"args": ["/bin/true"], "env": ["PATH=/bin"]}, "root": {"path": "rootfs"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


COMMANDS = [
    ["--log", "/dev/null", "--log-format", "json", "create", "--bundle", "BUNDLE", "--pid-file", "/p", "c1"],
    ["run", "-b", "BUNDLE", "c1"],
    ["start", "c1"],
    ["state", "c1"],
    ["kill", "c1", "KILL"],
    ["delete", "--force", "c1"],
    ["exec", "c1", "/bin/true"],
    ["pause", "c1"],
    ["ps", "c1"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: next(w for w in words if w.isalpha()))
def test_forwarding_imports_next_to_nothing(words: list[str], env: dict[str, str], bundle: Path) -> None:
    if "INCLAVARE_CONFIG" in os.environ or Path("/etc/inclavare/config.toml").exists():
        pytest.skip("this machine has a configuration, which takes one more file to read")
    words = [str(bundle) if word == "BUNDLE" else word for word in words]
    argv, modules = forwarded(words, env)
    assert modules - ALLOWED == set()
    assert argv[0] == f"{env['PATH']}/crun"
    assert argv[-1] == words[-1]
    assert "--root" in argv


def test_an_enclave_is_not_forwarded(env: dict[str, str], bundle: Path) -> None:
    config = json.loads((bundle / "config.json").read_text())
    config["process"]["env"].append("ENCLAVE_TYPE=nonsense")
    (bundle / "config.json").write_text(json.dumps(config))
    with pytest.raises(subprocess.CalledProcessError):
        forwarded(["run", "-b", str(bundle), "c1"], env)
