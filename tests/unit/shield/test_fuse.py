"""The FUSE protocol: layouts against the kernel's own header, and what the server answers to raw requests."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from inclavare.shield import fuse
from inclavare.shield.treefs import _STATFS, _new_encode

#: struct in linux/fuse.h → size in bytes as we pack it.
LAYOUTS = {
    "fuse_in_header": fuse.IN_HEADER.size,
    "fuse_out_header": fuse.OUT_HEADER.size,
    "fuse_attr": fuse.ATTR.size,
    "fuse_entry_out": fuse.ENTRY.size + fuse.ATTR.size,
    "fuse_attr_out": fuse.ATTR_OUT.size + fuse.ATTR.size,
    "fuse_read_in": fuse.READ_IN.size,
    "fuse_write_in": fuse.WRITE_IN.size,
    "fuse_open_out": fuse.OPEN_OUT.size,
    "fuse_init_out": fuse.INIT_OUT.size,
    "fuse_dirent": fuse.DIRENT.size,
    "fuse_statfs_out": _STATFS.size,
}
SIZES = [40, 16, 88, 128, 104, 40, 40, 16, 64, 24, 80]
OPCODES = [
    "LOOKUP",
    "FORGET",
    "GETATTR",
    "SETATTR",
    "READLINK",
    "OPEN",
    "READ",
    "WRITE",
    "STATFS",
    "RELEASE",
    "FSYNC",
    "GETXATTR",
    "LISTXATTR",
    "FLUSH",
    "INIT",
    "OPENDIR",
    "READDIR",
    "RELEASEDIR",
    "FSYNCDIR",
    "ACCESS",
    "INTERRUPT",
    "DESTROY",
    "BATCH_FORGET",
    "READDIRPLUS",
]
FLAGS = [
    "ASYNC_READ",
    "DO_READDIRPLUS",
    "READDIRPLUS_AUTO",
    "NO_OPEN_SUPPORT",
    "PARALLEL_DIROPS",
    "MAX_PAGES",
    "CACHE_SYMLINKS",
    "NO_OPENDIR_SUPPORT",
]


def test_sizes() -> None:
    assert list(LAYOUTS.values()) == SIZES


def test_the_kernels_header_agrees(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None or not Path("/usr/include/linux/fuse.h").exists():
        pytest.skip("no C compiler or no linux/fuse.h")
    expressions = [f"sizeof(struct {name})" for name in LAYOUTS]
    expressions += [f"FUSE_{name}" for name in (*OPCODES, *FLAGS)] + ["FOPEN_DIRECT_IO", "FOPEN_KEEP_CACHE"]
    expected = [*LAYOUTS.values(), *(getattr(fuse, name) for name in (*OPCODES, *FLAGS)),
                fuse.FOPEN_DIRECT_IO, fuse.FOPEN_KEEP_CACHE]  # fmt: skip
    # Where single fields lie, for those that are packed and read one by one.
    offsets = {
        "fuse_attr": ["ino", "size", "blocks", "atime", "mtime", "ctime", "atimensec", "mtimensec", "ctimensec", "mode",
                      "nlink", "uid", "gid", "rdev", "blksize"],
        "fuse_in_header": ["len", "opcode", "unique", "nodeid", "uid", "gid", "pid", "total_extlen"],
        "fuse_init_out": ["major", "minor", "max_readahead", "flags", "max_background", "congestion_threshold",
                          "max_write", "time_gran", "max_pages"],
        "fuse_read_in": ["fh", "offset", "size"],
        "fuse_write_in": ["fh", "offset", "size"],
    }  # fmt: skip
    structs = {
        "fuse_attr": fuse.ATTR, "fuse_in_header": fuse.IN_HEADER, "fuse_init_out": fuse.INIT_OUT,
        "fuse_read_in": fuse.READ_IN, "fuse_write_in": fuse.WRITE_IN,
    }  # fmt: skip
    for name, fields in offsets.items():
        expressions += [f"offsetof(struct {name}, {field})" for field in fields]
        expected += _offsets(structs[name])[: len(fields)]
    lines = "".join(f'printf("%lu\\n", (unsigned long)({expression}));' for expression in expressions)
    program = f"#include <stdio.h>\n#include <stddef.h>\n#include <linux/fuse.h>\nint main(void) {{ {lines} }}\n"
    (tmp_path / "facts.c").write_text(program)
    subprocess.run([compiler, "-o", tmp_path / "facts", tmp_path / "facts.c"], check=True)
    found = [int(line) for line in subprocess.check_output([tmp_path / "facts"]).split()]
    assert dict(zip(expressions, found, strict=True)) == dict(zip(expressions, expected, strict=True))


def _offsets(layout: struct.Struct) -> list[int]:
    at, found = 0, []
    for letter in layout.format.removeprefix("<").replace("6I", "IIIIII"):
        found.append(at)
        at += struct.calcsize(f"<{letter}")
    return found


def test_times_sizes_and_names() -> None:
    packed = fuse.Attr(7, 0o100644, size=1025, mtime_ns=-1, nlink=2).pack()
    ino, size, blocks, atime, *_ = fuse.ATTR.unpack(packed)
    assert (ino, size, blocks, atime) == (7, 1025, 3, 0xFFFFFFFFFFFFFFFF)
    assert fuse.ATTR.unpack(packed)[6:9] == (999_999_999,) * 3
    for length in range(1, 30):
        record = fuse.dirent(1, 2, 8, b"n" * length)
        assert len(record) % 8 == 0 and len(record) - 24 - length < 8
        assert fuse.DIRENT.unpack_from(record) == (1, 2, length, 8)


@pytest.mark.parametrize(("major", "minor", "encoded"), [(1, 3, 0x103), (10, 300, 0x100A2C), (259, 255, 0x103FF)])
def test_device_numbers(major: int, minor: int, encoded: int) -> None:
    assert _new_encode(os.makedev(major, minor)) == encoded


# --- the server, with a socket for /dev/fuse


class Kernel:
    """The other end: sends requests, receives replies."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end

    def ask(self, opcode: int, body: bytes = b"", *, node: int = 1, unique: int = 5, extension: bytes = b"") -> None:
        length = fuse.IN_HEADER.size + len(body) + len(extension)
        self.end.send(
            fuse.IN_HEADER.pack(length, opcode, unique, node, 1, 2, 3, len(extension) // 8, 0) + body + extension
        )

    def reply(self) -> tuple[int, int, bytes]:
        data = self.end.recv(1 << 16)
        length, code, unique = fuse.OUT_HEADER.unpack_from(data)
        assert length == len(data)
        return unique, -code, data[16:]


@contextmanager
def served(
    handlers: dict[int, Callable[[fuse.Request], fuse.Reply]], flags: int = 0
) -> Iterator[tuple[Kernel, list[BaseException]]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    faults: list[BaseException] = []
    server = fuse.Server(handlers, init_flags=flags, on_fault=faults.append)
    server._fd = theirs.fileno()
    thread = threading.Thread(target=server._serve)
    thread.start()
    ours.settimeout(10)
    yield Kernel(ours), faults
    ours.close()
    thread.join(10)
    assert not thread.is_alive()
    theirs.close()


def test_init() -> None:
    wanted = fuse.MAX_PAGES | fuse.NO_OPEN_SUPPORT
    with served({}, wanted) as (kernel, _):
        kernel.ask(fuse.INIT, struct.pack("<IIII", 7, 38, 131072, fuse.NO_OPEN_SUPPORT | fuse.ASYNC_READ) + bytes(48))
        unique, code, body = kernel.reply()
        major, minor, readahead, flags, _, _, max_write, *_ = fuse.INIT_OUT.unpack(body)
        assert (unique, code, major, minor, readahead, max_write) == (5, 0, 7, 31, 1 << 20, fuse.MAX_WRITE)
        assert flags == fuse.NO_OPEN_SUPPORT  # wanted by us, and there
        kernel.ask(fuse.INIT, struct.pack("<IIII", 7, 30, 0, 0))
        assert kernel.reply()[1] == errno.EPROTO


def test_errors_and_faults_are_answered() -> None:
    def refuse(request: fuse.Request) -> bytes:
        raise fuse.FuseError(errno.ENOTDIR)

    def fail(request: fuse.Request) -> bytes:
        raise RuntimeError("unexpected")

    with served({fuse.LOOKUP: refuse, fuse.READ: fail}) as (kernel, faults):
        kernel.ask(fuse.LOOKUP, b"x\0")
        assert kernel.reply() == (5, errno.ENOTDIR, b"")
        kernel.ask(fuse.READ, unique=9)
        assert kernel.reply() == (9, errno.EIO, b"")
        assert [str(fault) for fault in faults] == ["unexpected"]
        kernel.ask(fuse.GETXATTR)
        assert kernel.reply()[1] == errno.ENOSYS
        kernel.ask(9999)
        assert kernel.reply()[1] == errno.ENOSYS
        kernel.ask(fuse.DESTROY)
        assert kernel.reply() == (5, 0, b"")


def test_what_wants_no_answer_gets_none() -> None:
    with served({fuse.FLUSH: lambda request: None}) as (kernel, _):
        for opcode in (fuse.FORGET, fuse.BATCH_FORGET, fuse.INTERRUPT, fuse.FLUSH):
            kernel.ask(opcode, bytes(16))
        kernel.ask(fuse.STATFS, unique=77)
        assert kernel.reply()[0] == 77


def test_requests_carry_their_caller_and_lose_their_extensions() -> None:
    seen: list[tuple[object, ...]] = []

    def lookup(request: fuse.Request) -> bytes:
        seen.append((request.node, request.uid, request.gid, request.pid, request.name(), len(request.body)))
        return b"r" * 3

    with served({fuse.LOOKUP: lookup}) as (kernel, _):
        kernel.ask(fuse.LOOKUP, b"name\0", node=42, extension=bytes(16))
        assert kernel.reply() == (5, 0, b"rrr")
        assert seen == [(42, 1, 2, 3, b"name", 5)]


def test_a_mount_that_fails_leaves_no_descriptor(tmp_path: Path) -> None:
    if os.geteuid() != 0 or not Path("/dev/fuse").exists():
        pytest.skip("needs root and /dev/fuse to mount")
    server = fuse.Server({}, init_flags=0, on_fault=lambda error: None)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        server.mount(str(tmp_path / "nowhere"), fsname="test", read_only=True, threads=1)
    assert len(os.listdir("/proc/self/fd")) == before
    server.close()
    server.close()
