"""The simulated processor's secrets and constants: what a real one has burnt into it, and its microcode's versions.

Made once, at first use or by ``inclavare sgx platform init``.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from ...errors import PlatformError
from ...sgx.keys import RootKeys
from ...sgx.structs import Layout
from . import files

FILE = "fuses"
#: The security versions of this simulated processor's sixteen TCB components.
CPUSVN = bytes((2, 2, 2, 2, 2, 1)) + bytes(10)
#: Spells "SIM" and a model number; no processor of Intel's has it.
FMSPC = bytes.fromhex("53494d000001")

_FIRST_MAGIC = b"inclavare.fuses1"
_MAGIC = b"inclavare.fuses2"
_KEYS = (
    ("magic", 0, "16s"),
    ("provisioning", 16, "16s"),
    ("seal", 32, "16s"),
    ("owner_epoch", 48, "16s"),
    ("cpusvn", 64, "16s"),
)
#: Of platforms made before FMSPC and the size of the EPC were theirs.
_FIRST_LAYOUT = Layout("fuses", 112, (*_KEYS, ("digest", 80, "32s")), constants={"magic": _FIRST_MAGIC})
_LAYOUT = Layout(
    "fuses",
    128,
    (*_KEYS, ("fmspc", 80, "6s"), ("epc_size", 88, "Q"), ("digest", 96, "32s")),
    constants={"magic": _MAGIC},
)


@dataclass(frozen=True, slots=True)
class Fuses:
    """What the platform is.

    Attributes:
        roots: the processor's keys and CPUSVN.
        fmspc: family, model, stepping, platform, custom SKU: 6 bytes.
        epc_size: bytes that the firmware reserves for the EPC; 0 where the configuration says it.
    """

    roots: RootKeys
    fmspc: bytes = FMSPC
    epc_size: int = 0


def read(directory: Path) -> Fuses | None:
    """The platform's fuses, or ``None`` if there is no platform.

    Raises:
        PlatformError: ``tee.fuses.damaged``.
    """
    path = directory / FILE
    data = files.read(path)
    return None if data is None else _parse(path, data)


def load(directory: Path) -> RootKeys:
    """The processor's root keys; drawn by the first of all processes that ask, the same for all of them.

    Raises:
        PlatformError: the file is damaged or the directory cannot be used.
    """
    found = read(directory)
    if found is None:
        files.private_directory(directory)
        with files.locked(directory):
            found = read(directory)
            if found is None:
                found = draw()
                write(directory, found)
    return found.roots


def draw(*, cpusvn: bytes = CPUSVN, fmspc: bytes = FMSPC, epc_size: int = 0) -> Fuses:
    """A new processor."""
    roots = RootKeys(provisioning=os.urandom(16), seal=os.urandom(16), owner_epoch=os.urandom(16), cpusvn=bytes(cpusvn))
    return Fuses(roots, fmspc, epc_size)


def write(directory: Path, fuses: Fuses) -> None:
    """Replace the platform's fuses; the caller holds the directory's lock."""
    roots = fuses.roots
    values = (_MAGIC, roots.provisioning, roots.seal, roots.owner_epoch, roots.cpusvn, fuses.fmspc, fuses.epc_size)
    body = _LAYOUT.pack((*values, bytes(32)))[:-32]
    files.write(directory / FILE, body + hashlib.sha256(body).digest())


def _parse(path: Path, data: bytes) -> Fuses:
    layout = _FIRST_LAYOUT if data.startswith(_FIRST_MAGIC) else _LAYOUT
    digest = hashlib.sha256(data[:-32]).digest()
    if len(data) != layout.size or not data.startswith((_FIRST_MAGIC, _MAGIC)) or digest != data[-32:]:
        raise PlatformError(
            f"the simulated platform's keys in {path} are damaged",
            id="tee.fuses.damaged",
            found=f"{len(data)} bytes",
            expected=f"{layout.size} bytes with a matching digest",
            remedy=f"restore the file, or remove {path.parent} for a new platform (what was sealed is lost)",
        )
    roots = RootKeys(provisioning=data[16:32], seal=data[32:48], owner_epoch=data[48:64], cpusvn=data[64:80])
    if layout is _FIRST_LAYOUT:
        return Fuses(roots)
    return Fuses(roots, fmspc=data[80:86], epc_size=int.from_bytes(data[88:96], "little"))
