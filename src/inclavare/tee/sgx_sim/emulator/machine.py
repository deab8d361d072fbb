"""A computer with one logical processor that runs code: host and enclave, entries, exits, exceptions, interrupts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from ....errors import ResourceError
from ..processor import AddressSpace, Fault, LogicalProcessor, Processor
from .engine import Ended, Engine
from .instructions import Instruction

#: Instructions that one run may execute, unless told otherwise.
DEFAULT_BUDGET = 50_000_000
#: Vector of the interrupts that are injected.
INTERRUPT_VECTOR = 32


class Reason(Enum):
    """Why a run ended."""

    REACHED = "the code outside of enclaves came to where it should"
    EXCEPTION = "an exception that nobody handled"
    SYSTEM_CALL = "a system call of the code outside of enclaves"


@dataclass(frozen=True, slots=True)
class Stop:
    """The end of a run.

    Attributes:
        reason: why.
        fault: the exception. If it was in an enclave, the asynchronous exit has happened, and running on resumes it.
    """

    reason: Reason
    fault: Fault | None = None


@dataclass(frozen=True, slots=True)
class ExceptionEvent:
    """An exception, as observers are told before it is delivered.

    Attributes:
        fault: what and why. A page fault's address is that of the page.
        rip: of the instruction.
        enclave: whether it was in an enclave.
    """

    fault: Fault
    rip: int
    enclave: bool


class Machine:
    """Runs code on one logical processor.

    Args:
        processor: the package, with its EPC.
        space: page tables and ordinary memory; a new one by default.
        budget: instructions that one :meth:`run` may execute.

    Attributes:
        logical: the logical processor.
        handler: the operating system's part: asked about each exception, says whether it has seen to it, so that
            execution goes on (in an enclave by way of the AEP).
        interrupt_every: an interrupt after so many instructions in enclave mode.
        observers: told about each exception.
        on_instruction: told about each instruction, which makes everything slow.
        instructions: executed so far; ``enclave_instructions``: those in enclave mode.

    Raises:
        PlatformError: ``tee.emulator.missing``.
    """

    def __init__(
        self, processor: Processor, space: AddressSpace | None = None, *, budget: int = DEFAULT_BUDGET
    ) -> None:
        self.logical = LogicalProcessor(processor, AddressSpace() if space is None else space)
        self.budget = budget
        self.handler: Callable[[Fault], bool] | None = None
        self.interrupt_every: int | None = None
        self.observers: list[Callable[[ExceptionEvent], None]] = []
        self.on_instruction: Callable[[Instruction], None] | None = None
        self.instructions = 0
        self.enclave_instructions = 0
        self._engine = Engine(self.logical)
        self._since_interrupt = 0

    @property
    def space(self) -> AddressSpace:
        """The page tables and ordinary memory."""
        return self.logical.space

    def run(self, until: int) -> Stop:
        """Run from RIP on until code outside of enclaves comes to ``until``, or something needs a decision.

        Raises:
            IntegrityError: the EPC was changed from outside.
            ResourceError: ``tee.emulator.budget``: too many instructions.
            PlatformError: ``tee.emulator.unsupported``.
        """
        logical = self.logical
        end = self.instructions + self.budget
        while logical.enclave_mode or logical.registers.rip != until:
            outcome = self._engine.run(self._limit(end), until=until)
            if self.on_instruction is not None and self._engine.first is not None:
                self.on_instruction(self._engine.first)
            self._count(outcome.instructions)
            fault = outcome.fault
            if outcome.ended is Ended.SYSTEM_CALL:
                return Stop(Reason.SYSTEM_CALL)
            if outcome.ended is Ended.LEAF:
                try:
                    self._count(1)
                    if not logical.enclave_mode:
                        self._since_interrupt = 0
                    logical.enclu()
                except Fault as raised:
                    fault = raised
            if fault is not None and not self._deliver(fault):
                return Stop(Reason.EXCEPTION, fault)
            if logical.enclave_mode and self.interrupt_every and self._since_interrupt >= self.interrupt_every:
                self._since_interrupt = 0
                logical.aex(INTERRUPT_VECTOR)
        return Stop(Reason.REACHED)

    def _limit(self, end: int) -> int:
        left = end - self.instructions
        if left <= 0:
            raise ResourceError(
                "the code ran for too long",
                id="tee.emulator.budget",
                found=f"{self.budget} instructions",
                remedy="allow more, if the code is meant to run that long",
            )
        if self.on_instruction is not None:
            return 1
        if not self.logical.enclave_mode or not self.interrupt_every:
            return left
        return max(1, min(left, self.interrupt_every - self._since_interrupt))

    def _count(self, instructions: int) -> None:
        self.instructions += instructions
        if self.logical.enclave_mode:
            self.enclave_instructions += instructions
            self._since_interrupt += instructions

    def _deliver(self, fault: Fault) -> bool:
        logical = self.logical
        told = ExceptionEvent(fault, logical.registers.rip, logical.enclave_mode)
        for observer in self.observers:
            observer(told)
        if logical.enclave_mode:
            self._since_interrupt = 0
            logical.aex(fault.vector, fault.error_code, fault.address)
        return self.handler is not None and self.handler(fault)
