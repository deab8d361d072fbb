"""Comparing enclaves page by page."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_enclaves import Signers, sign_image, small_image

from inclavare.sgx import compare
from inclavare.sgx.compare import Field, Pages
from inclavare.sgx.image import PAGE_SIZE, EnclaveImage, PageRun

R, RW = 0x201, 0x203


def image(*runs: PageRun) -> EnclaveImage:
    return EnclaveImage(1 << 20, 1, 4, 3, 0, runs)


def data(*pages: int) -> bytes:
    return b"".join(bytes([page]) * PAGE_SIZE for page in pages)


def test_the_same() -> None:
    one = image(PageRun(0, R, 2, data(1, 2)), PageRun(8192, RW, 4, None, False))
    other = image(
        PageRun(8192, RW, 1, None, False), PageRun(12288, RW, 3, data(0, 0, 0), False), PageRun(0, R, 2, data(1, 2))
    )
    assert compare.pages(one, other) == [] and compare.secs_fields(one, other) == []


def test_each_kind_of_difference() -> None:
    one = image(PageRun(0, R, 4, data(1, 2, 3, 4)), PageRun(0x8000, RW, 2))
    other = image(PageRun(0, R, 4, data(1, 9, 9, 4)), PageRun(0x8000, R, 2, None, False), PageRun(0x20000, RW, 1))
    assert compare.pages(one, other) == [
        Pages(0x1000, 2, "contents"),
        Pages(0x8000, 2, "secinfo", RW, R),
        Pages(0x8000, 2, "measured", 0xFFFF, 0),
        Pages(0x20000, 1, "only right"),
    ]
    assert Pages(0x20000, 1, "only left") in compare.pages(other, one)


def test_partly_measured_pages_differ_from_wholly_measured_ones() -> None:
    one, other = image(PageRun(0, R, 1, data(1), chunks=0xFF)), image(PageRun(0, R, 1, data(1)))
    assert compare.pages(one, other) == [Pages(0, 1, "measured", 0xFF, 0xFFFF)]


def test_zeros_and_data_are_compared_by_contents() -> None:
    one, other = image(PageRun(0, R, 3)), image(PageRun(0, R, 3, data(0, 5, 0)))
    assert compare.pages(one, other) == [Pages(0x1000, 1, "contents")]


@pytest.mark.parametrize(
    ("field", "value"), [("size", 1 << 21), ("ssa_frame_size", 2), ("attributes", 6), ("xfrm", 7), ("miscselect", 1)]
)
def test_secs_fields(field: str, value: int) -> None:
    one = image(PageRun(0, R, 1))
    assert compare.secs_fields(one, replace(one, **{field: value})) == [Field(field, getattr(one, field), value)]


def test_sigstruct_fields(signers: Signers) -> None:
    one = sign_image(small_image(), signers.ours)
    other = sign_image(small_image(b"other"), signers.theirs, isv_svn=9)
    names = [field.name for field in compare.sigstruct_fields(one, other)]
    assert names == ["modulus", "enclave_hash", "isv_svn"]
    assert compare.sigstruct_fields(one, one) == []


@given(st.lists(st.tuples(st.integers(0, 20), st.sampled_from([R, RW]), st.integers(0, 2)), max_size=12),
       st.lists(st.tuples(st.integers(0, 20), st.sampled_from([R, RW]), st.integers(0, 2)), max_size=12))  # fmt: skip
def test_agrees_with_a_page_by_page_comparison(
    left: list[tuple[int, int, int]], right: list[tuple[int, int, int]]
) -> None:
    tables = [{page: (flags, value) for page, flags, value in side} for side in (left, right)]
    images = [
        image(*(PageRun(page * PAGE_SIZE, flags, 1, data(value)) for page, (flags, value) in table.items()))
        for table in tables
    ]
    expected = set()
    for page in tables[0].keys() | tables[1].keys():
        one, other = tables[0].get(page), tables[1].get(page)
        if one is None or other is None:
            expected.add((page, "only right" if one is None else "only left"))
            continue
        if one[0] != other[0]:
            expected.add((page, "secinfo"))
        if one[1] != other[1]:
            expected.add((page, "contents"))
    found = compare.pages(*images)
    assert {(p.offset // PAGE_SIZE + n, p.what) for p in found for n in range(p.count)} == expected
