"""Secrets through ``/dev/attestation/secrets``, else through Confidential Containers' interface."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from inclavare.errors import AppraisalError, PlatformError, UsageError
from inclavare.sdk import attest, secret


@pytest.fixture
def enclave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "data-key").write_bytes(b"released")
    (tmp_path / "secrets" / "repo%2Fkey%2F1").write_bytes(b"from the manifest")
    monkeypatch.setattr(attest, "DIRECTORY", tmp_path)
    return tmp_path


@pytest.fixture
def guest(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            status, body = {"denied": (403, b"why"), "down": (503, b"unreachable")}.get(
                self.path.rpartition("/")[2], (200, b"fresh")
            )
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    monkeypatch.setattr(secret, "GUEST_API", server.server_address)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield asked
    server.shutdown()
    server.server_close()


def test_what_is_there_is_read(enclave: Path, guest: list[str]) -> None:
    assert secret.get("data-key") == b"released"
    assert secret.get("repo/key/1") == secret.get("kbs:///repo/key/1") == b"from the manifest"
    assert guest == []


def test_anything_else_is_asked_for(enclave: Path, guest: list[str]) -> None:
    assert secret.get("kbs:///repo/key/2") == b"fresh"
    assert guest == ["/cdh/resource/repo/key/2"]
    with pytest.raises(AppraisalError) as denied:
        secret.get("repo/key/denied")
    assert (denied.value.id, denied.value.found) == ("sdk.secret.denied", "why")
    with pytest.raises(PlatformError) as down:
        secret.get("repo/key/down")
    assert (down.value.id, down.value.found) == ("sdk.secret.unavailable", "unreachable")


def test_nobody_serves(enclave: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secret, "GUEST_API", ("127.0.0.1", 1))
    monkeypatch.setattr(secret, "_STARTING", 0.2)
    began = time.monotonic()
    with pytest.raises(PlatformError) as caught:
        secret.get("repo/key/2")
    assert caught.value.id == "sdk.secret.unavailable" and time.monotonic() - began >= 0.2


def test_names(enclave: Path) -> None:
    with pytest.raises(PlatformError) as absent:
        secret.get("other")
    assert absent.value.id == "sdk.secret.absent"
    for name in ("", ".", "..", "x" * 129, "a\0b"):
        with pytest.raises(UsageError):
            secret.get(name)
    with pytest.raises(UsageError):
        secret.get("../../etc/passwd")
    with pytest.raises(PlatformError) as plugin:
        secret.get("kbs+vault:///a/b/c")
    assert "kbs+vault" in str(plugin.value.found)


def test_outside_of_an_enclave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attest, "DIRECTORY", tmp_path / "nowhere")
    with pytest.raises(PlatformError) as caught:
        secret.get("data-key")
    assert caught.value.id == "sdk.attest.outside"
