"""What every request meets first: authentication, limits, and refusals in one form."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool

from ...errors import InclavareError
from .. import http
from ..auth import Authenticator, Forbidden, Principal, Unauthenticated
from ..http import Message, Receive, Scope, Send
from ..limits import Rate, client_key
from ..store import SYSTEM, NotFound
from ..store.names import MAX_BUNDLE, MAX_POLICY, MAX_SECRET
from ..telemetry import request_id
from .problems import Failed, problem

if TYPE_CHECKING:
    from ..config import VerdictConfig
    from ..store import Store

#: A request's principal and its whole body, in its scope.
PRINCIPAL, BODY = "verdict.principal", "verdict.body"
#: Bodies that may be larger than ``limits.body``: what the store takes, as base64 or as a JSON string.
_LARGE = (
    (re.compile(r".*/secrets/.*", re.DOTALL), 2 * MAX_SECRET),
    (re.compile(r".*/policies(/.*)?", re.DOTALL), 3 * MAX_POLICY),
    (re.compile(r".*/references", re.DOTALL), MAX_BUNDLE),
)
#: Calls of nobody that one client has in the audit trail a minute; how many more there were stands in the next one.
_STRANGERS = 30


class Front:
    """ASGI 3 around the routes."""

    def __init__(self, store: Store, config: VerdictConfig) -> None:
        from .routes import application

        self._store = store
        self._limits = config.limits
        self._authenticator = Authenticator(config, store)
        self.routes = application(store, config, self.refused)
        self._strangers = Rate()
        self._suppressed: dict[str, int] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        try:
            principal = await run_in_threadpool(self._authenticate, scope)
            body = await http.body(scope, receive, self._limit(scope), self._limits.request_time)
        except InclavareError as error:
            await problem(error).send(send)
            return
        except http.TooLarge:
            limit = f"at most {self._limit(scope)} bytes"
            large = Failed(413, "the body is too large", id="verdict.api.size", expected=limit)
            await problem(large, {"connection": "close"}).send(send)
            return
        except http.TooSlow:
            slow = Failed(408, "the request did not come to its end", id="verdict.api.timeout")
            await problem(slow, {"connection": "close"}).send(send)
            return
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def private(message: Message) -> None:
            if message["type"] == "http.response.start":
                names = {name.lower() for name, _ in message["headers"]}
                if b"cache-control" not in names:
                    message["headers"] = [*message["headers"], (b"cache-control", b"no-store")]
            await send(message)

        await self.routes({**scope, PRINCIPAL: principal, BODY: body}, replay, private)

    def _limit(self, scope: Scope) -> int:
        path = scope["path"]
        return next((limit for pattern, limit in _LARGE if pattern.fullmatch(path)), int(self._limits.body))

    def _authenticate(self, scope: Scope) -> Principal:
        token = http.bearer(scope)
        if token is None and any(name == b"authorization" for name, _ in scope["headers"]):
            token = ""  # something else than one bearer token: not a reason to look at the certificate
        try:
            return self._authenticator.authenticate(token, scope.get("client_certificate"))
        except (Unauthenticated, Forbidden) as error:
            self._stranger(scope, error)
            raise

    def _stranger(self, scope: Scope, error: InclavareError) -> None:
        """Write a call of nobody down, as often as one client may make the trail longer."""
        peer = client_key(_peer(scope))
        if self._strangers.wait(peer, _STRANGERS):
            if len(self._suppressed) < 10_000 or peer in self._suppressed:
                self._suppressed[peer] = self._suppressed.get(peer, 0) + 1
            return
        actor = str(error.found) if isinstance(error, Forbidden) else "nobody"
        more = self._suppressed.pop(peer, 0)
        self._write(SYSTEM, actor, scope, error, {"not_written_before": more} if more else {})

    def refused(self, scope: Any, error: Forbidden) -> None:
        """Write down that somebody asked for what they may not."""
        principal: Principal = scope[PRINCIPAL]
        try:
            self._write(principal.home, principal.actor, scope, error, {})
        except NotFound:  # verdictd.toml may name a tenant that there is not
            self._write(SYSTEM, principal.actor, scope, error, {})

    def _write(self, tenant: str, actor: str, scope: Scope, error: InclavareError, more: dict[str, Any]) -> None:
        path = "".join(char if char.isprintable() else "?" for char in scope["path"][:512])
        detail = {
            "request": request_id.get(),
            "peer": _peer(scope),
            "method": scope["method"],
            "path": path,
            "reasons": [{"id": error.id, "found": str(error.found), "expected": str(error.expected)}],
        }
        self._store.audit.append(tenant, actor, "api.refused", "denied", {**detail, **more})


def _peer(scope: Scope) -> str:
    return str((scope.get("client") or ("",))[0])
