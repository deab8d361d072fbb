"""Who administrates, and what they may: signed tokens, OpenID Connect, TLS client certificates. Nobody is anonymous.

A *grant* is a role for a tenant, or for all of them (``*``):

- ``auditor`` reads metadata and the audit trail, never a secret's value, which nobody reads here;
- ``operator`` also changes policies, reference values and secrets;
- ``admin`` also hands out tokens; for all tenants, makes and removes tenants and exchanges the service's keys.

This service's own tokens are JWTs (RFC 7519) signed with Ed25519. The store knows their ``jti`` only: a token that it
does not know, or knows as revoked or as another role, is refused, however well it is signed.
"""

from __future__ import annotations

import hmac
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from ..errors import PolicyError, UsageError
from .store.names import SYSTEM

if TYPE_CHECKING:
    from .config import CertificateRule, VerdictConfig
    from .store import Store, TokenInfo
    from .store.types import Role

EVERY = "*"
ISSUER = "verdictd"
AUDIENCE = "verdictd-admin"
_TYPE = "verdictd-admin+jwt"
_ALGORITHM = "Ed25519"
_RANK = {"auditor": 1, "operator": 2, "admin": 3}
#: Longest token that is looked at, bytes: those of OpenID providers list groups.
MAX_TOKEN = 16 << 10


class Unauthenticated(PolicyError):
    """It is not known who asks."""


class Forbidden(PolicyError):
    """It is known who asks, and they may not."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks.

    Attributes:
        actor: as in the audit trail: ``token:<name>``, ``oidc:<subject>``, ``certificate:<subject>``.
        grants: tenant (or :data:`EVERY`) and role.
    """

    actor: str
    grants: tuple[tuple[str, Role], ...]

    def role(self, tenant: str) -> Role | None:
        """The highest role for a tenant; for :data:`~inclavare.verdict.store.SYSTEM` those for all tenants count."""
        found = [role for name, role in self.grants if name in (EVERY, tenant)]
        return max(found, key=_RANK.__getitem__, default=None)

    def require(self, tenant: str, role: Role) -> None:
        """Refuse whoever has less than this role. The answer does not depend on whether there is such a tenant.

        Raises:
            Forbidden: ``verdict.auth.role``.
        """
        own = self.role(tenant)
        if own is None or _RANK[own] < _RANK[role]:
            raise Forbidden(
                "this needs a role that you do not have for this tenant",
                id="verdict.auth.role",
                found="no role" if own is None else own,
                expected=role if tenant != SYSTEM else f"{role} of all tenants",
                remedy="ask an administrator of the tenant for a token with this role",
            )

    @property
    def author(self) -> str:
        """The actor as the store's author: 1 to 128 of ``A-Za-z0-9._@+-``."""
        return re.sub(r"[^A-Za-z0-9._@+-]", "_", self.actor)[:128]

    @property
    def home(self) -> str:
        """In whose audit trail it stands that something was refused to them."""
        own = {name for name, _ in self.grants}
        return own.pop() if len(own) == 1 and EVERY not in own else SYSTEM


class Authenticator:
    """Finds out who asks. Called from several threads.

    Args:
        clock: seconds since 1970.

    Raises:
        UsageError: ``verdict.config.value``: a certificate's subject is malformed.
    """

    def __init__(self, config: VerdictConfig, store: Store, *, clock: Callable[[], float] = time.time) -> None:
        from .oidc import Providers

        self._store = store
        self._clock = clock
        self._providers = Providers(config.auth.oidc, config.limits.clock_skew)
        self._certificates = [(rule, _parsed(rule.subject)) for rule in config.auth.certificates]

    def authenticate(self, token: str | None, certificate: Mapping[str, Any] | None) -> Principal:
        """Who shows this.

        Args:
            token: the bearer token. A wrong one is refused, even if there is a certificate, too.
            certificate: the TLS client's, verified, as :meth:`ssl.SSLSocket.getpeercert` has it.

        Raises:
            Unauthenticated: nothing that identifies anybody.
            Forbidden: somebody, for whom no role is configured.
            ResourceError: ``verdict.auth.oidc.unavailable``.
            InclavareError: see :mod:`inclavare.verdict.store.errors`.
        """
        if token is not None:
            return self._by_token(token)
        if certificate:
            return self._by_certificate(certificate)
        raise Unauthenticated(
            "this needs authentication",
            id="verdict.auth.none",
            found="neither a bearer token nor a client certificate",
            expected="Authorization: Bearer …, or a client certificate that verdictd.toml names",
            remedy="inclavare verdict login",
        )

    def _by_token(self, token: str) -> Principal:
        from joserfc.errors import JoseError
        from joserfc.jws import extract_compact
        from msgspec import DecodeError, json

        if len(token) > MAX_TOKEN:
            raise _refused("malformed", f"{len(token)} bytes")
        try:
            parts = extract_compact(token.encode("ascii"))
            claims = json.decode(parts.payload)
            header = dict(parts.headers())
        except (JoseError, DecodeError, ValueError, RecursionError):
            raise _refused("malformed", "not a JWT") from None
        issuer = claims.get("iss") if isinstance(claims, dict) else None
        if self._providers.knows(issuer):
            return self._providers.authenticate(str(issuer), token, int(self._clock()))
        if issuer != ISSUER:
            raise _refused("issuer", "an issuer that verdictd.toml does not name")
        return self._by_own_token(token, header)

    def _by_own_token(self, token: str, header: Mapping[str, Any]) -> Principal:
        from joserfc import jwt
        from joserfc.errors import JoseError
        from joserfc.jwk import KeySet, OKPKey

        # JSON can hold half a surrogate pair, which UTF-8 cannot.
        kid = str(header.get("kid")).encode(errors="replace")
        keys: list[Any] = [
            OKPKey.import_key(key.private.public_key(), {"kid": key.kid})  # type: ignore[arg-type]
            for key in self._store.keys.list("admin")
            if hmac.compare_digest(key.kid.encode(), kid)
        ]
        if not keys or header.get("typ") != _TYPE:
            raise _refused("key", "not one of this service's keys")
        try:
            claims = jwt.decode(token, KeySet(keys), algorithms=[_ALGORITHM]).claims
        except (JoseError, ValueError):
            raise _refused("signature", "a wrong signature") from None
        if claims.get("aud") != AUDIENCE:
            raise _refused("audience", "for another service")
        known = self._store.tokens.find(str(claims.get("jti")))
        if known is None:
            raise _refused("revoked", "expired or revoked")
        # The store's record counts; the clock is asked again, because the signed time must hold as well.
        signed = f"{claims.get('tenant')}\n{claims.get('role')}\n{claims.get('sub')}"
        same = hmac.compare_digest(signed.encode(), f"{known.tenant}\n{known.role}\n{known.name}".encode())
        expires = claims.get("exp")
        if not same or not isinstance(expires, int) or expires <= self._clock():
            raise _refused("revoked", "expired or revoked")
        return Principal(f"token:{known.name}", ((EVERY if known.tenant == SYSTEM else known.tenant, known.role),))

    def _by_certificate(self, certificate: Mapping[str, Any]) -> Principal:
        subject = tuple(frozenset(part) for part in certificate.get("subject", ()))
        names = {f"{kind}:{value}" for kind, value in certificate.get("subjectAltName", ())}
        grants = tuple(
            (rule.tenant, rule.role) for rule, wanted in self._certificates if _matches(rule, wanted, subject, names)
        )
        shown = ",".join(f"{name}={value}" for part in certificate.get("subject", ()) for name, value in part)
        actor = "certificate:" + _printable(shown or min(names, default=""))
        if not grants:
            raise _no_role(actor)
        return Principal(actor, grants)


def issue(
    store: Store, tenant: str, name: str, role: Role, lifetime: int, *, clock: Callable[[], float] = time.time
) -> tuple[TokenInfo, str]:
    """Make a token. It is returned once and kept nowhere.

    Args:
        tenant: whose; :data:`~inclavare.verdict.store.SYSTEM` for all of them.
        name: who will have it.
        lifetime: seconds.

    Raises:
        Invalid: not a name.
        NotFound: no such tenant.
    """
    from joserfc import jwt
    from joserfc.jwk import OKPKey

    now = int(clock())
    expires = datetime.fromtimestamp(now, UTC) + timedelta(seconds=lifetime)
    info = store.tokens.create(tenant, name, role, expires)
    key = store.keys.current("admin")
    claims: dict[str, Any] = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": name,
        "jti": info.jti,
        "tenant": tenant,
        "role": role,
        "iat": now,
        "exp": now + lifetime,
    }
    header = {"alg": _ALGORITHM, "typ": _TYPE, "kid": key.kid}
    signing = OKPKey.import_key(key.private)  # type: ignore[arg-type]
    return info, jwt.encode(header, claims, signing, algorithms=[_ALGORITHM])


def _refused(event: str, found: str) -> Unauthenticated:
    return Unauthenticated(
        "the token is not accepted",
        id=f"verdict.auth.token.{event}",
        found=found,
        expected="a token of this service, or of an OpenID provider that verdictd.toml names, that is still valid",
        remedy="ask an administrator for a token, then: inclavare verdict login",
    )


def _no_role(actor: str) -> Forbidden:
    return Forbidden(
        "no role is configured for you",
        id="verdict.auth.unknown",
        found=actor,
        remedy="have it added below [auth] in verdictd.toml",
    )


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text)[:200]


# RFC 4514's short names, and OpenSSL's long ones, which getpeercert() has.
_LONG = {
    "CN": "commonName",
    "O": "organizationName",
    "OU": "organizationalUnitName",
    "C": "countryName",
    "ST": "stateOrProvinceName",
    "L": "localityName",
    "STREET": "streetAddress",
    "DC": "domainComponent",
    "UID": "userId",
    "1.2.840.113549.1.9.1": "emailAddress",
    "2.5.4.5": "serialNumber",
}


def _parsed(subject: str) -> tuple[frozenset[tuple[str, str]], ...]:
    """A subject in the order and with the names that getpeercert() has; RFC 4514 writes the last part first."""
    from cryptography.x509 import Name

    if not subject:
        return ()
    try:
        parts = Name.from_rfc4514_string(subject).rdns
        return tuple(
            frozenset((_LONG[item.rfc4514_attribute_name], str(item.value)) for item in part) for part in parts
        )
    except (ValueError, KeyError) as error:
        raise UsageError(
            "a client certificate's subject in [[auth.certificates]] is wrong",
            id="verdict.config.value",
            found=f"{subject} ({error})",
            expected=f"RFC 4514, such as CN=alice,O=Example, with {', '.join(list(_LONG)[:9])}",
        ) from None


def _matches(
    rule: CertificateRule,
    wanted: tuple[frozenset[tuple[str, str]], ...],
    subject: tuple[frozenset[tuple[str, str]], ...],
    names: set[str],
) -> bool:
    if not wanted and not rule.san:
        return False
    return (not wanted or wanted == subject) and (not rule.san or rule.san in names)
