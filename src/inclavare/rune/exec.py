"""``exec`` in an enclave container, as far as its measured manifest allows."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..config import load as load_config
from ..enclave.manifest import Manifest
from ..errors import UsageError
from ..runelet.admission import admit_env, admit_exec
from ..runelet.job import MANIFEST
from .dispatch import directory_of, forward

if TYPE_CHECKING:
    from .main import Call

_ENV = ("--env", "-e")
_PROCESS = ("--process", "-p")


def run(call: Call) -> NoReturn:
    """Check the command and its environment, then become the low-level runtime."""
    config = load_config()
    directory = directory_of(call, config)
    try:
        manifest = Manifest.from_canonical((directory / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise UsageError(
            f"container {call.container} does not run", id="rune.exec.stopped", remedy="start it first"
        ) from None
    name = call.values.get("--process") or call.values.get("-p")
    # Written anew, so that the low-level runtime cannot read the line in another way than it was checked.
    rest = [word for option in call.given if option[0] not in (*_ENV, *_PROCESS) for word in option]
    rest += sorted(call.flags)
    if name is None:
        admit_exec(call.positional[1:], call.values.get("--user") or call.values.get("-u"), manifest)
        asked = [value for option, value in call.given if option in _ENV]
        admitted = set(admit_env(asked, manifest))
        rest += [word for entry in asked if entry in admitted for word in ("--env", entry)]
        forward(call, config, [*rest, *call.positional])
    process = _read(name)
    user = process.get("user") or {}
    admit_exec(process["args"], f"{user.get('uid', 0)}:{user.get('gid', 0)}", manifest)
    process["env"] = admit_env(process["env"], manifest)
    # An unlinked file has no name that could be left behind; the runtime reads it through /proc.
    fd = os.memfd_create("process", 0)
    os.write(fd, json.dumps(process).encode())
    os.lseek(fd, 0, os.SEEK_SET)
    os.set_inheritable(fd, True)
    forward(call, config, [*rest, "--process", f"/proc/self/fd/{fd}", *call.positional])


def _read(name: str) -> dict[str, Any]:
    try:
        process = json.loads(Path(name).read_bytes())
    except OSError as error:
        raise UsageError(f"{name} cannot be read: {error.strerror}", id="rune.exec.process") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name} is not JSON: {error}", id="rune.exec.process") from None
    words: list[object] = []
    if isinstance(process, dict) and isinstance(process.get("user") or {}, dict):
        process["env"] = process.get("env") or []
        words = [process["env"], process.get("args")]
    if not words or not all(isinstance(list_, list) and all(isinstance(w, str) for w in list_) for list_ in words):
        raise UsageError(
            f"{name} has no args, or they or env are not lists of strings",
            id="rune.exec.process",
            expected="a process object of the runtime-spec",
        )
    found: dict[str, Any] = process
    return found
