"""TDX quotes of the simulated platform, judged by an independent verifier (dcap-qvl)."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dcap_qvl
import pytest
from cryptography import x509

from inclavare.config import Config
from inclavare.errors import EvidenceError, IntegrityError, UsageError
from inclavare.sgx.quote import TEE_TDX, VERSION_4, Quote
from inclavare.sgx.tdx import TD_DEBUG, TD_SEPT_VE_DISABLE, TdReport10
from inclavare.tee.sgx_sim import SimulatedPlatform, create, files, life, provisioning, tdmodule

MRTD = hashlib.sha384(b"mrtd").digest()
RTMRS = tuple(hashlib.sha384(b"rtmr%d" % at).digest() for at in range(4))
DATA = bytes(range(64))


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> SimulatedPlatform:
    base = tmp_path_factory.mktemp("tdx")
    return create(Config(state_dir=base / "state", run_dir=base / "run", log_dir=base / "log", epc_size=4 << 20))


def opinion(platform: SimulatedPlatform, quote: bytes, collateral: dict[str, str] | None = None) -> Any:
    parts = dcap_qvl.QuoteCollateralV3.from_json(json.dumps(collateral or platform.td_collateral()))
    return dcap_qvl.verify_with_root_ca(quote, parts, platform.root_ca(), int(time.time()))


def test_accepted_with_its_root(platform: SimulatedPlatform) -> None:
    quote = platform.td_quote(
        DATA, MRTD, RTMRS, config_id=b"c" * 48, owner=b"o" * 48, owner_config=b"p" * 48, xfam=0xE7
    )
    verified = opinion(platform, quote)
    assert (verified.status, verified.advisory_ids) == ("UpToDate", [])
    report = json.loads(verified.to_json())["report"]["TD10"]
    assert report["mr_td"] == MRTD.hex() and report["report_data"] == DATA.hex()
    assert [report[f"rt_mr{at}"] for at in range(4)] == [value.hex() for value in RTMRS]
    assert (report["mr_config_id"], report["mr_owner"], report["mr_owner_config"]) == (
        (b"c" * 48).hex(),
        (b"o" * 48).hex(),
        (b"p" * 48).hex(),
    )
    assert report["tee_tcb_svn"] == tdmodule.TCB_SVN.hex()


def test_refused_with_intels_root(platform: SimulatedPlatform) -> None:
    collateral = dcap_qvl.QuoteCollateralV3.from_json(json.dumps(platform.td_collateral()))
    with pytest.raises(ValueError, match="CRL"):
        dcap_qvl.verify(platform.td_quote(DATA, MRTD), collateral, int(time.time()))


def test_refused_with_collateral_for_enclaves(platform: SimulatedPlatform) -> None:
    quote = platform.td_quote(DATA, MRTD)
    for key in ("tcb_info", "qe_identity"):
        of_sgx = platform.collateral()
        mixed = {**platform.td_collateral(), key: of_sgx[key], f"{key}_signature": of_sgx[f"{key}_signature"]}
        with pytest.raises(ValueError, match=r"TCB info|QE Identity"):
            opinion(platform, quote, mixed)


def test_it_is_of_intels_shape(platform: SimulatedPlatform, vectors: Path) -> None:
    ours = Quote.from_bytes(platform.td_quote(DATA, MRTD, RTMRS))
    theirs, _ = Quote.split((vectors / "tdx" / "phala_tdx_quote.bin").read_bytes())
    assert (ours.header.version, ours.header.tee_type) == (VERSION_4, TEE_TDX)
    for name in ("version", "attestation_key_type", "tee_type", "qe_svn", "pce_svn", "qe_vendor_id"):
        assert getattr(ours.header, name) == getattr(theirs.header, name), name
    assert ours.header.user_data[16:] == theirs.header.user_data[16:]
    assert len(ours.body) == len(theirs.body) == 584
    assert (ours.cert_type, ours.qe_auth_data) == (theirs.cert_type, theirs.qe_auth_data)
    assert ours.qe_report_body().isv_prod_id == theirs.qe_report_body().isv_prod_id
    body, other = ours.td_report(), theirs.td_report()
    assert isinstance(body, TdReport10)
    assert (body.td_attributes, body.xfam) == (other.td_attributes, other.xfam)
    assert Quote.from_bytes(ours.to_bytes()) == ours


def test_collateral_is_of_intels_shape(platform: SimulatedPlatform, vectors: Path) -> None:
    theirs = json.loads((vectors / "collateral" / "phala_tdx_quote_collateral.json").read_bytes())
    ours = platform.td_collateral()
    assert set(ours) == set(theirs)
    for key in ("tcb_info", "qe_identity"):
        left, right = json.loads(ours[key]), json.loads(theirs[key])
        assert list(left) == list(right)
        assert (left["id"], left["version"]) == (right["id"], right["version"])
    left, right = (json.loads(each["tcb_info"]) for each in (ours, theirs))
    assert set(left["tdxModule"]) == set(right["tdxModule"])
    assert set(left["tdxModuleIdentities"][0]) == set(right["tdxModuleIdentities"][0])
    assert set(left["tcbLevels"][0]["tcb"]) == set(right["tcbLevels"][0]["tcb"])


def test_every_certificate_says_simulated(platform: SimulatedPlatform) -> None:
    pem = Quote.from_bytes(platform.td_quote(DATA, MRTD)).cert_data
    for certificate in x509.load_pem_x509_certificates(pem):
        assert "SIMULATED" in certificate.subject.rfc4514_string()
    assert Quote.from_bytes(platform.td_quote(DATA, MRTD)).td_report().mr_signer_seam != bytes(48), (
        "the module is not Intel's"
    )


def test_a_debuggable_domain_is_refused(platform: SimulatedPlatform) -> None:
    quote = platform.td_quote(DATA, MRTD, attributes=TD_DEBUG | TD_SEPT_VE_DISABLE)
    assert Quote.from_bytes(quote).td_report().debug
    with pytest.raises(ValueError, match="Debug"):
        opinion(platform, quote)


def test_every_part_of_a_quote_is_covered(platform: SimulatedPlatform) -> None:
    quote = platform.td_quote(DATA, MRTD, RTMRS)
    certificates = quote.index(b"-----BEGIN")
    for at in range(0, certificates, 7):
        damaged = bytearray(quote)
        damaged[at] ^= 1 << at % 8
        with pytest.raises(ValueError, match=r"\w"):
            opinion(platform, bytes(damaged))


@pytest.mark.parametrize(
    ("call", "id"),
    [
        (lambda platform: platform.td_quote(bytes(63), MRTD), "tee.td.length"),
        (lambda platform: platform.td_quote(DATA, MRTD[:47]), "tee.td.length"),
        (lambda platform: platform.td_quote(DATA, MRTD, (MRTD, MRTD + b"x")), "tee.td.length"),
        (lambda platform: platform.td_quote(DATA, MRTD, owner=b""), "tee.td.length"),
        (lambda platform: platform.td_quote(DATA, MRTD, [MRTD] * 5), "tee.td.rtmrs"),
        (lambda platform: platform.td_quote(DATA, MRTD, attributes=-1), "tee.td.bits"),
        (lambda platform: platform.td_quote(DATA, MRTD, xfam=1 << 64), "tee.td.bits"),
    ],
)
def test_wrong_measurements(platform: SimulatedPlatform, call: Callable[[SimulatedPlatform], bytes], id: str) -> None:
    with pytest.raises(UsageError) as caught:
        call(platform)
    assert caught.value.id == id


def test_reports_of_another_session_are_not_quoted(platform: SimulatedPlatform) -> None:
    platform.td_quote(DATA, MRTD)
    assert platform._td_quoting is not None
    module, enclave = platform._td_quoting
    domain = tdmodule.domain(MRTD)
    good = module.report(domain, DATA)
    assert len(good) == 1024 and Quote.from_bytes(enclave.quote(good)).td_report().report_data == DATA
    cpusvn = platform._session().cpusvn
    foreign = tdmodule.TdxModule(cpusvn).report(domain, DATA)
    for at in (None, 128, 255):
        received = foreign if at is None else good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]
        with pytest.raises(EvidenceError) as caught:
            enclave.quote(received)
        assert caught.value.id == "evidence.report.mac"
    # The MAC covers digests of the other two parts.
    for at in (300, 600):
        with pytest.raises(IntegrityError):
            enclave.quote(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])


def test_statuses_are_those_that_are_set(config: Config) -> None:
    platform = create(config)
    quote = platform.td_quote(DATA, MRTD)
    for status in ("ConfigurationNeeded", "OutOfDate"):
        life.set_tcb(config, status=status, advisories=("INTEL-SA-00615",))
        verified = opinion(platform, quote)
        assert (verified.status, verified.advisory_ids) == (status, ["INTEL-SA-00615"])
    life.set_tcb(config, pck_revoked=True)
    with pytest.raises(ValueError, match=r"(?i)revoked"):
        opinion(platform, quote)


def test_platforms_of_old_get_a_td_quoting_enclave(config: Config) -> None:
    processor = create(config)._session()
    made = provisioning.load(config.platform_dir, processor)
    path = config.platform_dir / provisioning.FILE
    document = json.loads(path.read_bytes())
    pck = document.pop("pcks")[0]
    del document["td_qe_sigstruct"]
    with files.locked(config.platform_dir):
        files.write(path, json.dumps({**document, "version": 1, "pck": pck}).encode())
    platform = create(config)
    assert platform.root_ca() == made.root_der
    assert opinion(platform, platform.td_quote(DATA, MRTD)).status == "UpToDate"
    again = provisioning.load(config.platform_dir, processor)
    assert (again.pck, again.qe_sigstruct) == (made.pck, made.qe_sigstruct)
    # Another process that comes later has the same one.
    assert opinion(create(config), platform.td_quote(DATA, MRTD)).status == "UpToDate"
