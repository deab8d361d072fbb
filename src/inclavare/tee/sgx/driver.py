"""The Linux driver's ABI: one open file of ``/dev/sgx_enclave`` is one enclave.

Numbers and structures are those of the kernel's ``arch/x86/include/uapi/asm/sgx.h``; what each error means is read from
``arch/x86/kernel/cpu/sgx/ioctl.c``. The tests compare them with the header that the machine has.
"""

from __future__ import annotations

import ctypes
import errno
import time
from dataclasses import dataclass, replace
from typing import NoReturn

from ...errors import InclavareError, IntegrityError, PlatformError, ResourceError
from ...sgx.codes import Status
from ...sgx.image import PAGE_SIZE, PT_TCS, SECINFO_R, SECINFO_W, SECINFO_X, PageRun
from ...sgx.measure import effective_flags
from ...sgx.structs import SecInfo, Secs
from .syscalls import (
    LINUX,
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MAP_SHARED,
    PROT_EXEC,
    PROT_NONE,
    PROT_READ,
    PROT_WRITE,
    Syscalls,
)

ENCLAVE_DEVICE = "/dev/sgx_enclave"
PROVISION_DEVICE = "/dev/sgx_provision"
#: Nodes of drivers that never went into the kernel: other structures under the same ioctl numbers.
FOREIGN_DEVICES = {
    "/dev/isgx": "Intel's out-of-tree driver without flexible launch control",
    "/dev/sgx/enclave": "Intel's out-of-tree DCAP driver",
    "/dev/sgx": "a development version of the driver",
}
_O_RDWR = 2
#: Source pages are handed over in pieces of this size, so that a heap of gigabytes needs no memory here.
_PIECE = 4 << 20
#: How often a call is repeated that the kernel asks to be repeated, and the pause in seconds between.
_ATTEMPTS = 100
_PAUSE = 0.01


class _Create(ctypes.Structure):
    _fields_ = (("src", ctypes.c_uint64),)


class _AddPages(ctypes.Structure):
    _fields_ = (
        ("src", ctypes.c_uint64),
        ("offset", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("secinfo", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
        ("count", ctypes.c_uint64),
    )


class _Init(ctypes.Structure):
    _fields_ = (("sigstruct", ctypes.c_uint64),)


class _Provision(ctypes.Structure):
    _fields_ = (("fd", ctypes.c_uint64),)


class _RestrictPermissions(ctypes.Structure):
    _fields_ = (
        ("offset", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("permissions", ctypes.c_uint64),
        ("result", ctypes.c_uint64),
        ("count", ctypes.c_uint64),
    )


class _ModifyTypes(ctypes.Structure):
    _fields_ = (
        ("offset", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("page_type", ctypes.c_uint64),
        ("result", ctypes.c_uint64),
        ("count", ctypes.c_uint64),
    )


class _RemovePages(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64), ("count", ctypes.c_uint64))


@dataclass(frozen=True, slots=True)
class Ioctl:
    """An ioctl of the driver: name in the header, number, argument, and whether the kernel writes the argument back."""

    name: str
    number: int
    argument: type[ctypes.Structure]
    writes_back: bool

    @property
    def request(self) -> int:
        """The request code: direction, size of the argument, the magic 0xA4 and the number (asm-generic/ioctl.h)."""
        direction = 3 if self.writes_back else 1
        return direction << 30 | ctypes.sizeof(self.argument) << 16 | 0xA4 << 8 | self.number


CREATE = Ioctl("SGX_IOC_ENCLAVE_CREATE", 0, _Create, False)
ADD_PAGES = Ioctl("SGX_IOC_ENCLAVE_ADD_PAGES", 1, _AddPages, True)
INIT = Ioctl("SGX_IOC_ENCLAVE_INIT", 2, _Init, False)
PROVISION = Ioctl("SGX_IOC_ENCLAVE_PROVISION", 3, _Provision, False)
RESTRICT_PERMISSIONS = Ioctl("SGX_IOC_ENCLAVE_RESTRICT_PERMISSIONS", 5, _RestrictPermissions, True)
MODIFY_TYPES = Ioctl("SGX_IOC_ENCLAVE_MODIFY_TYPES", 6, _ModifyTypes, True)
REMOVE_PAGES = Ioctl("SGX_IOC_ENCLAVE_REMOVE_PAGES", 7, _RemovePages, True)
IOCTLS = (CREATE, ADD_PAGES, INIT, PROVISION, RESTRICT_PERMISSIONS, MODIFY_TYPES, REMOVE_PAGES)
#: SGX_PAGE_MEASURE: EEXTEND every chunk of the page.
PAGE_MEASURE = 1

_LOST = "enclave memory was lost: the machine slept, or a virtual machine was moved"


def protection(flags: int) -> int:
    """The ``PROT_`` bits that pages with these SECINFO.FLAGS may be mapped with: their own, or RW for a TCS."""
    if flags & 0xFF << 8 == PT_TCS:
        return PROT_READ | PROT_WRITE
    pairs = ((SECINFO_R, PROT_READ), (SECINFO_W, PROT_WRITE), (SECINFO_X, PROT_EXEC))
    return sum(prot for bit, prot in pairs if flags & bit)


class EnclaveFile:
    """One enclave of the driver: reserve, :meth:`create`, :meth:`add`, :meth:`init`; :meth:`close` gives the EPC back.

    Args:
        size: SECS.SIZE, bytes, a power of two; the base will be a multiple of it.
        syscalls: the kernel, or in tests what stands for it.

    Raises:
        PlatformError: the device cannot be opened.
        ResourceError: no room in the address space.
    """

    def __init__(self, size: int, *, syscalls: Syscalls = LINUX) -> None:
        self._sys = syscalls
        self.size = size
        self.base = 0
        self._fd = self._open()
        try:
            self.base = self._reserve()
        except OSError as error:
            self.close()
            raise ResourceError(
                "the enclave's address range cannot be reserved",
                id="tee.sgx.range",
                found=error.strerror,
                expected=f"{2 * size} bytes of free address space",
                remedy="raise the limit of the address space (ulimit -v), or make the enclave smaller",
            ) from None

    def _open(self) -> int:
        for attempt in range(_ATTEMPTS):
            try:
                return self._sys.open(ENCLAVE_DEVICE, _O_RDWR)
            except OSError as error:
                # The first enclave after an update of the microcode makes newer kernels run EUPDATESVN, which may have
                # to wait for entropy.
                if error.errno not in (errno.EAGAIN, errno.EINTR) or attempt == _ATTEMPTS - 1:
                    raise _open_refused(error) from None
                time.sleep(_PAUSE)
        raise AssertionError("unreachable")

    def _reserve(self) -> int:
        """ELRANGE has to be aligned to its size: take twice as much and give back what is before and behind."""
        area = self._sys.mmap(0, 2 * self.size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1)
        base = (area + self.size - 1) // self.size * self.size
        if base > area:
            self._sys.munmap(area, base - area)
        behind = area + 2 * self.size - (base + self.size)
        if behind:
            self._sys.munmap(base + self.size, behind)
        return base

    # --- building

    def create(self, secs: Secs) -> None:
        """ECREATE. ``secs.size`` is this range's size; ``secs.base`` is set here.

        Raises:
            PlatformError: ``tee.sgx.ecreate``: the processor refuses the SECS.
            ResourceError: the EPC is full.
        """
        page = ctypes.create_string_buffer(replace(secs, base=self.base).to_bytes(), PAGE_SIZE)
        try:
            self._call(CREATE, _Create(ctypes.addressof(page)))
        except OSError as error:
            if error.errno == errno.EIO:
                raise PlatformError(
                    "the processor refuses the enclave's SECS (ECREATE)",
                    id="tee.sgx.ecreate",
                    found=f"size {secs.size:#x}, attributes {secs.attributes.hex()}, MISCSELECT {secs.miscselect:#x}, "
                    f"SSA frames of {secs.ssa_frame_size} pages",
                    expected="what CPUID leaf 12H offers (inclavare sgx selftest)",
                    remedy="build the enclave with fewer features (XFRM, MISCSELECT, KSS) or a smaller size",
                ) from None
            self._refused("ECREATE", error)

    def add(self, run: PageRun) -> None:
        """EADD, and EEXTEND where the run is measured, of each page; then map them with their own permissions.

        Raises:
            ResourceError: the EPC, or the cgroup's share of it, is full.
            PlatformError: ``tee.sgx.lost`` or ``tee.sgx.driver``.
        """
        flags = effective_flags(run.flags)
        secinfo = ctypes.create_string_buffer(SecInfo(flags).to_bytes(), SecInfo.LAYOUT.size)
        length = run.count * PAGE_SIZE
        piece = min(length, _PIECE)
        source = self._stage(piece)
        view = None if run.data is None else memoryview(run.data)
        try:
            for start in range(0, length, piece):
                size = min(piece, length - start)
                if view is not None:
                    ctypes.memmove(source, bytes(view[start : start + size]), size)
                self._add_pages(source, run.offset + start, size, secinfo, PAGE_MEASURE if run.measured else 0)
        finally:
            self._sys.munmap(source, piece)
        self.map(run.offset, length, protection(flags))

    def _stage(self, size: int) -> int:
        # A mapping of its own: source pages have to be page-aligned and must not lie on a noexec file system.
        try:
            return self._sys.mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1)
        except OSError as error:
            self._refused("EADD", error)

    def _add_pages(
        self, source: int, offset: int, length: int, secinfo: ctypes.Array[ctypes.c_char], flags: int
    ) -> None:
        done = idle = 0
        while done < length:
            argument = _AddPages(
                src=source + done,
                offset=offset + done,
                length=length - done,
                secinfo=ctypes.addressof(secinfo),
                flags=flags,
            )
            failure = OSError(errno.EAGAIN, "no page was added, and no reason given")
            try:
                self._call(ADD_PAGES, argument)
            except OSError as error:
                if error.errno not in (errno.EINTR, errno.EAGAIN):
                    self._refused("EADD", error)
                failure = error
            # The kernel counts what it has added also where a signal ended the call.
            done += argument.count
            idle = 0 if argument.count else idle + 1
            if idle == _ATTEMPTS:
                self._refused("EADD", failure)

    def map(self, offset: int, length: int, prot: int) -> None:
        """Map ``length`` bytes of the enclave at ``offset``; the driver allows no more than the pages' permissions.

        Raises:
            PlatformError: ``tee.sgx.map``.
        """
        try:
            self._sys.mmap(self.base + offset, length, prot, MAP_FIXED | MAP_SHARED, self._fd)
        except OSError as error:
            remedy = "report this: the enclave's pages were added with other permissions"
            if error.errno == errno.EPERM:
                remedy = "mount /dev with exec: mount -o remount,exec /dev"
            elif error.errno == errno.EACCES:
                remedy = "give the process the ordinary personality (setarch without -X)"
            raise PlatformError(
                "enclave pages cannot be mapped", id="tee.sgx.map", found=error.strerror, remedy=remedy
            ) from None

    def provision(self) -> None:
        """Allow this enclave ATTRIBUTES.PROVISIONKEY, with the right to open ``/dev/sgx_provision``.

        Raises:
            PlatformError: ``tee.sgx.provision``: this process may not.
        """
        try:
            fd = self._sys.open(PROVISION_DEVICE, _O_RDWR)
            try:
                self._call(PROVISION, _Provision(fd))
            finally:
                self._sys.close(fd)
        except OSError as error:
            raise PlatformError(
                "the enclave asks for the provisioning key, which this process may not give",
                id="tee.sgx.provision",
                found=f"{PROVISION_DEVICE}: {error.strerror}",
                remedy="run it as root or as a member of the group sgx_prv, or build it without PROVISIONKEY",
            ) from None

    def init(self, sigstruct: bytes) -> None:
        """EINIT with a SIGSTRUCT of 1808 bytes; Linux sets the launch key to its signer.

        Raises:
            IntegrityError: ``tee.sgx.einit``: the processor refuses the SIGSTRUCT.
            PlatformError: attributes that are not allowed here, or enclave memory that was lost.
        """
        buffer = ctypes.create_string_buffer(sigstruct, len(sigstruct))
        for attempt in range(_ATTEMPTS):
            try:
                code = self._call(INIT, _Init(ctypes.addressof(buffer)))
            except OSError as error:
                # Interrupted before EINIT had an effect: the measurement is still open.
                if error.errno in (errno.EINTR, errno.EAGAIN) and attempt < _ATTEMPTS - 1:
                    continue
                raise _init_refused(error) from None
            if code:  # drivers before 5.11 handed the processor's code through
                raise _einit_refused(_status(code))
            return

    # --- EDMM: an initialised enclave on a processor with SGX2

    def restrict_permissions(self, offset: int, length: int, permissions: int) -> None:
        """EMODPR and ETRACK: take permissions away from regular pages; the enclave then has to EACCEPT.

        Args:
            permissions: SECINFO's R, W and X bits that stay.

        Raises:
            PlatformError: ``tee.sgx.edmm``.
        """
        self._edmm(RESTRICT_PERMISSIONS, offset, length, permissions=permissions)

    def modify_types(self, offset: int, length: int, page_type: int) -> None:
        """EMODT and ETRACK: make regular pages TCS (1) or any pages TRIM (4); the enclave then has to EACCEPT.

        Raises:
            PlatformError: ``tee.sgx.edmm``.
        """
        self._edmm(MODIFY_TYPES, offset, length, page_type=page_type)
        if page_type << 8 == PT_TCS:
            # The driver caps a TCS at RW and would refuse the next fault in a wider mapping.
            self.map(offset, length, PROT_READ | PROT_WRITE)

    def remove_pages(self, offset: int, length: int) -> None:
        """Give trimmed pages back, once the enclave has accepted their removal.

        Raises:
            PlatformError: ``tee.sgx.edmm``.
        """
        self._edmm(REMOVE_PAGES, offset, length)

    def offers_edmm(self) -> bool:
        """Whether kernel and processor have the EDMM calls: an empty range is refused as such, and nothing happens."""
        try:
            self._call(REMOVE_PAGES, _RemovePages(0, 0, 0))
        except OSError as error:
            return error.errno == errno.EINVAL
        return False

    def _edmm(self, call: Ioctl, offset: int, length: int, **what: int) -> None:
        done = idle = 0
        while done < length:
            argument = call.argument(offset=offset + done, length=length - done, **what)
            failure = OSError(errno.EAGAIN, "no page was changed, and no reason given")
            try:
                self._call(call, argument)
            except OSError as error:
                failure = error
                # A page that is being written back, or a signal: go on where it stopped.
                if error.errno not in (errno.EINTR, errno.EAGAIN, errno.EBUSY):
                    raise _edmm_refused(call, error, getattr(argument, "result", 0)) from None
            done += argument.count
            idle = 0 if argument.count else idle + 1
            if idle == _ATTEMPTS:
                raise _edmm_refused(call, failure, 0)
            if idle:
                time.sleep(_PAUSE)

    # --- the end

    def close(self) -> None:
        """Unmap and close: the driver removes every page. Idempotent."""
        if self.base:
            self._sys.munmap(self.base, self.size)
            self.base = 0
        if self._fd >= 0:
            self._sys.close(self._fd)
            self._fd = -1

    def _call(self, call: Ioctl, argument: ctypes.Structure) -> int:
        return self._sys.ioctl(self._fd, call.request, argument)

    def _refused(self, instruction: str, error: OSError) -> NoReturn:
        raise _build_refused(instruction, error) from None


def _status(code: int) -> str:
    try:
        return Status(code).name
    except ValueError:
        return f"code {code}"


def _open_refused(error: OSError) -> PlatformError:
    if error.errno in (errno.EACCES, errno.EPERM):
        remedy = "run as root, or join the device's group (sgx)"
    elif error.errno == errno.EAGAIN:
        remedy = "try again: the processor had no entropy to bring its SVN up to date (EUPDATESVN)"
    elif error.errno == errno.EIO:
        remedy = "reboot: the processor could not bring its SVN up to date after a microcode update (EUPDATESVN)"
    else:
        remedy = "inclavare sgx selftest tells what is missing"
    return PlatformError(f"{ENCLAVE_DEVICE} cannot be opened", id="tee.sgx.device", found=error.strerror, remedy=remedy)


def _build_refused(instruction: str, error: OSError) -> InclavareError:
    if error.errno == errno.ENOMEM:
        return ResourceError(
            "enclave memory (EPC) is used up",
            id="tee.epc.full",
            found=_epc_state(),
            remedy="stop an enclave, raise the cgroup's misc.max, or give enclaves more memory in the firmware (PRMRR)",
        )
    if error.errno == errno.EIO:
        return PlatformError(
            f"the processor refuses {instruction}", id="tee.sgx.lost", found=_LOST, remedy="start the enclave again"
        )
    reasons = {
        errno.EBUSY: (
            "a page is there already: two pages at one offset, or a call that the kernel repeated after it was stopped",
            "start the enclave again; if it happens again, correct the enclave's layout",
        ),
        errno.EINVAL: (
            "a page outside the enclave, or page permissions that are not allowed (W without R)",
            "correct the enclave's layout",
        ),
        errno.EACCES: (
            "the process's memory may not become executable",
            "check the security policy (SELinux: execmem)",
        ),
    }
    found, remedy = reasons.get(error.errno or 0, (error.strerror, "see the kernel's log"))
    return PlatformError(
        f"the driver refuses {instruction}", id="tee.sgx.driver", found=f"{found} ({error.strerror})", remedy=remedy
    )


def _epc_state() -> str:
    from .sysfs import epc_accounting

    accounting = epc_accounting()
    group = accounting.tightest if accounting else None
    if group is not None and group.limit is not None and group.limit - group.current < _PIECE:
        return f"cgroup {group.path}: {group.current} of {group.limit} bytes charged"
    return "no free page, and none that could be written back"


def _init_refused(error: OSError) -> InclavareError:
    if error.errno == errno.EPERM:
        return _einit_refused(error.strerror)
    if error.errno == errno.EACCES:
        return PlatformError(
            "the enclave has attributes that Linux does not allow",
            id="tee.sgx.attributes",
            found="PROVISIONKEY without /dev/sgx_provision, EINITTOKENKEY, or one that this kernel does not know",
            remedy="run it with the right to open /dev/sgx_provision, or build it without these attributes",
        )
    if error.errno == errno.EINVAL:
        return PlatformError(
            "the SIGSTRUCT asks for what this processor does not have",
            id="tee.sgx.sigstruct",
            found="a bit of ATTRIBUTES, XFRM or MISCSELECT, or a VENDOR other than 0 and 0x8086",
            remedy="sign the enclave with masks that leave the bit open, or use another machine",
        )
    return _build_refused("EINIT", error)


def _einit_refused(found: str | None) -> IntegrityError:
    return IntegrityError(
        "the processor refuses the enclave's SIGSTRUCT (EINIT)",
        id="tee.sgx.einit",
        found=found,
        expected="a signature over this enclave's MRENCLAVE, attributes and MISCSELECT",
        remedy="sign the enclave again",
    )


def _edmm_refused(call: Ioctl, error: OSError, result: int) -> PlatformError:
    reasons = {
        errno.ENOTTY: "the kernel lacks this call (Linux 6.0)",
        errno.ENODEV: "the processor lacks SGX2",
        errno.EINVAL: "a page of another type, or a range outside the enclave",
        errno.EPERM: "the enclave has not accepted the change (EACCEPT), or the page lacks the permissions for it",
    }
    found = _status(result) if result else reasons.get(error.errno or 0, error.strerror)
    return PlatformError(
        "the enclave's pages cannot be changed",
        id="tee.sgx.edmm",
        found=f"{call.name}: {found}",
        remedy="use a kernel 6.0 or newer and a processor with SGX2"
        if error.errno in (errno.ENOTTY, errno.ENODEV)
        else "correct what the enclave and its host do with the page",
    )
