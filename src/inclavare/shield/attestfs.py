"""``/dev/attestation`` with Gramine's files, sizes and behaviour, so that software written for Gramine runs unchanged.

==================  ====  ==========================================================================
file                mode  contents
==================  ====  ==========================================================================
attestation_type    r     ``dcap``
user_report_data    rw    64 bytes; shorter writes are padded with zeros, longer ones cut; in force at once
target_info         rw    512 bytes, likewise
my_target_info      r     512 bytes, this enclave's TARGETINFO
report              r     432 bytes, EREPORT over target_info and user_report_data
quote               r     DCAP quote over user_report_data
collateral          r     JSON in dcap-qvl's layout for whoever verifies these quotes (not in Gramine)
keys/NAME           rw    16 raw bytes; ``_sgx_mrenclave`` and ``_sgx_mrsigner`` are read-only
secrets/NAME        r     a secret that a relying party released to this enclave (not in Gramine)
egetkey             rw    write a KEYREQUEST, read status and key (not in Gramine; see .transactions)
counter             rw    write a request about a monotonic counter, read the answer (not in Gramine; likewise)
==================  ====  ==========================================================================

What is written into user_report_data and target_info belongs to the process that wrote it, as in Gramine, where each
process has an enclave of its own. A process that has written nothing sees what was last written by any other, so that
``cp nonce user_report_data && cat quote`` works in a shell.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import stat
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from ..tee.base import Counters
from . import fuse, transactions
from .secrets import SecretStore

REPORT_DATA_SIZE, TARGET_INFO_SIZE, REPORT_SIZE, KEY_SIZE = 64, 512, 432, 16
#: Processes whose last writes are remembered.
_PROCESSES = 1024
_SECRET_NAME = re.compile(rb"[A-Za-z0-9._-]{1,128}")


@dataclass(frozen=True, slots=True)
class EnclaveCalls:
    """What the files ask of the enclave; all values in bytes. Without counters there is no such file."""

    my_target_info: Callable[[], bytes]
    report: Callable[[bytes, bytes], bytes]
    quote: Callable[[bytes], bytes]
    collateral: Callable[[], bytes]
    seal_key: Callable[[str], bytes]
    egetkey: Callable[[bytes], bytes]
    counters: Counters | None


@dataclass(slots=True)
class _Written:
    report_data: bytes = bytes(REPORT_DATA_SIZE)
    target_info: bytes = bytes(TARGET_INFO_SIZE)


@dataclass(slots=True)
class _Handle:
    data: bytes
    written: bytearray = field(default_factory=bytearray)
    dirty: bool = False


_ROOT, _KEYS, _SECRETS = 1, 2, 3
_FILES = {
    10: (b"attestation_type", 0o444),
    11: (b"user_report_data", 0o666),
    12: (b"target_info", 0o666),
    13: (b"my_target_info", 0o444),
    14: (b"report", 0o444),
    15: (b"quote", 0o444),
    18: (b"collateral", 0o444),
}
_EGETKEY, _COUNTER, _COLLATERAL = 16, 17, 18
#: Seconds for which the platform is not asked for its collateral again; on hardware that is a call over the network.
_COLLATERAL_AGE = 60.0
#: Seconds for which one reader waits while another's request is under way.
_COLLATERAL_WAIT = 5.0
_TRANSACTIONS = {_EGETKEY: b"egetkey", _COUNTER: b"counter"}
#: Bytes; a quote's length is the platform's and is asked for once.
_SIZES = {10: 4, 11: REPORT_DATA_SIZE, 12: TARGET_INFO_SIZE, 13: TARGET_INFO_SIZE, 14: REPORT_SIZE}
_SEALING = {20: (b"_sgx_mrenclave", "mrenclave"), 21: (b"_sgx_mrsigner", "mrsigner")}
_DEFAULT_KEY = 22
#: Files that can be written, and the bytes of their whole value.
_WRITABLE = {11: REPORT_DATA_SIZE, 12: TARGET_INFO_SIZE, _DEFAULT_KEY: KEY_SIZE}
_FIRST_SECRET = 1000


class AttestFs:
    """Serves ``/dev/attestation`` over FUSE.

    Args:
        calls: the enclave's functions.
        secrets: where released secrets are; files under ``secrets/`` follow it.
        owner: uid and gid of the application; keys and secrets are readable by it alone.
        on_fault: called with an unexpected exception.
    """

    def __init__(
        self,
        calls: EnclaveCalls,
        secrets: SecretStore,
        *,
        owner: tuple[int, int],
        on_fault: Callable[[BaseException], None],
    ) -> None:
        self._calls = calls
        self._on_fault = on_fault
        self._secrets = secrets
        self._uid, self._gid = owner
        self._lock = threading.Lock()
        self._by_process: OrderedDict[tuple[int, str], _Written] = OrderedDict()
        self._last = _Written()
        self._default_key = b""
        self._quote_size = 0
        self._collateral = b""
        self._collateral_at = -_COLLATERAL_AGE
        self._asking = threading.Lock()
        self._handles: dict[int, _Handle] = {}
        self._numbers = itertools.count(1)
        self._secret_nodes: dict[bytes, int] = {}
        self._server = fuse.Server(
            {
                fuse.LOOKUP: self._lookup,
                fuse.GETATTR: self._getattr,
                fuse.SETATTR: self._setattr,
                fuse.OPEN: self._open,
                # Answered, because a kernel that may open directories without asking also keeps their listings.
                fuse.OPENDIR: lambda _: fuse.OPEN_OUT.pack(0, 0, 0),
                fuse.RELEASEDIR: lambda _: b"",
                fuse.READ: self._read,
                fuse.WRITE: self._write,
                fuse.FLUSH: self._flush,
                fuse.FSYNC: self._flush,
                fuse.RELEASE: self._release,
                fuse.READDIR: self._readdir,
            },
            init_flags=0,
            on_fault=on_fault,
        )

    def mount(self, target: str) -> None:
        """Mount on ``target`` and serve on two threads, so that a slow quote does not hold up a key.

        Raises:
            OSError: the mount failed.
        """
        self._server.mount(target, fsname="inclavare-attestation", read_only=False, threads=2)

    # Names

    def _children(self, node: int) -> dict[bytes, int]:
        if node == _ROOT:
            names = {b"keys": _KEYS, b"secrets": _SECRETS, **{name: number for number, (name, _) in _FILES.items()}}
            offered = {name: number for number, name in _TRANSACTIONS.items()}
            if self._calls.counters is None:
                del offered[b"counter"]
            return names | offered
        if node == _KEYS:
            return {b"default": _DEFAULT_KEY, **{name: number for number, (name, _) in _SEALING.items()}}
        if node == _SECRETS:
            return {name: self._secret_node(name) for name in self._secrets.names()}
        raise fuse.FuseError(errno.ENOTDIR)

    def _secret_node(self, name: bytes) -> int:
        with self._lock:
            return self._secret_nodes.setdefault(name, _FIRST_SECRET + len(self._secret_nodes))

    def _secret_name(self, node: int) -> bytes:
        with self._lock:
            for name, number in self._secret_nodes.items():
                if number == node:
                    return name
        raise fuse.FuseError(errno.ENOENT)

    def _attr(self, node: int) -> fuse.Attr:
        if node in (_ROOT, _KEYS):
            return fuse.Attr(node, stat.S_IFDIR | 0o555, nlink=2)
        if node == _SECRETS:
            return fuse.Attr(node, stat.S_IFDIR | 0o500, uid=self._uid, gid=self._gid, nlink=2)
        if node in _FILES:
            return fuse.Attr(node, stat.S_IFREG | _FILES[node][1], self._size(node))
        if node in _SEALING:
            return fuse.Attr(node, stat.S_IFREG | 0o400, KEY_SIZE, self._uid, self._gid)
        if node == _DEFAULT_KEY or node in _TRANSACTIONS:
            size = len(self._default_key) if node == _DEFAULT_KEY else 0
            return fuse.Attr(node, stat.S_IFREG | 0o600, size, self._uid, self._gid)
        value = self._secrets.get(self._secret_name(node))
        if value is None:
            raise fuse.FuseError(errno.ENOENT)
        return fuse.Attr(node, stat.S_IFREG | 0o400, len(value), self._uid, self._gid)

    def _size(self, node: int) -> int:
        """True sizes, though Gramine says 0: programs that copy with sendfile or splice believe them."""
        if node == _COLLATERAL:
            try:
                return len(self._current_collateral())
            except Exception as error:  # a platform without collateral is no reason that the directory cannot be listed
                self._on_fault(error)
                return 0
        size = _SIZES.get(node, 0)
        if size == 0 and self._quote_size == 0:
            self._quote_size = len(self._calls.quote(bytes(REPORT_DATA_SIZE)))
        return size or self._quote_size

    def _current_collateral(self) -> bytes:
        """Empty where the platform was asked a moment ago and had none."""
        # Not for long: quotes are served by the same threads.
        if self._asking.acquire(timeout=_COLLATERAL_WAIT):
            try:
                if time.monotonic() - self._collateral_at >= _COLLATERAL_AGE:
                    self._collateral_at = time.monotonic()
                    self._collateral = b""
                    self._collateral = self._calls.collateral()
            finally:
                self._asking.release()
        return self._collateral

    def _lookup(self, request: fuse.Request) -> bytes:
        node = self._children(request.node).get(request.name())
        if node is None:
            raise fuse.FuseError(errno.ENOENT)
        return fuse.entry(node, self._attr(node), valid=0)

    def _getattr(self, request: fuse.Request) -> bytes:
        return fuse.attr_out(self._attr(request.node), valid=0)

    def _setattr(self, request: fuse.Request) -> bytes:
        # O_TRUNC arrives as a size of 0 and changes nothing here; modes and owners are fixed.
        valid = int.from_bytes(request.body[:4], "little")
        if valid & 0b111:
            raise fuse.FuseError(errno.EPERM)
        return fuse.attr_out(self._attr(request.node), valid=0)

    def _readdir(self, request: fuse.Request) -> bytes:
        _, offset, size, *_ = fuse.READ_IN.unpack_from(request.body)
        out = bytearray()
        names = {b".": request.node, b"..": _ROOT, **self._children(request.node)}
        for position, (name, node) in enumerate(names.items()):
            kind = stat.S_IFDIR if node in (_ROOT, _KEYS, _SECRETS) else stat.S_IFREG
            record = fuse.dirent(node, position + 1, kind >> 12, name)
            if position >= offset:
                if len(out) + len(record) > size:
                    break
                out += record
        return bytes(out)

    # Contents: made when a file is opened, as Gramine does

    def _load(self, node: int, pid: int) -> bytes:
        written = self._written(pid)
        name = _FILES.get(node, (b"",))[0]
        if name == b"attestation_type":
            return b"dcap"
        if name == b"user_report_data":
            return written.report_data
        if name == b"target_info":
            return written.target_info
        if name == b"my_target_info":
            return self._calls.my_target_info()
        if name == b"report":
            return self._calls.report(written.target_info, written.report_data)
        if name == b"quote":
            return self._calls.quote(written.report_data)
        if name == b"collateral":
            if not (known := self._current_collateral()):
                raise fuse.FuseError(errno.EIO)
            return known
        if node in _SEALING:
            return self._calls.seal_key(_SEALING[node][1])
        if node == _DEFAULT_KEY:
            return self._default_key
        value = self._secrets.get(self._secret_name(node))
        if value is None:
            raise fuse.FuseError(errno.ENOENT)
        return value

    def _open(self, request: fuse.Request) -> bytes:
        flags = int.from_bytes(request.body[:4], "little")
        writing = flags & os.O_ACCMODE != os.O_RDONLY
        if writing and request.node not in (*_WRITABLE, *_TRANSACTIONS):
            raise fuse.FuseError(errno.EACCES)  # root's capabilities get it past the mode
        empty = flags & os.O_ACCMODE == os.O_WRONLY or request.node in _TRANSACTIONS
        data = b"" if empty else self._load(request.node, request.pid)
        number = next(self._numbers)
        with self._lock:
            self._handles[number] = _Handle(data)
        return fuse.OPEN_OUT.pack(number, fuse.FOPEN_DIRECT_IO, 0)

    def _handle(self, number: int) -> _Handle:
        with self._lock:
            handle = self._handles.get(number)
        if handle is None:
            raise fuse.FuseError(errno.EBADF)
        return handle

    def _read(self, request: fuse.Request) -> bytes:
        number, offset, size, *_ = fuse.READ_IN.unpack_from(request.body)
        handle = self._handle(number)
        if request.node in _TRANSACTIONS:
            # An answer is read once, from its beginning, wherever the write has left the file's position.
            with self._lock:
                answer, handle.data = handle.data[:size], handle.data[size:]
            return answer
        return handle.data[offset : offset + size]

    def _write(self, request: fuse.Request) -> bytes:
        number, offset, size, *_ = fuse.WRITE_IN.unpack_from(request.body)
        handle = self._handle(number)
        if request.node in _TRANSACTIONS:
            handle.data = b""
            handle.data = self._transact(request.node, bytes(request.body[fuse.WRITE_IN.size :][:size]))
            return struct.pack("<II", size, 0)
        whole = _WRITABLE[request.node]
        # As in Gramine each write replaces the value; only pieces that follow one another are put together.
        if offset != len(handle.written) or offset >= whole:
            handle.written.clear()
        handle.written += request.body[fuse.WRITE_IN.size : fuse.WRITE_IN.size + size]
        handle.data = bytes(handle.written)
        handle.dirty = True
        if request.node != _DEFAULT_KEY or len(handle.written) == whole:
            self._save(number, request)  # a key that is still too short is judged when the file is closed
        return struct.pack("<II", size, 0)

    def _transact(self, node: int, request: bytes) -> bytes:
        if node == _EGETKEY:
            return transactions.egetkey(self._calls.egetkey, request)
        assert self._calls.counters is not None
        return transactions.counter(self._calls.counters, request)

    def _flush(self, request: fuse.Request) -> bytes:
        self._save(int.from_bytes(request.body[:8], "little"), request)
        return b""

    def _release(self, request: fuse.Request) -> bytes:
        number = int.from_bytes(request.body[:8], "little")
        try:
            self._save(number, request)
        finally:
            with self._lock:
                self._handles.pop(number, None)
        return b""

    def _save(self, number: int, request: fuse.Request) -> None:
        handle = self._handle(number)
        if not handle.dirty:
            return
        handle.dirty = False
        data = bytes(handle.written)
        if request.node == _DEFAULT_KEY:
            if len(data) != KEY_SIZE:
                raise fuse.FuseError(errno.EACCES)  # what Gramine answers
            self._default_key = data
            return
        name = _FILES[request.node][0]
        with self._lock:
            written = self._own(request.pid)
            if name == b"user_report_data":
                written.report_data = data[:REPORT_DATA_SIZE].ljust(REPORT_DATA_SIZE, b"\0")
                self._last.report_data = written.report_data
            else:
                written.target_info = data[:TARGET_INFO_SIZE].ljust(TARGET_INFO_SIZE, b"\0")
                self._last.target_info = written.target_info

    def _own(self, tid: int) -> _Written:
        """What this process wrote; made from the last values on its first write. The lock is held."""
        process = _process(tid)
        written = self._by_process.get(process)
        if written is None:
            written = _Written(self._last.report_data, self._last.target_info)
            self._by_process[process] = written
            if len(self._by_process) > _PROCESSES:
                self._by_process.popitem(last=False)
        return written

    def _written(self, tid: int) -> _Written:
        with self._lock:
            found = self._by_process.get(_process(tid), self._last)
            return _Written(found.report_data, found.target_info)


def _process(tid: int) -> tuple[int, str]:
    """The process of a thread, told apart from a later one with the same number by its start time."""
    try:
        with open(f"/proc/{tid}/status", encoding="ascii", errors="replace") as handle:
            group = next(int(line.split()[1]) for line in handle if line.startswith("Tgid:"))
        with open(f"/proc/{group}/stat", encoding="ascii", errors="replace") as handle:
            return group, handle.read().rpartition(")")[2].split()[19]
    except (OSError, StopIteration, ValueError, IndexError):
        return tid, ""


def check_secret_name(name: str) -> bytes:
    """A secret's file name.

    Raises:
        ValueError: it is not 1–128 letters, digits, dots, dashes or underscores, or is ``.`` or ``..``.
    """
    encoded = name.encode()
    if not _SECRET_NAME.fullmatch(encoded) or encoded in (b".", b".."):
        raise ValueError(f"{name!r} is not a secret's name: 1 to 128 letters, digits, dots, dashes, underscores")
    return encoded
