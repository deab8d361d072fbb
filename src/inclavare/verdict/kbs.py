"""Confidential Containers' key broker service, protocol 0.4.0: ``/kbs/v0/{auth,attest,resource/…,<plugin>/…}``.

::

    POST auth      {"version": "0.4.0", "tee", "extra-params"}      → cookie, {"nonce", "extra-params"}
    POST attest    {"runtime-data", "tee-evidence", "init-data"?}   → {"token"}
    GET  resource/<repository>/<type>/<tag>                         → JWE to the TEE's key

What Trustee's code does counts, not its documents. Three things are stricter: a session serves one attestation; a
denial at ``attest`` says every failed claim; and what is not there is denied like what is not allowed. Simulated
platforms call themselves ``sgx-sim`` and ``tdx-sim``: their evidence under another name is refused.

Sources: Trustee ``kbs/src`` and ``kbs-types``, guest-components ``kbs_protocol`` (August 2026).
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import logging
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote

import msgspec

from ..attestation import Evidence
from ..attestation.identity import TEES
from ..attestation.jwe import TeeKey
from ..errors import EvidenceError, InclavareError
from . import http, metrics
from .decide import Decider, Denied, PluginFailed
from .http import Answer, Receive, Scope
from .limits import Gate, Rate
from .plugins import Request as ResourceRequest
from .store import names
from .store.errors import Consumed, Invalid, NotFound, Unavailable
from .telemetry import event, span

if TYPE_CHECKING:
    from .config import VerdictConfig
    from .store import Session, Store

T = TypeVar("T")

VERSION = "0.4.0"
COOKIE = "kbs-session-id"
NONCE_SIZE = 32
HASH = "sha384"
_ERRORS = "https://github.com/confidential-containers/kbs/errors/"
#: Names that the protocol has, and for which there is no verifier here.
_UNSUPPORTED = frozenset(
    (
        *("az-snp-vtpm", "az-tdx-vtpm", "cca", "csv", "hygondcu", "nvidia", "nvidia-dpu", "nvidiadpu", "sample"),
        *("sampledevice", "se", "tpm"),
    )
)
_ADMINISTRATION = frozenset({"attestation-policy", "resource-policy", "reference-value"})
_QUOTA_SECONDS = 5.0


class Refusal(Exception):
    """An error as the protocol has it.

    Args:
        name: of Trustee's error.
        detail: for the client.
        status: 401 for nearly everything.
    """

    def __init__(self, name: str, detail: str, status: int = 401, **headers: str) -> None:
        super().__init__(detail)
        self.answer = Answer(status, _json({"type": _ERRORS + name, "detail": detail}), headers=headers)
        self.name = name


class _AuthRequest(msgspec.Struct):
    version: str
    tee: str
    extra_params: Any = msgspec.field(name="extra-params", default=None)


class _InitData(msgspec.Struct):
    format: str
    body: str


class _RuntimeData(msgspec.Struct):
    nonce: str
    tee_pubkey: dict[str, Any] = msgspec.field(name="tee-pubkey")


class _TeeEvidence(msgspec.Struct):
    primary_evidence: Any
    additional_evidence: str = ""


class _Attestation(msgspec.Struct):
    runtime_data: _RuntimeData = msgspec.field(name="runtime-data")
    tee_evidence: _TeeEvidence = msgspec.field(name="tee-evidence")
    init_data: _InitData | None = msgspec.field(name="init-data", default=None)


class Kbs:
    """The protocol's paths.

    Args:
        threads: does what blocks.
    """

    def __init__(self, config: VerdictConfig, store: Store, decider: Decider, threads: ThreadPoolExecutor) -> None:
        self._config = config
        self._store = store
        self._decider = decider
        self._threads = threads
        self._gate = Gate(config.limits.verifications)
        self._rate = Rate()
        self._quotas: dict[str, tuple[float, int]] = {}
        # Decoders are compiled once.
        self._auth_request = msgspec.json.Decoder(_AuthRequest)
        self._attestation = msgspec.json.Decoder(_Attestation)

    async def answer(self, scope: Scope, receive: Receive, tenant: str, path: str) -> tuple[str, Answer]:
        """Answer a request.

        Args:
            tenant: out of the path's prefix.
            path: what follows ``/kbs/v0/``, percent-encoded.

        Returns:
            which endpoint it was (for metrics), and the answer.
        """
        name, *rest = path.split("/")
        endpoint = name if name in ("auth", "attest") and not rest else "resource" if name == "resource" else "plugin"
        try:
            await self._limit(tenant)
            handler = {"auth": self._auth, "attest": self._attest}.get(endpoint)
            if scope["method"] == "POST" and handler is not None:
                return endpoint, await handler(scope, receive, tenant)
            return endpoint, await self._resource(scope, receive, tenant, name, rest)
        except Refusal as refusal:
            event("kbs.refused", level=logging.DEBUG, endpoint=endpoint, error=refusal.name, tenant=tenant)
            return endpoint, refusal.answer
        except http.TooLarge:
            metrics.REFUSED.labels("body").inc()
            return endpoint, Refusal("PayloadTooLarge", "the request is too large", 413, connection="close").answer
        except http.TooSlow:
            metrics.REFUSED.labels("time").inc()
            return endpoint, Refusal("RequestTimeout", "the request did not come to its end", 408).answer
        except Unavailable as error:
            event("verdict.unavailable", level=logging.ERROR, reason=error.id, found=error.found)
            busy = Refusal("Unavailable", "the service cannot decide at present", 503, **{"retry-after": "5"})
            return endpoint, busy.answer

    # --- the three steps

    async def _auth(self, scope: Scope, receive: Receive, tenant: str) -> Answer:
        asked = self._decode(self._auth_request, await self._body(scope, receive, self._config.limits.body), "Auth")
        _check_auth(asked)
        nonce = os.urandom(NONCE_SIZE)
        lifetime = self._config.attestation.nonce_life + self._config.tokens.lifetime
        expires = datetime.now(UTC) + timedelta(seconds=lifetime)
        with span("kbs.auth", tee=asked.tee):
            id = await self._blocking(lambda: self._store.sessions.create(tenant, asked.tee, nonce, expires))
        challenge = {"nonce": base64.b64encode(nonce).decode(), "extra-params": ""}
        return Answer(200, _json(challenge), headers={"set-cookie": _cookie(id, expires, tenant)})

    async def _attest(self, scope: Scope, receive: Receive, tenant: str) -> Answer:
        id = http.cookie(scope, COOKIE)
        if id is None:
            raise _attest_refusal("cookie not found")
        # The body first: who sends it slowly must not hold a place.
        raw = await self._body(scope, receive, self._config.limits.evidence)
        if not self._gate.enter():
            metrics.REFUSED.labels("verifications").inc()
            raise Refusal("Unavailable", "too many attestations are under way", 503, **{"retry-after": "1"})
        metrics.UNDER_WAY.inc()
        try:
            attestation = self._decode(self._attestation, raw, "Attest")
            peer = _peer(scope)
            with span("kbs.attest"):
                token, expires = await self._blocking(lambda: self._attested(tenant, id, attestation, peer))
        finally:
            metrics.UNDER_WAY.dec()
            self._gate.leave()
        return Answer(200, _json({"token": token}), headers={"set-cookie": _cookie(id, expires, tenant)})

    def _attested(self, tenant: str, id: str, attestation: _Attestation, peer: str) -> tuple[str, datetime]:
        """In a thread: everything from the nonce to the token."""
        key = _guarded(lambda: TeeKey.parse(attestation.runtime_data.tee_pubkey))
        try:
            session = self._store.sessions.take(tenant, id)
        except NotFound:
            raise _attest_refusal("session not found") from None
        except Consumed as error:
            raise _attest_refusal(f"{error.message}: {error.remedy}") from None
        _check_session(session, attestation, self._config.attestation.nonce_life)
        evidence = _guarded(lambda: _evidence(session, attestation))
        try:
            token = self._decider.attest(tenant, id, session.nonce, evidence, key, peer=peer)
        except Denied as error:
            raise _attest_refusal(error.message) from None
        return token, session.expires

    async def _resource(self, scope: Scope, receive: Receive, tenant: str, name: str, rest: list[str]) -> Answer:
        method = scope["method"]
        if method not in ("GET", "POST", "PUT", "DELETE"):
            raise Refusal("InvalidRequestPath", f"the method {method} is not served", 405, allow="GET, POST")
        plugin = self._decider.plugin(tenant, name)
        if name in _ADMINISTRATION or (plugin is not None and method not in plugin.methods):
            endpoint = f"admin access denied for endpoint {name}: administer verdictd by its API, /api/v1"
            raise Refusal("AdminAuthAccess", endpoint)
        if plugin is None:
            raise Refusal("PluginNotFound", f"Plugin {name} not found", 404)
        try:
            path = tuple(unquote(part, errors="strict") for part in rest)
            query = http.query(scope)
        except (UnicodeDecodeError, ValueError):
            path, query = ("\0",), {}
        if any("/" in part or not part.isprintable() for part in path):
            raise Refusal("InvalidRequestPath", f"Request path {name}/… is invalid", 404)
        body = await self._body(scope, receive, self._config.limits.body) if method == "POST" else b""
        request = ResourceRequest(name, path, query, method, body)
        session, token, peer = http.cookie(scope, COOKIE), http.bearer(scope), _peer(scope)
        with span("kbs.resource", plugin=name):
            jwe = await self._blocking(lambda: self._released(tenant, session, token, request, peer))
        return Answer(200, jwe)

    def _released(self, tenant: str, id: str | None, token: str | None, request: ResourceRequest, peer: str) -> bytes:
        """In a thread: everything from the token to the encrypted answer."""
        try:
            if id is not None:
                # As Trustee does it: a cookie without a token counts as no cookie.
                token = self._store.sessions.get(tenant, id).token or token
        except NotFound:
            pass
        if token is None:
            raise Refusal("TokenNotFound", "Attestation Token not found")
        try:
            grant = self._decider.grant(tenant, token)
        except EvidenceError as error:
            event("kbs.token.refused", reason=error.id, found=error.found, tenant=tenant, peer=peer)
            raise Refusal("TokenVerifierError", f"Token Verifier error: {error.message}") from None
        try:
            return self._decider.release(tenant, grant, request, peer=peer)
        except Denied:
            raise Refusal("PolicyDeny", Denied.UNIFORM) from None
        except PluginFailed as error:
            event("kbs.plugin.failed", level=logging.ERROR, reason=error.id, found=error.found, plugin=request.plugin)
            raise Refusal("PluginInternalError", error.message) from None

    # --- inside

    async def _limit(self, tenant: str) -> None:
        """See that there is such a tenant, and that it has requests left."""
        now = asyncio.get_running_loop().time()
        since, quota = self._quotas.get(tenant, (-math.inf, 0))
        if now - since > _QUOTA_SECONDS:
            try:
                names.tenant(tenant)
                found = await self._blocking(lambda: self._store.tenants.get(tenant))
            except (Invalid, NotFound):
                raise Refusal("InvalidRequestPath", f"Request path /t/{tenant[:63]} is invalid", 404) from None
            quota = found.quotas.requests
            self._quotas[tenant] = (now, quota)
        if wait := self._rate.wait(tenant, quota):
            metrics.REFUSED.labels("tenant").inc()
            retry = {"retry-after": str(math.ceil(wait))}
            raise Refusal("TooManyRequests", "the tenant's quota of requests is used up", 429, **retry)

    async def _body(self, scope: Scope, receive: Receive, limit: int) -> bytes:
        return await http.body(scope, receive, limit, self._config.limits.request_time)

    def _decode(self, decoder: msgspec.json.Decoder[T], raw: bytes, step: str) -> T:
        try:
            return decoder.decode(raw)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            what = {"Auth": "Request", "Attest": "Attestation"}[step]
            raise Refusal(
                "AttestationError", f"Attestation error: RCAR handshake {step} failed: deserialize {what}: {error}"
            ) from None

    async def _blocking(self, work: Callable[[], T]) -> T:
        from contextvars import copy_context

        context = copy_context()
        return await asyncio.get_running_loop().run_in_executor(self._threads, context.run, work)


def _check_auth(asked: _AuthRequest) -> None:
    def refuse(why: str) -> None:
        raise Refusal("AttestationError", f"Attestation error: RCAR handshake Auth failed: {why}")

    if asked.version != VERSION:
        refuse(f"KBS Client Protocol Version Mismatch: expect ={VERSION} while the request is {asked.version[:32]}")
    if asked.tee in _UNSUPPORTED:
        refuse(f"there is no verifier for {asked.tee} here; there is one for {', '.join(TEES)}")
    if asked.tee not in TEES:
        refuse(f"unknown TEE {asked.tee[:32]!r}; known are {', '.join(TEES)}")
    parameters = asked.extra_params
    supported = parameters.get("supported-hash-algorithms") if isinstance(parameters, dict) else None
    if supported is not None and not (
        isinstance(supported, list) and HASH in {item.lower() for item in supported if isinstance(item, str)}
    ):
        refuse(f"the client does not support {HASH}")


def _check_session(session: Session, attestation: _Attestation, nonce_life: int) -> None:
    if datetime.now(UTC) > session.created + timedelta(seconds=nonce_life):
        raise _attest_refusal(f"the nonce has expired: it is good for {nonce_life} seconds")
    expected = base64.b64encode(session.nonce)
    if not hmac.compare_digest(attestation.runtime_data.nonce.encode("utf-8", "replace"), expected):
        raise _attest_refusal("the nonce is not this session's")


def _evidence(session: Session, attestation: _Attestation) -> Evidence:
    additional = attestation.tee_evidence.additional_evidence
    if additional.strip() not in ("", "{}"):
        raise EvidenceError(
            "there is no verifier for evidence of devices",
            id="kbs.additional_evidence",
            found=f"{len(additional)} characters of additional evidence",
            expected="none",
        )
    init_data = attestation.init_data
    if init_data is not None and init_data.format != "toml":
        raise EvidenceError(
            "the init-data is of another format", id="kbs.init_data.format", found=init_data.format, expected="toml"
        )
    evidence = Evidence.from_kbs(
        session.tee,
        attestation.tee_evidence.primary_evidence,
        {
            "nonce": attestation.runtime_data.nonce,
            "tee-pubkey": attestation.runtime_data.tee_pubkey,
            "additional-evidence": additional,
        },
        None if init_data is None else init_data.body,
    )
    if evidence.tee != session.tee:
        raise EvidenceError(
            "the evidence is of another TEE than the session was begun for",
            id="evidence.quote.tee",
            found=evidence.tee,
            expected=session.tee,
            remedy=f"begin the session with the tee {evidence.tee}",
        )
    return evidence


def _guarded(make: Callable[[], T]) -> T:
    try:
        return make()
    except InclavareError as error:
        raise _attest_refusal(error.one_line()) from None


def _attest_refusal(why: str) -> Refusal:
    return Refusal("AttestationError", f"Attestation error: RCAR handshake Attest failed: {why}")


def _cookie(id: str, expires: datetime, tenant: str) -> str:
    path = "/kbs/v0" if tenant == "default" else f"/t/{tenant}/kbs/v0"
    when = format_datetime(expires, usegmt=True)
    return f"{COOKIE}={id}; Path={path}; Expires={when}; HttpOnly; Secure; SameSite=Strict"


def _peer(scope: Scope) -> str:
    return str((scope.get("client") or ("unknown",))[0])


def _json(value: Any) -> bytes:
    # As serde_json writes it: without spaces, not escaped.
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")
