"""The service as an ASGI application: the key broker, the administrators' API, the web page, health and metrics.

::

    /kbs/v0/…, /t/<tenant>/kbs/v0/…     inclavare.verdict.kbs; without a prefix the tenant is "default"
    /api/…                              inclavare.verdict.admin
    /.well-known/…                      keys of attestation tokens (JWKS), and where they are (OpenID discovery)
    /healthz, /readyz, /metrics
    everything else                     inclavare.verdict.web

The parts see whole paths. Every request has an id, which is in its answer, in every line of the log about it, in the
audit trail and in its trace.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import math
import re
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from . import admin, http, metrics, web
from .decide import Decider
from .http import Answer, Message, Receive, Scope, Send
from .kbs import Kbs
from .limits import Rate, client_key
from .telemetry import event, new_request_id, request_id, span

if TYPE_CHECKING:
    from .config import VerdictConfig
    from .store import Store

_KBS = re.compile(r"(?:/t/([^/]+))?/kbs/v0/(.*)", re.DOTALL)
_READY_SECONDS = 1.0


class Application:
    """See the module.

    Attributes:
        decider: makes the decisions.
        stopping: set when the service ends: it is not ready any more, but answers.
    """

    def __init__(self, config: VerdictConfig, store: Store) -> None:
        self.decider = Decider(config, store)
        self.stopping = False
        self._config = config
        self._store = store
        self._threads = ThreadPoolExecutor(config.attestation.threads, thread_name_prefix="verdict")
        self._kbs = Kbs(config, store, self.decider, self._threads)
        self._clients = Rate()
        self._ready: tuple[float, bool] = (-math.inf, False)
        self._admin = admin.router(store, config)
        self._web = web.router(store, config) if config.web.enabled else None

    def close(self) -> None:
        """Wait for what is under way in threads."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI 3."""
        if scope["type"] != "http":
            return
        id = new_request_id()
        reset = request_id.set(id)
        started = time.perf_counter()
        status, endpoint = 500, "other"

        async def identified(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", id.encode())]
            await send(message)

        try:
            with span("request", method=scope["method"]):
                endpoint = await self._serve(scope, receive, identified)
        except http.Gone:
            status = 499
        except Exception as error:
            # Where, but not with what: an exception's text may quote what must not be in a log.
            frames = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
            event("verdict.fault", level=logging.ERROR, kind=type(error).__name__, frames=frames[-8:])
            if status == 500:
                await _error(500, "InternalError", "the service failed; its log says more").send(identified)
        finally:
            elapsed = time.perf_counter() - started
            metrics.REQUESTS.labels(endpoint, str(status)).inc()
            metrics.LATENCY.labels(endpoint).observe(elapsed)
            milliseconds = round(elapsed * 1000, 1)
            event("http", level=logging.DEBUG, endpoint=endpoint, status=status, milliseconds=milliseconds)
            request_id.reset(reset)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> str:
        """Answer, and say which endpoint it was."""
        raw = scope.get("raw_path") or scope["path"].encode()
        path = str(raw.decode("latin-1")).partition("?")[0]
        own = {"/healthz": self._healthz, "/readyz": self._readyz, "/metrics": self._metrics}.get(path)
        if own is not None:
            answer = await own(scope)
            await answer.send(send)
            return path[1:]
        host = str((scope.get("client") or ("",))[0])
        if wait := self._clients.wait(client_key(host), self._config.limits.client_requests):
            metrics.REFUSED.labels("client").inc()
            headers = {"retry-after": str(math.ceil(wait))}
            await _error(429, "TooManyRequests", "too many requests", headers).send(send)
            return "limited"
        match = _KBS.fullmatch(path)
        if match is not None:
            endpoint, answer = await self._kbs.answer(scope, receive, match[1] or "default", match[2])
            await answer.send(send)
            return endpoint
        if path.startswith("/.well-known/"):
            await (await self._well_known(path)).send(send)
            return "well-known"
        endpoint, part = ("api", self._admin) if path.startswith("/api/") else ("web", self._web)
        if part is None:
            await _error(404, "InvalidRequestPath", "Request path is invalid").send(send)
            return "other"
        await part(scope, receive, send)
        return endpoint

    async def _healthz(self, scope: Scope) -> Answer:
        return Answer(200, b"ok\n", "text/plain")

    async def _readyz(self, scope: Scope) -> Answer:
        since, ready = self._ready
        if time.monotonic() - since > _READY_SECONDS:
            ready = await asyncio.get_running_loop().run_in_executor(self._threads, self._is_ready)
            self._ready = (time.monotonic(), ready)
        good = ready and not self.stopping
        return Answer(200 if good else 503, b"ready\n" if good else b"not ready\n", "text/plain")

    def _is_ready(self) -> bool:
        from ..errors import InclavareError

        try:
            self._store.ping()
        except InclavareError as error:
            event("verdict.not_ready", level=logging.WARNING, reason=error.id)
            return False
        return True

    async def _metrics(self, scope: Scope) -> Answer:
        from .. import serving

        if self._config.telemetry.metrics_token_file:
            from ..enclave.signing_access import read_private

            file = Path(self._config.telemetry.metrics_token_file)
            expected = read_private(file, "verdict.config.secret").strip()
            allowed = bool(expected) and hmac.compare_digest((http.bearer(scope) or "").encode(), expected)
        else:
            allowed = serving.is_loopback(str((scope.get("client") or ("",))[0]))
        if not allowed:
            return _error(401, "TokenNotFound", "metrics are for this machine, or need telemetry.metrics_token_file")
        text = await asyncio.get_running_loop().run_in_executor(self._threads, metrics.exposition)
        return Answer(200, text, metrics.CONTENT_TYPE)

    async def _well_known(self, path: str) -> Answer:
        if path == "/.well-known/jwks.json":
            keys = await asyncio.get_running_loop().run_in_executor(self._threads, self.decider.jwks)
            return Answer(200, json.dumps(keys).encode(), headers={"cache-control": "max-age=60"})
        if path == "/.well-known/openid-configuration":
            base = self._config.base_url
            found = {"issuer": self._config.tokens.issuer, "jwks_uri": f"{base}/.well-known/jwks.json"}
            return Answer(200, json.dumps(found).encode(), headers={"cache-control": "max-age=60"})
        return _error(404, "InvalidRequestPath", "Request path is invalid")


def build(config: VerdictConfig, store: Store) -> Application:
    """The application.

    Raises:
        UsageError: a plugin's configuration is wrong.
        PlatformError: a package is not installed, or the cache of collateral is not private.
    """
    return Application(config, store)


def _error(status: int, name: str, detail: str, headers: dict[str, str] | None = None) -> Answer:
    from .kbs import Refusal

    return Refusal(name, detail, status, **(headers or {})).answer
