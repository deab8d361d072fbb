"""Certificates as annotated rows: the fields of X.509, and of the SGX extension in a PCK certificate.

Works on DER without judging it, so that certificates can be looked at which stricter parsers refuse.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import NamedTuple

from . import der, meanings, pck
from .rows import Row
from .structs import StructureError

_NAMES = {"2.5.4.3": "CN", "2.5.4.6": "C", "2.5.4.7": "L", "2.5.4.8": "ST", "2.5.4.10": "O", "2.5.4.11": "OU"}
_ALGORITHMS = {
    "1.2.840.10045.4.3.2": "ecdsa-with-SHA256",
    "1.2.840.10045.4.3.3": "ecdsa-with-SHA384",
    "1.2.840.113549.1.1.11": "sha256WithRSAEncryption",
    "1.2.840.113549.1.1.12": "sha384WithRSAEncryption",
    "1.2.840.10045.2.1": "id-ecPublicKey",
    "1.2.840.10045.3.1.7": "P-256",
    "1.3.132.0.34": "P-384",
    "1.2.840.113549.1.1.1": "rsaEncryption",
}
_EXTENSIONS = {
    "2.5.29.14": "subjectKeyIdentifier",
    "2.5.29.15": "keyUsage",
    "2.5.29.17": "subjectAltName",
    "2.5.29.19": "basicConstraints",
    "2.5.29.31": "cRLDistributionPoints",
    "2.5.29.35": "authorityKeyIdentifier",
    "2.5.29.37": "extKeyUsage",
    pck.OID_SGX_EXTENSION: "sgx",
    "2.23.133.5.4.9": "dice.evidence",
    "1.2.840.113741.1337.6": "gramine.quote",
    "0.6.9.42.840.113741.1337.6": "gramine.quote",
}
#: The SGX extension's fields by what follows its identifier.
_SGX_FIELDS = {
    "1": "ppid",
    **{f"2.{index + 1}": f"tcb_components.{index + 1}" for index in range(16)},
    "2.17": "pce_svn",
    "2.18": "cpusvn",
    "3": "pce_id",
    "4": "fmspc",
    "5": "sgx_type",
    "6": "platform_instance_id",
    "7.1": "dynamic_platform",
    "7.2": "cached_keys",
    "7.3": "smt_enabled",
}
_UTC_TIME, _GENERALIZED_TIME = 0x17, 0x18


class _At(NamedTuple):
    """An element and where it begins."""

    offset: int
    element: der.Element

    @property
    def inside(self) -> int:
        """Where its contents begin."""
        return self.offset + len(self.element.raw) - len(self.element.value)

    def children(self) -> list[_At]:
        found, at = [], self.inside
        for element in self.element.children():
            found.append(_At(at, element))
            at += len(element.raw)
        return found

    def row(self, field: str, meaning: str = "") -> Row:
        return Row(self.inside, self.element.value, field, meaning)


def certificate_rows(data: bytes, prefix: str = "") -> list[Row]:
    """The fields of one certificate, DER; offsets are those of the fields' contents.

    Raises:
        StructureError: ``sgx.certificate.malformed``, or ``sgx.pck.malformed`` for its SGX extension.
    """
    try:
        return [Row(row.offset, row.value, prefix + row.field, row.meaning) for row in _certificate_rows(bytes(data))]
    except (ValueError, IndexError) as error:
        raise StructureError(
            "the certificate cannot be parsed",
            id="sgx.certificate.malformed",
            found=str(error),
            expected="an X.509 v3 certificate",
        ) from None


def chain_rows(chain: Sequence[bytes]) -> list[Row]:
    """The fields of the certificates of a chain; offsets are those within each one's DER.

    Raises:
        StructureError: see :func:`certificate_rows`.
    """
    if len(chain) == 1:
        return certificate_rows(chain[0])
    return [row for index, data in enumerate(chain) for row in certificate_rows(data, f"{index}.")]


def summary(chain: Sequence[bytes]) -> str:
    """A chain in a line: the subjects, and what identifies the platform of a PCK certificate at its start."""
    try:
        text = " < ".join(_subject(data) for data in chain)
        found = pck.PckExtension.from_certificate(chain[0])
    except (StructureError, ValueError, IndexError) as error:
        return f"{len(chain)} certificates: {getattr(error, 'message', error)}"
    return f"{text}; FMSPC {found.fmspc.hex()}, CPUSVN {found.cpusvn.hex()}, PCESVN {found.pce_svn}"


def extension_rows(data: bytes, base: int = 0, prefix: str = "") -> list[Row]:
    """The fields of a PCK certificate's SGX extension (its value, DER).

    Raises:
        StructureError: ``sgx.pck.malformed``.
    """
    parsed = pck.PckExtension.from_bytes(bytes(data))
    values = {entry.name: getattr(parsed, entry.name) for entry in fields(parsed)}
    rows = []
    for suffix, value in _extension_fields(_At(base, der.only(data, der.SEQUENCE))):
        field = _SGX_FIELDS[suffix]
        name, _, index = field.partition(".")
        found = values[name][int(index) - 1] if index else values[name]
        rows.append(value.row(prefix + field, meanings.pck_meaning(name, found)))
    return rows


def _extension_fields(sequence: _At) -> Iterator[tuple[str, _At]]:
    for entry in sequence.children():
        name, value = entry.children()
        suffix = der.object_identifier(name.element.value).removeprefix(f"{pck.OID_SGX_EXTENSION}.")
        if value.element.tag == der.SEQUENCE:
            yield from _extension_fields(value)
        else:
            yield suffix, value


def _subject(data: bytes) -> str:
    body = _body(data)
    return _name(body[4].element, only_common_name=True)


def _body(data: bytes) -> list[_At]:
    """Serial, signature algorithm, issuer, validity, subject, public key, and what follows."""
    der.certificate_parts(data)
    tbs = _At(0, der.only(data, der.SEQUENCE)).children()[0]
    return [part for part in tbs.children() if part.element.tag != 0xA0]


def _certificate_rows(data: bytes) -> Iterator[Row]:
    _, algorithm, signature = _At(0, der.only(data, der.SEQUENCE)).children()
    body = _body(data)
    yield body[0].row("serial", str(int.from_bytes(body[0].element.value, "big", signed=True)))
    yield body[2].row("issuer", _name(body[2].element))
    not_before, not_after = body[3].children()
    yield not_before.row("not_before", _time(not_before.element))
    yield not_after.row("not_after", _time(not_after.element))
    yield body[4].row("subject", _name(body[4].element))
    key_algorithm, key = body[5].children()
    yield key.row("public_key", _algorithm(key_algorithm.element))
    for wrapper in body[6:]:
        if wrapper.element.tag == 0xA3:
            for extension in wrapper.children()[0].children():
                yield from _extension(extension)
    yield signature.row("signature", _algorithm(algorithm.element))


def _extension(extension: _At) -> Iterator[Row]:
    parts = extension.children()
    oid = der.object_identifier(parts[0].element.value)
    value, name = parts[-1], _EXTENSIONS.get(oid, oid)
    if oid == pck.OID_SGX_EXTENSION:
        yield from extension_rows(value.element.value, value.inside, "sgx.")
    else:
        yield value.row(f"extension.{name}", "critical" if len(parts) == 3 and any(parts[1].element.value) else "")


def _name(name: der.Element, *, only_common_name: bool = False) -> str:
    found = []
    for part in name.children():
        for attribute in part.children():
            oid, value = attribute.children()
            label = der.object_identifier(oid.value)
            text = "".join(char if char.isprintable() else "?" for char in value.value.decode("utf-8", "replace"))
            if not only_common_name:
                found.append(f"{_NAMES.get(label, label)}={text}")
            elif label == "2.5.4.3":
                found.append(text)
    return ", ".join(found)


def _time(value: der.Element) -> str:
    text = value.value.decode("ascii", "replace")
    if value.tag == _UTC_TIME:
        text = ("20" if text[:2] < "50" else "19") + text
    elif value.tag != _GENERALIZED_TIME:
        raise ValueError("not a date")
    return f"{text[:4]}-{text[4:6]}-{text[6:8]} {text[8:10]}:{text[10:12]}:{text[12:14]} UTC"


def _algorithm(value: der.Element) -> str:
    found = [element.value for element in value.children() if element.tag == der.OBJECT_IDENTIFIER]
    return ", ".join(_ALGORITHMS.get(oid, oid) for oid in map(der.object_identifier, found))
