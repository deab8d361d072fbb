"""SSA frames: where a thread's state is saved, and whether the frame is fit for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ....sgx.image import PAGE_SIZE
from ....sgx.ssa import GPRSGX_SIZE, frame_layout
from ....sgx.structs import Tcs
from .access import resolve, violation
from .secs import EnclaveSecs

if TYPE_CHECKING:
    from .logical import LogicalProcessor

_ADDRESSES = 1 << 64


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame that was seen to be writable.

    Attributes:
        xsave_pages: EPC pages of the XSAVE area, in order (CR_XSAVE_PAGE_n).
        gprsgx: EPC page of GPRSGX and its offset in it (CR_GPR_PA).
    """

    xsave_pages: tuple[int, ...]
    gprsgx: tuple[int, int]


def locate(lp: LogicalProcessor, secs_page: int, secs: EnclaveSecs, tcs: Tcs, index: int) -> Frame:
    """Check frame number ``index`` of a thread, as EENTER, ERESUME and EDECCSSA do.

    Raises:
        PageFault: a page of its XSAVE area or GPRSGX is not the enclave's own, regular, readable and writable.
    """
    layout = frame_layout(secs.public.ssa_frame_size, secs.attributes.xfrm, secs.public.miscselect)
    start = tcs.ossa + secs.base + layout.size * index
    pages = tuple(
        _page(lp, secs_page, (start + offset) % _ADDRESSES) for offset in range(0, layout.xsave_size, PAGE_SIZE)
    )
    gprsgx = (start + layout.gprsgx_offset) % _ADDRESSES
    return Frame(pages, (_page(lp, secs_page, gprsgx), gprsgx % PAGE_SIZE))


def _page(lp: LogicalProcessor, secs_page: int, linear: int) -> int:
    page = resolve(lp, linear, "w", "ssa.epc")
    rule = violation(lp.processor.epcm[page], secs_page, linear, "rw")
    if rule is not None:
        raise lp.epcm_fault(rule, linear, "w")
    return page


def read_xsave(lp: LogicalProcessor, pages: tuple[int, ...], size: int) -> bytes:
    """``size`` bytes of an XSAVE area."""
    return b"".join(lp.processor.read_epc(page) for page in pages)[:size]


def write_xsave(lp: LogicalProcessor, pages: tuple[int, ...], area: bytes) -> None:
    """Write an XSAVE area."""
    for number, page in enumerate(pages):
        lp.processor.write_epc(page, area[number * PAGE_SIZE : (number + 1) * PAGE_SIZE])


def read_gprsgx(lp: LogicalProcessor, place: tuple[int, int]) -> bytes:
    """The 184 bytes of GPRSGX."""
    page, start = place
    return lp.processor.read_epc(page, start, GPRSGX_SIZE)
