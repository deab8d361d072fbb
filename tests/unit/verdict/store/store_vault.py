"""Vault for tests: a real server where there is one, and one that does what transit's documentation says."""

from __future__ import annotations

import base64
import json
import os
import shlex
import shutil
import socket
import ssl
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM


@dataclass
class Vault:
    """A server with the transit engine, and its root token."""

    url: str
    token: str

    def call(self, method: str, path: str, **fields: Any) -> None:
        body = json.dumps(fields).encode()
        request = urllib.request.Request(f"{self.url}/v1/{path}", body, {"X-Vault-Token": self.token}, method=method)
        urllib.request.urlopen(request, timeout=10).close()


@contextmanager
def real_vault() -> Iterator[Vault]:
    """``vault`` or ``bao`` in development mode, or what ``INCLAVARE_TEST_VAULT`` starts: it prints its URL and token."""
    command = os.environ.get("INCLAVARE_TEST_VAULT")
    program = shutil.which("bao") or shutil.which("vault")
    if command is None and program is None:
        pytest.skip("neither vault nor bao is installed, and INCLAVARE_TEST_VAULT names none")
    if command is not None:
        process = subprocess.Popen(shlex.split(command), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout is not None
        vault = Vault(*process.stdout.readline().split())
    else:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        vault = Vault(f"http://127.0.0.1:{port}", "root")
        options = [f"-dev-listen-address=127.0.0.1:{port}", "-dev-root-token-id=root"]
        process = subprocess.Popen([str(program), "server", "-dev", *options], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        for _ in range(100):
            try:
                vault.call("POST", "sys/mounts/transit", type="transit")
                break
            except OSError:
                time.sleep(0.2)
        vault.call("POST", "transit/keys/verdictd", type="aes256-gcm96")
        yield vault
    finally:
        process.kill()
        process.wait()


@dataclass
class Documented:
    """Transit as ``developer.hashicorp.com/vault/api-docs/secret/transit`` describes it: encrypt, decrypt, rotate."""

    token: str = "hvs.documented"
    keys: list[bytes] = field(default_factory=lambda: [os.urandom(32)])
    requests: list[str] = field(default_factory=list)

    def answer(self, path: str, fields: dict[str, Any], token: str | None) -> tuple[int, dict[str, Any]]:
        self.requests.append(path)
        if token != self.token:
            return 403, {"errors": ["permission denied"]}
        aad = base64.b64decode(fields.get("associated_data", ""))
        if path == "/v1/transit/encrypt/verdictd":
            nonce = os.urandom(12)
            sealed = nonce + AESGCM(self.keys[-1]).encrypt(nonce, base64.b64decode(fields["plaintext"]), aad)
            return 200, {"data": {"ciphertext": f"vault:v{len(self.keys)}:{base64.b64encode(sealed).decode()}"}}
        if path == "/v1/transit/decrypt/verdictd":
            try:
                scheme, version, text = fields["ciphertext"].split(":")
                sealed = base64.b64decode(text, validate=True)
                opened = AESGCM(self.keys[int(version[1:]) - 1]).decrypt(sealed[:12], sealed[12:], aad)
                assert scheme == "vault"
            except (InvalidTag, ValueError, IndexError):
                return 400, {"errors": ["invalid ciphertext"]}
            return 200, {"data": {"plaintext": base64.b64encode(opened).decode()}}
        if path == "/v1/transit/keys/verdictd/rotate":
            self.keys.append(os.urandom(32))
            return 204, {}
        return 404, {"errors": []}


@contextmanager
def documented_vault(behaviour: Documented, tls: ssl.SSLContext | None = None) -> Iterator[Vault]:
    """An HTTP server for :class:`Documented`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, document = behaviour.answer(self.path, json.loads(body or b"{}"), self.headers.get("X-Vault-Token"))
            data = json.dumps(document).encode() if status != 204 else b""
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_PUT = do_POST

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            pass

    server = Server(("127.0.0.1", 0), Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield Vault(f"http{'s' if tls else ''}://127.0.0.1:{server.server_port}", behaviour.token)
    finally:
        server.shutdown()
        server.server_close()
