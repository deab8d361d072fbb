"""The service's signing keys, encrypted at rest, shared by its replicas, exchanged with an overlap."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from .crypto import Envelope
from .database import Database
from .errors import Conflict
from .keyring import Keyring, signing_key_aad
from .models import SigningKeyRow, table
from .types import KeyKind, SigningKey

_K = SigningKeyRow
_ALGORITHMS: dict[KeyKind, str] = {"ear": "ES256", "admin": "EdDSA", "audit": "EdDSA"}
_VALID = (
    sa.select(*table(SigningKeyRow).c)
    .where(_K.kind == sa.bindparam("kind"), sa.or_(_K.retires.is_(None), _K.retires > sa.bindparam("now")))
    .order_by(_K.retires.is_not(None), _K.created.desc())
)
#: For so long a replica signs with a key that another one has exchanged.
CACHE_SECONDS = 5.0
OVERLAP = timedelta(days=1)


class Keys:
    """Signing keys by kind: ``ear`` (attestation tokens, ES256), ``admin`` (admin tokens), ``audit`` (both EdDSA)."""

    def __init__(self, database: Database, keyring: Keyring) -> None:
        self._database = database
        self._keyring = keyring
        self._lock = threading.Lock()
        self._cached: dict[KeyKind, tuple[float, SigningKey]] = {}
        self._opened: dict[str, SigningKey] = {}

    def current(self, kind: KeyKind) -> SigningKey:
        """The key to sign with; made at first use.

        Raises:
            Damaged: it was exchanged in the database.
        """
        with self._lock:
            since, key = self._cached.get(kind, (float("-inf"), None))
            if key is not None and time.monotonic() - since < CACHE_SECONDS:
                return key
        found = self._find(kind)
        if found is None:
            try:
                self._database.write(lambda connection: self._insert(connection, kind))
            except Conflict:
                pass  # another replica was quicker
            found = self._find(kind)
            if found is None:
                raise Conflict("a signing key is being exchanged", id="verdict.store.key.exchanged", remedy="try again")
        with self._lock:
            self._cached[kind] = (time.monotonic(), found)
        return found

    def list(self, kind: KeyKind) -> Sequence[SigningKey]:
        """All keys whose signatures are accepted now: the current one first, then those that retire."""
        values = {"kind": kind, "now": self._database.now()}
        rows = self._database.read(lambda connection: connection.execute(_VALID, values).all())
        return [self._open(row) for row in rows]

    def every(self, kind: KeyKind) -> Sequence[SigningKey]:
        """All keys, retired ones too: an audit trail is verified with keys of long ago."""
        query = sa.select(*_K.__table__.columns).where(_K.kind == kind).order_by(_K.created)
        return [self._open(row) for row in self._database.read(lambda connection: connection.execute(query).all())]

    def rotate(self, kind: KeyKind, *, overlap: timedelta = OVERLAP) -> SigningKey:
        """A new current key.

        Args:
            overlap: for so long signatures of the old key are accepted; zero if it was stolen. At least
                :data:`CACHE_SECONDS`, and the tokens' life, lets nobody notice.

        Raises:
            Conflict: it was rotated by somebody else at the same time.
        """
        retires = self._database.now() + overlap

        def work(connection: Connection) -> None:
            current = sa.update(_K).where(_K.kind == kind, _K.retires.is_(None))
            connection.execute(current.values(retires=retires))
            self._insert(connection, kind)

        self._database.write(work)
        with self._lock:
            self._cached.pop(kind, None)
        return self.current(kind)

    def purge(self) -> int:
        """Forget retired keys, except for those that the audit trail is verified with. Returns how many."""
        query = sa.delete(_K).where(_K.retires <= self._database.now(), _K.kind != "audit")
        return self._database.write(lambda connection: connection.execute(query).rowcount)

    # --- inside

    def _find(self, kind: KeyKind) -> SigningKey | None:
        query = sa.select(*_K.__table__.columns).where(_K.kind == kind, _K.retires.is_(None))
        row = self._database.read(lambda connection: connection.execute(query).first())
        return None if row is None else self._open(row)

    def _insert(self, connection: Connection, kind: KeyKind) -> None:
        from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

        algorithm = _ALGORITHMS[kind]
        private = generate_private_key(SECP256R1()) if algorithm == "ES256" else Ed25519PrivateKey.generate()
        values = {"kid": thumbprint(private.public_key()), "kind": kind, "algorithm": algorithm}
        encoded = private.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
        sealed = self._keyring.seal(connection, encoded, signing_key_aad(SimpleNamespace(**values)))
        connection.execute(
            sa.insert(_K).values(
                **values,
                created=self._database.now(),
                generation=sealed.generation,
                wrapped_key=sealed.wrapped_key,
                sealed=sealed.sealed,
            )
        )

    def _open(self, row: Any) -> SigningKey:
        from cryptography.hazmat.primitives.serialization import load_der_private_key

        known = self._opened.get(row.kid)
        if known is not None and (known.kind, known.retires) == (row.kind, row.retires):
            return known
        encoded = self._keyring.unseal(Envelope(row.generation, row.wrapped_key, row.sealed), signing_key_aad(row))
        private: Any = load_der_private_key(encoded, None)
        key = SigningKey(row.kid, row.kind, row.algorithm, row.created, row.retires, private)
        self._opened[row.kid] = key
        return key


def public_jwk(key: Any) -> dict[str, str]:
    """A P-256 or Ed25519 public key as a JWK (RFC 7517, RFC 8037) with its required members only."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from joserfc.jwk import ECKey, OKPKey

    jwk: Any = OKPKey.import_key(key) if isinstance(key, Ed25519PublicKey) else ECKey.import_key(key)
    return {name: value for name, value in jwk.as_dict(private=False).items() if name in ("kty", "crv", "x", "y")}


def thumbprint(key: Any) -> str:
    """RFC 7638, SHA-256, base64url: 43 characters."""
    import base64
    from hashlib import sha256

    import rfc8785

    return base64.urlsafe_b64encode(sha256(rfc8785.dumps(public_jwk(key))).digest()).rstrip(b"=").decode()
