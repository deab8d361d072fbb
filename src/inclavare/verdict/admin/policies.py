"""Policies with their history, dry-runs of them, and the evidence that these are about."""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Header, Path, Query, Response

from ...attestation import rego
from ...errors import EvidenceError, InclavareError, PlatformError, UsageError
from .. import decide
from ..rules import make_rule, reason
from . import models
from .common import HEX, Auditor, Cursor, Limit, Operator, PolicyId, TenantName, changing, existing, ordinary, page
from .problems import Failed

if TYPE_CHECKING:
    from ..store import PolicyVersion, Store

_Version = Annotated[int, Query(ge=1, le=(1 << 31) - 1)]
_Digest = Annotated[str, Path(pattern=HEX, description="SHA-256 of the evidence.")]
_ETAG = {"ETag": {"description": "Names the text; for If-Match.", "schema": {"type": "string"}}}


def routes(store: Store) -> APIRouter:
    """``/tenants/{tenant}/policies``, ``/policy-defaults``, ``/dry-run`` and ``/evidence``."""
    made = APIRouter(prefix="/tenants/{tenant}", tags=["policies"])

    def in_force(tenant: str, id: str) -> PolicyVersion | None:
        return next((one for one in store.policies.list(tenant) if one.id == id), None)

    def shown(response: Response, found: PolicyVersion) -> Any:
        response.headers["etag"] = etag(found)
        return found.to_dict()

    @made.get("/policies", response_model=models.Page[models.Policy], summary="The version in force of each policy")
    def list_policies(who: Auditor, tenant: TenantName, limit: Limit = 100, after: Cursor = "") -> Any:
        return page(store.policies.list(existing(store, tenant)), lambda policy: policy.id, after, limit)

    @made.put(
        "/policies/{id}",
        response_model=models.Policy,
        summary="Put a policy's next version into force",
        responses={200: {"headers": _ETAG}, 201: {"model": models.Policy, "headers": _ETAG,
                                                  "description": "It is new."}},
    )  # fmt: skip
    def put_policy(
        response: Response,
        who: Operator,
        tenant: TenantName,
        id: PolicyId,
        body: models.PolicyPut,
        if_match: Annotated[str | None, Header(description="ETag of the version that this one follows.")] = None,
        if_none_match: Annotated[str | None, Header(description="`*`: only if there is none of this id.")] = None,
    ) -> Any:
        """The text is checked first. Putting the text that is in force changes nothing."""
        check(id, body.kind, body.text)
        old = in_force(existing(store, tenant), id)
        expected = None
        if if_match is not None:
            if old is None or if_match.strip() not in ("*", etag(old)):
                raise _changed("none" if old is None else etag(old), if_match)
            expected = old.version
        if if_none_match is not None:
            if if_none_match.strip() != "*":
                raise Failed(422, "If-None-Match is for new policies", id="verdict.api.request", expected="*")
            if old is not None:
                raise _changed(etag(old), "none")
            expected = 0
        if old is not None and (old.kind, old.text) == (body.kind, body.text):
            return shown(response, old)
        with changing(store, who, tenant, "policy.put", {"policy": id, "kind": body.kind}):
            put = store.policies.put(tenant, id, body.kind, body.text, author=who.author, expected=expected)
        response.status_code = 201 if old is None else 200
        return shown(response, put)

    @made.get("/policies/{id}", response_model=models.Policy, summary="A policy", responses={200: {"headers": _ETAG}})
    def get_policy(
        response: Response, who: Auditor, tenant: TenantName, id: PolicyId, version: _Version | None = None
    ) -> Any:
        return shown(response, store.policies.get(tenant, id, version))

    @made.delete("/policies/{id}", status_code=204, summary="Remove a policy with its history")
    def delete_policy(who: Operator, tenant: TenantName, id: PolicyId) -> None:
        with changing(store, who, tenant, "policy.delete", {"policy": id}):
            store.policies.delete(tenant, id)

    @made.get("/policies/{id}/history", response_model=list[models.Policy], summary="All versions, newest first")
    def history(who: Auditor, tenant: TenantName, id: PolicyId) -> Any:
        return [one.to_dict() for one in store.policies.history(tenant, id)]

    @made.get("/policies/{id}/diff", response_model=models.Diff, summary="What changed between two versions")
    def diff(who: Auditor, tenant: TenantName, id: PolicyId, old: _Version, new: _Version | None = None) -> Any:
        """`new` is by default the version in force."""
        before, after = store.policies.get(tenant, id, old), store.policies.get(tenant, id, new)
        lines = difflib.unified_diff(
            before.text.splitlines(), after.text.splitlines(), f"{id}@{before.version}", f"{id}@{after.version}",
            lineterm="",
        )  # fmt: skip
        return {"id": id, "old": before.version, "new": after.version, "diff": "\n".join(lines)}

    @made.post("/policies/{id}/rollback", response_model=models.Policy, summary="Bring an older text back")
    def rollback(response: Response, who: Operator, tenant: TenantName, id: PolicyId, body: models.Rollback) -> Any:
        """As a new version, which is in force from now on."""
        with changing(store, who, tenant, "policy.rollback", {"policy": id, "version": body.version}):
            return shown(response, store.policies.rollback(tenant, id, body.version, author=who.author))

    @made.put("/policies/{id}/default", response_model=models.Policy, summary="Make it the default of its kind")
    def set_default(response: Response, who: Operator, tenant: TenantName, id: PolicyId) -> Any:
        with changing(store, who, tenant, "policy.default", {"policy": id}):
            return shown(response, store.policies.set_default(tenant, id))

    @made.delete("/policy-defaults/{kind}", status_code=204, summary="Have no default policy of this kind")
    def clear_default(who: Operator, tenant: TenantName, kind: models.PolicyKind) -> None:
        with changing(store, who, ordinary(tenant), "policy.default", {"kind": kind, "policy": None}):
            store.policies.clear_default(tenant, kind)

    @made.get("/evidence", response_model=models.Page[models.Evidence], summary="Evidence kept for dry-runs")
    def list_evidence(who: Auditor, tenant: TenantName, limit: Limit = 100, after: Cursor = "") -> Any:
        return page(store.evidence.list(existing(store, tenant)), lambda one: one.digest, after, limit)

    @made.get("/evidence/{digest}", response_model=models.Evidence, summary="Metadata of kept evidence")
    def get_evidence(who: Auditor, tenant: TenantName, digest: _Digest) -> Any:
        return store.evidence.get(tenant, digest).to_dict()

    @made.post("/dry-run", response_model=models.DryRun, summary="Try a policy out on kept evidence")
    def dry_run(who: Operator, tenant: TenantName, body: models.DryRunPost) -> Any:
        """Decides again, at the time when the evidence was kept. Nothing is changed or released."""
        kept = {one.digest: one for one in store.evidence.list(existing(store, tenant))}
        kind, text = body.kind, body.text
        if body.policy is not None:
            if kind is not None or text is not None:
                raise Failed(422, "a policy or a text", id="verdict.api.request", found="both")
            found = store.policies.get(tenant, body.policy, body.version)
            kind, text = found.kind, found.text
        if (kind is None) != (text is None):
            raise Failed(422, "kind and text go together", id="verdict.api.request", found="one of them")
        if kind is not None and text is not None:
            check("dry-run", kind, text)
        digests = list(kept)[: body.limit] if body.evidence is None else list(dict.fromkeys(body.evidence))
        results = []
        for digest in digests:
            one = kept.get(digest) or store.evidence.get(tenant, digest)
            result: dict[str, Any] = {"evidence": digest, "tee": one.tee, "kept": one.kept}
            try:
                tried = decide.dry_run(store, tenant, digest, kind=kind, text=text or "", resource=body.resource)
            except (EvidenceError, PlatformError) as error:
                results.append({**result, "accepted": False, "failures": [_failure(reason(error))]})
                continue
            release = tried.release and {
                "allowed": tried.release.allowed,
                "failures": [_failure(asdict(failure)) for failure in tried.release.failures],
            }
            failures = [_failure(asdict(failure)) for failure in tried.appraisal.failures]
            results.append({**result, "accepted": tried.appraisal.accepted, "failures": failures, "release": release})
        accepted = sum(result["accepted"] and (result.get("release") or {}).get("allowed", True) for result in results)
        return {"accepted": accepted, "refused": len(results) - accepted, "results": results}

    return made


def etag(policy: PolicyVersion) -> str:
    """Strong: the version, and its text's digest, because a policy that was removed begins anew at version 1."""
    return f'"{policy.version}-{policy.sha256[:16]}"'


def check(id: str, kind: models.PolicyKind, text: str) -> None:
    """Refuse a text that could not decide.

    Raises:
        UsageError: what is wrong with it, and where.
    """
    if "\0" in text:
        raise UsageError("the policy is not text", id="verdict.store.policy.text", expected="UTF-8 without NUL")
    if kind == "toml":
        try:
            anchor = tomllib.loads(text).get("trust_anchor", "-----BEGIN")
        except tomllib.TOMLDecodeError as error:
            raise UsageError(f"{id}: {error}", id="policy.file.syntax", remedy="correct the text") from None
        # A path would be one of this machine, and the error would tell what lies there.
        if not isinstance(anchor, str) or not anchor.startswith("-----BEGIN"):
            raise UsageError(
                f"{id}: trust_anchor is not a certificate",
                id="verdict.api.policy.trust_anchor",
                found="a path",
                expected='the certificate itself: trust_anchor = """-----BEGIN CERTIFICATE-----…"""',
            )
        make_rule(id, 0, kind, text)
    else:
        rego.check(text, "attestation" if kind == "attestation-rego" else "resource")


def _failure(found: dict[str, Any]) -> dict[str, Any]:
    names = ("id", "claim", "found", "expected", "remedy", "reference")
    return {name: str(found[name]) for name in names if found.get(name) is not None}


def _changed(found: str, expected: str) -> InclavareError:
    return Failed(412, "the policy is another one", id="verdict.store.policy.changed", found=found,
                  expected=expected[:100], remedy="read it again, and decide again")  # fmt: skip
