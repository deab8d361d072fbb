"""The processor package: EPC and EPCM, keys, and what all logical processors share."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from threading import RLock
from typing import TYPE_CHECKING

from ....sgx.image import PAGE_SIZE
from ....sgx.keys import RootKeys
from ..memory import MemoryEncryption
from .epcm import EpcmEntry
from .events import Event
from .locks import Locks
from .rules import Features
from .secs import EnclaveSecs, EnclaveState

if TYPE_CHECKING:
    from .logical import Active, LogicalProcessor


class Processor:
    """One package with SGX. Its keys are drawn at its start, but for the fuses.

    Args:
        roots: fuse keys, owner epoch and CPUSVN.
        epc_pages: size of the EPC in pages of 4096 bytes.
        features: what CPUID says.

    Attributes:
        memory: the EPC's contents, encrypted.
        epcm: one entry for each page.
        locks: what is held by leaf functions in progress.
        le_pubkey_hash: IA32_SGXLEPUBKEYHASH0–3, 32 bytes: whose enclaves need no EINITTOKEN. Software may write it.
        report_key_id: CR_REPORT_KEYID, 32 bytes.
        page_key: CR_BASE_PK, the key of EWB and ELDB/ELDU, 16 bytes.
        logical: the logical processors.
        enclaves: what is kept by EID.
        mutex: held while a leaf function runs: each is atomic.
        observers: called after every leaf and asynchronous exit.
    """

    def __init__(self, roots: RootKeys, *, epc_pages: int, features: Features | None = None) -> None:
        if epc_pages < 1:
            raise ValueError(f"an EPC of {epc_pages} pages")
        self.roots = roots
        self.features = features or Features()
        self.epc_pages = epc_pages
        self.memory = MemoryEncryption(epc_pages)
        self.epcm = [EpcmEntry() for _ in range(epc_pages)]
        self.locks = Locks()
        self.le_pubkey_hash = bytes(32)
        self.report_key_id = os.urandom(32)
        self.page_key = os.urandom(16)
        self.logical: list[LogicalProcessor] = []
        self.enclaves: dict[int, EnclaveState] = {}
        self.mutex = RLock()
        self.observers: list[Callable[[Event], None]] = []
        self._next_eid = itertools.count(1)
        self._next_version = itertools.count(1)

    def new_enclave(self) -> tuple[int, EnclaveState]:
        """CR_NEXT_EID, and the state that is kept under it."""
        eid = next(self._next_eid)
        self.enclaves[eid] = EnclaveState()
        return eid, self.enclaves[eid]

    def new_version(self) -> int:
        """A version for EWB that was never used, and is not zero."""
        return next(self._next_version)

    def read_epc(self, page: int, start: int = 0, size: int = PAGE_SIZE) -> bytes:
        """``size`` bytes from ``start`` in an EPC page, without any check.

        Raises:
            IntegrityError: the memory was changed from outside.
        """
        return self.memory.read(page)[start : start + size]

    def write_epc(self, page: int, data: bytes, start: int = 0) -> None:
        """Write into an EPC page, without any check.

        Raises:
            IntegrityError: the memory was changed from outside.
        """
        if len(data) != PAGE_SIZE:
            old = self.memory.read(page)
            data = old[:start] + data + old[start + len(data) :]
        self.memory.write(page, data)

    def free_epc(self, page: int) -> None:
        """Make an EPC page unused, contents and EPCM entry."""
        self.epcm[page] = EpcmEntry()
        self.memory.discard(page)

    def secs(self, page: int) -> EnclaveSecs:
        """The SECS in an EPC page of type PT_SECS."""
        return EnclaveSecs.from_page(self.memory.read(page))

    def write_secs(self, page: int, secs: EnclaveSecs) -> None:
        """Replace the SECS in an EPC page."""
        self.memory.write(page, secs.to_page())

    def has_children(self, secs_page: int) -> bool:
        """Whether a page of the EPC belongs to the enclave of that SECS."""
        return any(entry.is_child and entry.enclave_secs == secs_page for entry in self.epcm)

    def inside(self, secs_page: int) -> list[LogicalProcessor]:
        """The logical processors that execute the enclave of that SECS."""
        return [one for one in self.logical if one.active is not None and one.active.secs_page == secs_page]

    def active(self, secs_page: int) -> list[Active]:
        """What those have saved at their entry."""
        return [one.active for one in self.inside(secs_page) if one.active is not None]

    def tracked(self, secs_page: int, epoch: int | None) -> bool:
        """Whether no logical processor can hold a translation that is older than tracking epoch ``epoch``.

        That is so once an ETRACK followed, and everybody who was inside at the ETRACK has left.
        """
        if epoch is None:
            return True
        if self.enclaves[self.secs(secs_page).eid].epoch <= epoch:
            return False
        return all(active.epoch > epoch for active in self.active(secs_page))

    def notify(self, event: Event) -> None:
        """Tell the observers."""
        for observer in self.observers:
            observer(event)
