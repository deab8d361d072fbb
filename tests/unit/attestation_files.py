"""``/dev/attestation`` of a small enclave, mounted for tests."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from inclavare.shield import mounts
from inclavare.shield.attestfs import AttestFs, EnclaveCalls
from inclavare.shield.secrets import SecretStore
from inclavare.tee.sgx_sim import SimulatedEnclave

needs_fuse = pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="needs root and /dev/fuse to mount"
)


def calls_of(enclave: SimulatedEnclave, quote: Any = bytes, **other: Any) -> EnclaveCalls:
    """What an enclave's files ask of it; ``other`` replaces some."""
    calls = EnclaveCalls(
        my_target_info=enclave.target_info,
        report=enclave.report,
        quote=quote,
        collateral=lambda: b"{}",
        seal_key=enclave.seal_key,
        egetkey=enclave.egetkey,
        counters=enclave.counters,
    )
    return replace(calls, **other)


@contextlib.contextmanager
def mounted(
    calls: EnclaveCalls, faults: list[BaseException], secrets: SecretStore | None = None, owner: int = 0
) -> Iterator[Path]:
    """The mount point."""
    served = AttestFs(calls, secrets or SecretStore(), owner=(owner, owner), on_fault=faults.append)
    # Not under pytest's directory, which other users cannot enter.
    point = Path(tempfile.mkdtemp(prefix="attestation-"))
    point.chmod(0o755)
    served.mount(str(point))
    try:
        yield point
    finally:
        mounts.umount(str(point))
        point.rmdir()
