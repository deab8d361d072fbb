"""SDM vol. 3D, EENTER, EEXIT, ERESUME and EDECCSSA."""

from __future__ import annotations

from typing import Any

import pytest
from sgx_machine import (
    AEP,
    BASE,
    CODE,
    DATA,
    HOST_CODE,
    MORE,
    NON_CANONICAL,
    SECS_PAGE,
    SOURCE,
    SPARE,
    SSA,
    SSA2_PAGE,
    SSA_PAGE,
    STACK,
    TCS,
    TCS_PAGE,
    VA_PAGE,
    Machine,
    a_secs,
    a_tcs,
    attributes,
    epc,
)
from small_enclaves import Signers

from inclavare.sgx.codes import Enclu
from inclavare.sgx.paging import PAGE_SIZE, PT_REG, PT_TCS, PT_TRIM
from inclavare.sgx.ssa import GprSgx
from inclavare.sgx.structs import ATTRIBUTE_AEXNOTIFY, ATTRIBUTE_INIT, ATTRIBUTE_MODE64BIT
from inclavare.tee.sgx_sim.processor import Access, GeneralProtection, Kind, PageFault, Registers
from inclavare.tee.sgx_sim.processor.registers import (
    RFLAGS_AC,
    RFLAGS_CF,
    RFLAGS_DF,
    RFLAGS_IF,
    RFLAGS_IOPL,
    RFLAGS_NT,
    RFLAGS_OF,
    RFLAGS_TF,
    RFLAGS_ZF,
)

GPRSGX = PAGE_SIZE - 184
ENTRIES = [Enclu.EENTER, Enclu.ERESUME]


def gprsgx(machine: Machine, page: int = SSA_PAGE) -> GprSgx:
    return GprSgx.from_bytes(machine.cpu.read_epc(page, GPRSGX, 184))


def poke_gprsgx(machine: Machine, name: str, value: int, page: int = SSA_PAGE, size: int = 8) -> None:
    at = GPRSGX + GprSgx.LAYOUT.offsets[name]
    machine.cpu.write_epc(page, value.to_bytes(size, "little"), at)


def interrupted(machine: Machine) -> Machine:
    """A thread with one frame in use, whose registers are what AEX leaves."""
    machine.enter()
    machine.user.registers.rip = CODE + 0x20
    machine.user.aex(0x20)
    return machine


def ready(machine: Machine, leaf: Enclu) -> str:
    """The thread is so that the leaf would succeed."""
    if leaf is Enclu.ERESUME:
        interrupted(machine)
    return leaf.name.lower()


def attempt(machine: Machine, leaf: Enclu, rbx: int = TCS, rcx: int = AEP) -> None:
    machine.enclu(leaf, rbx, rcx)


# --- EENTER -----------------------------------------------------------------------------------------------------


def test_eenter(enclave: Machine) -> None:
    user = enclave.user
    user.registers = Registers(
        rax=Enclu.EENTER,
        rbx=TCS,
        rcx=AEP,
        rdx=0xD,
        rsi=0x51,
        rdi=0xD1,
        r8=8,
        r15=15,
        rsp=STACK,
        rbp=STACK + 8,
        rip=HOST_CODE,
        rflags=0x8D7,
        fs_base=0x111,
        gs_base=0x222,
    )
    poke_gprsgx(enclave, "exitinfo", 0x8000_0306, size=4)
    user.enclu()
    registers = user.registers
    assert (registers.rip, registers.rcx, registers.rax) == (CODE + 0x10, HOST_CODE + 3, 0)
    # Arguments pass in the other registers.
    assert (registers.rbx, registers.rdx, registers.rsi, registers.rdi) == (TCS, 0xD, 0x51, 0xD1)
    assert (registers.r8, registers.r15, registers.rsp, registers.rbp) == (8, 15, STACK, STACK + 8)
    assert (registers.fs_base, registers.gs_base) == (DATA, MORE)
    assert registers.rflags == 0x8D7
    assert user.enclave_mode
    assert (user.elrange.start, user.elrange.stop) == (BASE, BASE + 16 * PAGE_SIZE)
    assert user.xcr0 == 3
    tcs = enclave.tcs()
    assert (tcs.state, tcs.aep, tcs.cssa) == (1, AEP, 0)
    saved = gprsgx(enclave)
    assert (saved.ursp, saved.urbp, saved.exitinfo) == (STACK, STACK + 8, 0x8000_0306)
    active = user.active
    assert active is not None
    assert (active.secs_page, active.tcs_page, active.tcs_linear) == (SECS_PAGE, TCS_PAGE, TCS)
    assert (active.gprsgx, active.xsave_pages) == ((SSA_PAGE, GPRSGX), (SSA_PAGE,))
    event = enclave.events[-1]
    assert (event.kind, event.enclave, event.tcs, event.rip) == (Kind.ENTRY, 1, TCS, HOST_CODE)


def test_eenter_uses_the_next_frame(enclave: Machine) -> None:
    interrupted(enclave)
    enclave.enter()
    assert enclave.user.registers.rax == 1
    active = enclave.user.active
    assert active is not None and active.gprsgx == (SSA2_PAGE, GPRSGX)
    assert enclave.tcs().cssa == 1


def test_eenter_without_a_free_frame(enclave: Machine) -> None:
    interrupted(enclave)
    interrupted(enclave)
    assert enclave.tcs().cssa == 2
    with enclave.faults(GeneralProtection, "eenter.cssa"):
        attempt(enclave, Enclu.EENTER)


@pytest.mark.parametrize("oentry", [1 << 47, NON_CANONICAL])
def test_eenter_oentry(enclave: Machine, oentry: int) -> None:
    enclave.set_tcs(oentry=oentry)
    with enclave.faults(GeneralProtection, "eenter.oentry"):
        attempt(enclave, Enclu.EENTER)


def test_eenter_oentry_wraps_around(enclave: Machine) -> None:
    enclave.set_tcs(oentry=(1 << 64) - BASE + 0x1000)
    enclave.enter()
    assert enclave.user.registers.rip == 0x1000


@pytest.mark.parametrize(("rule", "fields"), [("fsbase", {"ofsbase": 1 << 48}), ("gsbase", {"ogsbase": 1 << 48})])
def test_eenter_segments(enclave: Machine, rule: str, fields: dict[str, int]) -> None:
    enclave.set_tcs(**fields)
    with enclave.faults(GeneralProtection, f"eenter.{rule}"):
        attempt(enclave, Enclu.EENTER)


def test_eenter_trap_flag(enclave: Machine) -> None:
    """An opt-out entry hides the enclave from a single-stepping debugger, and EEXIT gives TF back."""
    enclave.user.registers = Registers(rax=2, rbx=TCS, rcx=AEP, rip=HOST_CODE, rflags=2 | RFLAGS_TF)
    enclave.user.enclu()
    assert enclave.user.registers.rflags == 2
    attempt(enclave, Enclu.EEXIT, HOST_CODE)
    assert enclave.user.registers.rflags == 2 | RFLAGS_TF
    attempt(enclave, Enclu.EENTER)
    enclave.user.aex(0x20)
    assert enclave.user.registers.rflags == 2 | RFLAGS_TF


def test_eenter_trap_flag_of_a_debugged_thread(enclave: Machine) -> None:
    enclave.set_tcs(flags=1)
    enclave.user.registers = Registers(rax=2, rbx=TCS, rcx=AEP, rip=HOST_CODE, rflags=2 | RFLAGS_TF)
    enclave.user.enclu()
    assert enclave.user.registers.rflags == 2 | RFLAGS_TF
    active = enclave.user.active
    assert active is not None and active.dbgoptin
    enclave.user.registers.rflags = 2
    attempt(enclave, Enclu.EEXIT, HOST_CODE)
    assert enclave.user.registers.rflags == 2


def test_two_threads_of_an_enclave(enclave: Machine) -> None:
    """Another TCS can be entered, the same cannot."""
    enclave.enter()
    other = enclave.another()
    with enclave.faults(GeneralProtection, "eenter.active"):
        enclave.enter(other)


# --- what EENTER and ERESUME have in common ---------------------------------------------------------------------


@pytest.mark.parametrize("leaf", ENTRIES)
class TestEntry:
    def test_operands(self, enclave: Machine, leaf: Enclu) -> None:
        name = ready(enclave, leaf)
        for rule, rbx, rcx in (
            ("tcs", TCS + 2048, AEP),
            ("tcs", NON_CANONICAL, AEP),
            ("aep", TCS, NON_CANONICAL),
            ("aep", TCS, 1 << 47),
        ):
            with enclave.faults(GeneralProtection, f"{name}.{rule}"):
                attempt(enclave, leaf, rbx, rcx)
        with enclave.faults(PageFault, f"{name}.tcs", address=SOURCE, sgx=True):
            attempt(enclave, leaf, SOURCE)

    def test_tcs_must_be_writable(self, enclave: Machine, leaf: Enclu) -> None:
        ready(enclave, leaf)
        enclave.space.protect(TCS, writable=False, executable=False)
        with enclave.faults(PageFault, "paging.writable", address=TCS, sgx=False):
            attempt(enclave, leaf)

    def test_concurrency(self, enclave: Machine, leaf: Enclu) -> None:
        name = ready(enclave, leaf)
        locks = enclave.cpu.locks
        with locks.held(TCS_PAGE, Access.EXCLUSIVE), enclave.faults(GeneralProtection, f"{name}.conflict"):
            attempt(enclave, leaf)
        with locks.held(TCS_PAGE, Access.SHARED):
            attempt(enclave, leaf)

    @pytest.mark.parametrize(
        ("rule", "fields"),
        [
            ("tcs-valid", {"valid": False}),
            ("tcs-blocked", {"blocked": True}),
            ("tcs-page", {"enclave_address": SPARE}),
            ("tcs-page", {"pt": PT_REG}),
            ("tcs-page", {"pt": PT_TRIM}),
            ("tcs-state", {"pending": True}),
            ("tcs-state", {"modified": True}),
        ],
    )
    def test_tcs_page(self, enclave: Machine, leaf: Enclu, rule: str, fields: dict[str, Any]) -> None:
        name = ready(enclave, leaf)
        enclave.change(TCS_PAGE, **fields)
        with enclave.faults(PageFault, f"{name}.{rule}", address=TCS, sgx=True, write=False):
            attempt(enclave, leaf)

    def test_tcs_at_another_address(self, enclave: Machine, leaf: Enclu) -> None:
        name = ready(enclave, leaf)
        enclave.space.map_epc(SPARE, TCS_PAGE, writable=True, executable=False)
        with enclave.faults(PageFault, f"{name}.tcs-page", address=SPARE, sgx=True):
            attempt(enclave, leaf, SPARE)

    @pytest.mark.parametrize(
        ("rule", "fields"),
        [
            ("ossa", {"ossa": SSA - BASE + 2048}),
            ("ofsbase", {"ofsbase": 2048}),
            ("ogsbase", {"ogsbase": 2048}),
            ("flags", {"flags": 1 << 2}),
            ("flags", {"flags": 1 << 63}),
            ("active", {"state": 1}),
            ("aexnotify", {"flags": 2}),
        ],
    )
    def test_tcs(self, enclave: Machine, leaf: Enclu, rule: str, fields: dict[str, int]) -> None:
        name = ready(enclave, leaf)
        enclave.set_tcs(**fields)
        with enclave.faults(GeneralProtection, f"{name}.{rule}"):
            attempt(enclave, leaf)

    def test_enclave_is_not_initialised(self, enclave: Machine, leaf: Enclu) -> None:
        name = ready(enclave, leaf)
        enclave.set_attributes(ATTRIBUTE_MODE64BIT)
        with enclave.faults(GeneralProtection, f"{name}.initialised"):
            attempt(enclave, leaf)

    def test_32_bit_enclave(self, enclave: Machine, leaf: Enclu) -> None:
        name = ready(enclave, leaf)
        enclave.set_attributes(ATTRIBUTE_INIT)
        with enclave.faults(GeneralProtection, f"{name}.mode64"):
            attempt(enclave, leaf)

    def test_aexnotify_of_the_enclave(self, enclave: Machine, leaf: Enclu) -> None:
        """SECS and TCS must agree, unless the thread is debugged."""
        name = ready(enclave, leaf)
        enclave.set_attributes(ATTRIBUTE_MODE64BIT | ATTRIBUTE_INIT | ATTRIBUTE_AEXNOTIFY)
        with enclave.faults(GeneralProtection, f"{name}.aexnotify"):
            attempt(enclave, leaf)
        enclave.set_tcs(flags=1)
        attempt(enclave, leaf)

    def test_osfxsr(self, enclave: Machine, leaf: Enclu) -> None:
        name = ready(enclave, leaf)
        enclave.user.cr4_osfxsr = False
        with enclave.faults(GeneralProtection, f"{name}.osfxsr"):
            attempt(enclave, leaf)

    def test_xfrm(self, signers: Signers, leaf: Enclu) -> None:
        machine = Machine(signers.ours).build(secs=a_secs(attributes=attributes(xfrm=7)))
        name = ready(machine, leaf)
        machine.user.xcr0 = 3
        with machine.faults(GeneralProtection, f"{name}.xfrm"):
            attempt(machine, leaf)
        machine.user.xcr0 = 7
        machine.user.cr4_osxsave = False
        with machine.faults(GeneralProtection, f"{name}.xfrm"):
            attempt(machine, leaf)
        machine.user.cr4_osxsave = True
        attempt(machine, leaf)

    def test_xfrm_without_osxsave(self, enclave: Machine, leaf: Enclu) -> None:
        ready(enclave, leaf)
        enclave.user.cr4_osxsave = False
        attempt(enclave, leaf)

    @pytest.mark.parametrize(
        ("rule", "fields"),
        [
            ("epcm.valid", {"valid": False}),
            ("epcm.blocked", {"blocked": True}),
            ("epcm.pending", {"pending": True}),
            ("epcm.modified", {"modified": True}),
            ("epcm.enclaveaddress", {"enclave_address": SPARE}),
            ("epcm.pt", {"pt": PT_TCS}),
            ("epcm.enclavesecs", {"enclave_secs": 12}),
            ("epcm.r", {"r": False}),
            ("epcm.w", {"w": False}),
        ],
    )
    def test_ssa_page(self, enclave: Machine, leaf: Enclu, rule: str, fields: dict[str, Any]) -> None:
        ready(enclave, leaf)
        if leaf is Enclu.EENTER:
            enclave.change(SSA2_PAGE, **fields)
        enclave.change(SSA_PAGE, **fields)
        with enclave.faults(PageFault, rule, address=SSA, sgx=True, write=True):
            attempt(enclave, leaf)

    def test_ssa_that_is_not_epc(self, enclave: Machine, leaf: Enclu) -> None:
        ready(enclave, leaf)
        enclave.space.map_ram(SSA, PAGE_SIZE)
        with enclave.faults(PageFault, "ssa.epc", address=SSA, sgx=True):
            attempt(enclave, leaf)
        enclave.space.map_epc(SSA, SSA_PAGE, writable=False, executable=False)
        with enclave.faults(PageFault, "paging.writable", address=SSA, sgx=False):
            attempt(enclave, leaf)

    def test_ssa_wraps_around(self, enclave: Machine, leaf: Enclu) -> None:
        ready(enclave, leaf)
        enclave.set_tcs(ossa=(1 << 64) - BASE + 0x1000)
        with enclave.faults(PageFault, "paging.present", address=0x1000):
            attempt(enclave, leaf)

    def test_ssa_outside_of_the_enclave(self, enclave: Machine, leaf: Enclu) -> None:
        ready(enclave, leaf)
        enclave.set_tcs(ossa=0x100000)
        with enclave.faults(PageFault, "paging.present", address=BASE + 0x100000):
            attempt(enclave, leaf)


def test_large_frames(signers: Signers) -> None:
    """A frame of three pages: the XSAVE area fills the first ones, GPRSGX ends the last one."""
    machine = Machine(signers.ours)
    machine.ecreate(a_secs(attributes=attributes(xfrm=0x600E7), ssa_frame_size=4))
    machine.eadd(TCS, TCS_PAGE, PT_TCS, a_tcs(nssa=1, ossa=0x4000).to_bytes())
    machine.space.map_epc(TCS, TCS_PAGE, writable=True, executable=False)
    frame = [BASE + 0x4000 + number * PAGE_SIZE for number in range(4)]
    for number, linear in enumerate(frame):
        machine.eadd(linear, 8 + number)
        machine.space.map_epc(linear, 8 + number, writable=True, executable=False)
    assert machine.einit().rax == 0
    machine.enter()
    active = machine.user.active
    assert active is not None
    assert (active.xsave_pages, active.gprsgx) == ((8, 9, 10), (11, GPRSGX))
    image = bytearray(machine.user.registers.xsave)
    image[2816 + 5000] = 0x77
    machine.user.registers.xsave = bytes(image)
    machine.user.aex(0x20)
    assert machine.cpu.read_epc(9)[2816 + 5000 - PAGE_SIZE] == 0x77
    assert machine.user.registers.xsave[2816 + 5000] == 0
    machine.user.enclu()
    assert machine.user.registers.xsave[2816 + 5000] == 0x77
    machine.user.aex(0x20)
    machine.change(10, w=False)
    with machine.faults(PageFault, "epcm.w", address=frame[2]):
        attempt(machine, Enclu.ERESUME)
    machine.change(10, w=True)
    machine.change(11, r=False)
    with machine.faults(PageFault, "epcm.r", address=frame[3] + GPRSGX):
        attempt(machine, Enclu.ERESUME)


# --- EEXIT ------------------------------------------------------------------------------------------------------


def test_eexit(inside: Machine) -> None:
    registers = inside.user.registers
    registers.r9 = 99
    registers.rflags = 0x8D7
    registers.rsp, registers.rbp = STACK + 0x10, 0
    xsave = registers.xsave
    attempt(inside, Enclu.EEXIT, HOST_CODE + 0x40, 0)
    assert not inside.user.enclave_mode
    assert (registers.rip, registers.rcx, registers.rax) == (HOST_CODE + 0x40, AEP, Enclu.EEXIT)
    # Registers are the enclave's to clean.
    assert (registers.r9, registers.rflags, registers.rsp, registers.xsave) == (99, 0x8D7, STACK + 0x10, xsave)
    assert (registers.fs_base, registers.gs_base) == (0x111, 0x222)
    assert inside.user.xcr0 == 0x602E7
    tcs = inside.tcs()
    assert (tcs.state, tcs.cssa, tcs.aep) == (0, 0, AEP)
    assert inside.events[-1].kind is Kind.EXIT
    assert inside.events[-1].enclave == 1
    inside.enter()


def test_eexit_target(inside: Machine) -> None:
    for target in (NON_CANONICAL, 1 << 47):
        with inside.faults(GeneralProtection, "eexit.target"):
            attempt(inside, Enclu.EEXIT, target)


# --- ERESUME ----------------------------------------------------------------------------------------------------


def test_eresume(enclave: Machine) -> None:
    enclave.enter()
    registers = enclave.user.registers
    for number, name in enumerate(("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r15")):
        setattr(registers, name, 0x1000 + number)
    registers.rsp, registers.rbp = DATA + 0x100, DATA + 0x200
    registers.rip, registers.rflags = CODE + 0x44, 2 | RFLAGS_CF | RFLAGS_DF | RFLAGS_NT | RFLAGS_AC
    registers.fs_base, registers.gs_base = DATA + 8, MORE + 8
    image = bytearray(registers.xsave)
    image[200] = 0xAB
    registers.xsave = bytes(image)
    before = registers.copy()
    enclave.user.aex(0x20)
    enclave.user.registers.fs_base = 0x333
    enclave.user.registers.rsp = STACK - 0x40
    enclave.user.registers.rflags = 2 | RFLAGS_ZF | RFLAGS_IF | RFLAGS_OF
    enclave.user.enclu()
    after = enclave.user.registers
    assert after.rflags == 2 | RFLAGS_CF | RFLAGS_DF | RFLAGS_NT | RFLAGS_AC | RFLAGS_IF
    after.rflags = before.rflags
    assert after == before
    tcs = enclave.tcs()
    assert (tcs.state, tcs.cssa, tcs.aep) == (1, 0, AEP)
    active = enclave.user.active
    assert active is not None
    assert (active.saved_fs_base, active.gprsgx) == (0x333, (SSA_PAGE, GPRSGX))
    assert enclave.user.xcr0 == 3
    assert enclave.events[-1].kind is Kind.RESUME
    # The outside's stack pointer is the one of EENTER: ERESUME does not save it again.
    enclave.user.aex(0x20)
    assert enclave.user.registers.rsp == STACK
    assert enclave.user.registers.fs_base == 0x333


def test_eresume_with_another_aep(enclave: Machine) -> None:
    interrupted(enclave)
    attempt(enclave, Enclu.ERESUME, TCS, AEP + 0x10)
    assert enclave.tcs().aep == AEP + 0x10


@pytest.mark.parametrize("bit", range(22))
def test_eresume_flags(enclave: Machine, bit: int) -> None:
    """CF, PF, AF, ZF, SF, DF, OF, NT, RF, AC and ID come from the frame; the others are the application's."""
    from_the_frame = bit in (0, 2, 4, 6, 7, 10, 11, 14, 16, 18, 21)
    interrupted(enclave)
    poke_gprsgx(enclave, "rflags", 1 << bit)
    enclave.user.registers.rflags = 0
    attempt(enclave, Enclu.ERESUME)
    assert enclave.user.registers.rflags == (1 << bit if from_the_frame else 0)
    enclave.user.aex(0x20)
    poke_gprsgx(enclave, "rflags", 0)
    enclave.user.registers.rflags = 1 << bit
    attempt(enclave, Enclu.ERESUME)
    # TF is cleared on an opt-out entry.
    assert enclave.user.registers.rflags == (0 if from_the_frame or bit == 8 else 1 << bit)


def test_eresume_interrupt_flag(enclave: Machine) -> None:
    """IF comes from the frame only if IOPL is 3."""
    interrupted(enclave)
    enclave.user.registers.rflags = 2 | RFLAGS_IF | RFLAGS_IOPL
    poke_gprsgx(enclave, "rflags", 2)
    attempt(enclave, Enclu.ERESUME)
    assert enclave.user.registers.rflags == 2 | RFLAGS_IOPL
    enclave.user.aex(0x20)
    enclave.user.registers.rflags = 2 | RFLAGS_IF | 1 << 12
    attempt(enclave, Enclu.ERESUME)
    assert enclave.user.registers.rflags & RFLAGS_IF


def test_eresume_trap_flag(enclave: Machine) -> None:
    interrupted(enclave)
    poke_gprsgx(enclave, "rflags", 2 | RFLAGS_TF)
    enclave.user.registers.rflags = 2 | RFLAGS_TF
    attempt(enclave, Enclu.ERESUME)
    assert not enclave.user.registers.rflags & RFLAGS_TF
    attempt(enclave, Enclu.EEXIT, HOST_CODE)
    assert enclave.user.registers.rflags & RFLAGS_TF


def test_eresume_without_a_frame(enclave: Machine) -> None:
    with enclave.faults(GeneralProtection, "eresume.cssa"):
        attempt(enclave, Enclu.ERESUME)


@pytest.mark.parametrize(("rule", "field"), [("target", "rip"), ("fsbase", "fsbase"), ("gsbase", "gsbase")])
def test_eresume_addresses(enclave: Machine, rule: str, field: str) -> None:
    interrupted(enclave)
    poke_gprsgx(enclave, field, NON_CANONICAL)
    with enclave.faults(GeneralProtection, f"eresume.{rule}"):
        attempt(enclave, Enclu.ERESUME)


@pytest.mark.parametrize(
    ("rule", "offset", "data"),
    [
        ("xrstor.xstate_bv", 512, b"\x04"),
        ("xrstor.xstate_bv", 519, b"\x80"),
        ("xrstor.header", 520, b"\x01"),
        ("xrstor.header", 527, b"\x80"),
        ("xrstor.header", 528, b"\x01"),
        ("xrstor.header", 575, b"\x01"),
        ("xrstor.mxcsr", 26, b"\x01"),
    ],
)
def test_eresume_xrstor(enclave: Machine, rule: str, offset: int, data: bytes) -> None:
    interrupted(enclave)
    enclave.cpu.write_epc(SSA_PAGE, data, offset)
    with enclave.faults(GeneralProtection, rule):
        attempt(enclave, Enclu.ERESUME)
    assert enclave.tcs().state == 0


def test_eresume_takes_initialised_components_as_such(enclave: Machine) -> None:
    """What XSTATE_BV does not name is initialised, whatever lies in the area."""
    interrupted(enclave)
    enclave.cpu.write_epc(SSA_PAGE, b"\x55" * 16, 160)
    attempt(enclave, Enclu.ERESUME)
    assert enclave.user.registers.xsave[160:176] == bytes(16)


def test_eresume_reserved_bytes_of_gprsgx(enclave: Machine) -> None:
    """Enclave software may write there; nobody looks."""
    interrupted(enclave)
    enclave.cpu.write_epc(SSA_PAGE, b"\xff\xff\xff", GPRSGX + 164)
    attempt(enclave, Enclu.ERESUME)
    assert enclave.user.registers.rip == CODE + 0x20


def test_nested_frames(enclave: Machine) -> None:
    """An exception handler runs in the second frame; the frames come back in reverse order."""
    enclave.enter()
    enclave.user.registers.r12 = 1
    enclave.user.aex(6)
    enclave.enter()
    enclave.user.registers.r12 = 2
    enclave.user.aex(0x20)
    assert enclave.tcs().cssa == 2
    enclave.user.enclu()
    assert (enclave.user.registers.r12, enclave.tcs().cssa) == (2, 1)
    attempt(enclave, Enclu.EEXIT, HOST_CODE)
    attempt(enclave, Enclu.ERESUME)
    assert (enclave.user.registers.r12, enclave.tcs().cssa) == (1, 0)


# --- AEX-Notify and EDECCSSA ------------------------------------------------------------------------------------


@pytest.fixture
def notified(signers: Signers) -> Machine:
    """An interrupted thread that wants to be told: TCS.FLAGS.AEXNOTIFY, and bit 0 of GPRSGX.AEXNOTIFY."""
    machine = Machine(signers.ours).build(a_tcs(flags=2), a_secs(attributes=attributes(ATTRIBUTE_AEXNOTIFY)))
    interrupted(machine)
    poke_gprsgx(machine, "aexnotify", 1, size=1)
    machine.user.registers.rip = AEP
    return machine


def test_eresume_notifies(notified: Machine) -> None:
    registers = notified.user.registers
    registers.rsp, registers.rbp = STACK + 0x100, STACK + 0x108
    attempt(notified, Enclu.ERESUME)
    assert (registers.rip, registers.rax, registers.rcx) == (CODE + 0x10, 1, AEP + 3)
    assert (registers.fs_base, registers.gs_base) == (DATA, MORE)
    tcs = notified.tcs()
    assert (tcs.cssa, tcs.state) == (1, 1)
    saved = gprsgx(notified, SSA2_PAGE)
    assert (saved.ursp, saved.urbp) == (STACK + 0x100, STACK + 0x108)
    active = notified.user.active
    assert active is not None and active.gprsgx == (SSA2_PAGE, GPRSGX)


def test_eresume_notifies_only_who_asked(notified: Machine) -> None:
    poke_gprsgx(notified, "aexnotify", 2, size=1)
    attempt(notified, Enclu.ERESUME)
    assert notified.user.registers.rip == CODE + 0x20
    assert notified.tcs().cssa == 0


def test_eresume_needs_the_tcs_flag_to_notify(enclave: Machine) -> None:
    interrupted(enclave)
    poke_gprsgx(enclave, "aexnotify", 1, size=1)
    attempt(enclave, Enclu.ERESUME)
    assert enclave.user.registers.rip == CODE + 0x20


def test_eresume_notifies_if_there_is_a_frame(notified: Machine) -> None:
    notified.set_tcs(nssa=1)
    with notified.faults(GeneralProtection, "eresume.nssa"):
        attempt(notified, Enclu.ERESUME)
    notified.set_tcs(nssa=2)
    notified.change(SSA2_PAGE, w=False)
    with notified.faults(PageFault, "epcm.w", address=SSA + PAGE_SIZE):
        attempt(notified, Enclu.ERESUME)


@pytest.mark.parametrize(
    ("rule", "fields"),
    [("target", {"oentry": 1 << 47}), ("fsbase", {"ofsbase": 1 << 48}), ("gsbase", {"ogsbase": 1 << 48})],
)
def test_eresume_notify_addresses(notified: Machine, rule: str, fields: dict[str, int]) -> None:
    notified.set_tcs(**fields)
    with notified.faults(GeneralProtection, f"eresume.{rule}"):
        attempt(notified, Enclu.ERESUME)


def test_aex_keeps_aexnotify(notified: Machine) -> None:
    attempt(notified, Enclu.ERESUME)
    attempt(notified, Enclu.EDECCSSA)
    notified.user.aex(0x20)
    assert gprsgx(notified).aexnotify == 1
    assert notified.tcs().cssa == 1


def test_edeccssa(notified: Machine) -> None:
    """The handler goes back to the interrupted frame, without leaving the enclave."""
    attempt(notified, Enclu.ERESUME)
    notified.user.registers.rip = CODE + 0x80
    before = notified.user.registers.rflags
    attempt(notified, Enclu.EDECCSSA)
    assert notified.tcs().cssa == 0
    active = notified.user.active
    assert active is not None
    assert (active.gprsgx, active.xsave_pages) == ((SSA_PAGE, GPRSGX), (SSA_PAGE,))
    registers = notified.user.registers
    assert (registers.rip, registers.rax, registers.rflags) == (CODE + 0x83, Enclu.EDECCSSA, before)
    notified.user.aex(0x20)
    assert gprsgx(notified).rip == CODE + 0x83


def test_edeccssa_without_a_frame_before(inside: Machine) -> None:
    with inside.faults(GeneralProtection, "edeccssa.cssa"):
        attempt(inside, Enclu.EDECCSSA)


def test_edeccssa_checks_the_frame(notified: Machine) -> None:
    attempt(notified, Enclu.ERESUME)
    notified.change(SSA_PAGE, blocked=True)
    with notified.faults(PageFault, "epcm.blocked", address=SSA):
        attempt(notified, Enclu.EDECCSSA)


def test_the_va_page_is_no_tcs(enclave: Machine) -> None:
    with enclave.faults(PageFault, "eenter.tcs-page", address=epc(VA_PAGE)):
        attempt(enclave, Enclu.EENTER, epc(VA_PAGE))
