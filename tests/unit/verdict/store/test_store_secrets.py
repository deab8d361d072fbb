"""Secrets: paths, versions, quotas, and what is released once only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from store_cases import ALICE, BOB, in_threads, refused, tamper

from inclavare.errors import InclavareError
from inclavare.verdict.store import Consumed, Damaged, Invalid, Quotas, Store
from inclavare.verdict.store import names as checked


def test_round_trip_and_versions(store: Store) -> None:
    first = store.secrets.put("acme", "app/key/1", b"one", metadata={"owner": "team Ä"})
    second = store.secrets.put("acme", "app/key/1", bytes(range(256)) * 4096)
    assert (first.version, second.version, second.size) == (1, 2, 1 << 20)
    assert store.secrets.read("acme", "app/key/1", holder=ALICE) == bytes(range(256)) * 4096
    assert store.secrets.read("acme", "app/key/1", holder=BOB, version=1) == b"one"
    assert [item.version for item in store.secrets.versions("acme", "app/key/1")] == [2, 1]
    assert store.secrets.info("acme", "app/key/1", 1).metadata == {"owner": "team Ä"}
    assert store.secrets.info("acme", "app/key/1") == second
    store.secrets.put("acme", "app/key/0", b"")
    assert [item.path for item in store.secrets.list("acme")] == ["app/key/0", "app/key/1"]
    assert [item.path for item in store.secrets.list("acme", after="app/key/0")] == ["app/key/1"]
    assert [item.path for item in store.secrets.list("acme", limit=1)] == ["app/key/0"]
    assert store.secrets.read("acme", "app/key/0", holder=ALICE) == b""


def test_values_are_nowhere_to_be_seen(store: Store) -> None:
    value = b"correct horse battery staple"
    info = store.secrets.put("acme", "app/key/1", value)
    secret = store.secrets.fetch("acme", "app/key/1", holder=ALICE)
    for shown in (repr(info), repr(secret), str(secret.to_dict())):
        assert value.decode() not in shown and value.hex() not in shown
    with store.database.engine.connect() as connection:
        for table in sa.inspect(connection).get_table_names():
            for row in connection.execute(sa.select(sa.text("*")).select_from(sa.table(table))):
                assert not any(value in bytes(item) for item in row if isinstance(item, bytes | memoryview))
                assert not any(value.decode() in item for item in row if isinstance(item, str))
    if store.database.sqlite:
        files = Path(str(store.database.url.database)).parent.iterdir()
        assert value not in b"".join(path.read_bytes() for path in files)


def test_numbers_of_versions_do_not_come_twice(store: Store) -> None:
    for value in (b"1", b"2", b"3"):
        store.secrets.put("acme", "app/key/1", value)
    assert store.secrets.delete("acme", "app/key/1", 3) == 1
    assert store.secrets.read("acme", "app/key/1", holder=ALICE) == b"2"
    assert store.secrets.put("acme", "app/key/1", b"4").version == 4
    assert store.secrets.delete("acme", "app/key/1") == 3
    refused("verdict.store.secret.unknown", store.secrets.info, "acme", "app/key/1")
    refused("verdict.store.secret.unknown", store.secrets.delete, "acme", "app/key/1")
    for number in (0, -1, 1 << 40, 1 << 62):
        refused("verdict.store.secret.unknown", store.secrets.read, "acme", "app/key/1", holder=ALICE, version=number)
    assert store.secrets.list("acme") == []
    assert store.secrets.put("acme", "app/key/1", b"5").version == 5


@pytest.mark.parametrize(
    "path",
    ["", "a", "a/b", "a/b/c/d", "/a/b/c", "a//c", "../a/b", "a/../b", "a/./b", "a/b/.c", "a/b/c.", "a/b/c\n", "a b/c/d",
     "a/b/ü", "a/b/c\0", "a/b/\ud800", "-a/b/c", "a/b/" + "c" * 129, "a\\b/c/d", "a/b/c?x", "a/b/c%2f"],
)  # fmt: skip
def test_other_paths(store: Store, path: str) -> None:
    refused("verdict.store.path.name", store.secrets.put, "acme", path, b"v")
    with pytest.raises(InclavareError) as caught:
        store.secrets.read("acme", path, holder=ALICE)
    assert caught.value.id == ("verdict.store.value" if unstorable(store, path) else "verdict.store.secret.unknown")


def unstorable(store: Store, text: str) -> bool:
    return "\ud800" in text or ("\0" in text and not store.database.sqlite)


@given(st.text(max_size=40))
def test_any_text_as_a_path(path: str) -> None:
    try:
        taken = checked.path(path)
    except Invalid:
        return
    parts = taken.split("/")
    assert len(parts) == 3 and all(parts) and not {".", ".."} & set(parts)
    assert taken.isascii() and taken.isprintable() and " " not in taken


@given(st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,20}[A-Za-z0-9_-](/[A-Za-z0-9_]{1,5}){2}", fullmatch=True))
def test_paths_of_the_documented_form_are_taken(path: str) -> None:
    assert checked.path(path) == path


def test_too_large(store: Store) -> None:
    refused("verdict.store.secret.size", store.secrets.put, "acme", "a/b/c", bytes((1 << 20) + 1))
    refused(
        "verdict.store.metadata.size",
        store.secrets.put,
        "acme",
        "a/b/c",
        b"",
        metadata={str(n): "x" * 2000 for n in range(3)},
    )
    refused("verdict.store.metadata.name", store.secrets.put, "acme", "a/b/c", b"", metadata={"a": "b\nc"})
    refused("verdict.store.holder.name", store.secrets.read, "acme", "a/b/c", holder="Alice")


def test_a_policy_has_to_be_there_and_stays_while_it_is_used(store: Store) -> None:
    refused("verdict.store.secret.policy", store.secrets.put, "acme", "a/b/c", b"v", policy="strict")
    store.policies.put("zeta", "strict", "resource-rego", "package policy")
    refused("verdict.store.secret.policy", store.secrets.put, "acme", "a/b/c", b"v", policy="strict")
    store.policies.put("acme", "strict", "resource-rego", "package policy")
    store.secrets.put("acme", "a/b/c", b"v", policy="strict")
    refused("verdict.store.policy.used", store.policies.delete, "acme", "strict")
    store.secrets.delete("acme", "a/b/c")
    store.policies.delete("acme", "strict")


def test_quotas(store: Store) -> None:
    store.tenants.set_quotas("acme", Quotas(secrets=2, bytes=10, policies=1))
    store.secrets.put("acme", "a/b/1", b"1234")
    store.secrets.put("acme", "a/b/1", b"1234")
    error = refused("verdict.store.quota.bytes", store.secrets.put, "acme", "a/b/1", b"123")
    assert (error.found, error.expected) == ("8 in use, 3 more", "at most 10")
    store.secrets.put("acme", "a/b/2", b"12")
    refused("verdict.store.quota.secrets", store.secrets.put, "acme", "a/b/3", b"")
    refused("verdict.store.secret.unknown", store.secrets.info, "acme", "a/b/3")
    store.secrets.put("zeta", "a/b/3", b"others are not concerned")
    assert store.secrets.delete("acme", "a/b/1", 1) == 1
    used = store.tenants.get("acme")
    assert (used.used_secrets, used.used_bytes) == (2, 6)
    store.secrets.delete("acme", "a/b/1")
    store.secrets.put("acme", "a/b/3", b"")
    refused("verdict.store.quota.value", store.tenants.set_quotas, "acme", Quotas(secrets=-1))


def test_quotas_hold_when_many_put_at_the_same_time(open_store: Callable[[], Store], store: Store) -> None:
    store.tenants.set_quotas("acme", Quotas(secrets=7, bytes=1000))
    replicas = [open_store(), store]
    results: Counter[str] = Counter()

    def go(number: int) -> None:
        try:
            replicas[number % 2].secrets.put("acme", f"a/b/{number % 15}", b"x" * 10)
            results["put"] += 1
        except InclavareError as error:
            results[error.id] += 1

    in_threads(go, 30)
    used = store.tenants.get("acme")
    assert used.used_secrets == len(store.secrets.list("acme")) == 7
    assert used.used_bytes == 10 * results["put"]
    assert set(results) == {"put", "verdict.store.quota.secrets"}


def test_versions_when_many_put_at_the_same_time(open_store: Callable[[], Store], store: Store) -> None:
    replicas = [open_store(), store]
    in_threads(lambda n: replicas[n % 2].secrets.put("acme", "a/b/c", str(n).encode()), 20)
    assert [item.version for item in store.secrets.versions("acme", "a/b/c")] == list(range(20, 0, -1))
    values = {store.secrets.read("acme", "a/b/c", holder=ALICE, version=n + 1) for n in range(20)}
    assert values == {str(n).encode() for n in range(20)}


def test_release_once(store: Store) -> None:
    store.secrets.put("acme", "a/b/c", b"once", release_once=True)
    secret = store.secrets.fetch("acme", "a/b/c", holder=ALICE)
    assert (secret.value, secret.info.released_to) == (b"once", ALICE)
    error = refused("verdict.store.secret.consumed", store.secrets.read, "acme", "a/b/c", holder=BOB)
    assert isinstance(error, Consumed) and ALICE not in error.one_line()
    assert store.secrets.read("acme", "a/b/c", holder=ALICE) == b"once", "may try again until it has acknowledged"
    refused("verdict.store.secret.consumed", store.secrets.acknowledge, "acme", "a/b/c", holder=BOB)
    acknowledged = store.secrets.acknowledge("acme", "a/b/c", holder=ALICE)
    assert acknowledged.acknowledged is not None
    assert store.secrets.acknowledge("acme", "a/b/c", holder=ALICE) == acknowledged
    refused("verdict.store.secret.consumed", store.secrets.read, "acme", "a/b/c", holder=ALICE)
    assert store.tenants.get("acme").used_bytes == 0
    with store.database.engine.connect() as connection:
        query = sa.text("SELECT sealed, wrapped_key FROM secret_versions")
        assert [bytes(item) for item in connection.execute(query).one()] == [b"", b""], "it is erased"
    store.secrets.put("acme", "a/b/c", b"twice", release_once=True)
    assert store.secrets.read("acme", "a/b/c", holder=BOB) == b"twice", "each version is released once"
    refused("verdict.store.secret.consumed", store.secrets.read, "acme", "a/b/c", holder=ALICE)
    refused("verdict.store.secret.consumed", store.secrets.read, "acme", "a/b/c", holder=BOB, version=1)
    store.secrets.delete("acme", "a/b/c")
    assert store.tenants.get("acme").used_bytes == 0


def test_only_release_once_secrets_are_acknowledged(store: Store) -> None:
    store.secrets.put("acme", "a/b/c", b"v")
    refused("verdict.store.secret.acknowledge", store.secrets.acknowledge, "acme", "a/b/c", holder=ALICE)
    refused("verdict.store.secret.unknown", store.secrets.acknowledge, "zeta", "a/b/c", holder=ALICE)


def test_one_of_many_holders_gets_it(open_store: Callable[[], Store], store: Store) -> None:
    replicas = [store, open_store(), open_store()]
    for path in ("a/b/1", "a/b/2", "a/b/3"):
        store.secrets.put("acme", path, b"once", release_once=True)
        got: Counter[str] = Counter()

        def go(number: int, path: str = path, got: Counter[str] = got) -> None:
            holder = f"{number % 8:02x}" * 32
            try:
                assert replicas[number % 3].secrets.read("acme", path, holder=holder) == b"once"
                got[holder] += 1
            except Consumed:
                pass

        in_threads(go, 24)
        assert len(got) == 1 and set(got.values()) == {3}, "one holder, and it as often as it asks"


@pytest.mark.parametrize(
    ("change", "id"),
    [
        ("sealed = :junk", "ciphertext"),
        ("wrapped_key = :junk", "ciphertext"),
        ("policy = NULL", "ciphertext"),
        ("policy = 'loose'", "ciphertext"),
        ("release_once = 0, released_to = NULL", "ciphertext"),
        ("tenant_id = (SELECT id FROM tenants WHERE name = 'zeta')", "ciphertext"),
        ("path = 'a/b/other'", "ciphertext"),
        ("version = 7", "ciphertext"),
    ],
)
def test_what_decides_on_a_release_cannot_be_changed_in_the_database(store: Store, change: str, id: str) -> None:
    for policy in ("strict", "loose"):
        for tenant in ("acme", "zeta"):
            store.policies.put(tenant, policy, "resource-rego", policy)
    store.secrets.put("acme", "a/b/c", b"v", policy="strict", release_once=True)
    for tenant in ("acme", "zeta"):
        store.secrets.put(tenant, "a/b/other", b"v")
        store.secrets.put(tenant, "a/b/c", b"v")
    tamper(store, "DELETE FROM secret_versions WHERE NOT (path = 'a/b/c' AND version = 1 AND release_once = 1)")
    tamper(store, "UPDATE secrets SET version = 7 WHERE path = 'a/b/c'" if "version" in change else "SELECT 1")
    values = {"junk": bytes(60)} if ":junk" in change else {}
    assert tamper(store, f"UPDATE secret_versions SET {change}", **values) == 1
    tenant = "zeta" if "tenant_id" in change else "acme"
    path = "a/b/other" if "path" in change else "a/b/c"
    number = 7 if "version" in change else 1
    error = refused(f"verdict.store.{id}.damaged", store.secrets.read, tenant, path, holder=ALICE, version=number)
    assert isinstance(error, Damaged)
