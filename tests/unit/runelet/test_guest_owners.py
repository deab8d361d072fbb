"""Who asks the in-guest interface is found by both ends of the connection."""

from __future__ import annotations

import os
import socket

import pytest

from inclavare.runelet import guest_api


def test_the_peers_address_counts_as_its_port_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A neighbour may have the application's port on another address of the loopback interface."""
    with socket.create_server((guest_api.HOST, 0)) as listening:
        monkeypatch.setattr(guest_api, "PORT", listening.getsockname()[1])
        with (
            socket.create_connection(listening.getsockname()) as ours,
            socket.create_connection(
                listening.getsockname(), source_address=("127.0.0.2", ours.getsockname()[1])
            ) as other,
        ):
            found = [inode for inode, _ in guest_api._connections(os.getpid(), ours.getsockname())]
            assert found == [str(os.fstat(ours.fileno()).st_ino)]
            theirs = [inode for inode, _ in guest_api._connections(os.getpid(), other.getsockname())]
            assert theirs == [str(os.fstat(other.fileno()).st_ino)]
            assert list(guest_api._connections(os.getpid(), ("127.0.0.3", ours.getsockname()[1]))) == []
