"""Connections that ask nothing, or are too many, take no places."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from inclavare import serving


async def hello(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@contextmanager
def running(**settings: Any) -> Iterator[tuple[str, int]]:
    server = serving.server(hello, None, connections=64, shutdown_seconds=1, **settings)
    with serving.listen("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=lambda: server.run(sockets=[listening]), daemon=True)
        thread.start()
        try:
            yield listening.getsockname()
        finally:
            server.should_exit = True
            thread.join(20)


def ask(sock: socket.socket) -> bytes:
    sock.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    answer = b""
    while not answer.endswith(b"\r\n\r\nok") and (piece := sock.recv(4096)):
        answer += piece
    return answer


def ended(sock: socket.socket) -> bool:
    sock.settimeout(10)
    try:
        return sock.recv(1) == b""
    except ConnectionError:
        return True


def test_a_silent_connection_ends_and_one_that_asks_does_not() -> None:
    with running(first_request_seconds=0.5) as address:
        with socket.create_connection(address) as silent, socket.create_connection(address) as slow:
            slow.sendall(b"GET / HTTP/1.1\r\n")
            assert ended(silent) and ended(slow)
        with socket.create_connection(address) as sock:
            assert b"200" in ask(sock)
            time.sleep(0.8)
            assert b"200" in ask(sock)


def test_one_address_does_not_take_all() -> None:
    with running(connections_per_client=3) as address:
        socks = [socket.create_connection(address) for _ in range(3)]
        try:
            assert all(b"200" in ask(sock) for sock in socks)
            with socket.create_connection(address) as fourth:
                assert ended(fourth)
            with socket.create_connection(address, source_address=("127.0.0.2", 0)) as another:
                assert b"200" in ask(another)
        finally:
            for sock in socks:
                sock.close()
        until = time.monotonic() + 10
        while True:
            with socket.create_connection(address) as again:
                try:
                    if b"200" in ask(again):
                        break
                except ConnectionError:
                    pass
            assert time.monotonic() < until, "closed connections are forgotten"
            time.sleep(0.05)
