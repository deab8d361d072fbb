"""Init-data of Confidential Containers: what the host launched a TEE with, bound to its measured configuration.

The text is TOML with ``version``, ``algorithm`` and ``[data]``. Its digest stands in SGX's CONFIGID (64 bytes), TDX's
MRCONFIGID (48) or SNP's HOSTDATA (32), zero-padded or cut off to that size.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Any

from ..errors import EvidenceError
from .appraisal import Failure
from .claims import Claims

_ALGORITHMS = {"sha-256": "sha256", "sha-384": "sha384", "sha-512": "sha512"}
_ALGORITHMS |= {name: name for name in _ALGORITHMS.values()}
_SIZES = {"sgx": 64, "tdx": 48, "snp": 32}
_VERSION = "0.1.0"


def digest(text: str) -> bytes:
    """The digest of an init-data text by the algorithm that it names.

    Raises:
        EvidenceError: ``evidence.init_data.malformed``.
    """
    return hashlib.new(_ALGORITHMS[_parse(text)["algorithm"].lower()], text.encode()).digest()


def data(text: str) -> dict[str, str]:
    """The table ``[data]``: file names and contents.

    Raises:
        EvidenceError: ``evidence.init_data.malformed``.
    """
    return dict(_parse(text)["data"])


def check_init_data(claims: Claims, text: str) -> tuple[Failure, ...]:
    """Empty if the TEE was launched with this init-data.

    Raises:
        EvidenceError: ``evidence.init_data.malformed``.
    """
    if claims.snp is not None:
        found = claims.snp.host_data
    elif claims.tdx is not None:
        found = claims.tdx.mr_config_id
    else:
        found = claims.config_id
    size = _SIZES[claims.family]
    expected = digest(text)[:size].ljust(size, b"\0").hex()
    if hmac.compare_digest(found, expected):
        return ()
    return (
        Failure(
            "binding.init_data",
            "init_data",
            found,
            expected,
            "the host launched the TEE with other init-data: launch it with the one that it sends",
        ),
    )


def _parse(text: str) -> dict[str, Any]:
    import tomllib

    try:
        found = tomllib.loads(text)
        if found["version"] != _VERSION or found["algorithm"].lower() not in _ALGORITHMS:
            raise ValueError(f"version {found['version']}, algorithm {found['algorithm']}")
        if not all(isinstance(value, str) for value in found["data"].values()):
            raise ValueError("a value in [data] is not text")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise EvidenceError(
            "the init-data is malformed",
            id="evidence.init_data.malformed",
            found=f"{type(error).__name__}: {error}",
            expected=f'TOML with version = "{_VERSION}", algorithm and [data]',
        ) from None
    return found
