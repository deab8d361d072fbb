"""``delete`` of an enclave container: the low-level runtime's part, then whatever of the enclave is still there."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import load as load_config
from ..runelet.job import Job, lock, read_meta, remove_traces
from ..tee.base import reclaim
from .dispatch import check_id, directory_of, low_level_status

if TYPE_CHECKING:
    from .main import Call

#: How long guard and runelet may take once the container is gone, before they are killed.
_PATIENCE_SECONDS = 10.0


def run(call: Call) -> None:
    """Delete; an enclave that outlived its container is ended."""
    config = load_config()
    code = low_level_status(call, config, [call.command, *call.rest])
    directory = directory_of(call, config)
    if code != 0 and os.path.lexists(f"{call.root}/{call.container}"):
        os._exit(code)  # it still exists (running, and no --force): the enclave goes on as well
    _await_end(directory)
    job = Job(check_id(call), call.root, Path("/"), {}, directory, Path("/"), False, config)
    remove_traces(job.places, everything=True)
    reclaim(config)  # where guard and runelet were killed together, nobody else has
    os._exit(code)


def _await_end(directory: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    killed = False
    while directory.is_dir():
        try:
            os.close(lock(directory))
            return
        except FileNotFoundError:
            return
        except BlockingIOError:
            pass
        if time.monotonic() > deadline:
            if killed:
                return
            killed = True
            deadline += _PATIENCE_SECONDS
            pid = read_meta(directory).get("runelet")
            if isinstance(pid, int):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
        time.sleep(0.005)
