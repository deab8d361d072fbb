"""The host-wide ledger of simulated enclave memory: one file per enclave, whose lock its owner holds while it lives.

The kernel drops the lock when the owner ends, whatever ends it, so a file that can be locked belongs to nobody and its
pages are free. There is nothing to clean up and no daemon to ask.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from ...config import DEFAULT_PATH, Config
from ...errors import PlatformError, ResourceError
from ...sgx.image import PAGE_SIZE
from . import files, fuses

#: Where the firmware would have reserved it in the physical address space: 256 GB.
BASE = 1 << 38
_MAX_RECORD = 4096


class Reservation:
    """EPC pages that this process holds until :meth:`release`."""

    def __init__(self, path: Path, handle: int, pages: int) -> None:
        self._path = path
        self._handle = handle
        self.pages = pages

    def release(self) -> None:
        """Give the pages back. Idempotent."""
        if self._handle < 0:
            return
        self._path.unlink(missing_ok=True)
        os.close(self._handle)
        self._handle = -1


def directory(config: Config) -> Path:
    """Where the ledger lies; lost at reboot, as EPC contents are."""
    return config.run_dir / "epc"


def size(config: Config) -> int:
    """Bytes of EPC: those that the platform was initialised with, else the configuration's.

    Raises:
        PlatformError: ``tee.fuses.damaged``.
    """
    platform = fuses.read(config.platform_dir)
    return platform.epc_size if platform is not None and platform.epc_size else config.epc_size


@contextlib.contextmanager
def vacant(config: Config) -> Iterator[None]:
    """No enclave is there, and none comes, inside of this context.

    Raises:
        PlatformError: ``tee.epc.busy``, naming who holds pages.
    """
    ledger = directory(config)
    files.private_directory(ledger)
    with files.locked(ledger):
        held = _collect(ledger)
        if held:
            raise PlatformError(
                "enclaves are running on this platform",
                id="tee.epc.busy",
                found=_holders(held),
                expected="no enclaves",
                remedy="stop them first",
            )
        yield


def reserve(config: Config, pages: int, label: str) -> Reservation:
    """Take ``pages`` 4096-byte pages for the enclave ``label``.

    Raises:
        ResourceError: ``tee.epc.full``, naming what is used and by whom; ``tee.state.write``, a full disk.
    """
    ledger = directory(config)
    files.private_directory(ledger)
    with files.locked(ledger):
        held = _collect(ledger)
        used = sum(entry[1] for entry in held)
        total = size(config) // PAGE_SIZE
        if used + pages > total:
            raise _full(config, held, used=used, total=total, needed=pages)
        path = ledger / f"{os.getpid()}-{os.urandom(8).hex()}"
        try:
            return Reservation(path, _record(path, f"{pages} {os.getpid()}\n{label}"), pages)
        except OSError as error:
            raise files.unwritable(path, error) from None


def usage(config: Config) -> list[tuple[str, int, int]]:
    """Who holds how many pages: ``(label, pages, pid)``, the largest first."""
    ledger = directory(config)
    if not ledger.is_dir():
        return []
    with files.locked(ledger):
        return sorted(_collect(ledger), key=lambda entry: -entry[1])


def _record(path: Path, text: str) -> int:
    """Make an entry; the file descriptor holds its lock."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(handle, text.encode()[:_MAX_RECORD])
    except BaseException:
        path.unlink(missing_ok=True)
        os.close(handle)
        raise
    return handle


def _collect(ledger: Path) -> list[tuple[str, int, int]]:
    """The living entries; files of dead owners are removed. The caller holds the ledger's lock."""
    living: list[tuple[str, int, int]] = []
    for name in os.listdir(ledger):
        if name.startswith("."):
            continue
        path = ledger / name
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            numbers, _, label = os.read(handle, _MAX_RECORD).decode(errors="replace").partition("\n")
            pages, _, pid = numbers.partition(" ")
            living.append((label, int(pages), int(pid)))
        else:
            path.unlink(missing_ok=True)
        finally:
            os.close(handle)
    return living


def _full(config: Config, held: list[tuple[str, int, int]], *, used: int, total: int, needed: int) -> ResourceError:
    larger = f"raise [sgx_sim] epc_size in {config.source if config.source != 'defaults' else DEFAULT_PATH}"
    if total != config.epc_size // PAGE_SIZE:
        larger = "make a new platform with a larger one (inclavare sgx platform reset, init --epc-size)"
    return ResourceError(
        "the enclave page cache (EPC) is full",
        id="tee.epc.full",
        found=f"{used} of {total} pages used, largest holders: {_holders(held)}",
        expected=f"{needed} free pages",
        remedy=f"stop an enclave, lower [enclave] size in the manifest, or {larger}",
    )


def _holders(held: list[tuple[str, int, int]]) -> str:
    largest = sorted(held, key=lambda entry: -entry[1])[:3]
    return ", ".join(f"{label} ({pages} pages, pid {pid})" for label, pages, pid in largest) or "nobody"
