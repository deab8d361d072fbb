"""Enclaves and host code for tests that execute real instructions. Comments are what the bytes say, for GNU as."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric import rsa
from small_enclaves import sign_image, small_image

from inclavare.sgx.keys import RootKeys
from inclavare.sgx.paging import PAGE_SIZE
from inclavare.tee.sgx_sim.emulator import EmulatedEnclave, Machine, Reason, Stop
from inclavare.tee.sgx_sim.processor import Fault, Features, Processor

ROOTS = RootKeys(bytes(range(16)), bytes(range(16, 32)), bytes(range(32, 48)), bytes((2, 2, 1)) + bytes(13))
OTHER_ROOTS = RootKeys(bytes(range(1, 17)), bytes(range(17, 33)), bytes(range(33, 49)), bytes((2, 2, 1)) + bytes(13))

BASE = 0x2000_0000
#: Offsets in an enclave of ``small_image``.
HEAP = 3 * PAGE_SIZE
HEAP_PAGES = 4
HOST_CODE, HOST_DATA = 0x40_0000, 0x50_0000

#: mov rbx, rcx; mov eax, 4; enclu
EXIT = bytes.fromhex("4889cb b804000000 0f01d7")
#: mov rdi, [rdi]
READ = bytes.fromhex("488b3f")
#: mov [rdi], rsi
WRITE = bytes.fromhex("488937")
#: jmp rdi
JUMP = bytes.fromhex("ffe7")


def new_processor(roots: RootKeys = ROOTS, *, features: Features | None = None, epc_pages: int = 256) -> Processor:
    return Processor(roots, epc_pages=epc_pages, features=features)


def load(
    code: bytes,
    key: rsa.RSAPrivateKey,
    *,
    processor: Processor | None = None,
    debug: bool = False,
    base: int = BASE,
    budget: int = 100_000,
) -> EmulatedEnclave:
    """An enclave whose entry point is ``code``, in a machine of its own."""
    image = small_image(code, debug=debug, heap_pages=HEAP_PAGES)
    signed = sign_image(image, key).to_bytes()
    enclave = EmulatedEnclave.load(processor or new_processor(), image, signed, base=base)
    enclave.machine.budget = budget
    return enclave


def host(machine: Machine, code: bytes, **registers: int) -> Stop:
    """Run host code to its end."""
    space = machine.space
    space.map_ram(HOST_CODE, PAGE_SIZE, executable=True)
    space.map_ram(HOST_DATA, PAGE_SIZE)
    space.poke(HOST_CODE, code)
    for name, value in registers.items():
        setattr(machine.logical.registers, name, value)
    machine.logical.registers.rip = HOST_CODE
    return machine.run(HOST_CODE + len(code))


def answer(enclave: EmulatedEnclave, stop: Stop) -> int:
    """RDI after a run that ended with EEXIT."""
    assert stop.reason is Reason.REACHED, stop
    assert not enclave.machine.logical.enclave_mode
    return enclave.machine.logical.registers.rdi


def fault(stop: Stop) -> Fault:
    """The exception that a run ended with."""
    assert stop.reason is Reason.EXCEPTION, stop
    assert stop.fault is not None
    return stop.fault
