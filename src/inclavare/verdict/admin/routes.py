"""All routes, and the document that describes them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from ... import __version__
from ...errors import InclavareError
from ..auth import Forbidden
from ..http import Answer
from . import PREFIX, audit, models, policies, references, secrets, tenants, tokens
from .problems import MEDIA_TYPE, of_http, of_request, problem

if TYPE_CHECKING:
    from ..config import VerdictConfig
    from ..store import Store

_DESCRIPTION = """\
Everything here needs authentication: a token of this service (`Authorization: Bearer …`), one of a configured OpenID \
provider, or a TLS client certificate. Roles are for one tenant or for all of them: `auditor` reads metadata and the \
audit trail, `operator` also changes policies, reference values and secrets, `admin` also tokens and, for all tenants, \
tenants. A tenant that you have no role for and one that does not exist are refused alike. Refusals are problem \
documents; secrets' values are in no answer."""
_REFUSALS = {
    401: "It is not known who asks.",
    403: "You may not.",
    404: "There is no such thing for this tenant.",
    408: "The request did not come to its end in time.",
    409: "It exists already, is in use, was used already, or a quota is used up.",
    412: "It was changed meanwhile.",
    413: "The body is too large.",
    415: "Another kind of body is needed.",
    422: "The request is not as it should be.",
    429: "Too many requests.",
    503: "Something that is needed cannot be reached now.",
}


def application(store: Store, config: VerdictConfig, refused: Callable[[Any, Forbidden], None]) -> FastAPI:
    """The routes; a request's principal and body are in its scope.

    Args:
        refused: writes a refusal down.
    """
    app = FastAPI(title="verdictd", version="1", openapi_url=None, docs_url=None, redoc_url=None,
                  redirect_slashes=False)  # fmt: skip
    for router in (
        tenants.routes(store, config),
        secrets.routes(store),
        policies.routes(store),
        references.routes(store),
        tokens.routes(store, config),
        audit.routes(store),
    ):
        app.include_router(router, prefix=PREFIX)

    @app.get(f"{PREFIX}/openapi.json", include_in_schema=False)
    async def document() -> dict[str, Any]:
        return app.openapi()

    @app.exception_handler(InclavareError)
    async def refuse(request: Request, error: InclavareError) -> Response:
        if isinstance(error, Forbidden):
            await run_in_threadpool(refused, request.scope, error)
        return _response(problem(error))

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        return _response(problem(of_request(error.errors())))

    @app.exception_handler(HTTPException)
    async def of_framework(request: Request, error: HTTPException) -> Response:
        if error.status_code == 400:  # FastAPI's, for a body that is not even text
            return _response(problem(of_request([{"loc": ("body",), "msg": "not JSON"}])))
        headers = {} if error.status_code != 405 else {"allow": ", ".join(_methods(app, request.url.path))}
        return _response(of_http(error.status_code, headers))

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> Response:
        # It is raised again behind this, and logged without its text.
        return _response(of_http(500))

    app.openapi = lambda: _describe(app, config)  # type: ignore[method-assign]
    return app


def _methods(app: FastAPI, path: str) -> list[str]:
    """What a path is served for: the framework names those of its first route only (RFC 9110, section 10.2.1)."""
    return sorted(
        {
            method.upper()
            for template, operations in app.openapi()["paths"].items()
            if re.fullmatch(re.sub(r"\\{[^}]*\\}", "[^/]+", re.escape(template)), path)
            for method in operations
        }
    )


def _response(answer: Answer) -> Response:
    return Response(answer.body, answer.status, dict(answer.headers), answer.content_type)


def _describe(app: FastAPI, config: VerdictConfig) -> dict[str, Any]:
    if app.openapi_schema is not None:
        return app.openapi_schema
    found = get_openapi(title="verdictd: administration", version=f"1 (verdictd {__version__})",
                        description=_DESCRIPTION, routes=app.routes)  # fmt: skip
    parts = found["components"]
    for name in ("HTTPValidationError", "ValidationError"):
        parts["schemas"].pop(name, None)
    reference = "#/components/schemas/{model}"
    for model in (models.Problem, models.SecretPut):
        parts["schemas"][model.__name__] = model.model_json_schema(ref_template=reference)
    for name, schema in parts["schemas"].items():
        if name.startswith("Page_"):
            schema["description"] = models.Page.__doc__  # pydantic does not hand it on to what is made of a generic
    parts["responses"] = {
        str(status): {
            "description": text,
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
        for status, text in _REFUSALS.items()
    }
    for path in found["paths"].values():
        for operation in path.values():
            own = operation["responses"]
            own |= {str(status): {"$ref": f"#/components/responses/{status}"} for status in _REFUSALS}
    parts["securitySchemes"] = {
        "token": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT",
                  "description": "A token of this service, or of a configured OpenID provider."},
        "certificate": {"type": "mutualTLS", "description": "A certificate that verdictd.toml names."},
    }  # fmt: skip
    for number, issuer in enumerate(dict.fromkeys(rule.issuer for rule in config.auth.oidc)):
        url = issuer.rstrip("/") + "/.well-known/openid-configuration"
        parts["securitySchemes"][f"oidc{number}"] = {"type": "openIdConnect", "openIdConnectUrl": url}
    found["security"] = [{name: []} for name in parts["securitySchemes"]]
    app.openapi_schema = found
    return found
