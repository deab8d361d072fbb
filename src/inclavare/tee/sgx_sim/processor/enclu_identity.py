"""ENCLU leaves that tell who the enclave is: EREPORT, EGETKEY (SDM vol. 3D, 40.4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ....sgx import keys, report
from ....sgx.codes import Status
from ....sgx.structs import KeyRequest, StructureError, TargetInfo
from .access import aligned, within_elrange
from .faults import GeneralProtection, LeafError

if TYPE_CHECKING:
    from .logical import AccessKind, LogicalProcessor

_REPORT_DATA = 64


def _operand(lp: LogicalProcessor, linear: int, alignment: int, access: AccessKind, rule: str) -> None:
    """An aligned address in a page of the enclave that the access is allowed to."""
    aligned(linear, alignment, rule)
    within_elrange(lp, linear, rule)
    lp.translate(linear, access)


def _target_info(data: bytes) -> TargetInfo:
    """The fields of a TARGETINFO: EREPORT does not look at its reserved bytes."""
    layout = TargetInfo.LAYOUT
    clean = bytearray(layout.size)
    for name, offset in layout.offsets.items():
        field = slice(offset, offset + layout.sizes[name])
        clean[field] = data[field]
    return TargetInfo.from_bytes(bytes(clean))


def ereport(lp: LogicalProcessor) -> None:
    """EREPORT: RBX a TARGETINFO, RCX 64 bytes of REPORTDATA, RDX where the REPORT goes."""
    rbx, rcx, rdx = lp.registers.rbx, lp.registers.rcx, lp.registers.rdx
    assert lp.active is not None
    _operand(lp, rbx, 512, "r", "ereport.targetinfo")
    _operand(lp, rcx, 128, "r", "ereport.reportdata")
    _operand(lp, rdx, 512, "w", "ereport.outputdata")
    made = report.ereport(
        lp.processor.roots,
        lp.active.secs.identity,
        _target_info(lp.read(rbx, TargetInfo.LAYOUT.size)),
        lp.read(rcx, _REPORT_DATA),
        lp.processor.report_key_id,
    )
    lp.write(rdx, made.to_bytes())


def egetkey(lp: LogicalProcessor) -> Status:
    """EGETKEY: RBX a KEYREQUEST, RCX where the 16 bytes of the key go."""
    rbx, rcx = lp.registers.rbx, lp.registers.rcx
    assert lp.active is not None
    _operand(lp, rbx, 512, "r", "egetkey.keyrequest")
    _operand(lp, rcx, 16, "w", "egetkey.outputdata")
    try:
        request = KeyRequest.from_bytes(lp.read(rbx, KeyRequest.LAYOUT.size))
    except StructureError:
        raise GeneralProtection("egetkey.reserved") from None
    try:
        key = keys.egetkey(lp.processor.roots, lp.active.secs.identity, request)
    except keys.KeyRefused as refused:
        rule = refused.id.removeprefix("sgx.")
        if refused.status is None:
            raise GeneralProtection(rule) from None
        raise LeafError(refused.status, rule) from None
    lp.write(rcx, key)
    return Status.SGX_SUCCESS
