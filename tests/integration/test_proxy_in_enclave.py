"""The attested TLS proxy where it belongs: in an enclave container, beside the program that it protects."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from runebox import PYTHON_ENV, RuneBox, python_mounts

pytestmark = pytest.mark.crun

PROGRAM = [sys.executable, "-c", "from inclavare.cli import main; main()"]
#: A program that speaks plain TCP on the container's loopback, and the proxy in front of it.
SERVER = """
import socketserver, sys, threading
from inclavare.cli import main
class Echo(socketserver.StreamRequestHandler):
    def handle(self):
        self.wfile.write(b"enclave heard " + self.rfile.readline())
plain = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Echo)
threading.Thread(target=plain.serve_forever, daemon=True).start()
sys.argv = ["inclavare", "proxy", "server", "--listen", "127.0.0.1:0", "--connect", f"127.0.0.1:{plain.server_address[1]}", "--json"]
main()
"""


@contextmanager
def lines(argv: list[str], env: dict[str, str]) -> Iterator[Iterator[dict[str, Any]]]:
    """A program that writes JSON lines, as long as it is needed."""
    with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield (json.loads(line) for line in process.stdout)
        finally:
            process.terminate()


def said(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(b"hello\n")
        found = b""
        while piece := connection.recv(4096):
            found += piece
    return found


def test_attested_channel_into_an_enclave_container(box: RuneBox, tmp_path: Path) -> None:
    """The client needs the policy only: evidence and collateral come with the connection."""

    def change(config: dict[str, Any]) -> None:
        config["mounts"] += python_mounts()
        config["linux"]["namespaces"] = [n for n in config["linux"]["namespaces"] if n["type"] != "network"]

    bundle = box.bundle("/usr/bin/python3", "-B", "-s", "-c", SERVER, env=(PYTHON_ENV,), change=change)
    root = subprocess.run(
        [*PROGRAM, "sgx", "platform", "show", "--root-ca"], env=box.env, check=True, capture_output=True, text=True
    ).stdout

    def client(policy: str) -> list[str]:
        file = tmp_path / "policy.toml"
        file.write_text(f"{policy}\nsimulated = \"allow\"\ntrust_anchor = '''{root}'''\n")
        address = f"127.0.0.1:{port}"
        return [*PROGRAM, "proxy", "client", "--listen", "127.0.0.1:0", "--connect", address, "-p", str(file), "--json"]

    rune = [str(box.rune), "--root", str(box.root), "run", "--bundle", str(bundle), "c1"]
    with lines(rune, box.env) as server:
        port = next(server)["port"]
        with lines(client('any_enclave = "allow"'), box.env) as events:
            assert said(next(events)["port"]) == b"enclave heard hello\n"
            accepted = next(events)
        assert accepted["event"] == "proxy.accepted"
        identity = accepted["peer"]["mrenclave"]
        assert (accepted["peer"]["tee"], accepted["peer"]["fresh"]) == ("sgx-sim", True)
        assert identity in subprocess.run([*PROGRAM, "list"], env=box.env, capture_output=True, text=True).stdout

        other = re.sub("[0-9a-f]", lambda digit: "fedcba9876543210"[int(digit[0], 16)], identity)
        with lines(client(f'mrenclave = ["{other}"]'), box.env) as events:
            assert said(next(events)["port"]) == b""
            refused = next(events)
        assert (refused["event"], refused["reason"]["id"]) == ("proxy.refused", "policy.mrenclave")
        assert identity in refused["reason"]["found"]
