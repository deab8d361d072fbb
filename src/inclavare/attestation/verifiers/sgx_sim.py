"""Evidence of the simulated platform: the same formats and checks, another root, and claims that say ``simulated``."""

from __future__ import annotations

from ...errors import EvidenceError
from ..claims import Claims
from ..evidence import Evidence
from ..policy import Policy
from .sgx import INTEL_ROOT_CA


class SimulatedSgxVerifier:
    """See :class:`inclavare.attestation.verifiers.Verifier`."""

    def verify(self, evidence: Evidence, policy: Policy, now: int) -> Claims:
        """The authentic claims of an enclave on the simulated platform whose root the policy names.

        Raises:
            EvidenceError: ``evidence.root.untrusted`` without such a root; else see
                :func:`inclavare.attestation.verifiers.dcap.verify_quote`.
        """
        from .dcap import verify_quote

        if policy.trust_anchor is None or policy.trust_anchor == INTEL_ROOT_CA:
            raise EvidenceError(
                "the evidence is of a simulated platform, and the policy trusts none",
                id="evidence.root.untrusted",
                found="evidence of sgx-sim",
                expected="evidence of SGX hardware",
                remedy='for development, set simulated = "allow" and trust_anchor = "<the platform\'s root CA>"',
            )
        return verify_quote(
            evidence.quote,
            evidence.collateral,
            root=policy.trust_anchor,
            now=now,
            tee="sgx-sim",
            simulated=True,
        )


def create() -> SimulatedSgxVerifier:
    """The verifier."""
    return SimulatedSgxVerifier()
