"""Admin tokens: the store knows their ``jti``, never the token, and so can revoke them."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from datetime import datetime
from typing import Any, get_args

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from . import names
from .database import Database
from .errors import Invalid, unknown
from .models import TenantRow, TokenRow
from .tenants import tenant_id, tenant_is
from .types import Role, TokenInfo

_T = TokenRow
_COLUMNS = (_T.jti, TenantRow.name.label("tenant"), _T.name, _T.role, _T.created, _T.expires, _T.revoked)


class Tokens:
    """The admin tokens of all tenants, and of the service itself (tenant :data:`~inclavare.verdict.store.SYSTEM`)."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, tenant: str, name: str, role: Role, expires: datetime) -> TokenInfo:
        """Write down a token before it is signed.

        Raises:
            Invalid: not a name or a role, or expired already.
            NotFound: no such tenant.
        """
        names.identifier(name, "token")
        now = self._database.now()
        if role not in get_args(Role):
            raise Invalid("not a role", id="verdict.store.token.role", found=repr(role),
                          expected=", ".join(get_args(Role)))  # fmt: skip
        if expires <= now:
            raise Invalid("the token would be expired", id="verdict.store.token.expires", found=expires)
        info = TokenInfo(secrets.token_urlsafe(16), tenant, name, role, now, expires)
        values = {"jti": info.jti, "name": name, "role": role, "created": now, "expires": expires}

        def work(connection: Connection) -> None:
            connection.execute(sa.insert(_T).values(tenant_id=tenant_id(connection, tenant), **values))

        self._database.write(work)
        return info

    def find(self, jti: str) -> TokenInfo | None:
        """A token that is neither expired nor revoked, whose ever it is: to authenticate by, before a tenant is known.

        A signed token whose ``jti`` is not found here must be refused; so must one whose tenant or role differs.
        """
        values = {"jti": jti, "now": self._database.now()}
        row = self._database.read(lambda connection: connection.execute(_FIND, values).first())
        return None if row is None else TokenInfo(**row._mapping)

    def is_revoked(self, jti: str) -> bool:
        """Whether a token must be refused: revoked, expired, of a deleted tenant, or not known at all."""
        return self.find(jti) is None

    def list(self, tenant: str) -> Sequence[TokenInfo]:
        """All tokens of a tenant that are not purged yet, by name."""
        query = _query().where(tenant_is(tenant)).order_by(_T.name, _T.created)
        rows = self._database.read(lambda connection: connection.execute(query).all())
        return [TokenInfo(**row._mapping) for row in rows]

    def revoke(self, tenant: str, jti: str) -> TokenInfo:
        """Refuse a token from now on. Revoking again changes nothing.

        Raises:
            NotFound: there is none; no matter whether it is another tenant's.
        """
        now = self._database.now()

        def work(connection: Connection) -> Any:
            of_tenant = sa.select(TenantRow.id).where(tenant_is(tenant)).scalar_subquery()
            where = (_T.jti == jti, _T.tenant_id == of_tenant, _T.revoked.is_(None))
            connection.execute(sa.update(_T).where(*where).values(revoked=now))
            return connection.execute(_query().where(_T.jti == jti, tenant_is(tenant))).first()

        row = self._database.write(work)
        if row is None:
            raise unknown("token")
        return TokenInfo(**row._mapping)

    def purge(self) -> int:
        """Forget expired tokens of all tenants: they are refused for being expired. Returns how many."""
        query = sa.delete(_T).where(_T.expires <= self._database.now())
        return self._database.write(lambda connection: connection.execute(query).rowcount)


def _query() -> Any:
    return sa.select(*_COLUMNS).join(TenantRow, TenantRow.id == _T.tenant_id)


_FIND = _query().where(
    _T.jti == sa.bindparam("jti"), _T.revoked.is_(None), _T.expires > sa.bindparam("now"), TenantRow.deleted.is_(None)
)
