"""Bundles of reference values, as they were signed, and the keys of those who may sign them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from . import names
from .crypto import damaged
from .database import Database, conflicts
from .errors import Conflict, Invalid, unknown
from .keyring import Keyring
from .models import ReferenceRow, SignerRow, TenantRow
from .tenants import OF_TENANT, charge, tenant_id, tenant_is
from .types import ReferenceInfo, Signer

_R, _S = ReferenceRow, SignerRow


class ReferenceBundles:
    """The reference values of all tenants; each method sees those of one.

    Who registers a bundle has verified its signature; who decides by it verifies it again, with :meth:`signers`.
    """

    def __init__(self, database: Database, keyring: Keyring) -> None:
        self._database = database
        self._keyring = keyring

    def register(
        self,
        tenant: str,
        bundle: bytes,
        *,
        image: str | None = None,
        not_before: datetime | None = None,
        not_after: datetime | None = None,
        metadata: Mapping[str, Any] | None = None,
        by: str = "system",
    ) -> ReferenceInfo:
        """Store a bundle under its SHA-256.

        Args:
            bundle: at most 4 MiB, kept byte for byte.
            image: what image its values are of.
            not_before, not_after: its validity, aware times.
            metadata: JSON, what lists show.
            by: who registered it.

        Raises:
            Invalid: too large, or one of the others is not as it should be.
            NotFound: no such tenant.
            Conflict: it is registered already (and perhaps revoked: a revoked bundle does not come back).
            QuotaExceeded: no bytes are left for it.
        """
        names.size(bundle, "bundle", names.MAX_BUNDLE)
        names.identifier(by, "author")
        if image is not None:
            names.text(image, "image", 512, least=1)
        for moment in (not_before, not_after):
            if moment is not None and moment.tzinfo is None:
                raise Invalid("a time without its zone", id="verdict.store.reference.validity", found=moment)
        values: dict[str, Any] = {
            "digest": sha256(bundle).hexdigest(),
            "image": image,
            "not_before": not_before and not_before.astimezone(UTC),
            "not_after": not_after and not_after.astimezone(UTC),
            "metadata_json": names.canonical(dict(metadata or {}), "metadata", names.MAX_DETAIL),
            "size": len(bundle),
            "registered": self._database.now(),
            "registered_by": by,
            "revoked": None,
            "revoked_reason": None,
        }
        there = Conflict(
            "this bundle of reference values is registered already",
            id="verdict.store.reference.exists",
            found=values["digest"],
            remedy="a revoked bundle does not come back: sign a new one",
        )

        def work(connection: Connection) -> None:
            owner = tenant_id(connection, tenant)
            uid = connection.execute(sa.select(TenantRow.uid).where(TenantRow.id == owner)).scalar_one()
            charge(connection, owner, bytes=len(bundle))
            mac = self._keyring.mac(*_parts(uid, values))
            with conflicts(there):
                connection.execute(sa.insert(_R).values(tenant_id=owner, bundle=bundle, mac=mac, **values))

        self._database.write(work)
        return self.get(tenant, values["digest"])[0]

    def get(self, tenant: str, digest: str) -> tuple[ReferenceInfo, bytes]:
        """A bundle and what is known of it.

        Raises:
            NotFound: there is none; no matter whether it is another tenant's.
            Damaged: it was changed in the database.
        """
        query = _query(tenant, _R.bundle).where(_R.digest == digest)
        row = self._database.read(lambda connection: connection.execute(query).first())
        if row is None:
            raise unknown("reference")
        return self._checked(row), row.bundle

    def list(self, tenant: str) -> Sequence[ReferenceInfo]:
        """All bundles, revoked and expired ones too, the newest first."""
        query = _query(tenant).order_by(_R.registered.desc(), _R.digest)
        return [self._checked(row) for row in self._database.read(lambda c: c.execute(query).all())]

    def active(self, tenant: str) -> Sequence[tuple[ReferenceInfo, bytes]]:
        """The bundles that are valid now and not revoked, in the order in which they were registered.

        Raises:
            Damaged: one was changed in the database.
        """
        now = self._database.now()
        query = _query(tenant, _R.bundle).where(
            _R.revoked.is_(None),
            sa.or_(_R.not_before.is_(None), _R.not_before <= now),
            sa.or_(_R.not_after.is_(None), _R.not_after > now),
        )
        rows = self._database.read(lambda c: c.execute(query.order_by(_R.registered, _R.digest)).all())
        return [(self._checked(row), row.bundle) for row in rows]

    def revision(self, tenant: str) -> str:
        """Changes whenever :meth:`active` might, except by time: for caches of parsed bundles."""
        found = self._database.read(lambda connection: connection.execute(_REVISION, {"tenant": tenant}).first())
        return sha256(repr(found).encode()).hexdigest()

    def revoke(self, tenant: str, digest: str, reason: str) -> ReferenceInfo:
        """Take a bundle out of all decisions from now on, for ever.

        Raises:
            Invalid: no reason.
            NotFound: there is none.
            Conflict: it was revoked before.
        """
        names.text(reason, "reason", 1000, least=1)
        now = self._database.now()

        def work(connection: Connection) -> None:
            row = connection.execute(_query(tenant).where(_R.digest == digest).with_for_update(of=_R)).first()
            if row is None:
                raise unknown("reference")
            self._checked(row)
            if row.revoked is not None:
                raise Conflict("this bundle was revoked before", id="verdict.store.reference.revoked",
                               found=row.revoked_reason)  # fmt: skip
            values = {**row._mapping, "revoked": now, "revoked_reason": reason}
            mac = self._keyring.mac(*_parts(row.uid, values))
            where = (_R.tenant_id == row.tenant_id, _R.digest == digest)
            connection.execute(sa.update(_R).where(*where).values(revoked=now, revoked_reason=reason, mac=mac))

        self._database.write(work)
        return self.get(tenant, digest)[0]

    # --- who may sign

    def trust(self, tenant: str, name: str, public_key: str) -> Signer:
        """Take bundles that this key signed.

        Args:
            public_key: PEM, SubjectPublicKeyInfo.

        Raises:
            Invalid: not a name, or no public key.
            NotFound: no such tenant.
            Conflict: the name is taken.
        """
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

        names.identifier(name, "signer")
        try:
            key = load_pem_public_key(public_key.encode())
            pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
        except (ValueError, UnsupportedAlgorithm):
            raise Invalid("not a public key", id="verdict.store.signer.key", expected="PEM, BEGIN PUBLIC KEY") from None
        created = self._database.now()
        taken = Conflict(f"there is a signer {name} already", id="verdict.store.signer.exists",
                         remedy="remove it first, or choose another name")  # fmt: skip

        def work(connection: Connection) -> None:
            owner = tenant_id(connection, tenant)
            uid = connection.execute(sa.select(TenantRow.uid).where(TenantRow.id == owner)).scalar_one()
            mac = self._keyring.mac("signer", uid, name, pem, created)
            with conflicts(taken):
                connection.execute(
                    sa.insert(_S).values(tenant_id=owner, name=name, public_key=pem, created=created, mac=mac)
                )

        self._database.write(work)
        return Signer(name, pem, created)

    def distrust(self, tenant: str, name: str) -> None:
        """Take no more bundles of this signer; those registered are judged by it no more, either.

        Raises:
            NotFound: there is none of this name.
        """

        def work(connection: Connection) -> None:
            owner = tenant_id(connection, tenant)
            where = (_S.tenant_id == owner, _S.name == name)
            if connection.execute(sa.delete(_S).where(*where)).rowcount != 1:
                raise unknown("signer")

        self._database.write(work)

    def signers(self, tenant: str) -> Sequence[Signer]:
        """The keys whose bundles the tenant takes, by name.

        Raises:
            Damaged: one was exchanged in the database.
        """
        query = (
            sa.select(TenantRow.uid, _S.name, _S.public_key, _S.created, _S.mac)
            .join(TenantRow, TenantRow.id == _S.tenant_id)
            .where(tenant_is(tenant))
            .order_by(_S.name)
        )
        rows = self._database.read(lambda connection: connection.execute(query).all())
        for row in rows:
            self._keyring.check(row.mac, "signer", row.uid, row.name, row.public_key, row.created)
        return [Signer(row.name, row.public_key, row.created) for row in rows]

    def _checked(self, row: Any) -> ReferenceInfo:
        fields = row._mapping
        self._keyring.check(row.mac, *_parts(row.uid, fields))
        if "bundle" in fields and sha256(row.bundle).hexdigest() != row.digest:
            raise damaged()
        return ReferenceInfo(
            row.digest, row.image, row.not_before, row.not_after, json.loads(row.metadata_json), row.size,
            row.registered, row.registered_by, row.revoked, row.revoked_reason,
        )  # fmt: skip


_FIELDS = ("digest", "image", "metadata_json", "not_after", "not_before", "registered", "registered_by", "revoked",
           "revoked_reason", "size")  # fmt: skip


def _parts(uid: str, fields: Mapping[str, Any]) -> tuple[object, ...]:
    return ("reference bundle", uid, *(f"{name}={fields[name]!r}" for name in _FIELDS))


def _query(tenant: str, *more: Any) -> Any:
    columns = (getattr(_R, name) for name in (*_FIELDS, "tenant_id", "mac"))
    joined = sa.select(TenantRow.uid, *columns, *more).join(TenantRow, TenantRow.id == _R.tenant_id)
    return joined.where(tenant_is(tenant))


def _aggregate(column: Any, owner: Any) -> Any:
    return sa.select(column).where(owner == TenantRow.id).correlate(TenantRow).scalar_subquery()


# Made once: every decision asks for it.
_REVISION = sa.select(
    TenantRow.uid,
    *(
        _aggregate(column, _R.tenant_id)
        for column in (sa.func.count(), sa.func.max(_R.registered), sa.func.count(_R.revoked), sa.func.max(_R.revoked))
    ),
    *(_aggregate(column, _S.tenant_id) for column in (sa.func.count(), sa.func.max(_S.created))),
).where(OF_TENANT)
