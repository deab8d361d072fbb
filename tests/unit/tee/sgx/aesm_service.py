"""A service that speaks AESM's protocol, with its own reading and writing of protobuf's wire format.

Numbers are Intel's ``messages.proto``, typed in here a second time. Behind it is a quoting enclave of the simulated platform.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

#: request and response number, and the fields that a request has to have.
REQUIRED = {1: set(), 2: {1, 2, 3, 6}, 3: {1, 2, 3}, 15: {3}, 16: set(), 17: {1, 4}, 19: set(), 21: set(), 22: {1}}
Field = int | bytes


def varint(value: int) -> bytes:
    out = bytearray()
    while True:
        out.append(value & 0x7F | (0x80 if value > 0x7F else 0))
        value >>= 7
        if not value:
            return bytes(out)


def encode(fields: dict[int, Field]) -> bytes:
    out = b""
    for number, value in fields.items():
        if isinstance(value, int):
            out += varint(number << 3) + varint(value)
        else:
            out += varint(number << 3 | 2) + varint(len(value)) + value
    return out


def decode(data: bytes) -> dict[int, Field]:
    found: dict[int, Field] = {}
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                return value

    while at < len(data):
        key = number()
        assert key & 7 in (0, 2), f"wire type {key & 7}"
        if key & 7 == 0:
            found[key >> 3] = number()
        else:
            size = number()
            assert size <= len(data) - at
            found[key >> 3] = data[at : at + size]
            at += size
    return found


def key_id(algorithm: int, *, mrsigner: bytes = bytes(range(32))) -> bytes:
    """``sgx_att_key_id_ext_t``, packed: id, version, mrsigner_length, mrsigner[48], prod_id, ext_prod_id[16],
    config_id[64], family_id[16], algorithm_id, spid[16], att_key_type, reserved[80]."""
    return struct.pack("<HHH48sI16s64s16sI16sH80s", 0, 0, 32, mrsigner, 1, b"", b"", b"", algorithm, b"", 0, b"")


class AesmService:
    """Serves until it is left.

    Attributes:
        answers: request number to a function that takes the request's fields and gives the response's.
        asked: the requests, in order.
        raw: sent instead of any answer, if set.
        silent: accepts, and never answers.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.answers: dict[int, Callable[[dict[int, Field]], dict[int, Field]]] = {}
        self.asked: list[tuple[int, dict[int, Field]]] = []
        self.raw: bytes | None = None
        self.silent = False
        self.errors: list[BaseException] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(path))
        self._socket.listen(8)
        self._held: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> AesmService:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(10)
        for connection in self._held:
            connection.close()
        if error is None and self.errors:
            raise self.errors[0]

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            if self.silent:
                self._held.append(connection)
                continue
            try:
                with connection:
                    self._answer(connection)
            except BaseException as error:
                self.errors.append(error)

    def _answer(self, connection: socket.socket) -> None:
        (size,) = struct.unpack("<I", connection.recv(4, socket.MSG_WAITALL))
        request = decode(connection.recv(size, socket.MSG_WAITALL))
        assert len(request) == 1, "one request a message"
        ((number, body),) = request.items()
        assert isinstance(body, bytes)
        fields = decode(body)
        assert REQUIRED[number] <= set(fields), f"request {number} lacks {REQUIRED[number] - set(fields)}"
        self.asked.append((number, fields))
        if self.raw is not None:
            connection.sendall(self.raw)
            return
        if number in self.answers:
            reply = encode({number: encode({1: 0, **self.answers[number](fields)})})
        else:
            reply = encode({20: encode({1: 30})})
        # In two pieces, as a stream may bring it.
        message = struct.pack("<I", len(reply)) + reply
        connection.sendall(message[:3])
        connection.sendall(message[3:])
