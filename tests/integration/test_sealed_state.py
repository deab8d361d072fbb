"""Sealed state of an enclave container outlives kill and restart, and opens for nobody else."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from runebox import PYTHON_ENV, RuneBox, python_mounts, wait_for

pytestmark = pytest.mark.crun

#: Counts its starts in sealed state: ``state.py POLICY COUNTER``.
APPLICATION = """
import sys, time
from pathlib import Path
from inclavare.sdk import seal
policy, counter = sys.argv[1], sys.argv[2] or None
path, wait = Path("/data/state"), Path("/signal/wait")
started = 0
if path.exists():
    started = int(seal.unseal(path.read_bytes(), aad=b"starts", policy=policy, counter=counter))
print("found", started, flush=True)
seal.store(path, seal.seal(b"%d" % (started + 1), policy=policy, aad=b"starts", counter=counter))
if wait.exists():
    wait.with_name("ready").touch()
    time.sleep(100)
"""


class Machine:
    """A machine with one image, whose containers have directories of the host's at ``/data`` and ``/signal``."""

    def __init__(self, box: RuneBox) -> None:
        self.box = box
        self.volume = box.base / "volume"
        self.signal = box.base / "signal"
        for directory in (self.volume, self.signal):
            directory.mkdir()
        self.manifest("")

    def manifest(self, text: str) -> None:
        """What images without a manifest of their own start from."""
        template = self.box.base / "default.toml"
        template.write_text(text)
        self.box.configure(f'[signing]\ndefault_manifest = "{template}"')

    def bundle(self, *args: str, name: str = "bundle") -> Path:
        """A bundle that runs ``args`` of the image with Python and this tree's package."""

        def change(config: dict[str, Any]) -> None:
            config["mounts"] += python_mounts()
            config["mounts"] += [
                {"destination": destination, "type": "bind", "source": str(source), "options": ["bind", "rw"]}
                for destination, source in (("/data", self.volume), ("/signal", self.signal))
            ]

        made = self.box.bundle(*args, name=name, env=(PYTHON_ENV,), change=change)
        application = made / "rootfs/app/state.py"
        if not application.exists():
            application.parent.mkdir()
            application.write_text(APPLICATION)
        return made

    def application(self, policy: str, counter: str = "", name: str = "bundle") -> Path:
        return self.bundle("/usr/bin/python3", "-B", "-s", "/app/state.py", policy, counter, name=name)

    def run(self, bundle: Path) -> CompletedProcess[str]:
        return self.box.run(bundle)

    def power_off(self) -> None:
        """Kill everything of the node at once, and lose what a reboot loses: processes, mounts, /run."""
        # Its mounts are in namespaces of its own: that is how its processes are told from all others.
        assert str(self.box.base) not in Path("/proc/self/mountinfo").read_text()
        for _ in range(20):
            for pid in self._pids():
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            if wait_for(lambda: not self._pids(), 0.5) == []:
                break
        assert self._pids() == []
        shutil.rmtree(self.box.run_dir)
        shutil.rmtree(self.box.root, ignore_errors=True)
        # Of no use to anybody: its key died with the runelet.
        shutil.rmtree(self.box.state_dir / "scratch", ignore_errors=True)

    def _pids(self) -> list[int]:
        """Processes of this node, by command line or mounts."""
        base = os.fsencode(self.box.base)
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                texts = [(process / name).read_bytes() for name in ("cmdline", "mountinfo")]
            except OSError:
                continue
            if int(process.name) != os.getpid() and any(base in text for text in texts):
                found.append(int(process.name))
        return found


@pytest.fixture
def machine(box: RuneBox) -> Machine:
    return Machine(box)


@pytest.mark.parametrize("manifest", ["", '[[files.encrypted]]\npath = "/data"\nkey = "sealed:mrenclave"\n'],
                         ids=["plain directory", "encrypted volume"])  # fmt: skip
@pytest.mark.parametrize("counter", ["", "starts"], ids=["", "counter"])
def test_state_survives_kill_and_restart(machine: Machine, manifest: str, counter: str) -> None:
    machine.manifest(manifest)
    bundle = machine.application("mrenclave", counter)
    first = machine.run(bundle)
    assert first.stdout == "found 0\n", first.stderr
    wait, ready = machine.signal / "wait", machine.signal / "ready"
    wait.touch()
    machine.box.create(bundle)
    assert wait_for(ready.exists, 20) == []
    kept = {path.name: path.read_bytes() for path in machine.volume.iterdir() if path.is_file()}
    assert any(b"INCLSEAL" in data for data in kept.values()) == (not manifest)
    machine.power_off()
    wait.unlink()
    assert kept == {path.name: path.read_bytes() for path in machine.volume.iterdir() if path.is_file()}
    again = machine.run(bundle)
    assert again.stdout == "found 2\n", again.stderr
    assert again.returncode == 0


def test_killed_while_it_seals_again_and_again(machine: Machine) -> None:
    """Killed at some moment of a store: the state is that of before or of after, and always opens."""
    script = """
import sys
from pathlib import Path
from inclavare.sdk import seal
path = Path("/data/state")
found = int(seal.unseal(path.read_bytes(), counter="c")) if path.exists() else 0
print("found", found, flush=True)
while Path("/data/go").exists():
    found += 1
    seal.store(path, seal.seal(b"%d" % found, counter="c"))
    Path("/data/new").write_text(str(found))
    Path("/data/new").rename("/data/last")
"""
    bundle = machine.bundle("/usr/bin/python3", "-B", "-s", "-c", script)
    go, last = machine.volume / "go", machine.volume / "last"
    for moment in range(4):
        go.touch()
        last.unlink(missing_ok=True)
        machine.box.create(bundle)
        assert wait_for(last.exists, 20) == []
        time.sleep(0.013 * moment)
        machine.power_off()
        go.unlink()
        stored = int(last.read_text())
        again = machine.run(bundle)
        assert again.stdout in (f"found {stored}\n", f"found {stored + 1}\n"), again.stderr


def test_another_image_does_not_open_it(machine: Machine) -> None:
    assert machine.run(machine.application("mrenclave")).stdout == "found 0\n"
    other = machine.application("mrenclave", name="other")
    (other / "rootfs/etc/greeting").write_text("another image\n")
    refused = machine.run(other)
    assert refused.returncode == 1 and "sealed data cannot be opened" in refused.stderr
    assert "found" not in refused.stdout
    assert machine.run(machine.application("mrenclave")).stdout == "found 1\n"


def test_versions_of_a_signers_images(machine: Machine) -> None:
    def run(isv_svn: int, product: int = 1) -> CompletedProcess[str]:
        machine.manifest(f"[enclave]\nisv_svn = {isv_svn}\nisv_prod_id = {product}\n")
        return machine.run(machine.application("mrsigner"))

    assert run(3).stdout == "found 0\n"
    assert run(3).stdout == "found 1\n"
    older = run(2)
    assert older.returncode == 1 and "sealed by a newer enclave" in older.stderr and "found" not in older.stdout
    newer = run(4)
    assert newer.stdout == "found 2\n", newer.stderr
    assert "sealed by a newer enclave" in run(3).stderr  # it is sealed by version 4 now
    assert "sealed data cannot be opened" in run(4, product=2).stderr
    assert run(5).stdout == "found 3\n"


def test_another_signer(machine: Machine) -> None:
    assert machine.run(machine.application("mrsigner")).stdout == "found 0\n"
    key = machine.box.state_dir / "signing-key.pem"
    assert key.exists()
    key.rename(key.with_name("old.pem"))
    refused = machine.run(machine.application("mrsigner", name="again"))
    assert refused.returncode == 1 and "sealed data cannot be opened" in refused.stderr, refused.stdout


def test_a_file_that_was_rolled_back(machine: Machine) -> None:
    state = machine.volume / "state"
    bundle = machine.application("mrenclave", "starts")
    assert machine.run(bundle).stdout == "found 0\n"
    old = state.read_bytes()
    assert machine.run(bundle).stdout == "found 1\n"
    new = state.read_bytes()
    machine.power_off()
    state.write_bytes(old)
    refused = machine.run(bundle)
    assert refused.returncode == 1 and "somebody rolled them back" in refused.stderr
    assert "found" not in refused.stdout and state.read_bytes() == old
    state.write_bytes(new)
    assert machine.run(bundle).stdout == "found 2\n"


def test_every_change_of_the_file_is_refused(machine: Machine) -> None:
    state = machine.volume / "state"
    bundle = machine.application("mrenclave")
    assert machine.run(bundle).stdout == "found 0\n"
    good = state.read_bytes()
    for at in (0, 9, 20, 30, 128, 200, 400, 640, len(good) - 1):
        state.write_bytes(good[:at] + bytes((good[at] ^ 1,)) + good[at + 1 :])
        refused = machine.run(bundle)
        assert refused.returncode == 1 and "found" not in refused.stdout, at
    state.write_bytes(good)
    assert machine.run(bundle).stdout == "found 1\n"


def test_commands_in_a_container(machine: Machine) -> None:
    inclavare = "/usr/bin/python3 -B -s -c 'from inclavare.cli import main; main()'"
    script = f"""set -e
echo -n secret state | {inclavare} seal --counter c --aad v1 -o /data/sealed
{inclavare} unseal /data/sealed --aad v1 --counter c
echo
{inclavare} unseal --info /data/sealed
{inclavare} unseal /data/sealed --aad v2 || echo refused $?"""
    bundle = machine.bundle("/bin/sh", "-c", script)
    done = machine.run(bundle)
    lines = done.stdout.splitlines()
    assert lines[0] == "secret state", done.stderr
    assert any("policy" in line and "mrenclave" in line for line in lines)
    assert lines[-1] == "refused 7" and "sealing.open.tag" in done.stderr
    assert (machine.volume / "sealed").stat().st_mode & 0o777 == 0o600
    assert b"secret" not in (machine.volume / "sealed").read_bytes()


def test_only_the_application_user_gets_keys(machine: Machine) -> None:
    bundle = machine.bundle(
        "/bin/sh", "-c", "ls -ln /dev/attestation/egetkey /dev/attestation/counter; echo x > /dev/attestation/egetkey"
    )
    done = machine.run(bundle)
    assert done.stdout.count("-rw-------    1 0        0") == 2, done.stdout
    assert "Invalid argument" in done.stderr
