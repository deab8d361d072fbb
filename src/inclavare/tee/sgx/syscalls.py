"""The few system calls that hardware enclaves need, in one thin layer that takes and returns plain values.

``mmap`` at a fixed address and an ``ioctl`` that leaves other threads running are not in Python's own modules.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from typing import Any, Protocol

PROT_NONE, PROT_READ, PROT_WRITE, PROT_EXEC = 0, 1, 2, 4
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS, MAP_NORESERVE = 0x01, 0x02, 0x10, 0x20, 0x4000
_MAP_FAILED = (1 << 8 * ctypes.sizeof(ctypes.c_void_p)) - 1


class Syscalls(Protocol):
    """What the driver calls; every method raises :class:`OSError` as the kernel refuses."""

    def open(self, path: str, flags: int) -> int:
        """A file descriptor."""

    def close(self, fd: int) -> None:
        """Close it."""

    def ioctl(self, fd: int, request: int, argument: ctypes.Structure) -> int:
        """The kernel reads and writes ``argument`` in place, also where it returns an error."""

    def mmap(self, address: int, length: int, prot: int, flags: int, fd: int) -> int:
        """The address of the mapping; offset 0."""

    def munmap(self, address: int, length: int) -> None:
        """Take a mapping away."""

    def mprotect(self, address: int, length: int, prot: int) -> None:
        """Change a mapping's permissions."""

    def __hash__(self) -> int:
        """By identity."""


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]
    libc.getauxval.restype = ctypes.c_ulong
    libc.getauxval.argtypes = [ctypes.c_ulong]
    return libc


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


class Linux:
    """The kernel itself."""

    def open(self, path: str, flags: int) -> int:
        """open(2), close-on-exec."""
        return os.open(path, flags | os.O_CLOEXEC)

    def close(self, fd: int) -> None:
        """close(2)."""
        os.close(fd)

    def ioctl(self, fd: int, request: int, argument: ctypes.Structure) -> int:
        """ioctl(2); other threads run meanwhile."""
        return _checked(_libc().ioctl(fd, request, ctypes.byref(argument)))

    def mmap(self, address: int, length: int, prot: int, flags: int, fd: int) -> int:
        """mmap(2)."""
        found: int = _libc().mmap(address, length, prot, flags, fd, 0) or 0
        if found == _MAP_FAILED:
            _checked(-1)
        return found

    def munmap(self, address: int, length: int) -> None:
        """munmap(2)."""
        _checked(_libc().munmap(address, length))

    def mprotect(self, address: int, length: int, prot: int) -> None:
        """mprotect(2)."""
        _checked(_libc().mprotect(address, length, prot))


LINUX: Syscalls = Linux()


def auxiliary_value(kind: int) -> int:
    """An entry of the process's auxiliary vector (getauxval(3)); 0 if there is none."""
    return int(_libc().getauxval(kind))


def executable(code: bytes, syscalls: Syscalls = LINUX) -> int:
    """The address of a copy of machine code, readable and executable, that stays for the process's life.

    Raises:
        OSError: a security policy forbids executable memory.
    """
    address = syscalls.mmap(0, len(code), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1)
    try:
        ctypes.memmove(address, code, len(code))
        syscalls.mprotect(address, len(code), PROT_READ | PROT_EXEC)
    except BaseException:
        syscalls.munmap(address, len(code))
        raise
    return address
