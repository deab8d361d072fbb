"""Enclaves of Intel's SGX SDK: a shared object whose section ``.note.sgxmeta`` tells how it is loaded.

``sgx_sign`` leaves one or more metadata there, one per version of the loader (1.x, 2.x, 3.x; 10 is added to the major
version if the enclave's address range is larger than the enclave). Each has a SIGSTRUCT and tables: patches of the
file, the layout of heap, stacks, TCSs, SSAs and reserved memory, extensions. The pages are those that the SDK's loader
adds (intel/linux-sgx, ``psw/urts/loader.cpp``, ``common/inc/internal/metadata.h``), of ELF32 and ELF64.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby

from ..errors import UsageError
from .elf import DT_TEXTREL, PF_R, PF_W, PF_X, PT_LOAD, Elf, Segment
from .image import EnclaveImage, PageRun
from .paging import PAGE_SIZE, PT_REG, PT_TCS, SECINFO_PT, SECINFO_R, SECINFO_RWX, SECINFO_W, SECINFO_X
from .structs import Attributes, Layout, Sigstruct, StructureError

NOTE_SECTION = ".note.sgxmeta"
_NOTE_NAME = b"sgx_metadata\0"
_MAGIC = 0x86A80294635D0E4C
_METADATA = Layout(
    "sdk.metadata",
    1872,
    (
        ("magic", 0, "Q"),
        ("minor", 8, "I"),
        ("major", 12, "I"),
        ("size", 16, "I"),
        ("tcs_policy", 20, "I"),
        ("ssa_frame_size", 24, "I"),
        ("max_save_buffer_size", 28, "I"),
        ("miscselect", 32, "I"),
        ("tcs_min_pool", 36, "I"),
        ("enclave_size", 40, "Q"),
        ("attributes", 48, "16s"),
        ("sigstruct", 64, "1808s"),
    ),
)
#: Directories follow the metadata: offset and size of patches, layout and, in later versions, ELRANGE and extensions.
_DIRECTORY = struct.Struct("<II")
_PATCH = struct.Struct("<QII16x")
_ENTRY = struct.Struct("<HHIQIIQ")
_GROUP = struct.Struct("<HHIQ16x")
_ELRANGE = struct.Struct("<QQQ")
_EXTENSION = struct.Struct("<IIII")
_SHARED_OBJECT = struct.Struct("<QQQQ")
_EXTENSION_SHARED_OBJECT = 0x1002
_GROUP_FLAG = 1 << 12
_EADD, _EEXTEND = 1, 2
#: Added to the major version of an enclave that lies within a larger address range.
_ELRANGE_VERSIONS = 10
#: The loader's limit for an enclave, and ours for the pieces that a layout may be made of.
_MAX_SIZE = 1 << 37
_MAX_PIECES = 1 << 18


@dataclass(frozen=True, slots=True)
class Metadata:
    """One of the ways in which a file can be loaded.

    Attributes:
        version: major and minor.
        sigstruct: ``None`` if it is not signed yet.
        raw: the whole metadata.
    """

    version: tuple[int, int]
    ssa_frame_size: int
    miscselect: int
    enclave_size: int
    attributes: Attributes
    sigstruct: Sigstruct | None
    raw: bytes

    def table(self, number: int) -> bytes:
        """The bytes of a directory's table.

        Raises:
            StructureError: ``sgx.sdk.bounds``.
        """
        offset, size = _DIRECTORY.unpack_from(self.raw, _METADATA.size + number * _DIRECTORY.size)
        return self.content(offset, size)

    def content(self, offset: int, size: int) -> bytes:
        """Bytes of the metadata.

        Raises:
            StructureError: ``sgx.sdk.bounds``.
        """
        if offset + size > len(self.raw):
            raise _refusal("bounds", "the metadata point outside of themselves", f"{size} bytes at {offset:#x}")
        return self.raw[offset : offset + size]


class SdkEnclave:
    """An enclave file of the SDK.

    Args:
        data: the whole file; it is copied for each image.

    Raises:
        StructureError: ``sgx.elf.…``, ``sgx.sdk.…``, ``sgx.sigstruct.…``: the file is damaged.
        UsageError: ``sgx.sdk.unsigned``: the file has no metadata yet.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.metadata: tuple[Metadata, ...] = tuple(_metadata(Elf(data)))

    @property
    def chosen(self) -> Metadata:
        """What the SDK's present loader takes: the latest version, but 2.x only if there is nothing else."""
        usable = [one for one in self.metadata if one.version[0] % _ELRANGE_VERSIONS != 2]
        return max(usable or self.metadata, key=lambda one: one.version)

    def image(self, metadata: Metadata | None = None) -> EnclaveImage:
        """The pages that the loader adds, in its order.

        Args:
            metadata: one of :attr:`metadata`; the chosen one if there is none.

        Raises:
            StructureError: ``sgx.elf.…``, ``sgx.sdk.…``: the loader would refuse the file.
        """
        chosen = self.chosen if metadata is None else metadata
        size = chosen.enclave_size
        if not PAGE_SIZE * 2 <= size <= _MAX_SIZE or size & (size - 1) or not 1 <= chosen.ssa_frame_size <= 4:
            raise _refusal(
                "size",
                "the metadata describe an impossible enclave",
                f"{size:#x} bytes, SSA frames of {chosen.ssa_frame_size} pages",
                "a power of two up to 2^37, and 1 to 4",
            )
        patched = bytearray(self._data)
        # Before the patches, as the loader does: they may overwrite the relocations.
        writable = _relocated_pages(Elf(self._data), size)
        for target, source, length in _entries(_PATCH, chosen.table(0)):
            if target + length > len(patched):
                raise _refusal("patch", "a patch lies outside of the file", f"{length} bytes at {target:#x}")
            patched[target : target + length] = chosen.content(source, length)
        runs = [*_sections(patched, chosen, writable), *_layout(chosen)]
        _check_pages(runs, size)
        shift = 0
        if chosen.version[0] > _ELRANGE_VERSIONS:
            shift, size = _elrange(chosen)
        return EnclaveImage(
            size=size,
            ssa_frame_size=chosen.ssa_frame_size,
            attributes=chosen.attributes.flags,
            xfrm=chosen.attributes.xfrm,
            miscselect=chosen.miscselect,
            runs=tuple(replace(run, offset=run.offset + shift) if shift else run for run in runs),
        )


def _metadata(elf: Elf) -> Iterator[Metadata]:
    section = elf.section(NOTE_SECTION)
    if section is None:
        raise UsageError(
            f"the file is no enclave of the SGX SDK: it has no section {NOTE_SECTION}",
            id="sgx.sdk.note",
            remedy="name a file that was linked with the SDK's trusted runtime",
        )
    note = elf.bytes_at(section.offset, section.size)
    if len(note) < 12 + len(_NOTE_NAME) or bytes(note[12 : 12 + len(_NOTE_NAME)]) != _NOTE_NAME:
        raise _refusal("note", f"the note in {NOTE_SECTION} is not named sgx_metadata")
    name_size, size, _ = struct.unpack_from("<III", note)
    rest = note[12 + len(_NOTE_NAME) :]
    if name_size != len(_NOTE_NAME) or size > len(rest):
        raise _refusal("note", f"the note in {NOTE_SECTION} has the wrong size", f"{size} bytes", f"{len(rest)} bytes")
    rest = rest[:size]
    found = False
    while len(rest) >= _METADATA.size and int.from_bytes(rest[:8], "little") == _MAGIC:
        one = _one_metadata(rest)
        found = True
        yield one
        rest = rest[len(one.raw) :]
    if not found:
        raise UsageError(
            "the enclave has no metadata: it is not signed",
            id="sgx.sdk.unsigned",
            remedy="sign it with: sgx_sign sign, or sgx_sign gendata and catsig",
        )


def _one_metadata(rest: memoryview) -> Metadata:
    values = dict(zip(_METADATA.names, _METADATA.unpack(bytes(rest[: _METADATA.size])), strict=True))
    size = values["size"]
    assert isinstance(size, int) and isinstance(values["sigstruct"], bytes) and isinstance(values["attributes"], bytes)
    if not _METADATA.size + 2 * _DIRECTORY.size <= size <= len(rest):
        raise _refusal(
            "metadata", "the metadata have an impossible size", f"{size} bytes", f"at most {len(rest)} bytes"
        )
    return Metadata(
        version=(int(values["major"]), int(values["minor"])),
        ssa_frame_size=int(values["ssa_frame_size"]),
        miscselect=int(values["miscselect"]),
        enclave_size=int(values["enclave_size"]),
        attributes=Attributes.from_bytes(values["attributes"]),
        sigstruct=Sigstruct.from_bytes(values["sigstruct"]) if any(values["sigstruct"]) else None,
        raw=bytes(rest[:size]),
    )


def _entries(form: struct.Struct, table: bytes) -> Iterator[tuple[int, ...]]:
    if len(table) % form.size:
        raise _refusal("table", "a table of the metadata ends in the middle of an entry", f"{len(table)} bytes")
    return form.iter_unpack(table)


def _relocated_pages(elf: Elf, size: int) -> frozenset[int]:
    """Numbers of the pages that are writable because the enclave relocates its own code."""
    if DT_TEXTREL not in elf.dynamic():
        return frozenset()
    word = 8 if elf.is64 else 4
    pages: set[int] = set()
    for address in elf.relocations():
        if address < size:
            pages.update((address // PAGE_SIZE, (address + word - 1) // PAGE_SIZE))
    return frozenset(pages)


def _sections(data: bytearray, metadata: Metadata, writable: frozenset[int]) -> Iterator[PageRun]:
    """The pages of the loadable segments."""
    elf = Elf(data)
    segments = [(elf, segment) for segment in elf.segments if segment.kind == PT_LOAD]
    shared_object = _shared_object(metadata)
    if shared_object is not None:
        at, address, length = shared_object
        inner = Elf(elf.bytes_at(at, length))
        segments += [
            (inner, replace(segment, address=segment.address + address))
            for segment in inner.segments
            if segment.kind == PT_LOAD
        ]
    last: Segment | None = None
    for owner, segment in segments:
        if last is not None:
            yield from _extra_page(metadata, last, segment.address)
        # Nothing counts that begins at 0, as in the loader.
        if segment.address > (0 if last is None else last.address):
            last = segment
        contents = owner.bytes_at(segment.offset, segment.file_size)
        yield from _region(contents, segment.address, segment.memory_size, _flags(segment), writable)
    if last is not None:
        yield from _extra_page(metadata, last, None)


def _flags(segment: Segment) -> int:
    flags = PT_REG
    for bit, permission in ((PF_R, SECINFO_R), (PF_W, SECINFO_W), (PF_X, SECINFO_X)):
        if segment.flags & bit:
            flags |= permission
    if flags == PT_REG:
        raise _refusal("segment", "a segment is neither readable nor writable nor executable", f"{segment.address:#x}")
    return flags


def _extra_page(metadata: Metadata, last: Segment, following: int | None) -> Iterator[PageRun]:
    """A page too many that loaders of version 1.3 counted for some segments, and with which enclaves were signed."""
    end = _round(last.end)
    if metadata.version != (1, 3) or end >= _round(_round(last.memory_size) + last.address):
        return
    if following is None or end < following - following % PAGE_SIZE:
        yield PageRun(end, _flags(last), 1)


def _region(
    contents: memoryview, address: int, memory_size: int, flags: int, writable: frozenset[int]
) -> Iterator[PageRun]:
    """Pages that begin with these contents at ``address``, zero before it and after them, all measured."""
    if len(contents) > memory_size:
        raise _refusal("segment", "a segment has more contents than memory", f"{len(contents)} of {memory_size} bytes")
    at = start = address - address % PAGE_SIZE
    filled = address + len(contents)
    for (more, whole), pages in groupby(
        range(start, _round(filled) if contents else start, PAGE_SIZE),
        lambda page: (page // PAGE_SIZE in writable, address <= page and page + PAGE_SIZE <= filled),
    ):
        size = len(list(pages)) * PAGE_SIZE
        data: bytes | memoryview = contents[max(at - address, 0) : at - address + size]
        if not whole:
            data = (bytes(max(address - at, 0)) + data).ljust(size, b"\0")
        yield PageRun(at, flags | SECINFO_W if more else flags, size // PAGE_SIZE, data)
        at += size
    if memory_size and address + memory_size > at:
        yield PageRun(at, flags, (_round(address + memory_size) - at) // PAGE_SIZE)


def _layout(metadata: Metadata) -> Iterator[PageRun]:
    """Heap, stacks, TCSs, SSAs, reserved memory: entries, and groups that repeat the entries before them."""
    entries = list(_entries(_ENTRY, metadata.table(1)))
    table = metadata.table(1)
    pieces = 0
    for number, entry in enumerate(entries):
        if not entry[0] & _GROUP_FLAG:
            repeated, times, step = [entry], [0], 0
        else:
            _, count, load_times, step = _GROUP.unpack_from(table, number * _GROUP.size)
            repeated = entries[number - count : number] if count <= number else []
            if not repeated or any(one[0] & _GROUP_FLAG for one in repeated):
                raise _refusal("layout", "a group of the layout repeats what is not there", f"entry {number}")
            if load_times * step > metadata.enclave_size or load_times * count > _MAX_PIECES:
                raise _refusal("layout", "a group of the layout does not fit", f"{load_times} times {step:#x} bytes")
            times = list(range(1, load_times + 1))
        pieces += len(times) * len(repeated)
        if pieces > _MAX_PIECES:
            raise _refusal("layout", "the layout has too many entries", pieces, _MAX_PIECES)
        for turn in times:
            for one in repeated:
                yield from _entry(metadata, one, turn * step)


def _entry(metadata: Metadata, entry: tuple[int, ...], step: int) -> Iterator[PageRun]:
    _, attributes, page_count, rva, content_size, content_offset, flags = entry
    address = rva + step
    if not attributes & _EADD or not page_count:
        return
    if address % PAGE_SIZE or address + page_count * PAGE_SIZE > metadata.enclave_size:
        raise _refusal("layout", "the layout leaves the enclave", f"{page_count} pages at {address:#x}")
    measured = bool(attributes & _EEXTEND)
    if content_offset and flags == PT_TCS:
        yield from _repeated(
            address, flags, page_count, _tcs(metadata.content(content_offset, content_size), address), measured=measured
        )
    elif content_offset:
        content = memoryview(metadata.content(content_offset, content_size))
        yield from _region(content, address, page_count * PAGE_SIZE, flags, frozenset())
    elif flags and content_size:
        yield from _repeated(
            address, flags, page_count, struct.pack("<I", content_size) * (PAGE_SIZE // 4), measured=measured
        )
    elif flags:
        yield PageRun(address, flags, page_count, None, measured)


def _repeated(address: int, flags: int, count: int, page: bytes, *, measured: bool) -> Iterator[PageRun]:
    """The same page again and again; in small runs, so that a large stack takes no memory of its size."""
    batch = memoryview(page * min(count, 64))
    for first in range(0, count, 64):
        pages = min(64, count - first)
        yield PageRun(address + first * PAGE_SIZE, flags, pages, batch[: pages * PAGE_SIZE], measured)


def _tcs(template: bytes, address: int) -> bytes:
    """A TCS: OSSA, OFSBASE and OGSBASE are relative to its own page in the template."""
    if len(template) > PAGE_SIZE:
        raise _refusal("layout", "the TCS template is larger than a page", f"{len(template)} bytes")
    page = bytearray(template.ljust(PAGE_SIZE, b"\0"))
    for offset in (16, 48, 56):
        (value,) = struct.unpack_from("<Q", page, offset)
        struct.pack_into("<Q", page, offset, (value + address) & (1 << 64) - 1)
    return bytes(page)


def _elrange(metadata: Metadata) -> tuple[int, int]:
    """Where the enclave begins in its address range, and the range's size, both in bytes."""
    table = metadata.table(2)
    if len(table) != _ELRANGE.size:
        raise _refusal("elrange", "the metadata lack the enclave's address range")
    image, start, size = _ELRANGE.unpack(table)
    if (
        size < 2 * PAGE_SIZE
        or size & (size - 1)
        or start % size
        or image % PAGE_SIZE
        or not start <= image <= image + metadata.enclave_size <= start + size
    ):
        raise _refusal("elrange", "the enclave's address range is impossible", f"{size:#x} bytes at {start:#x}")
    return image - start, size


def _shared_object(metadata: Metadata) -> tuple[int, int, int] | None:
    """A second shared object in the file (a FIPS provider): offset in the file, address, size."""
    major, minor = metadata.version
    major %= _ELRANGE_VERSIONS
    if major == 2 or (major == 1 and minor < 5) or (major == 3 and minor < 2):
        return None
    for kind, _, offset, _ in _entries(_EXTENSION, metadata.table(3)):
        if kind == _EXTENSION_SHARED_OBJECT:
            at, address, size, _ = _SHARED_OBJECT.unpack(metadata.content(offset, _SHARED_OBJECT.size))
            return at, address, size
    return None


def _check_pages(runs: list[PageRun], size: int) -> None:
    """Each page lies in the enclave, is added once, and has SECINFO.FLAGS that EADD takes."""
    end = 0
    for run in sorted(runs, key=lambda run: run.offset):
        if run.offset < end or run.end > size:
            raise _refusal("pages", "a page is added twice or lies outside of the enclave", f"{run.offset:#x}")
        end = run.end
        if run.flags & ~(SECINFO_PT | SECINFO_RWX) or run.flags & SECINFO_PT not in (PT_REG, PT_TCS):
            raise _refusal("pages", "a page has impossible SECINFO.FLAGS", f"{run.flags:#x} at {run.offset:#x}")


def _round(address: int) -> int:
    return -(-address // PAGE_SIZE) * PAGE_SIZE


def _refusal(event: str, what: str, found: object = None, expected: object = None) -> StructureError:
    return StructureError(f"the SDK enclave is damaged: {what}", id=f"sgx.sdk.{event}", found=found, expected=expected)
