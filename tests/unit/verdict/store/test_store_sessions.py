"""Sessions and nonces, evidence for dry-runs, admin tokens, signing keys."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from store_cases import ALICE, in_threads, refused, tamper

from inclavare.verdict.store import SYSTEM, Consumed, Store
from inclavare.verdict.store.evidence import EvidenceRing
from inclavare.verdict.store.keys import CACHE_SECONDS

Open = Callable[[], Store]
NONCE = bytes(range(32))


def begin(store: Store, nonce: bytes = NONCE) -> str:
    return store.sessions.create("acme", "sgx", nonce, store.database.now() + timedelta(minutes=5))


def test_a_session_and_its_states(store: Store, open_store: Open) -> None:
    id = begin(store)
    other = open_store()
    fresh = other.sessions.get("acme", id)
    assert (fresh.state, fresh.nonce, fresh.tee, fresh.claims) == ("new", NONCE, "sgx", None)
    assert other.sessions.take("acme", id).state == "taken"
    error = refused("verdict.store.session.used", store.sessions.take, "acme", id)
    assert isinstance(error, Consumed)
    done = store.sessions.attest("acme", id, holder=ALICE, claims={"mrenclave": "00"}, token="a.b.c")
    assert done == other.sessions.get("acme", id)
    assert (done.state, done.holder, done.claims, done.token) == ("attested", ALICE, {"mrenclave": "00"}, "a.b.c")
    assert "a.b.c" not in repr(done) and "token" not in done.to_dict()
    refused("verdict.store.session.used", other.sessions.attest, "acme", id, holder=ALICE, claims={})
    refused("verdict.store.session.used", other.sessions.refuse, "acme", id)


def test_a_refused_session_is_of_no_use(store: Store) -> None:
    id = begin(store)
    store.sessions.take("acme", id)
    assert store.sessions.refuse("acme", id).state == "refused"
    for call in (lambda: store.sessions.take("acme", id),
                 lambda: store.sessions.attest("acme", id, holder=ALICE, claims={})):  # fmt: skip
        refused("verdict.store.session.used", call)


def test_expiry_and_purge(store: Store, clock: Any) -> None:
    id = begin(store)
    clock.now += 300
    for call in (store.sessions.get, store.sessions.take, store.sessions.refuse):
        refused("verdict.store.session.unknown", call, "acme", id)
    refused("verdict.store.session.unknown", store.sessions.attest, "acme", id, holder=ALICE, claims={})
    begin(store, bytes(32))
    assert store.sessions.purge() == 1 and store.sessions.purge() == 0
    refused("verdict.store.session.expires", store.sessions.create, "acme", "sgx", bytes(16), store.database.now())


def test_nonces_are_used_once(store: Store, open_store: Open) -> None:
    begin(store)
    refused("verdict.store.session.nonce_used", begin, open_store())
    refused(
        "verdict.store.session.nonce_used",
        store.sessions.create,
        "zeta",
        "sgx",
        NONCE,
        store.database.now() + timedelta(1),
    )
    for nonce in (b"", bytes(15), bytes(65)):
        refused("verdict.store.session.nonce", begin, store, nonce)
    refused(
        "verdict.store.tee.name", store.sessions.create, "acme", "a b", bytes(32), store.database.now() + timedelta(1)
    )


def test_one_of_many_takes_the_nonce(store: Store, open_store: Open) -> None:
    replicas = [store, open_store(), open_store()]
    for verb in ("take", "attest"):
        id = begin(store, verb.encode().ljust(32))
        results: Counter[str] = Counter()

        def go(number: int, id: str = id, verb: str = verb, results: Counter[str] = results) -> None:
            sessions = replicas[number % 3].sessions
            try:
                sessions.take("acme", id) if verb == "take" else sessions.attest(
                    "acme", id, holder=ALICE, claims={"n": number}
                )
                results["got it"] += 1
            except Consumed:
                results["too late"] += 1

        in_threads(go, 18)
        assert results == {"got it": 1, "too late": 17}


def test_who_reads_the_database_cannot_take_over_a_session(store: Store) -> None:
    id = begin(store)
    assert len(id) == 43
    with store.database.engine.connect() as connection:
        row = connection.execute(sa.text("SELECT * FROM sessions")).one()
    assert id not in repr(row) and id.encode() not in repr(row).encode()
    refused("verdict.store.session.unknown", store.sessions.get, "acme", bytes(row.id_hash).hex())


@pytest.mark.parametrize("claims", [{"x": float("inf")}, {"x": b""}, {"x": "y" * (257 << 10)}])
def test_claims_are_json_of_a_reasonable_size(store: Store, claims: dict[str, Any]) -> None:
    id = begin(store)
    with pytest.raises(Exception, match="claims"):
        store.sessions.attest("acme", id, holder=ALICE, claims=claims)
    assert store.sessions.get("acme", id).state == "new"


# --- evidence


def test_evidence_is_a_ring(store: Store, clock: Any) -> None:
    ring = EvidenceRing(store.database, limit=3, bytes=100)
    for number in range(5):
        clock.now += 1
        ring.keep("acme", f"{number:02x}", b"x" * 10, tee="sgx")
    ring.keep("zeta", "aa", b"another tenant's")
    assert [item.digest for item in ring.list("acme")] == ["04", "03", "02"]
    clock.now += 1
    ring.keep("acme", "02", b"again")
    assert [item.digest for item in ring.list("acme")] == ["02", "04", "03"]
    assert ring.get("acme", "02").envelope == b"again" and b"again" not in repr(ring.get("acme", "02")).encode()
    refused("verdict.store.evidence.unknown", ring.get, "acme", "00")
    clock.now += 1
    ring.keep("acme", "05", b"y" * 86)
    assert [item.digest for item in ring.list("acme")] == ["05", "02"], "and no more bytes than that"
    refused("verdict.store.evidence.size", ring.keep, "acme", "06", bytes(101))
    refused("verdict.store.digest.name", ring.keep, "acme", "XX", b"")
    assert len(ring.list("zeta")) == 1


def test_the_ring_holds_when_many_keep_at_the_same_time(store: Store, open_store: Open) -> None:
    rings = [EvidenceRing(item.database, limit=4) for item in (store, open_store())]
    in_threads(lambda number: rings[number % 2].keep("acme", f"{number:02x}", b"x"), 16)
    assert len(store.evidence.list("acme")) == 4


# --- admin tokens


def test_tokens(store: Store, open_store: Open, clock: Any) -> None:
    soon = store.database.now() + timedelta(hours=1)
    token = store.tokens.create("acme", "robot", "operator", soon)
    root = store.tokens.create(SYSTEM, "root", "admin", soon)
    other = open_store()
    assert other.tokens.find(token.jti) == token and other.tokens.find(root.jti) == root
    assert store.tokens.list("acme") == [token]
    revoked = store.tokens.revoke("acme", token.jti)
    assert revoked.revoked is not None and store.tokens.revoke("acme", token.jti) == revoked
    assert other.tokens.is_revoked(token.jti) and not other.tokens.is_revoked(root.jti)
    assert other.tokens.is_revoked("nobody knows it"), "what is not known is refused"
    clock.now += 3600
    assert other.tokens.is_revoked(root.jti)
    assert store.tokens.purge() == 2
    refused(
        "verdict.store.token.role", store.tokens.create, "acme", "robot", "root", store.database.now() + timedelta(1)
    )
    refused("verdict.store.token.expires", store.tokens.create, "acme", "robot", "admin", store.database.now())
    refused("verdict.store.token.name", store.tokens.create, "acme", "", "admin", store.database.now() + timedelta(1))


# --- signing keys


def test_keys_are_made_once_and_shared(store: Store, open_store: Open) -> None:
    replicas = [store, open_store(), open_store()]
    made: set[str] = set()
    in_threads(lambda number: made.add(replicas[number % 3].keys.current("ear").kid), 9)
    assert len(made) == 1
    key = store.keys.current("ear")
    assert isinstance(key.private, EllipticCurvePrivateKey) and key.algorithm == "ES256"
    assert len({store.keys.current(kind).kid for kind in ("ear", "admin", "audit")}) == 3  # type: ignore[arg-type]
    assert store.keys.current("admin").algorithm == "EdDSA"


def test_public_keys_are_jwks_named_by_their_thumbprint(store: Store) -> None:
    from joserfc.jwk import import_key

    for kind in ("ear", "admin"):
        jwk = store.keys.current(kind).public_jwk()
        assert set(jwk) - {"y"} == {"kty", "crv", "x", "kid", "alg", "use"} and "d" not in jwk
        assert import_key(json.loads(json.dumps(jwk))).thumbprint() == jwk["kid"]


def test_rotation_has_an_overlap(store: Store, open_store: Open, clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from inclavare.verdict.store import keys

    ticks = [0.0]
    monkeypatch.setattr(keys.time, "monotonic", lambda: ticks[0])
    other = open_store()
    old = store.keys.current("ear")
    assert other.keys.current("ear").kid == old.kid
    new = store.keys.rotate("ear", overlap=timedelta(hours=1))
    assert new.kid != old.kid and store.keys.current("ear").kid == new.kid
    assert other.keys.current("ear").kid == old.kid, "another replica signs with the old key a little longer"
    assert [key.kid for key in other.keys.list("ear")] == [new.kid, old.kid], "which is accepted everywhere"
    ticks[0] += CACHE_SECONDS
    assert other.keys.current("ear").kid == new.kid
    clock.now += 3600
    assert [key.kid for key in other.keys.list("ear")] == [new.kid]
    assert store.keys.purge() == 1 and [key.kid for key in store.keys.every("ear")] == [new.kid]
    store.keys.rotate("ear", overlap=timedelta(0))
    assert len(store.keys.list("ear")) == 1, "a stolen key is accepted no more at once"


@pytest.mark.parametrize("change", ["sealed = wrapped_key", "kind = 'admin'", "kid = 'x'", "algorithm = 'EdDSA'"])
def test_keys_cannot_be_exchanged_in_the_database(store: Store, open_store: Open, change: str) -> None:
    store.keys.current("ear")
    assert tamper(store, f"UPDATE signing_keys SET {change} WHERE kind = 'ear'") == 1
    kind: Any = "admin" if "admin" in change else "ear"
    refused("verdict.store.ciphertext.damaged", open_store().keys.list, kind)


def test_private_keys_are_nowhere_to_be_seen(store: Store) -> None:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = store.keys.current("ear")
    raw = key.private.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    with store.database.engine.connect() as connection:
        row = connection.execute(sa.text("SELECT * FROM signing_keys WHERE kind = 'ear'")).one()
    assert raw not in bytes(row.sealed) and raw[36:68] not in bytes(row.sealed)
    assert "private" not in repr(key)
