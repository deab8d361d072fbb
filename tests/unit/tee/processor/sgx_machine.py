"""A processor, an address space and operands in memory, for tests of single leaf functions.

Everything lies at fixed places, so that a test says only what is different from a leaf that succeeds.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from inclavare.sgx import sigstruct
from inclavare.sgx.codes import Encls, Enclu, Status
from inclavare.sgx.keys import RootKeys
from inclavare.sgx.paging import (
    PAGE_SIZE,
    PT_REG,
    PT_SECS,
    PT_TCS,
    SECINFO_R,
    SECINFO_W,
    SECINFO_X,
    PageInfo,
    Pcmd,
)
from inclavare.sgx.structs import ATTRIBUTE_DEBUG, ATTRIBUTE_MODE64BIT, Attributes, SecInfo, Secs, Sigstruct, Tcs
from inclavare.tee.sgx_sim.processor import (
    AddressSpace,
    EpcmEntry,
    Event,
    Fault,
    Features,
    LogicalProcessor,
    Processor,
    Registers,
)
from inclavare.tee.sgx_sim.processor.faults import PF_SGX, PF_WRITE

WINDOW = 0xFFFF_8880_0000_0000
BUFFERS = 0xFFFF_C900_0000_0000
PAGEINFO, SECINFO, PCMD, RDINFO = BUFFERS, BUFFERS + 0x40, BUFFERS + 0x80, BUFFERS + 0x100
#: The same PAGEINFO and SECINFO once more, as far from their alignment as can be.
ODD_PAGEINFO, ODD_SECINFO = BUFFERS + 0x210, BUFFERS + 0x2A0
SOURCE, TOKEN, SIGSTRUCT = BUFFERS + 0x1000, BUFFERS + 0x2000, BUFFERS + 0x3000
#: A page-aligned address where nothing is mapped, and one that is not canonical.
NOWHERE, NON_CANONICAL = 0x6660_0000, 1 << 52

BASE, SIZE = 0x1000_0000, 16 * PAGE_SIZE
#: Linear addresses in the enclave.
CODE, TCS, SSA, DATA, MORE, SPARE = (BASE + offset for offset in (0, 0x1000, 0x2000, 0x4000, 0x5000, 0x8000))
#: Numbers of EPC pages: the SECS, then the pages above (two frames of SSA), a VA page, and free ones.
SECS_PAGE, CODE_PAGE, TCS_PAGE, SSA_PAGE, SSA2_PAGE, DATA_PAGE, MORE_PAGE, VA_PAGE, FREE_PAGE = range(9)
EPC_PAGES = 16
#: Outside of the enclave.
HOST_CODE, HOST_DATA, AEP = 0x40_0000, 0x50_0000, 0x40_0800
STACK = HOST_DATA + 0x800

RX, RW = PT_REG | SECINFO_R | SECINFO_X, PT_REG | SECINFO_R | SECINFO_W
RWX = RX | RW
ALL_BUT_DEBUG = (1 << 64) - 1 & ~ATTRIBUTE_DEBUG
ROOTS = RootKeys(bytes(range(16)), bytes(range(16, 32)), bytes(range(32, 48)), bytes((2, 2, 1)) + bytes(13))


def epc(page: int) -> int:
    """Where the operating system sees an EPC page."""
    return WINDOW + page * PAGE_SIZE


class Machine:
    """One processor with two hardware threads: the operating system's and the application's."""

    def __init__(self, key: rsa.RSAPrivateKey, features: Features | None = None, epc_pages: int = EPC_PAGES) -> None:
        self.key = key
        self.cpu = Processor(ROOTS, epc_pages=epc_pages, features=features)
        self.space = AddressSpace()
        self.os = LogicalProcessor(self.cpu, self.space, cpl=0)
        self.user = LogicalProcessor(self.cpu, self.space)
        self.events: list[Event] = []
        self.cpu.observers.append(self.events.append)
        self.space.map_ram(BUFFERS, 4 * PAGE_SIZE)
        self.space.map_ram(HOST_CODE, PAGE_SIZE, executable=True)
        self.space.map_ram(HOST_DATA, PAGE_SIZE)
        for page in range(epc_pages):
            self.space.map_epc(epc(page), page, writable=True, executable=True)
        self.cpu.le_pubkey_hash = sigstruct.mrsigner(key.public_key().public_numbers().n.to_bytes(384, "little"))

    # --- instructions --------------------------------------------------------------------------------------------

    def encls(self, leaf: Encls, rbx: int = 0, rcx: int = 0, rdx: int = 0) -> Registers:
        """ENCLS as the operating system; the registers afterwards."""
        self.os.registers = Registers(rax=leaf, rbx=rbx, rcx=rcx, rdx=rdx, rip=HOST_CODE, rflags=0x8D7)
        self.os.encls()
        return self.os.registers

    def enclu(self, leaf: Enclu, rbx: int = 0, rcx: int = 0, rdx: int = 0) -> Registers:
        """ENCLU as the application or its enclave; the other registers stay."""
        registers = self.user.registers
        registers.rax, registers.rbx, registers.rcx, registers.rdx = leaf, rbx, rcx, rdx
        self.user.enclu()
        return registers

    def pageinfo(self, *, linaddr: int = 0, srcpge: int = 0, secinfo: int = 0, secs: int = 0) -> None:
        for at in (PAGEINFO, ODD_PAGEINFO):
            self.space.poke(at, PageInfo(linaddr, srcpge, secinfo, secs).to_bytes())

    def secinfo(self, flags: int) -> None:
        for at in (SECINFO, ODD_SECINFO):
            self.space.poke(at, SecInfo(flags).to_bytes())

    def ecreate(self, secs: Secs | None = None, page: int = SECS_PAGE) -> Registers:
        self.space.poke(SOURCE, (secs or a_secs()).to_bytes())
        self.secinfo(PT_SECS)
        self.pageinfo(srcpge=SOURCE, secinfo=SECINFO)
        return self.encls(Encls.ECREATE, PAGEINFO, epc(page))

    def eadd(
        self, linear: int, page: int, flags: int = RW, contents: bytes = b"", *, secs_page: int = SECS_PAGE
    ) -> Registers:
        self.space.poke(SOURCE, contents.ljust(PAGE_SIZE, b"\0"))
        self.secinfo(flags)
        self.pageinfo(linaddr=linear, srcpge=SOURCE, secinfo=SECINFO, secs=epc(secs_page))
        return self.encls(Encls.EADD, PAGEINFO, epc(page))

    def einit(self, token: bytes = bytes(304), *, secs_page: int = SECS_PAGE, **signing: Any) -> Registers:
        self.space.poke(SIGSTRUCT, self.sign(secs_page, **signing).to_bytes())
        self.space.poke(TOKEN, token)
        return self.encls(Encls.EINIT, SIGSTRUCT, epc(secs_page), TOKEN)

    def epa(self, page: int = VA_PAGE) -> Registers:
        return self.encls(Encls.EPA, 3, epc(page))

    def eaug(self, linear: int = SPARE, page: int = FREE_PAGE, *, mapped: bool = True) -> Registers:
        self.pageinfo(linaddr=linear, secs=epc(SECS_PAGE))
        registers = self.encls(Encls.EAUG, PAGEINFO, epc(page))
        if mapped:
            self.space.map_epc(linear, page, writable=True, executable=True)
        return registers

    def block(self, page: int) -> Registers:
        return self.encls(Encls.EBLOCK, rcx=epc(page))

    def track(self) -> Registers:
        return self.encls(Encls.ETRACK, rcx=epc(SECS_PAGE))

    def ewb(self, page: int, slot: int = 0, va_page: int = VA_PAGE) -> Registers:
        self.pageinfo(srcpge=SOURCE, secinfo=PCMD)
        return self.encls(Encls.EWB, PAGEINFO, epc(page), epc(va_page) + 8 * slot)

    def evict(self, page: int, slot: int = 0) -> tuple[bytes, bytes, int]:
        """EBLOCK, ETRACK, EWB; ciphertext, PCMD and linear address."""
        self.block(page)
        self.track()
        assert self.ewb(page, slot).rax == Status.SGX_SUCCESS
        info = PageInfo.from_bytes(self.space.peek(PAGEINFO, 32))
        return self.space.peek(SOURCE, PAGE_SIZE), self.space.peek(PCMD, Pcmd.LAYOUT.size), info.linaddr

    def load(
        self,
        evicted: tuple[bytes, bytes, int],
        page: int,
        slot: int = 0,
        *,
        leaf: Encls = Encls.ELDU,
        secs: int | None = None,
    ) -> Registers:
        contents, pcmd, linear = evicted
        self.space.poke(SOURCE, contents)
        self.space.poke(PCMD, pcmd)
        self.pageinfo(linaddr=linear, srcpge=SOURCE, secinfo=PCMD, secs=epc(SECS_PAGE) if secs is None else secs)
        return self.encls(leaf, PAGEINFO, epc(page), epc(VA_PAGE) + 8 * slot)

    # --- enclaves ------------------------------------------------------------------------------------------------

    def sign(self, secs_page: int = SECS_PAGE, **overrides: Any) -> Sigstruct:
        """A SIGSTRUCT over the enclave as it is now; ``overrides`` replace arguments of ``sign``."""
        secs = self.cpu.secs(secs_page)
        attributes = secs.attributes
        arguments: dict[str, Any] = {
            "attributes": attributes.flags,
            "attribute_mask": ALL_BUT_DEBUG,
            "xfrm": attributes.xfrm,
            "xfrm_mask": 3,
            "miscselect": secs.public.miscselect,
            "misc_mask": 0xFFFFFFFF,
            "isv_prod_id": 7,
            "isv_svn": 3,
            "date": 0x20260131,
        }
        mrenclave = overrides.pop("mrenclave", None) or self.cpu.enclaves[secs.eid].measurement.digest()
        return sigstruct.sign(mrenclave, self.key, **{**arguments, **overrides})

    def add_pages(self, tcs: Tcs | None = None) -> None:
        """The pages of the usual enclave, mapped where it sees them."""
        pages = (
            (CODE, CODE_PAGE, RX, b"code"),
            (TCS, TCS_PAGE, PT_TCS, (tcs or a_tcs()).to_bytes()),
            (SSA, SSA_PAGE, RW, b""),
            (SSA + PAGE_SIZE, SSA2_PAGE, RW, b""),
            (DATA, DATA_PAGE, RW, b"data"),
            (MORE, MORE_PAGE, RW, b"more"),
        )
        for linear, page, flags, contents in pages:
            self.eadd(linear, page, flags, contents)
            self.space.map_epc(linear, page, writable=not flags & SECINFO_X, executable=bool(flags & SECINFO_X))

    def build(self, tcs: Tcs | None = None, secs: Secs | None = None, **signing: Any) -> Machine:
        """An initialised enclave, and a VA page."""
        self.ecreate(secs)
        self.add_pages(tcs)
        assert self.einit(**signing).rax == Status.SGX_SUCCESS, self.events[-1].rule
        self.epa()
        self.events.clear()
        return self

    def enter(self, lp: LogicalProcessor | None = None, tcs: int = TCS) -> LogicalProcessor:
        """EENTER from the host's code."""
        lp = lp or self.user
        lp.registers = Registers(
            rax=Enclu.EENTER, rbx=tcs, rcx=AEP, rip=HOST_CODE, rsp=STACK, rbp=STACK + 8, fs_base=0x111, gs_base=0x222
        )
        lp.enclu()
        return lp

    def another(self) -> LogicalProcessor:
        """One more hardware thread of the application."""
        return LogicalProcessor(self.cpu, self.space)

    # --- what a test looks at ------------------------------------------------------------------------------------

    def entry(self, page: int) -> EpcmEntry:
        return self.cpu.epcm[page]

    def change(self, page: int, **fields: Any) -> None:
        """Put an EPCM entry into a state that takes long to reach by instructions."""
        for name, value in fields.items():
            setattr(self.cpu.epcm[page], name, value)

    def tcs(self, page: int = TCS_PAGE) -> Tcs:
        return Tcs.from_bytes(self.cpu.read_epc(page))

    def set_tcs(self, page: int = TCS_PAGE, **fields: Any) -> None:
        self.cpu.write_epc(page, replace(self.tcs(page), **fields).to_bytes())

    def set_secs(self, **fields: Any) -> None:
        secs = self.cpu.secs(SECS_PAGE)
        self.cpu.write_secs(SECS_PAGE, replace(secs, public=replace(secs.public, **fields)))

    def set_attributes(self, flags: int) -> None:
        old = self.cpu.secs(SECS_PAGE).attributes
        self.set_secs(attributes=Attributes(flags, old.xfrm).to_bytes())

    def state(self) -> object:
        """Everything that a leaf which faults must leave alone."""
        contents = [self.cpu.read_epc(page) if entry.valid else b"" for page, entry in enumerate(self.cpu.epcm)]
        epochs = {eid: (state.epoch, state.measurement.digest()) for eid, state in self.cpu.enclaves.items()}
        threads = [(lp.registers.copy(), copy.copy(lp.active), lp.xcr0) for lp in self.cpu.logical]
        ram = [self.space.peek(BUFFERS, 4 * PAGE_SIZE), self.space.peek(HOST_DATA, PAGE_SIZE)]
        return copy.deepcopy((self.cpu.epcm, contents, epochs, threads[1:], ram))

    @contextmanager
    def faults(
        self,
        kind: type[Fault],
        rule: str,
        *,
        address: int | None = None,
        sgx: bool | None = None,
        write: bool | None = None,
    ) -> Iterator[None]:
        """The body ends in this exception, and nothing has changed."""
        before = None
        with pytest.raises(kind) as caught:
            before = self.state()
            yield
        fault = caught.value
        assert fault.rule == rule, str(fault)
        # The operands themselves are the caller's.
        assert self._without_registers(before) == self._without_registers(self.state())
        if address is not None:
            assert fault.address == address
        if sgx is not None:
            assert bool(fault.error_code & PF_SGX) is sgx
        if write is not None:
            assert bool(fault.error_code & PF_WRITE) is write
        assert self.events[-1].fault is fault or self.events == []

    @staticmethod
    def _without_registers(state: Any) -> object:
        epcm, contents, epochs, threads, _ram = state
        return epcm, contents, epochs, [(active, xcr0) for _, active, xcr0 in threads]


def a_secs(**fields: Any) -> Secs:
    """The SECS of the usual enclave."""
    usual: dict[str, Any] = {
        "size": SIZE,
        "base": BASE,
        "ssa_frame_size": 1,
        "miscselect": 1,
        "attributes": attributes(),
    }
    return Secs(**{**usual, **fields})


def attributes(extra: int = 0, *, without: int = 0, xfrm: int = 3) -> bytes:
    """ATTRIBUTES of a 64-bit enclave, 16 bytes."""
    return Attributes((ATTRIBUTE_MODE64BIT | extra) & ~without, xfrm).to_bytes()


def a_tcs(**fields: Any) -> Tcs:
    """The TCS of the usual enclave: two frames, entry at 10H, FS and GS in pages of its own."""
    usual: dict[str, Any] = {
        "ossa": SSA - BASE,
        "nssa": 2,
        "oentry": 0x10,
        "ofsbase": DATA - BASE,
        "ogsbase": MORE - BASE,
    }
    return Tcs(**{**usual, **fields})
