"""SDM vol. 3D, EPA, EBLOCK, ETRACK, ETRACKC, EWB, ELDB, ELDU, ELDBC and ELDUC."""

from __future__ import annotations

from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sgx_machine import (
    BUFFERS,
    CODE,
    CODE_PAGE,
    DATA,
    DATA_PAGE,
    FREE_PAGE,
    MORE_PAGE,
    NON_CANONICAL,
    NOWHERE,
    ODD_PAGEINFO,
    PAGEINFO,
    PCMD,
    RW,
    RX,
    SECS_PAGE,
    SOURCE,
    TCS_PAGE,
    VA_PAGE,
    Machine,
    epc,
)

from inclavare.sgx.codes import Encls, Status
from inclavare.sgx.paging import PAGE_SIZE, PT_SECS, PT_TRIM, PT_VA, PageInfo, Pcmd
from inclavare.tee.sgx_sim.processor import Access, EpcmEntry, GeneralProtection, PageFault, Resource

ZF, CF = 1 << 6, 1 << 0


def outcome(machine: Machine) -> tuple[Status, int, str]:
    """Code, flags and rule of the last leaf."""
    registers = machine.os.registers
    assert registers.rflags & 2
    return Status(registers.rax), registers.rflags & ~2, machine.events[-1].rule


SUCCESS = (Status.SGX_SUCCESS, 0, "")


# --- EPA --------------------------------------------------------------------------------------------------------


def test_epa(machine: Machine) -> None:
    machine.cpu.write_epc(3, b"left behind".ljust(PAGE_SIZE, b"x"))
    registers = machine.epa(3)
    assert (registers.rax, registers.rflags) == (Encls.EPA, 0x8D7)
    assert machine.entry(3) == EpcmEntry(valid=True, pt=PT_VA)
    assert machine.cpu.read_epc(3) == bytes(PAGE_SIZE)


@pytest.mark.parametrize(
    ("rule", "rbx", "rcx"),
    [
        ("epa.type", 2, epc(3)),
        ("epa.type", PT_VA, epc(3)),
        ("epa.epcpage", 3, epc(3) + 2048),
        ("epa.epcpage", 3, NON_CANONICAL),
    ],
)
def test_epa_operands(machine: Machine, rule: str, rbx: int, rcx: int) -> None:
    with machine.faults(GeneralProtection, rule):
        machine.encls(Encls.EPA, rbx, rcx)


def test_epa_page(machine: Machine) -> None:
    with machine.faults(PageFault, "epa.epcpage", address=SOURCE, sgx=True):
        machine.encls(Encls.EPA, 3, SOURCE)
    for access in Access:
        with machine.cpu.locks.held(3, access), machine.faults(GeneralProtection, "epa.conflict"):
            machine.epa(3)
    machine.epa(3)
    with machine.faults(PageFault, "epa.occupied", address=epc(3), sgx=True, write=True):
        machine.epa(3)
    machine.space.map_epc(NOWHERE, 4, writable=False, executable=False)
    with machine.faults(PageFault, "paging.writable", address=NOWHERE):
        machine.encls(Encls.EPA, 3, NOWHERE)


# --- EBLOCK -----------------------------------------------------------------------------------------------------


def test_eblock(enclave: Machine) -> None:
    for page in (CODE_PAGE, TCS_PAGE):
        enclave.block(page)
        assert outcome(enclave) == SUCCESS
        assert (enclave.entry(page).blocked, enclave.entry(page).epoch) == (True, 0)
    enclave.change(DATA_PAGE, pt=PT_TRIM)
    enclave.block(DATA_PAGE)
    assert outcome(enclave) == SUCCESS
    enclave.track()
    enclave.block(MORE_PAGE)
    assert enclave.entry(MORE_PAGE).epoch == 1


def test_eblock_codes(enclave: Machine) -> None:
    enclave.block(FREE_PAGE)
    assert outcome(enclave) == (Status.SGX_PG_INVLD, ZF, "eblock.valid")
    enclave.block(SECS_PAGE)
    assert outcome(enclave) == (Status.SGX_PG_IS_SECS, CF, "eblock.secs")
    enclave.block(VA_PAGE)
    assert outcome(enclave) == (Status.SGX_NOTBLOCKABLE, CF, "eblock.pt")
    enclave.block(CODE_PAGE)
    enclave.track()
    enclave.block(CODE_PAGE)
    assert outcome(enclave) == (Status.SGX_BLKSTATE, CF, "eblock.blocked")
    assert enclave.entry(CODE_PAGE).epoch == 0
    with enclave.cpu.locks.held(DATA_PAGE, Access.EXCLUSIVE):
        enclave.block(DATA_PAGE)
        assert outcome(enclave) == (Status.SGX_EPC_PAGE_CONFLICT, ZF, "eblock.conflict")
    with enclave.cpu.locks.held(SECS_PAGE, Access.EXCLUSIVE, Resource.TRACKING):
        enclave.block(DATA_PAGE)
        assert outcome(enclave) == (Status.SGX_ENTRYEPOCH_LOCKED, ZF, "eblock.epoch")
    assert not enclave.entry(DATA_PAGE).blocked
    locks = enclave.cpu.locks
    with locks.held(DATA_PAGE, Access.SHARED), locks.held(SECS_PAGE, Access.SHARED, Resource.TRACKING):
        enclave.block(DATA_PAGE)
        assert outcome(enclave) == SUCCESS


ONE_PAGE = [Encls.EBLOCK, Encls.ETRACK, Encls.ETRACKC]


@pytest.mark.parametrize("leaf", ONE_PAGE)
def test_operand_alignment(enclave: Machine, leaf: Encls) -> None:
    operand = "secs" if leaf is Encls.ETRACK else "epcpage"
    for rcx in (epc(0) + 2048, NON_CANONICAL):
        with enclave.faults(GeneralProtection, f"{leaf.name.lower()}.{operand}"):
            enclave.encls(leaf, rcx=rcx)
    with enclave.faults(PageFault, f"{leaf.name.lower()}.{operand}", address=SOURCE, sgx=True):
        enclave.encls(leaf, rcx=SOURCE)


# --- ETRACK, ETRACKC --------------------------------------------------------------------------------------------


def epoch(machine: Machine) -> int:
    return machine.cpu.enclaves[machine.cpu.secs(SECS_PAGE).eid].epoch


def test_etrack(enclave: Machine) -> None:
    enclave.track()
    assert outcome(enclave) == SUCCESS
    assert epoch(enclave) == 1


def test_etrack_previous_cycle_is_incomplete(inside: Machine) -> None:
    inside.track()
    assert outcome(inside) == SUCCESS
    inside.track()
    assert outcome(inside) == (Status.SGX_PREV_TRK_INCMPL, ZF, "etrack.incomplete")
    assert epoch(inside) == 1
    inside.user.aex(0x20)
    inside.track()
    assert outcome(inside) == SUCCESS
    inside.enter()
    inside.track()
    assert outcome(inside) == SUCCESS
    assert epoch(inside) == 3


def test_etrack_page(enclave: Machine) -> None:
    for rule, page in (("etrack.secs.valid", FREE_PAGE), ("etrack.secs.pt", CODE_PAGE), ("etrack.secs.pt", VA_PAGE)):
        with enclave.faults(PageFault, rule, address=epc(page), sgx=True):
            enclave.encls(Encls.ETRACK, rcx=epc(page))


def test_etrack_concurrency(enclave: Machine) -> None:
    locks = enclave.cpu.locks
    with locks.held(SECS_PAGE, Access.EXCLUSIVE), enclave.faults(GeneralProtection, "etrack.conflict"):
        enclave.track()
    for access in Access:
        with (
            locks.held(SECS_PAGE, access, Resource.TRACKING),
            enclave.faults(GeneralProtection, "etrack.tracking-conflict"),
        ):
            enclave.track()
    with locks.held(SECS_PAGE, Access.SHARED), locks.held(SECS_PAGE, Access.EXCLUSIVE, Resource.MEASUREMENT):
        enclave.track()


def test_etrackc(enclave: Machine) -> None:
    for number, page in enumerate((CODE_PAGE, TCS_PAGE, SECS_PAGE), 1):
        enclave.encls(Encls.ETRACKC, rcx=epc(page))
        assert outcome(enclave) == SUCCESS
        assert epoch(enclave) == number
    enclave.encls(Encls.ETRACKC, rcx=epc(VA_PAGE))
    assert outcome(enclave) == (Status.SGX_TRACK_NOT_REQUIRED, CF, "etrackc.pt")
    enclave.encls(Encls.ETRACKC, rcx=epc(FREE_PAGE))
    assert outcome(enclave) == (Status.SGX_PG_INVLD, ZF, "etrackc.valid")
    enclave.enter()
    enclave.encls(Encls.ETRACKC, rcx=epc(CODE_PAGE))
    assert outcome(enclave) == SUCCESS
    enclave.encls(Encls.ETRACKC, rcx=epc(CODE_PAGE))
    assert outcome(enclave) == (Status.SGX_PREV_TRK_INCMPL, ZF, "etrackc.incomplete")


def test_etrackc_concurrency(enclave: Machine) -> None:
    locks = enclave.cpu.locks
    with locks.held(CODE_PAGE, Access.EXCLUSIVE):
        enclave.encls(Encls.ETRACKC, rcx=epc(CODE_PAGE))
        assert outcome(enclave) == (Status.SGX_EPC_PAGE_CONFLICT, ZF, "etrackc.conflict")
    for access in Access:
        with locks.held(SECS_PAGE, access, Resource.TRACKING):
            enclave.encls(Encls.ETRACKC, rcx=epc(CODE_PAGE))
            assert outcome(enclave) == (Status.SGX_EPC_PAGE_CONFLICT, ZF, "etrackc.tracking-conflict")
    with locks.held(CODE_PAGE, Access.SHARED):
        enclave.encls(Encls.ETRACKC, rcx=epc(CODE_PAGE))
        assert outcome(enclave) == SUCCESS


def test_tracking_is_each_enclaves_own(inside: Machine) -> None:
    inside.ecreate(page=9)
    inside.track()
    for _ in range(2):
        inside.encls(Encls.ETRACK, rcx=epc(9))
        assert outcome(inside) == SUCCESS


# --- EWB --------------------------------------------------------------------------------------------------------


def test_ewb(enclave: Machine) -> None:
    eid = enclave.cpu.secs(SECS_PAGE).eid
    contents, pcmd, linear = enclave.evict(CODE_PAGE, slot=3)
    assert outcome(enclave) == SUCCESS
    assert linear == CODE
    assert b"code" not in contents and contents != bytes(PAGE_SIZE)
    parsed = Pcmd.from_bytes(pcmd)
    assert (parsed.flags, parsed.enclave_id) == (RX, eid)
    assert enclave.entry(CODE_PAGE) == EpcmEntry()
    assert CODE_PAGE not in enclave.cpu.memory.store.pages
    slots = enclave.cpu.read_epc(VA_PAGE)
    assert slots[:24] == bytes(24) and any(slots[24:32]) and slots[32:] == bytes(PAGE_SIZE - 32)


def test_ewb_cipher(enclave: Machine) -> None:
    """AES-128-GCM under CR_BASE_PK; the counter block is the version shifted by 32, the header a MACHEADER."""
    eid = enclave.cpu.secs(SECS_PAGE).eid
    contents, pcmd, linear = enclave.evict(CODE_PAGE, slot=3)
    version = int.from_bytes(enclave.cpu.read_epc(VA_PAGE, 24, 8), "little")
    header = eid.to_bytes(8, "little") + linear.to_bytes(8, "little") + pcmd[:64] + bytes(48)
    counter = (version << 32).to_bytes(12, "big")
    plain = AESGCM(enclave.cpu.page_key).decrypt(counter, contents + pcmd[112:], header)
    assert plain == b"code".ljust(PAGE_SIZE, b"\0")


def test_ewb_keeps_the_pages_state(enclave: Machine) -> None:
    enclave.change(DATA_PAGE, pending=True, modified=True, pr=True)
    flags = enclave.entry(DATA_PAGE).flags
    assert Pcmd.from_bytes(enclave.evict(DATA_PAGE)[1]).flags == flags == RW | 0x38


def test_ewb_never_writes_the_same_twice(enclave: Machine) -> None:
    first = enclave.evict(CODE_PAGE)
    enclave.load(first, CODE_PAGE)
    second = enclave.evict(CODE_PAGE)
    assert first[0] != second[0]
    assert first[1] != second[1]


@pytest.mark.parametrize(
    ("rule", "operands"),
    [
        ("ewb.pageinfo", (ODD_PAGEINFO, epc(CODE_PAGE), epc(VA_PAGE))),
        ("ewb.epcpage", (PAGEINFO, epc(CODE_PAGE) + 2048, epc(VA_PAGE))),
        ("ewb.epcpage", (PAGEINFO, NON_CANONICAL, epc(VA_PAGE))),
        ("ewb.slot", (PAGEINFO, epc(CODE_PAGE), epc(VA_PAGE) + 4)),
        ("ewb.slot", (PAGEINFO, epc(CODE_PAGE), NON_CANONICAL)),
        ("ewb.same-page", (PAGEINFO, epc(VA_PAGE), epc(VA_PAGE) + 8)),
    ],
)
def test_ewb_operand_alignment(enclave: Machine, rule: str, operands: tuple[int, int, int]) -> None:
    enclave.pageinfo(srcpge=SOURCE, secinfo=PCMD)
    with enclave.faults(GeneralProtection, rule):
        enclave.encls(Encls.EWB, *operands)


@pytest.mark.parametrize(
    ("rule", "rcx", "rdx"),
    [
        ("ewb.epcpage", SOURCE, epc(VA_PAGE)),
        ("ewb.slot", epc(CODE_PAGE), SOURCE),
        ("ewb.valid", epc(FREE_PAGE), epc(VA_PAGE)),
        ("ewb.va.valid", epc(CODE_PAGE), epc(FREE_PAGE)),
        ("ewb.va.pt", epc(CODE_PAGE), epc(DATA_PAGE)),
    ],
)
def test_ewb_pages(enclave: Machine, rule: str, rcx: int, rdx: int) -> None:
    enclave.pageinfo(srcpge=SOURCE, secinfo=PCMD)
    address = rdx if ".slot" in rule or (".va" in rule and rule[4:] != "valid") else rcx
    with enclave.faults(PageFault, rule, address=address, sgx=True):
        enclave.encls(Encls.EWB, PAGEINFO, rcx, rdx)


@pytest.mark.parametrize(
    ("rule", "fields"),
    [
        ("ewb.pageinfo", {"linaddr": CODE}),
        ("ewb.pageinfo", {"secs": epc(SECS_PAGE)}),
        ("ewb.pcmd", {"secinfo": PCMD + 64}),
        ("ewb.srcpge", {"srcpge": SOURCE + 2048}),
    ],
)
def test_ewb_pageinfo(enclave: Machine, rule: str, fields: dict[str, int]) -> None:
    enclave.pageinfo(**{"srcpge": SOURCE, "secinfo": PCMD, **fields})
    with enclave.faults(GeneralProtection, rule):
        enclave.encls(Encls.EWB, PAGEINFO, epc(CODE_PAGE), epc(VA_PAGE))


@pytest.mark.parametrize("fields", [{"srcpge": NOWHERE}, {"secinfo": NOWHERE}])
def test_ewb_loses_nothing_if_it_cannot_write(enclave: Machine, fields: dict[str, int]) -> None:
    enclave.block(CODE_PAGE)
    enclave.track()
    enclave.pageinfo(**{"srcpge": SOURCE, "secinfo": PCMD, **fields})
    with enclave.faults(PageFault, "paging.present", address=NOWHERE):
        enclave.encls(Encls.EWB, PAGEINFO, epc(CODE_PAGE), epc(VA_PAGE))
    enclave.space.protect(BUFFERS, writable=False, executable=False)
    enclave.pageinfo(srcpge=SOURCE, secinfo=PCMD)
    with enclave.faults(PageFault, "paging.writable", address=PCMD):
        enclave.encls(Encls.EWB, PAGEINFO, epc(CODE_PAGE), epc(VA_PAGE))


def test_ewb_concurrency(enclave: Machine) -> None:
    locks = enclave.cpu.locks
    enclave.block(CODE_PAGE)
    enclave.track()
    enclave.pageinfo(srcpge=SOURCE, secinfo=PCMD)
    for access in Access:
        with locks.held(CODE_PAGE, access), enclave.faults(GeneralProtection, "ewb.conflict"):
            enclave.ewb(CODE_PAGE)
    with locks.held(VA_PAGE, Access.EXCLUSIVE), enclave.faults(GeneralProtection, "ewb.va-conflict"):
        enclave.ewb(CODE_PAGE)
    with locks.held(VA_PAGE, Access.SHARED):
        enclave.ewb(CODE_PAGE)
    assert outcome(enclave) == SUCCESS


def test_ewb_of_a_page_that_is_not_blocked(enclave: Machine) -> None:
    enclave.track()
    enclave.ewb(CODE_PAGE)
    assert outcome(enclave) == (Status.SGX_PAGE_NOT_BLOCKED, ZF, "ewb.blocked")
    assert enclave.entry(CODE_PAGE).valid


def test_ewb_without_tracking(enclave: Machine) -> None:
    """The ETRACK must come after the EBLOCK."""
    enclave.track()
    enclave.block(CODE_PAGE)
    enclave.ewb(CODE_PAGE)
    assert outcome(enclave) == (Status.SGX_NOT_TRACKED, ZF, "ewb.tracked")
    enclave.track()
    enclave.ewb(CODE_PAGE)
    assert outcome(enclave) == SUCCESS


def test_ewb_while_a_thread_may_hold_a_translation(inside: Machine) -> None:
    inside.block(CODE_PAGE)
    inside.track()
    inside.ewb(CODE_PAGE)
    assert outcome(inside) == (Status.SGX_NOT_TRACKED, ZF, "ewb.tracked")
    inside.user.aex(0x20)
    inside.user.enclu()
    # It is inside again, but entered after the ETRACK.
    assert inside.user.enclave_mode
    inside.ewb(CODE_PAGE)
    assert outcome(inside) == SUCCESS


def test_ewb_of_an_secs(enclave: Machine) -> None:
    enclave.ewb(SECS_PAGE)
    assert outcome(enclave) == (Status.SGX_CHILD_PRESENT, ZF, "ewb.children")
    eid = enclave.cpu.secs(SECS_PAGE).eid
    for slot, page in enumerate(range(1, 7), 1):
        enclave.evict(page, slot)
    enclave.ewb(SECS_PAGE)
    assert outcome(enclave) == SUCCESS
    assert Pcmd.from_bytes(enclave.space.peek(PCMD, 128)).enclave_id == eid
    assert Pcmd.from_bytes(enclave.space.peek(PCMD, 128)).flags == PT_SECS


def test_ewb_of_a_va_page(enclave: Machine) -> None:
    enclave.epa(9)
    evicted = enclave.evict(CODE_PAGE, slot=100)
    enclave.ewb(VA_PAGE, va_page=9)
    assert outcome(enclave) == SUCCESS
    pcmd = enclave.space.peek(PCMD, 128)
    assert (Pcmd.from_bytes(pcmd).enclave_id, Pcmd.from_bytes(pcmd).flags) == (0, PT_VA)
    contents = enclave.space.peek(SOURCE, PAGE_SIZE)
    enclave.pageinfo(srcpge=SOURCE, secinfo=PCMD)
    enclave.encls(Encls.ELDB, PAGEINFO, epc(VA_PAGE), epc(9))
    assert outcome(enclave) == SUCCESS
    assert enclave.entry(VA_PAGE) == EpcmEntry(valid=True, pt=PT_VA)
    assert contents != enclave.cpu.read_epc(VA_PAGE)
    enclave.load(evicted, CODE_PAGE, 100)
    assert outcome(enclave) == SUCCESS


def test_ewb_into_a_slot_that_is_in_use(enclave: Machine) -> None:
    """Information, not an error: the page is out, and what had the slot before is lost."""
    first = enclave.evict(CODE_PAGE)
    enclave.block(DATA_PAGE)
    enclave.track()
    enclave.ewb(DATA_PAGE)
    assert outcome(enclave) == (Status.SGX_VA_SLOT_OCCUPIED, CF, "ewb.slot-occupied")
    assert not enclave.entry(DATA_PAGE).valid
    second = enclave.space.peek(SOURCE, PAGE_SIZE), enclave.space.peek(PCMD, 128), DATA
    enclave.load(first, CODE_PAGE)
    assert outcome(enclave)[0] is Status.SGX_MAC_COMPARE_FAIL
    enclave.load(second, DATA_PAGE)
    assert outcome(enclave) == SUCCESS


# --- ELDB, ELDU, ELDBC, ELDUC -----------------------------------------------------------------------------------

LOADS = [Encls.ELDB, Encls.ELDU, Encls.ELDBC, Encls.ELDUC]


@pytest.mark.parametrize("leaf", LOADS)
def test_load(enclave: Machine, leaf: Encls) -> None:
    before = enclave.entry(CODE_PAGE)
    evicted = enclave.evict(CODE_PAGE, slot=2)
    enclave.load(evicted, FREE_PAGE, 2, leaf=leaf)
    assert outcome(enclave) == SUCCESS
    entry = enclave.entry(FREE_PAGE)
    assert entry.blocked is (leaf in (Encls.ELDB, Encls.ELDBC))
    assert entry.epoch is None
    assert (entry.flags, entry.enclave_secs, entry.enclave_address) == (before.flags, SECS_PAGE, CODE)
    assert enclave.cpu.read_epc(FREE_PAGE, 0, 4) == b"code"
    # The version is used up.
    assert enclave.cpu.read_epc(VA_PAGE) == bytes(PAGE_SIZE)
    enclave.load(evicted, 9, 2, leaf=leaf)
    assert outcome(enclave) == (Status.SGX_MAC_COMPARE_FAIL, ZF, f"{leaf.name.lower()}.mac")
    assert not enclave.entry(9).valid


def test_loaded_blocked_page_can_be_written_out_again(enclave: Machine) -> None:
    enclave.load(enclave.evict(CODE_PAGE), CODE_PAGE, leaf=Encls.ELDB)
    enclave.ewb(CODE_PAGE)
    assert outcome(enclave) == SUCCESS


def test_load_of_an_secs(enclave: Machine) -> None:
    """An enclave can be paged out entirely and goes on where it was."""
    secs = enclave.cpu.secs(SECS_PAGE)
    pages = [enclave.evict(page, page) for page in range(1, 7)]
    enclave.ewb(SECS_PAGE, 0)
    out = enclave.space.peek(SOURCE, PAGE_SIZE), enclave.space.peek(PCMD, 128), 0
    enclave.load(out, 12, 0, secs=0, leaf=Encls.ELDB)
    assert outcome(enclave) == SUCCESS
    assert enclave.entry(12) == EpcmEntry(valid=True, pt=PT_SECS)
    assert enclave.cpu.secs(12) == secs
    for page, evicted in enumerate(pages, 1):
        enclave.load(evicted, page, page, secs=epc(12))
        assert outcome(enclave) == SUCCESS
    enclave.enter()
    assert enclave.user.active is not None and enclave.user.active.secs_page == 12


@pytest.mark.parametrize("leaf", LOADS)
@pytest.mark.parametrize(
    ("rule", "operands"),
    [
        ("pageinfo", (ODD_PAGEINFO, epc(FREE_PAGE), epc(VA_PAGE))),
        ("epcpage", (PAGEINFO, epc(FREE_PAGE) + 2048, epc(VA_PAGE))),
        ("epcpage", (PAGEINFO, NON_CANONICAL, epc(VA_PAGE))),
        ("slot", (PAGEINFO, epc(FREE_PAGE), epc(VA_PAGE) + 4)),
    ],
)
def test_load_operand_alignment(enclave: Machine, leaf: Encls, rule: str, operands: tuple[int, int, int]) -> None:
    enclave.evict(CODE_PAGE)
    enclave.pageinfo(linaddr=CODE, srcpge=SOURCE, secinfo=PCMD, secs=epc(SECS_PAGE))
    with enclave.faults(GeneralProtection, f"{leaf.name.lower()}.{rule}"):
        enclave.encls(leaf, *operands)


@pytest.mark.parametrize(
    ("rule", "fields"),
    [
        ("eldu.pcmd", {"secinfo": PCMD + 64}),
        ("eldu.srcpge", {"srcpge": SOURCE + 2048}),
        ("eldu.secs", {"secs": epc(SECS_PAGE) + 2048}),
        ("eldu.secs", {"secs": NON_CANONICAL}),
    ],
)
def test_load_pageinfo(enclave: Machine, rule: str, fields: dict[str, int]) -> None:
    enclave.evict(CODE_PAGE)
    enclave.pageinfo(**{"linaddr": CODE, "srcpge": SOURCE, "secinfo": PCMD, "secs": epc(SECS_PAGE), **fields})
    with enclave.faults(GeneralProtection, rule):
        enclave.encls(Encls.ELDU, PAGEINFO, epc(FREE_PAGE), epc(VA_PAGE))


@pytest.mark.parametrize(
    ("rule", "rcx", "rdx", "secs"),
    [
        ("eldu.epcpage", SOURCE, epc(VA_PAGE), epc(SECS_PAGE)),
        ("eldu.slot", epc(FREE_PAGE), SOURCE, epc(SECS_PAGE)),
        ("eldu.occupied", epc(DATA_PAGE), epc(VA_PAGE), epc(SECS_PAGE)),
        ("eldu.va.valid", epc(FREE_PAGE), epc(12), epc(SECS_PAGE)),
        ("eldu.va.pt", epc(FREE_PAGE), epc(DATA_PAGE), epc(SECS_PAGE)),
        ("eldu.secs", epc(FREE_PAGE), epc(VA_PAGE), SOURCE),
        ("eldu.secs.valid", epc(FREE_PAGE), epc(VA_PAGE), epc(12)),
        ("eldu.secs.pt", epc(FREE_PAGE), epc(VA_PAGE), epc(DATA_PAGE)),
    ],
)
def test_load_pages(enclave: Machine, rule: str, rcx: int, rdx: int, secs: int) -> None:
    enclave.evict(CODE_PAGE)
    enclave.pageinfo(linaddr=CODE, srcpge=SOURCE, secinfo=PCMD, secs=secs)
    with enclave.faults(PageFault, rule, sgx=True):
        enclave.encls(Encls.ELDU, PAGEINFO, rcx, rdx)


@pytest.mark.parametrize("leaf", LOADS)
def test_load_concurrency(enclave: Machine, leaf: Encls) -> None:
    """ELDB and ELDU fault, ELDBC and ELDUC report."""
    evicted = enclave.evict(CODE_PAGE)
    conflicts: list[tuple[int, Access, str]] = [
        (FREE_PAGE, Access.SHARED, "conflict"),
        (FREE_PAGE, Access.EXCLUSIVE, "conflict"),
        (VA_PAGE, Access.EXCLUSIVE, "va-conflict"),
        (SECS_PAGE, Access.EXCLUSIVE, "secs-conflict"),
    ]
    for page, access, name in conflicts:
        rule = f"{leaf.name.lower()}.{name}"
        with enclave.cpu.locks.held(page, access):
            if leaf in (Encls.ELDBC, Encls.ELDUC):
                enclave.load(evicted, FREE_PAGE, leaf=leaf)
                assert outcome(enclave) == (Status.SGX_EPC_PAGE_CONFLICT, ZF, rule)
            else:
                with enclave.faults(GeneralProtection, rule):
                    enclave.load(evicted, FREE_PAGE, leaf=leaf)
    with enclave.cpu.locks.held(VA_PAGE, Access.SHARED), enclave.cpu.locks.held(SECS_PAGE, Access.SHARED):
        enclave.load(evicted, FREE_PAGE, leaf=leaf)
    assert outcome(enclave) == SUCCESS


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda contents, pcmd, linear: (flipped(contents, 17), pcmd, linear),
        lambda contents, pcmd, linear: (contents, flipped(pcmd, 112), linear),
        lambda contents, pcmd, linear: (contents, flipped(pcmd, 0), linear),
        lambda contents, pcmd, linear: (contents, flipped(pcmd, 63), linear),
        lambda contents, pcmd, linear: (contents, flipped(pcmd, 72), linear),
        lambda contents, pcmd, linear: (contents, flipped(pcmd, 111), linear),
        lambda contents, pcmd, linear: (contents, pcmd, linear + PAGE_SIZE),
        lambda contents, pcmd, linear: (contents, flipped(pcmd, 1), linear),
    ],
    ids=["contents", "mac", "permissions", "secinfo", "reserved", "last reserved", "linaddr", "type"],
)
def test_load_of_a_damaged_page(enclave: Machine, damage: Any) -> None:
    evicted = enclave.evict(CODE_PAGE)
    enclave.load(damage(*evicted), FREE_PAGE)
    assert outcome(enclave) == (Status.SGX_MAC_COMPARE_FAIL, ZF, "eldu.mac")
    assert enclave.entry(FREE_PAGE) == EpcmEntry()
    # The version stays until the right page comes.
    enclave.load(evicted, FREE_PAGE)
    assert outcome(enclave) == SUCCESS


def test_load_does_not_look_at_the_enclave_id_in_pcmd(enclave: Machine) -> None:
    """It is there for software; the binding is to the SECS."""
    contents, pcmd, linear = enclave.evict(CODE_PAGE)
    enclave.load((contents, flipped(pcmd, 64), linear), FREE_PAGE)
    assert outcome(enclave) == SUCCESS


def test_load_into_another_enclave(enclave: Machine) -> None:
    enclave.ecreate(page=9)
    enclave.load(enclave.evict(CODE_PAGE), FREE_PAGE, secs=epc(9))
    assert outcome(enclave) == (Status.SGX_MAC_COMPARE_FAIL, ZF, "eldu.mac")


def test_load_with_another_slot(enclave: Machine) -> None:
    one, other = enclave.evict(CODE_PAGE, 0), enclave.evict(DATA_PAGE, 1)
    enclave.load(one, FREE_PAGE, 1)
    assert outcome(enclave)[0] is Status.SGX_MAC_COMPARE_FAIL
    enclave.load(other, FREE_PAGE, 1)
    assert outcome(enclave) == SUCCESS


def test_load_of_an_older_version(enclave: Machine) -> None:
    """Roll-back: the page was loaded, changed and evicted again into the same slot."""
    old = enclave.evict(DATA_PAGE)
    enclave.load(old, DATA_PAGE)
    enclave.cpu.write_epc(DATA_PAGE, b"newer", 0)
    new = enclave.evict(DATA_PAGE)
    enclave.load(old, DATA_PAGE)
    assert outcome(enclave)[0] is Status.SGX_MAC_COMPARE_FAIL
    enclave.load(new, DATA_PAGE)
    assert enclave.cpu.read_epc(DATA_PAGE, 0, 5) == b"newer"


def test_page_keys_are_the_processors_own(enclave: Machine) -> None:
    other = Machine(enclave.key).build()
    evicted = enclave.evict(CODE_PAGE)
    other.evict(CODE_PAGE)
    other.load(evicted, CODE_PAGE)
    assert outcome(other)[0] is Status.SGX_MAC_COMPARE_FAIL


def test_measurement_survives_eviction(machine: Machine) -> None:
    """SECS and pages leave the EPC between ECREATE and EINIT."""
    machine.ecreate()
    machine.epa()
    machine.ewb(SECS_PAGE)
    out = machine.space.peek(SOURCE, PAGE_SIZE), machine.space.peek(PCMD, 128), 0
    machine.load(out, SECS_PAGE, secs=0)
    machine.add_pages()
    assert machine.einit().rax == 0


def test_pageinfo_is_parsed_as_told(enclave: Machine) -> None:
    enclave.evict(CODE_PAGE)
    assert PageInfo.from_bytes(enclave.space.peek(PAGEINFO, 32)) == PageInfo(CODE, SOURCE, PCMD, 0)
