"""The guard with real processes, and the files of a container's directory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from inclavare.config import Config
from inclavare.runelet import guard as guard_module
from inclavare.runelet.guard import Guard
from inclavare.runelet.job import BUNDLE, CONTROL, Job, lock, read_meta, remove_traces, write_meta
from inclavare.shield import mounts

PID_NAMESPACE = {"linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}]}}


class Scene:
    """A guard between a caller, a runelet and a container, all of them real and none of them doing anything."""

    def __init__(self, base: Path, *, foreground: bool, config: dict[str, Any], runelet: str = "exec sleep 60") -> None:
        node = Config(state_dir=base / "state", run_dir=base / "run", log_dir=base / "log")
        directory = base / "run/enclaves/root/c1"
        directory.mkdir(parents=True)
        self.state = base / "root"
        (self.state / "c1").mkdir(parents=True)
        self.job = Job("c1", str(self.state), base, config, directory, base / "pid", foreground, node)
        self.job.places.make()
        self.caller = subprocess.Popen(["sleep", "60"])
        self.container = subprocess.Popen(["sleep", "60"])
        self.runelet = subprocess.Popen(["sh", "-c", runelet])
        self.told: list[int] = []
        self.called: list[str] = []
        self.guard = Guard(
            self.job, os.pidfd_open(self.caller.pid), self.runelet.pid,
            tell=self.told.append, delete=self._delete, kill_all=lambda: self.called.append("kill"),
        )  # fmt: skip
        self.thread = threading.Thread(target=self.guard.run)
        self.thread.start()

    def _delete(self) -> None:
        self.called.append("delete")
        if (self.state / "c1").exists():
            (self.state / "c1").rmdir()

    def create(self) -> None:
        """What the low-level runtime does; returns once the guard knows."""
        self.job.pid_file.write_text(str(self.container.pid))
        _until(lambda: read_meta(self.job.directory).get("pid") == self.container.pid)

    def end(self) -> None:
        """Wait for the guard."""
        self.thread.join(10)
        assert not self.thread.is_alive()

    def events(self) -> list[str]:
        path = self.job.node.log_dir / "runelet.log"
        return [json.loads(line)["event"] for line in path.read_text().splitlines()]

    def close(self) -> None:
        for process in (self.caller, self.container, self.runelet):
            process.kill()
            process.wait()
        self.thread.join(10)


def _until(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def scenes(tmp_path: Path) -> Iterator[Any]:
    made: list[Scene] = []

    def make(*, foreground: bool = False, config: dict[str, Any] = PID_NAMESPACE, **kwargs: Any) -> Scene:
        made.append(Scene(tmp_path, foreground=foreground, config=config, **kwargs))
        return made[-1]

    yield make
    for scene in made:
        scene.close()


def test_a_container_that_ends_ends_its_runelet(scenes: Any) -> None:
    scene = scenes()
    scene.create()
    assert scene.told == [scene.container.pid]
    scene.caller.kill()  # detached: the caller's end means nothing once the container exists
    scene.caller.wait()
    time.sleep(0.05)
    assert scene.runelet.poll() is None and scene.container.poll() is None
    scene.container.kill()
    scene.end()
    assert not Path(f"/proc/{scene.runelet.pid}").exists()
    assert scene.called == []
    # state and delete are still to come.
    assert read_meta(scene.job.directory)["ended"] > 0
    assert not scene.job.places.cipher.exists() and not scene.job.places.root.exists()


def test_a_container_that_was_deleted_leaves_nothing(scenes: Any) -> None:
    scene = scenes()
    scene.create()
    (scene.state / "c1").rmdir()
    scene.container.kill()
    scene.end()
    assert not scene.job.directory.exists() and not scene.job.directory.parent.exists()


def test_a_runelet_that_dies_takes_the_container_with_it(scenes: Any) -> None:
    scene = scenes()
    scene.create()
    scene.runelet.kill()
    scene.end()
    assert scene.container.wait(5) == -signal.SIGKILL
    assert scene.called == []  # its pid namespace ends with its first process
    assert "runelet.process.died" in scene.events()


@pytest.mark.parametrize("namespaces", [[], [{"type": "pid", "path": "/proc/1/ns/pid"}]])
def test_without_a_pid_namespace_of_its_own_every_process_is_killed(scenes: Any, namespaces: list[Any]) -> None:
    scene = scenes(config={"linux": {"namespaces": namespaces}})
    scene.create()
    scene.runelet.kill()
    scene.end()
    assert scene.called == ["kill"]


def test_a_creation_that_fails_is_taken_back(scenes: Any) -> None:
    scene = scenes()
    scene.job.pid_file.write_text("not a number")
    scene.caller.kill()
    scene.end()
    assert scene.called == ["delete"]
    assert not Path(f"/proc/{scene.runelet.pid}").exists()
    assert not scene.job.directory.exists() and not scene.job.places.cipher.exists()
    assert "guard.create.abandoned" in scene.events()


def test_a_runelet_that_dies_during_the_creation(scenes: Any) -> None:
    scene = scenes()
    scene.runelet.kill()
    scene.end()
    assert scene.called == ["delete"]
    assert not scene.job.directory.exists()


def test_a_caller_that_dies_right_after_the_creation_does_not_undo_it(scenes: Any) -> None:
    scene = scenes()
    scene.job.pid_file.write_text(str(scene.container.pid))
    scene.caller.kill()
    _until(lambda: scene.told)
    time.sleep(0.05)
    assert scene.container.poll() is None
    scene.container.kill()
    scene.end()
    assert scene.called == []


def test_a_foreground_run_that_is_interrupted_ends_its_container(scenes: Any) -> None:
    scene = scenes(foreground=True)
    scene.create()
    scene.caller.kill()
    scene.end()
    assert scene.container.wait(5) == -signal.SIGKILL
    assert scene.called == ["delete"]
    assert not scene.job.directory.exists()
    assert "rune.run.interrupted" in scene.events()


def test_a_foreground_run_is_waited_for_while_it_deletes(scenes: Any) -> None:
    scene = scenes(foreground=True)
    scene.create()
    scene.container.kill()
    time.sleep(0.1)
    assert scene.thread.is_alive()
    (scene.state / "c1").rmdir()
    scene.caller.kill()
    scene.end()
    assert scene.called == []
    assert not scene.job.directory.exists()


def test_a_runelet_that_hangs_is_killed(scenes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_module, "_GRACE_SECONDS", 0.3)
    scene = scenes(runelet="trap '' TERM; echo; while :; do sleep 0.05; done")
    scene.create()
    time.sleep(0.1)  # until the trap is set
    scene.container.kill()
    scene.end()
    assert not Path(f"/proc/{scene.runelet.pid}").exists()
    assert "runelet.process.stuck" in scene.events()


# --- files


@pytest.fixture
def job(tmp_path: Path) -> Job:
    directory = tmp_path / "run/enclaves/root/c1"
    directory.mkdir(parents=True)
    node = Config(state_dir=tmp_path / "state", run_dir=tmp_path / "run", log_dir=tmp_path / "log")
    return Job("c1", "/root", tmp_path, {}, directory, tmp_path / "pid", False, node)


def test_metadata_is_merged(job: Job) -> None:
    assert read_meta(job.directory) == {}
    write_meta(job.directory, a=1, path=Path("/x"))
    write_meta(job.directory, b=2)
    write_meta(job.directory, a=3)
    assert read_meta(job.directory) == {"a": 3, "path": "/x", "b": 2}
    assert os.listdir(job.directory) == ["meta.json"]


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"\xff\xff", b'"x"'])
def test_metadata_that_is_damaged(job: Job, data: bytes) -> None:
    (job.directory / "meta.json").write_bytes(data)
    assert read_meta(job.directory) == {}


def test_the_lock_is_one_owners(job: Job) -> None:
    held = lock(job.directory)
    with pytest.raises(BlockingIOError):
        lock(job.directory)
    assert not os.get_inheritable(held)
    os.close(held)
    os.close(lock(job.directory))
    with pytest.raises(FileNotFoundError):
        lock(job.directory / "nowhere")


def _fill(job: Job) -> None:
    job.places.make()
    (job.places.volumes / "0").mkdir()
    (job.places.cipher / "deep").mkdir()
    (job.places.cipher / "deep/file").touch()
    (job.directory / BUNDLE).mkdir()
    for name in (CONTROL, f"{BUNDLE}/config.json", "lock", "manifest.json", ".meta.json.7"):
        (job.directory / name).touch()
    write_meta(job.directory, tee="sgx-sim")


def test_what_state_needs_stays_until_the_end(job: Job) -> None:
    _fill(job)
    remove_traces(job.places, everything=False)
    assert read_meta(job.directory) == {"tee": "sgx-sim"}
    assert sorted(os.listdir(job.directory)) == [".meta.json.7", "bundle", "lock", "manifest.json", "meta.json"]
    assert not job.places.cipher.exists()
    remove_traces(job.places, everything=True)
    assert not job.directory.parent.exists()
    remove_traces(job.places, everything=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount")
def test_what_is_still_mounted_is_never_emptied(job: Job, tmp_path: Path) -> None:
    _fill(job)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/precious").touch()
    places = [job.places.root, job.places.volumes / "0", job.places.layer]
    for place in places:
        mounts.mount(str(tmp_path / "data"), str(place), None, mounts.MS_BIND)
    try:
        remove_traces(job.places, everything=True)
        assert (tmp_path / "data/precious").exists()
    finally:
        for place in places:
            mounts.umount(str(place))
    remove_traces(job.places, everything=True)
    assert not job.directory.exists()


def test_other_containers_of_the_same_root_stay(job: Job) -> None:
    (job.directory.parent / "c2").mkdir()
    remove_traces(job.places, everything=True)
    assert os.listdir(job.directory.parent) == ["c2"]
