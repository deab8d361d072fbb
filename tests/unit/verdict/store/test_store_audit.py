"""The audit trail: append-only, and every kind of tampering is found."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from datetime import timedelta
from hashlib import sha256
from typing import Any

import pytest
import rfc8785
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_cases import in_threads, refused, tamper

from inclavare.errors import InclavareError
from inclavare.verdict.store import SYSTEM, AuditReport, Store
from inclavare.verdict.store.audit import verify_export

Open = Callable[[], Store]
ENTRIES = "audit_entries SET {} WHERE seq = 3 AND tenant_id = (SELECT id FROM tenants WHERE name = 'acme')"


@pytest.fixture
def trail(store: Store, clock: Any) -> Store:
    """Six entries of ``acme``, one of ``zeta``."""
    for number in range(6):
        clock.now += 1
        store.audit.append(
            "acme", f"actor {number}", "kbs.resource.get", "denied" if number % 2 else "allowed", {"n": number}
        )
    store.audit.append("zeta", "me", "a.b.c", "done")
    return store


def kinds(report: AuditReport) -> set[str]:
    return {item.id.removeprefix("verdict.store.audit.") for item in report.findings}


def test_entries_are_chained_canonical_json(trail: Store) -> None:
    entries = trail.audit.entries("acme")
    assert [entry.seq for entry in entries] == [1, 2, 3, 4, 5, 6]
    previous = bytes(32)
    for entry in entries:
        # Computed here from the documentation alone.
        document = entry.to_dict()
        del document["hash"]
        assert document["previous"] == previous.hex() and document["chain"] == trail.tenants.get("acme").uid
        previous = sha256(rfc8785.dumps(document)).digest()
        assert entry.hash == previous
    assert trail.audit.verify().to_dict() == {"chains": 3, "entries": 7, "checkpoints": 0, "findings": []}
    assert trail.audit.verify("acme").whole


def test_lists(trail: Store, clock: Any) -> None:
    def numbers(**filters: Any) -> list[int]:
        return [entry.seq for entry in trail.audit.entries("acme", **filters)]

    assert numbers(after=4) == [5, 6] and numbers(before=3) == [1, 2]
    assert numbers(limit=2, newest_first=True) == [6, 5] and numbers(limit=2, newest_first=True, before=5) == [4, 3]
    assert numbers(decision="denied") == [2, 4, 6] and numbers(actor="actor 0") == [1] and numbers(action="x") == []
    now = trail.database.now()
    assert numbers(since=now - timedelta(seconds=1)) == [5, 6] and numbers(until=now) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("fields", "id"),
    [
        (("", "a", "b", {}), "actor.name"),
        (("a\nb", "a", "b", {}), "actor.name"),
        (("a" * 257, "a", "b", {}), "actor.name"),
        (("\ud800", "a", "b", {}), "actor.name"),
        (("a", "", "b", {}), "action.name"),
        (("a", "b", "\0", {}), "decision.name"),
        (("a", "b", "c", {"x": float("nan")}), "detail.json"),
        (("a", "b", "c", {"x": 1 << 60}), "detail.json"),
        (("a", "b", "c", {"x": b"bytes"}), "detail.json"),
        (("a", "b", "c", {"x": "\ud800"}), "detail.json"),
        (("a", "b", "c", {1: "x"}), "detail.json"),
        (("a", "b", "c", {"x": "y" * 70000}), "detail.size"),
    ],
)
def test_what_is_no_entry(store: Store, fields: tuple[Any, ...], id: str) -> None:
    refused(f"verdict.store.{id}", store.audit.append, "acme", *fields)
    assert store.audit.verify().entries == 0


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 60), 1 << 60) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(detail=st.dictionaries(st.text(max_size=8), _JSON, max_size=4))
def test_any_detail_is_refused_or_stands_the_test(store: Store, detail: dict[str, Any]) -> None:
    try:
        entry = store.audit.append("acme", "me", "a.b.c", "done", detail)
    except InclavareError as error:
        assert error.id == "verdict.store.detail.json"
    else:
        assert store.audit.entries("acme", after=entry.seq - 1)[0] == entry
    assert store.audit.verify("acme").whole
    assert verify_export(store.audit.export("acme"), store.audit.public_keys()).whole


@pytest.mark.parametrize("table", ["audit_entries", "audit_checkpoints"])
def test_the_database_refuses_changes(trail: Store, table: str) -> None:
    trail.audit.checkpoint()
    sqlite = trail.database.sqlite
    own = f"INSERT OR REPLACE INTO {table} SELECT * FROM {table}" if sqlite else f"TRUNCATE {table}"
    for statement in (f"UPDATE {table} SET hash = hash", f"DELETE FROM {table}", own):
        error = refused(
            "verdict.store.audit.append_only",
            trail.database.write,
            lambda connection, statement=statement: connection.execute(sa.text(statement)),
        )
        assert table in str(error.found)
        if sqlite:
            # As another program would, without recursive triggers.
            plain = sqlite3.connect(str(trail.database.url.database))
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                plain.execute(statement)
            plain.close()
    assert trail.audit.verify().whole


CHANGES = [
    "actor = 'somebody else'",
    "action = 'kbs.resource.put'",
    "decision = 'denied'",
    "detail = '{\"n\":7}'",
    "detail = '{ \"n\":2}'",
    "detail = 'no JSON'",
    "detail = '[]'",
    "detail = '{\"n\":NaN}'",
    "time = time + 1",
    "time = 9000000000000000000",
    "previous = hash",
    "hash = previous",
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_entry(trail: Store, change: str) -> None:
    assert tamper(trail, "UPDATE " + ENTRIES.format(change)) == 1
    report = trail.audit.verify("acme")
    assert "changed" in kinds(report) and {3} <= {item.seq for item in report.findings}
    assert trail.audit.verify("zeta").whole
    assert all(item.message and item.chain == trail.tenants.get("acme").uid for item in report.findings)
    try:
        exported = verify_export(trail.audit.export("acme"), trail.audit.public_keys())
    except (InclavareError, ValueError):
        return
    # White space is not in an export.
    assert exported.whole == (change == CHANGES[4])


def rechained(store: Store, first: int, **changes: Any) -> None:
    """Change an entry, and compute all hashes anew, as somebody who knows the format but not the key."""
    previous = None
    for entry in store.audit.entries("acme"):
        document = entry.to_dict()
        document.pop("hash")
        if previous is not None:
            document["previous"] = previous.hex()
        if entry.seq == first:
            document |= changes
        previous = sha256(rfc8785.dumps(document)).digest()
        tamper(
            store,
            "UPDATE audit_entries SET decision = :d, previous = :p, hash = :h WHERE seq = :s AND tenant_id = "
            "(SELECT id FROM tenants WHERE name = 'acme')",
            d=document["decision"], p=bytes.fromhex(document["previous"]), h=previous, s=entry.seq,
        )  # fmt: skip


def test_an_entry_that_is_changed_with_all_that_follow(trail: Store) -> None:
    trail.audit.checkpoint()
    rechained(trail, 3, decision="denied")
    report = trail.audit.verify("acme")
    assert kinds(report) == {"tail", "checkpoint"}
    assert "signed head is entry 6" in report.findings[-1].message or any(
        "signed head" in f.message for f in report.findings
    )


def test_and_the_head_with_them(trail: Store) -> None:
    rechained(trail, 3, decision="denied")
    tamper(trail, "UPDATE audit_heads SET hash = (SELECT hash FROM audit_entries WHERE seq = 6)")
    assert kinds(trail.audit.verify("acme")) == {"head"}


def test_removed_entries(trail: Store) -> None:
    where = "DELETE FROM audit_entries WHERE tenant_id = (SELECT id FROM tenants WHERE name = 'acme') AND seq "
    assert tamper(trail, where + "= 3") == 1
    report = trail.audit.verify()
    assert [(item.seq, item.message) for item in report.findings] == [(4, "entry 3 is missing")]
    assert tamper(trail, where + "IN (1, 2)") == 2
    assert [item.message for item in trail.audit.verify().findings] == ["entry 1 to 3 are missing"]
    assert kinds(verify_export(trail.audit.export("acme"), trail.audit.public_keys())) == {"missing"}


def test_reordered_entries(trail: Store) -> None:
    where = (
        "UPDATE audit_entries SET seq = {} WHERE seq = {} AND tenant_id = (SELECT id FROM tenants WHERE name = 'acme')"
    )
    for new, old in ((99, 3), (3, 4), (4, 99)):
        assert tamper(trail, where.format(new, old)) == 1
    assert {"changed", "order"} <= kinds(trail.audit.verify("acme"))


def test_an_entry_of_another_chain(trail: Store) -> None:
    tamper(
        trail, "DELETE FROM audit_entries WHERE seq = 1 AND tenant_id = (SELECT id FROM tenants WHERE name = 'zeta')"
    )
    statement = (
        "UPDATE audit_entries SET tenant_id = (SELECT id FROM tenants WHERE name = 'zeta') WHERE seq = 1 AND "
        "tenant_id = (SELECT id FROM tenants WHERE name = 'acme')"
    )
    assert tamper(trail, statement) == 1
    assert {"changed", "tail"} <= kinds(trail.audit.verify("zeta"))
    assert {"missing"} <= kinds(trail.audit.verify("acme"))


def test_a_tail_that_was_cut_off(trail: Store) -> None:
    assert tamper(trail, "DELETE FROM audit_entries WHERE seq > 4") == 2
    report = trail.audit.verify("acme")
    assert [(item.id, item.seq) for item in report.findings] == [("verdict.store.audit.tail", 6)]
    assert kinds(verify_export(trail.audit.export("acme"), trail.audit.public_keys())) == {"tail"}


def test_a_tail_that_was_cut_off_with_its_head_put_back(trail: Store, open_store: Open) -> None:
    """An older head is genuine: a checkpoint tells that there was more; kept elsewhere, even if it is removed here."""
    with trail.database.engine.connect() as connection:
        old = (
            connection.execute(
                sa.text(
                    "SELECT seq, hash, kid, signature FROM audit_heads h JOIN tenants t ON t.id = h.tenant_id WHERE t.name = 'acme'"
                )
            )
            .one()
            ._asdict()
        )
    trail.audit.append("acme", "thief", "kbs.resource.get", "allowed")
    kept = trail.audit.checkpoint()
    tamper(trail, "DELETE FROM audit_entries WHERE seq = 7")
    tamper(trail, "UPDATE audit_heads SET seq = :seq, hash = :hash, kid = :kid, signature = :signature WHERE tenant_id = "
                  "(SELECT id FROM tenants WHERE name = 'acme')", **old)  # fmt: skip
    assert kinds(trail.audit.verify()) == {"tail"}
    tamper(trail, "DELETE FROM audit_checkpoints")
    assert trail.audit.verify().whole, "a database that was rolled back as a whole is consistent in itself"
    report = trail.audit.verify(anchors=[kept])
    assert kinds(report) == {"tail", "checkpoint"}
    trail.audit.append("acme", "thief", "kbs.resource.get", "denied")
    assert "checkpoint" in kinds(trail.audit.verify(anchors=[json.loads(json.dumps(kept))]))


def test_heads(trail: Store) -> None:
    tamper(trail, "UPDATE audit_heads SET signature = hash")
    assert kinds(trail.audit.verify()) == {"head"}
    tamper(trail, "DELETE FROM audit_heads")
    assert kinds(trail.audit.verify()) == {"head"}
    refused("verdict.store.audit.head", lambda: list(trail.audit.export("acme")))


def test_a_head_signed_by_a_key_that_somebody_put_beside_ours(trail: Store, open_store: Open) -> None:
    """A row in signing_keys does not make a key: it has to open under the store's root key."""
    tamper(trail, "UPDATE signing_keys SET kid = 'x'")
    refused("verdict.store.ciphertext.damaged", trail.audit.verify)


def test_checkpoints(trail: Store) -> None:
    first = trail.audit.checkpoint()
    trail.audit.append("zeta", "me", "a.b.c", "done")
    trail.audit.checkpoint()
    third = trail.audit.checkpoint()
    assert trail.audit.checkpoints(limit=2)[0] == third
    assert trail.audit.verify(anchors=[first, third]).to_dict()["findings"] == []
    foreign = {**first, "body": first["body"].replace('"seq":6', '"seq":5')}
    assert kinds(trail.audit.verify(anchors=[foreign])) == {"checkpoint"}
    tamper(trail, "UPDATE audit_checkpoints SET body = replace(body, '\"seq\":6', '\"seq\":5') WHERE number = 1")
    assert kinds(trail.audit.verify()) == {"checkpoint"}
    tamper(trail, "DELETE FROM audit_checkpoints WHERE number = 1")
    assert kinds(trail.audit.verify()) == {"checkpoint"}


def test_a_tenant_that_was_removed_with_its_trail(trail: Store) -> None:
    trail.audit.checkpoint()
    for table in ("audit_entries", "audit_heads"):
        tamper(trail, f"DELETE FROM {table} WHERE tenant_id = (SELECT id FROM tenants WHERE name = 'zeta')")
    assert kinds(trail.audit.verify()) == {"head", "tail"}
    tamper(trail, "DELETE FROM tenants WHERE name = 'zeta'")
    assert kinds(trail.audit.verify()) == {"missing"}


def test_many_who_append_at_the_same_time_keep_one_chain(open_store: Open, store: Store) -> None:
    replicas = [store, open_store(), open_store()]

    def work(number: int) -> None:
        for step in range(5):
            replicas[number % 3].audit.append(
                ("acme", "zeta")[(number + step) % 2], f"{number}", "a.b.c", "done", {"step": step}
            )

    in_threads(work, 12)
    report = store.audit.verify()
    assert (report.entries, report.findings) == (60, ())
    for tenant in ("acme", "zeta"):
        entries = store.audit.entries(tenant)
        assert [entry.seq for entry in entries] == list(range(1, 31))
        assert [entry.time for entry in entries] == sorted(entry.time for entry in entries)


def test_who_has_no_trail_spoils_nothing_for_those_who_append_beside(store: Store) -> None:
    outcomes: dict[int, object] = {}

    def work(number: int) -> None:
        try:
            outcomes[number] = store.audit.append(
                ("acme", "nobody", "zeta")[number % 3], "me", "a.b.c", "done"
            ).decision
        except InclavareError as error:
            outcomes[number] = error.id

    in_threads(work, 18)
    expected = ("done", "verdict.store.tenant.unknown", "done")
    assert outcomes == {number: expected[number % 3] for number in range(18)}
    assert store.audit.verify().whole and len(store.audit.entries("acme")) == len(store.audit.entries("zeta")) == 6


def test_keys_of_long_ago_verify_what_they_signed(trail: Store, clock: Any) -> None:
    kept = trail.audit.checkpoint()
    trail.keys.rotate("audit", overlap=timedelta(0))
    trail.audit.append("acme", "me", "a.b.c", "done")
    clock.now += 10 * 86400
    trail.purge()
    assert trail.audit.verify(anchors=[kept]).whole
    assert len(trail.audit.public_keys()) == 2


def test_the_services_own_trail(store: Store) -> None:
    store.audit.append(SYSTEM, "root", "verdict.tenant.create", "done", {"tenant": "acme"})
    assert store.audit.verify(SYSTEM).entries == 1
    assert SYSTEM not in [tenant.name for tenant in store.tenants.list()]
    refused("verdict.store.tenant.unknown", store.audit.append, "nobody", "a", "b", "c")
    refused("verdict.store.tenant.unknown", store.audit.verify, "nobody")
    refused("verdict.store.tenant.unknown", lambda: next(store.audit.export("nobody")))


def test_an_export_stands_alone(trail: Store) -> None:
    lines = list(trail.audit.export("acme"))
    keys = trail.audit.public_keys()
    assert len(lines) == 8 and all(json.loads(line) for line in lines)
    assert verify_export(lines, keys).to_dict() == {"chains": 1, "entries": 6, "checkpoints": 0, "findings": []}
    assert kinds(verify_export(lines, [])) == {"head"}, "the keys in the export itself prove nothing"
    assert kinds(verify_export(lines[:-1], keys)) == {"tail"}
    assert kinds(verify_export([*lines[:5], *lines[6:]], keys)) == {"missing"}
    assert kinds(verify_export([*lines[:3], lines[4], lines[3], *lines[5:]], keys)) == {"missing", "order"}
    assert kinds(verify_export([*lines[:-2], lines[-1]], keys)) == {"tail"}
    assert kinds(verify_export([line.replace("actor 3", "actor 4") for line in lines], keys)) == {"changed"}
    other = list(trail.audit.export("zeta"))
    assert "head" in kinds(verify_export([lines[0], *lines[1:7], other[-1]], keys))
    for broken in (
        [],
        ["{}"],
        ["x"],
        lines[1:],
        [*lines, lines[-1]],
        [lines[0], "[]"],
        [lines[0], '{"seq":1}'],
        [lines[0], "[" * 10000],
    ):
        refused("verdict.store.audit.export", verify_export, broken, keys)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_byte_of_an_export_can_be_changed(trail: Store, data: st.DataObject) -> None:
    """Except where it means the same, or in what only the header says."""
    lines = list(trail.audit.export("acme"))
    number = data.draw(st.integers(1, len(lines) - 1))
    raw = bytearray(lines[number].encode())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        changed = raw.decode()
        report = verify_export([*lines[:number], changed, *lines[number + 1 :]], trail.audit.public_keys())
    except (UnicodeDecodeError, InclavareError):
        return
    if report.whole:
        same = json.loads(changed)
        assert {name: str(value).lower() for name, value in same.items()} == {
            name: str(value).lower() for name, value in json.loads(lines[number]).items()
        }
