"""Reports and quotes of the enclave that this process runs in, through ``/dev/attestation``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import PlatformError, UsageError

DIRECTORY = Path("/dev/attestation")


def _path(name: str) -> Path:
    path = DIRECTORY / name
    if not path.exists():
        raise PlatformError(
            f"{path} does not exist",
            id="sdk.attest.outside",
            expected="to run inside an enclave container",
            remedy="start the container with ENCLAVE_TYPE set",
        )
    return path


def _set_report_data(report_data: bytes) -> None:
    if len(report_data) > 64:
        raise UsageError(
            "report data is too long",
            id="sdk.attest.report_data",
            found=f"{len(report_data)} bytes",
            expected="at most 64",
        )
    _path("user_report_data").write_bytes(report_data.ljust(64, b"\0"))


def quote(report_data: bytes) -> bytes:
    """A DCAP quote over up to 64 bytes of report data (zero-padded).

    Raises:
        PlatformError: this process does not run in an enclave.
        UsageError: more than 64 bytes.
    """
    _set_report_data(report_data)
    return _path("quote").read_bytes()


def collateral() -> dict[str, Any] | None:
    """Collateral for this platform's quotes in dcap-qvl's layout, or ``None`` where the platform has none.

    It is no evidence: whoever verifies checks it like collateral from anywhere else.

    Raises:
        PlatformError: this process does not run in an enclave.
    """
    import json

    _path("quote")
    try:
        found: dict[str, Any] = json.loads((DIRECTORY / "collateral").read_bytes())
    except (OSError, ValueError):
        return None
    return found


def report(target_info: bytes, report_data: bytes) -> bytes:
    """EREPORT, 432 bytes, for the enclave whose 512-byte TARGETINFO is given.

    Raises:
        PlatformError: this process does not run in an enclave.
        UsageError: a wrong length.
    """
    if len(target_info) != 512:
        raise UsageError(
            "not a TARGETINFO", id="sdk.attest.target_info", found=f"{len(target_info)} bytes", expected="512 bytes"
        )
    _path("target_info").write_bytes(target_info)
    _set_report_data(report_data)
    return _path("report").read_bytes()


def target_info() -> bytes:
    """This enclave's own TARGETINFO, 512 bytes.

    Raises:
        PlatformError: this process does not run in an enclave.
    """
    return _path("my_target_info").read_bytes()


def seal_key(policy: str = "mrenclave") -> bytes:
    """The enclave's sealing key, 16 bytes; ``policy`` is ``mrenclave`` (this enclave) or ``mrsigner`` (its signer's).

    Raises:
        PlatformError: this process does not run in an enclave, or may not read its keys.
        UsageError: another policy.
    """
    if policy not in ("mrenclave", "mrsigner"):
        raise UsageError(
            "no such sealing policy", id="sdk.attest.policy", found=policy, expected="mrenclave or mrsigner"
        )
    return _path(f"keys/_sgx_{policy}").read_bytes()


def secret(name: str) -> bytes | None:
    """A secret that a relying party released to this enclave, or ``None`` while it has not."""
    try:
        return (_path("secrets") / name).read_bytes()
    except FileNotFoundError:
        return None
