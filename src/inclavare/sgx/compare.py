"""What differs between two enclaves: SECS fields, SIGSTRUCT fields, pages."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import pairwise

from .image import EnclaveImage, PageRun
from .paging import PAGE_SIZE
from .structs import Sigstruct

_ZERO_PAGE = bytes(PAGE_SIZE)
#: SIGSTRUCT fields that follow from the others.
_DERIVED = frozenset({"header", "header2", "exponent", "signature", "q1", "q2"})


@dataclass(frozen=True, slots=True)
class Field:
    """A field that differs.

    Attributes:
        name: as the SDM spells it, lower case.
        left, right: the two values; byte strings in hexadecimal.
    """

    name: str
    left: int | str
    right: int | str


@dataclass(frozen=True, slots=True)
class Pages:
    """Consecutive pages that differ in the same way.

    Attributes:
        offset: of the first, bytes from the enclave's base.
        count: number of pages.
        what: ``only left``, ``only right``, ``secinfo``, ``measured`` (which chunks EEXTEND measures) or ``contents``.
        left, right: SECINFO.FLAGS or chunk masks where these differ, else 0.
    """

    offset: int
    count: int
    what: str
    left: int = 0
    right: int = 0


def secs_fields(left: EnclaveImage, right: EnclaveImage) -> list[Field]:
    """Fields of SECS that differ."""
    names = ("size", "ssa_frame_size", "attributes", "xfrm", "miscselect")
    return [
        Field(name, getattr(left, name), getattr(right, name))
        for name in names
        if getattr(left, name) != getattr(right, name)
    ]


def sigstruct_fields(left: Sigstruct, right: Sigstruct) -> list[Field]:
    """Fields of two SIGSTRUCTs that differ, without those that follow from the others."""
    found = []
    for field in fields(Sigstruct):
        one, other = getattr(left, field.name), getattr(right, field.name)
        if field.name not in _DERIVED and one != other:
            found.append(Field(field.name, _shown(one), _shown(other)))
    return found


def pages(left: EnclaveImage, right: EnclaveImage) -> list[Pages]:
    """Pages that differ, in ascending order, consecutive ones together."""
    merged: list[Pages] = []
    for found in _differing(left, right):
        last = merged[-1] if merged else None
        if (
            last is not None
            and last.offset + last.count * PAGE_SIZE == found.offset
            and (last.what, last.left, last.right) == (found.what, found.left, found.right)
        ):
            merged[-1] = Pages(last.offset, last.count + found.count, last.what, last.left, last.right)
        else:
            merged.append(found)
    return merged


def _shown(value: int | bytes) -> int | str:
    return value.hex() if isinstance(value, bytes) else value


def _differing(left: EnclaveImage, right: EnclaveImage) -> Iterator[Pages]:
    sides = [sorted(image.runs, key=lambda run: run.offset) for image in (left, right)]
    starts = [[run.offset for run in runs] for runs in sides]
    edges = sorted({edge for runs in sides for run in runs for edge in (run.offset, run.end)})
    for start, end in pairwise(edges):
        one, other = (_at(runs, begins, start) for runs, begins in zip(sides, starts, strict=True))
        count = (end - start) // PAGE_SIZE
        if one is None and other is None:
            continue
        if one is None or other is None:
            yield Pages(start, count, "only right" if one is None else "only left")
            continue
        if one.flags != other.flags:
            yield Pages(start, count, "secinfo", one.flags, other.flags)
        if _measured(one) != _measured(other):
            yield Pages(start, count, "measured", _measured(one), _measured(other))
        yield from _contents(one, other, start, end)


def _at(runs: list[PageRun], starts: list[int], offset: int) -> PageRun | None:
    at = bisect_right(starts, offset) - 1
    return runs[at] if at >= 0 and offset < runs[at].end else None


def _measured(run: PageRun) -> int:
    return run.chunks if run.measured else 0


def _contents(one: PageRun, other: PageRun, start: int, end: int) -> Iterator[Pages]:
    if one.data is None and other.data is None:
        return
    if one.data is not None and other.data is not None and _bytes(one, start, end) == _bytes(other, start, end):
        return
    for offset in range(start, end, PAGE_SIZE):
        if _bytes(one, offset, offset + PAGE_SIZE) != _bytes(other, offset, offset + PAGE_SIZE):
            yield Pages(offset, 1, "contents")


def _bytes(run: PageRun, start: int, end: int) -> memoryview | bytes:
    if run.data is None:
        return _ZERO_PAGE
    return memoryview(run.data)[start - run.offset : end - run.offset]
