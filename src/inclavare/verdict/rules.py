"""A tenant's policies and reference values, ready to decide by.

They are read anew when :data:`FRESH_SECONDS` have passed: so long after a policy was changed or a reference value was
revoked, every replica decides by it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..attestation.appraisal import AppraisalPolicy
from ..attestation.policy import Policy
from ..attestation.references import ReferenceBundle, References
from ..attestation.rego import RegoPolicy
from ..attestation.signers import TrustedSigners
from ..errors import InclavareError, IntegrityError, UsageError
from .store.errors import NotFound
from .telemetry import event

if TYPE_CHECKING:
    from .store import PolicyVersion, Store
    from .store.types import PolicyKind

FRESH_SECONDS = 1.0
_TENANTS = 1000

#: Said of a refusal by what is built in.
NO_POLICY = (
    "the tenant has no attestation policy of its own, and what is built in accepts production hardware only: "
    "make one the default with `inclavare verdict policy set ID FILE --default`"
)
#: What counts where a tenant has no policy: hardware in production, up to date. Which enclaves get what is then for the
#: secrets' own policies to say.
BUILT_IN = Policy(any_enclave=True)


@dataclass(frozen=True, slots=True)
class Rule:
    """A policy, ready.

    Attributes:
        id, version, kind: of the store; version 0 for what is built in.
        policy: what evidence is appraised by; ``None`` for a resource policy.
        text: of a resource policy in Rego.
    """

    id: str
    version: int
    kind: PolicyKind
    policy: Policy | AppraisalPolicy | None
    text: str = field(default="", repr=False)

    @property
    def label(self) -> str:
        """``id@version``, as in tokens and the audit trail."""
        return f"{self.id}@{self.version}"

    def names_enclaves(self) -> bool:
        """Whether it says which enclaves it is about, so that a release may rest on it alone."""
        return not (isinstance(self.policy, Policy) and self.policy.any_enclave)


@dataclass(frozen=True, slots=True)
class Rules:
    """What a tenant decides by.

    Attributes:
        attestation: evidence has to pass all of them.
        resource: the default resource policy.
        references: reference values, those that are expired or revoked, too.
        basis: changes when the result of an appraisal might.
    """

    attestation: tuple[Rule, ...]
    resource: Rule | None
    references: References
    basis: str


class RuleBook:
    """The rules of all tenants, cached.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, store: Store, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._lock = threading.Lock()
        self._rules: OrderedDict[str, tuple[float, Rules]] = OrderedDict()
        self._named: OrderedDict[tuple[str, str], tuple[float, Rule]] = OrderedDict()
        self._references: OrderedDict[str, tuple[str, References]] = OrderedDict()

    def of(self, tenant: str, *, fresh: bool = False) -> Rules:
        """The tenant's default policies and its reference values.

        Args:
            fresh: do not take them from the cache.

        Raises:
            UsageError: a policy in the store cannot be read.
            InclavareError: see :mod:`inclavare.verdict.store.errors`.
        """
        now = self._clock()
        with self._lock:
            since, rules = self._rules.get(tenant, (float("-inf"), None))
        if rules is None or fresh or now - since >= FRESH_SECONDS:
            rules = self._read(tenant)
            self._keep(self._rules, tenant, (now, rules))
        return rules

    def named(self, tenant: str, id: str) -> Rule:
        """A policy by its id.

        Raises:
            NotFound: there is none.
        """
        now = self._clock()
        with self._lock:
            since, rule = self._named.get((tenant, id), (float("-inf"), None))
        if rule is None or now - since >= FRESH_SECONDS:
            rule = _rule(self._store.policies.get(tenant, id))
            self._keep(self._named, (tenant, id), (now, rule))
        return rule

    def _read(self, tenant: str) -> Rules:
        policies = self._store.policies
        attestation = []
        anchor = None
        for kind in ("toml", "attestation-rego"):
            found = policies.default(tenant, kind)
            if found is not None:
                rule = _rule(found, anchor)
                assert rule.policy is not None
                # Rego has no place for a root: a tenant's file says which simulated platform it trusts.
                anchor = anchor or rule.policy.trust_anchor
                attestation.append(rule)
        if not attestation:
            attestation.append(Rule("built-in", 0, "toml", BUILT_IN))
        resource = policies.default(tenant, "resource-rego")
        revision, references = self._references_of(tenant)
        return Rules(
            tuple(attestation),
            None if resource is None else _rule(resource),
            references,
            ",".join([*(rule.label for rule in attestation), revision[:16]]),
        )

    def _references_of(self, tenant: str) -> tuple[str, References]:
        store = self._store.references
        revision = store.revision(tenant)
        with self._lock:
            known, references = self._references.get(tenant, ("", None))
        if references is not None and known == revision:
            return revision, references
        trusted = TrustedSigners.from_pem(*(signer.public_key.encode() for signer in store.signers(tenant)))
        bundles: dict[str, ReferenceBundle] = {}
        revoked: dict[str, str] = {}
        for info in store.list(tenant):
            try:
                _, envelope = store.get(tenant, info.digest)
                bundle = ReferenceBundle.parse(envelope, trusted)
            except (IntegrityError, UsageError, NotFound) as error:
                event("verdict.references.skipped", level=logging.WARNING, bundle=info.digest, reason=error.id)
                continue
            bundles[bundle.id] = bundle
            if info.revoked is not None:
                revoked[bundle.id] = info.revoked_reason or "no reason was given"
        references = References(bundles.values(), revoked)
        self._keep(self._references, tenant, (revision, references))
        return revision, references

    def _keep(self, cache: OrderedDict, key: object, value: object) -> None:  # type: ignore[type-arg]
        with self._lock:
            cache[key] = value
            cache.move_to_end(key)
            if len(cache) > _TENANTS:
                cache.popitem(last=False)


def _rule(found: PolicyVersion, anchor: bytes | None = None) -> Rule:
    return make_rule(found.id, found.version, found.kind, found.text, anchor)


def make_rule(id: str, version: int, kind: PolicyKind, text: str, anchor: bytes | None = None) -> Rule:
    """A rule from a policy's text.

    Args:
        anchor: root CA of the simulated platform for a policy in Rego, DER.

    Raises:
        UsageError: the text is not a policy of this kind.
    """
    if kind == "toml":
        return Rule(id, version, kind, Policy.parse(text, id))
    if kind == "attestation-rego":
        return Rule(id, version, kind, RegoPolicy(text, anchor))
    return Rule(id, version, kind, None, text)


def reason(error: InclavareError) -> dict[str, object]:
    """An error as a reason in a decision."""
    return {name: value for name, value in error.to_dict().items() if name != "exit_code" and value is not None}
