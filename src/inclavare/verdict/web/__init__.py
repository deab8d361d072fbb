"""The web page: attested workloads and why they were accepted or refused, policies, reference values, secrets, audit.

It only reads, and shows no secret's value. Whoever has a role for a tenant signs in with a token of this service or of
an OpenID provider, or with a TLS client certificate. No script, nothing from elsewhere, nothing to build.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..config import VerdictConfig
    from ..http import Asgi
    from ..store import Store


def router(store: Store, config: VerdictConfig) -> Asgi:
    """The page as an ASGI application that sees whole paths.

    Raises:
        UsageError: ``verdict.config.value``: a certificate's subject is malformed.
        PlatformError: ``serving.missing``: the extra ``verdictd`` is not installed.
    """
    from ...serving import missing

    try:
        from .site import Site
    except ImportError as error:
        raise missing(error) from None
    return Site(store, config)
