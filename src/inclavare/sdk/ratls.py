"""Attested TLS, as easy as :mod:`ssl`: ``connect`` to enclaves that a policy accepts, ``serve`` from inside of one.

::

    from inclavare.sdk import ratls

    with ratls.connect("db.example", 8443, policy="policy.toml") as sock:     # the peer is an accepted enclave
        sock.sendall(b"hello")

    ratls.serve(("0.0.0.0", 8443), handler).serve_forever()                   # inside an enclave container
    ratls.serve(("0.0.0.0", 8443), handler, policy="clients.toml")            # clients have to be enclaves, too

    httpx.Client(transport=ratls.httpx_transport(policy="policy.toml")).get("https://db.example:8443/")
    ratls.asgi_server(app).run(sockets=[...])

A peer is verified before anything is returned; there is no way to have a connection without. TLS is 1.3.
:mod:`inclavare.attestation.ratls.session` says what is proven.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..attestation import Policy
from ..attestation.ratls import AttestedSocket, Attester, Context, Peer, Server, client_context, server_context
from ..attestation.ratls import sockets as _sockets
from . import attest

if TYPE_CHECKING:
    import asyncio

    from uvicorn import Server as UvicornServer

    from ..attestation.ratls import http as _http
    from ..attestation.ratls import streams as _streams

__all__ = [
    "AttestedSocket",
    "Attester",
    "Context",
    "EnclaveAttester",
    "Peer",
    "Server",
    "asgi_server",
    "async_httpx_transport",
    "client_context",
    "connect",
    "httpx_transport",
    "open_connection",
    "serve",
    "server_context",
    "start_server",
]

_lock = threading.Lock()


class EnclaveAttester:
    """Quotes of the enclave that this process runs in, through ``/dev/attestation``.

    Args:
        collateral: file with collateral in dcap-qvl's layout, for verifiers that have no source of their own; by
            default the platform's, from ``/dev/attestation/collateral``.
    """

    def __init__(self, collateral: Path | None = None) -> None:
        self._collateral = collateral

    def quote(self, report_data: bytes) -> bytes:
        """See :class:`~inclavare.attestation.ratls.Attester`.

        Raises:
            PlatformError: ``sdk.attest.outside``: this process does not run in an enclave.
        """
        # What is written into user_report_data is the process's, not the thread's.
        with _lock:
            return attest.quote(report_data)

    def collateral(self) -> dict[str, Any] | None:
        """See :class:`~inclavare.attestation.ratls.Attester`."""
        if self._collateral is None:
            return attest.collateral()
        from ..attestation.collateral import FileSource

        return FileSource(self._collateral).fetch(b"").parts


def _client(
    policy: Policy | Path | str | None, context: Context | None, attester: Attester | None, **more: Any
) -> Context:
    if context is not None:
        return context
    if policy is None:
        raise TypeError("policy or context: a peer that nobody describes cannot be verified")
    return client_context(_policy(policy), attester=attester, **more)


def _server(
    policy: Policy | Path | str | None, context: Context | None, attester: Attester | None, **more: Any
) -> Context:
    if context is not None:
        return context
    return server_context(attester or EnclaveAttester(), policy=None if policy is None else _policy(policy), **more)


def _policy(policy: Policy | Path | str) -> Policy:
    return policy if isinstance(policy, Policy) else Policy.load(Path(policy))


def connect(
    host: str,
    port: int,
    *,
    policy: Policy | Path | str | None = None,
    context: Context | None = None,
    attester: Attester | None = None,
    timeout: float = _sockets.HANDSHAKE_TIMEOUT,
    **more: Any,
) -> AttestedSocket:
    """Connect to an enclave that the policy accepts.

    Args:
        policy: or a TOML file with one (see :mod:`inclavare.attestation.policy`).
        context: instead of ``policy``, for many connections.
        attester: shows this side's evidence to servers that ask for it; :class:`EnclaveAttester` in an enclave.
        timeout: seconds for TCP, TLS and evidence.
        more: see :func:`client_context`.

    Raises:
        EvidenceError, AppraisalError: the peer is not who it should be; the message says why.
        PlatformError: it cannot be reached, or does not speak TLS 1.3.
    """
    return _sockets.connect(host, port, _client(policy, context, attester, **more), timeout=timeout)


def serve(
    address: tuple[str, int],
    handler: Callable[[AttestedSocket], None],
    *,
    policy: Policy | Path | str | None = None,
    context: Context | None = None,
    attester: Attester | None = None,
    connections: int = 256,
    timeout: float = _sockets.HANDSHAKE_TIMEOUT,
    on_refused: Callable[[Any, Exception], None] | None = None,
    **more: Any,
) -> Server:
    """A server in an enclave; each connection's handler runs in a thread, once the connection is attested.

    Args:
        policy: clients have to be enclaves that it accepts, too.
        context: instead of the other arguments about attestation.
        attester: by default the enclave that this process runs in.
        connections: at once; more wait.
        more: see :func:`server_context`.

    Raises:
        PlatformError: ``sdk.attest.outside``: this process does not run in an enclave.
        UsageError: the address cannot be used.
    """
    made = _server(policy, context, attester, **more)
    return _sockets.serve(address, handler, made, connections=connections, timeout=timeout, on_refused=on_refused)


async def open_connection(
    host: str,
    port: int,
    *,
    policy: Policy | Path | str | None = None,
    context: Context | None = None,
    attester: Attester | None = None,
    timeout: float = _sockets.HANDSHAKE_TIMEOUT,
    **more: Any,
) -> tuple[asyncio.StreamReader, _streams.AttestedWriter]:
    """As :func:`connect`, for asyncio."""
    from ..attestation.ratls import streams

    return await streams.open_connection(host, port, _client(policy, context, attester, **more), timeout=timeout)


async def start_server(
    handler: _streams.Handler,
    host: str,
    port: int,
    *,
    policy: Policy | Path | str | None = None,
    context: Context | None = None,
    attester: Attester | None = None,
    timeout: float = _sockets.HANDSHAKE_TIMEOUT,
    on_refused: _streams.OnRefused | None = None,
    **more: Any,
) -> asyncio.Server:
    """As :func:`serve`, for asyncio."""
    from ..attestation.ratls import streams

    made = _server(policy, context, attester, **more)
    made.prepare()
    return await streams.start_server(handler, host, port, made, timeout=timeout, on_refused=on_refused)


def httpx_transport(
    *,
    policy: Policy | Path | str | None = None,
    context: Context | None = None,
    attester: Attester | None = None,
    **more: Any,
) -> _http.Transport:
    """For ``httpx.Client(transport=…)``: every connection is to an enclave that the policy accepts."""
    from ..attestation.ratls import http

    return http.Transport(_client(policy, context, attester, alpn=http.HTTP_ALPN, **more))


def async_httpx_transport(
    *,
    policy: Policy | Path | str | None = None,
    context: Context | None = None,
    attester: Attester | None = None,
    **more: Any,
) -> _http.AsyncTransport:
    """For ``httpx.AsyncClient(transport=…)``."""
    from ..attestation.ratls import http

    return http.AsyncTransport(_client(policy, context, attester, alpn=http.HTTP_ALPN, **more))


def asgi_server(
    application: Any,
    *,
    policy: Policy | Path | str | None = None,
    context: Context | None = None,
    attester: Attester | None = None,
    connections: int = 1024,
    **more: Any,
) -> UvicornServer:
    """A uvicorn server for an ASGI application; run it with ``.run(sockets=[serving.listen(host, port)])``.

    Verified clients are in ``scope["peer"]``.
    """
    from ..attestation.ratls import http

    return http.asgi_server(application, _server(policy, context, attester, **more), connections=connections)
