"""Asynchronous enclave exit (SDM vol. 3D, chapter 39 "Enclave exiting events")."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ....sgx.codes import Enclu
from ....sgx.image import PAGE_SIZE
from ....sgx.ssa import EXINFO_SIZE, MISC_EXINFO, ExInfo, ExitInfo, GprSgx, xsave_size
from . import frames, xsave
from .enclu_flow import leave, read_gprsgx, read_tcs, write_tcs
from .faults import PF_USER, GeneralProtection, PageFault
from .registers import GENERAL, RFLAGS_RF, RFLAGS_STATUS

if TYPE_CHECKING:
    from .logical import LogicalProcessor


def asynchronous_exit(lp: LogicalProcessor, vector: int, error_code: int, address: int | None) -> None:
    """Save the enclave's state in the SSA frame that entry chose, scrub it, and leave for the AEP."""
    active, registers = lp.active, lp.registers
    assert active is not None
    miscselect = active.secs.public.miscselect
    reported = not (vector == PageFault.vector and not error_code & PF_USER)
    _save(lp, ExitInfo.of_exception(vector, miscselect) if reported else ExitInfo())
    if miscselect & MISC_EXINFO and reported and vector in (GeneralProtection.vector, PageFault.vector):
        page, start = active.gprsgx
        maddr = (address or 0) if vector == PageFault.vector else 0
        lp.processor.write_epc(page, ExInfo(maddr, error_code).to_bytes(), start - EXINFO_SIZE)
    tcs = read_tcs(lp, active.tcs_page)
    write_tcs(lp, active.tcs_page, replace(tcs, cssa=tcs.cssa + 1))
    saved = read_gprsgx(lp, active.gprsgx)
    leave(lp)

    # Synthetic state: nothing of the enclave's is left but where to resume it.
    for name in GENERAL:
        setattr(registers, name, 0)
    registers.rax = Enclu.ERESUME
    registers.rbx = active.tcs_linear
    registers.rcx = registers.rip = tcs.aep
    registers.rsp, registers.rbp = saved.ursp, saved.urbp
    registers.rflags &= ~(RFLAGS_STATUS | RFLAGS_RF)
    registers.xsave = xsave.initialise(registers.xsave, active.secs.attributes.xfrm)
    if vector == PageFault.vector and address is not None:
        # The page is told, the offset in it is not.
        lp.cr2 = address & ~(PAGE_SIZE - 1)


def _save(lp: LogicalProcessor, exit_info: ExitInfo) -> None:
    """GPRSGX and the XSAVE area; URSP, URBP and AEXNOTIFY stay as they are."""
    active, registers = lp.active, lp.registers
    assert active is not None
    old = read_gprsgx(lp, active.gprsgx)
    made = replace(
        old,
        rflags=registers.rflags,
        rip=registers.rip,
        exitinfo=exit_info.to_int(),
        fsbase=registers.fs_base,
        gsbase=registers.gs_base,
        **{name: getattr(registers, name) for name in GENERAL},
    )
    page, start = active.gprsgx
    # Byte for byte up to EXITINFO, then the bases: what lies between is the enclave software's.
    data = made.to_bytes()
    exit_end, bases = GprSgx.LAYOUT.offsets["exitinfo"] + 4, GprSgx.LAYOUT.offsets["fsbase"]
    lp.processor.write_epc(page, data[:exit_end], start)
    lp.processor.write_epc(page, data[bases:], start + bases)
    xfrm = active.secs.attributes.xfrm
    area = frames.read_xsave(lp, active.xsave_pages, xsave_size(xfrm))
    frames.write_xsave(lp, active.xsave_pages, xsave.save(registers.xsave, area, xfrm))
