"""The skeleton enclave's requests and responses as bytes, and a client over any carrier.

A request is ``u32 operation, u32 payload size, u64 zero, payload``, a response the same with a status in front, both
filled with zeros to a multiple of 8 bytes, in ordinary memory. The enclave is entered with RDI and RSI naming the
request (address, size in bytes), RDX and R8 the response (address, capacity); the addresses are multiples of 8. It
leaves its status in RDI, too.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from enum import IntEnum

from ...errors import EvidenceError, InclavareError, PlatformError, PolicyError, UsageError
from ...sgx.keys import POLICY_MRENCLAVE, POLICY_MRSIGNER
from ...sgx.structs import KeyRequest, Report, TargetInfo

HEADER = struct.Struct("<IIQ")
#: Bytes of a request or a response, header included.
MAX_MESSAGE = 8192
MAX_PAYLOAD = MAX_MESSAGE - HEADER.size
#: What SEAL puts around the data: KEYREQUEST, size, IV; and the tag behind it.
SEAL_HEADER = 512 + 4 + 12
SEAL_OVERHEAD = SEAL_HEADER + 16
#: The most that SEAL takes.
MAX_SEALED_DATA = MAX_PAYLOAD - SEAL_OVERHEAD

_PAIR = struct.Struct("<II")


class Operation(IntEnum):
    """What a request asks for; from ``UD2`` on, of a debug enclave only."""

    INIT = 1
    ECHO = 2
    REPORT = 3
    SEAL = 4
    UNSEAL = 5
    INFO = 6
    UD2 = 128
    PEEK = 129
    POKE = 130
    JUMP = 131
    SPIN = 132


class Status(IntEnum):
    """How a request ended."""

    OK = 0
    REQUEST = 1
    OPERATION = 2
    STATE = 3
    SIZE = 4
    RANDOM = 5
    KEY = 6
    AUTHENTICATION = 7
    DEBUG = 8
    EXCEPTION = 9
    BUFFER = 10


_MEANING: dict[int, tuple[type[InclavareError], str, str | None]] = {
    Status.REQUEST: (UsageError, "the request is malformed", None),
    Status.OPERATION: (UsageError, "there is no such operation", None),
    Status.STATE: (UsageError, "INIT comes first, and once", None),
    Status.SIZE: (UsageError, "the data is too large, or the room for the response too small", None),
    Status.RANDOM: (PlatformError, "the processor gives no random numbers", None),
    Status.KEY: (PolicyError, "EGETKEY refused the key", "data sealed by a newer version opens in that version only"),
    Status.AUTHENTICATION: (
        EvidenceError,
        "the sealed data is damaged, or was sealed by another enclave, for another use or on another processor",
        None,
    ),
    Status.DEBUG: (PolicyError, "the operation is one of debug enclaves", "load the enclave with ATTRIBUTES.DEBUG"),
    Status.EXCEPTION: (PlatformError, "an exception in the enclave is not handled", "resume the enclave or end it"),
    Status.BUFFER: (UsageError, "the response's buffer is misaligned, too small or inside of the enclave", None),
}


def pack_request(operation: int, payload: bytes = b"") -> bytes:
    """A request, a multiple of 8 bytes.

    Raises:
        UsageError: ``tee.skeleton.size``: more than 8176 bytes of payload.
    """
    if len(payload) > MAX_PAYLOAD:
        raise UsageError(
            "the request is too large for the skeleton enclave",
            id="tee.skeleton.size",
            found=f"{len(payload)} bytes",
            expected=f"at most {MAX_PAYLOAD}",
        )
    return HEADER.pack(operation, len(payload), 0) + payload + bytes(-len(payload) % 8)


def unpack_response(response: bytes) -> bytes:
    """The payload of a response.

    Args:
        response: header and payload; bytes behind them are ignored.

    Raises:
        InclavareError: ``tee.skeleton.<status>``: the enclave refused; ``tee.skeleton.response``: not a response.
    """
    status, size, zero = HEADER.unpack_from(response) if len(response) >= HEADER.size else (0, 0, 1)
    if zero or size > len(response) - HEADER.size:
        raise EvidenceError("that is no response of a skeleton enclave", id="tee.skeleton.response")
    payload = response[HEADER.size : HEADER.size + size]
    if status == Status.OK:
        return payload
    raise refusal(status, payload)


def refusal(status: int, payload: bytes = b"") -> InclavareError:
    """The error for a status other than OK; ``payload`` is EGETKEY's error code after ``Status.KEY``."""
    kind, message, remedy = _MEANING.get(status, (PlatformError, f"unknown status {status}", None))
    event = Status(status).name.lower() if status in _MEANING else "status"
    found = f"SGX error {int.from_bytes(payload, 'little')}" if payload else None
    return kind(f"the skeleton enclave refused: {message}", id=f"tee.skeleton.{event}", found=found, remedy=remedy)


def pack_report(target: TargetInfo, report_data: bytes) -> bytes:
    """REPORT's payload, 576 bytes; ``report_data`` is up to 64 bytes, filled with zeros."""
    if len(report_data) > 64:
        raise UsageError("REPORTDATA is too long", id="tee.skeleton.report", found=len(report_data), expected="<= 64")
    return target.to_bytes() + report_data.ljust(64, b"\0")


def pack_seal(data: bytes, additional: bytes = b"", *, policy: int = POLICY_MRENCLAVE) -> bytes:
    """SEAL's payload; ``policy`` is KEYREQUEST.KEYPOLICY, 1 (MRENCLAVE) or 2 (MRSIGNER)."""
    if policy not in (POLICY_MRENCLAVE, POLICY_MRSIGNER):
        raise UsageError("sealing is to MRENCLAVE or to MRSIGNER", id="tee.skeleton.policy", found=policy)
    return _PAIR.pack(policy, len(additional)) + additional + data


def pack_unseal(sealed: bytes, additional: bytes = b"") -> bytes:
    """UNSEAL's payload."""
    return _PAIR.pack(0, len(additional)) + additional + sealed


def key_request(sealed: bytes) -> KeyRequest:
    """The KEYREQUEST in front of sealed data: which identity and versions it is sealed to.

    Raises:
        IntegrityError: it is not sealed data.
    """
    return KeyRequest.from_bytes(sealed[:512])


class Client:
    """The operations over a carrier.

    Args:
        call: takes a request to an enclave and brings its response (see :func:`unpack_response`).
    """

    def __init__(self, call: Callable[[bytes], bytes]) -> None:
        self._call = call

    def ask(self, operation: int, payload: bytes = b"") -> bytes:
        """One operation: payload in, payload out.

        Raises:
            InclavareError: ``tee.skeleton.*``: refused.
        """
        return unpack_response(self._call(pack_request(operation, payload)))

    def init(self) -> bytes:
        """INIT: the instance's name, 16 random bytes."""
        return self.ask(Operation.INIT)[:16]

    def info(self) -> tuple[bytes, int]:
        """INFO: the instance's name and how often it was entered since INIT."""
        answer = self.ask(Operation.INFO)
        return answer[:16], int.from_bytes(answer[16:24], "little")

    def echo(self, data: bytes) -> bytes:
        """ECHO: the same bytes, by way of enclave memory."""
        return self.ask(Operation.ECHO, data)

    def report(self, target: TargetInfo, report_data: bytes = b"") -> Report:
        """REPORT: a REPORT that ``target`` can verify."""
        return Report.from_bytes(self.ask(Operation.REPORT, pack_report(target, report_data)))

    def seal(self, data: bytes, additional: bytes = b"", *, policy: int = POLICY_MRENCLAVE) -> bytes:
        """SEAL: 544 bytes longer than ``data``."""
        return self.ask(Operation.SEAL, pack_seal(data, additional, policy=policy))

    def unseal(self, sealed: bytes, additional: bytes = b"") -> bytes:
        """UNSEAL: the data."""
        return self.ask(Operation.UNSEAL, pack_unseal(sealed, additional))
