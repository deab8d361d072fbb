"""``create`` and ``run`` of an enclave container: a runelet first, then the low-level runtime inside its namespace."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..config import Config
from ..config import load as load_config
from ..errors import ResourceError, UsageError
from ..runelet.admission import check_shape
from ..runelet.job import LOCK, Job, lock, remove_traces, write_meta
from ..runelet.spawn import spawn
from . import kernel
from .dispatch import check_id, directory_of, forward, low_level_status
from .main import config_file

if TYPE_CHECKING:
    from .main import Call

#: How long an id may still be in use by a container that is being taken back, in seconds.
_ID_WAIT = 10.0


def run(call: Call) -> NoReturn:
    """Create the enclave and become the low-level runtime that creates the container."""
    config = load_config()
    container = check_id(call)
    bundle = Path(call.values.get("--bundle") or call.values.get("-b") or ".").absolute()
    name = config_file(call, str(bundle))
    document = check_shape(_read(Path(name)))
    directory = directory_of(call, config)
    pid_file = Path(call.values.get("--pid-file") or directory / "pid").absolute()
    job = Job(
        id=container,
        root=call.root,
        bundle=bundle,
        config=document,
        directory=directory,
        pid_file=pid_file,
        foreground=call.command == "run" and not call.flags & {"-d", "--detach"},
        node=config,
    )
    try:
        ready, namespace = spawn(
            job,
            claim=lambda: _claim(call, job),
            delete=lambda: _quietly(call, config, "delete", "--force", container),
            kill_all=lambda: _quietly(call, config, "kill", "--all", container, "KILL"),
        )
    except OSError as error:
        raise _cannot_start(error) from None
    _become_low_level(call, config, ready, namespace, pid_file)


def _cannot_start(error: OSError) -> ResourceError:
    return ResourceError(
        f"the enclave container could not be started: {error.strerror}",
        id="rune.create.failed",
        found=error.filename,
        remedy="make room on that disk, or set run_dir in /etc/inclavare/config.toml",
    )


def _read(path: Path) -> Any:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror}",
            id="bundle.config.missing",
            remedy="give the bundle's directory with --bundle; rune spec writes an example",
        ) from None
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{path} is not JSON: {error}", id="bundle.config.syntax", remedy="correct it; rune spec writes an example"
        ) from None


def _claim(call: Call, job: Job) -> None:
    """Make the container's directory; whoever makes it owns the id."""
    _make_directory(call, job)
    try:
        job.pid_file.unlink(missing_ok=True)  # a stale one would name a process of somebody else
        write_meta(job.directory, id=job.id, root=job.root, bundle=str(job.bundle), created=time.time())
    except OSError as error:
        remove_traces(job.places, everything=True)
        raise _cannot_start(error) from None


def _make_directory(call: Call, job: Job) -> None:
    container, directory = job.id, job.directory
    deadline = time.monotonic() + _ID_WAIT
    while True:
        if os.path.lexists(f"{call.root}/{container}"):
            raise _exists(container)
        try:
            directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory.mkdir(mode=0o700)
            return
        except FileExistsError:
            pass
        except FileNotFoundError:
            continue  # the parent was removed with its last container
        except OSError as error:
            raise ResourceError(
                f"cannot make {directory}: {error.strerror}",
                id="rune.create.directory",
                remedy="make room on that disk, or set run_dir in /etc/inclavare/config.toml",
            ) from None
        if _is_abandoned(directory):
            _take_back(call, job.node, container, directory)
        elif time.monotonic() > deadline:
            raise _exists(container)
        else:
            time.sleep(0.02)


def _exists(container: str) -> UsageError:
    return UsageError(
        f"a container with the id {container} exists",
        id="rune.id.exists",
        remedy=f"delete it first (rune delete {container}), or choose another id",
    )


def _is_abandoned(directory: Path) -> bool:
    """Whether nobody works on it: no guard, no runelet, and no rune that has just made it."""
    try:
        fresh = time.time() - directory.stat().st_mtime < 2 and not (directory / LOCK).exists()
        if fresh:
            return False
        os.close(lock(directory))
        return True
    except (BlockingIOError, FileNotFoundError):
        return False


def _take_back(call: Call, config: Config, container: str, directory: Path) -> None:
    """Remove what a start left that was killed together with its guard."""
    job = Job(container, call.root, Path("/"), {}, directory, Path("/"), False, config)
    remove_traces(job.places, everything=True)


def _quietly(call: Call, config: Config, *words: str) -> None:
    if os.path.lexists(f"{call.root}/{call.container}"):
        low_level_status(call, config, list(words), quiet=True)


def _become_low_level(call: Call, config: Config, ready: dict[str, Any], namespace: int, pid_file: Path) -> NoReturn:
    rest = ["--bundle", ready["bundle"], "--pid-file", str(pid_file)]
    for name, value in call.values.items():
        if name in ("--console-socket",):
            rest += [name, str(Path(value).absolute())]
        elif name not in ("--bundle", "-b", "--pid-file", "--config", "-f"):
            rest += [name, value]
    kernel.setns(namespace, kernel.CLONE_NEWNS)
    os.close(namespace)
    os.chdir(ready["bundle"])
    forward(call, config, [*rest, *sorted(call.flags), *call.positional])
