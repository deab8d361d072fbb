"""Client of a key broker service (KBS protocol 0.4.0): attests an enclave and gets what is released to it.

::

    POST auth → nonce      POST attest (evidence over nonce and key) → token      GET resource → JWE to the key

The network and the host are not trusted: TLS is 1.3 and pinned to a trust anchor, and what is released is encrypted to
a key that only the evidence vouches for. Without the anchor nothing is sent. Only the standard library speaks HTTP.

Sources: Trustee ``kbs/docs/kbs_attestation_protocol.md``, guest-components ``kbs_protocol`` (August 2026).
"""

from __future__ import annotations

import base64
import hmac
import http.client
import json
import random
import re
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, NoReturn, Protocol, TypeVar
from urllib.parse import quote, unquote, urlsplit

from ..enclave.kbs_uri import Resource
from ..errors import AppraisalError, EvidenceError, PlatformError, UsageError
from .channel import EnclaveChannel, report_data, runtime_data

T = TypeVar("T")

VERSION = "0.4.0"
COOKIE = "kbs-session-id"
#: The anchor that stands for this machine's certificate authorities.
SYSTEM = "system"
#: Seconds for everything that one call does, waiting and trying again included.
DEADLINE = 15.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 2.0
#: Bytes of an answer: a JWE around 1 MiB, base64 twice; of a challenge or token.
_MAX_RESOURCE, _MAX_ANSWER = 3 << 20, 256 << 10
_MAX_DETAIL = 4096
#: A token is taken to be good for so long if it does not say it, and is never used for longer than the second.
_LIFETIME, _LONGEST_LIFETIME = 300.0, 3600.0
#: Denied with a token older than this, a client attests again before it believes it: policies may have changed since.
_FRESH = 1.0
_BUSY = frozenset({408, 429, 500, 502, 503, 504})
_FINGERPRINT = re.compile(r"(?:sha-?256[:=]\s*)?((?:[0-9a-f]{2}:?){31}[0-9a-f]{2})", re.IGNORECASE)


class Attester(Protocol):
    """Who quotes for the enclave (as in :mod:`.ratls`)."""

    def quote(self, report_data: bytes) -> bytes:
        """A quote over 64 bytes of report data."""

    def collateral(self) -> dict[str, Any] | None:
        """Collateral for these quotes in dcap-qvl's layout, or ``None``."""


class TrustAnchor:
    """What the service's certificate is checked against.

    Args:
        text: certificates in PEM (authorities, or the service's own): chain, dates and names are checked; the SHA-256
            fingerprint of the service's certificate: exactly that certificate, whatever its names and dates; or
            ``system``: this machine's authorities, which the host chooses.

    Raises:
        UsageError: ``kbs.trust_anchor``.
    """

    def __init__(self, text: str) -> None:
        self._fingerprint: bytes | None = None
        stripped = text.strip()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        pin = _FINGERPRINT.fullmatch(stripped)
        if pin is not None:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE  # its fingerprint is compared instead, before anything is sent
            self._fingerprint = bytes.fromhex(pin[1].replace(":", ""))
        elif stripped == SYSTEM:
            context.load_default_certs()
        else:
            try:
                context.load_verify_locations(cadata=stripped)
            except (ssl.SSLError, ValueError):
                raise UsageError(
                    "the key broker's trust anchor cannot be used",
                    id="kbs.trust_anchor",
                    found=_shown(stripped),
                    expected=f"PEM certificates, a SHA-256 fingerprint, or {SYSTEM!r}",
                    remedy="set [attestation] trust_anchor to what `inclavare verdictd init` shows",
                ) from None
            # A certificate that is not an authority's may be pinned, too.
            context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        self.context = context

    def check(self, der: bytes | None) -> None:
        """Compare the peer's certificate, where a fingerprint is what counts.

        Raises:
            EvidenceError: ``kbs.tls.certificate``.
        """
        if self._fingerprint is None:
            return
        found = sha256(der or b"").digest()
        if not hmac.compare_digest(found, self._fingerprint):
            _other_certificate(f"SHA-256 {found.hex()}", f"SHA-256 {self._fingerprint.hex()}")


@dataclass(frozen=True, slots=True)
class Session:
    """An attested session.

    Attributes:
        cookie: the session's.
        token: JWT.
        began: monotonic clock, seconds.
        expires: likewise.
    """

    cookie: str
    token: str
    began: float
    expires: float


class KbsClient:
    """One enclave's client; any thread may call it, one call is under way at a time.

    Its key is drawn once and lives as long as it: what is released once only can be asked for again when an answer was
    lost.

    Args:
        url: ``https://host[:port]``, with ``/t/<tenant>`` for a tenant of verdictd's.
        trust_anchor: see :class:`TrustAnchor`.
        attester: quotes for this enclave.
        tee: its platform's name, ``sgx`` or ``sgx-sim``.
        policy: id of a policy that the service has to have appraised by, with ``@version`` or without; or empty.
        deadline: seconds for one call.

    Raises:
        UsageError: ``kbs.url`` or ``kbs.trust_anchor``.
    """

    def __init__(
        self, url: str, trust_anchor: str, attester: Attester, *, tee: str, policy: str = "", deadline: float = DEADLINE
    ) -> None:
        self._host, self._port, self._base, self._anchor = parse_service(url, trust_anchor)
        self._url = url
        self._attester = attester
        self._tee = tee
        self._policy = policy
        self._deadline = deadline
        self._channel = EnclaveChannel.new()
        self._lock = threading.Lock()
        self._connection: http.client.HTTPSConnection | None = None
        self._session: Session | None = None

    def get(self, uri: str) -> bytes:
        """What a URI names, released to this enclave.

        Raises:
            UsageError: ``kbs.uri``.
            AppraisalError: ``kbs.attest.denied`` with every reason that the service gives, ``kbs.resource.denied``, or
                ``kbs.policy.other``.
            EvidenceError: ``kbs.tls.certificate``: another service; ``kbs.answer.malformed`` or
                ``evidence.channel.jwe``.
            PlatformError: ``kbs.unreachable`` when the deadline has passed, or ``kbs.refused``.
        """
        resource = Resource.parse(uri)
        with self._lock:
            end = time.monotonic() + self._deadline
            session = self._attested(end)
            try:
                jwe = self._fetch(resource, session, end)
            except AppraisalError:
                if time.monotonic() - session.began < _FRESH:
                    raise
                self._session = None
                jwe = self._fetch(resource, self._attested(end), end)
            return self._channel.decrypt(jwe)

    def attest(self) -> tuple[str, bytes]:
        """A token of the service's, and the private key that it is bound to (PKCS #8 PEM).

        Raises:
            InclavareError: as for :meth:`get`.
        """
        with self._lock:
            token = self._attested(time.monotonic() + self._deadline).token
        return token, self._channel.private_pem()

    @property
    def remaining(self) -> float:
        """Seconds for which the service's decision holds; 0 before the first."""
        session = self._session
        return 0.0 if session is None else max(0.0, session.expires - time.monotonic())

    def forget(self) -> None:
        """End the session: the next call attests anew."""
        with self._lock:
            self._session = None

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            self._disconnect()

    # --- the protocol

    def _attested(self, end: float) -> Session:
        if self._session is None or time.monotonic() >= self._session.expires:
            self._session = self._retry(self._handshake, end)
        return self._session

    def _handshake(self, end: float) -> Session:
        """``auth`` and ``attest``: one after the other, or both again, for a nonce is good for one attempt."""
        began = time.monotonic()
        asked = {
            "version": VERSION,
            "tee": self._tee,
            "extra-params": {"supported-hash-algorithms": ["sha384"]},
        }
        challenge, headers = self._call("POST", "auth", end, body=asked)
        cookie = _cookie(headers)
        try:
            nonce = base64.b64decode(challenge["nonce"], validate=True)
        except (KeyError, TypeError, ValueError):
            nonce = b""
        if not 16 <= len(nonce) <= 128 or cookie is None:
            _malformed("a challenge without a nonce or a session")
        bound = runtime_data(nonce, self._channel.public_jwk)
        primary: dict[str, Any] = {"quote": base64.b64encode(self._attester.quote(report_data(bound))).decode()}
        collateral = self._attester.collateral()
        if collateral is not None:
            primary["collateral"] = collateral
        answer, headers = self._call(
            "POST",
            "attest",
            end,
            cookie=cookie,
            body={
                "runtime-data": {"nonce": bound["nonce"], "tee-pubkey": bound["tee-pubkey"]},
                "tee-evidence": {"primary_evidence": primary, "additional_evidence": ""},
            },
        )
        token = answer.get("token")
        if not isinstance(token, str):
            _malformed("no token")
        claims = _claims(token)
        self._check_policy(claims)
        lifetime = claims.get("exp", 0) - claims.get("iat", 0) if "exp" in claims and "iat" in claims else _LIFETIME
        expires = began + min(max(float(lifetime), 0.0), _LONGEST_LIFETIME)
        return Session(_cookie(headers) or cookie, token, began, expires)

    def _check_policy(self, claims: dict[str, Any]) -> None:
        """The token came by a pinned channel, so that what it says is the service's word."""
        if not self._policy:
            return
        found: list[str] = []
        for submodule in claims.get("submods", {}).values():
            own = submodule.get("ear.veraison.policy-claims")
            found += own["policy-ids"] if isinstance(own, dict) and "policy-ids" in own else []
            found.append(str(submodule.get("ear.appraisal-policy-id")))
        if not any(self._policy in (label, str(label).partition("@")[0]) for label in found):
            raise AppraisalError(
                "the key broker has appraised this enclave by another policy than its manifest asks for",
                id="kbs.policy.other",
                found=", ".join(dict.fromkeys(map(str, found))) or "none",
                expected=self._policy,
                remedy="make this the service's default attestation policy, or change [attestation] policy",
            )

    def _fetch(self, resource: Resource, session: Session, end: float) -> dict[str, Any]:
        def once(end: float) -> dict[str, Any]:
            jwe, _ = self._call("GET", resource.request_path, end, cookie=session.cookie, token=session.token)
            return jwe

        return self._retry(once, end)

    # --- HTTP

    def _retry(self, step: Callable[[float], T], end: float) -> T:
        """Again and again, with growing pauses, while the service is out of reach or busy."""
        pause = _FIRST_PAUSE
        while True:
            try:
                return step(end)
            except _Again as again:
                self._disconnect()
                wait = max(again.after, pause * random.uniform(0.7, 1.3))  # noqa: S311 - spreads clients, hides nothing
                if time.monotonic() + wait >= end:
                    raise PlatformError(
                        f"the key broker {self._url} cannot be reached or is busy",
                        id="kbs.unreachable",
                        found=again.reason,
                        expected=f"an answer within {self._deadline:g} seconds",
                        remedy="check that it runs and that this machine's network reaches it",
                    ) from None
                time.sleep(wait)
                pause = min(2 * pause, _LONGEST_PAUSE)
            except BaseException:
                self._disconnect()
                raise

    def _call(
        self,
        method: str,
        path: str,
        end: float,
        *,
        body: dict[str, Any] | None = None,
        cookie: str | None = None,
        token: str | None = None,
    ) -> tuple[dict[str, Any], http.client.HTTPMessage]:
        headers = {"Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if cookie is not None:
            headers["Cookie"] = f"{COOKIE}={cookie}"
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        data = None if body is None else json.dumps(body, separators=(",", ":")).encode()
        limit = _MAX_ANSWER if method == "POST" else _MAX_RESOURCE
        try:
            connection = self._connected(end)
            if connection.sock is not None:
                connection.sock.settimeout(max(0.1, end - time.monotonic()))
            connection.request(method, f"{self._base}/kbs/v0/{path}", data, headers)
            response = connection.getresponse()
            raw = _body(response, connection, limit, end)
        except ssl.SSLCertVerificationError as error:
            _other_certificate(error.verify_message, "one that leads to [attestation] trust_anchor, for this name")
        except (OSError, http.client.HTTPException) as error:
            raise _Again(f"{type(error).__name__}: {error}") from None
        if response.status in _BUSY:
            raise _Again(_detail(raw) or f"HTTP {response.status}", _seconds(response.getheader("Retry-After")))
        if response.status != 200:
            self._refused(method, path, response.status, raw)
        try:
            answer = json.loads(raw)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            _malformed("not a JSON object")
        return answer, response.headers

    def _connected(self, end: float) -> http.client.HTTPSConnection:
        if self._connection is None:
            left = max(0.1, end - time.monotonic())
            connection = http.client.HTTPSConnection(self._host, self._port, timeout=left, context=self._anchor.context)
            connection.connect()
            try:
                self._anchor.check(connection.sock.getpeercert(binary_form=True))
            except BaseException:
                connection.close()
                raise
            connection.auto_open = 0  # it must not connect anew without the check
            self._connection = connection
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _refused(self, method: str, path: str, status: int, raw: bytes) -> NoReturn:
        detail = _detail(raw) or f"HTTP {status}"
        if status == 401 and path == "attest":
            raise AppraisalError(
                "the key broker does not accept this enclave",
                id="kbs.attest.denied",
                found=detail,
                remedy="correct what it names, or have its policy or reference values changed",
            )
        if status == 401 and method == "GET":
            raise AppraisalError(
                "the key broker accepts this enclave, but does not release this to it",
                id="kbs.resource.denied",
                found=detail,
                expected=f"a policy that allows {unquote(path)}",
                remedy="see why in the service's audit trail; what is not there and what is denied look the same here",
            )
        raise PlatformError(
            "the key broker refuses the request",
            id="kbs.refused",
            found=f"{detail} (HTTP {status})",
            remedy=f"check that {self._url} is a key broker's address, with its tenant if it has one",
        )


class _Again(Exception):
    """Trying again may help."""

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.after = after


def parse_service(url: str, trust_anchor: str) -> tuple[str, int, str, TrustAnchor]:
    """Host, port and path of a key broker, and what its certificate is checked against.

    Raises:
        UsageError: ``kbs.url`` or ``kbs.trust_anchor``.
    """
    host, port, base = _split(url)
    if not trust_anchor.strip():
        raise UsageError(
            "the key broker is named, but not what its certificate is checked against",
            id="kbs.trust_anchor",
            found="none",
            expected=f"PEM certificates, a SHA-256 fingerprint, or {SYSTEM!r}",
            remedy="set [attestation] trust_anchor to what `inclavare verdictd init` shows",
        )
    return host, port, base, TrustAnchor(trust_anchor)


def _split(url: str) -> tuple[str, int, str]:
    try:
        parts = urlsplit(url)
        port = parts.port or 443
    except ValueError:
        parts, port = urlsplit(""), 0
    strange = parts.username is not None or parts.query or parts.fragment
    if parts.scheme != "https" or not parts.hostname or strange or not url.isascii() or not url.isprintable():
        raise UsageError(
            "the key broker's URL cannot be used",
            id="kbs.url",
            found=_shown(url),
            expected="https://host[:port], with /t/<tenant> for a tenant",
            remedy="correct [attestation] verdictd in enclave.toml",
        )
    return parts.hostname, port, quote(parts.path.rstrip("/"), safe="/%")


def _body(response: http.client.HTTPResponse, connection: http.client.HTTPSConnection, limit: int, end: float) -> bytes:
    data = bytearray()
    while chunk := response.read(16384):
        data += chunk
        if len(data) > limit:
            connection.close()
            _malformed(f"more than {limit} bytes")
        if time.monotonic() > end:
            raise TimeoutError("the answer did not come to its end")
    if response.length:
        raise http.client.IncompleteRead(b"", response.length)
    return bytes(data)


def _cookie(headers: http.client.HTTPMessage) -> str | None:
    for value in headers.get_all("Set-Cookie") or []:
        name, _, text = value.partition(";")[0].strip().partition("=")
        if name == COOKIE and re.fullmatch(r"[\x21\x23-\x2b\x2d-\x3a\x3c-\x5b\x5d-\x7e]{1,512}", text):
            return text
    return None


def _claims(token: str) -> dict[str, Any]:
    """A JWT's claims, not verified."""
    try:
        part = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    except (IndexError, ValueError, RecursionError):
        claims = None
    if not isinstance(claims, dict) or not token.isascii() or not token.isprintable():
        _malformed("not a token")
    numbers = all(isinstance(claims.get(name, 0), (int, float)) for name in ("iat", "exp"))
    submodules = claims.get("submods", {})
    if not numbers or not isinstance(submodules, dict) or not all(isinstance(one, dict) for one in submodules.values()):
        _malformed("not an attestation token")
    return claims


def _detail(raw: bytes) -> str:
    """The service's words, cut and without control characters."""
    try:
        error = json.loads(raw)
        kind, detail = str(error["type"]).rpartition("/")[2], str(error["detail"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return ""
    text = detail if kind in ("AttestationError", "PolicyDeny") else f"{kind}: {detail}"
    text = text.removeprefix("Attestation error: RCAR handshake Attest failed: ")
    return "".join(sign if sign.isprintable() else " " for sign in text[:_MAX_DETAIL])


def _seconds(text: str | None) -> float:
    return float(text) if text is not None and text.isdecimal() and len(text) < 5 else 0.0


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "…")


def _malformed(what: str) -> NoReturn:
    raise EvidenceError(
        "the key broker's answer is not understood",
        id="kbs.answer.malformed",
        found=what,
        expected=f"the KBS protocol, version {VERSION}",
        remedy="check that [attestation] verdictd is a key broker's address",
    )


def _other_certificate(found: str, expected: str) -> NoReturn:
    raise EvidenceError(
        "the key broker shows another certificate than the manifest trusts; nothing was sent to it",
        id="kbs.tls.certificate",
        found=found,
        expected=expected,
        remedy="somebody answers in its place, or it has a new certificate: then correct [attestation] trust_anchor",
    )
