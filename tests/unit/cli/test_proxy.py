"""``inclavare proxy``: both sides, in processes of their own, between real programs on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from attestation_files import calls_of, mounted, needs_fuse
from click.testing import CliRunner
from ratls_peers import Enclave, echo, make_enclave, plain_server, served
from small_enclaves import Signers

from inclavare.attestation import ratls
from inclavare.cli.proxy import command
from inclavare.tee.sgx_sim import SimulatedPlatform

pytestmark = needs_fuse

_RUN = """
import sys
from pathlib import Path
from inclavare.sdk import attest
attest.DIRECTORY = Path(sys.argv.pop(1))
from inclavare.cli import main
main()
"""


@dataclass
class Site:
    """An enclave's files, its policy and its platform's collateral."""

    enclave: Enclave
    attestation: Path
    policy: Path
    collateral: Path


@pytest.fixture(scope="module")
def sites(
    platform: SimulatedPlatform, signers: Signers, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Site, Site]]:
    """A server's enclave and a client's, each with its /dev/attestation."""
    directory = tmp_path_factory.mktemp("proxy")
    collateral = directory / "collateral.json"
    collateral.write_text(json.dumps(platform.collateral()))
    (directory / "root.pem").write_text(ssl.DER_cert_to_PEM_cert(platform.root_ca()))
    made = []
    faults: list[BaseException] = []
    with contextlib.ExitStack() as stack:
        for name in ("server", "client"):
            enclave = make_enclave(platform, signers, f"proxy {name}".encode())
            policy = directory / f"{name}.toml"
            policy.write_text(
                f'mrenclave = ["{enclave.enclave.mrenclave.hex()}"]\nsimulated = "allow"\ntrust_anchor = "root.pem"\n'
            )
            point = stack.enter_context(mounted(calls_of(enclave.enclave, enclave.attester.quote), faults))
            made.append(Site(enclave, point, policy, collateral))
        yield made[0], made[1]
    assert faults == []


class Running:
    """A proxy in a process of its own."""

    def __init__(self, site: Site, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _RUN, str(site.attestation), "proxy", *arguments, "--json"],
            stdout=subprocess.PIPE,
            text=True,
        )
        self._events: queue.Queue[dict[str, Any]] = queue.Queue()
        self.seen: list[dict[str, Any]] = []
        threading.Thread(target=self._read, daemon=True).start()
        self.port = int(self.event("proxy.listening")["port"])

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._events.put(json.loads(line))

    def event(self, name: str) -> dict[str, Any]:
        """The next event of this name."""
        while True:
            event = self._events.get(timeout=30)
            self.seen.append(event)
            if event["event"] == name:
                return event


@contextlib.contextmanager
def proxy(site: Site, *arguments: str) -> Iterator[Running]:
    running = Running(site, *arguments)
    try:
        yield running
    finally:
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(30) == 0


def server_arguments(site: Site, backend: int, *more: str) -> list[str]:
    return ["server", "--listen", "127.0.0.1:0", "--connect", f"127.0.0.1:{backend}",
            "--endorsements", str(site.collateral), *more]  # fmt: skip


def client_arguments(site: Site, port: int, *more: str) -> list[str]:
    return ["client", "--listen", "127.0.0.1:0", "--connect", f"localhost:{port}", "--policy", str(site.policy), *more]


def upper(sock: socket.socket) -> None:
    """Answers with the request in capitals, when it has ended."""
    parts = []
    while data := sock.recv(1 << 16):
        parts.append(data)
    sock.sendall(b"".join(parts).upper())


def ask(port: int, data: bytes) -> bytes:
    """Send everything, end, and read the answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        parts = []
        while part := sock.recv(1 << 16):
            parts.append(part)
        return b"".join(parts)


def test_two_proxies_between_two_programs(sites: tuple[Site, Site]) -> None:
    """Mutual, with half-closed connections, many at once, and everything that passes is what was sent."""
    server, client = sites
    with (
        plain_server(upper) as backend,
        proxy(server, *server_arguments(server, backend, "--policy", str(client.policy))) as inner,
        proxy(
            client,
            *client_arguments(server, inner.port, "--attest", "--endorsements", str(client.collateral)),
        ) as outer,
    ):
        big = os.urandom(2 << 20).hex().encode()
        assert ask(outer.port, big) == big.upper()
        with ThreadPoolExecutor(16) as threads:
            requests = [f"request {number} ".encode() * 1000 for number in range(32)]
            assert list(threads.map(lambda data: ask(outer.port, data), requests)) == [r.upper() for r in requests]
        accepted = inner.event("proxy.accepted")
        assert accepted["peer"]["mrenclave"] == client.enclave.enclave.mrenclave.hex()
        assert accepted["peer"]["fresh"] is True and accepted["peer"]["simulated"] is True
        assert outer.event("proxy.accepted")["peer"]["mrenclave"] == server.enclave.enclave.mrenclave.hex()
        assert inner.event("proxy.ended")["bytes"] >= len(requests[0])
        # Without a proxy of the right enclave there is no way in.
        assert len(ask(inner.port, b"GET / HTTP/1.1\r\n\r\n")) < 16
        assert inner.event("proxy.refused")["reason"]["id"] == "ratls.tls"


def test_refused_servers_get_nothing(sites: tuple[Site, Site], tmp_path: Path) -> None:
    server, client = sites
    reached: list[bytes] = []
    log = tmp_path / "log"
    with (
        served(ratls.server_context(client.enclave.attester), lambda sock: reached.append(sock.recv(1))) as wrong,
        proxy(server, *client_arguments(server, wrong.port, "--log", str(log))) as outer,
    ):
        assert ask(outer.port, b"secret") == b""
        refused = outer.event("proxy.refused")["reason"]
        assert refused["id"] == "policy.mrenclave"
        assert refused["found"] == client.enclave.enclave.mrenclave.hex()
        assert refused["expected"] == server.enclave.enclave.mrenclave.hex() and refused["remedy"]
        assert wrong.seen.wait(10) and [error.found for error in wrong.refused] == ["policy.mrenclave"]
    assert reached == []
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["proxy.listening", "proxy.refused", "proxy.ended", "proxy.stopped"]
    assert lines[1]["level"] == "warning" and log.stat().st_mode & 0o777 == 0o600
    assert "secret" not in log.read_text()


def test_a_client_of_another_implementation(sites: tuple[Site, Site]) -> None:
    """The server's proxy speaks to whatever speaks RA-TLS; here, the SDK."""
    server, _ = sites
    with plain_server(upper) as backend, proxy(server, *server_arguments(server, backend)) as inner:
        context = ratls.client_context(server.enclave.policy)
        with ratls.connect("127.0.0.1", inner.port, context) as sock:
            sock.sendall(b"abc")
            sock.shutdown()
            assert sock.makefile("rb").read() == b"ABC"


def test_who_was_accepted_and_breaks_off_is_not_counted_as_refused(sites: tuple[Site, Site]) -> None:
    server, _ = sites
    with (
        plain_server(lambda sock: sock.sendall(sock.recv(100))) as backend,
        proxy(server, *server_arguments(server, backend)) as inner,
        ratls.connect("127.0.0.1", inner.port, ratls.client_context(server.enclave.policy)) as sock,
    ):
        sock.sendall(b"x")
        with socket.socket(fileno=os.dup(sock.fileno())) as bare:
            bare.shutdown(socket.SHUT_RDWR)  # without the alert that ends TLS
        assert inner.event("proxy.broken")["reason"]["id"] == "ratls.truncated"
        inner.event("proxy.ended")
        assert "proxy.refused" not in [event["event"] for event in inner.seen]


def test_limits(sites: tuple[Site, Site]) -> None:
    server, _ = sites
    arguments = ("--max-connections", "2", "--handshake-timeout", "1", "--idle", "1")
    context = ratls.client_context(server.enclave.policy)
    with (
        plain_server(lambda sock: sock.sendall(sock.recv(100))) as backend,
        proxy(server, *server_arguments(server, backend, *arguments)) as inner,
        socket.create_connection(("127.0.0.1", inner.port)) as stalled,
    ):
        stalled.sendall(b"\x16")
        # The other connection that is allowed works meanwhile.
        with ratls.connect("127.0.0.1", inner.port, context) as sock:
            sock.sendall(b"x")
            assert sock.recv(1) == b"x"
            third = socket.create_connection(("127.0.0.1", inner.port))
            with third, contextlib.suppress(ConnectionResetError):
                assert third.recv(1) == b""
            assert inner.event("proxy.full")["connections"] == 2
        assert stalled.recv(1) == b""
        assert inner.event("proxy.refused")["reason"]["id"] == "ratls.timeout"
    with (
        plain_server(lambda sock: sock.recv(1)) as backend,
        proxy(server, *server_arguments(server, backend, *arguments)) as inner,
        ratls.connect("127.0.0.1", inner.port, context) as sock,
    ):
        assert inner.event("proxy.idle")["seconds"] == 1
        assert sock.recv(1) == b""


def test_shutdown_lets_connections_end(sites: tuple[Site, Site]) -> None:
    server, _ = sites
    with plain_server(upper) as backend:
        running = Running(server, *server_arguments(server, backend, "--drain", "30"))
        sock = ratls.connect("127.0.0.1", running.port, ratls.client_context(server.enclave.policy))
        sock.sendall(b"before ")
        running.event("proxy.accepted")
        running.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", running.port)).close()
            except ConnectionError:
                break
        else:
            pytest.fail("it still takes connections")
        sock.sendall(b"and after")
        sock.shutdown()
        assert sock.makefile("rb").read() == b"BEFORE AND AFTER"
        sock.close()
        assert running.process.wait(30) == 0
        assert running.event("proxy.stopped")["cut"] == 0


def test_shutdown_has_an_end(sites: tuple[Site, Site]) -> None:
    server, _ = sites
    with plain_server(upper) as backend:
        running = Running(server, *server_arguments(server, backend, "--drain", "0.2"))
        with ratls.connect("127.0.0.1", running.port, ratls.client_context(server.enclave.policy)):
            running.event("proxy.accepted")
            running.process.send_signal(signal.SIGTERM)
            assert running.process.wait(30) == 0
        assert running.event("proxy.stopped")["cut"] == 1


def test_a_program_that_does_not_run(sites: tuple[Site, Site]) -> None:
    server, _ = sites
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with proxy(server, *server_arguments(server, port)) as inner:
        with ratls.connect("127.0.0.1", inner.port, ratls.client_context(server.enclave.policy)) as sock:
            assert sock.recv(1) == b""
        assert inner.event("proxy.refused")["reason"]["id"] == "proxy.connect"


def test_long_connections_are_attested_again(sites: tuple[Site, Site]) -> None:
    server, _ = sites
    with (
        served(ratls.server_context(server.enclave.attester), echo) as far,
        proxy(server, *client_arguments(server, far.port, "--reattest", "2")) as outer,
        socket.create_connection(("127.0.0.1", outer.port), timeout=10) as sock,
    ):
        end = time.monotonic() + 4
        while time.monotonic() < end:
            sock.sendall(b"tick")
            assert sock.recv(4) == b"tick"
    assert far.refused == []


@pytest.mark.parametrize(
    ("arguments", "id"),
    [
        (["server", "--listen", "127.0.0.1:0", "--connect", "192.0.2.1:80"], "proxy.plain.remote"),
        (["client", "--listen", "0.0.0.0:0", "--connect", "db:1", "--policy", "POLICY"], "proxy.plain.remote"),
        (["client", "--listen", "192.0.2.1:1", "--connect", "db:1", "--policy", "POLICY"], "proxy.plain.remote"),
        (["server", "--listen", "192.0.2.1:1", "--connect", "127.0.0.1:1"], "sdk.attest.outside"),
    ],
)
def test_refusals(sites: tuple[Site, Site], arguments: list[str], id: str) -> None:
    given = [str(sites[0].policy) if word == "POLICY" else word for word in arguments]
    done = subprocess.run(
        [sys.executable, "-c", "from inclavare.cli import main; main()", "proxy", *given, "--json"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert json.loads(done.stdout)["error"]["id"] == id


def test_usage(sites: tuple[Site, Site]) -> None:
    for words, text in (
        (["client", "--listen", "127.0.0.1:0", "--connect", "db:1"], "needs --policy"),
        (["server", "--listen", "8443", "--connect", "127.0.0.1:1"], "not HOST:PORT"),
        (["both", "--listen", "127.0.0.1:0", "--connect", "db:1"], "is not one of"),
    ):
        done = CliRunner().invoke(command, words)
        assert done.exit_code == 2 and text in done.output
