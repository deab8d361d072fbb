"""The little of ELF that enclaves need: sections by name and address, segments, the dynamic table, relocations.

Written for files that an adversary made: every offset is checked before it is used.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from .structs import StructureError

PT_LOAD, PT_DYNAMIC = 1, 2
PF_X, PF_W, PF_R = 1, 2, 4
DT_NULL, DT_PLTRELSZ, DT_RELA, DT_RELASZ, DT_REL, DT_RELSZ, DT_TEXTREL, DT_JMPREL = 0, 2, 7, 8, 17, 18, 22, 23
_ET_DYN = 3
_MACHINES = {1: 3, 2: 62}  # ELFCLASS32: EM_386, ELFCLASS64: EM_X86_64


@dataclass(frozen=True, slots=True)
class Section:
    """A section header: name, address in memory, and where in the file its bytes are."""

    name: str
    address: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Segment:
    """A program header: ``file_size`` bytes at ``offset`` go to ``address``, and zeros up to ``memory_size``."""

    kind: int
    flags: int
    offset: int
    address: int
    file_size: int
    memory_size: int

    @property
    def end(self) -> int:
        """Address just past the segment."""
        return self.address + self.memory_size


class Elf:
    """A little-endian ELF32 or ELF64 shared object or position-independent executable for x86.

    Args:
        data: the whole file.

    Raises:
        StructureError: ``sgx.elf.header``, ``.bounds``: it is no such file, or points outside of itself.
    """

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self.data = memoryview(data)
        if len(self.data) < 52 or bytes(self.data[:4]) != b"\x7fELF":
            raise _refusal("header", "the file is not an ELF file")
        kind, order, version = self.data[4:7]
        if kind not in _MACHINES or order != 1 or version != 1:
            raise _refusal("header", "the file is not a little-endian ELF file of version 1")
        self.is64 = kind == 2
        values = self._at("<16xHHIQQQIHHHHHH" if self.is64 else "<16xHHIIIIIHHHHHH", 0)
        elf_type, machine, _, self.entry, phoff, shoff, _, _, phentsize, phnum, shentsize, shnum, self._names = values
        if elf_type != _ET_DYN or machine != _MACHINES[kind]:
            raise _refusal("header", "the file is not a shared object for x86", f"type {elf_type}, machine {machine}")
        if phentsize != (56 if self.is64 else 32) or (shnum and shentsize != (64 if self.is64 else 40)):
            raise _refusal("header", "the ELF file has headers of another size")
        self.segments = tuple(self._segments(phoff, phnum))
        self.sections = tuple(self._sections(shoff, shnum))

    def bytes_at(self, offset: int, size: int) -> memoryview:
        """That part of the file.

        Raises:
            StructureError: ``sgx.elf.bounds``.
        """
        if offset + size > len(self.data):
            raise _refusal(
                "bounds",
                "the ELF file points outside of itself",
                f"{size} bytes at {offset:#x}",
                f"at most {len(self.data)} bytes in all",
            )
        return self.data[offset : offset + size]

    def section(self, name: str) -> Section | None:
        """The first section of this name."""
        return next((section for section in self.sections if section.name == name), None)

    def dynamic(self) -> dict[int, int]:
        """The dynamic table's standard tags, of repeated ones the last."""
        segment = next((segment for segment in self.segments if segment.kind == PT_DYNAMIC), None)
        found: dict[int, int] = {}
        if segment is None:
            return found
        form = "<QQ" if self.is64 else "<II"
        table = self.bytes_at(segment.offset, segment.file_size - segment.file_size % struct.calcsize(form))
        for tag, value in struct.iter_unpack(form, table):
            if tag == DT_NULL:
                break
            found[tag] = value
        return found

    def relocations(self) -> Iterator[int]:
        """Addresses that relocations write to, of whatever type but ``NONE``."""
        dynamic = self.dynamic()
        address, size = (DT_RELA, DT_RELASZ) if self.is64 else (DT_REL, DT_RELSZ)
        form, mask = ("<QQ8x", 0xFFFFFFFF) if self.is64 else ("<II", 0xFF)
        for start, length in ((address, size), (DT_JMPREL, DT_PLTRELSZ)):
            if start not in dynamic:
                continue
            at = next((section.offset for section in self.sections if section.address == dynamic[start]), None)
            if at is None:
                continue
            entries = dynamic.get(length, 0) // struct.calcsize(form)
            for offset, info in struct.iter_unpack(form, self.bytes_at(at, entries * struct.calcsize(form))):
                if info & mask:
                    yield offset

    def _segments(self, at: int, count: int) -> Iterator[Segment]:
        form = "<IIQQ8xQQQ" if self.is64 else "<III4xIIII"
        size = struct.calcsize(form)
        for header in struct.iter_unpack(form, self.bytes_at(at, count * size)):
            if self.is64:
                kind, flags, offset, address, file_size, memory_size, _ = header
            else:
                kind, offset, address, file_size, memory_size, flags, _ = header
            self.bytes_at(offset, file_size)
            yield Segment(kind, flags, offset, address, file_size, memory_size)

    def _sections(self, at: int, count: int) -> Iterator[Section]:
        form = "<II8xQQQ24x" if self.is64 else "<II4xIII16x"
        size = struct.calcsize(form)
        headers = list(struct.iter_unpack(form, self.bytes_at(at, count * size)))
        if not headers:
            return
        if self._names >= count:
            raise _refusal("bounds", "the ELF file's section names are in a section that does not exist")
        names = bytes(self.bytes_at(*headers[self._names][3:5]))
        for name, _, address, offset, length in headers:
            yield Section(_name(names, name), address, offset, length)

    def _at(self, form: str, offset: int) -> tuple[int, ...]:
        return struct.unpack(form, self.bytes_at(offset, struct.calcsize(form)))


def _name(names: bytes, at: int) -> str:
    end = names.find(b"\0", at, at + 256)
    return names[at : end if end >= 0 else at + 256].decode("latin-1")


def _refusal(event: str, what: str, found: object = None, expected: object = None) -> StructureError:
    return StructureError(what, id=f"sgx.elf.{event}", found=found, expected=expected)
