"""What happens to an enclave in a machine, as a timeline: entries, exits, exceptions, key requests, paging.

A key's bytes are never part of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from ....sgx.codes import Status
from ....sgx.meanings import KEY_NAMES, KEY_POLICY
from ....sgx.paging import PAGE_TYPES, SECINFO_PT, PageInfo
from ....sgx.ssa import EXIT_VECTORS
from ....sgx.structs import KeyRequest, TargetInfo
from ..processor import Event, Kind, PageFault
from ..processor.faults import PF_FETCH, PF_WRITE
from .enclave import EmulatedEnclave
from .instructions import Instruction
from .machine import ExceptionEvent

#: Why accesses are refused, by rule; others are shown as they are called.
_WHY = {
    "paging.present": "the page tables map nothing there",
    "paging.writable": "the page tables do not allow writing",
    "paging.executable": "the page tables do not allow execution",
    "access.elrange-not-epc": "the page tables put ordinary memory into the enclave",
    "access.fetch-outside-elrange": "an enclave executes nothing outside of itself",
    "access.abort-page": "no code there: the abort page stands in for enclave memory",
    "access.canonical": "the address is not canonical",
    "epcm.valid": "EPCM: there is no such page",
    "epcm.blocked": "EPCM: the page is blocked",
    "epcm.pt": "EPCM: only the processor may access a page of this type",
    "epcm.enclavesecs": "EPCM: the page belongs to another enclave",
    "epcm.enclaveaddress": "EPCM: the page belongs at another linear address",
    "epcm.pending": "EPCM: the page awaits EACCEPT",
    "epcm.modified": "EPCM: the page awaits EACCEPT",
    "epcm.r": "EPCM: the page is not readable",
    "epcm.w": "EPCM: the page is not writable",
    "epcm.x": "EPCM: the page is not executable",
    "illegal-in-enclave": "the instruction is illegal in an enclave",
    "opcode": "invalid opcode",
    "privileged": "the instruction is privileged",
}
#: Leaves that make up the loading of an enclave; they are counted, not shown one by one.
_BUILDING = frozenset(("ECREATE", "EADD", "EEXTEND", "EINIT", "EPA"))


@dataclass(frozen=True, slots=True)
class Step:
    """One line of the timeline.

    Attributes:
        instructions: executed until then.
        event: leaf, ``AEX``, mnemonic of an exception, ``INSTRUCTION`` or ``LOADED``.
        fields: what there is to know about it.
        enclave: whether it happened in enclave mode.
    """

    instructions: int
    event: str
    fields: dict[str, object] = field(default_factory=dict)
    enclave: bool = False


class Tracer:
    """Follows an enclave.

    Args:
        enclave: whose processor and machine are observed.
        emit: takes the steps.
        symbols: names for offsets in the enclave's code.
        instructions: tell every instruction, too.
    """

    def __init__(
        self,
        enclave: EmulatedEnclave,
        emit: Callable[[Step], None],
        *,
        symbols: dict[int, str] | None = None,
        instructions: bool = False,
    ) -> None:
        self._enclave = enclave
        self._emit = emit
        self._symbols = sorted((symbols or {}).items(), reverse=True)
        enclave.machine.logical.processor.observers.append(self._event)
        enclave.machine.observers.append(self._exception)
        if instructions:
            enclave.machine.on_instruction = self._instruction

    def place(self, linear: int) -> str:
        """An address, with the symbol before it if it is in the enclave's code."""
        offset = linear - self._enclave.loaded.base
        if 0 <= offset < self._enclave.loaded.size:
            for start, name in self._symbols:
                if start <= offset:
                    beyond = offset - start
                    return f"{linear:#x} <{name}{f'+{beyond:#x}' if beyond else ''}>"
        return f"{linear:#x}"

    def _tell(self, event: str, *, enclave: bool = False, **fields: object) -> None:
        self._emit(Step(self._enclave.machine.instructions, event, fields, enclave))

    def _instruction(self, one: Instruction) -> None:
        inside = self._enclave.machine.logical.enclave_mode
        self._tell("INSTRUCTION", enclave=inside, rip=self.place(one.address), text=str(one))

    def _exception(self, told: ExceptionEvent) -> None:
        fault = told.fault
        who = "enclave" if told.enclave else "host"
        why = _WHY.get(fault.rule, fault.rule)
        fields: dict[str, object] = {"by": who, "rip": self.place(told.rip)}
        if isinstance(fault, PageFault):
            access = "write" if fault.error_code & PF_WRITE else "fetch" if fault.error_code & PF_FETCH else "read"
            checked = "EPCM" if fault.by_epcm else "page tables"
            fields |= {"access": access, "page": f"{fault.address:#x}", "refused_by": checked}
        self._tell(fault.mnemonic, enclave=told.enclave, **fields, why=why)

    def _event(self, event: Event) -> None:
        if event.kind is Kind.FAULT:
            return
        if event.kind is Kind.ENTRY:
            self._tell("EENTER", tcs=f"{event.operands[0]:#x}", to=self.place(self._rip()))
        elif event.kind is Kind.RESUME:
            self._tell("ERESUME", tcs=f"{event.operands[0]:#x}", to=self.place(self._rip()))
        elif event.kind is Kind.EXIT:
            self._tell("EEXIT", enclave=True, to=f"{self._rip():#x}", at=self.place(event.rip))
        elif event.kind is Kind.AEX:
            vector = event.vector or 0
            reason = EXIT_VECTORS.get(vector, f"interrupt {vector}")
            self._tell("AEX", enclave=True, reason=reason, at=self.place(event.rip), to=f"{self._rip():#x}")
        elif event.kind is Kind.KEY:
            self._tell("EGETKEY", enclave=True, **self._key(event), at=self.place(event.rip))
        elif event.kind is Kind.ENCLU and event.name == "EREPORT":
            self._tell("EREPORT", enclave=True, **self._report(event), at=self.place(event.rip))
        elif event.name not in _BUILDING:
            self._leaf(event)

    def _rip(self) -> int:
        return self._enclave.machine.logical.registers.rip

    def _key(self, event: Event) -> dict[str, object]:
        request = KeyRequest.from_bytes(self._read(event.operands[0], 512))
        policy = "|".join(name for bit, name in KEY_POLICY.items() if request.key_policy & bit)
        return {
            "key": KEY_NAMES.get(request.key_name, str(request.key_name)),
            "policy": policy or "none",
            "isv_svn": request.isv_svn,
            "status": (event.status or Status.SGX_SUCCESS).name,
        }

    def _report(self, event: Event) -> dict[str, object]:
        target = TargetInfo.from_bytes(self._read(event.operands[0], 512))
        own = not any(target.mrenclave)
        return {"target": "nobody: it learns its own identity" if own else target.mrenclave.hex()}

    def _read(self, linear: int, size: int) -> bytes:
        """Operands of a leaf that has just been executed, in the enclave's memory."""
        return self._enclave.machine.logical.read(linear, size)

    def _leaf(self, event: Event) -> None:
        """A leaf of ENCLS, or another of ENCLU."""
        fields: dict[str, object] = {}
        page = self._named(event)
        if page is not None:
            fields["page"] = page
        if event.status is not None:
            fields["status"] = event.status.name
        if event.rule:
            fields["why"] = event.rule
        self._tell(event.name, enclave=event.kind is Kind.ENCLU, **fields)

    def _named(self, event: Event) -> str | None:
        """The enclave page that an ENCLS leaf works on."""
        driver, linear = self._enclave.driver, None
        if event.name.startswith("ELD"):
            linear = PageInfo.from_bytes(driver.space.peek(event.operands[0], PageInfo.LAYOUT.size)).linaddr
        for page in self._enclave.loaded.pages.values():
            resident = page.epc_page is not None and driver.window(page.epc_page) == event.operands[1]
            if resident or page.linear == linear:
                return f"{page.linear:#x} {PAGE_TYPES[page.flags & SECINFO_PT]}"
        return None


def loading(leaves: Counter[str], enclave: EmulatedEnclave) -> Step:
    """The first line: what loading took, and what came of it."""
    loaded = enclave.loaded
    secs = enclave.machine.logical.processor.secs(loaded.secs_page)
    flags = secs.attributes.flags
    return Step(
        0,
        "LOADED",
        {
            "base": f"{loaded.base:#x}",
            "size": f"{loaded.size:#x}",
            "leaves": " ".join(f"{name}×{count}" for name, count in leaves.items()),
            "mrenclave": secs.public.mrenclave.hex(),
            "mrsigner": secs.public.mrsigner.hex(),
            "attributes": f"{flags:#x}",
            "xfrm": f"{secs.attributes.xfrm:#x}",
        },
    )
