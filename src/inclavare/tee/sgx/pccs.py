"""Collateral for this platform's quotes, from the PCCS that Intel's quote provider library is configured to use.

The configuration is that library's own, ``/etc/sgx_default_qcnl.conf``, so there is nothing to set twice. What comes
back is signed by Intel and checked by whoever verifies a quote; the transport need not be trusted.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NoReturn

from ...errors import EvidenceError, PlatformError
from ...sgx.certification import (
    CERT_PCK_CHAIN,
    CERT_PCK_LEAF,
    CERT_PPID_PLAIN,
    PckIdentifier,
    certificates,
    parse,
)
from ...sgx.pck import PckExtension
from ...sgx.quote import TEE_SGX, Quote
from ...sgx.structs import StructureError

CONFIGURATION = "etc/sgx_default_qcnl.conf"
#: Where Intel's root CRL is where the service has none of its own: the root certificate's distribution point.
ROOT_CRL = "https://certificates.trustedservices.intel.com/IntelSGXRootCA.der"
TIMEOUT = 20.0
#: Bytes of one answer; TCB info has some 10 KB, a CRL up to a megabyte.
MAX_ANSWER = 8 << 20


def service(root: Path = Path("/")) -> tuple[str, bool]:
    """The collateral service's URL, which ends in ``/sgx/certification/v…/``, and whether its certificate is checked.

    Raises:
        PlatformError: ``tee.sgx.pccs``: none is configured.
    """
    path = root / CONFIGURATION
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        _unavailable(f"/{CONFIGURATION}: {getattr(error, 'strerror', 'not text')}")
    settings = _settings(text)
    url = settings.get("collateral_service") or settings.get("pccs_url")
    if not isinstance(url, str) or not re.match(r"https?://[^/\s]+/", url):
        _unavailable(f"/{CONFIGURATION} names no pccs_url")
    return url.rstrip("/") + "/", str(settings.get("use_secure_cert", True)).lower() != "false"


def _settings(text: str) -> dict[str, Any]:
    """JSON with comments, or the older ``KEY=value`` lines."""
    plain = re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE)
    try:
        found = json.loads(plain)
    except ValueError:
        lines = (line.partition("=") for line in text.splitlines() if not line.lstrip().startswith("#"))
        return {key.strip().lower(): value.strip().strip('"') for key, equal, value in lines if equal}
    return found if isinstance(found, dict) else {}


def base(url: str) -> str:
    """A service's URL as the other functions take it, from one with or without ``/sgx/certification/v4``.

    Raises:
        PlatformError: ``tee.sgx.pccs``: not an http or https URL.
    """
    if not re.match(r"https?://[^/\s]+", url):
        _unavailable(f"{url} is not an http or https URL")
    return (url if "/certification/" in url else f"{url.rstrip('/')}/sgx/certification/v4").rstrip("/") + "/"


def collateral(
    url: str, quote: bytes, *, check_certificate: bool = True, timeout: float | None = None
) -> dict[str, str]:
    """Everything that verifying ``quote`` takes, in dcap-qvl's JSON layout.

    Args:
        url: see :func:`service`; for trust domains the paths under ``/tdx`` beside it are used, too.
        quote: an enclave's or trust domain's. Without a PCK certificate (certification data types 1 to 3) the service
            is asked for it; with nothing but the certificate (type 4), for its chain.
        timeout: seconds for each answer; by default ``TIMEOUT``.

    Raises:
        PlatformError: ``tee.sgx.pccs``.
    """
    try:
        parsed = Quote.split(quote)[0]
    except EvidenceError as error:
        _unavailable(f"the quote has no PCK certificate: {error.message}")
    fetch = Fetcher(url, check_certificate, timeout)
    fetched = _pck_chain(fetch, parsed)
    fmspc, ca = platform_of(fetched or parsed.cert_data)
    ours = "" if parsed.header.tee_type == TEE_SGX else url.replace("/sgx/certification/", "/tdx/certification/")
    crl, headers = fetch(f"pckcrl?ca={ca}&encoding=der")
    tcb, tcb_headers = fetch(f"{ours}tcb?fmspc={fmspc}")
    identity, identity_headers = fetch(f"{ours}qe/identity")
    root_crl = fetch.optional("rootcacrl") or fetch(ROOT_CRL)[0]
    tcb_info, tcb_signature = _signed(tcb, "tcbInfo")
    qe_identity, identity_signature = _signed(identity, "enclaveIdentity")
    issuers = _chain(headers, "SGX-PCK-CRL-Issuer-Chain")
    if parsed.cert_type == CERT_PCK_LEAF:
        fetched = parsed.cert_data.removesuffix(b"\0").rstrip() + b"\n" + issuers.encode()
    found = {
        "pck_crl_issuer_chain": issuers,
        "root_ca_crl": _der(root_crl).hex(),
        "pck_crl": _der(crl).hex(),
        "tcb_info_issuer_chain": _chain(tcb_headers, "TCB-Info-Issuer-Chain", "SGX-TCB-Info-Issuer-Chain"),
        "tcb_info": tcb_info,
        "tcb_info_signature": tcb_signature,
        "qe_identity_issuer_chain": _chain(identity_headers, "SGX-Enclave-Identity-Issuer-Chain"),
        "qe_identity": qe_identity,
        "qe_identity_signature": identity_signature,
    }
    return {**found, "pck_certificate_chain": fetched.decode()} if fetched else found


def _pck_chain(fetch: Fetcher, quote: Quote) -> bytes:
    """The PCK certificate chain, PEM, of a quote that only identifies it; empty where the quote has a certificate.

    The quoting enclave's id stands in the header's user data. A PCCS knows the platform by it; Intel's own service also
    needs the encrypted PPID.
    """
    if quote.cert_type in (CERT_PCK_LEAF, CERT_PCK_CHAIN):
        return b""
    identifier = parse(quote.cert_type, quote.cert_data)
    if not isinstance(identifier, PckIdentifier):
        _unavailable(f"certification data of type {quote.cert_type} does not identify a PCK certificate")
    asked = {
        "qeid": quote.header.user_data[:16],
        "encrypted_ppid": b"" if quote.cert_type == CERT_PPID_PLAIN else identifier.ppid,
        "cpusvn": identifier.cpusvn,
        "pcesvn": identifier.pce_svn.to_bytes(2, "little"),
        "pceid": identifier.pce_id,
    }
    query = "&".join(f"{name}={value.hex().upper()}" for name, value in asked.items() if value)
    leaf, headers = fetch(f"pckcert?{query}")
    return leaf.rstrip() + b"\n" + _chain(headers, "SGX-PCK-Certificate-Issuer-Chain").encode()


def platform_of(pem: bytes) -> tuple[str, str]:
    """FMSPC (hexadecimal) and certificate authority (``platform`` or ``processor``) of a PCK certificate, PEM, first.

    Raises:
        PlatformError: ``tee.sgx.pccs``: no such certificate.
    """
    try:
        leaf = certificates(pem)[0]
        fmspc = PckExtension.from_certificate(leaf).fmspc
    except (EvidenceError, StructureError) as error:
        _unavailable(f"the quote has no PCK certificate: {error.message}")
    # In the issuer's name, whoever that is.
    return fmspc.hex(), "platform" if b"PCK Platform CA" in leaf else "processor"


class Fetcher:
    """GET requests to a service.

    Args:
        url: what paths are relative to; ends in a slash.
        check_certificate: whether the service's TLS certificate must be valid.
        timeout: seconds for each answer; by default ``TIMEOUT``.
    """

    def __init__(self, url: str, check_certificate: bool = True, timeout: float | None = None) -> None:
        import ssl

        self._url = url
        self._timeout = TIMEOUT if timeout is None else timeout
        self._context = ssl.create_default_context()
        if (
            not check_certificate
        ):  # the configuration says so (use_secure_cert); a PCCS comes with a certificate of its own
            self._context.check_hostname = False
            self._context.verify_mode = ssl.CERT_NONE

    def __call__(self, path: str) -> tuple[bytes, Any]:
        """Body and headers. Raises PlatformError, ``tee.sgx.pccs``."""
        from urllib.error import HTTPError

        try:
            return self._get(path)
        except HTTPError as error:
            _unavailable(f"{self._place(path)}: HTTP status {error.code}")
        except (OSError, ValueError) as error:
            _unavailable(f"{self._place(path)}: {getattr(error, 'reason', error)}")

    def optional(self, path: str) -> bytes | None:
        """The answer, or ``None`` where the service has no such thing."""
        from urllib.error import HTTPError

        try:
            return self._get(path)[0]
        except HTTPError as error:
            if error.code in (400, 404):
                return None
            _unavailable(f"{self._place(path)}: HTTP status {error.code}")
        except (OSError, ValueError) as error:
            _unavailable(f"{self._place(path)}: {getattr(error, 'reason', error)}")

    def _get(self, path: str) -> tuple[bytes, Any]:
        from urllib.request import urlopen

        # The scheme is http or https: checked where the URL was read.
        with urlopen(self._place(path), timeout=self._timeout, context=self._context) as answer:  # noqa: S310
            data = answer.read(MAX_ANSWER + 1)
            if len(data) > MAX_ANSWER:
                raise ValueError(f"more than {MAX_ANSWER} bytes")
            return data, answer.headers

    def _place(self, path: str) -> str:
        return path if "://" in path else self._url + path


def _signed(document: bytes, name: str) -> tuple[str, str]:
    """The signed JSON text, exactly as it came, and its signature in hexadecimal."""
    try:
        text = document.decode()
        signature: str = json.loads(text)["signature"]
        bytes.fromhex(signature)
        begin = text.index(":", text.index(f'"{name}"')) + 1
        begin += len(text[begin:]) - len(text[begin:].lstrip())
        end = json.JSONDecoder().raw_decode(text, begin)[1]
    except (ValueError, KeyError, TypeError):
        _unavailable(f"its {name} is malformed")
    return text[begin:end], signature


def _chain(headers: Any, *names: str) -> str:
    from urllib.parse import unquote

    value = next((headers[name] for name in names if headers.get(name)), None)
    if value is None:
        _unavailable(f"it sent no {names[0]}")
    return unquote(value)


def _der(crl: bytes) -> bytes:
    """A CRL that came as DER, or as a PCCS sends it, in hexadecimal."""
    text = crl.strip()
    if re.fullmatch(rb"[0-9A-Fa-f]+", text) and len(text) % 2 == 0:
        return bytes.fromhex(text.decode())
    return crl


def _unavailable(found: str) -> NoReturn:
    raise PlatformError(
        "collateral for this platform's quotes cannot be had",
        id="tee.sgx.pccs",
        found=found,
        remedy=f"name a PCCS that knows this platform (pccs_url in /{CONFIGURATION}, or --pccs URL), "
        "or get collateral elsewhere",
    )
