"""Unicorn as the execution unit of a :class:`LogicalProcessor`: it runs instructions until SGX has something to say.

Unicorn's TLB is filled by :meth:`LogicalProcessor.translate`, so every page that code touches passes SGX's access
control, once for each kind of access, and again after each entry and exit. What lies behind is:

- ordinary memory: the address space's own bytes,
- a page of the enclave: its plaintext in a cache that exists only while the enclave runs; a page that was written goes
  back through the memory encryption engine before anything else can look,
- the abort page: reads are ones, writes are dropped.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from dataclasses import dataclass
from enum import Enum
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ....errors import PlatformError
from ....sgx.image import PAGE_SIZE
from ....sgx.ssa import XSAVE_LEGACY_SIZE
from ..processor.faults import Fault, GeneralProtection, InvalidOpcode
from ..processor.registers import GENERAL, RFLAGS_IF, RFLAGS_IOPL
from .instructions import Action, Instruction, classify

if TYPE_CHECKING:
    from ..processor.logical import AccessKind, LogicalProcessor

ENCLU = bytes.fromhex("0f01d7")
ENCLS = bytes.fromhex("0f01cf")

#: Where the parts of memory lie in unicorn's physical address space.
_EPC = 1 << 36
_RAM = 1 << 37
_ABORT = 1 << 38
_SCRATCH = 1 << 39
#: Linear address of the two scratch pages, one of code and one of data, while the engine itself uses them.
_SCRATCH_LINEAR = 0xFFFF_FFFF_FFFF_0000
_AREA = PAGE_SIZE
#: fxsave64 [rip + ...] and fxrstor64 [rip + ...], at the start of the first page and 64 bytes on.
_FXSAVE = bytes.fromhex("480fae05") + (_AREA - 8).to_bytes(4, "little")
_FXRSTOR = bytes.fromhex("480fae0d") + (_AREA - 0x48).to_bytes(4, "little")
#: FXSAVE's bytes that are state: not MXCSR_MASK and not the reserved end.
_FX_PARTS = (slice(0, 28), slice(32, 416))
#: Bits of RFLAGS that code at CPL 3 cannot change.
_RFLAGS_SYSTEM = RFLAGS_IF | RFLAGS_IOPL
_ZERO_PAGE = bytes(PAGE_SIZE)


class DivideError(Fault):
    """#DE."""

    vector = 0
    mnemonic = "#DE"


class DebugException(Fault):
    """#DB."""

    vector = 1
    mnemonic = "#DB"


class Breakpoint(Fault):
    """#BP: INT3."""

    vector = 3
    mnemonic = "#BP"


class FloatingPointError(Fault):
    """#MF."""

    vector = 16
    mnemonic = "#MF"


class SimdException(Fault):
    """#XM."""

    vector = 19
    mnemonic = "#XM"


_EXCEPTIONS: dict[int, type[Fault]] = {
    one.vector: one
    for one in (
        DivideError,
        DebugException,
        Breakpoint,
        InvalidOpcode,
        GeneralProtection,
        FloatingPointError,
        SimdException,
    )
}


class Ended(Enum):
    """Why the engine stopped."""

    LIMIT = "as many instructions as allowed"
    LEAF = "at an ENCLU"
    FAULT = "an exception"
    SYSTEM_CALL = "behind a system call"
    REACHED = "at the address to stop at"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How far the engine came.

    Attributes:
        ended: why it stopped.
        instructions: how many were executed; an iteration of a repeated string instruction counts as one.
        fault: the exception.
    """

    ended: Ended
    instructions: int
    fault: Fault | None = None


class Engine:
    """One unicorn instance, for one logical processor.

    Attributes:
        first: the instruction with which the last :meth:`run` began.

    Raises:
        PlatformError: ``tee.emulator.missing``: unicorn or capstone is not installed.
    """

    def __init__(self, logical: LogicalProcessor) -> None:
        try:
            capstone, unicorn, x86 = _modules()
        except ImportError as error:
            raise PlatformError(
                "executing enclave code needs the emulator",
                id="tee.emulator.missing",
                found=f"no module {error.name}",
                expected="unicorn and capstone",
                remedy="pip install 'inclavare[emulator]'",
            ) from None
        self._lp = logical
        self._error = unicorn.UcError
        self._invalid = unicorn.UC_ERR_INSN_INVALID
        self._uc: Any = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
        self._disassembler = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
        self._kinds: dict[int, AccessKind] = {
            unicorn.UC_MEM_READ: "r",
            unicorn.UC_MEM_WRITE: "w",
            unicorn.UC_MEM_FETCH: "x",
        }
        self._permission = {"r": unicorn.UC_PROT_READ, "w": unicorn.UC_PROT_WRITE, "x": unicorn.UC_PROT_EXEC}
        self._flush_tlb = (unicorn.UC_CTL_TLB_FLUSH, unicorn.UC_CTL_IO_WRITE)
        self._names = (*GENERAL, "rip", "rflags", "fs_base", "gs_base")
        self._ids = [
            getattr(x86, f"UC_X86_REG_{'EFLAGS' if name == 'rflags' else name.upper()}") for name in self._names
        ]
        self._rip = x86.UC_X86_REG_RIP

        self._ram: dict[int, tuple[int, object, bytearray]] = {}
        self._present: set[int] = set()
        self._dirty: set[int] = set()
        self._granted: dict[int, set[AccessKind]] = {}
        self._code: dict[int, int] = {}
        self._digests: dict[int, bytes] = {}
        self._blocks: dict[tuple[int, int, int], tuple[Instruction, ...]] = {}
        self._xsave: bytes | None = None
        self._scratch = False
        self._planned = False
        self._until: int | None = None
        self.first: Instruction | None = None
        self._reset()
        self._set_up(unicorn)

    def _set_up(self, unicorn: Any) -> None:
        uc = self._uc
        uc.ctl_set_tlb_mode(unicorn.UC_TLB_VIRTUAL)
        # No address ends a run: an exit would have to be mapped.
        uc.ctl_exits_enabled(True)
        uc.ctl_set_exits([])
        uc.mem_map(_EPC, self._lp.processor.epc_pages * PAGE_SIZE)
        uc.mem_map(_SCRATCH, 2 * PAGE_SIZE)
        uc.mem_write(_SCRATCH, _FXSAVE.ljust(0x40, b"\x90") + _FXRSTOR)
        uc.mmio_map(
            _ABORT,
            PAGE_SIZE,
            lambda _uc, _offset, size, _data: (1 << 8 * size) - 1,
            None,
            lambda *_arguments: None,
            None,
        )
        uc.hook_add(unicorn.UC_HOOK_TLB_FILL, self._fill)
        uc.hook_add(unicorn.UC_HOOK_BLOCK, self._block)
        uc.hook_add(unicorn.UC_HOOK_INTR, self._interrupt)
        uc.hook_add(unicorn.UC_HOOK_INSN_INVALID, lambda _uc, _data: False)

    def _reset(self) -> None:
        """Forget what the last stretch of instructions led to."""
        self._fault: Fault | None = None
        self._failure: BaseException | None = None
        self._trap: Instruction | None = None
        self._split = 0
        self._restart = False
        self._at_until = False
        self._stopped = False
        self._before = 0
        self._current: tuple[Instruction, ...] = ()
        #: Address of the current block, if it need not be looked at when it runs once more: string instructions.
        self._again: int | None = None

    # --- running -----------------------------------------------------------------------------------------------

    def run(self, limit: int, *, until: int | None = None) -> Outcome:
        """Execute instructions from RIP on, in the logical processor's mode.

        Registers are the logical processor's before and after; memory is written back.

        Args:
            limit: how many instructions, at least one.
            until: a linear address at which code outside of enclaves ends.

        Raises:
            IntegrityError: the EPC was changed from outside.
            PlatformError: ``tee.emulator.unsupported``: an instruction or exception that is not emulated.
        """
        self._until = None if self._lp.enclave_mode else until
        self.first = None
        self._load()
        try:
            outcome = self._run(limit)
        except BaseException:
            self._clear()
            raise
        self._store()
        self._write_back()
        return outcome

    def _run(self, limit: int) -> Outcome:
        done, plan = 0, 0
        rip = self._lp.registers.rip
        while done < limit:
            self._reset()
            self._planned = bool(plan)
            allowed = min(limit - done, plan or limit)
            plan = 0
            failed: Any = None
            try:
                self._uc.emu_start(rip, 0, count=allowed)
            except self._error as error:
                failed = error
            rip = self._uc.reg_read(self._rip)
            if self._failure is not None:
                raise self._failure
            done += self._counted(rip) if failed is not None or self._stopped else allowed
            if self._restart:
                self._uc.ctl_flush_tb()
                self._blocks.clear()
            elif self._at_until:
                return Outcome(Ended.REACHED, done)
            elif self._fault is not None:
                return Outcome(Ended.FAULT, done, self._fault)
            elif self._split:
                plan = self._split
            elif self._trap is not None:
                ended = self._instead(self._trap)
                if ended is not None:
                    return Outcome(ended, done, self._fault)
                done += 1
                rip = self._uc.reg_read(self._rip)
            elif failed is not None:
                if failed.errno != self._invalid:
                    raise PlatformError(
                        "the emulator stopped unexpectedly", id="tee.emulator.failed", found=f"{failed} at {rip:#x}"
                    )
                if self._bytes(rip, 3) == ENCLU:
                    return Outcome(Ended.LEAF, done)
                rule = "encls.cpl" if self._bytes(rip, 3) == ENCLS else "opcode"
                return Outcome(Ended.FAULT, done, InvalidOpcode(rule))
        return Outcome(Ended.LIMIT, done)

    def _counted(self, rip: int) -> int:
        """Instructions executed when a stretch ended early at ``rip``."""
        for index, one in enumerate(self._current):
            if one.address == rip:
                return self._before + index
        return self._before + len(self._current)

    def _instead(self, one: Instruction) -> Ended | None:
        """Do what happens instead of an instruction; ``None`` if execution goes on behind it."""
        action = one.action if self._lp.enclave_mode else one.outside
        if action is Action.ILLEGAL:
            self._fault = InvalidOpcode("illegal-in-enclave")
        elif action is Action.PRIVILEGED:
            self._fault = GeneralProtection("privileged")
        elif action is Action.BREAKPOINT:
            self._fault = Breakpoint("int3")
        elif action is Action.SYSTEM_CALL:
            self._uc.reg_write(self._rip, one.address + one.size)
            return Ended.SYSTEM_CALL
        elif action is Action.RANDOM:
            self._random(one)
        elif action is Action.XGETBV:
            self._xgetbv()
        else:
            raise PlatformError(
                "an instruction of the code outside of the enclave is not emulated",
                id="tee.emulator.unsupported",
                found=f"{one} at {one.address:#x}",
            )
        if self._fault is not None:
            return Ended.FAULT
        self._uc.reg_write(self._rip, one.address + one.size)
        return None

    def _random(self, one: Instruction) -> None:
        """RDRAND and RDSEED. Unicorn's own come from rand()."""
        x86 = _modules()[2]
        name = one.operands.strip()
        size, register = _register(name)
        value = int.from_bytes(os.urandom(size), "little")
        full = getattr(x86, f"UC_X86_REG_{register.upper()}")
        if size == 2:
            value |= self._uc.reg_read(full) & ~0xFFFF
        self._uc.reg_write(full, value)
        flags = self._uc.reg_read(x86.UC_X86_REG_EFLAGS) & ~0x8D5 | 1
        self._uc.reg_write(x86.UC_X86_REG_EFLAGS, flags)

    def _xgetbv(self) -> None:
        x86 = _modules()[2]
        if self._uc.reg_read(x86.UC_X86_REG_ECX):
            self._fault = GeneralProtection("xgetbv")
            return
        self._uc.reg_write(x86.UC_X86_REG_RAX, self._lp.xcr0 & 0xFFFF_FFFF)
        self._uc.reg_write(x86.UC_X86_REG_RDX, self._lp.xcr0 >> 32)

    # --- what unicorn calls ------------------------------------------------------------------------------------

    def _fill(self, _uc: Any, linear: int, access: int, entry: Any, _data: object) -> bool:
        """A TLB miss: where ``linear`` leads, or a fault."""
        try:
            return self._fill_checked(linear, self._kinds[access], entry)
        except Fault as fault:
            self._fault = fault
        except BaseException as error:
            # Unicorn would swallow it.
            self._failure = error
        self._stopped = True
        return False

    def _fill_checked(self, linear: int, kind: AccessKind, entry: Any) -> bool:
        page = linear & ~(PAGE_SIZE - 1)
        if self._scratch:
            entry.paddr, entry.perms = _SCRATCH + page - _SCRATCH_LINEAR, 7
            return True
        found = self._lp.translate(linear, kind)
        if found.ram is not None:
            physical = self._ordinary(found.ram)
        elif found.epc_page is not None:
            physical = self._cached(found.epc_page)
            if kind == "w":
                self._dirty.add(found.epc_page)
        else:
            physical = _ABORT
            if kind == "x":
                # Ones are no instruction.
                raise InvalidOpcode("access.abort-page")
        if kind == "x":
            self._code[page] = physical
            if self._changed(physical):
                self._restart = self._stopped = True
                return False
        # The entry replaces the one before; a write is granted only once it is asked for, so that pages stay clean.
        granted = self._granted.setdefault(page, set())
        granted.add(kind)
        if kind == "w":
            self._again = None
        entry.paddr = physical
        entry.perms = sum(self._permission[one] for one in granted)
        return True

    def _block(self, _uc: Any, address: int, size: int, _data: object) -> None:
        """A stretch of instructions without branches is about to run."""
        if self._scratch:
            return
        self._before += len(self._current)
        if address == self._again:
            return
        self._current, self._again = (), None
        if address == self._until:
            self._at_until = self._stopped = True
            self._uc.emu_stop()
            return
        try:
            block = self._instructions(address, size)
        except BaseException as error:
            self._failure, self._stopped = error, True
            self._uc.emu_stop()
            return
        if self.first is None and block:
            self.first = block[0]
        if not self._planned:
            enclave = self._lp.enclave_mode
            for index, one in enumerate(block):
                if (one.action if enclave else one.outside) is None and one.address != self._until:
                    continue
                if index:
                    self._split = index
                else:
                    self._trap = one
                self._stopped = True
                self._uc.emu_stop()
                return
        self._current = block
        if not self._planned and not self._written_code(address, size):
            self._again = address

    def _interrupt(self, _uc: Any, vector: int, _data: object) -> None:
        """An exception that unicorn itself raises."""
        kind = _EXCEPTIONS.get(vector)
        if kind is None:
            self._failure = PlatformError(
                "an exception is not emulated", id="tee.emulator.unsupported", found=f"vector {vector}"
            )
        else:
            self._fault = kind("instruction")
        self._stopped = True
        self._uc.emu_stop()

    # --- memory ------------------------------------------------------------------------------------------------

    def _ordinary(self, ram: bytearray) -> int:
        """Physical address of a page of ordinary memory: unicorn works on the very bytes."""
        known = self._ram.get(id(ram))
        if known is None:
            view = (ctypes.c_char * PAGE_SIZE).from_buffer(ram)
            physical = _RAM + len(self._ram) * PAGE_SIZE
            self._uc.mem_map_ptr(physical, PAGE_SIZE, 7, ctypes.addressof(view))
            known = self._ram[id(ram)] = (physical, view, ram)
        return known[0]

    def _cached(self, page: int) -> int:
        """Physical address of an enclave page's plaintext."""
        physical = _EPC + page * PAGE_SIZE
        if page not in self._present:
            self._uc.mem_write(physical, self._lp.processor.read_epc(page))
            self._present.add(page)
        return physical

    def _changed(self, physical: int) -> bool:
        """Whether code was translated from other contents of that page. A digest, so that no plaintext is kept."""
        digest = hashlib.blake2b(self._uc.mem_read(physical, PAGE_SIZE), digest_size=16).digest()
        known = self._digests.get(physical)
        self._digests[physical] = digest
        return known is not None and known != digest

    def _write_back(self) -> None:
        """Leave nothing in the cache; what was written goes through the memory encryption engine."""
        try:
            for page in self._dirty:
                contents = bytes(self._uc.mem_read(_EPC + page * PAGE_SIZE, PAGE_SIZE))
                self._lp.processor.write_epc(page, contents)
        finally:
            self._clear()

    def _clear(self) -> None:
        for page in self._present:
            self._uc.mem_write(_EPC + page * PAGE_SIZE, _ZERO_PAGE)
        self._present.clear()
        self._dirty.clear()
        self._granted.clear()
        self._code.clear()
        self._uc.ctl(*self._flush_tlb)

    def _bytes(self, linear: int, size: int) -> bytes:
        """Bytes of code that was fetched."""
        out = bytearray()
        while len(out) < size:
            at = linear + len(out)
            start = at % PAGE_SIZE
            physical = self._code.get(at - start)
            if physical is None:
                break
            out += self._uc.mem_read(physical + start, min(size - len(out), PAGE_SIZE - start))
        return bytes(out)

    def _instructions(self, address: int, size: int) -> tuple[Instruction, ...]:
        physical = self._code.get(address & ~(PAGE_SIZE - 1), 0)
        key = (address, size, physical)
        known = self._blocks.get(key)
        if known is not None and not self._written_code(address, size):
            return known
        sgx2 = self._lp.processor.features.sgx2
        found = tuple(
            classify(*one, sgx2=sgx2) for one in self._disassembler.disasm_lite(self._bytes(address, size), address)
        )
        self._blocks[key] = found
        return found

    def _written_code(self, address: int, size: int) -> bool:
        """Whether the code may have been written since it was last disassembled."""
        first, last = address & ~(PAGE_SIZE - 1), (address + size - 1) & ~(PAGE_SIZE - 1)
        return "w" in self._granted[first] or (last != first and "w" in self._granted[last])

    # --- registers ---------------------------------------------------------------------------------------------

    def _load(self) -> None:
        registers = self._lp.registers
        if registers.xsave is not self._xsave:
            self._uc.mem_write(_SCRATCH + _AREA, registers.xsave[:XSAVE_LEGACY_SIZE])
            self._on_scratch(0x40)
            self._xsave = registers.xsave
        self._uc.reg_write_batch(
            [(number, getattr(registers, name)) for number, name in zip(self._ids, self._names, strict=True)]
        )

    def _store(self) -> None:
        registers = self._lp.registers
        system = registers.rflags & _RFLAGS_SYSTEM
        for name, value in zip(self._names, self._uc.reg_read_batch(self._ids), strict=True):
            setattr(registers, name, value)
        registers.rflags = registers.rflags & ~_RFLAGS_SYSTEM | system
        self._on_scratch(0)
        area = self._uc.mem_read(_SCRATCH + _AREA, XSAVE_LEGACY_SIZE)
        self._uc.mem_write(_SCRATCH + _AREA, bytes(XSAVE_LEGACY_SIZE))
        image = bytearray(registers.xsave)
        for part in _FX_PARTS:
            image[part] = area[part]
        if image != registers.xsave:
            registers.xsave = bytes(image)
        self._xsave = registers.xsave

    def _on_scratch(self, offset: int) -> None:
        """Run one instruction of the scratch pages."""
        self._scratch = True
        try:
            self._uc.ctl(*self._flush_tlb)
            self._uc.emu_start(_SCRATCH_LINEAR + offset, 0, count=1)
        finally:
            self._uc.ctl(*self._flush_tlb)
            self._scratch = False


def _modules() -> tuple[Any, Any, Any]:
    """capstone, unicorn and its register numbers; none has complete types."""
    return import_module("capstone"), import_module("unicorn"), import_module("unicorn.x86_const")


def _register(name: str) -> tuple[int, str]:
    """Size in bytes of a general register, and the 64-bit register that it is part of."""
    if name.startswith("r") and name[1:2].isdigit():
        digits = name.rstrip("dw")
        return {"d": 4, "w": 2}.get(name[-1], 8), digits
    if name.startswith(("r", "e")):
        return (8 if name[0] == "r" else 4), f"r{name[1:]}"
    return 2, f"r{name}"
