"""Tenants, the service's signing keys, and the service itself."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Path, Request

from ... import __version__
from ...errors import InclavareError
from .. import store as stored
from ..auth import EVERY, Principal
from ..store import SYSTEM
from . import models
from .common import Auditor, Cursor, Limit, SystemAdmin, SystemAuditor, TenantName, changing, existing, ordinary, page

if TYPE_CHECKING:
    from ..config import VerdictConfig
    from ..store import Store

_KeyKind = Annotated[
    Literal["ear", "admin", "audit"],
    Path(description="`ear` signs attestation tokens, `admin` administrators' tokens, `audit` the audit trail."),
]


def routes(store: Store, config: VerdictConfig) -> APIRouter:
    """``/info``, ``/tenants`` and ``/keys``."""
    made = APIRouter(tags=["service"])

    def quotas(given: models.QuotasPut) -> stored.Quotas:
        section = config.tenants
        default = {"secrets": section.secrets, "bytes": section.bytes, "policies": section.policies,
                   "requests": section.requests}  # fmt: skip
        return stored.Quotas(**{**default, **given.model_dump(exclude_none=True)})

    @made.get("/info", response_model=models.Info, summary="The service, and who asks")
    def info(request: Request) -> Any:
        who: Principal = request.scope["verdict.principal"]
        try:
            store.ping()
            ready = True
        except InclavareError:
            ready = False
        grants = [{"tenant": tenant, "role": role} for tenant, role in who.grants]
        return {"service": "verdictd", "version": __version__, "actor": who.actor, "grants": grants, "ready": ready,
                "time": datetime.now(UTC)}  # fmt: skip

    @made.get("/tenants", response_model=models.Page[models.Tenant], summary="The tenants that you have a role for")
    def list_tenants(request: Request, limit: Limit = 100, after: Cursor = "") -> Any:
        who: Principal = request.scope["verdict.principal"]
        own = {name for name, _ in who.grants}
        seen = [tenant for tenant in store.tenants.list() if EVERY in own or tenant.name in own]
        return page(seen, lambda tenant: tenant.name, after, limit)

    @made.post("/tenants", response_model=models.Tenant, status_code=201, summary="Make a tenant")
    def create_tenant(who: SystemAdmin, body: models.TenantPost) -> Any:
        with changing(store, who, SYSTEM, "tenant.create", {"tenant": body.name}):
            return store.tenants.create(body.name, quotas=quotas(body.quotas)).to_dict()

    @made.get("/tenants/{tenant}", response_model=models.Tenant, summary="A tenant")
    def get_tenant(who: Auditor, tenant: TenantName) -> Any:
        return store.tenants.get(ordinary(tenant)).to_dict()

    @made.put("/tenants/{tenant}/quotas", response_model=models.Tenant, summary="Set a tenant's quotas")
    def set_quotas(who: SystemAdmin, tenant: TenantName, body: models.QuotasPut) -> Any:
        wanted = quotas(body)
        with changing(store, who, ordinary(tenant), "tenant.quotas", {"quotas": wanted.to_dict()}):
            return store.tenants.set_quotas(tenant, wanted).to_dict()

    @made.delete("/tenants/{tenant}", status_code=204, summary="Remove a tenant with everything but its audit trail")
    def delete_tenant(who: SystemAdmin, tenant: TenantName) -> None:
        existing(store, tenant)
        with (
            changing(store, who, SYSTEM, "tenant.delete", {"tenant": tenant}),
            changing(store, who, tenant, "tenant.delete"),
        ):
            store.tenants.delete(tenant)

    @made.get("/keys/{kind}", response_model=models.Keys, summary="Public keys whose signatures count now")
    def list_keys(who: SystemAuditor, kind: _KeyKind) -> Any:
        found = store.audit.public_keys() if kind == "audit" else [key.public_jwk() for key in store.keys.list(kind)]
        return {"keys": found}

    @made.post("/keys/{kind}/rotate", response_model=models.Keys, summary="Sign with a new key from now on")
    def rotate_key(who: SystemAdmin, kind: _KeyKind) -> Any:
        """What the old key has signed counts until it expires. To end that at once, revoke the tokens."""
        overlap = {"ear": config.tokens.lifetime + 60, "admin": config.auth.token_life}.get(kind, 60)
        with changing(store, who, SYSTEM, "key.rotate", {"kind": kind}):
            return {"keys": [store.keys.rotate(kind, overlap=timedelta(seconds=overlap)).public_jwk()]}

    return made
