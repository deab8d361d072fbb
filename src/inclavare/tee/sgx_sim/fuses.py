"""The simulated processor's secrets: what a real one has burnt into it. Made once, at first use."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from ...errors import PlatformError
from ...sgx.keys import RootKeys
from ...sgx.structs import Layout
from . import files

FILE = "fuses"
#: The security versions of this simulated processor's sixteen TCB components.
CPUSVN = bytes((2, 2, 2, 2, 2, 1)) + bytes(10)

_MAGIC = b"inclavare.fuses1"
_LAYOUT = Layout(
    "fuses",
    112,
    (
        ("magic", 0, "16s"),
        ("provisioning", 16, "16s"),
        ("seal", 32, "16s"),
        ("owner_epoch", 48, "16s"),
        ("cpusvn", 64, "16s"),
        ("digest", 80, "32s"),
    ),
    constants={"magic": _MAGIC},
)


def load(directory: Path) -> RootKeys:
    """The processor's root keys; drawn by the first of all processes that ask, the same for all of them.

    Raises:
        PlatformError: the file is damaged or the directory cannot be used.
    """
    path = directory / FILE
    data = files.read(path) if directory.is_dir() else None
    if data is None:
        files.private_directory(directory)
        with files.locked(directory):
            data = files.read(path)
            if data is None:
                data = _draw()
                files.write(path, data)
    return _parse(path, data)


def _draw() -> bytes:
    values = (_MAGIC, os.urandom(16), os.urandom(16), os.urandom(16), CPUSVN)
    return _LAYOUT.pack((*values, hashlib.sha256(b"".join(values)).digest()))


def _parse(path: Path, data: bytes) -> RootKeys:
    if len(data) != _LAYOUT.size or not data.startswith(_MAGIC) or hashlib.sha256(data[:80]).digest() != data[80:]:
        raise PlatformError(
            f"the simulated platform's keys in {path} are damaged",
            id="tee.fuses.damaged",
            found=f"{len(data)} bytes",
            expected=f"{_LAYOUT.size} bytes with a matching digest",
            remedy=f"restore the file, or remove {path.parent} for a new platform (what was sealed is lost)",
        )
    return RootKeys(provisioning=data[16:32], seal=data[32:48], owner_epoch=data[48:64], cpusvn=data[64:80])
