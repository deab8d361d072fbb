"""The schema's versions, and the way from one to the next (alembic; no ``alembic.ini`` is needed)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SchemaMismatch, Unsupported

if TYPE_CHECKING:
    from alembic.config import Config
    from alembic.script import ScriptDirectory
    from sqlalchemy.engine import Connection, Engine

#: Two replicas that migrate at the same time wait for one another (PostgreSQL's advisory lock).
_LOCK = 0x1C1A7A2E


def migrate(url: str) -> str:
    """Make the schema, or bring it to this version, in one transaction. Does nothing if it is this version's.

    Make a backup before it; other versions of the service cannot work on the store afterwards.

    Args:
        url: see :meth:`inclavare.verdict.store.Store.open`; a missing SQLite file is made.

    Returns:
        The schema's version.

    Raises:
        Invalid: not such a URL.
        SchemaMismatch: the schema is newer than this version of the service.
        Unsupported: the database cannot hold UTF-8, or is too old.
        Unavailable: the database cannot be reached.
    """
    from ..database import Database

    database = Database(url, create=True)
    try:
        database.write(upgrade)
        return head()
    finally:
        database.close()


def upgrade(connection: Connection) -> None:
    """As :func:`migrate`, within a transaction."""
    from alembic import command
    from sqlalchemy import text

    if connection.dialect.name == "postgresql":
        connection.execute(text("SET LOCAL lock_timeout = 0"))
        connection.execute(text("SELECT pg_advisory_xact_lock(:id)"), {"id": _LOCK})
        encoding = connection.execute(text("SHOW server_encoding")).scalar_one()
        if encoding != "UTF8":
            raise Unsupported("the database does not hold UTF-8", id="verdict.store.database.encoding", found=encoding,
                              expected="UTF8", remedy="create it with: createdb --encoding UTF8")  # fmt: skip
    else:
        version = connection.execute(text("SELECT sqlite_version()")).scalar_one()
        if tuple(map(int, version.split("."))) < (3, 35):
            raise Unsupported("SQLite is too old", id="verdict.store.database.version", found=version, expected="3.35")
    found = revision(connection)
    if found is not None and found not in _known():
        raise _newer(found)
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def check(engine: Engine) -> None:
    """See that the schema is this version's.

    Raises:
        SchemaMismatch: there is none, or an older or a newer one.
        Unavailable: the database cannot be reached.
    """
    from sqlalchemy import exc

    from ..database import translated

    try:
        with engine.connect() as connection:
            found = revision(connection)
    except exc.SQLAlchemyError as error:
        raise translated(error) from None
    if found == head():
        return
    if found is None:
        raise SchemaMismatch("the database holds no store", id="verdict.store.schema.missing",
                             remedy="make it with: inclavare verdictd init")  # fmt: skip
    if found not in _known():
        raise _newer(found)
    raise SchemaMismatch(
        "the store is of an older version",
        id="verdict.store.schema.older",
        found=f"schema {found}",
        expected=f"schema {head()}",
        remedy="make a backup with the version that it is of, stop all replicas, then: inclavare verdictd migrate",
    )


def head() -> str:
    """The schema's version that this code works with."""
    return str(_scripts().get_current_head())


def revision(connection: Connection) -> str | None:
    """The schema's version of a database, ``None`` for an empty one."""
    from alembic.migration import MigrationContext

    return MigrationContext.configure(connection).get_current_revision()


def _known() -> set[str]:
    return {script.revision for script in _scripts().walk_revisions()}


def _newer(found: str) -> SchemaMismatch:
    return SchemaMismatch(
        "the store is of a newer version than this program",
        id="verdict.store.schema.newer",
        found=f"schema {found}",
        expected=f"schema {head()}",
        remedy="upgrade inclavare; a store cannot be brought back to an older version",
    )


def _config() -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def _scripts() -> ScriptDirectory:
    from alembic.script import ScriptDirectory

    return ScriptDirectory.from_config(_config())
