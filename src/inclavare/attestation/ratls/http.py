"""HTTP over RA-TLS: transports for httpx, and uvicorn under an ASGI application.

Requests go to ``https`` addresses only. The connection pools are httpcore's, the HTTP is theirs; TLS is ours.
"""

from __future__ import annotations

import asyncio
import select
import ssl
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import TYPE_CHECKING, Any, cast

import httpcore
import httpx

from ... import serving
from ...errors import InclavareError, UsageError
from . import sockets, streams
from .contexts import Context

if TYPE_CHECKING:
    from uvicorn import Server

#: What plain RA-TLS servers of HTTP are offered.
HTTP_ALPN = (b"http/1.1",)


class Transport(httpx.BaseTransport):
    """For :class:`httpx.Client`; each response's ``extensions["peer"]`` tells who answered."""

    def __init__(self, context: Context, *, timeout: float = sockets.HANDSHAKE_TIMEOUT) -> None:
        self._pool = httpcore.ConnectionPool(
            ssl_context=_refusing_context(), network_backend=_Backend(context, timeout), retries=0
        )

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """See :class:`httpx.BaseTransport`.

        Raises:
            InclavareError: the server could not be verified.
            UsageError: ``ratls.http.scheme``: not an ``https`` address.
        """
        with _told():
            response = self._pool.handle_request(_request(request, cast("Iterable[bytes]", request.stream)))
        return httpx.Response(
            response.status,
            headers=response.headers,
            stream=_Body(cast("Iterable[bytes]", response.stream)),
            extensions=_extensions(response),
        )

    def close(self) -> None:
        """Close the connections."""
        self._pool.close()


class AsyncTransport(httpx.AsyncBaseTransport):
    """For :class:`httpx.AsyncClient`."""

    def __init__(self, context: Context, *, timeout: float = sockets.HANDSHAKE_TIMEOUT) -> None:
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=_refusing_context(), network_backend=_AsyncBackend(context, timeout), retries=0
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """See :meth:`Transport.handle_request`."""
        with _told():
            response = await self._pool.handle_async_request(_request(request, request.stream))
        return httpx.Response(
            response.status,
            headers=response.headers,
            stream=_AsyncBody(cast("httpx.AsyncByteStream", response.stream)),
            extensions=_extensions(response),
        )

    async def aclose(self) -> None:
        """Close the connections."""
        await self._pool.aclose()


def asgi_server(
    application: Any,
    context: Context,
    *,
    connections: int = 1024,
    shutdown_seconds: int = 10,
    handshake_seconds: float = sockets.HANDSHAKE_TIMEOUT,
    on_refused: streams.OnRefused | None = None,
) -> Server:
    """A uvicorn server behind RA-TLS; run it with ``server.run(sockets=[serving.listen(host, port)])``.

    Applications find the verified client, a :class:`Peer`, in ``scope["peer"]``; ``None`` where clients do not attest.

    Args:
        connections: requests at once; more are answered with 503.
        shutdown_seconds: how long requests under way have at the end.

    Raises:
        PlatformError: ``serving.missing``; or the platform does not quote.
    """
    context.prepare()

    server = serving.server(application, None, connections=connections, shutdown_seconds=shutdown_seconds)
    inner = server.config.http_protocol_class

    def protocol(**arguments: Any) -> asyncio.BaseProtocol:
        def make() -> asyncio.BaseProtocol:
            made: Any = inner(**arguments)
            app = made.app

            async def of_connection(scope: Any, receive: Any, send: Any) -> None:
                await app({**scope, "peer": made.transport.get_extra_info("peer")}, receive, send)

            made.app = of_connection
            return cast("asyncio.BaseProtocol", made)

        # uvicorn tells https by it.
        return streams.Link(
            context, make, timeout=handshake_seconds, on_refused=on_refused, extra={"sslcontext": context}
        )

    server.config.http_protocol_class = protocol  # type: ignore[assignment]
    return server


def _refusing_context() -> ssl.SSLContext:
    """httpcore wants one; it is never used, and trusts nobody."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def _request(request: httpx.Request, content: Any) -> httpcore.Request:
    if request.url.scheme != "https":
        raise UsageError(
            "RA-TLS is for https addresses only",
            id="ratls.http.scheme",
            found=f"{request.url.scheme}://{request.url.host}",
            expected=f"https://{request.url.host}",
        )
    url = httpcore.URL(
        scheme=request.url.raw_scheme, host=request.url.raw_host, port=request.url.port, target=request.url.raw_path
    )
    return httpcore.Request(
        method=request.method,
        url=url,
        headers=request.headers.raw,
        content=content,
        extensions=request.extensions,
    )


def _extensions(response: httpcore.Response) -> dict[str, Any]:
    stream = response.extensions.get("network_stream")
    peer = None if stream is None else stream.get_extra_info("peer")
    return {**response.extensions, "peer": peer}


class _told:
    """httpcore's failures, as httpx's users know them."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        pairs = (
            (httpcore.TimeoutException, httpx.TimeoutException),
            (httpcore.ProtocolError, httpx.RemoteProtocolError),
            (httpcore.NetworkError, httpx.NetworkError),
        )
        for theirs, known in pairs:
            if isinstance(error, theirs):
                raise known(str(error)) from error


class _Body(httpx.SyncByteStream):
    def __init__(self, stream: Iterable[bytes]) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        with _told():
            yield from self._stream

    def close(self) -> None:
        if hasattr(self._stream, "close"):
            self._stream.close()


class _AsyncBody(httpx.AsyncByteStream):
    def __init__(self, stream: httpx.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _told():
            async for part in self._stream:
                yield part

    async def aclose(self) -> None:
        await self._stream.aclose()


class _Backend(httpcore.NetworkBackend):
    def __init__(self, context: Context, timeout: float) -> None:
        self._context, self._timeout = context, timeout

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        attested = sockets.connect(host, port, self._context, timeout=min(timeout or self._timeout, self._timeout))
        return _Stream(attested)


class _Stream(httpcore.NetworkStream):
    """TLS and attestation are done when it is made."""

    def __init__(self, attested: sockets.AttestedSocket) -> None:
        self._attested = attested

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        self._attested.settimeout(timeout)
        with _mapped(httpcore.ReadTimeout, httpcore.ReadError):
            return self._attested.recv(max_bytes)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._attested.settimeout(timeout)
        with _mapped(httpcore.WriteTimeout, httpcore.WriteError):
            self._attested.sendall(buffer)

    def close(self) -> None:
        self._attested.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return self

    def get_extra_info(self, info: str) -> Any:
        if info == "is_readable":
            # The server has closed, or challenges an idle connection: a new one is quicker than to answer.
            return bool(select.select([self._attested.fileno()], [], [], 0)[0])
        return self._attested.peer if info == "peer" else None


class _mapped:
    def __init__(self, timed_out: type[Exception], failed: type[Exception]) -> None:
        self._timed_out, self._failed = timed_out, failed

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, TimeoutError):
            raise self._timed_out(str(error)) from error
        if isinstance(error, OSError | InclavareError):
            raise self._failed(str(error)) from error


class _AsyncBackend(httpcore.AsyncNetworkBackend):
    def __init__(self, context: Context, timeout: float) -> None:
        self._context, self._timeout = context, timeout

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        reader, writer = await streams.open_connection(
            host, port, self._context, timeout=min(timeout or self._timeout, self._timeout)
        )
        return _AsyncStream(reader, writer)


class _AsyncStream(httpcore.AsyncNetworkStream):
    def __init__(self, reader: asyncio.StreamReader, writer: streams.AttestedWriter) -> None:
        self._reader, self._writer = reader, writer

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        with _mapped(httpcore.ReadTimeout, httpcore.ReadError):
            async with asyncio.timeout(timeout):
                return await self._reader.read(max_bytes)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        with _mapped(httpcore.WriteTimeout, httpcore.WriteError):
            self._writer.write(buffer)
            async with asyncio.timeout(timeout):
                await self._writer.drain()

    async def aclose(self) -> None:
        self._writer.close()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        return self

    def get_extra_info(self, info: str) -> Any:
        if info == "is_readable":
            return self._reader.at_eof() or self._writer.transport.is_closing()
        return self._writer.peer if info == "peer" else None
