"""SGXS streams: others' enclaves, round trips, and every way in which a stream can be wrong."""

from __future__ import annotations

import hashlib
import io
import struct
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inclavare.errors import InclavareError, UsageError
from inclavare.sgx import sgxs
from inclavare.sgx.image import PAGE_SIZE, PT_REG, PT_TCS, SECINFO_R, SECINFO_W, EnclaveImage, PageRun
from inclavare.sgx.measure import measure
from inclavare.sgx.structs import Sigstruct, StructureError

RW = PT_REG | SECINFO_R | SECINFO_W
ECREATE = b"ECREATE\0" + struct.pack("<IQ", 1, 1 << 20) + bytes(44)


def eadd(offset: int, flags: int = RW) -> bytes:
    return b"EADD\0\0\0\0" + struct.pack("<QQ", offset, flags) + bytes(40)


def chunk(offset: int, tag: bytes = b"EEXTEND\0", fill: bytes = b"c") -> bytes:
    return tag + struct.pack("<Q", offset) + bytes(48) + fill * 256


def page(offset: int, flags: int = RW, tag: bytes = b"EEXTEND\0") -> bytes:
    return eadd(offset, flags) + b"".join(chunk(offset + at, tag) for at in range(0, 4096, 256))


@st.composite
def images(draw: st.DrawFn) -> EnclaveImage:
    runs, at = [], 0
    for _ in range(draw(st.integers(0, 4))):
        at += draw(st.integers(0, 3)) * PAGE_SIZE
        count = draw(st.integers(1, 70))
        seed = draw(st.one_of(st.none(), st.binary(min_size=1, max_size=8)))
        measured = draw(st.booleans())
        # A chunk that is measured is in the stream even if it is zero, and then it is not told apart from data.
        data = None if seed is None and not measured else hashlib.shake_128(seed or b"").digest(count * PAGE_SIZE)
        chunks = draw(st.sampled_from([0xFFFF, 0x8001])) if measured else 0xFFFF
        runs.append(PageRun(at, draw(st.sampled_from([RW, PT_TCS])), count, data, measured, chunks))
        at += count * PAGE_SIZE
    return EnclaveImage(1 << 21, draw(st.integers(1, 4)), 4, 3, 0, tuple(runs))


def written(image: EnclaveImage) -> bytes:
    out = io.BytesIO()
    sgxs.write(image, out)
    return out.getvalue()


@settings(max_examples=40, deadline=None)
@given(images())
def test_written_streams_are_read_to_the_same_enclave(image: EnclaveImage) -> None:
    stream = written(image)
    again = sgxs.read(io.BytesIO(stream))
    assert measure(again) == measure(image) == sgxs.Stream(io.BytesIO(stream)).measure()
    assert contents(again) == contents(image)
    assert written(again) == stream


def contents(image: EnclaveImage) -> dict[int, tuple[int, bytes]]:
    pages = {}
    for run in image.runs:
        for number in range(run.count):
            data = bytes(4096) if run.data is None else bytes(run.data[number * 4096 : number * 4096 + 4096])
            pages[run.offset + number * 4096] = (run.flags, data)
    return pages


@settings(max_examples=60, deadline=None)
@given(images(), st.data())
def test_damage_is_refused_or_measured(image: EnclaveImage, data: st.DataObject) -> None:
    """Whatever byte changes: the stream is refused, or its MRENCLAVE is another, or the byte is of no measured chunk."""
    stream = bytearray(written(image))
    at = data.draw(st.integers(0, len(stream) - 1))
    stream[at] ^= 1 << data.draw(st.integers(0, 7))
    try:
        changed = sgxs.read(io.BytesIO(bytes(stream)))
    except InclavareError as refusal:
        assert refusal.id.startswith("sgx.sgxs.")
        return
    assert sgxs.Stream(io.BytesIO(bytes(stream))).measure() == measure(changed)
    if measure(changed) == measure(image):
        assert contents(changed) != contents(image)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([ECREATE, eadd(0), eadd(4096), chunk(0), chunk(256), b"x" * 64, page(8192)]), max_size=6)
)
def test_any_sequence_of_blocks_is_read_or_refused(blocks: list[bytes]) -> None:
    stream = b"".join(blocks)
    try:
        image = sgxs.read(io.BytesIO(stream))
    except StructureError:
        return
    assert stream[:64] == ECREATE and hashlib.sha256(stream).digest() == measure(image)


@pytest.mark.parametrize(
    ("stream", "event"),
    [
        (b"", "size"),
        (ECREATE[:63], "size"),
        (page(0), "tag"),
        (ECREATE + ECREATE, "tag"),
        (ECREATE + chunk(0), "tag"),
        (ECREATE[:-1] + b"\1", "reserved"),
        (b"ECREATE\0" + struct.pack("<IQ", 0, 1 << 20) + bytes(44), "ecreate"),
        (b"ECREATE\0" + struct.pack("<IQ", 1, 3 << 20) + bytes(44), "ecreate"),
        (b"ECREATE\0" + struct.pack("<IQ", 1, 4096) + bytes(44), "ecreate"),
        (ECREATE + eadd(0)[:-1], "size"),
        (ECREATE + eadd(0)[:-1] + b"\1", "reserved"),
        (ECREATE + eadd(256), "offset"),
        (ECREATE + eadd(1 << 20), "offset"),
        (ECREATE + eadd(4096) + eadd(4096), "order"),
        (ECREATE + page(4096) + page(0), "order"),
        (ECREATE + page(0) + page(0), "order"),
        (ECREATE + eadd(0, RW | 8), "secinfo"),
        (ECREATE + eadd(0, 0x003), "secinfo"),
        (ECREATE + eadd(0, PT_TCS | SECINFO_R), "secinfo"),
        (ECREATE + eadd(0, RW | 1 << 16), "secinfo"),
        (ECREATE + eadd(0) + chunk(4096), "offset"),
        (ECREATE + eadd(4096) + chunk(0), "offset"),
        (ECREATE + eadd(0) + chunk(128), "offset"),
        (ECREATE + eadd(0) + chunk(256) + chunk(256), "order"),
        (ECREATE + eadd(0) + chunk(256) + chunk(0), "order"),
        (ECREATE + eadd(0) + chunk(256) + chunk(256, b"UNMEASRD"), "order"),
        (ECREATE + eadd(0) + chunk(0)[:-1], "size"),
        (ECREATE + eadd(0) + chunk(0)[:10] + b"\1" + chunk(0)[11:], "offset"),
        (ECREATE + eadd(0) + chunk(0)[:63] + b"\1" + chunk(0)[64:], "reserved"),
        (ECREATE + page(0)[:-1], "size"),
        (ECREATE + page(0) + b"E", "size"),
        (ECREATE + page(0) + chunk(0), "tag"),
    ],
)
def test_what_is_not_canonical_is_refused(stream: bytes, event: str) -> None:
    with pytest.raises(StructureError) as refusal:
        sgxs.read(io.BytesIO(stream))
    assert refusal.value.id == f"sgx.sgxs.{event}"
    with pytest.raises(StructureError):
        sgxs.Stream(io.BytesIO(stream)).measure()


def test_a_stream_of_open_size_is_refused() -> None:
    with pytest.raises(UsageError) as refusal:
        sgxs.Stream(io.BytesIO(b"UNSIZED\0" + ECREATE[8:]))
    assert refusal.value.id == "sgx.sgxs.unsized"


def test_unmeasured_contents_are_loaded_but_not_hashed() -> None:
    stream = ECREATE + page(0) + page(4096, tag=b"UNMEASRD") + eadd(8192) + chunk(8192) + chunk(8448, b"UNMEASRD", b"u")
    image = sgxs.read(io.BytesIO(stream))
    measured = ECREATE + page(0) + eadd(4096) + eadd(8192) + chunk(8192)
    assert sgxs.Stream(io.BytesIO(stream)).measure() == measure(image) == hashlib.sha256(measured).digest()
    assert contents(image)[4096] == (RW, b"c" * 4096)
    assert contents(image)[8192] == (RW, b"c" * 256 + b"u" * 256 + bytes(4096 - 512))
    assert written(image) == stream


def test_pages_out_of_order_cannot_be_written() -> None:
    image = EnclaveImage(1 << 20, 1, 4, 3, 0, (PageRun(4096, RW, 1), PageRun(0, RW, 1)))
    with pytest.raises(UsageError) as refusal:
        written(image)
    assert refusal.value.id == "sgx.sgxs.order"


def test_memory_stays_flat() -> None:
    """A stream of 64 MiB in less than 4 MiB."""
    pages = 16384

    class Generated:
        """A file that is made while it is read."""

        def __init__(self) -> None:
            self._left = ECREATE[:12] + struct.pack("<Q", 1 << 30) + ECREATE[20:]
            self._next = 0

        def readinto(self, buffer: memoryview) -> int:
            if not self._left:
                self._left = b"".join(page(n * 4096) for n in range(self._next, min(self._next + 16, pages)))
                self._next += 16
            taken, self._left = self._left[: len(buffer)], self._left[len(buffer) :]
            buffer[: len(taken)] = taken
            return len(taken)

    tracemalloc.start()
    try:
        digest = sgxs.Stream(Generated()).measure()  # type: ignore[arg-type]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20
    image = EnclaveImage(1 << 30, 1, 4, 3, 0, (PageRun(0, RW, pages, b"c" * 4096 * pages),))
    assert digest == measure(image)


@pytest.mark.parametrize("name", ["fortanix_test_enclave.sgxs", "fortanix_report.sgxs"])
def test_real_streams(vectors: Path, name: str) -> None:
    stream = (vectors / "measure" / name).read_bytes()
    image = sgxs.read(io.BytesIO(stream))
    assert sgxs.Stream(io.BytesIO(stream)).measure() == measure(image) == hashlib.sha256(stream).digest()
    assert written(image) == stream


def test_real_enclave_is_what_its_sigstruct_says(vectors: Path) -> None:
    signed = Sigstruct.from_bytes((vectors / "measure" / "fortanix_test_enclave.sig").read_bytes())
    with (vectors / "measure" / "fortanix_test_enclave.sgxs").open("rb") as file:
        image = sgxs.read(file, attributes=6, xfrm=3)
    assert measure(image) == signed.enclave_hash
    assert measure(replace(image, size=image.size * 2)) != signed.enclave_hash
