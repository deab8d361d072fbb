"""Exchanging the master key and the root key, while replicas work, interrupted anywhere."""

from __future__ import annotations

import textwrap
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from store_cases import ALICE, BOB, done, killed, refused, replica

from inclavare.verdict.store import FileKey, PassphraseKey, Store

NEW = FileKey(b"\2" * 32)
Open = Callable[[], Store]


@pytest.fixture
def full(store: Store) -> Store:
    """Ten secrets of each tenant, one of them erased, and all signing keys."""
    for number in range(10):
        store.secrets.put("acme", f"a/b/{number}", f"value {number}".encode())
        store.secrets.put("zeta", f"a/b/{number}", b"z", release_once=number == 0)
    store.secrets.read("zeta", "a/b/0", holder=ALICE)
    store.secrets.acknowledge("zeta", "a/b/0", holder=ALICE)
    store.keys.current("ear")
    store.audit.append("acme", "me", "a.b.c", "done")
    store.policies.put("acme", "one", "toml", "text")
    return store


def whole(store: Store) -> None:
    """Everything is readable still."""
    for number in range(10):
        assert store.secrets.read("acme", f"a/b/{number}", holder=ALICE) == f"value {number}".encode()
    refused("verdict.store.secret.consumed", store.secrets.read, "zeta", "a/b/0", holder=ALICE)
    assert store.audit.verify().whole and store.policies.get("acme", "one").text == "text"
    assert store.keys.list("ear")


def generations(store: Store) -> dict[int, int]:
    """How many wrapped keys there are of each generation."""
    with store.database.engine.connect() as connection:
        found: dict[int, int] = {}
        for table in ("secret_versions", "signing_keys", "store"):
            for generation, count in connection.execute(
                sa.text(f"SELECT generation, count(*) FROM {table} GROUP BY 1")
            ):
                found[generation] = found.get(generation, 0) + count
        return found


def test_rotation(full: Store, url: str, master: FileKey) -> None:
    seen: list[int] = []
    total = sum(generations(full).values())
    assert full.keyring.rotate(NEW, batch=5, progress=seen.append) == total
    assert seen[-1] == total and len(seen) >= total // 5
    assert generations(full) == {2: total}
    assert [(slot.generation, slot.kind) for slot in full.keyring.slots()] == [(2, "file")]
    whole(full)
    full.secrets.put("acme", "a/b/new", b"after")
    with Store.open(url, NEW) as again:
        whole(again)
        assert again.secrets.read("acme", "a/b/new", holder=ALICE) == b"after"
    refused("verdict.store.master.wrong", Store.open, url, master)


def test_replicas_with_either_key_work_on(full: Store, open_store: Open, url: str, master: FileKey) -> None:
    """Rotate, restart the replicas one after the other with the new key, retire the old one."""
    old = open_store()
    full.keyring.rotate(NEW, retire=False)
    whole(old)
    old.secrets.put("acme", "a/b/old", b"by a replica with the old key")
    with Store.open(url, master) as restarted_too_early, Store.open(url, NEW) as restarted:
        whole(restarted_too_early)
        whole(restarted)
        assert restarted.secrets.read("acme", "a/b/old", holder=ALICE) == b"by a replica with the old key"
        assert restarted.keyring.retire_others() == 1
    refused("verdict.store.master.wrong", Store.open, url, master)
    whole(old)
    assert full.keyring.retire_others() == 0


def test_the_old_root_key_is_of_no_use_afterwards(full: Store, url: str) -> None:
    """Who had the old master key and an old copy of the database reads nothing that is stored later."""
    before = full.keyring._root(1)
    full.keyring.rotate(NEW)
    full.secrets.put("acme", "a/b/new", b"after")
    assert full.keyring._root(2) != before
    refused("verdict.store.master.exchanged", full.keyring._root, 1)


def test_work_goes_on_meanwhile(full: Store, open_store: Open) -> None:
    replicas = [open_store(), open_store()]
    stop = threading.Event()
    errors: list[BaseException] = []
    written: dict[str, bytes] = {}

    def work(number: int) -> None:
        step = 0
        try:
            while not stop.is_set():
                path = f"w/{number}/{step}"
                replicas[number].secrets.put("acme", path, path.encode())
                written[path] = path.encode()
                assert replicas[1 - number].secrets.read("acme", path, holder=ALICE) == path.encode()
                replicas[number].keys.current("ear")
                step += 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    try:
        for key in (NEW, FileKey(b"\3" * 32), NEW):
            full.keyring.rotate(key, batch=3, retire=False)
            for item in replicas:
                item.keyring._master = key
            full.keyring.retire_others()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not errors and written
    whole(full)
    for path, value in written.items():
        assert full.secrets.read("acme", path, holder=ALICE) == value
    assert set(generations(full)) == {4}


def test_only_one_rotation_at_a_time(full: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        full.keyring.rotate(NEW, batch=3, progress=interrupted)
    error = refused("verdict.store.master.rotation", full.keyring.rotate, FileKey(b"\3" * 32))
    assert "finish it first" in str(error.remedy)
    refused("verdict.store.master.rotation", full.keyring.rotate, PassphraseKey(b"another long one", n=1 << 14))
    full.keyring.rotate(NEW)
    whole(full)
    assert set(generations(full)) == {2}


def test_a_master_key_that_would_be_forgotten(full: Store, url: str, master: FileKey) -> None:
    full.keyring.rotate(NEW, retire=False)
    refused("verdict.store.master.rotation", full.keyring.rotate, FileKey(b"\3" * 32))
    full.keyring.retire_others()
    full.keyring.rotate(FileKey(b"\3" * 32))
    whole(full)


def test_the_root_key_alone(full: Store, master: FileKey, url: str) -> None:
    """After rotating a key within Vault: the same master key, and a new root key."""
    full.keyring.rotate(master)
    assert set(generations(full)) == {2} and len(full.keyring.slots()) == 1
    with Store.open(url, master) as again:
        whole(again)


def test_the_database_does_not_let_a_root_key_go_that_is_needed(full: Store) -> None:
    def work(connection: sa.Connection) -> None:
        connection.execute(sa.text("DELETE FROM root_key_slots"))
        connection.execute(sa.text("DELETE FROM root_keys"))

    refused("verdict.store.database.constraint", full.database.write, work)
    whole(full)


#: Where a process that rotates is killed: it may be anywhere.
POINTS = {
    "before it begins": "store.keyring._begin_rotation = lambda new: die()",
    "when it has begun": "store.keyring._rewrap = lambda *a: die()",
    "between two batches": "progress = lambda n: die() if n >= 6 else None",
    "in the middle of a batch": """
        from inclavare.verdict.store import crypto
        wrap, count = crypto.wrap, [0]
        def dying(*a):
            count[0] += 1
            return die() if count[0] == 8 else wrap(*a)
        crypto.wrap = dying
    """,
    "before the old root key goes": """
        from inclavare.verdict.store import keyring
        keyring._remove_generations_before = lambda *a: die()
    """,
    "before the old master key goes": "store.keyring.retire_others = lambda: die()",
}


@pytest.mark.parametrize("point", POINTS)
def test_killed(full: Store, url: str, key_file: Path, master: FileKey, point: str) -> None:
    total = sum(generations(full).values())
    script = "progress = None\nnew = FileKey(b'\\2' * 32)\n" + textwrap.dedent(POINTS[point])
    killed(replica(url, key_file, script + "\nstore.keyring.rotate(new, batch=3, progress=progress)"))
    whole(full)
    with Store.open(url, master) as again:
        whole(again)
    if point != "before it begins":
        with Store.open(url, NEW) as again:
            whole(again)
    assert done(replica(url, key_file, "print(store.keyring.rotate(FileKey(b'\\2' * 32), batch=3))"))
    with Store.open(url, NEW) as again:
        whole(again)
        assert sum(generations(again).values()) == total and len(generations(again)) == 1
        assert len(again.keyring.slots()) == 1
    refused("verdict.store.master.wrong", Store.open, url, master)


def test_rotation_from_a_passphrase(url: str) -> None:
    old = PassphraseKey(b"correct horse battery staple", n=1 << 14)
    new = PassphraseKey(b"a better passphrase", n=1 << 14)
    with Store.open(url, old) as store:
        store.tenants.create("acme")
        store.secrets.put("acme", "a/b/c", b"value")
        store.keyring.rotate(new)
        store.keyring.rotate(new)
        store.sessions.create("acme", "sgx", bytes(32), store.database.now() + timedelta(1))
    with Store.open(url, PassphraseKey(b"a better passphrase")) as store:
        assert store.secrets.read("acme", "a/b/c", holder=BOB) == b"value"
        assert [slot.generation for slot in store.keyring.slots()] == [3]
