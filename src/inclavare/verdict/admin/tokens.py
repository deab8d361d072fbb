"""Administrators' tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Path

from ..auth import issue
from ..store import Invalid
from . import models
from .common import Admin, Cursor, Limit, TenantName, changing, existing, page

if TYPE_CHECKING:
    from ..config import VerdictConfig
    from ..store import Store

_Jti = Annotated[str, Path(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="The token's id.")]


def routes(store: Store, config: VerdictConfig) -> APIRouter:
    """``/tenants/{tenant}/tokens``; those of ``_system`` are for all tenants."""
    made = APIRouter(prefix="/tenants/{tenant}/tokens", tags=["tokens"])

    @made.get("", response_model=models.Page[models.Token], summary="Tokens, revoked ones too")
    def list_tokens(who: Admin, tenant: TenantName, limit: Limit = 100, after: Cursor = "") -> Any:
        return page(store.tokens.list(existing(store, tenant, system=True)), lambda token: token.jti, after, limit)

    @made.post("", response_model=models.NewToken, status_code=201, summary="Make a token")
    def create_token(who: Admin, tenant: TenantName, body: models.TokenPost) -> Any:
        """It is in this answer and nowhere else."""
        if body.lifetime > config.auth.token_life:
            raise Invalid(
                "the token would live too long",
                id="verdict.api.token.lifetime",
                found=f"{body.lifetime} seconds",
                expected=f"at most {config.auth.token_life} seconds",
            )
        detail = {"name": body.name, "role": body.role, "lifetime": body.lifetime}
        with changing(store, who, tenant, "token.create", detail):
            info, token = issue(store, tenant, body.name, body.role, body.lifetime)
        return {**info.to_dict(), "token": token}

    @made.delete("/{jti}", response_model=models.Token, summary="Refuse a token from now on")
    def revoke_token(who: Admin, tenant: TenantName, jti: _Jti) -> Any:
        with changing(store, who, tenant, "token.revoke", {"jti": jti}):
            return store.tokens.revoke(tenant, jti).to_dict()

    return made
