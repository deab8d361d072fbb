"""Decisions: whether evidence is accepted, and whether something is released. They are made, and audited, here only.

Attestation: the evidence is verified, bound to the session's nonce and the TEE's key, and has to pass every default
attestation policy of the tenant (TOML, Rego or both). Then there is a token, signed by this service, that says so.

Release: a token is needed, whichever way it comes. If the tenant's policies or reference values have changed since, it
counts no more: the client attests again. Then the resource's own policy decides; without one the tenant's resource
policy (Rego); without that, the attestation policies, if they name enclaves.

Every decision is in the audit trail before anything leaves. What is not there and what is denied cannot be told apart
from outside.
"""

from __future__ import annotations

import base64
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import MISSING, asdict, dataclass, fields, replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from ..attestation import Appraisal, Claims, Evidence, appraise, verify
from ..attestation.appraisal import Context, Failure
from ..attestation.collateral import (
    AMD_KDS,
    INTEL_PCS,
    CachedSource,
    ChainSource,
    CollateralSource,
    FileSource,
    KdsSource,
    PccsSource,
    PlatformSource,
)
from ..attestation.ear import EVIDENCE, SUBMODULE, EarIssuer, EarKey, EarVerifier, tee_public_key
from ..attestation.jwe import TeeKey
from ..attestation.rego import ResourceDecision, resource_policy
from ..errors import AppraisalError, EvidenceError, InclavareError, PlatformError, UsageError
from . import metrics
from .plugins import Plugin, Plugins, Request, Workload
from .rules import BUILT_IN, NO_POLICY, Rule, RuleBook, Rules, make_rule, reason
from .store.errors import Consumed, Invalid, NotFound
from .telemetry import event, request_id, span

if TYPE_CHECKING:
    from .config import VerdictConfig
    from .store import Store
    from .store.types import PolicyKind

#: What the token carries for this service itself, under the evidence's submodule.
EXTENSION = "inclavare"
_EXTENSION_KEY = -70000
_KEYS_SECONDS = 5.0
#: One workload's evidence is kept once in so many seconds.
_KEEP_SECONDS = 60.0
_RECENT = 1000
#: What the audit trail has of a denial: characters of each value, and reasons.
_SHOWN = 512
_REASONS = 16


#: Claims without a default value.
_NEEDED = frozenset(one.name for one in fields(Claims) if one.default is MISSING and one.default_factory is MISSING)


@dataclass(frozen=True, slots=True)
class Decision:
    """A decision.

    Attributes:
        action: ``kbs.attest`` or ``kbs.release``.
        allowed: what was decided.
        reasons: every failed claim, or the error; empty exactly if allowed.
        policies: what was decided by, ``id@version``.
        evidence: SHA-256 of the evidence, hexadecimal.
        tee: the platform.
        appraisal: of authentic evidence.
    """

    action: str
    allowed: bool
    reasons: tuple[dict[str, Any], ...]
    policies: tuple[str, ...]
    evidence: str
    tee: str
    appraisal: Appraisal | None = None

    def text(self) -> str:
        """All reasons in one line: for a denial's detail."""
        return "; ".join(_reason_text(item) for item in self.reasons)


class Denied(AppraisalError):
    """No. The reasons are for whoever attests (their own claims) and for the audit trail."""

    #: What a client that asked for a resource is told, whatever the reason.
    UNIFORM: ClassVar[str] = "Access denied by policy"

    def __init__(self, decision: Decision) -> None:
        first = decision.reasons[0]
        super().__init__(
            decision.text(),
            id=str(first.get("id")),
            found=first.get("found"),
            expected=first.get("expected"),
            remedy=first.get("remedy"),
        )
        self.decision = decision


class PluginFailed(PlatformError):
    """The policy allows it, but the plugin fails."""


@dataclass(frozen=True, slots=True)
class Grant:
    """A verified attestation token: who asks for resources.

    Attributes:
        token: its claims.
        basis: by which policies and reference values it was accepted.
    """

    workload: Workload
    token: dict[str, Any]
    context: Context
    basis: str


class Decider:
    """Makes the decisions. Called from several threads.

    Args:
        clock: seconds since 1970.

    Raises:
        UsageError: a plugin's configuration is wrong.
        PlatformError: the cache of collateral is not private, or a plugin's package is not installed.
    """

    def __init__(self, config: VerdictConfig, store: Store, *, clock: Callable[[], float] = time.time) -> None:
        self._config = config
        self._store = store
        self._clock = clock
        self._collateral = collateral_source(config)
        self._book = RuleBook(store)
        self._plugins = Plugins(config, store)
        self._lock = threading.Lock()
        self._keys: tuple[float, EarIssuer, EarVerifier] | None = None
        self._kept: OrderedDict[tuple[str, ...], float] = OrderedDict()
        self._uids: OrderedDict[str, tuple[float, str]] = OrderedDict()

    # --- attestation

    def attest(self, tenant: str, session: str, nonce: bytes, evidence: Evidence, key: TeeKey, *, peer: str) -> str:
        """Decide about evidence for a session whose nonce was used up for it.

        Args:
            session: its id.
            nonce: 32 bytes; the evidence has to answer it.
            evidence: with its runtime data.
            key: the TEE's, out of the runtime data.
            peer: the client's address.

        Returns:
            the token.

        Raises:
            Denied: refused, with every failed claim.
            InclavareError: it could not be written down.
        """
        digest = sha256(evidence.quote).hexdigest()
        started = time.perf_counter()
        evidence, rules, decision = self._judged("kbs.attest", tenant, evidence, nonce, digest)
        metrics.VERIFICATION.labels(decision.tee).observe(time.perf_counter() - started)
        self._keep_evidence(tenant, evidence, decision)
        self._audit(tenant, decision, key.holder, {"peer": peer})
        if decision.appraisal is None or not decision.allowed:
            self._store.sessions.refuse(tenant, session)
            raise Denied(decision)
        token = self._issue(tenant, decision.appraisal, evidence, key, rules, digest)
        # Last, and exactly once: a token that nobody can present does no harm, one that was seen must be written down.
        self._store.sessions.attest(tenant, session, holder=key.holder, claims={"evidence": digest}, token=token)
        return token

    def _judged(
        self, action: str, tenant: str, evidence: Evidence, nonce: bytes | None, digest: str
    ) -> tuple[Evidence, Rules, Decision]:
        """The evidence with its collateral, the rules that it was judged by, and the decision.

        A refusal rests on no cache: whoever has just registered what this evidence needs does not have to wait.
        """
        rules = self._book.of(tenant)
        evidence, decision = self._decision(action, evidence, rules, nonce, digest)
        if not decision.allowed and (changed := self._book.of(tenant, fresh=True)).basis != rules.basis:
            rules = changed
            evidence, decision = self._decision(action, evidence, rules, nonce, digest)
        return evidence, rules, decision

    def _decision(
        self, action: str, evidence: Evidence, rules: Rules, nonce: bytes | None, digest: str
    ) -> tuple[Evidence, Decision]:
        policies = tuple(rule.label for rule in rules.attestation)
        try:
            with span("verify", tee=evidence.tee):
                evidence = self._with_collateral(evidence)
                appraisal = judge(evidence, rules, nonce=nonce, now=int(self._clock()))
        except InclavareError as error:
            decision = Decision(action, False, (reason(error),), policies, digest, evidence.tee)
        else:
            reasons = tuple(_plain(failure) for failure in appraisal.failures)
            decision = Decision(action, appraisal.accepted, reasons, policies, digest, appraisal.claims.tee, appraisal)
        if not decision.allowed and any(rule.policy is BUILT_IN for rule in rules.attestation):
            decision = replace(decision, reasons=tuple({**item, "remedy": NO_POLICY} for item in decision.reasons))
        return evidence, decision

    def jwks(self) -> dict[str, Any]:
        """The keys that tokens are verified with (RFC 7517)."""
        return self._signing()[0].jwks()

    def grant(self, tenant: str, token: str) -> Grant:
        """Verify a token.

        Raises:
            EvidenceError: ``ear.token.*``: not signed by this service, expired, or another tenant's.
        """
        claims = self._signing()[1].verify(token, now=int(self._clock()))
        own = claims["submods"].get(SUBMODULE, {}).get(EXTENSION)
        known = tee_public_key(claims)
        if not isinstance(own, dict) or known is None or own.get("tenant") != self._uid(tenant):
            raise EvidenceError(
                "the token is not for this tenant",
                id="ear.token.tenant",
                found="another one's, or none",
                expected=tenant,
                remedy="attest to the tenant whose resource this is",
            )
        facts = msgspec.convert({**own["claims"], "signed": own["signed"]}, Claims)
        evidence = claims["submods"][SUBMODULE][EVIDENCE]
        context = Context(evidence.get("runtime_data_claims"), own.get("init_data"))
        key = TeeKey.parse(known)
        return Grant(Workload(key.holder, key, facts, str(own["evidence"])), claims, context, str(own["basis"]))

    # --- release

    def plugin(self, tenant: str, name: str) -> Plugin | None:
        """The plugin of this name, if the tenant has it."""
        return self._plugins.find(tenant, name)

    def release(self, tenant: str, grant: Grant, request: Request, *, peer: str) -> bytes:
        """Decide about a resource, and encrypt it to the TEE's key.

        Returns:
            a flattened JWE, JSON.

        Raises:
            Denied: not allowed, or not there: outside they are the same.
            PluginFailed: it is allowed, but cannot be had.
            InclavareError: it could not be written down.
        """
        rules = self._book.of(tenant)
        if grant.basis != rules.basis:
            # The token may be newer than what is cached here: another replica's.
            rules = self._book.of(tenant, fresh=True)
        value = self._release(tenant, grant, request, rules, "kbs.release", peer)
        assert grant.workload.key is not None
        with span("encrypt"):
            return grant.workload.key.encrypt(value)

    def release_to_certificate(self, tenant: str, evidence: Evidence, path: str, *, peer: str = "") -> bytes:
        """Decide about a secret for whoever has proven to have an RA-TLS certificate's key: it leaves by that channel.

        Args:
            evidence: out of the certificate.
            path: ``repo/type/tag``.

        Raises:
            Denied: not accepted, not allowed, or not there.
            InclavareError: it could not be written down.
        """
        digest = sha256(evidence.quote).hexdigest()
        assert evidence.certificate is not None
        holder = sha256(evidence.certificate.public_key).hexdigest()
        _, rules, decision = self._judged("secret_prov.release", tenant, evidence, None, digest)
        appraisal = decision.appraisal
        if appraisal is None or not decision.allowed:
            self._audit(tenant, decision, holder, {"peer": peer})
            raise Denied(decision)
        key = EarKey.generate()
        issuer = EarIssuer([key])
        token = EarVerifier(issuer.jwks()).verify(
            issuer.issue(appraisal, tee_pubkey=None, policy_ids=decision.policies)
        )
        workload = Workload(holder, None, appraisal.claims, digest)
        grant = Grant(workload, token, Context(), rules.basis)
        request = Request("resource", tuple(path.split("/")))
        return self._release(tenant, grant, request, rules, "secret_prov.release", peer)

    def _release(self, tenant: str, grant: Grant, request: Request, rules: Rules, action: str, peer: str) -> bytes:
        workload = grant.workload
        plugin = self._plugins.find(tenant, request.plugin)
        policies: list[str] = []
        reasons: list[dict[str, Any]] = []
        answer = None
        failed: InclavareError | None = None
        try:
            if plugin is None:
                raise NotFound("no such plugin", id="verdict.plugin.unknown", found=request.plugin)
            with span("policy", plugin=request.plugin):
                request = replace(request, judged_by=plugin.policy(tenant, request))
                failures = self._allowed(tenant, grant, request, plugin, rules, policies)
            reasons = [_plain(failure) for failure in failures]
            if not reasons:
                with span("fetch", plugin=request.plugin):
                    answer = plugin.fetch(tenant, request, workload)
        except (NotFound, Consumed, Invalid) as error:
            reasons = [reason(error)]
        except InclavareError as error:
            failed, reasons = error, [reason(error)]
        decision = Decision(
            action, answer is not None, tuple(reasons), tuple(policies), workload.evidence, workload.claims.tee
        )
        detail = {"peer": peer, "resource": request.name[:_SHOWN], "method": request.method}
        self._audit(tenant, decision, workload.holder, detail | ({} if answer is None else answer.detail))
        if failed is not None:
            raise PluginFailed("Plugin internal error", id=failed.id, found=failed.message) from failed
        if answer is None:
            raise Denied(decision)
        return answer.value

    def _allowed(
        self, tenant: str, grant: Grant, request: Request, plugin: Plugin, rules: Rules, policies: list[str]
    ) -> Iterable[Failure]:
        """Nothing if it may be released. Notes the policies that have decided."""
        failures: list[Failure] = []
        policies += [rule.label for rule in rules.attestation]
        if grant.basis != rules.basis:
            failures.append(
                Failure(
                    "policy.changed",
                    "policies",
                    f"attested by {grant.basis}",
                    rules.basis,
                    "attest again: policies or reference values have changed since",
                )
            )
        own = request.judged_by
        rule: Rule | None = rules.resource if own is None else self._book.named(tenant, own)
        if rule is not None:
            policies.append(rule.label)
            if rule.policy is not None:
                failures += _judge_again(rule, grant, rules).failures
            else:
                failures += _by_resource_policy(rule, grant.token, request).failures
        elif plugin.needs_resource_policy or not any(rule.names_enclaves() for rule in rules.attestation):
            failures.append(
                Failure(
                    "policy.resource.none",
                    "policy",
                    "no policy says which enclaves may have it",
                    "the resource's own policy, a resource policy, or an attestation policy that names enclaves",
                    "store the secret with a policy, or make one the tenant's default",
                )
            )
        return failures

    # --- inside

    def _with_collateral(self, evidence: Evidence) -> Evidence:
        if evidence.collateral is not None or self._collateral is None:
            return evidence
        return evidence.with_collateral(self._collateral.fetch(evidence.quote))

    def _issue(
        self, tenant: str, appraisal: Appraisal, evidence: Evidence, key: TeeKey, rules: Rules, digest: str
    ) -> str:
        own = {
            "tenant": self._uid(tenant),
            "evidence": digest,
            "basis": rules.basis,
            "claims": _portable(appraisal.claims),
            "signed": base64.b64encode(appraisal.claims.signed).decode(),
        }
        if evidence.init_data is not None:
            own["init_data"] = evidence.init_data
        extension = {"name": EXTENSION, "key": _EXTENSION_KEY, "value": own}
        return self._signing()[0].issue(
            replace(appraisal, extensions=(*appraisal.extensions, extension)),
            tee_pubkey=key.jwk,
            policy_ids=[rule.label for rule in rules.attestation],
            lifetime=self._config.tokens.lifetime,
            context=Context(evidence.runtime_data, evidence.init_data),
            now=int(self._clock()),
        )

    def _signing(self) -> tuple[EarIssuer, EarVerifier]:
        now = time.monotonic()
        with self._lock:
            known = self._keys
        if known is None or now - known[0] > _KEYS_SECONDS:
            self._store.keys.current("ear")
            keys = [EarKey(key.private) for key in self._store.keys.list("ear")]  # type: ignore[arg-type]
            issuer = EarIssuer(keys, issuer=self._config.tokens.issuer)
            verifier = EarVerifier(
                issuer.jwks(), issuers=[self._config.tokens.issuer], skew=self._config.limits.clock_skew
            )
            known = (now, issuer, verifier)
            with self._lock:
                self._keys = known
        return known[1], known[2]

    def _uid(self, tenant: str) -> str:
        now = time.monotonic()
        with self._lock:
            since, uid = self._uids.get(tenant, (float("-inf"), ""))
        if now - since > _KEYS_SECONDS:
            uid = self._store.tenants.get(tenant).uid
            with self._lock:
                self._uids[tenant] = (now, uid)
                if len(self._uids) > _RECENT:
                    self._uids.popitem(last=False)
        return uid

    def _keep_evidence(self, tenant: str, evidence: Evidence, decision: Decision) -> None:
        """Keep it for dry-runs, if the like of it was not kept just now."""
        if not self._config.attestation.keep_evidence:
            return
        appraisal = decision.appraisal
        what = () if appraisal is None else _identity(appraisal.claims)
        name = (tenant, evidence.tee, *what, *(str(item["id"]) for item in decision.reasons))
        now = time.monotonic()
        with self._lock:
            if now - self._kept.get(name, float("-inf")) < _KEEP_SECONDS:
                return
            self._kept[name] = now
            self._kept.move_to_end(name)
            if len(self._kept) > _RECENT:
                self._kept.popitem(last=False)
        try:
            self._store.evidence.keep(tenant, decision.evidence, evidence.to_json().encode(), tee=evidence.tee)
        except Invalid as error:
            event("verdict.evidence.not_kept", level=logging.WARNING, reason=error.id)

    def _audit(self, tenant: str, decision: Decision, holder: str, detail: dict[str, Any]) -> None:
        """Write it down, durably, and count it."""
        verdict = "allowed" if decision.allowed else "denied"
        facts: dict[str, Any] = {
            "request": request_id.get(),
            "evidence": decision.evidence,
            "tee": decision.tee,
            "policies": list(decision.policies),
            "reasons": [
                {name: str(value)[:_SHOWN] for name, value in item.items()} for item in decision.reasons[:_REASONS]
            ],
            **detail,
        }
        if decision.appraisal is not None:
            facts["claims"] = _portable(decision.appraisal.claims)
            facts["references"] = list(decision.appraisal.references)
            facts["trust"] = decision.appraisal.trust.to_dict()
        with span("audit"):
            entry = self._store.audit.append(tenant, f"tee:{holder}", decision.action, verdict, facts)
        first = str(decision.reasons[0]["id"]) if decision.reasons else "none"
        metrics.decided(decision.action, verdict, first, decision.tee)
        event(
            decision.action,
            decision=verdict,
            tenant=tenant,
            seq=entry.seq,
            evidence=decision.evidence,
            tee=decision.tee,
            policies=decision.policies,
            reasons=[item["id"] for item in decision.reasons],
            **detail,
        )


def judge(evidence: Evidence, rules: Rules, *, nonce: bytes | None, now: int) -> Appraisal:
    """Verify evidence, and appraise it by all attestation policies of a tenant.

    Raises:
        EvidenceError: it is not authentic.
        PlatformError: it carries no collateral.
    """
    first, *others = rules.attestation
    assert first.policy is not None
    appraisal = verify(evidence, first.policy, nonce=nonce, now=now, references=rules.references)
    context = Context(evidence.runtime_data, evidence.init_data)
    for rule in others:
        assert rule.policy is not None
        more = appraise(appraisal.claims, rule.policy, references=rules.references, context=context)
        # The later policy is the more particular one: the vector and the token's extensions are its.
        appraisal = replace(
            more,
            accepted=appraisal.accepted and more.accepted,
            failures=(*appraisal.failures, *more.failures),
            references=tuple(dict.fromkeys((*appraisal.references, *more.references))),
        )
    return appraisal


@dataclass(frozen=True, slots=True)
class DryRun:
    """What a policy would have decided.

    Attributes:
        appraisal: by the policy, or by those that the tenant has.
        release: of a resource policy about :attr:`resource`.
    """

    appraisal: Appraisal
    release: ResourceDecision | None = None


def dry_run(
    store: Store,
    tenant: str,
    digest: str,
    *,
    kind: PolicyKind | None = None,
    text: str = "",
    resource: str = "default/key/1",
    plugin: str = "resource",
) -> DryRun:
    """Decide about kept evidence again, at the time when it was kept, without any effect.

    Args:
        digest: of the evidence.
        kind, text: a policy to be tried out instead of the tenant's of this kind; by default none is replaced.
        resource, plugin: what a resource policy is asked about.

    Raises:
        NotFound: there is no such evidence.
        UsageError: the text is not a policy of this kind.
        EvidenceError: the evidence is not authentic.
    """
    kept = store.evidence.get(tenant, digest)
    evidence = Evidence.from_json(kept.envelope)
    rules = RuleBook(store).of(tenant)
    tried: Rule | None = None
    if kind is not None:
        anchors = [rule.policy.trust_anchor for rule in rules.attestation if rule.policy is not None]
        tried = make_rule("dry-run", 0, kind, text, next((anchor for anchor in anchors if anchor), None))
        if tried.policy is not None:
            others = [rule for rule in rules.attestation if rule.kind != kind and rule.version]
            # The TOML policy goes first: it has the root of a simulated platform.
            order = sorted([tried, *others], key=lambda rule: rule.kind != "toml")
            rules = replace(rules, attestation=tuple(order))
    appraisal = judge(evidence, rules, nonce=None, now=int(kept.kept.replace(tzinfo=UTC).timestamp()))
    by = tried if tried is not None and tried.policy is None else rules.resource if tried is None else None
    if by is None:
        return DryRun(appraisal)
    issuer = EarIssuer([EarKey.generate()])
    moment = int(datetime.now(UTC).timestamp())
    token = EarVerifier(issuer.jwks()).verify(
        issuer.issue(
            appraisal,
            tee_pubkey=None,
            policy_ids=[rule.label for rule in rules.attestation],
            context=Context(evidence.runtime_data, evidence.init_data),
            now=moment,
        ),
        now=moment,
    )
    return DryRun(appraisal, _by_resource_policy(by, token, Request(plugin, tuple(resource.split("/")))))


def collateral_source(config: VerdictConfig) -> CollateralSource | None:
    """Where collateral comes from; ``None`` if it has to be in the evidence.

    Raises:
        PlatformError: ``tee.state.*``: the cache's directory is not private.
    """
    check = config.collateral.pccs_check_certificate
    made: list[CollateralSource] = []
    for name in config.collateral.sources:
        if name == "intel":
            made.append(PccsSource(INTEL_PCS))
        elif name == "amd":
            made.append(KdsSource(AMD_KDS))
        elif name == "platform":
            made.append(PlatformSource())
        elif name.startswith("file:"):
            made.append(_collateral_file(Path(name.removeprefix("file:"))))
        else:
            made.append(PccsSource(name, check_certificate=check))
    if not made:
        return None
    directory = config.directory / "collateral"
    refresh = config.collateral.refresh_after
    # What is on this machine is not kept once more: whoever sends quotes would choose what is written.
    return ChainSource(
        [
            CachedSource(source, directory / sha256(name.encode()).hexdigest()[:16], refresh_after=refresh)
            if isinstance(source, PccsSource | KdsSource)
            else source
            for name, source in zip(config.collateral.sources, made, strict=True)
        ]
    )


def _collateral_file(path: Path) -> FileSource:
    """Refused when the service starts, not when the first client attests."""
    if not path.is_file():
        raise UsageError(
            "the file with collateral is not there",
            id="verdict.config.collateral",
            found=str(path),
            expected="JSON in dcap-qvl's layout",
            remedy="correct [collateral] sources",
        )
    return FileSource(path)


def _judge_again(rule: Rule, grant: Grant, rules: Rules) -> Appraisal:
    assert rule.policy is not None
    claims = grant.workload.claims
    if rule.policy.trust_anchor is not None and claims.simulated:
        root = sha256(rule.policy.trust_anchor).hexdigest()
        if root != claims.root_fingerprint:
            failure = Failure(
                "policy.trust_anchor",
                "root_fingerprint",
                claims.root_fingerprint,
                root,
                "the simulated platform is another one than the policy trusts",
            )
            return appraise(claims, rule.policy, references=rules.references, context=grant.context).refuse([failure])
    return appraise(claims, rule.policy, references=rules.references, context=grant.context)


def _by_resource_policy(rule: Rule, token: dict[str, Any], request: Request) -> ResourceDecision:
    # CoCo's command line asks for resource//repo/type/tag where the path is given without a scheme.
    path = request.path[1:] if request.path[:1] == ("",) else request.path
    return resource_policy(rule.text, token, path, plugin=request.plugin, query=request.query)


def _portable(claims: Claims) -> dict[str, Any]:
    """Claims for a token and the audit trail: without what only verification needed."""
    if claims.tdx is not None and claims.tdx.event_log is not None:
        claims = replace(claims, tdx=replace(claims.tdx, event_log=None))
    found = claims.to_dict()
    del found["endorsements"]
    return {name: value for name, value in found.items() if value not in (None, "") or name in _NEEDED}


def _identity(claims: Claims) -> tuple[str, ...]:
    from ..attestation.identity import IDENTIFYING, found

    return (*(str(found(claims, name)) for name in IDENTIFYING[claims.family]), claims.tcb_status, str(claims.debug))


def _plain(failure: Failure) -> dict[str, Any]:
    return {name: value for name, value in asdict(failure).items() if value is not None}


def _reason_text(item: dict[str, Any]) -> str:
    claim, found, expected = (item.get(name) for name in ("claim", "found", "expected"))
    text = str(claim or item.get("message"))
    if found is not None:
        text += f" {found}" if claim else f", found {found}"
    if expected is not None:
        text += f", expected {expected}"
    return f"{text} [{item['id']}]" + (f" ({item['remedy']})" if item.get("remedy") else "")


def _cut(item: dict[str, Any]) -> dict[str, str]:
    return {name: str(value)[:_SHOWN] for name, value in item.items()}
