"""Policies and reference values: versions, roll-back, validity, revocation; changes in the database are found."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from hashlib import sha256
from typing import Any

import pytest
from store_cases import in_threads, refused, tamper
from test_store_tenants import PEM

from inclavare.errors import InclavareError
from inclavare.verdict.store import Damaged, Quotas, Store


def test_versions_and_roll_back(store: Store, clock: Any) -> None:
    first = store.policies.put("acme", "strict", "toml", "a = 1", author="alice")
    clock.now += 1
    second = store.policies.put("acme", "strict", "toml", "a = 2 # ä", author="bob")
    assert (first.version, second.version) == (1, 2)
    assert store.policies.get("acme", "strict") == second and store.policies.get("acme", "strict", 1) == first
    assert second.sha256 == sha256("a = 2 # ä".encode()).hexdigest()
    back = store.policies.rollback("acme", "strict", 1, author="carol")
    assert (back.version, back.text, back.restored_from, back.author) == (3, "a = 1", 1, "carol")
    assert [item.version for item in store.policies.history("acme", "strict")] == [3, 2, 1]
    assert store.policies.list("acme") == [back]
    refused("verdict.store.policy.unknown", store.policies.rollback, "acme", "strict", 9)
    refused("verdict.store.policy.unknown", store.policies.get, "acme", "strict", 1 << 40)
    refused("verdict.store.policy.kind", store.policies.put, "acme", "strict", "resource-rego", "package policy")


def test_defaults(store: Store) -> None:
    assert store.policies.default("acme", "toml") is None
    for name in ("one", "two"):
        store.policies.put("acme", name, "toml", name)
    store.policies.put("acme", "resources", "resource-rego", "package policy")
    for name in ("two", "one", "one"):
        assert store.policies.set_default("acme", name).default
        assert [item.id for item in store.policies.list("acme") if item.default] == [name]
    store.policies.set_default("acme", "resources")
    changed = store.policies.put("acme", "one", "toml", "newer")
    assert changed.default and store.policies.default("acme", "toml") == changed
    store.policies.clear_default("acme", "toml")
    store.policies.clear_default("acme", "toml")
    assert store.policies.default("acme", "toml") is None
    found = store.policies.default("acme", "resource-rego")
    assert found is not None and found.id == "resources"
    store.policies.delete("acme", "resources")
    assert store.policies.default("acme", "resource-rego") is None


@pytest.mark.parametrize(
    ("id", "kind", "text", "expected"),
    [
        ("", "toml", "", "policy.name"),
        ("a/b", "toml", "", "policy.name"),
        ("ok", "yaml", "", "policy.kind"),
        ("ok", "toml", "a\0b", "policy.text"),
        ("ok", "toml", "\ud800", "policy.text"),
        ("ok", "toml", "x" * ((1 << 20) + 1), "policy.size"),
    ],
)
def test_what_is_no_policy(store: Store, id: str, kind: Any, text: str, expected: str) -> None:
    refused(f"verdict.store.{expected}", store.policies.put, "acme", id, kind, text)


def test_quotas(store: Store) -> None:
    store.tenants.set_quotas("acme", Quotas(policies=1, bytes=10))
    store.policies.put("acme", "one", "toml", "12345")
    refused("verdict.store.quota.policies", store.policies.put, "acme", "two", "toml", "")
    refused("verdict.store.quota.bytes", store.policies.put, "acme", "one", "toml", "123456")
    refused("verdict.store.quota.bytes", store.references.register, "acme", b"123456")
    assert store.policies.rollback("acme", "one", 1).version == 2
    store.policies.delete("acme", "one")
    used = store.tenants.get("acme")
    assert (used.used_policies, used.used_bytes) == (0, 0)


def test_versions_when_many_put_at_the_same_time(store: Store) -> None:
    in_threads(lambda number: store.policies.put("acme", "one", "toml", str(number)), 12)
    history = store.policies.history("acme", "one")
    assert [item.version for item in history] == list(range(12, 0, -1))
    assert {item.text for item in history} == {str(number) for number in range(12)}


POLICY_CHANGES = [
    "policy_versions SET text = 'a = 3'",
    "policy_versions SET text = 'a = 3', sha256 = :sha256",
    "policy_versions SET author = 'mallory'",
    "policy_versions SET created = created + 1",
    "policy_versions SET mac = :mac",
    "policies SET version = 1",
    "policies SET is_default = 0",
    "policies SET kind = 'resource-rego'",
]


@pytest.mark.parametrize("change", POLICY_CHANGES)
def test_policies_cannot_be_loosened_in_the_database(store: Store, change: str) -> None:
    store.policies.put("acme", "one", "toml", "a = 1")
    store.policies.put("acme", "one", "toml", "a = 2")
    store.policies.set_default("acme", "one")
    all_values = {"sha256": sha256(b"a = 3").hexdigest(), "mac": bytes(32)}
    values = {name: value for name, value in all_values.items() if f":{name}" in change}
    assert tamper(store, f"UPDATE {change}", **values)
    error = refused("verdict.store.row.damaged", store.policies.get, "acme", "one")
    assert isinstance(error, Damaged)
    refused("verdict.store.row.damaged", store.policies.list, "acme")
    if "SET is_default" not in change and "SET kind" not in change:
        refused("verdict.store.row.damaged", store.policies.default, "acme", "toml")


def test_a_policy_of_another_tenant_put_in_place(store: Store) -> None:
    store.policies.put("acme", "one", "toml", "strict")
    store.policies.put("zeta", "one", "toml", "loose")
    for column in ("text", "sha256", "mac", "created"):
        tamper(
            store,
            f"UPDATE policy_versions SET {column} = (SELECT v.{column} FROM policy_versions v JOIN tenants t ON "
            f"t.id = v.tenant_id WHERE t.name = 'zeta') WHERE tenant_id = (SELECT id FROM tenants WHERE name = 'acme')",
        )
    refused("verdict.store.row.damaged", store.policies.get, "acme", "one")


def test_reference_bundles(store: Store, clock: Any) -> None:
    now = store.database.now()
    day = timedelta(days=1)
    eastern = timezone(timedelta(hours=5))
    always = store.references.register("acme", b"always", metadata={"subjects": ["app"]}, by="alice")
    clock.now += 1
    valid = store.references.register(
        "acme", b"valid", image="app:1", not_before=now - day, not_after=(now + day).astimezone(eastern)
    )
    clock.now += 1
    store.references.register("acme", b"later", not_before=now + day)
    store.references.register("acme", b"over", not_after=now)
    assert always.digest == sha256(b"always").hexdigest() and always.metadata == {"subjects": ["app"]}
    assert store.references.get("acme", valid.digest) == (valid, b"valid")
    assert valid.not_after == now + day and valid.is_active(store.database.now())
    assert [bundle for _, bundle in store.references.active("acme")] == [b"always", b"valid"]
    assert {item.size for item in store.references.list("acme")} == {6, 5, 4}
    assert [item.is_active(store.database.now()) for item in store.references.list("acme")].count(True) == 2
    clock.now += 86400
    assert [bundle for _, bundle in store.references.active("acme")] == [b"always", b"later"]
    refused("verdict.store.reference.exists", store.references.register, "acme", b"always")
    refused("verdict.store.reference.validity", store.references.register, "acme", b"x", not_after=datetime(2030, 1, 1))
    refused("verdict.store.bundle.size", store.references.register, "acme", bytes((4 << 20) + 1))
    store.references.register("zeta", b"always")


def test_revoked_bundles_do_not_come_back(store: Store) -> None:
    info = store.references.register("acme", b"bundle")
    before = store.references.revision("acme")
    revoked = store.references.revoke("acme", info.digest, "the build host was broken into")
    assert revoked.revoked is not None and revoked.revoked_reason == "the build host was broken into"
    assert store.references.active("acme") == [] and store.references.list("acme") == [revoked]
    assert store.references.revision("acme") != before
    refused("verdict.store.reference.revoked", store.references.revoke, "acme", info.digest, "again")
    refused("verdict.store.reference.exists", store.references.register, "acme", b"bundle")
    refused("verdict.store.reason.name", store.references.revoke, "acme", info.digest, "")


def test_signers(store: Store) -> None:
    before = store.references.revision("acme")
    signer = store.references.trust("acme", "builder", PEM)
    assert store.references.signers("acme") == [signer] and signer.public_key == PEM
    assert store.references.revision("acme") != before
    refused("verdict.store.signer.exists", store.references.trust, "acme", "builder", PEM)
    for junk in ("", "junk", PEM.replace("MCow", "AAAA"), PEM[:60]):
        refused("verdict.store.signer.key", store.references.trust, "acme", "other", junk)
    store.references.distrust("acme", "builder")
    assert store.references.signers("acme") == []
    refused("verdict.store.signer.unknown", store.references.distrust, "acme", "builder")


@pytest.mark.parametrize(
    "change",
    ["revoked = NULL, revoked_reason = NULL", "not_after = NULL", "bundle = :other", "image = 'another'",
     "metadata_json = '{}'", "registered_by = 'mallory'"],
)  # fmt: skip
def test_reference_values_cannot_be_exchanged_in_the_database(store: Store, change: str) -> None:
    info = store.references.register(
        "acme", b"bundle", image="app", metadata={"a": 1}, not_after=store.database.now() + timedelta(days=1)
    )
    if "revoked" in change:
        store.references.revoke("acme", info.digest, "wrong")
    assert (
        tamper(store, f"UPDATE reference_bundles SET {change}", **({"other": b"other"} if ":other" in change else {}))
        == 1
    )
    for call in (lambda: store.references.get("acme", info.digest), lambda: store.references.active("acme")):
        with pytest.raises(Damaged):
            call()


def test_signers_cannot_be_exchanged_in_the_database(store: Store) -> None:
    store.references.trust("acme", "builder", PEM)
    store.references.trust("zeta", "builder", PEM.replace("Gb9", "Ab9"))
    tamper(store, "UPDATE reference_signers SET public_key = :key", key=PEM.replace("Gb9", "Ab9"))
    refused("verdict.store.row.damaged", store.references.signers, "acme")
    assert len(store.references.signers("zeta")) == 1


def test_nothing_is_half_done(store: Store) -> None:
    """A refusal in the middle of a transaction leaves all as it was."""
    store.policies.put("acme", "one", "toml", "1")
    store.tenants.set_quotas("acme", Quotas(policies=5, bytes=3))
    for _ in range(3):
        with pytest.raises(InclavareError):
            store.policies.put("acme", "two", "toml", "12345")
    used = store.tenants.get("acme")
    assert (used.used_policies, used.used_bytes) == (1, 1)
