"""SGX structures as data: every field's name, offset and format, byte-exact both ways.

Layouts are those of the Intel SDM, volume 3D, chapter 38. All integers are little-endian. Bytes that no field names are
reserved: they are written as zero and must be zero when read.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

from ..errors import IntegrityError

#: ATTRIBUTES.FLAGS, SDM 38.7.1.
ATTRIBUTE_INIT = 1 << 0
ATTRIBUTE_DEBUG = 1 << 1
ATTRIBUTE_MODE64BIT = 1 << 2
ATTRIBUTE_PROVISIONKEY = 1 << 4
ATTRIBUTE_EINITTOKENKEY = 1 << 5
ATTRIBUTE_CET = 1 << 6
ATTRIBUTE_KSS = 1 << 7
ATTRIBUTE_AEXNOTIFY = 1 << 10
ATTRIBUTES_KNOWN = (
    ATTRIBUTE_INIT
    | ATTRIBUTE_DEBUG
    | ATTRIBUTE_MODE64BIT
    | ATTRIBUTE_PROVISIONKEY
    | ATTRIBUTE_EINITTOKENKEY
    | ATTRIBUTE_CET
    | ATTRIBUTE_KSS
    | ATTRIBUTE_AEXNOTIFY
)
#: ATTRIBUTES.XFRM: x87 and SSE state, which every enclave must name.
XFRM_LEGACY = 0x3


class StructureError(IntegrityError):
    """Bytes that are not the structure that they should be (``sgx.<structure>.size``, ``.reserved``, ``.constant``)."""


class Layout:
    """Where the fields of one structure lie.

    Args:
        name: lower-case name, for error ids.
        size: bytes.
        spec: ``(field, offset, format)`` in ascending order; format is a :mod:`struct` code (``B H I Q`` or ``<n>s``).
        constants: fields whose value is fixed by the architecture.
    """

    def __init__(
        self, name: str, size: int, spec: tuple[tuple[str, int, str], ...], constants: dict[str, bytes] | None = None
    ) -> None:
        self.name = name
        self.size = size
        self.names = tuple(entry[0] for entry in spec)
        self.offsets = {entry[0]: entry[1] for entry in spec}
        self.sizes = {entry[0]: struct.calcsize("<" + entry[2]) for entry in spec}
        self.constants = constants or {}
        code, at = "<", 0
        for _, offset, format in spec:
            code += f"{offset - at}x" + format
            at = offset + struct.calcsize("<" + format)
        self._struct = struct.Struct(code + f"{size - at}x")

    def pack(self, values: tuple[int | bytes, ...]) -> bytes:
        """The structure's bytes, from the values in field order.

        Raises:
            ValueError: a byte string of the wrong length, or an integer out of range.
        """
        for name, value in zip(self.names, values, strict=True):
            if isinstance(value, bytes) and len(value) != self.sizes[name]:
                raise ValueError(f"{self.name}.{name} is {len(value)} bytes, not {self.sizes[name]}")
        try:
            return self._struct.pack(*values)
        except struct.error as error:
            raise ValueError(f"{self.name}: {error}") from None

    def unpack(self, data: bytes) -> tuple[int | bytes, ...]:
        """The values in field order.

        Raises:
            StructureError: wrong length, a reserved byte that is not zero, or a wrong constant.
        """
        if len(data) != self.size:
            raise StructureError(
                f"{self.name.upper()} has the wrong length",
                id=f"sgx.{self.name}.size",
                found=f"{len(data)} bytes",
                expected=f"{self.size} bytes",
            )
        values = self._struct.unpack(data)
        again = self._struct.pack(*values)
        if again != data:
            at = next(index for index, (left, right) in enumerate(zip(again, data, strict=True)) if left != right)
            raise StructureError(
                f"{self.name.upper()} has a reserved byte that is not zero",
                id=f"sgx.{self.name}.reserved",
                found=f"{data[at]:#04x} at offset {at}",
                expected="0x00",
            )
        for name, expected in self.constants.items():
            offset = self.offsets[name]
            found = data[offset : offset + len(expected)]
            if found != expected:
                raise StructureError(
                    f"{self.name.upper()}.{name.upper()} is not the architectural constant",
                    id=f"sgx.{self.name}.constant",
                    found=found.hex(),
                    expected=expected.hex(),
                )
        return values


class Structure:
    """Base of the typed structures: a dataclass whose fields stand in the order of its ``LAYOUT``."""

    LAYOUT: ClassVar[Layout]

    def to_bytes(self) -> bytes:
        """``LAYOUT.size`` bytes.

        Raises:
            ValueError: a field is out of range.
        """
        values: list[Any] = [getattr(self, entry.name) for entry in fields(self)]  # type: ignore[arg-type]
        return self.LAYOUT.pack(tuple(values))

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Parse exactly ``LAYOUT.size`` bytes.

        Raises:
            StructureError: wrong length, reserved bytes or constants.
        """
        return cls(*cls.LAYOUT.unpack(bytes(data)))


def _zeros(size: int) -> Any:
    return field(default=bytes(size))


@dataclass(frozen=True, slots=True)
class Attributes(Structure):
    """ATTRIBUTES (SDM 38.7.1), 16 bytes."""

    LAYOUT: ClassVar[Layout] = Layout("attributes", 16, (("flags", 0, "Q"), ("xfrm", 8, "Q")))

    flags: int
    xfrm: int

    @property
    def debug(self) -> bool:
        """ATTRIBUTES.DEBUG: the host can read and write the enclave's memory."""
        return bool(self.flags & ATTRIBUTE_DEBUG)

    def masked(self, mask: Attributes) -> Attributes:
        """The bits that ``mask`` selects."""
        return Attributes(self.flags & mask.flags, self.xfrm & mask.xfrm)


@dataclass(frozen=True, slots=True)
class SecInfo(Structure):
    """SECINFO (SDM 38.11), 64 bytes."""

    LAYOUT: ClassVar[Layout] = Layout("secinfo", 64, (("flags", 0, "Q"),))

    flags: int


@dataclass(frozen=True, slots=True)
class Secs(Structure):
    """SECS (SDM 38.7), 4096 bytes: what ECREATE takes and EINIT completes."""

    LAYOUT: ClassVar[Layout] = Layout(
        "secs",
        4096,
        (
            ("size", 0, "Q"),
            ("base", 8, "Q"),
            ("ssa_frame_size", 16, "I"),
            ("miscselect", 20, "I"),
            ("cet_attributes", 24, "B"),
            ("cet_legacy_bitmap", 32, "Q"),
            ("cet_leg_bitmap_size", 40, "I"),
            ("attributes", 48, "16s"),
            ("mrenclave", 64, "32s"),
            ("mrsigner", 128, "32s"),
            ("config_id", 192, "64s"),
            ("isv_prod_id", 256, "H"),
            ("isv_svn", 258, "H"),
            ("config_svn", 260, "H"),
        ),
    )

    size: int
    base: int
    ssa_frame_size: int
    miscselect: int
    cet_attributes: int = 0
    cet_legacy_bitmap: int = 0
    cet_leg_bitmap_size: int = 0
    attributes: bytes = _zeros(16)
    mrenclave: bytes = _zeros(32)
    mrsigner: bytes = _zeros(32)
    config_id: bytes = _zeros(64)
    isv_prod_id: int = 0
    isv_svn: int = 0
    config_svn: int = 0


@dataclass(frozen=True, slots=True)
class Tcs(Structure):
    """TCS (SDM 38.8), the 4096-byte page of one enclave thread."""

    LAYOUT: ClassVar[Layout] = Layout(
        "tcs",
        4096,
        (
            ("state", 0, "Q"),
            ("flags", 8, "Q"),
            ("ossa", 16, "Q"),
            ("cssa", 24, "I"),
            ("nssa", 28, "I"),
            ("oentry", 32, "Q"),
            ("aep", 40, "Q"),
            ("ofsbase", 48, "Q"),
            ("ogsbase", 56, "Q"),
            ("fslimit", 64, "I"),
            ("gslimit", 68, "I"),
            ("ocetssa", 72, "Q"),
            ("oprevssp", 80, "Q"),
        ),
    )

    state: int = 0
    flags: int = 0
    ossa: int = 0
    cssa: int = 0
    nssa: int = 1
    oentry: int = 0
    aep: int = 0
    ofsbase: int = 0
    ogsbase: int = 0
    fslimit: int = 0xFFF
    gslimit: int = 0xFFF
    ocetssa: int = 0
    oprevssp: int = 0


#: SIGSTRUCT.HEADER and HEADER2, SDM 38.13.
SIGSTRUCT_HEADER = bytes.fromhex("06000000e10000000000010000000000")
SIGSTRUCT_HEADER2 = bytes.fromhex("01010000600000006000000001000000")


@dataclass(frozen=True, slots=True)
class Sigstruct(Structure):
    """SIGSTRUCT (SDM 38.13), 1808 bytes. Big numbers are little-endian, 384 bytes."""

    LAYOUT: ClassVar[Layout] = Layout(
        "sigstruct",
        1808,
        (
            ("header", 0, "16s"),
            ("vendor", 16, "I"),
            ("date", 20, "I"),
            ("header2", 24, "16s"),
            ("swdefined", 40, "I"),
            ("modulus", 128, "384s"),
            ("exponent", 512, "I"),
            ("signature", 516, "384s"),
            ("miscselect", 900, "I"),
            ("misc_mask", 904, "I"),
            ("cet_attributes", 908, "B"),
            ("cet_attributes_mask", 909, "B"),
            ("isv_family_id", 912, "16s"),
            ("attributes", 928, "16s"),
            ("attribute_mask", 944, "16s"),
            ("enclave_hash", 960, "32s"),
            ("isv_ext_prod_id", 1008, "16s"),
            ("isv_prod_id", 1024, "H"),
            ("isv_svn", 1026, "H"),
            ("q1", 1040, "384s"),
            ("q2", 1424, "384s"),
        ),
        constants={"header": SIGSTRUCT_HEADER, "header2": SIGSTRUCT_HEADER2},
    )

    header: bytes
    vendor: int
    date: int
    header2: bytes
    swdefined: int
    modulus: bytes
    exponent: int
    signature: bytes
    miscselect: int
    misc_mask: int
    cet_attributes: int
    cet_attributes_mask: int
    isv_family_id: bytes
    attributes: bytes
    attribute_mask: bytes
    enclave_hash: bytes
    isv_ext_prod_id: bytes
    isv_prod_id: int
    isv_svn: int
    q1: bytes
    q2: bytes

    def signed_bytes(self) -> bytes:
        """The 256 bytes that the signature covers: offsets 0–127 and 900–1027."""
        whole = self.to_bytes()
        return whole[:128] + whole[900:1028]


@dataclass(frozen=True, slots=True)
class TargetInfo(Structure):
    """TARGETINFO (SDM 38.17), 512 bytes: the enclave that shall be able to verify a report."""

    LAYOUT: ClassVar[Layout] = Layout(
        "targetinfo",
        512,
        (
            ("mrenclave", 0, "32s"),
            ("attributes", 32, "16s"),
            ("cet_attributes", 48, "B"),
            ("config_svn", 50, "H"),
            ("miscselect", 52, "I"),
            ("config_id", 64, "64s"),
        ),
    )

    mrenclave: bytes
    attributes: bytes
    cet_attributes: int = 0
    config_svn: int = 0
    miscselect: int = 0
    config_id: bytes = _zeros(64)


@dataclass(frozen=True, slots=True)
class ReportBody(Structure):
    """The first 384 bytes of a REPORT (SDM 38.15), which are also the body of a quote."""

    LAYOUT: ClassVar[Layout] = Layout(
        "report",
        384,
        (
            ("cpusvn", 0, "16s"),
            ("miscselect", 16, "I"),
            ("cet_attributes", 20, "B"),
            ("isv_ext_prod_id", 32, "16s"),
            ("attributes", 48, "16s"),
            ("mrenclave", 64, "32s"),
            ("mrsigner", 128, "32s"),
            ("config_id", 192, "64s"),
            ("isv_prod_id", 256, "H"),
            ("isv_svn", 258, "H"),
            ("config_svn", 260, "H"),
            ("isv_family_id", 304, "16s"),
            ("report_data", 320, "64s"),
        ),
    )

    cpusvn: bytes
    miscselect: int
    cet_attributes: int
    isv_ext_prod_id: bytes
    attributes: bytes
    mrenclave: bytes
    mrsigner: bytes
    config_id: bytes
    isv_prod_id: int
    isv_svn: int
    config_svn: int
    isv_family_id: bytes
    report_data: bytes

    @property
    def debug(self) -> bool:
        """ATTRIBUTES.DEBUG."""
        return Attributes.from_bytes(self.attributes).debug


@dataclass(frozen=True, slots=True)
class Report(Structure):
    """REPORT (SDM 38.15), 432 bytes: body, KEYID and AES-CMAC."""

    LAYOUT: ClassVar[Layout] = Layout("report", 432, (("body", 0, "384s"), ("key_id", 384, "32s"), ("mac", 416, "16s")))

    body: bytes
    key_id: bytes
    mac: bytes


@dataclass(frozen=True, slots=True)
class KeyRequest(Structure):
    """KEYREQUEST (SDM 38.18), 512 bytes."""

    LAYOUT: ClassVar[Layout] = Layout(
        "keyrequest",
        512,
        (
            ("key_name", 0, "H"),
            ("key_policy", 2, "H"),
            ("isv_svn", 4, "H"),
            ("cet_attributes_mask", 6, "B"),
            ("cpusvn", 8, "16s"),
            ("attribute_mask", 24, "16s"),
            ("key_id", 40, "32s"),
            ("misc_mask", 72, "I"),
            ("config_svn", 76, "H"),
        ),
    )

    key_name: int
    key_policy: int = 0
    isv_svn: int = 0
    cet_attributes_mask: int = 0
    cpusvn: bytes = _zeros(16)
    attribute_mask: bytes = _zeros(16)
    key_id: bytes = _zeros(32)
    misc_mask: int = 0
    config_svn: int = 0
