"""How an instruction can fail: with an exception that the processor delivers, or with an error code in RAX.

Both name the rule that was violated (``eadd.secinfo``), which no real processor tells; the trace and the tests do.
"""

from __future__ import annotations

from typing import ClassVar

from ....sgx.codes import Status

#: Page-fault error code, SDM vol. 3A 4.7 and vol. 3D 38.9.2.2.
PF_PRESENT = 1 << 0
PF_WRITE = 1 << 1
PF_USER = 1 << 2
PF_FETCH = 1 << 4
PF_SGX = 1 << 15


class Fault(Exception):
    """An exception of the processor.

    Attributes:
        vector: its number.
        error_code: what is pushed with it.
        address: the linear address of a page fault.
        rule: the rule that was violated.
    """

    vector: ClassVar[int]
    mnemonic: ClassVar[str]

    def __init__(self, rule: str, *, error_code: int = 0, address: int | None = None) -> None:
        where = "" if address is None else f" at {address:#x}"
        super().__init__(f"{self.mnemonic}({error_code:#x}){where}: {rule}")
        self.rule = rule
        self.error_code = error_code
        self.address = address


class InvalidOpcode(Fault):
    """#UD: the instruction does not exist here (privilege level, no SGX)."""

    vector = 6
    mnemonic = "#UD"


class GeneralProtection(Fault):
    """#GP(0): an operand or the state is not allowed."""

    vector = 13
    mnemonic = "#GP"


class PageFault(Fault):
    """#PF: the page tables or, with bit 15 of the error code, the EPCM do not allow the access."""

    vector = 14
    mnemonic = "#PF"

    def __init__(self, rule: str, *, error_code: int, address: int) -> None:
        super().__init__(rule, error_code=error_code, address=address)

    @property
    def by_epcm(self) -> bool:
        """Whether SGX's own access control caused it, not the page tables."""
        return bool(self.error_code & PF_SGX)


class LeafError(Exception):
    """A leaf function ends with a code in RAX.

    Attributes:
        status: the code.
        rule: the rule that was violated.
        carry: the code is information and sets CF; an error sets ZF.
    """

    def __init__(self, status: Status, rule: str, *, carry: bool = False) -> None:
        super().__init__(f"{status.name}: {rule}")
        self.status = status
        self.rule = rule
        self.carry = carry
