"""EPCM: what the processor knows about each page of the EPC (SDM vol. 3D, 38.20)."""

from __future__ import annotations

from dataclasses import dataclass

from ....sgx.paging import (
    PT_REG,
    PT_SECS,
    PT_SS_FIRST,
    PT_SS_REST,
    PT_TCS,
    PT_TRIM,
    SECINFO_MODIFIED,
    SECINFO_PENDING,
    SECINFO_PR,
    SECINFO_PT,
    SECINFO_R,
    SECINFO_W,
    SECINFO_X,
)

#: Pages that belong to an enclave.
CHILD_TYPES = frozenset((PT_REG, PT_TCS, PT_TRIM, PT_SS_FIRST, PT_SS_REST))


@dataclass(slots=True)
class EpcmEntry:
    """One entry; ``pt`` is the page type as in SECINFO.FLAGS.

    Attributes:
        enclave_secs: number of the EPC page that holds the SECS of the page's enclave; ``None`` for SECS and VA pages.
        enclave_address: the only linear address at which the enclave may access the page.
        epoch: the enclave's tracking epoch when the page was last blocked or restricted; ``None`` if never.
    """

    valid: bool = False
    pt: int = PT_SECS
    r: bool = False
    w: bool = False
    x: bool = False
    enclave_secs: int | None = None
    enclave_address: int = 0
    blocked: bool = False
    pending: bool = False
    modified: bool = False
    pr: bool = False
    epoch: int | None = None

    @classmethod
    def from_flags(cls, flags: int, *, enclave_secs: int | None, enclave_address: int) -> EpcmEntry:
        """A valid entry with the permissions, state and type of SECINFO.FLAGS."""
        return cls(
            valid=True,
            pt=flags & SECINFO_PT,
            r=bool(flags & SECINFO_R),
            w=bool(flags & SECINFO_W),
            x=bool(flags & SECINFO_X),
            enclave_secs=enclave_secs,
            enclave_address=enclave_address,
            pending=bool(flags & SECINFO_PENDING),
            modified=bool(flags & SECINFO_MODIFIED),
            pr=bool(flags & SECINFO_PR),
        )

    @property
    def flags(self) -> int:
        """Permissions, state and type as SECINFO.FLAGS."""
        return (
            self.pt
            | self.r * SECINFO_R
            | self.w * SECINFO_W
            | self.x * SECINFO_X
            | self.pending * SECINFO_PENDING
            | self.modified * SECINFO_MODIFIED
            | self.pr * SECINFO_PR
        )

    @property
    def is_child(self) -> bool:
        """Whether the page belongs to an enclave."""
        return self.valid and self.pt in CHILD_TYPES
