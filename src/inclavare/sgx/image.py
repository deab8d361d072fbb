"""An enclave image: the pages that ECREATE, EADD and EEXTEND put into the EPC, as data.

Pages are held in runs, so that a gigabyte of zero heap costs a few bytes here and one vectorised hash call when it is
measured (see :mod:`inclavare.sgx.measure`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from ..errors import IntegrityError
from .paging import PAGE_SIZE, PT_REG, PT_SECS, PT_TCS, SECINFO_R, SECINFO_W, SECINFO_X

__all__ = [
    "ALL_CHUNKS",
    "CHUNK",
    "PAGE_SIZE",
    "PT_REG",
    "PT_SECS",
    "PT_TCS",
    "SECINFO_R",
    "SECINFO_W",
    "SECINFO_X",
    "EnclaveImage",
    "PageRun",
    "read_pages",
]

#: EEXTEND measures this many bytes at a time.
CHUNK = 256
ALL_CHUNKS = (1 << PAGE_SIZE // CHUNK) - 1


@dataclass(frozen=True, slots=True)
class PageRun:
    """Consecutive pages with the same SECINFO.

    Attributes:
        offset: offset in bytes of the first page from the enclave's base, a multiple of 4096.
        flags: SECINFO.FLAGS, 8 bytes little-endian in the measurement.
        count: number of 4096-byte pages.
        data: ``count * 4096`` bytes, or a view of as many (of an ``mmap``, for example), or ``None`` for zero pages.
        measured: whether the contents are measured with EEXTEND (16 chunks of 256 bytes a page).
        chunks: of a measured run, the chunks of each page that EEXTEND measures, as bits; nearly always all.
    """

    offset: int
    flags: int
    count: int
    data: bytes | memoryview | None = None
    measured: bool = True
    chunks: int = ALL_CHUNKS

    def __post_init__(self) -> None:
        if self.offset % PAGE_SIZE or self.offset < 0 or self.count < 1:
            raise ValueError(f"page run at {self.offset:#x} with {self.count} pages is not page-aligned and non-empty")
        if self.data is not None and len(self.data) != self.count * PAGE_SIZE:
            raise ValueError(f"page run at {self.offset:#x}: {len(self.data)} bytes for {self.count} pages")
        if not 0 < self.chunks <= ALL_CHUNKS:
            raise ValueError(f"page run at {self.offset:#x}: {self.chunks:#x} are no chunks of a page")

    @property
    def end(self) -> int:
        """Offset in bytes just past the run."""
        return self.offset + self.count * PAGE_SIZE


@dataclass(frozen=True, slots=True)
class EnclaveImage:
    """What is loaded, in the order in which it is added.

    Attributes:
        size: SECS.SIZE in bytes, a power of two.
        ssa_frame_size: SECS.SSAFRAMESIZE in pages.
        attributes: SECS.ATTRIBUTES.FLAGS (bit 1 DEBUG, bit 2 MODE64BIT), without INIT.
        xfrm: SECS.ATTRIBUTES.XFRM.
        miscselect: SECS.MISCSELECT.
        runs: the pages.
    """

    size: int
    ssa_frame_size: int
    attributes: int
    xfrm: int
    miscselect: int
    runs: tuple[PageRun, ...]

    @property
    def page_count(self) -> int:
        """EPC pages that the image occupies, its SECS page included."""
        return 1 + sum(run.count for run in self.runs)


def read_pages(source: BinaryIO, offset: int, flags: int, count: int, *, measured: bool = True) -> Iterator[PageRun]:
    """Pages whose contents a file holds, as runs of at most 64 pages, so that memory stays flat.

    Args:
        source: read from where it stands; ``count * 4096`` bytes.
        offset: of the first page from the enclave's base, in bytes.

    Raises:
        IntegrityError: ``sgx.image.truncated``: the file ends early.
    """
    end = offset + count * PAGE_SIZE
    while offset < end:
        pages = min(64, (end - offset) // PAGE_SIZE)
        data = source.read(pages * PAGE_SIZE)
        if len(data) != pages * PAGE_SIZE:
            raise IntegrityError(
                "the file ends before the enclave's last page",
                id="sgx.image.truncated",
                found=f"{len(data)} bytes for the pages from offset {offset:#x}",
                expected=f"{pages * PAGE_SIZE} bytes",
            )
        yield PageRun(offset, flags, pages, data, measured)
        offset += pages * PAGE_SIZE
