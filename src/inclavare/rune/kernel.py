"""The few system calls of the forwarding path, without the 3 ms that ``import ctypes`` costs.

``_ctypes`` is the extension module under ``ctypes``; where another Python lacks these three functions, ``ctypes``
itself does the same work more slowly.
"""

from __future__ import annotations

import os

CLONE_NEWNS = 0x00020000
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REC = 0x4000
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19


def _call(name: str, *args: int | bytes | None) -> None:
    try:
        from _ctypes import call_function, dlopen, dlsym

        result = call_function(dlsym(dlopen(None, 0), name), args)  # type: ignore[arg-type]
    except ImportError:
        import ctypes

        result = getattr(ctypes.CDLL(None), name)(*args)
    if result != 0:
        raise OSError(f"{name}{args} was refused by the kernel")


def unshare(flags: int) -> None:
    """unshare(2)."""
    _call("unshare", flags)


def setns(fd: int, flags: int) -> None:
    """setns(2)."""
    _call("setns", fd, flags)


def mount(source: str | None, target: str, fstype: str | None, flags: int, data: str | None = None) -> None:
    """mount(2)."""
    _call("mount", _text(source), _text(target), _text(fstype), flags, _text(data))


def _text(value: str | None) -> bytes | None:
    return None if value is None else os.fsencode(value)
