"""Quotes for tests: the real ones of the vectors, without what others put around them, and random ones."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import strategies as st
from structures import binary

from inclavare.sgx.quote import BODIES, QE_VENDOR_INTEL, TEE_TDX, Quote, QuoteHeader

#: File, version, body type, certification data type.
REAL = (
    ("sgx/phala_sgx_quote.bin", 3, 1, 5),
    ("sgx/fortanix_dcapql_quote_raw_tcb.bin", 3, 1, 3),
    ("sgx/fortanix_dcapql_quote_pck_cert_chain_corrupted.bin", 3, 1, 5),
    ("sgx/oe_sgx_report_bad.bin", 3, 1, 5),
    ("tdx/phala_tdx_quote.bin", 4, 2, 5),
    ("tdx/oe_tdx_quote.bin", 4, 2, 5),
    ("tdx/trustee_tdx_quote_4.dat", 4, 2, 5),
    ("tdx/dstack_verifier_quote-report.json", 4, 2, 5),
    ("tdx/gotdx_quote_v5_sample.dat", 5, 3, 5),
)


def real(vectors: Path, name: str) -> bytes:
    """A quote and its padding. Open Enclave puts a header of 16 bytes in front, dstack has hexadecimal in JSON."""
    raw = (vectors / name).read_bytes()
    if name.endswith(".json"):
        return bytes.fromhex(json.loads(raw)["quote"])
    return raw[16:] if name.startswith("sgx/oe_") else raw


@st.composite
def quotes(draw: st.DrawFn) -> Quote:
    """A quote of any version and body."""
    version, kind = draw(st.sampled_from([(3, 1), (4, 1), (4, 2), (5, 1), (5, 2), (5, 3)]))
    tee, body = BODIES[kind]
    svns = draw(st.tuples(st.integers(0, 9), st.integers(0, 9)))
    return Quote(
        header=QuoteHeader(version, 2, tee, *svns, QE_VENDOR_INTEL, draw(binary(20))),
        body=draw(binary(body.LAYOUT.size)),
        signature=draw(binary(64)),
        attestation_key=draw(binary(64)),
        qe_report=draw(binary(384)),
        qe_report_signature=draw(binary(64)),
        qe_auth_data=draw(st.binary(max_size=40)),
        cert_type=draw(st.integers(0, 0xFFFF).filter(lambda value: value != 6)),
        cert_data=draw(st.binary(max_size=100)),
    )


def is_td(quote: Quote) -> bool:
    return quote.header.tee_type == TEE_TDX
