"""The SECS as this processor keeps it in the EPC, and what it keeps elsewhere about an enclave."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import ClassVar

from ....sgx.image import PAGE_SIZE, PageRun
from ....sgx.keys import Identity
from ....sgx.measure import EEXTEND, Measurement
from ....sgx.structs import ATTRIBUTE_INIT, ATTRIBUTE_MODE64BIT, Attributes, Layout, Secs, Structure

_EEXTEND = struct.Struct("<8sQ48x")
#: Where the implementation-defined fields lie, in the part that software sees as reserved (SDM vol. 3D, 38.7).
_INTERNAL = slice(512, 576)


@dataclass(frozen=True, slots=True)
class Internal(Structure):
    """The implementation-defined fields of an SECS, 64 bytes."""

    LAYOUT: ClassVar[Layout] = Layout(
        "internalsecs",
        64,
        (("isv_family_id", 0, "16s"), ("isv_ext_prod_id", 16, "16s"), ("eid", 32, "Q"), ("enclave_context", 40, "Q")),
    )

    isv_family_id: bytes
    isv_ext_prod_id: bytes
    eid: int
    enclave_context: int


@dataclass(frozen=True, slots=True)
class EnclaveSecs:
    """An SECS page of the EPC, read."""

    public: Secs
    internal: Internal

    @classmethod
    def from_page(cls, page: bytes) -> EnclaveSecs:
        """Parse 4096 bytes that this processor wrote."""
        blank = page[: _INTERNAL.start] + bytes(_INTERNAL.stop - _INTERNAL.start) + page[_INTERNAL.stop :]
        return cls(Secs.from_bytes(blank), Internal.from_bytes(page[_INTERNAL]))

    def to_page(self) -> bytes:
        """4096 bytes."""
        page = bytearray(self.public.to_bytes())
        page[_INTERNAL] = self.internal.to_bytes()
        return bytes(page)

    @property
    def eid(self) -> int:
        """The enclave's identifier, never used again."""
        return self.internal.eid

    @property
    def base(self) -> int:
        """SECS.BASEADDR."""
        return self.public.base

    @property
    def elrange(self) -> range:
        """The linear addresses that the enclave owns."""
        return range(self.public.base, self.public.base + self.public.size)

    @property
    def attributes(self) -> Attributes:
        """SECS.ATTRIBUTES."""
        return Attributes.from_bytes(self.public.attributes)

    @property
    def initialised(self) -> bool:
        """ATTRIBUTES.INIT: EINIT has succeeded."""
        return bool(self.attributes.flags & ATTRIBUTE_INIT)

    @property
    def mode64(self) -> bool:
        """ATTRIBUTES.MODE64BIT."""
        return bool(self.attributes.flags & ATTRIBUTE_MODE64BIT)

    @property
    def identity(self) -> Identity:
        """What EREPORT and EGETKEY say about the enclave."""
        public = self.public
        return Identity(
            mrenclave=public.mrenclave,
            mrsigner=public.mrsigner,
            attributes=self.attributes,
            isv_prod_id=public.isv_prod_id,
            isv_svn=public.isv_svn,
            miscselect=public.miscselect,
            cet_attributes=public.cet_attributes,
            config_id=public.config_id,
            config_svn=public.config_svn,
            isv_family_id=self.internal.isv_family_id,
            isv_ext_prod_id=self.internal.isv_ext_prod_id,
        )


class RunningMeasurement(Measurement):
    """MRENCLAVE before EINIT, instruction by instruction: a SHA-256 that goes on."""

    def eadd(self, offset: int, flags: int) -> None:
        """Measure that a page was added at ``offset`` bytes from the base."""
        self.add(PageRun(offset, flags, 1, None, measured=False))

    def eextend(self, offset: int, chunk: bytes) -> None:
        """Measure 256 bytes at ``offset`` bytes from the base."""
        self._hash.update(_EEXTEND.pack(EEXTEND, offset) + chunk)


@dataclass(slots=True)
class EnclaveState:
    """What the processor keeps about an enclave by its EID, so that it outlives the eviction of the SECS page.

    Attributes:
        measurement: SECS.MRENCLAVE before EINIT.
        epoch: the number of completed ETRACKs.
    """

    measurement: RunningMeasurement = field(default_factory=RunningMeasurement)
    epoch: int = 0


assert _INTERNAL.stop - _INTERNAL.start == Internal.LAYOUT.size
assert _INTERNAL.stop <= PAGE_SIZE
