"""Secrets: values go in and never come out here."""

from __future__ import annotations

import base64
import binascii
import json
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from pydantic import ValidationError

from ..store.names import MAX_SECRET
from . import models
from .common import IDENTIFIER, SEGMENT, Auditor, Cursor, Limit, Operator, TenantName, changing, existing, ordinary
from .problems import Failed, of_request

if TYPE_CHECKING:
    from ..store import Store

_Part = Annotated[str, Path(pattern=SEGMENT)]
_PATH = "/{repo}/{type}/{tag}"
_RAW = "application/octet-stream"
_VERSION = Query(ge=1, le=(1 << 31) - 1, description="By default the newest; of a deletion, all of them.")
_BODY = {
    "required": True,
    "content": {
        "application/json": {"schema": {"$ref": "#/components/schemas/SecretPut"}},
        _RAW: {"schema": {"type": "string", "format": "binary", "minLength": 1, "maxLength": MAX_SECRET}},
    },
}


def routes(store: Store) -> APIRouter:
    """``/tenants/{tenant}/secrets``."""
    made = APIRouter(prefix="/tenants/{tenant}/secrets", tags=["secrets"])

    @made.get("", response_model=models.Page[models.Secret], summary="The newest version of each secret")
    def list_secrets(who: Auditor, tenant: TenantName, limit: Limit = 100, after: Cursor = "") -> Any:
        found = store.secrets.list(existing(store, tenant), after=after, limit=limit + 1)
        shown = found[:limit]
        return {"items": [info.to_dict() for info in shown],
                "next": shown[-1].path if len(found) > limit else None}  # fmt: skip

    @made.put(
        _PATH,
        response_model=models.Secret,
        status_code=201,
        summary="Store a secret's next version",
        openapi_extra={"requestBody": _BODY},
    )
    def put_secret(
        request: Request,
        who: Operator,
        tenant: TenantName,
        repo: _Part,
        type: _Part,
        tag: _Part,
        policy: Annotated[
            str | None, Query(pattern=IDENTIFIER, description="With a raw body: policy that it is released by.")
        ] = None,
        release_once: Annotated[bool, Query(description="With a raw body: to one workload only, ever.")] = False,
    ) -> Any:
        """The value is the raw body, or base64 in JSON. 1 byte to 1 MiB."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        body: bytes = request.scope["verdict.body"]
        if kind == _RAW:
            value, metadata = body, {}
        elif kind == "application/json":
            if policy is not None or release_once:
                raise Failed(422, "the options belong into the JSON body", id="verdict.api.request",
                             found="policy or release_once in the query")  # fmt: skip
            asked = _parsed(body)
            value, policy, release_once, metadata = _decoded(asked.value), asked.policy, asked.release_once, \
                asked.metadata  # fmt: skip
        else:
            raise Failed(415, "not a kind of body that is taken here", id="verdict.api.media_type", found=kind[:100],
                         expected=f"application/json or {_RAW}")  # fmt: skip
        if not value:
            raise Failed(422, "the secret is empty", id="verdict.api.secret.empty", expected="1 byte at least")
        path = f"{repo}/{type}/{tag}"
        detail = {"secret": path, "bytes": len(value), "policy": policy, "release_once": release_once}
        with changing(store, who, ordinary(tenant), "secret.put", detail):
            info = store.secrets.put(tenant, path, value, policy=policy, release_once=release_once, metadata=metadata)
        return info.to_dict()

    @made.get(_PATH, response_model=models.Secret, summary="What is known of a secret besides its value")
    def get_secret(
        who: Auditor,
        tenant: TenantName,
        repo: _Part,
        type: _Part,
        tag: _Part,
        version: Annotated[int | None, _VERSION] = None,
    ) -> Any:
        return store.secrets.info(tenant, f"{repo}/{type}/{tag}", version).to_dict()

    @made.get(_PATH + "/versions", response_model=list[models.Secret], summary="A secret's versions, newest first")
    def list_versions(who: Auditor, tenant: TenantName, repo: _Part, type: _Part, tag: _Part) -> Any:
        return [info.to_dict() for info in store.secrets.versions(tenant, f"{repo}/{type}/{tag}")]

    @made.delete(_PATH, status_code=204, summary="Delete a secret, or one of its versions")
    def delete_secret(
        who: Operator,
        tenant: TenantName,
        repo: _Part,
        type: _Part,
        tag: _Part,
        version: Annotated[int | None, _VERSION] = None,
    ) -> None:
        path = f"{repo}/{type}/{tag}"
        with changing(store, who, tenant, "secret.delete", {"secret": path, "version": version}):
            store.secrets.delete(tenant, path, version)

    return made


def _parsed(body: bytes) -> models.SecretPut:
    try:
        return models.SecretPut.model_validate(json.loads(body))
    except ValidationError as error:
        raise of_request(error.errors(include_input=False, include_context=False, include_url=False)) from None
    except (ValueError, RecursionError):
        raise of_request([{"loc": ("body",), "msg": "not JSON"}]) from None


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise of_request([{"loc": ("body", "value"), "msg": "not base64"}]) from None
