"""Backup and restore: consistent, encrypted, authenticated; never over something, never with another key."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_cases import ALICE, BOB, refused
from store_servers import PostgreSQL
from test_store_tenants import PEM

from inclavare.errors import InclavareError
from inclavare.verdict.store import FileKey, Store, backup
from inclavare.verdict.store.models import Base

OTHER = FileKey(b"\2" * 32)


@pytest.fixture
def full(store: Store) -> Store:
    soon = store.database.now() + timedelta(minutes=5)
    for number in range(3):
        store.secrets.put("acme", f"a/b/{number}", f"value {number}".encode() * 1000, metadata={"n": str(number)})
    for name in ("taken", "arrived", "free"):
        store.secrets.put("acme", f"once/b/{name}", name.encode(), release_once=True)
    for name in ("taken", "arrived"):
        store.secrets.read("acme", f"once/b/{name}", holder=ALICE)
    store.secrets.acknowledge("acme", "once/b/arrived", holder=ALICE)
    store.policies.put("acme", "strict", "toml", "a policy that is nobody's business")
    store.policies.set_default("acme", "strict")
    store.references.trust("acme", "builder", PEM)
    store.references.register("acme", b"bundle", image="app")
    store.sessions.create("acme", "sgx", bytes(32), soon)
    store.evidence.keep("acme", "cafe", b"evidence")
    store.tokens.create("acme", "robot", "admin", soon)
    store.keys.current("ear")
    store.audit.append("acme", "me", "a.b.c", "done", {"n": 1})
    store.audit.checkpoint()
    return store


@pytest.fixture(params=["sqlite", "postgresql"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where to restore to: nothing yet."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/restored/store.db"
        return
    server: PostgreSQL = request.getfixturevalue("server")
    name = server.create()
    yield server.url(name)
    server.drop(name)


def contents(store: Store) -> dict[str, list[Any]]:
    with store.database.engine.connect() as connection:
        return {
            table.name: sorted(map(repr, connection.execute(sa.select(table))))
            for table in Base.metadata.sorted_tables
            if table.name != "sessions"
        }


def test_from_each_database_to_each(full: Store, target: str, master: FileKey, tmp_path: Path) -> None:
    before = contents(full)
    made = backup.backup(full, tmp_path / "backup")
    assert made.rows["secret_versions"] == 6 and made.rows["audit_entries"] == 1
    assert backup.restore(tmp_path / "backup", target, master, release_once_again=True).store == made.store
    with Store.open(target, master, clock=full.database.clock) as restored:
        assert contents(restored) == before
        assert restored.secrets.read("acme", "a/b/1", holder=BOB) == b"value 1" * 1000
        assert restored.audit.verify().whole and restored.policies.default("acme", "toml") == full.policies.default(
            "acme", "toml"
        )
        assert restored.references.active("acme") == full.references.active("acme")
        assert restored.secrets.read("acme", "once/b/free", holder=BOB) == b"free"
        refused("verdict.store.secret.consumed", restored.secrets.read, "acme", "once/b/taken", holder=BOB)
        assert restored.secrets.read("acme", "once/b/taken", holder=ALICE) == b"taken"
        # Life goes on: numbers of rows and versions do too.
        restored.tenants.create("later")
        restored.audit.append("acme", "me", "a.b.c", "done")
        assert restored.secrets.put("acme", "a/b/1", b"newer").version == 2
        assert restored.audit.verify().whole


def test_what_may_have_been_released_since_stays_released(
    full: Store, target: str, master: FileKey, tmp_path: Path
) -> None:
    backup.backup(full, tmp_path / "backup")
    full.secrets.read("acme", "once/b/free", holder=ALICE)
    backup.restore(tmp_path / "backup", target, master)
    with Store.open(target, master) as restored:
        for holder in (ALICE, BOB):
            refused("verdict.store.secret.consumed", restored.secrets.read, "acme", "once/b/free", holder=holder)
        assert restored.secrets.read("acme", "once/b/taken", holder=ALICE) == b"taken"


def test_the_file_is_private_and_tells_nothing(full: Store, tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        backup.backup(full, tmp_path / "backup")
    finally:
        os.umask(old)
    data = (tmp_path / "backup").read_bytes()
    assert stat.S_IMODE((tmp_path / "backup").stat().st_mode) == 0o600
    for hidden in (b"acme", b"nobody's business", b"a/b/1", b"value 1", b"robot", b"bundle"):
        assert hidden not in data
    refused("verdict.store.backup.write", backup.backup, full, tmp_path / "none" / "backup")
    assert [path.name for path in tmp_path.iterdir() if "new" in path.name] == []


def test_a_target_that_is_not_empty(full: Store, target: str, master: FileKey, tmp_path: Path) -> None:
    backup.backup(full, tmp_path / "backup")
    before = contents(full)
    backup.restore(tmp_path / "backup", target, master, release_once_again=True)
    with Store.open(target, master) as restored:
        restored.tenants.create("later")
    error = refused("verdict.store.restore.target", backup.restore, tmp_path / "backup", target, master)
    assert "--force" in str(error.remedy)
    with Store.open(target, master) as restored:
        assert restored.tenants.get("later")
    backup.restore(tmp_path / "backup", target, master, force=True, release_once_again=True)
    with Store.open(target, master) as restored:
        assert contents(restored) == before
        refused("verdict.store.audit.append_only", restored.database.write,
                lambda connection: connection.execute(sa.text("DELETE FROM audit_entries")))  # fmt: skip


def test_a_migrated_but_empty_target(full: Store, target: str, master: FileKey, tmp_path: Path) -> None:
    from inclavare.verdict.store import migrate

    backup.backup(full, tmp_path / "backup")
    migrate(target)
    backup.restore(tmp_path / "backup", target, master)
    Store.open(target, master).close()


def test_another_master_key(full: Store, target: str, master: FileKey, tmp_path: Path) -> None:
    path = tmp_path / "backup"
    backup.backup(full, path)
    refused("verdict.store.master.wrong", backup.restore, path, target, OTHER)
    refused("verdict.store.master.wrong", backup.verify, path, OTHER)
    refused("verdict.store.schema.missing", Store.open, target, master)
    full.keyring.rotate(OTHER)
    backup.restore(path, target, master)
    refused("verdict.store.master.wrong", Store.open, target, OTHER)
    Store.open(target, master).close()


def test_another_schema(
    full: Store, target: str, master: FileKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from inclavare.verdict.store import migrations

    for schema, id in (("0000", "older"), ("9999", "newer")):
        with monkeypatch.context() as patch:
            patch.setattr(migrations, "head", lambda schema=schema: schema)
            backup.backup(full, tmp_path / schema)
        error = refused(f"verdict.store.schema.{id}", backup.restore, tmp_path / schema, target, master)
        assert error.found == f"schema {schema}"


def test_what_is_no_backup(tmp_path: Path, master: FileKey) -> None:
    path = tmp_path / "backup"
    refused("verdict.store.backup.read", backup.verify, path, master)
    for content in (b"", b"junk" * 100, b"inclavare-vstore", b"inclavare-vstore" + bytes(4), b"inclavare-vstore\xff\xff\xff\xff",
                    b"inclavare-vstore" + (2).to_bytes(4) + b"{}"):  # fmt: skip
        path.write_bytes(content)
        refused("verdict.store.backup.format", backup.verify, path, master)


@given(content=st.binary(max_size=300))
def test_any_bytes_are_no_backup(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    for data in (content, b"inclavare-vstore" + content, b"inclavare-vstore" + len(content).to_bytes(4) + content):
        path.write_bytes(data)
        with pytest.raises(InclavareError):
            backup.verify(path, OTHER)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_byte_of_a_backup_can_be_changed(full: Store, master: FileKey, tmp_path: Path, data: st.DataObject) -> None:
    path, other = tmp_path / "backup", tmp_path / "other"
    if not path.exists():
        backup.backup(full, path)
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    other.write_bytes(content)
    with pytest.raises(InclavareError):
        backup.verify(other, master)


def test_a_backup_that_is_cut_off_or_put_together_anew(
    full: Store, master: FileKey, tmp_path: Path, target: str
) -> None:
    path, other = tmp_path / "backup", tmp_path / "other"
    backup.backup(full, path)
    content = path.read_bytes()
    start = 20 + int.from_bytes(content[16:20])
    chunks, at = [], start
    while at < len(content):
        end = at + 4 + int.from_bytes(content[at : at + 4])
        chunks.append(content[at:end])
        at = end
    assert len(chunks) > 5
    for changed in (chunks[:-1], chunks[1:], [*chunks, chunks[-1]], [chunks[1], chunks[0], *chunks[2:]], [],
                    [*chunks[:2], *chunks[3:]], [*chunks, b"\0"], [*chunks, bytes(4)]):  # fmt: skip
        other.write_bytes(content[:start] + b"".join(changed))
        refused("verdict.store.backup.damaged", backup.restore, other, target, master)
    refused("verdict.store.schema.missing", Store.open, target, master)
    backup.backup(full, other)
    mixed = other.read_bytes()
    other.write_bytes(mixed[: 20 + int.from_bytes(mixed[16:20])] + b"".join(chunks))
    refused("verdict.store.backup.damaged", backup.verify, other, master)


def test_a_backup_is_of_one_moment(
    full: Store, open_store: Callable[[], Store], master: FileKey, tmp_path: Path, target: str
) -> None:
    """Two secrets and an audit entry that are written again and again, always together, are so in the backup."""
    stop = threading.Event()
    writer = open_store()

    def go() -> None:
        step = 0
        while not stop.is_set():
            step += 1

            def work(connection: sa.Connection, step: int = step) -> None:
                for tenant in ("acme", "zeta"):
                    connection.execute(
                        sa.text("UPDATE tenants SET quota_requests = :n WHERE name = :t"), {"n": step, "t": tenant}
                    )

            writer.database.write(work)
            writer.audit.append("acme", "me", "a.b.c", "done", {"step": step})

    thread = threading.Thread(target=go)
    thread.start()
    try:
        for _ in range(4):
            backup.backup(full, tmp_path / "backup")
    finally:
        stop.set()
        thread.join()
    backup.restore(tmp_path / "backup", target, master)
    with Store.open(target, master) as restored:
        requests = {restored.tenants.get(name).quotas.requests for name in ("acme", "zeta")}
        assert len(requests) == 1 and requests != {6000}
        assert restored.audit.verify().whole


def test_a_large_store(store: Store, master: FileKey, tmp_path: Path, target: str) -> None:
    """Several chunks, and rows larger than a chunk."""
    for number in range(4):
        store.secrets.put("acme", f"a/b/{number}", os.urandom(1 << 20))
    for number in range(700):
        store.evidence.keep("acme", f"{number:04x}", b"x" * 100)
    store.references.register("acme", os.urandom(4 << 20))
    backup.backup(store, tmp_path / "backup")
    backup.restore(tmp_path / "backup", target, master)
    with Store.open(target, master) as restored:
        for number in range(4):
            path = f"a/b/{number}"
            assert restored.secrets.read("acme", path, holder=ALICE) == store.secrets.read("acme", path, holder=ALICE)
        assert restored.evidence.list("acme") == store.evidence.list("acme")
