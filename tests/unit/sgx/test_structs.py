"""Every structure round-trips byte for byte, and refuses reserved bytes, wrong lengths and wrong constants."""

from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structures import check_layout, check_reserved_bytes, check_round_trip, fill

from inclavare.sgx import launch, paging, ssa, structs, tdx
from inclavare.sgx.quote import QuoteHeader
from inclavare.sgx.structs import Structure

#: Bytes, as the SDM and Intel's quoting libraries give them.
SIZES: dict[type[Structure], int] = {
    structs.Attributes: 16,
    structs.SecInfo: 64,
    structs.Secs: 4096,
    structs.Tcs: 4096,
    structs.Sigstruct: 1808,
    structs.TargetInfo: 512,
    structs.ReportBody: 384,
    structs.Report: 432,
    structs.KeyRequest: 512,
    launch.EinitToken: 304,
    paging.PageInfo: 32,
    paging.Pcmd: 128,
    paging.VersionArray: 4096,
    paging.RdInfo: 24,
    ssa.GprSgx: 184,
    ssa.ExInfo: 16,
    QuoteHeader: 48,
    tdx.TdReport10: 584,
    tdx.TdReport15: 648,
    tdx.ReportMacStruct: 256,
    tdx.TeeTcbInfo: 239,
    tdx.TdInfo: 512,
    tdx.TdReport: 1024,
}
every = pytest.mark.parametrize("kind", SIZES, ids=lambda kind: kind.__name__)


@every
@given(data=st.data())
def test_round_trip(kind: type[Structure], data: st.DataObject) -> None:
    check_round_trip(kind, data)


@every
def test_size_is_the_architectures(kind: type[Structure]) -> None:
    assert kind.LAYOUT.size == SIZES[kind]


@every
def test_every_reserved_byte_is_checked(kind: type[Structure]) -> None:
    check_reserved_bytes(kind)


@every
def test_layout(kind: type[Structure]) -> None:
    check_layout(kind)
    assert tuple(entry.name for entry in fields(kind)) == kind.LAYOUT.names  # type: ignore[arg-type]


def test_short_byte_string_is_not_padded_silently() -> None:
    with pytest.raises(ValueError, match="mrenclave is 31 bytes"):
        structs.TargetInfo(mrenclave=bytes(31), attributes=bytes(16)).to_bytes()


def test_integer_out_of_range() -> None:
    with pytest.raises(ValueError, match="keyrequest"):
        structs.KeyRequest(key_name=1 << 16).to_bytes()


def test_attributes() -> None:
    production = structs.Attributes(structs.ATTRIBUTE_INIT, 0x7)
    debug = structs.Attributes(structs.ATTRIBUTE_INIT | structs.ATTRIBUTE_DEBUG, 0x7)
    assert (production.debug, debug.debug) == (False, True)
    assert debug.masked(structs.Attributes(structs.ATTRIBUTE_DEBUG, 0x3)) == structs.Attributes(2, 0x3)


@given(st.data())
def test_report_body_says_debug(data: st.DataObject) -> None:
    body = structs.ReportBody.from_bytes(fill(structs.ReportBody, data))
    assert body.debug == bool(body.attributes[0] & structs.ATTRIBUTE_DEBUG)


@given(st.data())
def test_signed_bytes_of_a_sigstruct(data: st.DataObject) -> None:
    """Header and body, as SDM table 38-21 marks them; neither key nor signature nor Q1 and Q2."""
    raw = fill(structs.Sigstruct, data)
    assert structs.Sigstruct.from_bytes(raw).signed_bytes() == raw[:128] + raw[900:1028]
