"""The untrusted side's address space: page tables, and the ordinary memory behind them.

Nothing here is believed: what a mapping of an EPC page is worth is decided by the EPCM.
"""

from __future__ import annotations

from dataclasses import dataclass

from ....sgx.paging import PAGE_SIZE

_CANONICAL_BITS = 47


def is_canonical(linear: int) -> bool:
    """Whether bits 63–47 of a linear address are all equal (4-level paging)."""
    return linear >> _CANONICAL_BITS in (0, (1 << 64 - _CANONICAL_BITS) - 1)


def page_base(linear: int) -> int:
    """The address of the page that ``linear`` lies in."""
    return linear & ~(PAGE_SIZE - 1)


@dataclass(frozen=True, slots=True, eq=False)
class Mapping:
    """A page-table entry: ordinary memory (``ram``, 4096 bytes) or a page of the EPC, by number."""

    ram: bytearray | None
    epc_page: int | None
    writable: bool
    executable: bool


class AddressSpace:
    """Page tables of one process, with 4096-byte pages that are all accessible to user code."""

    def __init__(self) -> None:
        self._pages: dict[int, Mapping] = {}

    def map_ram(self, linear: int, size: int, *, writable: bool = True, executable: bool = False) -> None:
        """Map ``size`` bytes of fresh, zeroed ordinary memory; both arguments are multiples of 4096."""
        for page in self._range(linear, size):
            self._pages[page] = Mapping(bytearray(PAGE_SIZE), None, writable, executable)

    def map_epc(self, linear: int, epc_page: int, *, writable: bool, executable: bool) -> None:
        """Map the EPC page of that number at ``linear``, a multiple of 4096, in place of what was there."""
        for page in self._range(linear, PAGE_SIZE):
            self._pages[page] = Mapping(None, epc_page, writable, executable)

    def protect(self, linear: int, *, writable: bool, executable: bool) -> None:
        """Change the permissions of the page at ``linear``.

        Raises:
            ValueError: nothing is mapped there.
        """
        old = self._present(linear)
        self._pages[page_base(linear)] = Mapping(old.ram, old.epc_page, writable, executable)

    def unmap(self, linear: int) -> None:
        """Remove the mapping of the page at ``linear``, if there is one."""
        self._pages.pop(page_base(linear), None)

    def lookup(self, linear: int) -> Mapping | None:
        """What the page tables say about ``linear``."""
        return self._pages.get(page_base(linear))

    def peek(self, linear: int, size: int) -> bytes:
        """``size`` bytes of ordinary memory, whatever its permissions.

        Raises:
            ValueError: not ordinary memory.
        """
        out = bytearray()
        while len(out) < size:
            at = linear + len(out)
            start = at % PAGE_SIZE
            out += self._ordinary(at)[start : start + size - len(out)]
        return bytes(out)

    def poke(self, linear: int, data: bytes) -> None:
        """Change ordinary memory, whatever its permissions.

        Raises:
            ValueError: not ordinary memory.
        """
        done = 0
        while done < len(data):
            at = linear + done
            start = at % PAGE_SIZE
            part = data[done : done + PAGE_SIZE - start]
            self._ordinary(at)[start : start + len(part)] = part
            done += len(part)

    def _present(self, linear: int) -> Mapping:
        found = self.lookup(linear)
        if found is None:
            raise ValueError(f"nothing is mapped at {linear:#x}")
        return found

    def _ordinary(self, linear: int) -> bytearray:
        ram = self._present(linear).ram
        if ram is None:
            raise ValueError(f"no ordinary memory at {linear:#x}")
        return ram

    @staticmethod
    def _range(linear: int, size: int) -> range:
        if linear % PAGE_SIZE or size % PAGE_SIZE or size <= 0:
            raise ValueError(f"{size} bytes at {linear:#x} are not whole pages")
        if not is_canonical(linear) or not is_canonical(linear + size - 1):
            raise ValueError(f"{size} bytes at {linear:#x} are not in the address space")
        return range(linear, linear + size, PAGE_SIZE)
