"""Plugins: SoftHSM as it is, an HTTP server that follows Vault's documented API, and certificates that OpenSSL verifies."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from kbs_client import Client, Key, b64url
from small_enclaves import Signers
from verdict_service import Service, make_config, make_store, running

from inclavare.errors import InclavareError
from inclavare.tee.sgx_sim import SimulatedPlatform
from inclavare.verdict.plugins import Plugins

SOFTHSM = Path("/usr/lib/softhsm/libsofthsm2.so")
PLUGIN_POLICY = """package policy
import rego.v1
default allow := false
allow if data.plugin in {"vault", "pkcs11"}
allow if {
    data.plugin == "ca"
    data["resource-path"] == ["bundle"]
}
allow if {
    data.plugin == "ca"
    data["resource-path"] == ["issue", "ns", "web"]
}
"""


# --- Vault


class Vault(BaseHTTPRequestHandler):
    """KV version 2 and transit as https://developer.hashicorp.com/vault/api-docs documents them; written for this test."""

    TOKEN = "s.token"
    asked: list[str]

    def _answer(self, status: int, body: Any) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _serve(self, body: dict[str, Any]) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        if self.headers.get("X-Vault-Token") != self.TOKEN:
            return self._answer(403, {"errors": ["permission denied"]})
        if self.path.startswith("/v1/secret/data/tenant-a/db"):
            version = int(self.path.partition("version=")[2] or 2)
            data = {1: {"password": "old"}, 2: {"password": "vault's secret", "number": 7}}.get(version)
            if data is None:
                return self._answer(404, {"errors": []})
            return self._answer(200, {"data": {"data": data, "metadata": {"version": version, "destroyed": False}}})
        if self.path == "/v1/transit/decrypt/data-key":
            if body.get("ciphertext") != "vault:v1:AAAA":
                return self._answer(400, {"errors": ["cipher: message authentication failed"]})
            return self._answer(200, {"data": {"plaintext": base64.b64encode(b"the plain key").decode()}})
        if self.path.startswith("/v1/secret/data/tenant-a/broken"):
            return self._answer(500, {"errors": ["internal error"]})
        return self._answer(404, {"errors": []})

    def do_GET(self) -> None:
        self._serve({})

    def do_POST(self) -> None:
        self._serve(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    do_PUT = do_POST

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def vault() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Vault)
    server.asked = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


# --- SoftHSM


@pytest.fixture(scope="module")
def softhsm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with a token, in which there are a secret object and an RSA key."""
    if not SOFTHSM.exists():
        pytest.skip("softhsm2 is not installed")
    import pkcs11

    base = tmp_path_factory.mktemp("softhsm")
    (base / "tokens").mkdir()
    (base / "softhsm2.conf").write_text(f"directories.tokendir = {base}/tokens\nobjectstore.backend = file\n")
    before = os.environ.get("SOFTHSM2_CONF")
    os.environ["SOFTHSM2_CONF"] = str(base / "softhsm2.conf")
    subprocess.run(
        ["softhsm2-util", "--init-token", "--free", "--label", "verdictd", "--pin", "98765", "--so-pin", "1234"],
        check=True,
        capture_output=True,
    )
    (base / "pin").write_text("98765\n")
    (base / "pin").chmod(0o600)
    with pkcs11.lib(str(SOFTHSM)).get_token(token_label="verdictd").open(rw=True, user_pin="98765") as session:
        session.create_object(
            {
                pkcs11.Attribute.CLASS: pkcs11.ObjectClass.SECRET_KEY,
                pkcs11.Attribute.KEY_TYPE: pkcs11.KeyType.GENERIC_SECRET,
                pkcs11.Attribute.TOKEN: True,
                pkcs11.Attribute.SENSITIVE: False,
                pkcs11.Attribute.EXTRACTABLE: True,
                pkcs11.Attribute.LABEL: "app/key/hsm",
                pkcs11.Attribute.VALUE: b"from the module",
            }
        )
        public, _ = session.generate_keypair(pkcs11.KeyType.RSA, 2048, label="wrap", store=True)
        for name, mechanism, mgf in (("sha1", pkcs11.Mechanism.SHA_1, pkcs11.MGF.SHA1),):
            parameters = (mechanism, mgf, None)
            wrapped = public.encrypt(b"wrapped", mechanism=pkcs11.Mechanism.RSA_PKCS_OAEP, mechanism_param=parameters)
            (base / f"wrapped-{name}").write_bytes(wrapped)
    yield base
    if before is None:
        del os.environ["SOFTHSM2_CONF"]
    else:
        os.environ["SOFTHSM2_CONF"] = before


# --- the authority


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("ca")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "workloads")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now - timedelta(hours=1), now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.KeyUsage(False, False, False, False, False, True, True, False, False), critical=True)
        .sign(key, SHA256())
    )
    (base / "ca.pem").write_bytes(made.public_bytes(Encoding.PEM))
    (base / "ca-key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (base / "ca-key.pem").chmod(0o600)
    return base


@pytest.fixture(scope="module")
def plugged(
    tmp_path_factory: pytest.TempPathFactory,
    platform: SimulatedPlatform,
    signers: Signers,
    vault: ThreadingHTTPServer,
    softhsm: Path,
    authority: Path,
) -> Iterator[Service]:
    base = tmp_path_factory.mktemp("plugged")
    (base / "vault-token").write_text(f"{Vault.TOKEN}\n")
    (base / "vault-token").chmod(0o600)
    config = make_config(
        base / "state",
        f"""
[[plugins]]
type = "vault"
tenants = ["default"]
url = "http://127.0.0.1:{vault.server_port}"
token_file = "{base}/vault-token"
kv_prefix = "tenant-a"
transit_mount = "transit"
transit_keys = ["data-key"]

[[plugins]]
type = "pkcs11"
tenants = ["default"]
module = "{SOFTHSM}"
token_label = "verdictd"
pin_file = "{softhsm}/pin"
wrapping_keys = ["wrap"]
hash = "sha1"

[[plugins]]
type = "ca"
tenants = ["default", "other"]
certificate = "{authority}/ca.pem"
key_file = "{authority}/ca-key.pem"
trust_domain = "example.org"
lifetime = "10m"
dns_suffix = ".svc.example.org"
""",
    )
    with make_store(config) as store:
        for tenant in ("default", "other"):
            store.tenants.create(tenant)
        with running(config, store, platform, signers) as service:
            service.default_policy(service.policy())
            service.default_policy(PLUGIN_POLICY, kind="resource-rego")
            service.default_policy(service.policy(), tenant="other")
            yield service


@pytest.fixture
def client(plugged: Service) -> Client:
    made = plugged.client()
    made.handshake()
    return made


def test_vault_kv(plugged: Service, client: Client) -> None:
    assert client.get("kv/db/password", plugin="vault") == b"vault's secret"
    assert client.get("kv/db/password?version=1", plugin="vault") == b"old"
    assert plugged.last_decision().detail["version"] == 1
    assert plugged.last_decision().detail["resource"] == "vault/kv/db/password"


@pytest.mark.parametrize(
    "path",
    [
        "kv/db/absent",
        "kv/db/number",
        "kv/db/password?version=9",
        "kv/db/password?version=x",
        "kv/absent/password",
        "kv/db",
        "kv",
        "transit/data-key?ciphertext=vault:v1:BBBB",
        "transit/data-key?ciphertext=nonsense",
        "transit/other-key?ciphertext=vault:v1:AAAA",
        "sys/seal",
        "kv/..%2f..%2fsys/seal",
        "kv/%2e%2e/x/password",
        "kv/db%3Fx/password",
    ],
)
def test_vault_denials(plugged: Service, client: Client, vault: Any, path: str) -> None:
    vault.asked.clear()
    reply = client.resource(path, plugin="vault")
    assert (reply.status, reply.error) in {(401, "PolicyDeny"), (404, "InvalidRequestPath")}
    assert all(asked.startswith(("/v1/secret/data/tenant-a/", "/v1/transit/decrypt/data-key")) for asked in vault.asked)


def test_vault_transit(plugged: Service, client: Client) -> None:
    assert client.get("transit/data-key?ciphertext=vault:v1:AAAA", plugin="vault") == b"the plain key"
    reply = client.call("POST", "/kbs/v0/vault/transit/data-key", b"vault:v1:AAAA", cookie=client.cookie)
    assert client.key.open(reply.json) == b"the plain key"


def test_vault_that_fails(plugged: Service, client: Client) -> None:
    reply = client.resource("kv/broken/password", plugin="vault")
    assert (reply.status, reply.error, reply.detail) == (401, "PluginInternalError", "Plugin internal error")
    assert plugged.last_decision().detail["reasons"][0]["id"] == "verdict.plugin.vault.unavailable"
    token = Path(plugged.config.state_dir).parent / "vault-token"
    token.write_text("s.expired")
    try:
        assert client.resource("kv/db/password", plugin="vault").error == "PluginInternalError"
        token.chmod(0o644)
        assert client.resource("kv/db/password", plugin="vault").error == "PluginInternalError"
    finally:
        token.write_text(Vault.TOKEN)
        token.chmod(0o600)
    assert client.get("kv/db/password", plugin="vault") == b"vault's secret"


def test_pkcs11(plugged: Service, client: Client, softhsm: Path) -> None:
    assert client.get("resource/app/key/hsm", plugin="pkcs11") == b"from the module"
    wrapped = (softhsm / "wrapped-sha1").read_bytes()
    assert client.get(f"wrap-key/wrap?wrapped={b64url(wrapped)}", plugin="pkcs11") == b"wrapped"
    reply = client.call("POST", "/kbs/v0/pkcs11/wrap-key/wrap", wrapped, cookie=client.cookie)
    assert client.key.open(reply.json) == b"wrapped"


@pytest.mark.parametrize(
    "path",
    [
        "resource/app/key/absent",
        "wrap-key/other?wrapped=AAAA",
        "wrap-key/wrap?wrapped=!",
        "wrap-key/wrap",
        "wrap-key/wrap?wrapped=" + "A" * 342,
        "x/y",
        "resource",
    ],
)
def test_pkcs11_denials(plugged: Service, client: Client, path: str) -> None:
    assert client.resource(path, plugin="pkcs11").error == "PolicyDeny"
    assert client.get("resource/app/key/hsm", plugin="pkcs11") == b"from the module"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the library's, over the lost session
def test_pkcs11_recovers(plugged: Service, client: Client) -> None:
    """A module that has forgotten the session gets a new one."""
    assert client.get("resource/app/key/hsm", plugin="pkcs11") == b"from the module"
    found = plugged.application.decider.plugin("default", "pkcs11")
    found._session.close()  # type: ignore[union-attr]
    assert client.get("resource/app/key/hsm", plugin="pkcs11") == b"from the module"


def test_certificate_for_the_tee_key(plugged: Service, client: Client, authority: Path, tmp_path: Path) -> None:
    pem = client.get("issue/ns/web?dns=a.svc.example.org", plugin="ca")
    made, issuer = x509.load_pem_x509_certificates(pem)
    assert made.public_key() == client.key.private.public_key()
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert names.critical
    assert names.value.get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://example.org/default/ns/web"]
    assert names.value.get_values_for_type(x509.DNSName) == ["a.svc.example.org"]
    assert made.not_valid_after_utc - datetime.now(UTC) <= timedelta(minutes=10)
    assert not made.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert client.get("bundle", plugin="ca") == issuer.public_bytes(Encoding.PEM)
    (tmp_path / "leaf.pem").write_bytes(pem)
    verified = subprocess.run(
        ["openssl", "verify", "-x509_strict", "-CAfile", authority / "ca.pem", tmp_path / "leaf.pem"],
        capture_output=True,
        text=True,
    )
    assert verified.returncode == 0, verified.stderr
    detail = plugged.last_decision().detail
    assert detail["resource"] == "ca/bundle"


def csr(key: Any) -> bytes:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "admin.example.org")])
    return x509.CertificateSigningRequestBuilder(name).sign(key, SHA256()).public_bytes(Encoding.DER)


def test_certificate_for_a_request(plugged: Service, client: Client) -> None:
    key = rsa.generate_private_key(65537, 2048)
    pem = client.get(f"issue/ns/web?csr={b64url(csr(key))}", plugin="ca")
    made = x509.load_pem_x509_certificates(pem)[0]
    assert made.public_key() == key.public_key()
    assert made.subject == x509.Name([])  # nothing but the key is taken from the request
    posted = client.call("POST", "/kbs/v0/ca/issue/ns/web", csr(key), cookie=client.cookie)
    assert x509.load_pem_x509_certificates(client.key.open(posted.json))[0].public_key() == key.public_key()


def test_certificate_denials(plugged: Service, client: Client) -> None:
    broken = bytearray(csr(ec.generate_private_key(ec.SECP256R1())))
    broken[-5] ^= 1
    weak = csr(rsa.generate_private_key(65537, 1024))
    for path in (
        "issue/ns/admin",  # another path than the policy says
        "issue",
        "issue/ns/web?dns=evil.example.com",
        "issue/ns/web?dns=a..svc.example.org",
        f"issue/ns/web?csr={b64url(bytes(broken))}",
        f"issue/ns/web?csr={b64url(weak)}",
        "issue/ns/web?csr=AAAA",
        "issue/ns/../web",
        "revoke/ns/web",
    ):
        assert client.resource(path, plugin="ca").error == "PolicyDeny", path
    with_rsa = plugged.client(key=Key("RSA"))
    with_rsa.handshake()
    assert with_rsa.resource("issue/ns/web", plugin="ca").error == "PolicyDeny"


def test_no_certificates_without_a_resource_policy(plugged: Service) -> None:
    other = plugged.client(tenant="other")
    other.handshake()
    assert other.resource("issue/ns/web", plugin="ca").error == "PolicyDeny"
    assert plugged.last_decision("other").detail["reasons"][0]["id"] == "policy.resource.none"


def test_plugins_are_the_tenants_that_have_them(plugged: Service) -> None:
    other = plugged.client(tenant="other")
    other.handshake()
    reply = other.resource("kv/db/password", plugin="vault")
    assert (reply.status, reply.error) == (404, "PluginNotFound")


@pytest.mark.parametrize(
    ("table", "id"),
    [
        ('type = "nonsense"\ntenants = ["default"]', "verdict.plugin.type"),
        ('type = "ca"\nname = "resource"\ntenants = ["default"]', "verdict.plugin.name"),
        ('type = "ca"\nname = "a/b"\ntenants = ["default"]', "verdict.plugin.name"),
        ('type = "ca"', "verdict.plugin.tenants"),
        ('type = "vault"\ntenants = ["default"]', "verdict.plugin.settings"),
        (
            'type = "vault"\ntenants = ["default"]\nurl = "http://vault.example"\ntoken_file = "/x"',
            "verdict.plugin.vault.url",
        ),
        (
            'type = "pkcs11"\ntenants = ["a"]\nmodule = "/m"\ntoken_label = "x"\npin_file = "/p"\nx = 1',
            "verdict.plugin.settings",
        ),
        (
            'type = "ca"\ntenants = ["a"]\ncertificate = "/x"\nkey_file = "/x"\ntrust_domain = "not a domain"',
            "verdict.plugin.ca.trust_domain",
        ),
    ],
)
def test_wrong_configurations(tmp_path: Path, table: str, id: str) -> None:
    config = make_config(tmp_path / "state", f"[[plugins]]\n{table}\n")
    with make_store(config) as store, pytest.raises(InclavareError) as refused:
        Plugins(config, store)
    assert refused.value.id == id


def test_certificate_that_is_no_authoritys(tmp_path: Path, authority: Path) -> None:
    config = make_config(tmp_path / "state")
    table = f"""[[plugins]]\ntype = "ca"\ntenants = ["default"]\ncertificate = "{config.certificate}"
key_file = "{config.certificate_key}"\ntrust_domain = "example.org"\n"""
    with make_store(config) as store, pytest.raises(InclavareError, match="certificate is wrong"):
        Plugins(make_config(tmp_path / "state", table), store)
    table = table.replace(str(config.certificate), str(authority / "ca.pem"))
    with make_store(config) as store, pytest.raises(InclavareError, match="key_file is wrong"):
        Plugins(make_config(tmp_path / "state", table), store)
