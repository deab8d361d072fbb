"""The runelet's control socket: one JSON line in, one JSON line out.

=========  =======================================  ==============================================
op         request                                  reply
=========  =======================================  ==============================================
info                                                identity, EPC pages, secrets' names
attest     ``nonce`` (base64, 16–64 bytes)          ``evidence``, ``tee_pubkey``
release    ``name``, ``tee_pubkey``, ``jwe``        ``released``
=========  =======================================  ==============================================

The socket belongs to root (mode 0600). What comes through it is the host's word: a nonce, and a message encrypted to a
key that only this enclave has. Errors come back as ``{"error": …}`` (:meth:`inclavare.errors.InclavareError.to_dict`).
"""

from __future__ import annotations

import base64
import json
import os
import socket
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

from ..errors import EvidenceError, InclavareError, UsageError
from ..shield.attestfs import check_secret_name
from ..shield.secrets import SecretStore
from ..tee.base import Enclave, Platform

#: A request may hold a 1 MiB secret, base64 twice.
_REQUEST = 4 << 20
#: Of a larger one this much is read before the connection is closed.
_DRAINED = 64 << 20
#: Challenges whose keys are kept for a release.
_CHANNELS = 16
_TIMEOUT_SECONDS = 30.0


class ControlServer:
    """Serves one enclave's control socket on a thread."""

    def __init__(self, path: Path, container: str, enclave: Enclave, platform: Platform, secrets: SecretStore) -> None:
        self._path = path
        self._container = container
        self._enclave = enclave
        self._platform = platform
        self._secrets = secrets
        self._channels: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)

    def start(self) -> None:
        """Listen and serve."""
        # Through /proc/self/fd: a socket's path may have 107 bytes at most, a container's directory more.
        directory = os.open(self._path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._socket.bind(f"/proc/self/fd/{directory}/{self._path.name}")
        finally:
            os.close(directory)
        self._path.chmod(0o600)
        self._socket.listen(16)
        threading.Thread(target=self._accept, name="control", daemon=True).start()

    def close(self) -> None:
        """Stop listening and drop the keys of open challenges."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)  # close() alone leaves the accepting thread its hold on it
        except OSError:
            pass  # it was not listening yet, or is closed
        self._socket.close()
        with self._lock:
            self._channels.clear()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            connection.settimeout(_TIMEOUT_SECONDS)
            try:
                reply = self._answer(_read_line(connection))
            except InclavareError as error:
                reply = {"error": error.to_dict()}
            except OSError:
                return
            except Exception as error:
                # The text of an unexpected error may hold what was decrypted; its type does not.
                fault = InclavareError(f"the runelet could not answer ({type(error).__name__})", id="control.fault")
                reply = {"error": fault.to_dict()}
            try:
                connection.sendall(json.dumps(reply).encode() + b"\n")
            except OSError:
                pass

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            operation = request["op"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise UsageError("not a control request", id="control.request.malformed") from None
        if operation == "info":
            return self._info()
        if operation == "attest":
            return self._attest(request)
        if operation == "release":
            return self._release(request)
        raise UsageError(
            f"unknown operation {operation!r}", id="control.request.unknown", expected="info, attest, release"
        )

    def _info(self) -> dict[str, Any]:
        return {
            "container": self._container,
            "tee": self._platform.name,
            "simulated": self._platform.simulated,
            "mrenclave": self._enclave.mrenclave.hex(),
            "mrsigner": self._enclave.mrsigner.hex(),
            "debug": self._enclave.debug,
            "epc_pages": self._enclave.epc_pages,
            "secrets": [name.decode() for name in self._secrets.names()],
        }

    def _attest(self, request: dict[str, Any]) -> dict[str, Any]:
        from ..attestation.channel import EnclaveChannel, report_data, runtime_data
        from ..attestation.evidence import Evidence

        try:
            nonce = base64.b64decode(request["nonce"], validate=True)
        except (KeyError, TypeError, ValueError):
            nonce = b""
        if not 16 <= len(nonce) <= 64:
            raise UsageError(
                "a challenge needs a nonce",
                id="control.nonce.malformed",
                found=f"{len(nonce)} bytes",
                expected="16 to 64 bytes, base64",
                remedy="draw a fresh random one for each challenge",
            )
        channel = EnclaveChannel.new()
        bound = runtime_data(nonce, channel.public_jwk)
        report = self._enclave.report(self._platform.quote_target_info(), report_data(bound))
        evidence = Evidence(
            tee=self._platform.name,
            quote=self._platform.quote(report),
            collateral=self._platform.collateral(),
            runtime_data=bound,
        )
        with self._lock:
            self._channels[_key_id(channel.public_jwk)] = channel
            if len(self._channels) > _CHANNELS:
                self._channels.popitem(last=False)
        return {"evidence": evidence.to_dict()}

    def _release(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            name = check_secret_name(request["name"])
            key = _key_id(request["tee_pubkey"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(
                f"not a release: {error}", id="control.release.malformed", expected="name, tee_pubkey, jwe"
            ) from None
        with self._lock:
            channel = self._channels.pop(key, None)
        if channel is None:
            raise EvidenceError(
                "the secret is encrypted to a key that this enclave does not have, or has used already",
                id="control.release.key",
                expected="the key of a challenge that was not answered yet",
                remedy="challenge the container again",
            )
        self._secrets.put(name, channel.decrypt(request.get("jwe")))
        return {"released": name.decode()}


def _key_id(jwk: dict[str, str]) -> str:
    return f"{jwk['x']}.{jwk['y']}"


def _read_line(connection: socket.socket) -> bytes:
    data = bytearray()
    size = 0
    while not data.endswith(b"\n") and size < _DRAINED:
        chunk = connection.recv(65536)
        if not chunk:
            break
        size += len(chunk)
        data += chunk
        if size > _REQUEST:
            data = data[-1:]  # read on, so that the sender comes to read why it is refused
    if size > _REQUEST:
        raise UsageError("the request is too large", id="control.request.size", expected=f"at most {_REQUEST} bytes")
    return bytes(data)
