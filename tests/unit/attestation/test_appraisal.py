"""Appraisal: each policy key refuses what it should, all failures are listed, and nothing is allowed by default."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import made_claims
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inclavare.attestation import Claims, Policy, appraise
from inclavare.attestation.claims import SnpTcb
from inclavare.attestation.policy import TCB_STATUSES, SnpPolicy, TdxPolicy
from inclavare.attestation.trust import Tier
from inclavare.errors import AppraisalError

CLAIMS = Claims(
    tee="sgx",
    simulated=False,
    mrenclave="aa" * 32,
    mrsigner="bb" * 32,
    isv_prod_id=7,
    isv_svn=3,
    debug=False,
    attributes="0500000000000000",
    xfrm="0300000000000000",
    miscselect=0,
    cpusvn="02" * 16,
    config_id="00" * 64,
    report_data="dd" * 64,
    tcb_status="UpToDate",
    advisories=(),
    tcb_date="2025-01-01T00:00:00Z",
    tcb_evaluation_number=17,
    fmspc="00a067110000",
    pce_svn=13,
    root_fingerprint="ee" * 32,
    collateral_issued=1000,
    collateral_expires=9000,
    verified_at=2000,
)
POLICY = Policy(mrenclave=("aa" * 32,))


def test_accepted() -> None:
    result = appraise(CLAIMS, POLICY, expected_report_data=b"\xdd" * 64)
    assert result.accepted and result.require() is CLAIMS


@pytest.mark.parametrize(
    ("id", "claims", "policy"),
    [
        ("policy.simulated", {"simulated": True}, {}),
        ("policy.debug", {"debug": True}, {}),
        ("policy.identity", {}, {"mrenclave": ()}),
        ("policy.mrenclave", {"mrenclave": "ab" * 32}, {}),
        ("policy.mrsigner", {}, {"mrsigner": ("bc" * 32,)}),
        ("policy.isv_prod_id", {}, {"isv_prod_id": 8}),
        ("policy.min_isv_svn", {}, {"min_isv_svn": 4}),
        ("policy.tcb", {"tcb_status": "OutOfDate"}, {}),
        ("policy.max_age", {}, {"max_age": 999}),
    ],
)
def test_each_key_refuses(id: str, claims: dict[str, object], policy: dict[str, object]) -> None:
    result = appraise(replace(CLAIMS, **claims), replace(POLICY, **policy))  # type: ignore[arg-type]
    assert [failure.id for failure in result.failures] == [id]
    assert not result.accepted
    failure = result.failures[0]
    assert failure.found and failure.expected and failure.remedy and failure.found != failure.expected


@pytest.mark.parametrize(
    ("claims", "policy"),
    [
        ({"simulated": True}, {"allow_simulated": True}),
        ({"debug": True}, {"allow_debug": True}),
        ({}, {"mrenclave": (), "mrsigner": ("bb" * 32,)}),
        ({}, {"mrenclave": (), "any_enclave": True}),
        ({}, {"mrenclave": ("00" * 32, "aa" * 32)}),
        ({}, {"isv_prod_id": 7, "min_isv_svn": 3, "max_age": 1000}),
        ({"tcb_status": "SWHardeningNeeded"}, {"tcb": ("UpToDate", "SWHardeningNeeded")}),
    ],
)
def test_each_key_allows(claims: dict[str, object], policy: dict[str, object]) -> None:
    assert appraise(replace(CLAIMS, **claims), replace(POLICY, **policy)).accepted  # type: ignore[arg-type]


def test_both_measurement_and_signer_must_fit() -> None:
    assert not appraise(CLAIMS, replace(POLICY, mrsigner=("cc" * 32,))).accepted


def test_report_data() -> None:
    result = appraise(CLAIMS, POLICY, expected_report_data=bytes(64))
    assert [failure.id for failure in result.failures] == ["binding.report_data"]


def test_all_failures_are_listed_and_the_first_is_raised() -> None:
    result = appraise(replace(CLAIMS, simulated=True, debug=True, isv_svn=0), replace(POLICY, min_isv_svn=1))
    assert [failure.id for failure in result.failures] == ["policy.simulated", "policy.debug", "policy.min_isv_svn"]
    with pytest.raises(AppraisalError) as caught:
        result.require()
    assert caught.value.id == "policy.simulated" and "policy.min_isv_svn" in caught.value.message
    assert [failure["id"] for failure in result.to_dict()["failures"]][1] == "policy.debug"


TDX_POLICY = Policy(tdx=TdxPolicy((("mr_td", ("a1" * 48,)), ("rtmr_1", ("b1" * 48,)))))
SNP_POLICY = Policy(snp=SnpPolicy((("measurement", ("c1" * 48,)),), min_tcb=SnpTcb(4, 0, 24, 219)))


def refused(claims: Claims, policy: Policy) -> list[str]:
    result = appraise(claims, policy)
    assert result.accepted is not bool(result.failures)
    assert result.accepted or result.trust.tier > Tier.AFFIRMING
    for failure in result.failures:
        assert failure.found and failure.expected and failure.remedy and failure.found != failure.expected
    return [failure.id for failure in result.failures]


@pytest.mark.parametrize(
    ("id", "domain", "fields", "policy"),
    [
        (None, {}, {}, {}),
        ("policy.tdx.mr_td", {"mr_td": "a0" * 48}, {}, {}),
        ("policy.tdx.rtmr_1", {"rtmr_1": "b0" * 48}, {}, {}),
        ("policy.tdx.migratable", {"migratable": True}, {}, {}),
        ("policy.debug", {}, {"debug": True}, {}),
        ("policy.tcb", {}, {"tcb_status": "TDRelaunchAdvised"}, {}),
        ("policy.simulated", {}, {"tee": "tdx-sim", "simulated": True}, {}),
        ("policy.identity", {}, {}, {"tdx": TdxPolicy()}),
        ("policy.identity", {}, {}, {"tdx": TdxPolicy((("rtmr_1", ("b1" * 48,)),))}),
        ("policy.identity", {}, {}, {"tdx": TdxPolicy(), "mrenclave": ("aa" * 32,)}),
        (None, {"migratable": True}, {}, {"tdx": replace(TDX_POLICY.tdx, allow_migratable=True)}),
        (None, {}, {}, {"tdx": TdxPolicy(), "any_enclave": True}),
        (None, {}, {"tcb_status": "TDRelaunchAdvised"}, {"tcb": ("TDRelaunchAdvised",)}),
    ],
)
def test_trust_domains(id: str | None, domain: dict[str, Any], fields: dict[str, Any], policy: dict[str, Any]) -> None:
    claims = made_claims.tdx(domain=domain, **fields)
    assert refused(claims, replace(TDX_POLICY, **policy)) == ([] if id is None else [id])


@pytest.mark.parametrize(
    ("id", "guest", "fields", "policy"),
    [
        (None, {}, {}, {}),
        ("policy.snp.measurement", {"measurement": "c0" * 48}, {}, {}),
        (
            "policy.snp.host_data",
            {"host_data": "01" * 32},
            {},
            {"values": (("measurement", ("c1" * 48,)), ("host_data", ("02" * 32,)))},
        ),
        ("policy.snp.migrate_ma", {"policy_migrate_ma": True}, {}, {}),
        ("policy.snp.vmpl", {"vmpl": 1}, {}, {}),
        ("policy.snp.vmpl", {"vmpl": 0xFFFFFFFF}, {}, {}),
        ("policy.snp.min_guest_svn", {}, {}, {"min_guest_svn": 3}),
        ("policy.snp.smt", {}, {}, {"allow_smt": False}),
        ("policy.snp.min_tcb", {"reported_tcb": SnpTcb(4, 0, 23, 219)}, {}, {}),
        ("policy.snp.min_tcb", {}, {}, {"min_tcb": SnpTcb(4, 0, 24, 219, 1)}),
        ("policy.tcb", {}, {}, {"min_tcb": None}),
        ("policy.debug", {}, {"debug": True}, {}),
        ("policy.identity", {}, {}, {"values": (("host_data", ("00" * 32,)),)}),
        (None, {"policy_migrate_ma": True, "vmpl": 1}, {}, {"allow_migrate_ma": True, "vmpl": (0, 1)}),
        (None, {}, {}, {"values": (("id_key_digest", ("00" * 48,)),)}),
    ],
)
def test_sev_snp(id: str | None, guest: dict[str, Any], fields: dict[str, Any], policy: dict[str, Any]) -> None:
    claims = made_claims.snp(guest=guest, **fields)
    changed = replace(SNP_POLICY, snp=replace(SNP_POLICY.snp, **policy))
    assert refused(claims, changed) == ([] if id is None else [id])


def test_amds_tcb_without_levels_is_explained() -> None:
    failure = appraise(made_claims.snp(), replace(SNP_POLICY, snp=replace(SNP_POLICY.snp, min_tcb=None))).failures[0]
    assert failure.found == "NotRated" and "min_tcb in [snp]" in failure.remedy
    assert not refused(
        made_claims.snp(), replace(SNP_POLICY, tcb=("NotRated",), snp=replace(SNP_POLICY.snp, min_tcb=None))
    )


def test_one_policy_for_every_family() -> None:
    policy = replace(POLICY, tdx=TDX_POLICY.tdx, snp=SNP_POLICY.snp)
    for claims in (CLAIMS, made_claims.tdx(), made_claims.snp()):
        assert refused(claims, policy) == []


def test_a_policy_for_one_family_refuses_the_others() -> None:
    for claims, policy in (
        (CLAIMS, TDX_POLICY),
        (CLAIMS, SNP_POLICY),
        (made_claims.tdx(), POLICY),
        (made_claims.tdx(), SNP_POLICY),
        (made_claims.snp(), replace(POLICY, tcb=("NotRated",))),
        (made_claims.snp(), replace(TDX_POLICY, tcb=("NotRated",))),
    ):
        assert refused(claims, policy) == ["policy.identity"]


@pytest.mark.parametrize(
    ("claims", "policy", "expected"),
    [
        ({}, {}, {"executables": 3, "hardware": 2, "configuration": 3, "runtime_opaque": 2, "instance_identity": 2}),
        ({}, {"mrenclave": (), "any_enclave": True}, {"executables": 33}),
        ({"mrenclave": "01" * 32}, {}, {"executables": 33}),
        (
            {"simulated": True},
            {"allow_simulated": True},
            {"hardware": 32, "runtime_opaque": 32, "instance_identity": 0},
        ),
        ({"simulated": True}, {}, {"hardware": 97, "runtime_opaque": 96}),
        ({"debug": True}, {"allow_debug": True}, {"configuration": 32, "runtime_opaque": 32}),
        ({"debug": True}, {}, {"configuration": 96, "runtime_opaque": 96}),
        ({"tcb_status": "OutOfDate"}, {"tcb": ("OutOfDate",)}, {"hardware": 32}),
        ({"tcb_status": "OutOfDate"}, {}, {"hardware": 96}),
        ({"isv_svn": 1}, {"min_isv_svn": 2}, {"executables": 32}),
        ({}, {"max_age": 1}, {"hardware": 32}),
    ],
)
def test_trustworthiness_vector(claims: dict[str, Any], policy: dict[str, Any], expected: dict[str, int]) -> None:
    result = appraise(replace(CLAIMS, **claims), replace(POLICY, **policy))
    assert {name: getattr(result.trust, name) for name in expected} == expected
    affirming = not claims and policy.get("any_enclave") is None and "max_age" not in policy
    assert (result.trust.tier is Tier.AFFIRMING) is affirming


def test_bindings_make_the_instance_unrecognized() -> None:
    result = appraise(CLAIMS, POLICY, expected_report_data=bytes(64))
    assert result.trust.instance_identity == 97 and result.trust.tier is Tier.CONTRAINDICATED
    assert result.refuse(()) is result


_VALUES = st.fixed_dictionaries(
    {
        "simulated": st.booleans(),
        "debug": st.booleans(),
        "tcb_status": st.sampled_from(TCB_STATUSES),
        "mrenclave": st.sampled_from(["aa" * 32, "01" * 32]),
        "isv_svn": st.integers(0, 5),
    }
)
_POLICIES = st.fixed_dictionaries(
    {
        "allow_simulated": st.booleans(),
        "allow_debug": st.booleans(),
        "tcb": st.lists(st.sampled_from(TCB_STATUSES), min_size=1).map(tuple),
        "any_enclave": st.booleans(),
        "min_isv_svn": st.integers(0, 5),
        "mrenclave": st.sampled_from([(), ("aa" * 32,)]),
    }
)


@given(_VALUES, _POLICIES)
def test_affirming_means_accepted_on_good_hardware(claims: dict[str, Any], policy: dict[str, Any]) -> None:
    made = replace(CLAIMS, **claims)
    result = appraise(made, Policy(**policy))
    if not result.accepted:
        assert result.trust.tier > Tier.AFFIRMING
    if result.trust.tier is Tier.AFFIRMING:
        assert result.accepted and not made.simulated and not made.debug and made.tcb_status == "UpToDate"
        assert policy["mrenclave"] == (made.mrenclave,)
