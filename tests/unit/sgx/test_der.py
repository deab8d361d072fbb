"""DER: what is written is read again, and nothing that is not DER is read."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography import x509
from hypothesis import given, settings
from hypothesis import strategies as st

from inclavare.sgx import der


@given(st.binary(max_size=64))
def test_reads_or_refuses(data: bytes) -> None:
    try:
        assert b"".join(der.encode(element.tag, element.value) for element in der.elements(data)) == data
    except ValueError:
        pass


@given(st.sampled_from([der.SEQUENCE, der.OCTET_STRING, 0xA3]), st.integers(0, 70000), st.integers(0, 255))
def test_written_elements_are_read(tag: int, size: int, fill: int) -> None:
    value = bytes([fill]) * size
    raw = der.encode(tag, value)
    assert der.only(raw, tag) == der.Element(tag, value, raw)


@given(st.integers(0, 1 << 80))
def test_integers(value: int) -> None:
    content = der.only(der.encode_integer(value), der.INTEGER).value
    assert int.from_bytes(content, "big", signed=True) == value
    assert len(content) == 1 or content[0] or content[1] & 0x80


@given(st.integers(0, 2), st.integers(0, 39), st.lists(st.integers(0, 1 << 40), max_size=9))
def test_object_identifiers(first: int, second: int, rest: list[int]) -> None:
    dotted = ".".join(map(str, (first, second, *rest)))
    assert der.object_identifier(der.only(der.encode_object_identifier(dotted), der.OBJECT_IDENTIFIER).value) == dotted


@pytest.mark.parametrize("data", ["30", "3080", "308101", "30820001", "300201", "1f0100", "3085000000000100"])
def test_is_strict(data: str) -> None:
    with pytest.raises(ValueError, match="not DER"):
        list(der.elements(bytes.fromhex(data)))


@pytest.mark.parametrize(
    ("value", "dotted"),
    [("2a864886f84d010d01", "1.2.840.113741.1.13.1"), ("678105050409", "2.23.133.5.4.9"), ("00", "0.0")],
)
def test_known_object_identifiers(value: str, dotted: str) -> None:
    assert der.object_identifier(bytes.fromhex(value)) == dotted
    assert der.encode_object_identifier(dotted)[2:].hex() == value


@pytest.mark.parametrize("value", ["", "80", "2a86"])
def test_broken_object_identifiers(value: str) -> None:
    with pytest.raises(ValueError, match="identifier"):
        der.object_identifier(bytes.fromhex(value))


@pytest.mark.parametrize(("data", "tag"), [(b"", 0x30), (b"\x30\x00\x30\x00", 0x30), (b"\x30\x00", 0x04)])
def test_only_one(data: bytes, tag: int) -> None:
    with pytest.raises(ValueError, match="single DER element"):
        der.only(data, tag)


def certificate(*fields: bytes, extensions: bytes | None = None) -> bytes:
    body = b"".join(fields)
    if extensions is not None:
        body += der.encode(0xA3, der.encode(der.SEQUENCE, extensions))
    rest = der.encode(der.SEQUENCE, b"") + der.encode(0x03, b"\0")
    return der.encode(der.SEQUENCE, der.encode(der.SEQUENCE, body) + rest)


FIELDS = [
    der.encode(0xA0, b""),
    der.encode_integer(1),
    *[der.encode(der.SEQUENCE, bytes([number])) for number in range(5)],
]
EXTENSION = der.encode(der.SEQUENCE, der.encode_object_identifier("1.2.3") + der.encode(der.OCTET_STRING, b"x"))


def test_certificates(vectors: Path) -> None:
    assert der.certificate_parts(certificate(*FIELDS, extensions=EXTENSION)) == (FIELDS[6], {"1.2.3": b"x"})
    assert der.certificate_parts(certificate(*FIELDS, der.encode(0x81, b""))) == (FIELDS[6], {})
    real = (vectors / "collateral" / "intel_sgx_root_ca.der").read_bytes()
    key, extensions = der.certificate_parts(real)
    assert set(extensions) == {entry.oid.dotted_string for entry in x509.load_der_x509_certificate(real).extensions}
    assert key in real


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x30\x00",
        b"\x30\x04\x30\x00\x30\x00",
        der.encode(der.SEQUENCE, der.encode(der.SEQUENCE, b"") * 4),
        certificate(*FIELDS[:-1]),
        certificate(*FIELDS[:-1], der.encode(der.OCTET_STRING, b"")),
        certificate(*FIELDS, extensions=EXTENSION * 2),
        certificate(*FIELDS, extensions=der.encode(der.SEQUENCE, b"")),
        certificate(*FIELDS, extensions=der.encode(der.SEQUENCE, der.encode_object_identifier("1.2.3"))),
        certificate(*FIELDS, extensions=der.encode(der.SEQUENCE, der.encode(der.OCTET_STRING, b"x"))),
    ],
)
def test_what_is_no_certificate(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"not a|twice"):
        der.certificate_parts(data)


@settings(max_examples=200)
@given(st.data())
def test_damaged_certificates_do_not_crash(vectors: Path, data: st.DataObject) -> None:
    raw = bytearray((vectors / "collateral" / "intel_sgx_root_ca.der").read_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        der.certificate_parts(bytes(raw))
    except ValueError:
        pass
