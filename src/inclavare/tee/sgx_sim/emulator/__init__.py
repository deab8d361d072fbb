"""Executes x86-64 code of host and enclave on the software processor, with unicorn (extra ``emulator``).

What unicorn has, runs: integer, x87 and SSE up to 4.2, AES-NI, PCLMULQDQ; no AVX. It does not fault on misaligned SSE
operands, unmasked SIMD exceptions and alignment checks. A page fault names the page, not the byte in it. Machines of
one processor take turns: run them in one thread.
"""

from .enclave import EmulatedEnclave, unhandled
from .engine import Breakpoint, DivideError
from .instructions import Instruction
from .machine import ExceptionEvent, Machine, Reason, Stop
from .trace import Step, Tracer, loading

__all__ = [
    "Breakpoint",
    "DivideError",
    "EmulatedEnclave",
    "ExceptionEvent",
    "Instruction",
    "Machine",
    "Reason",
    "Step",
    "Stop",
    "Tracer",
    "loading",
    "unhandled",
]
