"""Memory for keys and secrets: ``memfd_secret`` pages where the kernel has them, locked private memory elsewhere.

``memfd_secret`` (Linux 5.14) takes pages out of the kernel's direct map, so that neither another process nor most
kernel bugs can read them. Python objects made on the way (a decrypted message, a reply to a read) are ordinary memory
of a process that is not dumpable; they live as short as possible.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading

_SYS_MEMFD_SECRET = 447
_libc = ctypes.CDLL(None, use_errno=True)


class Secret:
    """One value in protected memory.

    Args:
        value: copied; the caller drops its own.
    """

    def __init__(self, value: bytes | bytearray) -> None:
        self._length = len(value)
        self._map, self.protected = _secret_map(max(1, self._length))
        self._map[: self._length] = value

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"Secret({self._length} bytes)"

    def reveal(self) -> bytes:
        """A copy of the value."""
        return self._map[: self._length]

    def wipe(self) -> None:
        """Overwrite and unmap. Idempotent."""
        if not self._map.closed:
            self._map[:] = bytes(len(self._map))
            self._map.close()
        self._length = 0


def has_memfd_secret() -> bool:
    """Whether this kernel gives out secret memory."""
    fd = _libc.syscall(_SYS_MEMFD_SECRET, 0)
    if fd < 0:
        return False
    os.close(fd)
    return True


def _secret_map(length: int) -> tuple[mmap.mmap, bool]:
    fd = _libc.syscall(_SYS_MEMFD_SECRET, 0)
    if fd >= 0:
        try:
            os.ftruncate(fd, length)
            return mmap.mmap(fd, length), True
        except OSError:
            pass  # over RLIMIT_MEMLOCK: locked memory below says so too
        finally:
            os.close(fd)
    region = mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    _libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(length))
    return region, False


class SecretStore:
    """Named secrets of one enclave."""

    def __init__(self) -> None:
        self._secrets: dict[bytes, Secret] = {}
        self._lock = threading.Lock()

    def put(self, name: bytes, value: bytes) -> None:
        """Set or replace a secret."""
        fresh = Secret(value)
        with self._lock:
            old = self._secrets.pop(name, None)
            self._secrets[name] = fresh
        if old is not None:
            old.wipe()

    def get(self, name: bytes) -> bytes | None:
        """A copy of the value, or ``None``."""
        with self._lock:
            found = self._secrets.get(name)
            return None if found is None else found.reveal()

    def names(self) -> list[bytes]:
        """Sorted names."""
        with self._lock:
            return sorted(self._secrets)

    def wipe(self) -> None:
        """Overwrite and forget everything."""
        with self._lock:
            for secret in self._secrets.values():
                secret.wipe()
            self._secrets.clear()
