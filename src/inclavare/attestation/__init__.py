"""Attestation (RFC 9334): evidence in, attestation result out.

:func:`verify` is the one way in: it verifies, binds and appraises. There is no way to skip a step.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import UsageError
from .appraisal import Appraisal, AppraisalPolicy, Context, Failure, appraise, check_report_data
from .channel import report_data as _bound_report_data
from .claims import Claims
from .collateral import CollateralSource
from .evidence import Evidence
from .initdata import check_init_data
from .policy import Policy
from .verifiers import verifier

if TYPE_CHECKING:
    from .references import References

__all__ = ["Appraisal", "Claims", "CollateralSource", "Evidence", "Failure", "Policy", "appraise", "verify"]


def verify(
    evidence: Evidence,
    policy: Policy | AppraisalPolicy,
    *,
    nonce: bytes | None = None,
    report_data: bytes | None = None,
    now: int | None = None,
    collateral: CollateralSource | None = None,
    references: References | None = None,
) -> Appraisal:
    """Verify evidence and appraise it.

    Runtime data in the evidence is always checked against the report data, so that the public key in accepted evidence
    is the enclave's.

    Args:
        nonce: the challenge that the evidence must answer: in its runtime data, or in its certificate's claims.
        report_data: what the report data must be; shorter than 64 bytes means zero-padded.
        now: seconds since 1970; by default the present.
        collateral: asked where the evidence carries none.
        references: the registered reference values, for a policy that takes its measurements from there.

    Returns:
        The result for authentic evidence, accepted or not.

    Raises:
        EvidenceError: the evidence is damaged, forged, expired, revoked, or of a root that is not trusted.
        UsageError: ``report_data`` is longer than 64 bytes.
        PlatformError: the evidence carries no collateral, and the source has none.
    """
    if report_data is not None and len(report_data) > 64:
        raise UsageError(
            "the expected report data is too long",
            id="attestation.report_data.size",
            found=f"{len(report_data)} bytes",
            expected="at most 64 bytes",
        )
    if evidence.collateral is None and collateral is not None:
        evidence = evidence.with_collateral(collateral.fetch(evidence.quote))
    anchored = policy if isinstance(policy, Policy) else Policy(trust_anchor=policy.trust_anchor)
    claims = verifier(evidence.tee).verify(evidence, anchored, int(time.time()) if now is None else now)
    if evidence.certificate is not None:
        claims = replace(claims, public_key_sha256=hashlib.sha256(evidence.certificate.public_key).hexdigest())
    expected = None if report_data is None else report_data.ljust(64, b"\0")
    context = Context(evidence.runtime_data, evidence.init_data)
    appraisal = appraise(claims, policy, expected_report_data=expected, references=references, context=context)
    failures: list[Failure] = []
    if evidence.runtime_data is not None:
        failures += check_report_data(claims, _bound_report_data(evidence.runtime_data))
    if evidence.init_data is not None:
        failures += check_init_data(claims, evidence.init_data)
    if nonce is not None and not _answers(evidence, nonce):
        failures.append(
            Failure(
                "freshness.nonce",
                "nonce",
                "another nonce or none",
                base64.b64encode(nonce).decode(),
                "the evidence does not answer this challenge: challenge the enclave again",
            )
        )
    return appraisal.refuse(failures)


def _answers(evidence: Evidence, nonce: bytes) -> bool:
    if evidence.certificate is not None:
        found = evidence.certificate.nonce or b""
    else:
        text = (evidence.runtime_data or {}).get("nonce")
        try:
            found = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
        except ValueError:
            found = b""
    return bool(nonce) and hmac.compare_digest(found, nonce)
