"""A client of the administrators' API, and tokens for it."""

from __future__ import annotations

import http.client
import json
import ssl
from typing import Any
from urllib.parse import urlsplit

from inclavare.verdict.auth import issue
from inclavare.verdict.store import SYSTEM, Store


class Answered:
    """An answer."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = response.headers
        self.body = response.read()

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def id(self) -> str:
        """Of a problem document."""
        assert self.headers["content-type"] == "application/problem+json", self.body
        return str(self.json["id"])


def call(
    service: Any,
    method: str,
    path: str,
    *,
    token: str | None = None,
    body: Any = None,
    headers: dict[str, str] | None = None,
    certificate: tuple[str, str] | None = None,
) -> Answered:
    """One request; a dict becomes JSON."""
    parts = urlsplit(service.url)
    context = ssl.create_default_context(cafile=str(service.config.certificate))
    if certificate:
        context.load_cert_chain(*certificate)
    assert parts.hostname
    connection = http.client.HTTPSConnection(parts.hostname, parts.port, context=context, timeout=30)
    sent = dict(headers or {})
    if token is not None:
        sent["Authorization"] = f"Bearer {token}"
    if isinstance(body, dict | list):
        body = json.dumps(body).encode()
        sent.setdefault("Content-Type", "application/json")
    try:
        connection.request(method, "/api/v1" + path, body, sent)
        return Answered(connection.getresponse())
    finally:
        connection.close()


def token(store: Store, role: Any, tenant: str = SYSTEM, *, name: str = "", lifetime: int = 3600) -> str:
    """A token."""
    return issue(store, tenant, name or f"{role}.{tenant.strip('_')}", role, lifetime)[1]
