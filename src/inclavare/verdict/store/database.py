"""Connections and transactions: SQLite in one file, or PostgreSQL shared by several replicas.

Work is given as a function of a connection, so that it can be run again when the database says so. On SQLite, which
has one writer at a time, writers that wait are put together into one transaction, each behind a savepoint: one fsync
serves them all. The audit trail does the same with its entries, which queue for their chain on any database.
"""

from __future__ import annotations

import ipaddress
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.engine import URL, Connection, Engine, make_url

from .errors import Conflict, Damaged, Invalid, Unavailable

T = TypeVar("T")
Work = Callable[[Connection], T]

_POOL = 10
_BUSY_SECONDS = 10
_BATCH = 128
_ATTEMPTS = 6
#: PostgreSQL: serialization failure, deadlock, lock not available.
_AGAIN = ("40001", "40P01", "55P03")


class Database:
    """One database with its pool of connections.

    Args:
        url: see :meth:`inclavare.verdict.store.Store.open`.
        clock: seconds since 1970.
        create: make a missing SQLite file (mode 0600) and its directory (0700).

    Raises:
        Invalid: not such a URL; a file or directory that others may read; a connection without verified TLS to
            another host.
    """

    def __init__(self, url: str, *, clock: Callable[[], float] = time.time, create: bool = False) -> None:
        self.url = parse_url(url)
        self.clock = clock
        self.sqlite = self.url.get_backend_name() == "sqlite"
        self.engine = self._sqlite_engine(create) if self.sqlite else self._postgresql_engine()
        # Single statements need no BEGIN and no COMMIT; on PostgreSQL that saves two round trips.
        self._reading = self.engine if self.sqlite else self.engine.execution_options(isolation_level="AUTOCOMMIT")
        snapshot: dict[str, Any] = (
            {"inclavare_begin": "BEGIN"}
            if self.sqlite
            else {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        )
        self._snapshot = self.engine.execution_options(**snapshot)
        self._writing = self.engine.execution_options(inclavare_begin="BEGIN IMMEDIATE")
        self._inside = threading.local()
        self._combiner: Combiner[Job[Any]] = Combiner(self._run_batch)

    def now(self) -> datetime:
        """The time, UTC, whole microseconds."""
        return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=int(self.clock() * 1e6))

    def read(self, work: Work[T], *, snapshot: bool = False) -> T:
        """Run reading work.

        Args:
            snapshot: all statements see the database as it was at one time; the work is never run again.

        Raises:
            Unavailable: the database cannot be reached.
        """
        engine = self._snapshot if snapshot else self._reading
        for attempt in range(_ATTEMPTS):
            try:
                with engine.connect() as connection:
                    return work(connection)
            except exc.DBAPIError as error:
                # The server was restarted: the pool is new already.
                if snapshot or not (error.connection_invalidated and attempt == 0):
                    raise translated(error) from None
            except (exc.TimeoutError, OverflowError, UnicodeEncodeError) as error:
                raise translated(error) from None
        raise AssertionError("unreachable")

    def write(self, work: Work[T], *, durable: bool = True) -> T:
        """Run work in a transaction, which is committed when this returns and undone when it raises.

        Args:
            work: is run again after a conflict with another replica, so it must not have other effects.
            durable: wait until it survives a loss of power. Without it, a crash of the database's machine may undo
                the last moment; the crash of a replica cannot.

        Raises:
            Unavailable: the database cannot be reached or stays locked.
            Conflict: a constraint that the work did not expect.
        """
        assert not getattr(self._inside, "writing", False), "a transaction within a transaction would wait for itself"
        job = Job(work, durable)
        if self.sqlite:
            return cast(T, self._combiner.submit(job))
        self._run_batch([job])
        return job.outcome()

    def close(self) -> None:
        """Close all connections. Idempotent."""
        self.engine.dispose()

    # --- transactions

    def _run_batch(self, jobs: Sequence[Job[Any]]) -> None:
        """Run jobs in one transaction. Each gets its value or its error."""
        self._inside.writing = True
        try:
            self._run_together(jobs)
        finally:
            self._inside.writing = False

    def _run_together(self, jobs: Sequence[Job[Any]]) -> None:
        for attempt in range(_ATTEMPTS):
            committing = False
            try:
                with self._writing.connect() as connection:
                    self._durability(connection, any(job.durable for job in jobs))
                    for job in jobs:
                        self._run(connection, job, alone=len(jobs) == 1)
                    committing = True
                    connection.commit()
                    return
            except exc.DBAPIError as error:
                if not committing and _again(error, attempt):
                    time.sleep(0.005 * 2**attempt)
                    continue
                failed: Exception = translated(error)
            except Exception as error:
                failed = translated(error)
            for job in jobs:
                # A job that failed by itself keeps its own reason.
                job.error = job.error or failed
            return

    def _run(self, connection: Connection, job: Job[Any], *, alone: bool) -> None:
        job.error = None
        if alone:
            job.value = job.work(connection)
            return
        savepoint = connection.begin_nested()
        try:
            job.value = job.work(connection)
        except Exception as error:
            if isinstance(error, exc.DBAPIError) and (error.connection_invalidated or _again(error, 0)):
                raise
            savepoint.rollback()
            job.error = translated(error)
        else:
            savepoint.commit()

    def _durability(self, connection: Connection, durable: bool) -> None:
        if self.sqlite:
            # Not possible inside of a transaction, and the first statement begins one.
            driver = connection.connection.dbapi_connection
            assert driver is not None
            driver.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
        elif not durable:
            connection.exec_driver_sql("SET LOCAL synchronous_commit TO off")

    # --- engines

    def _sqlite_engine(self, create: bool) -> Engine:
        _private_file(Path(str(self.url.database)), create)
        engine = sa.create_engine(
            self.url,
            pool_size=_POOL,
            max_overflow=0,
            pool_timeout=_BUSY_SECONDS,
            connect_args={"timeout": _BUSY_SECONDS, "uri": False},
        )

        @sa.event.listens_for(engine, "connect")
        def connected(connection: Any, _: Any) -> None:
            # Transactions are begun below: the driver would begin them too late, and never IMMEDIATE.
            connection.isolation_level = None
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA foreign_keys=ON")
            connection.execute("PRAGMA recursive_triggers=ON")
            connection.execute("PRAGMA trusted_schema=OFF")
            connection.execute("PRAGMA secure_delete=ON")

        @sa.event.listens_for(engine, "begin")
        def begun(connection: Connection) -> None:
            begin = connection.get_execution_options().get("inclavare_begin")
            if begin is not None:
                connection.exec_driver_sql(begin)

        return engine

    def _postgresql_engine(self) -> Engine:
        return sa.create_engine(
            self.url,
            pool_size=_POOL,
            max_overflow=_POOL,
            pool_timeout=_BUSY_SECONDS,
            pool_use_lifo=True,
            hide_parameters=True,
            connect_args={
                "connect_timeout": 5,
                "application_name": "verdictd",
                "client_encoding": "utf8",
                # A replica that stops in the middle of a transaction must not stop the others.
                "options": "-c lock_timeout=10s -c idle_in_transaction_session_timeout=30s",
            },
        )


class Waiting(Generic[T]):
    """Something that waits for its turn, and becomes a value or an error."""

    def __init__(self) -> None:
        self.value: T | None = None
        self.error: Exception | None = None
        self.done = False
        self.woken = threading.Event()

    def outcome(self) -> T:
        """The value, or the error."""
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]


class Job(Waiting[T]):
    """Work that waits for a transaction."""

    def __init__(self, work: Work[T], durable: bool) -> None:
        super().__init__()
        self.work = work
        self.durable = durable


W = TypeVar("W", bound=Waiting[Any])


class Combiner(Generic[W]):
    """Lets whoever comes first work for all who came meanwhile.

    Args:
        run: gives each of many its value or its error.
    """

    def __init__(self, run: Callable[[Sequence[W]], None]) -> None:
        self._run = run
        self._mutex = threading.Lock()
        self._waiting: list[W] = []
        self._led = False

    def submit(self, job: W) -> Any:
        """Have a job done, and return its value or raise its error."""
        with self._mutex:
            self._waiting.append(job)
            lead, self._led = not self._led, True
        if not lead:
            job.woken.wait()
        if not job.done:
            self._lead()
        return job.outcome()

    def _lead(self) -> None:
        with self._mutex:
            batch, self._waiting = self._waiting[:_BATCH], self._waiting[_BATCH:]
        try:
            self._run(batch)
        except BaseException as error:
            # KeyboardInterrupt in this thread must not leave the others waiting.
            for job in batch:
                job.error = job.error or Unavailable(
                    "the transaction was interrupted", id="verdict.store.database.interrupted", found=repr(error)
                )
            raise
        finally:
            for job in batch:
                job.done = True
                job.woken.set()
            with self._mutex:
                if self._waiting:
                    self._waiting[0].woken.set()
                else:
                    self._led = False


def upsert(connection: Connection, table: type[Any]) -> Any:
    """An INSERT that has ``on_conflict_do_nothing`` and ``on_conflict_do_update``."""
    from sqlalchemy.dialects import postgresql, sqlite

    return (sqlite if connection.dialect.name == "sqlite" else postgresql).insert(table)


@contextmanager
def conflicts(refusal: Exception) -> Iterator[None]:
    """Turn a constraint's violation into this refusal."""
    try:
        yield
    except exc.IntegrityError:
        raise refusal from None


def translated(error: Exception) -> Exception:
    """A driver's error as one of ours; neither statements' parameters nor passwords are in it."""
    if isinstance(error, exc.DataError | OverflowError | UnicodeEncodeError):
        return Invalid(
            "a name, text or number that no database can hold",
            id="verdict.store.value",
            found=type(getattr(error, "orig", error)).__name__,
            expected="text without NUL and without half a surrogate pair; numbers of 64 bits",
        )
    if isinstance(error, exc.DatabaseError) and "append-only" in str(error.orig):
        return Damaged("the audit trail is append-only", id="verdict.store.audit.append_only", found=_reason(error))
    if isinstance(error, exc.IntegrityError):
        return Conflict("the database refuses this", id="verdict.store.database.constraint", found=_reason(error))
    if isinstance(error, exc.DatabaseError | exc.InterfaceError | exc.TimeoutError):
        return Unavailable(
            "the database cannot be reached, or is busy",
            id="verdict.store.database.unavailable",
            found=_reason(error),
            remedy="try again; if it stays so, look at the database server, its disk and its number of connections",
        )
    return error


def _reason(error: exc.SQLAlchemyError) -> str:
    origin = getattr(error, "orig", None) or error
    # PostgreSQL's DETAIL quotes rows; its first line does not.
    return f"{type(origin).__name__}: {str(origin).splitlines()[0] if str(origin) else ''}"


def _again(error: exc.DBAPIError, attempt: int) -> bool:
    if attempt + 1 >= _ATTEMPTS:
        return False
    if getattr(error.orig, "sqlstate", None) in _AGAIN:
        return True
    return bool(error.connection_invalidated) and attempt == 0


def parse_url(text: str) -> URL:
    """A database's URL, checked.

    Raises:
        Invalid: another database, SQLite in memory or with options, or PostgreSQL on another host without
            ``sslmode=verify-full``.
    """
    expected = "sqlite:////absolute/path or postgresql://user@host/name?sslmode=verify-full"
    try:
        url = make_url(text)
    except (exc.ArgumentError, ValueError):
        raise Invalid("not a database's URL", id="verdict.store.url", expected=expected) from None
    if url.drivername == "sqlite":
        if not url.database or not Path(url.database).is_absolute() or url.query:
            raise Invalid("not the URL of an SQLite file", id="verdict.store.url", found=str(url), expected=expected)
        return url
    if url.drivername not in ("postgresql", "postgresql+psycopg"):
        raise Invalid("not a database that this works with", id="verdict.store.url", found=url.drivername,
                      expected=expected)  # fmt: skip
    url = url.set(drivername="postgresql+psycopg")
    for host in _hosts(url):
        if not _is_local(host) and url.query.get("sslmode") != "verify-full":
            raise Invalid(
                f"the connection to the database on {host} would not be encrypted and verified",
                id="verdict.store.url.tls",
                found=f"sslmode={url.query.get('sslmode', 'prefer')}",
                expected="sslmode=verify-full",
                remedy="add ?sslmode=verify-full (and sslrootcert=FILE, where the authority is your own) to the URL",
            )
    return url


def _hosts(url: URL) -> list[str]:
    """Wherever libpq may connect to: the URL's hosts, what it takes from the environment, a service file's unknown."""

    def parts(name: str, variable: str) -> list[str]:
        queried = url.query.get(name, ())
        named = [queried] if isinstance(queried, str) else list(queried)
        if name == "host" and url.host:
            named.append(url.host)
        found = [part for item in named for part in item.split(",") if part]
        return found or [part for part in os.environ.get(variable, "").split(",") if part]

    service = [f"service {name}" for name in parts("service", "PGSERVICE")]
    return parts("host", "PGHOST") + parts("hostaddr", "PGHOSTADDR") + service


def _is_local(host: str) -> bool:
    if host.startswith(("/", "@")) or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _private_file(path: Path, create: bool) -> None:
    if create:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # SQLite gives -wal and -shm the mode of the file.
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        except FileExistsError:
            pass
    for item, mode in ((path.parent, 0o700), (path, 0o600)):
        try:
            info = item.stat()
        except OSError as error:
            from .errors import SchemaMismatch

            raise SchemaMismatch(
                f"there is no store at {path}",
                id="verdict.store.schema.missing",
                found=error.strerror,
                remedy="make it with: inclavare verdictd init",
            ) from None
        if stat.S_IMODE(info.st_mode) & 0o077 or info.st_uid != os.geteuid():
            raise Invalid(
                f"{item} is not private",
                id="verdict.store.file.mode",
                found=f"mode {stat.S_IMODE(info.st_mode):04o}, uid {info.st_uid}",
                expected=f"mode {mode:04o}, uid {os.geteuid()}",
                remedy=f"chmod {mode:o} {item}, and find out who may have read it",
            )
