"""The SGX extension of a PCK certificate, read and written (Intel's "SGX PCK Certificate and CRL Profile").

Parsing is strict: the fields stand in the profile's order and :meth:`PckExtension.to_bytes` gives the same bytes again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from . import der
from .structs import StructureError

OID_SGX_EXTENSION = "1.2.840.113741.1.13.1"

#: SGX Type: how the platform protects EPC memory.
SGX_TYPE_STANDARD = 0
SGX_TYPE_SCALABLE = 1
SGX_TYPE_SCALABLE_WITH_INTEGRITY = 2
SGX_TYPES = {
    SGX_TYPE_STANDARD: "Standard",
    SGX_TYPE_SCALABLE: "Scalable",
    SGX_TYPE_SCALABLE_WITH_INTEGRITY: "Scalable with integrity",
}

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class PckExtension:
    """What a PCK certificate says about its platform; the number is the identifier under ``OID_SGX_EXTENSION``.

    Attributes:
        ppid: .1, 16 bytes.
        tcb_components: .2.1 to .2.16, sixteen numbers of 0–255.
        pce_svn: .2.17, 0–65535.
        cpusvn: .2.18, 16 bytes, as the processor has it.
        pce_id: .3, 2 bytes.
        fmspc: .4, 6 bytes.
        sgx_type: .5.
        platform_instance_id: .6, 16 bytes; only in certificates of the platform CA.
        dynamic_platform: .7.1, cached_keys: .7.2, smt_enabled: .7.3; only in certificates of the platform CA.
    """

    ppid: bytes
    tcb_components: tuple[int, ...]
    pce_svn: int
    cpusvn: bytes
    pce_id: bytes
    fmspc: bytes
    sgx_type: int
    platform_instance_id: bytes | None = None
    dynamic_platform: bool | None = None
    cached_keys: bool | None = None
    smt_enabled: bool | None = None

    def to_bytes(self) -> bytes:
        """The extension's value, DER.

        Raises:
            ValueError: a field is out of range or has the wrong length.
        """
        self._check()
        tcb = [_entry(f"2.{index + 1}", der.encode_integer(svn)) for index, svn in enumerate(self.tcb_components)]
        tcb += [_entry("2.17", der.encode_integer(self.pce_svn)), _entry("2.18", _octets(self.cpusvn))]
        parts = [
            _entry("1", _octets(self.ppid)),
            _entry("2", der.encode(der.SEQUENCE, b"".join(tcb))),
            _entry("3", _octets(self.pce_id)),
            _entry("4", _octets(self.fmspc)),
            _entry("5", der.encode_integer(self.sgx_type, der.ENUMERATED)),
        ]
        if self.platform_instance_id is not None:
            parts.append(_entry("6", _octets(self.platform_instance_id)))
        configuration = [
            _entry(f"7.{number}", der.encode(der.BOOLEAN, b"\xff" if flag else b"\0"))
            for number, flag in enumerate((self.dynamic_platform, self.cached_keys, self.smt_enabled), 1)
            if flag is not None
        ]
        if configuration:
            parts.append(_entry("7", der.encode(der.SEQUENCE, b"".join(configuration))))
        return der.encode(der.SEQUENCE, b"".join(parts))

    def _check(self) -> None:
        for name, size in (("ppid", 16), ("cpusvn", 16), ("pce_id", 2), ("fmspc", 6), ("platform_instance_id", 16)):
            value = getattr(self, name)
            if value is not None and len(value) != size:
                raise ValueError(f"pck.{name} is {len(value)} bytes, not {size}")
        if len(self.tcb_components) != 16 or not all(0 <= svn <= 0xFF for svn in self.tcb_components):
            raise ValueError("pck.tcb_components are not sixteen numbers of 0 to 255")
        if not 0 <= self.pce_svn <= 0xFFFF:
            raise ValueError(f"pck.pce_svn {self.pce_svn} is not within 0 to 65535")
        if self.sgx_type not in SGX_TYPES:
            raise ValueError(f"pck.sgx_type {self.sgx_type} is not one of {sorted(SGX_TYPES)}")

    @classmethod
    def from_bytes(cls, data: bytes) -> PckExtension:
        """Parse the extension's value, DER.

        Raises:
            StructureError: ``sgx.pck.malformed``.
        """
        try:
            fields = _fields(data, "")
            tcb, configuration = _fields(fields.pop("2"), "2."), None
            if "7" in fields:
                configuration = _fields(fields.pop("7"), "7.")
            parsed = cls(
                ppid=_value(fields, "1", der.OCTET_STRING, bytes),
                tcb_components=tuple(_value(tcb, f"2.{index}", der.INTEGER, _number) for index in range(1, 17)),
                pce_svn=_value(tcb, "2.17", der.INTEGER, _number),
                cpusvn=_value(tcb, "2.18", der.OCTET_STRING, bytes),
                pce_id=_value(fields, "3", der.OCTET_STRING, bytes),
                fmspc=_value(fields, "4", der.OCTET_STRING, bytes),
                sgx_type=_value(fields, "5", der.ENUMERATED, _number),
                platform_instance_id=_value(fields, "6", der.OCTET_STRING, bytes) if "6" in fields else None,
                dynamic_platform=_flag(configuration, "7.1"),
                cached_keys=_flag(configuration, "7.2"),
                smt_enabled=_flag(configuration, "7.3"),
            )
            if parsed.to_bytes() != data:
                raise ValueError("fields that the profile does not know, or not in its order")
        except KeyError as error:
            raise _malformed(f"no field {OID_SGX_EXTENSION}.{error.args[0]}") from None
        except ValueError as error:
            raise _malformed(str(error)) from None
        return parsed

    @classmethod
    def from_certificate(cls, certificate: bytes) -> PckExtension:
        """Parse the extension of a PCK certificate, DER; the certificate itself is not judged.

        Raises:
            StructureError: ``sgx.pck.malformed`` or, for a certificate without the extension, ``sgx.pck.absent``.
        """
        try:
            extensions = der.certificate_parts(certificate)[1]
        except ValueError as error:
            raise _malformed(str(error)) from None
        if OID_SGX_EXTENSION not in extensions:
            raise StructureError(
                "the certificate has no SGX extension: it is no PCK certificate",
                id="sgx.pck.absent",
                found=", ".join(sorted(extensions)) or "no extensions",
                expected=f"an extension {OID_SGX_EXTENSION}",
            )
        return cls.from_bytes(extensions[OID_SGX_EXTENSION])


def _entry(suffix: str, value: bytes) -> bytes:
    return der.encode(der.SEQUENCE, der.encode_object_identifier(f"{OID_SGX_EXTENSION}.{suffix}") + value)


def _octets(value: bytes) -> bytes:
    return der.encode(der.OCTET_STRING, value)


def _fields(data: bytes, prefix: str) -> dict[str, bytes]:
    """The values (DER) of a sequence of identifiers and values, by what follows ``OID_SGX_EXTENSION``."""
    found: dict[str, bytes] = {}
    for entry in der.only(data, der.SEQUENCE).children():
        parts = entry.children()
        if len(parts) != 2 or parts[0].tag != der.OBJECT_IDENTIFIER:
            raise ValueError("an entry is not an identifier and a value")
        name = der.object_identifier(parts[0].value)
        suffix = name.removeprefix(f"{OID_SGX_EXTENSION}.")
        if suffix in found or suffix == name or not suffix.startswith(prefix):
            raise ValueError(f"{name} is there twice or does not belong there")
        found[suffix] = parts[1].raw
    return found


def _value(fields: dict[str, bytes], suffix: str, tag: int, decode: Callable[[bytes], _T]) -> _T:
    return decode(der.only(fields[suffix], tag).value)


def _number(value: bytes) -> int:
    return int.from_bytes(value, "big")


def _flag(fields: dict[str, bytes] | None, suffix: str) -> bool | None:
    if fields is None or suffix not in fields:
        return None
    return _value(fields, suffix, der.BOOLEAN, any)


def _malformed(found: str) -> StructureError:
    return StructureError(
        "the PCK certificate's SGX extension cannot be parsed",
        id="sgx.pck.malformed",
        found=found,
        expected="the fields of Intel's PCK certificate profile",
    )
