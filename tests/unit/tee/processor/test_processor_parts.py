"""Parts of the processor on their own: address space, locks, XSAVE, EPCM entries."""

from __future__ import annotations

import pytest

from inclavare.sgx.paging import (
    PAGE_SIZE,
    PT_REG,
    PT_SECS,
    PT_TCS,
    PT_TRIM,
    PT_VA,
    SECINFO_MODIFIED,
    SECINFO_PENDING,
    SECINFO_PR,
    SECINFO_R,
    SECINFO_W,
    SECINFO_X,
)
from inclavare.sgx.ssa import xsave_size
from inclavare.tee.sgx_sim.processor import Access, AddressSpace, EpcmEntry, GeneralProtection, Locks, Resource
from inclavare.tee.sgx_sim.processor.registers import GENERAL, Registers
from inclavare.tee.sgx_sim.processor.space import is_canonical, page_base
from inclavare.tee.sgx_sim.processor.xsave import INIT_IMAGE, XFRM_SUPPORTED, initialise, is_legal, restore, save

LINEAR = 0x7000_0000


@pytest.mark.parametrize(
    ("linear", "canonical"),
    [
        (0, True),
        ((1 << 47) - 1, True),
        (1 << 47, False),
        ((1 << 64) - (1 << 47) - 1, False),
        ((1 << 64) - (1 << 47), True),
        ((1 << 64) - 1, True),
        (1 << 64, False),
    ],
)
def test_canonical(linear: int, canonical: bool) -> None:
    assert is_canonical(linear) is canonical


def test_page_base() -> None:
    assert (page_base(LINEAR + 4095), page_base(LINEAR), page_base((1 << 64) - 1)) == (LINEAR, LINEAR, (1 << 64) - 4096)


def test_ram_across_pages() -> None:
    space = AddressSpace()
    space.map_ram(LINEAR, 2 * PAGE_SIZE)
    assert space.peek(LINEAR, 2 * PAGE_SIZE) == bytes(2 * PAGE_SIZE)
    space.poke(LINEAR + PAGE_SIZE - 2, b"abcd")
    assert space.peek(LINEAR + PAGE_SIZE - 3, 6) == b"\0abcd\0"
    first, second = space.lookup(LINEAR), space.lookup(LINEAR + PAGE_SIZE)
    assert first is not None and first.ram is not None and first.ram[-2:] == b"ab"
    assert second is not None and second.ram is not None and second.ram[:2] == b"cd"
    assert (first.writable, first.executable, first.epc_page) == (True, False, None)
    assert space.lookup(LINEAR + 2 * PAGE_SIZE) is None


def test_mappings() -> None:
    space = AddressSpace()
    space.map_epc(LINEAR, 7, writable=False, executable=True)
    found = space.lookup(LINEAR + 5)
    assert found is not None
    assert (found.ram, found.epc_page, found.writable, found.executable) == (None, 7, False, True)
    space.protect(LINEAR + 9, writable=True, executable=False)
    changed = space.lookup(LINEAR)
    assert changed is not None and changed is not found
    assert (changed.epc_page, changed.writable, changed.executable) == (7, True, False)
    with pytest.raises(ValueError, match="no ordinary memory"):
        space.peek(LINEAR, 1)
    with pytest.raises(ValueError, match="no ordinary memory"):
        space.poke(LINEAR, b"x")
    space.unmap(LINEAR + 100)
    space.unmap(LINEAR)
    for call in (
        lambda: space.peek(LINEAR, 1),
        lambda: space.poke(LINEAR, b"x"),
        lambda: space.protect(LINEAR, writable=True, executable=True),
    ):
        with pytest.raises(ValueError, match="nothing is mapped"):
            call()


@pytest.mark.parametrize(
    ("linear", "size"),
    [
        (LINEAR + 1, PAGE_SIZE),
        (LINEAR, 100),
        (LINEAR, 0),
        (LINEAR, -PAGE_SIZE),
        (-PAGE_SIZE, PAGE_SIZE),
        (1 << 47, PAGE_SIZE),
        ((1 << 47) - PAGE_SIZE, 2 * PAGE_SIZE),
        ((1 << 64) - PAGE_SIZE, 2 * PAGE_SIZE),
        ((1 << 64) - (1 << 47) - PAGE_SIZE, 2 * PAGE_SIZE),
    ],
)
def test_ranges(linear: int, size: int) -> None:
    with pytest.raises(ValueError, match=r"not whole pages|not in the address space"):
        AddressSpace().map_ram(linear, size)


def test_range_limits() -> None:
    space = AddressSpace()
    space.map_ram((1 << 64) - PAGE_SIZE, PAGE_SIZE)
    space.map_ram((1 << 47) - PAGE_SIZE, PAGE_SIZE)
    space.map_ram(0, PAGE_SIZE)


# --- registers --------------------------------------------------------------------------------------------------


def test_registers() -> None:
    registers = Registers()
    assert len(GENERAL) == len(set(GENERAL)) == 16
    assert GENERAL[-8:] == ("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15")
    assert all(getattr(registers, name) == 0 for name in (*GENERAL, "rip", "fs_base", "gs_base"))
    assert (registers.rflags, registers.xsave) == (0x202, INIT_IMAGE)
    other = registers.copy()
    other.rax = 1
    assert registers.rax == 0
    registers.rflags = 0xFFFF_FFFF
    registers.set_status(0x41)
    assert registers.rflags == 0xFFFF_FFFF & ~0x8D5 | 0x41


# --- locks ------------------------------------------------------------------------------------------------------


def test_locks() -> None:
    locks = Locks()
    assert locks.free(3, Access.EXCLUSIVE)
    with locks.held(3, Access.SHARED), locks.held(3, Access.SHARED):
        assert locks.free(3, Access.SHARED)
        assert not locks.free(3, Access.EXCLUSIVE)
        assert locks.free(4, Access.EXCLUSIVE)
        assert locks.free(3, Access.EXCLUSIVE, Resource.TRACKING)
    with locks.held(3, Access.EXCLUSIVE, Resource.TRACKING):
        assert not locks.free(3, Access.SHARED, Resource.TRACKING)
        assert locks.free(3, Access.EXCLUSIVE)
    assert locks.free(3, Access.EXCLUSIVE)
    with pytest.raises(RuntimeError), locks.held(3, Access.EXCLUSIVE):
        raise RuntimeError
    assert locks.free(3, Access.EXCLUSIVE)


# --- EPCM -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        PT_REG | SECINFO_R,
        PT_REG | SECINFO_W,
        PT_REG | SECINFO_X,
        PT_REG | SECINFO_PENDING,
        PT_TRIM | SECINFO_MODIFIED,
        PT_REG | SECINFO_PR,
        PT_TCS,
        PT_VA,
        PT_SECS,
    ],
)
def test_entry_flags(flags: int) -> None:
    entry = EpcmEntry.from_flags(flags, enclave_secs=3, enclave_address=LINEAR)
    assert entry.flags == flags
    assert (entry.valid, entry.blocked, entry.enclave_secs, entry.enclave_address) == (True, False, 3, LINEAR)
    assert entry.is_child is (flags & 0xFF00 not in (PT_SECS, PT_VA))
    entry.valid = False
    assert not entry.is_child


# --- XSAVE ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("xfrm", "legal"),
    [
        (3, True),
        (7, True),
        (0xE7, True),
        (0x203, True),
        (0x60003, True),
        (XFRM_SUPPORTED, True),
        (0, False),
        (1, False),
        (2, False),
        (6, False),
        (0xB, False),
        (0x27, False),
        (0x47, False),
        (0x87, False),
        (0x67, False),
        (0xE3, False),
        (0x20003, False),
        (0x40003, False),
        (3 | 1 << 19, False),
        (3 | 1 << 10, False),
    ],
)
def test_legal_xfrm(xfrm: int, legal: bool) -> None:
    assert is_legal(xfrm) is legal


def full_image() -> bytes:
    """Every component holds something; MXCSR is legal, and what no component owns is zero."""
    image = bytearray(INIT_IMAGE)
    for start, end in ((0, 24), (32, 416), (576, 832), (1088, 2696), (2752, 11008)):
        image[start:end] = bytes(1 + index % 251 for index in range(end - start))
    image[24:28] = (0x1FA0).to_bytes(4, "little")
    return bytes(image)


@pytest.mark.parametrize("xfrm", [3, 7, 0xE7, 0x203, 0x60003, XFRM_SUPPORTED])
def test_save_and_restore(xfrm: int) -> None:
    image = full_image()
    area = save(image, bytes(xsave_size(xfrm)), xfrm)
    assert len(area) == xsave_size(xfrm)
    assert area[512:576] == xfrm.to_bytes(8, "little") + bytes(56)
    scrubbed = initialise(image, xfrm)
    assert restore(scrubbed, area, xfrm) == image
    assert initialise(image, XFRM_SUPPORTED) == INIT_IMAGE


def test_image_has_a_place_for_everything() -> None:
    assert len(INIT_IMAGE) == 11008
    assert INIT_IMAGE[:2] == b"\x7f\x03" and INIT_IMAGE[24:28] == b"\x80\x1f\0\0"
    assert not any(INIT_IMAGE[2:24]) and not any(INIT_IMAGE[28:])


@pytest.mark.parametrize(
    ("at", "bit"),
    [(0, 0), (23, 0), (32, 0), (159, 0), (24, 1), (160, 1), (415, 1), (576, 2), (831, 2), (2688, 9), (2695, 9)],
)
def test_components(at: int, bit: int) -> None:
    """Each byte belongs to one component, which alone is in use when it differs from the INIT state."""
    image = bytearray(INIT_IMAGE)
    image[at] ^= 0x40 if at != 24 else 0x20
    area = save(bytes(image), bytes(len(INIT_IMAGE)), XFRM_SUPPORTED)
    assert area[512:520] == (1 << bit).to_bytes(8, "little")
    assert initialise(bytes(image), 1 << bit) == INIT_IMAGE
    assert initialise(bytes(image), XFRM_SUPPORTED & ~(1 << bit)) == bytes(image)


def test_save_does_not_touch_what_xfrm_does_not_name() -> None:
    area = b"\x99" * xsave_size(0x203)
    saved = save(full_image(), area, 0x203)
    assert saved[576:2688] == b"\x99" * (2688 - 576)
    assert saved[416:512] == b"\x99" * 96
    assert saved[28:32] == full_image()[28:32] or saved[28:32] == b"\x99" * 4


@pytest.mark.parametrize(
    ("rule", "at", "value"),
    [
        ("xrstor.xstate_bv", 512, 4),
        ("xrstor.header", 520, 1),
        ("xrstor.header", 528, 1),
        ("xrstor.header", 575, 1),
        ("xrstor.mxcsr", 27, 0x80),
    ],
)
def test_restore_refuses(rule: str, at: int, value: int) -> None:
    area = bytearray(save(INIT_IMAGE, bytes(576), 3))
    area[at] = value
    with pytest.raises(GeneralProtection) as caught:
        restore(INIT_IMAGE, bytes(area), 3)
    assert caught.value.rule == rule


def test_restore_takes_every_defined_bit_of_mxcsr() -> None:
    area = bytearray(save(INIT_IMAGE, bytes(576), 3))
    area[24:28] = (0xFFFF).to_bytes(4, "little")
    area[512] = 3
    assert restore(INIT_IMAGE, bytes(area), 3)[24:28] == (0xFFFF).to_bytes(4, "little")


def test_restore_leaves_other_components_alone() -> None:
    image = full_image()
    area = save(INIT_IMAGE, bytes(576), 3)
    restored = restore(image, area, 3)
    assert restored[:576] == INIT_IMAGE[:576]
    assert restored[576:] == image[576:]
