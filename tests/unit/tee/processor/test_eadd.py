"""SDM vol. 3D, EADD."""

from __future__ import annotations

import pytest
from sgx_machine import (
    BASE,
    CODE,
    CODE_PAGE,
    DATA,
    DATA_PAGE,
    MORE,
    NON_CANONICAL,
    NOWHERE,
    ODD_PAGEINFO,
    ODD_SECINFO,
    PAGEINFO,
    RW,
    RX,
    SECINFO,
    SECS_PAGE,
    SIZE,
    SOURCE,
    TCS,
    TCS_PAGE,
    Machine,
    a_secs,
    a_tcs,
    attributes,
    epc,
)

from inclavare.sgx.codes import Encls
from inclavare.sgx.image import PageRun
from inclavare.sgx.measure import Measurement
from inclavare.sgx.paging import (
    PAGE_SIZE,
    PT_REG,
    PT_SECS,
    PT_TCS,
    PT_TRIM,
    PT_VA,
    SECINFO_MODIFIED,
    SECINFO_PENDING,
    SECINFO_PR,
    SECINFO_R,
    SECINFO_W,
    SECINFO_X,
)
from inclavare.sgx.structs import ATTRIBUTE_MODE64BIT, Tcs
from inclavare.tee.sgx_sim.processor import Access, EpcmEntry, GeneralProtection, PageFault, Resource, rules


@pytest.fixture
def building(machine: Machine) -> Machine:
    """An SECS without pages, and the operands of an EADD."""
    machine.ecreate()
    return prepared(machine)


def prepared(machine: Machine) -> Machine:
    machine.space.poke(SOURCE, b"data".ljust(PAGE_SIZE, b"\0"))
    machine.secinfo(RW)
    machine.pageinfo(linaddr=DATA, srcpge=SOURCE, secinfo=SECINFO, secs=epc(SECS_PAGE))
    return machine


def eadd(machine: Machine) -> None:
    machine.encls(Encls.EADD, PAGEINFO, epc(DATA_PAGE))


def test_success(building: Machine) -> None:
    registers = building.eadd(CODE, CODE_PAGE, RX, b"code")
    assert (registers.rax, registers.rflags) == (Encls.EADD, 0x8D7)
    assert building.entry(CODE_PAGE) == EpcmEntry(
        valid=True, pt=PT_REG, r=True, x=True, enclave_secs=SECS_PAGE, enclave_address=CODE
    )
    assert building.cpu.read_epc(CODE_PAGE) == b"code".ljust(PAGE_SIZE, b"\0")
    building.eadd(DATA, DATA_PAGE, PT_REG | SECINFO_R | SECINFO_W)
    assert (building.entry(DATA_PAGE).w, building.entry(DATA_PAGE).x) == (True, False)


def test_measurement(building: Machine) -> None:
    building.eadd(CODE, CODE_PAGE, RX, b"code")
    building.eadd(TCS, TCS_PAGE, PT_TCS | SECINFO_R | SECINFO_W | SECINFO_X, a_tcs().to_bytes())
    expected = Measurement()
    expected.ecreate(1, SIZE)
    expected.add(PageRun(CODE - BASE, RX, 1, None, measured=False))
    expected.add(PageRun(TCS - BASE, PT_TCS, 1, None, measured=False))
    eid = building.cpu.secs(SECS_PAGE).eid
    assert building.cpu.enclaves[eid].measurement.digest() == expected.digest()


def test_tcs(building: Machine) -> None:
    tcs = a_tcs(flags=1, cssa=1, aep=0x1234, state=1)
    building.eadd(TCS, TCS_PAGE, PT_TCS | SECINFO_R | SECINFO_W | SECINFO_X, tcs.to_bytes())
    entry = building.entry(TCS_PAGE)
    assert (entry.pt, entry.r, entry.w, entry.x) == (PT_TCS, False, False, False)
    assert building.tcs() == a_tcs()


def test_tcs_keeps_aexnotify(building: Machine) -> None:
    building.eadd(TCS, TCS_PAGE, PT_TCS, a_tcs(flags=3).to_bytes())
    assert building.tcs().flags == 2


@pytest.mark.parametrize(
    ("rule", "rbx", "rcx"),
    [
        ("eadd.pageinfo", ODD_PAGEINFO, epc(DATA_PAGE)),
        ("eadd.epcpage", PAGEINFO, epc(DATA_PAGE) + 2048),
        ("eadd.epcpage", PAGEINFO, NON_CANONICAL),
        ("access.canonical", NON_CANONICAL, epc(DATA_PAGE)),
    ],
)
def test_operand_alignment(building: Machine, rule: str, rbx: int, rcx: int) -> None:
    with building.faults(GeneralProtection, rule):
        building.encls(Encls.EADD, rbx, rcx)


def test_epcpage_does_not_resolve_within_an_epc(building: Machine) -> None:
    with building.faults(PageFault, "eadd.epcpage", address=SOURCE, sgx=True):
        building.encls(Encls.EADD, PAGEINFO, SOURCE)
    building.space.map_epc(NOWHERE, DATA_PAGE, writable=False, executable=False)
    with building.faults(PageFault, "paging.writable", address=NOWHERE, sgx=False):
        building.encls(Encls.EADD, PAGEINFO, NOWHERE)


@pytest.mark.parametrize(
    ("rule", "fields"),
    [
        ("eadd.srcpge", {"srcpge": SOURCE + 2048}),
        ("eadd.secs", {"secs": epc(SECS_PAGE) + 2048}),
        ("eadd.secs", {"secs": NON_CANONICAL}),
        ("eadd.secinfo", {"secinfo": ODD_SECINFO}),
        ("eadd.linaddr", {"linaddr": DATA + 2048}),
        ("eadd.range", {"linaddr": BASE - PAGE_SIZE}),
        ("eadd.range", {"linaddr": BASE + SIZE}),
    ],
)
def test_pageinfo(building: Machine, rule: str, fields: dict[str, int]) -> None:
    usual = {"linaddr": DATA, "srcpge": SOURCE, "secinfo": SECINFO, "secs": epc(SECS_PAGE)}
    building.pageinfo(**{**usual, **fields})
    with building.faults(GeneralProtection, rule):
        eadd(building)


def test_range_limits(building: Machine) -> None:
    building.eadd(BASE, 1)
    building.eadd(BASE + SIZE - PAGE_SIZE, 2)
    assert building.entry(1).valid and building.entry(2).valid


def test_secs_operand(building: Machine) -> None:
    """It resolves within the EPC, is valid and an SECS."""
    building.epa(8)
    for rule, secs in (
        ("eadd.secs", SOURCE),
        ("eadd.secs.valid", epc(9)),
        ("eadd.secs.pt", epc(8)),
    ):
        building.pageinfo(linaddr=DATA, srcpge=SOURCE, secinfo=SECINFO, secs=secs)
        with building.faults(PageFault, rule, address=secs, sgx=True):
            eadd(building)
    building.space.map_epc(NOWHERE, SECS_PAGE, writable=False, executable=False)
    building.pageinfo(linaddr=DATA, srcpge=SOURCE, secinfo=SECINFO, secs=NOWHERE)
    with building.faults(PageFault, "paging.writable", address=NOWHERE):
        eadd(building)


@pytest.mark.parametrize(
    "flags",
    [
        PT_SECS,
        PT_VA,
        PT_TRIM,
        0xFF00,
        RW | 1 << 6,
        RW | 1 << 7,
        RW | 1 << 16,
        RW | SECINFO_PENDING,
        RW | SECINFO_MODIFIED,
        RW | SECINFO_PR,
        PT_REG | SECINFO_W,
        PT_REG | SECINFO_W | SECINFO_X,
        PT_TCS | SECINFO_PENDING,
    ],
)
def test_secinfo(building: Machine, flags: int) -> None:
    building.space.poke(SOURCE, a_tcs().to_bytes())
    building.secinfo(flags)
    with building.faults(GeneralProtection, "eadd.secinfo"):
        eadd(building)


def test_secinfo_is_checked_before_and_after_the_page(building: Machine) -> None:
    """The page type before, permissions after the EPCM: SDM, order of the pseudo-code."""
    eadd(building)
    building.secinfo(PT_VA)
    with building.faults(GeneralProtection, "eadd.secinfo"):
        eadd(building)
    building.secinfo(PT_REG | SECINFO_W)
    with building.faults(PageFault, "eadd.occupied"):
        eadd(building)


@pytest.mark.parametrize("flags", [PT_REG, PT_REG | SECINFO_X, PT_REG | SECINFO_R, RW | SECINFO_X])
def test_permissions(building: Machine, flags: int) -> None:
    building.eadd(DATA, DATA_PAGE, flags)
    assert building.entry(DATA_PAGE).flags == flags


def test_permissions_of_a_tcs_do_not_matter(building: Machine) -> None:
    building.eadd(TCS, TCS_PAGE, PT_TCS | SECINFO_W, a_tcs().to_bytes())
    assert building.entry(TCS_PAGE).flags == PT_TCS


def test_secinfo_reserved_bytes(building: Machine) -> None:
    building.space.poke(SECINFO + 8, b"\1")
    with building.faults(GeneralProtection, "eadd.secinfo"):
        eadd(building)


def test_concurrency(building: Machine) -> None:
    locks = building.cpu.locks
    for access in Access:
        with locks.held(DATA_PAGE, access), building.faults(GeneralProtection, "eadd.conflict"):
            eadd(building)
        with (
            locks.held(SECS_PAGE, access, Resource.MEASUREMENT),
            building.faults(GeneralProtection, "eadd.measurement-conflict"),
        ):
            eadd(building)
    with locks.held(SECS_PAGE, Access.EXCLUSIVE), building.faults(GeneralProtection, "eadd.secs-conflict"):
        eadd(building)
    with locks.held(SECS_PAGE, Access.SHARED), locks.held(SECS_PAGE, Access.EXCLUSIVE, Resource.TRACKING):
        eadd(building)


def test_epc_page_is_valid_already(building: Machine) -> None:
    eadd(building)
    with building.faults(PageFault, "eadd.occupied", address=epc(DATA_PAGE), sgx=True, write=True):
        eadd(building)


@pytest.mark.parametrize("offset", [88, 2048, 4095])
def test_tcs_reserved_bytes(building: Machine, offset: int) -> None:
    contents = bytearray(a_tcs().to_bytes())
    contents[offset] = 1
    with building.faults(GeneralProtection, "eadd.tcs"):
        building.eadd(TCS, TCS_PAGE, PT_TCS, bytes(contents))


@pytest.mark.parametrize("bit", [2, 63])
def test_tcs_reserved_flags(building: Machine, bit: int) -> None:
    with building.faults(GeneralProtection, "eadd.tcs"):
        building.eadd(TCS, TCS_PAGE, PT_TCS, a_tcs(flags=1 << bit).to_bytes())


@pytest.mark.parametrize("limits", [{"fslimit": 0xFFE}, {"gslimit": 0x1000}])
def test_tcs_limits_matter_in_32_bit_enclaves_only(machine: Machine, limits: dict[str, int]) -> None:
    machine.ecreate(a_secs(attributes=attributes(without=ATTRIBUTE_MODE64BIT)))
    contents = a_tcs(**limits).to_bytes()
    with machine.faults(GeneralProtection, "eadd.tcs"):
        machine.eadd(TCS, TCS_PAGE, PT_TCS, contents)
    machine.eadd(TCS, TCS_PAGE, PT_TCS, a_tcs(fslimit=0x1FFF, gslimit=0xFFFFFFFF).to_bytes())
    machine.ecreate(page=9)
    machine.eadd(TCS, 10, PT_TCS, contents, secs_page=9)
    assert Tcs.from_bytes(machine.cpu.read_epc(10)).fslimit == limits.get("fslimit", 0xFFF)


def test_enclave_is_initialised(enclave: Machine) -> None:
    prepared(enclave).pageinfo(linaddr=MORE, srcpge=SOURCE, secinfo=SECINFO, secs=epc(SECS_PAGE))
    with enclave.faults(GeneralProtection, "eadd.initialised"):
        enclave.encls(Encls.EADD, PAGEINFO, epc(9))


@pytest.mark.parametrize("flags", [PT_SECS, PT_VA, PT_TRIM])
def test_page_types_for_the_other_processor(flags: int) -> None:
    """The rule that both simulated processors share does not rely on the leaf's first look."""
    with pytest.raises(GeneralProtection):
        rules.check_secinfo_eadd(flags)
    rules.check_secinfo_eadd(PT_TCS)
