"""MRENCLAVE, exactly as ECREATE, EADD and EEXTEND compute it (SDM vol. 3D, 38.1.2 and the instructions' pages).

Each instruction feeds 64-byte blocks to one SHA-256. The blocks of a run of zero pages differ from page to page in the
offset only, so they are built many pages at a time by strided copies: a 256 MB heap costs a few milliseconds.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from array import array

from .image import PAGE_SIZE, PT_TCS, SECINFO_R, SECINFO_W, SECINFO_X, EnclaveImage, PageRun

#: EEXTEND measures this many bytes at a time.
CHUNK = 256

_ECREATE = struct.Struct("<8sIQ44x")
_EADD = struct.Struct("<8sQQ40x")
_EEXTEND = struct.Struct("<8sQ48x")
#: Pages whose blocks are built at once: large enough to amortise the calls, small enough to stay in the cache.
_BATCH = 1024


class Measurement:
    """A running MRENCLAVE."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def ecreate(self, ssa_frame_size: int, size: int) -> None:
        """ECREATE: SECS.SSAFRAMESIZE in pages and SECS.SIZE in bytes."""
        self._hash.update(_ECREATE.pack(b"ECREATE\0", ssa_frame_size, size))

    def add(self, run: PageRun) -> None:
        """EADD of each page, followed, if the run is measured, by EEXTEND of its 16 chunks of 256 bytes."""
        flags = effective_flags(run.flags)
        if run.data is None:
            self._add_zeros(run.offset, flags, run.count, run.measured)
        elif run.measured:
            self._add_data(run.offset, flags, run.data)
        else:
            self._add_zeros(run.offset, flags, run.count, False)

    def digest(self) -> bytes:
        """MRENCLAVE so far, 32 bytes."""
        return self._hash.digest()

    def _add_zeros(self, start: int, flags: int, count: int, measured: bool) -> None:
        """Pages whose blocks differ in their offsets only."""
        block = _EADD.pack(b"EADD\0\0\0\0", 0, flags)
        if measured:
            block += (_EEXTEND.pack(b"EEXTEND\0", 0) + bytes(CHUNK)) * (PAGE_SIZE // CHUNK)
        batch = min(count, _BATCH)
        buffer = bytearray(block * batch)
        words = memoryview(buffer).cast("Q")
        stride = len(block) // 8
        for first in range(0, count, batch):
            pages = min(batch, count - first)
            base = start + first * PAGE_SIZE
            used = pages * stride
            words[1:used:stride] = _offsets(base, pages)
            if measured:
                for chunk in range(PAGE_SIZE // CHUNK):
                    at = 8 + chunk * (8 + CHUNK // 8) + 1
                    words[at:used:stride] = _offsets(base + chunk * CHUNK, pages)
            self._hash.update(memoryview(buffer)[: used * 8])

    def _add_data(self, start: int, flags: int, data: bytes) -> None:
        view = memoryview(data)
        for at in range(0, len(data), PAGE_SIZE):
            parts: list[bytes | memoryview] = [_EADD.pack(b"EADD\0\0\0\0", start + at, flags)]
            for chunk in range(at, at + PAGE_SIZE, CHUNK):
                parts.append(_EEXTEND.pack(b"EEXTEND\0", start + chunk))
                parts.append(view[chunk : chunk + CHUNK])
            self._hash.update(b"".join(parts))


def effective_flags(flags: int) -> int:
    """SECINFO.FLAGS as EADD measures them: it clears R, W and X of a TCS page (SDM, EADD)."""
    if flags & (0xFF << 8) == PT_TCS:
        return flags & ~(SECINFO_R | SECINFO_W | SECINFO_X)
    return flags


def measure(image: EnclaveImage) -> bytes:
    """MRENCLAVE of a whole image, 32 bytes."""
    running = Measurement()
    running.ecreate(image.ssa_frame_size, image.size)
    for run in image.runs:
        running.add(run)
    return running.digest()


def _offsets(base: int, pages: int) -> memoryview:
    values = array("Q", range(base, base + pages * PAGE_SIZE, PAGE_SIZE))
    if sys.byteorder == "big":
        values.byteswap()
    return memoryview(values)
