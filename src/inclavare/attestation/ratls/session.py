"""One attested connection, without any input or output: TLS 1.3, the exchange of evidence, and the stream after it.

Drivers (:mod:`.sockets`, :mod:`.streams`) carry bytes and run jobs. Plaintext goes neither in nor out before the peer
is verified: :meth:`Session.read` and :meth:`Session.write` refuse until :attr:`Session.open`.

The exchange
    Peers agree on it by ALPN. Each frame is type (1 byte), length (3 bytes, big-endian), contents:

    ====  =========  ==================================================================================
    type  name       contents
    ====  =========  ==================================================================================
    0     DATA       application data
    1     CHALLENGE  32 random bytes
    2     EVIDENCE   an RA-TLS certificate for the sender's TLS key whose claims' nonce is the binding
    3     RESULT     empty: nothing (more) is asked of the receiver; else the id of the refusal
    4     END        no more DATA follows
    ====  =========  ==================================================================================

    binding = SHA-256(``inclavare RA-TLS exchange 1`` ‖ 0 ‖ who answers ‖ challenge ‖ tls-exporter): who answers is one
    byte, 0 the server, 1 the client; tls-exporter is RFC 9266's channel binding, 32 bytes. A side that verifies sends
    CHALLENGE first, and RESULT when it has decided; one that does not sends RESULT at once. A connection is open when
    its own verification is done and the peer's RESULT is there. Before an attestation result expires, verifiers
    challenge again, at any time, between DATA.

What it proves
    An enclave that the policy accepts has quoted after the challenge was drawn, for this TLS key, on this connection:
    the exporter's value is known to its two ends only, and an enclave quotes it only for connections that it
    terminates itself. So neither evidence replayed, nor evidence relayed from another connection, nor a stolen TLS key
    without the enclave passes. Not proven: where the machine is, or that it is not some other genuine enclave of the
    same identity; and whoever holds a platform's attestation key can be every enclave of that platform.

Peers without the exchange
    Gramine, rats-tls and others prove their key by evidence in the certificate, made at some time before. Nothing but
    their own word says when: whoever has stolen the key may write later dates. They pass only where :class:`Verifier`
    names the longest validity that is accepted, and such connections end when the attestation result expires.

Alternatives that were weighed
    TLS post-handshake client authentication and drafts of attested TLS put evidence into the handshake, but no library
    offers a verifier's nonce there. A nonce in SNI or ALPN is readable on the wire, and binds to no connection. The
    client's Finished message (tls-unique of old) would do for :mod:`ssl`, which has no exporter, but has no standing in
    TLS 1.3, and :mod:`ssl` takes no self-signed certificate from a client at all: hence pyOpenSSL.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from OpenSSL import SSL, crypto

from ...errors import AppraisalError, EvidenceError, InclavareError, PlatformError, UsageError
from .. import Claims, Evidence, Policy, verify
from . import certificates
from .certificates import Credential, Identity

if TYPE_CHECKING:
    from ..appraisal import AppraisalPolicy
    from ..collateral import CollateralSource
    from ..references import References

ALPN = b"inclavare-ratls/1"
DATA, CHALLENGE, EVIDENCE, RESULT, END = range(5)
#: Seconds for which an attestation result counts.
LIFETIME = 3600
#: Least seconds between two challenges that are answered: each costs a quote.
CHALLENGE_INTERVAL = 1.0

_LABEL = b"EXPORTER-Channel-Binding"
_CONTEXT = b"inclavare RA-TLS exchange 1\0"
_NONCE = 32
_LIMITS = {DATA: (1 << 24) - 1, CHALLENGE: _NONCE, EVIDENCE: certificates.MAX_CERTIFICATE, RESULT: 128, END: 0}
_HEADER = 4
_READ = 1 << 16
#: Largest DATA frame that is sent, bytes.
_FRAME = 1 << 18


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end.

    Attributes:
        claims: authentic, and accepted by the policy.
        evidence: what they were taken from.
        fresh: the evidence answers a challenge on this connection; else it stood in the certificate only.
        expires: when this result ceases to count, seconds since 1970.
    """

    claims: Claims
    evidence: Evidence
    fresh: bool
    expires: float


@dataclass(frozen=True, slots=True)
class Verifier:
    """What a peer has to prove.

    Attributes:
        policy: which enclaves are accepted.
        collateral: where collateral comes from if the peer brings none.
        certificate_only: longest validity in seconds of certificates of peers that cannot answer challenges;
            ``None`` refuses such peers.
        lifetime: seconds for which an attestation result counts; before, the peer is challenged again.
        references: reference values, for a policy that takes its measurements from there.
    """

    policy: Policy | AppraisalPolicy
    collateral: CollateralSource | None = None
    certificate_only: int | None = None
    lifetime: float = LIFETIME
    references: References | None = None

    def __post_init__(self) -> None:
        if self.lifetime < 2 * CHALLENGE_INTERVAL:
            raise UsageError(
                "an attestation result has to count for longer",
                id="ratls.lifetime",
                found=f"{self.lifetime} seconds",
                expected=f"at least {2 * CHALLENGE_INTERVAL:.0f} seconds",
            )

    def check(self, certificate: bytes, nonce: bytes | None) -> Peer:
        """Verify and appraise a certificate's evidence.

        Args:
            nonce: what the claims' nonce must be; ``None`` for a peer without the exchange.

        Raises:
            EvidenceError: damaged, forged, expired, for another key, or of a root that is not trusted.
            AppraisalError: the policy refuses it.
        """
        start, end = certificates.validity(certificate)
        now = time.time()
        if not start - certificates.CLOCK_SKEW <= now <= end + certificates.CLOCK_SKEW:
            raise EvidenceError(
                "the peer's certificate is not valid now",
                id="ratls.certificate.expired",
                found=f"valid from {_date(start)} to {_date(end)}",
                expected=_date(now),
                remedy="have the peer make a new certificate, and compare both clocks",
            )
        if nonce is None and self.certificate_only is not None and end - start > self.certificate_only:
            raise EvidenceError(
                "the peer's certificate is valid for too long to say anything about its age",
                id="ratls.certificate.validity",
                found=f"{end - start:.0f} seconds",
                expected=f"at most {self.certificate_only}",
                remedy="have the peer make certificates of shorter validity, or accept this one's",
            )
        evidence = certificates.read(certificate)
        appraisal = verify(evidence, self.policy, nonce=nonce, collateral=self.collateral, references=self.references)
        claims = appraisal.require()
        return Peer(claims, evidence, nonce is not None, min(now + self.lifetime, float(claims.collateral_expires)))


class Result(Protocol):
    """What verifying a peer gives."""

    @property
    def expires(self) -> float:
        """When it ceases to count, seconds since 1970."""


#: Verifies a certificate and, if given, that its evidence bears a nonce; raises InclavareError.
Check = Callable[[bytes, "bytes | None"], Result]


@dataclass(frozen=True, slots=True)
class Job:
    """Work that takes milliseconds: ``compute`` may run in any thread, ``finish`` where the session lives."""

    compute: Callable[[], Any]
    finish: Callable[[Any], None]

    def run(self, session: Session) -> None:
        """Both, here."""
        try:
            result = self.compute()
        except InclavareError as error:
            session.fail(error)
        else:
            self.finish(result)


@dataclass(frozen=True, slots=True)
class Terms:
    """What one side brings into a connection and asks of the other.

    Attributes:
        server: which side.
        tls: OpenSSL's context, with the credential in it.
        identity: who answers challenges; ``None`` for a side that does not attest.
        credential: of this connection.
        check: verifies the peer; ``None`` for a side that does not.
        certificate_only: whether peers without the exchange may pass ``check``.
    """

    server: bool
    tls: SSL.Context
    identity: Identity | None
    credential: Credential | None
    check: Check | None
    certificate_only: bool
    server_name: bytes | None = None


class Session:
    """A connection's state. Not thread-safe; each method may add jobs, outgoing bytes and received data.

    After every call a driver runs :attr:`jobs`, then sends :meth:`outgoing`. Once a method has raised, or :attr:`error`
    is set, the connection is over; what :meth:`outgoing` then gives may tell the peer why.
    """

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._tls = SSL.Connection(terms.tls, None)
        if terms.server:
            self._tls.set_accept_state()
        else:
            self._tls.set_connect_state()
            if terms.server_name is not None:
                self._tls.set_tlsext_host_name(terms.server_name)
        self._established = False
        self._framed = False
        self._received = bytearray()
        self._data: deque[bytes] = deque()
        self._remaining = 0  # of a DATA frame that has not arrived wholly
        self._binding = b""
        self._certificate = self._public_key = b""
        self._challenge: bytes | None = None
        self._challenge_at = 0.0
        self._answered_at = float("-inf")
        self._answering = False
        self._verified = terms.check is None
        self._admitted = False
        self._ended_in = self._ended_out = False
        self.jobs: deque[Job] = deque()
        self.error: InclavareError | None = None
        self.result: Result | None = None
        self._advance()

    @property
    def peer(self) -> Peer | None:
        """Who is at the other end; ``None`` where the peer does not attest."""
        return self.result if isinstance(self.result, Peer) else None

    @property
    def open(self) -> bool:
        """The peer is verified, and has admitted this side: application data may flow."""
        return self.error is None and self._established and self._verified and self._admitted

    @property
    def eof(self) -> bool:
        """The peer sends no more data, and all of it has been read."""
        return self._ended_in and not self._data

    @property
    def ended(self) -> bool:
        """Both sides have sent their end."""
        return self._ended_in and self._ended_out

    # --- wire

    def feed(self, ciphertext: bytes) -> None:
        """Bytes from the peer."""
        if self.error is None:
            while ciphertext:
                ciphertext = ciphertext[self._tls.bio_write(ciphertext) :]
            self._advance()

    def feed_eof(self) -> None:
        """The peer's TCP stream has ended."""
        if not self._ended_in:
            self.fail(
                PlatformError(
                    "the connection was cut off" if self._established else "the peer ended the TLS handshake",
                    id="ratls.truncated",
                    expected="the peer's end of data",
                    remedy="see the peer's log; whoever is on the way can cut connections, too",
                )
            )

    def outgoing(self) -> bytes:
        """Bytes for the peer."""
        parts = []
        while True:
            try:
                parts.append(self._tls.bio_read(_READ))
            except SSL.WantReadError:
                return b"".join(parts)

    # --- application

    def read(self) -> bytes:
        """All data that has arrived; empty if there is none.

        Raises:
            UsageError: the connection is not open.
        """
        self._require_open(reading=True)
        if len(self._data) == 1:
            return self._data.popleft()
        data = b"".join(self._data)
        self._data.clear()
        return data

    def unread(self, data: bytes) -> None:
        """Give back what a reader had no room for."""
        self._data.appendleft(data)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send data.

        Raises:
            UsageError: the connection is not open, or its end has been sent.
        """
        self._require_open()
        if self._ended_out:
            raise UsageError("the end of data has been sent", id="ratls.write.ended")
        view = memoryview(data).cast("B")
        if not self._framed:
            self._send(view)
            return
        for start in range(0, len(view), _FRAME):
            self._send(_frame(DATA, view[start : start + _FRAME]))

    def end(self) -> None:
        """No more data from this side; the other side may go on."""
        if self.open and not self._ended_out:
            self._ended_out = True
            if self._framed:
                self._send(_header(END, 0))
            else:
                self._shutdown()

    def close(self) -> None:
        """The last that the peer hears: end of data, and TLS's close_notify."""
        self.end()
        self._shutdown()

    # --- time

    def due(self) -> float | None:
        """Seconds from now until :meth:`tick` has something to do; ``None`` if never."""
        if not self.open or self.result is None or self._terms.check is None:
            return None
        next_ = self.result.expires
        if self._framed and self._challenge is None:
            next_ = min(next_, self._challenge_at)
        return max(0.0, next_ - time.time())

    def tick(self) -> None:
        """Challenge the peer again, or end the connection whose attestation result has expired."""
        if not self.open or self.result is None or self._terms.check is None:
            return
        now = time.time()
        if now >= self.result.expires:
            self.fail(
                EvidenceError(
                    "the peer's attestation result has expired",
                    id="ratls.expired",
                    found="no new evidence in time" if self._framed else "a peer that cannot be challenged again",
                    expected=f"evidence before {_date(self.result.expires)}",
                    remedy="connect again",
                )
            )
        elif self._framed and self._challenge is None and now >= self._challenge_at:
            self._send_challenge()

    def fail(self, error: InclavareError) -> None:
        """End the connection. The peer is told the id of what this side refused."""
        if self.error is not None:
            return
        self.error = error
        self.jobs.clear()
        self._data.clear()
        if self._established:
            if self._framed and isinstance(error, EvidenceError | AppraisalError):
                self._send(_frame(RESULT, error.id.encode()[: _LIMITS[RESULT]]))
            self._shutdown()

    # --- inside

    def _advance(self) -> None:
        try:
            if not self._established:
                self._tls.do_handshake()
                self._on_handshake()
            while self.error is None and not self._ended_in:
                self._on_plaintext(self._tls.recv(_READ))
        except SSL.WantReadError:
            pass
        except SSL.ZeroReturnError:
            if self._established and not self._framed and self._verified:
                self._ended_in = True
            else:
                self.feed_eof()
        except SSL.Error as error:
            self.fail(_tls_error(error, self._established))
        except InclavareError as error:
            self.fail(error)

    def _on_handshake(self) -> None:
        self._established = True
        self._framed = self._tls.get_alpn_proto_negotiated() == ALPN
        check = self._terms.check
        if check is not None:
            certificate = self._tls.get_peer_certificate()
            if certificate is None:
                _refuse("certificate", "certificate", "none", "an RA-TLS certificate")
            self._certificate = crypto.dump_certificate(crypto.FILETYPE_ASN1, certificate)
            # Also where fresh evidence follows: a certificate with evidence for another key is nobody's honest one.
            binding = certificates.read(self._certificate).certificate
            assert binding is not None
            self._public_key = binding.public_key
        if not self._framed:
            self._admitted = True
            if check is None:
                return
            if not self._terms.certificate_only:
                raise EvidenceError(
                    "the peer cannot answer challenges",
                    id="ratls.exchange.unsupported",
                    found="a peer without the RA-TLS exchange",
                    expected=f"ALPN {ALPN.decode()}",
                    remedy="accept evidence of a certificate's age (certificate_only), or run the peer with inclavare",
                )
            self._add_check(self._certificate, None)
            return
        self._binding = self._tls.export_keying_material(_LABEL, 32, b"")
        if check is None:
            self._send(_header(RESULT, 0))
        else:
            self._send_challenge()

    def _bound(self, challenge: bytes, *, server: bool) -> bytes:
        return hashlib.sha256(_CONTEXT + bytes([not server]) + challenge + self._binding).digest()

    def _send_challenge(self) -> None:
        self._challenge = os.urandom(_NONCE)
        self._send(_frame(CHALLENGE, self._challenge))

    def _add_check(self, certificate: bytes, nonce: bytes | None) -> None:
        check = self._terms.check
        assert check is not None

        def compute() -> Result:
            if nonce is not None and certificates.public_key(certificate) != self._public_key:
                raise EvidenceError(
                    "the evidence is for another key than the connection's",
                    id="evidence.key.binding",
                    expected="the key of the peer's TLS certificate",
                    remedy="do not talk to this peer: it presents evidence of another enclave",
                )
            return check(certificate, nonce)

        self.jobs.append(Job(compute, self._on_checked))

    def _on_checked(self, result: Result) -> None:
        if self.error is not None:
            return
        self.result = result
        # At half of the time that is left, so that an answer may take its time.
        self._challenge_at = time.time() + (result.expires - time.time()) / 2
        if not self._verified:
            self._verified = True
            if self._framed:
                self._send(_header(RESULT, 0))
        if not self._framed:
            self._advance()

    def _on_plaintext(self, data: bytes) -> None:
        if not self._framed:
            if not self._verified and sum(map(len, self._data)) > _FRAME:
                _refuse("early", "data before the verification", "more than 256 KiB", "a peer that waits")
            self._data.append(data)
            return
        if self._remaining:  # then nothing else waits
            part = data[: self._remaining]
            self._remaining -= len(part)
            self._data.append(part)
            data = data[len(part) :]
        self._received += data
        received, at = self._received, 0
        while len(received) - at >= _HEADER and self.error is None:
            kind, size = received[at], int.from_bytes(received[at + 1 : at + _HEADER], "big")
            if kind > END or size > _LIMITS[kind]:
                _refuse("frame", "frame", f"type {kind}, {size} bytes", "a frame of the exchange")
            at += _HEADER
            if kind == DATA:
                if not self.open or self._ended_in:
                    _refuse("early", "application data", "before or after its time", "evidence first")
                part = bytes(received[at : at + size])
                at += len(part)
                self._remaining = size - len(part)
                if part:
                    self._data.append(part)
            elif len(received) - at < size:
                at -= _HEADER
                break
            else:
                contents = bytes(received[at : at + size])
                at += size
                self._on_control(kind, contents)
        del received[:at]

    def _on_control(self, kind: int, contents: bytes) -> None:
        if kind == CHALLENGE:
            self._on_challenge(contents)
        elif kind == EVIDENCE:
            if self._challenge is None:
                _refuse("frame", "evidence", "evidence that nobody asked for", "a challenge before")
            nonce = self._bound(self._challenge, server=not self._terms.server)
            self._challenge = None
            self._add_check(contents, nonce)
        elif kind == RESULT:
            if contents:
                raise AppraisalError(
                    "the peer refuses this side's evidence",
                    id="ratls.refused",
                    found=contents.decode("utf-8", "replace"),
                    remedy="see the peer's log for the claims that it refuses",
                )
            self._admitted = True
        else:
            if not self.open:
                _refuse("early", "end of data", "before its time", "evidence first")
            self._ended_in = True

    def _on_challenge(self, challenge: bytes) -> None:
        identity, credential = self._terms.identity, self._terms.credential
        if identity is None or credential is None:
            raise PlatformError(
                "the peer asks for evidence, and this side has none",
                id="ratls.attester.missing",
                expected="mutual attestation",
                remedy="run this side in an enclave and give it an attester",
            )
        now = time.monotonic()
        if len(challenge) != _NONCE or self._answering or now - self._answered_at < CHALLENGE_INTERVAL:
            _refuse(
                "challenge", "challenge", "too many, or of a wrong size", f"one in {CHALLENGE_INTERVAL} s, 32 bytes"
            )
        self._answering = True
        nonce = self._bound(challenge, server=self._terms.server)

        def finish(certificate: bytes) -> None:
            self._answering, self._answered_at = False, time.monotonic()
            if self.error is None:
                self._send(_frame(EVIDENCE, certificate))

        self.jobs.append(Job(lambda: identity.answer(credential, nonce), finish))

    def _send(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[self._tls.send(view) :]
            except SSL.Error as error:
                self.fail(_tls_error(error, self._established))
                return

    def _shutdown(self) -> None:
        try:
            self._tls.shutdown()
        except SSL.Error:
            pass  # the peer has closed, or TLS has failed before

    def _require_open(self, *, reading: bool = False) -> None:
        if self.error is not None:
            raise self.error
        if not self.open and not (reading and self._ended_in):
            raise UsageError("the peer is not verified yet", id="ratls.not_open", expected="attestation first")


def _header(kind: int, size: int) -> bytes:
    return bytes([kind]) + size.to_bytes(3, "big")


def _frame(kind: int, contents: bytes | memoryview) -> bytes:
    return b"".join((_header(kind, len(contents)), contents))


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _refuse(event: str, what: str, found: object, expected: str) -> NoReturn:
    raise EvidenceError(
        f"the peer does not keep to the protocol: {what}",
        id=f"ratls.protocol.{event}",
        found=found,
        expected=expected,
        remedy="do not talk to this peer",
    )


def _tls_error(error: SSL.Error, established: bool) -> InclavareError:
    reasons = error.args[0] if error.args and isinstance(error.args[0], list) else []
    reason = "; ".join(str(entry[-1]) for entry in reasons) or str(error) or "the stream ended"
    return PlatformError(
        "TLS failed" if established else "no TLS 1.3 connection with the peer",
        id="ratls.tls",
        found=reason,
        expected="a peer that speaks TLS 1.3, with an RA-TLS certificate where one is asked for",
        remedy="check the peer's address, and its log",
    )
