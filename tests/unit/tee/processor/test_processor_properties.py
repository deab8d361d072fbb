"""The SDM's invariants, under random sequences of leaf functions with random operands.

Three quarters of the operands are such as the leaf expects, so that the sequences get somewhere; the rest are anything,
so that pages, addresses and states meet that should not.
"""

from __future__ import annotations

import copy
import hashlib
import struct
from collections.abc import Callable, Sequence
from inspect import signature
from random import Random
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from sgx_machine import (
    AEP,
    HOST_CODE,
    HOST_DATA,
    PAGEINFO,
    PCMD,
    SECINFO,
    SIGSTRUCT,
    SOURCE,
    TOKEN,
    Machine,
    a_secs,
    a_tcs,
    attributes,
    epc,
)
from small_enclaves import Signers

from inclavare.sgx.codes import Encls, Enclu
from inclavare.sgx.paging import (
    PAGE_SIZE,
    PT_REG,
    PT_SECS,
    PT_TCS,
    PT_TRIM,
    PT_VA,
    SECINFO_MODIFIED,
    SECINFO_PENDING,
    SECINFO_PR,
    SECINFO_R,
    SECINFO_W,
    SECINFO_X,
    PageInfo,
)
from inclavare.sgx.structs import ATTRIBUTE_DEBUG, SecInfo, Tcs
from inclavare.tee.sgx_sim.processor import EpcmEntry, Fault, LogicalProcessor, Registers
from inclavare.tee.sgx_sim.processor.registers import GENERAL

EPC_PAGES = 18
#: Two enclaves of eight pages, side by side.
BASES = (0x1000_0000, 0x1000_8000)
SIZE = 8 * PAGE_SIZE
OFFSETS = [number * PAGE_SIZE for number in range(8)]
TCS_OFFSET, SSA_OFFSET, DATA_OFFSET = OFFSETS[1], OFFSETS[2], OFFSETS[4]
#: What enclave code writes, and nobody else may ever see.
MARKER = b"enclave's secret"
SECRET = int.from_bytes(MARKER[:8], "little")

ONES = b"\xff" * 16
RW, RX = PT_REG | SECINFO_R | SECINFO_W, PT_REG | SECINFO_R | SECINFO_X

#: Flags for SECINFOs.
FLAGS = (
    RW,
    RX,
    RW | SECINFO_X,
    PT_REG,
    PT_REG | SECINFO_W,
    PT_TCS,
    PT_SECS,
    PT_VA,
    PT_TRIM,
    RW | SECINFO_PENDING,
    PT_REG | SECINFO_R | SECINFO_PR,
    PT_TRIM | SECINFO_MODIFIED,
    PT_TCS | SECINFO_MODIFIED,
    SECINFO_R,
    SECINFO_X,
    SECINFO_R | SECINFO_W,
    1 << 6,
)

_CHOICES = range(4 * EPC_PAGES * 60)
_LINEAR = [base + offset for base in BASES for offset in OFFSETS]
_ODD = [0, 8, HOST_DATA, SOURCE, 1 << 52, BASES[0] - PAGE_SIZE, BASES[1] + SIZE]
#: What each parameter of an action is chosen from.
CHOICES: dict[str, Sequence[Any]] = {
    # Choose a page, see :meth:`ProcessorMachine.pick`.
    "page": _CHOICES,
    "secs_page": _CHOICES,
    "va_page": _CHOICES,
    "base": BASES,
    "linear": _LINEAR,
    "other": _LINEAR,
    "other_linear": [None] * len(_LINEAR) * 3 + _LINEAR,
    "flags": FLAGS,
    "slot": range(4),
    "thread": range(2),
    "number": range(41),
    "chunk": range(16),
    "offset": [0, 8, 16, 64, 72, 4088],
    "place": [offset + start for offset in OFFSETS for start in (64, 4080)],
    "vector": [6, 13, 14, 0x20],
    "access": ["r", "w", "x"],
    "encls": sorted(Encls),
    "load_leaf": [Encls.ELDB, Encls.ELDU, Encls.ELDBC, Encls.ELDUC],
    "modify_leaf": [Encls.EMODPR, Encls.EMODT],
    "edmm_leaf": [Enclu.EACCEPT, Enclu.EACCEPTCOPY, Enclu.EMODPE],
    "rbx": _ODD,
    "rcx": _ODD,
    "rdx": _ODD,
    "tcs": [True, False],
    "debug": [True, False],
    "honest": [True, True, False],
    "mapped": [True, True, True, False],
    "tracked": [True, True, False],
    "patient": [True, False],
    "writable": [True, True, False],
    "executable": [True, False],
}
ACTIONS: dict[str, Callable[..., None]] = {}


def action(method: Callable[..., None]) -> Callable[..., None]:
    """Something that may happen next."""
    ACTIONS[method.__name__] = method
    return method


INVARIANTS: list[str] = []


def always(method: Callable[..., None]) -> Callable[..., None]:
    """Something that holds after every action."""
    INVARIANTS.append(method.__name__)
    checked: Callable[..., None] = invariant()(method)
    return checked


class ProcessorMachine(RuleBasedStateMachine):
    """Two application threads and an operating system that does whatever it likes."""

    key: rsa.RSAPrivateKey

    @initialize()
    def start(self) -> None:
        self.m = Machine(self.key, epc_pages=EPC_PAGES)
        self.threads = [self.m.user, self.m.another()]
        #: What MRENCLAVE must become, by EID, from the leaves that succeeded; and what it became.
        self.shadow: dict[int, Any] = {}
        self.initialised: dict[int, bytes] = {}
        self.evicted: list[tuple[bytes, bytes, int]] = []
        self.loaded: set[bytes] = set()
        self.versions_seen: set[int] = set()
        self.versions_used: set[int] = set()
        self.slots: dict[bytes, tuple[int, int]] = {}
        self.build(BASES[0], list(range(6)))
        self.m.epa(6)

    @rule(name=st.deferred(lambda: st.sampled_from(sorted(ACTIONS))), data=st.data())
    def step(self, name: str, data: st.DataObject) -> None:
        """One of the actions."""
        self.act(name, lambda each: data.draw(st.sampled_from(CHOICES[each]), each))

    def act(self, name: str, choose: Callable[[str], Any]) -> None:
        parameters = list(signature(ACTIONS[name]).parameters)[1:]
        ACTIONS[name](self, **{each: choose(each) for each in parameters})

    # --- leaves ----------------------------------------------------------------------------------------------

    def attempt(self, action: Callable[[], object]) -> bool:
        """Whether the leaf succeeded; one that faults changes no EPCM entry and no thread."""
        epcm = copy.deepcopy(self.m.cpu.epcm)
        active = [copy.copy(one.active) for one in self.threads]
        try:
            action()
        except Fault:
            assert self.m.cpu.epcm == epcm
            assert [one.active for one in self.threads] == active
            return False
        return self.m.events[-1].rule == ""

    def pick(self, choice: int, *types: int | None) -> int:
        """An EPC page: mostly a valid one of these types (``None``: an unused one), else any."""
        fitting = [page for page, entry in enumerate(self.m.cpu.epcm) if (entry.pt if entry.valid else None) in types]
        return fitting[choice // 4 % len(fitting)] if choice % 4 and fitting else choice // 4 % EPC_PAGES

    def eid(self, secs_page: int) -> int:
        return self.m.cpu.secs(secs_page).eid

    @action
    def ecreate(self, page: int, base: int, debug: bool) -> None:
        page = self.pick(page, None)
        flags = attributes(ATTRIBUTE_DEBUG if debug else 0)
        if self.attempt(lambda: self.m.ecreate(a_secs(base=base, size=SIZE, attributes=flags), page)):
            shadow = self.shadow[self.eid(page)] = hashlib.sha256()
            shadow.update(struct.pack("<8sIQ44x", b"ECREATE\0", 1, SIZE))

    @action
    def eadd(self, linear: int, page: int, secs_page: int, flags: int, tcs: bool) -> None:
        page, secs_page = self.pick(page, None), self.pick(secs_page, PT_SECS)
        flags = PT_TCS if tcs and flags == PT_REG else flags
        contents = a_tcs(ossa=SSA_OFFSET, ofsbase=0, ogsbase=0).to_bytes() if tcs else b"\0"
        if self.attempt(lambda: self.m.eadd(linear, page, flags, contents, secs_page=secs_page)):
            self.measured(secs_page, linear, flags)
            self.m.space.map_epc(linear, page, writable=True, executable=True)

    def measured(self, secs_page: int, linear: int, flags: int) -> None:
        base = self.m.cpu.secs(secs_page).base
        effective = flags & ~7 if flags & 0xFF00 == PT_TCS else flags
        self.shadow[self.eid(secs_page)].update(struct.pack("<8sQQ40x", b"EADD\0\0\0\0", linear - base, effective))

    @action
    def eextend_any(self, page: int, secs_page: int, chunk: int) -> None:
        page = self.pick(page, PT_REG, PT_TCS)
        owner = self.m.entry(page).enclave_secs
        self.eextend(page, owner if owner is not None and secs_page % 4 else self.pick(secs_page, PT_SECS), chunk)

    def eextend(self, page: int, secs_page: int, chunk: int) -> None:
        if self.attempt(lambda: self.m.encls(Encls.EEXTEND, epc(secs_page), epc(page) + 256 * chunk)):
            offset = self.m.entry(page).enclave_address - self.m.cpu.secs(secs_page).base + 256 * chunk
            data = self.m.cpu.read_epc(page, 256 * chunk, 256)
            self.shadow[self.eid(secs_page)].update(struct.pack("<8sQ48x", b"EEXTEND\0", offset) + data)

    @action
    def einit(self, page: int, honest: bool) -> None:
        page = self.pick(page, PT_SECS)
        entry = self.m.entry(page)
        if not entry.valid or entry.pt != PT_SECS:
            self.attempt(lambda: self.m.encls(Encls.EINIT, SIGSTRUCT, epc(page), TOKEN))
            return
        eid = self.eid(page)
        mrenclave = self.shadow[eid].digest() if honest else bytes(32)
        if self.attempt(lambda: self.m.einit(secs_page=page, mrenclave=mrenclave)):
            assert honest
            assert eid not in self.initialised
            self.initialised[eid] = mrenclave

    @action
    def rebuild(self, base: int) -> None:
        """Away with what is at ``base``, and a whole enclave in its place, if there is room."""
        for page, entry in enumerate(self.m.cpu.epcm):
            if entry.valid and entry.pt == PT_SECS and self.m.cpu.secs(page).base == base:
                for lp in self.m.cpu.inside(page):
                    self.interrupt(lp, 0xFD)
                for child, other in enumerate(self.m.cpu.epcm):
                    if other.is_child and other.enclave_secs == page:
                        self.m.encls(Encls.EREMOVE, rcx=epc(child))
                self.m.encls(Encls.EREMOVE, rcx=epc(page))
        free = [page for page, entry in enumerate(self.m.cpu.epcm) if not entry.valid]
        if len(free) >= 6:
            self.build(base, free)

    def build(self, base: int, free: list[int]) -> None:
        secs_page = free[0]
        self.create(secs_page, base)
        tcs = a_tcs(ossa=SSA_OFFSET, ofsbase=0, ogsbase=0).to_bytes()
        for number, (page, offset, flags, contents) in enumerate(
            (
                (free[1], OFFSETS[0], RX, b"code"),
                (free[2], TCS_OFFSET, PT_TCS, tcs),
                (free[3], SSA_OFFSET, RW, b""),
                (free[4], SSA_OFFSET + PAGE_SIZE, RW, b""),
                (free[5], DATA_OFFSET, RW | SECINFO_X, b""),
            )
        ):
            self.m.eadd(base + offset, page, flags, contents, secs_page=secs_page)
            self.measured(secs_page, base + offset, flags)
            self.m.space.map_epc(base + offset, page, writable=True, executable=True)
            self.eextend(page, secs_page, number)
        eid = self.eid(secs_page)
        assert self.m.einit(secs_page=secs_page, mrenclave=self.shadow[eid].digest()).rax == 0
        self.initialised[eid] = self.shadow[eid].digest()

    def create(self, page: int, base: int) -> None:
        self.m.ecreate(a_secs(base=base, size=SIZE), page)
        shadow = self.shadow[self.eid(page)] = hashlib.sha256()
        shadow.update(struct.pack("<8sIQ44x", b"ECREATE\0", 1, SIZE))

    @action
    def epa(self, page: int) -> None:
        page = self.pick(page, None)
        self.attempt(lambda: self.m.epa(page))

    @action
    def eremove(self, page: int) -> None:
        page = self.pick(page, PT_SECS, PT_REG, PT_TRIM, PT_VA)
        entry = copy.copy(self.m.entry(page))
        had_children = self.m.cpu.has_children(page)
        if self.attempt(lambda: self.m.encls(Encls.EREMOVE, rcx=epc(page))) and entry.valid:
            assert not (entry.pt == PT_SECS and had_children)
            if entry.enclave_secs is not None and entry.pt != PT_TRIM:
                assert not self.m.cpu.inside(entry.enclave_secs)

    @action
    def eblock(self, page: int) -> None:
        page = self.pick(page, PT_REG, PT_TCS, PT_TRIM)
        self.attempt(lambda: self.m.block(page))

    @action
    def etrack(self, page: int) -> None:
        page = self.pick(page, PT_SECS)
        self.attempt(lambda: self.m.encls(Encls.ETRACK, rcx=epc(page)))

    @action
    def ewb(self, page: int, va_page: int, slot: int) -> None:
        page, va_page = self.pick(page, PT_REG, PT_TCS, PT_TRIM, PT_SECS), self.pick(va_page, PT_VA)
        self.run_ewb(page, va_page, slot)

    @action
    def evict(self, page: int, va_page: int, tracked: bool, patient: bool) -> None:
        """EBLOCK, ETRACK, an interrupt to everybody, EWB; a hasty operating system leaves something out."""
        cached = [found.epc_page for lp in self.threads for found in lp._tlb.values() if found.epc_page is not None]
        page = cached[page % len(cached)] if cached and page % 2 else self.pick(page, PT_REG, PT_TCS, PT_TRIM)
        va_page = self.pick(va_page, PT_VA)
        entry = self.m.entry(page)
        if entry.enclave_secs is None:
            return
        self.attempt(lambda: self.m.block(page))
        secs_page = entry.enclave_secs
        if tracked:
            self.attempt(lambda: self.m.encls(Encls.ETRACK, rcx=epc(secs_page)))
        if patient:
            for lp in self.m.cpu.inside(secs_page):
                self.interrupt(lp, 0xFD)
        self.ewb_of(page, va_page)

    def eblock_and_track(self, page: int, secs_page: int) -> None:
        self.attempt(lambda: self.m.block(page))
        self.attempt(lambda: self.m.encls(Encls.ETRACK, rcx=epc(secs_page)))
        for lp in self.m.cpu.inside(secs_page):
            self.interrupt(lp, 0xFD)

    def ewb_of(self, page: int, va_page: int) -> None:
        for slot in range(4):
            if not any(self.m.cpu.read_epc(va_page, 8 * slot, 8)):
                self.run_ewb(page, va_page, slot)
                return

    def run_ewb(self, page: int, va_page: int, slot: int) -> None:
        entry = copy.copy(self.m.entry(page))

        def leaf() -> None:
            self.m.pageinfo(srcpge=SOURCE, secinfo=PCMD)
            self.m.encls(Encls.EWB, PAGEINFO, epc(page), epc(va_page) + 8 * slot)

        self.attempt(leaf)
        if entry.valid and not self.m.entry(page).valid:
            linear = PageInfo.from_bytes(self.m.space.peek(PAGEINFO, 32)).linaddr
            contents = self.m.space.peek(SOURCE, PAGE_SIZE)
            assert contents not in {other for other, _, _ in self.evicted}
            self.evicted.append((contents, self.m.space.peek(PCMD, 128), linear))
            self.slots[contents] = va_page, slot

    @action
    def load(
        self,
        number: int,
        page: int,
        va_page: int,
        slot: int,
        secs_page: int,
        load_leaf: Encls,
        other_linear: int | None,
    ) -> None:
        """Any page that was ever written out, anywhere: it comes back once, where it was."""
        if not self.evicted:
            return
        out = [other for other in self.evicted if other[0] not in self.loaded] if number % 4 else self.evicted
        contents, pcmd, linear = (out or self.evicted)[-1 - number % len(out or self.evicted)]
        owner = self.owners().get(int.from_bytes(pcmd[64:72], "little"))
        page, va_page = self.pick(page, None), self.pick(va_page, PT_VA)
        secs_page = owner if owner is not None and secs_page % 4 else self.pick(secs_page, PT_SECS)
        if slot:
            # Mostly the slot that it was written out with.
            va_page, slot = self.slots[contents]
        given = linear if other_linear is None else other_linear
        if self.load_at(contents, pcmd, given, page, va_page, slot, secs_page, load_leaf):
            assert given == linear

    def load_at(
        self, contents: bytes, pcmd: bytes, linear: int, page: int, va_page: int, slot: int, secs_page: int, leaf: Encls
    ) -> bool:
        self.m.space.poke(SOURCE, contents)
        self.m.space.poke(PCMD, pcmd)
        self.m.pageinfo(linaddr=linear, srcpge=SOURCE, secinfo=PCMD, secs=epc(secs_page))
        if not self.attempt(lambda: self.m.encls(leaf, PAGEINFO, epc(page), epc(va_page) + 8 * slot)):
            return False
        assert contents not in self.loaded
        self.loaded.add(contents)
        entry = self.m.entry(page)
        assert entry.flags == int.from_bytes(pcmd[:8], "little")
        if entry.is_child:
            assert entry.enclave_secs == secs_page
            assert self.eid(secs_page) == int.from_bytes(pcmd[64:72], "little")
            self.m.space.map_epc(linear, page, writable=True, executable=True)
        return True

    def owners(self) -> dict[int, int]:
        """SECS pages by EID."""
        return {
            self.eid(page): page for page, entry in enumerate(self.m.cpu.epcm) if entry.valid and entry.pt == PT_SECS
        }

    @action
    def bring_back(self) -> None:
        """What a good operating system does: blocked pages go out, and everything that is out comes in."""
        va_pages = [page for page, entry in enumerate(self.m.cpu.epcm) if entry.valid and entry.pt == PT_VA]
        for page, entry in enumerate(self.m.cpu.epcm):
            if entry.is_child and entry.blocked and va_pages:
                assert entry.enclave_secs is not None
                self.eblock_and_track(page, entry.enclave_secs)
                self.ewb_of(page, va_pages[0])
        owners = self.owners()
        for contents, pcmd, linear in self.evicted:
            free = [page for page, entry in enumerate(self.m.cpu.epcm) if not entry.valid]
            owner = owners.get(int.from_bytes(pcmd[64:72], "little"))
            if contents not in self.loaded and owner is not None and free and pcmd[1] != PT_SECS:
                va_page, slot = self.slots[contents]
                self.load_at(contents, pcmd, linear, free[0], va_page, slot, owner, Encls.ELDU)

    @action
    def eaug(self, page: int, linear: int, secs_page: int) -> None:
        page, secs_page = self.pick(page, None), self.pick(secs_page, PT_SECS)

        def leaf() -> None:
            self.m.pageinfo(linaddr=linear, secs=epc(secs_page))
            self.m.encls(Encls.EAUG, PAGEINFO, epc(page))

        if self.attempt(leaf):
            assert self.m.cpu.read_epc(page) == bytes(PAGE_SIZE)
            self.m.space.map_epc(linear, page, writable=True, executable=True)

    @action
    def modify(self, page: int, flags: int, modify_leaf: Encls) -> None:
        page = self.pick(page, PT_REG, PT_TCS)
        before = self.m.entry(page).flags & 7

        def run() -> None:
            self.m.secinfo(flags)
            self.m.encls(modify_leaf, SECINFO, epc(page))

        if self.attempt(run):
            assert self.m.entry(page).flags & 7 & ~before == 0

    @action
    def edbgrd(self, page: int, offset: int) -> None:
        page = self.pick(page, PT_REG, PT_TCS, PT_VA)
        if self.attempt(lambda: self.m.encls(Encls.EDBGRD, 0, epc(page) + offset)):
            entry = self.m.entry(page)
            if entry.enclave_secs is not None:
                assert self.m.cpu.secs(entry.enclave_secs).attributes.debug
            else:
                assert self.m.os.registers.rbx in (0, (1 << 64) - 1)

    @action
    def encls_of_anything(self, encls: Encls, rbx: int, rcx: int, rdx: int) -> None:
        self.attempt(lambda: self.m.encls(encls, rbx, rcx, rdx))

    # --- enclave threads -------------------------------------------------------------------------------------

    @action
    def eenter(self, thread: int, base: int, mapped: bool) -> None:
        lp = self.threads[thread]
        if lp.enclave_mode:
            return
        if mapped:
            self.bring_back()
            self.map_everything()
        lp.registers = Registers(rax=Enclu.EENTER, rbx=base + TCS_OFFSET, rcx=AEP, rip=HOST_CODE, rsp=HOST_DATA)
        if self.attempt(lp.enclu):
            assert lp.active is not None
            assert self.m.cpu.secs(lp.active.secs_page).initialised
            for name in ("r12", "r13", "r14", "r15"):
                setattr(lp.registers, name, SECRET)
            self.attempt_access(lambda: lp.write(base + DATA_OFFSET, MARKER))

    @action
    def eresume(self, thread: int, base: int, mapped: bool) -> None:
        if mapped:
            self.bring_back()
            self.map_everything()
        lp = self.threads[thread]
        if lp.enclave_mode:
            return
        lp.registers = Registers(rax=Enclu.ERESUME, rbx=base + TCS_OFFSET, rcx=AEP, rip=HOST_CODE)
        if self.attempt(lp.enclu):
            assert lp.registers.r12 == SECRET

    @action
    def eexit(self, thread: int) -> None:
        lp = self.threads[thread]
        lp.registers.rax, lp.registers.rbx = Enclu.EEXIT, HOST_CODE
        self.attempt(lp.enclu)

    @action
    def exception(self, thread: int, vector: int) -> None:
        lp = self.threads[thread]
        if lp.enclave_mode:
            self.interrupt(lp, vector)

    def interrupt(self, lp: LogicalProcessor, vector: int) -> None:
        image = bytearray(lp.registers.xsave)
        image[160:176] = MARKER
        lp.registers.xsave = bytes(image)
        lp.aex(vector, 4, BASES[0])
        assert SECRET not in [getattr(lp.registers, name) for name in GENERAL]
        assert MARKER not in lp.registers.xsave
        assert lp.registers.rip == AEP

    @action
    def write_secret(self, thread: int, place: int, base: int) -> None:
        lp = self.threads[thread]
        self.eenter(thread, base, True)
        if lp.active is None:
            return
        linear = lp.active.secs.base + place
        if self.attempt_access(lambda: lp.write(linear, MARKER)):
            assert lp.read(linear, 16) == MARKER

    @action
    def touch(self, thread: int, linear: int, access: Any) -> None:
        self.attempt_access(lambda: self.threads[thread].translate(linear, access))

    def attempt_access(self, action: Callable[[], object]) -> bool:
        try:
            action()
        except Fault:
            return False
        return True

    @action
    def enclave_modifies(self, thread: int, edmm_leaf: Enclu, linear: int, other: int, flags: int) -> None:
        lp = self.threads[thread]
        self.eenter(thread, linear & -SIZE, True)
        if lp.active is None:
            return
        secinfo = lp.active.secs.base + DATA_OFFSET + 0x800
        waiting_pages = [
            entry.enclave_address
            for entry in self.m.cpu.epcm
            if entry.enclave_secs == lp.active.secs_page and (entry.pending or entry.modified or entry.pr)
        ]
        if waiting_pages and flags != PT_VA:
            linear = waiting_pages[0]
        found = self.mapped(linear)
        if found is not None and flags != 1 << 6:
            # What waits to be accepted, if something does.
            waiting = found.flags if found.pending or found.modified or found.pr else flags
            flags = waiting if edmm_leaf is Enclu.EACCEPT else RW if edmm_leaf is Enclu.EACCEPTCOPY else flags
            other = lp.active.secs.base + DATA_OFFSET
        if not self.attempt_access(lambda: lp.write(secinfo, SecInfo(flags).to_bytes())):
            return
        registers = lp.registers
        registers.rax, registers.rbx, registers.rcx, registers.rdx = edmm_leaf, secinfo, linear, other
        before = None if found is None else copy.copy(found)
        if self.attempt(lp.enclu):
            # The enclave agrees to what was done to its own pages, and extends nobody else's.
            assert found is not None and before is not None
            assert (found.enclave_secs, found.enclave_address) == (lp.active.secs_page, linear)
            assert not found.pending and not found.modified
            if edmm_leaf is Enclu.EACCEPT:
                assert found.flags & 7 == before.flags & 7

    def mapped(self, linear: int) -> EpcmEntry | None:
        found = self.m.space.lookup(linear)
        return None if found is None or found.epc_page is None else self.m.entry(found.epc_page)

    # --- page tables -----------------------------------------------------------------------------------------

    @action
    def remap(self, linear: int, page: int, writable: bool, executable: bool) -> None:
        page = self.pick(page, PT_REG, PT_TCS)
        self.m.space.map_epc(linear, page, writable=writable, executable=executable)

    def map_everything(self) -> None:
        """Every page where its enclave expects it."""
        for page, entry in enumerate(self.m.cpu.epcm):
            if entry.is_child:
                self.m.space.map_epc(entry.enclave_address, page, writable=True, executable=True)

    @action
    def put_ordinary_memory_there(self, linear: int) -> None:
        self.m.space.map_ram(linear, PAGE_SIZE, executable=True)

    @action
    def unmap(self, linear: int) -> None:
        self.m.space.unmap(linear)

    # --- what always holds -----------------------------------------------------------------------------------

    @always
    def pages_belong_to_one_enclave(self) -> None:
        for entry in self.m.cpu.epcm:
            if entry.is_child:
                assert entry.enclave_secs is not None
                owner = self.m.entry(entry.enclave_secs)
                assert owner.valid and owner.pt == PT_SECS
                assert entry.enclave_address in self.m.cpu.secs(entry.enclave_secs).elrange
            elif entry.valid:
                assert entry.pt in (PT_SECS, PT_VA)
                assert entry.enclave_secs is None
            if entry.valid and entry.pt != PT_REG:
                assert not (entry.r or entry.w or entry.x)
            assert entry.r or not entry.w

    @always
    def eids_are_unique(self) -> None:
        eids = [self.eid(page) for page, entry in enumerate(self.m.cpu.epcm) if entry.valid and entry.pt == PT_SECS]
        assert len(eids) == len(set(eids))

    @always
    def mrenclave_is_what_was_measured_and_stays(self) -> None:
        for page, entry in enumerate(self.m.cpu.epcm):
            if entry.valid and entry.pt == PT_SECS:
                secs = self.m.cpu.secs(page)
                assert secs.initialised is (secs.eid in self.initialised)
                expected = self.initialised.get(secs.eid, bytes(32))
                assert secs.public.mrenclave == expected

    @always
    def no_stale_translation_leads_to_a_page_that_changed_hands(self) -> None:
        """What ETRACK is for: whatever a thread has cached is still its enclave's page at that address."""
        for lp in self.threads:
            if lp.active is None:
                assert not lp._tlb
            for (linear, _), found in lp._tlb.items():
                assert lp.active is not None and found.epc_page is not None
                entry = self.m.entry(found.epc_page)
                assert entry.valid and entry.enclave_secs == lp.active.secs_page
                assert entry.enclave_address == linear

    @always
    def threads_are_where_their_tcs_says(self) -> None:
        inside = [lp.active for lp in self.threads if lp.active is not None]
        assert len({active.tcs_page for active in inside}) == len(inside)
        for active in inside:
            entry = self.m.entry(active.tcs_page)
            assert entry.valid and entry.enclave_secs == active.secs_page
            for page in (*active.xsave_pages, active.gprsgx[0]):
                assert self.m.entry(page).valid and self.m.entry(page).enclave_secs == active.secs_page
        for page, entry in enumerate(self.m.cpu.epcm):
            if entry.valid and entry.pt == PT_TCS and not entry.modified and not entry.pending:
                tcs = Tcs.from_bytes(self.m.cpu.read_epc(page))
                assert (tcs.state == 1) is any(active.tcs_page == page for active in inside)
                assert tcs.cssa <= tcs.nssa

    @always
    def versions_are_used_once(self) -> None:
        now: set[int] = set()
        for page, entry in enumerate(self.m.cpu.epcm):
            if entry.valid and entry.pt == PT_VA:
                found = [value for value in struct.unpack("<512Q", self.m.cpu.read_epc(page)) if value]
                assert len(found) == len(set(found))
                assert not now & set(found)
                now |= set(found)
        # A VA page may be evicted and come back with what it held; a version that was used up may not.
        assert not now & self.versions_used
        if not any(int.from_bytes(pcmd[:8], "little") == PT_VA for _, pcmd, _ in self.evicted):
            self.versions_used |= self.versions_seen - now
        self.versions_seen |= now

    @always
    def memory_shows_nothing(self) -> None:
        for ciphertext in self.m.cpu.memory.store.pages.values():
            assert MARKER not in ciphertext
        for address, size in ((PAGEINFO, 4 * PAGE_SIZE), (HOST_DATA, PAGE_SIZE)):
            assert MARKER not in self.m.space.peek(address, size)
        assert not any(MARKER in contents for contents, _, _ in self.evicted)

    @always
    def epc_is_the_abort_page_from_outside(self) -> None:
        for page in range(EPC_PAGES):
            assert self.m.os.read(epc(page) + 64, 16) == ONES

    @always
    def unused_pages_hold_nothing(self) -> None:
        for page, entry in enumerate(self.m.cpu.epcm):
            if not entry.valid:
                assert page not in self.m.cpu.memory.store.pages


@pytest.mark.timeout(300)
def test_invariants(signers: Signers) -> None:
    """Short sequences, which are shrunk when one fails."""
    machine = type("Signed", (ProcessorMachine,), {"key": signers.ours})
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine,
        settings=settings(
            max_examples=40,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
        ),
    )


#: Actions that are rarer by themselves than they should be.
_OFTEN = ("eenter", "eresume", "exception", "enclave_modifies", "write_secret", "load", "evict", "eaug", "modify")


#: Whatever does not succeed on any walk is not tested by them.
_LEAVES = {leaf.name for leaf in (*Encls, *Enclu)} - {
    "EUPDATESVN",
    "EVERIFYREPORT2",
    "EREPORT",
    "EGETKEY",
    "EDECCSSA",
    "EDBGWR",
    "ERDINFO",
    "ETRACKC",
}


@pytest.mark.timeout(300)
def test_invariants_on_long_walks(signers: Signers) -> None:
    """Long sequences in which every action is as likely as the others."""
    succeeded: set[str] = set()
    names = sorted(ACTIONS) + 2 * sorted(_OFTEN)
    for seed in range(16):
        rng = Random(seed)

        def choose(each: str, rng: Random = rng) -> Any:
            return rng.choice(CHOICES[each])

        machine = type("Signed", (ProcessorMachine,), {"key": signers.ours})()
        machine.start()
        machine.m.cpu.observers.append(lambda event: event.rule or succeeded.add(event.name))
        for _ in range(300):
            machine.act(rng.choice(names), choose)
            for name in INVARIANTS:
                getattr(machine, name)()
    assert succeeded >= _LEAVES, _LEAVES - succeeded
