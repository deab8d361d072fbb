"""Which leaf functions there are, and when ENCLS and ENCLU may execute them (SDM vol. 3D, 40.3 and 40.4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ....sgx.codes import Encls, Enclu, Status
from . import encls_build, encls_debug, encls_edmm, encls_paging, enclu_edmm, enclu_flow, enclu_identity
from .faults import GeneralProtection, InvalidOpcode

if TYPE_CHECKING:
    from .logical import LogicalProcessor

#: A leaf returns what it leaves in RAX, or ``None`` if it leaves RAX and the flags alone.
Leaf = Callable[["LogicalProcessor"], Status | None]
Table = Mapping[Encls | Enclu, Leaf]
Check = Callable[["LogicalProcessor"], Encls | Enclu]

ENCLS: Table = {
    Encls.ECREATE: encls_build.ecreate,
    Encls.EADD: encls_build.eadd,
    Encls.EINIT: encls_build.einit,
    Encls.EREMOVE: encls_build.eremove,
    Encls.EDBGRD: encls_debug.edbgrd,
    Encls.EDBGWR: encls_debug.edbgwr,
    Encls.EEXTEND: encls_build.eextend,
    Encls.ELDB: encls_paging.eldb,
    Encls.ELDU: encls_paging.eldu,
    Encls.EBLOCK: encls_paging.eblock,
    Encls.EPA: encls_paging.epa,
    Encls.EWB: encls_paging.ewb,
    Encls.ETRACK: encls_paging.etrack,
    Encls.EAUG: encls_edmm.eaug,
    Encls.EMODPR: encls_edmm.emodpr,
    Encls.EMODT: encls_edmm.emodt,
    Encls.ERDINFO: encls_debug.erdinfo,
    Encls.ETRACKC: encls_paging.etrackc,
    Encls.ELDBC: encls_paging.eldbc,
    Encls.ELDUC: encls_paging.elduc,
}
ENCLU: Table = {
    Enclu.EREPORT: enclu_identity.ereport,
    Enclu.EGETKEY: enclu_identity.egetkey,
    Enclu.EENTER: enclu_flow.eenter,
    Enclu.ERESUME: enclu_flow.eresume,
    Enclu.EEXIT: enclu_flow.eexit,
    Enclu.EACCEPT: enclu_edmm.eaccept,
    Enclu.EMODPE: enclu_edmm.emodpe,
    Enclu.EACCEPTCOPY: enclu_edmm.eacceptcopy,
    Enclu.EDECCSSA: enclu_flow.edeccssa,
}
#: Leaves that only some processors have, and the feature. One table for each instruction: the numbers overlap.
_ENCLS_NEEDS: Mapping[Encls | Enclu, str] = {
    Encls.EAUG: "sgx2",
    Encls.EMODPR: "sgx2",
    Encls.EMODT: "sgx2",
    Encls.ERDINFO: "oversub",
    Encls.ETRACKC: "oversub",
    Encls.ELDBC: "oversub",
    Encls.ELDUC: "oversub",
}
_ENCLU_NEEDS: Mapping[Encls | Enclu, str] = {
    Enclu.EACCEPT: "sgx2",
    Enclu.EMODPE: "sgx2",
    Enclu.EACCEPTCOPY: "sgx2",
    Enclu.EDECCSSA: "aexnotify",
}
_FROM_OUTSIDE = (Enclu.EENTER, Enclu.ERESUME)


def _leaf(
    lp: LogicalProcessor, numbers: Table, needs: Mapping[Encls | Enclu, str], instruction: str, cpl: int
) -> Encls | Enclu:
    features = lp.processor.features
    if not features.sgx:
        raise InvalidOpcode(f"{instruction}.sgx")
    if lp.cpl != cpl:
        raise InvalidOpcode(f"{instruction}.cpl")
    if not features.enabled:
        raise GeneralProtection(f"{instruction}.enabled")
    eax = lp.registers.rax & 0xFFFF_FFFF
    number = next((number for number in numbers if number == eax), None)
    if number is None or not getattr(features, needs.get(number, "sgx")):
        raise GeneralProtection(f"{instruction}.leaf")
    return number


def encls_leaf(lp: LogicalProcessor) -> Encls | Enclu:
    """The ENCLS leaf in EAX.

    Raises:
        InvalidOpcode: ``encls.sgx`` or ``encls.cpl``.
        GeneralProtection: ``encls.enabled`` or ``encls.leaf``.
    """
    return _leaf(lp, ENCLS, _ENCLS_NEEDS, "encls", 0)


def enclu_leaf(lp: LogicalProcessor) -> Encls | Enclu:
    """The ENCLU leaf in EAX: EENTER and ERESUME outside, all others inside of an enclave.

    Raises:
        InvalidOpcode: ``enclu.sgx`` or ``enclu.cpl``.
        GeneralProtection: ``enclu.enabled``, ``enclu.leaf`` or ``enclu.mode``.
    """
    number = _leaf(lp, ENCLU, _ENCLU_NEEDS, "enclu", 3)
    if lp.enclave_mode == (number in _FROM_OUTSIDE):
        raise GeneralProtection("enclu.mode")
    return number
