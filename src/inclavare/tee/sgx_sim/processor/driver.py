"""What an operating system's SGX driver does: hand out EPC pages, build enclaves, page them out and back.

It is on the untrusted side: everything that it does goes through ENCLS, with operands in ordinary memory. Pages of the
EPC are mapped twice, for the driver in a window of its own and for the enclave where it belongs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ....errors import IntegrityError, ResourceError
from ....sgx import sigstruct as signatures
from ....sgx.codes import Encls, Status
from ....sgx.image import CHUNK, PAGE_SIZE, EnclaveImage, PageRun
from ....sgx.launch import EINITTOKEN_VALID
from ....sgx.paging import (
    PT_REG,
    PT_SECS,
    PT_TCS,
    PT_VA,
    SECINFO_PT,
    SECINFO_R,
    SECINFO_W,
    SECINFO_X,
    VA_SLOTS,
    PageInfo,
    Pcmd,
)
from ....sgx.structs import Attributes, SecInfo, Secs, Sigstruct
from .faults import Fault
from .logical import LogicalProcessor
from .processor import Processor
from .registers import Registers
from .space import AddressSpace, page_base

#: The driver's windows, in the kernel's half: all of the EPC, and buffers for operands.
EPC_WINDOW = 0xFFFF_8880_0000_0000
BUFFERS = 0xFFFF_C900_0000_0000
_PAGEINFO, _SECINFO, _PCMD = BUFFERS, BUFFERS + 64, BUFFERS + 128
_SOURCE, _TOKEN, _SIGSTRUCT = (BUFFERS + number * PAGE_SIZE for number in (1, 2, 3))
_BUFFER_PAGES = 4
_SLOT = 8
#: Leaves that leave RAX alone.
_WITHOUT_STATUS = (Encls.ECREATE, Encls.EADD, Encls.EEXTEND, Encls.EPA, Encls.EAUG)
#: The inter-processor interrupt that makes threads leave an enclave.
IPI_VECTOR = 0xFD


@dataclass(frozen=True, slots=True)
class Evicted:
    """A page outside of the EPC: 4096 bytes of ciphertext, 128 of PCMD, and where its version is (a linear address)."""

    contents: bytes
    pcmd: bytes
    slot: int


@dataclass(slots=True, eq=False)
class EnclavePage:
    """A page of an enclave, as the driver knows it.

    Attributes:
        enclave: whose it is.
        linear: where the enclave sees it.
        flags: SECINFO.FLAGS with which it was added; they bound its page-table permissions.
        epc_page: number of the EPC page; ``None`` while it is evicted.
        evicted: what was written out instead.
    """

    enclave: LoadedEnclave
    linear: int
    flags: int
    epc_page: int | None
    evicted: Evicted | None = None


@dataclass(slots=True, eq=False)
class LoadedEnclave:
    """An enclave that the driver has built.

    Attributes:
        secs_page: number of the EPC page with the SECS.
        base: SECS.BASEADDR.
        size: SECS.SIZE.
        pages: by linear address.
        tcs: linear addresses of the TCSs.
        va_pages: numbers of the EPC pages with its version arrays.
        slots: linear addresses of the version slots that are free.
    """

    secs_page: int
    base: int
    size: int
    pages: dict[int, EnclavePage] = field(default_factory=dict)
    tcs: list[int] = field(default_factory=list)
    va_pages: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)


class Driver:
    """The driver, on a logical processor of its own at privilege level 0.

    Args:
        processor: the package, whose whole EPC it manages.
        space: the address space that enclaves are mapped into.
    """

    def __init__(self, processor: Processor, space: AddressSpace) -> None:
        self.processor = processor
        self.space = space
        self.lp = LogicalProcessor(processor, space, cpl=0)
        self.enclaves: list[LoadedEnclave] = []
        self._free = list(reversed(range(processor.epc_pages)))
        #: Pages that can be evicted, the oldest first.
        self._resident: dict[EnclavePage, None] = {}
        space.map_ram(BUFFERS, _BUFFER_PAGES * PAGE_SIZE)
        for page in range(processor.epc_pages):
            space.map_epc(self.window(page), page, writable=True, executable=False)

    @staticmethod
    def window(epc_page: int) -> int:
        """Where the driver sees an EPC page."""
        return EPC_WINDOW + epc_page * PAGE_SIZE

    def encls(self, leaf: Encls, rbx: int = 0, rcx: int = 0, rdx: int = 0) -> Status:
        """Execute a leaf; its status (SGX_SUCCESS for leaves that have none).

        Raises:
            Fault: the processor's.
        """
        self.lp.registers = Registers(rax=leaf, rbx=rbx, rcx=rcx, rdx=rdx)
        self.lp.encls()
        return Status.SGX_SUCCESS if leaf in _WITHOUT_STATUS else Status(self.lp.registers.rax)

    def load(self, image: EnclaveImage, sigstruct: bytes, *, base: int, token: bytes = bytes(304)) -> LoadedEnclave:
        """Build, measure and initialise an enclave and map it.

        Args:
            image: its pages.
            sigstruct: 1808 bytes.
            base: its linear address, a multiple of its size.
            token: EINITTOKEN, 304 bytes. Without a valid one, IA32_SGXLEPUBKEYHASH is set to its signer (flexible
                launch control).

        Raises:
            IntegrityError: ``sgx.`` and the rule that the processor found violated. Nothing is left behind.
            ResourceError: the EPC is too small.
        """
        enclave = LoadedEnclave(self._allocate(), base, image.size)
        self.enclaves.append(enclave)
        try:
            self._ecreate(enclave, image)
            for run in image.runs:
                self._add_run(enclave, run)
            self._einit(enclave, sigstruct, token)
        except BaseException as error:
            self.remove(enclave)
            if isinstance(error, Fault):
                raise _refused(error.rule, str(error)) from error
            raise
        return enclave

    def remove(self, enclave: LoadedEnclave) -> None:
        """EREMOVE everything, after its threads were made to leave. Idempotent."""
        if enclave not in self.enclaves:
            return
        self.interrupt(enclave)
        for page in enclave.pages.values():
            self._resident.pop(page, None)
            self.space.unmap(page.linear)
            if page.epc_page is not None:
                self._eremove(page.epc_page)
        for va_page in enclave.va_pages:
            self._eremove(va_page)
        self._eremove(enclave.secs_page)
        self.enclaves.remove(enclave)

    def interrupt(self, enclave: LoadedEnclave) -> None:
        """Make every thread leave the enclave, as an inter-processor interrupt does."""
        for lp in self.processor.inside(enclave.secs_page):
            lp.aex(IPI_VECTOR)

    def evict(self, page: EnclavePage) -> None:
        """EBLOCK, ETRACK, interrupt, EWB: move a page out of the EPC.

        Raises:
            ValueError: it is out already.
        """
        if page.epc_page is None:
            raise ValueError(f"the page at {page.linear:#x} is evicted already")
        enclave, linear = page.enclave, self.window(page.epc_page)
        self._expect(self.encls(Encls.EBLOCK, rcx=linear))
        self.track(enclave)
        slot = enclave.slots.pop()
        self._pageinfo(srcpge=_SOURCE, secinfo=_PCMD)
        self._expect(self.encls(Encls.EWB, _PAGEINFO, linear, slot))
        contents, pcmd = self.space.peek(_SOURCE, PAGE_SIZE), self.space.peek(_PCMD, Pcmd.LAYOUT.size)
        page.evicted = Evicted(contents, pcmd, slot)
        self.space.unmap(page.linear)
        self._free.append(page.epc_page)
        page.epc_page = None
        self._resident.pop(page)

    def reload(self, page: EnclavePage) -> None:
        """ELDU: bring an evicted page back and map it.

        Raises:
            ValueError: it is not evicted.
            IntegrityError: ``sgx.eldu.mac``: what was kept outside was changed or replayed.
            ResourceError: the EPC is full.
        """
        if page.evicted is None:
            raise ValueError(f"the page at {page.linear:#x} is not evicted")
        out = page.evicted
        epc_page = self._allocate()
        self.space.poke(_SOURCE, out.contents)
        self.space.poke(_PCMD, out.pcmd)
        self._pageinfo(linaddr=page.linear, srcpge=_SOURCE, secinfo=_PCMD, secs=self.window(page.enclave.secs_page))
        try:
            self._expect(self.encls(Encls.ELDU, _PAGEINFO, self.window(epc_page), out.slot), "eldu.mac")
        except IntegrityError:
            self._free.append(epc_page)
            raise
        page.enclave.slots.append(out.slot)
        page.evicted = None
        self._settle(page, epc_page)

    def handle_fault(self, address: int) -> bool:
        """What the page-fault handler does: reload the evicted page at ``address``, if there is one."""
        for enclave in self.enclaves:
            page = enclave.pages.get(page_base(address))
            if page is not None and page.evicted is not None:
                self.reload(page)
                return True
        return False

    def track(self, enclave: LoadedEnclave) -> None:
        """ETRACK, and make those leave who were inside before it."""
        secs = self.window(enclave.secs_page)
        if self.encls(Encls.ETRACK, rcx=secs) is Status.SGX_PREV_TRK_INCMPL:
            self.interrupt(enclave)
            self._expect(self.encls(Encls.ETRACK, rcx=secs))
        self.interrupt(enclave)

    def augment(self, enclave: LoadedEnclave, linear: int) -> EnclavePage:
        """EAUG: give an initialised enclave a pending page at ``linear``.

        Raises:
            Fault: the processor's.
            ResourceError: the EPC is full.
        """
        self._grow(enclave, 1)
        epc_page = self._allocate()
        self._pageinfo(linaddr=linear, secs=self.window(enclave.secs_page))
        try:
            self.encls(Encls.EAUG, _PAGEINFO, self.window(epc_page))
        except Fault:
            self._free.append(epc_page)
            raise
        page = EnclavePage(enclave, linear, PT_REG | SECINFO_R | SECINFO_W | SECINFO_X, None)
        enclave.pages[linear] = page
        self._settle(page, epc_page)
        return page

    def restrict(self, page: EnclavePage, permissions: int) -> Status:
        """EMODPR to SECINFO permissions, and ETRACK; the enclave has to EACCEPT."""
        return self._modify(page, Encls.EMODPR, permissions)

    def change_type(self, page: EnclavePage, kind: int) -> Status:
        """EMODT to PT_TCS or PT_TRIM, and ETRACK; the enclave has to EACCEPT."""
        return self._modify(page, Encls.EMODT, kind)

    def remove_page(self, page: EnclavePage) -> Status:
        """EREMOVE one page, which the enclave has accepted as trimmed if threads are inside.

        Raises:
            ValueError: it is evicted.
        """
        if page.epc_page is None:
            raise ValueError(f"the page at {page.linear:#x} is evicted")
        status = self.encls(Encls.EREMOVE, rcx=self.window(page.epc_page))
        if status is Status.SGX_SUCCESS:
            self._resident.pop(page)
            self.space.unmap(page.linear)
            self._free.append(page.epc_page)
            del page.enclave.pages[page.linear]
        return status

    def _modify(self, page: EnclavePage, leaf: Encls, flags: int) -> Status:
        if page.epc_page is None:
            self.reload(page)
        assert page.epc_page is not None
        self.space.poke(_SECINFO, SecInfo(flags).to_bytes())
        status = self.encls(leaf, _SECINFO, self.window(page.epc_page))
        if status is Status.SGX_SUCCESS:
            self.track(page.enclave)
        return status

    def _ecreate(self, enclave: LoadedEnclave, image: EnclaveImage) -> None:
        secs = Secs(
            size=image.size,
            base=enclave.base,
            ssa_frame_size=image.ssa_frame_size,
            miscselect=image.miscselect,
            attributes=Attributes(image.attributes, image.xfrm).to_bytes(),
        )
        self.space.poke(_SOURCE, secs.to_bytes())
        self.space.poke(_SECINFO, SecInfo(PT_SECS).to_bytes())
        self._pageinfo(srcpge=_SOURCE, secinfo=_SECINFO)
        self.encls(Encls.ECREATE, _PAGEINFO, self.window(enclave.secs_page))

    def _add_run(self, enclave: LoadedEnclave, run: PageRun) -> None:
        self._grow(enclave, run.count)
        zeros = bytes(PAGE_SIZE)
        for number in range(run.count):
            start = number * PAGE_SIZE
            data = zeros if run.data is None else bytes(run.data[start : start + PAGE_SIZE])
            self._add_page(enclave, run.offset + start, run.flags, data, run.chunks if run.measured else 0)

    def _add_page(self, enclave: LoadedEnclave, offset: int, flags: int, data: bytes, chunks: int) -> None:
        linear, secs = enclave.base + offset, self.window(enclave.secs_page)
        if linear in enclave.pages:
            # The processor would not mind: only one of the two can be mapped.
            raise _refused("eadd.occupied", f"there is a page already at offset {offset:#x}")
        epc_page = self._allocate()
        self.space.poke(_SOURCE, data)
        self.space.poke(_SECINFO, SecInfo(flags).to_bytes())
        self._pageinfo(linaddr=linear, srcpge=_SOURCE, secinfo=_SECINFO, secs=secs)
        try:
            self.encls(Encls.EADD, _PAGEINFO, self.window(epc_page))
        except Fault:
            self._free.append(epc_page)
            raise
        page = EnclavePage(enclave, linear, flags, None)
        enclave.pages[linear] = page
        if flags & SECINFO_PT == PT_TCS:
            enclave.tcs.append(linear)
        self._settle(page, epc_page)
        for number in range(PAGE_SIZE // CHUNK):
            if chunks >> number & 1:
                self.encls(Encls.EEXTEND, secs, self.window(epc_page) + number * CHUNK)

    def _einit(self, enclave: LoadedEnclave, sigstruct: bytes, token: bytes) -> None:
        self.space.poke(_SIGSTRUCT, sigstruct.ljust(PAGE_SIZE, b"\0"))
        self.space.poke(_TOKEN, token)
        if not token[0] & EINITTOKEN_VALID:
            modulus = Sigstruct.LAYOUT.offsets["modulus"]
            signer = sigstruct[modulus : modulus + signatures.RSA_SIZE].ljust(signatures.RSA_SIZE, b"\0")
            self.processor.le_pubkey_hash = signatures.mrsigner(signer)
        status = self.encls(Encls.EINIT, _SIGSTRUCT, self.window(enclave.secs_page), _TOKEN)
        if status is not Status.SGX_SUCCESS:
            raise _refused(self.lp.rule, status.name)

    def _grow(self, enclave: LoadedEnclave, count: int) -> None:
        """A version slot for every page, so that each can be evicted when the EPC is full."""
        while len(enclave.va_pages) * VA_SLOTS < len(enclave.pages) + count:
            va_page = self._allocate()
            self.encls(Encls.EPA, PT_VA >> 8, self.window(va_page))
            enclave.va_pages.append(va_page)
            enclave.slots.extend(self.window(va_page) + slot * _SLOT for slot in range(VA_SLOTS))

    def _settle(self, page: EnclavePage, epc_page: int) -> None:
        """Map a page that is in the EPC now."""
        page.epc_page = epc_page
        self._resident[page] = None
        writable = bool(page.flags & SECINFO_W) or page.flags & SECINFO_PT == PT_TCS
        self.space.map_epc(page.linear, epc_page, writable=writable, executable=bool(page.flags & SECINFO_X))

    def _allocate(self) -> int:
        """A free EPC page, if need be that of the page that has been there longest."""
        if not self._free:
            victim = next(iter(self._resident), None)
            if victim is None:
                raise ResourceError(
                    "the EPC is too small for this enclave",
                    id="tee.epc.full",
                    found=f"{self.processor.epc_pages} pages",
                    remedy="give the processor a larger EPC",
                )
            self.evict(victim)
        return self._free.pop()

    def _eremove(self, epc_page: int) -> None:
        self._expect(self.encls(Encls.EREMOVE, rcx=self.window(epc_page)))
        self._free.append(epc_page)

    def _pageinfo(self, *, linaddr: int = 0, srcpge: int = 0, secinfo: int = 0, secs: int = 0) -> None:
        self.space.poke(_PAGEINFO, PageInfo(linaddr, srcpge, secinfo, secs).to_bytes())

    @staticmethod
    def _expect(status: Status, rule: str = "driver.status") -> None:
        if status is not Status.SGX_SUCCESS:
            raise _refused(rule, status.name)


def _refused(rule: str, found: str) -> IntegrityError:
    instruction = rule.partition(".")[0].upper()
    return IntegrityError(f"{instruction} refused: {rule}", id=f"sgx.{rule}", found=found)
