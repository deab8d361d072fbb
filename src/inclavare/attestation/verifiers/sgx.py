"""Evidence of Intel SGX hardware. Its root is Intel's, and no policy or option can replace it."""

from __future__ import annotations

from ...sgx.intel import INTEL_ROOT_CA
from ..claims import Claims
from ..evidence import Evidence
from ..policy import Policy


class SgxVerifier:
    """See :class:`inclavare.attestation.verifiers.Verifier`."""

    def verify(self, evidence: Evidence, policy: Policy, now: int) -> Claims:
        """The authentic claims of an SGX enclave on hardware.

        Raises:
            EvidenceError: see :func:`inclavare.attestation.verifiers.dcap.verify_quote`.
        """
        from .dcap import verify_quote

        return verify_quote(
            evidence.quote,
            evidence.collateral,
            root=INTEL_ROOT_CA,
            now=now,
            tee="sgx",
            simulated=False,
            source=evidence.collateral_source,
        )


def create() -> SgxVerifier:
    """The verifier."""
    return SgxVerifier()
