"""TD reports: the two quote bodies, and TDREPORT_STRUCT whose parts must be those that its MAC structure names."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from quotes import real
from structures import fill

from inclavare.sgx import tdx
from inclavare.sgx.quote import Quote
from inclavare.sgx.structs import StructureError


@st.composite
def reports(draw: st.DrawFn) -> tdx.TdReport:
    data = draw(st.data())
    tcb, td = fill(tdx.TeeTcbInfo, data), fill(tdx.TdInfo, data)
    mac = replace(
        tdx.ReportMacStruct.from_bytes(fill(tdx.ReportMacStruct, data)),
        type=tdx.REPORT_TYPE_TDX,
        subtype=0,
        tee_tcb_info_hash=hashlib.sha384(tcb).digest(),
        tee_info_hash=hashlib.sha384(td).digest(),
    )
    return tdx.TdReport(mac.to_bytes(), tcb, td)


@given(reports())
def test_body_of_a_report(report: tdx.TdReport) -> None:
    """A quote's body has the report's fields, at the places that appendix 3 gives."""
    mac, tcb, td = report.parts()
    body = report.body()
    raw = body.to_bytes()
    assert tdx.TdReport15.from_bytes(raw) == body
    assert raw[:120] == report.tee_tcb_info[8:128]
    assert raw[120:520] == report.td_info[:400]
    assert raw[520:584] == mac.report_data
    assert raw[584:600] == tcb.tee_tcb_svn2
    assert raw[600:] == td.mr_service_td
    assert tdx.TdReport10.from_bytes(raw[:584]).rtmr3 == td.rtmr3


@given(reports(), st.data())
def test_parts_must_be_those_of_the_mac_structure(report: tdx.TdReport, data: st.DataObject) -> None:
    raw = bytearray(report.to_bytes())
    at = data.draw(st.sampled_from([*range(256, 495), *range(512, 1024), *range(32, 128)]))
    raw[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(StructureError) as caught:
        tdx.TdReport.from_bytes(bytes(raw)).parts()
    assert caught.value.id == "sgx.tdreport.hash"


@pytest.mark.parametrize("change", [{"type": 0}, {"type": 0x80}, {"subtype": 1}])
@given(reports())
def test_report_type(change: dict[str, int], report: tdx.TdReport) -> None:
    mac = replace(tdx.ReportMacStruct.from_bytes(report.report_mac_struct), **change)  # type: ignore[arg-type]
    with pytest.raises(StructureError) as caught:
        replace(report, report_mac_struct=mac.to_bytes()).body()
    assert caught.value.id == "sgx.tdreport.type"


def test_debug(vectors: Path) -> None:
    report = Quote.from_bytes(real(vectors, "tdx/oe_tdx_quote.bin")).td_report()
    assert not replace(report, td_attributes=0).debug
    assert replace(report, td_attributes=tdx.TD_DEBUG).debug


def test_agrees_with_trustee(vectors: Path) -> None:
    """Trustee's claims of a quote of its own, field by field."""
    claims = json.loads((vectors / "tdx" / "trustee_parse_tdx_claims_expected.json").read_bytes())["quote"]["body"]
    report = Quote.split(real(vectors, "tdx/trustee_tdx_quote_4.dat"))[0].td_report()
    for ours, theirs in (
        ("mr_seam", "mr_seam"),
        ("mr_signer_seam", "mrsigner_seam"),
        ("mr_td", "mr_td"),
        ("mr_config_id", "mr_config_id"),
        ("mr_owner", "mr_owner"),
        ("mr_owner_config", "mr_owner_config"),
        ("rtmr0", "rtmr_0"),
        ("rtmr1", "rtmr_1"),
        ("rtmr2", "rtmr_2"),
        ("rtmr3", "rtmr_3"),
        ("report_data", "report_data"),
        ("tee_tcb_svn", "tcb_svn"),
    ):
        assert getattr(report, ours).hex() == claims[theirs], ours
    for ours, theirs in (("td_attributes", "td_attributes"), ("xfam", "xfam"), ("seam_attributes", "seam_attributes")):
        assert getattr(report, ours).to_bytes(8, "little").hex() == claims[theirs], ours
