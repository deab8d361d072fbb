"""Every TCB status that can be set: two verifiers agree on it, and policies accept or refuse it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import dcap_qvl
import pytest
from cryptography import x509
from small_enclaves import Signers, sign_image, small_image

from inclavare.attestation import Evidence, Policy, verify
from inclavare.config import Config
from inclavare.errors import EvidenceError, PlatformError, UsageError
from inclavare.tee.sgx_sim import SimulatedPlatform, create, fuses, life, provisioning, tcb

NEWER = bytes((3, 2, 2, 2, 2, 1)) + bytes(10)
FIXED = {"OutOfDate", "OutOfDateConfigurationNeeded", "Revoked"}
DEFAULTS = {field.name: field.default for field in fields(tcb.Tcb)}


@dataclass(frozen=True)
class Quoted:
    """A platform of its own, and a quote that it made."""

    platform: SimulatedPlatform
    config: Config
    quote: bytes
    policy: Policy

    def opinion(self) -> dcap_qvl.VerifiedReport:
        """dcap-qvl's."""
        collateral = dcap_qvl.QuoteCollateralV3.from_json(json.dumps(self.platform.collateral()))
        return dcap_qvl.verify_with_root_ca(self.quote, collateral, self.platform.root_ca(), int(time.time()))

    def appraise(self, **policy: Any) -> Any:
        """Ours."""
        evidence = Evidence.from_quote(self.quote, self.platform.collateral())
        return verify(
            evidence,
            Policy(any_enclave=True, allow_simulated=True, **policy).with_trust_anchor(self.platform.root_ca()),
        )

    def set(self, **changes: Any) -> None:
        life.set_tcb(self.config, **changes)


def quoted_on(config: Config, signers: Signers) -> Quoted:
    platform = create(config)
    image = small_image(b"quoted")
    enclave = platform.load(image, sign_image(image, signers.ours).to_bytes(), label="quoted")
    quote = platform.quote(enclave.report(platform.quote_target_info(), bytes(64)))
    enclave.destroy()
    policy = Policy(any_enclave=True, allow_simulated=True).with_trust_anchor(platform.root_ca())
    return Quoted(platform, config, quote, policy)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, signers: Signers) -> Quoted:
    base = tmp_path_factory.mktemp("tcb")
    config = Config(state_dir=base / "state", run_dir=base / "run", log_dir=base / "log", epc_size=4 << 20)
    return quoted_on(config, signers)


@pytest.fixture
def quoted(whole: Quoted) -> Iterator[Quoted]:
    """A platform that is up to date, before and after."""
    yield whole
    whole.set(**DEFAULTS)


@pytest.mark.parametrize("advisories", [(), ("INTEL-SA-00615", "INTEL-SA-00289")])
@pytest.mark.parametrize("status", [status for status in tcb.STATUSES if status != "Revoked"])
def test_two_verifiers_agree_and_policies_decide(quoted: Quoted, status: str, advisories: tuple[str, ...]) -> None:
    quoted.set(status=status, advisories=advisories)
    theirs = quoted.opinion()
    assert (theirs.status, tuple(theirs.advisory_ids)) == (status, advisories)
    ours = quoted.appraise(tcb=(status,))
    assert ours.accepted
    assert (ours.claims.tcb_status, ours.claims.advisories) == (status, tuple(sorted(advisories)))
    others = tuple(other for other in tcb.STATUSES if other not in (status, "Revoked"))
    refused = quoted.appraise(tcb=others)
    assert [failure.id for failure in refused.failures] == ["policy.tcb"]
    assert all(advisory in refused.failures[0].remedy for advisory in advisories)
    assert quoted.appraise().accepted is (status == "UpToDate"), "by default only UpToDate is accepted"


def test_a_revoked_level_is_refused_by_both(quoted: Quoted) -> None:
    quoted.set(status="Revoked", advisories=("INTEL-SA-00999",))
    with pytest.raises(ValueError, match="Revoked"):
        quoted.opinion()
    assert refusal(quoted) == "evidence.tcb.revoked"


@pytest.mark.parametrize(("status", "expected"), [("UpToDate", "UpToDate"), ("OutOfDate", "OutOfDate")])
def test_status_of_the_quoting_enclave(quoted: Quoted, status: str, expected: str) -> None:
    quoted.set(qe_status=status, qe_advisories=("INTEL-SA-00700",))
    theirs = quoted.opinion()
    assert (theirs.status, theirs.advisory_ids) == (expected, ["INTEL-SA-00700"])
    ours = quoted.appraise(tcb=(expected,))
    assert ours.accepted and ours.claims.advisories == ("INTEL-SA-00700",)
    assert quoted.appraise().accepted is (status == "UpToDate")


@pytest.mark.parametrize("status", [status for status in tcb.STATUSES if status != "Revoked"])
def test_an_old_quoting_enclave_makes_every_status_worse(quoted: Quoted, status: str) -> None:
    quoted.set(status=status, advisories=("INTEL-SA-00615",), qe_status="OutOfDate", qe_advisories=("INTEL-SA-00700",))
    expected = "OutOfDateConfigurationNeeded" if "Configuration" in status else "OutOfDate"
    assert quoted.opinion().status == expected
    claims = quoted.appraise().claims
    assert (claims.tcb_status, claims.advisories) == (expected, ("INTEL-SA-00615", "INTEL-SA-00700"))


def test_a_revoked_quoting_enclave_is_refused_by_both(quoted: Quoted) -> None:
    quoted.set(qe_status="Revoked")
    with pytest.raises(ValueError, match="Revoked"):
        quoted.opinion()
    assert refusal(quoted) == "evidence.tcb.revoked"


def test_a_revoked_pck_certificate_is_refused_by_both(quoted: Quoted) -> None:
    before = x509.load_der_x509_crl(bytes.fromhex(quoted.platform.collateral()["pck_crl"]))
    assert len(before) == 0
    quoted.set(pck_revoked=True)
    crl = x509.load_der_x509_crl(bytes.fromhex(quoted.platform.collateral()["pck_crl"]))
    assert [entry.serial_number for entry in crl] == [manufactured(quoted).pck.serial_number]
    with pytest.raises(ValueError, match=r"(?i)revoked"):
        quoted.opinion()
    assert refusal(quoted) == "evidence.certificate.revoked"
    quoted.set(pck_revoked=False)
    assert quoted.appraise().accepted


def test_expired_collateral_is_refused_by_both(quoted: Quoted) -> None:
    quoted.set(collateral_expired=True)
    with pytest.raises(ValueError, match=r"(?i)expired"):
        quoted.opinion()
    assert refusal(quoted) == "evidence.collateral.expired"
    then = int(time.time()) - 20 * 86400
    evidence = Evidence.from_quote(quoted.quote, quoted.platform.collateral())
    assert verify(evidence, quoted.policy, now=then).accepted, "it was good last month"
    assert not (quoted.config.platform_dir / provisioning.COLLATERAL_FILE).exists()
    quoted.set(collateral_expired=False)
    assert quoted.appraise().accepted


def test_age_of_collateral_is_the_policys_to_limit(quoted: Quoted) -> None:
    assert quoted.appraise(max_age=86400).accepted
    assert [failure.id for failure in quoted.appraise(max_age=1).failures] == ["policy.max_age"]


def test_evaluation_number(quoted: Quoted) -> None:
    quoted.set(evaluation_number=17)
    assert quoted.appraise().claims.tcb_evaluation_number == 17
    identity = json.loads(quoted.platform.collateral()["qe_identity"])
    assert identity["tcbEvaluationDataNumber"] == 17


def test_where_an_update_helps_the_collateral_knows_it(quoted: Quoted) -> None:
    """As Intel's: what is out of date has a newer level above it, what needs hardening has not."""
    for status in tcb.STATUSES:
        quoted.set(status=status)
        levels = json.loads(quoted.platform.collateral()["tcb_info"])["tcbLevels"]
        svns = [[component["svn"] for component in level["tcb"]["sgxtcbcomponents"]] for level in levels]
        assert svns == sorted(svns, reverse=True) and all(len(components) == 16 for components in svns)
        assert len(levels) == (3 if status in FIXED else 2)
        assert levels[0]["tcbStatus"] == ("UpToDate" if status in FIXED else status)
        assert levels[-2]["tcbStatus"] == status and levels[-1]["tcbStatus"] == "OutOfDate"


def test_only_what_is_named_is_changed(quoted: Quoted) -> None:
    quoted.set(status="OutOfDate", advisories=("INTEL-SA-00615",))
    life.set_tcb(quoted.config, qe_status="OutOfDate")
    assert life.set_tcb(quoted.config) == tcb.Tcb(
        status="OutOfDate", advisories=("INTEL-SA-00615",), qe_status="OutOfDate"
    )
    assert tcb.load(quoted.config.platform_dir).qe_status == "OutOfDate"


@pytest.mark.parametrize(
    ("changes", "id"),
    [
        ({"status": "Fine"}, "tee.tcb.status"),
        ({"qe_status": "SWHardeningNeeded"}, "tee.tcb.status"),
        ({"advisories": ("CVE-2018-3615",)}, "tee.tcb.advisory"),
        ({"qe_advisories": ("INTEL-SA-1",)}, "tee.tcb.advisory"),
        ({"evaluation_number": 0}, "tee.tcb.evaluation_number"),
        ({"cpusvn": bytes(15), "status": "OutOfDate"}, "tee.platform.cpusvn"),
        ({"cpusvn": NEWER, "status": "Fine"}, "tee.tcb.status"),
    ],
)
def test_impossible_values_change_nothing(quoted: Quoted, changes: dict[str, Any], id: str) -> None:
    before = quoted.platform.collateral()
    with pytest.raises(UsageError) as caught:
        quoted.set(**changes)
    assert caught.value.id == id
    assert quoted.platform.collateral() == before
    assert create(quoted.config)._session().cpusvn == fuses.CPUSVN


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"[]",
        b'{"version": 2}',
        b'{"version": 1}',
        b'{"version": 1, "advisories": [], "qe_advisories": [], "status": "Fine"}',
        b'{"version": 1, "advisories": [], "qe_advisories": [], "pck_revoked": "no"}',
        b'{"version": 1, "advisories": [], "qe_advisories": [], "other": 1}',
    ],
)
def test_damaged_settings_never_mean_up_to_date(quoted: Quoted, damage: bytes) -> None:
    quoted.set(status="OutOfDate")
    (quoted.config.platform_dir / tcb.FILE).write_bytes(damage)
    with pytest.raises(PlatformError) as caught:
        quoted.platform.collateral()
    assert caught.value.id == "tee.tcb.damaged"
    (quoted.config.platform_dir / tcb.FILE).unlink()


# Microcode


def test_a_microcode_update_certifies_the_platform_anew(config: Config, signers: Signers) -> None:
    before = quoted_on(config, signers)
    life.set_tcb(config, cpusvn=NEWER)
    after = quoted_on(config, signers)
    assert after.platform.root_ca() == before.platform.root_ca()
    assert (after.opinion().status, after.opinion().ppid) == ("UpToDate", before.opinion().ppid)
    claims = after.appraise().claims
    assert claims.cpusvn == NEWER.hex()
    # A quote from before the update is of an old level now.
    old = Quoted(after.platform, config, before.quote, before.policy)
    assert old.opinion().status == "OutOfDate"
    assert [failure.id for failure in old.appraise().failures] == ["policy.tcb"]
    # Back again: the platform has its first certificate, and the second is not forgotten.
    life.set_tcb(config, cpusvn=bytes.fromhex(before.appraise().claims.cpusvn))
    back = quoted_on(config, signers)
    assert back.appraise().accepted
    assert manufactured(back).pck == manufactured(before).pck
    assert len(manufactured(back).pcks) == 2


def test_revocation_covers_certificates_of_every_cpusvn(config: Config, signers: Signers) -> None:
    before = quoted_on(config, signers)
    life.set_tcb(config, cpusvn=NEWER, pck_revoked=True)
    after = quoted_on(config, signers)
    assert refusal(after) == "evidence.certificate.revoked"
    assert refusal(Quoted(after.platform, config, before.quote, before.policy)) == "evidence.certificate.revoked"


def test_microcode_is_not_changed_under_enclaves(config: Config, signers: Signers) -> None:
    platform = create(config)
    image = small_image(b"running")
    enclave = platform.load(image, sign_image(image, signers.ours).to_bytes(), label="the-holder")
    with pytest.raises(PlatformError) as caught:
        life.set_tcb(config, cpusvn=NEWER, status="OutOfDate")
    assert caught.value.id == "tee.epc.busy" and "the-holder" in str(caught.value.found)
    assert tcb.load(config.platform_dir) == tcb.Tcb()
    # What the manufacturer says may change at any time.
    life.set_tcb(config, status="OutOfDate")
    enclave.destroy()
    life.set_tcb(config, cpusvn=NEWER)
    assert create(config)._session().cpusvn == NEWER


def test_a_session_from_before_the_update_cannot_issue_old_collateral(config: Config, signers: Signers) -> None:
    before = quoted_on(config, signers)
    life.set_tcb(config, cpusvn=NEWER)
    levels = json.loads(before.platform.collateral()["tcb_info"])["tcbLevels"]
    assert [component["svn"] for component in levels[0]["tcb"]["sgxtcbcomponents"]] == list(NEWER)
    assert before.opinion().status == "OutOfDate"


def refusal(quoted: Quoted) -> str:
    with pytest.raises(EvidenceError) as caught:
        quoted.appraise()
    return caught.value.id


def manufactured(quoted: Quoted) -> provisioning.Provisioning:
    return provisioning.load(quoted.config.platform_dir, create(quoted.config)._session())
