"""Requests and answers without a framework: what the key broker's three paths need, and not more."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]

_QUERY_FIELDS = 32
_PATIENCE = 4
#: Unless an answer says otherwise.
_HEADERS = {"cache-control": "no-store"}


class TooLarge(Exception):
    """The body is longer than the limit."""


class TooSlow(Exception):
    """The body was not complete in time."""


class Gone(Exception):
    """The client went away."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer; headers' names in lower case."""

    status: int
    body: bytes = b""
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)

    async def send(self, send: Send) -> None:
        """Send it."""
        headers = [
            (b"content-type", self.content_type.encode()),
            (b"content-length", str(len(self.body)).encode()),
            *((name.encode(), value.encode("latin-1")) for name, value in {**_HEADERS, **self.headers}.items()),
        ]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": self.body})


def header(scope: Scope, name: bytes) -> str | None:
    """A header that occurs once; ``None`` if it does not, or more than once."""
    found = [value for key, value in scope["headers"] if key == name]
    return found[0].decode("latin-1") if len(found) == 1 else None


def cookie(scope: Scope, name: str) -> str | None:
    """A cookie (RFC 6265, section 4.2.1)."""
    for key, value in scope["headers"]:
        if key == b"cookie":
            for pair in value.decode("latin-1").split(";"):
                found, _, text = pair.strip().partition("=")
                if found == name:
                    return text.strip('"')  # type: ignore[no-any-return]
    return None


def bearer(scope: Scope) -> str | None:
    """The bearer token (RFC 6750)."""
    scheme, _, token = (header(scope, b"authorization") or "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def query(scope: Scope) -> dict[str, str]:
    """The query's fields; of a name that occurs more than once, the last.

    Raises:
        ValueError: too many.
    """
    text = scope["query_string"].decode("latin-1")
    return dict(parse_qsl(text, keep_blank_values=True, max_num_fields=_QUERY_FIELDS))


async def body(scope: Scope, receive: Receive, limit: int, seconds: float) -> bytes:
    """The request's body.

    Args:
        limit: bytes.
        seconds: until it has to be complete.

    Raises:
        TooLarge, TooSlow, Gone: as they say.
    """
    collected, seen = bytearray(), 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Gone
                part = message.get("body", b"")
                seen += len(part)
                if seen <= limit:
                    collected += part
                # A little more is read, and dropped: who is still sending does not see the answer.
                if seen > _PATIENCE * limit or (seen > limit and not message.get("more_body")):
                    raise TooLarge
                if not message.get("more_body"):
                    return bytes(collected)
    except TimeoutError:
        raise TooSlow from None
