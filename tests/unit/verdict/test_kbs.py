"""The key broker's protocol over TLS, with honest clients and others."""

from __future__ import annotations

from verdict_service import SECRET, Service


def test_handshake_and_release(service: Service) -> None:
    client = service.client()
    client.handshake()
    assert client.get("app/key/1") == SECRET
