"""The simulated TDX module: what it would be measured as, and what the manufacturer says about it."""

from __future__ import annotations

import hashlib
from typing import Any

#: TEE_TCB_SVN of trust domains: the module's ISVSVN, its major version, then other components; 16 bytes.
TCB_SVN = bytes((3, 1)) + bytes(14)
#: Measurement of the module and its signer, 48 bytes each. Intel's own signer is written as zeros.
MRSEAM = hashlib.sha384(b"inclavare sgx-sim TDX module, no hardware protection").digest()
MRSIGNERSEAM = hashlib.sha384(b"SIMULATED TDX module signer").digest()


def collateral(date: str) -> dict[str, Any]:
    """Its part of a TDX TCB info, version 3: ``tdxModule`` and ``tdxModuleIdentities``.

    Args:
        date: of its TCB level, ISO 8601.
    """
    identity = {"mrsigner": MRSIGNERSEAM.hex().upper(), "attributes": "00" * 8, "attributesMask": "FF" * 8}
    level = {"tcb": {"isvsvn": TCB_SVN[0]}, "tcbDate": date, "tcbStatus": "UpToDate"}
    return {
        "tdxModule": identity,
        "tdxModuleIdentities": [{"id": f"TDX_{TCB_SVN[1]:02X}", **identity, "tcbLevels": [level]}],
    }
