"""Quote parsing: real quotes round-trip, and no prefix, extension or length is tolerated."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inclavare.errors import EvidenceError
from inclavare.sgx.quote import CERT_PCK_CHAIN, QE_VENDOR_INTEL, Quote, QuoteHeader

HEADER = QuoteHeader(3, 2, 1, 1, QE_VENDOR_INTEL, bytes(20))


@st.composite
def quotes(draw: st.DrawFn) -> Quote:
    def fixed(size: int) -> bytes:
        return draw(st.binary(min_size=size, max_size=size))

    return Quote(
        header=HEADER,
        body=fixed(384),
        signature=fixed(64),
        attestation_key=fixed(64),
        qe_report=fixed(384),
        qe_report_signature=fixed(64),
        qe_auth_data=draw(st.binary(max_size=40)),
        cert_type=draw(st.integers(0, 0xFFFF)),
        cert_data=draw(st.binary(max_size=100)),
    )


@settings(max_examples=50)
@given(quotes())
def test_round_trip(quote: Quote) -> None:
    assert Quote.from_bytes(quote.to_bytes()) == quote


@settings(max_examples=200)
@given(st.binary(max_size=1200))
def test_garbage_is_refused_or_round_trips(data: bytes) -> None:
    try:
        assert Quote.from_bytes(data).to_bytes() == data
    except EvidenceError as error:
        assert error.id.startswith("evidence.quote.")


@pytest.mark.parametrize(("name", "cert_type"), [("phala_sgx_quote.bin", 5), ("fortanix_dcapql_quote_raw_tcb.bin", 3)])
def test_real_quotes(vectors: Path, name: str, cert_type: int) -> None:
    raw = (vectors / "sgx" / name).read_bytes()
    quote = Quote.from_bytes(raw)
    assert quote.to_bytes() == raw
    assert quote.cert_type == cert_type
    assert quote.header.qe_vendor_id == QE_VENDOR_INTEL


def test_every_prefix_is_truncated(vectors: Path) -> None:
    raw = (vectors / "sgx" / "phala_sgx_quote.bin").read_bytes()
    assert Quote.from_bytes(raw).cert_type == CERT_PCK_CHAIN
    for size in range(len(raw)):
        with pytest.raises(EvidenceError) as caught:
            Quote.from_bytes(raw[:size])
        assert caught.value.id == "evidence.quote.truncated", size


def test_trailing_bytes(vectors: Path) -> None:
    raw = (vectors / "sgx" / "phala_sgx_quote.bin").read_bytes()
    with pytest.raises(EvidenceError) as caught:
        Quote.from_bytes(raw + b"\0")
    assert caught.value.id == "evidence.quote.trailing"
    longer = bytearray(raw + b"\0")
    struct.pack_into("<I", longer, 432, len(raw) - 436 + 1)
    with pytest.raises(EvidenceError) as caught:
        Quote.from_bytes(bytes(longer))
    assert caught.value.id == "evidence.quote.trailing"


@pytest.mark.parametrize(
    ("at", "id"),
    [(0, "version"), (2, "key_type"), (4, "header")],
)
def test_header(vectors: Path, at: int, id: str) -> None:
    raw = bytearray((vectors / "sgx" / "phala_sgx_quote.bin").read_bytes())
    raw[at] ^= 0x80
    with pytest.raises(EvidenceError) as caught:
        Quote.from_bytes(bytes(raw))
    assert caught.value.id == f"evidence.quote.{id}"


def test_open_enclave_header_is_not_skipped(vectors: Path) -> None:
    with pytest.raises(EvidenceError):
        Quote.from_bytes((vectors / "sgx" / "oe_sgx_report_bad.bin").read_bytes())


def test_tdx_quotes_are_told_apart(vectors: Path) -> None:
    with pytest.raises(EvidenceError) as caught:
        Quote.from_bytes((vectors / "tdx" / "phala_tdx_quote.bin").read_bytes())
    assert caught.value.id == "evidence.quote.version"


def test_oversized() -> None:
    with pytest.raises(EvidenceError) as caught:
        Quote.from_bytes(bytes(1 << 17))
    assert caught.value.id == "evidence.quote.size"
