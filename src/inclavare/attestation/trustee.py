"""Claims in the names and encodings of Confidential Containers' Trustee, so that policies written for it mean the same.

What Trustee takes from a quote's bytes is taken from the signed bytes here, too: numbers are little-endian hexadecimal.
"""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from ..sgx.quote import HEADER_SIZE, TEE_SGX, VERSION_5, QuoteHeader
from ..sgx.structs import ReportBody
from .claims import Claims

_TD_FIELDS = frozenset(
    {
        "mr_td",
        "mr_config_id",
        "mr_owner",
        "mr_owner_config",
        "mr_seam",
        "mrsigner_seam",
        "seam_attributes",
        "td_attributes",
        "xfam",
        "tcb_svn",
        "rtmr_0",
        "rtmr_1",
        "rtmr_2",
        "rtmr_3",
        "tee_tcb_svn2",
        "mr_servicetd",
    }
)
_SGX_BODY = {
    "cpusvn": "cpu_svn",
    "miscselect": "misc_select",
    "mrenclave": "mr_enclave",
    "mrsigner": "mr_signer",
}
#: What Trustee names of the reserved bytes: name, offset and size.
_SGX_RESERVED = (("reserved1", 20, 12), ("reserved2", 96, 32), ("reserved3", 160, 32), ("reserved4", 262, 42))
_SNP_LEFT_OUT = frozenset({"reported_tcb", "committed_tcb", "current_tcb", "launch_tcb", "host_data"})


def claims_map(claims: Claims) -> dict[str, Any]:
    """``{"sgx" | "tdx" | "snp": …}``: what a policy finds under ``input``.

    Simulated TEEs have the same names, and ``simulated``; whoever uses this has decided about them before.
    """
    made = {"sgx": _sgx, "tdx": _tdx, "snp": _snp}[claims.family](claims)
    return {claims.family: {**made, **_rated(claims)}}


def _rated(claims: Claims) -> dict[str, Any]:
    found: dict[str, Any] = {"simulated": claims.simulated, "debug": claims.debug, "report_data": claims.report_data}
    if claims.family != "snp":
        found |= {
            "tcb_status": claims.tcb_status,
            "tcb_date": claims.tcb_date,
            "advisory_ids": list(claims.advisories),
            "tcb_eval_num": claims.tcb_evaluation_number,
            "collateral_expiration_status": "0",
        }
        numbers = {endorsement.name: endorsement.number for endorsement in claims.endorsements}
        found |= {f"{name}_num": numbers[name] for name in ("pck_crl", "root_ca_crl") if numbers.get(name) is not None}
        if claims.platform_instance_id is not None:
            found["platform_instance_id"] = claims.platform_instance_id
    found["earliest_issue_date"] = _iso(claims.collateral_issued)
    found["earliest_expiration_date"] = _iso(claims.collateral_expires)
    return found


def _tdx(claims: Claims) -> dict[str, Any]:
    domain = claims.tdx
    assert domain is not None
    body = {name: value for name in _TD_FIELDS if (value := getattr(domain, name)) is not None}
    quote: dict[str, Any] = {"header": _header(claims.signed), "body": {**body, "report_data": claims.report_data}}
    if QuoteHeader.from_bytes(claims.signed[:HEADER_SIZE]).version >= VERSION_5:
        quote |= {"type": claims.signed[48:50].hex(), "size": claims.signed[50:54].hex()}
    made: dict[str, Any] = {
        "quote": quote,
        "init_data": domain.mr_config_id,
        "td_attributes": {
            "debug": bool(int.from_bytes(bytes.fromhex(domain.td_attributes), "little") & 1),
            "key_locker": domain.key_locker,
            "perfmon": domain.perfmon,
            "protection_keys": domain.protection_keys,
            "septve_disable": domain.septve_disable,
        },
    }
    if domain.event_log is not None:
        made["uefi_event_logs"] = list(domain.event_log)
    return made


def _sgx(claims: Claims) -> dict[str, Any]:
    start = len(claims.signed) - ReportBody.LAYOUT.size
    raw, layout = claims.signed[start:], ReportBody.LAYOUT
    body = {
        _SGX_BODY.get(name, name): raw[layout.offsets[name] : layout.offsets[name] + layout.sizes[name]].hex()
        for name in layout.names
        if name not in ("attributes", "cet_attributes")
    }
    body |= {name: raw[at : at + size].hex() for name, at, size in _SGX_RESERVED}
    body |= {"attributes.flags": claims.attributes, "attributes.xfrm": claims.xfrm}
    return {"header": _header(claims.signed), "body": body, "init_data": claims.config_id}


def _snp(claims: Claims) -> dict[str, Any]:
    guest = claims.snp
    assert guest is not None
    made = {name: value for name, value in asdict(guest).items() if name not in _SNP_LEFT_OUT}
    made["init_data"] = guest.host_data
    for name in ("reported", "committed", "current", "launch"):
        tcb = asdict(getattr(guest, f"{name}_tcb"))
        made |= {f"{name}_tcb_{part}": value for part, value in tcb.items() if value is not None}
    return made


def _header(signed: bytes) -> dict[str, Any]:
    named = {"version": signed[:2], "att_key_type": signed[2:4], "vendor_id": signed[12:28], "user_data": signed[28:48]}
    if QuoteHeader.from_bytes(signed[:HEADER_SIZE]).tee_type == TEE_SGX:
        named |= {"att_key_data_0": signed[4:8], "qe_svn": signed[8:10], "pce_svn": signed[10:12]}
    else:
        named |= {"tee_type": signed[4:8], "reserved": signed[8:12]}
    return {name: value.hex() for name, value in named.items()}


def _iso(moment: int) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
