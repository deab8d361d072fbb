"""ENCLU leaves that enter and leave enclaves: EENTER, EEXIT, ERESUME, EDECCSSA (SDM vol. 3D, 40.4)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ....sgx.image import PAGE_SIZE
from ....sgx.paging import PT_TCS
from ....sgx.ssa import GprSgx, xsave_size
from ....sgx.structs import ATTRIBUTE_AEXNOTIFY, XFRM_LEGACY, Tcs
from . import frames, rules, xsave
from .access import SHARED, aligned, canonical, claim, resolve
from .faults import GeneralProtection
from .frames import Frame
from .registers import (
    GENERAL,
    RFLAGS_AC,
    RFLAGS_DF,
    RFLAGS_ID,
    RFLAGS_IF,
    RFLAGS_IOPL,
    RFLAGS_NT,
    RFLAGS_RF,
    RFLAGS_STATUS,
    RFLAGS_TF,
)
from .secs import EnclaveSecs

if TYPE_CHECKING:
    from .logical import Active, LogicalProcessor

#: TCS.STATE.
INACTIVE, ACTIVE = 0, 1
#: What ERESUME takes from the saved RFLAGS.
_RESTORED = RFLAGS_STATUS | RFLAGS_DF | RFLAGS_NT | RFLAGS_AC | RFLAGS_ID | RFLAGS_RF
_ADDRESSES = 1 << 64
_URSP = GprSgx.LAYOUT.offsets["ursp"]
#: Bytes of GPRSGX that are reserved: enclave software may have left anything there.
_GPRSGX_RESERVED = slice(164, 167)


def read_tcs(lp: LogicalProcessor, page: int) -> Tcs:
    """The TCS in an EPC page of type PT_TCS."""
    return Tcs.from_bytes(lp.processor.read_epc(page))


def write_tcs(lp: LogicalProcessor, page: int, tcs: Tcs) -> None:
    """Replace it."""
    lp.processor.write_epc(page, tcs.to_bytes())


def read_gprsgx(lp: LogicalProcessor, place: tuple[int, int]) -> GprSgx:
    """The fields of GPRSGX."""
    data = bytearray(frames.read_gprsgx(lp, place))
    data[_GPRSGX_RESERVED] = bytes(3)
    return GprSgx.from_bytes(bytes(data))


def _thread(lp: LogicalProcessor, rule: str) -> tuple[int, Tcs, int, EnclaveSecs]:
    """What EENTER and ERESUME check of the TCS at RBX and of its enclave, up to the SSA frame.

    Returns:
        The TCS's EPC page and contents, the SECS's likewise.
    """
    rbx, rcx, cpu = lp.registers.rbx, lp.registers.rcx, lp.processor
    aligned(rbx, PAGE_SIZE, f"{rule}.tcs")
    page = resolve(lp, rbx, "w", f"{rule}.tcs")
    canonical(rcx, f"{rule}.aep")
    claim(lp, page, SHARED, f"{rule}.conflict")
    entry = cpu.epcm[page]
    if not entry.valid:
        raise lp.epcm_fault(f"{rule}.tcs-valid", rbx, "r")
    if entry.blocked:
        raise lp.epcm_fault(f"{rule}.tcs-blocked", rbx, "r")
    if entry.enclave_address != rbx or entry.pt != PT_TCS:
        raise lp.epcm_fault(f"{rule}.tcs-page", rbx, "r")
    if entry.pending or entry.modified:
        raise lp.epcm_fault(f"{rule}.tcs-state", rbx, "r")
    tcs = read_tcs(lp, page)
    aligned(tcs.ossa, PAGE_SIZE, f"{rule}.ossa")
    aligned(tcs.ofsbase, PAGE_SIZE, f"{rule}.ofsbase")
    aligned(tcs.ogsbase, PAGE_SIZE, f"{rule}.ogsbase")
    assert entry.enclave_secs is not None
    secs = cpu.secs(entry.enclave_secs)
    if tcs.flags & ~rules.TCS_FLAGS_KNOWN:
        raise GeneralProtection(f"{rule}.flags")
    if not secs.initialised:
        raise GeneralProtection(f"{rule}.initialised")
    if not secs.mode64:
        raise GeneralProtection(f"{rule}.mode64")
    if not lp.cr4_osfxsr:
        raise GeneralProtection(f"{rule}.osfxsr")
    xfrm = secs.attributes.xfrm
    if xfrm & ~lp.xcr0 if lp.cr4_osxsave else xfrm != XFRM_LEGACY:
        raise GeneralProtection(f"{rule}.xfrm")
    notify = bool(tcs.flags & rules.TCS_AEXNOTIFY)
    if not tcs.flags & rules.TCS_DBGOPTIN and notify != bool(secs.attributes.flags & ATTRIBUTE_AEXNOTIFY):
        raise GeneralProtection(f"{rule}.aexnotify")
    return page, tcs, entry.enclave_secs, secs


def _segments(tcs: Tcs, secs: EnclaveSecs, rule: str) -> tuple[int, int]:
    """FS and GS base as the TCS wants them."""
    fs, gs = (tcs.ofsbase + secs.base) % _ADDRESSES, (tcs.ogsbase + secs.base) % _ADDRESSES
    canonical(fs, f"{rule}.fsbase")
    canonical(gs, f"{rule}.gsbase")
    return fs, gs


def _activate(
    lp: LogicalProcessor, page: int, tcs: Tcs, secs_page: int, secs: EnclaveSecs, frame: Frame, cssa: int
) -> None:
    """Into enclave mode: save what belongs to the outside, mark the TCS as busy."""
    from .logical import Active

    registers = lp.registers
    write_tcs(lp, page, replace(tcs, state=ACTIVE, aep=registers.rcx, cssa=cssa))
    dbgoptin = bool(tcs.flags & rules.TCS_DBGOPTIN)
    lp.active = Active(
        secs_page=secs_page,
        secs=secs,
        tcs_page=page,
        tcs_linear=registers.rbx,
        epoch=lp.processor.enclaves[secs.eid].epoch,
        gprsgx=frame.gprsgx,
        xsave_pages=frame.xsave_pages,
        dbgoptin=dbgoptin,
        saved_fs_base=registers.fs_base,
        saved_gs_base=registers.gs_base,
        saved_xcr0=lp.xcr0,
        saved_tf=registers.rflags & RFLAGS_TF,
    )
    lp.xcr0 = secs.attributes.xfrm
    if not dbgoptin:
        # An opt-out entry makes the enclave one instruction to a debugger.
        registers.rflags &= ~RFLAGS_TF


def _enter(
    lp: LogicalProcessor,
    page: int,
    tcs: Tcs,
    secs_page: int,
    secs: EnclaveSecs,
    frame: Frame,
    segments: tuple[int, int],
    target: int,
) -> None:
    """The part of EENTER after its checks, which ERESUME shares when it notifies."""
    registers, cpu = lp.registers, lp.processor
    place, start = frame.gprsgx
    outside = registers.rsp.to_bytes(8, "little") + registers.rbp.to_bytes(8, "little")
    cpu.write_epc(place, outside, start + _URSP)
    _activate(lp, page, tcs, secs_page, secs, frame, tcs.cssa)
    registers.rcx, registers.rip, registers.rax = registers.rip, target, tcs.cssa
    registers.fs_base, registers.gs_base = segments


def eenter(lp: LogicalProcessor) -> None:
    """EENTER: RBX a TCS, RCX the AEP; RAX ← CSSA, RCX ← the address behind EENTER."""
    page, tcs, secs_page, secs = _thread(lp, "eenter")
    segments = _segments(tcs, secs, "eenter")
    if tcs.cssa >= tcs.nssa:
        raise GeneralProtection("eenter.cssa")
    frame = frames.locate(lp, secs_page, secs, tcs, tcs.cssa)
    target = (tcs.oentry + secs.base) % _ADDRESSES
    canonical(target, "eenter.oentry")
    if tcs.state == ACTIVE:
        raise GeneralProtection("eenter.active")
    _enter(lp, page, tcs, secs_page, secs, frame, segments, target)


def eexit(lp: LogicalProcessor) -> None:
    """EEXIT: RBX where execution goes on; RCX ← the AEP."""
    registers = lp.registers
    canonical(registers.rbx, "eexit.target")
    active = _active(lp)
    registers.rip = registers.rbx
    registers.rcx = read_tcs(lp, active.tcs_page).aep
    leave(lp)


def eresume(lp: LogicalProcessor) -> None:
    """ERESUME: RBX a TCS, RCX the AEP; the state comes from the last SSA frame."""
    registers = lp.registers
    page, tcs, secs_page, secs = _thread(lp, "eresume")
    if not tcs.cssa:
        raise GeneralProtection("eresume.cssa")
    frame = frames.locate(lp, secs_page, secs, tcs, tcs.cssa - 1)
    saved = read_gprsgx(lp, frame.gprsgx)
    notify = bool(tcs.flags & rules.TCS_AEXNOTIFY and saved.aexnotify & 1)
    if notify:
        if tcs.cssa >= tcs.nssa:
            raise GeneralProtection("eresume.nssa")
        frame = frames.locate(lp, secs_page, secs, tcs, tcs.cssa)
    target = (tcs.oentry + secs.base) % _ADDRESSES if notify else saved.rip
    canonical(target, "eresume.target")
    segments = _segments(tcs, secs, "eresume") if notify else (saved.fsbase, saved.gsbase)
    canonical(segments[0], "eresume.fsbase")
    canonical(segments[1], "eresume.gsbase")
    if tcs.state == ACTIVE:
        raise GeneralProtection("eresume.active")
    if notify:
        # AEX-Notify: the enclave's handler runs first, in the next frame; EDECCSSA brings it back to this one.
        _enter(lp, page, tcs, secs_page, secs, frame, segments, target)
        return
    xfrm = secs.attributes.xfrm
    area = frames.read_xsave(lp, frame.xsave_pages, xsave_size(xfrm))
    state = xsave.restore(registers.xsave, area, xfrm)
    _activate(lp, page, tcs, secs_page, secs, frame, tcs.cssa - 1)
    registers.xsave = state
    for name in GENERAL:
        setattr(registers, name, getattr(saved, name))
    restored = _RESTORED | (RFLAGS_IF if registers.rflags & RFLAGS_IOPL == RFLAGS_IOPL else 0)
    registers.rflags = registers.rflags & ~restored | saved.rflags & restored
    registers.rip = target
    registers.fs_base, registers.gs_base = segments


def edeccssa(lp: LogicalProcessor) -> None:
    """EDECCSSA: the thread's SSA frame becomes the one before."""
    active = _active(lp)
    tcs = read_tcs(lp, active.tcs_page)
    if not tcs.cssa:
        raise GeneralProtection("edeccssa.cssa")
    frame = frames.locate(lp, active.secs_page, active.secs, tcs, tcs.cssa - 1)
    write_tcs(lp, active.tcs_page, replace(tcs, cssa=tcs.cssa - 1))
    active.gprsgx, active.xsave_pages = frame.gprsgx, frame.xsave_pages


def leave(lp: LogicalProcessor) -> None:
    """What EEXIT and AEX have in common: the outside's state comes back, the TCS is free."""
    active, registers = _active(lp), lp.registers
    registers.fs_base, registers.gs_base = active.saved_fs_base, active.saved_gs_base
    lp.xcr0 = active.saved_xcr0
    if not active.dbgoptin:
        registers.rflags = registers.rflags & ~RFLAGS_TF | active.saved_tf
    write_tcs(lp, active.tcs_page, replace(read_tcs(lp, active.tcs_page), state=INACTIVE))
    lp.active = None
    # Nothing is cached outside of enclave mode: an entry finds no translation to flush.
    lp.flush()


def _active(lp: LogicalProcessor) -> Active:
    assert lp.active is not None
    return lp.active
