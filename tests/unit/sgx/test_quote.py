"""Quotes: real ones round-trip and agree with dcap-qvl, and no prefix, extension or length is tolerated."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import replace
from pathlib import Path

import dcap_qvl
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509 import load_der_x509_certificate
from hypothesis import given, settings
from hypothesis import strategies as st
from quotes import REAL, is_td, quotes, real

from inclavare.errors import EvidenceError
from inclavare.sgx.certification import CERT_PCK_CHAIN, certificates
from inclavare.sgx.quote import ATTESTATION_KEY_TYPES, MAX_SIZE, QE_VENDOR_INTEL, Quote
from inclavare.sgx.tdx import TdReport10, TdReport15

SGX = "sgx/phala_sgx_quote.bin"
#: Names of dcap-qvl's where they differ from ours.
THEIRS = {
    "mrenclave": "mr_enclave",
    "mrsigner": "mr_signer",
    "cpusvn": "cpu_svn",
    **{f"rtmr{index}": f"rt_mr{index}" for index in range(4)},
}


def refusal(data: bytes) -> str:
    with pytest.raises(EvidenceError) as caught:
        Quote.from_bytes(data)
    return caught.value.id


@settings(max_examples=100)
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


@settings(max_examples=200)
@given(quotes(), st.data())
def test_damage_is_refused_or_seen(quote: Quote, data: st.DataObject) -> None:
    """A changed byte, also of a length, is refused or changes a field: nothing is ignored."""
    raw = bytearray(quote.to_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] = data.draw(st.integers(0, 255).filter(lambda value: value != raw[at]))
    try:
        other = Quote.from_bytes(bytes(raw))
    except EvidenceError as error:
        assert error.id.startswith("evidence.quote.")
    else:
        assert other != quote
        assert other.to_bytes() == raw


@settings(max_examples=100)
@given(quotes(), st.data())
def test_every_length_is_checked(quote: Quote, data: st.DataObject) -> None:
    raw = quote.to_bytes()
    assert refusal(raw[: data.draw(st.integers(0, len(raw) - 1))]) == "evidence.quote.truncated"
    assert refusal(raw + b"\0") == "evidence.quote.trailing"
    body = len(quote.signed_bytes())
    cert = len(raw) - len(quote.cert_data) - 4
    lengths = [(body, "I"), (cert, "I"), (cert - 2 - len(quote.qe_auth_data) - 2, "H")]
    if quote.header.version > 3:
        lengths.append((body + 4 + 128 + 2, "I"))
    if quote.header.version > 4:
        lengths.append((50, "I"))
    at, code = data.draw(st.sampled_from(lengths))
    right = struct.unpack_from("<" + code, raw, at)[0]
    wrong = data.draw(st.integers(0, (1 << 8 * struct.calcsize(code)) - 1).filter(lambda value: value != right))
    damaged = bytearray(raw)
    struct.pack_into("<" + code, damaged, at, wrong)
    if code == "I":
        assert refusal(bytes(damaged)) in (
            "evidence.quote.truncated",
            "evidence.quote.trailing",
            "evidence.quote.body_type",
        )
    else:
        # A moved authentication data length finds another certification data header, and hardly ever one that fits.
        try:
            assert Quote.from_bytes(bytes(damaged)).to_bytes() == damaged
        except EvidenceError as error:
            assert error.id.startswith("evidence.quote.")


@pytest.mark.parametrize(("name", "version", "body_type", "cert_type"), REAL, ids=str)
def test_real_quotes(vectors: Path, name: str, version: int, body_type: int, cert_type: int) -> None:
    raw = real(vectors, name)
    quote, padding = Quote.split(raw)
    assert not any(padding)
    assert quote.to_bytes() + padding == raw
    assert (quote.header.version, quote.body_type, quote.cert_type) == (version, body_type, cert_type)
    assert quote.header.qe_vendor_id == QE_VENDOR_INTEL


@pytest.mark.parametrize("name", [entry[0] for entry in REAL])
def test_agrees_with_dcap_qvl(vectors: Path, name: str) -> None:
    """Every field that dcap-qvl shows, and every field of a TD report."""
    raw = real(vectors, name)
    quote = Quote.split(raw)[0]
    theirs = dcap_qvl.Quote.parse(raw)
    header = quote.header
    for field in header.LAYOUT.names:
        assert getattr(theirs.header, field) == getattr(header, field), field
    assert theirs.is_tdx() == is_td(quote)
    report = quote.td_report() if is_td(quote) else quote.report_body()
    compared = 0
    for field in report.LAYOUT.names:
        expected = getattr(theirs.report, THEIRS.get(field, field), None)
        if expected is None:
            continue
        found = getattr(report, field)
        assert (found.to_bytes(8, "little") if isinstance(found, int) else found) == expected, field
        compared += 1
    assert compared == (len(report.LAYOUT.names) if is_td(quote) else 5)
    chain = theirs.cert_chain_pem_bytes()
    assert chain is None if quote.cert_type != CERT_PCK_CHAIN else chain.rstrip(b"\0") == quote.cert_data.rstrip(b"\0")


@pytest.mark.parametrize("name", [entry[0] for entry in REAL if entry[3] == 5 and "corrupted" not in entry[0]])
def test_real_signatures(vectors: Path, name: str) -> None:
    """The right bytes are the signed ones: attestation key over header and body, PCK over the QE's report."""
    quote = Quote.split(real(vectors, name))[0]
    body = quote.qe_report_body()
    assert body.report_data == hashlib.sha256(quote.attestation_key + quote.qe_auth_data).digest() + bytes(32)
    verify(quote.attestation_key, quote.signature, quote.signed_bytes())
    point = load_der_x509_certificate(certificates(quote.cert_data)[0]).public_key()
    assert isinstance(point, ec.EllipticCurvePublicKey)
    numbers = point.public_numbers()
    verify(numbers.x.to_bytes(32, "big") + numbers.y.to_bytes(32, "big"), quote.qe_report_signature, quote.qe_report)


def verify(key: bytes, signature: bytes, message: bytes) -> None:
    point = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), b"\x04" + key)
    r, s = (int.from_bytes(signature[at : at + 32], "big") for at in (0, 32))
    point.verify(utils.encode_dss_signature(r, s), message, ec.ECDSA(SHA256()))
    with pytest.raises(InvalidSignature):
        point.verify(utils.encode_dss_signature(r, s), message + b"\0", ec.ECDSA(SHA256()))


@pytest.mark.parametrize("name", [SGX, "tdx/oe_tdx_quote.bin", "tdx/gotdx_quote_v5_sample.dat"])
def test_every_prefix_is_truncated(vectors: Path, name: str) -> None:
    raw = real(vectors, name)
    for size in range(len(raw)):
        assert refusal(raw[:size]) == "evidence.quote.truncated", size


def test_trailing_bytes(vectors: Path) -> None:
    raw = real(vectors, SGX)
    assert refusal(raw + b"\0") == "evidence.quote.trailing"
    longer = bytearray(raw + b"\0")
    struct.pack_into("<I", longer, 432, len(raw) - 436 + 1)
    assert refusal(bytes(longer)) == "evidence.quote.trailing"
    assert Quote.split(raw + b"\0\1") == (Quote.from_bytes(raw), b"\0\1")
    assert refusal(real(vectors, "tdx/phala_tdx_quote.bin")) == "evidence.quote.trailing"


@pytest.mark.parametrize("version", [0, 1, 2, 6, 0x8003])
def test_unknown_versions(vectors: Path, version: int) -> None:
    assert refusal(struct.pack("<H", version) + real(vectors, SGX)[2:]) == "evidence.quote.version"


@pytest.mark.parametrize("key_type", [0, 1, 3, 4, 0x8002])
def test_other_attestation_keys_are_refused_by_name(vectors: Path, key_type: int) -> None:
    raw = bytearray(real(vectors, SGX))
    struct.pack_into("<H", raw, 2, key_type)
    with pytest.raises(EvidenceError, match="attestation key") as caught:
        Quote.from_bytes(bytes(raw))
    assert caught.value.id == "evidence.quote.key_type"
    assert ATTESTATION_KEY_TYPES.get(key_type, "unknown") in str(caught.value.found)


@pytest.mark.parametrize(
    ("name", "tee"), [(SGX, 0x81), (SGX, 1), ("tdx/oe_tdx_quote.bin", 0x80), ("tdx/gotdx_quote_v5_sample.dat", 0)]
)
def test_tee_must_fit(vectors: Path, name: str, tee: int) -> None:
    raw = bytearray(real(vectors, name))
    struct.pack_into("<I", raw, 4, tee)
    assert refusal(bytes(raw)) == "evidence.quote.tee"


@pytest.mark.parametrize(("kind", "size"), [(0, 648), (4, 648), (3, 584), (3, 649)])
def test_body_descriptor(vectors: Path, kind: int, size: int) -> None:
    raw = bytearray(real(vectors, "tdx/gotdx_quote_v5_sample.dat"))
    struct.pack_into("<HI", raw, 48, kind, size)
    assert refusal(bytes(raw)) == "evidence.quote.body_type"


@pytest.mark.parametrize("kind", [1, 5, 7])
def test_version_4_is_certified_by_a_qe_report(vectors: Path, kind: int) -> None:
    raw = bytearray(real(vectors, "tdx/oe_tdx_quote.bin"))
    struct.pack_into("<H", raw, 48 + 584 + 4 + 128, kind)
    assert refusal(bytes(raw)) == "evidence.quote.certification"


@settings(max_examples=50)
@given(quotes())
def test_qe_report_does_not_certify_itself(quote: Quote) -> None:
    assert refusal(replace(quote, cert_type=6).to_bytes()) == "evidence.quote.certification"


@settings(max_examples=50)
@given(quotes())
def test_bodies(quote: Quote) -> None:
    if is_td(quote):
        report = quote.td_report()
        assert type(report) is (TdReport15 if quote.body_type == 3 else TdReport10)
        assert report.to_bytes() == quote.body
        with pytest.raises(EvidenceError) as caught:
            quote.report_body()
    else:
        clean = replace(quote, body=bytes(20) + quote.body[20:21] + bytes(363), qe_report=bytes(384))
        assert clean.report_body().to_bytes() == clean.body
        assert clean.qe_report_body().to_bytes() == clean.qe_report
        with pytest.raises(EvidenceError) as caught:
            quote.td_report()
    assert caught.value.id == "evidence.quote.tee"


def test_tdx_quotes_are_told_apart(vectors: Path) -> None:
    quote = Quote.from_bytes(real(vectors, "tdx/oe_tdx_quote.bin"))
    with pytest.raises(EvidenceError, match="a TD's, not an enclave's") as caught:
        quote.report_body()
    assert (caught.value.id, caught.value.found, caught.value.expected) == ("evidence.quote.tee", "TDX", "SGX")


def test_reserved_bytes_of_bodies(vectors: Path) -> None:
    quote = Quote.from_bytes(real(vectors, SGX))
    for damaged in (
        replace(quote, body=quote.body[:96] + b"\1" + quote.body[97:]),
        replace(quote, qe_report=quote.qe_report[:383] + b"\0\0"),
    ):
        with pytest.raises(EvidenceError) as caught:
            damaged.report_body()
            damaged.qe_report_body()
        assert caught.value.id == "evidence.quote.body"


@pytest.mark.parametrize(("version", "tee", "size"), [(3, 0, 383), (3, 0x81, 584), (4, 0x81, 648), (5, 0, 584)])
def test_no_quote_is_written_that_could_not_be_read(vectors: Path, version: int, tee: int, size: int) -> None:
    quote = Quote.from_bytes(real(vectors, SGX))
    wrong = replace(quote, header=replace(quote.header, version=version, tee_type=tee), body=bytes(size))
    with pytest.raises(ValueError, match=f"no body of a version {version} quote has {size} bytes"):
        wrong.to_bytes()


def test_open_enclave_header_is_not_skipped(vectors: Path) -> None:
    assert refusal((vectors / "sgx" / "oe_sgx_report_bad.bin").read_bytes()) == "evidence.quote.version"


def test_oversized() -> None:
    assert refusal(bytes(MAX_SIZE + 1)) == "evidence.quote.size"
