"""Claims under Trustee's names, beside what Trustee itself derives from real quotes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from attested import Attested

from inclavare.attestation import Evidence, Policy, verify
from inclavare.attestation.claims import Claims
from inclavare.attestation.trustee import claims_map
from inclavare.attestation.verifiers.dcap import _domain_claims
from inclavare.sgx.quote import Quote


def claims_of(quote: Quote) -> Claims:
    """Of a trust domain's quote that is not verified: its collateral is not among the vectors."""
    body = quote.td_report()
    return Claims(
        tee="tdx",
        simulated=False,
        debug=body.debug,
        report_data=body.report_data.hex(),
        tcb_status="UpToDate",
        advisories=(),
        tcb_date="2024-03-13T00:00:00Z",
        root_fingerprint="00" * 32,
        collateral_issued=0,
        collateral_expires=1,
        verified_at=0,
        tdx=_domain_claims(body, None),
        signed=quote.signed_bytes(),
    )


def test_a_trust_domain_as_trustee_sees_it(vectors: Path) -> None:
    expected = json.loads((vectors / "tdx" / "trustee_parse_tdx_claims_expected.json").read_text())
    quote = Quote.from_bytes((vectors / "tdx" / "trustee_tdx_quote_4.dat").read_bytes())
    found = claims_map(claims_of(quote))["tdx"]
    assert found["quote"] == expected["quote"]
    for name in ("init_data", "report_data", "td_attributes"):
        assert found[name] == expected[name]


def test_version_5_has_type_and_size(vectors: Path) -> None:
    raw = (vectors / "tdx" / "gotdx_quote_v5_sample.dat").read_bytes()
    found = claims_map(claims_of(Quote.split(raw)[0]))["tdx"]["quote"]
    assert (found["type"], found["size"], found["header"]["version"]) == ("0300", "88020000", "0500")
    assert len(found["body"]["tee_tcb_svn2"]) == 32 and found["body"]["mr_servicetd"] == "00" * 48


def test_an_enclave(attested: Attested, vectors: Path) -> None:
    found = claims_map(verify(attested.evidence, attested.policy, now=attested.now).claims)["sgx"]
    assert found["simulated"] is True and found["tcb_status"] == "UpToDate"
    collateral = json.loads((vectors / "collateral" / "phala_sgx_quote_collateral.json").read_bytes())
    raw = (vectors / "sgx" / "phala_sgx_quote.bin").read_bytes()
    evidence = Evidence.from_quote(raw, collateral)
    claims = verify(evidence, Policy(any_enclave=True), now=1751624924).claims
    found = claims_map(claims)["sgx"]
    assert found["header"]["version"] == "0300" and found["header"]["pce_svn"] == raw[10:12].hex()
    assert found["body"]["mr_enclave"] == claims.mrenclave and found["body"]["isv_prod_id"] == "0000"
    assert found["body"]["attributes.flags"] == "0500000000000000"
    assert found["advisory_ids"] == ["INTEL-SA-00289", "INTEL-SA-00615"] and found["tcb_eval_num"] == 17
    # Every byte of the body is in it once; CET_ATTRIBUTES and what follows are one reserved field for Trustee.
    assert sum(len(value) // 2 for value in found["body"].values()) == 384


@pytest.mark.parametrize("family", ["sgx"])
def test_all_of_it_is_json(attested: Attested, family: str) -> None:
    found: dict[str, Any] = claims_map(verify(attested.evidence, attested.policy, now=attested.now).claims)
    assert set(json.loads(json.dumps(found))) == {family}
