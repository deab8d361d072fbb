"""MRENCLAVE, exactly as ECREATE, EADD and EEXTEND compute it (SDM vol. 3D, 38.1.2 and the instructions' pages).

Each instruction feeds 64-byte blocks to one SHA-256: 5184 bytes for a measured page of 4096. They are built many pages
at a time by calls that loop in C: ``join`` leaves the gaps for the headers, strided copies fill in the offsets. A
second thread that builds while the first one hashes was tried, and did not pay on a machine with two busy cores.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Iterator
from functools import cache, lru_cache

from .image import ALL_CHUNKS, CHUNK, PAGE_SIZE, PT_TCS, SECINFO_R, SECINFO_W, SECINFO_X, EnclaveImage, PageRun

EEXTEND = b"EEXTEND\0"
_ECREATE = struct.Struct("<8sIQ44x")
_EADD = struct.Struct("<8sQQ40x")
_EEXTEND = struct.Struct("<8sQ48x")
_CHUNKS = PAGE_SIZE // CHUNK
#: Bytes that are hashed for a page that is measured whole.
PAGE_BLOCKS = _EADD.size + _CHUNKS * (_EEXTEND.size + CHUNK)
#: Pages whose blocks are built at once: large enough to amortise the calls, small enough to stay in the cache.
_BATCH = 32
_BATCH_UNMEASURED = 1024


class Measurement:
    """A running MRENCLAVE."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def ecreate(self, ssa_frame_size: int, size: int) -> None:
        """ECREATE: SECS.SSAFRAMESIZE in pages and SECS.SIZE in bytes."""
        self._hash.update(_ECREATE.pack(b"ECREATE\0", ssa_frame_size, size))

    def add(self, run: PageRun) -> None:
        """EADD of each page, followed, if the run is measured, by EEXTEND of its 16 chunks of 256 bytes."""
        self.add_all((run,))

    def add_all(self, runs: Iterable[PageRun], progress: Callable[[int], None] | None = None) -> None:
        """Add runs one after the other; of an iterator, never more than one is held.

        Args:
            progress: called with numbers of bytes of pages that are done.
        """
        for run in runs:
            for block, size in blocks(run):
                self._hash.update(block)
                if progress is not None:
                    progress(size)

    def digest(self) -> bytes:
        """MRENCLAVE so far, 32 bytes."""
        return self._hash.digest()


def effective_flags(flags: int) -> int:
    """SECINFO.FLAGS as EADD measures them: it clears R, W and X of a TCS page (SDM, EADD)."""
    if flags & (0xFF << 8) == PT_TCS:
        return flags & ~(SECINFO_R | SECINFO_W | SECINFO_X)
    return flags


def measure(image: EnclaveImage, progress: Callable[[int], None] | None = None) -> bytes:
    """MRENCLAVE of a whole image, 32 bytes; ``progress`` is told numbers of bytes of pages that are done."""
    running = Measurement()
    running.ecreate(image.ssa_frame_size, image.size)
    running.add_all(image.runs, progress)
    return running.digest()


def blocks(run: PageRun, tag: bytes = EEXTEND) -> Iterator[tuple[memoryview, int]]:
    """What is hashed for a run, piece by piece, each with the number of bytes of the pages that it stands for.

    A piece is good until the next one is asked for.

    Args:
        tag: what each chunk of 256 bytes begins with; an SGXS stream has more than the processor's own.
    """
    flags = effective_flags(run.flags)
    if run.measured and run.chunks != ALL_CHUNKS:
        yield from _partial_blocks(run, flags, tag)
        return
    batch = min(run.count, _BATCH if run.measured else _BATCH_UNMEASURED)
    offsets = offsets_of(_BATCH, _CHUNKS) if run.measured else offsets_of(_BATCH_UNMEASURED, 1)
    build = (
        _data_block(run, flags, tag) if run.measured and run.data is not None else _zero_block(run, flags, tag, batch)
    )
    for first in range(0, run.count, batch):
        pages = min(batch, run.count - first)
        block = build(first, pages)
        offsets.fill(block, run.offset // PAGE_SIZE + first, pages)
        yield block, pages * PAGE_SIZE


def _partial_blocks(run: PageRun, flags: int, tag: bytes) -> Iterator[tuple[memoryview, int]]:
    zeros = bytes(PAGE_SIZE)
    for at in range(0, run.count * PAGE_SIZE, PAGE_SIZE):
        page = zeros if run.data is None else run.data[at : at + PAGE_SIZE]
        parts = [_EADD.pack(b"EADD\0\0\0\0", run.offset + at, flags)]
        for chunk in range(0, PAGE_SIZE, CHUNK):
            if run.chunks >> chunk // CHUNK & 1:
                parts += [_EEXTEND.pack(tag, run.offset + at + chunk), bytes(page[chunk : chunk + CHUNK])]
        yield memoryview(b"".join(parts)), PAGE_SIZE


def _zero_block(run: PageRun, flags: int, tag: bytes, batch: int) -> Callable[[int, int], memoryview]:
    """Blocks that differ from page to page in their offsets only, in one buffer."""
    block = _EADD.pack(b"EADD\0\0\0\0", 0, flags)
    if run.measured:
        block += (_EEXTEND.pack(tag, 0) + bytes(CHUNK)) * _CHUNKS
    buffer = memoryview(bytearray(block * batch))
    return lambda first, pages: buffer[: pages * len(block)]


def _data_block(run: PageRun, flags: int, tag: bytes) -> Callable[[int, int], memoryview]:
    """Blocks between whose headers the chunks of the pages lie."""
    assert run.data is not None
    data = run.data
    header = bytearray(_EEXTEND.pack(tag, 0))
    eadd = memoryview(_EADD.pack(b"EADD\0\0\0\0", 0, flags) * _BATCH).cast("Q")

    def build(first: int, pages: int) -> memoryview:
        block = memoryview(header.join(_chunks(pages).unpack_from(data, first * PAGE_SIZE)))
        words = block.cast("Q")
        for word in (0, 2):
            words[word :: PAGE_BLOCKS // 8] = eadd[word : pages * 8 : 8]
        return block

    return build


@lru_cache(maxsize=_BATCH)
def _chunks(pages: int) -> struct.Struct:
    """Cuts pages into chunks, with two gaps before each page's first one: empty strings stand where EADD goes."""
    return struct.Struct("0s" + ("0s" + f"{CHUNK}s" * _CHUNKS) * pages)


class Offsets:
    """The offsets in the headers of a batch of pages.

    All of them grow by the same amount from batch to batch, so they are the digits of one large number (in base 2⁶⁴):
    an addition costs a quarter of counting.

    Args:
        batch: most pages at once.
        chunks: per page, 16 or 1 (EADD only).
    """

    def __init__(self, batch: int, chunks: int) -> None:
        count = batch * chunks
        self._first = int.from_bytes(
            struct.pack(f"<{count}Q", *range(0, batch * PAGE_SIZE, PAGE_SIZE // chunks)), "little"
        )
        self._ones = int.from_bytes(b"\1\0\0\0\0\0\0\0" * count, "little")
        self._size = count * 8
        self._chunks = chunks

    def fill(self, block: memoryview, page: int, pages: int) -> None:
        """Write the offsets of ``pages`` pages, from that page of the enclave on, into headers that lie evenly."""
        digits = (self._first + self._ones * (page * PAGE_SIZE)).to_bytes(self._size, "little")
        offsets = memoryview(digits).cast("Q")[: pages * self._chunks]
        words = block.cast("Q")
        stride = len(words) // pages
        words[1::stride] = offsets[:: self._chunks]
        if self._chunks > 1:
            eadd = _EADD.size // 8
            for chunk in range(self._chunks):
                words[eadd + chunk * (stride - eadd) // self._chunks + 1 :: stride] = offsets[chunk :: self._chunks]


#: Offsets for batches of that size, made once.
offsets_of = cache(Offsets)
