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
    if name is None:
        admit_exec(call.positional[1:], manifest)
        forward(call, config)
    process = _read(name)
    admit_exec(process["args"], manifest)
    process["env"] = admit_env(process.get("env") or [], manifest)
    # An unlinked file has no name that could be left behind; the runtime reads it through /proc.
    fd = os.memfd_create("process", 0)
    os.write(fd, json.dumps(process).encode())
    os.lseek(fd, 0, os.SEEK_SET)
    os.set_inheritable(fd, True)
    rest = []
    for word in call.rest:
        rest.append(f"/proc/self/fd/{fd}" if word == name else word.replace(f"={name}", f"=/proc/self/fd/{fd}"))
    forward(call, config, rest)


def _read(name: str) -> dict[str, Any]:
    try:
        process = json.loads(Path(name).read_bytes())
    except OSError as error:
        raise UsageError(f"{name} cannot be read: {error.strerror}", id="rune.exec.process") from None
    except ValueError as error:
        raise UsageError(f"{name} is not JSON: {error}", id="rune.exec.process") from None
    if not isinstance(process, dict) or not isinstance(process.get("args"), list):
        raise UsageError(f"{name} has no args", id="rune.exec.process", expected="a process object of the runtime-spec")
    return process
