"""Backup and restore: the whole store in one file, as it was at one moment, encrypted and authenticated.

::

    magic (16 bytes) | length of the header (4 bytes, big endian) | header (canonical JSON) | chunks
    chunk: length of the ciphertext (4 bytes, big endian) | AES-256-GCM of MessagePack (table, columns, rows)

The chunks' key is derived from the root key, with a salt of the file's own; the root key is in the header, wrapped
under the master key as it is in the store. Chunks are numbered and the last one is marked in their nonces, and the
header is authenticated with each (the STREAM construction): a file that was changed, cut off or put together anew does
not open.

Sessions are not in it. A backup goes between SQLite and PostgreSQL.

What was in force later than the backup is unknown to it: restoring brings back tokens and reference bundles that were
revoked since. Release-once secrets that were free then may have been released since, so they come back as released,
unless the caller knows better.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import msgspec
import rfc8785
import sqlalchemy as sa
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sqlalchemy.engine import Connection

from . import crypto
from .database import Database
from .errors import Conflict, Damaged, Invalid, SchemaMismatch
from .keyring import Slot, unwrap
from .models import Base, SecretVersionRow, SessionRow
from .types import isoformat

if TYPE_CHECKING:
    from .master import MasterKey
    from .store import Store

_MAGIC = b"inclavare-vstore"
_VERSION = 1
_CHUNK = 256 << 10
_MAX_CHUNK = 64 << 20
_MAX_HEADER = 1 << 20
_PAGE = 500
#: Whom release-once secrets went to that were free when the backup was made.
RESTORED = "00"


class _SlotHeader(msgspec.Struct):
    master: str
    kind: str
    parameters: dict[str, Any]
    wrapped: str


class _Header(msgspec.Struct):
    format: int
    schema: str
    store: str
    created: str
    generation: int
    salt: str
    slots: list[_SlotHeader]


@dataclass(frozen=True, slots=True)
class BackupInfo:
    """What a backup says of itself; authenticated once it was restored or verified.

    Attributes:
        schema: version of the schema.
        store: the store's ``uid``.
        created: ISO 8601, UTC.
        rows: how many rows of which table.
    """

    schema: str
    store: str
    created: str
    rows: dict[str, int]


def backup(store: Store, path: Path) -> BackupInfo:
    """Write a backup while the service runs; the file (mode 0600) is there wholly or not at all.

    Raises:
        Invalid: the file cannot be written.
        Unavailable: the database cannot be reached.
    """
    from .migrations import head

    salt = secrets.token_bytes(32)
    generation, key = store.keyring.derive("backup", salt)
    header = {
        "format": _VERSION,
        "schema": head(),
        "store": store.keyring.store_uid,
        "created": isoformat(store.database.now()),
        "generation": generation,
        "salt": salt.hex(),
        "slots": [
            {"master": slot.master, "kind": slot.kind, "parameters": slot.parameters, "wrapped": slot.wrapped.hex()}
            for slot in store.keyring.slots()
            if slot.generation == generation
        ],
    }
    if not header["slots"]:
        raise Conflict("the root key was exchanged meanwhile", id="verdict.store.backup.rotation", remedy="try again")
    encoded = rfc8785.dumps(header)  # type: ignore[arg-type]
    rows: dict[str, int] = {}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(fd, "wb") as handle:
                handle.write(_MAGIC + len(encoded).to_bytes(4) + encoded)
                writer = _Writer(handle, key, encoded)
                store.database.read(lambda connection: _dump(connection, writer, rows), snapshot=True)
                writer.end()
                handle.flush()
                os.fsync(handle.fileno())
            temporary.replace(path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise Invalid(f"the backup {path} cannot be written", id="verdict.store.backup.write",
                      found=error.strerror) from None  # fmt: skip
    return BackupInfo(head(), store.keyring.store_uid, str(header["created"]), rows)


def verify(path: Path, master: MasterKey) -> BackupInfo:
    """Read a backup to its end without restoring it.

    Raises:
        Invalid: no backup, or the file cannot be read.
        WrongMasterKey: this key does not open it.
        Damaged: it was changed or cut off.
    """
    with _open(path) as handle:
        header, chunks = _read(handle, master)
        rows: dict[str, int] = {}
        for table, _, values in chunks:
            rows[table] = rows.get(table, 0) + len(values)
        return BackupInfo(header["schema"], header["store"], header["created"], rows)


def restore(
    path: Path, url: str, master: MasterKey, *, force: bool = False, release_once_again: bool = False
) -> BackupInfo:
    """Bring back a backup, all of it or nothing. No replica may run on the target.

    Args:
        url: the target; its schema is made if there is none.
        force: replace the store that is there, its audit trail too.
        release_once_again: release-once secrets that were free then are free again. Only where nothing can have been
            released since, as when moving a stopped service to another database.

    Raises:
        Invalid: no backup, or the file cannot be read.
        WrongMasterKey: this key does not open it.
        SchemaMismatch: it is of another version of the schema.
        Conflict: the target is not empty.
        Damaged: it was changed or cut off.
        Unavailable: the target cannot be reached.
    """
    from .migrations import head, upgrade

    # To its end before anything is touched: nothing of a damaged file gets into a database.
    info = verify(path, master)
    if info.schema != head():
        newer = info.schema > head()
        raise SchemaMismatch(
            f"the backup is of {'a newer' if newer else 'an older'} version",
            id=f"verdict.store.schema.{'newer' if newer else 'older'}",
            found=f"schema {info.schema}",
            expected=f"schema {head()}",
            remedy="restore it with the version of inclavare that made it" + ("" if newer else ", then migrate"),
        )
    database = Database(url, create=True)
    try:
        with _open(path) as handle:

            def work(connection: Connection) -> None:
                handle.seek(0)
                if _holds_a_store(connection):
                    if not force:
                        raise Conflict(
                            "the target holds a store already",
                            id="verdict.store.restore.target",
                            found=database.url.render_as_string(hide_password=True),
                            remedy="restore into an empty database, or replace that store with --force",
                        )
                    _drop(connection)
                upgrade(connection)
                _load(connection, _read(handle, master)[1], database.now(), free=release_once_again)

            database.write(work)
    finally:
        database.close()
    return info


# --- rows


def _tables() -> list[sa.Table]:
    return [table for table in Base.metadata.sorted_tables if table.name != SessionRow.__tablename__]


def _dump(connection: Connection, writer: _Writer, rows: dict[str, int]) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(sa.text("SET LOCAL idle_in_transaction_session_timeout = 0"))
    for table in _tables():
        columns = [str(column.name) for column in table.columns]
        # The integers themselves, not what the models make of them.
        raw = [sa.type_coerce(column, _raw_type(column)).label(column.name) for column in table.columns]
        primary = list(table.primary_key.columns)
        result = connection.execution_options(yield_per=_PAGE).execute(sa.select(*raw).order_by(*primary))
        rows[table.name] = 0
        for page in result.partitions():
            rows[table.name] += len(page)
            writer.rows(str(table.name), columns, [list(row) for row in page])


def _raw_type(column: sa.Column[Any]) -> Any:
    from .models import Instant

    return sa.BigInteger() if isinstance(column.type, Instant) else column.type


def _load(
    connection: Connection, chunks: Iterator[tuple[str, list[str], list[list[Any]]]], now: datetime, *, free: bool
) -> None:
    known = {table.name: table for table in _tables()}
    for name, columns, rows in chunks:
        table = known[name]
        types = {column.name: _raw_type(column) for column in table.columns}
        named = [dict(zip(columns, row, strict=True)) for row in rows]
        insert = sa.insert(table).values(
            {column: sa.bindparam(f"v_{column}", type_=types[column]) for column in columns}
        )
        connection.execute(insert, [{f"v_{column}": value for column, value in row.items()} for row in named])
    if not free:
        table_ = SecretVersionRow
        lost = sa.update(table_).where(table_.release_once == 1, table_.released_to.is_(None))
        connection.execute(lost.values(released_to=RESTORED, released=now))
    if connection.dialect.name == "postgresql":
        # Rows came with their numbers; the sequence goes on behind them.
        connection.execute(
            sa.text("SELECT setval(pg_get_serial_sequence('tenants', 'id'), (SELECT max(id) FROM tenants))")
        )


def _holds_a_store(connection: Connection) -> bool:
    inspector = sa.inspect(connection)
    # Other tables are somebody else's: a store is not put beside them either.
    return any(
        name != "alembic_version" and connection.execute(sa.select(sa.text("1")).select_from(sa.table(name))).first()
        for name in inspector.get_table_names()
    )


def _drop(connection: Connection) -> None:
    # Dropping asks no trigger; the append-only tables go only as a whole.
    Base.metadata.drop_all(connection)
    connection.execute(sa.text("DROP TABLE IF EXISTS alembic_version"))


# --- the file


class _Writer:
    """Encrypts chunk by chunk. The last one is held back until it is known to be the last."""

    def __init__(self, handle: IO[bytes], key: bytes, header: bytes) -> None:
        self._handle = handle
        self._cipher = AESGCM(key)
        self._header = header
        self._number = 0
        self._held: bytes | None = None

    def rows(self, table: str, columns: list[str], rows: list[list[Any]]) -> None:
        """Write rows, in chunks of about 256 KiB."""
        start, size = 0, 0
        for end, row in enumerate(rows, 1):
            size += sum(len(value) if isinstance(value, bytes | str) else 9 for value in row)
            if size >= _CHUNK or end == len(rows):
                self._put(msgspec.msgpack.encode((table, columns, rows[start:end])))
                start, size = end, 0

    def end(self) -> None:
        """Write the last chunk."""
        self._write(self._held if self._held is not None else b"", last=True)

    def _put(self, data: bytes) -> None:
        if self._held is not None:
            self._write(self._held, last=False)
        self._held = data

    def _write(self, data: bytes, *, last: bool) -> None:
        sealed = self._cipher.encrypt(_nonce(self._number, last), data, self._header)
        self._handle.write(len(sealed).to_bytes(4) + sealed)
        self._number += 1


def _nonce(number: int, last: bool) -> bytes:
    return number.to_bytes(11) + bytes([last])


def _read(handle: IO[bytes], master: MasterKey) -> tuple[dict[str, Any], Iterator[tuple[str, list[str], list[Any]]]]:
    """The header, and the chunks as they are decrypted."""
    start = handle.read(len(_MAGIC) + 4)
    if start[: len(_MAGIC)] != _MAGIC or len(start) != len(_MAGIC) + 4:
        raise _no_backup("another beginning")
    size = int.from_bytes(start[-4:])
    encoded = handle.read(size) if size <= _MAX_HEADER else b""
    try:
        header = msgspec.json.decode(encoded, type=_Header)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise _no_backup(f"a header that is none ({type(error).__name__})") from None
    if header.format != _VERSION:
        raise SchemaMismatch("the backup is of a newer version", id="verdict.store.schema.newer",
                             found=f"format {header.format}", expected=f"format {_VERSION}",
                             remedy="upgrade inclavare")  # fmt: skip
    try:
        slots = [
            Slot(header.generation, slot.master, slot.kind, slot.parameters, bytes.fromhex(slot.wrapped))
            for slot in header.slots
        ]
        salt = bytes.fromhex(header.salt)
    except ValueError:
        raise _no_backup("a header that is none") from None
    root = unwrap(slots, master, header.store)
    cipher = AESGCM(crypto.derive(root, "backup", salt))
    fields = {"schema": header.schema, "store": header.store, "created": header.created}
    decoder = msgspec.msgpack.Decoder(tuple[str, list[str], list[list[Any]]])
    return fields, _chunks(handle, cipher, encoded, decoder.decode)


def _chunks(
    handle: IO[bytes], cipher: AESGCM, header: bytes, decode: Callable[[bytes], tuple[str, list[str], list[Any]]]
) -> Iterator[tuple[str, list[str], list[Any]]]:
    number, length = 0, handle.read(4)
    while True:
        size = int.from_bytes(length)
        sealed = handle.read(size) if len(length) == 4 and size <= _MAX_CHUNK else b""
        length = handle.read(4)
        last = not length
        try:
            if len(sealed) != size:
                raise InvalidTag
            data = cipher.decrypt(_nonce(number, last), sealed, header)
        except InvalidTag:
            raise Damaged("the backup was changed or cut off", id="verdict.store.backup.damaged",
                          found=f"chunk {number + 1} does not authenticate",
                          remedy="take another copy of it") from None  # fmt: skip
        if data:
            yield decode(data)
        if last:
            return
        number += 1


def _no_backup(found: str) -> Invalid:
    return Invalid("not a backup of a store", id="verdict.store.backup.format", found=found,
                   expected="a file that backup wrote")  # fmt: skip


def _open(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise Invalid(f"the backup {path} cannot be read", id="verdict.store.backup.read",
                      found=error.strerror) from None  # fmt: skip


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
