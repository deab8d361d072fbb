"""ENCLS leaves that look into the EPC from outside: EDBGRD, EDBGWR, ERDINFO (SDM vol. 3D, 40.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ....sgx.codes import Status
from ....sgx.image import PAGE_SIZE
from ....sgx.paging import PT_REG, PT_SECS, PT_TCS, PT_VA, RDINFO_BLOCKED, RDINFO_CHILDPRESENT, RdInfo
from ....sgx.structs import Tcs
from .access import SHARED, aligned, canonical, claim, claim_or_conflict, resolve, valid_page
from .epcm import EpcmEntry
from .faults import GeneralProtection, LeafError

if TYPE_CHECKING:
    from .logical import LogicalProcessor

_READABLE = frozenset((PT_REG, PT_TCS, PT_VA))
_WRITABLE = frozenset((PT_REG, PT_TCS))
#: SGX_TCS_LIMIT: the architectural fields of a TCS end here (without CET).
TCS_LIMIT = 72
_TCS_FLAGS = Tcs.LAYOUT.offsets["flags"]
_WORD = 8
_ONES = (1 << 64) - 1


def _target(lp: LogicalProcessor, access: str, types: frozenset[int], rule: str) -> tuple[int, EpcmEntry]:
    """The page that RCX points into, which must not be in the midst of a change."""
    rcx = lp.registers.rcx
    aligned(rcx, _WORD, f"{rule}.alignment")
    page = resolve(lp, rcx, "w" if access == "w" else "r", f"{rule}.epcpage")
    claim(lp, page, SHARED, f"{rule}.conflict")
    entry = valid_page(lp, page, rcx, types, f"{rule}.page")
    if entry.pending or entry.modified:
        raise LeafError(Status.SGX_PAGE_NOT_DEBUGGABLE, f"{rule}.state")
    return page, entry


def _check_debug(lp: LogicalProcessor, entry: EpcmEntry, rule: str) -> None:
    """The page's enclave is a debug enclave."""
    assert entry.enclave_secs is not None
    if not lp.processor.secs(entry.enclave_secs).attributes.debug:
        raise GeneralProtection(f"{rule}.debug")


def edbgrd(lp: LogicalProcessor) -> Status:
    """EDBGRD: RBX ← 8 bytes at RCX, in a debug enclave; of a VA page, whether the slot is in use."""
    page, entry = _target(lp, "r", _READABLE, "edbgrd")
    start = lp.registers.rcx % PAGE_SIZE
    if entry.pt == PT_TCS and start >= TCS_LIMIT:
        raise GeneralProtection("edbgrd.tcs")
    if entry.pt == PT_VA:
        # Versions themselves stay inside.
        lp.registers.rbx = _ONES if any(lp.processor.read_epc(page, start, _WORD)) else 0
        return Status.SGX_SUCCESS
    _check_debug(lp, entry, "edbgrd")
    lp.registers.rbx = int.from_bytes(lp.processor.read_epc(page, start, _WORD), "little")
    return Status.SGX_SUCCESS


def edbgwr(lp: LogicalProcessor) -> Status:
    """EDBGWR: 8 bytes at RCX ← RBX, in a debug enclave; of a TCS page, FLAGS only."""
    page, entry = _target(lp, "w", _WRITABLE, "edbgwr")
    start = lp.registers.rcx % PAGE_SIZE
    if entry.pt == PT_TCS and start != _TCS_FLAGS:
        raise GeneralProtection("edbgwr.tcs")
    _check_debug(lp, entry, "edbgwr")
    lp.processor.write_epc(page, lp.registers.rbx.to_bytes(_WORD, "little"), start)
    return Status.SGX_SUCCESS


def erdinfo(lp: LogicalProcessor) -> Status:
    """ERDINFO: RDINFO at RBX ← type and state of the EPC page at RCX."""
    rbx, rcx, cpu = lp.registers.rbx, lp.registers.rcx, lp.processor
    aligned(rbx, 32, "erdinfo.rdinfo")
    aligned(rcx, PAGE_SIZE, "erdinfo.epcpage")
    canonical(rcx, "erdinfo.epcpage")
    page = lp.walk(rcx, "r").epc_page
    if page is None:
        raise LeafError(Status.SGX_PG_NONEPC, "erdinfo.nonepc", carry=True)
    claim_or_conflict(lp, page, SHARED, "erdinfo.conflict")
    entry = cpu.epcm[page]
    if not entry.valid:
        raise LeafError(Status.SGX_PG_INVLD, "erdinfo.valid", carry=True)
    status = context = 0
    secs_page = page if entry.pt == PT_SECS else entry.enclave_secs
    if secs_page is not None:
        context = cpu.secs(secs_page).internal.enclave_context
    if cpu.has_children(page):
        status = RDINFO_CHILDPRESENT
    lp.write(rbx, RdInfo(status, entry.flags | entry.blocked * RDINFO_BLOCKED, context).to_bytes())
    return Status.SGX_SUCCESS
