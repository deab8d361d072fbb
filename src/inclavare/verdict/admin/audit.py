"""The audit trail."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import StreamingResponse

from ..store import SYSTEM, AuditReport
from . import models
from .common import Auditor, Limit, SystemAuditor, TenantName, changing, existing

if TYPE_CHECKING:
    from ..store import Store

_LINES = "application/jsonl"
_Seq = Annotated[int | None, Query(ge=0, le=(1 << 53) - 1)]
_Text = Annotated[str | None, Query(max_length=256, pattern=r"^[^\x00]*$")]


def routes(store: Store) -> APIRouter:
    """``/tenants/{tenant}/audit`` and ``/audit``."""
    made = APIRouter(tags=["audit"])

    @made.get("/tenants/{tenant}/audit", response_model=models.AuditPage, summary="Entries, not verified")
    def list_audit(
        who: Auditor,
        tenant: TenantName,
        limit: Limit = 100,
        after: _Seq = None,
        before: _Seq = None,
        newest_first: bool = False,
        action: _Text = None,
        decision: _Text = None,
        actor: _Text = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> Any:
        """Times without a zone are in UTC; `until` is excluded."""
        found = store.audit.entries(
            existing(store, tenant, system=True),
            after=after or 0,
            before=before,
            limit=limit + 1,
            newest_first=newest_first,
            action=action,
            decision=decision,
            actor=actor,
            since=_aware(since),
            until=_aware(until),
        )
        shown = found[:limit]
        return {"items": [entry.to_dict() for entry in shown], "next": shown[-1].seq if len(found) > limit else None}

    @made.get(
        "/tenants/{tenant}/audit/export",
        summary="The whole trail as JSON lines",
        response_class=StreamingResponse,
        responses={200: {"content": {_LINES: {"schema": {"type": "string"}}}}},
    )
    def export(who: Auditor, tenant: TenantName) -> StreamingResponse:
        """With its signed end. `inclavare verdict audit verify --export` checks it without this service."""
        lines = store.audit.export(tenant)
        first = next(lines)  # here, so that a refusal is an answer
        text: Iterator[str] = (line + "\n" for line in chain([first], lines))
        return StreamingResponse(text, media_type=_LINES)

    @made.post("/tenants/{tenant}/audit/verify", response_model=models.AuditReport, summary="Verify a trail")
    def verify(who: Auditor, tenant: TenantName, body: models.VerifyPost) -> Any:
        return _report(store.audit.verify(tenant, anchors=[anchor.model_dump() for anchor in body.anchors]))

    @made.post("/audit/verify", response_model=models.AuditReport, summary="Verify all trails")
    def verify_all(who: SystemAuditor, body: models.VerifyPost) -> Any:
        return _report(store.audit.verify(anchors=[anchor.model_dump() for anchor in body.anchors]))

    @made.get("/audit/checkpoints", response_model=list[models.Checkpoint], summary="The newest checkpoints")
    def list_checkpoints(who: SystemAuditor, limit: Limit = 100) -> Any:
        return store.audit.checkpoints(limit=limit)

    @made.post("/audit/checkpoints", response_model=models.Checkpoint, status_code=201, summary="Make a checkpoint")
    def checkpoint(who: SystemAuditor) -> Any:
        """Keep it where the database's administrator cannot reach."""
        with changing(store, who, SYSTEM, "audit.checkpoint"):
            return store.audit.checkpoint()

    return made


def _report(report: AuditReport) -> dict[str, Any]:
    return {**report.to_dict(), "whole": report.whole}


def _aware(moment: datetime | None) -> datetime | None:
    return moment.replace(tzinfo=UTC) if moment is not None and moment.tzinfo is None else moment
