"""Appraisal: authentic claims against a policy (RFC 9334). Every failing claim is named, not only the first."""

from __future__ import annotations

import hmac
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import AppraisalError
from .claims import Claims
from .policy import Policy


@dataclass(frozen=True, slots=True)
class Failure:
    """One claim that the policy refuses.

    Attributes:
        id: ``policy.<key>``, ``freshness.nonce`` or ``binding.report_data``.
        claim: name of the claim.
        found: what the evidence says.
        expected: what would be accepted.
        remedy: what the reader can do.
    """

    id: str
    claim: str
    found: str
    expected: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Appraisal:
    """The attestation result.

    Attributes:
        accepted: whether every check passed.
        claims: the authentic claims, also of refused evidence.
        failures: empty exactly if accepted.
    """

    accepted: bool
    claims: Claims
    failures: tuple[Failure, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "accepted": self.accepted,
            "claims": self.claims.to_dict(),
            "failures": [asdict(failure) for failure in self.failures],
        }

    def require(self) -> Claims:
        """The claims of accepted evidence.

        Raises:
            AppraisalError: the policy refuses them; the first failure, and the ids of the others.
        """
        if self.accepted:
            return self.claims
        first = self.failures[0]
        others = ", ".join(failure.id for failure in self.failures[1:])
        raise AppraisalError(
            f"the policy refuses this enclave: {first.claim}" + (f" (also: {others})" if others else ""),
            id=first.id,
            found=first.found,
            expected=first.expected,
            remedy=first.remedy,
        )


def check_report_data(claims: Claims, expected: bytes) -> tuple[Failure, ...]:
    """Empty if the 64 bytes of report data are the expected ones."""
    if hmac.compare_digest(claims.report_data, expected.hex()):
        return ()
    return (
        Failure(
            "binding.report_data",
            "report_data",
            claims.report_data,
            expected.hex(),
            "the quote was made for other data (a replay, another key, another nonce): challenge the enclave again",
        ),
    )


def appraise(claims: Claims, policy: Policy, *, expected_report_data: bytes | None = None) -> Appraisal:
    """Check authentic claims against a policy.

    Args:
        expected_report_data: 64 bytes that the enclave must have put into its report, if known.
    """
    failures: list[Failure] = []

    def refuse(key: str, claim: str, found: object, expected: object, remedy: str) -> None:
        failures.append(Failure(f"policy.{key}", claim, str(found), str(expected), remedy))

    if claims.simulated and not policy.allow_simulated:
        refuse(
            "simulated",
            "simulated",
            "true",
            "false",
            'nothing but software protects this enclave; for development, set simulated = "allow" in the policy',
        )
    if claims.debug and not policy.allow_debug:
        refuse(
            "debug",
            "debug",
            "true",
            "false",
            "the host can read this enclave: build it with debug = false",
        )
    if not policy.mrenclave and not policy.mrsigner and not policy.any_enclave:
        refuse(
            "identity",
            "mrenclave",
            claims.mrenclave,
            "mrenclave or mrsigner in the policy",
            "name the enclave in the policy: any enclave of this platform would pass otherwise",
        )
    if policy.mrenclave and claims.mrenclave not in policy.mrenclave:
        refuse(
            "mrenclave",
            "mrenclave",
            claims.mrenclave,
            " or ".join(policy.mrenclave),
            "the image, its manifest or the runtime differs from what the policy expects; if that is meant, update it",
        )
    if policy.mrsigner and claims.mrsigner not in policy.mrsigner:
        refuse(
            "mrsigner",
            "mrsigner",
            claims.mrsigner,
            " or ".join(policy.mrsigner),
            "another key signed the enclave; sign it with the expected key or update the policy",
        )
    if policy.isv_prod_id is not None and claims.isv_prod_id != policy.isv_prod_id:
        refuse(
            "isv_prod_id",
            "isv_prod_id",
            claims.isv_prod_id,
            policy.isv_prod_id,
            "this is another product of the same signer",
        )
    if claims.isv_svn < policy.min_isv_svn:
        refuse(
            "min_isv_svn",
            "isv_svn",
            claims.isv_svn,
            f"at least {policy.min_isv_svn}",
            "deploy a newer build of the enclave",
        )
    if claims.tcb_status not in policy.tcb:
        advisories = ", ".join(claims.advisories) or "none named"
        refuse(
            "tcb",
            "tcb_status",
            claims.tcb_status,
            " or ".join(policy.tcb),
            f"update the platform's firmware and microcode (advisories: {advisories}), or accept this status",
        )
    if policy.max_age is not None and claims.verified_at - claims.collateral_issued > policy.max_age:
        refuse(
            "max_age",
            "collateral_issued",
            f"{claims.verified_at - claims.collateral_issued} seconds old",
            f"at most {policy.max_age} seconds",
            "fetch fresh collateral",
        )
    if expected_report_data is not None:
        failures += check_report_data(claims, expected_report_data)
    return Appraisal(not failures, claims, tuple(failures))
