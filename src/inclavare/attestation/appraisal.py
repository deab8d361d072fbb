"""Appraisal: authentic claims against a policy (RFC 9334). Every failing claim is named, not only the first.

The result also says it as a trustworthiness vector (draft-ietf-rats-ar4si). For a policy file: what was verified
gives the best values, and each failure makes its claim worse (:data:`_WORSE`). What a policy allows by name, though it
protects less (simulation, debug, a bad TCB status), is a warning, never affirming.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import AppraisalError
from . import identity
from .claims import NOT_RATED, Claims, SnpTcb
from .policy import Policy
from .trust import TrustVector

if TYPE_CHECKING:
    from .references import References, ReferenceValue


@dataclass(frozen=True, slots=True)
class Failure:
    """One claim that the policy refuses.

    Attributes:
        id: ``policy.<key>``, ``freshness.nonce``, ``binding.report_data`` or ``binding.init_data``.
        claim: name of the claim.
        found: what the evidence says.
        expected: what would be accepted.
        remedy: what the reader can do.
        reference: id of the bundle that the expected value comes from; ``None`` where the policy itself has it.
    """

    id: str
    claim: str
    found: str
    expected: str
    remedy: str
    reference: str | None = None


@dataclass(frozen=True, slots=True)
class Appraisal:
    """The attestation result.

    Attributes:
        accepted: whether every check passed.
        claims: the authentic claims, also of refused evidence.
        failures: empty exactly if accepted.
        trust: the trustworthiness vector.
        references: ids of the reference bundles that matched.
        extensions: what a Rego policy adds to the attestation token: ``{"name", "key", "value"}`` each.
    """

    accepted: bool
    claims: Claims
    failures: tuple[Failure, ...] = ()
    trust: TrustVector = field(default_factory=TrustVector)
    references: tuple[str, ...] = ()
    extensions: tuple[dict[str, Any], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "accepted": self.accepted,
            "claims": self.claims.to_dict(),
            "failures": [asdict(failure) for failure in self.failures],
            "trust": self.trust.to_dict(),
            "references": list(self.references),
        }

    def refuse(self, failures: Sequence[Failure]) -> Appraisal:
        """The same with these failures, too."""
        if not failures:
            return self
        trust = self.trust
        for failure in failures:
            trust = trust.worse(**_worse(failure.id))
        return replace(self, accepted=False, failures=(*self.failures, *failures), trust=trust)

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


@dataclass(frozen=True, slots=True)
class Context:
    """What a policy in Rego may look at beside the claims: data that the evidence vouches for.

    Attributes:
        runtime_data: what the report data is the digest of.
        init_data: text of the init-data.
    """

    runtime_data: dict[str, Any] | None = None
    init_data: str | None = None


class AppraisalPolicy(Protocol):
    """A policy of another kind than :class:`Policy`: :class:`~inclavare.attestation.rego.RegoPolicy`."""

    @property
    def trust_anchor(self) -> bytes | None:
        """Root CA of simulated platforms, DER."""

    def judge(self, claims: Claims, references: References | None, context: Context) -> Appraisal:
        """The result for authentic claims."""


#: What a failure does to the vector, by its id: the first prefix that fits.
_WORSE: tuple[tuple[str, dict[str, int]], ...] = (
    ("policy.simulated", {"hardware": 97, "runtime_opaque": 96}),
    ("policy.debug", {"configuration": 96, "runtime_opaque": 96}),
    ("policy.tcb", {"hardware": 96}),
    ("policy.snp.min_tcb", {"hardware": 96}),
    ("policy.max_age", {"hardware": 32}),
    ("policy.reference.revoked", {"executables": 96}),
    ("policy.min_isv_svn", {"executables": 32}),
    *(
        (id, {"executables": 33})
        for id in (
            "policy.identity",
            "policy.reference.",
            "policy.mrenclave",
            "policy.mrsigner",
            "policy.isv_prod_id",
            "policy.tdx.mr_td",
            "policy.tdx.rtmr_",
            "policy.snp.measurement",
            "policy.snp.id_key_digest",
            "policy.snp.author_key_digest",
        )
    ),
    ("freshness.", {"instance_identity": 97}),
    ("binding.report_data", {"instance_identity": 97}),
)
_OTHERWISE = {"configuration": 96}


def _worse(id: str) -> dict[str, int]:
    return next((values for prefix, values in _WORSE if id.startswith(prefix)), _OTHERWISE)


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


def appraise(
    claims: Claims,
    policy: Policy | AppraisalPolicy,
    *,
    expected_report_data: bytes | None = None,
    references: References | None = None,
    context: Context | None = None,
) -> Appraisal:
    """Check authentic claims against a policy.

    Args:
        expected_report_data: 64 bytes that the enclave must have put into its report, if known.
        references: the registered reference values, for a policy that takes its measurements from there.
        context: for policies in Rego.
    """
    if isinstance(policy, Policy):
        found = _Appraiser(claims, policy, references).result()
    else:
        found = policy.judge(claims, references, context or Context())
    return found if expected_report_data is None else found.refuse(check_report_data(claims, expected_report_data))


class _Appraiser:
    """One appraisal by a policy file."""

    def __init__(self, claims: Claims, policy: Policy, references: References | None) -> None:
        self._claims = claims
        self._policy = policy
        self._references = references
        self._failures: list[Failure] = []
        self._matched: ReferenceValue | None = None
        #: Claims that reference values have decided about.
        self._decided: set[str] = set()

    def result(self) -> Appraisal:
        self._protection()
        self._identity()
        {"sgx": self._sgx, "tdx": self._tdx, "snp": self._snp}[self._claims.family]()
        self._tcb()
        good = Appraisal(
            True, self._claims, (), self._trust(), () if self._matched is None else (self._matched.bundle,)
        )
        return good.refuse(self._failures)

    def _refuse(self, key: str, claim: str, found: object, expected: object, remedy: str) -> None:
        self._failures.append(Failure(f"policy.{key}", claim, str(found), str(expected), remedy))

    def _protection(self) -> None:
        if self._claims.simulated and not self._policy.allow_simulated:
            self._refuse(
                "simulated",
                "simulated",
                "true",
                "false",
                'nothing but software protects this enclave; for development, set simulated = "allow" in the policy',
            )
        if self._claims.debug and not self._policy.allow_debug:
            self._refuse(
                "debug", "debug", "true", "false", "the host can read this enclave: build it with debug = false"
            )

    def _identity(self) -> None:
        """Something has to say what runs: the policy's own values, reference values, or both."""
        policy, claims = self._policy, self._claims
        identifying = identity.IDENTIFYING[claims.family]
        primary = identifying[0]
        if policy.named_references:
            # A measurement that the policy itself accepts needs no bundle.
            if identity.found(claims, primary) not in policy.accepted(claims.family).get(primary, ()):
                self._decided.add(primary)
                self._reference()
        elif not policy.identities(claims.family) and not policy.any_enclave:
            prefix = "" if claims.family == "sgx" else f"{claims.family}."
            self._refuse(
                "identity",
                primary,
                identity.found(claims, primary),
                " or ".join(prefix + name for name in identifying) + " in the policy",
                "name the enclave in the policy: any enclave of this platform would pass otherwise",
            )

    def _reference(self) -> None:
        if self._references is None:
            found: ReferenceValue | tuple[Failure, ...] = (
                Failure(
                    "policy.reference.unknown",
                    "reference",
                    "no reference values are registered here",
                    " or ".join(self._policy.named_references),
                    "verify with the reference bundles, or let verdictd verify, which has them",
                ),
            )
        else:
            found = self._references.match(self._claims, self._policy.named_references)
        if isinstance(found, tuple):
            self._failures += found
        else:
            self._matched = found

    def _values(self, *, prefix: str = "") -> None:
        """Measured values that the policy itself names."""
        for name, accepted in self._policy.accepted(self._claims.family).items():
            value = identity.found(self._claims, name)
            if value not in accepted and name not in self._decided:
                self._refuse(prefix + name, name, value, " or ".join(accepted), _REMEDIES.get(name, _OTHER_REMEDY))

    def _sgx(self) -> None:
        claims, policy = self._claims, self._policy
        self._values()
        if policy.isv_prod_id is not None and claims.isv_prod_id != policy.isv_prod_id:
            self._refuse(
                "isv_prod_id",
                "isv_prod_id",
                claims.isv_prod_id,
                policy.isv_prod_id,
                "this is another product of the same signer",
            )
        if claims.isv_svn < policy.min_isv_svn:
            self._refuse(
                "min_isv_svn",
                "isv_svn",
                claims.isv_svn,
                f"at least {policy.min_isv_svn}",
                "deploy a newer build of the enclave",
            )

    def _tdx(self) -> None:
        assert self._claims.tdx is not None
        self._values(prefix="tdx.")
        if self._claims.tdx.migratable and not self._policy.tdx.allow_migratable:
            self._refuse(
                "tdx.migratable",
                "migratable",
                "true",
                "false",
                'its memory may move to another platform; if that is meant, set migratable = "allow" in [tdx]',
            )

    def _snp(self) -> None:
        guest, policy = self._claims.snp, self._policy.snp
        assert guest is not None
        self._values(prefix="snp.")
        for key, refused, found, expected, remedy in (
            (
                "migrate_ma",
                guest.policy_migrate_ma and not policy.allow_migrate_ma,
                "true",
                "false",
                'a migration agent may move its memory; if that is meant, set migrate_ma = "allow" in [snp]',
            ),
            (
                "smt",
                guest.platform_smt_enabled and not policy.allow_smt,
                "true",
                "false",
                "switch simultaneous multithreading off in the platform's firmware",
            ),
            (
                "vmpl",
                guest.vmpl not in policy.vmpl,
                guest.vmpl,
                " or ".join(map(str, policy.vmpl)),
                "the report was asked for at another privilege level than the guest's; 4294967295 is the host",
            ),
            (
                "min_guest_svn",
                guest.guest_svn < policy.min_guest_svn,
                guest.guest_svn,
                f"at least {policy.min_guest_svn}",
                "deploy a newer guest",
            ),
        ):
            if refused:
                claim = {"migrate_ma": "policy_migrate_ma", "smt": "platform_smt_enabled", "min_guest_svn": "guest_svn"}
                self._refuse(f"snp.{key}", claim.get(key, key), found, expected, remedy)

    def _tcb(self) -> None:
        claims, policy = self._claims, self._policy
        if claims.snp is not None and policy.snp.min_tcb is not None:
            if not claims.snp.reported_tcb.covers(policy.snp.min_tcb):
                self._refuse(
                    "snp.min_tcb",
                    "reported_tcb",
                    _tcb_text(claims.snp.reported_tcb),
                    f"at least {_tcb_text(policy.snp.min_tcb)}",
                    "update the platform's firmware and microcode",
                )
        elif claims.tcb_status not in policy.tcb:
            advisories = ", ".join(claims.advisories) or "none named"
            self._refuse(
                "tcb",
                "tcb_status",
                claims.tcb_status,
                " or ".join(policy.tcb),
                "AMD rates no TCB: name the least one that you accept as min_tcb in [snp] of the policy"
                if claims.tcb_status == NOT_RATED
                else f"update the platform's firmware and microcode (advisories: {advisories}), or accept this status",
            )
        if policy.max_age is not None and claims.verified_at - claims.collateral_issued > policy.max_age:
            self._refuse(
                "max_age",
                "collateral_issued",
                f"{claims.verified_at - claims.collateral_issued} seconds old",
                f"at most {policy.max_age} seconds",
                "fetch fresh collateral",
            )

    def _trust(self) -> TrustVector:
        """The vector if nothing failed."""
        claims, policy = self._claims, self._policy
        rated = claims.tcb_status == "UpToDate" or (claims.snp is not None and policy.snp.min_tcb is not None)
        named = bool(self._matched or policy.named_references or policy.identities(claims.family))
        files = self._matched is not None and self._matched.tree_root is not None
        bare = claims.simulated or claims.debug
        return TrustVector(
            instance_identity=0 if claims.simulated else 2,
            configuration=32 if claims.debug else 3,
            executables=33 if not named else 2 if files else 3,
            file_system=2 if files else 0,
            hardware=32 if claims.simulated or not rated else 2,
            runtime_opaque=32 if bare else 2,
        )


_REMEDIES = {
    "mrenclave": "the image, its manifest or the runtime differs from what the policy expects; if that is meant, "
    "update it",
    "mrsigner": "another key signed the enclave; sign it with the expected key or update the policy",
}
_OTHER_REMEDY = "what was launched differs from what the policy expects; if that is meant, update it"


def _tcb_text(tcb: SnpTcb) -> str:
    return ", ".join(f"{name} {value}" for name, value in asdict(tcb).items() if value is not None)
