"""The signing service, as its callers and its adversaries meet it: a real server, TLS, real clients."""

from __future__ import annotations

import base64
import contextlib
import datetime
import json
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_public_key,
)
from hypothesis import given
from hypothesis import strategies as st
from small_enclaves import Signers

from inclavare import serving
from inclavare.enclave import signing_access, signing_service
from inclavare.enclave.signing_access import RateLimit, SigningPolicy, add_token, caller_of, read_tokens, remove_token
from inclavare.enclave.signing_client import SigningService
from inclavare.errors import InclavareError, IntegrityError, PlatformError, PolicyError, UsageError
from inclavare.sgx.sigstruct import SIGNED_SIZE, sign, unsigned
from inclavare.sgx.structs import StructureError

_ALL = (1 << 64) - 1
FIELDS: dict[str, Any] = {
    "attributes": 0x4,
    "attribute_mask": _ALL,
    "xfrm": 3,
    "xfrm_mask": _ALL,
    "miscselect": 0,
    "misc_mask": 0xFFFFFFFF,
    "isv_prod_id": 7,
    "isv_svn": 3,
    "date": 0x20260131,
}
MRENCLAVE = b"e" * 32
PKCS1 = "/api/v1/signature/pkcs1"


def _own_certificate(directory: Path, names: list[str]) -> tuple[Path, Path]:
    return serving.own_certificate(directory, names, common_name="inclavare signing service")


def _data(mrenclave: bytes = MRENCLAVE, **changes: Any) -> bytes:
    return unsigned(mrenclave, **{**FIELDS, **changes}).signed_bytes()


DATA = _data()


@dataclass
class Running:
    """A service on a port of the loopback interface."""

    url: str
    port: int
    directory: Path
    token: str

    @property
    def ca(self) -> Path:
        return self.directory / "tls-cert.pem"

    def context(self, certificate: tuple[Path, Path] | None = None) -> ssl.SSLContext:
        made = ssl.create_default_context(cafile=str(self.ca))
        if certificate is not None:
            made.load_cert_chain(*certificate)
        return made

    def http(self, certificate: tuple[Path, Path] | None = None, **headers: str) -> httpx.Client:
        return httpx.Client(base_url=self.url, verify=self.context(certificate), headers=headers, trust_env=False)

    def post(self, data: bytes = DATA, token: str | None = None) -> httpx.Response:
        with self.http(Authorization=f"Bearer {token or self.token}") as client:
            return client.post(PKCS1, content=data, headers={"Content-Type": "text/plain"})

    def client(self, **changes: Any) -> SigningService:
        return SigningService(**{"url": self.url, "token_file": self.directory / "ci.token", "ca": self.ca, **changes})

    def audit(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / "audit").read_text().splitlines()]


Serve = Callable[..., Any]


@pytest.fixture
def serve(tmp_path: Path, signers: Signers) -> Iterator[Callable[..., Running]]:
    with contextlib.ExitStack() as stack:

        def start(**changes: Any) -> Running:
            tokens = tmp_path / "tokens"
            token = add_token(tokens, "ci")
            (tmp_path / "ci.token").touch(0o600)
            (tmp_path / "ci.token").write_text(token + "\n")
            certificate, key = _own_certificate(tmp_path, ["127.0.0.1"])
            settings = signing_service.Settings(
                **{
                    "key": signers.ours,
                    "certificate": certificate,
                    "certificate_key": key,
                    "token_file": tokens,
                    "client_ca": None,
                    "audit": tmp_path / "audit",
                    **changes,
                }
            )
            running = signing_service.server(settings)
            listening = stack.enter_context(serving.listen("127.0.0.1", 0))
            thread = threading.Thread(target=running.run, args=([listening],))
            thread.start()

            def stop() -> None:
                running.should_exit = True
                thread.join(20)
                assert not thread.is_alive()

            stack.callback(stop)
            port = listening.getsockname()[1]
            return Running(f"https://127.0.0.1:{port}", port, tmp_path, token)

        yield start


def _public_pem(key: Any) -> bytes:
    pem: bytes = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return pem


# The original's protocol


def test_it_answers_as_the_original_server_does(serve: Serve, signers: Signers) -> None:
    running = serve()
    answer = running.post()
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    document = answer.json()
    assert set(document) == {"signature", "publicKey"}
    key: Any = load_pem_public_key(document["publicKey"].encode())
    key.verify(base64.b64decode(document["signature"], validate=True), DATA, padding.PKCS1v15(), SHA256())
    with running.http(Authorization=f"Bearer {running.token}") as client:
        public = client.get("/api/v1/signature/public-key")
        assert public.text.encode() == _public_pem(signers.ours) == document["publicKey"].encode()
        assert public.headers["content-type"].startswith("text/plain")
    with running.http() as client:
        assert (client.get("/ping").text, client.get("/healthz").text) == ("ping", "ok")
        assert client.head("/").status_code == 200
        assert client.get("/").status_code == 405
        assert client.get(PKCS1).status_code == 405
        assert client.get("/docs").status_code == 404


def test_curl(serve: Serve, signers: Signers, tmp_path: Path) -> None:
    running = serve()
    (tmp_path / "data").write_bytes(DATA)
    (tmp_path / "header").write_text(f"Authorization: Bearer {running.token}\n")
    made = subprocess.run(
        ["curl", "-sS", "--fail", "--cacert", running.ca, "-H", f"@{tmp_path / 'header'}", "-H", "Content-Type: text/plain",
         "--data-binary", f"@{tmp_path / 'data'}", running.url + PKCS1],
        capture_output=True,
        check=True,
    )  # fmt: skip
    signature = base64.b64decode(json.loads(made.stdout)["signature"])
    assert signature[::-1] == sign(MRENCLAVE, signers.ours, **FIELDS).signature


def test_the_client_gets_a_complete_sigstruct(serve: Serve, signers: Signers) -> None:
    running = serve()
    expected = sign(MRENCLAVE, signers.ours, **FIELDS)
    for url in (running.url, running.url + "/", running.url + "/api/v1/signature"):
        assert running.client(url=url).sign(DATA) == expected
    assert running.client().sign(DATA, _public_pem(signers.ours)) == expected
    with pytest.raises(IntegrityError) as caught:
        running.client().sign(DATA, _public_pem(signers.theirs))
    assert caught.value.id == "signing.service.publickey"


# TLS


def test_tls_below_1_3_and_plain_http_are_refused(serve: Serve) -> None:
    running = serve()
    old = running.context()
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection(("127.0.0.1", running.port)) as raw, pytest.raises(ssl.SSLError):
        old.wrap_socket(raw, server_hostname="127.0.0.1")
    with socket.create_connection(("127.0.0.1", running.port)) as raw:
        raw.sendall(b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"ping" not in raw.recv(1000)
    with _open(running) as tls:
        assert tls.version() == "TLSv1.3"


def test_the_own_certificate_is_made_once_and_its_key_is_private(tmp_path: Path) -> None:
    certificate, key = _own_certificate(tmp_path / "new", ["signer.example", "192.0.2.7"])
    assert key.stat().st_mode & 0o777 == 0o600
    assert key.parent.stat().st_mode & 0o777 == 0o700
    before = certificate.read_bytes()
    assert _own_certificate(tmp_path / "new", ["other"]) == (certificate, key)
    assert certificate.read_bytes() == before
    parsed = x509.load_pem_x509_certificate(before)
    names = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert {"signer.example", "localhost"} <= set(names.get_values_for_type(x509.DNSName))
    assert {"192.0.2.7", "127.0.0.1", "::1"} <= set(map(str, names.get_values_for_type(x509.IPAddress)))
    shown = subprocess.run(
        ["openssl", "x509", "-in", certificate, "-noout", "-fingerprint", "-sha256"], capture_output=True, check=True
    )
    assert serving.fingerprint(certificate) in shown.stdout.decode()
    for content in ("rubbish", "-----BEGIN CERTIFICATE-----\n"):
        certificate.write_text(content)
        with pytest.raises(UsageError):
            serving.fingerprint(certificate)


def test_tls_files_that_cannot_be_used(tmp_path: Path, signers: Signers) -> None:
    certificate, key = _own_certificate(tmp_path, [])
    (tmp_path / "rubbish").write_text("rubbish")
    good = {"certificate": certificate, "certificate_key": key, "client_ca": certificate}
    for name in good:
        for path in (tmp_path / "rubbish", tmp_path / "missing"):
            settings = signing_service.Settings(
                **{"key": signers.ours, "token_file": None, **good, name: path}  # type: ignore[arg-type]
            )
            with pytest.raises(UsageError) as caught:
                signing_service.server(settings)
            assert caught.value.id == "serving.tls"


# Who may call


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer wrong", "Basic {token}", "{token}", "Bearer {digest}", "Bearer {token}x"],
)
def test_unknown_callers_get_nothing(serve: Serve, header: str | None) -> None:
    running = serve()
    digest = read_tokens(running.directory / "tokens")["ci"]
    headers = {} if header is None else {"Authorization": header.format(token=running.token, digest=digest)}
    with running.http(**headers) as client:
        for answer in (client.post(PKCS1, content=DATA), client.get("/api/v1/signature/public-key")):
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["id"] == "signing.caller.unknown"
    assert [line["event"] for line in running.audit()] == ["signing.unauthenticated"] * 2


def test_a_token_that_is_taken_away_is_worth_nothing_at_once(serve: Serve) -> None:
    running = serve()
    other = add_token(running.directory / "tokens", "other")
    assert running.post().status_code == running.post(token=other).status_code == 200
    remove_token(running.directory / "tokens", "ci")
    assert running.post().status_code == 401
    assert running.post(token=other).status_code == 200


def test_token_file_that_is_damaged_or_readable_by_others_lets_nobody_in(serve: Serve) -> None:
    running = serve()
    tokens = running.directory / "tokens"
    tokens.chmod(0o644)
    assert running.post().status_code == 503
    tokens.chmod(0o600)
    assert running.post().status_code == 200
    tokens.write_text("ci\n")
    assert running.post().status_code == 503
    tokens.unlink()
    answer = running.post()
    assert (answer.status_code, answer.json()["error"]["id"]) == (503, "signing.caller.error")
    # Where the file is, and what is wrong with it, is the audit log's matter.
    assert str(tokens) not in answer.text


@dataclass
class Authority:
    """Issues client certificates."""

    directory: Path

    def __post_init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "clients")])
        self.path = self.directory / f"ca-{id(self)}.pem"
        self.path.write_bytes(self._issue(self.name, self.key.public_key(), ca=True))

    def certificate(self, name: str) -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        paths = (self.directory / f"{name}-cert.pem", self.directory / f"{name}-key.pem")
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        paths[0].write_bytes(self._issue(subject, key.public_key(), ca=False))
        paths[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return paths

    def _issue(self, subject: x509.Name, key: ec.EllipticCurvePublicKey, *, ca: bool) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        return builder.sign(self.key, SHA256()).public_bytes(Encoding.PEM)


def test_mutual_tls(serve: Serve, tmp_path: Path, signers: Signers) -> None:
    clients, strangers = Authority(tmp_path), Authority(tmp_path)
    running = serve(token_file=None, client_ca=clients.path)
    known, stranger = clients.certificate("builder"), strangers.certificate("stranger")
    with running.http(known) as client:
        assert client.post(PKCS1, content=DATA).status_code == 200
    assert running.audit()[-1]["caller"] == "commonName=builder"
    for certificate in (None, stranger):
        with running.http(certificate) as client, pytest.raises(httpx.TransportError):
            client.post(PKCS1, content=DATA, headers={"Authorization": f"Bearer {running.token}"})
    remote = running.client(token_file=None, client_certificate=known[0], client_key=known[1])
    assert remote.sign(DATA) == sign(MRENCLAVE, signers.ours, **FIELDS)
    with pytest.raises(PlatformError) as caught:
        running.client(token_file=None).sign(DATA)
    assert caught.value.id == "signing.service.unreachable"


def test_certificate_and_token_where_both_are_asked_for(serve: Serve, tmp_path: Path) -> None:
    clients = Authority(tmp_path)
    running = serve(client_ca=clients.path)
    known = clients.certificate("builder")
    with running.http(known) as client:
        assert client.post(PKCS1, content=DATA).status_code == 401
        authorization = {"Authorization": f"Bearer {running.token}"}
        assert client.post(PKCS1, content=DATA, headers=authorization).status_code == 200
    with running.http() as client, pytest.raises(httpx.TransportError):
        client.post(PKCS1, content=DATA, headers=authorization)


def test_there_is_no_service_without_authentication(tmp_path: Path, signers: Signers) -> None:
    with pytest.raises(ValueError, match="authentication"):
        signing_service.Settings(signers.ours, tmp_path, tmp_path, None, None)


# What is signed


def test_every_signature_is_written_down_first(serve: Serve) -> None:
    running = serve()
    assert running.post().status_code == 200
    [line] = running.audit()
    assert line["event"] == "signing.signed"
    assert (line["caller"], line["peer"], line["mrenclave"]) == ("ci", "127.0.0.1", MRENCLAVE.hex())
    assert (line["attributes"], line["attribute_mask"]) == ("0x4", "0xffffffffffffffff")
    assert (line["isv_prod_id"], line["isv_svn"], line["date"]) == (7, 3, "20260131")
    assert (running.directory / "audit").stat().st_mode & 0o777 == 0o600
    assert running.token not in (running.directory / "audit").read_text()


def test_without_an_audit_log_nothing_is_signed(serve: Serve) -> None:
    running = serve(audit=Path("/dev/full"))
    answer = running.post()
    assert (answer.status_code, answer.json()["error"]["id"]) == (503, "signing.audit.write")
    with pytest.raises(InclavareError) as caught:
        running.client().sign(DATA)
    assert caught.value.id == "signing.audit.write"


@pytest.mark.parametrize("size", [0, 1, SIGNED_SIZE - 1])
def test_too_little(serve: Serve, size: int) -> None:
    answer = serve().post(DATA[:size])
    assert (answer.status_code, answer.json()["error"]["id"]) == (400, "sgx.sigstruct.gendata")


@pytest.mark.parametrize("size", [SIGNED_SIZE + 1, 1 << 20])
def test_too_much(serve: Serve, size: int) -> None:
    running = serve()
    answer = running.post(DATA.ljust(size, b"\0"))
    assert (answer.status_code, answer.json()["error"]["id"]) == (413, "signing.request.size")


def test_anything_else_is_not_signed(serve: Serve) -> None:
    """Neither the hash of something else, nor a document, nor gendata with a reserved byte."""
    running = serve()
    for body in (b"x" * SIGNED_SIZE, b"\0" + DATA[1:], DATA[:100] + b"\1" + DATA[101:]):
        answer = running.post(body)
        assert answer.status_code == 400
        assert "signature" not in answer.json()
    assert {line["event"] for line in running.audit()} == {"signing.refused"}


DEBUG, PROVISIONKEY, EINITTOKENKEY = 1 << 1, 1 << 4, 1 << 5


@pytest.mark.parametrize(
    ("id", "changes"),
    [
        ("signing.policy.vendor", {"vendor": 0x8086}),
        ("signing.policy.attributes", {"attributes": 4 | 1}),
        ("signing.policy.attributes", {"attributes": 4 | 1 << 3}),
        ("signing.policy.attributes", {"attributes": 4 | DEBUG}),
        ("signing.policy.attributes", {"attributes": 4 | PROVISIONKEY}),
        ("signing.policy.attributes", {"attributes": 4 | EINITTOKENKEY}),
        ("signing.policy.attributes", {"attribute_mask": _ALL & ~DEBUG}),
        ("signing.policy.attributes", {"attribute_mask": _ALL & ~PROVISIONKEY}),
        ("signing.policy.attributes", {"attribute_mask": _ALL & ~EINITTOKENKEY}),
        ("signing.policy.isvprodid", {"isv_prod_id": 8}),
        ("signing.policy.mrenclave", {"mrenclave": b"f" * 32}),
    ],
)
def test_the_policy(serve: Serve, id: str, changes: dict[str, Any]) -> None:
    policy = SigningPolicy(isv_prod_ids=frozenset({7, 9}), mrenclaves=frozenset({MRENCLAVE, b"g" * 32}))
    running = serve(policy=policy)
    answer = running.post(_data(**changes))
    assert (answer.status_code, answer.json()["error"]["id"]) == (403, id)
    assert running.audit()[-1]["error"] == id
    assert running.post().status_code == 200
    with pytest.raises(PolicyError) as caught:
        running.client().sign(_data(**changes))
    assert caught.value.id == id


@pytest.mark.parametrize("name", ["DEBUG", "PROVISIONKEY", "EINITTOKENKEY"])
def test_the_policy_can_allow_an_attribute_and_only_that(name: str) -> None:
    bits = {"DEBUG": DEBUG, "PROVISIONKEY": PROVISIONKEY, "EINITTOKENKEY": EINITTOKENKEY}
    policy = SigningPolicy(attributes=frozenset({name}), vendors=frozenset({0, 0x8086}))
    for other, bit in bits.items():
        for changes in ({"attributes": 4 | bit}, {"attribute_mask": _ALL & ~bit}):
            data = _data(vendor=0x8086, **changes)
            if other == name:
                policy.check(data)
            else:
                with pytest.raises(PolicyError):
                    policy.check(data)


def test_a_policy_without_lists_signs_any_product_and_enclave() -> None:
    assert SigningPolicy().check(_data(mrenclave=b"z" * 32, isv_prod_id=99)).isv_prod_id == 99
    with pytest.raises(PolicyError):
        SigningPolicy(mrenclaves=frozenset()).check(DATA)


@given(st.binary(min_size=SIGNED_SIZE, max_size=SIGNED_SIZE))
def test_rubbish_is_never_signed(data: bytes) -> None:
    with pytest.raises(StructureError):
        SigningPolicy().check(data)


# Limits


def test_each_caller_has_so_many_a_minute(serve: Serve) -> None:
    now = [1000.0]
    running = serve(per_minute=2, clock=lambda: now[0])
    other = add_token(running.directory / "tokens", "other")
    assert [running.post().status_code for _ in range(3)] == [200, 200, 429]
    refused = running.post()
    assert refused.headers["retry-after"] == "31"
    assert running.post(token=other).status_code == 200
    now[0] += 30
    assert [running.post().status_code for _ in range(2)] == [200, 429]
    assert running.audit()[2]["event"] == "signing.limited"


def test_rate_limit_over_time() -> None:
    now = [0.0]
    limit = RateLimit(60, lambda: now[0])
    assert [limit.wait("a") for _ in range(60)] == [0.0] * 60
    assert limit.wait("a") == pytest.approx(1)
    now[0] += 0.5
    assert limit.wait("a") == pytest.approx(0.5)
    now[0] += 3600
    assert [limit.wait("a") for _ in range(61)][-2:] == [0.0, pytest.approx(1)]


def _open(running: Running) -> ssl.SSLSocket:
    raw = socket.create_connection(("127.0.0.1", running.port), timeout=20)
    return running.context().wrap_socket(raw, server_hostname="127.0.0.1")


def test_a_body_that_does_not_come_is_not_waited_for(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signing_service, "BODY_SECONDS", 0.2)
    running = serve()
    with _open(running) as tls:
        tls.sendall(
            f"POST {PKCS1} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {running.token}\r\nContent-Length: 256\r\n\r\n".encode()
            + DATA[:100]
        )
        assert tls.recv(1000).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("sent", [b"", b"GET /ping HTTP/1.1\r\nHost: "])
def test_a_request_that_does_not_come_is_not_waited_for(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(signing_service, "CONNECTION_SECONDS", 0.2)
    with _open(serve()) as tls:
        tls.sendall(sent) if sent else None
        with contextlib.suppress(ConnectionResetError):
            assert tls.recv(1000) == b""


def test_one_connection_one_request(serve: Serve) -> None:
    running = serve()
    with _open(running) as tls:
        tls.sendall(b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n" * 2)
        answer = b""
        while chunk := tls.recv(1000):
            answer += chunk
        assert answer.count(b"HTTP/1.1") == 1
        assert b"connection: close" in answer


def test_a_caller_who_leaves_does_no_harm(serve: Serve) -> None:
    running = serve()
    with _open(running) as tls:
        tls.sendall(
            f"POST {PKCS1} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {running.token}\r\nContent-Length: 256\r\n\r\n".encode()
        )
    assert running.post().status_code == 200


# Tokens


def test_tokens_are_kept_as_digests_in_a_private_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "tokens"
    token, other = add_token(path, "ci"), add_token(path, "release@example.org")
    assert path.stat().st_mode & 0o777 == 0o600
    assert token not in path.read_text() and len(token) >= 43
    tokens = read_tokens(path)
    assert caller_of(tokens, f"Bearer {token}") == caller_of(tokens, f"bearer {token} ") == "ci"
    assert caller_of(tokens, f"Bearer {other}") == "release@example.org"
    for name in ("ci", "", "a b", "-x", "a\n", "x" * 65):
        with pytest.raises(UsageError) as caught:
            add_token(path, name)
        assert caught.value.id == "signing.token.name"
    remove_token(path, "ci")
    assert list(read_tokens(path)) == ["release@example.org"]
    with pytest.raises(UsageError):
        remove_token(path, "ci")


@pytest.mark.parametrize(
    "content", ["ci\n", "ci abc\n", f"ci {'0' * 64} x\n", f"ci {'0' * 64}\nci {'1' * 64}\n", f"ci {'G' * 64}\n"]
)
def test_a_damaged_token_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokens"
    path.touch(0o600)
    path.write_text(content)
    with pytest.raises(UsageError) as caught:
        read_tokens(path)
    assert caught.value.id == "signing.token.file"


def test_a_token_file_may_have_remarks(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.touch(0o600)
    path.write_text(f"# callers\n\nci {'0' * 64}\n")
    assert read_tokens(path) == {"ci": "0" * 64}


# The client


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:1", "127.0.0.1:8443", "https://", "https://u:p@127.0.0.1", "https://127.0.0.1/?x=1", "ftp://x"],
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        SigningService(url).sign(DATA)
    assert caught.value.id == "signing.service.url"


def test_a_service_that_is_not_trusted_or_not_there(serve: Serve, tmp_path: Path) -> None:
    running = serve()
    with pytest.raises(PlatformError) as caught:
        running.client(ca=None).sign(DATA)
    assert caught.value.id == "signing.service.unreachable"
    assert "certificate" in str(caught.value.found)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(PlatformError):
            running.client(url=f"https://127.0.0.1:{unused.getsockname()[1]}").sign(DATA)
    # A certificate for other names.
    with pytest.raises(PlatformError):
        running.client(url=f"https://127.0.0.2:{running.port}").sign(DATA)


def test_the_clients_token_must_be_private(serve: Serve) -> None:
    running = serve()
    path = running.directory / "ci.token"
    for mode in (0o604, 0o640):
        path.chmod(mode)
        with pytest.raises(UsageError) as caught:
            running.client().sign(DATA)
        assert caught.value.id == "signing.service.token"
    path.chmod(0o600)
    for content in ("", "a\x01b", "é", "two\nlines"):
        path.write_text(content)
        with pytest.raises(UsageError):
            running.client().sign(DATA)
    path.write_text("wrong")
    with pytest.raises(PolicyError) as unknown:
        running.client().sign(DATA)
    assert unknown.value.id == "signing.caller.unknown"
    path.unlink()
    with pytest.raises(UsageError):
        running.client().sign(DATA)


@pytest.fixture
def liar(tmp_path: Path) -> Iterator[Callable[[bytes, int], SigningService]]:
    """A service that answers whatever it is told to."""
    certificate, key = _own_certificate(tmp_path / "liar", [])
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    with contextlib.ExitStack() as stack:

        def start(answer: bytes, status: int = 200) -> SigningService:
            class Handler(BaseHTTPRequestHandler):
                def do_POST(self) -> None:
                    self.rfile.read(int(self.headers["Content-Length"]))
                    self.send_response(status)
                    self.send_header("Location", "https://elsewhere.example/")
                    self.end_headers()
                    self.wfile.write(answer)

                def log_message(self, *args: Any) -> None:
                    pass

            listening = stack.enter_context(HTTPServer(("127.0.0.1", 0), Handler))
            listening.socket = context.wrap_socket(listening.socket, server_side=True)
            thread = threading.Thread(target=listening.serve_forever, args=(0.02,))
            thread.start()
            stack.callback(thread.join)
            stack.callback(listening.shutdown)
            return SigningService(f"https://127.0.0.1:{listening.server_port}", ca=certificate)

        yield start


def test_answers_that_are_no_signatures(liar: Callable[..., SigningService], signers: Signers) -> None:
    def answer(signature: bytes, key: Any) -> bytes:
        return json.dumps(
            {"signature": base64.b64encode(signature).decode(), "publicKey": _public_pem(key).decode()}
        ).encode()

    good = sign(MRENCLAVE, signers.ours, **FIELDS).signature[::-1]
    assert liar(answer(good, signers.ours)).sign(DATA).enclave_hash == MRENCLAVE
    other = sign(b"f" * 32, signers.ours, **FIELDS).signature[::-1]
    for lie in (answer(other, signers.ours), answer(good, signers.theirs), answer(b"", signers.ours)):
        with pytest.raises(IntegrityError) as caught:
            liar(lie).sign(DATA)
        assert caught.value.id == "sgx.sigstruct.signature"
    for rubbish in (
        b"",
        b"[]",
        b"{}",
        b"null",
        b'{"signature": "!", "publicKey": ""}',
        b'{"signature": 1, "publicKey": 2}',
    ):
        with pytest.raises(IntegrityError) as caught:
            liar(rubbish).sign(DATA)
        assert caught.value.id == "signing.service.answer"


@pytest.mark.parametrize("status", [302, 404, 500])
def test_answers_that_are_failures(liar: Callable[..., SigningService], status: int) -> None:
    for body in (b"", b"[]", b'{"error": 1}', b'{"error": {"exit_code": "x"}}'):
        with pytest.raises(PlatformError) as caught:
            liar(body, status).sign(DATA)
        assert (caught.value.id, caught.value.found) == ("signing.service.failed", f"HTTP {status}")


def test_the_key_is_not_shown(tmp_path: Path, signers: Signers) -> None:
    settings = signing_service.Settings(signers.ours, tmp_path, tmp_path, tmp_path, None)
    assert "key=" not in repr(settings).replace("certificate_key=", "")


def test_listen_on_what_is_taken_or_elsewhere() -> None:
    with serving.listen("127.0.0.1", 0) as first:
        assert first.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        for host, port in (("127.0.0.1", first.getsockname()[1]), ("192.0.2.1", 0), ("no such host", 0)):
            with pytest.raises(UsageError) as caught:
                serving.listen(host, port)
            assert caught.value.id == "serving.listen"


def test_private_files(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"x")
    for mode in (0o600, 0o400):
        path.chmod(mode)
        assert signing_access.read_private(path, "x.y.z") == b"x"
    for mode in (0o601, 0o610, 0o644):
        path.chmod(mode)
        with pytest.raises(UsageError) as caught:
            signing_access.read_private(path, "x.y.z")
        assert caught.value.id == "x.y.z"
