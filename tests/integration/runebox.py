"""rune with a node of its own: configuration, state and bundles in a temporary directory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import inclavare

APPLETS = [
    "sh",
    "true",
    "false",
    "cat",
    "echo",
    "id",
    "ls",
    "sleep",
    "env",
    "dd",
    "rm",
    "mkdir",
    "touch",
    "stat",
    "head",
    "mv",
    "chmod",
    "test",
    "od",
    "kill",
    "wc",
    "md5sum",
    "ln",
]


def need(*programs: str) -> None:
    """Skip where the machine lacks what the test drives."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (make setup)")


#: What a process started by ``python_mounts`` needs in its environment.
PYTHON_ENV = "PYTHONPATH=/opt/src:/opt/packages"


def python_mounts() -> list[dict[str, Any]]:
    """Mounts that give a container the host's Python with this tree's package and what it depends on."""
    if Path("/usr/bin/python3").resolve().name != f"python3.{sys.version_info.minor}":
        pytest.skip("needs the host's python3 in the version that runs the tests")
    mounts = {
        "/usr": "/usr",
        "/lib": "/lib",
        "/lib64": "/lib64",
        "/opt/src": str(Path(inclavare.__file__).parents[1]),
        "/opt/packages": sysconfig.get_paths()["platlib"],
    }
    return [
        {"destination": destination, "type": "bind", "source": source, "options": ["rbind", "ro"]}
        for destination, source in mounts.items()
    ]


class RuneBox:
    """One node.

    Args:
        base: an empty directory.
        rune: the launcher.
        extra: more lines for the node's configuration, table headers included.
    """

    def __init__(self, base: Path, rune: Path, extra: str = "") -> None:
        self.base = base
        self.rune = rune
        self.run_dir, self.state_dir, self.log_dir = base / "run", base / "state", base / "log"
        self.root = base / "root"
        self.config = base / "config.toml"
        self.configure(extra)

    def configure(self, extra: str) -> None:
        """Write the node's configuration anew."""
        lines = [f'{key} = "{getattr(self, key)}"' for key in ("run_dir", "state_dir", "log_dir")]
        self.config.write_text("\n".join([*lines, extra, ""]))

    @property
    def env(self) -> dict[str, str]:
        """The environment of rune and inclavare on this node."""
        return {**os.environ, "INCLAVARE_CONFIG": str(self.config)}

    def bundle(
        self,
        *args: str,
        name: str = "bundle",
        tee: str | None = "sgx-sim",
        env: tuple[str, ...] = (),
        change: Callable[[dict[str, Any]], None] | None = None,
        rootfs: Path | None = None,
    ) -> Path:
        """A bundle with a busybox root file system that runs ``args``."""
        path = self.base / name
        path.mkdir(exist_ok=True)
        if rootfs is None:
            rootfs = path / "rootfs"
            if not rootfs.exists():
                for directory in ("bin", "etc", "tmp", "data", "proc", "dev", "sys"):
                    (rootfs / directory).mkdir(parents=True)
                shutil.copy("/bin/busybox", rootfs / "bin/busybox")
                for applet in APPLETS:
                    (rootfs / "bin" / applet).symlink_to("busybox")
                (rootfs / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\napp:x:1000:1000::/:/bin/sh\n")
                (rootfs / "etc/greeting").write_text("measured\n")
        subprocess.run(["runc", "spec"], cwd=path, check=not (path / "config.json").exists(), capture_output=True)
        config = json.loads((path / "config.json").read_text())
        config["root"] = {"path": str(rootfs), "readonly": False}
        process = config["process"]
        process["terminal"] = False
        process["args"] = list(args) or ["/bin/true"]
        process["env"] = ["PATH=/bin", *env]
        if tee is not None:
            process["env"].append(f"ENCLAVE_TYPE={tee}")
        if change is not None:
            change(config)
        (path / "config.json").write_text(json.dumps(config))
        return path

    def call(
        self, *words: str, input: bytes | None = None, env: dict[str, str] | None = None, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """``rune WORDS`` on this node; output as text."""
        done = subprocess.run(
            [self.rune, "--root", self.root, *words],
            env=env or self.env,
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            timeout=timeout,
        )
        return subprocess.CompletedProcess(
            done.args, done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        )

    def run(self, bundle: Path, id: str = "c1", **kwargs: Any) -> subprocess.CompletedProcess[str]:
        """``rune run`` in the foreground."""
        return self.call("run", "--bundle", str(bundle), id, **kwargs)

    def create(self, bundle: Path, id: str = "c1", *words: str, start: bool = True) -> Path:
        """Create and start in the background; returns the container's directory."""
        done = subprocess.run(
            [self.rune, "--root", self.root, "create", "--bundle", bundle, *words, id],
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(self.base / f"{id}.err").open("wb"),
            timeout=60,
        )
        assert done.returncode == 0, (self.base / f"{id}.err").read_text()
        if start:
            started = self.call("start", id)
            assert started.returncode == 0, started.stderr
        return self.directory(id)

    def directory(self, id: str = "c1") -> Path:
        """Where rune keeps what it knows of a container."""
        return self.run_dir / "enclaves" / str(self.root).replace("%", "%25").replace("/", "%2F") / id

    def meta(self, id: str = "c1") -> dict[str, Any]:
        """The container's metadata."""
        found: dict[str, Any] = json.loads((self.directory(id) / "meta.json").read_text())
        return found

    def pid(self, id: str = "c1") -> int:
        """The container's first process."""
        return int(json.loads(self.call("state", id).stdout)["pid"])

    def status(self, id: str = "c1") -> str:
        """The container's status as ``rune state`` says it, or ``gone``."""
        done = self.call("state", id)
        return str(json.loads(done.stdout)["status"]) if done.returncode == 0 else "gone"

    def events(self) -> list[dict[str, Any]]:
        """What the runelets logged."""
        path = self.log_dir / "runelet.log"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def leftovers(self) -> list[str]:
        """Everything of enclaves that is still there: files, mounts, processes, EPC pages. Empty after an end."""
        found = [str(path) for path in (self.run_dir / "enclaves").glob("*/*")]
        found += [str(path) for path in (self.state_dir / "scratch").glob("*")]
        found += [str(path) for path in (self.run_dir / "epc").glob("*") if path.name[0] != "."]
        found += [str(path) for path in self.root.glob("*")]
        found += [line for line in Path("/proc/mounts").read_text().splitlines() if f" {self.base}/" in line]
        for process in Path("/proc").glob("[0-9]*"):
            try:
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(self.base) in command:
                found.append(command)
        return found

    def settled(self, seconds: float = 10) -> list[str]:
        """:meth:`leftovers` once everything has had time to end."""
        return wait_for(lambda: not self.leftovers(), seconds, self.leftovers)


def wait_for(condition: Callable[[], bool], seconds: float, otherwise: Callable[[], Any] = list) -> Any:
    """Wait until a condition holds; returns an empty list, or what ``otherwise`` finds when time is up."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return []
        time.sleep(0.01)
    return otherwise()
