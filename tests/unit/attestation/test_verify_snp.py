"""SEV-SNP: a real report under AMD's roots, and a manufacturer of our own for what real vectors do not show."""

from __future__ import annotations

import json
import ssl
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import made_snp
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st
from made_snp import NOW, TCB, chip_certificate, evidence, report

from inclavare.attestation import Evidence, Policy, verify
from inclavare.attestation.claims import SnpTcb
from inclavare.attestation.collateral import SNP_CERTIFICATES_KEY
from inclavare.attestation.snp_report import SIGNED_SIZE, SnpReport, is_report, pack_tcb, tcb
from inclavare.attestation.verifiers import snp
from inclavare.errors import EvidenceError

maker = made_snp.maker
#: AMD numbers its VCEKs with 0.
pytestmark = pytest.mark.filterwarnings("ignore:Parsed a serial number")
LOOKING = Policy(any_enclave=True)
#: The VCEK in the vectors is valid from 2023-01-24T17:58:26Z to 2030-01-24T17:58:26Z.
REAL_NOW = 1751624191


def cause(found: Evidence, now: int = NOW) -> str:
    with pytest.raises(EvidenceError) as caught:
        verify(found, LOOKING, now=now)
    return caught.value.id


@pytest.fixture
def real(vectors: Path) -> Evidence:
    vcek = (vectors / "sev-snp" / "trustee_test-vcek.der").read_bytes()
    return Evidence.from_quote(
        (vectors / "sev-snp" / "trustee_test-report.bin").read_bytes(),
        {SNP_CERTIFICATES_KEY: ssl.DER_cert_to_PEM_cert(vcek)},
    )


# Real


def test_real_report(real: Evidence) -> None:
    assert real.tee == "snp"
    claims = verify(real, LOOKING, now=REAL_NOW).claims
    guest = claims.snp
    assert guest is not None and (claims.tee, claims.simulated, claims.debug) == ("snp", False, False)
    assert (guest.version, guest.processor, guest.signing_key, guest.vmpl) == (2, "Milan", "vcek", 0)
    assert guest.reported_tcb == SnpTcb(3, 0, 8, 115) and guest.current_tcb == SnpTcb(3, 0, 8, 206)
    assert guest.measurement.startswith("a1f39304") and (guest.policy_abi_major, guest.policy_abi_minor) == (0, 31)
    assert claims.tcb_status == "NotRated" and claims.mrenclave == ""
    assert (claims.endorsements[0].name, claims.endorsements[0].issuer) == ("vcek", "SEV-Milan")
    assert claims.root_fingerprint == snp.roots()["ARK-Milan"].fingerprint(x509_sha256()).hex()
    shown = claims.to_dict()
    assert json.loads(json.dumps(shown))["snp"]["reported_tcb"]["microcode"] == 115
    assert not {"mrenclave", "fmspc", "tdx", "signed"} & set(shown)


def x509_sha256() -> Any:
    from cryptography.hazmat.primitives.hashes import SHA256

    return SHA256()


def test_real_report_with_its_whole_chain(real: Evidence, vectors: Path) -> None:
    assert real.collateral is not None
    authorities = (vectors / "sev-snp" / "trustee_milan_ask_ark_asvk.pem").read_text()
    chain = real.collateral[SNP_CERTIFICATES_KEY] + authorities
    assert verify(replace(real, collateral={SNP_CERTIFICATES_KEY: chain}), LOOKING, now=REAL_NOW).claims.snp
    roots = snp.roots()
    for certificate in x509.load_pem_x509_certificates(authorities.encode()):
        name = snp.pki.common_name(certificate)
        assert roots[name] == certificate, "what is embedded is what AMD publishes"


@pytest.mark.parametrize(
    ("now", "id"),
    [
        (1674583105, "evidence.certificate.not_yet_valid"),
        (1674583106, None),
        (1895507906, None),
        (1895507907, "evidence.certificate.expired"),
    ],
)
def test_real_report_in_time_only(real: Evidence, now: int, id: str | None) -> None:
    if id is None:
        assert verify(real, LOOKING, now=now).claims.snp
    else:
        assert cause(real, now) == id


def test_bad_vcek(real: Evidence, vectors: Path) -> None:
    other = (vectors / "sev-snp" / "trustee_test-vcek-invalid-new.der").read_bytes()
    bad = replace(real, collateral={SNP_CERTIFICATES_KEY: ssl.DER_cert_to_PEM_cert(other)})
    assert cause(bad, REAL_NOW) == "evidence.certificate.signature"
    assert cause(replace(real, collateral=None), REAL_NOW) == "evidence.collateral.missing"


def test_every_byte_of_the_report_counts(real: Evidence) -> None:
    """In the signed part and after it."""
    for at in range(len(real.quote)):
        damaged = bytearray(real.quote)
        damaged[at] ^= 1 << at % 8
        assert cause(replace(real, quote=bytes(damaged)), REAL_NOW).startswith("evidence.snp."), at


def test_every_byte_of_the_certificate_counts(real: Evidence) -> None:
    assert real.collateral is not None
    der = ssl.PEM_cert_to_DER_cert(real.collateral[SNP_CERTIFICATES_KEY])
    for at in range(len(der)):
        damaged = bytearray(der)
        damaged[at] ^= 1 << at % 8
        collateral = {SNP_CERTIFICATES_KEY: ssl.DER_cert_to_PEM_cert(bytes(damaged))}
        assert cause(replace(real, collateral=collateral), REAL_NOW).startswith("evidence."), at


@given(data=st.binary(max_size=1300))
def test_noise_is_no_report(data: bytes) -> None:
    with pytest.raises(EvidenceError):
        SnpReport.from_bytes(data.ljust(1184, b"\0")[:1184] if data[:1] not in b"\2\3\4\5" else data[:1183])


def test_sizes(real: Evidence) -> None:
    for size in (0, 1183):
        assert cause(replace(real, quote=real.quote[:size]), REAL_NOW) == "evidence.snp.report"
    assert cause(replace(real, quote=real.quote + b"\0"), REAL_NOW) == "evidence.snp.report"
    assert is_report(real.quote) and not is_report(real.quote + b"\0")


# Made


@pytest.mark.parametrize(
    ("processor", "version", "kind"),
    [
        ("Milan", 2, "VCEK"),
        ("Milan", 3, "VLEK"),
        ("Genoa", 3, "VCEK"),
        ("Genoa", 5, "VLEK"),
        ("Turin", 3, "VCEK"),
        ("Turin", 5, "VCEK"),
        ("Turin", 5, "VLEK"),
    ],
)
def test_processors_versions_and_keys(maker: None, processor: str, version: int, kind: str) -> None:
    made = report(processor, version, kind)
    claims = verify(evidence(made, chip_certificate(processor, kind)), LOOKING, now=NOW).claims
    guest = claims.snp
    assert guest is not None
    assert (guest.processor, guest.version, guest.signing_key) == (processor, version, kind.lower())
    assert guest.reported_tcb == TCB[processor] and (guest.reported_tcb.fmc is None) is (processor != "Turin")
    assert claims.report_data == bytes(range(64)).hex() and guest.current_version == "1.55.40"
    assert claims.signed == made.to_bytes()[:SIGNED_SIZE]


def test_these_roots_are_amds_nowhere_else() -> None:
    snp._key.cache_clear()
    assert cause(evidence(report(), chip_certificate())) == "evidence.certificate.signature"


def test_debug_is_for_the_policy(maker: None) -> None:
    made = evidence(report(policy=0x30000 | 1 << 19), chip_certificate())
    result = verify(made, LOOKING, now=NOW)
    assert result.claims.debug and result.claims.snp is not None and result.claims.snp.policy_debug_allowed
    assert "policy.debug" in [failure.id for failure in result.failures]


@pytest.mark.parametrize(
    ("fields", "certificate", "id"),
    [
        ({"sig_algo": 2}, {}, "evidence.snp.algorithm"),
        ({"key_info": 1 << 2}, {}, "evidence.snp.key"),
        ({"key_info": 7 << 2}, {}, "evidence.snp.key"),
        ({"cpuid_mod_id": 0x80}, {}, "evidence.snp.processor"),
        ({"cpuid_fam_id": 0x19, "cpuid_mod_id": 1}, {}, "evidence.snp.processor"),
        ({"chip_id": bytes(64)}, {}, "evidence.snp.chip"),
        ({"chip_id": bytes(range(1, 10)).ljust(64, b"\0")}, {}, "evidence.snp.chip"),
        ({}, {"chip": b"another!".ljust(64, b"\0")}, "evidence.snp.chip"),
        ({}, {"tcb": SnpTcb(1, 2, 3, 71, 5)}, "evidence.snp.tcb"),
        ({}, {"tcb": SnpTcb(1, 2, 3, 70, 6)}, "evidence.snp.tcb"),
        ({"current_tcb": pack_tcb(SnpTcb(1, 2, 3, 69, 5), "Turin")}, {}, "evidence.snp.tcb"),
        ({"committed_tcb": pack_tcb(SnpTcb(2, 2, 3, 70, 5), "Turin")}, {}, "evidence.snp.tcb"),
        ({"reported_tcb": bytes((5, 1, 2, 3, 9, 0, 0, 70))}, {}, "evidence.snp.report"),
        ({"version": 3, "launch_mit_vector": 1}, {}, "evidence.snp.report"),
        ({"version": 2, "cpuid_step": 1}, {}, "evidence.snp.report"),
        ({}, {"name": "SEV-SOMETHING"}, "evidence.certificate.malformed"),
        ({}, {"name": "SEV-VLEK"}, "evidence.root.untrusted"),
        ({}, {"issuer": "SEV-Rome"}, "evidence.root.untrusted"),
        ({}, {"issuer": "ARK-Turin"}, "evidence.root.untrusted"),
        ({}, {"extensions": {snp._OID_TCB["fmc"]: b"\x02\x02\x01\x00"}}, "evidence.certificate.malformed"),
        ({}, {"extensions": {snp._OID_TCB["tee"]: b"\x02\x01\xff"}}, "evidence.certificate.malformed"),
        ({}, {"extensions": {snp._OID_HWID: b"short"}}, "evidence.certificate.malformed"),
        ({}, {"end": NOW - 1}, "evidence.certificate.expired"),
        ({}, {"start": NOW + 1}, "evidence.certificate.not_yet_valid"),
    ],
)
def test_what_does_not_belong_together(
    maker: None, fields: dict[str, Any], certificate: dict[str, Any], id: str
) -> None:
    """Each is signed by the right keys: only the contents are wrong."""
    assert cause(evidence(report(**fields), chip_certificate(**certificate))) == id


def test_another_chips_signature(maker: None) -> None:
    other = made_snp.sign(report(), "Milan")
    assert cause(evidence(other, chip_certificate())) == "evidence.snp.signature"
    halves = replace(report(), signature_r=b"\xff" * 72)
    assert cause(evidence(halves, chip_certificate())) == "evidence.snp.signature"


def test_chains(maker: None) -> None:
    leaf = chip_certificate()
    authority = made_snp.authority("SEV-Turin", "ARK-Turin")
    root = made_snp.authority("ARK-Turin", "ARK-Turin")
    for chain in ((leaf, authority), (leaf, authority, root), (root, leaf)):
        assert verify(evidence(report(), *chain), LOOKING, now=NOW).claims.snp
    assert cause(evidence(report(), authority, root)) == "evidence.certificate.malformed"
    assert cause(evidence(report(), leaf, chip_certificate(kind="VLEK"))) == "evidence.certificate.malformed"
    foreign = made_snp.certificate("ARK-Turin", made_snp.rsa_key("x").public_key(), "ARK-Turin", ca=True)
    assert cause(evidence(report(), leaf, foreign)) == "evidence.root.untrusted"
    # An authority that calls itself AMD's, with a chip key of its own.
    theirs = made_snp.certificate("SEV-Turin", made_snp.rsa_key("x").public_key(), "x", ca=True)
    assert cause(evidence(report(), leaf, theirs)) == "evidence.certificate.signature"
    curve = ec.generate_private_key(ec.SECP256R1()).public_key()
    weak = made_snp.certificate("SEV-VCEK", curve, "SEV-Turin", extensions={})
    assert cause(evidence(report(), weak)) == "evidence.certificate.purpose"


def test_revocation(maker: None) -> None:
    leaf = chip_certificate()
    claims = verify(evidence(report(), leaf, revocations=made_snp.crl("Turin")), LOOKING, now=NOW).claims
    assert [(one.name, one.number) for one in claims.endorsements] == [("vcek", None), ("crl", 12)]
    assert (claims.collateral_issued, claims.collateral_expires) == (NOW - 100, NOW + 100)
    revoked = made_snp.crl("Turin", (made_snp.authority("SEV-Turin", "ARK-Turin"),))
    assert cause(evidence(report(), leaf, revocations=revoked)) == "evidence.certificate.revoked"
    assert cause(evidence(report(), leaf, revocations=made_snp.crl("Milan"))) == "evidence.collateral.signature"
    for dates, id in (
        ({"end": NOW - 1}, "evidence.collateral.expired"),
        ({"start": NOW + 1}, "evidence.collateral.not_yet_valid"),
    ):
        assert cause(evidence(report(), leaf, revocations=made_snp.crl("Turin", **dates))) == id
    assert cause(evidence(report(), leaf, revocations="00")) == "evidence.collateral.malformed"


# As Confidential Containers sends it


def as_json(made: SnpReport) -> dict[str, Any]:
    """As serde writes the sev crate's AttestationReport."""
    processor = {family: name for name, family in made_snp.CPUID.items()}.get((made.cpuid_fam_id, made.cpuid_mod_id))
    found: dict[str, Any] = {}
    for field in fields(made):
        value = getattr(made, field.name)
        if field.name.endswith("_tcb"):
            value = asdict(tcb(value, processor or "Milan"))
        elif field.name in ("current", "committed"):
            value = {"build": value[0], "minor": value[1], "major": value[2]}
        elif isinstance(value, bytes):
            value = list(value)
        if not field.name.startswith("signature_"):
            found[field.name] = value
    found["signature"] = {"r": list(made.signature_r), "s": list(made.signature_s)}
    if made.version < 3:
        found |= dict.fromkeys(("cpuid_fam_id", "cpuid_mod_id", "cpuid_step"))
    return found


def kbs(made: SnpReport, *certificates: x509.Certificate) -> dict[str, Any]:
    chain = [{"cert_type": "VCEK", "data": list(one.public_bytes(Encoding.DER))} for one in certificates]
    return {"attestation_report": as_json(made), "cert_chain": [*chain, {"cert_type": "Empty", "data": []}]}


@pytest.mark.parametrize(("processor", "version"), [("Milan", 2), ("Genoa", 3), ("Turin", 5)])
def test_evidence_of_confidential_containers(maker: None, processor: str, version: int) -> None:
    made = report(processor, version)
    sent = json.loads(json.dumps(kbs(made, chip_certificate(processor))))
    found = Evidence.from_kbs("snp", sent, None)
    assert found.quote == made.to_bytes()
    assert verify(found, LOOKING, now=NOW).claims.snp is not None
    bare = Evidence.from_kbs("snp", {"attestation_report": as_json(made), "cert_chain": None}, None)
    assert bare.collateral is None and bare.quote == made.to_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"attestation_report": None},
        {"attestation_report": {}},
        {"attestation_report": "AAAA"},
        {"cert_chain": [{"cert_type": "VCEK"}]},
        {"cert_chain": [{"cert_type": "VCEK", "data": [256]}]},
        {"cert_chain": 5},
    ],
)
def test_malformed_evidence_of_confidential_containers(maker: None, change: dict[str, Any]) -> None:
    with pytest.raises(EvidenceError):
        Evidence.from_kbs("snp", {**kbs(report(), chip_certificate()), **change}, None)


@settings(max_examples=50)
@given(data=st.data())
def test_json_of_a_report_is_all_of_it(data: st.DataObject) -> None:
    """Whatever stands in the fields comes back byte for byte."""
    made = report("Turin", 5)
    changed = {
        field.name: data.draw(st.binary(min_size=len(value), max_size=len(value)))
        for field in fields(made)
        if isinstance(value := getattr(made, field.name), bytes) and not field.name.endswith("_tcb")
    }
    changed |= {name: data.draw(st.integers(0, (1 << 64) - 1)) for name in ("policy", "plat_info")}
    made = replace(made, **changed)
    assert SnpReport.from_json(json.loads(json.dumps(as_json(made)))) == made


@given(
    parts=st.builds(SnpTcb, *[st.integers(0, 255)] * 4),
    more=st.tuples(*[st.integers(0, 5)] * 4),
)
def test_covers(parts: SnpTcb, more: tuple[int, ...]) -> None:
    values = [getattr(parts, name) for name in ("bootloader", "tee", "snp", "microcode")]
    higher = SnpTcb(*(value + add for value, add in zip(values, more, strict=True)))
    assert higher.covers(parts) and parts.covers(higher) is not any(more)
    assert tcb(pack_tcb(parts, "Milan"), "Milan") == parts
