"""What this project's HTTP services share: the listening socket, TLS, a self-made certificate, a hardened server.

Starlette and uvicorn come with the extra ``services``; nothing here imports them before it is called.
"""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import os
import socket
import ssl
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import PlatformError, UsageError

if TYPE_CHECKING:
    from uvicorn import Server

_CERTIFICATE_DAYS = 3650
_BACKLOG = 128
_GOOD_BYE_SECONDS = 0.5
_BEGIN, _END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 for any.

    Raises:
        UsageError: ``serving.listen``: the address is taken, or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host}, port {port}",
            id="serving.listen",
            found=error.strerror or str(error),
            remedy="name an address of this machine and a free port",
        ) from None
    # Connections inherit it; asyncio does not see that such a socket is TCP's. Without it each answer takes 40 ms more.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own; a name other than ``localhost`` may mean another address tomorrow."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def tls_context(
    certificate: Path,
    key: Path,
    *,
    client_ca: Path | None = None,
    minimum: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
) -> ssl.SSLContext:
    """A server's TLS with this certificate (chain) and key, PEM.

    Args:
        client_ca: clients must show a certificate of this authority.
        minimum: lowest version; anything below 1.3 is for clients that know no better.

    Raises:
        UsageError: ``serving.tls``: a file cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = minimum
    try:
        context.load_cert_chain(certificate, key)
        if client_ca is not None:
            context.load_verify_locations(client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ssl.SSLError) as error:
        raise UsageError(
            "the service's TLS certificate, its key or the clients' authority cannot be used",
            id="serving.tls",
            found=error.strerror or str(error),
            expected="PEM files: a certificate and the private key that belongs to it",
        ) from None
    return context


def own_certificate(directory: Path, names: Sequence[str], *, common_name: str) -> tuple[Path, Path]:
    """A self-made certificate ``tls-cert.pem`` and its key ``tls-key.pem`` (mode 0600), made at first use.

    Args:
        directory: where they lie; made with mode 0700.
        names: host names and addresses that it is for; those of this machine are added.

    Raises:
        OSError: the directory cannot be written.
    """
    certificate, key = directory / "tls-cert.pem", directory / "tls-key.pem"
    if certificate.exists() and key.exists():
        return certificate, key
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    private = ec.generate_private_key(ec.SECP256R1())
    public = private.public_key()
    alternatives = [
        _general_name(name) for name in dict.fromkeys((*names, socket.gethostname(), "localhost", "127.0.0.1", "::1"))
    ]
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    now = datetime.datetime.now(datetime.UTC)
    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=_CERTIFICATE_DAYS))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(public), critical=False)
        .sign(private, SHA256())
    )
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    _write(key, private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), 0o600)
    _write(certificate, made.public_bytes(Encoding.PEM), 0o644)
    return certificate, key


def fingerprint(certificate: Path) -> str:
    """SHA-256 of a PEM file's first certificate, as browsers and OpenSSL show it.

    Raises:
        UsageError: ``serving.tls``: there is no certificate in it.
    """
    try:
        text = certificate.read_text("ascii")
        start = text.index(_BEGIN)
        der = ssl.PEM_cert_to_DER_cert(text[start : text.index(_END, start) + len(_END)])
    except (OSError, ValueError) as error:
        raise UsageError(f"{certificate} holds no certificate", id="serving.tls", found=str(error)) from None
    return sha256(der).digest().hex(":").upper()


def server(
    application: Any,
    tls: ssl.SSLContext | None,
    *,
    connections: int,
    shutdown_seconds: int,
    keep_alive_seconds: int = 5,
    connection_seconds: float | None = None,
    first_request_seconds: float = 10,
    connections_per_client: int | None = None,
    headers: Sequence[tuple[str, str]] = (),
) -> Server:
    """A uvicorn server of HTTP/1.1 for an ASGI application; run it with ``server(…).run(sockets=[listen(…)])``.

    It ends on SIGTERM and SIGINT, after the requests under way. What clients say about proxies counts for nothing. With
    TLS, ``scope["client_certificate"]`` is what :meth:`ssl.SSLSocket.getpeercert` gives.

    Args:
        connections: more at once are answered with 503.
        shutdown_seconds: how long requests under way have at the end.
        connection_seconds: a connection's whole life, whatever it does; ``None`` for any.
        first_request_seconds: how long a connection may be silent before its first request is complete.
        connections_per_client: more from one address are cut off, so that nobody takes all; ``None`` for any.
        headers: of every answer.

    Raises:
        PlatformError: ``serving.missing``: the extra is not installed.
    """
    try:
        from uvicorn import Config, Server
    except ImportError as error:
        raise missing(error) from None
    config = Config(
        application,
        http=_connection(connection_seconds, first_request_seconds, connections_per_client),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=connections,
        timeout_keep_alive=keep_alive_seconds,
        timeout_graceful_shutdown=shutdown_seconds,
        headers=list(headers),
    )
    config.load()
    # Set here and not by Config's arguments, which cannot ask for a TLS version.
    config.ssl = tls
    return Server(config)


def missing(error: ImportError) -> PlatformError:
    """The refusal where a service's packages are not installed."""
    return PlatformError(
        "this service needs packages that are not installed",
        id="serving.missing",
        found=str(error),
        remedy="pip install 'inclavare[services]'",
    )


def _connection(seconds: float | None, first: float, most: int | None) -> Any:
    """uvicorn's HTTP/1.1 connection, with an end that a slow peer cannot put off, and the peer's certificate."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    from_client: Counter[str] = Counter()

    class Connection(H11Protocol):
        _end: asyncio.TimerHandle | None = None
        _silent: asyncio.TimerHandle | None = None
        _from = ""

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._from = str((transport.get_extra_info("peername") or ("",))[0])
            from_client[self._from] += 1
            if most is not None and from_client[self._from] > most:
                transport.abort()
                return
            # uvicorn's own timer begins with the first answer.
            self._silent = self.loop.call_later(first, transport.abort)
            tls = transport.get_extra_info("ssl_object")
            certificate = tls.getpeercert() if tls is not None else None
            app = self.app

            async def with_certificate(scope: Any, receive: Any, send: Any) -> None:
                if self._silent is not None:
                    self._silent.cancel()
                await app({**scope, "client_certificate": certificate}, receive, send)

            self.app = with_certificate
            if seconds is not None:
                self._end = self.loop.call_later(seconds, transport.abort)

        def shutdown(self) -> None:
            super().shutdown()
            if self.transport.is_closing():
                # It was idle. Without this, TLS waits half a minute for the peer to say good-bye, too.
                self.loop.call_later(_GOOD_BYE_SECONDS, self.transport.abort)

        def connection_lost(self, exc: Exception | None) -> None:
            for timer in (self._end, self._silent):
                if timer is not None:
                    timer.cancel()
            from_client[self._from] -= 1
            if from_client[self._from] <= 0:
                del from_client[self._from]
            super().connection_lost(exc)

    return Connection


def _general_name(name: str) -> Any:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _write(path: Path, data: bytes, mode: int) -> None:
    """Replace a file atomically."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}.new")
    handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
