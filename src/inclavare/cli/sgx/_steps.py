"""The steps of ``inclavare sgx selftest``, on hardware or on the software platform."""

from __future__ import annotations

import os
import platform as machine
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ...config import Config
from ...errors import InclavareError, PlatformError, ResourceError
from .._output import size

if TYPE_CHECKING:
    from ...sgx.image import EnclaveImage
    from ...tee.base import Platform
    from ...tee.sgx import HardwarePlatform
    from ...tee.skeleton.protocol import Client

PASS, FAIL, SKIP = "pass", "fail", "skip"
#: EENTER–EEXIT round trips that are timed.
_ROUND_TRIPS = 200
_CPUINFO = {
    "model name": "processor",
    "cpu family": "family",
    "model": "model",
    "stepping": "stepping",
    "microcode": "microcode",
}


@dataclass(frozen=True, slots=True)
class Step:
    """One line of the report; ``milliseconds`` is the time that it took."""

    name: str
    status: str
    detail: str
    milliseconds: float


class Skipped(Exception):
    """Why a step is not done."""


class Enclave(Protocol):
    """What the steps need of an enclave that runs the skeleton's code."""

    def enter(self, request: bytes) -> bytes:
        """A request in, a response out."""

    def target_info(self) -> bytes:
        """512 bytes."""

    def destroy(self) -> None:
        """Give the EPC back."""


class Subject:
    """The software platform under test: its processor executes the skeleton, its quoting enclave quotes.

    Attributes:
        platform: quotes, collateral and root.
    """

    def __init__(self, config: Config) -> None:
        from ...tee.sgx_sim import SimulatedPlatform

        self.platform: Platform = SimulatedPlatform(config)
        self._config = config

    def preliminaries(self) -> Iterator[tuple[str, Callable[[], str]]]:
        """Steps before an enclave is loaded."""

        def available() -> str:
            availability = self.platform.probe()
            if not availability.usable:
                raise PlatformError(availability.reason, id="tee.platform.unusable", remedy=availability.remedy)
            return "software platform: it proves nothing about hardware"

        yield "platform", available

    def load(self, image: EnclaveImage, sigstruct: bytes) -> Enclave:
        """The skeleton on the emulator, with the platform's fuse keys."""
        from importlib.util import find_spec

        if find_spec("unicorn") is None:
            raise Skipped("executing enclave code needs the emulator: pip install 'inclavare[emulator]'")
        from ...tee.sgx_sim import fuses
        from ...tee.sgx_sim.emulator import EmulatedEnclave
        from ...tee.sgx_sim.processor import Processor

        self.platform.quote_target_info()
        processor = Processor(fuses.load(self._config.platform_dir), epc_pages=64)
        return _Emulated(EmulatedEnclave.load(processor, image, sigstruct), image, sigstruct)

    def exhausted(self) -> str:
        """Load more than there is, without a page being touched."""
        from dataclasses import replace

        from ...enclave.signing import sign_once
        from ...sgx.image import PAGE_SIZE, PT_REG, SECINFO_R, SECINFO_W, PageRun
        from ...tee import skeleton

        image = skeleton.image()
        pages = self._config.epc_size // PAGE_SIZE + 1
        heap = PageRun(image.size, PT_REG | SECINFO_R | SECINFO_W, pages, None, measured=False)
        wanted = replace(image, size=1 << heap.end.bit_length(), runs=(*image.runs, heap))
        try:
            self.platform.load(wanted, sign_once(wanted, measurement=bytes(32)), label="selftest").destroy()
        except ResourceError as error:
            return f"refused as it should be: {error.message}"
        raise PlatformError("an enclave larger than the EPC was loaded", id="cli.selftest.epc", remedy="report this")

    def edmm(self, enclave: Enclave) -> str:
        """Nothing to ask a driver."""
        raise Skipped("there is no driver to ask; the software processor's tests cover SGX2")

    def policy(self) -> Any:
        """What the quote is checked with."""
        from ...attestation import Policy

        allowing = Policy(any_enclave=True, allow_debug=True, allow_simulated=True)
        return allowing.with_trust_anchor(self.platform.root_ca())


class _Emulated:
    def __init__(self, host: Any, image: EnclaveImage, sigstruct: bytes) -> None:
        self._host, self._image, self._sigstruct = host, image, sigstruct

    def enter(self, request: bytes) -> bytes:
        """Through the emulator."""
        answer: bytes = self._host.call(request)
        return answer

    def target_info(self) -> bytes:
        """From what was loaded."""
        from ...sgx.structs import ATTRIBUTE_INIT, Attributes, Sigstruct, TargetInfo

        signature = Sigstruct.from_bytes(self._sigstruct)
        attributes = Attributes(self._image.attributes | ATTRIBUTE_INIT, self._image.xfrm).to_bytes()
        return TargetInfo(mrenclave=signature.enclave_hash, attributes=attributes).to_bytes()

    def destroy(self) -> None:
        """EREMOVE."""
        self._host.driver.remove(self._host.loaded)


class Hardware(Subject):
    """This machine's SGX."""

    def __init__(self, found: HardwarePlatform, root: Path = Path("/")) -> None:
        self.platform = self._hardware = found
        self._root = root

    def preliminaries(self) -> Iterator[tuple[str, Callable[[], str]]]:
        """CPUID, kernel, device nodes, EPC and vDSO."""
        yield "cpuid", self._cpuid
        yield "kernel", self._kernel
        yield "device", self._device
        yield "provisioning device", self._provisioning
        yield "epc", self._epc
        yield "epc cgroup", self._cgroup
        yield "vdso", self._vdso
        yield "platform", self._usable

    def load(self, image: EnclaveImage, sigstruct: bytes) -> Enclave:
        """The skeleton in the processor."""
        return self._hardware.load(image, sigstruct, label="selftest")

    def exhausted(self) -> str:
        """Nothing to do: see the message."""
        raise Skipped("Linux writes enclave pages back instead of refusing; a full EPC shows as slowness")

    def edmm(self, enclave: Enclave) -> str:
        """Whether the EDMM calls are there, and whether the driver takes a permission away."""
        from ...sgx.image import PAGE_SIZE, SECINFO_R, SECINFO_W
        from ...tee import skeleton
        from ...tee.sgx.platform import HardwareEnclave

        assert isinstance(enclave, HardwareEnclave)
        if not self._hardware.cpu().sgx2:
            raise Skipped("the processor has no SGX2")
        if not enclave.file.offers_edmm():
            raise Skipped("the kernel has no EDMM calls (Linux 6.0)")
        # The page keeps what it has, so that nobody has to EACCEPT: the skeleton cannot.
        enclave.file.restrict_permissions(skeleton.STACK_TOP - PAGE_SIZE, PAGE_SIZE, SECINFO_R | SECINFO_W)
        return "offered; a page's permissions were restricted to what they are"

    def policy(self) -> Any:
        """What the quote is checked with: Intel's root, which no policy replaces."""
        from ...attestation import Policy

        return Policy(any_enclave=True, allow_debug=True)

    def _cpuid(self) -> str:
        cpu = self._hardware.cpu()
        if not cpu.sgx:
            raise PlatformError(
                f"the processor ({cpu.vendor}) has no SGX, or the hypervisor hides it",
                id="cli.selftest.cpuid",
                remedy="use a machine with SGX; if it is virtual, with SGX in its hypervisor's configuration",
            )
        names = {"SGX1": cpu.sgx1, "SGX2": cpu.sgx2, "FLC": cpu.flc, "KSS": cpu.kss, "EDECCSSA": cpu.edeccssa}
        text = ", ".join(name if has else f"no {name}" for name, has in names.items())
        text += f"; attributes {cpu.attributes:#x}, xfrm {cpu.xfrm:#x}, miscselect {cpu.miscselect:#x}"
        text += f"; enclaves up to {size(cpu.max_size_64)}"
        if not cpu.sgx1 or not cpu.flc:
            raise PlatformError(text, id="cli.selftest.cpuid", remedy="enable SGX and launch control in the firmware")
        return text

    def _kernel(self) -> str:
        release = machine.release()
        found = kernel_option("CONFIG_X86_SGX", self._root, release)
        numbers = tuple(int(number) for number in re.findall(r"\d+", release)[:2])
        shown = {None: "options not shown", "": "CONFIG_X86_SGX is not set"}.get(found, f"CONFIG_X86_SGX={found}")
        text = f"{release}, {shown}"
        if numbers < (5, 11) or found == "":
            raise PlatformError(text, id="cli.selftest.kernel", remedy="use Linux 5.11 or newer with CONFIG_X86_SGX=y")
        return text

    def _device(self) -> str:
        from ...tee.sgx.driver import ENCLAVE_DEVICE

        return self._node(ENCLAVE_DEVICE) + self._noexec()

    def _noexec(self) -> str:
        best = ("", "")
        for line in (self._root / "proc/self/mountinfo").read_text().splitlines():
            fields = line.split()
            if fields[4] in ("/", "/dev") and len(fields[4]) >= len(best[0]):
                best = fields[4], fields[5]
        if "noexec" in best[1].split(","):
            raise PlatformError(
                f"{best[0]} is mounted noexec", id="cli.selftest.noexec", remedy=f"mount -o remount,exec {best[0]}"
            )
        return ""

    def _provisioning(self) -> str:
        from ...tee.sgx.driver import PROVISION_DEVICE

        try:
            return self._node(PROVISION_DEVICE)
        except PlatformError as error:
            raise Skipped(f"{error.message}; only quoting enclaves need it") from None

    def _node(self, path: str) -> str:
        place = self._root / path.lstrip("/")
        try:
            found = place.stat()
            os.close(os.open(place, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            availability = self._hardware.probe()
            raise PlatformError(
                f"{path}: {error.strerror}",
                id="cli.selftest.device",
                found=availability.reason or None,
                remedy=availability.remedy or None,
            ) from None
        return f"{path} opens; mode {found.st_mode & 0o777:04o}, uid {found.st_uid}, gid {found.st_gid}"

    def _epc(self) -> str:
        from ...tee.sgx.sysfs import epc_nodes

        cpu = self._hardware.cpu()
        if not cpu.epc:
            raise PlatformError(
                "CPUID shows no EPC", id="cli.selftest.epc", remedy="reserve memory for SGX (PRMRR) in the firmware"
            )
        sections = " + ".join(size(section.size) for section in cpu.epc)
        nodes = ", ".join(f"node {node}: {size(count)}" for node, count in epc_nodes(self._root).items())
        return f"{size(cpu.epc_size)} ({sections})" + (f"; {nodes}" if nodes else "")

    def _cgroup(self) -> str:
        from ...tee.sgx.sysfs import epc_accounting

        found = epc_accounting(self._root)
        if found is None:
            raise Skipped("this kernel does not account for EPC (no sgx_epc in misc.capacity)")
        tightest = found.tightest
        limit = "no limit" if tightest is None else f"{size(tightest.current)} of {size(tightest.limit or 0)} used"
        return f"capacity {size(found.capacity)}, {limit}"

    def _vdso(self) -> str:
        from ...tee.sgx.vdso import SYMBOL, enter_function

        enter_function()
        return SYMBOL

    def _usable(self) -> str:
        availability = self._hardware.probe()
        if not availability.usable:
            raise PlatformError(availability.reason, id="tee.sgx.unavailable", remedy=availability.remedy)
        return "usable"


def kernel_option(name: str, root: Path, release: str) -> str | None:
    """A kernel option's value, ``""`` if it is not set, ``None`` if the kernel does not show its options."""
    import gzip

    for path in (root / "proc/config.gz", root / f"boot/config-{release}", root / f"lib/modules/{release}/config"):
        try:
            data = path.read_bytes()
            text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
        except (OSError, EOFError, ValueError):
            continue
        found = re.search(rf"^{name}=(.*)$", text, re.MULTILINE)
        return found[1] if found else ""
    return None


def describe(root: Path = Path("/")) -> dict[str, str]:
    """The machine, for a report that others read: no host name, no serial number, no address."""
    from ... import __version__

    found = {"inclavare": __version__, "python": machine.python_version(), "kernel": machine.release()}
    try:
        for line in (root / "proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in _CPUINFO:
                found.setdefault(_CPUINFO[key.strip()], value.strip())
            if key.strip() == "flags":
                found["virtual"] = "yes" if "hypervisor" in value.split() else "no"
                break
    except OSError:
        pass
    for name, path in (("product", "product_name"), ("firmware", "bios_version")):
        try:
            found[name] = (root / "sys/class/dmi/id" / path).read_text().strip()
        except (OSError, UnicodeDecodeError):
            continue
    try:
        found["system"] = machine.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        pass
    return found


def perform(subject: Subject) -> Iterator[Step]:
    """Every step, one after the other; what depends on a step that did not pass is skipped."""
    from ...enclave.signing import sign_once
    from ...tee import skeleton
    from ...tee.skeleton.protocol import Client

    ready = True
    for name, action in subject.preliminaries():
        step = _timed(name, action)
        yield step
        # The last of them says whether enclaves can be loaded.
        ready = step.status == PASS
    image = skeleton.image(debug=True)
    signature = sign_once(image) if ready else b""
    loaded: list[Enclave] = []

    def load() -> str:
        if not ready:
            raise Skipped("enclaves cannot be loaded here")
        loaded.append(subject.load(image, signature))
        return f"{image.page_count} pages, ATTRIBUTES.DEBUG"

    yield _timed("load and EINIT", load)
    try:
        enclave = loaded[0] if loaded else None
        for name, act in _enclave_steps(subject, Client(enclave.enter) if enclave else None, enclave):
            yield _timed(name, act)
        yield _timed("full EPC", subject.exhausted if ready else _no_enclave)
        yield from _quote_steps(subject, enclave)
    finally:
        for one in loaded:
            one.destroy()


def _no_enclave() -> str:
    raise Skipped("no enclave")


def _enclave_steps(
    subject: Subject, client: Client | None, enclave: Enclave | None
) -> Iterator[tuple[str, Callable[[], str]]]:
    names = ("INIT", "ECHO", "exception in the enclave", "REPORT", "SEAL and UNSEAL", "EDMM", "round trips")
    if client is None or enclave is None:
        yield from ((name, _no_enclave) for name in names)
        return

    def init() -> str:
        client.init()
        return "random name drawn in the enclave (RDRAND)"

    def echo() -> str:
        for length in (0, 1, 4096, 8176):
            data = os.urandom(length)
            _expect(client.echo(data) == data, f"ECHO of {length} bytes brought other bytes")
        return "0 to 8176 bytes, the same came back"

    def exception() -> str:
        from ...tee.skeleton.protocol import Operation

        client.ask(Operation.UD2)
        return "#UD, the enclave's handler, ERESUME"

    def report() -> str:
        from ...sgx.structs import ReportBody, TargetInfo

        target, data = TargetInfo.from_bytes(enclave.target_info()), os.urandom(64)
        body = ReportBody.from_bytes(client.report(target, data).body)
        _expect(body.report_data == data, "the report has other data")
        _expect(body.mrenclave == target.mrenclave, "the report is another enclave's")
        _expect(body.attributes == target.attributes, "the report has other attributes")
        return f"MRENCLAVE {body.mrenclave.hex()}, CPUSVN {body.cpusvn.hex()}"

    def seal() -> str:
        secret = os.urandom(100)
        sealed = client.seal(secret, b"selftest")
        _expect(client.unseal(sealed, b"selftest") == secret, "UNSEAL brought other data")
        try:
            client.unseal(sealed, b"another")
        except InclavareError as error:
            _expect(error.id == "tee.skeleton.authentication", error.message)
            return "100 bytes; other additional data are refused"
        raise PlatformError("UNSEAL took other additional data", id="cli.selftest.seal", remedy="report this")

    def round_trips() -> str:
        started = time.perf_counter()
        for _ in range(_ROUND_TRIPS):
            client.echo(b"")
        return f"{_ROUND_TRIPS / (time.perf_counter() - started):,.0f} a second (EENTER, EEXIT, Python around it)"

    actions = (init, echo, exception, report, seal, lambda: subject.edmm(enclave), round_trips)
    yield from zip(names, actions, strict=True)


def _quote_steps(subject: Subject, enclave: Enclave | None) -> Iterator[Step]:
    from ...tee.skeleton.protocol import Client

    data = os.urandom(64)
    found: dict[str, bytes] = {}

    def target() -> str:
        if enclave is None:
            _no_enclave()
        found["target"] = subject.platform.quote_target_info()
        return f"quoting enclave {found['target'][:32].hex()}"

    def quote() -> str:
        from ...sgx.structs import TargetInfo

        if enclave is None or "target" not in found:
            raise Skipped("no quoting enclave")
        report = Client(enclave.enter).report(TargetInfo.from_bytes(found["target"]), data)
        found["quote"] = subject.platform.quote(report.to_bytes())
        return f"{len(found['quote'])} bytes, version {int.from_bytes(found['quote'][:2], 'little')}"

    def verified() -> str:
        from ...attestation import Evidence, verify

        if "quote" not in found:
            raise Skipped("no quote")
        try:
            collateral = subject.platform.collateral()
        except PlatformError as error:
            if error.id == "tee.sgx.pccs":
                raise Skipped(f"{error.found}") from None
            raise
        result = verify(Evidence.from_quote(found["quote"], collateral), subject.policy(), report_data=data)
        claims = result.claims
        # A TCB that a policy would refuse is no fault of the way here.
        failures = [failure for failure in result.failures if failure.id != "policy.tcb"]
        _expect(not failures, "; ".join(f"{failure.claim}: {failure.found}" for failure in failures))
        advisories = ", ".join(claims.advisories) or "none"
        return f"authentic; TCB {claims.tcb_status} ({claims.tcb_date}), FMSPC {claims.fmspc}, advisories: {advisories}"

    yield _timed("quoting enclave", target)
    yield _timed("quote", quote)
    yield _timed("quote verified", verified)


def _expect(right: bool, otherwise: str) -> None:
    if not right:
        raise PlatformError(otherwise, id="cli.selftest.wrong", remedy="report this")


def _timed(name: str, action: Callable[[], str]) -> Step:
    started = time.perf_counter()
    try:
        status, detail = PASS, action()
    except Skipped as reason:
        status, detail = SKIP, str(reason)
    except InclavareError as error:
        status, detail = FAIL, error.one_line()
    except Exception as error:  # a report of a defect is worth more than its absence
        status, detail = FAIL, f"unexpected {type(error).__name__}: {error}"
    return Step(name, status, detail, round((time.perf_counter() - started) * 1000, 2))
