"""Requests for pages: who asks, which page, and the headers that keep a browser on our side."""

from __future__ import annotations

import asyncio
import logging
from importlib.resources import files
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

from ...errors import InclavareError
from .. import http, metrics
from ..auth import Authenticator, Forbidden, Principal, Unauthenticated
from ..http import Answer, Receive, Scope, Send
from ..store.errors import NotFound
from ..telemetry import event
from .pages import Pages

if TYPE_CHECKING:
    from ..config import VerdictConfig
    from ..store import Store

#: The prefix makes browsers take it only with Secure, for all paths, and from no other host of the domain.
COOKIE = "__Host-verdictd"
#: Longest token that browsers keep as a cookie, bytes.
MAX_COOKIE = 3800
_SESSION_SECONDS = 8 * 3600
_BODY = 8192
_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "vary": "cookie",
}
_FILES = {"/style.css": "text/css; charset=utf-8", "/icon.svg": "image/svg+xml"}


class Site:
    """ASGI 3."""

    def __init__(self, store: Store, config: VerdictConfig) -> None:
        self._store = store
        self._limits = config.limits
        self._authenticator = Authenticator(config, store)
        self._pages = Pages(store)
        self._files = {name: (files(__package__) / name[1:]).read_bytes() for name in _FILES}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        answer = await self._answer(scope, receive)
        await Answer(answer.status, answer.body, answer.content_type, {**_HEADERS, **answer.headers}).send(send)

    async def _answer(self, scope: Scope, receive: Receive) -> Answer:
        path, method = scope["path"], scope["method"]
        if method in ("GET", "HEAD"):
            if path in _FILES:
                return Answer(200, self._files[path], _FILES[path], {"cache-control": "max-age=3600"})
            return await asyncio.to_thread(self._page, scope)
        if method == "POST" and path in ("/sign-in", "/sign-out"):
            if not _from_here(scope):
                return self._problem(403, "This form was sent from another site.", None)
            if path == "/sign-out":
                return _redirect("/sign-in", _cookie("", 0))
            try:
                raw = await http.body(scope, receive, _BODY, self._limits.request_time)
            except (http.TooLarge, http.TooSlow):
                return self._sign_in(413, "The token is too long, or came too slowly.")
            return await asyncio.to_thread(self._begin, scope, raw)
        answer = self._problem(405, "This page is only for reading.", None)
        return Answer(405, answer.body, answer.content_type, {"allow": "GET, HEAD"})

    # --- in threads

    def _page(self, scope: Scope) -> Answer:
        path = scope["path"]
        principal: Principal | None = None
        try:
            principal = self._authenticator.authenticate(http.cookie(scope, COOKIE), scope.get("client_certificate"))
        except Unauthenticated:
            if path == "/sign-in":
                return self._sign_in(200)
            return _redirect("/sign-in", _cookie("", 0))
        except InclavareError as error:
            return self._sign_in(403, error.message)
        if path == "/sign-in":
            return _redirect("/")
        try:
            return _html(200, self._pages.page(principal, path, http.query(scope)))
        except Forbidden as error:
            metrics.REFUSED.labels("forbidden").inc()
            return self._problem(403, error.message, principal)
        except NotFound:
            return self._problem(404, "There is nothing here.", principal)
        except ValueError:
            return self._problem(400, "This address is malformed.", principal)
        except InclavareError as error:
            event("verdict.web.failed", level=logging.ERROR, reason=error.id)
            return self._problem(503, f"{error.message} [{error.id}]", principal)

    def _begin(self, scope: Scope, raw: bytes) -> Answer:
        """Sign in: the token becomes the cookie, so that revoking it ends the session."""
        try:
            fields = parse_qs(raw.decode("ascii"), max_num_fields=4)
            token = "".join(fields.get("token", [""])[0].split())
        except ValueError:
            token = ""
        if not token or not token.isascii() or len(token) > MAX_COOKIE or set(token) & set(';,"\\'):
            return self._sign_in(401, "This is not a token.")
        try:
            principal = self._authenticator.authenticate(token, None)
        except InclavareError as error:
            metrics.REFUSED.labels("unauthenticated").inc()
            event("verdict.web.sign_in_refused", level=logging.WARNING, reason=error.id)
            return self._sign_in(401, f"{error.message}: {error.found}" if error.found else error.message)
        peer = str((scope.get("client") or ("unknown",))[0])
        self._store.audit.append(principal.home, principal.actor, "web.sign_in", "allowed", {"peer": peer})
        return _redirect("/", _cookie(token, _SESSION_SECONDS))

    def _sign_in(self, status: int, problem: str = "") -> Answer:
        return _html(status, self._pages.render("sign_in.html", None, problem=problem))

    def _problem(self, status: int, problem: str, principal: Principal | None) -> Answer:
        return _html(status, self._pages.render("problem.html", principal, problem=problem))


def _from_here(scope: Scope) -> bool:
    """Whether a form was sent by our own page: SameSite does not keep others from signing somebody in."""
    site = http.header(scope, b"sec-fetch-site")
    if site is not None:
        return site in ("same-origin", "none")
    origin = http.header(scope, b"origin")
    return origin is None or urlsplit(origin).netloc == http.header(scope, b"host")


def _cookie(value: str, seconds: int) -> dict[str, str]:
    return {
        "set-cookie": f"{COOKIE}={value}; Path=/; Max-Age={seconds}; Secure; HttpOnly; SameSite=Strict",
    }


def _html(status: int, text: str) -> Answer:
    return Answer(status, text.encode(), "text/html; charset=utf-8")


def _redirect(where: str, headers: dict[str, str] | None = None) -> Answer:
    return Answer(303, b"", "text/plain", {"location": where, **(headers or {})})
