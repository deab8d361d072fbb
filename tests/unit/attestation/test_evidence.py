"""Evidence as it arrives: envelopes, bare quotes, and RA-TLS certificates of other implementations."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cbor2
import pytest
from attested import Attested, resigned
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from inclavare.attestation import Evidence, verify
from inclavare.attestation.evidence import OID_DICE_EVIDENCE, OIDS_LEGACY
from inclavare.errors import EvidenceError
from inclavare.sgx import der
from inclavare.sgx.quote import Quote

QUOTE = base64.b64encode(b"quote").decode()


def refused(call: Any, *arguments: Any) -> str:
    with pytest.raises(EvidenceError) as caught:
        call(*arguments)
    return caught.value.id


def certificate_der(vectors: Path, name: str) -> bytes:
    pem = (vectors / "ra-tls" / name).read_text()
    return base64.b64decode("".join(pem.splitlines()[1:-1]))


# Envelopes


@pytest.mark.parametrize(
    "envelope",
    [
        [],
        {},
        {"version": 2, "tee": "sgx", "quote": QUOTE},
        {"version": True, "tee": "sgx", "quote": QUOTE},
        {"version": 1, "tee": "sgx"},
        {"version": 1, "tee": 1, "quote": QUOTE},
        {"version": 1, "tee": "sgx", "quote": "not base64!"},
        {"version": 1, "tee": "sgx", "quote": QUOTE, "runtime-data": []},
        {"version": 1, "tee": "sgx", "quote": QUOTE, "simulated": False},
    ],
)
def test_malformed_envelopes(envelope: Any) -> None:
    assert refused(Evidence.from_json, json.dumps(envelope)) == "evidence.envelope.malformed"


@pytest.mark.parametrize("text", ["", "{", "null", "[" * 100000, b"\xff\xfe", "{" + " " * (1 << 20) + "}"])
def test_not_an_envelope(text: str | bytes) -> None:
    assert refused(Evidence.from_json, text) == "evidence.envelope.malformed"


@pytest.mark.parametrize("change", [{"pck_crl": None}, {"pck_crl": "zz"}, {"more": ""}, {"tcb_info": {}}])
def test_malformed_collateral(attested: Attested, change: dict[str, Any]) -> None:
    collateral = {**(attested.evidence.collateral or {}), **change}
    assert refused(attested.evidence.with_collateral, collateral) == "evidence.collateral.malformed"
    envelope = {**attested.evidence.to_dict(), "collateral": collateral}
    assert refused(Evidence.from_dict, envelope) == "evidence.collateral.malformed"
    assert refused(attested.evidence.with_collateral, []) == "evidence.collateral.malformed"


@given(st.binary(max_size=200))
def test_garbage_is_refused(data: bytes) -> None:
    assert refused(Evidence.load, data).startswith("evidence.")


def test_load_tells_the_forms_apart(attested: Attested, vectors: Path) -> None:
    assert Evidence.load(attested.evidence.to_json().encode()) == attested.evidence
    assert Evidence.load(attested.evidence.quote).quote == attested.evidence.quote
    pem = (vectors / "ra-tls" / "ccc_rats-tls-cert.pem").read_bytes()
    assert Evidence.load(pem) == Evidence.load(certificate_der(vectors, "ccc_rats-tls-cert.pem"))
    assert refused(Evidence.load, b"-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n").endswith("malformed")


def test_bare_quotes_name_their_verifier(attested: Attested, vectors: Path) -> None:
    assert Evidence.from_quote(attested.evidence.quote).tee == "sgx-sim"
    assert Evidence.from_quote((vectors / "sgx" / "phala_sgx_quote.bin").read_bytes()).tee == "sgx"


# Certificates of other implementations


@pytest.mark.parametrize("name", ["ccc_gramine-cert.pem", "ccc_rats-tls-cert.pem"])
def test_others_certificates(vectors: Path, name: str) -> None:
    raw = certificate_der(vectors, name)
    evidence = Evidence.from_certificate(raw)
    assert evidence.tee == "sgx" and evidence.certificate is not None
    assert evidence.certificate.extension == "dice"
    assert evidence.certificate.public_key in raw
    assert evidence.certificate.nonce is None


def test_gramines_legacy_extension_as_it_is_on_the_wire(vectors: Path) -> None:
    """The same certificate without its DICE extension: the stray bytes in the identifier are tolerated."""
    raw = certificate_der(vectors, "ccc_gramine-cert.pem")
    public_key, extensions = der.certificate_parts(raw)
    assert "0.6.9.42.840.113741.1337.6" in extensions
    evidence = Evidence._from_legacy(public_key, extensions["0.6.9.42.840.113741.1337.6"])
    assert evidence.certificate is not None and evidence.certificate.extension == "legacy"
    # Its two extensions carry different quotes.
    assert evidence.quote != Evidence.from_certificate(raw).quote


@pytest.mark.parametrize("name", ["ccc_gramine-cert.pem", "ccc_rats-tls-cert.pem"])
def test_another_key_in_others_certificates(vectors: Path, name: str) -> None:
    raw = certificate_der(vectors, name)
    public_key, _ = der.certificate_parts(raw)
    at = raw.index(public_key) + len(public_key) - 1
    changed = bytearray(raw)
    changed[at] ^= 1
    assert refused(Evidence.from_certificate, bytes(changed)) == "evidence.key.binding"


# Our own platform's quotes in certificates


def make(attested: Attested, form: str, *, nonce: bytes | None = None, bind: bytes | None = None) -> bytes:
    """A certificate with evidence in it; ``bind`` binds the quote to another key."""
    key = ec.generate_private_key(ec.SECP256R1())
    spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    digest = hashlib.sha256(bind or spki).digest()
    platform, enclave = attested.platform, attested.enclave
    claims: dict[str, bytes] = {"pubkey-hash": cbor2.dumps([1, digest])}
    if nonce is not None:
        claims["nonce"] = nonce
    encoded = cbor2.dumps(claims)
    bound = hashlib.sha256(encoded).digest() if form == "dice" else digest
    quote = platform.quote(enclave.report(platform.quote_target_info(), bound + bytes(32)))
    value = cbor2.dumps(cbor2.CBORTag(60000, [quote, encoded])) if form == "dice" else quote
    oid = OID_DICE_EVIDENCE if form == "dice" else OIDS_LEGACY[0]
    return self_signed(key, oid, value)


def self_signed(key: ec.EllipticCurvePrivateKey, oid: str, value: bytes) -> bytes:
    import datetime

    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "RATLS")])
    start = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    return (
        x509.CertificateBuilder(name, name, key.public_key(), 1, start, start.replace(year=2036))
        .add_extension(x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value), critical=False)
        .sign(key, SHA256())
        .public_bytes(Encoding.DER)
    )


@pytest.mark.parametrize("form", ["dice", "legacy"])
def test_certificate_is_verified_and_appraised(attested: Attested, form: str) -> None:
    raw = make(attested, form)
    evidence = Evidence.from_certificate(raw).with_collateral(attested.platform.collateral())
    result = verify(evidence, attested.policy, now=attested.now)
    assert result.accepted
    public_key = x509.load_der_x509_certificate(raw).public_key()
    spki = public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert result.claims.public_key_sha256 == hashlib.sha256(spki).hexdigest()


def test_nonce_in_a_certificate(attested: Attested) -> None:
    evidence = Evidence.from_certificate(make(attested, "dice", nonce=b"fresh"))
    evidence = evidence.with_collateral(attested.platform.collateral())
    assert verify(evidence, attested.policy, nonce=b"fresh", now=attested.now).accepted
    assert not verify(evidence, attested.policy, nonce=b"other", now=attested.now).accepted
    without = Evidence.from_certificate(make(attested, "dice")).with_collateral(attested.platform.collateral())
    assert not verify(without, attested.policy, nonce=b"fresh", now=attested.now).accepted


@pytest.mark.parametrize("form", ["dice", "legacy"])
def test_evidence_stolen_from_another_certificate(attested: Attested, form: str) -> None:
    assert refused(Evidence.from_certificate, make(attested, form, bind=b"another key")) == "evidence.key.binding"


def test_certificate_without_evidence() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    assert refused(Evidence.from_certificate, self_signed(key, "1.2.3.4", b"x")) == "evidence.certificate.absent"


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"\xff",
        cbor2.dumps(1),
        cbor2.dumps(cbor2.CBORTag(60001, [b"", b""])),
        cbor2.dumps(cbor2.CBORTag(60000, [b""])),
        cbor2.dumps(cbor2.CBORTag(60000, [b"q", cbor2.dumps({})])),
        cbor2.dumps(cbor2.CBORTag(60000, [b"q", cbor2.dumps({"pubkey-hash": cbor2.dumps([99, b""])})])),
        cbor2.dumps(cbor2.CBORTag(60000, ["q", cbor2.dumps({"pubkey-hash": cbor2.dumps([1, b""])})])),
        cbor2.dumps(cbor2.CBORTag(60000, [b"q", cbor2.dumps([1])])),
        cbor2.dumps(cbor2.CBORTag(60000, [b"q", 5])),
        cbor2.dumps(cbor2.CBORTag(60000, [b"q", cbor2.dumps({"pubkey-hash": cbor2.dumps([[], b""])})])),
    ],
)
def test_malformed_dice_evidence(value: bytes) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = self_signed(key, OID_DICE_EVIDENCE, value)
    assert refused(Evidence.from_certificate, certificate) == "evidence.certificate.malformed"


@pytest.mark.parametrize("name", ["oe_tdx_quote.bin", "phala_tdx_quote.bin", "gotdx_quote_v5_sample.dat"])
def test_quotes_of_trust_domains(vectors: Path, name: str) -> None:
    """A trust domain's quote comes in a buffer that is filled up with zeros; they are no part of it."""
    raw = (vectors / "tdx" / name).read_bytes()
    evidence = Evidence.from_quote(raw)
    assert evidence.tee == "tdx"
    assert raw.removeprefix(evidence.quote).strip(b"\0") == b"" and Quote.from_bytes(evidence.quote)
    padded = raw.ljust(len(raw) + 100, b"\0")
    assert Evidence.from_quote(padded) == evidence
    assert refused(Evidence.from_quote, padded + b"\1") == "evidence.quote.trailing"


@pytest.mark.parametrize("version", [4, 5])
def test_later_versions_of_an_enclaves_quote(attested: Attested, version: int) -> None:
    quote = Quote.from_bytes(attested.evidence.quote)
    later = replace(quote, header=replace(quote.header, version=version, qe_svn=0, pce_svn=0))
    claimed = replace(attested.evidence, quote=later.to_bytes())
    with pytest.raises(EvidenceError) as caught:
        verify(claimed, attested.policy, now=attested.now)
    assert caught.value.id == "evidence.quote.signature", "the version is signed"
    signed = replace(attested.evidence, quote=resigned(attested.platform, later).to_bytes())
    assert Evidence.from_quote(signed.quote).tee == "sgx-sim"
    result = verify(signed, attested.policy, nonce=attested.nonce, now=attested.now)
    assert result.accepted and result.claims.mrenclave == attested.enclave.mrenclave.hex()
    with pytest.raises(EvidenceError) as caught:
        verify(replace(signed, quote=signed.quote + b"\0"), attested.policy, now=attested.now)
    assert caught.value.id == "evidence.quote.trailing"


def test_truncated_certificates(vectors: Path) -> None:
    raw = certificate_der(vectors, "ccc_rats-tls-cert.pem")
    for size in range(0, len(raw), 61):
        assert refused(Evidence.from_certificate, raw[:size]).startswith("evidence.")
