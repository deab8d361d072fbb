"""Where the store lies: URLs, files, schema, transactions."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from store_cases import refused
from store_servers import PostgreSQL

from inclavare.errors import InclavareError
from inclavare.verdict.store import FileKey, Invalid, Store, Unavailable, Unsupported, migrate
from inclavare.verdict.store.database import Database, parse_url
from inclavare.verdict.store.migrations import check, head
from inclavare.verdict.store.models import Base


@pytest.mark.parametrize(
    "url",
    ["", "store.db", "sqlite://", "sqlite:///relative.db", "sqlite:///:memory:", "sqlite:////x.db?mode=ro",
     "mysql://host/x", "postgresql+asyncpg://host/x", "http://[", "postgresql://host:port/x"],
)  # fmt: skip
def test_other_urls(url: str) -> None:
    refused("verdict.store.url", parse_url, url)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://db.example.com/x",
        "postgresql://10.0.0.1/x?sslmode=require",
        "postgresql://db.example.com/x?sslmode=verify-ca",
        "postgresql:///x?host=localhost,db.example.com",
        "postgresql://localhost/x?host=db.example.com&sslmode=disable",
        "postgresql://localhost/x?hostaddr=192.0.2.1",
        "postgresql:///x?service=production",
    ],
)
def test_no_connection_to_another_host_without_verified_tls(url: str) -> None:
    error = refused("verdict.store.url.tls", parse_url, url)
    assert "sslmode=verify-full" in str(error.remedy)


@pytest.mark.parametrize(
    ("name", "value"), [("PGHOST", "db.example.com"), ("PGHOSTADDR", "192.0.2.1"), ("PGSERVICE", "x")]
)
def test_no_connection_to_another_host_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    refused("verdict.store.url.tls", parse_url, "postgresql:///x")


@pytest.mark.parametrize(
    "url",
    ["postgresql://db.example.com/x?sslmode=verify-full", "postgresql://127.0.0.1/x", "postgresql://[::1]/x",
     "postgresql:///x?host=/run/postgresql", "postgresql://u:p@localhost/x"],
)  # fmt: skip
def test_urls_that_are_taken(url: str) -> None:
    assert parse_url(url).drivername == "postgresql+psycopg"


@given(st.text(max_size=60))
def test_any_text_as_url(text: str) -> None:
    for candidate in (text, f"sqlite:///{text}", f"postgresql://{text}"):
        try:
            parse_url(candidate)
        except Invalid:
            pass


def test_passwords_are_in_no_error() -> None:
    database = Database("postgresql://someone:hunter22@127.0.0.1:1/x")
    error = refused("verdict.store.database.unavailable", database.read, lambda c: c.execute(sa.text("SELECT 1")))
    assert "hunter22" not in str(error.to_dict()) and "hunter22" not in repr(database.engine)
    assert isinstance(error, Unavailable)


def test_files_are_private(tmp_path: Path, master: FileKey) -> None:
    old = os.umask(0)
    try:
        url = f"sqlite:///{tmp_path}/store/store.db"
        migrate(url)
        store = Store.open(url, master)
        store.tenants.create("acme")
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "store").iterdir()}
        assert modes == {"store.db": 0o600, "store.db-wal": 0o600, "store.db-shm": 0o600}
        assert stat.S_IMODE((tmp_path / "store").stat().st_mode) == 0o700
        store.close()
        for path, mode in ((tmp_path / "store", 0o750), (tmp_path / "store" / "store.db", 0o640)):
            before = stat.S_IMODE(path.stat().st_mode)
            path.chmod(mode)
            error = refused("verdict.store.file.mode", Store.open, url, master)
            assert f"{mode:04o}" in str(error.found) and "chmod" in str(error.remedy)
            path.chmod(before)
        Store.open(url, master).close()
    finally:
        os.umask(old)


def test_the_schema_has_to_be_there_and_of_this_version(empty_url: str, master: FileKey) -> None:
    error = refused("verdict.store.schema.missing", Store.open, empty_url, master)
    assert "init" in str(error.remedy)
    assert migrate(empty_url) == head() == migrate(empty_url)
    store = Store.open(empty_url, master)
    for revision, id in (("0000", "newer"), ("9999", "newer")):
        with store.database.engine.begin() as connection:
            connection.execute(sa.text("UPDATE alembic_version SET version_num = :v"), {"v": revision})
        refused(f"verdict.store.schema.{id}", check, store.database.engine)
        refused(f"verdict.store.schema.{id}", migrate, empty_url)
    store.close()


def test_an_older_schema(empty_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from inclavare.verdict.store import migrations

    migrate(empty_url)
    database = Database(empty_url)
    monkeypatch.setattr(migrations, "head", lambda: "0002")
    error = refused("verdict.store.schema.older", check, database.engine)
    assert "backup" in str(error.remedy)
    database.close()


def test_migrations_make_what_the_models_say(url: str) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    database = Database(url)
    with database.engine.connect() as connection:
        options = {"compare_type": True, "compare_server_default": not database.sqlite}
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, Base.metadata) == []
        inspector = sa.inspect(connection)
        for table in Base.metadata.sorted_tables:
            checks = {item["name"] for item in inspector.get_check_constraints(table.name)}
            assert checks == {item.name for item in table.constraints if isinstance(item, sa.CheckConstraint)}
    database.close()


def test_replicas_that_migrate_at_the_same_time(empty_url: str) -> None:
    results: list[object] = []

    def go() -> None:
        try:
            results.append(migrate(empty_url))
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [head()] * 4


def test_a_database_that_cannot_hold_utf8(server: PostgreSQL) -> None:
    name = server.create(encoding="LATIN1")
    error = refused("verdict.store.database.encoding", migrate, server.url(name))
    assert isinstance(error, Unsupported)


def test_work_that_fails_is_undone_and_others_beside_it_are_not(store: Store) -> None:
    """Writers that were put together into one transaction do not share their fate."""
    outcomes: dict[int, object] = {}
    barrier = threading.Barrier(12)

    def go(number: int) -> None:
        def work(connection: sa.Connection) -> int:
            connection.execute(sa.text("UPDATE tenants SET used_bytes = used_bytes + 1 WHERE name = 'acme'"))
            if number % 3 == 0:
                raise InclavareError("no", id="test.no")
            if number % 3 == 1:
                connection.execute(sa.text("INSERT INTO root_keys (generation, created) VALUES (1, 0)"))
            return number

        barrier.wait()
        try:
            outcomes[number] = store.database.write(work)
        except InclavareError as error:
            outcomes[number] = error.id

    threads = [threading.Thread(target=go, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {0: "test.no", 1: "verdict.store.database.constraint"}
    assert outcomes == {number: expected.get(number % 3, number) for number in range(12)}
    assert store.tenants.get("acme").used_bytes == 4


def test_a_transaction_within_a_transaction_is_refused_instead_of_waiting_for_ever(store: Store) -> None:
    with pytest.raises(AssertionError):
        store.database.write(lambda _: store.database.write(lambda _: None))
    store.tenants.create("later")


def test_values_are_in_no_error(store: Store) -> None:
    def work(connection: sa.Connection) -> None:
        row = {"g": 1, "c": 0, "s": "a very secret value"}
        connection.execute(sa.text("INSERT INTO root_keys (generation, created) SELECT :g, :c WHERE :s <> ''"), row)

    error = refused("verdict.store.database.constraint", store.database.write, work)
    assert "secret" not in error.one_line()


def test_a_server_that_was_restarted_is_found_again(server: PostgreSQL, master: FileKey) -> None:
    url = server.url(server.create())
    migrate(url)
    with Store.open(url, master) as store:
        store.tenants.create("acme")
        server.stop("fast")
        refused("verdict.store.database.unavailable", store.ping)
        refused("verdict.store.database.unavailable", store.audit.append, "acme", "me", "a.b.c", "done")
        server.start("fsync=off")
        store.ping()
        store.audit.append("acme", "me", "a.b.c", "done")
        assert store.audit.verify().entries == 1
