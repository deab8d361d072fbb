"""Enclaves of Intel's SDK: each of the loader's rules, on files made here, and others' enclaves where there are some."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sdk_enclaves import PAGE, REG, TCS, Entry, Group, Load, Page, R, Sdk, W, X, mrenclave

from inclavare.errors import InclavareError, UsageError
from inclavare.sgx.measure import measure
from inclavare.sgx.sdk import SdkEnclave
from inclavare.sgx.sigstruct import verify
from inclavare.sgx.structs import SIGSTRUCT_HEADER, SIGSTRUCT_HEADER2, StructureError

ZERO = bytes(PAGE)
CODE = Load(0, 5, b"\x90" * 100 + b"\xc3" * (2 * PAGE - 100), 2 * PAGE)
#: Begins in the middle of a page, ends in the middle of another, and has .bss.
DATA = Load(0x4100, 6, b"d" * (PAGE + 0x200), 3 * PAGE + 0x80)
TCS_TEMPLATE = struct.pack("<QQQIIQQQQII", 0, 0, 0x1000, 0, 2, 0x123, 0, 0x10, 0x20, 0xFFF, 0xFFF)


def of_code(flags: int = R | X) -> list[Page]:
    return [(at, REG | flags, CODE.data[at : at + PAGE], True) for at in (0, PAGE)]


def of_data() -> list[Page]:
    whole = (bytes(0x100) + DATA.data).ljust(4 * PAGE, b"\0")
    return [(0x4000 + at, REG | R | W, whole[at : at + PAGE], True) for at in range(0, 4 * PAGE, PAGE)]


def tcs(address: int) -> bytes:
    at = (0x1000 + address, 0, 2, 0x123, 0, 0x10 + address, 0x20 + address, 0xFFF, 0xFFF)
    return struct.pack("<QQQIIQQQQII", 0, 0, *at).ljust(PAGE, b"\0")


def check(sdk: Sdk, pages: list[Page], size: int | None = None) -> None:
    image = SdkEnclave(sdk.file()).image()
    assert measure(image) == mrenclave(size or sdk.size, pages)
    assert (image.ssa_frame_size, image.attributes, image.xfrm) == (1, sdk.attributes, 3)


@pytest.mark.parametrize("bits", [32, 64])
def test_segments(bits: int) -> None:
    check(Sdk([CODE, DATA], bits=bits, attributes=4 if bits == 64 else 0), of_code() + of_data())


def test_segment_without_contents() -> None:
    check(Sdk([CODE, Load(0x4800, 6, b"", 0x1000)]), of_code() + [(at, 0x203, ZERO, True) for at in (0x4000, 0x5000)])
    check(Sdk([CODE, Load(0x4800, 6, b"", 0)]), of_code())


@pytest.mark.parametrize("bits", [32, 64])
def test_pages_with_text_relocations_are_writable(bits: int) -> None:
    """DT_TEXTREL: the pages that relocations touch, also where one crosses into the next page."""
    relocated = of_code(R | W | X)[:1] + of_code()[1:]
    check(Sdk([CODE], relocations=[0x10], text_relocations=True, bits=bits), relocated)
    check(Sdk([CODE], relocations=[0x10], bits=bits), of_code())
    check(Sdk([CODE], relocations=[PAGE - 2], text_relocations=True, bits=bits), of_code(R | W | X))
    check(Sdk([CODE], relocations=[1 << 30], text_relocations=True, bits=bits), of_code())


def test_patches() -> None:
    sdk = Sdk([CODE, DATA], patches=[(0, b"z" * 8)])
    at = sdk.offset_of(CODE)
    sdk = replace(sdk, patches=[(at + 6, b"patched"), (at + PAGE, b"!")])
    pages = of_code()
    first, second = (bytearray(page[2]) for page in pages)
    first[6:13], second[0:1] = b"patched", b"!"
    patched = [(0, REG | R | X, bytes(first), True), (PAGE, REG | R | X, bytes(second), True)]
    check(sdk, patched + of_data())


def test_layout() -> None:
    """Heap, guard (nothing), stack full of 0xCC, TCS, SSA; EADD alone; what is added later only; contents."""
    layout: list[Entry | Group] = [
        Entry(0x10000, 3, REG | R | W, attributes=1),
        Entry(0x20000, 16, 0, attributes=0),
        Entry(0x30000, 70, REG | R | W, word=0xCCCCCCCC),
        Entry(0x80000, 1, TCS, content=TCS_TEMPLATE),
        Entry(0x82000, 2, REG | R | W),
        Entry(0x90000, 8, REG | R | W, attributes=8),
        Entry(0xA0000, 2, REG | R | W, content=b"template" * 600),
    ]
    content = (b"template" * 600).ljust(2 * PAGE, b"\0")
    pages = [
        *of_code(),
        *((0x10000 + n * PAGE, REG | R | W, ZERO, False) for n in range(3)),
        *((0x30000 + n * PAGE, REG | R | W, b"\xcc" * PAGE, True) for n in range(70)),
        (0x80000, TCS, tcs(0x80000), True),
        *((0x82000 + n * PAGE, REG | R | W, ZERO, True) for n in range(2)),
        *((0xA0000 + n * PAGE, REG | R | W, content[n * PAGE : (n + 1) * PAGE], True) for n in range(2)),
    ]
    check(Sdk([CODE], layout), pages)


def test_groups_repeat_the_entries_before_them() -> None:
    layout: list[Entry | Group] = [
        Entry(0x10000, 1, REG | R | W),
        Entry(0x20000, 1, TCS, content=TCS_TEMPLATE),
        Entry(0x22000, 2, REG | R | W),
        Group(2, 3, 0x10000),
    ]
    pages = of_code()
    pages.append((0x10000, REG | R | W, ZERO, True))
    for step in range(0, 0x40000, 0x10000):
        pages.append((0x20000 + step, TCS, tcs(0x20000 + step), True))
        pages += [(0x22000 + step + n * PAGE, REG | R | W, ZERO, True) for n in range(2)]
    check(Sdk([CODE], layout), pages)


def test_version_1_3_has_extra_pages() -> None:
    """A segment whose page offset plus size crosses a page gets one more page, unless the next segment is there."""
    long = Load(0x4800, 6, b"d" * 0x100, 0x900)
    assert long.address + long.memory == 0x5100
    short = Load(0x4800, 6, b"d" * 0x100, 0x700)
    pages = [(0x4000, 0x203, (bytes(0x800) + b"d" * 0x100).ljust(PAGE, b"\0"), True)]
    check(Sdk([CODE, short]), of_code() + pages)
    check(Sdk([CODE, short], version=(1, 3)), of_code() + pages + [(0x5000, 0x203, ZERO, True)])
    following = Load(0x8000, 6, b"f" * PAGE, PAGE)
    after = (0x8000, 0x203, b"f" * PAGE, True)
    check(Sdk([CODE, short, following], version=(1, 3)), [*of_code(), *pages, (0x5000, 0x203, ZERO, True), after])
    close = replace(following, address=0x5000)
    check(Sdk([CODE, short, close], version=(1, 3)), [*of_code(), *pages, (0x5000, *after[1:])])
    two = [*pages, (0x5000, 0x203, ZERO, True)]
    check(Sdk([CODE, long], version=(1, 3)), of_code() + two)


@pytest.mark.parametrize("major", [11, 13])
def test_larger_address_range(major: int) -> None:
    """Versions from 10 on: the enclave lies somewhere in ELRANGE, and SECS.SIZE is ELRANGE's."""
    sdk = Sdk([CODE], version=(major, 5), elrange=(0x600000, 0x400000, 0x400000))
    check(sdk, [(at + 0x200000, *page) for at, *page in of_code()], size=0x400000)  # type: ignore[misc]


@pytest.mark.parametrize(
    "elrange",
    [None, (0x600000, 0, 0), (0x600000, 0x400000, 0x300000), (0x600800, 0x400000, 0x400000), (0, 0x400000, 0x400000),
     (0x600000, 0x500000, 0x400000), (0x780000, 0x400000, 0x400000)],
)  # fmt: skip
def test_impossible_address_ranges_are_refused(elrange: tuple[int, int, int] | None) -> None:
    with pytest.raises(StructureError) as refusal:
        SdkEnclave(Sdk([CODE], version=(13, 3), elrange=elrange).file()).image()
    assert refusal.value.id == "sgx.sdk.elrange"


def test_second_shared_object() -> None:
    inner = Sdk([Load(0, 5, b"inner" * 100, 500)]).file()
    page = (0x40000, REG | R | X, (b"inner" * 100).ljust(PAGE, b"\0"), True)
    sdk = Sdk([CODE], inner=(inner, 0x40000), version=(3, 3))
    check(sdk, [*of_code(), page])
    check(replace(sdk, version=(1, 5)), [*of_code(), page])
    for version in ((1, 4), (2, 4), (3, 1)):
        check(replace(sdk, version=version), of_code())


def test_several_metadata() -> None:
    others = [replace(Sdk([CODE]), version=version, size=1 << 21).metadata() for version in ((2, 4), (1, 4))]
    enclave = SdkEnclave(Sdk([CODE], version=(3, 0), others=others).file())
    assert [one.version for one in enclave.metadata] == [(3, 0), (2, 4), (1, 4)]
    assert enclave.chosen.version == (3, 0)
    assert measure(enclave.image(enclave.metadata[1])) == mrenclave(1 << 21, of_code())
    only = SdkEnclave(Sdk([CODE], version=(2, 4), others=others[1:]).file())
    assert only.chosen.version == (1, 4)


def test_without_note_or_metadata() -> None:
    with pytest.raises(UsageError) as refusal:
        SdkEnclave(Sdk([CODE]).file().replace(b".note.sgxmeta", b".note.sgxmetb"))
    assert refusal.value.id == "sgx.sdk.note"
    with pytest.raises(UsageError) as refusal:
        SdkEnclave(Sdk([CODE]).file().replace(struct.pack("<Q", 0x86A80294635D0E4C), bytes(8)))
    assert refusal.value.id == "sgx.sdk.unsigned"


def test_sigstruct_of_the_metadata() -> None:
    signed = bytearray(1808)
    signed[0:16], signed[24:40] = SIGSTRUCT_HEADER, SIGSTRUCT_HEADER2
    signed[960:992] = b"h" * 32
    found = SdkEnclave(Sdk([CODE], sigstruct=bytes(signed)).file()).chosen.sigstruct
    assert found is not None and found.enclave_hash == b"h" * 32
    assert SdkEnclave(Sdk([CODE]).file()).chosen.sigstruct is None
    with pytest.raises(StructureError):
        SdkEnclave(Sdk([CODE], sigstruct=b"x" * 1808).file())


@pytest.mark.parametrize(
    ("sdk", "event"),
    [
        (Sdk([CODE], size=3 << 20), "sdk.size"),
        (Sdk([CODE], size=1 << 38), "sdk.size"),
        (Sdk([CODE], size=PAGE), "sdk.size"),
        (Sdk([replace(CODE, flags=0)]), "sdk.segment"),
        (Sdk([replace(CODE, memory=PAGE)]), "sdk.segment"),
        (Sdk([CODE, replace(DATA, address=0x1100)]), "sdk.pages"),
        (Sdk([CODE, replace(DATA, memory=1 << 20)]), "sdk.pages"),
        (Sdk([CODE, replace(DATA, memory=1 << 63)]), "sdk.pages"),
        (Sdk([CODE], patches=[(1 << 40, b"x")]), "sdk.patch"),
        (Sdk([CODE], [Entry(0x1000, 1, REG | R)]), "sdk.pages"),
        (Sdk([CODE], [Entry(0x10800, 1, REG | R)]), "sdk.layout"),
        (Sdk([CODE], [Entry(0x10000, 1 << 31, REG | R)]), "sdk.layout"),
        (Sdk([CODE], [Entry(0x10000, 1, REG | R | 8)]), "sdk.pages"),
        (Sdk([CODE], [Entry(0x10000, 1, 0x400 | R)]), "sdk.pages"),
        (Sdk([CODE], [Entry(0x10000, 1, TCS, content=b"t" * 5000)]), "sdk.layout"),
        (Sdk([CODE], [Entry(0x10000, 1, REG | R, content=b"t" * 5000)]), "sdk.segment"),
        (Sdk([CODE], [Entry(0x10000, 1, REG | R), Group(2, 1, PAGE)]), "sdk.layout"),
        (Sdk([CODE], [Entry(0x10000, 1, REG | R), Group(0, 1, PAGE)]), "sdk.layout"),
        (Sdk([CODE], [Entry(0x10000, 1, REG | R), Group(1, 1, PAGE), Group(1, 1, PAGE)]), "sdk.layout"),
        (Sdk([CODE], [Entry(0x10000, 1, REG | R), Group(1, 0xFFFFFFFF, PAGE)]), "sdk.layout"),
        (Sdk([CODE], [Entry(0x10000, 1, REG | R), Group(1, 0xFFFFFFFF, 0)]), "sdk.layout"),
        (Sdk([CODE], [Entry(0x10000, 1, REG | R), Group(1, 2, 0)]), "sdk.pages"),
    ],
)
def test_what_the_loader_would_refuse(sdk: Sdk, event: str) -> None:
    with pytest.raises(StructureError) as refusal:
        SdkEnclave(sdk.file()).image()
    assert refusal.value.id == f"sgx.{event}"


RICH = Sdk(
    [CODE, DATA],
    [Entry(0x10000, 1, TCS, content=TCS_TEMPLATE), Entry(0x12000, 2, REG | R | W, word=7), Group(2, 3, 0x4000)],
    patches=[(0x900, b"patch")],
    relocations=[8, 0x1010],
    text_relocations=True,
).file()
#: Everything but the contents of pages: headers, tables, metadata.
STRUCTURAL = [*range(64 + 3 * 56), *range(RICH.index(DATA.data) + len(DATA.data), len(RICH))]


@settings(max_examples=400, deadline=2000)
@given(st.lists(st.tuples(st.sampled_from(STRUCTURAL), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_files_are_refused_or_read(changes: list[tuple[int, int]]) -> None:
    data = bytearray(RICH)
    for at, value in changes:
        data[at] = value
    read_or_refused(bytes(data))


@settings(max_examples=100, deadline=2000)
@given(st.integers(0, len(RICH)))
def test_truncated_files_are_refused_or_read(size: int) -> None:
    read_or_refused(RICH[:size])


def read_or_refused(data: bytes) -> None:
    try:
        enclave = SdkEnclave(data)
        for metadata in enclave.metadata:
            image = enclave.image(metadata)
            assert all(run.end <= image.size for run in image.runs)
    except InclavareError as refusal:
        assert refusal.id.startswith(("sgx.sdk.", "sgx.elf.", "sgx.sigstruct.", "sgx.attributes."))


def test_enclaves_that_others_signed(vectors: Path) -> None:
    found = sorted((vectors / "measure").glob("*.signed.so*"))
    if not found:
        pytest.skip("no signed enclaves of the SDK among the vectors")
    for path in found:
        enclave = SdkEnclave(path.read_bytes())
        for metadata in enclave.metadata:
            assert metadata.sigstruct is not None
            verify(metadata.sigstruct)
            assert measure(enclave.image(metadata)) == metadata.sigstruct.enclave_hash
