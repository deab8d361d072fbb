"""MRENCLAVE against an independent computation written straight from the SDM, and against a real enclave."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from inclavare.sgx import measure as measure_module
from inclavare.sgx.image import PAGE_SIZE, PT_REG, PT_TCS, SECINFO_R, SECINFO_W, SECINFO_X, EnclaveImage, PageRun
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
        runs.append(PageRun(at, flags, count, data, draw(st.booleans())))
        at += count * PAGE_SIZE
    return EnclaveImage(1 << 20, draw(st.integers(1, 4)), 4, 3, 0, tuple(runs))


@settings(max_examples=60, deadline=None)
@given(images())
def test_agrees_with_the_manual(image: EnclaveImage) -> None:
    assert measure(image) == by_the_manual(image)


def test_agrees_across_batches() -> None:
    pages = 2 * measure_module._BATCH + 3
    for measured in (False, True):
        image = EnclaveImage(1 << 24, 1, 4, 3, 0, (PageRun(PAGE_SIZE, RW, pages, None, measured),))
        assert measure(image) == by_the_manual(image)


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
