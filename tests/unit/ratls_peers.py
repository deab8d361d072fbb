"""Enclaves that speak RA-TLS, in-memory connections between sessions, and echo servers, for tests."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from small_enclaves import Signers, sign_image, small_image

from inclavare.attestation import Policy, ratls
from inclavare.attestation.ratls.session import Session
from inclavare.errors import InclavareError
from inclavare.tee.sgx_sim import SimulatedEnclave, SimulatedPlatform


@dataclass(frozen=True)
class Enclave:
    """An enclave, who quotes for it, and the policy that accepts it."""

    platform: SimulatedPlatform
    enclave: SimulatedEnclave
    attester: ratls.PlatformAttester
    policy: Policy


def make_enclave(platform: SimulatedPlatform, signers: Signers, content: bytes, *, debug: bool = False) -> Enclave:
    image = small_image(content, debug=debug)
    enclave = platform.load(image, sign_image(image, signers.ours).to_bytes(), label="ratls")
    policy = Policy(mrenclave=(enclave.mrenclave.hex(),), allow_simulated=True)
    return Enclave(
        platform, enclave, ratls.PlatformAttester(platform, enclave), policy.with_trust_anchor(platform.root_ca())
    )


class Counting:
    """An attester that counts its quotes, and can be told to fail."""

    def __init__(self, attester: ratls.Attester) -> None:
        self._attester = attester
        self.quotes = 0
        self.error: InclavareError | None = None

    def quote(self, report_data: bytes) -> bytes:
        self.quotes += 1
        if self.error is not None:
            raise self.error
        return self._attester.quote(report_data)

    def collateral(self) -> dict[str, Any] | None:
        return self._attester.collateral()


def pump(a: Session, b: Session) -> None:
    """Carry bytes and run jobs until nothing moves any more."""
    moved = True
    while moved:
        moved = False
        for one, other in ((a, b), (b, a)):
            while one.jobs:
                one.jobs.popleft().run(one)
                moved = True
            data = one.outgoing()
            if data:
                other.feed(data)
                moved = True


def pair(client: Any, server: Any) -> tuple[Session, Session]:
    """Two sessions, as far as they get."""
    sessions = client.session(), server.session()
    pump(*sessions)
    return sessions


def echo(attested: ratls.AttestedSocket) -> None:
    """Sends back what it gets, then its end."""
    while data := attested.recv(1 << 16):
        attested.sendall(data)
    attested.shutdown()


@dataclass
class Served:
    """A running server, and the peers that it has refused."""

    port: int
    refused: list[InclavareError]
    seen: threading.Event


@contextlib.contextmanager
def served(context: Any, handler: Callable[[ratls.AttestedSocket], None] = echo, **arguments: Any) -> Iterator[Served]:
    refused: list[InclavareError] = []
    seen = threading.Event()

    def on_refused(_: Any, error: InclavareError) -> None:
        refused.append(error)
        seen.set()

    with ratls.serve(("127.0.0.1", 0), handler, context, on_refused=on_refused, **arguments).start() as server:
        yield Served(server.address[1], refused, seen)


@contextlib.contextmanager
def plain_server(handler: Callable[[socket.socket], None]) -> Iterator[int]:
    """A plain TCP server on loopback; yields its port."""
    listening = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        while True:
            try:
                sock, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=_guarded, args=(handler, sock), daemon=True).start()

    threading.Thread(target=run, daemon=True).start()
    try:
        yield listening.getsockname()[1]
    finally:
        with contextlib.suppress(OSError):
            listening.shutdown(socket.SHUT_RDWR)
        listening.close()


def _guarded(handler: Callable[[socket.socket], None], sock: socket.socket) -> None:
    with sock, contextlib.suppress(OSError):
        handler(sock)
