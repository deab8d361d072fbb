"""The key broker client against brokers that lie, stall, break off and change their certificates."""

from __future__ import annotations

import base64
import json
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from inclavare import serving
from inclavare.attestation import kbs_client
from inclavare.attestation.channel import encrypt
from inclavare.attestation.kbs_client import KbsClient, TrustAnchor
from inclavare.enclave.kbs_uri import Resource
from inclavare.errors import AppraisalError, EvidenceError, InclavareError, PlatformError, UsageError

SECRET = b"the key to the data"
ERROR = "https://github.com/confidential-containers/kbs/errors/"


def segment(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


def token(**claims: Any) -> str:
    now = int(time.time())
    found = {"iat": now, "exp": now + 300, "submods": {"cpu0": {"ear.appraisal-policy-id": "prod@3"}}, **claims}
    return f"{segment({'alg': 'ES256'})}.{segment(found)}.c2ln"


@dataclass
class Broker:
    """A TLS server that answers a script: a function of method, path and body for each request."""

    directory: Path
    script: Callable[[str, str, Any], bytes | None]
    minimum: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
    maximum: ssl.TLSVersion = ssl.TLSVersion.MAXIMUM_SUPPORTED
    asked: list[str] = field(default_factory=list)
    key: dict[str, str] = field(default_factory=dict)

    def __enter__(self) -> Broker:
        self.certificate, key = serving.own_certificate(self.directory, (), common_name="broker")
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version, self.context.maximum_version = self.minimum, self.maximum
        self.context.load_cert_chain(self.certificate, key)
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"https://127.0.0.1:{self.listening.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.listening.shutdown(socket.SHUT_RDWR)
        self.listening.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.listening.accept()
            except OSError:
                return
            try:
                with self.context.wrap_socket(connection, server_side=True) as tls, tls.makefile("rb") as stream:
                    self._answer(tls, stream)
            except OSError:
                connection.close()

    def _answer(self, tls: ssl.SSLSocket, stream: Any) -> None:
        while line := stream.readline():
            method, path, _ = line.decode().split()
            headers = {}
            while (header := stream.readline().strip()) != b"":
                name, _, value = header.decode().partition(":")
                headers[name.lower()] = value.strip()
            body = stream.read(int(headers.get("content-length", 0)))
            self.asked.append(f"{method} {path}")
            self.headers = headers
            reply = self.script(method, path, json.loads(body) if body else None)
            if reply is None:
                return
            tls.sendall(reply)

    @property
    def fingerprint(self) -> str:
        return serving.fingerprint(self.certificate)

    def client(self, anchor: str | None = None, **fields: Any) -> KbsClient:
        return KbsClient(self.url, anchor or self.fingerprint, Quoter(), tee="sgx", **{"deadline": 3.0, **fields})


class Quoter:
    def quote(self, report_data: bytes) -> bytes:
        return b"quote over " + report_data

    def collateral(self) -> dict[str, Any] | None:
        return None


def http(body: Any, status: int = 200, *headers: str) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(data)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + data


def refusal(kind: str, detail: str, status: int = 401, *headers: str) -> bytes:
    return http({"type": ERROR + kind, "detail": detail}, status, *headers)


class Honest:
    """The protocol, as a function for :class:`Broker`; each step can be replaced."""

    def __init__(self, **steps: Any) -> None:
        self.steps = steps
        self.key: dict[str, str] = {}

    def __call__(self, method: str, path: str, body: Any) -> bytes | None:
        step = path.split("/kbs/v0/")[1].split("/", maxsplit=1)[0]
        replaced = self.steps.get(step)
        if isinstance(replaced, list):
            replaced = replaced.pop(0) if replaced else None
        if callable(replaced):
            return replaced(body)  # type: ignore[no-any-return]
        if replaced is not None:
            return replaced if replaced else None
        if step == "auth":
            assert body["version"] == "0.4.0" and body["tee"] == "sgx"
            nonce = base64.b64encode(bytes(32)).decode()
            return http({"nonce": nonce, "extra-params": ""}, 200, "Set-Cookie: kbs-session-id=abc; HttpOnly")
        if step == "attest":
            self.key = body["runtime-data"]["tee-pubkey"]
            assert base64.b64decode(body["tee-evidence"]["primary_evidence"]["quote"]).startswith(b"quote over ")
            return http({"token": token()})
        return http(encrypt(self.key, SECRET))


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Callable[..., Broker]]:
    made: list[Broker] = []

    def make(*, name: str = "broker", **steps: Any) -> Broker:
        kind = {key: steps.pop(key) for key in ("minimum", "maximum") if key in steps}
        made.append(Broker(tmp_path / name, Honest(**steps), **kind).__enter__())
        return made[-1]

    yield make
    for one in made:
        one.__exit__()


def refused(client: KbsClient, kind: type[InclavareError], id: str) -> InclavareError:
    with pytest.raises(kind) as caught:
        client.get("kbs:///repo/key/1")
    assert caught.value.id == id, caught.value.one_line()
    assert SECRET.decode() not in caught.value.one_line()
    return caught.value


def test_get_attests_once_for_several_resources(broker: Callable[..., Broker]) -> None:
    served = broker()
    client = served.client()
    assert client.remaining == 0
    assert client.get("kbs:///repo/key/1") == client.get("kbs://ignored:1/repo/key/2") == SECRET
    assert served.asked == ["POST /kbs/v0/auth", "POST /kbs/v0/attest"] + [
        f"GET /kbs/v0/resource/repo/key/{number}" for number in (1, 2)
    ]
    assert served.headers["cookie"] == "kbs-session-id=abc" and served.headers["authorization"].startswith("Bearer ey")
    assert 290 < client.remaining <= 300
    client.forget()
    client.get("kbs+vault:///a/b/c?version=2")
    assert served.asked[-2:] == ["POST /kbs/v0/attest", "GET /kbs/v0/vault/a/b/c?version=2"]


def test_a_tenants_path_precedes_the_protocols(broker: Callable[..., Broker]) -> None:
    served = broker()
    client = KbsClient(served.url + "/t/acme/", served.fingerprint, Quoter(), tee="sgx")
    assert client.get("kbs:///repo/key/1") == SECRET
    assert served.asked[0] == "POST /t/acme/kbs/v0/auth"


@pytest.mark.parametrize("shape", ["plain", "colons", "prefix"])
def test_a_fingerprint_is_that_certificate_and_no_other(
    broker: Callable[..., Broker], shape: str, tmp_path: Path
) -> None:
    served = broker()
    plain = served.fingerprint.replace(":", "").lower()
    anchor = {"plain": plain, "colons": served.fingerprint, "prefix": f"sha256:{plain}"}[shape]
    assert served.client(anchor).get("kbs:///repo/key/1") == SECRET
    changed = ("0" if plain[0] != "0" else "1") + plain[1:]
    asked = len(served.asked)
    error = refused(served.client(changed), EvidenceError, "kbs.tls.certificate")
    assert plain in str(error.found) and changed in str(error.expected)
    assert len(served.asked) == asked  # nothing was sent


def test_certificates_as_anchor_check_chain_and_name(broker: Callable[..., Broker], tmp_path: Path) -> None:
    served, other = broker(), broker(name="other")
    pem = served.certificate.read_text()
    assert served.client(pem).get("kbs:///repo/key/1") == SECRET
    refused(served.client(other.certificate.read_text()), EvidenceError, "kbs.tls.certificate")
    named = served.url.replace("127.0.0.1", "127.0.0.2")
    elsewhere = socket.create_server(("127.0.0.2", int(named.rpartition(":")[2])))
    try:
        threading.Thread(target=lambda: relay(elsewhere, served), daemon=True).start()
        refused(KbsClient(named, pem, Quoter(), tee="sgx", deadline=3), EvidenceError, "kbs.tls.certificate")
    finally:
        elsewhere.close()
    # This machine's authorities do not know it either.
    refused(served.client("system"), EvidenceError, "kbs.tls.certificate")


def relay(listening: socket.socket, served: Broker) -> None:
    connection, _ = listening.accept()
    try:
        served.context.wrap_socket(connection, server_side=True)
    except OSError:
        connection.close()


def test_tls_below_1_3_is_not_spoken(broker: Callable[..., Broker]) -> None:
    served = broker(minimum=ssl.TLSVersion.TLSv1_2, maximum=ssl.TLSVersion.TLSv1_2)
    error = refused(served.client(deadline=1.0), PlatformError, "kbs.unreachable")
    assert "SSL" in str(error.found) and served.asked == []


@pytest.mark.parametrize("anchor", ["", "  ", "none", "ab" * 31, "-----BEGIN CERTIFICATE-----\nAAAA\n"])
def test_no_anchor_no_client(anchor: str) -> None:
    with pytest.raises(UsageError) as caught:
        KbsClient("https://broker", anchor, Quoter(), tee="sgx")
    assert caught.value.id == "kbs.trust_anchor"


@pytest.mark.parametrize(
    "url",
    ["http://h", "https://", "h:1", "https://u:p@h", "https://h?x", "https://h#x", "https://h:99999", "https://h\n"],
)
def test_urls(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        KbsClient(url, "ab" * 32, Quoter(), tee="sgx")
    assert caught.value.id == "kbs.url"


def test_the_reasons_of_a_denial_arrive(broker: Callable[..., Broker]) -> None:
    detail = (
        "Attestation error: RCAR handshake Attest failed: mrenclave, found aa, expected bb [policy.mrenclave]; debug"
    )
    served = broker(attest=refusal("AttestationError", detail + "\x1b[31m"))
    error = refused(served.client(), AppraisalError, "kbs.attest.denied")
    assert str(error.found).startswith("mrenclave, found aa, expected bb [policy.mrenclave]; debug")
    assert "\x1b" not in str(error.found)
    assert served.asked == ["POST /kbs/v0/auth", "POST /kbs/v0/attest"]  # a denial is not tried again
    other = broker(name="other", resource=refusal("PolicyDeny", "Access denied by policy"))
    error = refused(other.client(), AppraisalError, "kbs.resource.denied")
    assert "resource/repo/key/1" in str(error.expected)
    assert "Tenant" in str(
        refused(broker(name="third", auth=refusal("Tenant", "?", 404)).client(), PlatformError, "kbs.refused").found
    )


def test_denied_with_an_old_token_it_attests_again(broker: Callable[..., Broker], monkeypatch: Any) -> None:
    served = broker(resource=[None, refusal("PolicyDeny", "Access denied by policy"), None])
    client = served.client()
    assert client.get("kbs:///repo/key/1") == SECRET
    monkeypatch.setattr(kbs_client, "_FRESH", 0.0)
    assert client.get("kbs:///repo/key/1") == SECRET
    assert served.asked.count("POST /kbs/v0/attest") == 2


def test_an_expired_token_is_not_used(broker: Callable[..., Broker]) -> None:
    now = int(time.time())
    served = broker(attest=[lambda body: _attest(served, body, token(iat=now, exp=now)), None])
    client = served.client()
    assert client.get("kbs:///repo/key/1") == SECRET  # by the token as it came
    assert client.remaining == 0
    assert client.get("kbs:///repo/key/1") == SECRET
    assert served.asked.count("POST /kbs/v0/auth") == 2


def _attest(served: Broker, body: Any, made: str) -> bytes:
    served.script.key = body["runtime-data"]["tee-pubkey"]  # type: ignore[attr-defined]
    return http({"token": made})


def test_what_breaks_off_is_tried_again(broker: Callable[..., Broker]) -> None:
    busy = refusal("Unavailable", "busy", 503, "Retry-After: 0")
    served = broker(auth=[b"", busy, None, None], attest=[b"", None], resource=[b"", busy, None])
    assert served.client(deadline=10).get("kbs:///repo/key/1") == SECRET
    # A nonce is good for one attempt: a lost answer to attest means a new session.
    assert [line.split("/")[3] for line in served.asked] == [
        "auth", "auth", "auth", "attest", "auth", "attest", "resource", "resource", "resource",
    ]  # fmt: skip


def test_the_deadline_ends_it(broker: Callable[..., Broker]) -> None:
    began = time.monotonic()
    served = broker(auth=lambda _: time.sleep(3))
    refused(served.client(deadline=1.0), PlatformError, "kbs.unreachable")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        nobody = f"https://127.0.0.1:{probe.getsockname()[1]}"
        error = refused(
            KbsClient(nobody, "ab" * 32, Quoter(), tee="sgx", deadline=1.0), PlatformError, "kbs.unreachable"
        )
    assert "refused" in str(error.found).lower()
    assert time.monotonic() - began < 6


@pytest.mark.parametrize(
    ("step", "answer"),
    [
        ("auth", http(b"not JSON")),
        ("auth", http([])),
        ("auth", http({"nonce": "AAAA"}, 200, "Set-Cookie: kbs-session-id=a")),
        ("auth", http({"nonce": base64.b64encode(bytes(32)).decode()})),
        ("auth", http({"nonce": base64.b64encode(bytes(32)).decode()}, 200, "Set-Cookie: kbs-session-id=a\tb")),
        ("auth", http(b"{" * 100_000)),
        ("auth", http(b" " * (300 << 10))),
        ("attest", http({"token": 7})),
        ("attest", http({"token": "x"})),
        ("attest", http({"token": token() + "\r\nX: y"})),
        ("attest", http({"token": token(exp="soon")})),
        ("attest", http({"token": token(submods=[])})),
        ("resource", http(b" " * (4 << 20))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_answers_that_are_none(broker: Callable[..., Broker], step: str, answer: bytes) -> None:
    refused(broker(**{step: answer}).client(), EvidenceError, "kbs.answer.malformed")


def test_what_is_not_encrypted_to_this_enclave_is_not_taken(broker: Callable[..., Broker]) -> None:
    from inclavare.attestation.channel import EnclaveChannel

    other = encrypt(EnclaveChannel.new().public_jwk, b"the host's own key")
    refused(broker(resource=http(other)).client(), EvidenceError, "evidence.channel.jwe")
    refused(broker(name="plain", resource=http({"key": "plain"})).client(), EvidenceError, "evidence.channel.jwe")


def test_the_policy_that_the_manifest_asks_for(broker: Callable[..., Broker]) -> None:
    served = broker()
    for policy in ("prod", "prod@3", ""):
        assert served.client(policy=policy).get("kbs:///repo/key/1") == SECRET
    for policy in ("prod@2", "pro", "other"):
        assert "prod@3" in str(refused(served.client(policy=policy), AppraisalError, "kbs.policy.other").found)


def test_attest_gives_token_and_key(broker: Callable[..., Broker]) -> None:
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    served = broker()
    made, key = served.client().attest()
    assert made.count(".") == 2
    public = load_pem_private_key(key, None).public_key()
    x = base64.urlsafe_b64decode(served.script.key["x"] + "=")  # type: ignore[attr-defined]
    assert int.from_bytes(x, "big") == public.public_numbers().x  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("uri", "name", "path"),
    [
        ("kbs:///a/b/c", "a%2Fb%2Fc", "resource/a/b/c"),
        ("kbs://host:8/a/b%20x/c", "a%2Fb%20x%2Fc", "resource/a/b%20x/c"),
        ("kbs+ca:///a/b/c?x=1", "kbs%2Bca%3A%2Fa%2Fb%2Fc%3Fx%3D1", "ca/a/b/c?x=1"),
    ],
)
def test_uris(uri: str, name: str, path: str) -> None:
    resource = Resource.parse(uri)
    assert (resource.name, resource.request_path) == (name, path)


@pytest.mark.parametrize(
    "uri",
    ["", "kbs://", "kbs:///", "kbs:///a//c", "kbs:///a/../c", "http://h/a/b/c", "kbs:///a/b/%0a", "kbs:///a/b/%2f"],
)
def test_what_is_no_uri(uri: str) -> None:
    with pytest.raises(UsageError) as caught:
        Resource.parse(uri)
    assert caught.value.id == "kbs.uri"


def test_an_anchors_context_never_goes_below_1_3() -> None:
    assert TrustAnchor("ab" * 32).context.minimum_version == ssl.TLSVersion.TLSv1_3
    assert TrustAnchor("system").context.check_hostname


def test_a_container_without_secrets_imports_none_of_it() -> None:
    program = (
        "import sys; import inclavare.runelet.session, inclavare.runtimes.native, inclavare.runelet.control;"
        "print([m for m in ('ssl', 'http.client', 'http.server', 'joserfc', 'inclavare.runelet.broker',"
        " 'inclavare.runelet.guest_api', 'inclavare.enclave.kbs_uri', 'inclavare.attestation') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stdout + done.stderr
