"""Secrets at ``repo/type/tag``: versions, each encrypted under a key of its own; some are released once only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from . import names
from .crypto import Envelope
from .database import Database, conflicts, upsert
from .errors import Consumed, Invalid, unknown
from .keyring import Keyring, secret_aad
from .models import SecretRow, SecretVersionRow, TenantRow
from .tenants import OF_TENANT, charge, tenant_id, tenant_is
from .types import Secret, SecretInfo

_V = SecretVersionRow
_NEWEST = sa.and_(SecretRow.tenant_id == _V.tenant_id, SecretRow.path == _V.path)


class Secrets:
    """The secrets of all tenants; each method sees those of one."""

    def __init__(self, database: Database, keyring: Keyring) -> None:
        self._database = database
        self._keyring = keyring

    def put(
        self,
        tenant: str,
        path: str,
        value: bytes,
        *,
        policy: str | None = None,
        release_once: bool = False,
        metadata: Mapping[str, str] | None = None,
    ) -> SecretInfo:
        """Store a value as the newest version of a path.

        Args:
            path: ``repo/type/tag``.
            value: at most 1 MiB.
            policy: id of the policy that it is released by; ``None`` for the tenant's default.
            release_once: at most one holder ever reads this version.
            metadata: not secret; at most 4 KiB.

        Raises:
            Invalid: not a path; too large; no such policy.
            NotFound: no such tenant.
            QuotaExceeded: too many secrets, or bytes.
        """
        names.path(path)
        names.size(value, "secret", names.MAX_SECRET)
        document = names.canonical(_metadata(metadata), "metadata", names.MAX_METADATA)
        created = self._database.now()
        missing = Invalid(f"there is no policy {policy!r}", id="verdict.store.secret.policy",
                          remedy="register the policy first, or name one that there is")  # fmt: skip

        def work(connection: Connection) -> int:
            id = tenant_id(connection, tenant)
            uid = connection.execute(sa.select(TenantRow.uid).where(TenantRow.id == id)).scalar_one()
            fresh, version = _next_version(connection, id, path)
            charge(connection, id, secrets=int(fresh), bytes=len(value))
            row = {"tenant_id": id, "path": path, "version": version, "policy": policy,
                   "release_once": int(release_once)}  # fmt: skip
            sealed = self._keyring.seal(connection, value, secret_aad(SimpleNamespace(uid=uid, **row)))
            row |= {"size": len(value), "metadata_json": document, "created": created}
            row |= {"generation": sealed.generation, "wrapped_key": sealed.wrapped_key, "sealed": sealed.sealed}
            with conflicts(missing):
                connection.execute(sa.insert(_V).values(**row))
            return version

        version = self._database.write(work)
        return SecretInfo(path, version, policy, release_once, len(value), json.loads(document), created)

    def info(self, tenant: str, path: str, version: int | None = None) -> SecretInfo:
        """What is known of a secret besides its value; the newest version, or this one.

        Raises:
            NotFound: there is none; no matter whether it is another tenant's.
        """
        return _info(self._find(tenant, path, version, _SHOWN))

    def list(self, tenant: str, *, after: str = "", limit: int = 1000) -> Sequence[SecretInfo]:
        """The newest version of each path, by path.

        Args:
            after: paths behind this one: for the next page.
        """
        query = _joined(_INFO, tenant).where(SecretRow.version == _V.version, SecretRow.path > after)
        query = query.order_by(SecretRow.path).limit(limit)
        return [_info(row) for row in self._database.read(lambda connection: connection.execute(query).all())]

    def versions(self, tenant: str, path: str) -> Sequence[SecretInfo]:
        """All versions of a secret that are kept, the newest first.

        Raises:
            NotFound: there is none.
        """
        query = _joined(_INFO, tenant).where(SecretRow.path == path).order_by(_V.version.desc())
        rows = self._database.read(lambda connection: connection.execute(query).all())
        if not rows:
            raise unknown("secret")
        return [_info(row) for row in rows]

    def read(self, tenant: str, path: str, *, holder: str, version: int | None = None) -> bytes:
        """The value alone; see :meth:`fetch`."""
        return self.fetch(tenant, path, holder=holder, version=version).value

    def fetch(self, tenant: str, path: str, *, holder: str, version: int | None = None) -> Secret:
        """A value, and of which version it is.

        A release-once version goes to the first holder who asks. That is durable before the value is decrypted, so no
        crash and no other replica gives it to anybody else. The same holder may ask again until it has acknowledged.

        Args:
            holder: digest of the TEE key that the value will be encrypted to, hexadecimal.
            version: by default the newest.

        Raises:
            NotFound: there is none; no matter whether it is another tenant's.
            Consumed: released once already.
            Damaged: it was changed in the database.
        """
        names.digest(holder, "holder")
        row = self._find(tenant, path, version, _READ)
        if row.release_once:
            row = self._claim(tenant, path, row.version, holder)
        value = self._keyring.unseal(Envelope(row.generation, row.wrapped_key, row.sealed), secret_aad(row))
        return Secret(_info(row), value)

    def acknowledge(self, tenant: str, path: str, *, holder: str, version: int | None = None) -> SecretInfo:
        """The holder has a release-once value: it is erased. Acknowledging again changes nothing.

        Raises:
            NotFound: there is none.
            Consumed: it did not go to this holder.
            Invalid: it is not a release-once secret.
        """
        names.digest(holder, "holder")
        now = self._database.now()

        def work(connection: Connection) -> Any:
            row = _lock(connection, tenant, path, version)
            if not row.release_once:
                raise Invalid("only what is released once is acknowledged", id="verdict.store.secret.acknowledge")
            if row.released_to != holder:
                raise consumed()
            if row.acknowledged is None:
                charge(connection, row.tenant_id, bytes=-row.size)
                erased = {"acknowledged": now, "sealed": b"", "wrapped_key": b""}
                connection.execute(sa.update(_V).where(*_is(row)).values(**erased))
            return _lock(connection, tenant, path, row.version)

        return _info(self._database.write(work))

    def delete(self, tenant: str, path: str, version: int | None = None) -> int:
        """Delete a secret, or one of its versions. Returns how many versions.

        Version numbers are not used again, so what was released once stays distinguishable from what comes later.

        Raises:
            NotFound: there is none.
        """

        def work(connection: Connection) -> int:
            query = _joined([_V.tenant_id, _V.path, _V.version, _V.size, _V.acknowledged], tenant)
            query = query.where(SecretRow.path == path).order_by(_V.version).with_for_update(of=SecretRow)
            rows = connection.execute(query).all()
            doomed = [row for row in rows if version in (None, row.version)]
            if not doomed:
                raise unknown("secret")
            id = doomed[0].tenant_id
            for row in doomed:
                connection.execute(sa.delete(_V).where(*_is(row)))
            freed = sum(row.size for row in doomed if row.acknowledged is None)
            charge(connection, id, secrets=-int(len(doomed) == len(rows)), bytes=-freed)
            kept = [row.version for row in rows if row not in doomed]
            _set_newest(connection, id, path, max(kept, default=0))
            return len(doomed)

        return self._database.write(work)

    # --- inside

    def _find(self, tenant: str, path: str, version: int | None, columns: Mapping[bool, Any]) -> Any:
        # One query for everything, so that a foreign name and an unknown one take the same way.
        query, values = columns[version is None], _values(tenant, path, version)
        row = self._database.read(lambda connection: connection.execute(query, values).first())
        if row is None:
            raise unknown("secret")
        return row

    def _claim(self, tenant: str, path: str, version: int, holder: str) -> Any:
        now = self._database.now()

        def work(connection: Connection) -> Any:
            row = _lock(connection, tenant, path, version)
            if row.released_to not in (None, holder) or row.acknowledged is not None:
                raise consumed()
            if row.released_to is None:
                claim = sa.update(_V).where(*_is(row), _V.released_to.is_(None))
                claimed = connection.execute(claim.values(released_to=holder, released=now)).rowcount
                assert claimed == 1
                row = _lock(connection, tenant, path, version)
            return row

        return self._database.write(work)


def consumed() -> Consumed:
    """What was released to another holder, or has arrived."""
    return Consumed(
        "this secret was released already, and is released once only",
        id="verdict.store.secret.consumed",
        remedy="store a new version of it, after finding out who has the old one",
    )


_INFO: list[Any] = [
    _V.tenant_id, _V.path, _V.version, _V.policy, _V.release_once, _V.size, _V.metadata_json, _V.created,
    _V.released_to, _V.released, _V.acknowledged,
]  # fmt: skip
_SEALED: list[Any] = [*_INFO, TenantRow.uid, _V.generation, _V.wrapped_key, _V.sealed]


def _joined(columns: Any, tenant: str | None = None) -> Any:
    joined = sa.select(*columns).join(SecretRow, _NEWEST).join(TenantRow, TenantRow.id == SecretRow.tenant_id)
    return joined.where(OF_TENANT if tenant is None else tenant_is(tenant))


def _one(columns: Any) -> dict[bool, Any]:
    """Statements that are made once: for the newest version, and for a numbered one."""
    of_path = _joined(columns).where(SecretRow.path == sa.bindparam("path", type_=sa.Text()))
    number = sa.bindparam("version", type_=sa.Integer())
    return {True: of_path.where(_V.version == SecretRow.version), False: of_path.where(_V.version == number)}


def _values(tenant: str, path: str, version: int | None) -> dict[str, Any]:
    values: dict[str, Any] = {"tenant": tenant, "path": path}
    return values if version is None else {**values, "version": names.version(version)}


_SHOWN, _READ = _one(_INFO), _one(_SEALED)
_LOCKED = {newest: query.with_for_update(of=_V) for newest, query in _READ.items()}


def _lock(connection: Connection, tenant: str, path: str, version: int | None) -> Any:
    row = connection.execute(_LOCKED[version is None], _values(tenant, path, version)).first()
    if row is None:
        raise unknown("secret")
    return row


def _is(row: Any) -> tuple[sa.ColumnElement[bool], ...]:
    return (_V.tenant_id == row.tenant_id, _V.path == row.path, _V.version == row.version)


def _next_version(connection: Connection, id: int, path: str) -> tuple[bool, int]:
    """Count up a path's version. Returns whether none is kept now, and the number; two who put get two numbers."""
    first = upsert(connection, SecretRow).values(tenant_id=id, path=path, version=0, last=0)
    connection.execute(first.on_conflict_do_nothing())
    where = (SecretRow.tenant_id == id, SecretRow.path == path)
    kept, last = connection.execute(sa.select(SecretRow.version, SecretRow.last).where(*where).with_for_update()).one()
    connection.execute(sa.update(SecretRow).where(*where).values(version=last + 1, last=last + 1))
    return kept == 0, last + 1


def _set_newest(connection: Connection, id: int, path: str, version: int) -> None:
    connection.execute(
        sa.update(SecretRow).where(SecretRow.tenant_id == id, SecretRow.path == path).values(version=version)
    )


def _metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    found = dict(metadata or {})
    for name, value in found.items():
        names.text(name, "metadata", 128, least=1)
        names.text(value, "metadata", 2048)
    return found


def _info(row: Any) -> SecretInfo:
    return SecretInfo(
        row.path, row.version, row.policy, bool(row.release_once), row.size, json.loads(row.metadata_json),
        row.created, row.released_to, row.released, row.acknowledged,
    )  # fmt: skip
