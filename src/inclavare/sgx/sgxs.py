"""SGXS: an enclave as the stream of blocks that its measurement hashes (Fortanix' rust-sgx, crate ``sgxs``).

A stream is one ECREATE block (64 bytes), then per page an EADD block (64 bytes) and for each chunk of the page that is
not zero or is measured a header (64 bytes: ``EEXTEND``, or ``UNMEASRD`` for contents that are loaded but not measured)
with the chunk's 256 bytes. SHA-256 over a stream without ``UNMEASRD`` blocks is MRENCLAVE. What a SIGSTRUCT says about
attributes is not in it.

Only canonical streams are read: pages in ascending order, none twice, the same for the chunks of a page, nothing
reserved set. Neither reading nor writing holds more than 64 pages.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import BinaryIO

from ..errors import UsageError
from .image import ALL_CHUNKS, CHUNK, EnclaveImage, PageRun
from .measure import EEXTEND, PAGE_BLOCKS, blocks, offsets_of
from .paging import PAGE_SIZE, PT_REG, PT_SS_FIRST, PT_SS_REST, PT_TCS, SECINFO_PT, SECINFO_RWX
from .structs import ATTRIBUTE_MODE64BIT, XFRM_LEGACY, StructureError

UNMEASRD = b"UNMEASRD"
_ECREATE = struct.Struct("<8sIQ44s")
_EADD = struct.Struct("<8sQQ40s")
_CHUNK = struct.Struct("<8sQ48s")
_CHUNKS = PAGE_SIZE // CHUNK
_HEADERS = _EADD.size + _CHUNKS * _CHUNK.size
#: Pages read at once.
_BATCH = 64


@dataclass(frozen=True, slots=True)
class Header:
    """The ECREATE block: SECS.SSAFRAMESIZE in pages and SECS.SIZE in bytes."""

    ssa_frame_size: int
    size: int


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some pages as they stand in the stream.

    It is good until the next one is asked for.

    Attributes:
        run: the pages; if ``packed``, without their contents.
        raw: the blocks that are measured.
        packed: blocks of whole pages, from which the contents can be taken.
    """

    run: PageRun
    raw: bytes | memoryview
    packed: memoryview | None = None

    def contents(self) -> PageRun:
        if self.packed is None:
            return self.run
        return replace(self.run, data=b"".join(_cut(self.run.count, headers=False).unpack(self.packed)))


class Stream:
    """A stream that is being read.

    Args:
        file: read once, from where it stands to its end; need not be seekable.

    Raises:
        StructureError: ``sgx.sgxs.…``: the first block is no ECREATE.
        UsageError: ``sgx.sgxs.unsized``: the stream leaves the enclave's size open.
    """

    def __init__(self, file: BinaryIO) -> None:
        # Every binary file has it, although typing.BinaryIO does not say so.
        self._readinto: Callable[[memoryview], int | None] = file.readinto  # type: ignore[attr-defined]
        self._space = memoryview(bytearray(2 * _BATCH * PAGE_BLOCKS))
        self._buffer = self._space[:0]
        self._passed = 0
        block = bytes(self._take(_ECREATE.size))
        tag, ssa_frame_size, size, reserved = _ECREATE.unpack(block)
        if tag == b"UNSIZED\0":
            raise UsageError(
                "this SGXS stream leaves the enclave's size open",
                id="sgx.sgxs.unsized",
                remedy="have it made for a certain size",
            )
        if tag != b"ECREATE\0":
            raise self._refusal("tag", "does not begin with ECREATE", tag.hex(), b"ECREATE\0".hex())
        if any(reserved):
            raise self._refusal("reserved", "has a reserved byte that is not zero in ECREATE")
        if ssa_frame_size < 1 or size < 2 * PAGE_SIZE or size & (size - 1):
            raise self._refusal(
                "ecreate",
                "describes an enclave that ECREATE refuses",
                f"SIZE {size:#x}, SSAFRAMESIZE {ssa_frame_size}",
                "a power of two from 0x2000 on, and at least 1",
            )
        self.header = Header(ssa_frame_size, size)
        self._ecreate = block

    def runs(self) -> Iterator[PageRun]:
        """The pages, at most 64 at a time, in the stream's order.

        Raises:
            StructureError: ``sgx.sgxs.…``: the stream is not canonical or ends early.
        """
        return (piece.contents() for piece in self._pieces())

    def measure(self, progress: Callable[[int], None] | None = None) -> bytes:
        """MRENCLAVE, 32 bytes, hashed from the stream itself.

        Args:
            progress: called with numbers of bytes of pages that are done.

        Raises:
            StructureError: as :meth:`runs`.
        """
        running = hashlib.sha256(self._ecreate)
        for piece in self._pieces():
            running.update(piece.raw)
            if progress is not None:
                progress(piece.run.count * PAGE_SIZE)
        return running.digest()

    def _pieces(self) -> Iterator[_Piece]:
        last = -PAGE_SIZE
        while self._fill(1):
            offset, flags = self._eadd(last)
            piece = self._whole_pages(offset, flags) or self._page(offset, flags)
            last = piece.run.end - PAGE_SIZE
            yield piece

    def _eadd(self, last: int) -> tuple[int, int]:
        """Look at the EADD block that comes next."""
        self._need(_EADD.size)
        tag, offset, flags, reserved = _EADD.unpack_from(self._buffer)
        if tag != b"EADD\0\0\0\0":
            raise self._refusal("tag", "has another block where a page should begin", tag.hex(), b"EADD\0\0\0\0".hex())
        if any(reserved):
            raise self._refusal("reserved", "has a reserved byte that is not zero in EADD")
        if offset % PAGE_SIZE or offset >= self.header.size:
            raise self._refusal(
                "offset",
                "has a page at an impossible offset",
                f"{offset:#x}",
                f"a multiple of 0x1000 below {self.header.size:#x}",
            )
        if offset <= last:
            raise self._refusal("order", "has a page twice or out of order", f"{offset:#x} after {last:#x}")
        kind = flags & SECINFO_PT
        permissions = flags & SECINFO_RWX
        if (
            flags & ~(SECINFO_PT | SECINFO_RWX)
            or kind not in (PT_TCS, PT_REG, PT_SS_FIRST, PT_SS_REST)
            or (kind == PT_TCS and permissions)
        ):
            raise self._refusal("secinfo", "has a page with impossible SECINFO.FLAGS", f"{flags:#x} at {offset:#x}")
        return offset, flags

    def _whole_pages(self, offset: int, flags: int) -> _Piece | None:
        """As many pages as come next with the same flags, one after the other, each with all chunks of one kind."""
        self._fill(_BATCH * PAGE_BLOCKS)
        count = min(_BATCH, len(self._buffer) // PAGE_BLOCKS, (self.header.size - offset) // PAGE_SIZE)
        tag = bytes(self._buffer[_EADD.size : _EADD.size + 8])
        if not count or tag not in (EEXTEND, UNMEASRD):
            return None
        expected = bytearray(_headers(flags, tag) * count)
        offsets_of(_BATCH, _CHUNKS).fill(memoryview(expected), offset // PAGE_SIZE, count)
        while b"".join(_cut(count, headers=True).unpack_from(self._buffer)) != expected:
            if count == 1:
                return None
            count //= 2
            del expected[count * _HEADERS :]
        packed = self._take(count * PAGE_BLOCKS)
        measured = tag == EEXTEND
        raw = (
            packed if measured else b"".join(packed[at : at + _EADD.size] for at in range(0, len(packed), PAGE_BLOCKS))
        )
        return _Piece(PageRun(offset, flags, count, None, measured), raw, packed)

    def _page(self, offset: int, flags: int) -> _Piece:
        """One page, chunk by chunk."""
        page = bytearray(PAGE_SIZE)
        raw = bytearray(self._take(_EADD.size))
        seen = measured = 0
        while self._fill(8) and bytes(self._buffer[:8]) in (EEXTEND, UNMEASRD):
            self._need(_CHUNK.size + CHUNK)
            tag, at, reserved = _CHUNK.unpack_from(self._buffer)
            if any(reserved):
                raise self._refusal("reserved", "has a reserved byte that is not zero in a chunk's header")
            if at % CHUNK or not offset <= at < offset + PAGE_SIZE:
                raise self._refusal(
                    "offset", "has a chunk at an impossible offset", f"{at:#x} in the page at {offset:#x}"
                )
            bit = 1 << (at - offset) // CHUNK
            if seen >= bit:
                raise self._refusal("order", "has a chunk twice or out of order", f"{at:#x}")
            seen |= bit
            block = self._take(_CHUNK.size + CHUNK)
            page[at - offset : at - offset + CHUNK] = block[_CHUNK.size :]
            if tag == EEXTEND:
                measured |= bit
                raw += block
        run = PageRun(offset, flags, 1, bytes(page) if seen else None, bool(measured), measured or ALL_CHUNKS)
        return _Piece(run, bytes(raw))

    def _fill(self, size: int) -> bool:
        """Have that many bytes in the buffer, if there are so many; whether there are."""
        if len(self._buffer) >= size:
            return True
        left = len(self._buffer)
        self._space[:left] = self._buffer.tobytes()
        while left < size:
            more = self._readinto(self._space[left:])
            if not more:
                break
            left += more
        self._buffer = self._space[:left]
        return left >= size

    def _need(self, size: int) -> None:
        if not self._fill(size):
            raise self._refusal("size", "ends in the middle of a block")

    def _take(self, size: int) -> memoryview:
        self._need(size)
        taken, self._buffer = self._buffer[:size], self._buffer[size:]
        self._passed += size
        return taken

    def _refusal(self, event: str, what: str, found: object = None, expected: object = None) -> StructureError:
        return StructureError(
            f"the SGXS stream {what} (at byte {self._passed})",
            id=f"sgx.sgxs.{event}",
            found=found,
            expected=expected,
        )


def read(
    file: BinaryIO, *, attributes: int = ATTRIBUTE_MODE64BIT, xfrm: int = XFRM_LEGACY, miscselect: int = 0
) -> EnclaveImage:
    """The enclave of a stream; what the stream does not say comes from the caller, who has it from a SIGSTRUCT.

    Raises:
        StructureError, UsageError: as :class:`Stream`.
    """
    stream = Stream(file)
    runs = tuple(_merged(stream.runs()))
    return EnclaveImage(stream.header.size, stream.header.ssa_frame_size, attributes, xfrm, miscselect, runs)


def write(image: EnclaveImage, file: BinaryIO) -> None:
    """Write an enclave as a canonical stream.

    Raises:
        UsageError: ``sgx.sgxs.order``: the image adds pages in another order, which a canonical stream cannot say.
    """
    file.write(_ECREATE.pack(b"ECREATE\0", image.ssa_frame_size, image.size, b""))
    last = 0
    for run in image.runs:
        if run.offset < last:
            raise UsageError(
                "an SGXS stream cannot describe an enclave whose pages are not added in ascending order",
                id="sgx.sgxs.order",
                found=f"{run.offset:#x} after {last - PAGE_SIZE:#x}",
            )
        last = run.end
        if run.measured and run.chunks != ALL_CHUNKS and run.data is not None:
            _write_mixed(run, file)
            continue
        loaded = run if run.measured or run.data is None else replace(run, measured=True, chunks=ALL_CHUNKS)
        for block, _ in blocks(loaded, EEXTEND if run.measured else UNMEASRD):
            file.write(block)


def _write_mixed(run: PageRun, file: BinaryIO) -> None:
    """Pages of which some chunks are measured, and others only loaded."""
    assert run.data is not None
    for number in range(run.count):
        page = bytes(run.data[number * PAGE_SIZE : (number + 1) * PAGE_SIZE])
        offset = run.offset + number * PAGE_SIZE
        file.write(next(blocks(PageRun(offset, run.flags, 1, None, False)))[0])
        for at in range(0, PAGE_SIZE, CHUNK):
            chunk = page[at : at + CHUNK]
            measured = run.chunks >> at // CHUNK & 1
            if measured or any(chunk):
                file.write(_CHUNK.pack(EEXTEND if measured else UNMEASRD, offset + at, b"") + chunk)


def _merged(runs: Iterator[PageRun]) -> Iterator[PageRun]:
    """Consecutive runs that differ in nothing but their contents, as one."""
    group: list[PageRun] = []
    for run in runs:
        if group and not (
            run.offset == group[-1].end
            and (run.flags, run.measured, run.chunks) == (group[0].flags, group[0].measured, group[0].chunks)
            and (run.data is None) == (group[0].data is None)
        ):
            yield _joined(group)
            group = []
        group.append(run)
    if group:
        yield _joined(group)


def _joined(group: list[PageRun]) -> PageRun:
    if len(group) == 1:
        return group[0]
    data = None if group[0].data is None else b"".join(run.data for run in group if run.data is not None)
    return replace(group[0], count=sum(run.count for run in group), data=data)


@lru_cache(maxsize=2 * _BATCH)
def _cut(pages: int, *, headers: bool) -> struct.Struct:
    """Takes the headers, or the chunks, out of blocks of whole pages."""
    return struct.Struct((_page_format("s", "x") if headers else _page_format("x", "s")) * pages)


def _page_format(header: str, chunk: str) -> str:
    first = f"{_EADD.size + _CHUNK.size}{header}{CHUNK}{chunk}"
    return first + f"{_CHUNK.size}{header}{CHUNK}{chunk}" * (_CHUNKS - 1)


@lru_cache(maxsize=8)
def _headers(flags: int, tag: bytes) -> bytes:
    """The headers of a page, with offsets of zero."""
    return _EADD.pack(b"EADD\0\0\0\0", 0, flags, b"") + _CHUNK.pack(tag, 0, b"") * _CHUNKS
