"""JSON-line logs with structured ids; secrets never enter them, because only named fields do."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path


class EventLog:
    """Append-only JSON lines, one ``write`` each, so that several processes may share a file.

    Args:
        path: the file, created with mode 0600; its directory is made if needed.
        context: fields that stand in every line (container id, TEE platform…).
    """

    def __init__(self, path: Path | None, **context: object) -> None:
        self._context = context
        self._fd = -1
        if path is not None:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def event(self, id: str, *, level: str = "info", **fields: object) -> None:
        """Write one event; a log that cannot be written (full disk) never stops an enclave."""
        if self._fd < 0:
            return
        record = {"time": _now(), "level": level, "event": id, **self._context, **fields}
        try:
            os.write(self._fd, json.dumps(record, default=str).encode() + b"\n")
        except OSError:
            pass

    def close(self) -> None:
        """Close the file; further events are dropped."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _now() -> str:
    seconds = time.time()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1000):03d}Z"
