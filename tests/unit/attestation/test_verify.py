"""The whole verification path: what is accepted, and that every kind of wrong evidence is refused for its own reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import dcap_qvl
import pytest
from attested import Attested
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from inclavare.attestation import Evidence, Policy, verify
from inclavare.attestation.verifiers.sgx import INTEL_ROOT_CA
from inclavare.config import Config
from inclavare.errors import AppraisalError, EvidenceError, UsageError
from inclavare.sgx import der
from inclavare.sgx.quote import Quote
from inclavare.sgx.structs import ReportBody
from inclavare.tee.sgx_sim import create, provisioning

PHALA_TIME = 1751624924


def cause(evidence: Evidence, policy: Policy, now: int, **expected: Any) -> str:
    with pytest.raises(EvidenceError) as caught:
        verify(evidence, policy, now=now, **expected)
    assert caught.value.exit_code == 4
    return caught.value.id


def with_quote(attested: Attested, **fields: Any) -> Evidence:
    quote = replace(Quote.from_bytes(attested.evidence.quote), **fields)
    return replace(attested.evidence, quote=quote.to_bytes())


def with_collateral(attested: Attested, **fields: str) -> Evidence:
    assert attested.evidence.collateral is not None
    return replace(attested.evidence, collateral={**attested.evidence.collateral, **fields})


def reissued(attested: Attested, key: str, change: Callable[[dict[str, Any]], Any]) -> Evidence:
    """Collateral whose JSON was changed and signed again by the platform's own TCB signing key."""
    assert attested.evidence.collateral is not None
    document = json.loads(attested.evidence.collateral[key])
    change(document)
    text = json.dumps(document, separators=(",", ":"))
    signature = provisioning.sign_raw(manufacturer(attested).tcb_signing.key, text.encode()).hex()
    return with_collateral(attested, **{key: text, f"{key}_signature": signature})


def manufacturer(attested: Attested) -> provisioning.Provisioning:
    return provisioning.load(attested.platform._config.platform_dir, attested.platform._session())


# Accepted


def test_accepted(attested: Attested) -> None:
    result = verify(attested.evidence, attested.policy, nonce=attested.nonce, now=attested.now)
    assert result.accepted and result.failures == ()
    claims = result.require()
    assert claims.mrenclave == attested.enclave.mrenclave.hex()
    assert claims.mrsigner == attested.enclave.mrsigner.hex()
    assert (claims.tee, claims.simulated, claims.debug) == ("sgx-sim", True, False)
    assert (claims.isv_prod_id, claims.isv_svn) == (7, 3)
    assert (claims.tcb_status, claims.advisories, claims.fmspc) == ("UpToDate", (), "53494d000001")
    root = x509.load_der_x509_certificate(attested.platform.root_ca())
    assert claims.root_fingerprint == root.fingerprint(SHA256()).hex()
    assert claims.collateral_issued <= claims.verified_at < claims.collateral_expires
    assert json.loads(json.dumps(result.to_dict()))["claims"]["mrenclave"] == claims.mrenclave


def test_survives_the_envelope(attested: Attested) -> None:
    again = Evidence.from_json(attested.evidence.to_json())
    assert again == attested.evidence
    assert verify(again, attested.policy, nonce=attested.nonce, now=attested.now).accepted


def test_bare_quote_with_separate_collateral(attested: Attested) -> None:
    bare = Evidence.from_quote(attested.evidence.quote)
    assert bare.tee == "sgx-sim"
    assert cause(bare, attested.policy, attested.now) == "evidence.collateral.missing"
    complete = bare.with_collateral(attested.platform.collateral())
    data = ReportBody.from_bytes(complete.quote[48:432]).report_data
    assert verify(complete, attested.policy, report_data=data, now=attested.now).accepted


def test_real_hardware_quote(vectors: Path) -> None:
    evidence = phala(vectors)
    accepting = Policy(any_enclave=True, tcb=("ConfigurationAndSWHardeningNeeded",))
    result = verify(evidence, accepting, report_data=b"Hello, world!", now=PHALA_TIME)
    assert result.accepted
    claims = result.claims
    assert (claims.tee, claims.simulated, claims.debug) == ("sgx", False, False)
    assert claims.tcb_status == "ConfigurationAndSWHardeningNeeded"
    assert claims.advisories == ("INTEL-SA-00289", "INTEL-SA-00615")
    assert (claims.fmspc, claims.tcb_evaluation_number) == ("00a067110000", 17)
    refused = verify(evidence, Policy(any_enclave=True), now=PHALA_TIME)
    assert [failure.id for failure in refused.failures] == ["policy.tcb"]
    assert "INTEL-SA-00615" in refused.failures[0].remedy


@pytest.mark.parametrize(
    ("now", "id"),
    [
        (1750330570, "evidence.collateral.not_yet_valid"),  # 2025-06-19T10:56:10Z
        (1752919278, None),  # 2025-07-19T10:01:18Z
        (1752919279, "evidence.collateral.expired"),
        (1900000000, "evidence.collateral.expired"),
        (1600000000, "evidence.certificate.not_yet_valid"),
        (2600000000, "evidence.certificate.expired"),
    ],
)
def test_real_quote_in_time_only(vectors: Path, now: int, id: str | None) -> None:
    policy = Policy(any_enclave=True, tcb=("ConfigurationAndSWHardeningNeeded",))
    if id is None:
        assert verify(phala(vectors), policy, now=now).accepted
    else:
        assert cause(phala(vectors), policy, now) == id


def phala(vectors: Path) -> Evidence:
    collateral = json.loads((vectors / "collateral" / "phala_sgx_quote_collateral.json").read_bytes())
    return Evidence.from_quote((vectors / "sgx" / "phala_sgx_quote.bin").read_bytes(), collateral)


def test_embedded_root_is_intels(vectors: Path) -> None:
    assert (vectors / "collateral" / "intel_sgx_root_ca.der").read_bytes() == INTEL_ROOT_CA


# Damaged


def regions(quote: Quote) -> list[tuple[str, int, int]]:
    """Every field of a quote: name, offset and size."""
    header = [
        (f"header.{name}", *_span(type(quote.header).LAYOUT, name, 0)) for name in type(quote.header).LAYOUT.names
    ]
    body = [(f"body.{name}", *_span(ReportBody.LAYOUT, name, 48)) for name in ReportBody.LAYOUT.names]
    qe = [(f"qe_report.{name}", *_span(ReportBody.LAYOUT, name, 564)) for name in ReportBody.LAYOUT.names]
    auth = len(quote.qe_auth_data)
    return [
        *header,
        ("header.reserved", 4, 4),
        *body,
        ("body.reserved", 48 + 96, 32),
        ("signature_data_size", 432, 4),
        ("signature", 436, 64),
        ("attestation_key", 500, 64),
        *qe,
        ("qe_report.reserved", 564 + 96, 32),
        ("qe_report_signature", 948, 64),
        ("qe_auth_data_size", 1012, 2),
        ("qe_auth_data", 1014, auth),
        ("cert_type", 1014 + auth, 2),
        ("cert_data_size", 1016 + auth, 4),
        ("cert_data", 1020 + auth, len(quote.cert_data)),
    ]


def _span(layout: Any, name: str, base: int) -> tuple[int, int]:
    return base + layout.offsets[name], layout.sizes[name]


def test_each_field_flipped_in_turn(attested: Attested) -> None:
    raw = attested.evidence.quote
    fields = regions(Quote.from_bytes(raw))
    for name, start, size in fields:
        for at in sorted({start, start + size // 2, start + size - 1}):
            for bit in (0x01, 0x80):
                damaged = bytearray(raw)
                damaged[at] ^= bit
                with pytest.raises(EvidenceError) as caught:
                    verify(replace(attested.evidence, quote=bytes(damaged)), attested.policy, now=attested.now)
                assert caught.value.id.startswith("evidence."), name
    covered = {at for _, start, size in fields for at in range(start, start + size)}
    reserved = set(range(len(raw))) - covered
    assert all(raw[at] == 0 for at in reserved), "every byte is a field or reserved"


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
def test_every_byte_flipped_in_turn(attested: Attested) -> None:
    """Also where encodings leave room for variation: base64's spare bits, text around PEM blocks, line ends."""
    raw = attested.evidence.quote
    for at in range(len(raw)):
        damaged = bytearray(raw)
        damaged[at] ^= 1 << at % 8
        cause(replace(attested.evidence, quote=bytes(damaged)), attested.policy, attested.now)


@pytest.mark.parametrize(
    ("id", "damage"),
    [
        ("evidence.quote.truncated", lambda raw: raw[:-1]),
        ("evidence.quote.truncated", lambda raw: raw[:40]),
        ("evidence.quote.truncated", lambda raw: b""),
        ("evidence.quote.trailing", lambda raw: raw + b"\0"),
        ("evidence.quote.signature", lambda raw: raw[:200] + bytes([raw[200] ^ 1]) + raw[201:]),
    ],
)
def test_damaged_quote(attested: Attested, id: str, damage: Callable[[bytes], bytes]) -> None:
    evidence = replace(attested.evidence, quote=damage(attested.evidence.quote))
    assert cause(evidence, attested.policy, attested.now) == id


def test_causes_within_the_quote(attested: Attested, debug_attested: Attested) -> None:
    quote, other = (Quote.from_bytes(one.evidence.quote) for one in (attested, debug_attested))
    for id, evidence in {
        "evidence.quote.signature": with_quote(attested, signature=other.signature),
        "evidence.quote.qe_binding": with_quote(attested, qe_auth_data=bytes(32)),
        "evidence.quote.qe_signature": with_quote(attested, qe_report_signature=quote.signature),
        "evidence.quote.attestation_key": with_quote(attested, attestation_key=bytes(64)),
        "evidence.quote.cert_type": with_quote(attested, cert_type=3),
        "evidence.quote.qe_vendor": with_quote(attested, header=replace(quote.header, qe_vendor_id=bytes(16))),
        "evidence.quote.body": with_quote(attested, body=quote.body[:96] + b"\1" + quote.body[97:]),
        "evidence.certificate.malformed": with_quote(attested, cert_data=b"# hello\n" + quote.cert_data),
    }.items():
        assert cause(evidence, attested.policy, attested.now) == id


def test_damaged_real_chain(vectors: Path) -> None:
    raw = (vectors / "sgx" / "fortanix_dcapql_quote_pck_cert_chain_corrupted.bin").read_bytes()
    evidence = Evidence("sgx", raw, phala(vectors).collateral)
    assert cause(evidence, Policy(any_enclave=True), PHALA_TIME).startswith("evidence.certificate.")


# Certificates and roots


def test_chain_in_the_old_order(attested: Attested) -> None:
    leaf, authority, root = x509.load_pem_x509_certificates(Quote.from_bytes(attested.evidence.quote).cert_data)
    data = b"".join(one.public_bytes(Encoding.PEM) for one in (leaf, root, authority))
    assert verify(with_quote(attested, cert_data=data), attested.policy, now=attested.now).accepted


def test_foreign_root(attested: Attested, config: Config) -> None:
    foreign = create(config)
    policy = attested.policy.with_trust_anchor(foreign.root_ca())
    assert cause(attested.evidence, policy, attested.now) == "evidence.root.untrusted"
    mixed = replace(attested.evidence, collateral=foreign.collateral())
    assert cause(mixed, attested.policy, attested.now) == "evidence.root.untrusted"
    assert cause(mixed, policy, attested.now) == "evidence.root.untrusted"


def test_root_of_the_same_name_but_another_key(attested: Attested, config: Config) -> None:
    foreign = provisioning.load(config.platform_dir, create(config)._session())
    certificates = x509.load_pem_x509_certificates(Quote.from_bytes(attested.evidence.quote).cert_data)
    chain = [*certificates[:2], foreign.root.certificate]
    evidence = with_quote(attested, cert_data=b"".join(one.public_bytes(Encoding.PEM) for one in chain))
    assert cause(evidence, attested.policy, attested.now) == "evidence.root.untrusted"
    anchored = attested.policy.with_trust_anchor(foreign.root_der)
    assert foreign.root.certificate.subject == certificates[2].subject
    forged = {
        key: (value.replace(manufacturer(attested).root.pem, foreign.root.pem))
        for key, value in (evidence.collateral or {}).items()
    }
    assert cause(replace(evidence, collateral=forged), anchored, attested.now) == "evidence.certificate.signature"


def test_simulated_is_refused_unless_the_policy_names_its_root(attested: Attested) -> None:
    with pytest.raises(EvidenceError) as caught:
        verify(attested.evidence, Policy(any_enclave=True), now=attested.now)
    assert caught.value.id == "evidence.root.untrusted"
    assert "simulated" in str(caught.value.remedy)
    anchored = replace(attested.policy, allow_simulated=False)
    result = verify(attested.evidence, anchored, now=attested.now)
    assert not result.accepted
    assert [failure.id for failure in result.failures] == ["policy.simulated"]


def test_intels_root_cannot_be_replaced(attested: Attested, vectors: Path) -> None:
    disguised = replace(attested.evidence, tee="sgx")
    assert cause(disguised, attested.policy, attested.now) == "evidence.root.untrusted"
    real = phala(vectors)
    anchored = attested.policy.with_trust_anchor(INTEL_ROOT_CA)
    assert cause(replace(real, tee="sgx-sim"), anchored, PHALA_TIME) == "evidence.root.untrusted"
    assert cause(replace(real, tee="sgx-sim"), attested.policy, PHALA_TIME) == "evidence.root.untrusted"


def test_unknown_tee(attested: Attested) -> None:
    assert cause(replace(attested.evidence, tee="null"), attested.policy, attested.now) == "evidence.tee.unknown"


def test_revoked(attested: Attested) -> None:
    made = manufacturer(attested)
    for key, issuer, victim in (
        ("pck_crl", made.platform_ca, made.pck),
        ("root_ca_crl", made.root, made.platform_ca.certificate),
        ("root_ca_crl", made.root, made.tcb_signing.certificate),
        ("root_ca_crl", made.root, made.root.certificate),
    ):
        evidence = with_collateral(attested, **{key: crl(attested, key, issuer, victim.serial_number)})
        assert cause(evidence, attested.policy, attested.now) == "evidence.certificate.revoked"


def crl(attested: Attested, key: str, issuer: provisioning.Authority, serial: int, *, shift: int = 0) -> str:
    assert attested.evidence.collateral is not None
    import datetime

    old = x509.load_der_x509_crl(bytes.fromhex(attested.evidence.collateral[key]))
    moved = datetime.timedelta(seconds=shift)
    assert old.next_update_utc is not None
    entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(old.last_update_utc).build()
    builder = x509.CertificateRevocationListBuilder(issuer.certificate.subject)
    builder = builder.last_update(old.last_update_utc + moved).next_update(old.next_update_utc + moved)
    for extension in old.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    made = builder.add_revoked_certificate(entry).sign(issuer.key, SHA256())
    return made.public_bytes(Encoding.DER).hex()


def test_crl_of_the_future(attested: Attested) -> None:
    """dcap-qvl accepts it; we do not."""
    made = manufacturer(attested)
    evidence = with_collateral(attested, pck_crl=crl(attested, "pck_crl", made.platform_ca, 1, shift=86400))
    verified = dcap_qvl.verify_with_root_ca(
        evidence.quote,
        dcap_qvl.QuoteCollateralV3.from_json(json.dumps(evidence.collateral)),
        attested.platform.root_ca(),
        attested.now,
    )
    assert verified.status == "UpToDate"
    assert cause(evidence, attested.policy, attested.now) == "evidence.collateral.not_yet_valid"


def test_crl_of_the_wrong_issuer(attested: Attested) -> None:
    made = manufacturer(attested)
    for key, issuer in (("pck_crl", made.root), ("root_ca_crl", made.platform_ca)):
        evidence = with_collateral(attested, **{key: crl(attested, key, issuer, 1)})
        assert cause(evidence, attested.policy, attested.now) == "evidence.collateral.signature"


def test_certificates_have_one_purpose(attested: Attested) -> None:
    """A PCK's or CA's key cannot sign TCB info, whatever it chains to."""
    made = manufacturer(attested)
    chain = made.platform_ca.pem + made.root.pem
    text = (attested.evidence.collateral or {})["tcb_info"]
    signature = provisioning.sign_raw(made.platform_ca.key, text.encode()).hex()
    evidence = with_collateral(attested, tcb_info_issuer_chain=chain, tcb_info_signature=signature)
    assert cause(evidence, attested.policy, attested.now) == "evidence.certificate.purpose"


def recertified(attested: Attested, common_name: str, extension: bytes | None) -> Evidence:
    """The quote with another certificate for the platform's own PCK, issued by its own CA."""
    made = manufacturer(attested)
    key = made.pck.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    certificate = provisioning._certificate(
        common_name, key, made.platform_ca, made.platform_ca.key, ca_path_length=None, sgx_extension=extension
    )
    chain = certificate.public_bytes(Encoding.PEM) + made.platform_ca.pem.encode() + made.root.pem.encode()
    return with_quote(attested, cert_data=chain)


def test_pck_certificate_must_say_what_it_certifies(attested: Attested) -> None:
    name = "SIMULATED SGX PCK Certificate"
    whole = provisioning._sgx_extension(bytes(16), attested.platform._session().cpusvn)
    good = recertified(attested, name, whole)
    assert verify(good, attested.policy, now=attested.now).accepted
    fields = der.only(whole, der.SEQUENCE).children()
    without_fmspc = der.encode(der.SEQUENCE, b"".join(field.raw for field in (*fields[:3], *fields[4:])))
    for extension in (None, b"", b"\x30\x00", whole[:-1], without_fmspc):
        evidence = recertified(attested, name, extension)
        assert cause(evidence, attested.policy, attested.now) == "evidence.certificate.malformed"
    other = recertified(attested, "SIMULATED SGX TCB Signing", whole)
    assert cause(other, attested.policy, attested.now) == "evidence.certificate.purpose"


def test_crl_of_another_authority_under_the_same_root(attested: Attested) -> None:
    made = manufacturer(attested)
    key = ec.generate_private_key(ec.SECP256R1())
    name = "SIMULATED SGX PCK Processor CA"
    certificate = provisioning._certificate(name, key.public_key(), made.root, made.root.key, ca_path_length=0)
    sibling = provisioning.Authority(certificate, key)
    chain = sibling.pem + made.root.pem
    evidence = with_collateral(attested, pck_crl_issuer_chain=chain)
    assert cause(evidence, attested.policy, attested.now) == "evidence.collateral.signature"
    evidence = with_collateral(attested, pck_crl_issuer_chain=chain, pck_crl=crl(attested, "pck_crl", sibling, 1))
    assert cause(evidence, attested.policy, attested.now) == "evidence.collateral.mismatch"


# Collateral


@pytest.mark.parametrize("days", [31, 400])
def test_expired_collateral(attested: Attested, days: int) -> None:
    later = attested.now + days * 86400
    assert cause(attested.evidence, attested.policy, later) == "evidence.collateral.expired"


def test_collateral_from_the_future(attested: Attested) -> None:
    assert cause(attested.evidence, attested.policy, attested.now - 86400) == "evidence.collateral.not_yet_valid"


@pytest.mark.parametrize("key", ["tcb_info", "qe_identity"])
def test_forged_collateral(attested: Attested, key: str) -> None:
    text = (attested.evidence.collateral or {})[key]
    evidence = with_collateral(attested, **{key: text.replace("2025", "2026", 1)})
    assert cause(evidence, attested.policy, attested.now) == "evidence.collateral.signature"


def test_every_value_of_the_collateral_counts(attested: Attested) -> None:
    for key, value in (attested.evidence.collateral or {}).items():
        middle = len(value) // 2
        other = "0" if value[middle] != "0" else "1"
        evidence = with_collateral(attested, **{key: value[:middle] + other + value[middle + 1 :]})
        assert cause(evidence, attested.policy, attested.now).startswith("evidence."), key
        assert cause(with_collateral(attested, **{key: ""}), attested.policy, attested.now).startswith("evidence.")


@pytest.mark.parametrize(
    ("key", "field", "value", "id"),
    [
        ("tcb_info", "fmspc", "00A067110000", "evidence.collateral.mismatch"),
        ("tcb_info", "pceId", "0001", "evidence.collateral.mismatch"),
        ("tcb_info", "id", "TDX", "evidence.collateral.mismatch"),
        ("tcb_info", "tcbLevels", [], "evidence.tcb.unknown"),
        ("tcb_info", "tcbLevels", [{"tcb": {}}], "evidence.collateral.malformed"),
        ("tcb_info", "tcbLevels", None, "evidence.collateral.malformed"),
        ("tcb_info", "fmspc", 1, "evidence.collateral.malformed"),
        ("tcb_info", "tcbEvaluationDataNumber", "many", "evidence.collateral.malformed"),
        ("tcb_info", "nextUpdate", "soon", "evidence.collateral.malformed"),
        ("qe_identity", "issueDate", 0, "evidence.collateral.malformed"),
        ("qe_identity", "attributesMask", "zz", "evidence.collateral.malformed"),
        ("qe_identity", "id", "TD_QE", "evidence.collateral.mismatch"),
        ("qe_identity", "mrsigner", "00" * 32, "evidence.quote.qe_identity"),
        ("qe_identity", "isvprodid", 9, "evidence.quote.qe_identity"),
        ("qe_identity", "miscselect", "00000001", "evidence.quote.qe_identity"),
        ("qe_identity", "attributes", "13" + "00" * 15, "evidence.quote.qe_identity"),
        ("qe_identity", "tcbLevels", [], "evidence.tcb.unknown"),
    ],
)
def test_collateral_of_something_else(attested: Attested, key: str, field: str, value: object, id: str) -> None:
    evidence = reissued(attested, key, lambda document: document.update({field: value}))
    assert cause(evidence, attested.policy, attested.now) == id


def outdated(key: str, status: str) -> Callable[[dict[str, Any]], Any]:
    def change(document: dict[str, Any]) -> None:
        document["tcbLevels"][0].update(tcbStatus=status, advisoryIDs=["SIM-SA-00001"])

    return change


@pytest.mark.parametrize(
    ("platform_status", "qe_status", "expected"),
    [
        ("OutOfDate", "UpToDate", "OutOfDate"),
        ("UpToDate", "OutOfDate", "OutOfDate"),
        ("SWHardeningNeeded", "UpToDate", "SWHardeningNeeded"),
        ("SWHardeningNeeded", "OutOfDate", "OutOfDate"),
        ("ConfigurationNeeded", "OutOfDate", "OutOfDateConfigurationNeeded"),
        ("ConfigurationAndSWHardeningNeeded", "OutOfDate", "OutOfDateConfigurationNeeded"),
        ("OutOfDateConfigurationNeeded", "OutOfDate", "OutOfDateConfigurationNeeded"),
    ],
)
def test_tcb_status_as_dcap_qvl_sees_it(
    attested: Attested, platform_status: str, qe_status: str, expected: str
) -> None:
    """The second opinion is part of verify: a status on which the two disagreed would raise."""
    evidence = reissued(attested, "tcb_info", outdated("tcb_info", platform_status))
    both = replace(attested, evidence=evidence)
    evidence = reissued(both, "qe_identity", outdated("qe_identity", qe_status))
    result = verify(evidence, attested.policy, now=attested.now)
    assert result.claims.tcb_status == expected
    assert result.claims.advisories == ("SIM-SA-00001",)
    assert [failure.id for failure in result.failures] == ["policy.tcb"]
    assert verify(evidence, replace(attested.policy, tcb=(expected,)), now=attested.now).accepted


@pytest.mark.parametrize("key", ["tcb_info", "qe_identity"])
def test_revoked_tcb(attested: Attested, key: str) -> None:
    evidence = reissued(attested, key, outdated(key, "Revoked"))
    assert cause(evidence, attested.policy, attested.now) == "evidence.tcb.revoked"


# Freshness, binding and policy


def test_replayed_evidence(attested: Attested) -> None:
    result = verify(attested.evidence, attested.policy, nonce=b"another nonce", now=attested.now)
    assert [failure.id for failure in result.failures] == ["freshness.nonce"]
    claimed = dict(attested.evidence.runtime_data or {}, nonce="YW5vdGhlciBub25jZQ==")
    forged = replace(attested.evidence, runtime_data=claimed)
    result = verify(forged, attested.policy, nonce=b"another nonce", now=attested.now)
    assert [failure.id for failure in result.failures] == ["binding.report_data"]


def test_another_key_in_the_middle(attested: Attested, debug_attested: Attested) -> None:
    swapped = dict(attested.evidence.runtime_data or {})
    swapped["tee-pubkey"] = debug_attested.channel.public_jwk
    result = verify(
        replace(attested.evidence, runtime_data=swapped), attested.policy, nonce=attested.nonce, now=attested.now
    )
    assert [failure.id for failure in result.failures] == ["binding.report_data"]


def test_challenge_without_runtime_data(attested: Attested) -> None:
    bare = replace(attested.evidence, runtime_data=None)
    result = verify(bare, attested.policy, nonce=attested.nonce, now=attested.now)
    assert [failure.id for failure in result.failures] == ["freshness.nonce"]
    assert not verify(attested.evidence, attested.policy, nonce=b"", now=attested.now).accepted
    for nonce in ("\u00e9", "!", 5, None):
        odd = replace(attested.evidence, runtime_data={**(attested.evidence.runtime_data or {}), "nonce": nonce})
        result = verify(odd, attested.policy, nonce=attested.nonce, now=attested.now)
        assert {failure.id for failure in result.failures} == {"freshness.nonce", "binding.report_data"}


def test_report_data(attested: Attested) -> None:
    bare = replace(attested.evidence, runtime_data=None)
    result = verify(bare, attested.policy, report_data=b"other", now=attested.now)
    assert [failure.id for failure in result.failures] == ["binding.report_data"]
    assert result.failures[0].expected == (b"other" + bytes(59)).hex()
    with pytest.raises(UsageError):
        verify(bare, attested.policy, report_data=bytes(65), now=attested.now)


@pytest.mark.parametrize("extra", [{"surprise": 1}, {"nonce": float("nan")}, {"nonce": 1 << 70}])
def test_malformed_runtime_data(attested: Attested, extra: dict[str, Any]) -> None:
    evidence = replace(attested.evidence, runtime_data={**(attested.evidence.runtime_data or {}), **extra})
    assert cause(evidence, attested.policy, attested.now) == "evidence.runtime_data.malformed"


def test_debug_enclave(debug_attested: Attested) -> None:
    """Authentic, so it is appraised; a debug enclave passes only where the policy says so."""
    result = verify(debug_attested.evidence, debug_attested.policy, nonce=debug_attested.nonce, now=debug_attested.now)
    assert result.claims.debug
    assert [failure.id for failure in result.failures] == ["policy.debug"]
    with pytest.raises(AppraisalError) as caught:
        result.require()
    assert caught.value.exit_code == 3 and caught.value.id == "policy.debug"
    allowing = replace(debug_attested.policy, allow_debug=True)
    assert verify(debug_attested.evidence, allowing, nonce=debug_attested.nonce, now=debug_attested.now).accepted


def test_flipped_debug_quote_is_refused_without_the_second_opinion(debug_attested: Attested) -> None:
    """dcap-qvl has no say on debug enclaves, so our own steps must catch every field alone."""
    raw = debug_attested.evidence.quote
    policy = replace(debug_attested.policy, allow_debug=True)
    for _, start, _ in regions(Quote.from_bytes(raw)):
        damaged = bytearray(raw)
        damaged[start] ^= 0x04
        cause(replace(debug_attested.evidence, quote=bytes(damaged)), policy, debug_attested.now)
