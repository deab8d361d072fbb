"""Every structure round-trips byte for byte, and refuses reserved bytes, wrong lengths and wrong constants."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inclavare.sgx import structs
from inclavare.sgx.quote import QuoteHeader
from inclavare.sgx.structs import Structure, StructureError

ALL = [
    structs.Attributes,
    structs.SecInfo,
    structs.Secs,
    structs.Tcs,
    structs.Sigstruct,
    structs.TargetInfo,
    structs.ReportBody,
    structs.Report,
    structs.KeyRequest,
    QuoteHeader,
]
#: Sizes that the SDM gives.
SIZES = {"attributes": 16, "secinfo": 64, "secs": 4096, "tcs": 4096, "sigstruct": 1808, "targetinfo": 512}
SIZES |= {"report": 384, "keyrequest": 512, "quote": 48}


def fill(kind: type[Structure], data: st.DataObject) -> bytes:
    """Random bytes in every field, zeros in between, constants where they belong."""
    layout = kind.LAYOUT
    out = bytearray(layout.size)
    for name, offset in layout.offsets.items():
        size = layout.sizes[name]
        out[offset : offset + size] = layout.constants.get(name) or data.draw(st.binary(min_size=size, max_size=size))
    return bytes(out)


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_round_trip(kind: type[Structure], data: st.DataObject) -> None:
    raw = fill(kind, data)
    assert kind.from_bytes(raw).to_bytes() == raw


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_size_is_the_architectures(kind: type[Structure]) -> None:
    expected = 432 if kind is structs.Report else SIZES[kind.LAYOUT.name]
    assert kind.LAYOUT.size == expected


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_every_reserved_byte_is_checked(kind: type[Structure]) -> None:
    layout = kind.LAYOUT
    named = {at for name, start in layout.offsets.items() for at in range(start, start + layout.sizes[name])}
    template = bytearray(layout.size)
    for name, value in layout.constants.items():
        template[layout.offsets[name] : layout.offsets[name] + len(value)] = value
    for at in sorted(set(range(layout.size)) - named):
        raw = bytearray(template)
        raw[at] = 1
        with pytest.raises(StructureError) as caught:
            kind.from_bytes(bytes(raw))
        assert caught.value.id == f"sgx.{layout.name}.reserved"
        assert f"offset {at}" in str(caught.value.found)


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("change", [-1, 1])
def test_wrong_length(kind: type[Structure], change: int) -> None:
    with pytest.raises(StructureError) as caught:
        kind.from_bytes(bytes(kind.LAYOUT.size + change))
    assert caught.value.id == f"sgx.{kind.LAYOUT.name}.size"


def test_fields_do_not_overlap() -> None:
    for kind in ALL:
        layout, at = kind.LAYOUT, 0
        for name in layout.names:
            assert layout.offsets[name] >= at, f"{layout.name}.{name}"
            at = layout.offsets[name] + layout.sizes[name]
        assert at <= layout.size


def test_short_byte_string_is_not_padded_silently() -> None:
    with pytest.raises(ValueError, match="mrenclave is 31 bytes"):
        structs.TargetInfo(mrenclave=bytes(31), attributes=bytes(16)).to_bytes()


def test_integer_out_of_range() -> None:
    with pytest.raises(ValueError, match="keyrequest"):
        structs.KeyRequest(key_name=1 << 16).to_bytes()
