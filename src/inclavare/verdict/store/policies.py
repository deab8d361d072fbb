"""Policies: versioned texts, authenticated, so that the database's administrator cannot loosen them unnoticed."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Any, get_args

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from . import names
from .database import Database, conflicts
from .errors import Conflict, Invalid, unknown
from .keyring import Keyring
from .models import PolicyRow, PolicyVersionRow, TenantRow
from .tenants import OF_TENANT, charge, tenant_id, tenant_is
from .types import PolicyKind, PolicyVersion

_P, _V = PolicyRow, PolicyVersionRow


class Policies:
    """The policies of all tenants; each method sees those of one.

    The store keeps texts and does not judge them: whether they are well-formed is for the caller to say.
    """

    def __init__(self, database: Database, keyring: Keyring) -> None:
        self._database = database
        self._keyring = keyring

    def put(
        self,
        tenant: str,
        id: str,
        kind: PolicyKind,
        text: str,
        *,
        author: str = "system",
        expected: int | None = None,
    ) -> PolicyVersion:
        """Store a text as the newest version of a policy, which is in force from now on.

        Args:
            text: at most 1 MiB in UTF-8.
            expected: the version that it follows, 0 for none; by default whatever there is.

        Raises:
            Invalid: not an id, a kind or a text.
            NotFound: no such tenant.
            Conflict: the policy is of another kind; ``verdict.store.policy.changed``: another version is in force.
            QuotaExceeded: too many policies, or bytes.
        """
        names.identifier(id, "policy")
        names.identifier(author, "author")
        if kind not in get_args(PolicyKind):
            raise Invalid("not a kind of policy", id="verdict.store.policy.kind", found=repr(kind),
                          expected=", ".join(get_args(PolicyKind)))  # fmt: skip
        try:
            encoded = text.encode()
        except UnicodeEncodeError:
            encoded = b"\0"
        if b"\0" in encoded:
            raise Invalid("the policy is not text", id="verdict.store.policy.text", expected="UTF-8 without NUL")
        names.size(encoded, "policy", names.MAX_POLICY)
        return self._add(tenant, id, kind, text, author, None, expected)

    def get(self, tenant: str, id: str, version: int | None = None) -> PolicyVersion:
        """A policy; the version in force, or this one.

        Raises:
            NotFound: there is none; no matter whether it is another tenant's.
            Damaged: it was changed in the database.
        """
        values: dict[str, Any] = {"tenant": tenant, "id": id}
        if version is not None:
            values["version"] = names.version(version)
        row = self._database.read(lambda connection: connection.execute(_GET[version is None], values).first())
        if row is None:
            raise unknown("policy")
        return self._checked(row)

    def default(self, tenant: str, kind: PolicyKind) -> PolicyVersion | None:
        """The tenant's default policy of a kind, or ``None``.

        Raises:
            Damaged: it was changed in the database.
        """
        values = {"tenant": tenant, "kind": kind}
        row = self._database.read(lambda connection: connection.execute(_DEFAULT, values).first())
        return None if row is None else self._checked(row)

    def list(self, tenant: str) -> Sequence[PolicyVersion]:
        """The version in force of each policy, by id."""
        query = _query(tenant).where(_V.version == _P.version).order_by(_P.id)
        return [self._checked(row) for row in self._database.read(lambda c: c.execute(query).all())]

    def history(self, tenant: str, id: str) -> Sequence[PolicyVersion]:
        """All versions of a policy, the newest first.

        Raises:
            NotFound: there is none.
        """
        query = _query(tenant).where(_P.id == id).order_by(_V.version.desc())
        rows = self._database.read(lambda connection: connection.execute(query).all())
        if not rows:
            raise unknown("policy")
        return [self._checked(row) for row in rows]

    def rollback(self, tenant: str, id: str, version: int, *, author: str = "system") -> PolicyVersion:
        """Bring back an older version's text, as a new version: a version number always means one text.

        Raises:
            NotFound: there is no such policy or version.
            QuotaExceeded: no bytes are left for it.
        """
        names.identifier(author, "author")
        old = self.get(tenant, id, version)
        return self._add(tenant, id, old.kind, old.text, author, version)

    def set_default(self, tenant: str, id: str) -> PolicyVersion:
        """Make a policy the tenant's default of its kind.

        Raises:
            NotFound: there is no such policy.
        """
        kind = self.get(tenant, id).kind

        def work(connection: Connection) -> None:
            owner, uid = _owner(connection, tenant)
            of_kind = sa.select(*_P.__table__.columns).where(_P.tenant_id == owner, _P.kind == kind)
            rows = connection.execute(of_kind.order_by(_P.id).with_for_update()).all()
            # The old default goes first: there is never a moment with two.
            for row in sorted(rows, key=lambda row: row.id == id):
                if row.is_default or row.id == id:
                    self._point(connection, owner, uid, row.id, row.kind, row.version, int(row.id == id))

        self._database.write(work)
        return self.get(tenant, id)

    def clear_default(self, tenant: str, kind: PolicyKind) -> None:
        """The tenant has no default policy of this kind any more."""

        def work(connection: Connection) -> None:
            owner, uid = _owner(connection, tenant)
            where = (_P.tenant_id == owner, _P.kind == kind, _P.is_default == 1)
            row = connection.execute(sa.select(*_P.__table__.columns).where(*where).with_for_update()).first()
            if row is not None:
                self._point(connection, owner, uid, row.id, row.kind, row.version, 0)

        self._database.write(work)

    def delete(self, tenant: str, id: str) -> None:
        """Remove a policy with its versions.

        Raises:
            NotFound: there is none.
            Conflict: a secret names it.
        """
        used = Conflict(f"secrets are released by the policy {id}", id="verdict.store.policy.used",
                        remedy="store these secrets with another policy, or delete them, first")  # fmt: skip

        def work(connection: Connection) -> None:
            owner, _ = _owner(connection, tenant)
            where = (_V.tenant_id == owner, _V.id == id)
            row = connection.execute(
                sa.select(_P.version).where(_P.tenant_id == owner, _P.id == id).with_for_update()
            ).first()
            if row is None:
                raise unknown("policy")
            sizes = connection.execute(sa.select(_V.size).where(*where)).scalars().all()
            with conflicts(used):
                connection.execute(sa.delete(_V).where(*where))
                connection.execute(sa.delete(_P).where(_P.tenant_id == owner, _P.id == id))
            charge(connection, owner, policies=-1, bytes=-sum(sizes))

        self._database.write(work)

    # --- inside

    def _add(
        self,
        tenant: str,
        id: str,
        kind: PolicyKind,
        text: str,
        author: str,
        restored_from: int | None,
        expected: int | None = None,
    ) -> PolicyVersion:
        size, digest, created = len(text.encode()), sha256(text.encode()).hexdigest(), self._database.now()

        def work(connection: Connection) -> tuple[int, bool]:
            owner, uid = _owner(connection, tenant, alone=True)
            where = (_P.tenant_id == owner, _P.id == id)
            row = connection.execute(sa.select(*_P.__table__.columns).where(*where)).first()
            if row is not None and row.kind != kind:
                raise Conflict(f"the policy {id} is of another kind", id="verdict.store.policy.kind", found=row.kind,
                               expected=kind, remedy="choose another id")  # fmt: skip
            there = 0 if row is None else row.version
            if expected not in (None, there):
                raise Conflict(f"the policy {id} was changed meanwhile", id="verdict.store.policy.changed",
                               found=f"version {there}", expected=f"version {expected}",
                               remedy="read it again, and decide again")  # fmt: skip
            charge(connection, owner, policies=int(row is None), bytes=size)
            version = 1 if row is None else row.version + 1
            is_default = 0 if row is None else row.is_default
            self._point(connection, owner, uid, id, kind, version, is_default, new=row is None)
            values = {"version": version, "text": text, "sha256": digest, "size": size, "author": author,
                      "created": created, "restored_from": restored_from}  # fmt: skip
            mac = self._keyring.mac(*_version_parts(uid, id, **values))
            connection.execute(sa.insert(_V).values(tenant_id=owner, id=id, mac=mac, **values))
            return version, bool(is_default)

        version, default = self._database.write(work)
        return PolicyVersion(id, kind, version, text, digest, author, created, restored_from, default)

    def _point(
        self,
        connection: Connection,
        owner: int,
        uid: str,
        id: str,
        kind: str,
        version: int,
        is_default: int,
        *,
        new: bool = False,
    ) -> None:
        mac = self._keyring.mac("policy", uid, id, kind, version, is_default)
        values = {"version": version, "is_default": is_default, "mac": mac}
        if new:
            connection.execute(sa.insert(_P).values(tenant_id=owner, id=id, kind=kind, **values))
        else:
            connection.execute(sa.update(_P).where(_P.tenant_id == owner, _P.id == id).values(**values))

    def _checked(self, row: Any) -> PolicyVersion:
        self._keyring.check(row.pointer_mac, "policy", row.uid, row.id, row.kind, row.newest, row.is_default)
        fields = {name: getattr(row, name) for name in
                  ("version", "text", "sha256", "size", "author", "created", "restored_from")}  # fmt: skip
        self._keyring.check(row.mac, *_version_parts(row.uid, row.id, **fields))
        del fields["size"]
        return PolicyVersion(id=row.id, kind=row.kind, default=bool(row.is_default), **fields)


def _version_parts(uid: str, id: str, **fields: Any) -> tuple[object, ...]:
    return ("policy version", uid, id, *(f"{name}={fields[name]}" for name in sorted(fields)))


def _query(tenant: str | None = None) -> Any:
    return (
        sa.select(
            TenantRow.uid, _P.kind, _P.is_default, _P.version.label("newest"), _P.mac.label("pointer_mac"),
            _V.id, _V.version, _V.text, _V.sha256, _V.size, _V.author, _V.created, _V.restored_from, _V.mac,
        )
        .join(_P, sa.and_(_P.tenant_id == _V.tenant_id, _P.id == _V.id))
        .join(TenantRow, TenantRow.id == _P.tenant_id)
        .where(OF_TENANT if tenant is None else tenant_is(tenant))
    )  # fmt: skip


# Made once: every decision runs them.
_OF_ID = _query().where(_P.id == sa.bindparam("id", type_=sa.Text()))
_GET = {
    True: _OF_ID.where(_V.version == _P.version),
    False: _OF_ID.where(_V.version == sa.bindparam("version", type_=sa.Integer())),
}
_DEFAULT = _query().where(
    _P.kind == sa.bindparam("kind", type_=sa.Text()), _P.is_default == 1, _V.version == _P.version
)


def _owner(connection: Connection, tenant: str, *, alone: bool = False) -> tuple[int, str]:
    id = tenant_id(connection, tenant, alone=alone)
    return id, connection.execute(sa.select(TenantRow.uid).where(TenantRow.id == id)).scalar_one()
