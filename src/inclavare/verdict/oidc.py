"""OpenID Connect: who the configured providers say that somebody is (OpenID Connect Core 1.0, Discovery 1.0)."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ResourceError
from .auth import Principal, _no_role, _printable, _refused
from .telemetry import event

if TYPE_CHECKING:
    from joserfc.jwk import KeySet

    from .config import OidcRule

#: Signatures that only the provider can make; never ``none``, never a shared secret.
ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "Ed25519")
_TIMEOUT = 5.0
_MAX_DOCUMENT = 1 << 20
_KEYS_SECONDS = 3600.0
#: A key that is not known is asked for again, but a stranger must not make us ask all the time.
_RETRY_SECONDS = 30.0


class Providers:
    """The configured providers.

    Args:
        skew: seconds that their clocks may differ from ours.
    """

    def __init__(self, rules: Sequence[OidcRule], skew: int) -> None:
        self._rules = rules
        self._skew = skew
        self._keys = {rule.issuer: _Keys(rule) for rule in reversed(rules)}

    def knows(self, issuer: object) -> bool:
        """Whether tokens of this issuer are taken."""
        return isinstance(issuer, str) and issuer in self._keys

    def authenticate(self, issuer: str, token: str, now: int) -> Principal:
        """Whose token this is.

        Raises:
            Unauthenticated: it is not a good one.
            Forbidden: a good one, but no rule grants a role for it.
            ResourceError: ``verdict.auth.oidc.unavailable``: the provider's keys cannot be had.
        """
        from joserfc import jwt
        from joserfc.errors import JoseError
        from joserfc.jws import extract_compact

        kid = extract_compact(token.encode()).headers().get("kid")
        try:
            keys = self._keys[issuer].get(kid)
            claims = jwt.decode(token, keys, algorithms=list(ALGORITHMS)).claims
        except (JoseError, ValueError, TypeError):
            raise _refused("signature", "not signed by a key of its issuer") from None
        self._check_times(claims, now)
        audiences = claims.get("aud")
        audiences = [audiences] if isinstance(audiences, str) else audiences
        rules = [rule for rule in self._rules if rule.issuer == issuer]
        meant = [rule for rule in rules if isinstance(audiences, list) and rule.audience in audiences]
        if claims.get("iss") != issuer or not meant:
            raise _refused("audience", "for another service")
        subject = claims.get(meant[0].subject_claim)
        if not isinstance(subject, str) or not subject:
            raise _refused("subject", f"no {meant[0].subject_claim}")
        actor = "oidc:" + _printable(f"{subject}@{issuer.removeprefix('https://')}")
        grants = tuple((rule.tenant, rule.role) for rule in meant if rule.value in _values(claims, rule.claim))
        if not grants:
            raise _no_role(actor)
        return Principal(actor, grants)

    def _check_times(self, claims: dict[str, Any], now: int) -> None:
        expires, begins, issued = claims.get("exp"), claims.get("nbf", 0), claims.get("iat", 0)
        numbers = [float(value) for value in (expires, begins, issued) if isinstance(value, int | float)]
        if len(numbers) != 3 or not numbers[0] + self._skew > now:
            raise _refused("expired", "expired")
        if not max(numbers[1:]) - self._skew <= now:
            raise _refused("not_yet_valid", "not valid yet")


class _Keys:
    """A provider's keys, asked for when they are needed."""

    def __init__(self, rule: OidcRule) -> None:
        self._rule = rule
        self._lock = threading.Lock()
        self._found: KeySet | None = None
        self._since = self._asked = float("-inf")

    def get(self, kid: object) -> KeySet:
        """All of them; asked for again if this one is not among them."""
        with self._lock:
            now = time.monotonic()
            known = self._found is not None and any(key.kid == kid for key in self._found.keys)
            stale = now - self._since > _KEYS_SECONDS
            if (stale or not known) and now - self._asked > _RETRY_SECONDS:
                self._asked = now
                try:
                    self._found, self._since = self._fetch(), now
                except (OSError, ValueError, KeyError, TypeError) as error:
                    fields = {"issuer": self._rule.issuer, "reason": f"{type(error).__name__}: {error}"[:200]}
                    event("verdict.oidc.unavailable", level=logging.WARNING, **fields)
            if self._found is None or now - self._since > 24 * _KEYS_SECONDS:
                raise ResourceError(
                    "the OpenID provider cannot be asked for its keys",
                    id="verdict.auth.oidc.unavailable",
                    found=self._rule.issuer,
                    remedy="try again; the service's log says more",
                )
            return self._found

    def _fetch(self) -> KeySet:
        from joserfc.errors import JoseError
        from joserfc.jwk import KeySet

        uri = self._rule.jwks_uri
        if not uri:
            found = get_json(self._rule.issuer.rstrip("/") + "/.well-known/openid-configuration", self._rule.ca_file)
            if found["issuer"] != self._rule.issuer:
                raise ValueError("its discovery document is of another issuer")
            uri = found["jwks_uri"]
        document = get_json(uri, self._rule.ca_file)
        keys = []
        for jwk in document["keys"]:
            try:
                # One at a time: a kind of key that is new to us must not cost the others.
                keys += KeySet.import_key_set({"keys": [jwk]}).keys if jwk.get("kty") != "oct" else []
            except (JoseError, ValueError, KeyError):
                continue
        return KeySet(keys)


def get_json(url: str, ca_file: str = "") -> Any:
    """A JSON document over HTTPS, without following redirections.

    Args:
        ca_file: PEM of the authority; by default the system's.

    Raises:
        OSError, ValueError: it cannot be had, or is not JSON.
    """
    import http.client
    import json
    import ssl
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    if parts.scheme != "https" or not parts.hostname:
        raise ValueError("not an https URL")
    context = ssl.create_default_context(cafile=ca_file or None)
    connection = http.client.HTTPSConnection(parts.hostname, parts.port, timeout=_TIMEOUT, context=context)
    try:
        connection.request("GET", parts.path + (f"?{parts.query}" if parts.query else ""))
        answer = connection.getresponse()
        data = answer.read(_MAX_DOCUMENT + 1)
    except http.client.HTTPException as error:
        raise OSError(type(error).__name__) from None
    finally:
        connection.close()
    if answer.status != 200 or len(data) > _MAX_DOCUMENT:
        raise OSError(f"HTTP status {answer.status}, {len(data)} bytes")
    return json.loads(data)


def _values(claims: dict[str, Any], name: str) -> list[Any]:
    """A claim's values; ``realm_access.roles`` is looked for in depth where no claim is called so."""
    found: Any = claims
    for part in [name] if name in claims else name.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found if isinstance(found, list) else [found]
