"""The hardware platform ``sgx``: Intel SGX through the kernel's driver and the vDSO."""

from __future__ import annotations

from .platform import HardwarePlatform, create

__all__ = ["HardwarePlatform", "create"]
