"""RA-TLS: certificates, sessions, and those who want to get in between."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cbor2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ratls_peers import Counting, Enclave, make_enclave, pair, pump, served
from small_enclaves import Signers

from inclavare.attestation import Policy, ratls, verify
from inclavare.attestation.evidence import OID_DICE_EVIDENCE, OIDS_LEGACY
from inclavare.attestation.ratls import certificates, session, streams
from inclavare.attestation.ratls.certificates import OID_ENDORSEMENTS, Credential
from inclavare.attestation.ratls.session import CHALLENGE, DATA, END, EVIDENCE, RESULT, Session
from inclavare.attestation.references import ReferenceBundle, References, Subject, sign, statement
from inclavare.attestation.signers import KeySigner, TrustedSigners
from inclavare.errors import AppraisalError, EvidenceError, InclavareError, PlatformError, UsageError
from inclavare.sgx.quote import Quote
from inclavare.tee.sgx_sim import SimulatedPlatform


@pytest.fixture(scope="module")
def enclave(platform: SimulatedPlatform, signers: Signers) -> Enclave:
    return make_enclave(platform, signers, b"ratls server")


@pytest.fixture(scope="module")
def other(platform: SimulatedPlatform, signers: Signers) -> Enclave:
    return make_enclave(platform, signers, b"another enclave")


@pytest.fixture(scope="module")
def server(enclave: Enclave) -> ratls.Context:
    return ratls.server_context(enclave.attester)


@pytest.fixture(scope="module")
def client(enclave: Enclave) -> ratls.Context:
    return ratls.client_context(enclave.policy)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Virtual time for sessions: ``clock.now`` seconds since 1970."""
    clock = SimpleNamespace(now=time.time())
    fake = SimpleNamespace(
        time=lambda: clock.now, monotonic=lambda: clock.now, strftime=time.strftime, gmtime=time.gmtime
    )
    monkeypatch.setattr(session, "time", fake)
    return clock


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def spki(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def extensions(certificate: bytes) -> dict[str, bytes]:
    found = x509.load_der_x509_certificate(certificate).extensions
    return {e.oid.dotted_string: e.value.value for e in found if isinstance(e.value, x509.UnrecognizedExtension)}


def report_data(quote: bytes) -> bytes:
    return Quote.from_bytes(quote).report_body().report_data


def reissue(certificate: bytes, key: ec.EllipticCurvePrivateKey, **values: bytes) -> bytes:
    """The same certificate for a key, some extensions' values replaced (their OIDs with underscores)."""
    old = x509.load_der_x509_certificate(certificate)
    builder = (
        x509.CertificateBuilder()
        .subject_name(old.subject)
        .issuer_name(old.issuer)
        .public_key(key.public_key())
        .serial_number(old.serial_number)
        .not_valid_before(old.not_valid_before_utc)
        .not_valid_after(old.not_valid_after_utc)
    )
    replaced = {name.strip("_").replace("_", "."): value for name, value in values.items()}
    for oid, value in {**extensions(certificate), **replaced}.items():
        builder = builder.add_extension(x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value), False)
    return builder.sign(key, SHA256()).public_bytes(Encoding.DER)


# Certificates


def test_certificate_is_as_interoperable_ra_tls_says(enclave: Enclave) -> None:
    key = new_key()
    certificate = ratls.make(enclave.attester, key, nonce=b"nonce", lifetime=600, legacy=True, endorsements=True)
    parsed = x509.load_der_x509_certificate(certificate)
    parsed.verify_directly_issued_by(parsed)
    assert (parsed.not_valid_after_utc - parsed.not_valid_before_utc).total_seconds() == 600 + 300
    assert not any(e.critical for e in parsed.extensions if isinstance(e.value, x509.UnrecognizedExtension))
    found = extensions(certificate)
    tagged = cbor2.loads(found[OID_DICE_EVIDENCE])
    assert tagged.tag == 60000
    quote, buffer = tagged.value
    claims = cbor2.loads(buffer)
    assert claims == {"pubkey-hash": cbor2.dumps([1, hashlib.sha256(spki(key)).digest()]), "nonce": b"nonce"}
    assert report_data(quote) == hashlib.sha256(buffer).digest() + bytes(32)
    legacy = found[OIDS_LEGACY[1]]
    assert legacy != quote
    assert report_data(legacy) == hashlib.sha256(spki(key)).digest() + bytes(32)


def test_legacy_extension_alone_verifies(enclave: Enclave) -> None:
    key = new_key()
    found = extensions(ratls.make(enclave.attester, key, legacy=True))
    old = ratls.make(enclave.attester, key)
    builder = x509.CertificateBuilder(
        x509.load_der_x509_certificate(old).issuer,
        x509.load_der_x509_certificate(old).subject,
        key.public_key(),
        1,
        x509.load_der_x509_certificate(old).not_valid_before_utc,
        x509.load_der_x509_certificate(old).not_valid_after_utc,
    ).add_extension(x509.UnrecognizedExtension(x509.ObjectIdentifier(OIDS_LEGACY[1]), found[OIDS_LEGACY[1]]), False)
    evidence = ratls.read(builder.sign(key, SHA256()).public_bytes(Encoding.DER))
    assert evidence.certificate is not None and evidence.certificate.extension == "legacy"
    assert verify(evidence.with_collateral(enclave.platform.collateral()), enclave.policy).accepted


def test_collateral_travels_in_the_endorsements(enclave: Enclave) -> None:
    evidence = ratls.read(ratls.make(enclave.attester, new_key(), endorsements=True))
    assert evidence.collateral == enclave.platform.collateral()
    assert verify(evidence, enclave.policy).accepted
    bare = ratls.read(ratls.make(enclave.attester, new_key()))
    assert bare.collateral is None


def test_endorsements_in_open_enclaves_order(enclave: Enclave) -> None:
    collateral = enclave.platform.collateral()
    value = cbor2.loads(certificates.endorsements_value(collateral))
    version, tcb_info, _, pck_crl, root_crl, _, identity, _ = value.value
    assert (value.tag, version) == (60000, 1)
    assert tcb_info.startswith(b'{"tcbInfo":{') and identity.startswith(b'{"enclaveIdentity":{')
    assert x509.load_der_x509_crl(pck_crl).issuer != x509.load_der_x509_crl(root_crl).issuer
    # With a creation time and C's NUL, as others write them.
    entries = [*value.value, b"2026-01-01T00:00:00Z"]
    entries[1] = tcb_info + b"\0"
    assert certificates.collateral_of(cbor2.dumps(cbor2.CBORTag(60000, entries))) == collateral


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"\xff",
        cbor2.dumps(5),
        cbor2.dumps(cbor2.CBORTag(60001, [1] + [b""] * 7)),
        cbor2.dumps(cbor2.CBORTag(60000, [1] + [b""] * 7)),
        cbor2.dumps(cbor2.CBORTag(60000, [2] + [b"{}"] * 7)),
        cbor2.dumps(cbor2.CBORTag(60000, [1, "text"] + [b""] * 6)),
        cbor2.dumps(cbor2.CBORTag(60000, [])),
        cbor2.dumps(cbor2.CBORTag(60000, 7)),
    ],
)
def test_malformed_endorsements(enclave: Enclave, value: bytes) -> None:
    key = new_key()
    certificate = reissue(ratls.make(enclave.attester, key), key, _2_23_133_5_4_2=value)
    with pytest.raises(EvidenceError) as caught:
        ratls.read(certificate)
    assert caught.value.id == "evidence.collateral.malformed"


def test_certificates_of_others(vectors: Path) -> None:
    def load(name: str) -> bytes:
        pem = (vectors / "ra-tls" / name).read_text()
        return base64.b64decode("".join(pem.splitlines()[1:-1]))

    gramine, rats_tls = load("ccc_gramine-cert.pem"), load("ccc_rats-tls-cert.pem")
    for certificate in (gramine, rats_tls):
        evidence = ratls.read(certificate)
        assert evidence.tee == "sgx" and evidence.certificate is not None
        assert certificates.public_key(certificate) == evidence.certificate.public_key
    assert [time.gmtime(moment)[:3] for moment in certificates.validity(gramine)] == [(2001, 1, 1), (2030, 12, 31)]
    assert [time.gmtime(moment)[:3] for moment in certificates.validity(rats_tls)] == [(2023, 2, 22), (2024, 2, 22)]
    # Real enclaves, but debug ones that nobody's policy names, and rats-tls's certificate has run out.
    with pytest.raises(EvidenceError) as caught:
        ratls.Verifier(Policy(any_enclave=True), certificate_only=1 << 31).check(rats_tls, None)
    assert caught.value.id == "ratls.certificate.expired"
    with pytest.raises(EvidenceError) as caught:
        ratls.Verifier(Policy(any_enclave=True), certificate_only=86400).check(gramine, None)
    assert caught.value.id == "ratls.certificate.validity"


def test_key_and_certificate_are_renewed(enclave: Enclave, monkeypatch: pytest.MonkeyPatch) -> None:
    attester = Counting(enclave.attester)
    identity = ratls.Identity(attester, lifetime=100)
    first = identity.current()
    assert identity.current() is first and attester.quotes == 1
    real = time.monotonic
    monkeypatch.setattr(certificates.time, "monotonic", lambda: real() + 51)
    second = identity.current()
    assert second.key is not first.key and second.certificate != first.certificate
    assert "PrivateKey" not in repr(second)


# Sessions


def test_data_goes_both_ways(client: ratls.Context, server: ratls.Context, enclave: Enclave) -> None:
    data = os.urandom(3 << 20)
    with served(server) as running, ratls.connect("127.0.0.1", running.port, client) as sock:
        assert sock.peer is not None and sock.peer.fresh
        assert sock.peer.claims.mrenclave == enclave.enclave.mrenclave.hex()
        sock.settimeout(20)
        reader = sock.makefile("rb")
        writer = threading.Thread(target=lambda: (sock.sendall(data), sock.shutdown()))
        writer.start()
        assert reader.read() == data
        writer.join()
        assert sock.recv(1) == b""
        assert running.refused == []


def test_mutual(enclave: Enclave, other: Enclave) -> None:
    seen: list[Any] = []

    def handler(sock: ratls.AttestedSocket) -> None:
        seen.append(sock.peer)
        sock.sendall(b"welcome")

    context = ratls.server_context(enclave.attester, policy=other.policy)
    with served(context, handler) as running:
        mutual = ratls.client_context(enclave.policy, attester=other.attester)
        with ratls.connect("127.0.0.1", running.port, mutual) as sock:
            assert sock.makefile("rb").read() == b"welcome"
        assert seen[0].claims.mrenclave == other.enclave.mrenclave.hex() and seen[0].fresh
        # The wrong enclave, and none at all.
        for attester, ids in ((enclave.attester, {"ratls.refused"}), (None, {"ratls.tls"})):
            with pytest.raises(InclavareError) as caught:
                ratls.connect("127.0.0.1", running.port, ratls.client_context(enclave.policy, attester=attester))
            assert caught.value.id in ids
        assert len(seen) == 1
        # The server tells of a refusal after the client has seen it.
        until = time.monotonic() + 10
        while len(running.refused) < 2 and time.monotonic() < until:
            time.sleep(0.01)
    assert {error.id for error in running.refused} == {"policy.mrenclave", "ratls.tls"}


def test_peer_is_told_which_claim_was_refused(server: ratls.Context, other: Enclave) -> None:
    reached: list[bytes] = []
    with served(server, lambda sock: reached.append(sock.recv(1))) as running:
        with pytest.raises(AppraisalError) as caught:
            ratls.connect("127.0.0.1", running.port, ratls.client_context(other.policy))
        assert caught.value.id == "policy.mrenclave"
        assert running.seen.wait(10)
    assert [(error.id, error.found) for error in running.refused] == [("ratls.refused", "policy.mrenclave")]
    assert reached == []


def test_simulated_enclaves_pass_only_where_the_policy_says_so(server: ratls.Context, enclave: Enclave) -> None:
    for policy, id in (
        (replace(enclave.policy, allow_simulated=False), "policy.simulated"),
        (replace(enclave.policy, trust_anchor=None), "evidence.root.untrusted"),
    ):
        one, two = pair(ratls.client_context(policy), server)
        assert one.error is not None and one.error.id == id
        assert not one.open and not two.open


def test_asyncio_streams(enclave: Enclave, other: Enclave) -> None:
    data = os.urandom(1 << 20)

    async def handler(reader: asyncio.StreamReader, writer: streams.AttestedWriter) -> None:
        assert writer.peer is not None and writer.peer.claims.mrenclave == other.enclave.mrenclave.hex()
        writer.write(await reader.read())  # answers after the end of the request only
        writer.write_eof()
        await writer.drain()

    async def main() -> None:
        refused: list[InclavareError] = []
        context = ratls.server_context(enclave.attester, policy=other.policy)
        listening = await streams.start_server(
            handler, "127.0.0.1", 0, context, on_refused=lambda _, error: refused.append(error)
        )
        port = listening.sockets[0].getsockname()[1]
        mutual = ratls.client_context(enclave.policy, attester=other.attester)

        async def one() -> None:
            reader, writer = await streams.open_connection("127.0.0.1", port, mutual)
            writer.write(data)
            writer.write_eof()
            assert await reader.read() == data
            writer.close()
            await writer.wait_closed()

        await asyncio.gather(*(one() for _ in range(8)))
        with pytest.raises(AppraisalError):
            await streams.open_connection(
                "127.0.0.1", port, ratls.client_context(other.policy, attester=other.attester)
            )
        listening.close()
        while not refused:
            await asyncio.sleep(0.01)
        assert {error.id for error in refused} == {"ratls.refused"}

    asyncio.run(asyncio.wait_for(main(), 60))


def test_nothing_goes_through_before_the_peer_is_verified(client: ratls.Context, server: ratls.Context) -> None:
    one, two = client.session(), server.session()
    for _ in range(2):
        for this in (one, two):
            assert not this.open
            with pytest.raises(UsageError) as caught:
                this.write(b"secret")
            assert caught.value.id == "ratls.not_open"
            with pytest.raises(UsageError):
                this.read()
        two.feed(one.outgoing())
        one.feed(two.outgoing())
    pump(one, two)
    one.write(b"secret")
    pump(one, two)
    assert two.read() == b"secret"


def test_reference_values(enclave: Enclave, server: ratls.Context) -> None:
    """A policy that names an image takes its measurements from registered bundles; a revoked one is none."""
    signer = KeySigner(ec.generate_private_key(ec.SECP256R1()))
    measured: dict[str, str | int] = {"mrenclave": enclave.enclave.mrenclave.hex()}
    now = int(time.time())
    signed = sign(
        statement([Subject("app", (("sha256", "12" * 32),))], [(("sgx-sim",), measured)],
                  not_before=now - 60, not_after=now + 3600),
        signer,
    )  # fmt: skip
    bundle = ReferenceBundle.parse(signed, TrustedSigners([signer.key.public_key()]))
    policy = replace(enclave.policy, mrenclave=(), image="app")
    accepted, _ = pair(ratls.client_context(policy, references=References([bundle])), server)
    assert accepted.open
    for references in (None, References(), References([bundle], {bundle.id: "a flaw"})):
        refused, _ = pair(ratls.client_context(policy, references=references), server)
        assert isinstance(refused.error, AppraisalError) and not refused.open


def test_a_verifier_without_a_policy_does_not_exist() -> None:
    with pytest.raises(TypeError):
        ratls.client_context()  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        ratls.server_context()  # type: ignore[call-arg]
    with pytest.raises(UsageError):
        ratls.Verifier(Policy(), lifetime=1)


# Those who do not speak it


def stock_client(minimum: ssl.TLSVersion, maximum: ssl.TLSVersion) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version, context.maximum_version = minimum, maximum
    return context


def test_tls_12_is_refused(server: ratls.Context) -> None:
    with served(server) as running:
        raw = socket.create_connection(("127.0.0.1", running.port))
        with pytest.raises(ssl.SSLError, match=r"PROTOCOL_VERSION|protocol version"):
            stock_client(ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_2).wrap_socket(raw)
        assert running.seen.wait(10)
    assert [error.id for error in running.refused] == ["ratls.tls"]


def test_tls_12_server_is_refused(client: ratls.Context, tmp_path: Path, enclave: Enclave) -> None:
    key = new_key()
    pem = tmp_path / "pem"
    pem.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        + ssl.DER_cert_to_PEM_cert(ratls.make(enclave.attester, key)).encode()
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    session_ = client.session()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    incoming.write(session_.outgoing())
    with pytest.raises(ssl.SSLError):
        context.wrap_bio(incoming, outgoing, server_side=True).do_handshake()
    session_.feed(outgoing.read())
    assert session_.error is not None and session_.error.id == "ratls.tls"


def test_plain_tcp_gets_nothing(server: ratls.Context) -> None:
    with served(server) as running:
        with socket.create_connection(("127.0.0.1", running.port)) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = sock.recv(1 << 16)
        assert len(answer) < 16  # an alert at most
        assert running.seen.wait(10)
    assert [error.id for error in running.refused] == ["ratls.tls"]


def test_stock_clients_can_read_the_certificate(server: ratls.Context, enclave: Enclave) -> None:
    """A peer that knows Interoperable RA-TLS only: an enclave that asks nothing of clients serves it, unframed."""
    with served(server) as running:
        raw = socket.create_connection(("127.0.0.1", running.port))
        with stock_client(ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.TLSv1_3).wrap_socket(raw) as sock:
            certificate = sock.getpeercert(binary_form=True)
            assert certificate is not None
            evidence = ratls.read(certificate).with_collateral(enclave.platform.collateral())
            assert verify(evidence, enclave.policy).accepted
            sock.sendall(b"plain ratls")
            assert sock.recv(100) == b"plain ratls"
        # No resumption: it would show no certificate.
        raw = socket.create_connection(("127.0.0.1", running.port))
        stock = stock_client(ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.TLSv1_3)
        with stock.wrap_socket(raw, session=None) as sock:
            sock.sendall(b"x")
            sock.recv(1)
            offered = sock.session
        raw = socket.create_connection(("127.0.0.1", running.port))
        with stock.wrap_socket(raw, session=offered) as sock:
            assert sock.version() == "TLSv1.3" and not sock.session_reused


def stock_server(tmp_path: Path, certificate: bytes, key: ec.EllipticCurvePrivateKey) -> ssl.SSLContext:
    """Somebody else's RA-TLS server: a certificate, and nothing of the exchange."""
    pem = tmp_path / "server.pem"
    pem.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        + ssl.DER_cert_to_PEM_cert(certificate).encode()
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    return context


def against_stock(client: ratls.Context, context: ssl.SSLContext) -> tuple[Session, ssl.SSLObject]:
    """A session against a stock server, as far as it gets."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_side=True)
    session_ = client.session()
    for _ in range(4):
        incoming.write(session_.outgoing())
        try:
            tls.do_handshake()
        except ssl.SSLWantReadError:
            pass
        session_.feed(outgoing.read())
        while session_.jobs:
            session_.jobs.popleft().run(session_)
    return session_, tls


class Source:
    """Collateral that a relying party has from elsewhere."""

    def __init__(self, enclave: Enclave) -> None:
        self._enclave = enclave

    def fetch(self, quote: bytes) -> Any:
        from inclavare.attestation.collateral import Collateral

        return Collateral(self._enclave.platform.collateral(), "elsewhere")


def test_peers_without_the_exchange(enclave: Enclave, tmp_path: Path, clock: SimpleNamespace) -> None:
    key = new_key()
    context = stock_server(tmp_path, ratls.make(enclave.attester, key, lifetime=1000), key)
    source = Source(enclave)
    refused, _ = against_stock(ratls.client_context(enclave.policy, collateral=source), context)
    assert refused.error is not None and refused.error.id == "ratls.exchange.unsupported"
    too_long, _ = against_stock(ratls.client_context(enclave.policy, collateral=source, certificate_only=1000), context)
    assert too_long.error is not None and too_long.error.id == "ratls.certificate.validity"
    accepted, _tls = against_stock(
        ratls.client_context(enclave.policy, collateral=source, certificate_only=1300, lifetime=50), context
    )
    assert accepted.open and accepted.peer is not None and not accepted.peer.fresh
    accepted.write(b"unframed")
    tls_in = accepted.outgoing()
    assert tls_in and accepted.error is None
    # It cannot be challenged again: its connection ends with its evidence.
    assert accepted.due() == pytest.approx(50, abs=1)
    clock.now += 51
    accepted.tick()
    assert accepted.error is not None and accepted.error.id == "ratls.expired"
    with pytest.raises(EvidenceError):
        accepted.write(b"more")


def test_expired_certificate(enclave: Enclave, tmp_path: Path) -> None:
    key = new_key()
    certificate = ratls.make(enclave.attester, key, lifetime=60, now=time.time() - 3600)
    context = stock_server(tmp_path, certificate, key)
    session_, _ = against_stock(
        ratls.client_context(enclave.policy, collateral=Source(enclave), certificate_only=86400), context
    )
    assert session_.error is not None and session_.error.id == "ratls.certificate.expired"
    early = ratls.make(enclave.attester, key, now=time.time() + 7200)
    with pytest.raises(EvidenceError) as caught:
        ratls.Verifier(enclave.policy).check(early, b"nonce")
    assert caught.value.id == "ratls.certificate.expired"


# Who has stolen, copied or relays something


class Thief(ratls.Identity):
    """Answers challenges with a credential that is not its own, in a way of its own."""

    def __init__(self, credential: Credential, answer: Callable[[bytes], bytes]) -> None:
        self._stolen, self._answer_with = credential, answer

    def current(self) -> Credential:
        return self._stolen

    def answer(self, credential: Credential, nonce: bytes) -> bytes:
        return self._answer_with(nonce)


def attack(client: ratls.Context, credential: Credential, answer: Callable[[bytes], bytes]) -> InclavareError:
    """Why the victim refuses a server that is a thief."""
    context = ratls.Context(server=True, identity=Thief(credential, answer), verifier=None)
    victim, _thief = pair(client, context)
    assert not victim.open and victim.error is not None
    with pytest.raises(InclavareError):
        victim.write(b"secret")
    return victim.error


@pytest.fixture
def stolen(enclave: Enclave) -> tuple[ratls.Identity, Credential]:
    """An enclave's identity, and its key in an attacker's hands."""
    identity = ratls.Identity(enclave.attester)
    return identity, identity.current()


def test_a_stolen_key_does_not_suffice(client: ratls.Context, stolen: Any) -> None:
    _, credential = stolen
    # All that the thief has is the certificate, whose evidence has no nonce.
    assert attack(client, credential, lambda _: credential.certificate).id in (
        "freshness.nonce",
        "evidence.collateral.missing",
    )


def test_replayed_evidence(client: ratls.Context, stolen: Any) -> None:
    identity, credential = stolen
    recorded: list[bytes] = []

    def honest(nonce: bytes) -> bytes:
        recorded.append(identity.answer(credential, nonce))
        return recorded[0]

    good = ratls.Context(server=True, identity=Thief(credential, honest), verifier=None)
    victim, _ = pair(client, good)
    assert victim.open
    assert attack(client, credential, lambda _: recorded[0]).id == "freshness.nonce"


def test_evidence_for_another_key(client: ratls.Context, enclave: Enclave, stolen: Any) -> None:
    _identity, credential = stolen
    genuine = ratls.Identity(enclave.attester)
    error = attack(client, credential, lambda nonce: genuine.answer(genuine.current(), nonce))
    assert error.id == "evidence.key.binding"


def test_relayed_challenge(client: ratls.Context, enclave: Enclave, stolen: Any) -> None:
    """In the middle, with the enclave's own key: the challenge is passed on to the enclave, and its answer back."""
    identity, _credential = stolen
    genuine = ratls.Context(server=True, identity=identity, verifier=None)
    asked: list[bytes] = []

    class Relay(Session):
        """The attacker's connection to the enclave."""

        def _send_challenge(self) -> None:
            self._challenge = asked[0]
            self._send(session._frame(CHALLENGE, asked[0]))

    class Attacker(Session):
        """The attacker's connection to the victim."""

        def _on_challenge(self, challenge: bytes) -> None:
            asked.append(challenge)
            taken: list[bytes] = []
            terms = replace(client.session()._terms, check=lambda certificate, _: taken.append(certificate))  # type: ignore[arg-type, return-value]
            relay, real = Relay(terms), genuine.session()
            with pytest.raises(AttributeError):  # the check gives no result: the attacker has what it wants
                pump(relay, real)
            assert ratls.read(taken[0]).certificate.nonce  # type: ignore[union-attr]
            self._send(session._frame(EVIDENCE, taken[0]))

    victim = client.session()
    attacker = Attacker(genuine.session()._terms)
    pump(victim, attacker)
    assert len(asked) == 1
    assert victim.error is not None and victim.error.id == "freshness.nonce"


def test_evidence_of_a_client_does_not_pass_for_a_servers(enclave: Enclave) -> None:
    """Reflection: the challenge that a side has sent comes back to it."""
    mutual = ratls.client_context(enclave.policy, attester=enclave.attester)
    one = mutual.session()
    server_side = ratls.server_context(enclave.attester, policy=enclave.policy).session()
    pump(one, server_side)
    assert one.open and server_side.open
    assert one._bound(b"c" * 32, server=True) != one._bound(b"c" * 32, server=False)
    assert one._bound(b"c" * 32, server=True) == server_side._bound(b"c" * 32, server=True)


def test_swapped_extension(enclave: Enclave, client: ratls.Context) -> None:
    key, theirs = new_key(), new_key()
    value = extensions(ratls.make(enclave.attester, theirs))[OID_DICE_EVIDENCE]
    certificate = reissue(ratls.make(enclave.attester, key), key, _2_23_133_5_4_9=value)
    error = attack(client, Credential(key, certificate, float("inf")), lambda _: certificate)
    assert error.id == "evidence.key.binding"


def test_swapped_extension_with_fresh_evidence_behind_it(enclave: Enclave, client: ratls.Context) -> None:
    """Whoever shows evidence for another key in its certificate is refused, whatever it answers later."""
    key = new_key()
    value = extensions(ratls.make(enclave.attester, new_key()))[OID_DICE_EVIDENCE]
    swapped = reissue(ratls.make(enclave.attester, key), key, _2_23_133_5_4_9=value)
    error = attack(
        client,
        Credential(key, swapped, float("inf")),
        lambda nonce: ratls.make(enclave.attester, key, nonce=nonce, endorsements=True),
    )
    assert error.id == "evidence.key.binding"


def test_another_platforms_collateral(enclave: Enclave, tmp_path_factory: pytest.TempPathFactory) -> None:
    from inclavare.config import Config
    from inclavare.tee.sgx_sim import create

    base = tmp_path_factory.mktemp("foreign")
    foreign = create(Config(state_dir=base / "s", run_dir=base / "r", log_dir=base / "l", epc_size=4 << 20))
    key = new_key()
    value = certificates.endorsements_value(foreign.collateral())
    certificate = reissue(ratls.make(enclave.attester, key, nonce=b"n"), key, _2_23_133_5_4_2=value)
    with pytest.raises(EvidenceError):
        ratls.Verifier(enclave.policy).check(certificate, b"n")


@pytest.fixture(scope="module")
def sound(enclave: Enclave) -> bytes:
    key = new_key()
    return ratls.make(enclave.attester, key, nonce=b"nonce", endorsements=True)


def test_the_undamaged_certificate_passes(enclave: Enclave, sound: bytes) -> None:
    assert ratls.Verifier(enclave.policy).check(sound, b"nonce").fresh


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_certificates(enclave: Enclave, sound: bytes, data: st.DataObject) -> None:
    """What a damaged certificate still says, if anything, is what the enclave's quote vouches for."""
    damaged = bytearray(sound)
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "zero"]))
    at = data.draw(st.integers(0, len(sound) - 1))
    if kind == "flip":
        damaged[at] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del damaged[at : at + data.draw(st.integers(1, 64))]
    elif kind == "insert":
        damaged[at:at] = data.draw(st.binary(min_size=1, max_size=16))
    else:
        damaged[at : at + 16] = bytes(len(damaged[at : at + 16]))
    original = ratls.read(sound)
    try:
        peer = ratls.Verifier(enclave.policy).check(bytes(damaged), b"nonce")
    except InclavareError:
        return
    assert peer.evidence.certificate is not None and original.certificate is not None
    assert peer.evidence.certificate.public_key == original.certificate.public_key
    assert peer.evidence.certificate.nonce == b"nonce"
    assert peer.evidence.quote == original.quote


@pytest.mark.parametrize("part", ["public key", "quote", "claims", "tcb info", "crl"])
def test_every_part_that_counts(enclave: Enclave, sound: bytes, part: str) -> None:
    values = extensions(sound)
    quote, claims = cbor2.loads(values[OID_DICE_EVIDENCE]).value
    endorsed = cbor2.loads(values[OID_ENDORSEMENTS]).value
    piece = {
        "public key": certificates.public_key(sound)[-32:],
        "quote": quote[48:400],
        "claims": claims[-16:],
        "tcb info": endorsed[1][20:120],
        "crl": endorsed[3][-32:],
    }[part]
    start = sound.index(piece)
    step = max(1, len(piece) // 40)
    for at in range(start, start + len(piece), step):
        damaged = sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :]
        with pytest.raises(InclavareError):
            ratls.Verifier(enclave.policy).check(damaged, b"nonce")


# Who breaks the protocol


FRAMES = st.lists(
    st.one_of(
        st.tuples(st.sampled_from([DATA, CHALLENGE, RESULT, END]), st.binary(max_size=40)),
        st.tuples(st.just(EVIDENCE), st.binary(max_size=200)),
        st.tuples(st.integers(5, 255), st.binary(max_size=8)),
    ),
    max_size=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(frames=FRAMES, cut=st.integers(0, 64))
def test_no_frames_but_evidence_open_a_connection(enclave: Enclave, frames: list[tuple[int, bytes]], cut: int) -> None:
    """A client with a certificate, whatever it sends instead of an answer."""
    mutual = ratls.server_context(enclave.attester, policy=enclave.policy)
    attacker = ratls.client_context(enclave.policy, attester=enclave.attester).session()
    victim = mutual.session()
    attacker._on_challenge = lambda _: None  # type: ignore[method-assign]
    pump(attacker, victim)
    raw = b"".join(session._header(kind, len(contents)) + contents for kind, contents in frames)
    attacker._send(raw[: max(0, len(raw) - cut)])
    pump(attacker, victim)
    assert not victim.open
    with pytest.raises(InclavareError):
        victim.read()


def test_data_before_the_evidence(enclave: Enclave) -> None:
    victim = ratls.server_context(enclave.attester, policy=enclave.policy).session()
    attacker = ratls.client_context(enclave.policy, attester=enclave.attester).session()
    attacker._on_challenge = lambda _: None  # type: ignore[method-assign]
    pump(attacker, victim)
    attacker._send(session._frame(DATA, b"DROP TABLE"))
    pump(attacker, victim)
    assert victim.error is not None and victim.error.id == "ratls.protocol.early"


def test_challenges_cost_a_quote_so_they_are_counted(enclave: Enclave, client: ratls.Context) -> None:
    attester = Counting(enclave.attester)
    victim = ratls.server_context(attester).session()
    attacker = client.session()
    pump(attacker, victim)
    assert victim.open and attester.quotes == 2  # the certificate's, and the answer
    for _ in range(5):
        attacker._send(session._frame(CHALLENGE, os.urandom(32)))
    pump(attacker, victim)
    assert victim.error is not None and victim.error.id == "ratls.protocol.challenge"
    assert attester.quotes == 2


def test_oversized_frames_are_refused_by_their_header(server: ratls.Context, client: ratls.Context) -> None:
    attacker, victim = pair(client, server)
    attacker._send(session._header(EVIDENCE, (1 << 20) + 1))
    pump(attacker, victim)
    assert victim.error is not None and victim.error.id == "ratls.protocol.frame"


def test_evidence_that_nobody_asked_for(server: ratls.Context, client: ratls.Context) -> None:
    attacker, victim = pair(client, server)
    attacker._send(session._frame(EVIDENCE, b"x"))
    pump(attacker, victim)
    assert victim.error is not None and victim.error.id == "ratls.protocol.frame"


def cut_at(client: ratls.Context, port: int, count: int, after: Callable[[socket.socket], None]) -> InclavareError:
    """Connect through someone who passes on ``count`` bytes of the server's and then does something else."""
    ours, theirs = socket.socketpair()
    upstream = socket.create_connection(("127.0.0.1", port))

    def down() -> None:
        left = count
        while left > 0 and (data := upstream.recv(left)):
            theirs.sendall(data)
            left -= len(data)
        after(theirs)

    def up() -> None:
        try:
            while data := theirs.recv(1 << 16):
                upstream.sendall(data)
        except OSError:
            pass

    for body in (up, down):
        threading.Thread(target=body, daemon=True).start()
    with pytest.raises(InclavareError) as caught:
        ratls.wrap(ours, client, timeout=2)
    upstream.close()
    theirs.close()
    return caught.value


@pytest.mark.parametrize("count", [0, 1, 100, 1500, 5000, 8000, 12000])
def test_connections_that_are_cut(client: ratls.Context, server: ratls.Context, count: int) -> None:
    with served(server) as running:
        error = cut_at(client, running.port, count, lambda sock: sock.shutdown(socket.SHUT_WR))
    assert error.id in ("ratls.truncated", "ratls.tls")


def test_a_server_that_stops_answering(client: ratls.Context, server: ratls.Context) -> None:
    with served(server) as running:
        assert cut_at(client, running.port, 3000, lambda _: None).id == "ratls.timeout"


def test_data_that_is_cut_is_not_the_end_of_data(client: ratls.Context, server: ratls.Context) -> None:
    one, two = pair(client, server)
    two.write(b"half of the answer")
    one.feed(two.outgoing())
    assert one.read() == b"half of the answer" and not one.eof
    one.feed_eof()
    assert one.error is not None and one.error.id == "ratls.truncated"
    # Nor is TLS's own end, without the exchange's.
    one, two = pair(client, server)
    two._shutdown()
    one.feed(two.outgoing())
    assert one.error is not None and one.error.id == "ratls.truncated"


def test_slow_loris(client: ratls.Context, server: ratls.Context) -> None:
    with served(server, connections=4, timeout=0.5) as running:
        slow = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(3)]
        for sock in slow:
            sock.sendall(b"\x16\x03\x01")
        with ratls.connect("127.0.0.1", running.port, client, timeout=5) as sock:
            sock.sendall(b"still here")
            assert sock.recv(100) == b"still here"
        for sock in slow:
            sock.settimeout(10)
            assert sock.recv(1) == b""
            sock.close()
    assert [error.id for error in running.refused] == ["ratls.timeout"] * 3


# Time


def test_attested_again_before_the_result_expires(enclave: Enclave, clock: SimpleNamespace) -> None:
    attester = Counting(enclave.attester)
    client = ratls.client_context(enclave.policy, lifetime=100)
    one, two = pair(client, ratls.server_context(attester))
    first = one.peer
    assert first is not None and one.due() == pytest.approx(50)
    one.tick()
    assert attester.quotes == 2 and not one.outgoing()
    for count in range(3, 6):
        clock.now += 51
        one.write(b"data meanwhile")
        one.tick()
        pump(one, two)
        assert two.read() == b"data meanwhile"
        assert attester.quotes == count
        assert one.peer is not None and one.peer.expires == pytest.approx(clock.now + 100)
    assert one.open and two.open


def test_an_enclave_that_cannot_attest_again_is_cut_off(enclave: Enclave, clock: SimpleNamespace) -> None:
    attester = Counting(enclave.attester)
    client = ratls.client_context(enclave.policy, lifetime=100)
    one, two = pair(client, ratls.server_context(attester))
    clock.now += 60
    one.tick()
    two.feed(one.outgoing())  # the challenge is there, and no answer comes
    clock.now += 39
    one.tick()
    assert one.open
    clock.now += 2
    one.tick()
    assert one.error is not None and one.error.id == "ratls.expired"
    with pytest.raises(EvidenceError):
        one.read()


def test_an_enclave_whose_platform_fails(enclave: Enclave, clock: SimpleNamespace) -> None:
    attester = Counting(enclave.attester)
    one, two = pair(ratls.client_context(enclave.policy, lifetime=100), ratls.server_context(attester))
    attester.error = PlatformError("no quoting enclave", id="tee.quote")
    clock.now += 60
    one.tick()
    pump(one, two)
    assert two.error is attester.error
    assert one.error is not None and one.error.id == "ratls.truncated"


def test_results_end_with_the_collateral(enclave: Enclave) -> None:
    one, _ = pair(ratls.client_context(enclave.policy, lifetime=1 << 40), ratls.server_context(enclave.attester))
    assert one.peer is not None and one.peer.expires == one.peer.claims.collateral_expires


def test_blocking_sockets_attest_again(enclave: Enclave) -> None:
    attester = Counting(enclave.attester)
    with served(ratls.server_context(attester)) as running:
        context = ratls.client_context(enclave.policy, lifetime=2)
        with ratls.connect("127.0.0.1", running.port, context) as sock:
            sock.settimeout(0.2)
            end = time.monotonic() + 20
            while attester.quotes < 4 and time.monotonic() < end:
                with pytest.raises(TimeoutError):
                    sock.recv(1)
            assert attester.quotes >= 4
            sock.settimeout(10)
            sock.sendall(b"alive")
            assert sock.recv(100) == b"alive"
