"""Appraisal: each policy key refuses what it should, all failures are listed, and nothing is allowed by default."""

from __future__ import annotations

from dataclasses import replace

import pytest

from inclavare.attestation import Claims, Policy, appraise
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
