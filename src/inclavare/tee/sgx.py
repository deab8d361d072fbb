"""The hardware platform ``sgx``: Intel SGX through the Linux driver.

This module tells what the machine has and what is missing. Loading enclaves on hardware is not implemented in this
version, and says so: nothing falls back to the simulated platform.
"""

from __future__ import annotations

import os
import platform as machine
from pathlib import Path
from typing import Any, NoReturn

from ..config import Config
from ..errors import PlatformError
from ..sgx.image import EnclaveImage
from .base import Availability, Enclave

#: The in-kernel driver's device, and the older names that out-of-tree drivers used.
DEVICES = ("/dev/sgx_enclave", "/dev/sgx/enclave", "/dev/isgx")
_USE_SIMULATION = "use enclave type sgx-sim for development"


class HardwarePlatform:
    """See :class:`inclavare.tee.base.Platform`.

    Args:
        root: directory that stands for ``/``.
    """

    name = "sgx"
    simulated = False

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root

    def probe(self) -> Availability:
        """What is missing, the most basic thing first."""
        if machine.machine() != "x86_64":
            return Availability(False, f"SGX needs an x86-64 processor, this is {machine.machine()}", _USE_SIMULATION)
        flags = self._cpu_flags()
        device = self.device()
        if device is None and "sgx" not in flags:
            return Availability(
                False,
                "the processor offers no SGX (no sgx flag in /proc/cpuinfo)",
                "use a machine with SGX enabled in its firmware and, if it is virtual, by its hypervisor; "
                f"or {_USE_SIMULATION}",
            )
        if device is None:
            return Availability(
                False,
                "the processor has SGX, but there is no /dev/sgx_enclave",
                "use a kernel 5.11 or newer with CONFIG_X86_SGX and a processor with flexible launch control (sgx_lc)"
                + ("" if "sgx_lc" in flags else ", which this one does not show"),
            )
        if not os.access(self._root / device.lstrip("/"), os.R_OK | os.W_OK):
            return Availability(
                False, f"{device} cannot be opened by this user", "run as root or join the device's group (sgx)"
            )
        return Availability(
            False, f"{device} is there, but this version cannot load enclaves on hardware yet", _USE_SIMULATION
        )

    def device(self) -> str | None:
        """The driver's device node, if there is one."""
        return next((path for path in DEVICES if (self._root / path.lstrip("/")).exists()), None)

    def load(self, image: EnclaveImage, sigstruct: bytes, *, label: str) -> Enclave:
        """Refuses, saying what is missing.

        Raises:
            PlatformError: always.
        """
        self._refuse()

    def quote_target_info(self) -> bytes:
        """Refuses, like :meth:`load`."""
        self._refuse()

    def quote(self, report: bytes) -> bytes:
        """Refuses, like :meth:`load`."""
        self._refuse()

    def collateral(self) -> dict[str, Any]:
        """Refuses, like :meth:`load`."""
        self._refuse()

    def root_ca(self) -> bytes:
        """Refuses, like :meth:`load`."""
        self._refuse()

    def reclaim(self) -> None:
        """Nothing: the driver frees an enclave when its file is closed, by whatever."""

    def _cpu_flags(self) -> frozenset[str]:
        try:
            with (self._root / "proc/cpuinfo").open() as lines:
                for line in lines:
                    if line.startswith("flags"):
                        return frozenset(line.partition(":")[2].split())
        except OSError:
            pass
        return frozenset()

    def _refuse(self) -> NoReturn:
        availability = self.probe()
        raise PlatformError(
            "SGX hardware cannot be used",
            id="tee.sgx.unavailable",
            found=availability.reason,
            remedy=availability.remedy,
        )


def create(config: Config) -> HardwarePlatform:
    """This machine's SGX."""
    return HardwarePlatform()
