"""What the tests of structures share: random structures, and the rules that every structure keeps."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import strategies as st

from inclavare.sgx.structs import Structure, StructureError


def binary(size: int) -> st.SearchStrategy[bytes]:
    """So many bytes; large ones from a seed, which Hypothesis can shrink."""
    if size <= 512:
        return st.binary(min_size=size, max_size=size)
    return st.integers(0, 1 << 32).map(lambda seed: Random(seed).randbytes(size))


def fill(kind: type[Structure], data: st.DataObject) -> bytes:
    """Random bytes in every field, zeros in between, constants where they belong."""
    layout = kind.LAYOUT
    out = bytearray(layout.size)
    for name, offset in layout.offsets.items():
        size = layout.sizes[name]
        out[offset : offset + size] = layout.constants.get(name) or data.draw(binary(size))
    return bytes(out)


def check_round_trip(kind: type[Structure], data: st.DataObject) -> None:
    """Bytes to fields to bytes, and a flipped bit either is a field's or is refused."""
    raw = fill(kind, data)
    parsed = kind.from_bytes(raw)
    assert parsed.to_bytes() == raw
    at = data.draw(st.integers(0, kind.LAYOUT.size * 8 - 1))
    damaged = bytearray(raw)
    damaged[at // 8] ^= 1 << at % 8
    try:
        again = kind.from_bytes(bytes(damaged))
    except StructureError as error:
        assert error.id in (f"sgx.{kind.LAYOUT.name}.reserved", f"sgx.{kind.LAYOUT.name}.constant")
    else:
        assert again != parsed
        assert again.to_bytes() == damaged


def check_reserved_bytes(kind: type[Structure]) -> None:
    """Every byte that no field names is refused if it is not zero."""
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


def check_layout(kind: type[Structure]) -> None:
    """Fields ascend without overlap; another length is refused."""
    layout, at = kind.LAYOUT, 0
    for name in layout.names:
        assert layout.offsets[name] >= at, f"{layout.name}.{name}"
        at = layout.offsets[name] + layout.sizes[name]
    assert at <= layout.size
    for size in (0, layout.size - 1, layout.size + 1):
        with pytest.raises(StructureError) as caught:
            kind.from_bytes(bytes(size))
        assert caught.value.id == f"sgx.{layout.name}.size"
