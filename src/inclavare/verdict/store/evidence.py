"""The newest evidence of each tenant, kept so that a changed policy can be tried out against it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from . import names
from .database import Database, upsert
from .errors import unknown
from .models import EvidenceRow, TenantRow
from .tenants import tenant_id, tenant_is
from .types import Evidence

_E = EvidenceRow
_USED = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(_E.size), 0)).where(
    _E.tenant_id == sa.bindparam("owner")
)
_INFO = (_E.digest, _E.tee, _E.kept, _E.size)


class EvidenceRing:
    """So much evidence for each tenant, and a quarter more at times; the oldest goes first.

    Args:
        limit: pieces for each tenant.
        bytes: for each tenant, all together.
    """

    def __init__(self, database: Database, *, limit: int = 200, bytes: int = 16 << 20) -> None:
        self._database = database
        self._limit = limit
        self._bytes = bytes

    def keep(self, tenant: str, digest: str, envelope: bytes, *, tee: str = "unknown") -> None:
        """Keep evidence; what is known already becomes the newest.

        Args:
            digest: of the evidence, hexadecimal.
            envelope: at most 1 MiB.

        Raises:
            Invalid: not a digest, or too large.
            NotFound: no such tenant.
        """
        names.digest(digest, "digest")
        names.identifier(tee, "tee")
        names.size(envelope, "evidence", min(names.MAX_EVIDENCE, self._bytes))
        now = self._database.now()

        def work(connection: Connection) -> None:
            # Two who keep at the same time must not both count without the other's.
            owner = tenant_id(connection, tenant, alone=True)
            values = {"tee": tee[:32], "kept": now, "size": len(envelope), "envelope": envelope}
            kept = upsert(connection, _E).values(tenant_id=owner, digest=digest, **values)
            connection.execute(kept.on_conflict_do_update(index_elements=["tenant_id", "digest"], set_=values))
            count, total = connection.execute(_USED, {"owner": owner}).one()
            # Not each time, but when a quarter is too much: going through the ring takes a while.
            if count <= self._limit + self._limit // 4 and total <= self._bytes:
                return
            total = 0
            query = sa.select(_E.digest, _E.size).where(_E.tenant_id == owner)
            doomed = []
            for number, row in enumerate(connection.execute(query.order_by(_E.kept.desc(), _E.digest)).all(), 1):
                total += row.size
                if number > self._limit or total > self._bytes:
                    doomed.append(row.digest)
            if doomed:
                connection.execute(sa.delete(_E).where(_E.tenant_id == owner, _E.digest.in_(doomed)))

        self._database.write(work, durable=False)

    def get(self, tenant: str, digest: str) -> Evidence:
        """Evidence with its envelope.

        Raises:
            NotFound: there is none; no matter whether it is another tenant's.
        """
        query = _query(tenant, *_INFO, _E.envelope).where(_E.digest == digest)
        row = self._database.read(lambda connection: connection.execute(query).first())
        if row is None:
            raise unknown("evidence")
        return Evidence(row.digest, row.tee, row.kept, row.size, row.envelope)

    def list(self, tenant: str) -> Sequence[Evidence]:
        """What is kept, without the envelopes, the newest first."""
        query = _query(tenant, *_INFO).order_by(_E.kept.desc(), _E.digest).limit(self._limit)
        rows = self._database.read(lambda connection: connection.execute(query).all())
        return [Evidence(row.digest, row.tee, row.kept, row.size) for row in rows]


def _query(tenant: str, *columns: Any) -> Any:
    return sa.select(*columns).join(TenantRow, TenantRow.id == _E.tenant_id).where(tenant_is(tenant))
