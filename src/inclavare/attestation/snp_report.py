"""ATTESTATION_REPORT of AMD SEV-SNP, byte-exact both ways (AMD 56860, "SEV-SNP Firmware ABI Specification", table 23).

Versions 2 to 5. Parsing is strict: what a version reserves must be zero, in the unsigned part too. It says nothing
about authenticity.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from ..errors import EvidenceError
from ..sgx.structs import Layout, Structure, StructureError
from .claims import SnpTcb

SIZE = 1184
#: What the signature covers.
SIGNED_SIZE = 0x2A0
VERSIONS = (2, 3, 4, 5)
#: ECDSA P-384 with SHA-384.
SIGNATURE_ALGORITHM = 1
SIGNING_KEYS = {0: "vcek", 1: "vlek"}
POLICY_DEBUG = 1 << 19
#: R and S of the signature, little-endian, 72 bytes each, of which P-384 uses 48.
_SCALAR = 72


@dataclass(frozen=True, slots=True)
class SnpReport(Structure):
    """The 1184-byte report. TCB versions are 8 bytes; see :func:`tcb`."""

    LAYOUT: ClassVar[Layout] = Layout(
        "snpreport",
        SIZE,
        (
            ("version", 0x00, "I"),
            ("guest_svn", 0x04, "I"),
            ("policy", 0x08, "Q"),
            ("family_id", 0x10, "16s"),
            ("image_id", 0x20, "16s"),
            ("vmpl", 0x30, "I"),
            ("sig_algo", 0x34, "I"),
            ("current_tcb", 0x38, "8s"),
            ("plat_info", 0x40, "Q"),
            ("key_info", 0x48, "I"),
            ("report_data", 0x50, "64s"),
            ("measurement", 0x90, "48s"),
            ("host_data", 0xC0, "32s"),
            ("id_key_digest", 0xE0, "48s"),
            ("author_key_digest", 0x110, "48s"),
            ("report_id", 0x140, "32s"),
            ("report_id_ma", 0x160, "32s"),
            ("reported_tcb", 0x180, "8s"),
            ("cpuid_fam_id", 0x188, "B"),
            ("cpuid_mod_id", 0x189, "B"),
            ("cpuid_step", 0x18A, "B"),
            ("chip_id", 0x1A0, "64s"),
            ("committed_tcb", 0x1E0, "8s"),
            ("current", 0x1E8, "3s"),
            ("committed", 0x1EC, "3s"),
            ("launch_tcb", 0x1F0, "8s"),
            ("launch_mit_vector", 0x1F8, "Q"),
            ("current_mit_vector", 0x200, "Q"),
            ("signature_r", 0x2A0, f"{_SCALAR}s"),
            ("signature_s", 0x2E8, f"{_SCALAR}s"),
        ),
    )

    version: int
    guest_svn: int
    policy: int
    family_id: bytes
    image_id: bytes
    vmpl: int
    sig_algo: int
    current_tcb: bytes
    plat_info: int
    key_info: int
    report_data: bytes
    measurement: bytes
    host_data: bytes
    id_key_digest: bytes
    author_key_digest: bytes
    report_id: bytes
    report_id_ma: bytes
    reported_tcb: bytes
    cpuid_fam_id: int
    cpuid_mod_id: int
    cpuid_step: int
    chip_id: bytes
    committed_tcb: bytes
    current: bytes
    committed: bytes
    launch_tcb: bytes
    launch_mit_vector: int
    current_mit_vector: int
    signature_r: bytes
    signature_s: bytes

    @property
    def debug(self) -> bool:
        """Whether the guest's policy lets the host read its memory."""
        return bool(self.policy & POLICY_DEBUG)

    @property
    def signing_key(self) -> str:
        """``vcek``, ``vlek`` or another key's number."""
        number = self.key_info >> 2 & 7
        return SIGNING_KEYS.get(number, str(number))

    def signature(self) -> bytes:
        """r‖s, big-endian, 96 bytes; empty if a half is larger than P-384 has."""
        halves = [half[::-1] for half in (self.signature_r, self.signature_s)]
        return b"" if any(any(half[:24]) for half in halves) else b"".join(half[24:] for half in halves)

    def processor(self) -> str | None:
        """``Milan``, ``Genoa`` or ``Turin`` by the processor's family and model; ``None`` if the report is too old.

        Raises:
            EvidenceError: ``evidence.snp.processor``.
        """
        if self.version < 3:
            return None
        family, model = self.cpuid_fam_id, self.cpuid_mod_id
        if family == 0x19 and model <= 0x0F:
            return "Milan"
        if family == 0x19 and (0x10 <= model <= 0x1F or 0xA0 <= model <= 0xAF):
            return "Genoa"
        if family == 0x1A and model <= 0x11:
            return "Turin"
        raise EvidenceError(
            "the report is of a processor that is not known",
            id="evidence.snp.processor",
            found=f"family {family:#x}, model {model:#x}",
            expected="Milan, Genoa or Turin",
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> SnpReport:
        """Parse a report.

        Raises:
            EvidenceError: ``evidence.snp.report``.
        """
        try:
            report = cls(*cls.LAYOUT.unpack(bytes(data)))  # type: ignore[arg-type]
        except StructureError as error:
            raise _malformed(error.message, error.found, error.expected) from None
        if report.version not in VERSIONS:
            raise _malformed("its version is not supported", report.version, "2 to 5")
        later = (
            (3, (report.cpuid_fam_id, report.cpuid_mod_id, report.cpuid_step)),
            (5, (report.launch_mit_vector, report.current_mit_vector)),
        )
        if any(report.version < version and any(values) for version, values in later):
            raise _malformed("it has fields of a later version", f"version {report.version}", None)
        return report

    @classmethod
    def from_json(cls, document: Any) -> SnpReport:
        """The report from the JSON in which Confidential Containers' attesters send it: fields, bytes as number lists.

        Raises:
            EvidenceError: ``evidence.snp.report``.
        """
        try:
            processor = _processor(document)
            values: dict[str, Any] = {}
            for field in fields(cls):
                name = field.name
                if name.startswith("signature_"):
                    values[name] = bytes(document["signature"][name[-1]])
                elif name.endswith("_tcb"):
                    values[name] = pack_tcb(SnpTcb(**document[name]), processor)
                elif name in ("current", "committed"):
                    values[name] = bytes(document[name][part] for part in ("build", "minor", "major"))
                elif name.startswith("cpuid_") or name.endswith("_vector"):
                    values[name] = document.get(name) or 0
                else:
                    value = document[name]
                    values[name] = bytes(value) if isinstance(value, list) else value
            made = cls(**values)
            data = made.to_bytes()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _malformed("its JSON is not understood", f"{type(error).__name__}: {error}", None) from None
        return cls.from_bytes(data)


def is_report(data: bytes) -> bool:
    """Whether these bytes are an SNP report and no quote, whose first four bytes are another number."""
    return len(data) == SIZE and int.from_bytes(data[:4], "little") in VERSIONS


def tcb(data: bytes, processor: str) -> SnpTcb:
    """TCB_VERSION (AMD 56860, 2.2): its 8 bytes are ordered in another way from Turin on.

    Raises:
        EvidenceError: ``evidence.snp.report``: a reserved byte is not zero.
    """
    found = (
        SnpTcb(fmc=data[0], bootloader=data[1], tee=data[2], snp=data[3], microcode=data[7])
        if processor == "Turin"
        else SnpTcb(bootloader=data[0], tee=data[1], snp=data[6], microcode=data[7])
    )
    if pack_tcb(found, processor) != data:
        raise _malformed("a reserved byte of a TCB version is not zero", data.hex(), pack_tcb(found, processor).hex())
    return found


def pack_tcb(value: SnpTcb, processor: str) -> bytes:
    """The 8 bytes of :func:`tcb`.

    Raises:
        ValueError: a part is not 0 to 255.
    """
    if processor == "Turin":
        return bytes((value.fmc or 0, value.bootloader, value.tee, value.snp, 0, 0, 0, value.microcode))
    return bytes((value.bootloader, value.tee, 0, 0, 0, 0, value.snp, value.microcode))


def resigned(report: SnpReport, signature: bytes) -> SnpReport:
    """The report with another signature, r‖s big-endian, 96 bytes."""
    r, s = (signature[at : at + 48][::-1].ljust(_SCALAR, b"\0") for at in (0, 48))
    return replace(report, signature_r=r, signature_s=s)


def _processor(document: dict[str, Any]) -> str:
    family = document.get("cpuid_fam_id")
    if family is not None:
        return "Turin" if family >= 0x1A else "Genoa"
    # A Turin chip's id has 8 bytes; version 2 reports do not name the processor.
    return "Turin" if not any(document["chip_id"][8:]) and any(document["chip_id"]) else "Genoa"


def _malformed(what: str, found: object, expected: object) -> EvidenceError:
    return EvidenceError(
        f"the SEV-SNP report cannot be parsed: {what}",
        id="evidence.snp.report",
        found=found,
        expected=expected,
        remedy="fetch it again; a report has 1184 bytes with nothing around it",
    )
