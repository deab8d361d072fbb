"""What the value of a structure's field means, in words: flag names, page types, dates, identities."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from . import keys, launch, paging, pck, quote, ssa, structs, tdx

ATTRIBUTES = {
    structs.ATTRIBUTE_INIT: "INIT",
    structs.ATTRIBUTE_DEBUG: "DEBUG",
    structs.ATTRIBUTE_MODE64BIT: "MODE64BIT",
    structs.ATTRIBUTE_PROVISIONKEY: "PROVISIONKEY",
    structs.ATTRIBUTE_EINITTOKENKEY: "EINITTOKENKEY",
    structs.ATTRIBUTE_CET: "CET",
    structs.ATTRIBUTE_KSS: "KSS",
    structs.ATTRIBUTE_AEXNOTIFY: "AEXNOTIFY",
}
#: XFRM and XFAM: x87, SSE, what an SSA frame holds, and what only a TD may use.
STATE = {1 << bit: name for bit, name in ((0, "X87"), (1, "SSE"), (8, "PT"), (11, "CET_U"), (12, "CET_S"))}
STATE |= {1 << bit: name for bit, name in ((14, "UINTR"), (15, "LBR"))}
STATE |= {1 << bit: name for bit, (name, _, _) in ssa.XSAVE_COMPONENTS.items()}
MISCSELECT = {ssa.MISC_EXINFO: "EXINFO", ssa.MISC_CPINFO: "CPINFO"}
CET = {
    1 << bit: name
    for bit, name in enumerate(["SH_STK_EN", "WR_SHSTK_EN", "ENDBR_EN", "LEG_IW_EN", "NO_TRACK_EN", "SUPPRESS_DIS"])
}
TCS = {1 << 0: "DBGOPTIN", 1 << 1: "AEXNOTIFY"}
SECINFO = {
    paging.SECINFO_R: "R",
    paging.SECINFO_W: "W",
    paging.SECINFO_X: "X",
    paging.SECINFO_PENDING: "PENDING",
    paging.SECINFO_MODIFIED: "MODIFIED",
    paging.SECINFO_PR: "PR",
}
RDINFO_STATUS = {paging.RDINFO_CHILDPRESENT: "CHILDPRESENT", paging.RDINFO_VIRTCHILDPRESENT: "VIRTCHILDPRESENT"}
TD_ATTRIBUTES = {
    tdx.TD_DEBUG: "DEBUG",
    tdx.TD_SEPT_VE_DISABLE: "SEPT_VE_DISABLE",
    tdx.TD_MIGRATABLE: "MIGRATABLE",
    tdx.TD_PKS: "PKS",
    tdx.TD_KL: "KL",
    tdx.TD_PERFMON: "PERFMON",
}
KEY_NAMES = {
    keys.KEY_EINITTOKEN: "EINITTOKEN_KEY",
    keys.KEY_PROVISION: "PROVISION_KEY",
    keys.KEY_PROVISION_SEAL: "PROVISION_SEAL_KEY",
    keys.KEY_REPORT: "REPORT_KEY",
    keys.KEY_SEAL: "SEAL_KEY",
}
KEY_POLICY = {
    keys.POLICY_MRENCLAVE: "MRENCLAVE",
    keys.POLICY_MRSIGNER: "MRSIGNER",
    keys.POLICY_NOISVPRODID: "NOISVPRODID",
    keys.POLICY_CONFIGID: "CONFIGID",
    keys.POLICY_ISVFAMILYID: "ISVFAMILYID",
    keys.POLICY_ISVEXTPRODID: "ISVEXTPRODID",
}
BODY_TYPES = {quote.BODY_SGX: "SGX enclave report", quote.BODY_TD10: "TD report 1.0", quote.BODY_TD15: "TD report 1.5"}
EXIT_TYPES = {ssa.EXIT_HARDWARE: "hardware exception", ssa.EXIT_SOFTWARE: "software exception"}


def bits(value: int, names: Mapping[int, str]) -> str:
    """The names of the bits that are set, and a number for those without one."""
    found = [name for bit, name in sorted(names.items()) if value & bit]
    unknown = value & ~sum(names)
    if unknown:
        found.append(f"unknown {unknown:#x}")
    return " ".join(found) or "none"


def page_flags(value: int, extra: Mapping[int, str] | None = None) -> str:
    """SECINFO.FLAGS: page type, permissions and state."""
    kind = value & paging.SECINFO_PT
    rest = value & ~paging.SECINFO_PT
    name = paging.PAGE_TYPES.get(kind, f"unknown page type {kind >> 8}")
    return f"{name} {bits(rest, {**SECINFO, **(extra or {})})}"


def _attributes(value: bytes) -> str:
    parsed = structs.Attributes.from_bytes(value)
    return f"{bits(parsed.flags, ATTRIBUTES)}; XFRM {bits(parsed.xfrm, STATE)}"


def _mask(value: bytes) -> str:
    parsed = structs.Attributes.from_bytes(value)
    return f"flags {parsed.flags:#x}, XFRM {parsed.xfrm:#x}"


def _exit_info(value: int) -> str:
    try:
        info = ssa.ExitInfo.from_int(value)
    except structs.StructureError as error:
        return error.message
    if not info.valid:
        return "no exception"
    vector = ssa.EXIT_VECTORS.get(info.vector, "unknown")
    return f"vector {info.vector} ({vector}), {EXIT_TYPES.get(info.exit_type, f'unknown type {info.exit_type}')}"


def _bcd_date(value: int) -> str:
    text = f"{value:08x}"
    return f"{text[:4]}-{text[4:6]}-{text[6:]}"


def _of(names: Mapping[int, str]) -> Callable[[int], str]:
    return lambda value: names.get(value, f"unknown {value}")


def _flags(names: Mapping[int, str]) -> Callable[[int], str]:
    return lambda value: bits(value, names)


#: By field name.
_FIELDS: dict[str, Callable[[Any], str]] = {
    "aexnotify": _flags({1: "AEXNOTIFY"}),
    "attestation_key_type": _of(quote.ATTESTATION_KEY_TYPES),
    "attribute_mask": _mask,
    "attributes": _attributes,
    "cet_attributes": _flags(CET),
    "cet_attributes_mask": _flags(CET),
    "cet_masked_attributes_le": _flags(CET),
    "exitinfo": _exit_info,
    "key_name": _of(KEY_NAMES),
    "key_policy": _flags(KEY_POLICY),
    "masked_attributes_le": _attributes,
    "masked_miscselect_le": _flags(MISCSELECT),
    "misc_mask": lambda value: f"{value:#010x}",
    "miscselect": _flags(MISCSELECT),
    "modulus": lambda value: f"MRSIGNER {hashlib.sha256(value).hexdigest()}",
    "qe_vendor_id": lambda value: "Intel" if value == quote.QE_VENDOR_INTEL else "unknown",
    "tee_type": _of(quote.TEE_TYPES),
    "xfam": _flags(STATE),
}
#: By structure and field name, where the name alone does not tell.
_OF_STRUCTURE: dict[tuple[str, str], Callable[[Any], str]] = {
    ("attributes", "flags"): _flags(ATTRIBUTES),
    ("attributes", "xfrm"): _flags(STATE),
    ("einittoken", "valid"): _flags({launch.EINITTOKEN_VALID: "VALID"}),
    ("pcmd", "flags"): page_flags,
    ("rdinfo", "flags"): lambda value: page_flags(value, {paging.RDINFO_BLOCKED: "BLOCKED"}),
    ("rdinfo", "status"): _flags(RDINFO_STATUS),
    ("reportmacstruct", "type"): _of({tdx.REPORT_TYPE_TDX: "TDX", 0: "SGX"}),
    ("secinfo", "flags"): page_flags,
    ("secs", "base"): hex,
    ("secs", "size"): lambda value: f"{value:#x} bytes",
    ("secs", "ssa_frame_size"): lambda value: f"{value} pages",
    ("sigstruct", "date"): _bcd_date,
    ("sigstruct", "enclave_hash"): lambda value: "MRENCLAVE",
    ("sigstruct", "vendor"): lambda value: {0: "not Intel", 0x8086: "Intel"}.get(value, "unknown"),
    ("tcs", "flags"): _flags(TCS),
    ("tdinfo", "attributes"): _flags(TD_ATTRIBUTES),
    ("tdreport10", "td_attributes"): _flags(TD_ATTRIBUTES),
    ("tdreport15", "td_attributes"): _flags(TD_ATTRIBUTES),
    ("teetcbinfo", "attributes"): hex,
    ("teetcbinfo", "valid"): lambda value: (
        "fields at offsets " + ", ".join(str(8 * bit) for bit in range(64) if value >> bit & 1)
    ),
}
#: Fields that hold addresses, offsets or register contents.
_HEXADECIMAL = {"pageinfo", "gprsgx", "exinfo", "tcs"}
_DECIMAL = {"cssa", "nssa"}


def meaning(structure: str, field: str, value: int | bytes) -> str:
    """A field's value in words; numbers at least in decimal, byte strings that are all zero as such."""
    known = _OF_STRUCTURE.get((structure, field)) or _FIELDS.get(field)
    if known is not None:
        return known(value)
    if isinstance(value, bytes):
        return "" if any(value) else "zero"
    return hex(value) if structure in _HEXADECIMAL and field not in _DECIMAL else str(value)


def pck_meaning(field: str, value: object) -> str:
    """The same for a field of :class:`inclavare.sgx.pck.PckExtension`."""
    if field == "sgx_type":
        return pck.SGX_TYPES[value]  # type: ignore[index]
    if isinstance(value, bytes):
        return ""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
