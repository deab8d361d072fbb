"""SDM vol. 3D, "Enclave exiting events": what an asynchronous exit saves, scrubs and reports."""

from __future__ import annotations

import pytest
from sgx_machine import AEP, CODE, DATA, MORE, SSA_PAGE, STACK, TCS, Machine, a_secs, attributes
from small_enclaves import Signers

from inclavare.sgx.codes import Enclu
from inclavare.sgx.paging import PAGE_SIZE
from inclavare.sgx.ssa import ExInfo, ExitInfo, GprSgx
from inclavare.tee.sgx_sim.processor import Kind, PageFault
from inclavare.tee.sgx_sim.processor.registers import GENERAL, RFLAGS_DF, RFLAGS_IF, RFLAGS_RF, RFLAGS_STATUS
from inclavare.tee.sgx_sim.processor.xsave import INIT_IMAGE

GPRSGX = PAGE_SIZE - 184
SECRET = 0x5EC2_E700_0000_0000


def gprsgx(machine: Machine) -> GprSgx:
    return GprSgx.from_bytes(machine.cpu.read_epc(SSA_PAGE, GPRSGX, 184))


def exinfo(machine: Machine) -> ExInfo:
    return ExInfo.from_bytes(machine.cpu.read_epc(SSA_PAGE, GPRSGX - 16, 16))


def with_secrets(machine: Machine) -> Machine:
    """Every register holds something of the enclave's own."""
    registers = machine.user.registers
    for number, name in enumerate(GENERAL):
        setattr(registers, name, SECRET + number)
    registers.rip = CODE + 0x123
    registers.rflags = 2 | RFLAGS_STATUS | RFLAGS_DF | RFLAGS_RF | RFLAGS_IF
    registers.fs_base, registers.gs_base = DATA + 0x10, MORE + 0x10
    registers.xsave = bytes(
        0xA5 if index not in range(24, 32) and index < 416 else value for index, value in enumerate(registers.xsave)
    )
    return machine


def test_state_is_saved(inside: Machine) -> None:
    with_secrets(inside)
    image = inside.user.registers.xsave
    inside.user.aex(0x20)
    saved = gprsgx(inside)
    for number, name in enumerate(GENERAL):
        assert getattr(saved, name) == SECRET + number
    assert saved.rip == CODE + 0x123
    assert saved.rflags == 2 | RFLAGS_STATUS | RFLAGS_DF | RFLAGS_RF | RFLAGS_IF
    assert (saved.fsbase, saved.gsbase) == (DATA + 0x10, MORE + 0x10)
    assert (saved.ursp, saved.urbp) == (STACK, STACK + 8)
    area = inside.cpu.read_epc(SSA_PAGE, 0, 576)
    assert area[:24] == image[:24] and area[32:416] == image[32:416]
    assert area[512:576] == (3).to_bytes(8, "little") + bytes(56)
    tcs = inside.tcs()
    assert (tcs.cssa, tcs.state) == (1, 0)


def test_synthetic_state(inside: Machine) -> None:
    """SDM table 39-1. Nothing of the enclave's is left in a register."""
    with_secrets(inside)
    inside.user.aex(0x20)
    registers = inside.user.registers
    assert not inside.user.enclave_mode
    assert (registers.rax, registers.rbx, registers.rcx) == (Enclu.ERESUME, TCS, AEP)
    assert (registers.rip, registers.rsp, registers.rbp) == (AEP, STACK, STACK + 8)
    for name in ("rdx", "rsi", "rdi", *(f"r{number}" for number in range(8, 16))):
        assert getattr(registers, name) == 0
    assert registers.rflags == 2 | RFLAGS_DF | RFLAGS_IF
    assert (registers.fs_base, registers.gs_base) == (0x111, 0x222)
    assert registers.xsave == INIT_IMAGE
    assert inside.user.xcr0 == 0x602E7


@pytest.mark.parametrize("bit", range(22))
def test_synthetic_flags(inside: Machine, bit: int) -> None:
    """CF, PF, AF, ZF, SF, OF and RF are cleared, all others stay."""
    inside.user.registers.rflags = 1 << bit
    inside.user.aex(0x20)
    # TF was saved by the opt-out entry, as zero.
    cleared = bit in (0, 2, 4, 6, 7, 8, 11, 16)
    assert inside.user.registers.rflags == (0 if cleared else 1 << bit)


def test_components_outside_of_xfrm_are_left_alone(signers: Signers) -> None:
    """They belong to the application: the enclave cannot use them."""
    machine = Machine(signers.ours).build()
    image = bytearray(INIT_IMAGE)
    image[600] = 0x11
    machine.enter()
    machine.user.registers.xsave = bytes(image)
    machine.user.aex(0x20)
    assert machine.user.registers.xsave == bytes(image)
    assert machine.cpu.read_epc(SSA_PAGE)[600] == 0
    machine.user.enclu()
    assert machine.user.registers.xsave == bytes(image)


def test_avx_state(signers: Signers) -> None:
    machine = Machine(signers.ours).build(secs=a_secs(attributes=attributes(xfrm=7)))
    machine.enter()
    image = bytearray(INIT_IMAGE)
    image[576], image[831] = 0x11, 0x22
    machine.user.registers.xsave = bytes(image)
    machine.user.aex(0x20)
    area = machine.cpu.read_epc(SSA_PAGE)
    assert (area[512], area[576], area[831]) == (4, 0x11, 0x22)
    assert machine.user.registers.xsave == INIT_IMAGE
    machine.user.enclu()
    assert machine.user.registers.xsave == bytes(image)


@pytest.mark.parametrize("vector", [0, 1, 5, 6, 13, 14, 16, 17, 19])
def test_exitinfo_of_exceptions(inside: Machine, vector: int) -> None:
    inside.user.aex(vector, 4 if vector == 14 else 0, DATA)
    assert gprsgx(inside).exit_info == ExitInfo(vector, 3, True)


def test_exitinfo_of_a_breakpoint(inside: Machine) -> None:
    inside.user.aex(3)
    assert gprsgx(inside).exit_info == ExitInfo(3, 6, True)


@pytest.mark.parametrize("vector", [2, 7, 8, 18, 0x20, 0xFD])
def test_exitinfo_of_other_events(inside: Machine, vector: int) -> None:
    """Interrupts, and exceptions that concern the operating system, are not reported; an old report is erased."""
    inside.user.aex(6)
    inside.user.enclu()
    inside.user.aex(vector)
    assert gprsgx(inside).exit_info == ExitInfo()


def test_exinfo_of_a_page_fault(inside: Machine) -> None:
    with pytest.raises(PageFault) as caught:
        inside.user.write(CODE + 0x345, b"x")
    fault = caught.value
    inside.user.aex(fault.vector, fault.error_code, fault.address)
    assert exinfo(inside) == ExInfo(CODE + 0x345, fault.error_code)
    # The operating system is told the page only.
    assert inside.user.cr2 == CODE


def test_error_code_is_zero_unless_told(inside: Machine) -> None:
    assert inside.user.cr2 == 0
    inside.user.aex(13)
    assert exinfo(inside) == ExInfo()
    assert inside.events[-1].error_code == 0


def test_cr2_of_other_exits(inside: Machine) -> None:
    inside.user.cr2 = 0x1234
    inside.user.aex(13, 0, DATA)
    assert inside.user.cr2 == 0x1234
    inside.user.enclu()
    inside.user.aex(14, 4, None)
    assert exinfo(inside) == ExInfo(0, 4)
    assert inside.user.cr2 == 0x1234


def test_exinfo_of_a_general_protection(inside: Machine) -> None:
    inside.user.aex(13, 0x18, DATA)
    assert exinfo(inside) == ExInfo(0, 0x18)


def test_exinfo_of_other_exceptions_is_left_alone(inside: Machine) -> None:
    inside.user.aex(13, 0x18)
    inside.user.enclu()
    inside.user.aex(6)
    assert exinfo(inside) == ExInfo(0, 0x18)


def test_page_fault_without_user_bit_is_not_reported(inside: Machine) -> None:
    inside.user.aex(14, 1, DATA + 4)
    assert exinfo(inside) == ExInfo()
    assert gprsgx(inside).exit_info == ExitInfo()
    assert inside.user.cr2 == DATA


@pytest.mark.parametrize("vector", [13, 14])
def test_without_exinfo_selected(signers: Signers, vector: int) -> None:
    machine = Machine(signers.ours).build(secs=a_secs(miscselect=0))
    machine.enter()
    machine.user.aex(vector, 4, DATA)
    assert gprsgx(machine).exit_info == ExitInfo()
    assert exinfo(machine) == ExInfo()
    machine.user.enclu()
    machine.user.aex(6)
    assert gprsgx(machine).exit_info == ExitInfo(6, 3, True)


def test_reserved_bytes_of_gprsgx_are_left_alone(inside: Machine) -> None:
    inside.cpu.write_epc(SSA_PAGE, b"\1\2\3\4", GPRSGX + 164)
    inside.user.aex(0x20)
    assert inside.cpu.read_epc(SSA_PAGE, GPRSGX + 164, 4) == b"\1\2\3\4"


def test_frame_is_reached_whatever_the_page_tables_say(inside: Machine) -> None:
    """Its physical address was cached at entry (38.5.3.2)."""
    inside.space.unmap(0x1000_2000)
    inside.user.registers.r14 = 14
    inside.user.aex(0x20)
    assert gprsgx(inside).r14 == 14


def test_event(inside: Machine) -> None:
    inside.user.registers.rip = CODE + 5
    inside.user.aex(14, 0x8006, MORE)
    event = inside.events[-1]
    assert (event.kind, event.name, event.rip, event.enclave, event.tcs) == (Kind.AEX, "AEX", CODE + 5, 1, TCS)
    assert (event.vector, event.error_code, event.address, event.processor) == (14, 0x8006, MORE, 1)


def test_outside_of_enclave_mode(enclave: Machine) -> None:
    with pytest.raises(ValueError, match="enclave mode"):
        enclave.user.aex(0x20)
