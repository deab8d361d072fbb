"""ENCLS leaves that move pages out of the EPC and back: EPA, EBLOCK, ETRACK, EWB, ELDB, ELDU (SDM vol. 3D, 40.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ....sgx.codes import Status
from ....sgx.image import PAGE_SIZE
from ....sgx.paging import PT_SECS, PT_VA, PageInfo, Pcmd
from ....sgx.structs import Layout
from .access import EXCLUSIVE, SHARED, aligned, claim, claim_or_conflict, resolve, valid_page
from .encls_build import SECS_ONLY
from .epcm import CHILD_TYPES, EpcmEntry
from .faults import GeneralProtection, LeafError
from .locks import Resource

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    from .logical import LogicalProcessor

_VA_ONLY = frozenset((PT_VA,))
_SLOT = 8
#: RBX of EPA: the page type by its number.
_EPA_TYPE = PT_VA >> 8


class MacHeader:
    """MACHEADER (SDM vol. 3D, 38.14), 128 bytes: what EWB authenticates beside the page."""

    LAYOUT: ClassVar[Layout] = Layout(
        "macheader", 128, (("eid", 0, "Q"), ("linaddr", 8, "Q"), ("secinfo", 16, "64s"), ("reserved", 80, "40s"))
    )


def epa(lp: LogicalProcessor) -> None:
    """EPA: RBX PT_VA, RCX the EPC page that becomes a version array."""
    rcx, cpu = lp.registers.rcx, lp.processor
    if lp.registers.rbx != _EPA_TYPE:
        raise GeneralProtection("epa.type")
    aligned(rcx, PAGE_SIZE, "epa.epcpage")
    page = resolve(lp, rcx, "w", "epa.epcpage")
    claim(lp, page, EXCLUSIVE, "epa.conflict")
    if cpu.epcm[page].valid:
        raise lp.epcm_fault("epa.occupied", rcx, "w")
    cpu.write_epc(page, bytes(PAGE_SIZE))
    cpu.epcm[page] = EpcmEntry(valid=True, pt=PT_VA)


def eblock(lp: LogicalProcessor) -> Status:
    """EBLOCK: no new translation to the EPC page at RCX can be made."""
    rcx, cpu = lp.registers.rcx, lp.processor
    aligned(rcx, PAGE_SIZE, "eblock.epcpage")
    page = resolve(lp, rcx, "w", "eblock.epcpage")
    claim_or_conflict(lp, page, SHARED, "eblock.conflict")
    entry = cpu.epcm[page]
    if not entry.valid:
        raise LeafError(Status.SGX_PG_INVLD, "eblock.valid")
    if entry.pt == PT_SECS:
        raise LeafError(Status.SGX_PG_IS_SECS, "eblock.secs", carry=True)
    if entry.enclave_secs is None:
        raise LeafError(Status.SGX_NOTBLOCKABLE, "eblock.pt", carry=True)
    if not cpu.locks.free(entry.enclave_secs, SHARED, Resource.TRACKING):
        raise LeafError(Status.SGX_ENTRYEPOCH_LOCKED, "eblock.epoch")
    if entry.blocked:
        raise LeafError(Status.SGX_BLKSTATE, "eblock.blocked", carry=True)
    entry.blocked = True
    entry.epoch = cpu.enclaves[cpu.secs(entry.enclave_secs).eid].epoch
    return Status.SGX_SUCCESS


def _track(lp: LogicalProcessor, secs_page: int, rule: str) -> Status:
    """Begin a tracking cycle, once the previous one is complete: whoever was inside at its ETRACK has left."""
    state = lp.processor.enclaves[lp.processor.secs(secs_page).eid]
    if any(active.epoch < state.epoch for active in lp.processor.active(secs_page)):
        raise LeafError(Status.SGX_PREV_TRK_INCMPL, f"{rule}.incomplete")
    state.epoch += 1
    return Status.SGX_SUCCESS


def etrack(lp: LogicalProcessor) -> Status:
    """ETRACK: from now on count who was in the enclave of the SECS at RCX."""
    rcx = lp.registers.rcx
    aligned(rcx, PAGE_SIZE, "etrack.secs")
    page = resolve(lp, rcx, "w", "etrack.secs")
    claim(lp, page, SHARED, "etrack.conflict")
    claim(lp, page, EXCLUSIVE, "etrack.tracking-conflict", Resource.TRACKING)
    valid_page(lp, page, rcx, SECS_ONLY, "etrack.secs")
    return _track(lp, page, "etrack")


def etrackc(lp: LogicalProcessor) -> Status:
    """ETRACKC: like ETRACK, for the enclave of the EPC page at RCX."""
    rcx = lp.registers.rcx
    aligned(rcx, PAGE_SIZE, "etrackc.epcpage")
    page = resolve(lp, rcx, "w", "etrackc.epcpage")
    claim_or_conflict(lp, page, SHARED, "etrackc.conflict")
    entry = lp.processor.epcm[page]
    if not entry.valid:
        raise LeafError(Status.SGX_PG_INVLD, "etrackc.valid")
    secs_page = page if entry.pt == PT_SECS else entry.enclave_secs
    if secs_page is None:
        raise LeafError(Status.SGX_TRACK_NOT_REQUIRED, "etrackc.pt", carry=True)
    claim_or_conflict(lp, secs_page, EXCLUSIVE, "etrackc.tracking-conflict", Resource.TRACKING)
    return _track(lp, secs_page, "etrackc")


def ewb(lp: LogicalProcessor) -> Status:
    """EWB: RBX a PAGEINFO (SRCPGE and PCMD are written), RCX the EPC page, RDX the slot for its version."""
    rbx, rcx, rdx = lp.registers.rbx, lp.registers.rcx, lp.registers.rdx
    cpu = lp.processor
    aligned(rbx, 32, "ewb.pageinfo")
    aligned(rcx, PAGE_SIZE, "ewb.epcpage")
    page = resolve(lp, rcx, "w", "ewb.epcpage")
    aligned(rdx, _SLOT, "ewb.slot")
    va_page = resolve(lp, rdx, "w", "ewb.slot")
    if page == va_page:
        raise GeneralProtection("ewb.same-page")
    info = PageInfo.from_bytes(lp.read(rbx, PageInfo.LAYOUT.size))
    if info.linaddr or info.secs:
        raise GeneralProtection("ewb.pageinfo")
    aligned(info.secinfo, 128, "ewb.pcmd")
    aligned(info.srcpge, PAGE_SIZE, "ewb.srcpge")
    claim(lp, page, EXCLUSIVE, "ewb.conflict")
    claim(lp, va_page, SHARED, "ewb.va-conflict")
    entry = cpu.epcm[page]
    if not entry.valid:
        raise lp.epcm_fault("ewb.valid", rcx, "w")
    valid_page(lp, va_page, rdx, _VA_ONLY, "ewb.va")
    bound_eid, eid = _evictable(lp, page, entry)

    # Before anything changes: the destinations, of which none crosses a page, can be written.
    for linear in (info.srcpge, info.secinfo, rbx):
        lp.translate(linear, "w")
    version = cpu.new_version()
    secinfo = entry.flags.to_bytes(64, "little")
    header = MacHeader.LAYOUT.pack((bound_eid, entry.enclave_address, secinfo, bytes(40)))
    sealed = _cipher(cpu.page_key).encrypt(_iv(version), cpu.read_epc(page), header)
    lp.write(info.srcpge, sealed[:PAGE_SIZE])
    lp.write(info.secinfo, Pcmd(entry.flags, eid, sealed[PAGE_SIZE:]).to_bytes())
    lp.write(rbx, entry.enclave_address.to_bytes(8, "little"))
    slot = rdx % PAGE_SIZE
    occupied = any(cpu.read_epc(va_page, slot, _SLOT))
    cpu.write_epc(va_page, version.to_bytes(_SLOT, "little"), slot)
    cpu.free_epc(page)
    if occupied:
        # The page is out all the same: what the slot held can never be loaded again.
        raise LeafError(Status.SGX_VA_SLOT_OCCUPIED, "ewb.slot-occupied", carry=True)
    return Status.SGX_SUCCESS


def _evictable(lp: LogicalProcessor, page: int, entry: EpcmEntry) -> tuple[int, int]:
    """The EID that the evicted page is bound to, and the one that PCMD tells software."""
    cpu = lp.processor
    if entry.enclave_secs is not None:
        if not entry.blocked:
            raise LeafError(Status.SGX_PAGE_NOT_BLOCKED, "ewb.blocked")
        if not cpu.tracked(entry.enclave_secs, entry.epoch):
            raise LeafError(Status.SGX_NOT_TRACKED, "ewb.tracked")
        eid = cpu.secs(entry.enclave_secs).eid
        return eid, eid
    if entry.pt == PT_SECS:
        if cpu.has_children(page):
            raise LeafError(Status.SGX_CHILD_PRESENT, "ewb.children")
        return 0, cpu.secs(page).eid
    return 0, 0


def eldb(lp: LogicalProcessor) -> Status:
    """ELDB: load an evicted page, blocked."""
    return _load(lp, "eldb", blocked=True, report_conflict=False)


def eldu(lp: LogicalProcessor) -> Status:
    """ELDU: load an evicted page, unblocked."""
    return _load(lp, "eldu", blocked=False, report_conflict=False)


def eldbc(lp: LogicalProcessor) -> Status:
    """ELDBC: ELDB that reports conflicts."""
    return _load(lp, "eldbc", blocked=True, report_conflict=True)


def elduc(lp: LogicalProcessor) -> Status:
    """ELDUC: ELDU that reports conflicts."""
    return _load(lp, "elduc", blocked=False, report_conflict=True)


def _load(lp: LogicalProcessor, rule: str, *, blocked: bool, report_conflict: bool) -> Status:
    """RBX a PAGEINFO with the PCMD, RCX the EPC page, RDX the version's slot, which is freed."""
    rbx, rcx, rdx = lp.registers.rbx, lp.registers.rcx, lp.registers.rdx
    cpu = lp.processor
    take = claim_or_conflict if report_conflict else claim
    aligned(rbx, 32, f"{rule}.pageinfo")
    aligned(rcx, PAGE_SIZE, f"{rule}.epcpage")
    page = resolve(lp, rcx, "w", f"{rule}.epcpage")
    aligned(rdx, _SLOT, f"{rule}.slot")
    va_page = resolve(lp, rdx, "w", f"{rule}.slot")
    info = PageInfo.from_bytes(lp.read(rbx, PageInfo.LAYOUT.size))
    aligned(info.secinfo, 128, f"{rule}.pcmd")
    aligned(info.srcpge, PAGE_SIZE, f"{rule}.srcpge")
    take(lp, page, EXCLUSIVE, f"{rule}.conflict")
    take(lp, va_page, SHARED, f"{rule}.va-conflict")
    if cpu.epcm[page].valid:
        raise lp.epcm_fault(f"{rule}.occupied", rcx, "w")
    valid_page(lp, va_page, rdx, _VA_ONLY, f"{rule}.va")
    # Parsed by hand: what is not what EWB wrote fails the MAC, reserved bytes included.
    pcmd = lp.read(info.secinfo, Pcmd.LAYOUT.size)
    secinfo, reserved, mac = pcmd[:64], pcmd[72:112], pcmd[112:]
    entry = EpcmEntry.from_flags(int.from_bytes(secinfo[:8], "little"), enclave_secs=None, enclave_address=info.linaddr)
    eid = 0
    if entry.pt in CHILD_TYPES:
        aligned(info.secs, PAGE_SIZE, f"{rule}.secs")
        secs_page = resolve(lp, info.secs, "w", f"{rule}.secs")
        take(lp, secs_page, SHARED, f"{rule}.secs-conflict")
        valid_page(lp, secs_page, info.secs, SECS_ONLY, f"{rule}.secs")
        eid = cpu.secs(secs_page).eid
        entry.enclave_secs = secs_page
        entry.blocked = blocked
    slot = rdx % PAGE_SIZE
    version = int.from_bytes(cpu.read_epc(va_page, slot, _SLOT), "little")
    header = MacHeader.LAYOUT.pack((eid, info.linaddr, secinfo, reserved))
    contents = _opened(cpu.page_key, version, lp.read(info.srcpge, PAGE_SIZE) + mac, header)
    if contents is None:
        raise LeafError(Status.SGX_MAC_COMPARE_FAIL, f"{rule}.mac")
    # The version is used up: the same ciphertext cannot be loaded twice.
    cpu.write_epc(va_page, bytes(_SLOT), slot)
    cpu.write_epc(page, contents)
    cpu.epcm[page] = entry
    return Status.SGX_SUCCESS


def _cipher(key: bytes) -> AESGCM:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(key)


def _iv(version: int) -> bytes:
    """The 96-bit counter block of a version: TMP_VER << 32."""
    return (version << 32).to_bytes(12, "big")


def _opened(key: bytes, version: int, sealed: bytes, header: bytes) -> bytes | None:
    from cryptography.exceptions import InvalidTag

    try:
        return _cipher(key).decrypt(_iv(version), sealed, header)
    except InvalidTag:
        return None
