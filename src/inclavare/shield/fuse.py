"""The kernel's FUSE protocol (linux/fuse.h, version 7.31), as much of it as the shield's file systems speak.

Why not a FUSE library: the server is the trust boundary, so it must see the caller's pid of every request, answer on
several threads that drop the GIL while they read and hash, and start within a few milliseconds. The path-based Python
bindings do none of these, and the one that is close has to be compiled on the user's machine.
"""

from __future__ import annotations

import errno
import os
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from . import mounts

LOOKUP, FORGET, GETATTR, SETATTR, READLINK, OPEN, READ, WRITE = 1, 2, 3, 4, 5, 14, 15, 16
STATFS, RELEASE, FSYNC, GETXATTR, LISTXATTR, FLUSH, INIT, OPENDIR = 17, 18, 20, 22, 23, 25, 26, 27
READDIR, RELEASEDIR, FSYNCDIR, ACCESS, INTERRUPT, DESTROY, BATCH_FORGET, READDIRPLUS = 28, 29, 30, 34, 36, 38, 42, 44

ASYNC_READ, DO_READDIRPLUS, READDIRPLUS_AUTO = 1 << 0, 1 << 13, 1 << 14
NO_OPEN_SUPPORT, PARALLEL_DIROPS, MAX_PAGES = 1 << 17, 1 << 18, 1 << 22
CACHE_SYMLINKS, NO_OPENDIR_SUPPORT = 1 << 23, 1 << 24

FOPEN_DIRECT_IO, FOPEN_KEEP_CACHE = 1 << 0, 1 << 1

#: fuse_in_header: len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding.
IN_HEADER: Final = struct.Struct("<IIQQIIIHH")
#: fuse_out_header: len, error, unique.
OUT_HEADER: Final = struct.Struct("<IiQ")
#: fuse_attr: ino size blocks atime mtime ctime, their nanoseconds, mode nlink uid gid rdev blksize flags.
ATTR: Final = struct.Struct("<QQQQQQIIIIIIIIII")
#: fuse_entry_out before its attr: nodeid generation entry_valid attr_valid and the nanoseconds.
ENTRY: Final = struct.Struct("<QQQQII")
#: fuse_attr_out before its attr.
ATTR_OUT: Final = struct.Struct("<QII")
READ_IN: Final = struct.Struct("<QQIIQII")
WRITE_IN: Final = struct.Struct("<QQIIQII")
OPEN_OUT: Final = struct.Struct("<QIi")
INIT_OUT: Final = struct.Struct("<IIIIHHIIHHII6I")
DIRENT: Final = struct.Struct("<QQII")

#: Largest write that is accepted; also keeps the read buffer small.
MAX_WRITE = 4096
_BUFFER = 8192 + MAX_WRITE
_FOREVER = 1 << 31

ROOT_ID = 1


@dataclass(slots=True)
class Request:
    """One request: header fields and what follows the header."""

    opcode: int
    unique: int
    node: int
    uid: int
    gid: int
    pid: int
    body: memoryview

    def name(self) -> bytes:
        """The NUL-terminated name that a LOOKUP carries."""
        return bytes(self.body).split(b"\0", 1)[0]


class FuseError(Exception):
    """Answer a request with this errno."""

    def __init__(self, code: int) -> None:
        super().__init__(os.strerror(code))
        self.code = code


@dataclass(slots=True)
class Attr:
    """A file's attributes as ``stat`` shows them; times in nanoseconds."""

    ino: int
    mode: int
    size: int = 0
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    nlink: int = 1
    rdev: int = 0

    def pack(self) -> bytes:
        """fuse_attr, 88 bytes."""
        seconds, nanos = divmod(self.mtime_ns, 1_000_000_000)
        return ATTR.pack(
            self.ino, self.size, (self.size + 511) // 512, seconds & 0xFFFFFFFFFFFFFFFF, seconds & 0xFFFFFFFFFFFFFFFF,
            seconds & 0xFFFFFFFFFFFFFFFF, nanos, nanos, nanos, self.mode, self.nlink, self.uid, self.gid, self.rdev,
            4096, 0,
        )  # fmt: skip


def entry(node: int, attr: Attr, *, valid: int = _FOREVER) -> bytes:
    """fuse_entry_out, 128 bytes; ``valid`` seconds for name and attributes."""
    return ENTRY.pack(node, 0, valid, valid, 0, 0) + attr.pack()


def attr_out(attr: Attr, *, valid: int = _FOREVER) -> bytes:
    """fuse_attr_out, 104 bytes."""
    return ATTR_OUT.pack(valid, 0, 0) + attr.pack()


def dirent(ino: int, offset: int, kind: int, name: bytes) -> bytes:
    """fuse_dirent, padded to 8 bytes; ``kind`` is the file type bits of the mode, shifted by 12."""
    record = DIRENT.pack(ino, offset, len(name), kind) + name
    return record + b"\0" * (-len(record) % 8)


Reply = bytes | memoryview | None
Handler = Callable[[Request], Reply]


class Server:
    """Serves one mount on a few threads until it is unmounted or closed.

    Args:
        handlers: opcode → function that returns the reply's body, ``None`` for no reply at all, or raises
            :class:`FuseError`. An opcode without a handler is answered with ENOSYS, which the kernel remembers.
        init_flags: wanted FUSE_INIT flags (those that the kernel has are used).
        on_fault: called with an unexpected exception of a handler; the request is answered with EIO.
    """

    def __init__(
        self, handlers: dict[int, Handler], *, init_flags: int, on_fault: Callable[[BaseException], None]
    ) -> None:
        self._handlers = handlers
        self._init_flags = init_flags
        self._on_fault = on_fault
        self._fd = -1
        self._threads: list[threading.Thread] = []

    def mount(self, target: str, *, fsname: str, read_only: bool, threads: int) -> None:
        """Mount on ``target`` and start serving.

        Raises:
            OSError: mount(2) failed, or there is no ``/dev/fuse``.
        """
        self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={self._fd},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions"
        try:
            mounts.mount(fsname, target, "fuse.inclavare", mounts.MS_RDONLY if read_only else 0, options)
        except OSError:
            os.close(self._fd)
            self._fd = -1
            raise
        for index in range(threads):
            thread = threading.Thread(target=self._serve, name=f"fuse-{fsname}-{index}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def _serve(self) -> None:
        while True:
            try:
                data = os.read(self._fd, _BUFFER)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
                    continue  # the request was interrupted before it was read
                return  # ENODEV: unmounted; EBADF: closed
            if not data:
                return
            self._answer(data)

    def _answer(self, data: bytes) -> None:
        length, opcode, unique, node, uid, gid, pid, extra, _ = IN_HEADER.unpack_from(data)
        body = memoryview(data)[IN_HEADER.size : length - extra * 8]
        request = Request(opcode, unique, node, uid, gid, pid, body)
        reply: Reply
        try:
            if opcode == INIT:
                reply = self._initialise(body)
            elif opcode in (FORGET, BATCH_FORGET, INTERRUPT):
                return
            elif opcode == DESTROY:
                reply = b""
            else:
                handler = self._handlers.get(opcode)
                if handler is None:
                    raise FuseError(errno.ENOSYS)
                reply = handler(request)
        except FuseError as error:
            self._send(unique, error.code, b"")
            return
        except Exception as error:
            self._on_fault(error)
            self._send(unique, errno.EIO, b"")
            return
        if reply is not None:
            self._send(unique, 0, reply)

    def _initialise(self, body: memoryview) -> bytes:
        _major, minor, readahead, flags = struct.unpack_from("<IIII", body)
        if minor < 31:
            raise FuseError(errno.EPROTO)
        # 256 pages a request: a megabyte of readahead reaches the server in one piece.
        return INIT_OUT.pack(
            7, 31, max(readahead, 1 << 20), flags & self._init_flags, 64, 48, MAX_WRITE, 1, 256, 0, 0, 0, *([0] * 6)
        )

    def _send(self, unique: int, code: int, reply: bytes | memoryview) -> None:
        header = OUT_HEADER.pack(OUT_HEADER.size + len(reply), -code, unique)
        try:
            os.writev(self._fd, (header, reply))
        except OSError:
            pass  # ENOENT: the caller was interrupted; ENODEV: unmounted

    def close(self) -> None:
        """Stop serving; the kernel then fails every further access with ENOTCONN. Idempotent."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)
