"""EINITTOKEN: a launch enclave's permission to initialise another enclave (SDM vol. 3D, 38.14)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .structs import Layout, Structure

#: The MAC covers this many bytes from the token's start.
EINITTOKEN_MACED_SIZE = 192
EINITTOKEN_VALID = 1 << 0


@dataclass(frozen=True, slots=True)
class EinitToken(Structure):
    """EINITTOKEN, 304 bytes, aligned to 512. All zero where IA32_SGXLEPUBKEYHASH holds the enclave's MRSIGNER.

    Fields whose names end in ``_le`` are the launch enclave's own: with them EGETKEY finds the launch key again.
    """

    LAYOUT: ClassVar[Layout] = Layout(
        "einittoken",
        304,
        (
            ("valid", 0, "I"),
            ("attributes", 48, "16s"),
            ("mrenclave", 64, "32s"),
            ("mrsigner", 128, "32s"),
            ("cpusvn_le", 192, "16s"),
            ("isv_prod_id_le", 208, "H"),
            ("isv_svn_le", 210, "H"),
            ("cet_masked_attributes_le", 212, "B"),
            ("masked_miscselect_le", 236, "I"),
            ("masked_attributes_le", 240, "16s"),
            ("key_id", 256, "32s"),
            ("mac", 288, "16s"),
        ),
    )

    valid: int = 0
    attributes: bytes = bytes(16)
    mrenclave: bytes = bytes(32)
    mrsigner: bytes = bytes(32)
    cpusvn_le: bytes = bytes(16)
    isv_prod_id_le: int = 0
    isv_svn_le: int = 0
    cet_masked_attributes_le: int = 0
    masked_miscselect_le: int = 0
    masked_attributes_le: bytes = bytes(16)
    key_id: bytes = bytes(32)
    mac: bytes = bytes(16)

    def maced_bytes(self) -> bytes:
        """The 192 bytes that the MAC covers."""
        return self.to_bytes()[:EINITTOKEN_MACED_SIZE]
