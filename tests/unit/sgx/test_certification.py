"""Certification data of all seven types: read, written, and damage refused."""

from __future__ import annotations

import base64
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quotes import REAL, real
from structures import binary

from inclavare.errors import EvidenceError
from inclavare.sgx import certification
from inclavare.sgx.certification import CERT_TYPES, PckIdentifier, QeReportCertification, Reader, certificates, parse
from inclavare.sgx.quote import Quote


def refusal(cert_type: int, data: bytes) -> str:
    with pytest.raises(EvidenceError) as caught:
        parse(cert_type, data)
    return caught.value.id


def pem(*ders: bytes) -> bytes:
    return b"".join(
        b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(data) + b"-----END CERTIFICATE-----\n" for data in ders
    )


@pytest.mark.parametrize(("cert_type", "size"), [(1, 36), (2, 276), (3, 404)])
@given(data=st.data())
def test_identifiers(cert_type: int, size: int, data: st.DataObject) -> None:
    raw = data.draw(binary(size))
    parsed = parse(cert_type, raw)
    assert isinstance(parsed, PckIdentifier)
    assert parsed.to_bytes() == raw
    assert (parsed.ppid, parsed.cpusvn, parsed.pce_id) == (raw[:-20], raw[-20:-4], raw[-2:])
    assert parsed.pce_svn == int.from_bytes(raw[-4:-2], "little")
    for wrong in (raw[:-1], raw + b"\0"):
        assert refusal(cert_type, wrong) == "evidence.quote.certification"


def test_identifier_with_another_ppid() -> None:
    with pytest.raises(ValueError, match="ppid is 17 bytes, not 16, 256 or 384"):
        PckIdentifier(bytes(17), bytes(16), 0, bytes(2)).to_bytes()


def test_real_identifier(vectors: Path) -> None:
    quote = Quote.from_bytes(real(vectors, "sgx/fortanix_dcapql_quote_raw_tcb.bin"))
    parsed = parse(quote.cert_type, quote.cert_data)
    assert isinstance(parsed, PckIdentifier)
    assert (parsed.pce_svn, parsed.pce_id) == (quote.header.pce_svn, bytes(2))


@pytest.mark.parametrize("name", [entry[0] for entry in REAL if entry[3] == 5 and "corrupted" not in entry[0]])
def test_real_chains(vectors: Path, name: str) -> None:
    quote = Quote.split(real(vectors, name))[0]
    found = parse(5, quote.cert_data)
    assert isinstance(found, tuple)
    assert len(found) == 3
    assert refusal(4, quote.cert_data) == "evidence.quote.certification"
    assert parse(4, pem(found[0])) == found[:1]


@given(st.lists(st.binary(min_size=1, max_size=80), min_size=1, max_size=3), st.sampled_from([b"", b"\0", b"\n\n"]))
def test_chains(ders: list[bytes], end: bytes) -> None:
    assert certificates(pem(*ders) + end) == tuple(ders)


@pytest.mark.timeout(5)
def test_long_chains_do_not_take_long() -> None:
    assert len(certificates(pem(b"a") * 17000)) == 17000


@pytest.mark.parametrize(
    "chain",
    [
        b"",
        b"\0",
        b"\n",
        b"garbage",
        b"-----BEGIN CERTIFICATE-----",
        b"-----BEGIN CERTIFICATE-----\nAA=A\n-----END CERTIFICATE-----",
        b"-----BEGIN CERTIFICATE-----\n?\n-----END CERTIFICATE-----",
        pem(b"a") + b"garbage" + pem(b"b"),
        b"subject=x\n" + pem(b"a"),
        pem(b"a") + b"\0\0",
    ],
)
def test_damaged_chains(chain: bytes) -> None:
    assert refusal(5, chain) == "evidence.quote.certification"


@given(
    st.builds(
        QeReportCertification,
        binary(384),
        binary(64),
        st.binary(max_size=70),
        st.integers(0, 0xFFFF).filter(lambda value: value != 6),
        st.binary(max_size=70),
    )
)
def test_qe_report(data: QeReportCertification) -> None:
    raw = data.to_bytes()
    assert parse(6, raw) == data
    assert refusal(6, raw[:-1]) == "evidence.quote.truncated"
    assert refusal(6, raw + b"\0") == "evidence.quote.trailing"


def test_qe_report_in_qe_report() -> None:
    inner = bytes(448) + struct.pack("<HHI", 0, 6, 0)
    assert refusal(6, inner) == "evidence.quote.certification"


@given(st.binary(max_size=64))
def test_platform_manifest_is_carried(data: bytes) -> None:
    assert parse(7, data) == data


@pytest.mark.parametrize("cert_type", [0, 8, 0xFFFF])
def test_unknown_types(cert_type: int) -> None:
    assert cert_type not in CERT_TYPES
    assert refusal(cert_type, b"") == "evidence.quote.certification"


@settings(max_examples=200)
@given(st.integers(0, 9), st.binary(max_size=500))
def test_garbage_is_refused_or_read(cert_type: int, data: bytes) -> None:
    try:
        parse(cert_type, data)
    except EvidenceError as error:
        assert error.id.startswith("evidence.quote.")


def test_layouts_are_sound() -> None:
    for layout in PckIdentifier.LAYOUTS.values():
        assert sum(layout.sizes.values()) == layout.size


def test_reader_says_where_it_ends() -> None:
    reader = Reader(b"\1\2\3")
    assert (reader.number("H", "number"), reader.left) == (0x201, 1)
    with pytest.raises(EvidenceError, match="ends within its tail") as caught:
        reader.take(2, "tail")
    assert (caught.value.found, caught.value.expected) == ("1 bytes", "2 bytes")
    with pytest.raises(EvidenceError, match="follow the number"):
        reader.end("number")
    assert certification.refused("size", "x", 1, 2).remedy
