"""Gramine's secret provisioning: its client's bytes against our server, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from ratls_peers import Enclave, make_enclave
from small_enclaves import Signers

from inclavare import serving
from inclavare.attestation import Evidence, ratls, verify
from inclavare.errors import UsageError
from inclavare.tee.sgx_sim import SimulatedPlatform
from inclavare.verdict.secret_prov import SecretProvConfig, SecretProvServer

# As they stand in Gramine's secret_prov.h, with C's NUL.
REQUEST = b"SECRET_PROVISION_RA_TLS_REQUEST_V1\0"
RESPONSE = b"SECRET_PROVISION_RA_TLS_RESPONSE_V1:\0"
SECRET = b"A_SIMPLE_SECRET\0"

Decide = Callable[[Evidence], bytes]


@pytest.fixture(scope="module")
def enclave(platform: SimulatedPlatform, signers: Signers) -> Enclave:
    return make_enclave(platform, signers, b"gramine application")


@pytest.fixture(scope="module")
def other(platform: SimulatedPlatform, signers: Signers) -> Enclave:
    return make_enclave(platform, signers, b"another application")


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return serving.own_certificate(tmp_path_factory.mktemp("tls"), ["localhost"], common_name="secret provisioning")


def releasing(enclave: Enclave) -> Decide:
    """The secret, for this enclave only."""

    def decide(evidence: Evidence) -> bytes:
        verify(evidence.with_collateral(enclave.platform.collateral()), enclave.policy).require()
        return SECRET

    return decide


@contextlib.contextmanager
def provisioning(
    tls: tuple[Path, Path], decide: Decide, **options: Any
) -> Iterator[tuple[int, list[tuple[str, dict[str, Any]]]]]:
    """A running server's port, and what it tells."""
    events: list[tuple[str, dict[str, Any]]] = []
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def make() -> SecretProvServer:
        config = SecretProvConfig(*tls, port=0, **options)
        return SecretProvServer(config, decide, lambda event, **fields: events.append((event, fields)))

    def run(coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(30)

    server = run(make())
    try:
        yield run(server.start())[1], events
    finally:
        run(server.stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def client(tls: tuple[Path, Path], port: int, tmp_path: Path, certificate: bytes | None, key: Any = None) -> Any:
    """A TLS client as Gramine's: it trusts a CA file, and shows an RA-TLS certificate."""
    context = ssl.create_default_context(cafile=tls[0])
    if certificate is not None:
        pem = tmp_path / "client.pem"
        pem.write_bytes(
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            + ssl.DER_cert_to_PEM_cert(certificate).encode()
        )
        context.load_cert_chain(pem)
    return context.wrap_socket(socket.create_connection(("127.0.0.1", port), timeout=20), server_hostname="localhost")


def ask(sock: Any, request: bytes = REQUEST) -> bytes:
    """Everything that the server answers."""
    with sock:
        sock.sendall(request)
        parts = []
        with contextlib.suppress(OSError):
            while part := sock.recv(1 << 16):
                parts.append(part)
        return b"".join(parts)


def certified(enclave: Enclave, curve: ec.EllipticCurve | None = None, **options: Any) -> tuple[bytes, Any]:
    # Gramine draws P-384 keys, and puts both extensions into its certificates.
    key = ec.generate_private_key(curve or ec.SECP384R1())
    return ratls.make(enclave.attester, key, legacy=True, **options), key


def test_secret_is_released(tls: Any, enclave: Enclave, tmp_path: Path) -> None:
    with provisioning(tls, releasing(enclave)) as (port, events):
        certificate, key = certified(enclave, lifetime=86400 * 365 * 29)
        sock = client(tls, port, tmp_path, certificate, key)
        assert sock.version() == "TLSv1.3"
        assert ask(sock) == RESPONSE + len(SECRET).to_bytes(4, "big") + SECRET
        # In pieces, as a network may bring it.
        sock = client(tls, port, tmp_path, certificate, key)
        sock.sendall(REQUEST[:10])
        assert ask(sock, REQUEST[10:]).endswith(SECRET)
    assert [event for event, _ in events] == ["secret_prov.released"] * 2
    assert len(events[0][1]["evidence_sha256"]) == 64
    assert "A_SIMPLE" not in repr(events)


def test_the_largest_secret(tls: Any, enclave: Enclave, tmp_path: Path) -> None:
    with provisioning(tls, lambda _: b"x" * (1 << 20)) as (port, _):
        answer = ask(client(tls, port, tmp_path, *certified(enclave)))
        assert answer[len(RESPONSE) :] == (1 << 20).to_bytes(4, "big") + b"x" * (1 << 20)
    for size in (0, (1 << 20) + 1):
        with provisioning(tls, lambda _, size=size: b"x" * size) as (port, events):  # type: ignore[misc]
            assert ask(client(tls, port, tmp_path, *certified(enclave))) == b""
            assert events[0][1]["reason"]["id"] == "secret_prov.secret.size"


def test_refused_by_the_policy(tls: Any, enclave: Enclave, other: Enclave, tmp_path: Path) -> None:
    with provisioning(tls, releasing(enclave)) as (port, events):
        assert ask(client(tls, port, tmp_path, *certified(other))) == b""
    ((event, fields),) = events
    assert event == "secret_prov.refused" and fields["reason"]["id"] == "policy.mrenclave"
    assert fields["reason"]["found"] == other.enclave.mrenclave.hex()


def test_nobody_decides_without_a_proven_key(tls: Any, enclave: Enclave, tmp_path: Path) -> None:
    asked: list[Evidence] = []

    def decide(evidence: Evidence) -> bytes:
        asked.append(evidence)
        return SECRET

    stolen, _ = certified(enclave)
    mine = ec.generate_private_key(ec.SECP384R1())
    with provisioning(tls, decide) as (port, events):
        # No certificate; an ordinary one; another enclave's evidence in a certificate of one's own.
        assert SECRET not in ask(client(tls, port, tmp_path, None))
        ordinary = serving.own_certificate(tmp_path / "ordinary", [], common_name="nobody")
        context = ssl.create_default_context(cafile=tls[0])
        context.load_cert_chain(*ordinary)
        raw = socket.create_connection(("127.0.0.1", port))
        assert ask(context.wrap_socket(raw, server_hostname="localhost")) == b""
        assert ask(client(tls, port, tmp_path, _with_extensions_of(stolen, mine), mine)) == b""
        # Not TLS at all.
        with socket.create_connection(("127.0.0.1", port)) as plain:
            plain.sendall(REQUEST)
            assert len(plain.recv(100)) < 16
        ids = [fields["reason"]["id"] for _, fields in events]
    assert asked == []
    assert ids == ["ratls.tls", "evidence.certificate.absent", "evidence.key.binding", "ratls.tls"]


def _with_extensions_of(certificate: bytes, key: Any) -> bytes:
    from cryptography import x509
    from cryptography.hazmat.primitives.hashes import SHA256

    old = x509.load_der_x509_certificate(certificate)
    builder = x509.CertificateBuilder(
        old.issuer, old.subject, key.public_key(), 1, old.not_valid_before_utc, old.not_valid_after_utc
    )
    for extension in old.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    return builder.sign(key, SHA256()).public_bytes(Encoding.DER)


@pytest.mark.parametrize("request_", [b"GET / HTTP/1.1\r\n\r\n", REQUEST[:-1] + b"2", b"\0" * 64])
def test_other_requests(tls: Any, enclave: Enclave, tmp_path: Path, request_: bytes) -> None:
    with provisioning(tls, releasing(enclave)) as (port, events):
        assert ask(client(tls, port, tmp_path, *certified(enclave)), request_) == b""
        assert [fields["reason"]["id"] for _, fields in events] == ["secret_prov.request"]


def test_a_fault_in_the_decision_releases_nothing_and_tells_nothing(tls: Any, enclave: Enclave, tmp_path: Path) -> None:
    def decide(_: Evidence) -> bytes:
        raise RuntimeError("A_SIMPLE_SECRET in a message")

    with provisioning(tls, decide) as (port, events):
        assert ask(client(tls, port, tmp_path, *certified(enclave))) == b""
        assert events[0][1]["reason"]["id"] == "secret_prov.fault"
        assert "A_SIMPLE" not in repr(events)


def test_tls_12_only_where_it_is_asked_for(tls: Any, enclave: Enclave, tmp_path: Path) -> None:
    certificate, key = certified(enclave)

    def old(port: int) -> bytes:
        context = ssl.create_default_context(cafile=tls[0])
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        pem = tmp_path / "old.pem"
        pem.write_bytes(
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            + ssl.DER_cert_to_PEM_cert(certificate).encode()
        )
        context.load_cert_chain(pem)
        raw = socket.create_connection(("127.0.0.1", port))
        return ask(context.wrap_socket(raw, server_hostname="localhost"))

    with provisioning(tls, releasing(enclave)) as (port, _), pytest.raises(ssl.SSLError):
        old(port)
    with provisioning(tls, releasing(enclave), tls12=True) as (port, _):
        assert old(port).endswith(SECRET)


def test_slow_clients_and_many(tls: Any, enclave: Enclave, tmp_path: Path) -> None:
    with provisioning(tls, releasing(enclave), seconds=1.0, connections=3) as (port, events):
        slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
        silent = client(tls, port, tmp_path, *certified(enclave))  # attested, and then says nothing
        with socket.create_connection(("127.0.0.1", port)) as fourth, contextlib.suppress(ConnectionResetError):
            assert fourth.recv(1) == b""
        for sock in (*slow, silent):
            sock.settimeout(20)
            with contextlib.suppress(OSError):
                assert sock.recv(1) == b""
            sock.close()
        assert ask(client(tls, port, tmp_path, *certified(enclave))).endswith(SECRET)
    ids = [fields["reason"]["id"] for event, fields in events if event == "secret_prov.refused"]
    assert "secret_prov.full" in ids and ids.count("ratls.timeout") == 3


def test_a_certificate_that_is_no_certificate(tmp_path: Path, tls: Any) -> None:
    with pytest.raises(UsageError) as caught:
        SecretProvServer(SecretProvConfig(tls[1], tls[1]), lambda _: SECRET)
    assert caught.value.id == "serving.tls"
