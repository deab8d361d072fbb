"""The shielded root: a read-only file system whose every answer comes from the measured tree.

Names, types, modes, owners, sizes and link targets are the tree's; the host is asked only for file contents, and a
block that does not hash to what was measured is never handed out: the read fails with EIO and is reported. What is
not in the tree does not exist, whatever lies on the host.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable

from ..enclave.paths import RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, openat2
from ..enclave.tree import BLOCK_SIZE, FILE_TYPES, Node, Tree
from ..errors import IntegrityError
from . import fuse

#: Host files kept open per serving thread.
_OPEN_FILES = 128
#: Verified blocks kept per serving thread, for small reads at random places.
_BLOCKS = 8
#: FUSE's statfs reply: blocks, bfree, bavail, files, ffree, bsize, namelen, frsize, padding.
_STATFS = struct.Struct("<QQQQQIII7I")

Violation = Callable[[str, str], None]


class TreeFs:
    """Serves a :class:`~inclavare.enclave.tree.Tree` over FUSE, contents from a host directory.

    Args:
        tree: verified down from its root as far as it is used.
        root: file descriptor of the host directory with the contents; stays the caller's.
        on_violation: called with a path and a reason, each time that the host's contents differ from the tree.
        on_fault: called with an unexpected exception.
    """

    def __init__(
        self, tree: Tree, root: int, *, on_violation: Violation, on_fault: Callable[[BaseException], None]
    ) -> None:
        self._tree = tree
        self._root = root
        self._on_violation = on_violation
        self._where: dict[int, tuple[int, bytes]] = {}
        self._local = threading.local()
        self._server = fuse.Server(
            {
                fuse.LOOKUP: self._lookup,
                fuse.GETATTR: self._getattr,
                fuse.READLINK: self._readlink,
                fuse.READ: self._read,
                fuse.READDIR: self._readdir,
                fuse.READDIRPLUS: self._readdirplus,
                fuse.STATFS: self._statfs,
            },
            # No OPEN and no OPENDIR handler: the kernel then opens without asking and keeps the page cache.
            init_flags=fuse.ASYNC_READ | fuse.DO_READDIRPLUS | fuse.READDIRPLUS_AUTO | fuse.PARALLEL_DIROPS
            | fuse.MAX_PAGES | fuse.CACHE_SYMLINKS | fuse.NO_OPEN_SUPPORT | fuse.NO_OPENDIR_SUPPORT,
            on_fault=on_fault,
        )  # fmt: skip

    def mount(self, target: str, *, threads: int = 3) -> None:
        """Mount on ``target`` and serve.

        Raises:
            OSError: the mount failed.
        """
        self._server.mount(target, fsname="inclavare-tree", read_only=True, threads=threads)
        _raise_readahead(target)

    def path(self, index: int) -> str:
        """The path of a node that has been looked up, for reports."""
        parts: list[bytes] = []
        while index in self._where:
            index, name = self._where[index]
            parts.append(name)
        return "/" + os.fsdecode(b"/".join(reversed(parts)))

    def _attr(self, index: int, node: Node) -> fuse.Attr:
        size = node.size if node.kind == "f" else len(node.target) if node.kind == "l" else 0
        rdev = os.makedev(*node.rdev) if node.kind in "cb" else 0
        # Overlayfs and find take a directory's link count of 1 as "not counted".
        return fuse.Attr(
            index + 1, FILE_TYPES[node.kind] | node.mode, size, node.uid, node.gid, node.mtime_ns, 1, _new_encode(rdev)
        )

    def _child(self, index: int, name: bytes) -> int:
        try:
            child = self._tree.child(index, name)
        except IntegrityError as error:
            self._on_violation(os.path.join(self.path(index), os.fsdecode(name)), error.message)
            raise fuse.FuseError(errno.EIO) from None
        if child is None:
            raise fuse.FuseError(errno.ENOENT)
        self._where.setdefault(child, (index, name))
        return child

    def _lookup(self, request: fuse.Request) -> bytes:
        try:
            child = self._child(request.node - 1, request.name())
        except fuse.FuseError as error:
            if error.code != errno.ENOENT:
                raise
            return fuse.entry(0, fuse.Attr(0, 0))  # node 0: a negative entry that the kernel may keep
        return fuse.entry(child + 1, self._attr(child, self._tree.node(child)))

    def _getattr(self, request: fuse.Request) -> bytes:
        index = request.node - 1
        return fuse.attr_out(self._attr(index, self._tree.node(index)))

    def _readlink(self, request: fuse.Request) -> bytes:
        return self._tree.node(request.node - 1).target

    def _statfs(self, request: fuse.Request) -> bytes:
        return _STATFS.pack(0, 0, 0, len(self._tree), 0, 4096, 255, 4096, *([0] * 7))

    def _listing(self, request: fuse.Request, *, plus: bool) -> bytes:
        _, offset, size, *_ = fuse.READ_IN.unpack_from(request.body)
        index = request.node - 1
        node = self._tree.node(index)
        out = bytearray()
        # "." and ".." come first, as programs that count on them expect.
        names = [b".", b"..", *node.children]
        for position in range(offset, len(names)):
            name = names[position]
            if position < 2:
                record = fuse.dirent(request.node, position + 1, stat.S_IFDIR >> 12, name)
                head = b"\0" * 128 if plus else b""
            else:
                child = self._child(index, name)
                attr = self._attr(child, self._tree.node(child))
                record = fuse.dirent(child + 1, position + 1, attr.mode >> 12, name)
                head = fuse.entry(child + 1, attr) if plus else b""
            if len(out) + len(head) + len(record) > size:
                break
            out += head + record
        return bytes(out)

    def _readdir(self, request: fuse.Request) -> bytes:
        return self._listing(request, plus=False)

    def _readdirplus(self, request: fuse.Request) -> bytes:
        return self._listing(request, plus=True)

    def _read(self, request: fuse.Request) -> bytes | memoryview:
        _, offset, size, *_ = fuse.READ_IN.unpack_from(request.body)
        index = request.node - 1
        node = self._tree.node(index)
        end = min(offset + size, node.size)
        if offset >= end:
            return b""
        first, last = offset // BLOCK_SIZE, (end - 1) // BLOCK_SIZE
        start = first * BLOCK_SIZE
        blocks: OrderedDict[tuple[int, int], bytes] | None = getattr(self._local, "blocks", None)
        if blocks is None:
            blocks = self._local.blocks = OrderedDict()
        if first == last:
            data = blocks.get((index, first))
            if data is None:
                data = self._verified(index, node, first, last)
                blocks[index, first] = data
                if len(blocks) > _BLOCKS:
                    blocks.popitem(last=False)
        else:
            data = self._verified(index, node, first, last)
        return memoryview(data)[offset - start : end - start]

    def _verified(self, index: int, node: Node, first: int, last: int) -> bytes:
        """Blocks ``first`` to ``last``, checked; raises EIO."""
        start = first * BLOCK_SIZE
        expected = min((last + 1) * BLOCK_SIZE, node.size) - start
        try:
            data = os.pread(self._host_file(index), expected, start)
        except OSError as error:
            self._on_violation(self.path(index), f"the host's file cannot be used: {error.strerror}")
            raise fuse.FuseError(errno.EIO) from None
        view = memoryview(data)
        for number in range(first, last + 1):
            block = view[(number - first) * BLOCK_SIZE : (number - first + 1) * BLOCK_SIZE]
            if hashlib.sha256(block).digest() != node.blocks[number * 32 : number * 32 + 32]:
                self._on_violation(self.path(index), f"block {number} differs from what was measured")
                raise fuse.FuseError(errno.EIO)
        return data

    def _host_file(self, index: int) -> int:
        files: OrderedDict[int, int] | None = getattr(self._local, "files", None)
        if files is None:
            files = self._local.files = OrderedDict()
        fd = files.get(index)
        if fd is not None:
            files.move_to_end(index)
            return fd
        # O_NONBLOCK: a FIFO that the host put in the file's place must not hold up the server.
        fd = openat2(
            self._root,
            self.path(index).lstrip("/"),
            os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW,
            RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS,
        )
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size != self._tree.node(index).size:
            os.close(fd)
            raise OSError(errno.EINVAL, "another type or size than measured")
        files[index] = fd
        if len(files) > _OPEN_FILES:
            os.close(files.popitem(last=False)[1])
        return fd


def _new_encode(rdev: int) -> int:
    """The kernel's 32-bit device number (new_encode_dev)."""
    major, minor = os.major(rdev), os.minor(rdev)
    return (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)


def _raise_readahead(target: str) -> None:
    """Let the kernel read four megabytes ahead, so that several requests are hashed at once.

    A sysfs that cannot be written costs speed only.
    """
    device = os.stat(target).st_dev
    try:
        with open(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb", "w") as handle:
            handle.write("4096")
    except OSError:
        pass
