"""What rune hands to the runelet, and the files of a container's directory."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import Config
from ..shield.root import Places


@dataclass(frozen=True, slots=True)
class Job:
    """One enclave container to be made.

    Attributes:
        id: container id, checked.
        root: the low-level runtime's ``--root``.
        bundle: the bundle as the caller named it, absolute.
        config: the bundle's configuration, shape checked.
        directory: ``<run_dir>/enclaves/<quoted root>/<id>``, made by rune.
        pid_file: where the low-level runtime will write the container's pid.
        foreground: whether the caller stays until the container ends (``run`` without ``--detach``).
        node: the node's configuration.
    """

    id: str
    root: str
    bundle: Path
    config: dict[str, Any]
    directory: Path
    pid_file: Path
    foreground: bool
    node: Config

    @property
    def places(self) -> Places:
        """Mount points, and the place for ciphertext on disk."""
        scratch = self.node.state_dir / "scratch" / f"{self.directory.parent.name}-{self.id}"
        return Places(self.directory, scratch)


# Files in a container's directory.
META, MANIFEST, LOCK, CONTROL, BUNDLE = "meta.json", "manifest.json", "lock", "control.sock", "bundle"


def write_meta(directory: Path, **fields: object) -> None:
    """Merge fields into ``meta.json``, atomically."""
    merged = {**read_meta(directory), **fields}
    temporary = directory / f".{META}.{os.getpid()}"
    temporary.write_text(json.dumps(merged, default=str))
    temporary.replace(directory / META)


def read_meta(directory: Path) -> dict[str, Any]:
    """What is known of a container; empty if there is nothing yet."""
    try:
        found = json.loads((directory / META).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def lock(directory: Path) -> int:
    """Take the container's lock, held as long as a guard or runelet of it lives; returns its file descriptor.

    Raises:
        BlockingIOError: it is held.
    """
    fd = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise
    return fd


def remove_traces(job_places: Places, *, everything: bool) -> None:
    """Delete a container's files.

    Args:
        job_places: its directories; nothing is mounted there any more in this process's namespace.
        everything: also what ``state`` and ``delete`` need once the container has ended.
    """
    shutil.rmtree(job_places.cipher, ignore_errors=True)
    for place in (job_places.volumes, job_places.tree, job_places.layer, job_places.root, job_places.attestation):
        # rmdir, not rmtree: whatever may be mounted there is never descended into.
        for path in sorted(place.iterdir()) if place == job_places.volumes and place.is_dir() else []:
            _rmdir(path)
        _rmdir(place)
    _unlink(job_places.base / CONTROL)
    if everything:
        _unlink(job_places.base / BUNDLE / "config.json")
        _rmdir(job_places.base / BUNDLE)
        for path in sorted(job_places.base.glob("*")) + sorted(job_places.base.glob(".*")):
            _unlink(path)
        _rmdir(job_places.base)
        _rmdir(job_places.base.parent)


def _unlink(path: Path) -> None:
    try:
        path.unlink()
    except OSError:
        pass


def _rmdir(path: Path) -> None:
    try:
        path.rmdir()
    except OSError:
        pass
