"""Quotes and collateral of the simulated platform, judged by an independent verifier (dcap-qvl)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import dcap_qvl
import pytest
from cryptography import x509
from small_enclaves import Signers, sign_image, small_image

from inclavare.config import Config
from inclavare.errors import EvidenceError
from inclavare.sgx.quote import Quote
from inclavare.tee.sgx_sim import SimulatedEnclave, SimulatedPlatform, architectural, create, fuses, provisioning

Load = Callable[..., SimulatedEnclave]
NOW = int(time.time())


def quote_of(platform: SimulatedPlatform, enclave: SimulatedEnclave, data: bytes = bytes(64)) -> bytes:
    return platform.quote(enclave.report(platform.quote_target_info(), data))


def as_dcap(collateral: dict[str, str]) -> dcap_qvl.QuoteCollateralV3:
    return dcap_qvl.QuoteCollateralV3.from_json(json.dumps(collateral))


def test_accepted_with_its_root(platform: SimulatedPlatform, load: Load) -> None:
    enclave = load(b"quoted")
    verified = dcap_qvl.verify_with_root_ca(
        quote_of(platform, enclave, b"d" * 64), as_dcap(platform.collateral()), platform.root_ca(), NOW
    )
    assert verified.status == "UpToDate" and verified.advisory_ids == []
    report = json.loads(verified.to_json())["report"]["SgxEnclave"]
    assert report["mr_enclave"] == enclave.mrenclave.hex()
    assert report["mr_signer"] == enclave.mrsigner.hex()
    assert (report["isv_prod_id"], report["isv_svn"], report["report_data"]) == (7, 3, (b"d" * 64).hex())


def test_refused_with_intels_root(platform: SimulatedPlatform, load: Load) -> None:
    with pytest.raises(ValueError, match="CRL"):
        dcap_qvl.verify(quote_of(platform, load()), as_dcap(platform.collateral()), NOW)


def test_strict_policy_has_nothing_to_object_to(platform: SimulatedPlatform, load: Load) -> None:
    verifier = dcap_qvl.QuoteVerifier(platform.root_ca())
    claims = verifier.verify_with_policy(
        quote_of(platform, load()), as_dcap(platform.collateral()), NOW, dcap_qvl.QuotePolicy.strict(NOW)
    )
    pck = json.loads(claims.to_json())["platform"]["pck"]
    assert pck["dynamic_platform"] == pck["cached_keys"] == pck["smt_enabled"] == "False"


def test_pck_certificate_has_the_whole_extension(platform: SimulatedPlatform, load: Load) -> None:
    chain = Quote.from_bytes(quote_of(platform, load())).cert_data
    extension = dcap_qvl.parse_pck_extension_from_pem(chain)
    assert (extension.fmspc, extension.pce_id, extension.pce_svn) == (fuses.FMSPC, bytes(2), 1)
    assert extension.cpu_svn == platform._session().cpusvn
    assert extension.sgx_type == 0 and len(extension.ppid) == len(extension.platform_instance_id or b"") == 16
    for part in [*(f"2.{index}" for index in range(1, 19)), "1", "2", "3", "4", "5", "6", "7.1", "7.2", "7.3"]:
        assert extension.get_value(f"1.2.840.113741.1.13.1.{part}") is not None, part


def test_every_certificate_says_simulated(platform: SimulatedPlatform, load: Load) -> None:
    collateral = platform.collateral()
    pem = Quote.from_bytes(quote_of(platform, load())).cert_data
    for text in (pem, collateral["tcb_info_issuer_chain"].encode(), collateral["pck_crl_issuer_chain"].encode()):
        for certificate in x509.load_pem_x509_certificates(text):
            assert "SIMULATED" in certificate.subject.rfc4514_string()
            assert "no hardware protection" in certificate.subject.rfc4514_string()


def test_quote_is_of_intels_shape(platform: SimulatedPlatform, load: Load, vectors: Path) -> None:
    ours = Quote.from_bytes(quote_of(platform, load()))
    theirs = Quote.from_bytes((vectors / "sgx" / "phala_sgx_quote.bin").read_bytes())
    assert ours.header.qe_vendor_id == theirs.header.qe_vendor_id
    assert ours.qe_auth_data == theirs.qe_auth_data
    assert ours.cert_type == theirs.cert_type
    assert ours.qe_report_body().attributes[:8] == theirs.qe_report_body().attributes[:8]
    subjects = [
        [certificate.subject.rfc4514_string().split(",")[-1].split("=")[1].split(" ", 1)[1] for certificate in chain]
        for chain in map(x509.load_pem_x509_certificates, (ours.cert_data, theirs.cert_data.rstrip(b"\0")))
    ]
    assert subjects[0][0] == subjects[1][0] == "SGX PCK Certificate"
    extensions = [
        {extension.oid for extension in x509.load_pem_x509_certificates(quote.cert_data.rstrip(b"\0"))[0].extensions}
        for quote in (ours, theirs)
    ]
    assert extensions[0] == extensions[1]


def test_reports_from_elsewhere_are_not_quoted(
    platform: SimulatedPlatform, load: Load, config: Config, signers: Signers
) -> None:
    enclave, bystander = load(b"a"), load(b"b")
    image = small_image(b"a")
    elsewhere = create(config).load(image, sign_image(image, signers.ours).to_bytes(), label="elsewhere")
    assert elsewhere.mrenclave == enclave.mrenclave
    for raw in (
        enclave.report(bystander.target_info(), bytes(64)),
        elsewhere.report(platform.quote_target_info(), bytes(64)),
    ):
        with pytest.raises(EvidenceError) as caught:
            platform.quote(raw)
        assert caught.value.id == "evidence.report.mac"


def test_tampered_report_is_not_quoted(platform: SimulatedPlatform, load: Load) -> None:
    raw = bytearray(load().report(platform.quote_target_info(), bytes(64)))
    raw[64] ^= 1
    with pytest.raises(EvidenceError):
        platform.quote(bytes(raw))


def test_target_info_is_the_loaded_quoting_enclaves(platform: SimulatedPlatform, load: Load) -> None:
    qe_report = Quote.from_bytes(quote_of(platform, load())).qe_report_body()
    target = architectural.target_info(architectural.QE)
    assert (target.mrenclave, target.attributes) == (qe_report.mrenclave, qe_report.attributes)


def test_quotes_of_two_sessions_name_the_same_quoting_enclave(
    platform: SimulatedPlatform, load: Load, signers: Signers
) -> None:
    again = create(platform._config)
    enclave = load()
    first = Quote.from_bytes(quote_of(platform, enclave))
    image = small_image()
    other = again.load(image, sign_image(image, signers.ours).to_bytes(), label="again")
    second = Quote.from_bytes(quote_of(again, other))
    assert first.header == second.header
    assert first.attestation_key == second.attestation_key
    other.destroy()


def test_collateral_is_kept_and_renewed_in_time(config: Config) -> None:
    processor = create(config)._session()

    def at(now: int) -> dict[str, str]:
        return provisioning.collateral(config.platform_dir, processor, now)

    first = at(NOW)
    issued = json.loads(first["tcb_info"])
    assert at(NOW + 20 * 86400) == first
    renewed = at(NOW + 24 * 86400)
    assert renewed != first, "a week before its end"
    assert json.loads(renewed["tcb_info"])["issueDate"] > issued["issueDate"]
    assert renewed["tcb_info_issuer_chain"] == first["tcb_info_issuer_chain"]
    back = at(NOW - 86400)
    assert json.loads(back["tcb_info"])["issueDate"] < issued["issueDate"], "the clock was set back"


def test_the_platforms_own_enclaves_do_not_pile_up(config: Config) -> None:
    platform = create(config)
    pages = platform._session().memory.store.pages
    for _ in range(3):
        platform.collateral()
    assert not pages
    platform.td_quote(bytes(64), bytes(48))
    kept = set(pages)
    platform.td_collateral()
    platform.td_quote(bytes(64), bytes(48))
    assert set(pages) == kept and len(kept) == 2, "the quoting enclave stays"


def test_damaged_collateral_is_issued_again(config: Config) -> None:
    platform = create(config)
    whole = platform.collateral()
    path = config.platform_dir / provisioning.COLLATERAL_FILE
    for damage in (b"", b"[]", b"{", path.read_bytes().replace(b"UpToDate", b"upToDate")):
        path.write_bytes(damage)
        again = platform.collateral()
        assert set(again) == set(whole)
        assert json.loads(again["tcb_info"])["tcbLevels"][0]["tcbStatus"] == "UpToDate"
