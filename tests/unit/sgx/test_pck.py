"""The PCK certificate's SGX extension: written as Intel writes it, read as dcap-qvl reads it, damage refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import dcap_qvl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quotes import REAL, real
from structures import binary

from inclavare.sgx import der
from inclavare.sgx.certification import certificates
from inclavare.sgx.pck import OID_SGX_EXTENSION, SGX_TYPES, PckExtension
from inclavare.sgx.quote import Quote
from inclavare.sgx.structs import StructureError

CHAINS = [entry[0] for entry in REAL if entry[3] == 5]
flags = st.none() | st.booleans()
extensions = st.builds(
    PckExtension,
    ppid=binary(16),
    tcb_components=st.tuples(*[st.integers(0, 255)] * 16),
    pce_svn=st.integers(0, 0xFFFF),
    cpusvn=binary(16),
    pce_id=binary(2),
    fmspc=binary(6),
    sgx_type=st.sampled_from(sorted(SGX_TYPES)),
    platform_instance_id=st.none() | binary(16),
    dynamic_platform=flags,
    cached_keys=flags,
    smt_enabled=flags,
)


def refusal(data: bytes) -> StructureError:
    with pytest.raises(StructureError) as caught:
        PckExtension.from_bytes(data)
    assert caught.value.id == "sgx.pck.malformed"
    return caught.value


@given(extensions)
def test_round_trip(extension: PckExtension) -> None:
    assert PckExtension.from_bytes(extension.to_bytes()) == extension


@settings(max_examples=300)
@given(extensions, st.data())
def test_damage_is_refused_or_seen(extension: PckExtension, data: st.DataObject) -> None:
    raw = bytearray(extension.to_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] = data.draw(st.integers(0, 255).filter(lambda value: value != raw[at]))
    try:
        other = PckExtension.from_bytes(bytes(raw))
    except StructureError as error:
        assert error.id == "sgx.pck.malformed"
    else:
        assert other != extension
        assert other.to_bytes() == raw
    refusal(extension.to_bytes()[: data.draw(st.integers(0, len(raw) - 1))])
    refusal(extension.to_bytes() + b"\0")


@settings(max_examples=200)
@given(st.binary(max_size=300))
def test_garbage(data: bytes) -> None:
    refusal(data)


@pytest.mark.parametrize("name", CHAINS)
def test_real_certificates(vectors: Path, name: str) -> None:
    """Every real extension is written byte for byte as Intel wrote it, and dcap-qvl finds the same in it."""
    raw = real(vectors, name)
    leaf = certificates_of(raw)[0]
    found = PckExtension.from_certificate(leaf)
    assert der.certificate_parts(leaf)[1][OID_SGX_EXTENSION] == found.to_bytes()
    theirs = dcap_qvl.Quote.parse(raw).pck_extension()
    assert theirs is not None
    for ours, name_there in (
        ("ppid", "ppid"),
        ("cpusvn", "cpu_svn"),
        ("pce_svn", "pce_svn"),
        ("pce_id", "pce_id"),
        ("fmspc", "fmspc"),
        ("sgx_type", "sgx_type"),
        ("platform_instance_id", "platform_instance_id"),
    ):
        assert getattr(found, ours) == getattr(theirs, name_there), ours
    for index, svn in enumerate(found.tcb_components, 1):
        assert int.from_bytes(theirs.get_value(f"{OID_SGX_EXTENSION}.2.{index}") or b"", "big") == svn


def certificates_of(raw: bytes) -> tuple[bytes, ...]:
    """The damaged vector's chain ends in rubbish: only its first certificate is read."""
    chain = Quote.split(raw)[0].cert_data
    end = b"-----END CERTIFICATE-----"
    return certificates(chain[: chain.index(end) + len(end)])


def test_other_certificates(vectors: Path) -> None:
    with pytest.raises(StructureError) as caught:
        PckExtension.from_certificate((vectors / "collateral" / "intel_sgx_root_ca.der").read_bytes())
    assert caught.value.id == "sgx.pck.absent"
    with pytest.raises(StructureError) as caught:
        PckExtension.from_certificate(b"\x30\x00")
    assert caught.value.id == "sgx.pck.malformed"


GOOD = PckExtension(bytes(16), tuple(range(16)), 13, bytes(16), bytes(2), bytes(6), 0, bytes(16), True, False, True)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"ppid": bytes(15)}, "ppid is 15 bytes, not 16"),
        ({"cpusvn": bytes(17)}, "cpusvn is 17 bytes, not 16"),
        ({"pce_id": b""}, "pce_id is 0 bytes, not 2"),
        ({"fmspc": bytes(5)}, "fmspc is 5 bytes, not 6"),
        ({"platform_instance_id": bytes(1)}, "platform_instance_id is 1 bytes, not 16"),
        ({"tcb_components": (0,) * 15}, "sixteen"),
        ({"tcb_components": (256,) + (0,) * 15}, "sixteen"),
        ({"tcb_components": (-1,) + (0,) * 15}, "sixteen"),
        ({"pce_svn": 65536}, "pce_svn 65536"),
        ({"pce_svn": -1}, "pce_svn -1"),
        ({"sgx_type": 3}, "sgx_type 3"),
    ],
)
def test_out_of_range(change: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        replace(GOOD, **change).to_bytes()


@pytest.mark.parametrize("index", range(7))
def test_missing_and_doubled_fields(index: int) -> None:
    entries = [entry.raw for entry in der.only(GOOD.to_bytes(), der.SEQUENCE).children()]
    doubled = der.encode(der.SEQUENCE, b"".join([*entries, entries[index]]))
    assert "twice" in str(refusal(doubled).found)
    missing = der.encode(der.SEQUENCE, b"".join(entries[:index] + entries[index + 1 :]))
    if index < 5:
        assert f"no field {OID_SGX_EXTENSION}.{index + 1}" in str(refusal(missing).found)
    else:
        assert PckExtension.from_bytes(missing) != GOOD
    if index:
        swapped = der.encode(der.SEQUENCE, b"".join(entries[index:] + entries[:index]))
        assert "not in its order" in str(refusal(swapped).found)


@pytest.mark.parametrize(
    "entry",
    [
        der.encode(der.SEQUENCE, der.encode_object_identifier("1.2.3") + der.encode(der.OCTET_STRING, b"")),
        der.encode(der.SEQUENCE, der.encode_object_identifier(f"{OID_SGX_EXTENSION}.8")),
        der.encode(der.SEQUENCE, der.encode(der.OCTET_STRING, b"") * 2),
        der.encode(der.SEQUENCE, der.encode_object_identifier(f"{OID_SGX_EXTENSION}.8") + der.encode_integer(1)),
    ],
)
def test_unknown_entries(entry: bytes) -> None:
    content = der.only(GOOD.to_bytes(), der.SEQUENCE).value
    refusal(der.encode(der.SEQUENCE, content + entry))
