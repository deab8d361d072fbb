"""mount(2) and its relatives, with errno and names in the error."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE, MS_SLAVE = 0x1000, 0x4000, 1 << 18, 1 << 19
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8
CLONE_NEWNS = 0x00020000

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NAME = 1, 4, 15

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def mount(source: str | None, target: str, fstype: str | None, flags: int, data: str | None = None) -> None:
    """mount(2).

    Raises:
        OSError: with what was to be mounted where.
    """
    encoded = [None if value is None else os.fsencode(value) for value in (source, target, fstype)]
    options = None if data is None else os.fsencode(data)
    _check(_libc.mount(*encoded, ctypes.c_ulong(flags), options), f"mount {fstype or source} on {target}")


def umount(target: str, *, detach: bool = True) -> None:
    """umount2(2), lazily by default; a target that is not mounted is not an error."""
    flags = UMOUNT_NOFOLLOW | (MNT_DETACH if detach else 0)
    if _libc.umount2(os.fsencode(target), flags) < 0 and ctypes.get_errno() not in (2, 22):
        _check(-1, f"unmount {target}")


def private_namespace() -> None:
    """A mount namespace of this process's own that still sees the host's later mounts, and shows it none of ours."""
    _check(_libc.unshare(CLONE_NEWNS), "unshare mount namespace")
    mount(None, "/", None, MS_REC | MS_SLAVE)


def _unescape(name: bytes) -> bytes:
    """The kernel writes space, tab, newline and backslash as a backslash and three octal digits."""
    first, *rest = name.split(b"\\")
    return first + b"".join(bytes([int(part[:3], 8)]) + part[3:] for part in rest)


def prctl(option: int, value: int | bytes) -> None:
    """prctl(2) with one argument."""
    argument = ctypes.c_char_p(value) if isinstance(value, bytes) else ctypes.c_ulong(value)
    _check(_libc.prctl(option, argument, 0, 0, 0), f"prctl {option}")


def mounted_below(path: str) -> Iterator[str]:
    """Mount points at or below ``path`` in this process's namespace, innermost first."""
    prefix = path.rstrip("/") + "/"
    with open("/proc/self/mountinfo", "rb") as handle:
        points = [os.fsdecode(_unescape(line.split(b" ")[4])) for line in handle]
    yield from reversed([point for point in points if point == path or point.startswith(prefix)])
