"""Claims of each family of TEEs, as a verifier would give them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from inclavare.attestation import Claims
from inclavare.attestation.claims import NOT_RATED, SnpClaims, SnpTcb, TdxClaims
from inclavare.sgx.quote import TEE_SGX, TEE_TDX, VERSION_3, VERSION_4, QuoteHeader
from inclavare.sgx.structs import ReportBody

NOW = 2000


def _header(tee_type: int, version: int) -> bytes:
    header = bytearray(48)
    header[0:2] = version.to_bytes(2, "little")
    header[2:4] = (2).to_bytes(2, "little")
    header[4:8] = tee_type.to_bytes(4, "little")
    header[12:28] = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
    assert QuoteHeader.from_bytes(bytes(header)).version == version
    return bytes(header)


def sgx(**fields: Any) -> Claims:
    body = bytearray(ReportBody.LAYOUT.size)
    made = Claims(
        tee="sgx",
        simulated=False,
        debug=False,
        report_data="dd" * 64,
        tcb_status="UpToDate",
        advisories=(),
        tcb_date="2025-01-01T00:00:00Z",
        root_fingerprint="ee" * 32,
        collateral_issued=1000,
        collateral_expires=9000,
        verified_at=NOW,
        mrenclave="aa" * 32,
        mrsigner="bb" * 32,
        isv_prod_id=7,
        isv_svn=3,
        attributes="0500000000000000",
        xfrm="0300000000000000",
        config_id="00" * 64,
        cpusvn="02" * 16,
        fmspc="00a067110000",
        pce_svn=13,
        tcb_evaluation_number=17,
    )
    made = replace(made, **fields)
    offsets = ReportBody.LAYOUT.offsets
    body[offsets["mrenclave"] : offsets["mrenclave"] + 32] = bytes.fromhex(made.mrenclave)
    body[offsets["mrsigner"] : offsets["mrsigner"] + 32] = bytes.fromhex(made.mrsigner)
    return replace(made, signed=_header(TEE_SGX, VERSION_3) + bytes(body))


def tdx(*, domain: dict[str, Any] | None = None, **fields: Any) -> Claims:
    own = TdxClaims(
        mr_td="a1" * 48,
        mr_config_id="00" * 48,
        mr_owner="00" * 48,
        mr_owner_config="00" * 48,
        mr_seam="a2" * 48,
        mrsigner_seam="00" * 48,
        seam_attributes="00" * 8,
        td_attributes="0000001000000000",
        xfam="e702060000000000",
        tcb_svn="05" * 16,
        rtmr_0="b0" * 48,
        rtmr_1="b1" * 48,
        rtmr_2="b2" * 48,
        rtmr_3="00" * 48,
        septve_disable=True,
        migratable=False,
        protection_keys=False,
        key_locker=False,
        perfmon=False,
        tee_tcb_svn2=None,
        mr_servicetd=None,
        module_version=1,
        module_svn=5,
        module_status=None,
        module_date=None,
    )
    made = sgx(mrenclave="00" * 32, mrsigner="00" * 32)
    made = replace(made, tee="tdx", mrenclave="", mrsigner="", isv_prod_id=0, isv_svn=0, config_id="", attributes="")
    made = replace(made, signed=_header(TEE_TDX, VERSION_4) + bytes(584), tdx=replace(own, **(domain or {})))
    return replace(made, **fields)


def snp(*, guest: dict[str, Any] | None = None, **fields: Any) -> Claims:
    tcb = SnpTcb(4, 0, 24, 219)
    own = SnpClaims(
        version=3,
        processor="Milan",
        signing_key="vcek",
        vmpl=0,
        guest_svn=2,
        measurement="c1" * 48,
        host_data="00" * 32,
        id_key_digest="00" * 48,
        author_key_digest="00" * 48,
        report_id="01" * 32,
        report_id_ma="ff" * 32,
        chip_id="02" * 64,
        family_id="00" * 16,
        image_id="00" * 16,
        policy="0000000000030000",
        policy_abi_major=0,
        policy_abi_minor=0,
        policy_smt_allowed=True,
        policy_migrate_ma=False,
        policy_debug_allowed=False,
        policy_single_socket=False,
        reported_tcb=tcb,
        committed_tcb=tcb,
        current_tcb=tcb,
        launch_tcb=tcb,
        current_version="1.55.21",
        committed_version="1.55.21",
        platform_info="0000000000000001",
        platform_smt_enabled=True,
        platform_tsme_enabled=False,
    )
    made = replace(tdx(), tee="snp", tdx=None, snp=replace(own, **(guest or {})), tcb_status=NOT_RATED, tcb_date="")
    return replace(made, **fields)
