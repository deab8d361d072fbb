"""Verifiers: one file per TEE platform. A verifier tells authentic evidence from everything else; it accepts no policy
decision beyond the choice of the trust anchor, and there is no verifier that accepts unverified evidence."""

from __future__ import annotations

from typing import Protocol

from ...errors import EvidenceError
from ..claims import Claims
from ..evidence import Evidence
from ..policy import Policy

_MODULES = {"sgx": "sgx", "tdx": "tdx", "sgx-sim": "sgx_sim", "tdx-sim": "sgx_sim", "snp": "snp"}


class Verifier(Protocol):
    """Checks evidence of one kind of TEE."""

    def verify(self, evidence: Evidence, policy: Policy, now: int) -> Claims:
        """The authentic claims.

        Args:
            policy: names the trust anchor of simulated platforms; nothing else of it counts here.
            now: seconds since 1970.

        Raises:
            EvidenceError: damaged, forged, expired, revoked, or from another root; the id names the cause.
        """


def verifier(tee: str) -> Verifier:
    """The verifier for evidence that calls itself ``tee``.

    Raises:
        EvidenceError: ``evidence.tee.unknown``.
    """
    if tee not in _MODULES:
        raise EvidenceError(
            "there is no verifier for this kind of evidence",
            id="evidence.tee.unknown",
            found=tee,
            expected=" or ".join(_MODULES),
        )
    from importlib import import_module

    found: Verifier = import_module(f".{_MODULES[tee]}", __package__).create()
    return found
