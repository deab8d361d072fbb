"""SDM vol. 3D, EEXTEND."""

from __future__ import annotations

import pytest
from sgx_machine import (
    BASE,
    CODE,
    CODE_PAGE,
    NON_CANONICAL,
    RX,
    SECS_PAGE,
    SIZE,
    SOURCE,
    TCS,
    TCS_PAGE,
    VA_PAGE,
    Machine,
    a_secs,
    a_tcs,
    epc,
)

from inclavare.sgx.codes import Encls
from inclavare.sgx.image import PageRun
from inclavare.sgx.measure import Measurement
from inclavare.sgx.paging import PAGE_SIZE, PT_TCS
from inclavare.tee.sgx_sim.processor import Access, GeneralProtection, PageFault, Resource

CONTENTS = bytes(range(256)) * 16


@pytest.fixture
def building(machine: Machine) -> Machine:
    machine.ecreate()
    machine.eadd(CODE, CODE_PAGE, RX, CONTENTS)
    machine.eadd(TCS, TCS_PAGE, PT_TCS, a_tcs().to_bytes())
    machine.epa()
    return machine


def extend(machine: Machine, page: int = CODE_PAGE, chunk: int = 0) -> None:
    registers = machine.encls(Encls.EEXTEND, epc(SECS_PAGE), epc(page) + chunk)
    assert (registers.rax, registers.rflags) == (Encls.EEXTEND, 0x8D7)


def test_measurement(machine: Machine) -> None:
    machine.ecreate(a_secs())
    expected = Measurement()
    expected.ecreate(1, SIZE)
    machine.eadd(CODE, CODE_PAGE, RX, CONTENTS)
    for chunk in range(0, PAGE_SIZE, 256):
        extend(machine, CODE_PAGE, chunk)
    machine.eadd(TCS, TCS_PAGE, PT_TCS, a_tcs().to_bytes())
    for chunk in range(0, PAGE_SIZE, 256):
        extend(machine, TCS_PAGE, chunk)
    expected.add(PageRun(CODE - BASE, RX, 1, CONTENTS))
    expected.add(PageRun(TCS - BASE, PT_TCS, 1, a_tcs().to_bytes()))
    assert machine.cpu.enclaves[1].measurement.digest() == expected.digest()


def test_every_chunk_counts_with_its_place(building: Machine) -> None:
    seen = {building.cpu.enclaves[1].measurement.digest()}
    for chunk in (0, 256, 256, 3840):
        extend(building, CODE_PAGE, chunk)
        seen.add(building.cpu.enclaves[1].measurement.digest())
    assert len(seen) == 5


@pytest.mark.parametrize(
    ("rule", "rbx", "rcx"),
    [
        ("eextend.secs", epc(SECS_PAGE) + 2048, epc(CODE_PAGE)),
        ("eextend.secs", NON_CANONICAL, epc(CODE_PAGE)),
        ("eextend.chunk", epc(SECS_PAGE), epc(CODE_PAGE) + 128),
        ("eextend.chunk", epc(SECS_PAGE), NON_CANONICAL),
        ("eextend.secs", epc(CODE_PAGE), epc(CODE_PAGE)),
    ],
)
def test_operands(building: Machine, rule: str, rbx: int, rcx: int) -> None:
    with building.faults(GeneralProtection, rule):
        building.encls(Encls.EEXTEND, rbx, rcx)


@pytest.mark.parametrize(
    ("rule", "rbx", "rcx"),
    [
        ("eextend.secs", SOURCE, epc(CODE_PAGE)),
        ("eextend.chunk", epc(SECS_PAGE), SOURCE),
        ("eextend.page.valid", epc(SECS_PAGE), epc(12)),
        ("eextend.page.pt", epc(SECS_PAGE), epc(VA_PAGE)),
        ("eextend.page.pt", epc(SECS_PAGE), epc(SECS_PAGE)),
    ],
)
def test_pages(building: Machine, rule: str, rbx: int, rcx: int) -> None:
    address = SOURCE if SOURCE in (rbx, rcx) else rcx
    with building.faults(PageFault, rule, address=address, sgx=True):
        building.encls(Encls.EEXTEND, rbx, rcx)


def test_secs_is_that_of_the_page(building: Machine) -> None:
    building.ecreate(page=9)
    with building.faults(GeneralProtection, "eextend.secs"):
        building.encls(Encls.EEXTEND, epc(9), epc(CODE_PAGE))


def test_concurrency(building: Machine) -> None:
    locks = building.cpu.locks
    with locks.held(CODE_PAGE, Access.EXCLUSIVE), building.faults(GeneralProtection, "eextend.conflict"):
        extend(building)
    for access in Access:
        with (
            locks.held(SECS_PAGE, access, Resource.MEASUREMENT),
            building.faults(GeneralProtection, "eextend.measurement-conflict"),
        ):
            extend(building)
    with locks.held(CODE_PAGE, Access.SHARED), locks.held(SECS_PAGE, Access.EXCLUSIVE):
        extend(building)


def test_enclave_is_initialised(enclave: Machine) -> None:
    with enclave.faults(GeneralProtection, "eextend.initialised"):
        extend(enclave)
