"""Structures of EPC pages; that they round-trip is shown in test_structs.py."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inclavare.sgx import image, paging
from inclavare.sgx.paging import Pcmd, VersionArray
from inclavare.sgx.structs import SecInfo, StructureError


def test_page_types_and_flags_do_not_meet() -> None:
    states = (paging.SECINFO_PENDING, paging.SECINFO_MODIFIED, paging.SECINFO_PR)
    assert sum((*states, paging.SECINFO_RWX, paging.SECINFO_PT)) == paging.SECINFO_KNOWN == 0xFF3F
    assert not paging.SECINFO_KNOWN & paging.RDINFO_BLOCKED
    assert [kind >> 8 for kind in paging.PAGE_TYPES] == list(range(7))
    assert all(vars(paging)[name] == kind for kind, name in paging.PAGE_TYPES.items())
    assert (image.PT_TCS, image.SECINFO_X, image.PAGE_SIZE) == (paging.PT_TCS, paging.SECINFO_X, paging.PAGE_SIZE)


def test_pcmd_begins_with_the_secinfo() -> None:
    pcmd = Pcmd(paging.PT_REG | paging.SECINFO_R, 7, bytes(16))
    assert pcmd.to_bytes()[:64] == pcmd.secinfo.to_bytes()
    assert pcmd.secinfo == SecInfo(0x201)
    damaged = bytearray(pcmd.to_bytes())
    damaged[63] = 1
    with pytest.raises(StructureError) as caught:
        Pcmd.from_bytes(bytes(damaged))
    assert caught.value.id == "sgx.pcmd.reserved"


@given(st.lists(st.integers(0, (1 << 64) - 1), max_size=paging.VA_SLOTS))
def test_version_array(versions: list[int]) -> None:
    page = VersionArray.of(versions)
    assert page.versions == (*versions, *[0] * (paging.VA_SLOTS - len(versions)))
    assert VersionArray.from_bytes(page.to_bytes()) == page


def test_version_array_is_empty_at_first() -> None:
    assert VersionArray().to_bytes() == bytes(4096)


@pytest.mark.parametrize("versions", [[-1], [1 << 64]])
def test_versions_have_64_bits(versions: list[int]) -> None:
    with pytest.raises(ValueError, match="va: "):
        VersionArray.of(versions)


def test_a_page_has_512_slots() -> None:
    with pytest.raises(ValueError, match="slots is 4104 bytes, not 4096"):
        VersionArray.of([0] * 513).to_bytes()
