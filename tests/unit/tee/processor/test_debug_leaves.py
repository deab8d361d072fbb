"""SDM vol. 3D, EDBGRD, EDBGWR and ERDINFO."""

from __future__ import annotations

import pytest
from sgx_machine import (
    CODE_PAGE,
    DATA_PAGE,
    FREE_PAGE,
    MORE_PAGE,
    NON_CANONICAL,
    NOWHERE,
    RDINFO,
    RX,
    SECS_PAGE,
    SOURCE,
    TCS_PAGE,
    VA_PAGE,
    Machine,
    a_secs,
    attributes,
    epc,
)
from small_enclaves import Signers

from inclavare.sgx.codes import Encls, Status
from inclavare.sgx.paging import PT_SECS, PT_TCS, PT_VA, SECINFO_PENDING, RdInfo
from inclavare.sgx.structs import ATTRIBUTE_DEBUG
from inclavare.tee.sgx_sim.processor import Access, Fault, GeneralProtection, PageFault


@pytest.fixture
def debug(signers: Signers) -> Machine:
    """A debug enclave; page 5 holds ``data``."""
    return Machine(signers.ours).build(secs=a_secs(attributes=attributes(ATTRIBUTE_DEBUG)))


def edbgrd(machine: Machine, linear: int) -> int:
    registers = machine.encls(Encls.EDBGRD, 0x55, linear)
    assert (registers.rax, registers.rflags) == (0, 2)
    return registers.rbx


def edbgwr(machine: Machine, linear: int, value: int) -> None:
    registers = machine.encls(Encls.EDBGWR, value, linear)
    assert (registers.rax, registers.rflags) == (0, 2)


def test_edbgrd(debug: Machine) -> None:
    assert edbgrd(debug, epc(DATA_PAGE)) == int.from_bytes(b"data\0\0\0\0", "little")
    # EPCM permissions do not matter.
    debug.change(DATA_PAGE, r=False)
    assert edbgrd(debug, epc(DATA_PAGE) + 4088) == 0
    assert edbgrd(debug, epc(TCS_PAGE) + 16) == 0x2000
    assert edbgrd(debug, epc(TCS_PAGE) + 64) == 0xFFF_0000_0FFF


def test_edbgwr(debug: Machine) -> None:
    edbgwr(debug, epc(CODE_PAGE) + 8, 0x1122334455667788)
    assert debug.cpu.read_epc(CODE_PAGE, 0, 24) == b"code\0\0\0\0" + bytes.fromhex("8877665544332211") + bytes(8)
    edbgwr(debug, epc(TCS_PAGE) + 8, 1)
    assert debug.tcs().flags == 1


def test_edbgrd_of_a_version_slot_tells_only_whether_it_is_used(debug: Machine) -> None:
    debug.evict(CODE_PAGE, slot=2)
    assert edbgrd(debug, epc(VA_PAGE) + 16) == (1 << 64) - 1
    assert edbgrd(debug, epc(VA_PAGE) + 24) == 0


@pytest.mark.parametrize("leaf", [Encls.EDBGRD, Encls.EDBGWR])
class TestBoth:
    def test_alignment(self, debug: Machine, leaf: Encls) -> None:
        for linear in (epc(DATA_PAGE) + 4, epc(DATA_PAGE) + 1):
            with debug.faults(GeneralProtection, f"{leaf.name.lower()}.alignment"):
                debug.encls(leaf, 0, linear)
        with debug.faults(GeneralProtection, f"{leaf.name.lower()}.epcpage"):
            debug.encls(leaf, 0, NON_CANONICAL)

    def test_operand_does_not_resolve_within_an_epc(self, debug: Machine, leaf: Encls) -> None:
        with debug.faults(PageFault, f"{leaf.name.lower()}.epcpage", address=SOURCE, sgx=True):
            debug.encls(leaf, 0, SOURCE)

    def test_concurrency(self, debug: Machine, leaf: Encls) -> None:
        with (
            debug.cpu.locks.held(DATA_PAGE, Access.EXCLUSIVE),
            debug.faults(GeneralProtection, f"{leaf.name.lower()}.conflict"),
        ):
            debug.encls(leaf, 0, epc(DATA_PAGE))
        with debug.cpu.locks.held(DATA_PAGE, Access.SHARED):
            debug.encls(leaf, 0, epc(DATA_PAGE))

    def test_page_is_invalid_or_of_another_type(self, debug: Machine, leaf: Encls) -> None:
        with debug.faults(PageFault, f"{leaf.name.lower()}.page.valid", address=epc(FREE_PAGE), sgx=True):
            debug.encls(leaf, 0, epc(FREE_PAGE))
        with debug.faults(PageFault, f"{leaf.name.lower()}.page.pt", address=epc(SECS_PAGE), sgx=True):
            debug.encls(leaf, 0, epc(SECS_PAGE))

    def test_page_is_pending_or_modified(self, debug: Machine, leaf: Encls) -> None:
        for state in ("pending", "modified"):
            debug.change(DATA_PAGE, **{state: True})
            registers = debug.encls(leaf, 0x55, epc(DATA_PAGE))
            assert (registers.rax, registers.rflags) == (Status.SGX_PAGE_NOT_DEBUGGABLE, 0x42)
            assert registers.rbx == 0x55
            debug.change(DATA_PAGE, **{state: False})
        assert debug.cpu.read_epc(DATA_PAGE, 0, 4) == b"data"

    def test_production_enclave(self, enclave: Machine, leaf: Encls) -> None:
        for page, offset in ((DATA_PAGE, 0), (TCS_PAGE, 8)):
            with enclave.faults(GeneralProtection, f"{leaf.name.lower()}.debug"):
                enclave.encls(leaf, 0, epc(page) + offset)


def test_edbgrd_beyond_the_tcs_limit(debug: Machine) -> None:
    for offset in (72, 80, 4088):
        with debug.faults(GeneralProtection, "edbgrd.tcs"):
            debug.encls(Encls.EDBGRD, 0, epc(TCS_PAGE) + offset)


def test_edbgwr_of_a_tcs_is_for_flags_only(debug: Machine) -> None:
    for offset in (0, 16, 72):
        with debug.faults(GeneralProtection, "edbgwr.tcs"):
            debug.encls(Encls.EDBGWR, 0, epc(TCS_PAGE) + offset)


def test_edbgwr_of_a_va_page(debug: Machine) -> None:
    with debug.faults(PageFault, "edbgwr.page.pt", address=epc(VA_PAGE), sgx=True):
        debug.encls(Encls.EDBGWR, 0, epc(VA_PAGE))


def test_edbgwr_needs_a_writable_mapping(debug: Machine) -> None:
    debug.space.map_epc(NOWHERE, DATA_PAGE, writable=False, executable=False)
    with debug.faults(PageFault, "paging.writable", address=NOWHERE, sgx=False):
        debug.encls(Encls.EDBGWR, 0, NOWHERE)
    assert edbgrd(debug, NOWHERE)


# --- ERDINFO ----------------------------------------------------------------------------------------------------


def erdinfo(machine: Machine, rcx: int) -> tuple[int, int]:
    registers = machine.encls(Encls.ERDINFO, RDINFO, rcx)
    return registers.rax, registers.rflags


def told(machine: Machine, page: int) -> RdInfo:
    assert erdinfo(machine, epc(page)) == (0, 2)
    return RdInfo.from_bytes(machine.space.peek(RDINFO, 24))


def test_erdinfo(enclave: Machine) -> None:
    assert told(enclave, CODE_PAGE) == RdInfo(0, RX, epc(SECS_PAGE))
    assert told(enclave, TCS_PAGE) == RdInfo(0, PT_TCS, epc(SECS_PAGE))
    assert told(enclave, SECS_PAGE) == RdInfo(1, PT_SECS, epc(SECS_PAGE))
    assert told(enclave, VA_PAGE) == RdInfo(0, PT_VA, 0)
    enclave.block(MORE_PAGE)
    assert told(enclave, MORE_PAGE).flags & 1 << 7
    assert not told(enclave, DATA_PAGE).flags & 1 << 7
    enclave.change(CODE_PAGE, pending=True)
    assert told(enclave, CODE_PAGE).flags == RX | SECINFO_PENDING


def test_erdinfo_of_an_secs_without_children(machine: Machine) -> None:
    machine.ecreate()
    assert told(machine, SECS_PAGE).status == 0


def test_erdinfo_codes(enclave: Machine) -> None:
    assert erdinfo(enclave, SOURCE) == (Status.SGX_PG_NONEPC, 2 | 1)
    assert erdinfo(enclave, epc(FREE_PAGE)) == (Status.SGX_PG_INVLD, 2 | 1)
    with enclave.cpu.locks.held(CODE_PAGE, Access.EXCLUSIVE):
        assert erdinfo(enclave, epc(CODE_PAGE)) == (Status.SGX_EPC_PAGE_CONFLICT, 2 | 0x40)
    with enclave.cpu.locks.held(CODE_PAGE, Access.SHARED):
        assert erdinfo(enclave, epc(CODE_PAGE)) == (0, 2)


@pytest.mark.parametrize(
    ("kind", "rule", "rbx", "rcx"),
    [
        (GeneralProtection, "erdinfo.rdinfo", RDINFO + 16, epc(CODE_PAGE)),
        (GeneralProtection, "erdinfo.epcpage", RDINFO, epc(CODE_PAGE) + 2048),
        (GeneralProtection, "erdinfo.epcpage", RDINFO, NON_CANONICAL),
        (PageFault, "paging.present", RDINFO, NOWHERE),
        (PageFault, "paging.present", NOWHERE, epc(CODE_PAGE)),
    ],
)
def test_erdinfo_faults(enclave: Machine, kind: type[Fault], rule: str, rbx: int, rcx: int) -> None:
    with enclave.faults(kind, rule):
        enclave.encls(Encls.ERDINFO, rbx, rcx)
