"""The administrators' API over TLS: what it does, and what it refuses."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from admin_api import Answered, call, token
from verdict_service import SECRET, Service

from inclavare.attestation.references import Subject, sign, statement
from inclavare.attestation.signers import KeySigner
from inclavare.verdict.store import SYSTEM
from inclavare.verdict.store.audit import verify_export

TOML = 'mrsigner = ["' + "ab" * 32 + '"]\n'
REGO = 'package policy\n\nimport rego.v1\n\ndefault allow := false\n\nallow if count(data["resource-path"]) == 3\n'


class Api:
    """Calls with one token."""

    def __init__(self, service: Service, token: str) -> None:
        self.service, self.token = service, token

    def __call__(self, method: str, path: str, body: Any = None, **fields: Any) -> Answered:
        return call(self.service, method, path, token=self.token, body=body, **fields)

    def good(self, method: str, path: str, body: Any = None, *, status: int = 200, **fields: Any) -> Any:
        answer = self(method, path, body, **fields)
        assert answer.status == status, (answer.status, answer.body)
        return answer.json if answer.body else None


@pytest.fixture(scope="module")
def admin(shared_service: Service) -> Api:
    return Api(shared_service, token(shared_service.store, "admin"))


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> KeySigner:
    return KeySigner.load_or_make(Path(tmp_path_factory.mktemp("signer")) / "key.pem")[0]


@pytest.fixture
def tenant(admin: Api) -> Iterator[str]:
    name = f"t{time.monotonic_ns()}"
    admin.good("POST", "/tenants", {"name": name}, status=201)
    yield name
    admin("DELETE", f"/tenants/{name}")


def test_info_says_who_asks(admin: Api) -> None:
    found = admin.good("GET", "/info")
    assert found["actor"] == "token:admin.system"
    assert found["grants"] == [{"tenant": "*", "role": "admin"}]
    assert found["ready"] is True


def test_tenants(admin: Api) -> None:
    made = admin.good("POST", "/tenants", {"name": "payments", "quotas": {"secrets": 2}}, status=201)
    assert made["quotas"]["secrets"] == 2
    assert made["quotas"]["policies"] == admin.service.config.tenants.policies
    assert admin("POST", "/tenants", {"name": "payments"}).id == "verdict.store.tenant.exists"
    assert admin("POST", "/tenants", {"name": "payments"}).status == 409
    changed = admin.good("PUT", "/tenants/payments/quotas", {"bytes": 10})
    assert changed["quotas"]["bytes"] == 10
    names = [one["name"] for one in admin.good("GET", "/tenants")["items"]]
    assert {"default", "other", "payments"} <= set(names) and names == sorted(names)
    first = admin.good("GET", "/tenants?limit=1")
    assert first["next"] == names[0]
    assert admin.good("GET", f"/tenants?limit=1&after={first['next']}")["items"][0]["name"] == names[1]
    admin.good("DELETE", "/tenants/payments", status=204)
    assert admin("GET", "/tenants/payments").status == 404
    assert admin("DELETE", "/tenants/_system").status == 422
    actions = [entry.action for entry in admin.service.store.audit.entries(SYSTEM, limit=1000)]
    assert "tenant.create" in actions and "tenant.delete" in actions


def test_values_go_in_and_are_in_no_answer_no_list_and_no_audit(admin: Api, tenant: str) -> None:
    value = b"never seen again \x00\xff"
    path = f"/tenants/{tenant}/secrets/app/key/1"
    encoded = base64.b64encode(value).decode()
    bodies = [
        admin("PUT", path, {"value": encoded, "metadata": {"owner": "alice"}}),
        admin("PUT", path + "?release_once=true", value, headers={"Content-Type": "application/octet-stream"}),
        admin("GET", path),
        admin("GET", path + "/versions"),
        admin("GET", f"/tenants/{tenant}/secrets"),
        admin("GET", f"/tenants/{tenant}/audit"),
        admin("GET", f"/tenants/{tenant}/audit/export"),
    ]
    assert [answer.status for answer in bodies] == [201, 201, 200, 200, 200, 200, 200]
    assert bodies[0].json["metadata"] == {"owner": "alice"} and bodies[0].json["version"] == 1
    assert bodies[1].json["release_once"] is True and bodies[1].json["size"] == len(value)
    for answer in bodies:
        assert value not in answer.body and encoded.encode() not in answer.body and b"never seen" not in answer.body
    store = admin.service.store
    assert store.secrets.read(tenant, "app/key/1", holder="ab" * 32) == value
    assert store.secrets.read(tenant, "app/key/1", holder="ab" * 32, version=1) == value
    admin.good("DELETE", path + "?version=1", status=204)
    assert admin("GET", path + "?version=1").status == 404
    admin.good("DELETE", path, status=204)
    assert admin("DELETE", path).id == "verdict.store.secret.unknown"


@pytest.mark.parametrize(
    ("body", "kind", "status", "id"),
    [
        (b'{"value": "c2VjcmV0Cg==', "application/json", 422, "verdict.api.request"),
        (b'{"value": "c2VjcmV0 not base64"}', "application/json", 422, "verdict.api.request"),
        (b'{"value": 12345678}', "application/json", 422, "verdict.api.request"),
        (b'{"value": "c2VjcmV0", "valve": "c2VjcmV0"}', "application/json", 422, "verdict.api.request"),
        (b'{"value": ""}', "application/json", 422, "verdict.api.secret.empty"),
        (b"", "application/octet-stream", 422, "verdict.api.secret.empty"),
        (b"c2VjcmV0", "text/plain", 415, "verdict.api.media_type"),
        (b"[" * 100_000, "application/json", 422, "verdict.api.request"),
        (bytes((1 << 20) + 1), "application/octet-stream", 422, "verdict.store.secret.size"),
        (bytes((2 << 20) + 1), "application/octet-stream", 413, "verdict.api.size"),
    ],
)  # fmt: skip
def test_malformed_secrets_are_refused_and_not_quoted(admin: Api, body: bytes, kind: str, status: int, id: str) -> None:
    answer = admin("PUT", "/tenants/default/secrets/app/bad/1", body, headers={"Content-Type": kind})
    assert (answer.status, answer.id) == (status, id)
    assert b"c2VjcmV0" not in answer.body and b"12345678" not in answer.body
    assert admin("GET", "/tenants/default/secrets/app/bad/1").status == 404


def test_quota(admin: Api, tenant: str) -> None:
    admin.good("PUT", f"/tenants/{tenant}/quotas", {"secrets": 1})
    admin.good("PUT", f"/tenants/{tenant}/secrets/a/b/1", {"value": "YQ=="}, status=201)
    answer = admin("PUT", f"/tenants/{tenant}/secrets/a/b/2", {"value": "YQ=="})
    assert (answer.status, answer.id) == (409, "verdict.store.quota.secrets")
    assert answer.json["found"] and answer.json["expected"] and answer.json["remedy"] and answer.json["request"]
    last = admin.service.last_decision(tenant)
    assert (last.action, last.decision) == ("secret.put", "failed")


def test_secrets_in_pages(admin: Api, tenant: str) -> None:
    for number in range(5):
        admin.good("PUT", f"/tenants/{tenant}/secrets/a/b/{number}", {"value": "YQ=="}, status=201)
    seen: list[str] = []
    after = ""
    while True:
        page = admin.good("GET", f"/tenants/{tenant}/secrets?limit=2&after={after}")
        seen += [item["path"] for item in page["items"]]
        if page["next"] is None:
            break
        after = page["next"]
    assert seen == [f"a/b/{number}" for number in range(5)]


def test_policies_have_versions_and_conditions(admin: Api, tenant: str) -> None:
    path = f"/tenants/{tenant}/policies/production"
    first = admin("PUT", path, {"kind": "toml", "text": TOML}, headers={"If-None-Match": "*"})
    assert first.status == 201 and first.json["author"] == "token_admin.system"
    again = admin("PUT", path, {"kind": "toml", "text": TOML})
    assert again.status == 200 and again.json["version"] == 1 and again.headers["etag"] == first.headers["etag"]
    assert admin("PUT", path, {"kind": "toml", "text": TOML}, headers={"If-None-Match": "*"}).status == 412
    other = TOML + "# more\n"
    tag = first.headers["etag"]
    second = admin("PUT", path, {"kind": "toml", "text": other}, headers={"If-Match": tag})
    assert second.status == 200 and second.json["version"] == 2
    late = admin("PUT", path, {"kind": "toml", "text": TOML + "# late\n"}, headers={"If-Match": tag})
    assert (late.status, late.id) == (412, "verdict.store.policy.changed")
    missing = admin("PUT", f"{path}2", {"kind": "toml", "text": TOML}, headers={"If-Match": tag})
    assert missing.status == 412
    assert admin("PUT", path, {"kind": "resource-rego", "text": REGO}).status == 409
    found = admin.good("GET", f"{path}/diff?old=1")
    assert found["new"] == 2 and "+# more" in found["diff"]
    back = admin.good("POST", f"{path}/rollback", {"version": 1})
    assert (back["version"], back["restored_from"], back["text"]) == (3, 1, TOML)
    assert [one["version"] for one in admin.good("GET", f"{path}/history")] == [3, 2, 1]
    assert admin.good("GET", f"{path}?version=2")["text"] == other
    assert admin.good("PUT", f"{path}/default")["default"] is True
    admin.good("DELETE", f"/tenants/{tenant}/policy-defaults/toml", status=204)
    assert admin.good("GET", path)["default"] is False
    admin.good("PUT", f"/tenants/{tenant}/secrets/a/b/1?policy=production", b"x", status=201,
               headers={"Content-Type": "application/octet-stream"})  # fmt: skip
    assert admin("DELETE", path).id == "verdict.store.policy.used"
    admin.good("DELETE", f"/tenants/{tenant}/secrets/a/b/1", status=204)
    admin.good("DELETE", path, status=204)
    assert admin("GET", path).status == 404


def test_of_those_who_change_one_version_at_once_one_wins(admin: Api, tenant: str) -> None:
    path = f"/tenants/{tenant}/policies/raced"
    first = admin("PUT", path, {"kind": "toml", "text": TOML})
    tag = {"If-Match": first.headers["etag"]}
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(
                lambda number: admin("PUT", path, {"kind": "toml", "text": TOML + f"# {number}\n"}, headers=tag).status,
                range(8),
            )
        )
    assert sorted(answers) == [200] + [412] * 7
    assert [one["version"] for one in admin.good("GET", f"{path}/history")] == [2, 1]


@pytest.mark.parametrize(
    ("kind", "text", "id"),
    [
        ("toml", "mrsigner = [", "policy.file.syntax"),
        ("toml", "mrsinger = []", "policy.key.unknown"),
        ("toml", 'trust_anchor = "/etc/shadow"', "verdict.api.policy.trust_anchor"),
        ("toml", 'trust_anchor = "/nowhere"', "verdict.api.policy.trust_anchor"),
        ("attestation-rego", "package other\n", "policy.rego.package"),
        ("attestation-rego", "package policy\n\nx := \n", "policy.rego.syntax"),
        ("resource-rego", "package policy\n\ndeny := true\n", "policy.rego.rule"),
        ("toml", "a\0", "verdict.store.policy.text"),
        ("json", "{}", "verdict.api.request"),
    ],
)
def test_policies_that_cannot_decide_are_refused(admin: Api, kind: str, text: str, id: str) -> None:
    answer = admin("PUT", "/tenants/default/policies/bad", {"kind": kind, "text": text})
    assert (answer.status, answer.id) == (422, id), answer.body
    assert admin("GET", "/tenants/default/policies/bad").status == 404
    if kind != "json":
        assert admin("POST", "/tenants/default/dry-run", {"kind": kind, "text": text}).id == id


def test_dry_run_changes_nothing(service: Service, admin: Api) -> None:
    client = service.client()
    client.handshake()
    assert client.get("app/key/1") == SECRET
    before = service.store.policies.default("default", "toml")
    kept = admin.good("GET", "/tenants/default/evidence")["items"]
    digest = kept[0]["digest"]
    assert admin.good("GET", f"/tenants/default/evidence/{digest}")["tee"] == kept[0]["tee"]
    entries = service.store.audit.entries("default", newest_first=True, limit=1)[0].seq
    good = admin.good("POST", "/tenants/default/dry-run", {})
    assert good["accepted"] >= 1
    other = service.policy(b"workload", mrenclave=["00" * 32])
    bad = admin.good("POST", "/tenants/default/dry-run", {"kind": "toml", "text": other, "evidence": [digest]})
    assert (bad["accepted"], bad["refused"]) == (0, 1)
    failure = bad["results"][0]["failures"][0]
    assert failure["id"] == "policy.mrenclave" and failure["expected"] and failure["found"] and failure["remedy"]
    for resource, allowed in (("a/b/c", True), ("secret/b/c", False)):
        text = REGO.replace('count(data["resource-path"]) == 3', 'data["resource-path"][0] == "a"')
        release = admin.good(
            "POST", "/tenants/default/dry-run",
            {"kind": "resource-rego", "text": text, "evidence": [digest], "resource": resource},
        )["results"][0]["release"]  # fmt: skip
        assert release["allowed"] is allowed
    named = admin.good("POST", "/tenants/default/dry-run", {"policy": before.id, "evidence": [digest]})  # type: ignore[union-attr]
    assert named["results"][0]["accepted"] is True
    assert admin("POST", "/tenants/default/dry-run", {"evidence": ["ab" * 32]}).status == 404
    assert admin("POST", "/tenants/default/dry-run", {"kind": "toml"}).status == 422
    assert service.store.policies.default("default", "toml") == before
    assert service.store.audit.entries("default", newest_first=True, limit=1)[0].seq == entries


def bundle(signer: KeySigner, *, name: str = "registry.example/app", end: int = 3600) -> bytes:
    now = int(time.time())
    subjects = [Subject(name, (("sha256", "12" * 32),))]
    claims: dict[str, str | int] = {"mrenclave": "ab" * 32}
    return sign(statement(subjects, [(["sgx"], claims)], not_before=now - 7200, not_after=now + end), signer)


def test_references_are_registered_listed_and_revoked(admin: Api, tenant: str, signer: KeySigner) -> None:
    path = f"/tenants/{tenant}/references"
    envelope = bundle(signer)
    headers = {"Content-Type": "application/json"}
    assert admin("POST", path, envelope, headers=headers).id == "verdict.api.reference.signers"
    pem = {"public_key": signer.public_pem().decode()}
    admin.good("PUT", f"/tenants/{tenant}/signers/release", pem, status=201)
    admin.good("PUT", f"/tenants/{tenant}/signers/release", pem)
    made = admin.good("POST", path, envelope, status=201, headers=headers)
    assert made["image"] == "registry.example/app"
    assert admin.good("POST", path, envelope, headers=headers) == made
    assert admin("GET", f"{path}/{made['digest']}/bundle").body == envelope
    assert [one["digest"] for one in admin.good("GET", path)["items"]] == [made["digest"]]
    damaged = json.loads(envelope)
    damaged["signatures"][0]["sig"] = base64.b64encode(bytes(64)).decode()
    assert admin("POST", path, damaged).status == 422
    assert admin("POST", path, bundle(signer, end=-10), headers=headers).id == "verdict.api.reference.expired"
    revoked = admin.good("POST", f"{path}/{made['digest']}/revoke", {"reason": "CVE"})
    assert revoked["revoked_reason"] == "CVE"
    assert admin("POST", f"{path}/{made['digest']}/revoke", {"reason": "CVE"}).status == 409
    assert admin("POST", path, envelope, headers=headers).id == "verdict.store.reference.exists"
    admin.good("DELETE", f"/tenants/{tenant}/signers/release", status=204)
    assert admin("DELETE", f"/tenants/{tenant}/signers/release").status == 404
    assert admin.good("GET", f"/tenants/{tenant}/signers") == []


def test_private_keys_are_no_signers(admin: Api, tenant: str) -> None:
    text = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIA\n-----END PRIVATE KEY-----\n"
    answer = admin("PUT", f"/tenants/{tenant}/signers/release", {"public_key": text})
    assert answer.status == 422 and b"MC4C" not in answer.body


def test_tokens(admin: Api, tenant: str) -> None:
    path = f"/tenants/{tenant}/tokens"
    made = admin.good("POST", path, {"name": "ci", "role": "operator", "lifetime": 600}, status=201)
    own = Api(admin.service, made["token"])
    assert own.good("GET", "/info")["grants"] == [{"tenant": tenant, "role": "operator"}]
    listed = admin.good("GET", path)["items"]
    assert [one["jti"] for one in listed] == [made["jti"]] and "token" not in listed[0]
    too_long = admin.service.config.auth.token_life + 1
    assert admin("POST", path, {"name": "ci", "role": "operator", "lifetime": too_long}).status == 422
    admin.good("DELETE", f"{path}/{made['jti']}")
    assert own("GET", "/info").id == "verdict.auth.token.revoked"
    assert admin("DELETE", f"/tenants/other/tokens/{made['jti']}").status == 404
    audit = json.dumps(admin.good("GET", f"/tenants/{tenant}/audit"))
    assert made["token"] not in audit and "token.create" in audit


def test_rotation_keeps_old_tokens(admin: Api) -> None:
    store = admin.service.store
    old = store.keys.current("admin").kid
    keys = admin.good("POST", "/keys/admin/rotate")["keys"]
    assert keys[0]["kid"] != old and "d" not in keys[0]
    assert admin.good("GET", "/info")["ready"] is True
    fresh = Api(admin.service, token(store, "auditor"))
    fresh.good("GET", "/info")
    assert {key["kid"] for key in fresh.good("GET", "/keys/admin")["keys"]} >= {old, keys[0]["kid"]}
    assert fresh("POST", "/keys/admin/rotate").status == 403


def test_audit_in_pages_exported_and_verified(admin: Api, tenant: str) -> None:
    for number in range(3):
        admin.good("PUT", f"/tenants/{tenant}/secrets/a/b/{number}", {"value": "YQ=="}, status=201)
    first = admin.good("GET", f"/tenants/{tenant}/audit?limit=2")
    assert [entry["seq"] for entry in first["items"]] == [1, 2] and first["next"] == 2
    assert admin.good("GET", f"/tenants/{tenant}/audit?after=2")["items"][0]["seq"] == 3
    newest = admin.good("GET", f"/tenants/{tenant}/audit?newest_first=true&limit=1&action=secret.put")
    assert newest["items"][0]["seq"] == 3 and newest["next"] == 3
    assert admin.good("GET", f"/tenants/{tenant}/audit?since=2100-01-01T00:00:00Z")["items"] == []
    report = admin.good("POST", f"/tenants/{tenant}/audit/verify", {})
    assert report["whole"] is True and report["entries"] == 3
    exported = admin("GET", f"/tenants/{tenant}/audit/export")
    assert exported.headers["content-type"] == "application/jsonl"
    lines = exported.body.decode().splitlines()
    keys = admin.good("GET", "/keys/audit")["keys"]
    assert verify_export(lines, keys).whole
    assert not verify_export([*lines[:2], *lines[3:]], keys).whole
    assert admin("GET", "/tenants/nobody/audit/export").status == 404
    assert admin("GET", "/tenants/nobody/audit").status == 404
    point = admin.good("POST", "/audit/checkpoints", status=201)
    assert admin.good("POST", "/audit/verify", {"anchors": [point]})["whole"] is True
    assert admin.good("GET", "/audit/checkpoints?limit=1") == [point]


def test_errors_of_http_are_problems(admin: Api) -> None:
    assert (admin("GET", "/nothing").status, admin("GET", "/nothing").id) == (404, "verdict.api.404")
    wrong = admin("PATCH", "/tenants")
    assert (wrong.status, wrong.headers["allow"]) == (405, "GET, POST")
    large = admin("POST", "/tenants", b" " * (65 << 10), headers={"Content-Type": "application/json"})
    assert (large.status, large.id) == (413, "verdict.api.size")
    assert admin("GET", "/info").headers["cache-control"] == "no-store"
