"""Evidence of the simulated platform: the same formats and checks, another root, and claims that say ``simulated``."""

from __future__ import annotations

from ...errors import EvidenceError
from ...sgx.intel import INTEL_ROOT_CA
from ..claims import Claims
from ..evidence import Evidence
from ..policy import Policy
from .tdx import with_event_log


class SimulatedSgxVerifier:
    """See :class:`inclavare.attestation.verifiers.Verifier`."""

    def verify(self, evidence: Evidence, policy: Policy, now: int) -> Claims:
        """The authentic claims of an enclave or trust domain of the simulated platform whose root the policy names.

        Raises:
            EvidenceError: ``evidence.root.untrusted`` without such a root; else see
                :func:`inclavare.attestation.verifiers.dcap.verify_quote`.
        """
        from .dcap import verify_quote

        if policy.trust_anchor is None or policy.trust_anchor == INTEL_ROOT_CA:
            raise EvidenceError(
                "the evidence is of a simulated platform, and the policy trusts none",
                id="evidence.root.untrusted",
                found=f"evidence of {evidence.tee}",
                expected="evidence of hardware",
                remedy='for development, set simulated = "allow" and trust_anchor = "<the platform\'s root CA>"',
            )
        claims = verify_quote(
            evidence.quote,
            evidence.collateral,
            root=policy.trust_anchor,
            now=now,
            tee=evidence.tee,
            simulated=True,
            source=evidence.collateral_source,
        )
        return claims if evidence.event_log is None else with_event_log(claims, evidence.event_log)


def create() -> SimulatedSgxVerifier:
    """The verifier."""
    return SimulatedSgxVerifier()
