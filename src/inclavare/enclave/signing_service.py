"""A signing service: the key stays on one machine, and others have enclaves signed by it over HTTPS.

Its paths and bodies are those of the original signature server (``POST /api/v1/signature/pkcs1`` with the bytes to
sign, answered with ``{"signature": base64, "publicKey": PEM}``), but it speaks TLS 1.3 only, knows its callers, signs
nothing but what a SIGSTRUCT's signature covers and its policy allows, and writes every signature down before it gives
it away.
"""

from __future__ import annotations

import asyncio
import base64
import datetime
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import serving
from ..errors import InclavareError, PolicyError, ResourceError
from ..sgx.sigstruct import SIGNED_SIZE, pkcs1_sign
from ..sgx.structs import Attributes, Sigstruct, StructureError
from .signing_access import RateLimit, SigningPolicy, caller_of, read_tokens

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from uvicorn import Server

PREFIX = "/api/v1/signature"
#: A request's body must be complete after so many seconds, a connection at its end after so many.
BODY_SECONDS = 10
CONNECTION_SECONDS = 30
_SHUTDOWN_SECONDS = 10
_CONNECTIONS = 64


@dataclass(frozen=True)
class Settings:
    """How a service runs.

    Attributes:
        key: RSA-3072 with exponent 3.
        certificate: PEM file of the service's certificate (chain); ``certificate_key`` is its key.
        token_file: callers' tokens; a request must bring one, if it is given.
        client_ca: PEM file of an authority; a connection must bring a certificate of it, if it is given.
        policy: what is signed.
        per_minute: signatures a minute for each caller.
        audit: where the audit lines go: a file (mode 0600), or ``None`` for standard error.
        clock: seconds, monotonic.
    """

    key: RSAPrivateKey = field(repr=False)
    certificate: Path
    certificate_key: Path
    token_file: Path | None
    client_ca: Path | None
    policy: SigningPolicy = field(default_factory=SigningPolicy)
    per_minute: int = 60
    audit: Path | None = None
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        if self.token_file is None and self.client_ca is None:
            raise ValueError("a signing service without authentication")


class Audit:
    """One JSON line for each decision; durable before it returns.

    Args:
        path: a file, made with mode 0600; ``None`` for standard error.
    """

    def __init__(self, path: Path | None) -> None:
        self._fd = 2
        if path is not None:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def write(self, event: str, **fields: object) -> None:
        """Write one line.

        Raises:
            ResourceError: it cannot be written; what it is about must not happen then.
        """
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, "event": event, **fields}, default=str).encode() + b"\n"
        try:
            if os.write(self._fd, line) != len(line):
                raise OSError("written in part")
            if self._fd != 2:
                os.fsync(self._fd)
        except OSError as error:
            raise ResourceError(
                "the audit log cannot be written, so nothing is signed", id="signing.audit.write", found=str(error)
            ) from None


def application(settings: Settings) -> Starlette:
    """The service as an ASGI application; :func:`server` adds TLS and limits."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import ClientDisconnect
    from starlette.responses import JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route

    audit = Audit(settings.audit)
    limit = RateLimit(settings.per_minute, settings.clock)
    public_key = settings.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()

    def refusal(status: int, error: InclavareError, **headers: str) -> Response:
        return JSONResponse({"error": error.to_dict()}, status, headers=headers)

    def authenticated(handler: Callable[[Request, str], Any]) -> Callable[[Request], Any]:
        async def guarded(request: Request) -> Response:
            peer = request.client.host if request.client else ""
            try:
                caller = _caller(settings, request)
            except InclavareError as error:
                audit.write("signing.error", peer=peer, error=error.id)
                return refusal(503, PolicyError("nobody can be authenticated at present", id="signing.caller.error"))
            if caller is None:
                audit.write("signing.unauthenticated", peer=peer, path=request.url.path)
                unknown = PolicyError("the signing service does not know the caller", id="signing.caller.unknown")
                return refusal(401, unknown, **{"WWW-Authenticate": "Bearer"})
            if wait := limit.wait(caller):
                audit.write("signing.limited", peer=peer, caller=caller)
                too_many = ResourceError(
                    "too many requests", id="signing.caller.rate", expected=f"{settings.per_minute} a minute"
                )
                return refusal(429, too_many, **{"Retry-After": str(int(wait) + 1)})
            answer: Response = await handler(request, caller)
            return answer

        return guarded

    async def pkcs1(request: Request, caller: str) -> Response:
        who: dict[str, object] = {"caller": caller, "peer": request.client.host if request.client else ""}
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await _body(request)
        except TimeoutError:
            return refusal(408, ResourceError("the request did not come to its end", id="signing.request.timeout"))
        except ClientDisconnect:
            return Response(status_code=400)
        if body is None:
            error = StructureError("there is more than gendata", id="signing.request.size", expected=SIGNED_SIZE)
            return refusal(413, error)
        try:
            asked = settings.policy.check(body)
        except (StructureError, PolicyError) as error:
            what = {"sha256": sha256(body).hexdigest(), "error": error.id, "found": error.found}
            await run_in_threadpool(audit.write, "signing.refused", **who, **what)
            return refusal(403 if isinstance(error, PolicyError) else 400, error)
        # In this order: a signature that nobody wrote down does not exist.
        await run_in_threadpool(audit.write, "signing.signed", **who, **_described(asked))
        signature = await run_in_threadpool(pkcs1_sign, body, settings.key)
        return JSONResponse({"signature": base64.b64encode(signature).decode(), "publicKey": public_key})

    async def public(request: Request, caller: str) -> Response:
        return PlainTextResponse(public_key)

    async def ping(request: Request) -> Response:
        return PlainTextResponse("ping")

    async def healthz(request: Request) -> Response:
        return PlainTextResponse("ok")

    async def head(request: Request) -> Response:
        return Response()

    async def failed(request: Request, error: Exception) -> Response:
        assert isinstance(error, InclavareError)
        return refusal(503, error)

    return Starlette(
        exception_handlers={InclavareError: failed},
        routes=[
            Route(f"{PREFIX}/pkcs1", authenticated(pkcs1), methods=["POST"]),
            Route(f"{PREFIX}/public-key", authenticated(public), methods=["GET"]),
            Route("/ping", ping, methods=["GET"]),
            Route("/healthz", healthz, methods=["GET"]),
            Route("/", head, methods=["HEAD"]),
        ],
    )


def server(settings: Settings) -> Server:
    """The service with TLS 1.3; run it with ``server(…).run(sockets=[serving.listen(…)])``.

    Raises:
        UsageError: ``serving.tls``: the certificate, its key or the client authority cannot be used.
        PlatformError: ``serving.missing``: the extra ``services`` is not installed.
    """
    tls = serving.tls_context(settings.certificate, settings.certificate_key, client_ca=settings.client_ca)
    try:
        application_ = application(settings)
    except ImportError as error:
        raise serving.missing(error) from None
    return serving.server(
        application_,
        tls,
        connections=_CONNECTIONS,
        shutdown_seconds=_SHUTDOWN_SECONDS,
        connection_seconds=CONNECTION_SECONDS,
        headers=[("connection", "close"), ("cache-control", "no-store")],
    )


def _caller(settings: Settings, request: Request) -> str | None:
    """Who asks: the token's name, or the client certificate's subject where certificates alone are asked for."""
    if settings.token_file is not None:
        return caller_of(read_tokens(settings.token_file), request.headers.get("authorization", ""))
    certificate = request.scope.get("client_certificate") or {}
    parts = [f"{name}={value}" for group in certificate.get("subject", ()) for name, value in group]
    return ",".join(parts) or None


async def _body(request: Request) -> bytes | None:
    """The body, if it is no longer than gendata."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > SIGNED_SIZE:
            return None
    return bytes(body)


def _described(asked: Sigstruct) -> dict[str, object]:
    attributes, mask = Attributes.from_bytes(asked.attributes), Attributes.from_bytes(asked.attribute_mask)
    return {
        "mrenclave": asked.enclave_hash.hex(),
        "attributes": f"{attributes.flags:#x}",
        "attribute_mask": f"{mask.flags:#x}",
        "xfrm": f"{attributes.xfrm:#x}",
        "xfrm_mask": f"{mask.xfrm:#x}",
        "miscselect": f"{asked.miscselect:#x}",
        "misc_mask": f"{asked.misc_mask:#x}",
        "isv_prod_id": asked.isv_prod_id,
        "isv_svn": asked.isv_svn,
        "isv_family_id": asked.isv_family_id.hex(),
        "isv_ext_prod_id": asked.isv_ext_prod_id.hex(),
        "date": f"{asked.date:08x}",
    }
