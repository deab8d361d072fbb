"""Enclave files as the SGX SDK's linker and ``sgx_sign`` make them, small, and the pages that their loader adds.

Both are written from intel/linux-sgx' headers and loader, apart from the code under test: pages are a plain list.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field

R, W, X, REG, TCS = 1, 2, 4, 0x200, 0x100
MAGIC = 0x86A80294635D0E4C
PAGE = 4096
Page = tuple[int, int, bytes, bool]


@dataclass
class Entry:
    """layout_entry_t."""

    rva: int
    pages: int
    flags: int
    attributes: int = 3
    word: int = 0
    content: bytes = b""
    ident: int = 1


@dataclass
class Group:
    """layout_group_t: the ``count`` entries before it once more, ``times`` times, each ``step`` further."""

    count: int
    times: int
    step: int


@dataclass
class Load:
    """A PT_LOAD segment."""

    address: int
    flags: int
    data: bytes
    memory: int


@dataclass
class Sdk:
    """What goes into the file."""

    loads: list[Load]
    layout: list[Entry | Group] = field(default_factory=list)
    patches: list[tuple[int, bytes]] = field(default_factory=list)
    version: tuple[int, int] = (3, 0)
    size: int = 1 << 20
    elrange: tuple[int, int, int] | None = None
    relocations: list[int] = field(default_factory=list)
    text_relocations: bool = False
    bits: int = 64
    sigstruct: bytes = bytes(1808)
    others: list[bytes] = field(default_factory=list)
    inner: tuple[bytes, int] | None = None
    attributes: int = 4

    def metadata(self) -> bytes:
        """metadata_t."""
        data = bytearray(1872 + 32)

        def add(content: bytes) -> int:
            data.extend(content)
            return len(data) - len(content)

        patches = b"".join(struct.pack("<QII16x", at, add(content), len(content)) for at, content in self.patches)
        layout = b""
        for one in self.layout:
            if isinstance(one, Group):
                layout += struct.pack("<HHIQ16x", 1 << 12 | 9, one.count, one.times, one.step)
            else:
                size, at = (len(one.content), add(one.content)) if one.content else (one.word, 0)
                layout += struct.pack("<HHIQIIQ", one.ident, one.attributes, one.pages, one.rva, size, at, one.flags)
        extensions = b""
        if self.inner is not None:
            entry = add(struct.pack("<QQQQ", self.inner_at, self.inner[1], len(self.inner[0]), 0))
            extensions = struct.pack("<IIIIIIII", 0x1001, 4, 0, 0, 0x1002, 32, entry, 0)
        tables = [patches, layout, b"" if self.elrange is None else struct.pack("<QQQ", *self.elrange), extensions]
        for number, table in enumerate(tables):
            if table:
                struct.pack_into("<II", data, 1872 + 8 * number, add(table), len(table))
        major, minor = self.version
        attributes = struct.pack("<QQ", self.attributes, 3)
        struct.pack_into(
            "<QIIIIIIIIQ16s1808s", data, 0,
            MAGIC, minor, major, len(data), 0, 1, 0, 0, 0, self.size, attributes, self.sigstruct,
        )  # fmt: skip
        return bytes(data)

    @property
    def inner_at(self) -> int:
        """Where the second shared object is in the file."""
        return 0x800

    def file(self) -> bytes:
        """The ELF file."""
        wide = self.bits == 64
        header, program, section = (64, 56, 64) if wide else (52, 32, 40)
        body = bytearray(0x800 if self.inner is None else 0x800 + len(self.inner[0]))
        if self.inner is not None:
            body[0x800:] = self.inner[0]
        segments = []
        for load in self.loads:
            body.extend(bytes(-len(body) % PAGE + load.address % PAGE))
            segments.append((1, load.flags, len(body), load.address, len(load.data), load.memory))
            body.extend(load.data)
        table = b"".join(
            struct.pack("<QQq" if wide else "<II", at, 8, *([0] if wide else [])) for at in self.relocations
        )
        table += struct.pack("<QQq", 0, 0, 0) if wide else struct.pack("<II", 0, 0)
        table_at = len(body)
        body.extend(table)
        tags = [(7 if wide else 17, 0xABC000), (8 if wide else 18, len(table))] + [(22, 0)] * self.text_relocations
        dynamic = b"".join(struct.pack("<QQ" if wide else "<II", *tag) for tag in [*tags, (0, 0)])
        segments.append((2, 6, len(body), 0, len(dynamic), len(dynamic)))
        body.extend(dynamic)
        content = self.metadata() + b"".join(self.others)
        note = struct.pack("<III", 13, len(content) + 16, 1) + b"sgx_metadata\0" + content + bytes(16)
        names = b"\0.note.sgxmeta\0.rel\0.shstrtab\0"
        note_at = len(body)
        body.extend(note + names)
        sections = [(0, 0, 0, 0), (1, 0, note_at, len(note)), (15, 0xABC000, table_at, len(table))]
        sections.append((20, 0, note_at + len(note), len(names)))
        body.extend(bytes(-len(body) % 8))
        sections_at = len(body)
        for name, address, at, size in sections:
            body.extend(struct.pack("<II8xQQQ24x" if wide else "<II4xIII16x", name, 7, address, at, size))
        ident = b"\x7fELF" + bytes([2 if wide else 1, 1, 1]) + bytes(9)
        body[:header] = ident + struct.pack(
            "<HHIQQQIHHHHHH" if wide else "<HHIIIIIHHHHHH",
            3, 62 if wide else 3, 1, 0, header, sections_at, 0, header, program, len(segments), section, len(sections), 3,
        )  # fmt: skip
        for number, (kind, flags, at, address, size, memory) in enumerate(segments):
            values = (kind, flags, at, address, address, size, memory, PAGE)
            if not wide:
                values = (kind, at, address, address, size, memory, flags, PAGE)
            packed = struct.pack("<IIQQQQQQ" if wide else "<IIIIIIII", *values)
            body[header + number * program : header + (number + 1) * program] = packed
        return bytes(body)

    def offset_of(self, load: Load) -> int:
        """Where a segment's bytes are in the file."""
        return self.file().index(load.data)


def mrenclave(size: int, pages: list[Page]) -> bytes:
    """The measurement of a plain list of pages: offset, SECINFO.FLAGS, 4096 bytes, measured or not."""
    state = hashlib.sha256(b"ECREATE\0" + struct.pack("<IQ", 1, size) + bytes(44))
    for offset, flags, content, measured in pages:
        assert len(content) == PAGE
        state.update(b"EADD\0\0\0\0" + struct.pack("<QQ", offset, flags) + bytes(40))
        for at in range(0, PAGE if measured else 0, 256):
            state.update(b"EEXTEND\0" + struct.pack("<Q", offset + at) + bytes(48) + content[at : at + 256])
    return state.digest()
