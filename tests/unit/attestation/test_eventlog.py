"""Event logs: a real one that gives its quote's RTMRs, made ones in both forms, and damage."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inclavare.attestation import Evidence, Policy, eventlog, verify
from inclavare.attestation.eventlog import Entry
from inclavare.errors import EvidenceError
from inclavare.sgx.quote import Quote
from inclavare.tee.sgx_sim import SimulatedPlatform

SHA384 = 0x0C
SEPARATOR = 4


def ccel(entries: Sequence[Entry], *, algorithms: dict[int, int] | None = None, tail: bytes = b"") -> bytes:
    """A crypto-agile log (TCG PC Client Platform Firmware Profile, 10.4.5)."""
    known = algorithms or {SHA384: 48}
    spec = b"Spec ID Event03\0" + struct.pack("<IBBBBI", 0, 0, 2, 105, 2, len(known))
    spec += b"".join(struct.pack("<HH", *one) for one in known.items()) + b"\x07td-shim"
    made = struct.pack("<II20sI", 1, 3, bytes(20), len(spec)) + spec
    for entry in entries:
        made += struct.pack("<III", entry.index, entry.type, len(entry.digests))
        made += b"".join(struct.pack("<H", algorithm) + digest for algorithm, digest in entry.digests.items())
        made += struct.pack("<I", len(entry.event)) + entry.event
    return made + tail


def event(index: int, contents: bytes, kind: int = SEPARATOR) -> Entry:
    return Entry(index, kind, {SHA384: hashlib.sha384(contents).digest()}, contents)


EVENTS = (event(1, b"firmware"), event(1, bytes(4)), event(2, b"kernel"), event(4, b"application"))


def refused(data: bytes) -> str:
    with pytest.raises(EvidenceError) as caught:
        eventlog.replay(eventlog.parse(data))
    return caught.value.id


def real(vectors: Path) -> tuple[Quote, bytes]:
    document = json.loads((vectors / "tdx" / "dstack_verifier_quote-report.json").read_text())
    return Quote.split(bytes.fromhex(document["quote"]))[0], document["event_log"].encode()


def registers(quote: Quote) -> list[str]:
    body = quote.td_report()
    return [getattr(body, f"rtmr{at}").hex() for at in range(4)]


def test_real_log_gives_its_quotes_registers(vectors: Path) -> None:
    quote, log = real(vectors)
    found = eventlog.check(log, registers(quote))
    assert len(found) == 28 and found[0]["type_name"] == "EV_EFI_HANDOFF_TABLES2"
    named = {one["name"]: one for one in found if "name" in one}
    assert set(named) >= {"app-id", "compose-hash", "instance-id", "boot-mr-done", "key-provider", "system-ready"}
    assert all(one["digest_matches_event"] for one in named.values())
    provider = json.loads(base64.b64decode(named["key-provider"]["event"]))
    assert provider["name"] == "local-sgx"


@pytest.mark.parametrize("number", range(28))
def test_every_event_counts(vectors: Path, number: int) -> None:
    quote, log = real(vectors)
    events = json.loads(log)
    for changed in (
        events[:number] + events[number + 1 :],
        [*events[:number], {**events[number], "digest": "00" * 48}, *events[number + 1 :]],
        [*events[:number], events[number], events[number], *events[number + 1 :]],
        [*events[:number], {**events[number], "imr": (events[number]["imr"] + 1) % 4}, *events[number + 1 :]],
    ):
        with pytest.raises(EvidenceError) as caught:
            eventlog.check(json.dumps(changed).encode(), registers(quote))
        assert caught.value.id == "evidence.event_log.mismatch"


def test_changed_contents_are_told_apart(vectors: Path) -> None:
    """The registers cover digests; whether contents belong to them is said of each event."""
    quote, log = real(vectors)
    events = json.loads(log)
    at = next(number for number, one in enumerate(events) if one["event"] == "app-id")
    for field, value in (("event_payload", "00"), ("event", "app-ie")):
        changed = [*events[:at], {**events[at], field: value}, *events[at + 1 :]]
        found = eventlog.check(json.dumps(changed).encode(), registers(quote))
        assert found[at]["digest_matches_event"] is False


def test_ccel() -> None:
    extended = [bytes(48)] * 4
    for one in EVENTS:
        at = one.index - 1
        extended[at] = hashlib.sha384(extended[at] + one.digests[SHA384]).digest()
    for tail in (b"", bytes(100), b"\xff" * 64):
        parsed = eventlog.parse(ccel(EVENTS, tail=tail))
        assert parsed == EVENTS and list(eventlog.replay(parsed)) == extended
        assert eventlog.trim(ccel(EVENTS, tail=tail)) == ccel(EVENTS)
    assert eventlog.trim(b"no log") == b"no log" and eventlog.trim(b" []") == b" []"
    shown = EVENTS[0].to_dict()
    assert shown["digests"] == [{"alg": "SHA-384", "digest": EVENTS[0].digests[SHA384].hex()}]
    assert (shown["index"], shown["type_name"], shown["digest_matches_event"]) == (1, "EV_SEPARATOR", True)


def test_what_extends_nothing() -> None:
    quiet = (event(1, b"says something", kind=3), event(0, b"of MRTD"))
    assert eventlog.replay(eventlog.parse(ccel(quiet))) == (bytes(48),) * 4


def test_several_algorithms() -> None:
    both = Entry(1, SEPARATOR, {0x0B: bytes(32), SHA384: bytes(48)}, b"")
    log = ccel([both], algorithms={0x0B: 32, SHA384: 48})
    assert eventlog.replay(eventlog.parse(log))[0] == hashlib.sha384(bytes(96)).digest()
    without = replace(both, digests={0x0B: bytes(32)})
    assert refused(ccel([without], algorithms={0x0B: 32, SHA384: 48})) == "evidence.event_log.malformed"


@pytest.mark.parametrize(
    "log",
    [
        b"",
        b"[",
        b"[5]",
        b'[{"imr": 0}]',
        b'[{"imr": true, "event_type": 1, "digest": "%s"}]' % (b"00" * 48),
        b'[{"imr": 0, "event_type": 1, "digest": "00"}]',
        b'[{"imr": 9, "event_type": 1, "digest": "%s"}]' % (b"00" * 48),
        b"[" * 100_000,
        ccel(EVENTS)[:-1],
        ccel(EVENTS)[:20],
        ccel(EVENTS, tail=bytes(12) + b"\1"),
        ccel(EVENTS, algorithms={0x0B: 32}),
        ccel(EVENTS, algorithms={SHA384: 32}),
        ccel(EVENTS, algorithms={SHA384: 48, 0x99: 4}),
        ccel([event(5, b"no such register")]),
        ccel(EVENTS).replace(b"Event03", b"Event02"),
        bytes(eventlog.MAX_SIZE + 1),
    ],
)
def test_malformed(log: bytes) -> None:
    assert refused(log) == "evidence.event_log.malformed"


@given(data=st.binary(max_size=200), at=st.integers(0, 400))
def test_damage_never_surprises(data: bytes, at: int) -> None:
    log = ccel(EVENTS)
    try:
        eventlog.replay(eventlog.parse(log[:at] + data + log[at + len(data) :]))
    except EvidenceError as error:
        assert error.id == "evidence.event_log.malformed"


# In evidence


def domain(platform: SimulatedPlatform, log: bytes) -> tuple[Evidence, Policy]:
    rtmrs = eventlog.replay(eventlog.parse(log))
    quote = platform.td_quote(bytes(64), b"m" * 48, rtmrs)
    policy = Policy(any_enclave=True, allow_simulated=True).with_trust_anchor(platform.root_ca())
    sent: dict[str, Any] = {
        "quote": base64.b64encode(quote).decode(),
        "cc_eventlog": base64.b64encode(log).decode(),
        "collateral": platform.td_collateral(),
    }
    return Evidence.from_kbs("tdx", sent, None), policy


def test_evidence_with_its_log(platform: SimulatedPlatform) -> None:
    evidence, policy = domain(platform, ccel(EVENTS, tail=bytes(50)))
    assert evidence.tee == "tdx-sim"
    claims = verify(evidence, policy).claims
    assert claims.tdx is not None and claims.tdx.event_log is not None
    assert [one["index"] for one in claims.tdx.event_log] == [1, 1, 2, 4]
    again = Evidence.from_json(evidence.to_json())
    assert again == evidence and verify(again, policy).claims.tdx == claims.tdx
    for wrong, id in (
        (ccel(EVENTS[:-1]), "evidence.event_log.mismatch"),
        (b"no log", "evidence.event_log.malformed"),
        (b"", "evidence.event_log.malformed"),
    ):
        with pytest.raises(EvidenceError) as caught:
            verify(replace(evidence, event_log=wrong), policy)
        assert caught.value.id == id


def test_an_enclave_has_no_event_log(attested: Any) -> None:
    with pytest.raises(EvidenceError) as caught:
        verify(replace(attested.evidence, event_log=ccel(EVENTS)), attested.policy, now=attested.now)
    assert caught.value.id == "evidence.event_log.malformed"
