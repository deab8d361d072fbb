"""Opening files below a root that somebody else has filled, without ever leaving it.

``openat2`` (Linux 5.6) resolves ``..``, absolute links and links to links inside the root, so that an image's
``/etc/passwd -> /proc/1/root/etc/shadow`` can name nothing but a file of the image.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path

from ..errors import IntegrityError, PlatformError, ResourceError

#: ``resolve`` flags of ``struct open_how`` (openat2(2)).
RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

_SYS_OPENAT2 = 437  # the same on every architecture


@cache
def _syscall() -> tuple[Callable[..., int], Callable[[], int]]:
    import ctypes

    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    call.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t]
    return call, ctypes.get_errno


def openat2(dir_fd: int, path: str | bytes, flags: int, resolve: int, mode: int = 0) -> int:
    """The system call; the descriptor is close-on-exec.

    Args:
        dir_fd: directory that resolution starts from.
        path: relative or, with ``RESOLVE_IN_ROOT``, absolute path.
        flags: ``O_*`` flags.
        resolve: ``RESOLVE_*`` flags.
        mode: permission bits of a file that ``O_CREAT`` makes.

    Raises:
        OSError: as openat2(2); ``EXDEV`` and ``ELOOP`` where the path would have left the root or used a link.
        PlatformError: the kernel has no openat2.
    """
    name = os.fsencode(path)
    if b"\0" in name:
        raise OSError(errno.EINVAL, "embedded null byte", path)
    # struct open_how: three u64.
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, mode, resolve)
    call, get_errno = _syscall()
    while True:
        fd: int = call(_SYS_OPENAT2, dir_fd, name, how, len(how))
        if fd >= 0:
            return fd
        error = get_errno()
        # EAGAIN: a rename raced with "..", the kernel asks for another try.
        if error in (errno.EAGAIN, errno.EINTR):
            continue
        if error == errno.ENOSYS:
            raise PlatformError(
                "this kernel cannot open files safely inside an image",
                id="enclave.paths.openat2",
                found=f"Linux {os.uname().release} without openat2",
                expected="Linux 5.6 or later",
                remedy="use a newer kernel, or allow the openat2 system call in this sandbox",
            )
        raise OSError(error, os.strerror(error), os.fsdecode(path))


def open_in_root(root_fd: int, path: str | bytes, flags: int = os.O_RDONLY, mode: int = 0) -> int:
    """Open ``path`` as a process whose root directory is ``root_fd`` would, links included.

    Raises:
        OSError: as openat2(2).
        PlatformError: the kernel has no openat2.
    """
    return openat2(root_fd, path, flags, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS, mode)


def open_beneath(root_fd: int, path: str | bytes, flags: int = os.O_RDONLY, mode: int = 0) -> int:
    """Open a relative ``path`` below ``root_fd`` that has no symbolic link in any component.

    Raises:
        OSError: as openat2(2); ``ELOOP`` for a link, ``EXDEV`` for a way out or another mount.
        PlatformError: the kernel has no openat2.
    """
    return openat2(root_fd, path, flags, RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV, mode)


def read_regular(fd: int, name: str, limit: int) -> bytes:
    """All bytes of an open regular file.

    Args:
        fd: the open file; it stays open.
        name: how to call it in errors.
        limit: largest accepted size in bytes.

    Raises:
        IntegrityError: not a regular file, or larger than ``limit``.
    """
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        raise IntegrityError(
            f"{name} is not a regular file",
            id="enclave.paths.kind",
            found=stat.filemode(info.st_mode),
            expected="a regular file",
        )
    parts: list[bytes] = []
    left = limit + 1
    while left > 0:
        part = os.read(fd, min(left, max(info.st_size + 1, 65536)))
        if not part:
            break
        parts.append(part)
        left -= len(part)
    if left <= 0:
        raise IntegrityError(
            f"{name} is too large", id="enclave.paths.size", found=f"{info.st_size} bytes", expected=f"at most {limit}"
        )
    return b"".join(parts)


def read_in_root(root_fd: int, path: str, limit: int = 1 << 20) -> bytes | None:
    """Contents of the regular file that ``path`` is inside the root, or ``None`` if there is none.

    Raises:
        IntegrityError: something else than a regular file, or larger than ``limit`` bytes.
        PlatformError: the kernel has no openat2.
    """
    try:
        # O_NONBLOCK: a FIFO of the image must not hang its builder.
        fd = open_in_root(root_fd, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise IntegrityError(
            f"{path} of the image cannot be read", id="enclave.paths.open", found=error.strerror
        ) from None
    try:
        return read_regular(fd, path, limit)
    finally:
        os.close(fd)


def write_atomically(path: Path, content: bytes, mode: int = 0o644, *, durable: bool = False) -> None:
    """Write a file that is either complete or not there.

    Args:
        path: replaced if it is there.
        content: the whole of it.
        mode: permission bits.
        durable: return only when it survives a loss of power.

    Raises:
        OSError: as open(2), write(2) and rename(2); nothing half-written stays.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        with os.fdopen(fd, "wb") as handle:
            handle.write(content)
            if durable:
                handle.flush()
                os.fsync(handle.fileno())
        temporary.replace(path)
        if durable:
            parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(parent)
            finally:
                os.close(parent)
    except OSError as error:
        error.filename = str(path)  # what the caller knows, not the temporary file
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def full_disk(what: str, error: OSError) -> ResourceError:
    """The error for a write that failed for want of space."""
    return ResourceError(
        f"no space left for {what}",
        id="enclave.disk.full",
        found=error.strerror,
        remedy="free some space, or set TMPDIR to a larger file system, and try again; nothing half-written was left",
    )
