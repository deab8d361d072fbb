"""The simulated processor: ECREATE, EADD, EEXTEND, EINIT, EREPORT, EGETKEY and EREMOVE on SECS and EPCM.

What an instruction checks is in :mod:`.processor.rules`, for this processor and for the one that executes code; here
its refusals become errors for people. Pages are kept as runs, so that an EPCM for a large heap of zero pages stays
small; contents go into the memory encryption engine as they are added.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_left
from dataclasses import dataclass, field
from enum import Enum

from ...errors import IntegrityError, PlatformError, ResourceError
from ...sgx import keys, report, sigstruct, structs
from ...sgx.image import PAGE_SIZE, PT_REG, SECINFO_R, SECINFO_W, SECINFO_X, EnclaveImage, PageRun
from ...sgx.measure import Measurement
from ...sgx.paging import SECINFO_PT, SECINFO_RWX
from ...sgx.structs import (
    ATTRIBUTE_EINITTOKENKEY,
    ATTRIBUTE_INIT,
    ATTRIBUTE_MODE64BIT,
    ATTRIBUTE_PROVISIONKEY,
    Attributes,
    KeyRequest,
    Report,
    ReportBody,
    Sigstruct,
    TargetInfo,
    Tcs,
)
from .memory import ZERO_PAGE, MemoryEncryption
from .processor import rules
from .processor.faults import GeneralProtection, LeafError

_WRONG_ATTRIBUTES = "ATTRIBUTES are not those of a 64-bit enclave to be initialised"
#: 32 GB.
EPC_PAGES = 8 << 20


class State(Enum):
    """The life of an enclave."""

    BUILDING = "building"
    INITIALISED = "initialised"
    REMOVED = "removed"


@dataclass(slots=True)
class Secs:
    """The processor's record of one enclave: SECS, and its part of the EPCM."""

    size: int
    ssa_frame_size: int
    attributes: Attributes
    miscselect: int
    measurement: Measurement
    state: State = State.BUILDING
    identity: keys.Identity | None = None
    runs: list[PageRun] = field(default_factory=list)
    #: EPC page number by offset, of the pages that hold something else than zeros.
    frames: dict[int, int] = field(default_factory=dict)

    @property
    def epc_pages(self) -> int:
        """Pages in use, the SECS included; 0 once removed."""
        return 0 if self.state is State.REMOVED else 1 + sum(run.count for run in self.runs)


class Processor:
    """One session of the simulated processor, with its own memory encryption engine.

    Args:
        roots: the platform's fuse keys and CPUSVN.
        epc_pages: pages of 4096 bytes that the engine can hold.
    """

    def __init__(self, roots: keys.RootKeys, *, epc_pages: int = EPC_PAGES) -> None:
        self._roots = roots
        self.memory = MemoryEncryption(epc_pages)
        self._unused = iter(range(epc_pages))
        self._free: list[int] = []
        self._frames = threading.Lock()
        self._report_key_id = os.urandom(32)

    def load(self, image: EnclaveImage, signature: bytes, *, architectural: bool = False) -> Secs:
        """ECREATE, then EADD and EEXTEND of every page, then EINIT."""
        secs = self.ecreate(
            image.size, image.ssa_frame_size, Attributes(image.attributes, image.xfrm), image.miscselect
        )
        try:
            for run in image.runs:
                self.eadd(secs, run)
            self.einit(secs, signature, architectural=architectural)
        except BaseException:
            self.eremove(secs)
            raise
        return secs

    def ecreate(self, size: int, ssa_frame_size: int, attributes: Attributes, miscselect: int) -> Secs:
        """ECREATE.

        Args:
            size: SECS.SIZE in bytes, a power of two of at least two pages.
            ssa_frame_size: pages.

        Raises:
            IntegrityError: ``sgx.ecreate.*``: the processor would fault.
        """
        # An image has no base address yet; zero is as good as any.
        secs = structs.Secs(size, 0, ssa_frame_size, miscselect, attributes=attributes.to_bytes())
        try:
            rules.check_secs(secs, rules.Features())
            if not attributes.flags & ATTRIBUTE_MODE64BIT:
                raise GeneralProtection("ecreate.attributes")
        except GeneralProtection as fault:
            what, found = {
                "ecreate.size": ("SECS.SIZE is not a power of two of at least two pages", size),
                "ecreate.ssaframesize": ("SECS.SSAFRAMESIZE is too small for XFRM and MISCSELECT", ssa_frame_size),
                "ecreate.attributes": (
                    "ATTRIBUTES are not those of a 64-bit enclave to be initialised",
                    f"{attributes.flags:#x}",
                ),
                "ecreate.xfrm": (
                    "XFRM lacks x87 or SSE, or names state that this processor has not",
                    f"{attributes.xfrm:#x}",
                ),
                "ecreate.miscselect": ("MISCSELECT has a reserved bit", f"{miscselect:#x}"),
            }[fault.rule]
            raise _refused(fault.rule, what, found) from None
        measurement = Measurement()
        measurement.ecreate(ssa_frame_size, size)
        return Secs(size, ssa_frame_size, attributes, miscselect, measurement)

    def eadd(self, secs: Secs, run: PageRun) -> None:
        """EADD of each page of the run, each followed, if the run is measured, by EEXTEND of its 16 chunks.

        Raises:
            IntegrityError: ``sgx.eadd.*``: the processor would fault.
        """
        if secs.state is not State.BUILDING:
            raise _refused("eadd.state", "pages cannot be added after EINIT", secs.state.value)
        if run.end > secs.size:
            raise _refused("eadd.range", "the page lies outside of the enclave", f"{run.end:#x}", f"<= {secs.size:#x}")
        _check_secinfo(run)
        at = bisect_left(secs.runs, run.offset, key=lambda other: other.offset)
        if (at < len(secs.runs) and secs.runs[at].offset < run.end) or (at and secs.runs[at - 1].end > run.offset):
            raise _refused("eadd.occupied", "there is a page already", f"{run.offset:#x}")
        secs.measurement.add(run)
        if run.data is not None:
            view = memoryview(run.data)
            for start in range(0, len(view), PAGE_SIZE):
                page = view[start : start + PAGE_SIZE]
                if page != ZERO_PAGE:
                    frame = secs.frames[run.offset + start] = self._frame()
                    self.memory.write(frame, page)
        # The contents live on as ciphertext only: the record of the run holds none.
        secs.runs.insert(at, PageRun(run.offset, run.flags, run.count, None, run.measured))

    def einit(self, secs: Secs, signature: bytes, *, architectural: bool = False) -> None:
        """EINIT.

        Args:
            signature: SIGSTRUCT, 1808 bytes.
            architectural: the platform's own enclaves may use the provisioning keys.

        Raises:
            IntegrityError: ``sgx.sigstruct.*`` or ``sgx.einit.*``, naming the field.
        """
        if secs.state is not State.BUILDING:
            raise _refused("einit.state", "the enclave is initialised already", secs.state.value)
        try:
            signed = rules.check_sigstruct(signature)
        except LeafError as error:
            if isinstance(error.__cause__, IntegrityError):
                raise error.__cause__ from None
            signed = Sigstruct.from_bytes(signature)
            if error.rule == "sigstruct.vendor":
                raise _refused(
                    "sigstruct.vendor", "SIGSTRUCT.VENDOR is unknown", f"{signed.vendor:#x}", "0 or 0x8086"
                ) from None
            raise _refused(error.rule, "the exponent is wrong", signed.exponent, sigstruct.RSA_EXPONENT) from None
        mrenclave = secs.measurement.digest()
        try:
            rules.check_family(secs.attributes, signed)
            rules.check_measurement(signed, mrenclave)
            rules.check_signed_attributes(secs.attributes, secs.miscselect, signed)
        except LeafError as error:
            raise _mismatch(error.rule, secs, mrenclave, signed) from None
        if secs.attributes.flags & (ATTRIBUTE_PROVISIONKEY | ATTRIBUTE_EINITTOKENKEY) and not architectural:
            raise _refused(
                "einit.provision",
                "only the platform's own enclaves may use the provisioning and launch keys",
                f"flags {secs.attributes.flags:#x}",
            )
        secs.identity = keys.Identity(
            mrenclave=mrenclave,
            mrsigner=sigstruct.mrsigner(signed.modulus),
            attributes=Attributes(secs.attributes.flags | ATTRIBUTE_INIT, secs.attributes.xfrm),
            isv_prod_id=signed.isv_prod_id,
            isv_svn=signed.isv_svn,
            miscselect=secs.miscselect,
            isv_family_id=signed.isv_family_id,
            isv_ext_prod_id=signed.isv_ext_prod_id,
        )
        secs.state = State.INITIALISED

    def ereport(self, secs: Secs, target: TargetInfo, report_data: bytes) -> Report:
        """EREPORT: ``report_data`` is 64 bytes."""
        return report.ereport(self._roots, identity(secs), target, report_data, self._report_key_id)

    def egetkey(self, secs: Secs, request: KeyRequest) -> bytes:
        """EGETKEY, 16 bytes."""
        return keys.egetkey(self._roots, identity(secs), request)

    def verify_report(self, secs: Secs, received: Report) -> ReportBody:
        """What code in the enclave does with a report that was directed at it.

        Raises:
            EvidenceError: the MAC does not verify.
        """
        return report.verify(self._roots, identity(secs), received)

    def read(self, secs: Secs, offset: int, length: int) -> bytes:
        """What code in the enclave reads at ``offset``.

        Raises:
            IntegrityError: a page that is not there or not readable, or that was changed from outside.
        """
        identity(secs)
        out = bytearray()
        while len(out) < length:
            at = offset + len(out)
            page = at - at % PAGE_SIZE
            if not any(run.offset <= page < run.end and run.flags & SECINFO_R for run in secs.runs):
                raise _refused("epcm.access", "no readable page", f"{at:#x}")
            frame = secs.frames.get(page)
            plain = ZERO_PAGE if frame is None else self.memory.read(frame)
            out += plain[at - page : at - page + length - len(out)]
        return bytes(out)

    def eremove(self, secs: Secs) -> None:
        """EREMOVE of every page and of the SECS. Idempotent."""
        secs.state = State.REMOVED
        secs.identity = None
        secs.runs.clear()
        frames, secs.frames = secs.frames, {}
        for frame in frames.values():
            # A locked engine forgets nothing, and reads nothing either.
            if not self.memory.locked:
                self.memory.discard(frame)
        self._free += frames.values()

    def _frame(self) -> int:
        """The number of a free EPC page."""
        with self._frames:
            if self._free:
                return self._free.pop()
            for frame in self._unused:
                return frame
        raise ResourceError(
            "the enclave page cache (EPC) is full",
            id="tee.epc.full",
            found=f"all of {self.memory.pages} pages used",
            remedy="stop an enclave",
        )

    @property
    def cpusvn(self) -> bytes:
        """16 bytes."""
        return self._roots.cpusvn


def identity(secs: Secs) -> keys.Identity:
    """Who the enclave is.

    Raises:
        PlatformError: it is not initialised, or no more.
    """
    if secs.identity is None:
        raise PlatformError(
            "the enclave is not running", id="tee.enclave.state", found=secs.state.value, expected="initialised"
        )
    return secs.identity


def _check_secinfo(run: PageRun) -> None:
    try:
        rules.check_secinfo_eadd(run.flags)
    except GeneralProtection:
        unreadable = run.flags & ~SECINFO_X == PT_REG | SECINFO_W
        what = "a page cannot be writable without being readable"
        raise _refused(
            "eadd.secinfo",
            what if unreadable else "SECINFO.FLAGS has a reserved bit or another page type",
            f"{run.flags:#x}",
        ) from None
    if run.flags & SECINFO_PT == PT_REG:
        return
    # EADD would take them away, and the measurement would be another than the image's.
    if run.flags & SECINFO_RWX:
        raise _refused("eadd.secinfo", "a TCS page has no permissions", f"{run.flags:#x}")
    for start in range(0, run.count * PAGE_SIZE, PAGE_SIZE):
        page = ZERO_PAGE if run.data is None else bytes(run.data[start : start + PAGE_SIZE])
        try:
            # Stricter than EADD, which looks at the limits of 32-bit enclaves only: a TCS of zeros is a mistake.
            rules.check_tcs(page, mode64=False, rule="eadd.tcs")
        except GeneralProtection:
            tcs = Tcs.from_bytes(page)
            what, found = "TCS.FLAGS has a reserved bit", f"{tcs.flags:#x}"
            if tcs.fslimit & tcs.gslimit & 0xFFF != 0xFFF:
                what = "TCS.FSLIMIT or GSLIMIT does not end in 0xfff"
                found = f"{tcs.fslimit:#x}, {tcs.gslimit:#x}"
            raise _refused("eadd.tcs", what, f"{found} at offset {run.offset + start:#x}") from None


def _mismatch(rule: str, secs: Secs, mrenclave: bytes, signed: Sigstruct) -> IntegrityError:
    """EINIT's refusal of an enclave that is not the one that its signer meant."""
    if rule == "einit.enclavehash":
        return _refused(
            rule,
            "the SIGSTRUCT was made for another enclave",
            mrenclave.hex(),
            signed.enclave_hash.hex(),
            "the image, its manifest or the runtime changed since it was signed: build or sign it again",
        )
    if rule == "einit.attributes":
        mask, wanted = Attributes.from_bytes(signed.attribute_mask), Attributes.from_bytes(signed.attributes)
        return _refused(
            rule,
            "the enclave's attributes are not those that its signer allows",
            f"flags {secs.attributes.flags:#x}, xfrm {secs.attributes.xfrm:#x}",
            f"flags {wanted.flags:#x} under mask {mask.flags:#x}, xfrm {wanted.xfrm:#x} under mask {mask.xfrm:#x}",
            "load the enclave as it was signed (debug, XFRM), or sign it again",
        )
    if rule == "einit.miscselect":
        return _refused(
            rule,
            "the enclave's MISCSELECT is not the one that its signer allows",
            f"{secs.miscselect:#x}",
            f"{signed.miscselect:#x} under mask {signed.misc_mask:#x}",
        )
    if rule == "einit.isvfamilyid":
        return _refused(rule, "ISVFAMILYID needs an enclave with KSS", signed.isv_family_id.hex(), bytes(16).hex())
    return _refused(rule, "the signer asks for CET, which this processor has not", signed.cet_attributes)


def _refused(
    event: str, what: str, found: object, expected: object = None, remedy: str | None = None
) -> IntegrityError:
    instruction = event.partition(".")[0].upper()
    return IntegrityError(
        f"{instruction} refused: {what}", id=f"sgx.{event}", found=found, expected=expected, remedy=remedy
    )
