"""What applications import: attested sockets, HTTP clients and servers, from inside an enclave and outside."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from attestation_files import calls_of, mounted, needs_fuse
from ratls_peers import Enclave, echo, make_enclave
from small_enclaves import Signers

from inclavare import serving
from inclavare.attestation import ratls as low
from inclavare.errors import AppraisalError, InclavareError, PlatformError, UsageError
from inclavare.sdk import attest, ratls
from inclavare.sgx.quote import Quote
from inclavare.tee.sgx_sim import SimulatedPlatform


@pytest.fixture(scope="module")
def enclave(platform: SimulatedPlatform, signers: Signers) -> Enclave:
    return make_enclave(platform, signers, b"sdk server")


@pytest.fixture(scope="module")
def other(platform: SimulatedPlatform, signers: Signers) -> Enclave:
    return make_enclave(platform, signers, b"sdk client")


def policy_file(directory: Path, enclave: Enclave) -> Path:
    from ssl import DER_cert_to_PEM_cert

    (directory / "root.pem").write_text(DER_cert_to_PEM_cert(enclave.platform.root_ca()))
    path = directory / f"{enclave.enclave.mrenclave.hex()[:8]}.toml"
    path.write_text(
        f'mrenclave = ["{enclave.enclave.mrenclave.hex()}"]\nsimulated = "allow"\ntrust_anchor = "root.pem"\n'
    )
    return path


def test_connect_and_serve(enclave: Enclave, other: Enclave, tmp_path: Path) -> None:
    policy, clients = policy_file(tmp_path, enclave), policy_file(tmp_path, other)
    with ratls.serve(("127.0.0.1", 0), echo, policy=clients, attester=enclave.attester).start() as server:
        with ratls.connect(*server.address, policy=policy, attester=other.attester) as sock:
            sock.sendall(b"hello")
            assert sock.recv(5) == b"hello"
            assert sock.peer is not None and sock.peer.claims.mrenclave == enclave.enclave.mrenclave.hex()
        with pytest.raises(AppraisalError) as caught:
            ratls.connect(*server.address, policy=clients, attester=other.attester)
        assert caught.value.id == "policy.mrenclave"


def test_a_peer_that_nobody_describes(enclave: Enclave) -> None:
    with pytest.raises(TypeError):
        ratls.connect("127.0.0.1", 1)
    with pytest.raises(InclavareError) as caught:
        ratls.connect("127.0.0.1", 1, policy=enclave.policy)
    assert caught.value.id == "ratls.unreachable"


def test_outside_of_an_enclave_nothing_is_served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(attest, "DIRECTORY", tmp_path)
    with pytest.raises(PlatformError) as caught:
        ratls.serve(("127.0.0.1", 0), echo)
    assert caught.value.id == "sdk.attest.outside"
    with pytest.raises(PlatformError):
        ratls.asgi_server(application)


@needs_fuse
def test_inside_an_enclave(enclave: Enclave, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through /dev/attestation: 16 threads' quotes do not get mixed up, and the evidence brings its collateral."""
    import json

    collateral = tmp_path / "collateral.json"
    collateral.write_text(json.dumps(enclave.platform.collateral()))
    calls = calls_of(enclave.enclave, enclave.attester.quote)
    faults: list[BaseException] = []
    with mounted(calls, faults) as point:
        monkeypatch.setattr(attest, "DIRECTORY", point)
        attester = ratls.EnclaveAttester(collateral)
        with ThreadPoolExecutor(16) as threads:
            wanted = [bytes([number]) * 64 for number in range(64)]
            for data, quote in zip(wanted, threads.map(attester.quote, wanted), strict=True):
                assert Quote.from_bytes(quote).report_body().report_data == data
        server = ratls.serve(("127.0.0.1", 0), echo, attester=attester).start()
        with server, ratls.connect(*server.address, policy=enclave.policy) as sock:
            sock.sendall(b"from inside")
            assert sock.recv(20) == b"from inside"
        with pytest.raises(UsageError):
            ratls.EnclaveAttester(tmp_path / "absent").collateral()
    assert faults == []


def test_asyncio(enclave: Enclave) -> None:
    async def handler(reader: asyncio.StreamReader, writer: Any) -> None:
        writer.write(await reader.readline())
        writer.close()

    async def main() -> None:
        server = await ratls.start_server(handler, "127.0.0.1", 0, attester=enclave.attester)
        port = server.sockets[0].getsockname()[1]
        reader, writer = await ratls.open_connection("127.0.0.1", port, policy=enclave.policy)
        writer.write(b"line\n")
        assert await reader.read() == b"line\n"
        assert writer.peer is not None
        writer.close()
        server.close()

    asyncio.run(asyncio.wait_for(main(), 30))


# HTTP


async def application(scope: Any, receive: Any, send: Any) -> None:
    assert scope["scheme"] == "https"
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    peer = scope["peer"]
    answer = f"{peer.claims.mrenclave if peer else 'anyone'} {len(body)}".encode()
    headers = [(b"content-length", str(len(answer)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})


@pytest.fixture
def web(enclave: Enclave, other: Enclave) -> Iterator[tuple[int, int]]:
    """Ports: a server that asks nothing of clients, and a mutual one."""
    servers, threads, ports = [], [], []
    for policy in (None, other.policy):
        server = ratls.asgi_server(application, policy=policy, attester=enclave.attester)
        listening = serving.listen("127.0.0.1", 0)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        servers.append(server)
        threads.append(thread)
        ports.append(listening.getsockname()[1])
    yield ports[0], ports[1]
    for server, thread in zip(servers, threads, strict=True):
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def test_http(web: tuple[int, int], enclave: Enclave, other: Enclave) -> None:
    with httpx.Client(transport=ratls.httpx_transport(policy=enclave.policy)) as client:
        for _ in range(3):
            answer = client.post(f"https://127.0.0.1:{web[0]}/x?y", content=bytes(300_000))
            assert answer.text == "anyone 300000"
            assert answer.extensions["peer"].claims.mrenclave == enclave.enclave.mrenclave.hex()
    mutual = ratls.httpx_transport(policy=enclave.policy, attester=other.attester)
    with httpx.Client(transport=mutual) as client:
        assert client.get(f"https://127.0.0.1:{web[1]}/").text == f"{other.enclave.mrenclave.hex()} 0"


def test_http_connections_are_kept(web: tuple[int, int], enclave: Enclave, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    connect = low.sockets.connect
    monkeypatch.setattr(low.sockets, "connect", lambda *a, **k: made.append(a) or connect(*a, **k))
    with httpx.Client(transport=ratls.httpx_transport(policy=enclave.policy)) as client:
        for _ in range(4):
            assert client.get(f"https://127.0.0.1:{web[0]}/").status_code == 200
    assert len(made) == 1


def test_http_refusals(web: tuple[int, int], enclave: Enclave, other: Enclave) -> None:
    with httpx.Client(transport=ratls.httpx_transport(policy=other.policy)) as client:
        with pytest.raises(AppraisalError):
            client.get(f"https://127.0.0.1:{web[0]}/")
        with pytest.raises(UsageError) as caught:
            client.get(f"http://127.0.0.1:{web[0]}/")
        assert caught.value.id == "ratls.http.scheme"
    unattested = httpx.Client(transport=ratls.httpx_transport(policy=enclave.policy))
    with unattested, pytest.raises(InclavareError):
        unattested.get(f"https://127.0.0.1:{web[1]}/")  # the server asks for evidence
    with httpx.Client(verify=False) as stock, pytest.raises(httpx.HTTPError):
        stock.get(f"https://127.0.0.1:{web[1]}/")
    with socket.create_connection(("127.0.0.1", web[0])) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert len(plain.recv(1000)) < 16


def test_http_redirects_do_not_leave_ra_tls(web: tuple[int, int], enclave: Enclave) -> None:
    async def redirecting(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"location", b"http://127.0.0.1:1/"), (b"content-length", b"0")]
        await send({"type": "http.response.start", "status": 302, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    server = ratls.asgi_server(redirecting, attester=enclave.attester)
    listening = serving.listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        with (
            httpx.Client(transport=ratls.httpx_transport(policy=enclave.policy), follow_redirects=True) as client,
            pytest.raises(UsageError),
        ):
            client.get(f"https://127.0.0.1:{listening.getsockname()[1]}/")
    finally:
        server.should_exit = True
        thread.join(20)


def test_http_asynchronous(web: tuple[int, int], enclave: Enclave, other: Enclave) -> None:
    async def main() -> None:
        transport = ratls.async_httpx_transport(policy=enclave.policy, attester=other.attester)
        async with httpx.AsyncClient(transport=transport) as client:
            url = f"https://127.0.0.1:{web[1]}/"
            answers = await asyncio.gather(*(client.post(url, content=bytes(size)) for size in (0, 10, 200_000)))
            mrenclave = other.enclave.mrenclave.hex()
            assert [a.text for a in answers] == [f"{mrenclave} {size}" for size in (0, 10, 200_000)]
            assert answers[0].extensions["peer"].fresh
            with pytest.raises(UsageError):
                await client.get("http://127.0.0.1/")

    asyncio.run(asyncio.wait_for(main(), 60))
