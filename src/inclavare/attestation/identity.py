"""Which claims say what runs inside a TEE, and how long they are: policies and reference values are made of them."""

from __future__ import annotations

import re
from typing import Any

from .claims import Claims

#: Measured values by family, with their lengths in bytes.
MEASURED: dict[str, dict[str, int]] = {
    "sgx": {"mrenclave": 32, "mrsigner": 32, "config_id": 64, "isv_family_id": 16, "isv_ext_prod_id": 16},
    "tdx": {
        "mr_td": 48,
        "rtmr_0": 48,
        "rtmr_1": 48,
        "rtmr_2": 48,
        "rtmr_3": 48,
        "mr_config_id": 48,
        "mr_owner": 48,
        "mr_owner_config": 48,
        "mr_seam": 48,
        "xfam": 8,
    },
    "snp": {
        "measurement": 48,
        "id_key_digest": 48,
        "author_key_digest": 48,
        "host_data": 32,
        "family_id": 16,
        "image_id": 16,
    },
}
#: Those of them that identify what runs; the first is the measurement proper.
IDENTIFYING = {
    "sgx": ("mrenclave", "mrsigner"),
    "tdx": ("mr_td",),
    "snp": ("measurement", "id_key_digest", "author_key_digest"),
}
#: Numbers that have to be equal, with their greatest values.
EXACT: dict[str, dict[str, int]] = {"sgx": {"isv_prod_id": 0xFFFF}, "tdx": {}, "snp": {}}
#: Numbers that may be greater: security versions.
AT_LEAST: dict[str, dict[str, int]] = {"sgx": {"isv_svn": 0xFFFF}, "tdx": {}, "snp": {"guest_svn": 0xFFFFFFFF}}

TEES = ("sgx", "sgx-sim", "tdx", "tdx-sim", "snp")


def family(tee: str) -> str:
    """``sgx``, ``tdx`` or ``snp``."""
    return tee.removesuffix("-sim")


def found(claims: Claims, name: str) -> Any:
    """A claim of the TEE's own: hexadecimal, number or truth value."""
    own = {"tdx": claims.tdx, "snp": claims.snp}.get(claims.family)
    return getattr(claims if own is None else own, name)


def hexadecimal(value: object, length: int) -> str:
    """A measured value in lower case.

    Raises:
        ValueError: not a string of ``2 * length`` hexadecimal digits; says so.
    """
    if not isinstance(value, str) or not re.fullmatch(rf"[0-9a-fA-F]{{{2 * length}}}", value):
        raise ValueError(f"a string of {2 * length} hexadecimal digits")
    return value.lower()


def number(value: object, greatest: int) -> int:
    """A number.

    Raises:
        ValueError: not a number from 0 to ``greatest``; says so.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= greatest:
        raise ValueError(f"a number from 0 to {greatest}")
    return value
