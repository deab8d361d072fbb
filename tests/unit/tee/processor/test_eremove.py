"""SDM vol. 3D, EREMOVE."""

from __future__ import annotations

import pytest
from sgx_machine import (
    AEP,
    CODE_PAGE,
    DATA_PAGE,
    FREE_PAGE,
    NON_CANONICAL,
    NOWHERE,
    SECS_PAGE,
    SOURCE,
    TCS_PAGE,
    VA_PAGE,
    Machine,
    epc,
)

from inclavare.sgx.codes import Encls, Status
from inclavare.sgx.paging import PT_REG, PT_TRIM
from inclavare.tee.sgx_sim.processor import Access, EpcmEntry, GeneralProtection, PageFault, Resource


def remove(machine: Machine, page: int) -> Status:
    registers = machine.encls(Encls.EREMOVE, rcx=epc(page))
    status = Status(registers.rax)
    assert registers.rflags == 2 | (0x40 if status else 0)
    return status


def test_success(enclave: Machine) -> None:
    for page in (CODE_PAGE, TCS_PAGE, VA_PAGE):
        assert remove(enclave, page) is Status.SGX_SUCCESS
        assert enclave.entry(page) == EpcmEntry()
        assert page not in enclave.cpu.memory.store.pages


def test_unused_page(enclave: Machine) -> None:
    assert remove(enclave, FREE_PAGE) is Status.SGX_SUCCESS


def test_secs_goes_last(enclave: Machine) -> None:
    for page in range(1, 7):
        assert remove(enclave, SECS_PAGE) is Status.SGX_CHILD_PRESENT
        assert enclave.events[-1].rule == "eremove.children"
        assert remove(enclave, page) is Status.SGX_SUCCESS
    assert remove(enclave, SECS_PAGE) is Status.SGX_SUCCESS
    assert enclave.cpu.enclaves == {}
    assert not enclave.entry(SECS_PAGE).valid


def test_children_of_another_enclave_do_not_count(enclave: Machine) -> None:
    enclave.ecreate(page=9)
    assert remove(enclave, 9) is Status.SGX_SUCCESS
    assert 1 in enclave.cpu.enclaves


def test_enclave_is_active(inside: Machine) -> None:
    for page in (CODE_PAGE, TCS_PAGE, DATA_PAGE):
        assert remove(inside, page) is Status.SGX_ENCLAVE_ACT
        assert inside.events[-1].rule == "eremove.active"
        assert inside.entry(page).valid
    inside.user.aex(0x20)
    assert inside.user.registers.rip == AEP
    assert remove(inside, CODE_PAGE) is Status.SGX_SUCCESS


def test_another_enclave_is_active(inside: Machine) -> None:
    inside.ecreate(page=9)
    inside.eadd(0x1000_0000, 10, secs_page=9)
    assert remove(inside, 10) is Status.SGX_SUCCESS


def test_accepted_trimmed_page_of_an_active_enclave(inside: Machine) -> None:
    """Only what the enclave has agreed to: not while MODIFIED, and no other type."""
    inside.change(DATA_PAGE, pt=PT_TRIM, modified=True)
    assert remove(inside, DATA_PAGE) is Status.SGX_ENCLAVE_ACT
    inside.change(DATA_PAGE, pt=PT_REG, modified=False)
    assert remove(inside, DATA_PAGE) is Status.SGX_ENCLAVE_ACT
    inside.change(DATA_PAGE, pt=PT_TRIM)
    assert remove(inside, DATA_PAGE) is Status.SGX_SUCCESS


def test_va_page_of_an_active_platform(inside: Machine) -> None:
    assert remove(inside, VA_PAGE) is Status.SGX_SUCCESS


@pytest.mark.parametrize("rcx", [epc(CODE_PAGE) + 2048, NON_CANONICAL])
def test_operand_alignment(enclave: Machine, rcx: int) -> None:
    with enclave.faults(GeneralProtection, "eremove.epcpage"):
        enclave.encls(Encls.EREMOVE, rcx=rcx)


def test_operand_does_not_resolve_within_an_epc(enclave: Machine) -> None:
    with enclave.faults(PageFault, "eremove.epcpage", address=SOURCE, sgx=True):
        enclave.encls(Encls.EREMOVE, rcx=SOURCE)
    enclave.space.map_epc(NOWHERE, CODE_PAGE, writable=False, executable=False)
    with enclave.faults(PageFault, "paging.writable", address=NOWHERE):
        enclave.encls(Encls.EREMOVE, rcx=NOWHERE)


def test_concurrency(enclave: Machine) -> None:
    for access in Access:
        with enclave.cpu.locks.held(CODE_PAGE, access), enclave.faults(GeneralProtection, "eremove.conflict"):
            remove(enclave, CODE_PAGE)
    with enclave.cpu.locks.held(CODE_PAGE, Access.EXCLUSIVE, Resource.MODIFICATION):
        assert remove(enclave, CODE_PAGE) is Status.SGX_SUCCESS
