"""Refusals as problem documents (RFC 9457)."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any

from ...errors import EvidenceError, InclavareError, IntegrityError, PlatformError, ResourceError, UsageError
from ..auth import Forbidden, Unauthenticated
from ..http import Answer
from ..store import Conflict, Consumed, Damaged, Invalid, NotFound, QuotaExceeded, Unavailable
from ..telemetry import request_id

MEDIA_TYPE = "application/problem+json"
CHALLENGE = {"www-authenticate": 'Bearer realm="verdictd"'}

#: The first that fits counts.
_STATUS: tuple[tuple[type[InclavareError], int], ...] = (
    (Unauthenticated, 401),
    (Forbidden, 403),
    (NotFound, 404),
    (Conflict, 409),
    (Consumed, 409),
    (QuotaExceeded, 409),
    (Invalid, 422),
    (Damaged, 500),
    (Unavailable, 503),
    (ResourceError, 503),
    (PlatformError, 503),
    (EvidenceError, 422),
    (IntegrityError, 422),
    (UsageError, 422),
)


class Failed(UsageError):
    """A request that HTTP itself has a status for."""

    def __init__(self, status: int, message: str, **fields: Any) -> None:
        super().__init__(message, **fields)
        self.status = status


def status_of(error: InclavareError) -> int:
    """The HTTP status of an error."""
    if isinstance(error, Failed):
        return error.status
    if error.id == "verdict.store.policy.changed":
        return 412
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)


def problem(error: InclavareError, headers: dict[str, str] | None = None) -> Answer:
    """The answer. Nothing of the request stands in it but what the error says."""
    status = status_of(error)
    extra = {401: CHALLENGE, 503: {"retry-after": "1"}}.get(status, {})
    document = {
        "type": f"urn:inclavare:{error.id}",
        "title": error.message,
        "status": status,
        "id": error.id,
        "found": None if error.found is None else str(error.found),
        "expected": None if error.expected is None else str(error.expected),
        "remedy": error.remedy,
        "request": request_id.get(),
    }
    return Answer(status, json.dumps(document).encode(), MEDIA_TYPE, {**extra, **(headers or {})})


def of_http(status: int, headers: dict[str, str] | None = None) -> Answer:
    """The answer where the framework refuses: no such path, or not this method."""
    message = {404: "there is no such path", 405: "this path has not this method"}.get(
        status, HTTPStatus(status).phrase.lower()
    )
    return problem(Failed(status, message, id=f"verdict.api.{status}", remedy="see /api/v1/openapi.json"), headers)


def of_request(errors: Any) -> Failed:
    """A request that does not fit the description: where and why, but not what stood there, for it may be secret."""
    found = [f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in errors]
    return Failed(
        422,
        "the request is not as the API's description says",
        id="verdict.api.request",
        found="; ".join(found)[:1000],
        remedy="see /api/v1/openapi.json",
    )
