"""Signed bundles of reference values, and who may sign them."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Path, Request, Response

from ...attestation.references import ReferenceBundle
from ...attestation.signers import TrustedSigners, load_public_key
from ...errors import UsageError
from ..store import Conflict, Invalid, NotFound
from . import models
from .common import DIGEST, IDENTIFIER, Auditor, Cursor, Limit, Operator, TenantName, changing, existing, ordinary, page

if TYPE_CHECKING:
    from ..store import Store

_Digest = Annotated[str, Path(pattern=DIGEST, description="SHA-256 of the bundle.")]
_SignerName = Annotated[str, Path(pattern=IDENTIFIER, examples=["release"])]
_JSON = "application/json"
_BODY = {
    "required": True,
    "description": "A DSSE envelope, or a sigstore bundle around one, as `inclavare build` makes it.",
    "content": {_JSON: {"schema": {"type": "object"}}},
}


def routes(store: Store) -> APIRouter:
    """``/tenants/{tenant}/references`` and ``/signers``."""
    made = APIRouter(prefix="/tenants/{tenant}", tags=["references"])

    @made.get("/references", response_model=models.Page[models.Reference], summary="Bundles, revoked ones too")
    def list_references(who: Auditor, tenant: TenantName, limit: Limit = 100, after: Cursor = "") -> Any:
        return page(store.references.list(existing(store, tenant)), lambda one: one.digest, after, limit)

    @made.post(
        "/references",
        response_model=models.Reference,
        status_code=201,
        summary="Register a signed bundle",
        responses={200: {"model": models.Reference, "description": "It is registered already."}},
        openapi_extra={"requestBody": _BODY},
    )
    def register(request: Request, response: Response, who: Operator, tenant: TenantName) -> Any:
        """A trusted signer must have signed it. It is kept byte for byte, and verified again whenever it counts."""
        envelope: bytes = request.scope["verdict.body"]
        signers = store.references.signers(existing(store, tenant))
        if not signers:
            raise Invalid(
                "the tenant trusts no signer",
                id="verdict.api.reference.signers",
                remedy="trust the key first: inclavare verdict reference trust NAME KEY.pem",
            )
        bundle = ReferenceBundle.parse(
            envelope, TrustedSigners.from_pem(*(signer.public_key.encode() for signer in signers))
        )
        if bundle.not_after <= time.time():
            raise Invalid("the bundle is expired", id="verdict.api.reference.expired",
                          found=_moment(bundle.not_after).isoformat(), remedy="sign a new one")  # fmt: skip
        described = bundle.to_dict()
        metadata = {name: described[name] for name in ("id", "subjects", "signers")}
        image = bundle.subjects[0].name if bundle.subjects else None
        try:
            with changing(store, who, tenant, "reference.register", {"bundle": bundle.id, "image": image}):
                return store.references.register(
                    tenant,
                    envelope,
                    image=image,
                    not_before=_moment(bundle.not_before),
                    not_after=_moment(bundle.not_after),
                    metadata=metadata,
                    by=who.author,
                ).to_dict()
        except Conflict as error:
            found, _ = store.references.get(tenant, str(error.found))
            if found.revoked is not None:
                raise
            response.status_code = 200
            return found.to_dict()

    @made.get("/references/{digest}", response_model=models.Reference, summary="A bundle")
    def get_reference(who: Auditor, tenant: TenantName, digest: _Digest) -> Any:
        return store.references.get(tenant, digest)[0].to_dict()

    @made.get(
        "/references/{digest}/bundle",
        summary="A bundle as it was signed",
        response_class=Response,
        responses={200: {"content": {_JSON: {"schema": {"type": "object"}}}}},
    )
    def get_bundle(who: Auditor, tenant: TenantName, digest: _Digest) -> Response:
        return Response(store.references.get(tenant, digest)[1], media_type=_JSON)

    @made.post("/references/{digest}/revoke", response_model=models.Reference, summary="Revoke a bundle for ever")
    def revoke(who: Operator, tenant: TenantName, digest: _Digest, body: models.Revocation) -> Any:
        with changing(store, who, tenant, "reference.revoke", {"digest": digest, "reason": body.reason}):
            return store.references.revoke(tenant, digest, body.reason).to_dict()

    @made.get("/signers", response_model=list[models.Signer], summary="Whose bundles the tenant takes")
    def list_signers(who: Auditor, tenant: TenantName) -> Any:
        return [signer.to_dict() for signer in store.references.signers(existing(store, tenant))]

    @made.put(
        "/signers/{name}",
        response_model=models.Signer,
        status_code=201,
        summary="Trust a key",
        responses={200: {"model": models.Signer, "description": "It is trusted already."}},
    )
    def trust(response: Response, who: Operator, tenant: TenantName, name: _SignerName, body: models.SignerPut) -> Any:
        if "PRIVATE" in body.public_key or not body.public_key.isascii():
            raise UsageError("this is not a public key", id="reference.key", expected="PEM, BEGIN PUBLIC KEY")
        load_public_key(body.public_key.encode(), "public_key")
        known = {signer.name: signer for signer in store.references.signers(existing(store, tenant))}
        if name in known and known[name].public_key.strip() == body.public_key.strip():
            response.status_code = 200
            return known[name].to_dict()
        with changing(store, who, tenant, "signer.trust", {"signer": name}):
            return store.references.trust(tenant, name, body.public_key).to_dict()

    @made.delete("/signers/{name}", status_code=204, summary="Trust a key no more; its bundles count no more")
    def distrust(who: Operator, tenant: TenantName, name: _SignerName) -> None:
        with changing(store, who, ordinary(tenant), "signer.distrust", {"signer": name}):
            if name not in {signer.name for signer in store.references.signers(tenant)}:
                raise NotFound("no such signer", id="verdict.store.signer.unknown", found=name)
            store.references.distrust(tenant, name)

    return made


def _moment(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
