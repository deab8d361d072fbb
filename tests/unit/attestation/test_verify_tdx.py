"""Trust domains: a real quote, and the simulated platform's in every version, damaged and with other collateral."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import dcap_qvl
import pytest
from attested import resigned
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inclavare.attestation import Evidence, Policy, verify
from inclavare.attestation.verifiers import dcap
from inclavare.errors import EvidenceError
from inclavare.sgx.quote import VERSION_5, Quote
from inclavare.sgx.structs import StructureError
from inclavare.sgx.tdx import TD_DEBUG, TD_MIGRATABLE, TD_SEPT_VE_DISABLE, TdReport10, TdReport15
from inclavare.tee.sgx_sim import SimulatedPlatform, provisioning, tdmodule

MRTD = hashlib.sha384(b"mrtd").digest()
DATA = bytes(range(64))
#: dcap-qvl's and our own limits of the collateral in the vectors.
REAL_NOW = 1751624191
LOOKING = Policy(any_enclave=True)


def cause(evidence: Evidence, policy: Policy, now: int) -> str:
    with pytest.raises(EvidenceError) as caught:
        verify(evidence, policy, now=now)
    assert caught.value.exit_code == 4
    return caught.value.id


@pytest.fixture
def real(vectors: Path) -> Evidence:
    collateral = json.loads((vectors / "collateral" / "phala_tdx_quote_collateral.json").read_bytes())
    return Evidence.from_quote((vectors / "tdx" / "phala_tdx_quote.bin").read_bytes(), collateral)


class Domain:
    """A trust domain of the shared platform, its evidence, and who may sign collateral about it."""

    def __init__(self, platform: SimulatedPlatform) -> None:
        self.platform = platform
        self.evidence = Evidence.from_quote(platform.td_quote(DATA, MRTD), platform.td_collateral())
        self.policy = replace(LOOKING, allow_simulated=True).with_trust_anchor(platform.root_ca())
        self.now = json_time(self.evidence)

    def quote(self, body: TdReport10, version: int = 4) -> Evidence:
        """A quote over this body, signed by the platform's own quoting enclave."""
        made = Quote.from_bytes(self.evidence.quote)
        made = replace(made, body=body.to_bytes(), header=replace(made.header, version=version))
        return replace(self.evidence, quote=resigned(self.platform, made).to_bytes())

    def with_body(self, **fields: Any) -> Evidence:
        return self.quote(replace(self.body(), **fields))

    def body(self) -> TdReport10:
        return Quote.from_bytes(self.evidence.quote).td_report()

    def body15(self, **fields: Any) -> TdReport15:
        old = self.body()
        values = {name: getattr(old, name) for name in old.LAYOUT.names}
        return TdReport15(**{**values, "tee_tcb_svn2": old.tee_tcb_svn, "mr_service_td": bytes(48), **fields})

    def reissued(self, key: str, change: Callable[[dict[str, Any]], Any], evidence: Evidence | None = None) -> Evidence:
        """Collateral whose JSON was changed and signed again by the platform's TCB signing key."""
        start = evidence or self.evidence
        collateral = dict(start.collateral or {})
        document = json.loads(collateral[key])
        change(document)
        text = json.dumps(document, separators=(",", ":"))
        made = provisioning.load(self.platform._config.platform_dir, self.platform._session())
        signature = provisioning.sign_raw(made.tcb_signing.key, text.encode()).hex()
        return replace(start, collateral={**collateral, key: text, f"{key}_signature": signature})


def json_time(evidence: Evidence) -> int:
    """A moment at which the collateral is valid."""
    from datetime import datetime

    issued = json.loads((evidence.collateral or {})["tcb_info"])["issueDate"]
    return int(datetime.strptime(issued, "%Y-%m-%dT%H:%M:%S%z").timestamp()) + 60


@pytest.fixture(scope="module")
def domain(platform: SimulatedPlatform) -> Domain:
    return Domain(platform)


# Accepted


def test_real_quote(real: Evidence) -> None:
    assert real.tee == "tdx"
    result = verify(real, LOOKING, now=REAL_NOW)
    assert result.accepted
    claims, found = result.claims, result.claims.tdx
    assert found is not None and claims.mrenclave == ""
    assert (claims.tee, claims.simulated, claims.debug) == ("tdx", False, False)
    assert (claims.tcb_status, claims.advisories, claims.fmspc) == ("UpToDate", (), "b0c06f000000")
    assert (found.module_version, found.module_svn, found.module_status) == (1, 6, "UpToDate")
    assert found.mr_td.startswith("91eb2b44d141d4ec") and found.septve_disable and found.tee_tcb_svn2 is None
    assert [one.name for one in claims.endorsements] == ["root_ca_crl", "pck_crl", "tcb_info", "qe_identity"]
    assert [one.number for one in claims.endorsements][2:] == [17, 17]
    shown = json.loads(json.dumps(claims.to_dict()))
    assert shown["tdx"]["rtmr_0"] == found.rtmr_0 and not {"mrenclave", "snp", "signed"} & set(shown)


@pytest.mark.parametrize(
    ("now", "id"),
    [
        (1750329146, "evidence.collateral.not_yet_valid"),
        (1750329147, None),
        (1752919235, None),
        (1752919236, "evidence.collateral.expired"),
        (2600000000, "evidence.certificate.expired"),
    ],
)
def test_real_quote_in_time_only(real: Evidence, now: int, id: str | None) -> None:
    if id is None:
        assert verify(real, LOOKING, now=now).accepted
    else:
        assert cause(real, LOOKING, now) == id


def test_domain_of_the_simulated_platform(domain: Domain) -> None:
    assert domain.evidence.tee == "tdx-sim"
    result = verify(domain.evidence, domain.policy, report_data=DATA, now=domain.now)
    assert result.accepted and result.claims.simulated and result.claims.tdx is not None
    assert result.claims.tdx.mr_td == MRTD.hex()
    refused = verify(domain.evidence, replace(domain.policy, allow_simulated=False), now=domain.now)
    assert [failure.id for failure in refused.failures] == ["policy.simulated"]
    assert cause(domain.evidence, LOOKING, domain.now) == "evidence.root.untrusted"
    assert cause(replace(domain.evidence, tee="tdx"), domain.policy, domain.now) == "evidence.root.untrusted"


@pytest.mark.parametrize("tee", ["sgx-sim", "sgx", "snp"])
def test_evidence_that_says_another_tee(domain: Domain, real: Evidence, tee: str) -> None:
    for evidence, policy, now in ((domain.evidence, domain.policy, domain.now), (real, domain.policy, REAL_NOW)):
        expected = "evidence.snp.report" if tee == "snp" else "evidence.quote.tee"
        assert cause(replace(evidence, tee=tee), policy, now) == expected


def test_version_5_with_both_bodies(domain: Domain) -> None:
    ten = verify(domain.quote(domain.body(), VERSION_5), domain.policy, now=domain.now)
    assert ten.accepted and ten.claims.tdx is not None and ten.claims.tdx.tee_tcb_svn2 is None
    fifteen = verify(domain.quote(domain.body15(), VERSION_5), domain.policy, now=domain.now)
    assert fifteen.accepted and fifteen.claims.tdx is not None
    assert fifteen.claims.tdx.tee_tcb_svn2 == tdmodule.TCB_SVN.hex()
    assert fifteen.claims.tdx.mr_servicetd == "00" * 48


# Refused


def test_every_byte_flipped_in_turn(domain: Domain) -> None:
    raw = domain.evidence.quote
    verify(domain.evidence, domain.policy, now=domain.now)
    for at in range(len(raw)):
        damaged = bytearray(raw)
        damaged[at] ^= 1 << at % 8
        cause(replace(domain.evidence, quote=bytes(damaged)), domain.policy, domain.now)


def test_fields_of_the_real_quote(real: Evidence) -> None:
    verify(real, LOOKING, now=REAL_NOW)
    layout = TdReport10.LAYOUT
    for name in layout.names:
        damaged = bytearray(real.quote)
        damaged[48 + layout.offsets[name]] ^= 0x20
        assert cause(replace(real, quote=bytes(damaged)), LOOKING, REAL_NOW) in {
            "evidence.quote.signature",
            "evidence.td.attributes",
        }, name


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_damage_of_any_kind(real: Evidence, data: st.DataObject) -> None:
    """Bytes replaced, removed, inserted and doubled anywhere."""
    raw = real.quote
    at = data.draw(st.integers(0, len(raw) - 1))
    size = data.draw(st.integers(0, min(40, len(raw) - at)))
    new = data.draw(st.binary(max_size=40))
    damaged = raw[:at] + new + raw[at + size :]
    if damaged == raw:
        return
    with pytest.raises((EvidenceError, StructureError)):
        verify(replace(real, quote=damaged), LOOKING, now=REAL_NOW)


@pytest.mark.parametrize(
    ("attributes", "id"),
    [
        (0, "evidence.td.attributes"),
        (TD_SEPT_VE_DISABLE | TD_MIGRATABLE, "evidence.td.attributes"),
        (TD_SEPT_VE_DISABLE | 1 << 17, "evidence.td.attributes"),
        *[(TD_SEPT_VE_DISABLE | 1 << bit, "evidence.td.attributes") for bit in (1, 3, 7, 15, 23, 26, 32, 61)],
    ],
)
def test_attributes(domain: Domain, attributes: int, id: str) -> None:
    """dcap-qvl, too, refuses each of these."""
    evidence = domain.with_body(td_attributes=attributes)
    assert cause(evidence, domain.policy, domain.now) == id
    parts = dcap_qvl.QuoteCollateralV3.from_json(json.dumps(evidence.collateral))
    with pytest.raises(ValueError, match=r"TD attributes|SEPT|migration|SERVTD"):
        dcap_qvl.verify_with_root_ca(evidence.quote, parts, domain.platform.root_ca(), domain.now)


@pytest.mark.parametrize("bits", [TD_DEBUG, 1 << 4, 1 << 6])
def test_a_domain_under_debug_is_for_the_policy(domain: Domain, bits: int) -> None:
    """dcap-qvl refuses them all, so every field is checked by our steps alone."""
    evidence = domain.with_body(td_attributes=TD_SEPT_VE_DISABLE | bits)
    result = verify(evidence, domain.policy, now=domain.now)
    assert result.claims.debug and [failure.id for failure in result.failures] == ["policy.debug"]
    assert verify(evidence, replace(domain.policy, allow_debug=True), now=domain.now).accepted
    for at in range(0, len(evidence.quote), 13):
        damaged = bytearray(evidence.quote)
        damaged[at] ^= 4
        cause(replace(evidence, quote=bytes(damaged)), domain.policy, domain.now)


def test_a_service_domain(domain: Domain) -> None:
    evidence = domain.quote(domain.body15(mr_service_td=b"s" * 48), VERSION_5)
    assert cause(evidence, domain.policy, domain.now) == "evidence.td.service_td"


@pytest.mark.parametrize(
    ("fields", "id"),
    [
        ({"mr_signer_seam": bytes(48)}, "evidence.td.module"),
        ({"seam_attributes": 1}, "evidence.td.module"),
        ({"tee_tcb_svn": bytes((3, 2)) + bytes(14)}, "evidence.tcb.unknown"),
        ({"tee_tcb_svn": bytes((2, 1)) + bytes(14)}, "evidence.tcb.unknown"),
    ],
)
def test_the_module(domain: Domain, fields: dict[str, Any], id: str) -> None:
    assert cause(domain.with_body(**fields), domain.policy, domain.now) == id


def test_a_module_without_a_version(domain: Domain) -> None:
    """Its signer is that of ``tdxModule``, and components 0 and 1 count among the others."""
    evidence = domain.with_body(tee_tcb_svn=bytes((3, 0)) + bytes(14))
    result = verify(evidence, domain.policy, now=domain.now)
    assert result.claims.tdx is not None and result.claims.tdx.module_status is None
    raised = domain.reissued("tcb_info", lambda document: lift(document, 0, 4), evidence)
    assert cause(raised, domain.policy, domain.now) == "evidence.tcb.unknown"
    # With a version they are the module's business.
    assert verify(domain.reissued("tcb_info", lambda document: lift(document, 0, 4)), domain.policy, now=domain.now)


def lift(document: dict[str, Any], component: int, svn: int) -> None:
    for level in document["tcbLevels"]:
        level["tcb"]["tdxtcbcomponents"][component]["svn"] = svn


def test_collateral_of_enclaves(domain: Domain) -> None:
    sgx = domain.platform.collateral()
    assert cause(replace(domain.evidence, collateral=sgx), domain.policy, domain.now) == "evidence.collateral.mismatch"
    for key in ("tcb_info", "qe_identity"):
        mixed = {**(domain.evidence.collateral or {}), key: sgx[key], f"{key}_signature": sgx[f"{key}_signature"]}
        evidence = replace(domain.evidence, collateral=mixed)
        assert cause(evidence, domain.policy, domain.now) == "evidence.collateral.mismatch"


@pytest.mark.parametrize(
    ("change", "id"),
    [
        (lambda document: document.pop("tdxModule"), "evidence.collateral.malformed"),
        (lambda document: document.update(tdxModuleIdentities=[]), "evidence.tcb.unknown"),
        (lambda document: document["tdxModuleIdentities"][0].update(id="X"), "evidence.collateral.malformed"),
        (lambda document: document["tdxModuleIdentities"][0].update(mrsigner="00" * 48), "evidence.td.module"),
        (lambda document: document["tdxModuleIdentities"][0].update(mrsigner="00"), "evidence.collateral.malformed"),
        (lambda document: document["tdxModuleIdentities"][0].update(tcbLevels=[]), "evidence.tcb.unknown"),
        (lambda document: document["tcbLevels"][0]["tcb"].pop("tdxtcbcomponents"), "evidence.collateral.malformed"),
        (lambda document: document["tcbLevels"][0]["tcb"]["tdxtcbcomponents"].pop(), "evidence.collateral.malformed"),
        (lambda document: document["tcbLevels"][0].update(tcbStatus="Fine"), "evidence.collateral.malformed"),
        (lambda document: document.update(tcbType=1), "evidence.collateral.mismatch"),
        (lambda document: document.update(version=2), "evidence.collateral.mismatch"),
    ],
)
def test_tcb_info(domain: Domain, change: Callable[[dict[str, Any]], Any], id: str) -> None:
    assert cause(domain.reissued("tcb_info", change), domain.policy, domain.now) == id


def test_quoting_enclave_of_enclaves(domain: Domain) -> None:
    for version, id in ((3, None), (4, "evidence.collateral.mismatch")):
        evidence = domain.reissued("qe_identity", lambda document, v=version: document.update(version=v))
        if id is None:
            assert verify(evidence, domain.policy, now=domain.now).accepted
        else:
            assert cause(evidence, domain.policy, domain.now) == id


# TCB: both verifiers agree, whatever the levels are


_STATUSES = (
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
    "Revoked",
)


@st.composite
def _levels(draw: st.DrawFn) -> list[dict[str, Any]]:
    """TCB levels about the platform's own, in any order."""
    found = []
    for number in range(draw(st.integers(1, 5))):
        sgx = [{"svn": draw(st.sampled_from((0, 1, 2)))} for _ in range(16)]
        tdx = [{"svn": draw(st.sampled_from((0, 0, 0, 1, 3, 4)) if at < 2 else st.just(0))} for at in range(16)]
        found.append(
            {
                "tcb": {"sgxtcbcomponents": sgx, "pcesvn": draw(st.integers(0, 14)), "tdxtcbcomponents": tdx},
                "tcbDate": f"202{number}-03-13T00:00:00Z",
                "tcbStatus": draw(st.sampled_from(_STATUSES)),
                "advisoryIDs": [f"SIM-SA-{number:05}"],
            }
        )
    return found


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    levels=_levels(),
    module=st.sampled_from(("UpToDate", "OutOfDate", "Revoked")),
    qe=st.sampled_from(("UpToDate", "OutOfDate", "ConfigurationNeeded", "OutOfDateConfigurationNeeded", "Revoked")),
    later=st.sampled_from((None, bytes((3, 1)) + bytes(14), bytes((3, 0)) + bytes(14), bytes((9, 1)) + bytes(14))),
    module_svn=st.integers(0, 4),
)
def test_both_verifiers_agree(
    domain: Domain, levels: list[dict[str, Any]], module: str, qe: str, later: bytes | None, module_svn: int
) -> None:
    """Whatever we accept dcap-qvl accepts with the same status and advisories, and what it accepts we do."""

    def change(document: dict[str, Any]) -> None:
        document["tcbLevels"] = levels
        document["tdxModuleIdentities"][0]["tcbLevels"] = [
            {
                "tcb": {"isvsvn": svn},
                "tcbDate": "2022-01-01T00:00:00Z",
                "tcbStatus": status,
                "advisoryIDs": ["SIM-SA-MODULE"],
            }
            for svn, status in ((module_svn + 2, "UpToDate"), (module_svn, module))
        ]

    start = domain.evidence
    if later is not None:
        start = domain.quote(domain.body15(tee_tcb_svn2=later), VERSION_5)
    evidence = domain.reissued("tcb_info", change, start)
    evidence = domain.reissued("qe_identity", lambda found: found["tcbLevels"][0].update(tcbStatus=qe), evidence)
    parts = dcap_qvl.QuoteCollateralV3.from_json(json.dumps(evidence.collateral))
    theirs: Any = None
    try:
        theirs = dcap_qvl.verify_with_root_ca(evidence.quote, parts, domain.platform.root_ca(), domain.now)
    except ValueError:
        id = cause(evidence, domain.policy, domain.now)
        assert id in {"evidence.tcb.unknown", "evidence.tcb.revoked"}
        return
    claims = verify(evidence, domain.policy, now=domain.now).claims
    assert claims.tcb_status == theirs.status
    assert set(claims.advisories) == set(theirs.advisory_ids)


def test_relaunch(domain: Domain) -> None:
    """The module was updated under a running domain: what it was launched with is out of date."""

    def change(document: dict[str, Any]) -> None:
        document["tdxModuleIdentities"][0]["tcbLevels"] = [
            {"tcb": {"isvsvn": 5}, "tcbDate": "2025-01-01T00:00:00Z", "tcbStatus": "UpToDate"},
            {"tcb": {"isvsvn": 2}, "tcbDate": "2023-01-01T00:00:00Z", "tcbStatus": "OutOfDate"},
        ]

    updated = domain.quote(domain.body15(tee_tcb_svn2=bytes((6, 1)) + bytes(14)), VERSION_5)
    claims = verify(domain.reissued("tcb_info", change, updated), domain.policy, now=domain.now).claims
    assert (claims.tcb_status, claims.tcb_date) == ("TDRelaunchAdvised", "2023-01-01T00:00:00Z")
    still = domain.quote(domain.body15(), VERSION_5)
    claims = verify(domain.reissued("tcb_info", change, still), domain.policy, now=domain.now).claims
    assert claims.tcb_status == "OutOfDate"


# What is remembered between quotes of one platform


def test_a_known_platform_does_not_lend_its_name(domain: Domain) -> None:
    """After an accepted quote, only quotes that its key signed are accepted, in time, with the same collateral."""
    assert verify(domain.evidence, domain.policy, now=domain.now).accepted
    quote = Quote.from_bytes(domain.evidence.quote)
    forged = replace(quote, body=replace(domain.body(), mr_td=bytes(48)).to_bytes())
    evidence = replace(domain.evidence, quote=forged.to_bytes())
    assert cause(evidence, domain.policy, domain.now) == "evidence.quote.signature"
    assert cause(domain.evidence, domain.policy, domain.now + 400 * 86400) == "evidence.collateral.expired"
    assert cause(domain.evidence, domain.policy, domain.now - 86400) == "evidence.collateral.not_yet_valid"
    assert verify(domain.evidence, domain.policy, now=domain.now).accepted
    for key, value in (domain.evidence.collateral or {}).items():
        changed = {
            **(domain.evidence.collateral or {}),
            key: value[:-3] + ("0" if value[-3] != "0" else "1") + value[-2:],
        }
        cause(replace(domain.evidence, collateral=changed), domain.policy, domain.now)
    foreign = replace(domain.policy, trust_anchor=None).with_trust_anchor(_another_root())
    assert cause(domain.evidence, foreign, domain.now) == "evidence.root.untrusted"
    assert cause(replace(domain.evidence, collateral=None), domain.policy, domain.now) == "evidence.collateral.missing"


def _another_root() -> bytes:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding

    key = ec.generate_private_key(ec.SECP256R1())
    made: x509.Certificate = provisioning._certificate(
        "SIMULATED SGX Root CA", key.public_key(), None, key, ca_path_length=1
    )
    return made.public_bytes(Encoding.DER)


def test_what_dcap_qvl_is_asked(domain: Domain, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for everything that quotes of a platform have in common; anew for whatever else it looks at."""
    asked: list[bytes] = []
    real = dcap_qvl.verify_with_root_ca

    def counting(quote: bytes, *more: Any) -> Any:
        asked.append(quote)
        return real(quote, *more)

    monkeypatch.setattr(dcap_qvl, "verify_with_root_ca", counting)
    dcap.forget()
    for at in range(5):
        assert verify(domain.with_body(report_data=struct.pack("<64B", *[at] * 64)), domain.policy, now=domain.now)
    assert len(asked) == 1
    verify(domain.with_body(xfam=3), domain.policy, now=domain.now)
    verify(domain.quote(domain.body(), VERSION_5), domain.policy, now=domain.now)
    verify(domain.quote(domain.body15(), VERSION_5), domain.policy, now=domain.now)
    assert len(asked) == 4
    cause(domain.with_body(seam_attributes=2), domain.policy, domain.now)
    cause(domain.with_body(td_attributes=0), domain.policy, domain.now)
    verify(domain.reissued("tcb_info", lambda document: document.update(extra=1)), domain.policy, now=domain.now)
    assert len(asked) == 5
    dcap.forget()
    verify(domain.evidence, domain.policy, now=domain.now)
    assert len(asked) == 6


def test_memory_is_bounded(domain: Domain) -> None:
    for at in range(dcap._VERDICTS + 3):
        verify(domain.with_body(mr_seam=at.to_bytes(48, "big")), domain.policy, now=domain.now)
    assert len(dcap._verdicts) <= dcap._VERDICTS
    assert dcap._platform.cache_info().maxsize == dcap._PLATFORMS
    assert dcap._collateral.cache_info().maxsize == dcap._COLLATERALS
