"""A logical processor: its registers, enclave mode, and the access control of its memory accesses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ....sgx.codes import Enclu, Status
from ....sgx.image import PAGE_SIZE
from . import leaves
from .access import check_direct_access
from .aex import asynchronous_exit
from .events import Event, Kind
from .faults import PF_FETCH, PF_PRESENT, PF_SGX, PF_USER, PF_WRITE, Fault, GeneralProtection, LeafError, PageFault
from .processor import Processor
from .registers import RFLAGS_CF, RFLAGS_ZF, Registers
from .secs import EnclaveSecs
from .space import AddressSpace, Mapping, is_canonical, page_base

AccessKind = Literal["r", "w", "x"]

#: Length of ENCLS and ENCLU (0F 01 CF and 0F 01 D7).
INSTRUCTION_LENGTH = 3
_ABORT_BYTE = b"\xff"
_KINDS = {Enclu.EENTER: Kind.ENTRY, Enclu.EEXIT: Kind.EXIT, Enclu.ERESUME: Kind.RESUME, Enclu.EGETKEY: Kind.KEY}


@dataclass(frozen=True, slots=True)
class Translation:
    """Where an access goes: ordinary memory, an EPC page of the active enclave, or the abort page (neither).

    Attributes:
        ram: 4096 bytes of ordinary memory.
        epc_page: number of the EPC page.
        mapping: the page-table entry that led there.
    """

    ram: bytearray | None
    epc_page: int | None
    mapping: Mapping

    @property
    def abort(self) -> bool:
        """Reads return ones, writes are dropped."""
        return self.ram is None and self.epc_page is None


@dataclass(slots=True)
class Active:
    """The internal control registers (CR_…) of a logical processor in enclave mode (SDM vol. 3D, 40.1.3).

    Attributes:
        secs_page: CR_ACTIVE_SECS, number of an EPC page; ``secs`` is its contents at entry.
        tcs_page: CR_TCS_PA, likewise.
        tcs_linear: CR_TCS_LA.
        epoch: the enclave's tracking epoch at entry.
        gprsgx: CR_GPR_PA: EPC page and offset in it.
        xsave_pages: CR_XSAVE_PAGE_n.
        dbgoptin: CR_DBGOPTIN.
        saved_fs_base: CR_SAVE_FS; ``saved_gs_base``, ``saved_xcr0`` and ``saved_tf`` likewise.
    """

    secs_page: int
    secs: EnclaveSecs
    tcs_page: int
    tcs_linear: int
    epoch: int
    gprsgx: tuple[int, int]
    xsave_pages: tuple[int, ...]
    dbgoptin: bool
    saved_fs_base: int
    saved_gs_base: int
    saved_xcr0: int
    saved_tf: int


class LogicalProcessor:
    """One hardware thread, in 64-bit mode.

    Args:
        processor: the package.
        space: the page tables that CR3 points at.

    Attributes:
        registers: set them, then call :meth:`encls` or :meth:`enclu`.
        cpl: current privilege level: 0 for ENCLS, 3 for ENCLU.
        active: set while in enclave mode (CR_ENCLAVE_MODE).
        cr2: linear address of the last page fault that was delivered.
        cr4_osfxsr: CR4.OSFXSR; ``cr4_osxsave`` likewise.
        xcr0: XCR0.
        rule: the rule that ended the last leaf without a fault, but with a code in RAX; empty for success.
    """

    def __init__(self, processor: Processor, space: AddressSpace, *, cpl: int = 3) -> None:
        self.processor = processor
        self.space = space
        self.registers = Registers()
        self.cpl = cpl
        self.active: Active | None = None
        self.cr2 = 0
        self.cr4_osfxsr = True
        self.cr4_osxsave = True
        self.xcr0 = processor.features.xfrm
        self.rule = ""
        self.number = len(processor.logical)
        self._tlb: dict[tuple[int, AccessKind], Translation] = {}
        processor.logical.append(self)

    @property
    def enclave_mode(self) -> bool:
        """CR_ENCLAVE_MODE."""
        return self.active is not None

    @property
    def elrange(self) -> range:
        """CR_ELRANGE; empty outside of enclave mode."""
        return range(0) if self.active is None else self.active.secs.elrange

    def encls(self) -> None:
        """Execute ENCLS: the leaf in EAX, with operands in RBX, RCX and RDX.

        Raises:
            Fault: registers and memory are as before.
        """
        self._execute(leaves.encls_leaf, leaves.ENCLS)

    def enclu(self) -> None:
        """Execute ENCLU: the leaf in EAX, with operands in RBX, RCX and RDX.

        RIP is where the instruction stands; it is moved behind it, or where the leaf goes on.

        Raises:
            Fault: registers and memory are as before; whoever delivers it in enclave mode calls :meth:`aex`.
        """
        self._execute(leaves.enclu_leaf, leaves.ENCLU)

    def aex(self, vector: int, error_code: int = 0, address: int | None = None) -> None:
        """Asynchronous enclave exit, because of an exception or interrupt.

        The state is saved in the SSA frame and replaced by synthetic state; execution goes on at the AEP.

        Raises:
            ValueError: not in enclave mode.
        """
        if self.active is None:
            raise ValueError("an asynchronous exit needs enclave mode")
        with self.processor.mutex:
            active, rip = self.active, self.registers.rip
            asynchronous_exit(self, vector, error_code, address)
        self.processor.notify(
            Event(
                Kind.AEX,
                self.number,
                "AEX",
                rip,
                enclave=active.secs.eid,
                tcs=active.tcs_linear,
                vector=vector,
                error_code=error_code,
                address=address,
            )
        )

    def flush(self) -> None:
        """Drop cached translations (Flush_linear_context)."""
        self._tlb.clear()

    def translate(self, linear: int, access: AccessKind) -> Translation:
        """Where an access of the current mode goes (SDM vol. 3D, 38.3 and 38.5).

        Args:
            access: read, write or instruction fetch.

        Raises:
            GeneralProtection: the address is not canonical, or code in an enclave fetches outside of it.
            PageFault: the page tables do not allow it, or (with the SGX bit) the EPCM.
        """
        if not is_canonical(linear):
            raise GeneralProtection("access.canonical")
        within = linear in self.elrange
        if self.active is not None and not within and access == "x":
            raise GeneralProtection("access.fetch-outside-elrange")
        key = (page_base(linear), access)
        cached = self._tlb.get(key)
        if cached is not None and cached.mapping is self.space.lookup(linear):
            return cached
        mapping = self.walk(linear, access)
        if self.active is None or not within:
            # An EPC page that is not the enclave's own is never reached: the abort page stands in its place.
            return Translation(mapping.ram, None, mapping)
        if mapping.epc_page is None:
            raise self.epcm_fault("access.elrange-not-epc", linear, access)
        check_direct_access(self, mapping.epc_page, linear, access)
        found = self._tlb[key] = Translation(None, mapping.epc_page, mapping)
        return found

    def walk(self, linear: int, access: AccessKind) -> Mapping:
        """What the page tables say, and nothing else.

        Raises:
            PageFault: nothing is mapped, or not so.
        """
        mapping = self.space.lookup(linear)
        if mapping is None:
            raise PageFault("paging.present", error_code=self._pf_code(access), address=linear)
        if access == "w" and not mapping.writable:
            raise PageFault("paging.writable", error_code=self._pf_code(access) | PF_PRESENT, address=linear)
        if access == "x" and not mapping.executable:
            raise PageFault("paging.executable", error_code=self._pf_code(access) | PF_PRESENT, address=linear)
        return mapping

    def epcm_fault(self, rule: str, linear: int, access: AccessKind) -> PageFault:
        """#PF with the SGX bit."""
        return PageFault(rule, error_code=self._pf_code(access) | PF_PRESENT | PF_SGX, address=linear)

    def read(self, linear: int, size: int, access: AccessKind = "r") -> bytes:
        """Read ``size`` bytes as code of the current mode does.

        Raises:
            Fault: see :meth:`translate`.
            IntegrityError: the EPC was changed from outside.
        """
        out = bytearray()
        while len(out) < size:
            at = linear + len(out)
            start = at % PAGE_SIZE
            part = min(PAGE_SIZE - start, size - len(out))
            found = self.translate(at, access)
            if found.ram is not None:
                out += found.ram[start : start + part]
            elif found.epc_page is not None:
                out += self.processor.read_epc(found.epc_page, start, part)
            else:
                out += _ABORT_BYTE * part
        return bytes(out)

    def write(self, linear: int, data: bytes) -> None:
        """Write as code of the current mode does; nothing is written if a part cannot be.

        Raises:
            Fault: see :meth:`translate`.
            IntegrityError: the EPC was changed from outside.
        """
        parts = []
        done = 0
        while done < len(data):
            start = (linear + done) % PAGE_SIZE
            piece = data[done : done + PAGE_SIZE - start]
            parts.append((self.translate(linear + done, "w"), start, piece))
            done += len(piece)
        for found, start, piece in parts:
            if found.ram is not None:
                found.ram[start : start + len(piece)] = piece
            elif found.epc_page is not None:
                self.processor.write_epc(found.epc_page, piece, start)

    def _pf_code(self, access: AccessKind) -> int:
        code = PF_USER if self.cpl == 3 else 0
        return code | {"r": 0, "w": PF_WRITE, "x": PF_FETCH}[access]

    def _execute(self, check: leaves.Check, table: leaves.Table) -> None:
        with self.processor.mutex:
            registers = self.registers
            rip, operands = registers.rip, (registers.rbx, registers.rcx, registers.rdx)
            before = self.active
            name = ""
            try:
                number = check(self)
                name = number.name
                # The leaf sees the address of the next instruction, and may set another.
                registers.rip = (rip + INSTRUCTION_LENGTH) % (1 << 64)
                status, self.rule = self._run(table[number])
            except Fault as fault:
                registers.rip = rip
                self._tell(Kind.FAULT, name, rip, operands, before, fault=fault)
                raise
            kind = _KINDS.get(number) if isinstance(number, Enclu) else None
            default = Kind.ENCLU if isinstance(number, Enclu) else Kind.ENCLS
            self._tell(kind or default, name, rip, operands, before, status=status, rule=self.rule)

    def _run(self, leaf: leaves.Leaf) -> tuple[Status | None, str]:
        try:
            status = leaf(self)
        except LeafError as error:
            self.registers.rax = error.status
            self.registers.set_status(RFLAGS_CF if error.carry else RFLAGS_ZF)
            return error.status, error.rule
        if status is not None:
            self.registers.rax = status
            self.registers.set_status(0)
        return status, ""

    def _tell(
        self,
        kind: Kind,
        name: str,
        rip: int,
        operands: tuple[int, int, int],
        before: Active | None,
        *,
        status: Status | None = None,
        rule: str = "",
        fault: Fault | None = None,
    ) -> None:
        active = self.active or before
        self.processor.notify(
            Event(
                kind,
                self.number,
                name,
                rip,
                operands,
                status=status,
                rule=fault.rule if fault else rule,
                fault=fault,
                enclave=None if active is None else active.secs.eid,
                tcs=None if active is None else active.tcs_linear,
            )
        )
