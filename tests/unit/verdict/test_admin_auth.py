"""Who is let in: tokens, OpenID Connect against a provider on loopback, client certificates; and each role's doors."""

from __future__ import annotations

import base64
import datetime
import hmac
import http.server
import json
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from admin_api import call, token
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from joserfc import jwt
from joserfc.jwk import ECKey, OctKey, RSAKey
from small_enclaves import Signers
from verdict_service import Service, make_config, make_store, running

from inclavare import serving
from inclavare.errors import UsageError
from inclavare.tee.sgx_sim import SimulatedPlatform
from inclavare.verdict.auth import AUDIENCE, ISSUER, Authenticator
from inclavare.verdict.store import SYSTEM, Quotas


@dataclass
class Provider:
    """An OpenID provider."""

    issuer: str
    key: RSAKey
    keys: list[dict[str, Any]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def token(self, key: Any = None, header: dict[str, Any] | None = None, **claims: Any) -> str:
        now = int(time.time())
        given = {
            "iss": self.issuer,
            "aud": "verdictd",
            "sub": "carol",
            "exp": now + 300,
            "iat": now,
            "groups": ["staff", "security"],
            **claims,
        }
        kept = {name: value for name, value in given.items() if value is not None}
        key = key or self.key
        algorithm = {"RSA": "RS256", "EC": "ES256", "oct": "HS256"}[key.key_type]
        return jwt.encode({"alg": algorithm, "kid": key.kid, **(header or {})}, kept, key, algorithms=[algorithm])


@dataclass
class Authority:
    """Makes client certificates."""

    directory: Path
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    def client(self, subject: str, san: list[x509.GeneralName] | None = None, *, days: int = 1) -> tuple[str, str]:
        key = ec.generate_private_key(ec.SECP256R1())
        made = _certificate(x509.Name.from_rfc4514_string(subject), key, self.key, self.certificate.subject, san, days)
        name = self.directory / f"client-{time.monotonic_ns()}"
        name.with_suffix(".pem").write_bytes(made.public_bytes(Encoding.PEM))
        name.with_suffix(".key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return str(name.with_suffix(".pem")), str(name.with_suffix(".key"))


def _certificate(
    subject: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    signer: ec.EllipticCurvePrivateKey,
    issuer: x509.Name,
    san: list[x509.GeneralName] | None = None,
    days: int = 1,
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    end = now + datetime.timedelta(days=days)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, end) - datetime.timedelta(hours=1))
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=subject == issuer, path_length=None), critical=True)
    )
    if subject != issuer:
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
    if san:
        builder = builder.add_extension(x509.SubjectAlternativeName(san), critical=False)
    return builder.sign(signer, SHA256())


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    base = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=base, prefix="verdictd-auth") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def authority(directory: Path) -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "administrators")])
    made = _certificate(name, key, key, name)
    (directory / "client-ca.pem").write_bytes(made.public_bytes(Encoding.PEM))
    return Authority(directory, key, made)


@pytest.fixture(scope="module")
def provider(directory: Path) -> Iterator[Provider]:
    certificate, key = serving.own_certificate(directory / "provider", (), common_name="provider")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            made.asked.append(self.path)
            documents = {
                "/realm/.well-known/openid-configuration": {"issuer": made.issuer, "jwks_uri": f"{made.issuer}/keys"},
                "/realm/keys": {"keys": made.keys},
            }
            body = json.dumps(documents.get(self.path)).encode()
            self.send_response(200 if self.path in documents else 404)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    signing = RSAKey.generate_key(2048, {"kid": "first"})
    made = Provider(f"https://127.0.0.1:{server.server_address[1]}/realm", signing)
    odd = {"kty": "XYZ", "kid": "odd"}
    made.keys = [odd, signing.as_dict(private=False)]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield made
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def guarded(
    directory: Path, authority: Authority, provider: Provider, platform: SimulatedPlatform, signers: Signers
) -> Iterator[Service]:
    text = f"""
[limits]
client_requests = 1000000
[tls]
client_ca = "{directory / "client-ca.pem"}"
"""
    for value, tenant, role in (("security", "default", "auditor"), ("ops", "*", "admin")):
        text += f"""
[[auth.oidc]]
issuer = "{provider.issuer}"
audience = "verdictd"
claim = "groups"
value = "{value}"
tenant = "{tenant}"
role = "{role}"
ca_file = "{directory / "provider/tls-cert.pem"}"
"""
    for rule in ('subject = "CN=alice,O=Example"', 'san = "URI:spiffe://example/ops"'):
        text += f'\n[[auth.certificates]]\n{rule}\ntenant = "default"\nrole = "operator"\n'
    config = make_config(directory / "service", text)
    with make_store(config) as store:
        for name in ("default", "other"):
            store.tenants.create(name, quotas=Quotas())
            store.secrets.put(name, "app/key/1", b"x")
        with running(config, store, platform, signers) as service:
            yield service


# --- this service's tokens


def test_nobody_is_anonymous(guarded: Service) -> None:
    for path in ("/info", "/tenants", "/openapi.json", "/nothing", "/tenants/default/secrets"):
        answer = call(guarded, "GET", path)
        assert (answer.status, answer.id) == (401, "verdict.auth.none")
        assert answer.headers["www-authenticate"].startswith("Bearer")
    last = guarded.last_decision(SYSTEM)
    assert (last.action, last.decision, last.actor) == ("api.refused", "denied", "nobody")
    assert last.detail["path"] == "/api/v1/tenants/default/secrets"


@pytest.mark.parametrize("header", ["Basic YTpi", "Bearer", "Bearer ", "Token x", "bearer a.b.c", "Bearer \xff"])
def test_other_schemes_are_refused(guarded: Service, header: str) -> None:
    assert call(guarded, "GET", "/info", headers={"Authorization": header}).status == 401


def _signed(store: Any, claims: dict[str, Any], *, header: dict[str, Any] | None = None, kind: Any = "admin") -> str:
    from joserfc.jwk import OKPKey

    key = store.keys.current(kind)
    head = {"alg": "Ed25519", "typ": "verdictd-admin+jwt", "kid": key.kid, **(header or {})}
    return jwt.encode(head, claims, OKPKey.import_key(key.private), algorithms=["Ed25519"])


def _part(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def test_forged_and_altered_tokens_are_refused(guarded: Service) -> None:
    store = guarded.store
    good = token(store, "auditor", "default", name="mallory")
    from joserfc.jws import extract_compact

    claims = json.loads(extract_compact(good.encode()).payload)
    assert call(guarded, "GET", "/info", token=good).status == 200
    now = int(time.time())
    key = store.keys.current("admin")
    secret = OctKey.import_key(json.dumps(key.public_jwk()))
    head = _part({"alg": "Ed25519", "typ": "verdictd-admin+jwt", "kid": key.kid, "crit": ["x"], "x": 1})
    signature = key.private.sign(f"{head}.{_part(claims)}".encode())  # type: ignore[call-arg]
    critical = f"{head}.{_part(claims)}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"
    forged = {
        "more role": _signed(store, {**claims, "role": "admin"}),
        "more tenants": _signed(store, {**claims, "tenant": SYSTEM}),
        "another name": _signed(store, {**claims, "sub": "alice"}),
        "never issued": _signed(store, {**claims, "jti": "AAAAAAAAAAAAAAAAAAAAAA"}),
        "no id": _signed(store, {name: value for name, value in claims.items() if name != "jti"}),
        "expired": _signed(store, {**claims, "exp": now - 1}),
        "for ever": _signed(store, {name: value for name, value in claims.items() if name != "exp"}),
        "another service's": _signed(store, {**claims, "aud": "else"}),
        "another issuer": _signed(store, {**claims, "iss": "else"}),
        "the audit key": _signed(store, claims, kind="audit"),
        "another type": _signed(store, claims, header={"typ": "JWT"}),
        "own key": jwt.encode({"alg": "HS256", "typ": "verdictd-admin+jwt", "kid": key.kid}, claims, secret,
                              algorithms=["HS256"]),
        "half a surrogate pair": f"{_part({'alg': 'Ed25519', 'kid': chr(0xD800)})}.{_part(claims)}.AAAA",
        "no object": f"{_part({'alg': 'Ed25519', 'kid': key.kid})}.{_part([])}.AAAA",
        "an unknown critical header": critical,
        "nothing signed": good.rpartition(".")[0] + ".",
        "alg none": "eyJhbGciOiJub25lIn0." + good.split(".")[1] + ".",
        "cut": good[:-2],
        "large": good + "A" * 20_000,
        "nested": "e30." + "W" * 9000 + ".x",
    }  # fmt: skip
    for what, text in forged.items():
        assert call(guarded, "GET", "/info", token=text).status == 401, what
    first, second, third = good.split(".")
    for part in (0, 1, 2):
        for at in range(0, len(good.split(".")[part]), 7):
            parts = [first, second, third]
            other = "A" if parts[part][at] != "A" else "B"
            parts[part] = parts[part][:at] + other + parts[part][at + 1 :]
            # The last digit of a signature has bits that mean nothing.
            if part < 2 or at < len(third) - 1:
                assert call(guarded, "GET", "/info", token=".".join(parts)).status == 401
    assert (claims["aud"], claims["iss"]) == (AUDIENCE, ISSUER)


def test_a_deleted_tenants_tokens_do_not_come_back_with_its_name(guarded: Service) -> None:
    store = guarded.store
    store.tenants.create("brief")
    old = token(store, "operator", "brief")
    assert call(guarded, "GET", "/tenants/brief", token=old).status == 200
    store.tenants.delete("brief")
    store.tenants.create("brief")
    assert call(guarded, "GET", "/tenants/brief", token=old).status == 401
    store.tenants.delete("brief")


def test_strangers_fill_no_disk(guarded: Service) -> None:
    """What one client may make the trail longer is bounded; how much was left out stands in it."""
    before = guarded.last_decision(SYSTEM).seq
    front = guarded.application._admin
    for _ in range(100):
        assert call(guarded, "GET", "/info").status == 401
    written = guarded.last_decision(SYSTEM).seq - before
    assert written <= 60
    assert sum(front._suppressed.values()) >= 40
    front._strangers._left.clear()
    assert call(guarded, "GET", "/info").status == 401
    assert guarded.last_decision(SYSTEM).detail["not_written_before"] >= 40


# --- OpenID Connect


def test_oidc_gives_the_roles_of_its_rules(guarded: Service, provider: Provider) -> None:
    found = call(guarded, "GET", "/info", token=provider.token())
    assert found.status == 200, found.body
    assert found.json["grants"] == [{"tenant": "default", "role": "auditor"}]
    assert found.json["actor"].startswith("oidc:carol@127.0.0.1")
    both = call(guarded, "GET", "/info", token=provider.token(groups=["security", "ops"])).json
    assert {grant["role"] for grant in both["grants"]} == {"auditor", "admin"}
    assert call(guarded, "GET", "/info", token=provider.token(aud=["x", "verdictd"])).status == 200
    assert call(guarded, "GET", "/tenants/default/secrets", token=provider.token()).status == 200
    refused = call(guarded, "DELETE", "/tenants/default/secrets/app/key/1", token=provider.token())
    assert refused.status == 403
    last = guarded.last_decision("default")
    assert (last.action, last.decision) == ("api.refused", "denied") and last.actor.startswith("oidc:carol@")
    assert provider.asked.count("/realm/keys") == 1, "keys are kept"


def test_oidc_without_a_rule_is_known_but_may_nothing(guarded: Service, provider: Provider) -> None:
    for groups in (["staff"], [], None, "securityx", {"security": True}, ["Security"]):
        answer = call(guarded, "GET", "/info", token=provider.token(groups=groups))
        assert (answer.status, answer.id) == (403, "verdict.auth.unknown"), groups


def _with_shared_secret(token: str, secret: bytes) -> str:
    """The same claims, as a verifier would take them that lets the token say how it is verified."""
    head = base64.urlsafe_b64encode(b'{"alg":"HS256","kid":"first"}').rstrip(b"=").decode()
    signed = f"{head}.{token.split('.')[1]}"
    mac = hmac.digest(secret, signed.encode(), "sha256")
    return f"{signed}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"


def test_oidc_refuses_others_tokens(guarded: Service, provider: Provider) -> None:
    now = int(time.time())
    stranger = RSAKey.generate_key(2048, {"kid": "first"})
    public = provider.key.as_pem(private=False)
    bad = {
        "another key": provider.token(stranger),
        "unknown key": provider.token(ECKey.generate_key("P-256", {"kid": "second"})),
        "public key as a shared secret": _with_shared_secret(provider.token(), public),
        "expired": provider.token(exp=now - 3600),
        "never expires": provider.token(exp=None),
        "a text for a time": provider.token(exp="tomorrow"),
        "not yet": provider.token(nbf=now + 3600),
        "from the future": provider.token(iat=now + 3600),
        "another audience": provider.token(aud="else"),
        "no audience": provider.token(aud=None),
        "another issuer": provider.token(iss=provider.issuer + "/"),
        "nobody": provider.token(sub=None),
    }
    for what, text in bad.items():
        assert call(guarded, "GET", "/info", token=text).status == 401, what
    assert provider.asked.count("/realm/keys") <= 2, "strangers do not make us ask"


def test_oidc_takes_a_new_key_after_a_while(guarded: Service, provider: Provider) -> None:
    fresh = ECKey.generate_key("P-256", {"kid": "third"})
    provider.keys.append(fresh.as_dict(private=False))
    keys = guarded.application._admin._authenticator._providers._keys[provider.issuer]
    keys._asked = float("-inf")
    assert call(guarded, "GET", "/info", token=provider.token(fresh)).status == 200


def test_oidc_provider_that_cannot_be_reached_is_no_way_in(guarded: Service, provider: Provider) -> None:
    keys = guarded.application._admin._authenticator._providers._keys[provider.issuer]
    kept = keys._found, keys._since, keys._asked, keys._rule
    try:
        keys._found, keys._asked = None, float("-inf")
        from msgspec.structs import replace

        keys._rule = replace(keys._rule, jwks_uri="https://127.0.0.1:1/keys")
        answer = call(guarded, "GET", "/info", token=provider.token())
        assert (answer.status, answer.id) == (503, "verdict.auth.oidc.unavailable")
        # Its certificate must be the configured authority's.
        keys._asked = float("-inf")
        keys._rule = replace(keys._rule, jwks_uri=provider.issuer + "/keys", ca_file=str(guarded.config.certificate))
        assert call(guarded, "GET", "/info", token=provider.token()).status == 503
    finally:
        keys._found, keys._since, keys._asked, keys._rule = kept


# --- client certificates


def test_certificates_of_named_subjects(guarded: Service, authority: Authority) -> None:
    for pair in (
        authority.client("CN=alice,O=Example"),
        authority.client("CN=robot", [x509.UniformResourceIdentifier("spiffe://example/ops")]),
    ):
        found = call(guarded, "GET", "/info", certificate=pair)
        assert found.status == 200, found.body
        assert found.json["grants"] == [{"tenant": "default", "role": "operator"}]
        assert found.json["actor"].startswith("certificate:")
        assert call(guarded, "GET", "/tenants/other", certificate=pair).status == 403


@pytest.mark.parametrize(
    ("subject", "san"),
    [
        ("CN=mallory,O=Example", []),
        ("CN=alice", []),
        ("O=Example,CN=alice", []),
        ("CN=alice,O=Example,C=DE", []),
        ("CN=alice+O=Example", []),
        ("CN=Alice,O=Example", []),
        ("CN=robot", ["spiffe://example/opsx"]),
        ("CN=spiffe://example/ops", []),
    ],
)
def test_other_certificates_may_nothing(guarded: Service, authority: Authority, subject: str, san: list[str]) -> None:
    pair = authority.client(subject, [x509.UniformResourceIdentifier(one) for one in san])
    answer = call(guarded, "GET", "/info", certificate=pair)
    assert (answer.status, answer.id) == (403, "verdict.auth.unknown")


def test_certificates_of_another_authority_and_expired_ones_end_in_the_handshake(
    guarded: Service, authority: Authority
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    impostor = Authority(authority.directory, key, authority.certificate)
    for pair in (impostor.client("CN=alice,O=Example"), authority.client("CN=alice,O=Example", days=-1)):
        with pytest.raises((ssl.SSLError, OSError)):
            call(guarded, "GET", "/info", certificate=pair)


def test_a_wrong_token_is_not_healed_by_a_certificate(guarded: Service, authority: Authority) -> None:
    pair = authority.client("CN=alice,O=Example")
    assert call(guarded, "GET", "/info", token="a.b.c", certificate=pair).status == 401
    assert call(guarded, "GET", "/info", headers={"Authorization": "Basic YTpi"}, certificate=pair).status == 401


def test_malformed_subjects_stop_the_start(guarded: Service) -> None:
    from msgspec.structs import replace

    config = guarded.config
    for subject in ("alice", "XX=alice", "CN=alice;O=x"):
        rules = (replace(config.auth.certificates[0], subject=subject),)
        with pytest.raises(UsageError) as caught:
            Authenticator(replace(config, auth=replace(config.auth, certificates=rules)), guarded.store)
        assert caught.value.id == "verdict.config.value"


# --- roles

_POLICY = {"kind": "toml", "text": f'mrsigner = ["{"ab" * 32}"]\n'}
_BUNDLE = {"payload": "", "payloadType": "x", "signatures": []}
#: Method, path below a tenant, body, least role.
DOORS: list[tuple[str, str, Any, str]] = [
    ("GET", "", None, "auditor"),
    ("PUT", "/quotas", {}, "system"),
    ("GET", "/secrets", None, "auditor"),
    ("PUT", "/secrets/a/b/1", {"value": "YQ=="}, "operator"),
    ("GET", "/secrets/a/b/1", None, "auditor"),
    ("GET", "/secrets/a/b/1/versions", None, "auditor"),
    ("DELETE", "/secrets/a/b/1", None, "operator"),
    ("GET", "/policies", None, "auditor"),
    ("PUT", "/policies/matrix", _POLICY, "operator"),
    ("GET", "/policies/matrix", None, "auditor"),
    ("GET", "/policies/matrix/history", None, "auditor"),
    ("GET", "/policies/matrix/diff?old=1", None, "auditor"),
    ("POST", "/policies/matrix/rollback", {"version": 1}, "operator"),
    ("PUT", "/policies/matrix/default", None, "operator"),
    ("DELETE", "/policy-defaults/toml", None, "operator"),
    ("DELETE", "/policies/matrix", None, "operator"),
    ("POST", "/dry-run", {}, "operator"),
    ("GET", "/evidence", None, "auditor"),
    ("GET", f"/evidence/{'ab' * 32}", None, "auditor"),
    ("GET", "/references", None, "auditor"),
    ("POST", "/references", _BUNDLE, "operator"),
    ("GET", f"/references/{'ab' * 32}", None, "auditor"),
    ("GET", f"/references/{'ab' * 32}/bundle", None, "auditor"),
    ("POST", f"/references/{'ab' * 32}/revoke", {"reason": "x"}, "operator"),
    ("GET", "/signers", None, "auditor"),
    ("PUT", "/signers/me", {"public_key": "x"}, "operator"),
    ("DELETE", "/signers/me", None, "operator"),
    ("GET", "/tokens", None, "admin"),
    ("POST", "/tokens", {"name": "x", "role": "auditor", "lifetime": 60}, "admin"),
    ("DELETE", "/tokens/AAAA", None, "admin"),
    ("GET", "/audit", None, "auditor"),
    ("GET", "/audit/export", None, "auditor"),
    ("POST", "/audit/verify", {}, "auditor"),
    ("DELETE", "", None, "system"),
]
#: Not below a tenant; the least role for all tenants.
SERVICE_DOORS: list[tuple[str, str, Any, str]] = [
    ("POST", "/tenants", {"name": "default"}, "admin"),
    ("GET", "/keys/audit", None, "auditor"),
    ("POST", "/keys/ear/rotate", None, "admin"),
    ("POST", "/audit/verify", {}, "auditor"),
    ("GET", "/audit/checkpoints", None, "auditor"),
    ("POST", "/audit/checkpoints", None, "auditor"),
]
#: Open to everybody who is known.
COMMON_DOORS = [("GET", "/info"), ("GET", "/tenants")]
RANK = {"auditor": 1, "operator": 2, "admin": 3, "system": 4}


@pytest.fixture(scope="module")
def tokens(guarded: Service) -> Callable[[str, str], str]:
    made: dict[tuple[str, str], str] = {}

    def get(role: str, tenant: str) -> str:
        if (role, tenant) not in made:
            made[role, tenant] = token(guarded.store, role, tenant)
        return made[role, tenant]

    return get


def test_the_matrix_has_every_door(guarded: Service) -> None:
    described = {
        (method.upper(), path)
        for path, operations in guarded.application._admin.routes.openapi()["paths"].items()
        for method in operations
    }
    below = [(method, "/tenants/default" + path.partition("?")[0]) for method, path, _, _ in DOORS]
    listed = below + [(method, path) for method, path, _, _ in SERVICE_DOORS] + COMMON_DOORS
    import re

    def template(method: str, path: str) -> tuple[str, str]:
        found = [
            one for verb, one in described
            if verb == method and re.fullmatch(re.sub(r"\\\{[^}]*\\\}", "[^/]+", re.escape(one)), "/api/v1" + path)
        ]  # fmt: skip
        assert found, (method, path)
        return method, min(found, key=lambda one: one.count("{"))

    assert {template(*door) for door in listed} == described


@pytest.mark.parametrize("role", ["auditor", "operator", "admin"])
def test_doors_of_ones_own_tenant(guarded: Service, tokens: Callable[[str, str], str], role: str) -> None:
    for method, path, body, least in DOORS:
        answer = call(guarded, method, "/tenants/default" + path, token=tokens(role, "default"), body=body)
        allowed = RANK[role] >= RANK[least]
        assert (answer.status != 403) is allowed, (method, path, answer.body)
        assert answer.status not in (401, 500), (method, path, answer.body)
    for method, path, body, _ in SERVICE_DOORS:
        assert call(guarded, method, path, token=tokens(role, "default"), body=body).status == 403, (method, path)


@pytest.mark.parametrize("role", ["auditor", "operator", "admin"])
def test_no_door_of_another_tenant_opens_or_tells_whether_it_is_there(
    guarded: Service, tokens: Callable[[str, str], str], role: str
) -> None:
    own = tokens(role, "default")
    for method, path, body, _ in DOORS:
        answers = []
        for tenant in ("other", "nobody", SYSTEM):
            answer = call(guarded, method, f"/tenants/{tenant}{path}", token=own, body=body)
            assert (answer.status, answer.id) == (403, "verdict.auth.role"), (method, path, tenant, answer.body)
            said = answer.json
            del said["request"]
            answers.append((said, {name.lower() for name in answer.headers}))
        assert answers[0] == answers[1]
    assert {one["name"] for one in call(guarded, "GET", "/tenants", token=own).json["items"]} == {"default"}
    assert b"other" not in call(guarded, "GET", "/info", token=own).body
    # Nor does one's own tenant tell what there is in another.
    guarded.store.secrets.put("other", "only/there/1", b"x")
    if role != "auditor":
        here = call(guarded, "DELETE", "/tenants/default/secrets/only/there/1", token=own)
        nowhere = call(guarded, "DELETE", "/tenants/default/secrets/only/where/1", token=own)
        assert (here.status, here.id, here.json["found"]) == (nowhere.status, nowhere.id, nowhere.json["found"])


@pytest.mark.parametrize("role", ["auditor", "operator", "admin"])
def test_doors_of_the_service(guarded: Service, tokens: Callable[[str, str], str], role: str) -> None:
    own = tokens(role, SYSTEM)
    for method, path, body, least in SERVICE_DOORS:
        answer = call(guarded, method, path, token=own, body=body)
        assert (answer.status != 403) is (RANK[role] >= RANK[least]), (method, path, answer.body)
    for method, path, body, least in DOORS[:-1]:
        needed = "admin" if least == "system" else least
        answer = call(guarded, method, "/tenants/other" + path, token=own, body=body)
        assert (answer.status != 403) is (RANK[role] >= RANK[needed]), (method, path, answer.body)


def test_every_refused_call_is_in_the_trail_of_who_made_it(guarded: Service, tokens: Callable[[str, str], str]) -> None:
    before = guarded.last_decision("default").seq
    other = guarded.last_decision("other").seq if guarded.store.audit.entries("other") else 0
    call(guarded, "PUT", "/tenants/other/secrets/a/b/1", token=tokens("operator", "default"), body={"value": "YQ=="})
    last = guarded.last_decision("default")
    assert last.seq == before + 1
    assert (last.actor, last.action, last.decision) == ("token:operator.default", "api.refused", "denied")
    assert last.detail["reasons"][0]["id"] == "verdict.auth.role" and last.detail["method"] == "PUT"
    entries = guarded.store.audit.entries("other", newest_first=True, limit=1)
    assert (entries[0].seq if entries else 0) == other
