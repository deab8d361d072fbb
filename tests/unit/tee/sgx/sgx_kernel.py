"""What the kernel's SGX driver does, told from its header and from ioctl.c, without a processor behind it.

It knows nothing of :mod:`inclavare.tee.sgx.driver`: numbers and structures come from the header that the machine has,
bytes from the memory that the arguments point to, and MRENCLAVE from the SDM's blocks, hashed one by one.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256

from inclavare.tee.sgx.syscalls import LINUX

HEADER = Path("/usr/include/x86_64-linux-gnu/asm/sgx.h")
PAGE = 4096
MAP_SHARED, MAP_FIXED, MAP_ANONYMOUS = 1, 0x10, 0x20
PROVISIONKEY = 1 << 4
#: SGX_ATTR_UNPRIV_MASK: DEBUG, MODE64BIT, KSS (driver.h, arch/x86/include/asm/sgx.h).
UNPRIVILEGED = 1 << 1 | 1 << 2 | 1 << 7


def ioctls(text: str) -> dict[int, tuple[str, list[str]]]:
    """Request code to name and fields, each a __u64, from the header's text."""
    structs = {
        name: re.findall(r"__u64\s+(\w+);", body)
        for name, body in re.findall(r"struct (\w+)\s*\{(.*?)\};", text, re.DOTALL)
    }
    found = {}
    for name, macro, number, kind in re.findall(
        r"#define (SGX_IOC_\w+)\s*\\\s*_(IO\w+)\(SGX_MAGIC, (0x\w+), struct (\w+)\)", text
    ):
        direction = {"IOW": 1, "IOR": 2, "IOWR": 3}[macro]
        fields = structs[kind]
        found[direction << 30 | 8 * len(fields) << 16 | 0xA4 << 8 | int(number, 16)] = name, fields
    return found


@dataclass
class Page:
    flags: int
    protection: int
    content: bytes
    type: int
    measured: bool = True


@dataclass
class State:
    """One open file."""

    secs: bytes = b""
    base: int = 0
    size: int = 0
    initialised: bool = False
    allowed: int = UNPRIVILEGED
    measurement: Any = None
    pages: dict[int, Page] = field(default_factory=dict)

    @property
    def attributes(self) -> int:
        return int(struct.unpack_from("<Q", self.secs, 48)[0])


class Kernel:
    """A :class:`inclavare.tee.sgx.syscalls.Syscalls` of a machine with SGX.

    Attributes:
        pages_a_call: how many pages ADD_PAGES and the EDMM calls do before they come back, as if a signal came.
        interruptions: how many calls fail with EINTR before the first page.
        free: EPC pages left.
        failures: errors for the next calls of a name (``open`` or an ioctl's), in order.
        calls: names of the ioctls, in order.
        mapped: device mappings: address to length and protection.
        accepted: pages whose change the enclave has accepted.
    """

    def __init__(self) -> None:
        self.ioctls = ioctls(HEADER.read_text())
        self.pages_a_call = 1 << 20
        self.interruptions = 0
        self.free = 1 << 20
        self.sgx2 = True
        self.provisioning = True
        self.device_exec = True
        self.failures: dict[str, list[int]] = {}
        self.calls: list[str] = []
        self.files: dict[int, State | None] = {}
        self.mapped: dict[int, tuple[int, int]] = {}
        self.reserved: dict[int, int] = {}
        self.accepted: set[int] = set()
        self._next = 1000

    # --- Syscalls

    def open(self, path: str, flags: int) -> int:
        self._fail("open")
        if flags & 3 != os.O_RDWR:
            raise OSError(errno.EINVAL, "not read and write")
        if path == "/dev/sgx_enclave":
            state: State | None = State()
        elif path == "/dev/sgx_provision" and self.provisioning:
            state = None
        else:
            raise OSError(errno.EACCES if "provision" in path else errno.ENOENT, os.strerror(errno.EACCES))
        self._next += 1
        self.files[self._next] = state
        return self._next

    def close(self, fd: int) -> None:
        state = self.files.pop(fd)
        if state is not None:
            self.free += len(state.pages) + bool(state.secs)

    def ioctl(self, fd: int, request: int, argument: ctypes.Structure) -> int:
        if request not in self.ioctls:
            raise OSError(errno.ENOTTY, "unknown ioctl")
        name, names = self.ioctls[request]
        raw = bytes(argument)
        assert len(raw) == 8 * len(names)
        values = dict(zip(names, struct.unpack(f"<{len(names)}Q", raw), strict=True))
        name = name.removeprefix("SGX_IOC_ENCLAVE_")
        self.calls.append(name)
        self._fail(name)
        state = self.files[fd]
        assert state is not None
        handlers: dict[str, Callable[[State, dict[str, int]], int]] = {
            "CREATE": self._create,
            "ADD_PAGES": self._add_pages,
            "INIT": self._init,
            "PROVISION": self._provision,
            "RESTRICT_PERMISSIONS": self._restrict,
            "MODIFY_TYPES": self._modify,
            "REMOVE_PAGES": self._remove,
        }
        try:
            return handlers[name](state, values)
        finally:
            if request >> 30 & 2:
                ctypes.memmove(ctypes.addressof(argument), struct.pack(f"<{len(names)}Q", *values.values()), len(raw))

    def mmap(self, address: int, length: int, prot: int, flags: int, fd: int) -> int:
        if flags & MAP_ANONYMOUS:
            self._fail("mmap")
            found = LINUX.mmap(address, length, prot, flags, fd)
            self.reserved[found] = length
            return found
        assert flags == MAP_SHARED | MAP_FIXED and address % PAGE == 0 and length % PAGE == 0
        state = self.files[fd]
        assert state is not None
        if prot & 4 and not self.device_exec:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        if state.initialised and not state.base <= address <= address + length <= state.base + state.size:
            raise OSError(errno.EACCES, "outside the enclave")
        for at in range(address - state.base, address - state.base + length, PAGE):
            if at in state.pages and prot & ~state.pages[at].protection:
                raise OSError(errno.EACCES, "more than the page's permissions")
        self.mapped[address] = length, prot
        return address

    def munmap(self, address: int, length: int) -> None:
        LINUX.munmap(address, length)
        kept = {}
        for start, size in self.reserved.items():
            for begin, end in ((start, min(start + size, address)), (max(start, address + length), start + size)):
                if begin < end:
                    kept[begin] = end - begin
        self.reserved = kept
        self.mapped = {at: what for at, what in self.mapped.items() if not address <= at < address + length}

    def mprotect(self, address: int, length: int, prot: int) -> None:
        LINUX.mprotect(address, length, prot)

    # --- ioctl.c

    def _create(self, state: State, values: dict[str, int]) -> int:
        if state.secs:
            raise OSError(errno.EINVAL, "created already")
        secs = ctypes.string_at(values["src"], PAGE)
        size, base, frame = struct.unpack_from("<QQI", secs)
        attributes, xfrm = struct.unpack_from("<QQ", secs, 48)
        if not size or size & size - 1:
            raise OSError(errno.EINVAL, "not a power of two")
        # What ECREATE faults for.
        if base % size or not frame or attributes & 1 or not attributes & 4 or xfrm & 3 != 3 or any(secs[64:96]):
            raise OSError(errno.EIO, "ECREATE faulted")
        assert any(at <= base and base + size <= at + length for at, length in self.reserved.items()), "not reserved"
        self._take(1)
        state.secs, state.base, state.size = secs, base, size
        state.measurement = hashlib.sha256(b"ECREATE\0" + struct.pack("<IQ", frame, size).ljust(56, b"\0"))
        return 0

    def _add_pages(self, state: State, values: dict[str, int]) -> int:
        if not state.secs or state.initialised or values["src"] % PAGE:
            raise OSError(errno.EINVAL, "not building, or source not aligned")
        self._range(state, values)
        secinfo = ctypes.string_at(values["secinfo"], 64)
        (flags,) = struct.unpack_from("<Q", secinfo)
        kind, permissions = flags & 0xFF00, flags & 7
        if kind not in (0x100, 0x200) or permissions & 3 == 2 or (kind == 0x100 and permissions):
            raise OSError(errno.EINVAL, "page type or permissions")
        if flags & ~0xFF07 or any(secinfo[8:]) or values["flags"] & ~1:
            raise OSError(errno.EINVAL, "reserved bits")
        values["count"] = 0
        self._interrupt()
        for done in range(0, min(values["length"], self.pages_a_call * PAGE), PAGE):
            offset = values["offset"] + done
            if offset in state.pages:
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
            self._take(1)
            content = ctypes.string_at(values["src"] + done, PAGE)
            state.pages[offset] = Page(
                flags, 3 if kind == 0x100 else permissions, content, kind >> 8, bool(values["flags"] & 1)
            )
            state.measurement.update(b"EADD\0\0\0\0" + struct.pack("<QQ", offset, flags).ljust(56, b"\0"))
            if values["flags"] & 1:
                for at in range(0, PAGE, 256):
                    state.measurement.update(b"EEXTEND\0" + struct.pack("<Q", offset + at).ljust(56, b"\0"))
                    state.measurement.update(content[at : at + 256])
            values["count"] = done + PAGE
        return 0

    def _provision(self, state: State, values: dict[str, int]) -> int:
        if values["fd"] not in self.files or self.files[values["fd"]] is not None:
            raise OSError(errno.EINVAL, "not /dev/sgx_provision")
        state.allowed |= PROVISIONKEY
        return 0

    def _init(self, state: State, values: dict[str, int]) -> int:
        if not state.secs or state.initialised:
            raise OSError(errno.EINVAL, "not building")
        self._interrupt()
        if state.attributes & ~state.allowed:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        signed = ctypes.string_at(values["sigstruct"], 1808)
        if struct.unpack_from("<I", signed, 16)[0] not in (0, 0x8086):
            raise OSError(errno.EINVAL, "vendor")
        wanted, mask = signed[928:944], signed[944:960]
        attributes = state.secs[48:64]
        key = rsa.RSAPublicNumbers(3, int.from_bytes(signed[128:512], "little")).public_key()
        try:
            key.verify(signed[516:900][::-1], signed[:128] + signed[900:1028], padding.PKCS1v15(), SHA256())
        except InvalidSignature:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM)) from None
        same = all((a ^ w) & m == 0 for a, w, m in zip(attributes, wanted, mask, strict=True))
        if signed[960:992] != state.measurement.digest() or not same:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        state.initialised = True
        return 0

    def _restrict(self, state: State, values: dict[str, int]) -> int:
        self._sgx2(state)
        self._range(state, values)
        if values["permissions"] & ~7 or values["permissions"] & 3 == 2 or values["result"] or values["count"]:
            raise OSError(errno.EINVAL, "permissions")
        return self._each(
            state, values, lambda page: page.type == 2, lambda page: self._set(page, "flags", values["permissions"])
        )

    def _modify(self, state: State, values: dict[str, int]) -> int:
        self._sgx2(state)
        self._range(state, values)
        kind = values["page_type"]
        if kind not in (1, 4) or values["result"] or values["count"]:
            raise OSError(errno.EINVAL, "page type")

        def change(page: Page) -> None:
            page.type = kind
            if kind == 1:
                page.protection = 3

        return self._each(state, values, lambda page: page.type == 2 or (page.type == 1 and kind == 4), change)

    def _remove(self, state: State, values: dict[str, int]) -> int:
        self._sgx2(state)
        self._range(state, values)
        if values["count"]:
            raise OSError(errno.EINVAL, "count")
        self._interrupt()
        for done in range(0, min(values["length"], self.pages_a_call * PAGE), PAGE):
            offset = values["offset"] + done
            if offset not in state.pages:
                raise OSError(errno.EFAULT, "no page")
            if state.pages[offset].type != 4 or offset not in self.accepted:
                raise OSError(errno.EPERM, os.strerror(errno.EPERM))
            del state.pages[offset]
            self.free += 1
            values["count"] = done + PAGE
        return 0

    def _each(
        self, state: State, values: dict[str, int], may: Callable[[Page], bool], change: Callable[[Page], None]
    ) -> int:
        self._interrupt()
        for done in range(0, min(values["length"], self.pages_a_call * PAGE), PAGE):
            page = state.pages.get(values["offset"] + done)
            if page is None:
                raise OSError(errno.EFAULT, "no page")
            if not may(page):
                raise OSError(errno.EINVAL, "page type")
            change(page)
            values["count"] = done + PAGE
        if values["count"] < values["length"]:
            raise OSError(errno.EAGAIN, "being written back")
        return 0

    @staticmethod
    def _set(page: Page, name: str, value: int) -> None:
        setattr(page, name, value)

    def _sgx2(self, state: State) -> None:
        if not self.sgx2:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        if not state.initialised:
            raise OSError(errno.EINVAL, "not initialised")

    def _range(self, state: State, values: dict[str, int]) -> None:
        offset, length = values["offset"], values["length"]
        if offset % PAGE or not length or length % PAGE or offset + length - PAGE >= state.size:
            raise OSError(errno.EINVAL, "range")

    def _take(self, pages: int) -> None:
        if self.free < pages:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        self.free -= pages

    def _interrupt(self) -> None:
        if self.interruptions:
            self.interruptions -= 1
            raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))

    def _fail(self, name: str) -> None:
        if self.failures.get(name):
            code = self.failures[name].pop(0)
            raise OSError(code, os.strerror(code))
