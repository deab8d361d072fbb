"""ENCLU leaves with which an enclave agrees to changes of its pages (SGX2): EACCEPT, EACCEPTCOPY, EMODPE
(SDM vol. 3D, 40.4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ....sgx.codes import Status
from ....sgx.image import PAGE_SIZE
from ....sgx.paging import (
    PT_REG,
    PT_TCS,
    PT_TRIM,
    SECINFO_MODIFIED,
    SECINFO_PENDING,
    SECINFO_PR,
    SECINFO_PT,
    SECINFO_R,
    SECINFO_RWX,
    SECINFO_W,
    SECINFO_X,
)
from . import rules
from .access import EXCLUSIVE, SHARED, aligned, check_direct_access, claim, resolve, violation, within_elrange
from .epcm import EpcmEntry
from .faults import GeneralProtection, LeafError
from .locks import Resource

if TYPE_CHECKING:
    from .logical import LogicalProcessor

_ACCEPTABLE = frozenset((PT_REG, PT_TCS, PT_TRIM))
#: What EACCEPT compares of a page and its SECINFO: everything but PR.
_COMPARED = SECINFO_RWX | SECINFO_PENDING | SECINFO_MODIFIED | SECINFO_PT


def _legal(flags: int) -> bool:
    """Whether a SECINFO describes a page that waits for EACCEPT."""
    kind, pr, pending, modified = (
        flags & SECINFO_PT,
        bool(flags & SECINFO_PR),
        bool(flags & SECINFO_PENDING),
        bool(flags & SECINFO_MODIFIED),
    )
    if kind == PT_REG:
        return (pr or pending) and not modified
    return kind in (PT_TCS, PT_TRIM) and not pr and not pending and modified


def eaccept(lp: LogicalProcessor) -> Status:
    """EACCEPT: RBX a SECINFO, RCX the page that is as the SECINFO says."""
    rbx, rcx, cpu = lp.registers.rbx, lp.registers.rcx, lp.processor
    assert lp.active is not None
    secs_page = lp.active.secs_page
    aligned(rbx, 64, "eaccept.secinfo")
    within_elrange(lp, rbx, "eaccept.secinfo")
    resolve(lp, rbx, "r", "eaccept.secinfo")
    flags = rules.secinfo(lp.read(rbx, 64), "eaccept.secinfo")
    aligned(rcx, PAGE_SIZE, "eaccept.epcpage")
    within_elrange(lp, rcx, "eaccept.epcpage")
    page = resolve(lp, rcx, "r", "eaccept.epcpage")
    if not _legal(flags):
        raise GeneralProtection("eaccept.request")
    entry = cpu.epcm[page]
    if not entry.valid or entry.blocked or entry.pt not in _ACCEPTABLE or entry.enclave_secs != secs_page:
        raise lp.epcm_fault("eaccept.page", rcx, "w")
    claim(lp, page, SHARED, "eaccept.conflict")
    claim(lp, page, EXCLUSIVE, "eaccept.modification-conflict", Resource.MODIFICATION)
    if entry.enclave_address != rcx or (entry.flags ^ flags) & _COMPARED:
        raise LeafError(Status.SGX_PAGE_ATTRIBUTES_MISMATCH, "eaccept.mismatch")
    if not cpu.tracked(secs_page, entry.epoch):
        raise LeafError(Status.SGX_NOT_TRACKED, "eaccept.tracked")
    if flags & SECINFO_PT == PT_TCS:
        tcs = rules.check_tcs(cpu.read_epc(page), mode64=lp.active.secs.mode64, rule="eaccept.tcs")
        if tcs.flags & rules.TCS_DBGOPTIN or tcs.cssa >= tcs.nssa or tcs.aep or tcs.state:
            raise GeneralProtection("eaccept.tcs")
    entry.pending = entry.modified = entry.pr = False
    return Status.SGX_SUCCESS


def eacceptcopy(lp: LogicalProcessor) -> Status:
    """EACCEPTCOPY: RBX a SECINFO, RCX a pending page, RDX the page whose contents it gets."""
    rbx, rcx, rdx = lp.registers.rbx, lp.registers.rcx, lp.registers.rdx
    cpu = lp.processor
    assert lp.active is not None
    secs_page = lp.active.secs_page
    aligned(rbx, 64, "eacceptcopy.secinfo")
    aligned(rcx, PAGE_SIZE, "eacceptcopy.target")
    aligned(rdx, PAGE_SIZE, "eacceptcopy.source")
    within_elrange(lp, rbx, "eacceptcopy.secinfo")
    within_elrange(lp, rcx, "eacceptcopy.target")
    within_elrange(lp, rdx, "eacceptcopy.source")
    resolve(lp, rbx, "r", "eacceptcopy.secinfo")
    page = resolve(lp, rcx, "w", "eacceptcopy.target")
    source = resolve(lp, rdx, "r", "eacceptcopy.source")
    flags = rules.secinfo(lp.read(rbx, 64), "eacceptcopy.secinfo")
    if flags & SECINFO_PT != PT_REG or (flags & SECINFO_W and not flags & SECINFO_R):
        raise GeneralProtection("eacceptcopy.secinfo")
    check_direct_access(lp, source, rdx, "r")
    entry = cpu.epcm[page]
    if not entry.valid or not entry.pending or entry.modified or entry.blocked or entry.pt != PT_REG:
        raise LeafError(Status.SGX_PAGE_ATTRIBUTES_MISMATCH, "eacceptcopy.page")
    if entry.enclave_secs != secs_page:
        raise LeafError(Status.SGX_PAGE_ATTRIBUTES_MISMATCH, "eacceptcopy.enclavesecs")
    claim(lp, page, EXCLUSIVE, "eacceptcopy.modification-conflict", Resource.MODIFICATION)
    if not entry.r or not entry.w or entry.x or entry.enclave_address != rcx:
        raise LeafError(Status.SGX_PAGE_ATTRIBUTES_MISMATCH, "eacceptcopy.mismatch")
    cpu.write_epc(page, cpu.read_epc(source))
    entry.r, entry.w, entry.x = bool(flags & SECINFO_R), bool(flags & SECINFO_W), bool(flags & SECINFO_X)
    entry.pending = False
    return Status.SGX_SUCCESS


def emodpe(lp: LogicalProcessor) -> None:
    """EMODPE: extend the EPCM permissions of the page at RCX by those of the SECINFO at RBX."""
    rbx, rcx, cpu = lp.registers.rbx, lp.registers.rcx, lp.processor
    assert lp.active is not None
    aligned(rbx, 64, "emodpe.secinfo")
    aligned(rcx, PAGE_SIZE, "emodpe.epcpage")
    within_elrange(lp, rbx, "emodpe.secinfo")
    within_elrange(lp, rcx, "emodpe.epcpage")
    resolve(lp, rbx, "r", "emodpe.secinfo")
    page = resolve(lp, rcx, "r", "emodpe.epcpage")
    flags = rules.secinfo(lp.read(rbx, 64), "emodpe.secinfo")
    entry: EpcmEntry = cpu.epcm[page]
    rule = violation(entry, lp.active.secs_page, rcx, "")
    if rule is not None:
        raise lp.epcm_fault(rule, rcx, "r")
    claim(lp, page, EXCLUSIVE, "emodpe.modification-conflict", Resource.MODIFICATION)
    if flags & SECINFO_W and not flags & SECINFO_R and not entry.r:
        raise GeneralProtection("emodpe.permissions")
    entry.r = entry.r or bool(flags & SECINFO_R)
    entry.w = entry.w or bool(flags & SECINFO_W)
    entry.x = entry.x or bool(flags & SECINFO_X)
