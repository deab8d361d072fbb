"""RA-TLS: TLS 1.3 whose ends are proven by evidence instead of by an authority. There is no way around verification.

:mod:`.session` says what is proven, and how. Applications use :mod:`inclavare.sdk.ratls`.
"""

from __future__ import annotations

from ...errors import PlatformError

try:
    from OpenSSL import SSL as _SSL  # noqa: F401
except ImportError as missing:
    raise PlatformError(
        "RA-TLS needs a package that is not installed",
        id="ratls.missing",
        found=str(missing),
        remedy="pip install 'inclavare[ratls]'",
    ) from None

from .certificates import Attester, Identity, PlatformAttester, make, read
from .contexts import CertifiedContext, Context, client_context, server_context
from .session import ALPN, Peer, Session, Verifier
from .sockets import AttestedSocket, Server, connect, serve, wrap

__all__ = [
    "ALPN",
    "AttestedSocket",
    "Attester",
    "CertifiedContext",
    "Context",
    "Identity",
    "Peer",
    "PlatformAttester",
    "Server",
    "Session",
    "Verifier",
    "client_context",
    "connect",
    "make",
    "read",
    "serve",
    "server_context",
    "wrap",
]
