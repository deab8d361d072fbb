"""Collateral for this platform's quotes, from the PCCS that Intel's quote provider library is configured to use.

The configuration is that library's own, ``/etc/sgx_default_qcnl.conf``, so there is nothing to set twice. What comes
back is signed by Intel and checked by whoever verifies a quote; the transport need not be trusted.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NoReturn

from ...errors import PlatformError

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


def collateral(url: str, quote: bytes, *, check_certificate: bool = True) -> dict[str, str]:
    """Everything that verifying ``quote`` takes, in dcap-qvl's JSON layout.

    Args:
        url: see :func:`service`.
        quote: an SGX quote with its PCK certificate chain.

    Raises:
        PlatformError: ``tee.sgx.pccs``.
    """
    import dcap_qvl

    try:
        parsed = dcap_qvl.parse_quote(quote)
        fmspc, ca = parsed.fmspc().lower(), parsed.ca()
    except ValueError as error:
        _unavailable(f"the quote has no PCK certificate: {error}")
    fetch = _Fetcher(url, check_certificate)
    crl, headers = fetch(f"pckcrl?ca={ca}&encoding=der")
    tcb, tcb_headers = fetch(f"tcb?fmspc={fmspc}")
    identity, identity_headers = fetch("qe/identity")
    root_crl = fetch.optional("rootcacrl") or fetch(ROOT_CRL)[0]
    tcb_info, tcb_signature = _signed(tcb, "tcbInfo")
    qe_identity, identity_signature = _signed(identity, "enclaveIdentity")
    return {
        "pck_crl_issuer_chain": _chain(headers, "SGX-PCK-CRL-Issuer-Chain"),
        "root_ca_crl": _der(root_crl).hex(),
        "pck_crl": _der(crl).hex(),
        "tcb_info_issuer_chain": _chain(tcb_headers, "TCB-Info-Issuer-Chain", "SGX-TCB-Info-Issuer-Chain"),
        "tcb_info": tcb_info,
        "tcb_info_signature": tcb_signature,
        "qe_identity_issuer_chain": _chain(identity_headers, "SGX-Enclave-Identity-Issuer-Chain"),
        "qe_identity": qe_identity,
        "qe_identity_signature": identity_signature,
    }


class _Fetcher:
    def __init__(self, url: str, check_certificate: bool) -> None:
        import ssl

        self._url = url
        self._context = ssl.create_default_context()
        if (
            not check_certificate
        ):  # the configuration says so (use_secure_cert); a PCCS comes with a certificate of its own
            self._context.check_hostname = False
            self._context.verify_mode = ssl.CERT_NONE

    def __call__(self, path: str) -> tuple[bytes, Any]:
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
        with urlopen(self._place(path), timeout=TIMEOUT, context=self._context) as answer:  # noqa: S310
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
        remedy=f"set pccs_url in /{CONFIGURATION} to a PCCS that knows this platform, or get collateral elsewhere",
    )
