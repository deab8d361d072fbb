"""The key broker's protocol over TLS, with honest clients and others."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import ssl
import threading
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kbs_client import Client, Key, b64url, unb64url
from small_enclaves import Signers
from verdict_service import SECRET, Service, make_config, make_store, running

from inclavare.config import Config
from inclavare.tee.sgx_sim import SimulatedPlatform, create
from inclavare.verdict.plugins import Request
from inclavare.verdict.plugins.kv import KvPlugin
from inclavare.verdict.store import Quotas

# --- the protocol


@pytest.mark.parametrize("kind", ["P-256", "P-521", "RSA"])
def test_handshake_and_release(service: Service, kind: str) -> None:
    client = service.client(key=Key(kind))
    client.handshake()
    assert client.get("app/key/1") == SECRET


def test_challenge(service: Service) -> None:
    client = service.client()
    reply = client.auth()
    assert len(base64.b64decode(reply.json["nonce"], validate=True)) == 32
    assert reply.json["extra-params"] == ""
    cookie = dict(part.strip().partition("=")[::2] for part in reply.headers["set-cookie"].split(";"))
    assert cookie["Path"] == "/kbs/v0"
    assert {"HttpOnly", "Secure", "SameSite"} <= set(cookie)
    assert parsedate_to_datetime(cookie["Expires"]) > datetime.now(UTC)
    assert reply.headers["content-type"] == "application/json"
    assert len({service.client().auth().json["nonce"] for _ in range(5)}) == 5


def test_token_is_an_ear(service: Service) -> None:
    token = service.client().handshake()
    header, claims = (json.loads(unb64url(part)) for part in token.split(".")[:2])
    assert header["alg"] == "ES256"
    assert claims["iss"] == "CoCo-Attestation-Service"
    assert claims["eat_profile"] == "tag:github.com,2024:confidential-containers/Trustee"
    assert claims["exp"] - claims["iat"] == 300
    submodule = claims["submods"]["cpu0"]
    assert submodule["ear.appraisal-policy-id"].startswith("default-toml@")
    jwks = service.client().call("GET", "/.well-known/jwks.json").json
    assert header["kid"] in {key["kid"] for key in jwks["keys"]}
    assert not any("d" in key for key in jwks["keys"])


def test_bearer_token_of_another_session(service: Service) -> None:
    """Passport: the token alone is enough, on any connection."""
    client = service.client()
    token = client.handshake()
    other = service.client(key=client.key)
    assert other.get("app/key/1", bearer=token) == SECRET


def test_cookie_that_is_no_session_falls_back_to_the_bearer_token(service: Service) -> None:
    client = service.client()
    token = client.handshake()
    reply = client.call("GET", "/kbs/v0/resource/app/key/1", cookie="x" * 43, bearer=token)
    assert client.key.open(reply.json) == SECRET


def test_several_resources_of_one_session(service: Service) -> None:
    service.store.secrets.put("default", "app/key/2", b"another")
    client = service.client()
    client.handshake()
    assert [client.get(f"app/key/{number}") for number in (1, 2, 1)] == [SECRET, b"another", SECRET]


def test_large_and_empty_secrets(service: Service) -> None:
    service.store.secrets.put("default", "app/key/large", bytes(range(256)) * 4096)
    service.store.secrets.put("default", "app/key/empty", b"")
    client = service.client()
    client.handshake()
    assert client.get("app/key/large") == bytes(range(256)) * 4096
    assert client.get("app/key/empty") == b""


def test_path_as_cocos_command_line_sends_it(service: Service) -> None:
    client = service.client()
    client.handshake()
    assert client.get("/app/key/1") == SECRET


def test_init_data(service: Service) -> None:
    """The simulated enclave's CONFIGID is zero: init-data that it was not launched with is refused."""
    client = service.client()
    client.auth()
    text = 'version = "0.1.0"\nalgorithm = "sha384"\n[data]\n"aa.toml" = "x = 1"\n'
    reply = client.attest({**client.attestation(), "init-data": {"format": "toml", "body": text}})
    assert (reply.status, reply.error) == (401, "AttestationError")
    assert "binding.init_data" in reply.detail
    client.auth()
    reply = client.attest({**client.attestation(), "init-data": {"format": "json", "body": "{}"}})
    assert "kbs.init_data.format" in reply.detail


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"version": "0.1.1"}, "KBS Client Protocol Version Mismatch: expect =0.4.0 while the request is 0.1.1"),
        ({"version": "0.4.1"}, "Version Mismatch"),
        ({"tee": "sample"}, "no verifier for sample"),
        ({"tee": "nonsense"}, "unknown TEE"),
        ({"extra-params": {"supported-hash-algorithms": ["sha256"]}}, "does not support sha384"),
        ({"extra-params": {"supported-hash-algorithms": 7}}, "does not support sha384"),
        ({"version": 4}, "deserialize Request"),
        ({"tee": None}, "deserialize Request"),
    ],
)
def test_auth_refusals(service: Service, changes: dict[str, Any], expected: str) -> None:
    reply = service.client().auth(**changes)
    assert (reply.status, reply.error) == (401, "AttestationError")
    assert reply.detail.startswith("Attestation error: RCAR handshake Auth failed")
    assert expected in reply.detail


@pytest.mark.parametrize("params", ["", None, {}, {"supported-hash-algorithms": ["SHA384"]}])
def test_auth_without_algorithms(service: Service, params: Any) -> None:
    assert service.client().auth(**{"extra-params": params}).status == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "error"),
    [
        ("GET", "/kbs/v0/resource/app/key/1", 401, "TokenNotFound"),
        ("GET", "/kbs/v0/nothing/app/key/1", 404, "PluginNotFound"),
        ("GET", "/kbs/v0/auth", 404, "PluginNotFound"),
        ("GET", "/kbs/v0/", 404, "PluginNotFound"),
        ("POST", "/kbs/v0/resource/app/key/1", 401, "AdminAuthAccess"),
        ("DELETE", "/kbs/v0/resource/app/key/1", 401, "AdminAuthAccess"),
        ("POST", "/kbs/v0/attestation-policy", 401, "AdminAuthAccess"),
        ("GET", "/kbs/v0/reference-value/x", 401, "AdminAuthAccess"),
        ("PATCH", "/kbs/v0/resource/app/key/1", 405, "InvalidRequestPath"),
        ("GET", "/t/nobody/kbs/v0/resource/app/key/1", 404, "InvalidRequestPath"),
        ("POST", "/t/_system/kbs/v0/auth", 404, "InvalidRequestPath"),
        ("POST", "/t/a%2Fb/kbs/v0/auth", 404, "InvalidRequestPath"),
        ("POST", "/kbs/v0/attest", 401, "AttestationError"),
    ],
)
def test_paths(service: Service, method: str, path: str, status: int, error: str) -> None:
    reply = service.client().call(method, path)
    assert (reply.status, reply.error) == (status, error)


def test_tenants_are_apart(service: Service) -> None:
    """A token of one tenant is worth nothing to another; neither has the other's secrets."""
    service.default_policy(service.policy(), tenant="other")
    service.store.secrets.put("other", "app/key/theirs", b"theirs")
    client, other = service.client(), service.client(tenant="other")
    token, theirs = client.handshake(), other.handshake()
    assert other.get("app/key/theirs") == b"theirs"
    for reply in (other.resource("app/key/theirs", bearer=token), client.resource("app/key/1", bearer=theirs)):
        assert (reply.status, reply.error) == (401, "TokenVerifierError")
    reply = client.resource("app/key/theirs")
    assert (reply.status, reply.error) == (401, "PolicyDeny")
    # The cookie of one tenant's session is no session of the other's.
    reply = other.call("GET", "/t/other/kbs/v0/resource/app/key/theirs", cookie=client.cookie)
    assert (reply.status, reply.error) == (401, "TokenNotFound")


# --- denials


def test_denial_lists_every_failed_claim(service: Service) -> None:
    service.default_policy(service.policy(mrsigner=["00" * 32], isv_prod_id=65535, simulated="deny"))
    client = service.client(b"another image", debug=True)
    client.auth()
    reply = client.attest()
    assert (reply.status, reply.error) == (401, "AttestationError")
    for claim in ("simulated", "debug", "mrenclave", "mrsigner", "isv_prod_id"):
        assert f"policy.{claim}" in reply.detail
    assert service.enclave(b"another image", debug=True).mrenclave.hex() in reply.detail
    entry = service.last_decision()
    assert (entry.action, entry.decision) == ("kbs.attest", "denied")
    assert {item["id"] for item in entry.detail["reasons"]} >= {"policy.simulated", "policy.debug", "policy.mrenclave"}
    assert entry.detail["request"] == reply.headers["x-request-id"]


def test_what_is_denied_and_what_is_not_there_look_the_same(service: Service) -> None:
    service.store.policies.put("default", "others-only", "toml", service.policy(b"somebody else"))
    service.store.secrets.put("default", "app/key/denied", b"secret", policy="others-only")
    client = service.client()
    client.handshake()
    replies = [client.resource(path) for path in ("app/key/denied", "app/key/absent", "a/b", "../../x", "app/key/1/2")]
    assert {(reply.status, reply.body) for reply in replies} == {(401, replies[0].body)}
    assert (replies[0].error, replies[0].detail) == ("PolicyDeny", "Access denied by policy")
    drop = ("date", "x-request-id")
    assert len({tuple(sorted((k, v) for k, v in reply.headers.items() if k not in drop)) for reply in replies}) == 1
    entries = service.store.audit.entries("default", newest_first=True, limit=5)
    reasons = [entry.detail["reasons"][0]["id"] for entry in entries]
    assert reasons[4] == "policy.mrenclave"
    assert reasons[3] == "verdict.store.secret.unknown"


@pytest.mark.parametrize(
    "path",
    [
        "../../etc/passwd",
        "%2e%2e/%2e%2e/x",
        "app/..%2fkey/1",
        "app%2Fkey/1",
        "app/key/1%00",
        "app/key/%ff",
        "app//key/1",
        "app/key/.",
        "app/key/1?x=1&" + "&".join(f"a{i}=1" for i in range(100)),
        "app/key/" + "x" * 200,
        "app/key/1%0d%0aSet-Cookie:x",
    ],
)
def test_strange_resource_names(service: Service, path: str) -> None:
    client = service.client()
    client.handshake()
    reply = client.resource(path)
    assert (reply.status, reply.error) in {(401, "PolicyDeny"), (404, "InvalidRequestPath")}


# --- adversaries


def test_nonce_serves_one_attestation(service: Service) -> None:
    client = service.client()
    client.auth()
    body = client.attestation()
    assert client.attest(body).status == 200
    reply = client.attest(body)
    assert (reply.status, reply.error) == (401, "AttestationError")
    assert "begin a new session" in reply.detail


def test_secret_that_gets_another_policy_while_it_is_judged(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets, path = service.store.secrets, "app/key/moved"
    service.store.policies.put("default", "others", "toml", service.policy(b"somebody else"))
    secrets.put("default", path, b"for everybody")
    client = service.client()
    client.handshake()
    assert client.get(path) == b"for everybody"
    judge = KvPlugin.policy

    def overtaken(self: KvPlugin, tenant: str, request: Request) -> str | None:
        policy = judge(self, tenant, request)
        secrets.put("default", path, b"for others", policy="others")
        return policy

    with monkeypatch.context() as patch:
        patch.setattr(KvPlugin, "policy", overtaken)
        assert client.resource(path).error == "PolicyDeny"
    assert service.last_decision().detail["reasons"][0]["id"] == "verdict.secret.changed"


def test_same_nonce_twice_at_once(service: Service) -> None:
    client = service.client()
    client.auth()
    body = client.attestation()
    clients = [service.client(key=client.key) for _ in range(8)]
    barrier = threading.Barrier(len(clients))
    statuses: list[int] = []

    def go(one: Client) -> None:
        barrier.wait()
        statuses.append(one.attest(body, cookie=client.cookie).status)

    threads = [threading.Thread(target=go, args=(one,)) for one in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200] + [401] * (len(clients) - 1)


def test_replayed_evidence_in_a_new_session(service: Service) -> None:
    client = service.client()
    client.auth()
    old = client.attestation()
    client.auth()
    reply = client.attest(old)
    assert "the nonce is not this session's" in reply.detail
    client.auth()
    reply = client.attest({**old, "runtime-data": {**old["runtime-data"], "nonce": client.nonce}})
    assert (reply.status, reply.error) == (401, "AttestationError")
    assert "binding.report_data" in reply.detail


def test_stolen_cookie_with_another_key(service: Service) -> None:
    """Who has the cookie gets the answer, and cannot read it; and cannot put a key of its own into the session."""
    client, thief = service.client(), service.client(b"a thief's enclave")
    client.handshake()
    reply = thief.call("GET", "/kbs/v0/resource/app/key/1", cookie=client.cookie)
    assert reply.status == 200
    with pytest.raises(InvalidUnwrap):
        thief.key.open(reply.json)
    thief.nonce = client.nonce
    reply = thief.attest(cookie=client.cookie)
    assert (reply.status, reply.error) == (401, "AttestationError")


def test_stolen_cookie_before_attestation(service: Service) -> None:
    """The thief's enclave is not the one that the policy names."""
    client, thief = service.client(), service.client(b"a thief's enclave")
    client.auth()
    thief.nonce = client.nonce
    reply = thief.attest(cookie=client.cookie)
    assert "policy.mrenclave" in reply.detail


def test_evidence_of_another_key(service: Service) -> None:
    """The quote vouches for one key; another one is put beside it."""
    client = service.client()
    client.auth()
    body = client.attestation()
    body["runtime-data"]["tee-pubkey"] = Key().jwk
    reply = client.attest(body)
    assert "binding.report_data" in reply.detail


def test_stolen_token_is_for_its_key_only(service: Service) -> None:
    token = service.client().handshake()
    thief = service.client()
    reply = thief.resource("app/key/1", bearer=token)
    with pytest.raises(InvalidUnwrap):
        thief.key.open(reply.json)


@pytest.mark.parametrize("damage", ["signature", "payload", "alg", "key", "text", "empty"])
def test_forged_tokens(service: Service, damage: str) -> None:
    from inclavare.attestation.ear import EarIssuer, EarKey

    client = service.client()
    token = client.handshake()
    head, body, signature = token.split(".")
    claims = json.loads(unb64url(body))
    if damage == "signature":
        token = f"{head}.{body}.{'A' * len(signature)}"
    elif damage == "payload":
        claims["exp"] += 1000
        token = f"{head}.{b64url(json.dumps(claims).encode())}.{signature}"
    elif damage == "alg":
        token = b64url(b'{"alg":"none"}') + f".{body}."
    elif damage == "key":
        # The same claims, rightly signed, by a key of the forger's.
        forger = EarIssuer([EarKey.generate()])
        token = forger._signed(body)
    else:
        token = {"text": "not a token", "empty": "."}[damage]
    reply = client.resource("app/key/1", bearer=token)
    assert (reply.status, reply.error) == (401, "TokenVerifierError")


def test_expired_token_and_nonce(tmp_path: Path, platform: SimulatedPlatform, signers: Signers) -> None:
    text = '[tokens]\nlifetime = "2s"\n[limits]\nclock_skew = "1s"\n[attestation]\nnonce_life = "1s"\n'
    config = make_config(tmp_path / "state", text)
    with make_store(config) as store:
        store.tenants.create("default")
        with running(config, store, platform, signers) as service:
            service.default_policy(service.policy())
            store.secrets.put("default", "app/key/1", SECRET)
            client, late = service.client(), service.client()
            late.auth()
            token = client.handshake()
            assert client.get("app/key/1") == SECRET
            time.sleep(1.2)
            assert "the nonce has expired" in late.attest().detail
            time.sleep(2.2)
            assert client.resource("app/key/1", bearer=token).error == "TokenVerifierError"
            assert client.resource("app/key/1").error == "TokenNotFound"


def test_foreign_root(service: Service, tmp_path: Path) -> None:
    """Another simulated platform: everything right but the root."""
    other = create(Config(state_dir=tmp_path / "s", run_dir=tmp_path / "r", log_dir=tmp_path / "l", epc_size=4 << 20))
    foreign = Service(service.config, service.store, service.application, service.url, other, service.signers)
    client = foreign.client()
    client.auth()
    reply = client.attest()
    assert (reply.status, reply.error) == (401, "AttestationError")
    assert "evidence." in reply.detail
    assert service.last_decision().decision == "denied"


def test_simulated_evidence_under_the_name_of_hardware(service: Service) -> None:
    client = service.client(tee="sgx")
    client.auth()
    reply = client.attest()
    assert "evidence.quote.tee" in reply.detail
    assert "sgx-sim" in reply.detail


def test_simulated_evidence_without_a_policy_for_it(service: Service) -> None:
    service.store.policies.clear_default("default", "toml")
    service.forget()
    client = service.client()
    client.auth()
    assert "evidence.root.untrusted" in client.attest().detail


def test_devices_are_not_ignored(service: Service) -> None:
    client = service.client()
    client.auth()
    additional = json.dumps({"nvidia": {"evidence": "x"}})
    reply = client.attest(client.attestation(additional=additional))
    assert "kbs.additional_evidence" in reply.detail


@pytest.mark.parametrize(
    "jwk",
    [
        {},
        {"kty": "EC"},
        {**Key().jwk, "alg": "ECDH-ES"},
        {**Key().jwk, "crv": "P-384"},
        {**Key().jwk, "x": "A" * 43, "y": "A" * 43},
        {**Key().jwk, "x": Key().jwk["x"] + "=="},
        {**Key().jwk, "d": "private"},
        {**Key("RSA").jwk, "alg": "RSA1_5"},
        {"kty": "RSA", "alg": "RSA-OAEP-256", "n": "AQAB", "e": "AQAB"},
    ],
)
def test_keys_that_are_not_answered_to(service: Service, jwk: dict[str, str]) -> None:
    client = service.client()
    client.auth()
    body = client.attestation()
    body["runtime-data"]["tee-pubkey"] = jwk
    reply = client.attest(body)
    assert (reply.status, reply.error) == (401, "AttestationError")
    assert "kbs.tee_pubkey" in reply.detail


def test_release_once_goes_to_one_key(service: Service) -> None:
    service.store.secrets.put("default", "app/key/once", b"once", release_once=True)
    first, second = service.client(), service.client()
    first.handshake()
    second.handshake()
    assert first.get("app/key/once") == b"once"
    assert second.resource("app/key/once").error == "PolicyDeny"
    assert first.get("app/key/once") == b"once"  # it may ask again: an answer can be lost


def test_oversized_bodies(service: Service) -> None:
    client = service.client()
    client.auth()
    limits = service.config.limits
    for path, size in (("/kbs/v0/auth", limits.body + 1), ("/kbs/v0/attest", limits.evidence + 1)):
        reply = service.client().call("POST", path, b" " * size, cookie=client.cookie)
        assert (reply.status, reply.error) == (413, "PayloadTooLarge")


def test_endless_body(service: Service) -> None:
    """Nobody waits for the end of what is far too long: the connection ends."""
    host, port = service.url.removeprefix("https://").split(":")
    context = ssl.create_default_context(cafile=service.config.certificate)
    with context.wrap_socket(socket.create_connection((host, int(port))), server_hostname=host) as tls:
        tls.sendall(b"POST /kbs/v0/auth HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        sent = 0
        with pytest.raises((ssl.SSLError, OSError)):
            while sent < 64 << 20:
                tls.sendall(b"10000\r\n" + bytes(0x10000) + b"\r\n")
                sent += 0x10000
        assert sent < 32 << 20
    assert service.client().auth().status == 200


def test_slow_body(tmp_path: Path, platform: SimulatedPlatform, signers: Signers) -> None:
    config = make_config(tmp_path / "state", '[limits]\nrequest_time = "1s"\n')
    with make_store(config) as store:
        store.tenants.create("default")
        with running(config, store, platform, signers) as service:
            context = ssl.create_default_context(cafile=config.certificate)
            host, port = service.url.removeprefix("https://").split(":")
            with context.wrap_socket(socket.create_connection((host, int(port))), server_hostname=host) as tls:
                tls.sendall(b"POST /kbs/v0/auth HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
                started = time.monotonic()
                assert b" 408 " in tls.recv(4096)
                assert time.monotonic() - started < 5


def test_who_sends_evidence_slowly_holds_no_place(
    tmp_path: Path, platform: SimulatedPlatform, signers: Signers
) -> None:
    config = make_config(tmp_path / "state", "[limits]\nverifications = 1\n")
    with make_store(config) as store:
        store.tenants.create("default")
        with running(config, store, platform, signers) as service:
            slow, client = service.client(), service.client()
            assert slow.auth().status == client.auth().status == 200
            context = ssl.create_default_context(cafile=config.certificate)
            host, port = service.url.removeprefix("https://").split(":")
            with context.wrap_socket(socket.create_connection((host, int(port))), server_hostname=host) as tls:
                cookie = f"Cookie: kbs-session-id={slow.cookie}\r\n"
                head = f"POST /kbs/v0/attest HTTP/1.1\r\nHost: x\r\n{cookie}Expect: 100-continue\r\n"
                tls.sendall(f"{head}Content-Length: 100\r\n\r\n".encode())
                assert b" 100 " in tls.recv(4096), "the service is reading the body"
                assert client.attest().status == 401, "it is judged (nobody allows sgx-sim), not sent away with 503"


def test_tls_below_1_3_is_refused(service: Service) -> None:
    context = ssl.create_default_context(cafile=service.config.certificate)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    host, port = service.url.removeprefix("https://").split(":")
    with pytest.raises(ssl.SSLError), socket.create_connection((host, int(port))) as raw:
        context.wrap_socket(raw, server_hostname=host)


def test_rates(tmp_path: Path, platform: SimulatedPlatform, signers: Signers) -> None:
    config = make_config(tmp_path / "state", "[limits]\nclient_requests = 20\n")
    with make_store(config) as store:
        store.tenants.create("default", quotas=Quotas(requests=5))
        store.tenants.create("other")
        with running(config, store, platform, signers) as service:
            client, other = service.client(), service.client(tenant="other")
            replies = [client.auth() for _ in range(7)]
            assert [reply.status for reply in replies] == [200] * 5 + [429] * 2
            assert int(replies[-1].headers["retry-after"]) >= 1
            assert other.auth().status == 200  # one tenant's quota is not another's
            assert [other.auth().status for _ in range(20)][-1] == 429
            assert client.call("GET", "/healthz").status == 200


# --- malformed at every level

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=12), children, max_size=4),
    max_leaves=20,
)


def _mutated(draw: st.DrawFn, value: Any) -> Any:
    """The same with one place exchanged, removed or added."""
    if isinstance(value, dict) and value and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(value)))
        action = draw(st.sampled_from(["descend", "remove", "replace", "add"]))
        if action == "remove":
            return {name: item for name, item in value.items() if name != key}
        if action == "add":
            return {**value, draw(st.text(max_size=8)): draw(_json)}
        return {**value, key: _mutated(draw, value[key]) if action == "descend" else draw(_json)}
    if isinstance(value, str) and draw(st.booleans()):
        place = draw(st.integers(0, len(value)))
        return value[:place] + draw(st.text(max_size=3)) + value[place + draw(st.integers(0, 3)) :]
    return draw(_json)


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_fuzzed_attest(shared_service: Service, data: st.DataObject) -> None:
    """In the application itself: whatever comes, the answer is a refusal in the protocol's form."""
    service = shared_service
    if not hasattr(test_fuzzed_attest, "body"):
        client = service.client()
        client.auth()
        test_fuzzed_attest.body = client.attestation()  # type: ignore[attr-defined]
    kind = data.draw(st.sampled_from(["mutated", "json", "bytes", "deep"]))
    if kind == "mutated":
        body = json.dumps(_mutated(data.draw, test_fuzzed_attest.body)).encode()  # type: ignore[attr-defined]
    elif kind == "json":
        body = json.dumps(data.draw(_json)).encode()
    elif kind == "deep":
        body = b'{"runtime-data":{"tee-pubkey":' + b"[" * data.draw(st.integers(1, 100_000))
    else:
        body = data.draw(st.binary(max_size=200))
    nonce = b"n" * 32 if data.draw(st.booleans()) else b"m" * 32
    status, answer = asyncio.run(_attest_in_process(service, body, nonce))
    assert status == 401, (status, answer)
    found = json.loads(answer)
    assert set(found) == {"type", "detail"}
    assert found["type"].endswith("/AttestationError")


async def _attest_in_process(service: Service, body: bytes, nonce: bytes) -> tuple[int, bytes]:
    import os
    from datetime import timedelta

    application = service.application
    id = service.store.sessions.create("default", "sgx-sim", os.urandom(32), datetime.now(UTC) + timedelta(minutes=1))
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    await application(
        {
            "type": "http", "method": "POST", "path": "/kbs/v0/attest", "raw_path": b"/kbs/v0/attest",
            "query_string": b"", "headers": [(b"cookie", f"kbs-session-id={id}".encode())], "client": ("127.0.0.1", 1),
        },
        receive,
        send,
    )  # fmt: skip
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


# --- the rest of the service


def test_health_and_metrics(service: Service) -> None:
    client = service.client()
    client.handshake()
    client.get("app/key/1")
    assert client.call("GET", "/healthz").status == 200
    assert client.call("GET", "/readyz").status == 200
    text = client.call("GET", "/metrics").body.decode()
    assert 'verdictd_decisions_total{action="kbs.attest",decision="allowed",reason="none",tee="sgx-sim"}' in text
    assert 'verdictd_requests_total{endpoint="attest",status="200"}' in text
    assert "verdictd_verification_seconds_bucket" in text
    for secret in ("default", "app/key", service.enclave().mrenclave.hex()):
        assert secret not in text


def test_not_ready_when_stopping_or_without_database(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    application, client = service.application, service.client()
    application.stopping = True
    assert client.call("GET", "/readyz").status == 503
    application.stopping = False
    time.sleep(1.1)
    assert client.call("GET", "/readyz").status == 200


def test_answers_carry_no_secret_and_have_an_id(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    import logging

    caplog.set_level(logging.DEBUG)
    client = service.client()
    client.handshake()
    assert client.get("app/key/1") == SECRET
    logged = " ".join(f"{record.getMessage()} {getattr(record, 'fields', '')}" for record in caplog.records)
    assert "kbs.release" in logged
    for secret in (SECRET.decode(), client.token, client.cookie or "?", base64.b64encode(SECRET).decode()):
        assert secret not in logged
    exported = "".join(service.store.audit.export("default"))
    for secret in (SECRET.decode(), client.token, client.cookie or "?", base64.b64encode(SECRET).decode()):
        assert secret not in exported
    assert service.store.audit.verify("default").whole
