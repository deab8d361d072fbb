"""SSA frames: EXITINFO's bits, and where XSAVE area, padding, MISC and GPRSGX lie."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inclavare.sgx import ssa
from inclavare.sgx.ssa import ExitInfo, Frame, GprSgx, frame_layout
from inclavare.sgx.structs import StructureError

BITS = list(ssa.XSAVE_COMPONENTS)
xfrms = st.sets(st.sampled_from(BITS)).map(lambda bits: 3 | sum(1 << bit for bit in bits))


@given(st.integers(0, 255), st.integers(0, 7), st.booleans())
def test_exit_info(vector: int, exit_type: int, valid: bool) -> None:
    info = ExitInfo(vector, exit_type, valid)
    value = info.to_int()
    assert (value & 0xFF, value >> 8 & 7, value >> 31) == (vector, exit_type, valid)
    assert ExitInfo.from_int(value) == info
    assert GprSgx(exitinfo=value).exit_info == info


@given(st.integers(0, (1 << 33) - 1))
def test_exit_info_has_no_other_bits(value: int) -> None:
    try:
        assert ExitInfo.from_int(value).to_int() == value
    except StructureError as error:
        assert error.id == "sgx.exitinfo.reserved"
        assert value & ~0x8000_07FF


@pytest.mark.parametrize(("vector", "exit_type"), [(256, 0), (-1, 0), (0, 8), (0, -1)])
def test_exit_info_out_of_range(vector: int, exit_type: int) -> None:
    with pytest.raises(ValueError, match="exitinfo"):
        ExitInfo(vector, exit_type).to_int()


@pytest.mark.parametrize(
    ("vector", "miscselect", "value"),
    [
        (6, 0, 0x8000_0306),  # #UD
        (3, 0, 0x8000_0603),  # #BP: INT3 is a software exception
        (14, 0, 0),  # #PF without EXINFO
        (14, ssa.MISC_EXINFO, 0x8000_030E),
        (13, ssa.MISC_CPINFO, 0),
        (13, ssa.MISC_KNOWN, 0x8000_030D),
        (21, ssa.MISC_EXINFO, 0),
        (21, ssa.MISC_CPINFO, 0x8000_0315),
        (2, 3, 0),  # NMI
        (32, 3, 0),  # an interrupt
    ],
)
def test_exceptions_that_are_reported(vector: int, miscselect: int, value: int) -> None:
    assert ExitInfo.of_exception(vector, miscselect).to_int() == value


@given(st.integers(1, 8), xfrms, st.integers(0, 3))
def test_frame(pages: int, xfrm: int, miscselect: int) -> None:
    """The parts lie one after the other and fill the frame, whatever is in it."""
    needed = ssa.xsave_size(xfrm) + ssa.misc_size(miscselect) + ssa.GPRSGX_SIZE
    if needed > pages * 4096:
        with pytest.raises(ValueError, match=f"too small for {needed} bytes"):
            frame_layout(pages, xfrm, miscselect)
        return
    frame = frame_layout(pages, xfrm, miscselect)
    assert frame.xsave_offset == 0
    assert frame.pad_offset == frame.xsave_size >= ssa.XSAVE_MINIMUM
    assert frame.pad_size >= 0
    assert frame.pad_offset + frame.pad_size == frame.misc_offset
    assert frame.misc_offset + frame.misc_size == frame.gprsgx_offset
    assert frame.gprsgx_offset + 184 == frame.size == pages * 4096


@pytest.mark.parametrize(
    ("xfrm", "size"), [(0x3, 576), (0x7, 832), (0x1B, 1088), (0xE7, 2688), (0x2E7, 2696), (0x602E7, 11008)]
)
def test_xsave_sizes(xfrm: int, size: int) -> None:
    """As CPUID.0DH reports them for these values of XCR0."""
    assert ssa.xsave_size(xfrm) == size


def test_one_page_with_avx_and_exinfo() -> None:
    assert frame_layout(1, 0x7, 1) == Frame(4096, 832, 3896, 16, 3912)


def test_components_do_not_overlap() -> None:
    end = ssa.XSAVE_MINIMUM
    for _, offset, size in ssa.XSAVE_COMPONENTS.values():
        assert offset >= end
        end = offset + size


@pytest.mark.parametrize("bit", [8, 10, 16, 63])
def test_reserved_state_components(bit: int) -> None:
    with pytest.raises(ValueError, match=f"XFRM bit {bit} "):
        frame_layout(1, 3 | 1 << bit, 0)


def test_reserved_misc() -> None:
    with pytest.raises(ValueError, match="MISCSELECT 0x4"):
        frame_layout(1, 3, 4)
