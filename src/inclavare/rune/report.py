"""Errors as container engines read them: one JSON or text line in ``--log``, one on standard error, exit code 1."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import NoReturn, Protocol


class LogTarget(Protocol):
    """Where a call wants its log."""

    log: str | None
    log_format: str


def write_log(call: LogTarget, level: str, message: str, **more: object) -> None:
    """Append one line to the log file that the caller named, in the format that it named; JSON takes more keys."""
    if call.log is None:
        return
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    if call.log_format == "json":
        line = json.dumps({"level": level, "msg": message, "time": stamp, **more})
    else:
        line = f'time="{stamp}" level={level} msg={json.dumps(message)}'
    try:
        fd = os.open(call.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError:
        return
    try:
        os.write(fd, line.encode() + b"\n")
    finally:
        os.close(fd)


def fail(call: LogTarget, message: str, status: int = 1, *, exit_code: int = 1) -> NoReturn:
    """Report an error to the log and to standard error, and leave.

    Args:
        exit_code: what the ``inclavare`` command ends with for this error; it goes into a JSON log.
    """
    write_log(call, "error", message, exit_code=exit_code)
    sys.stderr.write(f"rune: {message}\n")
    sys.stderr.flush()
    os._exit(status)


def one_line(error: BaseException) -> str:
    """An error's text; an :class:`~inclavare.errors.InclavareError` with found, expected, remedy and id."""
    render = getattr(error, "one_line", None)
    if render is not None:
        return str(render())
    return f"{type(error).__name__}: {error}"
