"""Tenants: names, quotas, removal; and that none can reach, or tell of, what another has."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from store_cases import ALICE, refused

from inclavare.errors import InclavareError
from inclavare.verdict.store import SYSTEM, Invalid, NotFound, Quotas, Store
from inclavare.verdict.store import names as checked
from inclavare.verdict.store.models import Base

PEM = """-----BEGIN PUBLIC KEY-----
MCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=
-----END PUBLIC KEY-----
"""


def test_life(store: Store) -> None:
    assert [item.name for item in store.tenants.list()] == ["acme", "zeta"]
    refused("verdict.store.tenant.exists", store.tenants.create, "acme")
    changed = store.tenants.set_quotas("acme", Quotas(secrets=5, requests=7))
    assert changed.quotas == Quotas(secrets=5, requests=7) == store.tenants.get("acme").quotas
    assert changed.to_dict()["quotas"]["requests"] == 7
    refused("verdict.store.tenant.unknown", store.tenants.get, "nobody")
    refused("verdict.store.tenant.unknown", store.tenants.set_quotas, "nobody", Quotas())
    refused("verdict.store.tenant.unknown", store.tenants.delete, "nobody")
    refused("verdict.store.tenant.name", store.tenants.delete, SYSTEM)


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a.b", "a_b", "a" * 64, "ä", "a\n", "..", "a/b", " a", "a\0"])
def test_other_names(store: Store, name: str) -> None:
    refused("verdict.store.tenant.name", store.tenants.create, name)


@given(st.text(max_size=70))
def test_any_text_as_a_name(name: str) -> None:
    try:
        assert checked.tenant(name) == name
    except Invalid:
        assert not re.fullmatch(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?", name)
    else:
        assert re.fullmatch(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?", name)


def fill(store: Store, tenant: str) -> dict[str, Any]:
    """One of everything."""
    soon = store.database.now() + timedelta(minutes=5)
    store.policies.put(tenant, "strict", "toml", f"# {tenant}")
    store.policies.set_default(tenant, "strict")
    store.secrets.put(tenant, "app/key/1", tenant.encode(), policy="strict", release_once=True)
    store.references.trust(tenant, "builder", PEM)
    digest = store.references.register(tenant, f"bundle of {tenant}".encode()).digest
    session = store.sessions.create(tenant, "sgx", tenant.encode() * 8, soon)
    store.evidence.keep(tenant, "cafe", tenant.encode(), tee="sgx")
    token = store.tokens.create(tenant, "robot", "admin", soon).jti
    store.audit.append(tenant, "me", "a.b.c", "done", {"of": tenant})
    return {"digest": digest, "session": session, "jti": token}


def test_removal_takes_everything_but_the_audit_trail(store: Store) -> None:
    known = fill(store, "acme")
    kept = fill(store, "zeta")
    old = store.tenants.get("acme")
    store.tenants.delete("acme")
    assert [item.name for item in store.tenants.list()] == ["zeta"]
    assert store.tokens.is_revoked(known["jti"]) and not store.tokens.is_revoked(kept["jti"])
    refused("verdict.store.tenant.unknown", store.audit.append, "acme", "me", "a.b.c", "done")
    fresh = store.tenants.create("acme")
    assert fresh.uid != old.uid and fresh.used_secrets == fresh.used_bytes == fresh.used_policies == 0
    assert store.audit.entries("acme") == [] and store.secrets.list("acme") == []
    report = store.audit.verify()
    assert (report.chains, report.entries, report.findings) == (4, 2, ()), "the old trail is there still"
    refused("verdict.store.secret.unknown", store.secrets.info, "acme", "app/key/1")
    assert store.secrets.read("zeta", "app/key/1", holder=ALICE) == b"zeta"


Call = Callable[[Store, str, dict[str, Any]], Any]
#: What one tenant can ask for, with the names that another one's things have.
CALLS: dict[str, Call] = {
    "secrets.info": lambda s, t, k: s.secrets.info(t, "app/key/1"),
    "secrets.info version": lambda s, t, k: s.secrets.info(t, "app/key/1", 1),
    "secrets.versions": lambda s, t, k: s.secrets.versions(t, "app/key/1"),
    "secrets.read": lambda s, t, k: s.secrets.read(t, "app/key/1", holder=ALICE),
    "secrets.fetch": lambda s, t, k: s.secrets.fetch(t, "app/key/1", holder=ALICE, version=1),
    "secrets.acknowledge": lambda s, t, k: s.secrets.acknowledge(t, "app/key/1", holder=ALICE),
    "secrets.delete": lambda s, t, k: s.secrets.delete(t, "app/key/1"),
    "policies.get": lambda s, t, k: s.policies.get(t, "strict"),
    "policies.get version": lambda s, t, k: s.policies.get(t, "strict", 1),
    "policies.history": lambda s, t, k: s.policies.history(t, "strict"),
    "policies.rollback": lambda s, t, k: s.policies.rollback(t, "strict", 1),
    "policies.set_default": lambda s, t, k: s.policies.set_default(t, "strict"),
    "policies.delete": lambda s, t, k: s.policies.delete(t, "strict"),
    "references.get": lambda s, t, k: s.references.get(t, k["digest"]),
    "references.revoke": lambda s, t, k: s.references.revoke(t, k["digest"], "wrong"),
    "references.distrust": lambda s, t, k: s.references.distrust(t, "builder"),
    "sessions.get": lambda s, t, k: s.sessions.get(t, k["session"]),
    "sessions.take": lambda s, t, k: s.sessions.take(t, k["session"]),
    "sessions.attest": lambda s, t, k: s.sessions.attest(t, k["session"], holder=ALICE, claims={}),
    "sessions.refuse": lambda s, t, k: s.sessions.refuse(t, k["session"]),
    "evidence.get": lambda s, t, k: s.evidence.get(t, "cafe"),
    "tokens.revoke": lambda s, t, k: s.tokens.revoke(t, k["jti"]),
}
#: What answers with what the tenant has, and never fails.
LISTS: dict[str, Call] = {
    "secrets.list": lambda s, t, k: s.secrets.list(t),
    "policies.list": lambda s, t, k: s.policies.list(t),
    "policies.default": lambda s, t, k: [p for p in [s.policies.default(t, "toml")] if p],
    "references.list": lambda s, t, k: s.references.list(t),
    "references.active": lambda s, t, k: s.references.active(t),
    "references.signers": lambda s, t, k: s.references.signers(t),
    "evidence.list": lambda s, t, k: s.evidence.list(t),
    "tokens.list": lambda s, t, k: s.tokens.list(t),
    "audit.entries": lambda s, t, k: s.audit.entries(t),
}
#: What makes something of the tenant's own (two tenants may give it the same name), or is not of one tenant.
OWN = {
    "secrets.put", "policies.put", "policies.clear_default", "references.register", "references.trust",
    "references.revision", "sessions.create", "evidence.keep", "tokens.create", "tokens.find", "tokens.is_revoked",
    "audit.append", "audit.export", "audit.verify", "audit.checkpoint", "audit.checkpoints", "audit.public_keys",
    "audit.signing_key", "audit.begin", "sessions.purge", "tokens.purge",
}  # fmt: skip


def test_every_method_is_among_these() -> None:
    from inclavare.verdict.store import audit, evidence, policies, references, secrets, sessions, tokens

    parts = {"secrets": secrets.Secrets, "policies": policies.Policies, "references": references.ReferenceBundles,
             "sessions": sessions.Sessions, "evidence": evidence.EvidenceRing, "tokens": tokens.Tokens,
             "audit": audit.Audit}  # fmt: skip
    methods = {
        f"{name}.{method}" for name, part in parts.items() for method in vars(part) if not method.startswith("_")
    }
    assert methods == {name.split()[0] for name in CALLS} | set(LISTS) | OWN


def answer(store: Store, call: Call, tenant: str, known: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A refusal, and the statements that the database was sent on the way to it."""
    statements: list[str] = []

    def executed(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    sa.event.listen(store.database.engine, "before_cursor_execute", executed)
    try:
        with pytest.raises(InclavareError) as caught:
            call(store, tenant, known)
    finally:
        sa.event.remove(store.database.engine, "before_cursor_execute", executed)
    return caught.value.to_dict(), statements


def contents(store: Store) -> dict[str, list[Any]]:
    with store.database.engine.connect() as connection:
        return {
            table.name: sorted(map(repr, connection.execute(sa.select(table)))) for table in Base.metadata.sorted_tables
        }


def test_not_yours_is_the_same_as_not_there(store: Store) -> None:
    """The same refusal, after the same statements: neither its text nor its time tells whether another has it."""
    known = fill(store, "acme")
    nowhere = {"digest": "0" * 64, "session": "x" * 43, "jti": "x" * 22}
    before = contents(store)
    foreign = {name: answer(store, call, "zeta", known) for name, call in CALLS.items()}
    assert contents(store) == before, "and nothing is changed"
    store.tenants.delete("acme")
    absent = {name: answer(store, call, "zeta", nowhere) for name, call in CALLS.items()}
    assert foreign == absent
    for refusal, statements in foreign.values():
        assert statements and refusal["id"].endswith(".unknown") and "acme" not in str(refusal)


def test_lists_hold_what_is_the_tenants(store: Store) -> None:
    known = fill(store, "acme")
    for call in LISTS.values():
        assert len(call(store, "acme", known)) == 1
        assert list(call(store, "zeta", known)) == list(call(store, "nobody", known)) == []
    fill(store, "zeta")
    for call in LISTS.values():
        assert len(call(store, "zeta", known)) == 1 and "acme" not in repr(call(store, "zeta", known))


@pytest.mark.parametrize("guess", ["%", "acm_", "ACME", "acme ", "acme' OR '1'='1", "", "*", "a%"])
def test_the_names_of_tenants_cannot_be_guessed_by_wildcards(store: Store, guess: str) -> None:
    known = fill(store, "acme")
    for call in (CALLS | LISTS).values():
        try:
            assert list(call(store, guess, known)) == []
        except NotFound:
            pass
