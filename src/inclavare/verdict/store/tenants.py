"""Tenants: names, quotas, and the way from a name to a row that every other part takes."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from . import names
from .database import Database, conflicts
from .errors import Conflict, Invalid, QuotaExceeded, unknown
from .models import (
    Base,
    EvidenceRow,
    PolicyRow,
    PolicyVersionRow,
    ReferenceRow,
    SecretRow,
    SecretVersionRow,
    SessionRow,
    SignerRow,
    TenantRow,
    TokenRow,
    table,
)
from .types import Quotas, Tenant

if TYPE_CHECKING:
    from .audit import Audit

_T = table(TenantRow).c
#: What goes with a tenant, in the order in which the foreign keys let it; its audit trail stays.
_OWNED: tuple[type[Base], ...] = (
    SecretVersionRow, SecretRow, PolicyVersionRow, PolicyRow, ReferenceRow, SignerRow, SessionRow, EvidenceRow,
    TokenRow,
)  # fmt: skip


class Tenants:
    """The tenants of a store."""

    def __init__(self, database: Database, audit: Audit) -> None:
        self._database = database
        self._audit = audit

    def ensure_system(self) -> None:
        """Make the system tenant, if this store is new."""
        query = sa.select(TenantRow.id).where(tenant_is(names.SYSTEM))
        if self._database.read(lambda connection: connection.execute(query).scalar()) is None:
            try:
                self.create(names.SYSTEM, quotas=Quotas(0, 0, 0, 0))
            except Conflict:
                pass  # another replica was quicker

    def create(self, name: str, *, quotas: Quotas | None = None) -> Tenant:
        """A new tenant, and the beginning of its audit trail.

        Raises:
            Invalid: not a tenant's name, or a negative quota.
            Conflict: the name is taken.
        """
        names.tenant(name, system=True)
        row = _new_row(name, quotas or Quotas(), self._database)
        taken = Conflict(f"there is a tenant {name} already", id="verdict.store.tenant.exists",
                         remedy="choose another name")  # fmt: skip

        key = self._audit.signing_key()

        def work(connection: Connection) -> None:
            with conflicts(taken):
                id = connection.execute(sa.insert(TenantRow).values(**row).returning(TenantRow.id)).scalar_one()
            self._audit.begin(connection, id, row["uid"], key)

        self._database.write(work)
        return self.get(name)

    def get(self, name: str) -> Tenant:
        """One tenant.

        Raises:
            NotFound: there is none of this name.
        """
        row = self._database.read(lambda connection: connection.execute(_GET, {"tenant": name}).first())
        if row is None:
            raise unknown("tenant")
        return _tenant(row)

    def list(self) -> Sequence[Tenant]:
        """All tenants, by name; the system tenant is not among them."""
        query = sa.select(*TenantRow.__table__.columns).where(
            TenantRow.deleted.is_(None), TenantRow.name != names.SYSTEM
        )
        rows = self._database.read(lambda connection: connection.execute(query.order_by(TenantRow.name)).all())
        return [_tenant(row) for row in rows]

    def set_quotas(self, name: str, quotas: Quotas) -> Tenant:
        """Other quotas. What a tenant has beyond them stays; it gets no more.

        Raises:
            Invalid: a negative quota.
            NotFound: there is no such tenant.
        """
        values = _quota_values(quotas)

        def work(connection: Connection) -> None:
            changed = connection.execute(
                sa.update(TenantRow).where(TenantRow.id == tenant_id(connection, name)).values(**values)
            )
            assert changed.rowcount == 1

        self._database.write(work)
        return self.get(name)

    def delete(self, name: str) -> None:
        """Remove a tenant with everything it has, except for its audit trail. Its name is free then.

        Raises:
            NotFound: there is no such tenant.
        """
        names.tenant(name)
        now = self._database.now()

        def work(connection: Connection) -> None:
            id = tenant_id(connection, name, removing=True)
            for owned in map(table, _OWNED):
                connection.execute(sa.delete(owned).where(owned.c.tenant_id == id))
            unused = {"used_secrets": 0, "used_bytes": 0, "used_policies": 0}
            connection.execute(sa.update(TenantRow).where(TenantRow.id == id).values(deleted=now, **unused))

        self._database.write(work)


def tenant_is(name: str) -> sa.ColumnElement[bool]:
    """Condition for queries that join the tenant: its name, and that it was not deleted."""
    return sa.and_(TenantRow.name == name, TenantRow.deleted.is_(None))


#: The same for statements that are made once: its name is the parameter ``tenant``.
OF_TENANT = sa.and_(_T.name == sa.bindparam("tenant", type_=sa.String()), _T.deleted.is_(None))
_GET = sa.select(*_T).where(OF_TENANT)

# Without the lock that a foreign key's check takes, a tenant could be deleted under a row that is being written.
_LOCKED = {
    (alone, removing): sa.select(_T.id)
    .where(OF_TENANT)
    .with_for_update(read=not (alone or removing), key_share=not removing)
    for alone in (False, True)
    for removing in (False, True)
}


def tenant_id(connection: Connection, name: str, *, alone: bool = False, removing: bool = False) -> int:
    """The row of a tenant, for writing: nobody deletes it until the transaction ends.

    Args:
        alone: wait for others who do the same, and let them wait.
        removing: wait for all who write something of this tenant.

    Raises:
        NotFound: there is none.
    """
    found = connection.execute(_LOCKED[alone, removing], {"tenant": name}).scalar()
    if found is None:
        raise unknown("tenant")
    return int(found)


def charge(connection: Connection, id: int, *, secrets: int = 0, bytes: int = 0, policies: int = 0) -> None:
    """Count what a tenant gets or, negative, gives back.

    Raises:
        QuotaExceeded: it may not have so much.
    """
    added = {"secrets": secrets, "bytes": bytes, "policies": policies}
    columns = TenantRow.__table__.c
    within = [
        columns[f"used_{name}"] + amount <= columns[f"quota_{name}"] for name, amount in added.items() if amount > 0
    ]
    values = {f"used_{name}": columns[f"used_{name}"] + amount for name, amount in added.items() if amount}
    if not values:
        return
    if connection.execute(sa.update(TenantRow).where(TenantRow.id == id, *within).values(**values)).rowcount == 1:
        return
    row = connection.execute(sa.select(*columns).where(columns.id == id)).one()
    for name, amount in added.items():
        used, quota = row._mapping[f"used_{name}"], row._mapping[f"quota_{name}"]
        if amount > 0 and used + amount > quota:
            raise QuotaExceeded(
                f"the tenant's quota of {name} is used up",
                id=f"verdict.store.quota.{name}",
                found=f"{used} in use, {amount} more",
                expected=f"at most {quota}",
                remedy="delete what is not needed any more, or have the quota raised",
            )
    raise AssertionError("unreachable")


def _new_row(name: str, quotas: Quotas, database: Database) -> dict[str, Any]:
    return {"uid": secrets.token_hex(16), "name": name, "created": database.now(), **_quota_values(quotas)}


def _quota_values(quotas: Quotas) -> dict[str, int]:
    values = asdict(quotas)
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 53:
            raise Invalid(f"not a quota of {name}", id="verdict.store.quota.value", found=value,
                          expected="a whole number, not negative")  # fmt: skip
    return {f"quota_{name}": value for name, value in values.items()}


def _tenant(row: Any) -> Tenant:
    quotas = Quotas(row.quota_secrets, row.quota_bytes, row.quota_policies, row.quota_requests)
    return Tenant(row.name, row.uid, row.created, quotas, row.used_secrets, row.used_bytes, row.used_policies)
