"""A provisioning certificate caching service (PCCS) of the simulated platform: its collateral over HTTP, API version 4.

Clients that speak to Intel's PCCS (quote provider library, dcap-qvl, Trustee) work unchanged; what they get chains to
this platform's root. Paths, parameters, headers and encodings are those of Intel's "SGX and TDX PCS API", version 4;
where Intel's PCCS differs from it (CRLs in hexadecimal), the PCCS's. Every answer is made from what is set at that
moment.
"""

from __future__ import annotations

import re
import socket
import ssl
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from ... import serving
from ...config import Config
from ...errors import InclavareError, UsageError
from . import cpu, fuses

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from uvicorn import Server

    from .provisioning import Provisioning

#: Where Intel's PCCS listens.
PORT = 8081
SGX = "/sgx/certification/v4"
TDX = "/tdx/certification/v4"
#: In every answer (RFC 7234, 5.5): who mistakes this for Intel's should be able to see it.
WARNING = '299 - "SIMULATED: nothing here proves anything about hardware"'

_CONNECTIONS = 64
_KEEP_ALIVE_SECONDS = 5
_SHUTDOWN_SECONDS = 5
_MAX_QEID = 260
_REQUEST_ID = re.compile(r"[0-9A-Za-z-]{1,64}")


@dataclass(frozen=True, slots=True)
class _Answer:
    """A body, its type, and headers besides those of every answer."""

    body: bytes
    media_type: str
    headers: dict[str, str]


class _Refused(Exception):
    """An answer without data.

    Args:
        status: 400 or 404.
        reason: what is wrong with the request, for who debugs a client.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        said = {400: "Invalid request parameters.", 404: "No cache data for this platform."}[status]
        self.status = status
        self.text = f"{said} {reason}"


def application(config: Config) -> Starlette:
    """The service as an ASGI application; :func:`server` adds TLS and limits."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.responses import PlainTextResponse, Response
    from starlette.routing import Route

    def headers(request: Request) -> dict[str, str]:
        asked = request.headers.get("request-id", "")
        request_id = asked if _REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex
        return {"Request-ID": request_id, "Warning": WARNING, "Cache-Control": "no-store"}

    def route(path: str, handler: Callable[[Config, dict[str, str]], _Answer]) -> Route:
        async def answer(request: Request) -> Response:
            # As Intel's, which takes the first of several values.
            parameters = {name: request.query_params.getlist(name)[0] for name in request.query_params}
            # The work takes a millisecond or two and the processor serves one at a time, so no threads.
            found = handler(config, parameters)
            return Response(found.body, media_type=found.media_type, headers={**headers(request), **found.headers})

        return Route(path, answer, methods=["GET"])

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, _Refused)
        return PlainTextResponse(error.text, error.status, headers=headers(request))

    async def no_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return PlainTextResponse(error.detail, error.status_code, headers={**headers(request), **(error.headers or {})})

    async def failed(request: Request, error: Exception) -> Response:
        assert isinstance(error, InclavareError)
        return PlainTextResponse(f"Internal server error occurred. {error.one_line()}", 500, headers=headers(request))

    return Starlette(
        routes=[
            route(f"{SGX}/pckcert", _pck_certificate),
            route(f"{SGX}/pckcrl", _pck_crl),
            route(f"{SGX}/rootcacrl", _root_crl),
            route(f"{SGX}/crl", _crl_of),
            route(f"{SGX}/tcb", lambda config, asked: _tcb_info(config, asked, tdx=False)),
            route(f"{TDX}/tcb", lambda config, asked: _tcb_info(config, asked, tdx=True)),
            route(f"{SGX}/qe/identity", lambda config, asked: _qe_identity(config, asked, tdx=False)),
            route(f"{TDX}/qe/identity", lambda config, asked: _qe_identity(config, asked, tdx=True)),
        ],
        exception_handlers={_Refused: refused, InclavareError: failed, HTTPException: no_route},
    )


def server(config: Config, tls: ssl.SSLContext | None) -> Server:
    """The service; run it with ``server(…).run(sockets=[listen(…)])``. It ends on SIGTERM and SIGINT.

    Args:
        tls: see :func:`tls_context`; ``None`` for plain HTTP, which :func:`listen` allows on loopback only.

    Raises:
        PlatformError: ``serving.missing``: the extra ``services`` is not installed.
    """
    try:
        made = application(config)
    except ImportError as error:
        raise serving.missing(error) from None
    return serving.server(
        made,
        tls,
        connections=_CONNECTIONS,
        keep_alive_seconds=_KEEP_ALIVE_SECONDS,
        shutdown_seconds=_SHUTDOWN_SECONDS,
    )


def tls_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """TLS 1.2 or later, which Intel's quote provider library speaks, with this certificate (chain) and key, PEM.

    Raises:
        UsageError: ``serving.tls``: a file cannot be used.
    """
    return serving.tls_context(certificate, key, minimum=ssl.TLSVersion.TLSv1_2)


def listen(host: str, port: int, *, plain: bool) -> socket.socket:
    """A listening TCP socket; port 0 for any.

    Args:
        plain: without TLS.

    Raises:
        UsageError: ``tee.pccs.plain``: without TLS on an address that others reach; ``serving.listen``.
    """
    if plain and not serving.is_loopback(host):
        raise UsageError(
            "others could read and change what is served",
            id="tee.pccs.plain",
            found=f"plain HTTP on {host}",
            expected="plain HTTP on 127.0.0.1 or ::1, or TLS",
            remedy="give --tls-cert and --tls-key",
        )
    return serving.listen(host, port)


def _pck_certificate(config: Config, asked: dict[str, str]) -> _Answer:
    """The PCK certificate for a platform's raw TCB: the newest that is not above it."""
    from cryptography.hazmat.primitives.serialization import Encoding

    from . import architectural
    from .provisioning import PCE_ID, pck_extension

    qe_id = _hex(asked, "qeid", range(1, _MAX_QEID // 2 + 1))
    cpusvn = _hex(asked, "cpusvn", (16,))
    pce_svn = int.from_bytes(_hex(asked, "pcesvn", (2,)), "little")
    pce_id = _hex(asked, "pceid", (2,))
    if "encrypted_ppid" in asked:
        # Encrypted for Intel, and all zeros from many clients: the QE id tells the platform.
        _hex(asked, "encrypted_ppid", (384,))
    processor, made = _platform(config)
    with architectural.loaded(processor, architectural.QE, made.qe_sigstruct) as qe:
        known = {architectural.qe_id(processor, qe)}
    if made.td_qe_sigstruct:
        with architectural.loaded(processor, architectural.TD_QE, made.td_qe_sigstruct) as qe:
            known.add(architectural.qe_id(processor, qe))
    if qe_id[:16] not in known or any(qe_id[16:]) or pce_id != PCE_ID:
        raise _Refused(404, "Another platform's quoting enclave id or PCE id.")
    fitting = [
        (extension.cpusvn, certificate)
        for certificate in made.pcks
        if (extension := pck_extension(certificate)).pce_svn <= pce_svn
        and all(have >= want for have, want in zip(cpusvn, extension.cpusvn, strict=True))
    ]
    if not fitting:
        raise _Refused(404, "There is no PCK certificate for so low a TCB.")
    found, certificate = max(fitting, key=lambda entry: entry[0])
    extension = pck_extension(certificate)
    return _Answer(
        certificate.public_bytes(Encoding.PEM),
        "application/x-pem-file",
        {
            "SGX-PCK-Certificate-Issuer-Chain": quote(made.platform_ca.pem + made.root.pem, safe=""),
            "SGX-TCBm": (found + extension.pce_svn.to_bytes(2, "little")).hex().upper(),
            "SGX-FMSPC": extension.fmspc.hex().upper(),
            "SGX-PCK-Certificate-CA-Type": "platform",
        },
    )


def _pck_crl(config: Config, asked: dict[str, str]) -> _Answer:
    authority = asked.get("ca", "").lower()
    if authority not in ("platform", "processor"):
        raise _Refused(400, "ca is platform or processor.")
    encoding = asked.get("encoding", "").lower()
    if encoding not in ("", "der", "pem"):
        raise _Refused(400, "encoding is der or pem; without it a CRL comes in hexadecimal.")
    if authority == "processor":
        raise _Refused(404, "This platform's certificates are of the platform CA.")
    parts = _collateral(config, tdx=False)
    chain = {"SGX-PCK-CRL-Issuer-Chain": quote(parts["pck_crl_issuer_chain"], safe="")}
    der = bytes.fromhex(parts["pck_crl"])
    if encoding == "der":
        return _Answer(der, "application/pkix-crl", chain)
    if encoding == "pem":
        from cryptography import x509
        from cryptography.hazmat.primitives.serialization import Encoding

        return _Answer(x509.load_der_x509_crl(der).public_bytes(Encoding.PEM), "application/x-pem-file", chain)
    return _Answer(der.hex().encode(), "application/x-pem-file", chain)


def _root_crl(config: Config, asked: dict[str, str]) -> _Answer:
    return _Answer(_collateral(config, tdx=False)["root_ca_crl"].encode(), "application/pkix-crl", {})


def _crl_of(config: Config, asked: dict[str, str]) -> _Answer:
    """The root's CRL, DER, by the distribution point in its certificates, as the quote provider library asks for it."""
    from .provisioning import CRL_URL

    if not asked.get("uri"):
        raise _Refused(400, "The parameter uri is missing.")
    if asked["uri"] != CRL_URL:
        raise _Refused(404, "Not a distribution point of this platform's root.")
    return _Answer(bytes.fromhex(_collateral(config, tdx=False)["root_ca_crl"]), "application/pkix-crl", {})


def _tcb_info(config: Config, asked: dict[str, str], *, tdx: bool) -> _Answer:
    fmspc = _hex(asked, "fmspc", (6,))
    _check_version(asked)
    there = fuses.read(config.platform_dir)
    if fmspc != (fuses.FMSPC if there is None else there.fmspc):
        raise _Refused(404, "Another platform's FMSPC.")
    return _signed(config, asked, "tcb_info", "tcbInfo", "TCB-Info-Issuer-Chain", tdx)


def _qe_identity(config: Config, asked: dict[str, str], *, tdx: bool) -> _Answer:
    _check_version(asked)
    return _signed(config, asked, "qe_identity", "enclaveIdentity", "SGX-Enclave-Identity-Issuer-Chain", tdx)


def _signed(config: Config, asked: dict[str, str], key: str, name: str, chain: str, tdx: bool) -> _Answer:
    import json

    parts = _collateral(config, tdx=tdx)
    number = asked.get("tcbEvaluationDataNumber")
    if number is not None and int(number) != json.loads(parts[key])["tcbEvaluationDataNumber"]:
        raise _Refused(404, "There is no collateral of this TCB evaluation data number.")
    # Put together as text: the signature is over these very bytes.
    body = f'{{"{name}":{parts[key]},"signature":"{parts[f"{key}_signature"]}"}}'
    return _Answer(body.encode(), "application/json", {chain: quote(parts[f"{key}_issuer_chain"], safe="")})


def _check_version(asked: dict[str, str]) -> None:
    """``update`` and ``tcbEvaluationDataNumber``, of which there may be one."""
    number = asked.get("tcbEvaluationDataNumber")
    if asked.get("update", "standard").lower() not in ("standard", "early"):
        raise _Refused(400, "update is standard or early.")
    if number is not None and ("update" in asked or not re.fullmatch(r"[0-9]{1,9}", number)):
        raise _Refused(400, "tcbEvaluationDataNumber is a number, and excludes update.")


def _hex(asked: dict[str, str], name: str, sizes: range | tuple[int, ...]) -> bytes:
    """A parameter's bytes."""
    text = asked.get(name, "")
    if not re.fullmatch(r"(?:[0-9A-Fa-f]{2})*", text) or len(text) // 2 not in sizes:
        expected = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        raise _Refused(400, f"{name} is {expected} bytes in hexadecimal.")
    return bytes.fromhex(text)


def _platform(config: Config) -> tuple[cpu.Processor, Provisioning]:
    """As it is now: another process may have changed it since the last request."""
    from . import provisioning

    processor = cpu.Processor(fuses.load(config.platform_dir))
    return processor, provisioning.load(config.platform_dir, processor)


def _collateral(config: Config, *, tdx: bool) -> dict[str, Any]:
    from . import provisioning

    processor = cpu.Processor(fuses.load(config.platform_dir))
    return provisioning.collateral(config.platform_dir, processor, tdx=tdx)
