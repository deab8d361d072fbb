"""EINITTOKEN; that it round-trips is shown in test_structs.py."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from structures import fill

from inclavare.sgx.launch import EinitToken


def test_no_token_is_all_zero() -> None:
    assert EinitToken().to_bytes() == bytes(304)


@given(st.data())
def test_mac_covers_what_the_token_permits(data: st.DataObject) -> None:
    """VALID, ATTRIBUTES, MRENCLAVE and MRSIGNER are under the MAC, the launch enclave's own fields are not."""
    token = EinitToken.from_bytes(fill(EinitToken, data))
    layout = token.LAYOUT
    assert len(token.maced_bytes()) == 192 == layout.offsets["cpusvn_le"]
    assert token.maced_bytes() == token.to_bytes()[:192]
    assert max(layout.offsets[name] for name in ("valid", "attributes", "mrenclave", "mrsigner")) < 192
