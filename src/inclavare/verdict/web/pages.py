"""What the pages show, read from the store for whoever may see it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ...attestation.identity import IDENTIFYING, family
from ...attestation.references import References
from ...errors import InclavareError
from ..auth import EVERY, Principal
from ..rules import RuleBook
from ..store import SYSTEM
from ..store.errors import unknown

if TYPE_CHECKING:
    from ..store import AuditEntry, Store

PAGE = 50
#: Actions that say whether a workload was accepted.
ATTESTATIONS = ("kbs.attest", "secret_prov.release")
RELEASES = ("kbs.release", "secret_prov.release")
#: The newest releases, which are counted.
COUNTED = 2000
_TENANT = re.compile(
    r"/tenants/([a-z0-9_-]{1,63})(?:/(workloads|policies|references|secrets|audit)(?:/(.{1,400}))?)?/?"
)
#: Claims that come first.
_FIRST = ("tee", "simulated", "debug", "tcb_status", "advisories", "mrenclave", "mrsigner", "isv_prod_id", "isv_svn")

Shown = tuple[str, dict[str, Any]]


class Pages:
    """Renders pages. Called from several threads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._book = RuleBook(store)
        self._environment = Environment(
            loader=PackageLoader(__package__),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            auto_reload=False,
        )
        self._environment.filters |= {"plain": plain, "moment": moment, "value": value, "short": short}

    def render(self, template: str, principal: Principal | None, **values: Any) -> str:
        """A page's HTML."""
        common = {"principal": principal, "tenant": None, "part": None}
        return self._environment.get_template(template).render(common | values)

    def page(self, principal: Principal, path: str, query: dict[str, str]) -> str:
        """The page at a path.

        Raises:
            Forbidden: no role for this tenant, whether or not there is such a tenant.
            NotFound: there is nothing.
            ValueError: the query is malformed.
            InclavareError: see :mod:`inclavare.verdict.store.errors`.
        """
        if path == "/":
            return self.render("tenants.html", principal, tenants=self._tenants(principal))
        match = _TENANT.fullmatch(path)
        if match is None:
            raise unknown("page")
        tenant, part, item = match.groups()
        principal.require(tenant, "auditor")
        part = part or ("audit" if tenant == SYSTEM else "workloads")
        if tenant == SYSTEM and part != "audit":
            raise unknown("page")
        name = part if item is None else part + "_item"
        pages: dict[str, Callable[[str, str, dict[str, str]], Shown]] = {
            "workloads": self._workloads,
            "workloads_item": self._workload,
            "policies": self._policies,
            "policies_item": self._policy,
            "references": self._references,
            "references_item": self._reference,
            "secrets": self._secrets,
            "secrets_item": self._secret,
            "audit": self._audit,
        }
        if name not in pages:
            raise unknown("page")
        template, values = pages[name](tenant, item or "", query)
        return self.render(template, principal, tenant=tenant, part=part, **values)

    def _tenants(self, principal: Principal) -> list[tuple[str, str]]:
        own = {tenant for tenant, _ in principal.grants}
        found = {tenant.name for tenant in self._store.tenants.list()} if EVERY in own else own
        if EVERY in own:
            found.add(SYSTEM)
        return [(name, str(principal.role(name))) for name in sorted(found)]

    # --- workloads

    def _workloads(self, tenant: str, _: str, query: dict[str, str]) -> Shown:
        decision = _choice(query, "decision", ("allowed", "denied"))
        entries: list[AuditEntry] = []
        for action in ATTESTATIONS:
            entries += self._newest(tenant, query, action=action, decision=decision)
        entries.sort(key=lambda entry: -entry.seq)
        rows = [{"entry": entry, "measurement": _measurement(entry)} for entry in entries[:PAGE]]
        return "workloads.html", {"rows": rows, "decision": decision, "older": _older(entries)}

    def _workload(self, tenant: str, item: str, _: dict[str, str]) -> Shown:
        seq = _number(item)
        found = self._store.audit.entries(tenant, after=seq - 1, before=seq + 1)
        if not found or found[0].action not in (*ATTESTATIONS, *RELEASES):
            raise unknown("workload")
        entry = found[0]
        references = self._known(tenant)
        bundles = _bundles(entry)
        expected: dict[str, list[tuple[str, str | None]]] = {}
        for bundle in references.bundles:
            if bundle.id in bundles:
                for reference in bundle.references:
                    if entry.detail.get("tee") in reference.tees:
                        for name, text in reference.claims.items():
                            expected.setdefault(name, []).append((str(text), bundle.id))
        for reason in _reasons(entry):
            if reason.get("claim") and reason.get("expected"):
                expected[reason["claim"]] = [(reason["expected"], reason.get("reference"))]
        failed = {reason.get("claim") for reason in _reasons(entry)}
        claims = _flat(entry.detail.get("claims"))
        claims.sort(key=lambda pair: (pair[0] not in failed, _FIRST.index(pair[0]) if pair[0] in _FIRST else 99))
        return "workload.html", {
            "entry": entry,
            "reasons": _reasons(entry),
            "claims": [(name, text, expected.get(name, []), name in failed) for name, text in claims],
            "links": self._links(tenant),
            "policies": [str(label).rpartition("@")[::2] for label in _list(entry.detail.get("policies"))],
        }

    def _known(self, tenant: str) -> References:
        try:
            return self._book.of(tenant, fresh=True).references
        except InclavareError:
            # A policy that cannot be read is the decision's concern; the page goes on without.
            return References()

    def _links(self, tenant: str) -> dict[str, str]:
        """Bundles' ids and the digests that they are registered by."""
        from hashlib import sha256

        return {bundle.id: sha256(bundle.envelope).hexdigest() for bundle in self._known(tenant).bundles}

    # --- the others

    def _policies(self, tenant: str, _: str, __: dict[str, str]) -> Shown:
        return "policies.html", {"policies": self._store.policies.list(tenant)}

    def _policy(self, tenant: str, item: str, query: dict[str, str]) -> Shown:
        history = self._store.policies.history(tenant, item)
        wanted = _number(query["version"]) if "version" in query else None
        current = self._store.policies.get(tenant, item)
        shown = current if wanted is None else next((one for one in history if one.version == wanted), None)
        if shown is None:
            raise unknown("policy")
        return "policy.html", {"shown": shown, "current": current, "history": history}

    def _references(self, tenant: str, _: str, __: dict[str, str]) -> Shown:
        now = datetime.now(UTC)
        rows = [(info, _state(info, now)) for info in self._store.references.list(tenant)]
        return "references.html", {"rows": rows, "signers": self._store.references.signers(tenant)}

    def _reference(self, tenant: str, item: str, _: dict[str, str]) -> Shown:
        from hashlib import sha256

        info, envelope = self._store.references.get(tenant, item)
        known = self._known(tenant).bundles
        bundle = next((one for one in known if sha256(one.envelope).digest() == sha256(envelope).digest()), None)
        return "reference.html", {"info": info, "state": _state(info, datetime.now(UTC)), "bundle": bundle}

    def _secrets(self, tenant: str, _: str, query: dict[str, str]) -> Shown:
        secrets = list(self._store.secrets.list(tenant, after=query.get("after", "")[:400], limit=PAGE + 1))
        releases, more = self._releases(tenant)
        return "secrets.html", {
            "secrets": secrets[:PAGE],
            "releases": Counter(str(entry.detail.get("resource")) for entry in releases if entry.decision == "allowed"),
            "more": more,
            "next": secrets[PAGE - 1].path if len(secrets) > PAGE else None,
        }

    def _secret(self, tenant: str, item: str, _: dict[str, str]) -> Shown:
        versions = self._store.secrets.versions(tenant, item)
        releases, more = self._releases(tenant)
        own = [entry for entry in releases if entry.detail.get("resource") == f"resource/{item}"]
        return "secret.html", {"path": item, "versions": versions, "releases": own[:PAGE], "more": more}

    def _releases(self, tenant: str) -> tuple[list[AuditEntry], bool]:
        """The newest releases and refusals, and whether there are older ones that are not among them."""
        found: list[AuditEntry] = []
        more = False
        for action in RELEASES:
            entries = self._store.audit.entries(tenant, newest_first=True, limit=COUNTED + 1, action=action)
            more = more or len(entries) > COUNTED
            found += entries[:COUNTED]
        return sorted(found, key=lambda entry: -entry.seq), more

    def _audit(self, tenant: str, _: str, query: dict[str, str]) -> Shown:
        decision = _choice(query, "decision", ("allowed", "denied", "done"))
        entries = self._newest(tenant, query, decision=decision)
        report = self._store.audit.verify(tenant) if query.get("verify") == "1" else None
        values = {"entries": entries[:PAGE], "decision": decision, "older": _older(entries), "report": report}
        return "audit.html", values

    def _newest(
        self, tenant: str, query: dict[str, str], *, action: str | None = None, decision: str | None = None
    ) -> list[AuditEntry]:
        """A page of entries and one more."""
        before = _number(query["before"]) if "before" in query else None
        return self._store.audit.entries(
            tenant, before=before, newest_first=True, limit=PAGE + 1, action=action, decision=decision
        )


# --- filters: what others wrote is shown as it is, and does nothing


def plain(text: object) -> str:
    """Text in which control characters and those that turn the line's direction are to be seen."""
    return "".join(
        sign if sign.isprintable() or sign in "\n\t" else sign.encode("unicode_escape", "surrogatepass").decode()
        for sign in str(text)
    )


def moment(when: datetime | int | None) -> str:
    """``2026-07-01 12:00:00 UTC``."""
    if when is None:
        return "–"
    try:
        found = datetime.fromtimestamp(when, UTC) if isinstance(when, int) else when.astimezone(UTC)
    except (OverflowError, ValueError, OSError):
        return str(when)
    return found.strftime("%Y-%m-%d %H:%M:%S UTC")


def value(found: object) -> str:
    """A claim's value."""
    if isinstance(found, bool):
        return "yes" if found else "no"
    return plain(found if isinstance(found, str | int) else json.dumps(found, ensure_ascii=False))


def short(text: str, length: int = 16) -> str:
    """A digest's beginning."""
    return text if len(text) <= length else text[:length] + "…"


# --- inside


def _reasons(entry: AuditEntry) -> list[dict[str, str]]:
    return [item for item in _list(entry.detail.get("reasons")) if isinstance(item, dict)]


def _bundles(entry: AuditEntry) -> set[str]:
    named = {str(reason["reference"]) for reason in _reasons(entry) if reason.get("reference")}
    return named | set(map(str, _list(entry.detail.get("references"))))


def _measurement(entry: AuditEntry) -> tuple[str, str]:
    """Name and value of what says which code it was; empty where the evidence was not authentic."""
    claims = dict(_flat(entry.detail.get("claims")))
    name = IDENTIFYING.get(family(str(entry.detail.get("tee"))), ("",))[0]
    return name, str(claims.get(name, ""))


def _flat(claims: object) -> list[tuple[str, Any]]:
    """Claims, those of a trust domain or guest beside the others."""
    found: list[tuple[str, Any]] = []
    for name, text in claims.items() if isinstance(claims, dict) else ():
        if name in ("tdx", "snp") and isinstance(text, dict):
            found += text.items()
        else:
            found.append((str(name), text))
    return found


def _state(info: Any, now: datetime) -> str:
    if info.revoked is not None:
        return "revoked"
    if info.not_after is not None and info.not_after <= now:
        return "expired"
    return "valid" if info.is_active(now) else "not yet valid"


def _older(entries: list[AuditEntry]) -> int | None:
    return entries[PAGE - 1].seq if len(entries) > PAGE else None


def _list(found: object) -> list[Any]:
    return found if isinstance(found, list) else []


def _choice(query: dict[str, str], name: str, known: tuple[str, ...]) -> str | None:
    found = query.get(name)
    return found if found in known else None


def _number(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,15}", text, re.ASCII):
        raise ValueError(text)
    return int(text)
