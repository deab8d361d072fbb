"""Having an enclave signed by a signing service."""

from __future__ import annotations

import base64
import binascii
import http.client
import json
import ssl
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from ..errors import InclavareError, IntegrityError, PlatformError, UsageError
from ..sgx.sigstruct import catsig, public_modulus
from ..sgx.structs import Sigstruct
from .signing_access import read_private

_PREFIX = "/api/v1/signature"
_TIMEOUT_SECONDS = 20
_ANSWER_SIZE = 1 << 16


@dataclass(frozen=True, slots=True)
class SigningService:
    """Where a signing service is, and how to meet it.

    Attributes:
        url: ``https://host:port``, with or without ``/api/v1/signature``.
        token_file: the caller's token, in a file that nobody else may read.
        ca: PEM file: the service's authority, or its own certificate; ``None``: the system's authorities.
        client_certificate: PEM file for mutual TLS; ``client_key`` is its key.
    """

    url: str
    token_file: Path | None = None
    ca: Path | None = None
    client_certificate: Path | None = None
    client_key: Path | None = None

    def sign(self, data: bytes, public_key: bytes | None = None) -> Sigstruct:
        """A complete SIGSTRUCT over 256 bytes of gendata; its signature has been verified.

        Args:
            public_key: the signer that is expected, PEM.

        Raises:
            UsageError: the URL or a file is unusable.
            PlatformError: the service cannot be reached, or its certificate is not trusted.
            PolicyError: the service does not know the caller, or does not sign this.
            IntegrityError: its answer is no signature over these bytes by that signer.
        """
        answer = self._request(data)
        try:
            document = json.loads(answer)
            signature = base64.b64decode(document["signature"], validate=True)
            pem = document["publicKey"].encode()
        except (ValueError, KeyError, TypeError, AttributeError, binascii.Error):
            raise IntegrityError(
                "the signing service answered with something else than a signature", id="signing.service.answer"
            ) from None
        modulus = public_modulus(pem)
        if public_key is not None and modulus != public_modulus(public_key):
            raise IntegrityError(
                "the signing service signs with another key than the expected one",
                id="signing.service.publickey",
                remedy="name the right service, or its public key",
            )
        return catsig(data, signature, modulus)

    def _request(self, data: bytes) -> bytes:
        parts = urlsplit(self.url)
        if parts.scheme != "https" or not parts.hostname or parts.query or parts.username:
            raise UsageError(
                "this is not a signing service's address",
                id="signing.service.url",
                found=self.url,
                expected="https://HOST:PORT",
            )
        base = parts.path.rstrip("/").removesuffix(_PREFIX)
        headers = {"Content-Type": "text/plain"}
        if self.token_file is not None:
            token = read_private(self.token_file, "signing.service.token").decode("ascii", "replace").strip()
            if not token.isprintable() or not token.isascii() or not token:
                raise UsageError(f"{self.token_file} holds no token", id="signing.service.token", expected="one line")
            headers["Authorization"] = f"Bearer {token}"
        connection = http.client.HTTPSConnection(
            parts.hostname, parts.port or 443, timeout=_TIMEOUT_SECONDS, context=self._context()
        )
        try:
            connection.request("POST", f"{base}{_PREFIX}/pkcs1", data, headers)
            response = connection.getresponse()
            answer = response.read(_ANSWER_SIZE)
        except (OSError, http.client.HTTPException) as error:
            raise PlatformError(
                f"the signing service {parts.netloc} cannot be used",
                id="signing.service.unreachable",
                found=getattr(error, "verify_message", None) or str(error) or type(error).__name__,
                remedy="check its address, and name its certificate with --ca",
            ) from None
        finally:
            connection.close()
        if response.status != 200:
            raise _refusal(response.status, answer)
        return answer

    def _context(self) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(cafile=self.ca)
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            if self.client_certificate is not None:
                context.load_cert_chain(self.client_certificate, self.client_key)
        except (OSError, ssl.SSLError) as error:
            raise UsageError(
                "a certificate for the signing service cannot be used",
                id="signing.service.tls",
                found=error.strerror or str(error),
                expected="PEM files",
            ) from None
        return context


def _refusal(status: int, answer: bytes) -> InclavareError:
    try:
        return InclavareError.from_dict(json.loads(answer)["error"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return PlatformError("the signing service failed", id="signing.service.failed", found=f"HTTP {status}")
