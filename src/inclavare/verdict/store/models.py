"""The tables. Times are integers, microseconds since 1970; JSON is canonical text (RFC 8785).

The migrations make the same tables step by step; a test compares the two.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

import sqlalchemy as sa
from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Dialect,
    ForeignKey,
    ForeignKeyConstraint,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LATEST = 10**15 * 200


class Instant(TypeDecorator[datetime]):
    """An aware time as a 64-bit integer: the same order and the same precision in both databases."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> int | None:
        return None if value is None else (value - _EPOCH) // timedelta(microseconds=1)

    def process_result_value(self, value: int | None, dialect: Dialect) -> datetime | None:
        # Whatever else the column may hold, what comes out is a time.
        return None if value is None else _EPOCH + timedelta(microseconds=min(max(value, 0), _LATEST))


class Base(DeclarativeBase):
    """All tables of the store."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_N_label)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {datetime: Instant, bytes: LargeBinary, int: BigInteger, str: Text}


def table(model: type[Base]) -> sa.Table:
    """A model's table: statements on it, made once, cost a fraction of those on the model."""
    found = model.__table__
    assert isinstance(found, sa.Table)
    return found


def _unique_where(condition: str, name: str, *columns: str) -> Index:
    where = text(condition)
    return Index(name, *columns, unique=True, sqlite_where=where, postgresql_where=where)


def _serial() -> Mapped[int]:
    # SQLite gives out row ids for INTEGER PRIMARY KEY only.
    kind = BigInteger().with_variant(Integer, "sqlite")
    return mapped_column(kind, Identity(always=False), primary_key=True)


def _tenant(*, primary_key: bool = False) -> Mapped[int]:
    return mapped_column(ForeignKey("tenants.id", ondelete="RESTRICT"), primary_key=primary_key)


class TenantRow(Base):
    """A deleted tenant's row stays, for its audit trail; its name is free again."""

    __tablename__ = "tenants"
    __table_args__ = (
        _unique_where("deleted IS NULL", "uq_tenants_name", "name"),
        CheckConstraint("used_secrets >= 0 AND used_bytes >= 0 AND used_policies >= 0", name="used"),
    )

    id: Mapped[int] = _serial()
    uid: Mapped[str] = mapped_column(String(32), unique=True)
    name: Mapped[str] = mapped_column(String(63))
    created: Mapped[datetime]
    deleted: Mapped[datetime | None]
    quota_secrets: Mapped[int]
    quota_bytes: Mapped[int]
    quota_policies: Mapped[int]
    quota_requests: Mapped[int]
    used_secrets: Mapped[int] = mapped_column(server_default=text("0"))
    used_bytes: Mapped[int] = mapped_column(server_default=text("0"))
    used_policies: Mapped[int] = mapped_column(server_default=text("0"))


class RootKeyRow(Base):
    """A generation of the root key, which data keys are wrapped under."""

    __tablename__ = "root_keys"

    generation: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    created: Mapped[datetime]


class StoreRow(Base):
    """The store itself: its name for ever, and the key that authenticates rows which are not encrypted."""

    __tablename__ = "store"
    __table_args__ = (CheckConstraint("id = 1", name="single"),)

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    uid: Mapped[str] = mapped_column(String(32))
    created: Mapped[datetime]
    generation: Mapped[int] = mapped_column(ForeignKey("root_keys.generation", ondelete="RESTRICT"))
    wrapped_key: Mapped[bytes]


class RootKeySlotRow(Base):
    """A generation of the root key, wrapped under one master key."""

    __tablename__ = "root_key_slots"

    generation: Mapped[int] = mapped_column(ForeignKey("root_keys.generation", ondelete="RESTRICT"), primary_key=True)
    master: Mapped[str] = mapped_column(String(64), primary_key=True)
    kind: Mapped[str] = mapped_column(String(16))
    parameters: Mapped[str]
    wrapped: Mapped[bytes]


class PolicyRow(Base):
    __tablename__ = "policies"
    __table_args__ = (_unique_where("is_default = 1", "uq_policies_default", "tenant_id", "kind"),)

    tenant_id: Mapped[int] = _tenant(primary_key=True)
    id: Mapped[str] = mapped_column(String(128), primary_key=True)
    kind: Mapped[str] = mapped_column(String(16))
    version: Mapped[int] = mapped_column(Integer)
    is_default: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    mac: Mapped[bytes]


class PolicyVersionRow(Base):
    """Never changed; removed with its policy only."""

    __tablename__ = "policy_versions"
    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "id"], ["policies.tenant_id", "policies.id"], ondelete="RESTRICT"),
    )

    tenant_id: Mapped[int] = mapped_column(primary_key=True)
    id: Mapped[str] = mapped_column(String(128), primary_key=True)
    version: Mapped[int] = mapped_column(Integer, primary_key=True)
    text: Mapped[str]
    sha256: Mapped[str] = mapped_column(String(64))
    size: Mapped[int]
    author: Mapped[str] = mapped_column(String(128))
    created: Mapped[datetime]
    restored_from: Mapped[int | None] = mapped_column(Integer)
    mac: Mapped[bytes]


class SecretRow(Base):
    """A path. It stays when its versions are deleted, so that no version number comes twice."""

    __tablename__ = "secrets"

    tenant_id: Mapped[int] = _tenant(primary_key=True)
    path: Mapped[str] = mapped_column(String(386), primary_key=True)
    #: The newest version that is kept, 0 if none is; and the highest number that was given out.
    version: Mapped[int] = mapped_column(Integer)
    last: Mapped[int] = mapped_column(Integer)


class SecretVersionRow(Base):
    """A value, encrypted under a data key of its own, which is wrapped under a root key."""

    __tablename__ = "secret_versions"
    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "path"], ["secrets.tenant_id", "secrets.path"], ondelete="RESTRICT"),
        # NULL, the tenant's default policy, is not looked up.
        ForeignKeyConstraint(["tenant_id", "policy"], ["policies.tenant_id", "policies.id"], ondelete="RESTRICT"),
        CheckConstraint("released_to IS NULL OR release_once = 1", name="released"),
        Index("ix_secret_versions_generation", "generation"),
        Index("ix_secret_versions_policy", "tenant_id", "policy"),
    )

    tenant_id: Mapped[int] = mapped_column(primary_key=True)
    path: Mapped[str] = mapped_column(String(386), primary_key=True)
    version: Mapped[int] = mapped_column(Integer, primary_key=True)
    policy: Mapped[str | None] = mapped_column(String(128))
    release_once: Mapped[int] = mapped_column(Integer)
    size: Mapped[int]
    metadata_json: Mapped[str]
    created: Mapped[datetime]
    released_to: Mapped[str | None] = mapped_column(String(128))
    released: Mapped[datetime | None]
    acknowledged: Mapped[datetime | None]
    generation: Mapped[int] = mapped_column(ForeignKey("root_keys.generation", ondelete="RESTRICT"))
    wrapped_key: Mapped[bytes]
    sealed: Mapped[bytes]


class ReferenceRow(Base):
    __tablename__ = "reference_bundles"

    tenant_id: Mapped[int] = _tenant(primary_key=True)
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    image: Mapped[str | None] = mapped_column(Text)
    not_before: Mapped[datetime | None]
    not_after: Mapped[datetime | None]
    metadata_json: Mapped[str]
    bundle: Mapped[bytes]
    size: Mapped[int]
    registered: Mapped[datetime]
    registered_by: Mapped[str] = mapped_column(String(128))
    revoked: Mapped[datetime | None]
    revoked_reason: Mapped[str | None]
    mac: Mapped[bytes]


class SignerRow(Base):
    __tablename__ = "reference_signers"

    tenant_id: Mapped[int] = _tenant(primary_key=True)
    name: Mapped[str] = mapped_column(String(128), primary_key=True)
    public_key: Mapped[str]
    created: Mapped[datetime]
    mac: Mapped[bytes]


class SessionRow(Base):
    """Under the hash of its id: who reads the database can take over no session."""

    __tablename__ = "sessions"
    __table_args__ = (UniqueConstraint("nonce"), Index("ix_sessions_expires", "expires"))

    id_hash: Mapped[bytes] = mapped_column(primary_key=True)
    tenant_id: Mapped[int] = _tenant()
    tee: Mapped[str] = mapped_column(String(32))
    nonce: Mapped[bytes]
    state: Mapped[str] = mapped_column(String(8))
    created: Mapped[datetime]
    expires: Mapped[datetime]
    holder: Mapped[str | None] = mapped_column(String(128))
    claims: Mapped[str | None]
    token: Mapped[str | None]


class EvidenceRow(Base):
    __tablename__ = "evidence"
    __table_args__ = (Index("ix_evidence_kept", "tenant_id", "kept"),)

    tenant_id: Mapped[int] = _tenant(primary_key=True)
    digest: Mapped[str] = mapped_column(String(128), primary_key=True)
    tee: Mapped[str] = mapped_column(String(32))
    kept: Mapped[datetime]
    size: Mapped[int]
    envelope: Mapped[bytes]


class TokenRow(Base):
    __tablename__ = "admin_tokens"
    __table_args__ = (Index("ix_admin_tokens_expires", "expires"),)

    jti: Mapped[str] = mapped_column(String(43), primary_key=True)
    tenant_id: Mapped[int] = _tenant()
    name: Mapped[str] = mapped_column(String(128))
    role: Mapped[str] = mapped_column(String(16))
    created: Mapped[datetime]
    expires: Mapped[datetime]
    revoked: Mapped[datetime | None]


class SigningKeyRow(Base):
    __tablename__ = "signing_keys"
    __table_args__ = (
        _unique_where("retires IS NULL", "uq_signing_keys_current", "kind"),
        Index("ix_signing_keys_generation", "generation"),
    )

    kid: Mapped[str] = mapped_column(String(43), primary_key=True)
    kind: Mapped[str] = mapped_column(String(16))
    algorithm: Mapped[str] = mapped_column(String(16))
    created: Mapped[datetime]
    retires: Mapped[datetime | None]
    generation: Mapped[int] = mapped_column(ForeignKey("root_keys.generation", ondelete="RESTRICT"))
    wrapped_key: Mapped[bytes]
    sealed: Mapped[bytes]


class AuditRow(Base):
    """Append-only: triggers refuse to update and to delete."""

    __tablename__ = "audit_entries"
    __table_args__ = (Index("ix_audit_entries_time", "tenant_id", "time"),)

    tenant_id: Mapped[int] = _tenant(primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    time: Mapped[datetime]
    actor: Mapped[str] = mapped_column(String(256))
    action: Mapped[str] = mapped_column(String(128))
    decision: Mapped[str] = mapped_column(String(64))
    detail: Mapped[str]
    previous: Mapped[bytes]
    hash: Mapped[bytes]


class AuditHeadRow(Base):
    """The signed end of a chain."""

    __tablename__ = "audit_heads"

    tenant_id: Mapped[int] = _tenant(primary_key=True)
    seq: Mapped[int]
    hash: Mapped[bytes]
    kid: Mapped[str] = mapped_column(String(43))
    signature: Mapped[bytes]


class CheckpointRow(Base):
    """All chains' heads at one time, signed and chained. Append-only like the entries."""

    __tablename__ = "audit_checkpoints"

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    body: Mapped[str]
    hash: Mapped[bytes]
    kid: Mapped[str] = mapped_column(String(43))
    signature: Mapped[bytes]
