"""Decisions: policies, reference values, releases, and what is written down about them."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import pytest
from kbs_client import Client, b64url, unb64url
from verdict_service import SECRET, Service

from inclavare.attestation.references import Subject, sign, statement
from inclavare.attestation.signers import KeySigner
from inclavare.errors import UsageError
from inclavare.verdict.decide import collateral_source, dry_run
from inclavare.verdict.store import NotFound

ALLOW_OUR_PLATFORM = """package policy
import rego.v1
default hardware := 97
allow_simulated := true
hardware := 2 if input.sgx.simulated
executables := 3 if input.sgx.body.mr_enclave in query_reference_value("mrenclave")
default executables := 33
trust_claims := {"hardware": hardware, "executables": executables}
"""
RESOURCE = """package policy
import rego.v1
default allow := false
allow if {
    data.plugin == "resource"
    data["resource-path"][0] == "app"
    input.submods.cpu0["ear.veraison.annotated-evidence"].sgx.body.mr_enclave == "MRENCLAVE"
}
"""


@pytest.fixture
def client(service: Service) -> Client:
    return service.client()


@pytest.fixture
def signer(service: Service) -> Iterator[KeySigner]:
    """Whose bundles the tenant takes."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    made = KeySigner(Ed25519PrivateKey.generate())
    service.store.references.trust("default", "builder", made.public_pem().decode())
    yield made
    service.store.references.distrust("default", "builder")
    service.forget()


def bundle(service: Service, signer: KeySigner, content: bytes = b"workload", *, days: int = 30) -> bytes:
    now = int(time.time())
    made = statement(
        [Subject("registry/app", (("sha256", "00" * 32),))],
        [(["sgx-sim"], {"mrenclave": service.enclave(content).mrenclave.hex()})],
        not_before=now - 86400 - len(content),
        not_after=now - 86400 + days * 86400 - 10,
    )
    return sign(made, signer)


def denied(client: Client) -> str:
    client.auth()
    reply = client.attest()
    assert reply.status == 401
    return reply.detail


def test_reference_values_and_their_revocation(service: Service, client: Client, signer: KeySigner) -> None:
    service.default_policy(service.policy(mrenclave=None, image="registry/app"))
    assert "policy.reference.unknown" in denied(client)
    info = service.store.references.register("default", bundle(service, signer), image="registry/app")
    service.forget()
    client.handshake()
    assert client.get("app/key/1") == SECRET
    assert service.last_decision().decision == "allowed"
    # Revoked: at once for those who attest, and for those who have attested already.
    service.store.references.revoke("default", info.digest, "a vulnerability")
    time.sleep(1.1)
    assert client.resource("app/key/1").error == "PolicyDeny"
    assert service.last_decision().detail["reasons"][0]["id"] == "policy.changed"
    assert "a vulnerability" in denied(client)


@pytest.mark.parametrize("by", ["id", "digest"])
def test_what_was_just_allowed_counts_at_once(service: Service, client: Client, signer: KeySigner, by: str) -> None:
    """A reference value, named by its id or its digest, and a policy: a refusal rests on no cache."""
    store, made = service.store, bundle(service, signer)
    name = sha256(made if by == "digest" else base64.b64decode(json.loads(made)["payload"])).hexdigest()
    service.default_policy(service.policy(mrenclave=None, reference_values=[name]), id="app")
    assert "policy.reference.unknown" in denied(client)
    store.references.register("default", made)
    client.handshake()
    service.default_policy(service.policy(b"somebody else"), id="app")
    assert "policy.mrenclave" in denied(client)
    store.policies.put("default", "app", "toml", service.policy())
    client.handshake()


def test_bundle_of_a_signer_who_is_trusted_no_more(service: Service, client: Client, signer: KeySigner) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    service.default_policy(service.policy(mrenclave=None, image="registry/app"))
    stranger = KeySigner(Ed25519PrivateKey.generate())
    service.store.references.register("default", bundle(service, stranger, b"workload"), image="registry/app")
    service.forget()
    assert "policy.reference.unknown" in denied(client)


def test_expired_reference_values(service: Service, client: Client, signer: KeySigner) -> None:
    service.default_policy(service.policy(mrenclave=None, image="registry/app"))
    service.store.references.register("default", bundle(service, signer, days=1), image="registry/app")
    service.forget()
    assert "policy.reference.expired" in denied(client)


def test_changed_policy_ends_sessions(service: Service, client: Client) -> None:
    client.handshake()
    service.default_policy(service.policy(b"somebody else"))
    assert client.resource("app/key/1").error == "PolicyDeny"
    assert "policy.mrenclave" in denied(client)


def test_secret_with_a_policy_of_its_own(service: Service, client: Client) -> None:
    service.store.policies.put("default", "mine", "toml", service.policy())
    service.store.policies.put("default", "theirs", "toml", service.policy(b"somebody else"))
    service.store.secrets.put("default", "app/key/mine", b"mine", policy="mine")
    service.store.secrets.put("default", "app/key/theirs", b"theirs", policy="theirs")
    client.handshake()
    assert client.get("app/key/mine") == b"mine"
    assert client.resource("app/key/theirs").error == "PolicyDeny"
    entry = service.last_decision()
    assert entry.decision == "denied"
    assert entry.detail["policies"][-1] == "theirs@1"
    assert entry.detail["reasons"][0]["id"] == "policy.mrenclave"
    assert entry.detail["resource"] == "resource/app/key/theirs"


def test_secrets_policy_of_another_platform(service: Service, client: Client) -> None:
    """A simulated platform that the default policy trusts is not the one that the secret's policy trusts."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.serialization import Encoding

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "another root")])
    root = x509.load_der_x509_certificate(service.root_ca())
    other = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, root.not_valid_before_utc, root.not_valid_after_utc)
        .sign(key, SHA256())
        .public_bytes(Encoding.PEM)
        .decode()
    )
    service.store.policies.put("default", "elsewhere", "toml", service.policy(trust_anchor=other))
    service.store.secrets.put("default", "app/key/elsewhere", b"x", policy="elsewhere")
    client.handshake()
    assert client.resource("app/key/elsewhere").error == "PolicyDeny"
    assert service.last_decision().detail["reasons"][0]["id"] == "policy.trust_anchor"


def test_any_enclave_alone_releases_nothing(service: Service, client: Client) -> None:
    service.default_policy(service.policy(mrenclave=None, any_enclave="allow"))
    service.store.policies.put("default", "mine", "toml", service.policy())
    service.store.secrets.put("default", "app/key/mine", b"mine", policy="mine")
    client.handshake()
    assert client.resource("app/key/1").error == "PolicyDeny"
    assert service.last_decision().detail["reasons"][0]["id"] == "policy.resource.none"
    assert client.get("app/key/mine") == b"mine"


def test_resource_policy_in_rego(service: Service, client: Client) -> None:
    text = RESOURCE.replace("MRENCLAVE", service.enclave().mrenclave.hex())
    service.default_policy(service.policy(mrenclave=None, any_enclave="allow"))
    service.default_policy(text, kind="resource-rego")
    service.store.secrets.put("default", "closed/key/1", b"closed")
    client.handshake()
    assert client.get("app/key/1") == SECRET
    assert client.resource("closed/key/1").error == "PolicyDeny"
    stranger = service.client(b"somebody else")
    stranger.handshake()
    assert stranger.resource("app/key/1").error == "PolicyDeny"
    assert service.last_decision().detail["reasons"][0]["id"] == "policy.rego.allow"


def test_attestation_policy_in_rego(service: Service, client: Client, signer: KeySigner) -> None:
    """Both have to accept: the file that knows the platform, and the policy in Rego."""
    service.default_policy(service.policy(mrenclave=None, any_enclave="allow"))
    service.default_policy(ALLOW_OUR_PLATFORM, kind="attestation-rego")
    assert "policy.rego.executables" in denied(client)
    service.store.references.register("default", bundle(service, signer), image="registry/app")
    service.forget()
    token = client.handshake()
    claims = json.loads(unb64url(token.split(".")[1]))
    assert claims["submods"]["cpu0"]["ear.status"] == "affirming"
    assert client.get("app/key/1") == SECRET
    service.default_policy(service.policy(b"somebody else"))
    detail = denied(client)
    assert "policy.mrenclave" in detail
    assert "policy.rego" not in detail


def test_broken_policy_refuses(service: Service, client: Client) -> None:
    service.default_policy("package policy\ntrust_claims := {", kind="attestation-rego")
    assert "policy.rego.syntax" in denied(client)


def test_audit_of_decisions(service: Service, client: Client) -> None:
    client.handshake()
    client.get("app/key/1")
    release, attest = service.store.audit.entries("default", newest_first=True, limit=2)
    assert (attest.action, attest.decision, release.action, release.decision) == (
        "kbs.attest", "allowed", "kbs.release", "allowed",
    )  # fmt: skip
    assert attest.actor == release.actor
    assert attest.detail["evidence"] == release.detail["evidence"]
    assert attest.detail["claims"]["mrenclave"] == service.enclave().mrenclave.hex()
    assert attest.detail["policies"][0].startswith("default-toml@")
    assert release.detail["version"] == service.store.secrets.info("default", "app/key/1").version
    assert service.store.audit.verify("default").whole


def test_nothing_is_released_that_cannot_be_written_down(
    service: Service, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    from inclavare.verdict.store import Unavailable

    client.handshake()

    def full(*_: object, **__: object) -> None:
        raise Unavailable("the disk is full", id="verdict.store.database.unavailable")

    monkeypatch.setattr(service.store.audit, "append", full)
    assert client.resource("app/key/1").status == 503
    client.auth()
    assert client.attest().status == 503
    monkeypatch.undo()
    # That attestation's session is of no use.
    assert client.resource("app/key/1").error == "TokenNotFound"


def test_evidence_is_kept_for_dry_runs(service: Service, client: Client) -> None:
    client.handshake()
    digest = service.last_decision().detail["evidence"]
    service.application.decider._kept.clear()
    client.handshake()
    digest = service.last_decision().detail["evidence"]
    store = service.store
    assert dry_run(store, "default", digest).appraisal.accepted
    other = dry_run(store, "default", digest, kind="toml", text=service.policy(b"somebody else"))
    assert [failure.id for failure in other.appraisal.failures] == ["policy.mrenclave"]
    allowed = RESOURCE.replace("MRENCLAVE", service.enclave().mrenclave.hex())
    for text, path, expected in (
        (allowed, "app/key/1", True),
        (allowed, "b/key/1", False),
        (RESOURCE, "app/k/1", False),
    ):
        found = dry_run(store, "default", digest, kind="resource-rego", text=text, resource=path)
        assert found.appraisal.accepted
        assert found.release is not None
        assert found.release.allowed is expected
    rego = dry_run(store, "default", digest, kind="attestation-rego", text=ALLOW_OUR_PLATFORM)
    assert [failure.id for failure in rego.appraisal.failures] == ["policy.rego.executables"]
    with pytest.raises(UsageError):
        dry_run(store, "default", digest, kind="toml", text="nonsense = 1")
    with pytest.raises(NotFound):
        dry_run(store, "other", digest)


def test_like_evidence_is_kept_once(service: Service, client: Client) -> None:
    service.application.decider._kept.clear()
    before = len(service.store.evidence.list("default"))
    for _ in range(3):
        client.handshake()
    assert len(service.store.evidence.list("default")) == before + 1


def test_rotated_signing_key(service: Service, client: Client) -> None:
    """Tokens of the former key are good until they expire; another replica knows the new key at once."""
    token = client.handshake()
    service.store.keys.rotate("ear")
    service.application.decider._keys = None
    assert client.get("app/key/1", bearer=token) == SECRET
    again = client.handshake()
    kid = json.loads(unb64url(again.split(".")[0]))["kid"]
    assert kid != json.loads(unb64url(token.split(".")[0]))["kid"]
    assert client.get("app/key/1") == SECRET


def test_token_of_another_replica(service: Service, client: Client) -> None:
    """A second process over the same database: sessions and tokens are common."""
    from verdict_service import make_store, running

    with (
        make_store(service.config) as store,
        running(service.config, store, service.platform, service.signers) as replica,
    ):
        other = replica.client(key=client.key)
        client.auth()
        other.cookie, other.nonce = client.cookie, client.nonce
        assert other.attest().status == 200
        assert client.get("app/key/1") == SECRET
        assert client.get("app/key/1", bearer=other.token) == SECRET
        body = client.attestation()
        assert client.attest(body).status == 401


def test_forged_extension_in_a_token(service: Service, client: Client) -> None:
    """A token signed by the service, but not for this: it says no tenant."""
    from inclavare.attestation.ear import EarIssuer, EarKey

    token = client.handshake()
    claims: dict[str, Any] = json.loads(unb64url(token.split(".")[1]))
    key = EarKey(service.store.keys.current("ear").private)  # type: ignore[arg-type]
    issuer = EarIssuer([key])
    for damage in ({}, {"tenant": "x" * 32}):
        claims["submods"]["cpu0"]["inclavare"] = damage
        forged = issuer._signed(b64url(json.dumps(claims).encode()))
        assert client.resource("app/key/1", bearer=forged).error == "TokenVerifierError"


def test_collateral_from_a_source(service: Service) -> None:
    """Evidence without collateral is verified with what the configured file has; without one it is refused."""
    from pathlib import Path

    attester = service.attester()

    def bare(report_data: bytes) -> dict[str, Any]:
        return {"quote": attester(report_data)["quote"]}

    client = service.client(attester=bare)
    assert "evidence.collateral" in denied(client)
    file = Path(service.config.state_dir) / "collateral.json"
    file.write_text(json.dumps(service.platform.collateral()))
    config = service.config.__class__.parse(
        f'state_dir = "{service.config.state_dir}"\n[collateral]\nsources = ["file:{file}"]'
    )
    service.application.decider._collateral = collateral_source(config)
    try:
        client.handshake()
        assert client.get("app/key/1") == SECRET
    finally:
        service.application.decider._collateral = None
