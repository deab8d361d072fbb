"""Annotated rows: they cover every byte, say what flags and dates mean, and kinds are told apart or asked for."""

from __future__ import annotations

import base64
import datetime
import hashlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from cryptography import x509
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quotes import REAL, is_td, quotes, real
from structures import binary, fill
from test_pck import extensions

from inclavare.errors import EvidenceError, InclavareError, UsageError
from inclavare.sgx import der, describe_certificate, launch, meanings, paging, ssa, structs, tdx
from inclavare.sgx.certification import certificates
from inclavare.sgx.describe import KINDS, MAX_SIZE, describe, recognise
from inclavare.sgx.describe_certificate import certificate_rows, chain_rows, summary
from inclavare.sgx.pck import PckExtension
from inclavare.sgx.quote import Quote
from inclavare.sgx.rows import Row
from inclavare.sgx.structs import Structure, StructureError

STRUCTURES: dict[str, type[Structure]] = {
    "attributes": structs.Attributes,
    "exinfo": ssa.ExInfo,
    "rdinfo": paging.RdInfo,
    "pageinfo": paging.PageInfo,
    "secinfo": structs.SecInfo,
    "pcmd": paging.Pcmd,
    "gprsgx": ssa.GprSgx,
    "einittoken": launch.EinitToken,
    "report-body": structs.ReportBody,
    "report": structs.Report,
    "keyrequest": structs.KeyRequest,
    "targetinfo": structs.TargetInfo,
    "sigstruct": structs.Sigstruct,
    "secs": structs.Secs,
    "tcs": structs.Tcs,
    "va": paging.VersionArray,
    "teetcbinfo": tdx.TeeTcbInfo,
    "reportmacstruct": tdx.ReportMacStruct,
    "tdinfo": tdx.TdInfo,
    "tdreport10": tdx.TdReport10,
    "tdreport15": tdx.TdReport15,
}
ATTRIBUTES = structs.Attributes(structs.ATTRIBUTE_INIT | structs.ATTRIBUTE_MODE64BIT, 0x7).to_bytes()


def tiles(rows: list[Row], data: bytes) -> None:
    assert b"".join(row.value for row in rows) == data
    at = 0
    for row in rows:
        assert row.offset == at
        at += len(row.value)


def meaning(rows: list[Row], field: str) -> str:
    (found,) = (row.meaning for row in rows if row.field == field)
    return found


def test_every_kind_is_tested() -> None:
    assert set(STRUCTURES) | {"ssa", "tdreport", "quote", "certificate", "pck-extension"} == set(KINDS)


@pytest.mark.parametrize("name", STRUCTURES)
@settings(max_examples=20)
@given(data=st.data())
def test_structures_are_covered(name: str, data: st.DataObject) -> None:
    """Any content of the fields has a meaning; flags that nobody knows do not stop it."""
    raw = fill(STRUCTURES[name], data)
    if name == "report":
        raw = fill(structs.ReportBody, data) + raw[384:]
    found, rows = describe(raw, name)
    assert found == name
    tiles(rows, raw)
    assert {row.field.split(".")[-1] for row in rows} >= set(STRUCTURES[name].LAYOUT.names) - {"body"}


@given(st.data())
def test_td_report(data: st.DataObject) -> None:
    raw = fill(tdx.ReportMacStruct, data) + fill(tdx.TeeTcbInfo, data) + bytes(17) + fill(tdx.TdInfo, data)
    rows = describe(raw, "tdreport")[1]
    tiles(rows, raw)
    assert {"report_mac_struct.mac", "tee_tcb_info.tee_tcb_svn2", "td_info.rtmr3"} <= {row.field for row in rows}


@settings(max_examples=50)
@given(quotes(), st.integers(0, 9))
def test_quotes_are_covered(quote: Quote, padding: int) -> None:
    clean = replace(quote, qe_report=bytes(384))
    if not is_td(quote):
        clean = replace(clean, body=bytes(384))
    raw = clean.to_bytes() + bytes(padding)
    assert recognise(raw) == "quote"
    rows = describe(raw)[1]
    tiles(rows, raw)
    assert next(row.value for row in rows if row.field == "signature") == quote.signature
    with pytest.raises(EvidenceError) as caught:
        describe(raw + b"\1", "quote")
    assert caught.value.id == "evidence.quote.trailing"


@pytest.mark.parametrize("name", [entry[0] for entry in REAL])
def test_real_quotes(vectors: Path, name: str) -> None:
    raw = real(vectors, name)
    kind, rows = describe(raw)
    assert kind == "quote"
    tiles(rows, raw)
    quote = Quote.split(raw)[0]
    assert meaning(rows, "header.qe_vendor_id") == "Intel"
    text = meaning(rows, "cert_data")
    if "raw_tcb" in name:
        assert text.endswith("PCESVN 6, PCE-ID 0000")
    elif "corrupted" in name:
        assert text
    else:
        assert text.startswith("Intel SGX PCK Certificate < Intel SGX PCK P")
        assert "; FMSPC " in text
        assert summary(certificates(quote.cert_data)) == text


@given(st.integers(1, 3), st.data())
def test_ssa_frame(pages: int, data: st.DataObject) -> None:
    gprs = fill(ssa.GprSgx, data)
    frame = ssa.frame_layout(pages, 3, 1)
    raw = bytearray(data.draw(binary(frame.size)))
    raw[frame.misc_offset :] = fill(ssa.ExInfo, data) + gprs
    raw[512:520] = b"\7".ljust(8, b"\0")
    rows = describe(bytes(raw), "ssa")[1]
    tiles(rows, bytes(raw))
    assert meaning(rows, "xsave.xstate_bv") == "X87 SSE AVX"
    assert next(row for row in rows if row.field == "gprsgx.rax").offset == frame.gprsgx_offset
    for size in (0, 184, len(raw) - 1):
        with pytest.raises(StructureError) as caught:
            describe(bytes(size), "ssa")
        assert caught.value.id == "sgx.ssa.size"


SECS = structs.Secs(1 << 20, 0, 1, 0, attributes=ATTRIBUTES, mrenclave=b"m" * 32)
#: Contents as they really are, and what they are recognised as.
TYPICAL: dict[str, bytes] = {
    "pageinfo": paging.PageInfo(1, 2, 3, 4).to_bytes(),
    "rdinfo": paging.RdInfo(1, 0x203, 0).to_bytes(),
    "secinfo": structs.SecInfo(0x203).to_bytes(),
    "pcmd": paging.Pcmd(0x203, 1, b"m" * 16).to_bytes(),
    "gprsgx": ssa.GprSgx(rip=0x1000).to_bytes(),
    "exinfo": ssa.ExInfo(0x7000, 6).to_bytes(),
    "einittoken": launch.EinitToken(valid=1).to_bytes(),
    "keyrequest": structs.KeyRequest(4, 1, cpusvn=b"\5" * 16).to_bytes(),
    "targetinfo": structs.TargetInfo(b"m" * 32, ATTRIBUTES).to_bytes(),
    "secs": SECS.to_bytes(),
    "tcs": structs.Tcs(ossa=0x2000, nssa=2, oentry=0x1000).to_bytes(),
    "va": paging.VersionArray.of([1, 2, 3, 1 << 63] * 20).to_bytes(),
    "tdinfo": tdx.TdInfo(0, 0xE7, *[b"m" * 48] * 8).to_bytes(),
}


@pytest.mark.parametrize("name", TYPICAL)
def test_recognised(name: str) -> None:
    assert describe(TYPICAL[name])[0] == name


def test_recognised_real_structures(vectors: Path) -> None:
    for path in ("fortanix_test_enclave.sig", "fortanix_sgxstools_sig1.sigstruct.bin"):
        assert recognise((vectors / "measure" / path).read_bytes()) == "sigstruct"


def refusal(data: bytes) -> UsageError:
    with pytest.raises(UsageError) as caught:
        describe(data)
    return caught.value


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (ATTRIBUTES, "attributes, exinfo"),
        (bytes(16), "attributes, exinfo"),
        (bytes(4096), "secs, tcs, va"),
        (bytes(512), "keyrequest, targetinfo, tdinfo"),
    ],
)
def test_ambiguous(data: bytes, names: str) -> None:
    error = refusal(data)
    assert error.id == "sgx.describe.ambiguous"
    assert error.found == names
    assert error.remedy == f"name the kind with --as: {names}"


@pytest.mark.parametrize(
    "data", [b"", b"x", bytes(17), b"\3\0" + bytes(98), b"\x30\x00", b"-----BEGIN PRIVATE KEY-----"]
)
def test_unknown(data: bytes) -> None:
    error = refusal(data)
    assert error.id == "sgx.describe.unknown"
    assert error.found == f"{len(data)} bytes"


def test_unknown_of_a_known_size() -> None:
    error = refusal(b"\xff" * 512)
    assert (error.id, error.expected) == ("sgx.describe.unknown", "keyrequest, targetinfo, tdinfo")
    assert error.remedy == "name the kind with --as: keyrequest, targetinfo, tdinfo"


@pytest.mark.parametrize(
    ("data", "id"),
    [
        (bytes(1807) + b"\1", "sgx.sigstruct.constant"),
        (b"\xff" * 64, "sgx.secinfo.reserved"),
        (b"\3\0\2\0" + bytes(500), "evidence.quote.truncated"),
        (b"-----BEGIN CERTIFICATE-----\n", "evidence.quote.certification"),
        (b"\x30\x82\x01\x00", "sgx.certificate.malformed"),
    ],
)
def test_damaged_data_is_told_what_is_wrong_with_it(data: bytes, id: str) -> None:
    with pytest.raises(InclavareError) as caught:
        describe(data)
    assert caught.value.id == id


def test_too_large() -> None:
    assert refusal(bytes(MAX_SIZE + 1)).id == "sgx.describe.size"


@settings(max_examples=300)
@given(st.sampled_from([kind.size or 900 for kind in KINDS.values()]), st.data())
def test_garbage_is_refused_or_covered(size: int, data: st.DataObject) -> None:
    raw = bytearray(data.draw(binary(size)))
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, size))
        raw[at:] = bytes(size - at)
    try:
        _, rows = describe(bytes(raw))
    except InclavareError:
        return
    tiles(rows, bytes(raw))


# Meanings


@pytest.mark.parametrize(
    ("structure", "field", "value", "text"),
    [
        ("report", "attributes", ATTRIBUTES, "INIT MODE64BIT; XFRM X87 SSE AVX"),
        ("attributes", "flags", 1 << 3, "unknown 0x8"),
        ("attributes", "flags", 0x12, "DEBUG PROVISIONKEY"),
        ("attributes", "xfrm", 0x602E7, "X87 SSE AVX OPMASK ZMM_HI256 HI16_ZMM PKRU TILECFG TILEDATA"),
        (
            "sigstruct",
            "attribute_mask",
            b"\xfd" + b"\xff" * 7 + b"\x1b" + bytes(7),
            "flags 0xfffffffffffffffd, XFRM 0x1b",
        ),
        ("sigstruct", "date", 0x20260131, "2026-01-31"),
        ("sigstruct", "vendor", 0x8086, "Intel"),
        ("sigstruct", "vendor", 1, "unknown"),
        (
            "sigstruct",
            "modulus",
            bytes(384),
            f"MRSIGNER {hashlib.sha256(bytes(384)).hexdigest()}",
        ),
        ("secinfo", "flags", 0x203, "PT_REG R W"),
        ("secinfo", "flags", 0x0, "PT_SECS none"),
        ("secinfo", "flags", 0x439, "PT_TRIM R PENDING MODIFIED PR"),
        ("secinfo", "flags", 0x700, "unknown page type 7 none"),
        ("rdinfo", "flags", 0x381, "PT_VA R BLOCKED"),
        ("rdinfo", "status", 3, "CHILDPRESENT VIRTCHILDPRESENT"),
        ("pcmd", "flags", 0x107, "PT_TCS R W X"),
        ("tcs", "flags", 3, "DBGOPTIN AEXNOTIFY"),
        ("tcs", "ossa", 0x2000, "0x2000"),
        ("tcs", "nssa", 2, "2"),
        ("gprsgx", "exitinfo", 0x8000030E, "vector 14 (#PF), hardware exception"),
        ("gprsgx", "exitinfo", 0x80000603, "vector 3 (#BP), software exception"),
        ("gprsgx", "exitinfo", 0x800001FF, "vector 255 (unknown), unknown type 1"),
        ("gprsgx", "exitinfo", 0, "no exception"),
        ("gprsgx", "exitinfo", 0x800, "EXITINFO has a reserved bit that is not zero"),
        ("keyrequest", "key_name", 4, "SEAL_KEY"),
        ("keyrequest", "key_name", 9, "unknown 9"),
        ("keyrequest", "key_policy", 6, "MRSIGNER NOISVPRODID"),
        ("secs", "size", 1 << 20, "0x100000 bytes"),
        ("secs", "ssa_frame_size", 2, "2 pages"),
        ("report", "miscselect", 3, "EXINFO CPINFO"),
        ("report", "cet_attributes", 5, "SH_STK_EN ENDBR_EN"),
        ("einittoken", "valid", 1, "VALID"),
        ("quote", "attestation_key_type", 3, "ECDSA-384-with-P-384"),
        ("quote", "qe_vendor_id", bytes(16), "unknown"),
        ("tdreport10", "td_attributes", 1 | 1 << 63, "DEBUG PERFMON"),
        ("reportmacstruct", "type", 0x81, "TDX"),
        ("teetcbinfo", "valid", 0x301FF, "fields at offsets 0, 8, 16, 24, 32, 40, 48, 56, 64, 128, 136"),
        ("report", "mrenclave", bytes(32), "zero"),
        ("report", "mrenclave", b"m" * 32, ""),
        ("report", "isv_svn", 3, "3"),
    ],
)
def test_meanings(structure: str, field: str, value: int | bytes, text: str) -> None:
    assert meanings.meaning(structure, field, value) == text


# Certificates


def real_certificates(vectors: Path) -> list[bytes]:
    found = [(vectors / "collateral" / "intel_sgx_root_ca.der").read_bytes()]
    for name in ("sgx/phala_sgx_quote.bin", "tdx/oe_tdx_quote.bin"):
        found += certificates(Quote.split(real(vectors, name))[0].cert_data)
    return found


def test_certificates_agree_with_cryptography(vectors: Path) -> None:
    for raw in real_certificates(vectors):
        kind, rows = describe(raw)
        assert kind == "certificate"
        assert all(raw[row.offset : row.offset + len(row.value)] == row.value for row in rows)
        assert all(left.offset + len(left.value) <= right.offset for left, right in pairwise(rows))
        certificate = x509.load_der_x509_certificate(raw)
        assert meaning(rows, "serial") == str(certificate.serial_number)
        for field, moment in (
            ("not_before", certificate.not_valid_before_utc),
            ("not_after", certificate.not_valid_after_utc),
        ):
            parsed = datetime.datetime.strptime(meaning(rows, field), "%Y-%m-%d %H:%M:%S UTC")
            assert parsed.replace(tzinfo=datetime.UTC) == moment
        expected = ", ".join(f"{part.rfc4514_attribute_name}={part.value}" for part in certificate.subject)
        assert meaning(rows, "subject") == expected
        shown = [row for row in rows if row.field.startswith(("extension.", "sgx.ppid"))]
        assert len(shown) == len(certificate.extensions)
        for row, extension in zip(shown, certificate.extensions, strict=True):
            assert row.meaning == ("critical" if extension.critical else "")


def test_unique_identifiers_are_passed_over(vectors: Path) -> None:
    whole = der.only((vectors / "collateral" / "intel_sgx_root_ca.der").read_bytes(), der.SEQUENCE).children()
    parts = [part.raw for part in whole[0].children()]
    body = der.encode(der.SEQUENCE, b"".join([*parts[:-1], der.encode(0x81, b"\0x"), parts[-1]]))
    rows = certificate_rows(der.encode(der.SEQUENCE, body + whole[1].raw + whole[2].raw))
    assert [row.field for row in rows] == [
        row.field for row in certificate_rows(der.encode(der.SEQUENCE, b"".join(part.raw for part in whole)))
    ]


def test_pck_certificate_shows_the_sgx_extension(vectors: Path) -> None:
    leaf = certificates(Quote.split(real(vectors, "tdx/oe_tdx_quote.bin"))[0].cert_data)[0]
    rows = describe(leaf)[1]
    assert next(row.value.hex() for row in rows if row.field == "sgx.fmspc") == "50806f000000"
    assert meaning(rows, "sgx.sgx_type") == "Scalable"
    assert meaning(rows, "sgx.tcb_components.3") == "13"
    assert meaning(rows, "sgx.dynamic_platform") == "yes"
    assert meaning(rows, "sgx.cached_keys") == "no"
    extension = der.certificate_parts(leaf)[1]["1.2.840.113741.1.13.1"]
    kind, inner = describe(extension)
    assert kind == "pck-extension"
    assert [f"sgx.{row.field}" for row in inner] == [row.field for row in rows if row.field.startswith("sgx.")]


@given(extensions)
def test_extension_rows(extension: PckExtension) -> None:
    raw = extension.to_bytes()
    rows = describe(raw, "pck-extension")[1]
    assert all(raw[row.offset : row.offset + len(row.value)] == row.value for row in rows)
    assert next(row.value for row in rows if row.field == "fmspc") == extension.fmspc
    assert len(rows) >= 22


def test_pem(vectors: Path) -> None:
    raw = real_certificates(vectors)[:2]
    pem = [b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(one) + b"-----END CERTIFICATE-----\n" for one in raw]
    assert describe(pem[0])[1] == certificate_rows(raw[0])
    rows = describe(b"\n".join(pem))[1]
    assert rows == chain_rows(raw)
    assert {row.field.split(".")[0] for row in rows} == {"0", "1"}
    ra_tls = (vectors / "ra-tls" / "ccc_gramine-cert.pem").read_bytes()
    shown = {row.field for row in describe(ra_tls)[1]}
    assert {"extension.gramine.quote", "extension.dice.evidence"} <= shown


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_certificates_do_not_crash(vectors: Path, data: st.DataObject) -> None:
    raw = bytearray(certificates(Quote.split(real(vectors, "sgx/phala_sgx_quote.bin"))[0].cert_data)[0])
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        rows = certificate_rows(bytes(raw))
    except StructureError as error:
        assert error.id in ("sgx.certificate.malformed", "sgx.pck.malformed")
    else:
        assert all(raw[row.offset : row.offset + len(row.value)] == row.value for row in rows)
    assert summary([bytes(raw)])


def test_times_and_names() -> None:
    time = describe_certificate._time
    assert time(der.Element(0x17, b"490101000000Z", b"")) == "2049-01-01 00:00:00 UTC"
    assert time(der.Element(0x17, b"500101000000Z", b"")) == "1950-01-01 00:00:00 UTC"
    assert time(der.Element(0x18, b"20500101000000Z", b"")) == "2050-01-01 00:00:00 UTC"
    with pytest.raises(ValueError, match="not a date"):
        time(der.Element(0x04, b"", b""))
    attribute = der.encode_object_identifier("2.5.4.3") + der.encode(0x0C, b"a\x1b[31m\xff")
    name = der.encode(0x31, der.encode(der.SEQUENCE, attribute))
    assert describe_certificate._name(der.Element(der.SEQUENCE, name, b"")) == "CN=a?[31m\ufffd"


def test_certification_data_that_is_not_understood(vectors: Path) -> None:
    quote = Quote.from_bytes(real(vectors, "sgx/phala_sgx_quote.bin"))
    for cert_type, data, text in (
        (9, b"", "unknown"),
        (7, b"x", ""),
        (5, b"x", "PEM"),
        (5, PEM_RUBBISH, "1 certificates: "),
    ):
        changed = replace(quote, cert_type=cert_type, cert_data=data)
        found = meaning(describe(changed.to_bytes())[1], "cert_data")
        assert text in found
        assert bool(found) == bool(text)


PEM_RUBBISH = b"-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n"
