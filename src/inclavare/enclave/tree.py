"""The measured file tree: one SHA-256 root over every path's type, mode, owner, link target, size and content.

The format, and how to recompute a root independently, is in ``docs/formats.md``. A tree is held as the bytes that
are stored in an image; nodes come out of it on demand, and each is checked against the root when it is first
reached, so that a tree file needs no trust and costs nothing to open.
"""

from __future__ import annotations

import os
import stat
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from ..errors import IntegrityError, ResourceError, UsageError

#: Files are hashed in blocks of this many bytes.
BLOCK_SIZE = 128 * 1024
#: A node's kind → the file type bits of its mode.
FILE_TYPES = {
    "d": stat.S_IFDIR,
    "f": stat.S_IFREG,
    "l": stat.S_IFLNK,
    "c": stat.S_IFCHR,
    "b": stat.S_IFBLK,
    "p": stat.S_IFIFO,
    "s": stat.S_IFSOCK,
}
#: The directory at the top of a root file system that is not part of the tree.
RESERVED_NAME = b".inclavare"

_NODE_TAG = b"inclavare.tree.v1\0"
_BLOCKS_TAG = b"inclavare.blocks.v1\0"

_MAGIC = b"INCLTREE"
_VERSION = 1
#: magic, version, nodes, bytes of strings, block hashes, CRC-32 of everything else, zero.
_HEADER = struct.Struct("<8sIIQQII")
_CRC_OFFSET = 32
#: type, mode, uid, gid, name offset, name length, count, size, mtime, reference, digest.
_RECORD = struct.Struct("<BxHIIIIIQqQ32s")
_META = struct.Struct("<BIII")
_DIGEST_OFFSET = _RECORD.size - 32

_NO_CHILDREN: dict[bytes, int] = {}
#: Directories nested deeper than this are refused: every level holds a descriptor while it is read.
MAX_DEPTH = 512
#: Below this many bytes to hash, starting threads costs more than it saves.
_THREADS_FROM = 4 << 20
#: A file of at least this many bytes is worth a thread.
_THREAD_FILE = 512 << 10


class Node(NamedTuple):
    """One path of the tree.

    Attributes:
        kind: ``d`` directory, ``f`` file, ``l`` link, ``c``/``b`` device, ``p`` FIFO, ``s`` socket.
        mode: permission bits, at most 0o7777.
        uid: owner.
        gid: group.
        size: bytes of content of a file, length of a link's target, else 0.
        mtime_ns: modification time in nanoseconds since 1970; carried, not measured.
        target: a link's target.
        rdev: major and minor number of a device.
        children: entries of a directory by name, in bytewise order of the names.
        blocks: the 32-byte SHA-256 hashes of a file's 128 KiB blocks, concatenated.
        digest: 32 bytes.
    """

    kind: str
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    target: bytes
    rdev: tuple[int, int]
    children: dict[bytes, int]
    blocks: bytes
    digest: bytes


def block_count(size: int) -> int:
    """Blocks of a file of ``size`` bytes."""
    return (size + BLOCK_SIZE - 1) // BLOCK_SIZE


def content_root(size: int, blocks: bytes) -> bytes:
    """The 32-byte digest of a file's content.

    Args:
        size: bytes of content.
        blocks: concatenated SHA-256 hashes (32 bytes each) of its blocks.
    """
    return sha256(_BLOCKS_TAG + size.to_bytes(8, "little") + blocks).digest()


def _damaged(what: str, found: object = None, expected: object = None) -> IntegrityError:
    return IntegrityError(
        f"the file tree is damaged: {what}",
        id="enclave.tree.damaged",
        found=found,
        expected=expected,
        remedy="build the enclave image again, or fetch it again from where it was published",
    )


class Tree:
    """A file tree over its serialised form; node 0 is the root directory.

    A tree made by :func:`build` is trusted. One from :meth:`from_bytes` yields nodes only after :meth:`verify_root`
    and then checks each node on first access, so :class:`IntegrityError` can come out of every method.
    """

    __slots__ = ("_blocks", "_data", "_nodes", "_strings", "_strings_end", "_total_blocks", "_verified", "count")

    def __init__(self, data: bytes, *, trusted: bool = False) -> None:
        if len(data) < _HEADER.size:
            raise _damaged("it is truncated", f"{len(data)} bytes", f"at least {_HEADER.size}")
        magic, version, count, strings, blocks, crc, zero = _HEADER.unpack_from(data)
        if magic != _MAGIC or version != _VERSION or zero:
            raise _damaged(
                "it does not begin like a file tree", data[:12].hex(), f"{_MAGIC.decode()} version {_VERSION}"
            )
        self._strings = _HEADER.size + count * _RECORD.size
        self._strings_end = self._strings + strings
        self._blocks = self._strings_end
        end = self._blocks + blocks * 32
        if count < 1 or len(data) != end:
            raise _damaged("its length does not fit its header", f"{len(data)} bytes", f"{end} bytes, one node or more")
        if not trusted and crc != _checksum(data):
            raise _damaged("its checksum does not match", f"{_checksum(data):08x}", f"{crc:08x}")
        self._data = data
        self._total_blocks = blocks
        self.count: int = count
        self._nodes: dict[int, Node] = {}
        self._verified: bool = trusted
        if data[_HEADER.size] != 0x64:
            raise _damaged("its root is not a directory")

    # --- reading -------------------------------------------------------------------------------------------------

    @classmethod
    def from_bytes(cls, data: bytes) -> Tree:
        """Open a stored tree.

        Raises:
            IntegrityError: truncated, prolonged or damaged, or not a tree.
        """
        return cls(bytes(data))

    def to_bytes(self) -> bytes:
        """The serialised form (``docs/formats.md``)."""
        return self._data

    def __len__(self) -> int:
        return self.count

    @property
    def root(self) -> bytes:
        """The 32-byte digest of the root directory, as recorded; :meth:`verify_root` compares it."""
        return self._digest(0)

    def verify_root(self, expected: bytes) -> None:
        """Trust this tree as far as ``expected`` (32 bytes) vouches for it.

        Raises:
            IntegrityError: it is another tree, or its root directory is damaged.
        """
        if self.root != expected:
            raise IntegrityError(
                "the stored file tree is not the measured one",
                id="enclave.tree.root",
                found=self.root.hex(),
                expected=expected.hex(),
                remedy="build the enclave image again, or fetch it again from where it was published",
            )
        self._verified = True
        self._nodes.pop(0, None)
        self.node(0)

    def node(self, index: int) -> Node:
        """The node, its digest checked against its own fields.

        Only indices that came out of this tree's :attr:`Node.children` (or 0) are bound to the root.

        Raises:
            IntegrityError: damaged, or the root has not been verified.
        """
        found = self._nodes.get(index)
        if found is None:
            found = self._nodes[index] = self._load(index)
        return found

    def child(self, index: int, name: bytes) -> int | None:
        """Index of the entry ``name`` of directory ``index``, or ``None``; the entry is verified on first access.

        Raises:
            IntegrityError: damaged, or the root has not been verified.
        """
        found = self.node(index).children.get(name)
        if found is not None and found not in self._nodes:
            self._nodes[found] = self._load(found)
        return found

    def find(self, path: str | bytes) -> int | None:
        """Index of an absolute path, links not followed, or ``None``.

        Raises:
            IntegrityError: damaged, or the root has not been verified.
        """
        index: int | None = 0
        for part in os.fsencode(path).split(b"/"):
            if part in (b"", b"."):
                continue
            if index is None:
                return None
            index = self.child(index, part)
        return index

    def walk(self) -> Iterator[tuple[bytes, Node]]:
        """Every path (bytes, beginning with ``/``) and its node, parents first, names in bytewise order.

        Raises:
            IntegrityError: damaged, or the root has not been verified.
        """
        seen = 0
        todo: list[tuple[bytes, int]] = [(b"/", 0)]
        while todo:
            path, index = todo.pop()
            node = self.node(index)
            seen += 1
            if seen > self.count:
                raise _damaged("a directory has two parents")
            yield path, node
            prefix = path if path == b"/" else path + b"/"
            todo.extend((prefix + name, child) for name, child in reversed(node.children.items()))
        if seen != self.count:
            raise _damaged("it holds nodes that no directory names", f"{self.count} nodes", f"{seen}")

    def check(self) -> None:
        """Verify every node.

        Raises:
            IntegrityError: damaged, or the root has not been verified.
        """
        for _ in self.walk():
            pass

    def _digest(self, index: int) -> bytes:
        start = _HEADER.size + index * _RECORD.size + _DIGEST_OFFSET
        return self._data[start : start + 32]

    def _string(self, offset: int, length: int) -> bytes:
        start = self._strings + offset
        if start + length > self._strings_end:
            raise _damaged("a name lies outside it")
        return self._data[start : start + length]

    def _load(self, index: int) -> Node:
        if not self._verified:
            raise IntegrityError(
                "the file tree has not been compared with a measured root", id="enclave.tree.unverified"
            )
        if not 0 <= index < self.count:
            raise _damaged("an entry lies outside it")
        kind, mode, uid, gid, _, _, count, size, mtime, ref, digest = _RECORD.unpack_from(
            self._data, _HEADER.size + index * _RECORD.size
        )
        letter = chr(kind)
        target = blocks = body = b""
        rdev = (0, 0)
        children = _NO_CHILDREN
        if letter == "f":
            if count != block_count(size) or ref + count > self._total_blocks:
                raise _damaged("a file's blocks lie outside it")
            start = self._blocks + ref * 32
            blocks = self._data[start : start + count * 32]
            body = size.to_bytes(8, "little") + content_root(size, blocks)
        elif letter == "d":
            children, body = self._entries(index, ref, count)
        elif letter == "l":
            target = self._string(ref, count)
            body = count.to_bytes(4, "little") + target
        elif letter in "cb":
            rdev = (ref >> 32, ref & 0xFFFFFFFF)
            body = struct.pack("<II", *rdev)
        elif letter not in "ps":
            raise _damaged("a node has an unknown type", kind)
        if mode > 0o7777 or (letter not in "fl" and size) or (letter == "l" and size != count):
            raise _damaged("a node has impossible fields")
        actual = sha256(_NODE_TAG + _META.pack(kind, mode, uid, gid) + body).digest()
        if actual != digest:
            raise _damaged("a node differs from what its parent records", actual.hex(), digest.hex())
        return Node(letter, mode, uid, gid, size, mtime, target, rdev, children, blocks, digest)

    def _entries(self, index: int, first: int, count: int) -> tuple[dict[bytes, int], bytes]:
        # Children always follow their parent, which rules out cycles without a digest having to.
        if count and (first <= index or first + count > self.count):
            raise _damaged("a directory's entries lie outside it")
        names: dict[bytes, int] = {}
        body = [count.to_bytes(4, "little")]
        last = b""
        for child in range(first, first + count):
            at = _HEADER.size + child * _RECORD.size
            offset, length = struct.unpack_from("<II", self._data, at + 12)
            name = self._string(offset, length)
            if name <= last or length > 255 or b"/" in name or b"\0" in name or name in (b".", b".."):
                raise _damaged("a directory has an impossible entry", repr(name))
            names[name] = child
            body += (length.to_bytes(2, "little"), name, self._digest(child))
            last = name
        return names, b"".join(body)


def _checksum(data: bytes) -> int:
    return zlib.crc32(memoryview(data)[_CRC_OFFSET + 4 :], zlib.crc32(memoryview(data)[:_CRC_OFFSET]))


class DigestCache:
    """Block hashes of files by (inode, size, mtime, ctime), kept in a file between builds.

    The cache is only ever consulted where a tree is *made*; who reads files through a tree checks every byte against
    it, so that a wrong entry makes a file unreadable and never makes a changed file acceptable.

    Args:
        path: the cache file; missing, damaged or foreign contents are an empty cache.
    """

    #: Above this size a saved cache keeps only what the last build used.
    LIMIT = 64 << 20
    _MAGIC = b"inclavare.digests.v1\0"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._used: dict[tuple[int, int, int, int], bytes] = {}
        self._dirty = False
        self._known: dict[tuple[int, int, int, int], bytes] = self._read()

    def _read(self) -> dict[tuple[int, int, int, int], bytes]:
        import marshal

        try:
            raw = self._path.read_bytes()
            start = len(self._MAGIC) + 4
            # The checksum comes first: marshal must never see damaged bytes.
            if raw.startswith(self._MAGIC) and zlib.crc32(memoryview(raw)[start:]) == int.from_bytes(
                raw[start - 4 : start], "little"
            ):
                flat = marshal.loads(memoryview(raw)[start:])  # noqa: S302  (checksummed, in a directory of root's)
                if isinstance(flat, dict):
                    return flat
        except (OSError, ValueError, EOFError, TypeError):
            pass
        return {}

    def get(self, key: tuple[int, int, int, int]) -> bytes | None:
        """Concatenated block hashes of the file with this key, or ``None``."""
        found = self._known.get(key)
        if found is not None:
            self._used[key] = found
        return found

    def put(self, key: tuple[int, int, int, int], blocks: bytes) -> None:
        """Remember a file, unless it was changed so recently that its timestamps may not show the next change."""
        ctime = key[3]
        # File systems that store whole seconds need a longer wait than one clock tick.
        wait = 2_000_000_000 if ctime % 1_000_000_000 == 0 else 100_000_000
        if ctime + wait > time.time_ns():
            return
        self._known[key] = self._used[key] = blocks
        self._dirty = True

    def save(self) -> None:
        """Write the file atomically if there is anything new; a full disk or a read-only one is no error."""
        if not self._dirty:
            return
        import marshal

        payload = marshal.dumps(self._known)
        if len(payload) > self.LIMIT:
            payload = marshal.dumps(self._used)
        temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}.new")
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            with os.fdopen(fd, "wb") as handle:
                handle.write(self._MAGIC + zlib.crc32(payload).to_bytes(4, "little") + payload)
            temporary.replace(self._path)
            self._dirty = False
        except OSError:
            try:
                temporary.unlink(missing_ok=True)
            except OSError:
                pass


# --- building ----------------------------------------------------------------------------------------------------


class _Entry:
    """A node while the tree is being made."""

    __slots__ = (
        "blocks",
        "digest",
        "entries",
        "first",
        "gid",
        "kind",
        "mode",
        "mtime",
        "name",
        "rdev",
        "size",
        "text",
        "uid",
    )
    # Set only on the kinds of nodes that have them.
    blocks: bytes
    digest: bytes
    text: bytes
    rdev: tuple[int, int]

    def __init__(self, name: bytes, kind: int, info: os.stat_result) -> None:
        self.name = name
        self.kind = kind
        self.mode = info.st_mode & 0o7777
        self.uid = info.st_uid
        self.gid = info.st_gid
        self.mtime = info.st_mtime_ns
        self.size = 0
        self.first = 0
        self.entries: list[_Entry] | None = None


class _Missing(NamedTuple):
    """A file whose block hashes the cache does not have."""

    entry: _Entry
    path: bytes
    key: tuple[int, int, int, int]


_KINDS = {bits: ord(letter) for letter, bits in FILE_TYPES.items()}

#: Path components below a directory that a rule is about; ``None``: the rule holds for everything below.
_Rules = dict[bytes, "_Rules | None"]


def _rules(paths: Sequence[str]) -> _Rules | None:
    top: _Rules = {}
    for path in paths:
        parts = [os.fsencode(part) for part in path.split("/") if part]
        if not parts:
            return None
        here = top
        for part in parts[:-1]:
            below = here.setdefault(part, {})
            if below is None:
                break
            here = below
        else:
            here[parts[-1]] = None
    return top


def build(
    rootfs: Path,
    *,
    cache: DigestCache | None = None,
    progress: Callable[[int], None] | None = None,
    total: Callable[[int], None] | None = None,
    trusted: Sequence[str] = ("/",),
    allowed: Sequence[str] = (),
) -> Tree:
    """Measure a root file system.

    Links are never followed, and other file systems mounted below the root are refused.

    Args:
        rootfs: the root directory; its top-level ``.inclavare`` is left out.
        cache: where block hashes of unchanged files come from; saved when the tree is done.
        progress: called with a number of bytes each time that many more have been hashed.
        total: called once with the number of bytes that will be hashed.
        trusted: absolute paths that the tree covers; what is elsewhere does not exist for the enclave.
        allowed: absolute paths whose content is not verified: a directory is recorded without its entries,
            anything else is left out.

    Raises:
        UsageError: ``rootfs`` is not a readable directory, or has a file system mounted in it.
        IntegrityError: a file changed while it was read.
        ResourceError: a file name, the depth or the number of files is beyond what a tree can hold.
    """
    import gc

    try:
        root_fd = os.open(rootfs, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(
            f"{rootfs} cannot be measured",
            id="enclave.tree.rootfs",
            found=error.strerror,
            expected="a readable root file system directory",
        ) from None
    collecting = gc.isenabled()
    # Tens of thousands of small objects, none of them garbage: collections would take a third of the time.
    gc.disable()
    try:
        root, missing = _scan(root_fd, rootfs, cache, _rules(trusted), _rules(allowed) or {})
        if total is not None:
            total(sum(item.entry.size for item in missing))
        if missing:
            _hash_files(root_fd, rootfs, missing, cache, progress)
        data = _serialise(root)
    except OSError as error:
        where = os.fsdecode(error.filename) if error.filename is not None else str(rootfs)
        raise UsageError(
            f"{where} cannot be measured",
            id="enclave.tree.read",
            found=error.strerror,
            remedy="measure as a user who can read every file of the image (usually root)",
        ) from None
    finally:
        if collecting:
            gc.enable()
        os.close(root_fd)
    if cache is not None:
        cache.save()
    return Tree(data, trusted=True)


class _Frame(NamedTuple):
    """An open directory; ``todo`` are its subdirectories that are still to be read."""

    fd: int
    path: bytes
    entry: _Entry
    keep: _Rules | None
    cut: _Rules
    todo: list[tuple[_Entry, _Rules | None, _Rules]]


def _scan(
    root_fd: int, rootfs: Path, cache: DigestCache | None, keep: _Rules | None, cut: _Rules
) -> tuple[_Entry, list[_Missing]]:
    info = os.fstat(root_fd)
    device = info.st_dev
    root = _Entry(b"", ord("d"), info)
    missing: list[_Missing] = []
    frames = [_Frame(os.dup(root_fd), b"", root, keep, cut, [])]
    try:
        _read_directory(frames[0], cache, missing)
        while frames:
            frame = frames[-1]
            if not frame.todo:
                os.close(frames.pop().fd)
                continue
            entry, below, cut_below = frame.todo.pop()
            path = frame.path + entry.name
            if len(frames) > MAX_DEPTH:
                raise ResourceError(
                    f"{os.fsdecode(path)} is nested too deeply",
                    id="enclave.tree.depth",
                    expected=f"at most {MAX_DEPTH} levels",
                )
            try:
                fd = os.open(entry.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=frame.fd)
            except OSError as error:
                error.filename = os.fsencode(rootfs) + b"/" + path
                raise
            frames.append(_Frame(fd, path + b"/", entry, below, cut_below, []))
            if os.fstat(fd).st_dev != device:
                raise UsageError(
                    f"another file system is mounted at /{os.fsdecode(path)} in {rootfs}",
                    id="enclave.tree.mount",
                    remedy="unmount it, or measure a copy of the root file system",
                )
            _read_directory(frames[-1], cache, missing)
    finally:
        for frame in frames:
            os.close(frame.fd)
    return root, missing


def _read_directory(frame: _Frame, cache: DigestCache | None, missing: list[_Missing]) -> None:
    keep, cut, fd = frame.keep, frame.cut, frame.fd
    entries: list[_Entry] = []
    frame.entry.entries = entries
    at_top = not frame.path
    with os.scandir(fd) as listing:
        for item in listing:
            name = os.fsencode(item.name)
            if at_top and name == RESERVED_NAME:
                continue
            below: _Rules | None = None
            if keep is not None:
                if name not in keep:
                    continue
                below = keep[name]
            info = item.stat(follow_symlinks=False)
            kind = _KINDS[stat.S_IFMT(info.st_mode)]
            entry = _Entry(name, kind, info)
            cut_below: _Rules = {}
            if name in cut:
                rule = cut[name]
                if rule is None:
                    if kind == 0x64:
                        entry.entries = []
                        entries.append(entry)
                    continue
                cut_below = rule
            entries.append(entry)
            if kind == 0x66:  # f
                entry.size = info.st_size
                entry.blocks = b""
                if info.st_size:
                    key = (info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
                    known = cache.get(key) if cache is not None else None
                    if known is None or len(known) != 32 * block_count(info.st_size):
                        missing.append(_Missing(entry, frame.path + name, key))
                    else:
                        entry.blocks = known
            elif kind == 0x64:  # d
                frame.todo.append((entry, below, cut_below))
            elif kind == 0x6C:  # l
                entry.text = os.fsencode(os.readlink(item.name, dir_fd=fd))
                entry.size = len(entry.text)
            elif kind in (0x63, 0x62):
                entry.rdev = (os.major(info.st_rdev), os.minor(info.st_rdev))


def _hash_files(
    root_fd: int,
    rootfs: Path,
    missing: list[_Missing],
    cache: DigestCache | None,
    progress: Callable[[int], None] | None,
) -> None:
    def one(item: _Missing) -> None:
        item.entry.blocks = _hash_file(root_fd, rootfs, item, progress)
        if cache is not None:
            cache.put(item.key, item.entry.blocks)

    # Hashing lets go of the interpreter lock for large pieces only: threads make small files slower.
    large = [item for item in missing if item.entry.size >= _THREAD_FILE]
    workers = min(os.cpu_count() or 1, 4)
    if sum(item.entry.size for item in large) < _THREADS_FROM or workers == 1:
        for item in missing:
            one(item)
        return
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(workers, thread_name_prefix="measure") as pool:
        futures = [pool.submit(one, item) for item in large]
        try:
            for item in missing:
                if item.entry.size < _THREAD_FILE:
                    one(item)
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _hash_file(root_fd: int, rootfs: Path, item: _Missing, progress: Callable[[int], None] | None) -> bytes:
    from .paths import open_beneath

    try:
        fd = open_beneath(root_fd, item.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        error.filename = os.fsencode(rootfs) + b"/" + item.path
        raise
    try:
        hashes: list[bytes] = []
        size = 0
        buffer = bytearray(min(1 << 20, max(item.entry.size, 1)))
        view = memoryview(buffer)
        filled = 0
        while True:
            got = os.readv(fd, [view[filled:]])
            filled += got
            if got and filled < len(buffer):
                continue
            size += filled
            hashes += [sha256(view[at : min(at + BLOCK_SIZE, filled)]).digest() for at in range(0, filled, BLOCK_SIZE)]
            if progress is not None and filled:
                progress(filled)
            if filled < len(buffer) or size > item.entry.size:
                break
            filled = 0
        info = os.fstat(fd)
    finally:
        os.close(fd)
    if size != item.entry.size or (info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns) != item.key:
        raise IntegrityError(
            f"/{os.fsdecode(item.path)} in {rootfs} changed while it was measured",
            id="enclave.tree.changed",
            found=f"{size} bytes",
            expected=f"{item.entry.size} bytes",
            remedy="stop whatever writes to the root file system, and try again",
        )
    return b"".join(hashes)


def _serialise(root: _Entry) -> bytes:
    order = [root]
    for entry in order:
        if entry.entries:
            entry.entries.sort(key=_by_name)
            entry.first = len(order)
            order += entry.entries
    meta, tag = _META.pack, _NODE_TAG
    # Children come after their parent, so from the end every child's digest is there before it is needed.
    for entry in reversed(order):
        kind = entry.kind
        if kind == 0x66:
            body = entry.size.to_bytes(8, "little") + content_root(entry.size, entry.blocks)
        elif kind == 0x64:
            entries = entry.entries or []
            parts = [len(entries).to_bytes(4, "little")]
            for child in entries:
                parts += (len(child.name).to_bytes(2, "little"), child.name, child.digest)
            body = b"".join(parts)
        elif kind == 0x6C:
            body = entry.size.to_bytes(4, "little") + entry.text
        elif kind in (0x63, 0x62):
            body = struct.pack("<II", *entry.rdev)
        else:
            body = b""
        entry.digest = sha256(tag + meta(kind, entry.mode, entry.uid, entry.gid) + body).digest()
    records: list[bytes] = []
    strings: list[bytes] = []
    blocks: list[bytes] = []
    text = hashes = 0
    pack = _RECORD.pack
    for entry in order:
        kind = entry.kind
        name_at = text
        strings.append(entry.name)
        text += len(entry.name)
        count = ref = 0
        if kind == 0x66:
            count = len(entry.blocks) >> 5
            ref = hashes
            blocks.append(entry.blocks)
            hashes += count
        elif kind == 0x64:
            count = len(entry.entries or ())
            ref = entry.first
        elif kind == 0x6C:
            count = entry.size
            ref = text
            strings.append(entry.text)
            text += count
        elif kind in (0x63, 0x62):
            ref = entry.rdev[0] << 32 | entry.rdev[1]
        records.append(
            pack(
                kind,
                entry.mode,
                entry.uid,
                entry.gid,
                name_at,
                len(entry.name),
                count,
                entry.size,
                entry.mtime,
                ref,
                entry.digest,
            )
        )
    if text > 0xFFFFFFFF:
        raise ResourceError(
            "the root file system has too many files", id="enclave.tree.size", found=f"{len(order)} files"
        )
    header = _HEADER.pack(_MAGIC, _VERSION, len(order), text, hashes, 0, 0)
    payload = b"".join([header, *records, *strings, *blocks])
    return b"".join(
        (payload[:_CRC_OFFSET], _checksum(payload).to_bytes(4, "little"), memoryview(payload)[_CRC_OFFSET + 4 :])
    )


def _by_name(entry: _Entry) -> bytes:
    return entry.name
