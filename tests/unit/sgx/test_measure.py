"""MRENCLAVE against an independent computation written straight from the SDM, and against a real enclave."""

from __future__ import annotations

import hashlib
import io
import mmap
import struct
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inclavare.errors import IntegrityError
from inclavare.sgx import measure as measure_module
from inclavare.sgx.image import (
    PAGE_SIZE,
    PT_REG,
    PT_TCS,
    SECINFO_R,
    SECINFO_W,
    SECINFO_X,
    EnclaveImage,
    PageRun,
    read_pages,
)
from inclavare.sgx.measure import Measurement, measure
from inclavare.sgx.structs import Sigstruct

RW = PT_REG | SECINFO_R | SECINFO_W


def by_the_manual(image: EnclaveImage) -> bytes:
    """SDM, ECREATE, EADD and EEXTEND: one 64-byte update after the other."""
    state = hashlib.sha256()
    state.update(b"ECREATE\0" + struct.pack("<I", image.ssa_frame_size) + struct.pack("<Q", image.size) + b"\0" * 44)
    for run in image.runs:
        for number in range(run.count):
            offset = run.offset + number * 4096
            flags = run.flags & ~7 if run.flags >> 8 & 0xFF == 1 else run.flags
            secinfo = struct.pack("<Q", flags) + b"\0" * 40
            state.update(b"EADD\0\0\0\0" + struct.pack("<Q", offset) + secinfo)
            if not run.measured:
                continue
            page = b"\0" * 4096 if run.data is None else run.data[number * 4096 : number * 4096 + 4096]
            for chunk in range(0, 4096, 256):
                if not run.chunks & 1 << chunk // 256:
                    continue
                state.update(b"EEXTEND\0" + struct.pack("<Q", offset + chunk) + b"\0" * 48)
                for part in range(0, 256, 64):
                    state.update(page[chunk + part : chunk + part + 64])
    return state.digest()


@st.composite
def images(draw: st.DrawFn) -> EnclaveImage:
    runs, at = [], 0
    for _ in range(draw(st.integers(1, 4))):
        at += draw(st.integers(0, 3)) * PAGE_SIZE
        count = draw(st.integers(1, 5))
        seed = draw(st.one_of(st.none(), st.binary(min_size=1, max_size=8)))
        data = None if seed is None else hashlib.shake_128(seed).digest(count * PAGE_SIZE)
        flags = draw(st.sampled_from([RW, PT_REG | SECINFO_R | SECINFO_X, PT_TCS, PT_TCS | SECINFO_R]))
        chunks = draw(st.sampled_from([0xFFFF, 0xFFFF, 0x8001, 0x7FFE]))
        runs.append(PageRun(at, flags, count, data, draw(st.booleans()), chunks))
        at += count * PAGE_SIZE
    return EnclaveImage(1 << 20, draw(st.integers(1, 4)), 4, 3, 0, tuple(runs))


@settings(max_examples=60, deadline=None)
@given(images())
def test_agrees_with_the_manual(image: EnclaveImage) -> None:
    assert measure(image) == by_the_manual(image)


def test_agrees_across_batches() -> None:
    for measured, batch in ((False, measure_module._BATCH_UNMEASURED), (True, measure_module._BATCH)):
        pages = 2 * batch + 3
        for data in (None, hashlib.shake_128(b"pages").digest(pages * PAGE_SIZE)):
            image = EnclaveImage(1 << 24, 1, 4, 3, 0, (PageRun(PAGE_SIZE, RW, pages, data, measured),))
            assert measure(image) == by_the_manual(image)


def test_offsets_beyond_32_bits() -> None:
    image = EnclaveImage(1 << 40, 1, 4, 3, 0, (PageRun((1 << 32) - 2 * PAGE_SIZE, RW, 4, b"x" * 4 * PAGE_SIZE),))
    assert measure(image) == by_the_manual(image)


def test_contents_may_be_a_view_or_come_from_a_file(tmp_path: Path) -> None:
    data = hashlib.shake_128(b"file").digest(300 * PAGE_SIZE)
    image = EnclaveImage(1 << 24, 1, 4, 3, 0, (PageRun(PAGE_SIZE, RW, 300, data),))
    (tmp_path / "pages").write_bytes(data)
    with (tmp_path / "pages").open("rb") as file:
        mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        running = Measurement()
        running.ecreate(1, 1 << 24)
        running.add_all(read_pages(file, PAGE_SIZE, RW, 300))
    view = EnclaveImage(1 << 24, 1, 4, 3, 0, (PageRun(PAGE_SIZE, RW, 300, mapped),))
    assert running.digest() == measure(view) == by_the_manual(image)


def test_a_file_that_ends_early_is_refused() -> None:
    with pytest.raises(IntegrityError) as refusal:
        list(read_pages(io.BytesIO(b"x" * (3 * PAGE_SIZE - 1)), 0, RW, 3))
    assert refusal.value.id == "sgx.image.truncated"


def test_memory_stays_flat() -> None:
    """64 MiB of pages, every one measured, in less than 4 MiB."""

    class Zeros(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            return bytes(size)

    tracemalloc.start()
    try:
        running = Measurement()
        running.add_all(read_pages(Zeros(), 0, RW, 16384))  # type: ignore[arg-type]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20
    expected = Measurement()
    expected.add(PageRun(0, RW, 16384))
    assert running.digest() == expected.digest()


def test_progress_counts_every_byte() -> None:
    done: list[int] = []
    image = EnclaveImage(1 << 24, 1, 4, 3, 0, (PageRun(0, RW, 1500), PageRun(1 << 23, RW, 1, b"a" * PAGE_SIZE)))
    assert measure(image, done.append) == measure(image)
    assert sum(done) == 1501 * PAGE_SIZE and len(done) > 2


def test_splitting_a_run_changes_nothing() -> None:
    whole = EnclaveImage(1 << 20, 1, 4, 3, 0, (PageRun(0, RW, 9),))
    split = EnclaveImage(1 << 20, 1, 4, 3, 0, (PageRun(0, RW, 4), PageRun(4 * PAGE_SIZE, RW, 5)))
    assert measure(whole) == measure(split)


def test_everything_that_the_loader_could_change_is_measured() -> None:
    base = EnclaveImage(1 << 20, 1, 4, 3, 0, (PageRun(0, RW, 2, b"a" * 2 * PAGE_SIZE), PageRun(4 * PAGE_SIZE, RW, 1)))
    first, second = base.runs
    variants = [
        EnclaveImage(1 << 21, 1, 4, 3, 0, base.runs),
        EnclaveImage(1 << 20, 2, 4, 3, 0, base.runs),
        EnclaveImage(1 << 20, 1, 4, 3, 0, (second, first)),
        EnclaveImage(1 << 20, 1, 4, 3, 0, (first,)),
        EnclaveImage(1 << 20, 1, 4, 3, 0, (first, PageRun(5 * PAGE_SIZE, RW, 1))),
        EnclaveImage(1 << 20, 1, 4, 3, 0, (first, PageRun(4 * PAGE_SIZE, RW, 1, None, False))),
        EnclaveImage(1 << 20, 1, 4, 3, 0, (first, PageRun(4 * PAGE_SIZE, RW | SECINFO_X, 1))),
        EnclaveImage(1 << 20, 1, 4, 3, 0, (PageRun(0, RW, 2, b"a" * (2 * PAGE_SIZE - 1) + b"b"), second)),
    ]
    assert len({measure(image) for image in (base, *variants)}) == len(variants) + 1


def test_real_enclave_stream(vectors: Path) -> None:
    """An SGXS stream is the very input of the measurement: replay it, page by page, through ours."""
    stream = (vectors / "measure" / "fortanix_test_enclave.sgxs").read_bytes()
    signed = Sigstruct.from_bytes((vectors / "measure" / "fortanix_test_enclave.sig").read_bytes())
    assert hashlib.sha256(stream).digest() == signed.enclave_hash
    assert signed.enclave_hash.hex().startswith("784acfd7") and signed.enclave_hash.hex().endswith("98fc")
    assert measure(image_of(stream)) == signed.enclave_hash


def image_of(stream: bytes) -> EnclaveImage:
    """The enclave image that an SGXS stream describes, provided that each page is measured whole or not at all."""
    assert stream[:8] == b"ECREATE\0"
    ssa_frame_size, size = struct.unpack_from("<IQ", stream, 8)
    runs, at = [], 64
    while at < len(stream):
        assert stream[at : at + 8] == b"EADD\0\0\0\0"
        offset, flags = struct.unpack_from("<QQ", stream, at + 8)
        at += 64
        chunks = []
        while stream[at : at + 8] == b"EEXTEND\0":
            chunks.append(stream[at + 64 : at + 64 + 256])
            at += 64 + 256
        assert len(chunks) in (0, 16)
        runs.append(PageRun(offset, flags, 1, b"".join(chunks) or None, bool(chunks)))
    return EnclaveImage(size, ssa_frame_size, 4, 3, 0, tuple(runs))


def test_running_digest_can_be_read_in_between() -> None:
    running = Measurement()
    running.ecreate(1, 1 << 20)
    before = running.digest()
    running.add(PageRun(0, RW, 1))
    assert running.digest() != before
