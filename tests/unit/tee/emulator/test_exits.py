"""Leaving an enclave: exceptions and interrupts, what they save and what they leave behind; what is illegal inside."""

from __future__ import annotations

from dataclasses import fields

import pytest
from emulated import (
    BASE,
    EXIT,
    HEAP,
    HOST_CODE,
    HOST_DATA,
    READ,
    WRITE,
    answer,
    fault,
    host,
    load,
    new_processor,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_enclaves import Signers

from inclavare.errors import ResourceError
from inclavare.sgx.paging import PAGE_SIZE
from inclavare.sgx.ssa import GPRSGX_SIZE, GprSgx
from inclavare.tee.sgx_sim.emulator import Breakpoint, DivideError, EmulatedEnclave, Reason
from inclavare.tee.sgx_sim.processor import Event, Features, GeneralProtection, InvalidOpcode, Kind, Registers

pytest.importorskip("unicorn", reason="needs the extra emulator")

SECRET = 0x1BADB002_C0DEC0DE
UD2 = bytes.fromhex("0f0b")
#: Fills every register with RSI, then faults.
FILL_AND_FAULT = (
    # movq xmm0, rsi; punpcklqdq xmm0, xmm0; movdqa xmm7, xmm0; movdqa xmm15, xmm0; movq mm3, rsi
    bytes.fromhex("66480f6ec6 660f6cc0 660f6ff8 66440f6ff8 480f6ede")
    # mov rax, rsi; mov rbx, rsi; mov rcx, rsi; mov rdx, rsi; mov rdi, rsi
    + bytes.fromhex("4889f0 4889f3 4889f1 4889f2 4889f7")
    # mov r8, rsi; … mov r15, rsi
    + bytes.fromhex("4989f0 4989f1 4989f2 4989f3 4989f4 4989f5 4989f6 4989f7")
    # std; stc
    + bytes.fromhex("fd f9")
    + UD2
)
#: rdi numbers are added up in rax, by way of memory at rsi, and the flags' carry comes along.
#: pxor xmm2, xmm2; xor eax, eax; 1: adc rax, rdi; mov [rsi], rax; movq xmm1, rax; paddq xmm2, xmm1; dec rdi; jnz 1b
#: movq rdi, xmm2; xor rdi, [rsi]
SUM = bytes.fromhex("660fefd2 31c0 4811f8 488906 66480f6ec8 660fd4d1 48ffcf 75ec 66480f7ed7 48333e") + EXIT


def test_asynchronous_exit_leaves_no_secret(signers: Signers) -> None:
    enclave = load(FILL_AND_FAULT, signers.ours)
    assert isinstance(fault(enclave.enter(rsi=SECRET)), InvalidOpcode)
    registers = enclave.machine.logical.registers
    pattern = SECRET.to_bytes(8, "little")
    for entry in fields(Registers):
        value = getattr(registers, entry.name)
        if isinstance(value, int):
            assert value != SECRET, entry.name
        else:
            assert pattern not in value
    assert registers.rflags & 0x8D5 == 0
    # What the host can then see of it with its own instructions.
    # movq rdi, xmm15; fxsave64 [rsi]
    stop = host(enclave.machine, bytes.fromhex("664c0f7eff 480fae06"), rsi=HOST_DATA)
    assert stop.fault is None
    assert enclave.machine.logical.registers.rdi != SECRET
    assert pattern not in enclave.machine.space.peek(HOST_DATA, 512)


def test_state_is_in_the_ssa_frame(signers: Signers) -> None:
    enclave = load(FILL_AND_FAULT, signers.ours)
    fault(enclave.enter(rsi=SECRET))
    page = enclave.loaded.pages[BASE + 2 * PAGE_SIZE].epc_page
    assert page is not None
    frame = enclave.machine.logical.processor.read_epc(page)
    saved = GprSgx.from_bytes(frame[-GPRSGX_SIZE:])
    assert saved.rax == saved.r15 == saved.rdi == SECRET
    assert saved.rip == BASE + len(FILL_AND_FAULT) - len(UD2)
    assert saved.rflags & 0x401 == 0x401
    assert saved.exit_info.valid
    assert saved.exit_info.vector == 6
    assert frame[160:176] == frame[160 + 7 * 16 : 176 + 7 * 16] == SECRET.to_bytes(8, "little") * 2


def test_host_continues_at_the_aep(signers: Signers) -> None:
    enclave = load(UD2, signers.ours)
    fault(enclave.enter())
    registers = enclave.machine.logical.registers
    assert (registers.rip, registers.rax, registers.rbx) == (enclave.aep, 3, enclave.tcs)


def test_resume_repeats_the_instruction_that_faulted(signers: Signers) -> None:
    enclave = load(WRITE + READ + EXIT, signers.ours)
    fault(enclave.enter(rdi=HOST_DATA, rsi=SECRET))
    enclave.machine.space.map_ram(HOST_DATA, PAGE_SIZE)
    assert answer(enclave, enclave.resume()) == SECRET


def summed(enclave: EmulatedEnclave, count: int, every: int | None) -> tuple[int, int]:
    """What SUM gives, and the instructions that it took in the enclave."""
    machine = enclave.machine
    machine.interrupt_every = every
    before = machine.enclave_instructions
    return answer(enclave, enclave.enter(rdi=count, rsi=BASE + HEAP)), machine.enclave_instructions - before


@pytest.fixture(scope="module")
def adder(signers: Signers) -> EmulatedEnclave:
    return load(SUM, signers.ours)


@given(count=st.integers(1, 12), every=st.integers(1, 60))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_interrupts_change_nothing(adder: EmulatedEnclave, count: int, every: int) -> None:
    assert summed(adder, count, every) == summed(adder, count, None)


def test_single_stepping_gives_every_instruction(adder: EmulatedEnclave) -> None:
    seen: list[Event] = []
    adder.machine.logical.processor.observers.append(seen.append)
    result, instructions = summed(adder, 3, 1)
    adder.machine.logical.processor.observers.clear()
    interrupts = [event for event in seen if event.kind is Kind.AEX]
    assert (result, instructions) == summed(adder, 3, None)
    # One after each instruction but EEXIT, which leaves by itself.
    assert len(interrupts) == instructions - 1
    assert all(event.vector == 32 for event in interrupts)
    assert interrupts[0].rip == BASE + 4


def test_interrupts_hit_enclaves_only(adder: EmulatedEnclave) -> None:
    adder.machine.interrupt_every = 1
    # inc rdi, five times
    assert host(adder.machine, bytes.fromhex("48ffc7") * 5, rdi=0).reason is Reason.REACHED
    assert adder.machine.logical.registers.rdi == 5
    adder.machine.interrupt_every = None


#: SDM vol. 3D, table 36-1.
ILLEGAL = {
    "cpuid": "0fa2",
    "getsec": "0f37",
    "rdpmc": "0f33",
    "sgdt [rdi]": "0f0107",
    "sidt [rdi]": "0f010f",
    "sldt eax": "0f00c0",
    "str eax": "0f00c8",
    "smsw eax": "0f01e0",
    "vmcall": "0f01c1",
    "vmfunc": "0f01d4",
    "in al, dx": "ec",
    "insb": "6c",
    "rep insb": "f36c",
    "outsd": "6f",
    "out dx, al": "ee",
    "int 0x80": "cd80",
    "syscall": "0f05",
    "sysenter": "0f34",
    "iretq": "48cf",
    "retf": "cb",
    "lss esp, [rdi]": "0fb227",
    "lfs eax, [rdi]": "0fb407",
    "lgs eax, [rdi]": "0fb507",
    "jmp fword ptr [rdi]": "ff2f",
    "jmp tbyte ptr [rdi]": "48ff2f",
    "call fword ptr [rdi]": "ff1f",
    "data16 call dword ptr [rdi]": "66ff1f",
    "mov ds, eax": "8ed8",
    "mov es, eax": "8ec0",
    "mov ss, eax": "8ed0",
    "mov fs, eax": "8ee0",
    "mov gs, eax": "8ee8",
    "pop fs": "0fa1",
    "pop gs": "0fa9",
    "encls": "0f01cf",
    "ud2": "0f0b",
}


@pytest.mark.parametrize("code", ILLEGAL.values(), ids=ILLEGAL.keys())
def test_illegal_instruction(signers: Signers, code: str) -> None:
    # nop, so that it does not stand where the block begins
    enclave = load(b"\x90" + bytes.fromhex(code) + EXIT, signers.ours)
    found = fault(enclave.enter(rdi=BASE + HEAP))
    assert isinstance(found, InvalidOpcode)
    assert not enclave.machine.logical.enclave_mode


PRIVILEGED = {
    "hlt": "f4",
    "cli": "fa",
    "wbinvd": "0f09",
    "invd": "0f08",
    "mov rax, cr0": "0f20c0",
    "mov dr7, rax": "0f23f8",
    "rdmsr": "0f32",
    "in al, dx": "ec",
}


@pytest.mark.parametrize("code", PRIVILEGED.values(), ids=PRIVILEGED.keys())
def test_privileged_instruction_of_the_host(signers: Signers, code: str) -> None:
    enclave = load(EXIT, signers.ours)
    assert isinstance(fault(host(enclave.machine, bytes.fromhex(code))), GeneralProtection)


@pytest.mark.parametrize("code", ["f4", "0f09", "0f20c0", "0f32"], ids=["hlt", "wbinvd", "mov rax, cr0", "rdmsr"])
def test_privileged_instruction_in_an_enclave(signers: Signers, code: str) -> None:
    assert isinstance(fault(load(bytes.fromhex(code), signers.ours).enter()), GeneralProtection)


@pytest.mark.parametrize("code", ["0f31", "0f01f9"], ids=["rdtsc", "rdtscp"])
def test_time_stamp_counter_needs_sgx2(signers: Signers, code: str) -> None:
    program = (
        bytes.fromhex("4989c8") + bytes.fromhex(code) + bytes.fromhex("4c89c1") + EXIT
    )  # mov r8, rcx; …; mov rcx, r8
    sgx1 = load(program, signers.ours, processor=new_processor(features=Features(sgx2=False)))
    assert fault(sgx1.enter()).rule == "illegal-in-enclave"
    sgx2 = load(program, signers.ours)
    assert sgx2.enter().reason is Reason.REACHED


def test_enclave_cannot_enter_an_enclave(signers: Signers) -> None:
    # mov eax, 2; enclu
    found = fault(load(bytes.fromhex("b802000000 0f01d7"), signers.ours).enter())
    assert isinstance(found, GeneralProtection)
    assert found.rule == "enclu.mode"


def test_host_cannot_leave_an_enclave_that_it_is_not_in(signers: Signers) -> None:
    enclave = load(EXIT, signers.ours)
    assert fault(host(enclave.machine, EXIT, rcx=HOST_CODE)).rule == "enclu.mode"


def test_host_has_no_encls(signers: Signers) -> None:
    found = fault(host(load(EXIT, signers.ours).machine, bytes.fromhex("0f01cf"), rax=0))
    assert isinstance(found, InvalidOpcode)
    assert found.rule == "encls.cpl"


def test_prefix_makes_enclu_invalid(signers: Signers) -> None:
    # mov rbx, rcx; mov eax, 4; repe enclu
    found = fault(load(bytes.fromhex("4889cb b804000000 f30f01d7"), signers.ours).enter())
    assert isinstance(found, InvalidOpcode)


def test_divide_error(signers: Signers) -> None:
    # xor ecx, ecx; div ecx
    enclave = load(bytes.fromhex("31c9 f7f1"), signers.ours)
    assert isinstance(fault(enclave.enter()), DivideError)
    page = enclave.loaded.pages[BASE + 2 * PAGE_SIZE].epc_page
    assert page is not None
    saved = GprSgx.from_bytes(enclave.machine.logical.processor.read_epc(page)[-GPRSGX_SIZE:])
    assert (saved.rip, saved.exit_info.vector) == (BASE + 2, 0)


def test_breakpoint(signers: Signers) -> None:
    # nop; int3
    assert isinstance(fault(load(bytes.fromhex("90cc"), signers.ours).enter()), Breakpoint)


def test_system_call_of_the_host(signers: Signers) -> None:
    machine = load(EXIT, signers.ours).machine
    # nop; syscall; inc rdi
    stop = host(machine, bytes.fromhex("90 0f05 48ffc7"), rdi=1)
    assert stop.reason is Reason.SYSTEM_CALL
    assert machine.logical.registers.rip == HOST_CODE + 3
    assert machine.run(HOST_CODE + 6).reason is Reason.REACHED
    assert machine.logical.registers.rdi == 2


def test_endless_loop_ends(signers: Signers) -> None:
    # 1: jmp 1b
    enclave = load(bytes.fromhex("ebfe"), signers.ours, budget=5000)
    with pytest.raises(ResourceError) as caught:
        enclave.enter()
    assert caught.value.id == "tee.emulator.budget"
    assert enclave.machine.instructions == 5000


def test_endless_stream_of_exits_ends(signers: Signers) -> None:
    """A handler that claims to have repaired what it did not: each attempt counts."""
    enclave = load(UD2, signers.ours, budget=500)
    enclave.machine.handler = lambda _fault: True
    with pytest.raises(ResourceError):
        enclave.enter()


def test_enclave_cannot_switch_interrupts_off(signers: Signers) -> None:
    # lea rsp, [rdi + 0xff8]; push 0; popfq
    enclave = load(bytes.fromhex("488da7f80f0000 6a00 9d") + EXIT, signers.ours)
    answer(enclave, enclave.enter(rdi=BASE + HEAP))
    assert enclave.machine.logical.registers.rflags & 0x200


def test_stack_pointers_of_both_sides(signers: Signers) -> None:
    """An enclave starts with the host's RSP; pushing there writes ordinary memory."""
    # push rsi; pop rdi; mov rdi, rsp
    enclave = load(bytes.fromhex("56 5f 4889e7") + EXIT, signers.ours)
    assert answer(enclave, enclave.enter(rsi=SECRET)) == enclave.request_address
    assert enclave.machine.space.peek(enclave.request_address - 8, 8) == SECRET.to_bytes(8, "little")
