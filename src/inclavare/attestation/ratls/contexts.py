"""What connections have in common: who attests, what is asked of the peer, and OpenSSL's settings."""

from __future__ import annotations

import ipaddress
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from OpenSSL import SSL

from ...errors import UsageError
from .. import Policy
from .certificates import LIFETIME as CERTIFICATE_LIFETIME
from .certificates import Attester, Credential, Identity
from .session import ALPN, LIFETIME, Check, Session, Terms, Verifier

if TYPE_CHECKING:
    from ..appraisal import AppraisalPolicy
    from ..collateral import CollateralSource
    from ..references import References


class Context:
    """Makes sessions; may be shared by threads. Made by :func:`client_context` and :func:`server_context`."""

    def __init__(
        self, *, server: bool, identity: Identity | None, verifier: Verifier | None, alpn: Sequence[bytes] = ()
    ) -> None:
        self.server = server
        self._identity = identity
        self._verifier = verifier
        self._alpn = alpn
        self._lock = threading.Lock()
        self._tls: tuple[Credential | None, SSL.Context] | None = None

    @property
    def verifies(self) -> bool:
        """Whether peers have to attest."""
        return self._verifier is not None

    @property
    def attests(self) -> bool:
        """Whether this side has evidence to show."""
        return self._identity is not None

    def prepare(self) -> None:
        """Make the certificate now, so that a machine that cannot quote is found out before the first connection.

        Raises:
            InclavareError: the platform does not quote.
        """
        self._current()

    def session(self, server_name: str | None = None) -> Session:
        """A new connection's session. Takes the time of a quote where the certificate has to be made anew.

        Args:
            server_name: sent in SNI, if it is a name; nothing is checked by it.

        Raises:
            InclavareError: the platform does not quote.
        """
        credential, tls = self._current()
        verifier = self._verifier
        return Session(
            Terms(
                server=self.server,
                tls=tls,
                identity=self._identity,
                credential=credential,
                check=None if verifier is None else verifier.check,
                certificate_only=verifier is not None and verifier.certificate_only is not None,
                server_name=_server_name(server_name),
            )
        )

    def _current(self) -> tuple[Credential | None, SSL.Context]:
        credential = None if self._identity is None else self._identity.current()
        with self._lock:
            if self._tls is None or self._tls[0] is not credential:
                tls = new_tls(server=self.server, verifies=self._verifier is not None)
                if credential is not None:
                    from cryptography.x509 import load_der_x509_certificate

                    tls.use_certificate(load_der_x509_certificate(credential.certificate))
                    tls.use_privatekey(credential.key)
                if self.server:
                    tls.set_alpn_select_callback(_select)
                else:
                    tls.set_alpn_protos([ALPN, *self._alpn])
                self._tls = (credential, tls)
            return self._tls


class CertifiedContext:
    """A server with an ordinary certificate whose clients attest by theirs (Gramine's secret provisioning).

    Args:
        certificate: PEM file, chain.
        key: PEM file.
        check: verifies clients' certificates.
        tls12: also take TLS 1.2, for Gramine before 1.8; everything else about it is as strict.

    Raises:
        UsageError: ``serving.tls``: a file cannot be used.
    """

    server = True

    def __init__(self, certificate: Path, key: Path, check: Check, *, tls12: bool = False) -> None:
        self._check = check
        self._tls = new_tls(server=True, verifies=True, tls12=tls12)
        try:
            self._tls.use_certificate_chain_file(str(certificate))
            self._tls.use_privatekey_file(str(key))
            self._tls.check_privatekey()
        except SSL.Error as error:
            raise UsageError(
                "the service's TLS certificate or its key cannot be used",
                id="serving.tls",
                found=error.args[0][0][-1] if error.args and error.args[0] else None,
                expected="PEM files: a certificate and the private key that belongs to it",
            ) from None

    def session(self, server_name: str | None = None) -> Session:
        """A new connection's session."""
        return Session(
            Terms(
                server=True,
                tls=self._tls,
                identity=None,
                credential=None,
                check=self._check,
                certificate_only=True,
            )
        )


def client_context(
    policy: Policy | AppraisalPolicy,
    *,
    attester: Attester | None = None,
    collateral: CollateralSource | None = None,
    references: References | None = None,
    certificate_only: int | None = None,
    lifetime: float = LIFETIME,
    alpn: Sequence[bytes] = (),
) -> Context:
    """For connections to enclaves that the policy accepts.

    Args:
        attester: shows this side's own evidence, where the server asks for it.
        collateral: where collateral comes from if the peer brings none.
        references: reference values, for a policy that takes its measurements from there.
        certificate_only: accept peers that cannot answer challenges, with certificates that are valid for at most so
            many seconds. What that gives up: :mod:`inclavare.attestation.ratls.session`.
        lifetime: seconds for which an attestation result counts.
        alpn: protocols to offer to such peers.
    """
    identity = None if attester is None else Identity(attester)
    verifier = Verifier(policy, collateral, certificate_only, lifetime, references)
    return Context(server=False, identity=identity, verifier=verifier, alpn=alpn)


def server_context(
    attester: Attester,
    *,
    policy: Policy | AppraisalPolicy | None = None,
    collateral: CollateralSource | None = None,
    references: References | None = None,
    certificate_only: int | None = None,
    lifetime: float = LIFETIME,
    certificate_lifetime: int = CERTIFICATE_LIFETIME,
    legacy: bool = False,
    endorsements: bool = False,
) -> Context:
    """For an enclave that serves.

    Args:
        attester: shows this enclave's evidence.
        policy: clients have to be enclaves that it accepts, too (mutual attestation).
        collateral: see :func:`client_context`, as for ``references``, ``certificate_only`` and
            ``lifetime``.
        certificate_lifetime: seconds that certificates are valid.
        legacy: see :class:`Identity`, as for ``endorsements``.
    """
    identity = Identity(attester, lifetime=certificate_lifetime, legacy=legacy, endorsements=endorsements)
    verifier = None if policy is None else Verifier(policy, collateral, certificate_only, lifetime, references)
    return Context(server=True, identity=identity, verifier=verifier)


def new_tls(*, server: bool, verifies: bool, tls12: bool = False) -> SSL.Context:
    """OpenSSL's context: TLS 1.3, no resumption, no renegotiation, no compression."""
    tls = SSL.Context(SSL.TLS_SERVER_METHOD if server else SSL.TLS_CLIENT_METHOD)
    tls.set_min_proto_version(SSL.TLS1_2_VERSION if tls12 else SSL.TLS1_3_VERSION)
    # A resumed connection would show no certificate.
    tls.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    tls.set_options(SSL.OP_NO_TICKET | SSL.OP_NO_RENEGOTIATION | SSL.OP_NO_COMPRESSION)
    if tls12:
        tls.set_cipher_list(b"ECDHE+AESGCM:ECDHE+CHACHA20")
    if verifies:
        # No authority vouches for RA-TLS certificates: the session verifies their evidence, before any data flows.
        tls.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, lambda *_: True)
    return tls


def _select(_: SSL.Connection, offered: list[bytes]) -> Any:
    return ALPN if ALPN in offered else SSL.NO_OVERLAPPING_PROTOCOLS


def _server_name(host: str | None) -> bytes | None:
    if not host:
        return None
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host.encode("idna")
    return None
