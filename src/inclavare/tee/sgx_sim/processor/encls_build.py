"""ENCLS leaves that build and remove enclaves: ECREATE, EADD, EEXTEND, EINIT, EREMOVE (SDM vol. 3D, 40.3)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ....sgx import sigstruct
from ....sgx.codes import Status
from ....sgx.image import CHUNK, PAGE_SIZE
from ....sgx.paging import PT_REG, PT_SECS, PT_TCS, PT_TRIM, PT_VA, SECINFO_PT, SECINFO_RWX, PageInfo
from ....sgx.structs import ATTRIBUTE_INIT, Attributes, Secs, Sigstruct, StructureError
from . import rules
from .access import EXCLUSIVE, SHARED, aligned, claim, resolve, valid_page
from .epcm import EpcmEntry
from .faults import GeneralProtection, LeafError
from .locks import Resource
from .secs import EnclaveSecs, Internal

if TYPE_CHECKING:
    from .logical import LogicalProcessor

SECS_ONLY = frozenset((PT_SECS,))
_MEASURED = frozenset((PT_REG, PT_TCS))
_TOKEN_SIZE = 304


def ecreate(lp: LogicalProcessor) -> None:
    """ECREATE: RBX a PAGEINFO, RCX the EPC page that becomes the SECS."""
    rbx, rcx, cpu = lp.registers.rbx, lp.registers.rcx, lp.processor
    aligned(rbx, 32, "ecreate.pageinfo")
    aligned(rcx, PAGE_SIZE, "ecreate.epcpage")
    page = resolve(lp, rcx, "w", "ecreate.epcpage")
    info = PageInfo.from_bytes(lp.read(rbx, PageInfo.LAYOUT.size))
    aligned(info.srcpge, PAGE_SIZE, "ecreate.srcpge")
    aligned(info.secinfo, 64, "ecreate.secinfo")
    if info.linaddr or info.secs:
        raise GeneralProtection("ecreate.pageinfo")
    if rules.secinfo(lp.read(info.secinfo, 64), "ecreate.secinfo") & SECINFO_PT != PT_SECS:
        raise GeneralProtection("ecreate.secinfo")
    claim(lp, page, EXCLUSIVE, "ecreate.conflict")
    if cpu.epcm[page].valid:
        raise lp.epcm_fault("ecreate.occupied", rcx, "w")
    try:
        source = Secs.from_bytes(lp.read(info.srcpge, PAGE_SIZE))
    except StructureError:
        raise GeneralProtection("ecreate.reserved") from None
    rules.check_secs(source, cpu.features)
    # MRENCLAVE, MRSIGNER and the ISV's numbers are EINIT's to fill in.
    public = replace(source, mrenclave=bytes(32), mrsigner=bytes(32), isv_prod_id=0, isv_svn=0)
    eid, state = cpu.new_enclave()
    state.measurement.ecreate(public.ssa_frame_size, public.size)
    cpu.write_secs(page, EnclaveSecs(public, Internal(bytes(16), bytes(16), eid, rcx)))
    cpu.epcm[page] = EpcmEntry(valid=True, pt=PT_SECS)


def eadd(lp: LogicalProcessor) -> None:
    """EADD: RBX a PAGEINFO, RCX the EPC page that is added."""
    rbx, rcx, cpu = lp.registers.rbx, lp.registers.rcx, lp.processor
    aligned(rbx, 32, "eadd.pageinfo")
    aligned(rcx, PAGE_SIZE, "eadd.epcpage")
    page = resolve(lp, rcx, "w", "eadd.epcpage")
    info = PageInfo.from_bytes(lp.read(rbx, PageInfo.LAYOUT.size))
    aligned(info.srcpge, PAGE_SIZE, "eadd.srcpge")
    aligned(info.secs, PAGE_SIZE, "eadd.secs")
    aligned(info.secinfo, 64, "eadd.secinfo")
    aligned(info.linaddr, PAGE_SIZE, "eadd.linaddr")
    secs_page = resolve(lp, info.secs, "w", "eadd.secs")
    flags = rules.secinfo(lp.read(info.secinfo, 64), "eadd.secinfo")
    kind = flags & SECINFO_PT
    if kind not in _MEASURED:
        raise GeneralProtection("eadd.secinfo")
    claim(lp, page, EXCLUSIVE, "eadd.conflict")
    if cpu.epcm[page].valid:
        raise lp.epcm_fault("eadd.occupied", rcx, "w")
    claim(lp, secs_page, SHARED, "eadd.secs-conflict")
    valid_page(lp, secs_page, info.secs, SECS_ONLY, "eadd.secs")
    secs = cpu.secs(secs_page)
    contents = lp.read(info.srcpge, PAGE_SIZE)
    rules.check_secinfo_eadd(flags)
    if kind == PT_TCS:
        tcs = rules.check_tcs(contents, mode64=secs.mode64, rule="eadd.tcs")
        flags &= ~SECINFO_RWX
        tcs = replace(tcs, flags=tcs.flags & ~rules.TCS_DBGOPTIN, cssa=0, aep=0, state=0)
        contents = tcs.to_bytes()
    if info.linaddr not in secs.elrange:
        raise GeneralProtection("eadd.range")
    claim(lp, secs_page, EXCLUSIVE, "eadd.measurement-conflict", Resource.MEASUREMENT)
    if secs.initialised:
        raise GeneralProtection("eadd.initialised")
    cpu.enclaves[secs.eid].measurement.eadd(info.linaddr - secs.base, flags)
    cpu.write_epc(page, contents)
    cpu.epcm[page] = EpcmEntry.from_flags(flags, enclave_secs=secs_page, enclave_address=info.linaddr)


def eextend(lp: LogicalProcessor) -> None:
    """EEXTEND: RBX the SECS, RCX 256 bytes of a page of its enclave."""
    rbx, rcx, cpu = lp.registers.rbx, lp.registers.rcx, lp.processor
    aligned(rbx, PAGE_SIZE, "eextend.secs")
    secs_page = resolve(lp, rbx, "r", "eextend.secs")
    aligned(rcx, CHUNK, "eextend.chunk")
    page = resolve(lp, rcx, "r", "eextend.chunk")
    claim(lp, page, SHARED, "eextend.conflict")
    entry = valid_page(lp, page, rcx, _MEASURED, "eextend.page")
    if entry.enclave_secs != secs_page:
        raise GeneralProtection("eextend.secs")
    claim(lp, secs_page, EXCLUSIVE, "eextend.measurement-conflict", Resource.MEASUREMENT)
    secs = cpu.secs(secs_page)
    if secs.initialised:
        raise GeneralProtection("eextend.initialised")
    start = rcx % PAGE_SIZE
    offset = entry.enclave_address - secs.base + start
    cpu.enclaves[secs.eid].measurement.eextend(offset, cpu.read_epc(page, start, CHUNK))


def einit(lp: LogicalProcessor) -> Status:
    """EINIT: RBX a SIGSTRUCT, RCX the SECS, RDX an EINITTOKEN."""
    rbx, rcx, rdx = lp.registers.rbx, lp.registers.rcx, lp.registers.rdx
    cpu = lp.processor
    aligned(rbx, PAGE_SIZE, "einit.sigstruct")
    aligned(rcx, PAGE_SIZE, "einit.secs")
    aligned(rdx, 512, "einit.token")
    page = resolve(lp, rcx, "w", "einit.secs")
    data, token = lp.read(rbx, Sigstruct.LAYOUT.size), lp.read(rdx, _TOKEN_SIZE)
    signed = rules.check_sigstruct(data)
    claim(lp, page, SHARED, "einit.secs-conflict")
    valid_page(lp, page, rcx, SECS_ONLY, "einit.secs")
    secs = cpu.secs(page)
    attributes = secs.attributes
    rules.check_family(attributes, signed)
    claim(lp, page, EXCLUSIVE, "einit.measurement-conflict", Resource.MEASUREMENT)
    if secs.initialised:
        raise GeneralProtection("einit.initialised")
    mrenclave = cpu.enclaves[secs.eid].measurement.digest()
    mrsigner = sigstruct.mrsigner(signed.modulus)
    rules.check_measurement(signed, mrenclave)
    rules.check_controlled_attributes(attributes, mrsigner, cpu.le_pubkey_hash)
    rules.check_signed_attributes(attributes, secs.public.miscselect, signed)
    rules.check_launch(attributes, mrenclave, mrsigner, token, cpu.roots, cpu.le_pubkey_hash)
    public = replace(
        secs.public,
        attributes=Attributes(attributes.flags | ATTRIBUTE_INIT, attributes.xfrm).to_bytes(),
        mrenclave=mrenclave,
        mrsigner=mrsigner,
        isv_prod_id=signed.isv_prod_id,
        isv_svn=signed.isv_svn,
    )
    internal = replace(secs.internal, isv_family_id=signed.isv_family_id, isv_ext_prod_id=signed.isv_ext_prod_id)
    cpu.write_secs(page, EnclaveSecs(public, internal))
    return Status.SGX_SUCCESS


def eremove(lp: LogicalProcessor) -> Status:
    """EREMOVE: RCX the EPC page."""
    rcx, cpu = lp.registers.rcx, lp.processor
    aligned(rcx, PAGE_SIZE, "eremove.epcpage")
    page = resolve(lp, rcx, "w", "eremove.epcpage")
    claim(lp, page, EXCLUSIVE, "eremove.conflict")
    entry = cpu.epcm[page]
    if not entry.valid:
        return Status.SGX_SUCCESS
    if entry.pt == PT_SECS:
        if cpu.has_children(page):
            raise LeafError(Status.SGX_CHILD_PRESENT, "eremove.children")
        cpu.enclaves.pop(cpu.secs(page).eid)
    elif entry.enclave_secs is not None and not (entry.pt == PT_TRIM and not entry.modified):
        # A page that the enclave has accepted as trimmed may go while its threads run.
        if cpu.inside(entry.enclave_secs):
            raise LeafError(Status.SGX_ENCLAVE_ACT, "eremove.active")
    else:
        assert entry.pt in (PT_VA, PT_TRIM)
    cpu.free_epc(page)
    return Status.SGX_SUCCESS
