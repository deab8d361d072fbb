"""Running skopeo, umoci and cp, and the temporary directories that they fill."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import PlatformError, UsageError
from .paths import full_disk

_WORK_PREFIX = "inclavare-image-"
_SETTLED_SECONDS = 60
_PACKAGES = {"skopeo": "skopeo", "umoci": "umoci", "cp": "coreutils"}


def require_programs(*names: str) -> None:
    """Refuse early if a program is missing.

    Raises:
        PlatformError: with the Debian package to install.
    """
    missing = [name for name in names if shutil.which(name) is None]
    if missing:
        raise PlatformError(
            f"{' and '.join(missing)} not found",
            id="enclave.oci.program",
            expected="on the PATH",
            remedy=f"apt-get install {' '.join(_PACKAGES.get(name, name) for name in missing)}",
        )


def run(what: str, *argv: str | Path) -> str:
    """Run a program; its standard output.

    Raises:
        ResourceError: it found the disk full.
        UsageError: it failed.
    """
    try:
        done = subprocess.run(
            [os.fspath(arg) for arg in argv], stdin=subprocess.DEVNULL, capture_output=True, check=False
        )
    except FileNotFoundError:
        require_programs(os.fspath(argv[0]))
        raise
    if done.returncode:
        text = done.stderr.decode(errors="replace").strip()
        if "no space left on device" in text.lower() or "disk quota exceeded" in text.lower():
            raise full_disk(what, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        raise UsageError(
            f"{what} failed",
            id=f"enclave.oci.{Path(argv[0]).name}",
            found=_reason(text) or f"exit code {done.returncode}",
        )
    return done.stdout.decode(errors="replace")


def _reason(text: str) -> str:
    """The last line of a Go program's log, without its timestamp."""
    line = text.splitlines()[-1] if text else ""
    _, marker, message = line.partition('msg="')
    return message.rstrip('"').replace('\\"', '"') if marker else line.removeprefix("FATA").strip(" []0")


def skopeo_copy(what: str, *arguments: str) -> None:
    policies = (Path("/etc/containers/policy.json"), Path.home() / ".config/containers/policy.json")
    # Without any policy file skopeo refuses everything; with one it is obeyed.
    daemon = os.environ.get("DOCKER_HOST", "")
    ends = [f"--{end}-daemon-host={daemon}" for end, name in zip(("src", "dest"), arguments[-2:], strict=True)
            if daemon and name.startswith("docker-daemon:")]  # fmt: skip
    policy = [] if any(path.exists() for path in policies) else ["--insecure-policy"]
    run(what, "skopeo", *policy, "copy", "--quiet", *ends, *arguments)


@contextmanager
def work_directory() -> Iterator[Path]:
    """A private directory for unpacked images, in ``$TMPDIR`` or ``/var/tmp``; removed in the end.

    Its lock is held as long as its owner lives: what a killed owner left is removed by the next.

    Raises:
        ResourceError: there is no room for one.
    """
    base = os.environ.get("TMPDIR") or "/var/tmp"
    try:
        _remove_abandoned(Path(base))
        path = Path(tempfile.mkdtemp(prefix=_WORK_PREFIX, dir=base))
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise full_disk(base, error) from None
        raise UsageError(
            f"no temporary directory can be made in {base}", id="enclave.oci.tmpdir", found=error.strerror
        ) from None
    try:
        yield path
    finally:
        remove_tree(path)
        os.close(lock)


def _remove_abandoned(base: Path) -> None:
    for path in base.glob(f"{_WORK_PREFIX}*"):
        try:
            found = path.lstat()
            # A directory that was made just now may not be locked yet.
            if found.st_uid != os.geteuid() or time.time() - found.st_mtime < _SETTLED_SECONDS:
                continue
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_tree(path)
        except OSError:
            pass  # its owner lives
        finally:
            os.close(handle)


def remove_tree(path: Path) -> None:
    """Remove a directory with whatever modes an image gave its contents; never follows links."""

    def unlock(function: Callable[..., Any], name: str, _: object) -> None:
        try:
            Path(name).parent.chmod(0o700)
            function(name)
        except OSError:
            pass

    shutil.rmtree(path, onerror=unlock)
