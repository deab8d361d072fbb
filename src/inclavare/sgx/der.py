"""Just enough DER (ITU-T X.690) to write the SGX extension, and to look into certificates that stricter parsers refuse.

RA-TLS certificates in the field have algorithm parameters that RFC 5758 forbids and dates before 1950. Nothing here
judges a certificate: it finds the public key and the extensions; whoever uses them checks the signatures that matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

BOOLEAN = 0x01
INTEGER = 0x02
OCTET_STRING = 0x04
OBJECT_IDENTIFIER = 0x06
ENUMERATED = 0x0A
SEQUENCE = 0x30


@dataclass(frozen=True, slots=True)
class Element:
    """One element: tag, contents, and both with the length (``raw``)."""

    tag: int
    value: bytes
    raw: bytes

    def children(self) -> list[Element]:
        """The elements inside.

        Raises:
            ValueError: the contents are not a series of elements.
        """
        return list(elements(self.value))


def elements(data: bytes) -> Iterator[Element]:
    """The elements that ``data`` consists of.

    Raises:
        ValueError: truncated, indefinite, not minimal, or nested in a multi-byte tag.
    """
    at = 0
    while at < len(data):
        start, tag = at, data[at]
        if tag & 0x1F == 0x1F or at + 2 > len(data):
            raise ValueError("not DER")
        length = data[at + 1]
        at += 2
        if length & 0x80:
            count = length & 0x7F
            if not 1 <= count <= 4 or at + count > len(data):
                raise ValueError("not DER: length")
            length = int.from_bytes(data[at : at + count], "big")
            at += count
            if length < 0x80 or length >> (8 * (count - 1)) == 0:
                raise ValueError("not DER: length is not minimal")
        if at + length > len(data):
            raise ValueError("not DER: truncated")
        yield Element(tag, data[at : at + length], data[start : at + length])
        at += length


def only(data: bytes, tag: int) -> Element:
    """The single element that ``data`` is.

    Raises:
        ValueError: another tag, or more than one element.
    """
    found = list(elements(data))
    if len(found) != 1 or found[0].tag != tag:
        raise ValueError(f"not a single DER element with tag {tag:#x}")
    return found[0]


def encode(tag: int, value: bytes) -> bytes:
    """An element with these contents."""
    size = len(value)
    if size < 0x80:
        return bytes((tag, size)) + value
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(length))) + length + value


def encode_integer(value: int, tag: int = INTEGER) -> bytes:
    """A non-negative INTEGER (or ENUMERATED)."""
    return encode(tag, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def encode_object_identifier(dotted: str) -> bytes:
    """An OBJECT IDENTIFIER."""
    first, second, *rest = (int(part) for part in dotted.split("."))
    out = bytearray()
    for number in (first * 40 + second, *rest):
        groups = [number & 0x7F]
        while number := number >> 7:
            groups.append(number & 0x7F | 0x80)
        out += bytes(reversed(groups))
    return encode(OBJECT_IDENTIFIER, bytes(out))


def object_identifier(value: bytes) -> str:
    """Dotted form of an OBJECT IDENTIFIER's contents, whatever its arcs are.

    Raises:
        ValueError: empty, or the last arc has no end.
    """
    parts: list[int] = []
    number = 0
    for byte in value:
        number = number << 7 | byte & 0x7F
        if not byte & 0x80:
            parts.append(number)
            number = 0
    if not parts or value[-1] & 0x80:
        raise ValueError("not an object identifier")
    first = min(parts[0] // 40, 2)
    return ".".join(str(part) for part in (first, parts[0] - first * 40, *parts[1:]))


def certificate_parts(data: bytes) -> tuple[bytes, dict[str, bytes]]:
    """SubjectPublicKeyInfo (DER) and the extensions' values by OID of an X.509 certificate.

    Raises:
        ValueError: not an X.509 v3 certificate, or an extension twice.
    """
    certificate = only(data, SEQUENCE).children()
    if len(certificate) != 3:
        raise ValueError("not an X.509 certificate")
    body = [entry for entry in certificate[0].children() if entry.tag != 0xA0]
    # serial, signature algorithm, issuer, validity, subject, subjectPublicKeyInfo, then [1], [2], [3]
    if len(body) < 6 or body[5].tag != SEQUENCE:
        raise ValueError("not an X.509 certificate")
    extensions: dict[str, bytes] = {}
    for wrapper in body[6:]:
        if wrapper.tag != 0xA3:
            continue
        for extension in only(wrapper.value, SEQUENCE).children():
            parts = extension.children()
            if not parts or parts[0].tag != OBJECT_IDENTIFIER or parts[-1].tag != OCTET_STRING:
                raise ValueError("not an X.509 extension")
            name = object_identifier(parts[0].value)
            if name in extensions:
                raise ValueError(f"extension {name} twice")
            extensions[name] = parts[-1].value
    return body[5].raw, extensions
