"""The host's side of an enclave in a machine: what the vDSO and an untrusted runtime do on hardware."""

from __future__ import annotations

from ....errors import PlatformError, UsageError
from ....sgx.codes import Enclu
from ....sgx.image import PAGE_SIZE, EnclaveImage
from ...skeleton.protocol import HEADER, MAX_MESSAGE, Status, refusal
from ..processor import Driver, Fault, LoadedEnclave, PageFault, Processor
from .engine import ENCLU
from .machine import Machine, Reason, Stop

#: Where the host keeps its code, stack and buffers, unless told otherwise.
HOST_BASE = 0x10_0000
#: Where enclaves lie, unless told otherwise.
DEFAULT_BASE = 1 << 33
_ENTER, _DONE, _AEP = 0, 3, 16
_STACK, _REQUEST, _RESPONSE = PAGE_SIZE, 2 * PAGE_SIZE, 2 * PAGE_SIZE + MAX_MESSAGE
_END = _RESPONSE + MAX_MESSAGE


class EmulatedEnclave:
    """Calls an enclave that speaks the skeleton's protocol (:mod:`inclavare.tee.skeleton.protocol`).

    The host's code is real, too: EENTER at ``host_base``, ERESUME at the AEP 16 bytes on.

    Args:
        machine: where the enclave is mapped. Evicted pages are brought back when they are missed.
        driver: who loaded it there.
        loaded: the enclave; its first thread is used.
        host_base: linear address of 6 free pages, outside of the enclave.
    """

    def __init__(self, machine: Machine, driver: Driver, loaded: LoadedEnclave, *, host_base: int = HOST_BASE) -> None:
        if not loaded.tcs:
            raise UsageError("the enclave has no thread", id="tee.emulator.tcs", expected="a page of type PT_TCS")
        self.machine = machine
        self.driver = driver
        self.loaded = loaded
        self.tcs = loaded.tcs[0]
        self.host_base = host_base
        machine.handler = self.handle
        space = machine.space
        space.map_ram(host_base, PAGE_SIZE, writable=False, executable=True)
        space.map_ram(host_base + _STACK, _END - _STACK)
        space.poke(host_base + _ENTER, ENCLU)
        space.poke(host_base + _AEP, ENCLU)

    @classmethod
    def load(
        cls, processor: Processor, image: EnclaveImage, sigstruct: bytes, *, base: int | None = None
    ) -> EmulatedEnclave:
        """Load an enclave in a machine of its own.

        Args:
            sigstruct: 1808 bytes.
            base: its linear address; by default the first multiple of its size from 8 GiB on.

        Raises:
            InclavareError: see :meth:`Driver.load` and :class:`Machine`.
        """
        machine = Machine(processor)
        driver = Driver(processor, machine.space)
        loaded = driver.load(image, sigstruct, base=max(DEFAULT_BASE, image.size) if base is None else base)
        return cls(machine, driver, loaded)

    def handle(self, fault: Fault) -> bool:
        """What the operating system does about an exception: it reloads a page that it had evicted."""
        return isinstance(fault, PageFault) and fault.address is not None and self.driver.handle_fault(fault.address)

    @property
    def request_address(self) -> int:
        """Where requests are put."""
        return self.host_base + _REQUEST

    @property
    def response_address(self) -> int:
        """Where responses are expected."""
        return self.host_base + _RESPONSE

    @property
    def aep(self) -> int:
        """The asynchronous exit pointer."""
        return self.host_base + _AEP

    def enter(self, *, rdi: int = 0, rsi: int = 0, rdx: int = 0, r8: int = 0, r9: int = 0) -> Stop:
        """EENTER with these registers, until the enclave exits or an exception is left to the caller."""
        registers = self.machine.logical.registers
        registers.rax, registers.rbx, registers.rcx = Enclu.EENTER, self.tcs, self.aep
        registers.rdi, registers.rsi, registers.rdx, registers.r8, registers.r9 = rdi, rsi, rdx, r8, r9
        registers.rsp = registers.rbp = self.host_base + _REQUEST
        registers.rip = self.host_base + _ENTER
        return self.machine.run(self.host_base + _DONE)

    def resume(self) -> Stop:
        """ERESUME, after an exception that was left to the caller."""
        registers = self.machine.logical.registers
        registers.rax, registers.rbx, registers.rcx = Enclu.ERESUME, self.tcs, self.aep
        registers.rip = self.aep
        return self.machine.run(self.host_base + _DONE)

    def call(self, request: bytes, *, capacity: int = MAX_MESSAGE) -> bytes:
        """Bring a request to the enclave; its response, header and payload.

        An exception in the enclave is offered to its own exception entry, as an untrusted runtime does; if that repairs
        it, the enclave is resumed.

        Raises:
            PlatformError: ``tee.emulator.exception``: an exception that nobody repairs.
            InclavareError: see :meth:`Machine.run`; ``tee.skeleton.buffer``.
        """
        self.machine.space.poke(self.request_address, request)
        self.machine.space.poke(self.response_address, bytes(HEADER.size))
        stop = self.enter(rdi=self.request_address, rsi=len(request), rdx=self.response_address, r8=capacity)
        while stop.reason is not Reason.REACHED:
            self._repair(stop)
            stop = self.resume()
        status = self.machine.logical.registers.rdi
        if status in (Status.BUFFER, Status.EXCEPTION):
            raise refusal(status)
        response = self.machine.space.peek(self.response_address, MAX_MESSAGE)
        return response[: HEADER.size + int.from_bytes(response[4:8], "little")]

    def _repair(self, stop: Stop) -> None:
        entered = stop.fault is not None and self.machine.logical.registers.rip == self.aep
        if entered and self.enter().reason is Reason.REACHED and self.machine.logical.registers.rdi == Status.OK:
            return
        raise unhandled(stop.fault)


def unhandled(fault: Fault | None) -> PlatformError:
    """The error for an exception that ends an enclave's execution."""
    return PlatformError(
        "an exception ended the enclave's execution", id="tee.emulator.exception", found=fault or "a system call"
    )
