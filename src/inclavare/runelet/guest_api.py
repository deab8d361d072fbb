"""Confidential Containers' in-guest REST interface, on 127.0.0.1:8006 in the container's network namespace.

================================================  ====================================================================
``GET /cdh/resource/<repository>/<type>/<tag>``   the resource, as the key broker releases it to this enclave
``GET /aa/evidence?runtime_data=…[&encoding=…]``  evidence over at most 64 bytes, for SGX ``{"quote", "collateral"}``
``GET /aa/token?token_type=kbs``                  ``{"token", "tee_keypair"}``: an attestation token and its key, PEM
``POST /aa/aael``                                 501: no register of an SGX enclave can be extended
``GET /info``                                     ``{"version", "tee", "feature"}``
================================================  ====================================================================

In a virtual machine everybody on the loopback interface is inside. Here a pod's other containers share it, and so each
connection's owner is looked up: it has to be a process of this container, and for resources and tokens its
application's user or root.

Sources: guest-components ``api-server-rest`` (August 2026).
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from .. import __version__
from ..enclave.kbs_uri import Resource
from ..errors import AppraisalError, InclavareError, PlatformError, UsageError
from ..log import EventLog
from .broker import Broker

HOST, PORT = "127.0.0.1", 8006
_REPORT_DATA = 64
_CONNECTIONS = 32
_SILENCE_SECONDS = 15.0
_CLONE_NEWNET = 0x40000000
_IP_FREEBIND = 15
_NAMES = frozenset({HOST, "localhost", f"{HOST}:{PORT}", f"localhost:{PORT}"})
_ESTABLISHED = "01"


class _Refusal(Exception):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


class GuestApi:
    """Serves one container.

    Args:
        broker: where resources and tokens come from.
        user: uid of the application.
        log: events ``guest_api.*``.
    """

    def __init__(self, broker: Broker, *, user: int, log: EventLog) -> None:
        self._broker = broker
        self._attester = broker.attester
        self._user = user
        self._log = log
        self._container = 0
        self._mounts: tuple[int, int] = (0, 0)
        self._said: set[str] = set()

    def start(self, container: int) -> None:
        """Serve in the namespace of a process of the container, until this process ends. Else the log says why not.

        Args:
            container: its first process.
        """
        try:
            self._container = container
            self._mounts = _namespace(container, "mnt")
            if _namespace(container, "net") == _namespace(os.getpid(), "net"):
                self._off("the container shares the host's network, whose loopback interface is everybody's")
                return
            listening = _listen_in(container)
        except OSError as error:
            self._off(error.strerror or str(error))
            return
        server = _Server((HOST, PORT), _handler(self), bind_and_activate=False)
        server.socket.close()
        server.socket = listening
        threading.Thread(target=server.serve_forever, name="guest-api", daemon=True).start()
        self._log.event("guest_api.started", address=f"{HOST}:{PORT}")

    def _off(self, why: str) -> None:
        self._log.event("guest_api.off", level="warning", reason=why)

    # --- answers

    def answer(self, method: str, target: str, peer: tuple[str, int], host: str | None) -> tuple[int, str, bytes]:
        """Status, content type and body for a request."""
        try:
            return 200, *self._answer(method, target, peer, host)
        except _Refusal as refusal:
            status, text = refusal.status, refusal.text
        except AppraisalError as error:
            status, text = 403, error.one_line()
        except UsageError as error:
            status, text = 400, error.one_line()
        except PlatformError as error:
            status, text = 503, error.one_line()
        except InclavareError as error:
            status, text = 500, error.one_line()
        except Exception as error:
            # The text of an unexpected error may hold what was decrypted; its type does not.
            self._log.event("guest_api.fault", level="error", reason=type(error).__name__)
            status, text = 500, "the request could not be answered"
        return status, "text/plain; charset=utf-8", text.encode()

    def _answer(self, method: str, target: str, peer: tuple[str, int], host: str | None) -> tuple[str, bytes]:
        if host not in _NAMES:
            raise _Refusal(403, "this is no name of this service")  # a browser's page would come by another one
        owner = self._owner(peer)
        url = urlsplit(target)
        query = parse_qs(url.query, keep_blank_values=True, max_num_fields=16)
        root, _, rest = url.path.removeprefix("/").partition("/")
        what, _, path = rest.partition("/")
        if (root, rest) == ("aa", "aael") and method == "POST":
            raise _Refusal(501, "an SGX enclave has no register that could be extended at run time: not supported")
        if method != "GET":
            raise _Refusal(405, "Method Not Allowed")
        if url.path == "/info":
            return "application/json", _json(
                {"version": __version__, "tee": self._attester.tee, "additional_tees": [], "feature": "all"}
            )
        if (root, rest) == ("aa", "evidence"):
            return "application/octet-stream", self._evidence(query)
        if (root, what) == ("cdh", "resource") and path:
            self._only_the_user(owner)
            return "application/octet-stream", self._broker.fetch(_uri(path, url.query))
        if (root, rest) == ("aa", "token"):
            self._only_the_user(owner)
            return "application/octet-stream", self._token(query)
        raise _Refusal(404, "URL NOT FOUND")

    def _evidence(self, query: dict[str, list[str]]) -> bytes:
        text, encoding = query.get("runtime_data", [None])[-1], query.get("encoding", [None])[-1]
        try:
            data = None if text is None else _decoded(text, encoding)
        except ValueError:
            data = None
        if data is None or len(data) > _REPORT_DATA:
            raise _Refusal(400, "runtime_data has to have at most 64 bytes; with encoding=base64, in base64url")
        quote = self._attester.quote(data.ljust(_REPORT_DATA, b"\0"))
        return _json({"quote": base64.b64encode(quote).decode(), "collateral": self._attester.collateral()})

    def _token(self, query: dict[str, list[str]]) -> bytes:
        kind = query.get("token_type", [""])[-1]
        if kind != "kbs":
            raise _Refusal(400, "the token_type served here is kbs")
        # With a key of its own: the runelet's stays in the runelet.
        client = self._broker.fresh_client()
        try:
            token, key = client.attest()
        finally:
            client.close()
        return _json({"token": token, "tee_keypair": key.decode()})

    # --- who asks

    def _owner(self, peer: tuple[str, int]) -> int:
        """The uid of the connection's other end, a process of this container."""
        for inode, uid in _connections(self._container, peer):
            if any(self._is_inside(pid) for pid in _holders(inode)):
                return uid
        raise self._refusal("a process of another container")

    def _is_inside(self, pid: int) -> bool:
        try:
            return _namespace(pid, "mnt") == self._mounts
        except OSError:
            return False

    def _only_the_user(self, uid: int) -> None:
        if uid not in (0, self._user):
            raise self._refusal(f"user {uid}")

    def _refusal(self, who: str) -> _Refusal:
        if who not in self._said:
            self._said.add(who)
            self._log.event("guest_api.refused", level="warning", found=who)
        return _Refusal(403, f"refused: asked by {who}")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._free = threading.BoundedSemaphore(_CONNECTIONS)

    def process_request(self, request: Any, client_address: Any) -> None:
        # Nobody may hold up those who come after by not being served.
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that breaks is its owner's affair."""


def _handler(api: GuestApi) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"  # one request for each connection, so that its owner is looked up for each
        server_version, sys_version = "inclavare", ""
        timeout = _SILENCE_SECONDS

        def _serve(self) -> None:
            host = self.headers.get("Host")
            status, kind, body = api.answer(self.command, self.path, self.client_address[:2], host)
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PUT = do_DELETE = _serve

        def log_message(self, format: str, *args: Any) -> None:
            """Not to standard error."""

    return Handler


def _decoded(text: str, encoding: str | None) -> bytes:
    if encoding is None:
        return text.encode()
    if encoding != "base64":
        raise ValueError(encoding)
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)


def _uri(path: str, query: str) -> str:
    uri = f"kbs:///{unquote(path)}" + (f"?{query}" if query else "")
    if len(Resource.parse(uri).path) != 3:
        raise _Refusal(404, "a resource is /cdh/resource/<repository>/<type>/<tag>")
    return uri


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _namespace(pid: int, kind: str) -> tuple[int, int]:
    """What identifies a namespace of a process.

    Raises:
        OSError: it is gone.
    """
    found = os.stat(f"/proc/{pid}/ns/{kind}")
    return found.st_dev, found.st_ino


def _listen_in(container: int) -> socket.socket:
    """A listening socket in the network namespace of a process.

    Raises:
        OSError: the namespace cannot be entered, or the port is taken.
    """
    made: list[socket.socket] = []
    failed: list[OSError] = []

    def listen() -> None:
        # A thread of its own, which ends: a namespace that is entered counts for one thread only.
        libc = ctypes.CDLL(None, use_errno=True)
        try:
            with open(f"/proc/{container}/ns/net") as namespace:
                if libc.setns(namespace.fileno(), _CLONE_NEWNET) < 0:
                    raise OSError(ctypes.get_errno(), "its network namespace cannot be entered")
            listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            try:
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                # The loopback interface may not be up yet.
                listening.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
                listening.bind((HOST, PORT))
                listening.listen(16)
            except BaseException:
                listening.close()
                raise
            made.append(listening)
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=listen, name="netns")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return made[0]


def _connections(container: int, peer: tuple[str, int]) -> Iterator[tuple[str, int]]:
    """Inode and uid of the sockets whose local end is ``peer`` and whose other end is this service.

    The address counts as the port does: others may use the same port of 127.0.0.2.
    """
    there = f"{int.from_bytes(socket.inet_aton(peer[0]), 'little'):08X}:{peer[1]:04X}"
    here = f"{int.from_bytes(socket.inet_aton(HOST), 'little'):08X}"
    for table in ("tcp", "tcp6"):
        try:
            with open(f"/proc/{container}/net/{table}", encoding="ascii") as handle:
                lines = handle.read().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            # sl local remote state queues timer retransmits uid timeout inode …; IPv4 in IPv6 ends in the same digits.
            fields = line.split()
            local, remote = fields[1], fields[2]
            if local.endswith(there) and remote.endswith(f"{here}:{PORT:04X}") and fields[3] == (_ESTABLISHED):
                yield fields[9], int(fields[7])


def _holders(inode: str) -> Iterator[int]:
    """Processes that have this socket open."""
    name = f"socket:[{inode}]"
    for process in os.listdir("/proc"):
        if not process.isdecimal():
            continue
        try:
            found = any(os.readlink(f"/proc/{process}/fd/{fd}") == name for fd in os.listdir(f"/proc/{process}/fd"))
        except OSError:
            continue
        if found:
            yield int(process)
