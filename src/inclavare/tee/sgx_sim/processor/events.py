"""What observers of the processor are told."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ....sgx.codes import Status
from .faults import Fault


class Kind(Enum):
    """What happened."""

    ENCLS = "encls"
    ENCLU = "enclu"
    ENTRY = "entry"
    EXIT = "exit"
    RESUME = "resume"
    AEX = "aex"
    KEY = "key"
    FAULT = "fault"


@dataclass(frozen=True, slots=True)
class Event:
    """One leaf function or asynchronous exit, after it happened.

    Attributes:
        kind: what.
        processor: number of the logical processor.
        name: the leaf's name, or ``AEX``.
        rip: where the instruction was, or where the enclave was interrupted.
        operands: RBX, RCX and RDX before.
        status: the code in RAX, for leaves that return one.
        rule: the rule that made it fail; empty for success.
        fault: the exception that the leaf raised.
        enclave: EID of the enclave that was or is being executed; ``None`` outside.
        tcs: linear address of its TCS.
        vector: of the event that caused an asynchronous exit.
        error_code: likewise.
        address: likewise, of a page fault.
        detail: the EGETKEY key name, for example; never a secret.
    """

    kind: Kind
    processor: int
    name: str
    rip: int
    operands: tuple[int, int, int] = (0, 0, 0)
    status: Status | None = None
    rule: str = ""
    fault: Fault | None = None
    enclave: int | None = None
    tcs: int | None = None
    vector: int | None = None
    error_code: int = 0
    address: int | None = None
    detail: str = ""
