"""Event logs of trust domains, replayed to the RTMRs that a TDX quote vouches for.

A log is data from the untrusted side until its replay gives the quote's registers; even then only each entry's digest
is authentic, and its contents where they hash to that digest (``digest_matches_event``). Two forms are read: the CC
event log (CCEL: TCG "PC Client Platform Firmware Profile", crypto-agile log; UEFI 2.10, 38.4) and dstack's JSON list.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..errors import EvidenceError
from ..sgx.certification import Reader

#: Bytes; firmware reserves a fixed area for it, of which most is empty.
MAX_SIZE = 4 << 20
_MAX_ENTRIES = 10_000
_REGISTERS = 4

_SHA384 = 0x0C
_ALGORITHMS = {0x04: "SHA-1", 0x0B: "SHA-256", _SHA384: "SHA-384", 0x0D: "SHA-512", 0x12: "SM3-256"}
_NO_ACTION = 0x03
_SPEC_ID = b"Spec ID Event03\0"
#: dstack's own events, whose digest covers type, name and payload.
_DSTACK_EVENT = 0x08000001
_TYPES = {
    0x00: "EV_PREBOOT_CERT",
    0x01: "EV_POST_CODE",
    0x03: "EV_NO_ACTION",
    0x04: "EV_SEPARATOR",
    0x05: "EV_ACTION",
    0x06: "EV_EVENT_TAG",
    0x07: "EV_S_CRTM_CONTENTS",
    0x08: "EV_S_CRTM_VERSION",
    0x09: "EV_CPU_MICROCODE",
    0x0A: "EV_PLATFORM_CONFIG_FLAGS",
    0x0B: "EV_TABLE_OF_DEVICES",
    0x0C: "EV_COMPACT_HASH",
    0x0D: "EV_IPL",
    0x0E: "EV_IPL_PARTITION_DATA",
    0x0F: "EV_NONHOST_CODE",
    0x10: "EV_NONHOST_CONFIG",
    0x11: "EV_NONHOST_INFO",
    0x12: "EV_OMIT_BOOT_DEVICE_EVENTS",
    0x80000001: "EV_EFI_VARIABLE_DRIVER_CONFIG",
    0x80000002: "EV_EFI_VARIABLE_BOOT",
    0x80000003: "EV_EFI_BOOT_SERVICES_APPLICATION",
    0x80000004: "EV_EFI_BOOT_SERVICES_DRIVER",
    0x80000005: "EV_EFI_RUNTIME_SERVICES_DRIVER",
    0x80000006: "EV_EFI_GPT_EVENT",
    0x80000007: "EV_EFI_ACTION",
    0x80000008: "EV_EFI_PLATFORM_FIRMWARE_BLOB",
    0x80000009: "EV_EFI_HANDOFF_TABLES",
    0x8000000A: "EV_EFI_PLATFORM_FIRMWARE_BLOB2",
    0x8000000B: "EV_EFI_HANDOFF_TABLES2",
    0x8000000C: "EV_EFI_VARIABLE_BOOT2",
    0x80000010: "EV_EFI_HCRTM_EVENT",
    0x800000E0: "EV_EFI_VARIABLE_AUTHORITY",
    0x800000E1: "EV_EFI_SPDM_FIRMWARE_BLOB",
    0x800000E2: "EV_EFI_SPDM_FIRMWARE_CONFIG",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One event.

    Attributes:
        index: measurement register as the log numbers it: 0 is MRTD, 1 to 4 are RTMR0 to RTMR3.
        type: event type.
        digests: by algorithm identifier.
        event: its contents.
        name: name of a dstack event, else empty.
    """

    index: int
    type: int
    digests: dict[int, bytes]
    event: bytes
    name: str = ""

    def matches(self) -> bool:
        """Whether the contents hash to the SHA-384 digest. Many kinds of events measure something else."""
        measured = self.event
        if self.type == _DSTACK_EVENT:
            measured = b":".join((struct.pack("<I", self.type), self.name.encode(), self.event))
        return hmac.compare_digest(hashlib.sha384(measured).digest(), self.digests.get(_SHA384, b""))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, with the names of Trustee's claims."""
        return {
            "index": self.index,
            "type_name": _TYPES.get(self.type, f"{self.type:#x}"),
            **({"name": self.name} if self.name else {}),
            "digests": [
                {"alg": _ALGORITHMS[algorithm], "digest": digest.hex()} for algorithm, digest in self.digests.items()
            ],
            "event": base64.b64encode(self.event).decode(),
            "digest_matches_event": self.matches(),
        }


def parse(data: bytes) -> tuple[Entry, ...]:
    """The events of a log, CCEL or dstack's JSON.

    Raises:
        EvidenceError: ``evidence.event_log.malformed``.
    """
    if len(data) > MAX_SIZE:
        raise _malformed("it is too large", f"{len(data)} bytes", f"at most {MAX_SIZE}")
    try:
        entries = _json(data) if _is_json(data) else _ccel(data)[0]
    except EvidenceError as error:
        raise _malformed(error.message, error.found, error.expected) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _malformed("it is not understood", f"{type(error).__name__}: {error}", None) from None
    return entries


def trim(data: bytes) -> bytes:
    """The log without what firmware did not use of the area that it reserved; a malformed one as it is."""
    try:
        return data if _is_json(data) else data[: _ccel(data)[1]]
    except (EvidenceError, ValueError):
        return data


def _is_json(data: bytes) -> bool:
    return data.lstrip()[:1] == b"["


def _ccel(data: bytes) -> tuple[tuple[Entry, ...], int]:
    """The events, and where they end."""
    reader = Reader(data)
    reader.take(8, "event log's first entry")
    reader.take(20, "event log's first entry")
    header = Reader(reader.take(reader.number("I", "event log's header"), "event log's header"))
    if header.take(16, "event log's header") != _SPEC_ID:
        raise ValueError("the first entry is not that of a crypto-agile log")
    header.take(8, "event log's header")
    sizes: dict[int, int] = {}
    for _ in range(header.number("I", "event log's algorithms")):
        algorithm = header.number("H", "event log's algorithms")
        sizes[algorithm] = header.number("H", "event log's algorithms")
    if sizes.get(_SHA384) != 48 or not set(sizes) <= set(_ALGORITHMS):
        raise ValueError(f"its algorithms are {sorted(sizes)}")
    header.take(header.number("B", "event log's vendor"), "event log's vendor")
    header.end("event log's header")
    found: list[Entry] = []
    end = len(data) - reader.left
    while reader.left:
        index = reader.number("I", "event")
        if index == 0xFFFFFFFF:
            break
        kind, count = reader.number("I", "event"), reader.number("I", "event")
        if index == kind == count == 0:
            # What firmware did not use of its area.
            if any(reader.take(reader.left, "rest")):
                raise ValueError("something follows the end of the log")
            break
        digests: dict[int, bytes] = {}
        for _ in range(count):
            algorithm = reader.number("H", "event's digests")
            if algorithm not in sizes or algorithm in digests:
                raise ValueError(f"a digest of algorithm {algorithm:#x}")
            digests[algorithm] = reader.take(sizes[algorithm], "event's digests")
        event = reader.take(reader.number("I", "event"), "event")
        found.append(Entry(index, kind, digests, event))
        end = len(data) - reader.left
        if len(found) > _MAX_ENTRIES:
            raise ValueError(f"more than {_MAX_ENTRIES} events")
    return tuple(found), end


def _json(data: bytes) -> tuple[Entry, ...]:
    found = json.loads(data)
    if len(found) > _MAX_ENTRIES:
        raise ValueError(f"more than {_MAX_ENTRIES} events")
    entries: list[Entry] = []
    for one in found:
        register, kind, digest = one["imr"], one["event_type"], bytes.fromhex(one["digest"])
        if type(register) is not int or type(kind) is not int or not 0 <= kind < 1 << 32 or len(digest) != 48:
            raise ValueError(f"event {len(entries)}")
        event = bytes.fromhex(one.get("event_payload", ""))
        entries.append(Entry(register + 1, kind, {_SHA384: digest}, event, str(one.get("event", ""))))
    return tuple(entries)


def replay(entries: Iterable[Entry]) -> tuple[bytes, ...]:
    """RTMR0 to RTMR3, 48 bytes each, after these events.

    Raises:
        EvidenceError: ``evidence.event_log.malformed``: an event has no SHA-384 digest, or extends no RTMR.
    """
    registers = [bytes(48)] * _REGISTERS
    for entry in entries:
        if entry.type == _NO_ACTION:
            continue
        digest = entry.digests.get(_SHA384)
        if digest is None or not 0 <= entry.index <= _REGISTERS:
            raise _malformed("an event cannot be replayed", f"register {entry.index}", "a SHA-384 digest for an RTMR")
        if entry.index:
            registers[entry.index - 1] = hashlib.sha384(registers[entry.index - 1] + digest).digest()
    return tuple(registers)


def check(data: bytes, rtmrs: Iterable[str]) -> tuple[dict[str, Any], ...]:
    """The log's events, JSON-ready, if their replay gives these registers, hexadecimal.

    Raises:
        EvidenceError: ``evidence.event_log.malformed`` or ``.mismatch``.
    """
    entries = parse(data)
    for number, (found, expected) in enumerate(zip(replay(entries), rtmrs, strict=True)):
        if found.hex() != expected:
            raise EvidenceError(
                f"the event log does not give the quote's RTMR{number}",
                id="evidence.event_log.mismatch",
                found=found.hex(),
                expected=expected,
                remedy="the log was changed, or is of another boot: send the one that the trust domain has now",
            )
    return tuple(entry.to_dict() for entry in entries)


def _malformed(what: str, found: object, expected: object) -> EvidenceError:
    return EvidenceError(
        f"the event log cannot be parsed: {what}",
        id="evidence.event_log.malformed",
        found=found,
        expected=expected,
        remedy="send the CC event log of the trust domain, or none",
    )
