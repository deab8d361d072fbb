"""ENCLS leaves that change an initialised enclave (SGX2): EAUG, EMODPR, EMODT (SDM vol. 3D, 40.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ....sgx.codes import Status
from ....sgx.image import PAGE_SIZE
from ....sgx.paging import (
    PT_REG,
    PT_TCS,
    PT_TRIM,
    SECINFO_PENDING,
    SECINFO_PT,
    SECINFO_R,
    SECINFO_W,
    SECINFO_X,
    PageInfo,
)
from . import rules
from .access import EXCLUSIVE, SHARED, aligned, claim, claim_or_conflict, resolve, valid_page
from .encls_build import SECS_ONLY
from .epcm import EpcmEntry
from .faults import GeneralProtection, LeafError
from .locks import Resource

if TYPE_CHECKING:
    from .logical import LogicalProcessor


def eaug(lp: LogicalProcessor) -> None:
    """EAUG: RBX a PAGEINFO without source and SECINFO, RCX the EPC page that is added, pending."""
    rbx, rcx, cpu = lp.registers.rbx, lp.registers.rcx, lp.processor
    aligned(rbx, 32, "eaug.pageinfo")
    aligned(rcx, PAGE_SIZE, "eaug.epcpage")
    page = resolve(lp, rcx, "w", "eaug.epcpage")
    info = PageInfo.from_bytes(lp.read(rbx, PageInfo.LAYOUT.size))
    aligned(info.secs, PAGE_SIZE, "eaug.secs")
    aligned(info.linaddr, PAGE_SIZE, "eaug.linaddr")
    # A SECINFO asks for a shadow-stack page, which needs CET.
    if info.srcpge or info.secinfo:
        raise GeneralProtection("eaug.source")
    secs_page = resolve(lp, info.secs, "w", "eaug.secs")
    claim(lp, page, EXCLUSIVE, "eaug.conflict")
    if cpu.epcm[page].valid:
        raise lp.epcm_fault("eaug.occupied", rcx, "w")
    claim(lp, secs_page, SHARED, "eaug.secs-conflict")
    valid_page(lp, secs_page, info.secs, SECS_ONLY, "eaug.secs")
    secs = cpu.secs(secs_page)
    if not secs.initialised:
        raise GeneralProtection("eaug.initialised")
    if info.linaddr not in secs.elrange:
        raise GeneralProtection("eaug.range")
    cpu.write_epc(page, bytes(PAGE_SIZE))
    cpu.epcm[page] = EpcmEntry.from_flags(
        PT_REG | SECINFO_R | SECINFO_W | SECINFO_PENDING, enclave_secs=secs_page, enclave_address=info.linaddr
    )


def _operands(lp: LogicalProcessor, rule: str) -> tuple[int, int]:
    """SECINFO.FLAGS at RBX, and the number of the EPC page at RCX."""
    rbx, rcx = lp.registers.rbx, lp.registers.rcx
    aligned(rbx, 64, f"{rule}.secinfo")
    aligned(rcx, PAGE_SIZE, f"{rule}.epcpage")
    page = resolve(lp, rcx, "w", f"{rule}.epcpage")
    return rules.secinfo(lp.read(rbx, 64), f"{rule}.secinfo"), page


def _check_modifiable(entry: EpcmEntry, rule: str) -> None:
    if entry.pending or entry.modified:
        raise LeafError(Status.SGX_PAGE_NOT_MODIFIABLE, f"{rule}.state")


def _current_epoch(lp: LogicalProcessor, entry: EpcmEntry, rule: str) -> int:
    """The tracking epoch of the page's enclave, which must be initialised."""
    assert entry.enclave_secs is not None
    secs = lp.processor.secs(entry.enclave_secs)
    if not secs.initialised:
        raise GeneralProtection(f"{rule}.initialised")
    return lp.processor.enclaves[secs.eid].epoch


def emodpr(lp: LogicalProcessor) -> Status:
    """EMODPR: restrict the EPCM permissions of the page at RCX to those of the SECINFO at RBX."""
    rcx, cpu = lp.registers.rcx, lp.processor
    flags, page = _operands(lp, "emodpr")
    if flags & SECINFO_W and not flags & SECINFO_R:
        raise GeneralProtection("emodpr.secinfo")
    claim(lp, page, SHARED, "emodpr.conflict")
    entry = cpu.epcm[page]
    if not entry.valid:
        raise lp.epcm_fault("emodpr.valid", rcx, "w")
    claim_or_conflict(lp, page, EXCLUSIVE, "emodpr.modification-conflict", Resource.MODIFICATION)
    _check_modifiable(entry, "emodpr")
    if entry.pt != PT_REG:
        raise lp.epcm_fault("emodpr.pt", rcx, "w")
    entry.epoch = _current_epoch(lp, entry, "emodpr")
    entry.pr = True
    entry.r = entry.r and bool(flags & SECINFO_R)
    entry.w = entry.w and bool(flags & SECINFO_W)
    entry.x = entry.x and bool(flags & SECINFO_X)
    return Status.SGX_SUCCESS


def emodt(lp: LogicalProcessor) -> Status:
    """EMODT: change the type of the page at RCX to PT_TCS or PT_TRIM."""
    rcx, cpu = lp.registers.rcx, lp.processor
    flags, page = _operands(lp, "emodt")
    kind = flags & SECINFO_PT
    if kind not in (PT_TCS, PT_TRIM):
        raise GeneralProtection("emodt.secinfo")
    claim_or_conflict(lp, page, EXCLUSIVE, "emodt.conflict")
    entry = cpu.epcm[page]
    if not entry.valid:
        raise lp.epcm_fault("emodt.valid", rcx, "w")
    claim_or_conflict(lp, page, EXCLUSIVE, "emodt.modification-conflict", Resource.MODIFICATION)
    if entry.pt != PT_REG and not (entry.pt == PT_TCS and kind == PT_TRIM):
        raise lp.epcm_fault("emodt.pt", rcx, "w")
    _check_modifiable(entry, "emodt")
    entry.epoch = _current_epoch(lp, entry, "emodt")
    entry.pr = False
    entry.modified = True
    entry.r = entry.w = entry.x = False
    entry.pt = kind
    return Status.SGX_SUCCESS
