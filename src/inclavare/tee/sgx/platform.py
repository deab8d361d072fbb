"""The hardware platform: what the machine has, loading enclaves, and quotes through AESM.

Nothing here falls back to the simulated platform: what is missing is said, with what would help.
"""

from __future__ import annotations

import os
import platform as machine
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ...config import Config
from ...errors import IntegrityError, PlatformError, UsageError
from ...sgx.codes import Enclu
from ...sgx.image import EnclaveImage
from ...sgx.structs import ATTRIBUTE_DEBUG, ATTRIBUTE_INIT, ATTRIBUTE_PROVISIONKEY, Attributes, Secs, TargetInfo
from ..base import Availability

if TYPE_CHECKING:
    import ctypes

    from .aesm import Aesm
    from .cpuid import Cpuid, SgxCpu
    from .driver import EnclaveFile
    from .syscalls import Syscalls
    from .vdso import Gate

ENCLAVE_DEVICE = "/dev/sgx_enclave"
_USE_SIMULATION = "use enclave type sgx-sim for development"
_KERNEL = "use a kernel 5.11 or newer with CONFIG_X86_SGX"


class HardwareEnclave:
    """An initialised enclave in the processor (see :class:`inclavare.tee.base.Enclave`).

    EREPORT and EGETKEY are instructions of the enclave's own code. This process can have a report only of an enclave
    whose code answers requests: the project's skeleton enclave.
    """

    def __init__(self, file: EnclaveFile, image: EnclaveImage, secs: Secs, gate: Gate | None) -> None:
        self._file = file
        self._secs = secs
        self._gate = gate
        self._pages = image.page_count
        # A TCS lets one thread in.
        self._lock = threading.Lock()

    @property
    def mrenclave(self) -> bytes:
        """32 bytes, as the SIGSTRUCT has it, which EINIT compared with the measurement."""
        return self._secs.mrenclave

    @property
    def mrsigner(self) -> bytes:
        """32 bytes."""
        return self._secs.mrsigner

    @property
    def debug(self) -> bool:
        """ATTRIBUTES.DEBUG."""
        return Attributes.from_bytes(self._secs.attributes).debug

    @property
    def epc_pages(self) -> int:
        """4096-byte pages in use, the SECS included; 0 after :meth:`destroy`. The kernel may have written some back."""
        return self._pages

    @property
    def counters(self) -> None:
        """None: Linux offers no monotonic counters for SGX."""

    @property
    def file(self) -> EnclaveFile:
        """The driver's side of the enclave, for EDMM."""
        return self._file

    def target_info(self) -> bytes:
        """This enclave's TARGETINFO, 512 bytes."""
        secs = self._secs
        return TargetInfo(
            mrenclave=secs.mrenclave,
            attributes=secs.attributes,
            cet_attributes=secs.cet_attributes,
            config_svn=secs.config_svn,
            miscselect=secs.miscselect,
            config_id=secs.config_id,
        ).to_bytes()

    def report(self, target_info: bytes, report_data: bytes) -> bytes:
        """EREPORT by the enclave's code: 512 and 64 bytes in, 432 bytes out.

        Raises:
            UsageError: ``report_data`` is not 64 bytes.
            IntegrityError: ``target_info`` is not a TARGETINFO.
            PlatformError: ``tee.sgx.code``: the enclave has no code for it; ``tee.sgx.fault``.
        """
        from ..skeleton.protocol import Client

        if len(report_data) != 64:
            raise UsageError(
                "report data has the wrong length",
                id="tee.report.data",
                found=f"{len(report_data)} bytes",
                expected="64 bytes",
            )
        target, client = TargetInfo.from_bytes(target_info), Client(self.enter)
        try:
            return client.report(target, report_data).to_bytes()
        except UsageError as error:
            if error.id != "tee.skeleton.state":
                raise
        client.init()
        return client.report(target, report_data).to_bytes()

    def egetkey(self, request: bytes) -> bytes:
        """Refuses.

        Raises:
            PlatformError: ``tee.sgx.key``: a key never leaves an enclave in hardware.
        """
        self._no_key()

    def seal_key(self, policy: str) -> bytes:
        """Refuses, like :meth:`egetkey`."""
        self._no_key()

    def enter(self, request: bytes) -> bytes:
        """Give the skeleton enclave a request (:mod:`inclavare.tee.skeleton.protocol`) and bring its response.

        Raises:
            PlatformError: ``tee.sgx.code``: the enclave has no code for it; ``tee.sgx.fault``: it did not come back by
                itself.
        """
        import ctypes

        from ..skeleton.protocol import MAX_MESSAGE, Status, refusal

        if self._gate is None:
            raise PlatformError(
                "this enclave has no code that answers requests",
                id="tee.sgx.code",
                found="an image other than the skeleton enclave",
                remedy="an enclave runtime with code in the enclave (gramine, occlum) makes its own reports and keys",
            )
        with self._lock:
            if not self._pages:
                raise PlatformError(
                    "the enclave is not running", id="tee.enclave.state", found="destroyed", remedy="start it again"
                )
            # Numbers of 64 bits, because the enclave wants both buffers at multiples of 8.
            asked = (ctypes.c_uint64 * (-(-len(request) // 8)))()
            answer = (ctypes.c_uint64 * (MAX_MESSAGE // 8))()
            ctypes.memmove(asked, request, len(request))
            status = self._run(self._gate, asked, answer)
            # These two come in the register only: there may be no response.
            if status in (Status.BUFFER, Status.EXCEPTION):
                raise refusal(status)
            return bytes(answer)

    def _run(self, gate: Gate, request: ctypes.Array[Any], response: ctypes.Array[Any]) -> int:
        """EENTER until the enclave exits; RDI as it left it. An exception goes to the enclave's own handler first."""
        import ctypes

        from .. import skeleton
        from ..skeleton.protocol import Status
        from .vdso import fault

        tcs = self._file.base + skeleton.TCS
        left = gate.enter(
            tcs,
            rdi=ctypes.addressof(request),
            rsi=ctypes.sizeof(request),
            rdx=ctypes.addressof(response),
            r8=ctypes.sizeof(response),
        )
        while not left.exited:
            handled = gate.enter(tcs) if left.function == Enclu.ERESUME else left
            if not handled.exited or handled.registers[0] != Status.OK:
                raise fault(left, self._file.base, self._file.size)
            left = gate.enter(tcs, function=Enclu.ERESUME)
        return left.registers[0]

    def destroy(self) -> None:
        """Close the driver's file, whereupon the kernel removes every page. Idempotent."""
        with self._lock:
            self._pages = 0
            self._file.close()

    def _no_key(self) -> NoReturn:
        raise PlatformError(
            "this process cannot have a key of an enclave in hardware",
            id="tee.sgx.key",
            found="EGETKEY gives keys to code in the enclave only",
            remedy="use an enclave runtime whose code in the enclave seals and unseals (gramine, occlum)",
        )


class HardwarePlatform:
    """See :class:`inclavare.tee.base.Platform`.

    Args:
        root: directory that stands for ``/``.
        cpuid: the instruction, or in tests what stands for it.
        syscalls: the kernel's calls, likewise.
        enter: address of ``__vdso_sgx_enter_enclave``, by default the process's own.
    """

    name = "sgx"
    simulated = False

    def __init__(
        self,
        root: Path = Path("/"),
        *,
        cpuid: Cpuid | None = None,
        syscalls: Syscalls | None = None,
        enter: int | None = None,
    ) -> None:
        self._root = root
        self._cpuid = cpuid
        self._syscalls = syscalls
        self._enter = enter
        self._last_quote: bytes | None = None

    def cpu(self) -> SgxCpu:
        """What the processor says about SGX.

        Raises:
            PlatformError: CPUID cannot be executed.
        """
        from .cpuid import enumerate_sgx, execute

        return enumerate_sgx(self._cpuid or execute)

    def probe(self) -> Availability:
        """What is missing, the most basic thing first."""
        if machine.machine() != "x86_64":
            return Availability(False, f"SGX needs an x86-64 processor, this is {machine.machine()}", _USE_SIMULATION)
        flags = self._cpu_flags()
        if not self._exists(ENCLAVE_DEVICE):
            return self._without_driver(flags)
        if not os.access(self._place(ENCLAVE_DEVICE), os.R_OK | os.W_OK):
            return Availability(
                False, f"{ENCLAVE_DEVICE} cannot be opened by this user", "run as root or join the device's group (sgx)"
            )
        try:
            cpu = self.cpu()
            if not cpu.sgx1 or not cpu.flc:
                lacks = "SGX1" if not cpu.sgx1 else "flexible launch control"
                return Availability(
                    False,
                    f"{ENCLAVE_DEVICE} is there, but CPUID shows no {lacks}",
                    "enable SGX in the firmware and, if the machine is virtual, in its hypervisor",
                )
            if self._enter is None:
                from .vdso import enter_function

                enter_function()
        except PlatformError as error:
            return Availability(False, f"{error.message}: {error.found}", error.remedy or "")
        return Availability(True)

    def _without_driver(self, flags: frozenset[str]) -> Availability:
        from .driver import FOREIGN_DEVICES

        for path, driver in FOREIGN_DEVICES.items():
            if self._exists(path):
                return Availability(
                    False,
                    f"{path} belongs to {driver}, whose interface is another than the kernel's",
                    f"{_KERNEL}, and remove that driver",
                )
        if "sgx" in flags:
            return Availability(
                False,
                f"the processor has SGX, but there is no {ENCLAVE_DEVICE}",
                f"{_KERNEL} and a processor with flexible launch control (sgx_lc)"
                + ("" if "sgx_lc" in flags else ", which this one does not show"),
            )
        try:
            switched_off = self.cpu().sgx
        except PlatformError:
            switched_off = False
        if switched_off:
            return Availability(
                False,
                "the processor has SGX, but it is switched off (no sgx flag in /proc/cpuinfo)",
                "enable SGX in the firmware's setup (not only by software), and do not boot with nosgx",
            )
        return Availability(
            False,
            "the processor offers no SGX (no sgx flag in /proc/cpuinfo)",
            "use a machine with SGX enabled in its firmware and, if it is virtual, by its hypervisor; "
            f"or {_USE_SIMULATION}",
        )

    def load(self, image: EnclaveImage, sigstruct: bytes, *, label: str) -> HardwareEnclave:
        """ECREATE, EADD, EEXTEND and EINIT (see :meth:`inclavare.tee.base.Platform.load`).

        ``label`` is not used: the kernel charges the EPC to this process's cgroup.
        """
        self._need()
        from ...sgx.sigstruct import mrsigner
        from ...sgx.structs import Sigstruct
        from .cpuid import lacking
        from .driver import EnclaveFile
        from .syscalls import LINUX

        signed = Sigstruct.from_bytes(sigstruct)
        missing = lacking(self.cpu(), image)
        if missing:
            raise PlatformError(
                "this processor lacks what the enclave needs",
                id="tee.sgx.feature",
                found=", ".join(missing),
                remedy="build the enclave without it, or use another machine",
            )
        secs = Secs(
            size=image.size,
            base=0,
            ssa_frame_size=image.ssa_frame_size,
            miscselect=image.miscselect,
            attributes=Attributes(image.attributes, image.xfrm).to_bytes(),
        )
        gate = self._gate(image)
        file = EnclaveFile(image.size, syscalls=self._syscalls or LINUX)
        try:
            file.create(secs)
            if image.attributes & ATTRIBUTE_PROVISIONKEY:
                file.provision()
            for run in image.runs:
                file.add(run)
            try:
                file.init(sigstruct)
            except IntegrityError:
                _explain(image, signed)
                raise
        except BaseException:
            file.close()
            raise
        running = Secs(
            size=image.size,
            base=file.base,
            ssa_frame_size=image.ssa_frame_size,
            miscselect=image.miscselect,
            attributes=Attributes(image.attributes | ATTRIBUTE_INIT, image.xfrm).to_bytes(),
            mrenclave=signed.enclave_hash,
            mrsigner=mrsigner(signed.modulus),
            isv_prod_id=signed.isv_prod_id,
            isv_svn=signed.isv_svn,
        )
        return HardwareEnclave(file, image, running, gate)

    def _gate(self, image: EnclaveImage) -> Gate | None:
        from .. import skeleton

        if image != skeleton.image(debug=bool(image.attributes & ATTRIBUTE_DEBUG)):
            return None
        from .vdso import Gate

        return Gate(self._enter)

    def quote_target_info(self) -> bytes:
        """TARGETINFO of AESM's quoting enclave, 512 bytes.

        Raises:
            PlatformError: ``tee.sgx.unavailable`` or ``tee.aesm.*``.
        """
        self._need()
        aesm = self._aesm()
        return aesm.init_quote_ex(aesm.ecdsa_key_id())

    def quote(self, report: bytes) -> bytes:
        """An ECDSA quote by AESM over a 432-byte REPORT that is targeted at the quoting enclave.

        Raises:
            PlatformError: ``tee.sgx.unavailable`` or ``tee.aesm.*``.
        """
        self._need()
        aesm = self._aesm()
        self._last_quote = aesm.quote_ex(report, aesm.ecdsa_key_id())
        return self._last_quote

    def collateral(self) -> dict[str, Any]:
        """Collateral for the last quote that was made here, from the PCCS in ``/etc/sgx_default_qcnl.conf``.

        Raises:
            PlatformError: ``tee.sgx.pccs``: no PCCS is configured or it does not answer; ``tee.sgx.noquote``: there is
                no quote yet whose PCK certificate would say which platform this is.
        """
        self._need()
        from . import pccs

        url, check = pccs.service(self._root)
        if self._last_quote is None:
            raise PlatformError(
                "collateral is looked up by a quote's PCK certificate, and no quote was made yet",
                id="tee.sgx.noquote",
                remedy="ask for a quote first",
            )
        return dict(pccs.collateral(url, self._last_quote, check_certificate=check))

    def root_ca(self) -> bytes:
        """Intel's SGX root CA certificate, DER."""
        from ...sgx.intel import INTEL_ROOT_CA

        return INTEL_ROOT_CA

    def reclaim(self) -> None:
        """Nothing: the driver frees an enclave when its file is closed, by whatever."""

    def _aesm(self) -> Aesm:
        from .aesm import SOCKET, Aesm

        return Aesm(self._place(SOCKET))

    def _place(self, path: str) -> Path:
        return self._root / path.lstrip("/")

    def _exists(self, path: str) -> bool:
        # A directory /dev/sgx holds the nodes of the DCAP driver.
        return self._place(path).exists() and not self._place(path).is_dir()

    def _cpu_flags(self) -> frozenset[str]:
        try:
            with (self._root / "proc/cpuinfo").open() as lines:
                for line in lines:
                    if line.startswith("flags"):
                        return frozenset(line.partition(":")[2].split())
        except OSError:
            pass
        return frozenset()

    def _need(self) -> None:
        availability = self.probe()
        if not availability.usable:
            raise PlatformError(
                "SGX hardware cannot be used",
                id="tee.sgx.unavailable",
                found=availability.reason,
                remedy=availability.remedy,
            )


def _explain(image: EnclaveImage, signed: Any) -> None:
    """Why EINIT refused: Linux hands the processor's reason on as EPERM only.

    Raises:
        IntegrityError: ``sgx.sigstruct.*`` or ``sgx.einit.*``, if the reason is in what was loaded.
    """
    from ...sgx import sigstruct
    from ...sgx.measure import measure

    sigstruct.verify(signed)
    mrenclave = measure(image)
    if mrenclave != signed.enclave_hash:
        raise _refused(
            "enclavehash", "the SIGSTRUCT was made for another enclave", mrenclave.hex(), signed.enclave_hash.hex()
        )
    mask, wanted = Attributes.from_bytes(signed.attribute_mask), Attributes.from_bytes(signed.attributes)
    found = Attributes(image.attributes, image.xfrm)
    if found.masked(mask) != wanted.masked(mask):
        raise _refused("attributes", "the enclave's attributes are not those that its signer allows", found, wanted)
    if (image.miscselect ^ signed.miscselect) & signed.misc_mask:
        raise _refused(
            "miscselect",
            "the enclave's MISCSELECT is not the one that its signer allows",
            f"{image.miscselect:#x}",
            f"{signed.miscselect:#x} under mask {signed.misc_mask:#x}",
        )


def _refused(event: str, message: str, found: object, expected: object) -> IntegrityError:
    return IntegrityError(
        message,
        id=f"sgx.einit.{event}",
        found=found,
        expected=expected,
        remedy="load the enclave as it was signed, or sign it again",
    )


def create(config: Config) -> HardwarePlatform:
    """This machine's SGX."""
    return HardwarePlatform()
