"""The simulated platform's state on disk: a private directory, a lock, and files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from ...errors import PlatformError, ResourceError


def private_directory(path: Path) -> None:
    """Make the directory with mode 0700, or check that the one that is there is ours and private.

    Raises:
        PlatformError: it belongs to someone else, others may enter it, or it cannot be made.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.stat()
    except OSError as error:
        raise PlatformError(
            f"cannot make {path}",
            id="tee.state.directory",
            found=error.strerror,
            remedy="run as root, or set state_dir and run_dir in the configuration to directories that you may write",
        ) from None
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise PlatformError(
            f"{path} is not private",
            id="tee.state.permissions",
            found=f"owner {found.st_uid}, mode {found.st_mode & 0o777:04o}",
            expected=f"owner {os.geteuid()}, mode 0700",
            remedy=f"chown {os.geteuid()} {path} && chmod 700 {path}",
        )


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the directory's lock; it falls with the process, whatever ends that."""
    handle = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def read(path: Path) -> bytes | None:
    """The file's bytes, or ``None`` if there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def write(path: Path, data: bytes) -> None:
    """Replace the file atomically and durably, mode 0600. The caller holds the directory's lock.

    Raises:
        ResourceError: ``tee.state.write``: the disk is full, or the file cannot be written for another reason.
    """
    fresh = path.with_name(f".{path.name}.new")
    try:
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        fresh.rename(path)
        sync(path.parent)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise unwritable(path, error) from None


def sync(directory: Path) -> None:
    """Make durable which names the directory holds."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def unwritable(path: Path, error: OSError) -> ResourceError:
    """The refusal for a file that cannot be written."""
    return ResourceError(
        f"cannot write {path}",
        id="tee.state.write",
        found=error.strerror,
        remedy=f"make room on the file system of {path.parent}, or make it writable",
    )
