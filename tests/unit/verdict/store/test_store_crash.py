"""Replicas that are killed in the middle of something: nothing is lost, nothing is released twice."""

from __future__ import annotations

import random
import textwrap
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from store_cases import ALICE, BOB, done, killed, refused, replica, start

from inclavare.verdict.store import Consumed, Store

READ = "print(store.secrets.read('acme', 'a/b/c', holder='aa' * 32).decode())"
#: Where the reader of a release-once secret is killed, and whether it is Alice's then.
POINTS = {
    "before its claim is written": ("store.secrets._claim = lambda *a: die()", False),
    "before its claim is committed": (
        """
        import sqlalchemy as sa
        @sa.event.listens_for(store.database.engine, "commit")
        def commit(connection): die()
        """,
        False,
    ),
    "when its claim is committed": ("store.keyring.unseal = lambda *a: die()", True),
    "with the value in its hands": ("print = lambda *a: die()", True),
}


@pytest.mark.parametrize("point", POINTS)
def test_killed_while_it_reads_what_is_released_once(store: Store, url: str, key_file: Path, point: str) -> None:
    store.secrets.put("acme", "a/b/c", b"once", release_once=True)
    script, alices = POINTS[point]
    assert killed(replica(url, key_file, textwrap.dedent(script) + "\n" + READ)) == ""
    if alices:
        refused("verdict.store.secret.consumed", store.secrets.read, "acme", "a/b/c", holder=BOB)
        assert done(replica(url, key_file, READ)).strip() == "once", "she may try again, at another replica"
    else:
        assert store.secrets.read("acme", "a/b/c", holder=BOB) == b"once"
        refused("verdict.store.secret.consumed", store.secrets.read, "acme", "a/b/c", holder=ALICE)


def test_killed_at_any_time_under_load(open_store: Callable[[], Store], store: Store, url: str, key_file: Path) -> None:
    """Four replicas fight for release-once secrets and are killed one after the other; each secret has one reader."""
    names = [f"a/b/{number:03d}" for number in range(150)]
    for name in names:
        store.secrets.put("acme", name, name.encode(), release_once=True)
    script = """
    import random, threading
    holder, names = arguments[0], [f"a/b/{n:03d}" for n in range(150)]
    random.seed(holder)
    random.shuffle(names)
    lock = threading.Lock()
    def go(part):
        for name in part:
            try:
                value = store.secrets.read("acme", name, holder=holder).decode()
            except Consumed:
                continue
            entry = store.audit.append("acme", holder, "kbs.resource.get", "allowed", {"path": name})
            with lock:
                print(value, flush=True)
    threads = [threading.Thread(target=go, args=(names[n::4],)) for n in range(4)]
    ready()
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    """
    holders = [f"{number:02x}" * 32 for number in range(1, 5)]
    processes = {holder: replica(url, key_file, script, holder) for holder in holders}
    start(*processes.values())
    random.seed(4)
    for holder in holders[:3]:
        time.sleep(random.uniform(0.05, 0.25))
        processes[holder].kill()
    got: dict[str, set[str]] = {name: set() for name in names}
    for holder, process in processes.items():
        output, _ = process.communicate(timeout=120)
        for name in output.split():
            got[name].add(holder)
    assert processes[holders[3]].returncode == 0
    # What a killed replica had claimed but not handed out is its holder's still: it comes back and asks again.
    for name in names:
        for holder in holders:
            try:
                assert store.secrets.read("acme", name, holder=holder) == name.encode()
            except Consumed:
                continue
            got[name].add(holder)
    assert all(len(readers) == 1 for readers in got.values()), "each secret went to one holder, and none is lost"
    report = store.audit.verify()
    assert report.whole
    told = {entry.detail["path"]: entry.actor for entry in store.audit.entries("acme", limit=1000)}
    assert all({reader} == got[name] for name, reader in told.items())


def test_killed_while_it_appends_to_the_audit_trail(store: Store, url: str, key_file: Path) -> None:
    """What was acknowledged is there, the chain is whole, and others go on with it."""
    script = """
    import threading
    lock = threading.Lock()
    def go(n):
        for step in range(1000):
            entry = store.audit.append(("acme", "zeta")[step % 2], f"replica {arguments[0]}", "a.b.c", "done", {"n": n, "step": step})
            with lock:
                print(entry.chain, entry.seq, entry.hash.hex(), flush=True)
    ready()
    for n in range(3): threading.Thread(target=go, args=(n,)).start()
    """
    processes = [replica(url, key_file, script, str(number)) for number in range(3)]
    start(*processes)
    time.sleep(0.6)
    lines: list[str] = []
    for process in processes:
        process.kill()
        output = killed(process)
        # The last line may be cut off.
        lines += output[: output.rfind("\n") + 1].splitlines()
    assert lines
    store.audit.append("acme", "me", "a.b.c", "done")
    report = store.audit.verify()
    assert report.whole and report.entries >= len(lines)
    there = {
        (entry.chain, str(entry.seq), entry.hash.hex())
        for tenant in ("acme", "zeta")
        for entry in store.audit.entries(tenant, limit=100000)
    }
    assert {tuple(line.split()) for line in lines} <= there


def test_killed_while_it_takes_a_nonce(store: Store, url: str, key_file: Path) -> None:
    session = store.sessions.create("acme", "sgx", bytes(32), store.database.now() + timedelta(days=36500))
    script = "print(store.sessions.take('acme', arguments[0]).state, flush=True); die()"
    assert killed(replica(url, key_file, script, session)) == "taken\n"
    refused("verdict.store.session.used", store.sessions.take, "acme", session)


def test_replicas_that_open_a_new_store_at_the_same_time(url: str, key_file: Path) -> None:
    script = "print(store.keyring.store_uid, store.keys.current('ear').kid)"
    processes = [replica(url, key_file, script) for _ in range(4)]
    assert len({done(process) for process in processes}) == 1
