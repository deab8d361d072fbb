"""Executes x86-64 code of host and enclave on the software processor, with unicorn (extra ``emulator``).

What unicorn has, runs: integer, x87 and SSE up to 4.2, AES-NI, PCLMULQDQ; no AVX. It does not fault on misaligned SSE
operands, unmasked SIMD exceptions and alignment checks. A page fault names the page, not the byte in it.
"""

from .enclave import EmulatedEnclave
from .engine import Breakpoint, DivideError
from .machine import Exception_, Machine, Reason, Stop

__all__ = ["Breakpoint", "DivideError", "EmulatedEnclave", "Exception_", "Machine", "Reason", "Stop"]
