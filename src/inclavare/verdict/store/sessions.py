"""RCAR sessions and their nonces, shared by all replicas. Each nonce serves one attestation.

A session's id is what its client authenticates by, so the store keeps its hash only. Sessions live for minutes: writing
them does not wait for the disk. If the database's machine loses power, sessions of that moment may be lost, or be one
step behind; their clients begin again, and an attestation seen twice gives a token for the same TEE key.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from datetime import datetime
from hashlib import sha256
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from . import names
from .database import Database, conflicts
from .errors import Conflict, Consumed, Invalid, unknown
from .models import SessionRow, TenantRow, table
from .tenants import OF_TENANT, tenant_id
from .types import Session

_S = SessionRow
_TABLE = table(SessionRow)
_COLUMNS = [_TABLE.c[name] for name in ("tee", "nonce", "state", "created", "expires", "holder", "claims", "token")]


class Sessions:
    """The sessions of all tenants; each method sees those of one."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, tenant: str, tee: str, nonce: bytes, expires: datetime) -> str:
        """A new session.

        Args:
            tee: what the client says it is.
            nonce: 16 to 64 random bytes.
            expires: aware time.

        Returns:
            The session's id: 43 characters, 256 random bits.

        Raises:
            Invalid: not a nonce or a TEE's name, or expired already.
            NotFound: no such tenant.
            Conflict: the nonce was used.
        """
        names.identifier(tee, "tee")
        now = self._database.now()
        if not 16 <= len(nonce) <= 64 or len(tee) > 32:
            raise Invalid("not a nonce", id="verdict.store.session.nonce", found=f"{len(nonce)} bytes",
                          expected="16 to 64 bytes")  # fmt: skip
        if expires <= now:
            raise Invalid("the session would be expired", id="verdict.store.session.expires", found=expires)
        id = secrets.token_urlsafe(32)
        values = {"id_hash": _hash(id), "tee": tee, "nonce": nonce, "state": "new", "created": now,
                  "expires": expires}  # fmt: skip
        used = Conflict("this nonce was used before", id="verdict.store.session.nonce_used", remedy="make a new one")

        def work(connection: Connection) -> None:
            owner = tenant_id(connection, tenant)
            with conflicts(used):
                connection.execute(_INSERT, {"tenant_id": owner, **values})

        self._database.write(work, durable=False)
        return id

    def get(self, tenant: str, id: str) -> Session:
        """A session that is not expired.

        Raises:
            NotFound: there is none, it is expired, or it is another tenant's.
        """
        values = _which(tenant, id, self._database.now())
        row = self._database.read(lambda connection: connection.execute(_FIND, values).first())
        if row is None:
            raise unknown("session")
        return _session(tenant, row)

    def take(self, tenant: str, id: str) -> Session:
        """Use up the session's nonce, before evidence is verified against it: one of many who try gets it.

        Raises:
            NotFound: as for :meth:`get`.
            Consumed: it was used up before.
        """
        return self._move(tenant, id, _TAKE, {})

    def attest(
        self, tenant: str, id: str, *, holder: str, claims: Mapping[str, Any], token: str | None = None
    ) -> Session:
        """The evidence was accepted. Exactly once for each session.

        Args:
            holder: digest of the TEE key, hexadecimal.
            claims: JSON, at most 256 KiB.
            token: the attestation token.

        Raises:
            Invalid: the claims are no JSON, or too large.
            NotFound: as for :meth:`get`.
            Consumed: it was accepted or refused before.
        """
        names.digest(holder, "holder")
        document = names.canonical(dict(claims), "claims", names.MAX_CLAIMS)
        return self._move(tenant, id, _ATTEST, {"holder": holder, "claims": document, "token": token})

    def refuse(self, tenant: str, id: str) -> Session:
        """The evidence was refused: the session is of no use any more.

        Raises:
            NotFound: as for :meth:`get`.
            Consumed: it was accepted or refused before.
        """
        return self._move(tenant, id, _REFUSE, {})

    def purge(self) -> int:
        """Remove expired sessions of all tenants. Returns how many."""
        query = sa.delete(_S).where(_S.expires <= self._database.now())
        return self._database.write(lambda connection: connection.execute(query).rowcount, durable=False)

    def _move(self, tenant: str, id: str, change: Any, values: dict[str, Any]) -> Session:
        which = _which(tenant, id, self._database.now())

        def work(connection: Connection) -> Any:
            moved = connection.execute(change, {**which, **values}).first()
            if moved is None and connection.execute(_FIND, which).first() is not None:
                raise Consumed("the session was used already", id="verdict.store.session.used",
                               remedy="begin a new session: its nonce serves one attestation")  # fmt: skip
            return moved

        row = self._database.write(work, durable=False)
        if row is None:
            raise unknown("session")
        return _session(tenant, row)


def _which(tenant: str, id: str, now: datetime) -> dict[str, Any]:
    return {"tenant": tenant, "which": _hash(id), "now": now}


def _change(states: tuple[str, ...], state: str, *columns: str) -> Any:
    """From one of these states to another, if it is in one of them and not expired."""
    owner = sa.select(TenantRow.id).where(OF_TENANT).scalar_subquery()
    values = {"state": state, **{name: sa.bindparam(name) for name in columns}}
    change = sa.update(_TABLE).where(_THIS, _TABLE.c.tenant_id == owner, _TABLE.c.state.in_(states))
    return change.values(values).returning(*_COLUMNS)


# Made once: they are run for each client.
_THIS = sa.and_(_TABLE.c.id_hash == sa.bindparam("which"), _TABLE.c.expires > sa.bindparam("now"))
_FIND = sa.select(*_COLUMNS).join(table(TenantRow), table(TenantRow).c.id == _TABLE.c.tenant_id).where(_THIS, OF_TENANT)
_INSERT = sa.insert(_TABLE)
_TAKE = _change(("new",), "taken")
_REFUSE = _change(("new", "taken"), "refused")
_ATTEST = _change(("new", "taken"), "attested", "holder", "claims", "token")


def _hash(id: str) -> bytes:
    return sha256(id.encode("utf-8", "surrogatepass")).digest()


def _session(tenant: str, row: Any) -> Session:
    claims = None if row.claims is None else json.loads(row.claims)
    return Session(tenant, row.tee, row.nonce, row.state, row.created, row.expires, row.holder, claims, row.token)
