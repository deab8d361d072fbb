"""Stores for tests: each test gets a database of its own, SQLite or PostgreSQL."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from store_servers import PostgreSQL, postgresql

from inclavare.verdict.store import FileKey, Store, migrate


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """In memory where possible: these tests commit a thousand times, and none of them tests the disk."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="verdict") as path:
        yield Path(path)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="session")
def server() -> Iterator[PostgreSQL]:
    """A PostgreSQL that does not wait for the disk: what is tested here are crashes of its clients."""
    with postgresql("fsync=off") as running:
        yield running


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "store" / "store.db"
    migrate(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def postgresql_template(server: PostgreSQL) -> str:
    name = server.create()
    migrate(server.url(name))
    return name


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database with the schema and nothing in it."""
    if request.param == "sqlite":
        path = tmp_path / "store" / "store.db"
        path.parent.mkdir(mode=0o700)
        shutil.copy(request.getfixturevalue("sqlite_template"), path)
        path.chmod(0o600)
        yield f"sqlite:///{path}"
        return
    server: PostgreSQL = request.getfixturevalue("server")
    name = server.create(template=request.getfixturevalue("postgresql_template"))
    yield server.url(name)
    server.drop(name)


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database without a schema."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/empty/store.db"
        return
    server: PostgreSQL = request.getfixturevalue("server")
    name = server.create()
    yield server.url(name)
    server.drop(name)


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "master.key"
    FileKey.create(path)
    return path


@pytest.fixture
def master(key_file: Path) -> FileKey:
    return FileKey.load(key_file)


Open = Callable[[], Store]


@pytest.fixture
def open_store(url: str, master: FileKey, clock: Clock) -> Iterator[Open]:
    """Open the test's store, again and again: each is a replica."""
    opened: list[Store] = []

    def go() -> Store:
        opened.append(Store.open(url, master, clock=clock))
        return opened[-1]

    yield go
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store: Open) -> Store:
    """A store with the tenants ``acme`` and ``zeta``."""
    made = open_store()
    made.tenants.create("acme")
    made.tenants.create("zeta")
    return made
