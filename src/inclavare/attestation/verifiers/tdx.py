"""Evidence of Intel TDX hardware. Its root is Intel's, and no policy or option can replace it."""

from __future__ import annotations

from dataclasses import replace

from ...errors import EvidenceError
from ...sgx.intel import INTEL_ROOT_CA
from .. import eventlog
from ..claims import Claims
from ..evidence import Evidence
from ..policy import Policy


class TdxVerifier:
    """See :class:`inclavare.attestation.verifiers.Verifier`."""

    def verify(self, evidence: Evidence, policy: Policy, now: int) -> Claims:
        """The authentic claims of a trust domain on hardware; with its event log, if the evidence has one.

        Raises:
            EvidenceError: see :func:`inclavare.attestation.verifiers.dcap.verify_quote` and
                :func:`inclavare.attestation.eventlog.check`.
        """
        from .dcap import verify_quote

        claims = verify_quote(
            evidence.quote,
            evidence.collateral,
            root=INTEL_ROOT_CA,
            now=now,
            tee="tdx",
            simulated=False,
            source=evidence.collateral_source,
        )
        return claims if evidence.event_log is None else with_event_log(claims, evidence.event_log)


def with_event_log(claims: Claims, log: bytes) -> Claims:
    """The claims with the entries of the event log that gives the trust domain's RTMRs.

    Raises:
        EvidenceError: ``evidence.event_log.*``, also where there is no trust domain.
    """
    domain = claims.tdx
    if domain is None:
        raise EvidenceError(
            "an event log belongs to a trust domain",
            id="evidence.event_log.malformed",
            found=claims.tee,
            expected="tdx",
        )
    entries = eventlog.check(log, (domain.rtmr_0, domain.rtmr_1, domain.rtmr_2, domain.rtmr_3))
    return replace(claims, tdx=replace(domain, event_log=entries))


def create() -> TdxVerifier:
    """The verifier."""
    return TdxVerifier()
