"""Gramine's secret provisioning, the server's side: applications with ``libsecret_prov_attest`` get their secret here.

The client shows an RA-TLS certificate, the server an ordinary one that the client's CA file vouches for. Inside TLS::

    client  "SECRET_PROVISION_RA_TLS_REQUEST_V1\\0"
    server  "SECRET_PROVISION_RA_TLS_RESPONSE_V1:\\0", length of the secret (4 bytes, big-endian), the secret

Whoever is refused gets no answer: the connection ends, which Gramine's client reports as a reset. Its certificate
carries no nonce, so nothing in the protocol says how old the evidence is: TLS proves that the client has the key that
the quote vouches for, as with every RA-TLS peer without a challenge.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import serving
from ..attestation import Evidence
from ..attestation.ratls import CertifiedContext, certificates
from ..attestation.ratls.sockets import timed_out
from ..attestation.ratls.streams import AttestedTransport, Link
from ..errors import InclavareError, ResourceError, UsageError

REQUEST = b"SECRET_PROVISION_RA_TLS_REQUEST_V1\0"
RESPONSE = b"SECRET_PROVISION_RA_TLS_RESPONSE_V1:\0"
#: The client refuses more than a C int can hold; nobody needs as much.
MAX_SECRET = 1 << 20

#: Told of each event: its id and fields.
Tell = Callable[..., None]


@dataclass(frozen=True, slots=True)
class SecretProvConfig:
    """Where and how to serve.

    Attributes:
        certificate: PEM file: chain that the clients' SECRET_PROVISION_CA_CHAIN_PATH vouches for, for the name by which
            they call this server.
        key: PEM file.
        host: to listen on.
        port: 0 for any; Gramine's default is 4433.
        tls12: also take TLS 1.2, for Gramine before 1.8, whose mbedTLS speaks no 1.3.
        connections: at once; more are closed.
        seconds: for a connection's whole life.
    """

    certificate: Path
    key: Path
    host: str = "127.0.0.1"
    port: int = 4433
    tls12: bool = False
    connections: int = 256
    seconds: float = 30.0


@dataclass(frozen=True, slots=True)
class _Shown:
    """Evidence for the key that TLS has proven; not verified yet."""

    evidence: Evidence
    expires: float = math.inf


def _read(certificate: bytes, _: bytes | None) -> _Shown:
    return _Shown(certificates.read(certificate))


class SecretProvServer:
    """See the module.

    Args:
        config: where and how.
        decide: verifies and appraises evidence and returns the secret, 1 byte to 1 MiB; called in a thread, when TLS
            has proven that the client has the evidence's key. Any exception refuses.
        tell: ``secret_prov.released`` and ``secret_prov.refused``, each with the client's address and the evidence's
            SHA-256 as far as they are known.

    Raises:
        UsageError: ``serving.tls``.
    """

    def __init__(
        self, config: SecretProvConfig, decide: Callable[[Evidence], bytes], tell: Tell = lambda *_, **__: None
    ) -> None:
        self._config = config
        self._decide = decide
        self._tell = tell
        self._context = CertifiedContext(config.certificate, config.key, _read, tls12=config.tls12)
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="secret-prov")
        self._connections: set[Link] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> tuple[str, int]:
        """Listen; returns where.

        Raises:
            UsageError: ``serving.listen``.
        """
        listening = serving.listen(self._config.host, self._config.port)
        self._server = await asyncio.get_running_loop().create_server(lambda: _Connection(self), sock=listening)
        host, port, *_ = listening.getsockname()
        return host, port

    async def stop(self) -> None:
        """Take no more connections, and end those under way."""
        if self._server is not None:
            self._server.close()
        for link in list(self._connections):
            link.raw.abort()
        await asyncio.sleep(0)
        self._threads.shutdown(wait=False, cancel_futures=True)

    # --- for connections

    def begin(self, link: Link) -> bool:
        """Whether there is room for another."""
        if len(self._connections) >= self._config.connections:
            return False
        self._connections.add(link)
        return True

    def done(self, link: Link) -> None:
        """It is gone."""
        self._connections.discard(link)

    @property
    def config(self) -> SecretProvConfig:
        """The configuration."""
        return self._config

    @property
    def context(self) -> CertifiedContext:
        """TLS."""
        return self._context

    async def answer(self, evidence: Evidence) -> bytes:
        """The response with the secret.

        Raises:
            InclavareError: the decision was no.
        """
        secret = await asyncio.get_running_loop().run_in_executor(self._threads, self._decide, evidence)
        if not 0 < len(secret) <= MAX_SECRET:
            raise UsageError(
                "the secret cannot be sent",
                id="secret_prov.secret.size",
                found=f"{len(secret)} bytes",
                expected=f"1 to {MAX_SECRET} bytes",
            )
        return RESPONSE + len(secret).to_bytes(4, "big") + secret

    def refused(self, address: Any, error: InclavareError, evidence: Evidence | None = None) -> None:
        """Tell of it."""
        self._tell("secret_prov.refused", address=address, evidence_sha256=_digest(evidence), reason=error.to_dict())

    def released(self, address: Any, evidence: Evidence) -> None:
        """Tell of it."""
        self._tell("secret_prov.released", address=address, evidence_sha256=_digest(evidence))


class _Connection(Link):
    """TCP and TLS; the request's protocol begins when the client's certificate has been read."""

    def __init__(self, server: SecretProvServer) -> None:
        super().__init__(
            server.context, lambda: _Request(server), timeout=server.config.seconds, on_refused=server.refused
        )
        self._server = server
        self._end: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not self._server.begin(self):
            self.closing = self._closed_here = True
            self._server.refused(
                transport.get_extra_info("peername"),
                ResourceError("too many connections", id="secret_prov.full", found=self._server.config.connections),
            )
            transport.close()
            return
        self._end = self._loop.call_later(self._server.config.seconds, self._on_end)
        super().connection_made(transport)

    def _on_end(self) -> None:
        if self.protocol is None:
            self._on_timeout()
        elif not self.closing:
            self._server.refused(self.raw.get_extra_info("peername"), timed_out(self._server.config.seconds))
        self.raw.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._end is not None:
            self._end.cancel()
        self._server.done(self)
        super().connection_lost(exc)


class _Request(asyncio.Protocol):
    def __init__(self, server: SecretProvServer) -> None:
        self._server = server
        self._received = b""
        self._task: asyncio.Task[None] | None = None
        self._transport: AttestedTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, AttestedTransport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        if not REQUEST.startswith(self._received[: len(REQUEST)]):
            self._refuse(UsageError("this is no request for a secret", id="secret_prov.request", expected=REQUEST))
        elif len(self._received) >= len(REQUEST) and self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._answer())

    def connection_lost(self, exc: Exception | None) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _answer(self) -> None:
        evidence: Evidence = self._transport.get_extra_info("result").evidence
        try:
            response = await self._server.answer(evidence)
        except InclavareError as error:
            self._refuse(error, evidence)
        except Exception as fault:
            # Its text may hold what must not be told.
            self._refuse(InclavareError(f"no decision: {type(fault).__name__}", id="secret_prov.fault"), evidence)
        else:
            self._transport.write(response)
            self._server.released(self._transport.get_extra_info("peername"), evidence)
            self._transport.close()

    def _refuse(self, error: InclavareError, evidence: Evidence | None = None) -> None:
        self._server.refused(self._transport.get_extra_info("peername"), error, evidence)
        self._transport.close()


def _digest(evidence: Evidence | None) -> str | None:
    return None if evidence is None else hashlib.sha256(evidence.quote).hexdigest()
