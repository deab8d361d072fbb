"""Evidence of Intel's TEEs as Confidential Containers sends it, with init-data; and RA-TLS certificates of every TEE."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import replace
from typing import Any

import cbor2
import made_snp
import pytest
from attested import Attested
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from inclavare.attestation import Evidence, Policy, verify
from inclavare.attestation.evidence import CBOR_TAG_INTEL_QUOTE, CBOR_TAG_SNP_REPORT, OID_DICE_EVIDENCE
from inclavare.attestation.initdata import data, digest
from inclavare.errors import EvidenceError
from inclavare.tee.sgx_sim import SimulatedPlatform

maker = made_snp.maker
INIT_DATA = """\
version = "0.1.0"
algorithm = "%s"
[data]
"aa.toml" = '''
[token_configs]
'''
"policy.rego" = "package agent_policy"
"""


def refused(call: Any, *arguments: Any, **named: Any) -> str:
    with pytest.raises(EvidenceError) as caught:
        call(*arguments, **named)
    return caught.value.id


def sent(quote: bytes, **more: Any) -> dict[str, Any]:
    return {"quote": base64.b64encode(quote).decode(), **more}


def test_enclave(attested: Attested) -> None:
    evidence = attested.evidence
    for tee in ("sgx", "sgx-sim"):
        found = Evidence.from_kbs(tee, sent(evidence.quote, collateral=evidence.collateral), evidence.runtime_data)
        assert found == evidence
        assert verify(found, attested.policy, nonce=attested.nonce, now=attested.now).accepted
    swapped = {**(evidence.runtime_data or {}), "nonce": "AAAA"}
    found = Evidence.from_kbs("sgx", sent(evidence.quote, collateral=evidence.collateral), swapped)
    result = verify(found, attested.policy, now=attested.now)
    assert [failure.id for failure in result.failures] == ["binding.report_data"]


def test_what_is_not_what_it_says(attested: Attested, vectors: Any) -> None:
    quote = attested.evidence.quote
    domain = attested.platform.td_quote(bytes(64), bytes(48))
    hardware = (vectors / "sgx" / "phala_sgx_quote.bin").read_bytes()
    for tee, raw, id in (
        ("tdx", quote, "evidence.quote.tee"),
        ("sgx", domain, "evidence.quote.tee"),
        ("sgx-sim", hardware, "evidence.quote.tee"),
        ("sgx", made_snp.report().to_bytes(), "evidence.quote.tee"),
        ("sample", quote, "evidence.tee.unknown"),
        ("az-tdx-vtpm", domain, "evidence.tee.unknown"),
        ("snp-sim", quote, "evidence.envelope.malformed"),
    ):
        with pytest.raises(EvidenceError) as caught:
            Evidence.from_kbs(tee, sent(raw), None)
        assert caught.value.id.startswith("evidence.") and (tee == "snp-sim" or caught.value.id == id), tee
    for primary in (None, [], {}, {"quote": 5}, {"quote": "!"}, {"quote": ""}, sent(quote, collateral={})):
        assert refused(Evidence.from_kbs, "sgx", primary, None).startswith("evidence.")


@pytest.mark.parametrize(("algorithm", "size"), [("sha-256", 32), ("sha384", 48), ("sha-512", 64)])
def test_init_data_of_a_domain(platform: SimulatedPlatform, algorithm: str, size: int) -> None:
    """Bound to MRCONFIGID: cut off or zero-padded to its 48 bytes."""
    text = INIT_DATA % algorithm
    expected = hashlib.new(f"sha{size * 8}", text.encode()).digest()
    assert digest(text) == expected and data(text)["policy.rego"] == "package agent_policy"
    quote = platform.td_quote(bytes(64), bytes(48), config_id=expected[:48].ljust(48, b"\0"))
    policy = Policy(any_enclave=True, allow_simulated=True).with_trust_anchor(platform.root_ca())
    primary = sent(quote, collateral=platform.td_collateral())
    evidence = Evidence.from_kbs("tdx", primary, None, text)
    assert verify(evidence, policy).accepted
    assert Evidence.from_json(evidence.to_json()) == evidence
    other = verify(replace(evidence, init_data=text + "# changed"), policy)
    assert [failure.id for failure in other.failures] == ["binding.init_data"]
    assert other.failures[0].claim == "init_data"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[",
        INIT_DATA % "md5",
        (INIT_DATA % "sha256").replace("0.1.0", "0.2.0"),
        'version = "0.1.0"\nalgorithm = "sha256"\n',
        'version = "0.1.0"\nalgorithm = "sha256"\ndata = 5\n',
        'version = "0.1.0"\nalgorithm = 5\n[data]\n',
        'version = "0.1.0"\nalgorithm = "sha256"\n[data]\na = 5\n',
    ],
)
def test_malformed_init_data(attested: Attested, text: str) -> None:
    evidence = replace(attested.evidence, init_data=text)
    assert refused(verify, evidence, attested.policy, now=attested.now) == "evidence.init_data.malformed"


def test_init_data_of_an_enclave_and_a_guest(attested: Attested, maker: None) -> None:
    text = INIT_DATA % "sha256"
    result = verify(replace(attested.evidence, init_data=text), attested.policy, now=attested.now)
    assert [failure.id for failure in result.failures] == ["binding.init_data"]
    guest = made_snp.report(host_data=digest(text))
    evidence = replace(made_snp.evidence(guest, made_snp.chip_certificate()), init_data=text)
    found = verify(evidence, Policy(any_enclave=True), now=made_snp.NOW)
    assert "binding.init_data" not in [failure.id for failure in found.failures]
    changed = verify(replace(evidence, init_data=text + " "), Policy(any_enclave=True), now=made_snp.NOW)
    assert "binding.init_data" in [failure.id for failure in changed.failures]


# Envelopes


def test_envelopes(attested: Attested) -> None:
    envelope = attested.evidence.to_dict()
    for wrong in ({"event-log": "!"}, {"event-log": 5}, {"init-data": 5}):
        assert refused(Evidence.from_json, json.dumps({**envelope, **wrong})) == "evidence.envelope.malformed"


# Certificates


KEY = ec.generate_private_key(ec.SECP256R1())
SPKI = KEY.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
CLAIMS = cbor2.dumps({"pubkey-hash": cbor2.dumps([1, hashlib.sha256(SPKI).digest()]), "nonce": b"n"})
BOUND = hashlib.sha256(CLAIMS).digest().ljust(64, b"\0")


def certificate(tag: int, evidence: bytes) -> bytes:
    value = cbor2.dumps(cbor2.CBORTag(tag, [evidence, CLAIMS]))
    builder = x509.CertificateBuilder(x509.Name([]), x509.Name([]), KEY.public_key(), 1)
    builder = builder.not_valid_before(made_snp.moment(0)).not_valid_after(made_snp.moment(1 << 31))
    extension = x509.UnrecognizedExtension(x509.ObjectIdentifier(OID_DICE_EVIDENCE), value)
    return builder.add_extension(extension, critical=False).sign(KEY, SHA256()).public_bytes(Encoding.DER)


def test_certificates_of_every_tee(platform: SimulatedPlatform, maker: None) -> None:
    domain = platform.td_quote(BOUND, bytes(48))
    guest = made_snp.report(report_data=BOUND).to_bytes()
    for tag, raw, tee in (
        (CBOR_TAG_INTEL_QUOTE, domain, "tdx-sim"),
        (CBOR_TAG_INTEL_QUOTE, domain.ljust(8000, b"\0"), "tdx-sim"),
        (CBOR_TAG_SNP_REPORT, guest, "snp"),
    ):
        found = Evidence.from_certificate(certificate(tag, raw))
        assert found.tee == tee and found.certificate is not None
        assert (found.certificate.public_key, found.certificate.nonce) == (SPKI, b"n")
    policy = Policy(any_enclave=True, allow_simulated=True).with_trust_anchor(platform.root_ca())
    evidence = Evidence.from_certificate(certificate(CBOR_TAG_INTEL_QUOTE, domain))
    result = verify(evidence.with_collateral(platform.td_collateral()), policy, nonce=b"n")
    assert result.accepted and result.claims.public_key_sha256 == hashlib.sha256(SPKI).hexdigest()
    chain = made_snp.evidence(made_snp.report(), made_snp.chip_certificate()).collateral
    guests = Evidence.from_certificate(certificate(CBOR_TAG_SNP_REPORT, guest)).with_collateral(chain or {})
    assert verify(guests, Policy(any_enclave=True), nonce=b"n", now=made_snp.NOW).claims.snp is not None


def test_tags_that_lie(platform: SimulatedPlatform) -> None:
    domain = platform.td_quote(BOUND, bytes(48))
    guest = made_snp.report(report_data=BOUND).to_bytes()
    for tag, raw in ((CBOR_TAG_SNP_REPORT, domain), (CBOR_TAG_INTEL_QUOTE, guest), (60001, domain)):
        assert refused(Evidence.from_certificate, certificate(tag, raw)) == "evidence.certificate.malformed"
    other = platform.td_quote(bytes(64), bytes(48))
    assert refused(Evidence.from_certificate, certificate(CBOR_TAG_INTEL_QUOTE, other)) == "evidence.key.binding"
    stranger = made_snp.report().to_bytes()
    assert refused(Evidence.from_certificate, certificate(CBOR_TAG_SNP_REPORT, stranger)) == "evidence.key.binding"
