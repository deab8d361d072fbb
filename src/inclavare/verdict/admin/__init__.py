"""The administrators' API, ``/api/v1``: tenants, secrets, policies, reference values, tokens, evidence, audit.

``/api/v1/openapi.json`` describes it. Secrets go in and never come out. Every refusal is a problem document (RFC 9457)
with the error's id, what was found and expected, and a remedy; every change and every refused call is in the audit
trail.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..config import VerdictConfig
    from ..http import Asgi
    from ..store import Store

PREFIX = "/api/v1"


def router(store: Store, config: VerdictConfig) -> Asgi:
    """The API as an ASGI application that sees whole paths.

    Raises:
        UsageError: ``verdict.config.value``: a certificate's subject is malformed.
        PlatformError: ``serving.missing``: the extra ``services`` is not installed.
    """
    from ...serving import missing

    try:
        from .front import Front
    except ImportError as error:
        raise missing(error) from None
    return Front(store, config)
