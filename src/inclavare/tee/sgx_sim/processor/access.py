"""Who may access an EPC page: the EPCM's side of address translation, and the operands of leaf functions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ....sgx.codes import Status
from ....sgx.paging import PT_REG
from .epcm import EpcmEntry
from .faults import Fault, GeneralProtection, LeafError
from .locks import Access, Resource
from .space import is_canonical, page_base

if TYPE_CHECKING:
    from .logical import AccessKind, LogicalProcessor

SHARED, EXCLUSIVE = Access.SHARED, Access.EXCLUSIVE


def violation(entry: EpcmEntry, secs_page: int, linear: int, permissions: str) -> str | None:
    """The first rule that forbids an enclave to access one of its pages, or ``None`` (SDM vol. 3D, 38.3).

    Args:
        secs_page: number of the EPC page with the enclave's SECS.
        linear: the address at which the page is accessed.
        permissions: letters of ``rwx`` that are needed.
    """
    if not entry.valid:
        return "epcm.valid"
    if entry.blocked:
        return "epcm.blocked"
    if entry.pt != PT_REG:
        return "epcm.pt"
    if entry.enclave_secs != secs_page:
        return "epcm.enclavesecs"
    if entry.pending:
        return "epcm.pending"
    if entry.modified:
        return "epcm.modified"
    if entry.enclave_address != page_base(linear):
        return "epcm.enclaveaddress"
    return next((f"epcm.{letter}" for letter in permissions if not getattr(entry, letter)), None)


def check_direct_access(lp: LogicalProcessor, page: int, linear: int, access: AccessKind) -> None:
    """The EPCM check of an access that enclave code makes to its ELRANGE.

    Raises:
        PageFault: with the SGX bit.
    """
    assert lp.active is not None
    rule = violation(lp.processor.epcm[page], lp.active.secs_page, linear, access)
    if rule is not None:
        raise lp.epcm_fault(rule, linear, access)


def aligned(linear: int, alignment: int, rule: str) -> None:
    """An operand's address is a multiple of ``alignment``, a power of two.

    Raises:
        GeneralProtection: ``rule``.
    """
    if linear & (alignment - 1):
        raise GeneralProtection(rule)


def canonical(linear: int, rule: str) -> None:
    """An address is canonical.

    Raises:
        GeneralProtection: ``rule``.
    """
    if not is_canonical(linear):
        raise GeneralProtection(rule)


def resolve(lp: LogicalProcessor, linear: int, access: AccessKind, rule: str) -> int:
    """The EPC page that ``linear`` resolves to.

    Raises:
        GeneralProtection: the address is not canonical.
        PageFault: the page tables do not allow the access, or it is not an EPC page (``rule``).
    """
    canonical(linear, rule)
    mapping = lp.walk(linear, access)
    if mapping.epc_page is None:
        raise lp.epcm_fault(rule, linear, access)
    return mapping.epc_page


def claim(lp: LogicalProcessor, page: int, access: Access, rule: str, resource: Resource = Resource.PAGE) -> None:
    """Nobody holds the resource in a way that excludes this leaf.

    Raises:
        GeneralProtection: ``rule``.
    """
    if not lp.processor.locks.free(page, access, resource):
        raise GeneralProtection(rule)


def claim_or_conflict(
    lp: LogicalProcessor, page: int, access: Access, rule: str, resource: Resource = Resource.PAGE
) -> None:
    """Like :func:`claim`, for leaves that report the conflict.

    Raises:
        LeafError: SGX_EPC_PAGE_CONFLICT; ``rule``.
    """
    if not lp.processor.locks.free(page, access, resource):
        raise LeafError(Status.SGX_EPC_PAGE_CONFLICT, rule)


def within_elrange(lp: LogicalProcessor, linear: int, rule: str) -> None:
    """An operand of ENCLU lies in the active enclave.

    Raises:
        GeneralProtection: ``rule``.
    """
    if linear not in lp.elrange:
        raise GeneralProtection(rule)


def valid_page(lp: LogicalProcessor, page: int, linear: int, types: frozenset[int], rule: str) -> EpcmEntry:
    """The EPCM entry of an operand that must be valid and of one of these types.

    Raises:
        PageFault: with the SGX bit; ``rule`` and ``.valid`` or ``.pt``.
    """
    entry = lp.processor.epcm[page]
    fault: Fault | None = None
    if not entry.valid:
        fault = lp.epcm_fault(f"{rule}.valid", linear, "r")
    elif entry.pt not in types:
        fault = lp.epcm_fault(f"{rule}.pt", linear, "r")
    if fault is not None:
        raise fault
    return entry
