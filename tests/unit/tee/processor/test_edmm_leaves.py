"""SDM vol. 3D, EAUG, EMODPR, EMODT, EACCEPT, EACCEPTCOPY and EMODPE."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from sgx_machine import (
    BASE,
    CODE_PAGE,
    DATA,
    DATA_PAGE,
    FREE_PAGE,
    HOST_DATA,
    MORE,
    MORE_PAGE,
    NON_CANONICAL,
    NOWHERE,
    ODD_PAGEINFO,
    ODD_SECINFO,
    PAGEINFO,
    RW,
    RWX,
    SECINFO,
    SECS_PAGE,
    SIZE,
    SOURCE,
    SPARE,
    TCS_PAGE,
    VA_PAGE,
    Machine,
    a_tcs,
    epc,
)

from inclavare.sgx.codes import Encls, Enclu, Status
from inclavare.sgx.paging import (
    PAGE_SIZE,
    PT_REG,
    PT_SECS,
    PT_SS_FIRST,
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
from inclavare.sgx.structs import SecInfo
from inclavare.tee.sgx_sim.processor import Access, EpcmEntry, GeneralProtection, PageFault, Resource

ZF = 1 << 6
#: Where the enclave's own SECINFO lies.
INNER = DATA + 0x40


def outcome(machine: Machine) -> tuple[Status, int, str]:
    """Code, flags and rule of the operating system's last leaf."""
    registers = machine.os.registers
    return Status(registers.rax), registers.rflags & ~2, machine.events[-1].rule


SUCCESS = (Status.SGX_SUCCESS, 0, "")


# --- EAUG -------------------------------------------------------------------------------------------------------


def test_eaug(enclave: Machine) -> None:
    enclave.cpu.write_epc(FREE_PAGE, b"left behind".ljust(PAGE_SIZE, b"x"))
    registers = enclave.eaug()
    assert (registers.rax, registers.rflags) == (Encls.EAUG, 0x8D7)
    assert enclave.entry(FREE_PAGE) == EpcmEntry(
        valid=True, pt=PT_REG, r=True, w=True, pending=True, enclave_secs=SECS_PAGE, enclave_address=SPARE
    )
    assert enclave.cpu.read_epc(FREE_PAGE) == bytes(PAGE_SIZE)


@pytest.mark.parametrize(
    ("rule", "rbx", "rcx"),
    [
        ("eaug.pageinfo", ODD_PAGEINFO, epc(FREE_PAGE)),
        ("eaug.epcpage", PAGEINFO, epc(FREE_PAGE) + 2048),
        ("eaug.epcpage", PAGEINFO, NON_CANONICAL),
    ],
)
def test_eaug_operand_alignment(enclave: Machine, rule: str, rbx: int, rcx: int) -> None:
    enclave.pageinfo(linaddr=SPARE, secs=epc(SECS_PAGE))
    with enclave.faults(GeneralProtection, rule):
        enclave.encls(Encls.EAUG, rbx, rcx)


@pytest.mark.parametrize(
    ("rule", "fields"),
    [
        ("eaug.secs", {"secs": epc(SECS_PAGE) + 2048}),
        ("eaug.linaddr", {"linaddr": SPARE + 2048}),
        ("eaug.source", {"srcpge": SOURCE}),
        ("eaug.source", {"secinfo": SECINFO}),
        ("eaug.range", {"linaddr": BASE - PAGE_SIZE}),
        ("eaug.range", {"linaddr": BASE + SIZE}),
    ],
)
def test_eaug_pageinfo(enclave: Machine, rule: str, fields: dict[str, int]) -> None:
    enclave.pageinfo(**{"linaddr": SPARE, "secs": epc(SECS_PAGE), **fields})
    with enclave.faults(GeneralProtection, rule):
        enclave.encls(Encls.EAUG, PAGEINFO, epc(FREE_PAGE))


@pytest.mark.parametrize(
    ("rule", "rcx", "secs"),
    [
        ("eaug.epcpage", SOURCE, epc(SECS_PAGE)),
        ("eaug.occupied", epc(DATA_PAGE), epc(SECS_PAGE)),
        ("eaug.secs", epc(FREE_PAGE), SOURCE),
        ("eaug.secs.valid", epc(FREE_PAGE), epc(12)),
        ("eaug.secs.pt", epc(FREE_PAGE), epc(DATA_PAGE)),
    ],
)
def test_eaug_pages(enclave: Machine, rule: str, rcx: int, secs: int) -> None:
    enclave.pageinfo(linaddr=SPARE, secs=secs)
    with enclave.faults(PageFault, rule, sgx=True):
        enclave.encls(Encls.EAUG, PAGEINFO, rcx)


def test_eaug_needs_an_initialised_enclave(machine: Machine) -> None:
    machine.ecreate()
    with machine.faults(GeneralProtection, "eaug.initialised"):
        machine.eaug()


def test_eaug_concurrency(enclave: Machine) -> None:
    locks = enclave.cpu.locks
    for access in Access:
        with locks.held(FREE_PAGE, access), enclave.faults(GeneralProtection, "eaug.conflict"):
            enclave.eaug(mapped=False)
    with locks.held(SECS_PAGE, Access.EXCLUSIVE), enclave.faults(GeneralProtection, "eaug.secs-conflict"):
        enclave.eaug(mapped=False)
    with locks.held(SECS_PAGE, Access.SHARED):
        enclave.eaug()


# --- EMODPR, EMODT ----------------------------------------------------------------------------------------------


def modify(machine: Machine, leaf: Encls, page: int, flags: int) -> tuple[Status, int, str]:
    machine.secinfo(flags)
    machine.encls(leaf, SECINFO, epc(page))
    return outcome(machine)


@pytest.mark.parametrize(
    ("asked", "left"),
    [
        (SECINFO_R, SECINFO_R),
        (SECINFO_R | SECINFO_X, SECINFO_R),
        (SECINFO_R | SECINFO_W | SECINFO_X, SECINFO_R | SECINFO_W),
        (0, 0),
        (SECINFO_X, 0),
    ],
)
def test_emodpr(enclave: Machine, asked: int, left: int) -> None:
    enclave.track()
    assert modify(enclave, Encls.EMODPR, DATA_PAGE, asked) == SUCCESS
    assert enclave.entry(DATA_PAGE).flags == PT_REG | SECINFO_PR | left
    assert enclave.entry(DATA_PAGE).epoch == 1


@pytest.mark.parametrize("asked", range(8))
@pytest.mark.parametrize("before", [0, SECINFO_R, SECINFO_X, SECINFO_R | SECINFO_W, 7])
def test_emodpr_only_restricts(enclave: Machine, asked: int, before: int) -> None:
    if asked & SECINFO_W and not asked & SECINFO_R:
        return
    enclave.change(DATA_PAGE, r=bool(before & 1), w=bool(before & 2), x=bool(before & 4))
    assert modify(enclave, Encls.EMODPR, DATA_PAGE, asked) == SUCCESS
    assert enclave.entry(DATA_PAGE).flags == PT_REG | SECINFO_PR | before & asked


def test_emodpr_of_an_executable_page(enclave: Machine) -> None:
    assert modify(enclave, Encls.EMODPR, CODE_PAGE, SECINFO_R | SECINFO_X) == SUCCESS
    assert enclave.entry(CODE_PAGE).flags == PT_REG | SECINFO_PR | SECINFO_R | SECINFO_X


@pytest.mark.parametrize("kind", [PT_TCS, PT_TRIM])
def test_emodt(enclave: Machine, kind: int) -> None:
    enclave.track()
    enclave.change(CODE_PAGE, pr=True, w=True)
    assert modify(enclave, Encls.EMODT, CODE_PAGE, kind) == SUCCESS
    entry = enclave.entry(CODE_PAGE)
    assert entry.flags == kind | SECINFO_MODIFIED
    assert entry.epoch == 1


def test_emodt_of_a_tcs(enclave: Machine) -> None:
    assert modify(enclave, Encls.EMODT, TCS_PAGE, PT_TRIM) == SUCCESS
    assert enclave.entry(TCS_PAGE).flags == PT_TRIM | SECINFO_MODIFIED


@pytest.mark.parametrize("leaf", [Encls.EMODPR, Encls.EMODT])
class TestModify:
    flags: ClassVar = {Encls.EMODPR: SECINFO_R, Encls.EMODT: PT_TRIM}

    def test_operand_alignment(self, enclave: Machine, leaf: Encls) -> None:
        name = leaf.name.lower()
        enclave.secinfo(self.flags[leaf])
        for rule, rbx, rcx in (
            (f"{name}.secinfo", ODD_SECINFO, epc(DATA_PAGE)),
            (f"{name}.epcpage", SECINFO, epc(DATA_PAGE) + 2048),
            (f"{name}.epcpage", SECINFO, NON_CANONICAL),
        ):
            with enclave.faults(GeneralProtection, rule):
                enclave.encls(leaf, rbx, rcx)
        with enclave.faults(PageFault, f"{name}.epcpage", address=SOURCE, sgx=True):
            enclave.encls(leaf, SECINFO, SOURCE)
        enclave.space.map_epc(NOWHERE, DATA_PAGE, writable=False, executable=False)
        with enclave.faults(PageFault, "paging.writable", address=NOWHERE):
            enclave.encls(leaf, SECINFO, NOWHERE)

    def test_secinfo_reserved_bits(self, enclave: Machine, leaf: Encls) -> None:
        for flags in (1 << 6, 1 << 16):
            with enclave.faults(GeneralProtection, f"{leaf.name.lower()}.secinfo"):
                modify(enclave, leaf, DATA_PAGE, self.flags[leaf] | flags)
        enclave.secinfo(self.flags[leaf])
        enclave.space.poke(SECINFO + 20, b"\1")
        with enclave.faults(GeneralProtection, f"{leaf.name.lower()}.secinfo"):
            enclave.encls(leaf, SECINFO, epc(DATA_PAGE))

    def test_page(self, enclave: Machine, leaf: Encls) -> None:
        name = leaf.name.lower()
        for rule, page in ((f"{name}.valid", FREE_PAGE), (f"{name}.pt", VA_PAGE), (f"{name}.pt", SECS_PAGE)):
            with enclave.faults(PageFault, rule, address=epc(page), sgx=True):
                modify(enclave, leaf, page, self.flags[leaf])

    def test_pending_or_modified_page(self, enclave: Machine, leaf: Encls) -> None:
        for state in ("pending", "modified"):
            enclave.change(DATA_PAGE, **{state: True})
            before = enclave.entry(DATA_PAGE).flags
            rule = f"{leaf.name.lower()}.state"
            assert modify(enclave, leaf, DATA_PAGE, self.flags[leaf]) == (Status.SGX_PAGE_NOT_MODIFIABLE, ZF, rule)
            assert enclave.entry(DATA_PAGE).flags == before
            enclave.change(DATA_PAGE, **{state: False})

    def test_enclave_is_not_initialised(self, machine: Machine, leaf: Encls) -> None:
        machine.ecreate()
        machine.add_pages()
        with machine.faults(GeneralProtection, f"{leaf.name.lower()}.initialised"):
            modify(machine, leaf, DATA_PAGE, self.flags[leaf])

    def test_concurrency_among_sgx2_leaves(self, enclave: Machine, leaf: Encls) -> None:
        rule = f"{leaf.name.lower()}.modification-conflict"
        for access in Access:
            with enclave.cpu.locks.held(DATA_PAGE, access, Resource.MODIFICATION):
                assert modify(enclave, leaf, DATA_PAGE, self.flags[leaf]) == (Status.SGX_EPC_PAGE_CONFLICT, ZF, rule)


def test_emodpr_concurrency(enclave: Machine) -> None:
    locks = enclave.cpu.locks
    with locks.held(DATA_PAGE, Access.EXCLUSIVE), enclave.faults(GeneralProtection, "emodpr.conflict"):
        modify(enclave, Encls.EMODPR, DATA_PAGE, SECINFO_R)
    with locks.held(DATA_PAGE, Access.SHARED):
        assert modify(enclave, Encls.EMODPR, DATA_PAGE, SECINFO_R) == SUCCESS


def test_emodt_concurrency(enclave: Machine) -> None:
    for access in Access:
        with enclave.cpu.locks.held(DATA_PAGE, access):
            conflict = (Status.SGX_EPC_PAGE_CONFLICT, ZF, "emodt.conflict")
            assert modify(enclave, Encls.EMODT, DATA_PAGE, PT_TRIM) == conflict


def test_emodpr_secinfo(enclave: Machine) -> None:
    for flags in (SECINFO_W, SECINFO_W | SECINFO_X):
        with enclave.faults(GeneralProtection, "emodpr.secinfo"):
            modify(enclave, Encls.EMODPR, DATA_PAGE, flags)


def test_emodpr_page_type(enclave: Machine) -> None:
    with enclave.faults(PageFault, "emodpr.pt", address=epc(TCS_PAGE), sgx=True):
        modify(enclave, Encls.EMODPR, TCS_PAGE, SECINFO_R)


def test_emodt_secinfo(enclave: Machine) -> None:
    for kind in (PT_REG, PT_SECS, PT_VA, PT_SS_FIRST):
        with enclave.faults(GeneralProtection, "emodt.secinfo"):
            modify(enclave, Encls.EMODT, DATA_PAGE, kind)


def test_emodt_page_type(enclave: Machine) -> None:
    with enclave.faults(PageFault, "emodt.pt", address=epc(TCS_PAGE), sgx=True):
        modify(enclave, Encls.EMODT, TCS_PAGE, PT_TCS)
    enclave.change(DATA_PAGE, pt=PT_TRIM)
    with enclave.faults(PageFault, "emodt.pt", address=epc(DATA_PAGE), sgx=True):
        modify(enclave, Encls.EMODT, DATA_PAGE, PT_TRIM)


# --- EACCEPT ----------------------------------------------------------------------------------------------------


def inner(machine: Machine, flags: int, at: int = INNER) -> None:
    """A SECINFO in the enclave."""
    machine.user.write(at, SecInfo(flags).to_bytes())


def accepted(machine: Machine) -> tuple[Status, int, str]:
    registers = machine.user.registers
    return Status(registers.rax), registers.rflags & 0x8D5, machine.events[-1].rule


def eaccept(machine: Machine, flags: int, linear: int = SPARE) -> tuple[Status, int, str]:
    inner(machine, flags)
    machine.enclu(Enclu.EACCEPT, INNER, linear)
    return accepted(machine)


def test_eaccept_of_a_new_page(inside: Machine) -> None:
    """Pages from EAUG need no tracking: nobody can have a translation to them."""
    inside.eaug()
    with pytest.raises(PageFault) as caught:
        inside.user.read(SPARE, 1)
    assert caught.value.rule == "epcm.pending"
    inside.user.registers.rflags = 0x8D7
    assert eaccept(inside, RW | SECINFO_PENDING) == SUCCESS
    assert inside.entry(FREE_PAGE).flags == RW
    assert inside.user.read(SPARE, 4) == bytes(4)


def test_eaccept_of_restricted_permissions(inside: Machine) -> None:
    """The thread that restricts must have left since: its own translation may still be writable."""
    inside.user.write(MORE, b"cached")
    assert modify(inside, Encls.EMODPR, MORE_PAGE, SECINFO_R) == SUCCESS
    inside.user.write(MORE, b"still!")
    request = PT_REG | SECINFO_R | SECINFO_PR
    assert eaccept(inside, request, MORE) == (Status.SGX_NOT_TRACKED, ZF, "eaccept.tracked")
    inside.track()
    assert eaccept(inside, request, MORE) == (Status.SGX_NOT_TRACKED, ZF, "eaccept.tracked")
    assert inside.entry(MORE_PAGE).pr
    inside.user.aex(0x20)
    inside.user.enclu()
    with pytest.raises(PageFault) as caught:
        inside.user.write(MORE, b"no")
    assert caught.value.rule == "epcm.w"
    assert eaccept(inside, request, MORE) == SUCCESS
    assert inside.entry(MORE_PAGE).flags == PT_REG | SECINFO_R


def test_eaccept_does_not_compare_pr(inside: Machine) -> None:
    inside.eaug()
    assert eaccept(inside, RW | SECINFO_PENDING | SECINFO_PR) == SUCCESS


@pytest.mark.parametrize("kind", [PT_TCS, PT_TRIM])
def test_eaccept_of_a_changed_type(enclave: Machine, kind: int) -> None:
    if kind == PT_TCS:
        enclave.cpu.write_epc(MORE_PAGE, a_tcs(nssa=1).to_bytes())
    assert modify(enclave, Encls.EMODT, MORE_PAGE, kind) == SUCCESS
    enclave.track()
    enclave.enter()
    assert eaccept(enclave, kind | SECINFO_MODIFIED, MORE) == SUCCESS
    assert enclave.entry(MORE_PAGE).flags == kind


@pytest.mark.parametrize(
    "fields", [{"flags": 1}, {"flags": 4}, {"cssa": 1, "nssa": 1}, {"nssa": 0}, {"aep": 1}, {"state": 1}]
)
def test_eaccept_of_a_tcs_that_is_not_fresh(enclave: Machine, fields: dict[str, int]) -> None:
    enclave.cpu.write_epc(MORE_PAGE, a_tcs(**fields).to_bytes())
    modify(enclave, Encls.EMODT, MORE_PAGE, PT_TCS)
    enclave.track()
    enclave.enter()
    inner(enclave, PT_TCS | SECINFO_MODIFIED)
    with enclave.faults(GeneralProtection, "eaccept.tcs"):
        enclave.enclu(Enclu.EACCEPT, INNER, MORE)


def test_eaccept_of_a_tcs_with_reserved_bytes(enclave: Machine) -> None:
    enclave.cpu.write_epc(MORE_PAGE, a_tcs().to_bytes()[:-1] + b"\1")
    modify(enclave, Encls.EMODT, MORE_PAGE, PT_TCS)
    enclave.track()
    enclave.enter()
    inner(enclave, PT_TCS | SECINFO_MODIFIED)
    with enclave.faults(GeneralProtection, "eaccept.tcs"):
        enclave.enclu(Enclu.EACCEPT, INNER, MORE)


def test_accepted_tcs_can_be_entered(enclave: Machine) -> None:
    enclave.cpu.write_epc(MORE_PAGE, a_tcs(nssa=1).to_bytes())
    modify(enclave, Encls.EMODT, MORE_PAGE, PT_TCS)
    with pytest.raises(PageFault) as caught:
        enclave.enter(tcs=MORE)
    assert caught.value.rule == "eenter.tcs-state"
    enclave.track()
    enclave.enter()
    eaccept(enclave, PT_TCS | SECINFO_MODIFIED, MORE)
    enclave.user.aex(0x20)
    enclave.enter(tcs=MORE)
    assert enclave.user.enclave_mode


@pytest.mark.parametrize(
    "flags",
    [
        RW,
        RW | SECINFO_MODIFIED,
        RW | SECINFO_PENDING | SECINFO_MODIFIED,
        RW | SECINFO_PR | SECINFO_MODIFIED,
        PT_TRIM,
        PT_TCS,
        PT_TCS | SECINFO_PENDING,
        PT_TRIM | SECINFO_MODIFIED | SECINFO_PENDING,
        PT_TRIM | SECINFO_MODIFIED | SECINFO_PR,
        PT_SECS | SECINFO_MODIFIED,
        PT_VA | SECINFO_MODIFIED,
        PT_SS_FIRST | SECINFO_PENDING,
    ],
)
def test_eaccept_request(inside: Machine, flags: int) -> None:
    inside.eaug()
    inner(inside, flags)
    with inside.faults(GeneralProtection, "eaccept.request"):
        inside.enclu(Enclu.EACCEPT, INNER, SPARE)


@pytest.mark.parametrize(
    ("fields", "flags"),
    [
        ({}, PT_REG | SECINFO_R | SECINFO_PENDING),
        ({}, RWX | SECINFO_PENDING),
        ({}, RW | SECINFO_PR),
        ({"r": False}, RW | SECINFO_PENDING),
        ({"w": False}, RW | SECINFO_PENDING),
        ({"x": True}, RW | SECINFO_PENDING),
        ({"modified": True}, RW | SECINFO_PENDING),
        ({"pt": PT_TCS}, RW | SECINFO_PENDING),
        ({"enclave_address": SPARE + PAGE_SIZE}, RW | SECINFO_PENDING),
    ],
)
def test_eaccept_mismatch(inside: Machine, fields: dict[str, Any], flags: int) -> None:
    inside.eaug()
    inside.change(FREE_PAGE, **fields)
    before = inside.entry(FREE_PAGE).flags
    assert eaccept(inside, flags) == (Status.SGX_PAGE_ATTRIBUTES_MISMATCH, ZF, "eaccept.mismatch")
    assert inside.entry(FREE_PAGE).flags == before


@pytest.mark.parametrize("fields", [{"valid": False}, {"blocked": True}, {"pt": PT_VA}, {"enclave_secs": 12}])
def test_eaccept_page(inside: Machine, fields: dict[str, Any]) -> None:
    inside.eaug()
    inside.change(FREE_PAGE, **fields)
    inner(inside, RW | SECINFO_PENDING)
    with inside.faults(PageFault, "eaccept.page", address=SPARE, sgx=True, write=True):
        inside.enclu(Enclu.EACCEPT, INNER, SPARE)


def test_eaccept_concurrency(inside: Machine) -> None:
    inside.eaug()
    inner(inside, RW | SECINFO_PENDING)
    locks = inside.cpu.locks
    with locks.held(FREE_PAGE, Access.EXCLUSIVE), inside.faults(GeneralProtection, "eaccept.conflict"):
        inside.enclu(Enclu.EACCEPT, INNER, SPARE)
    for access in Access:
        with (
            locks.held(FREE_PAGE, access, Resource.MODIFICATION),
            inside.faults(GeneralProtection, "eaccept.modification-conflict"),
        ):
            inside.enclu(Enclu.EACCEPT, INNER, SPARE)
    with locks.held(FREE_PAGE, Access.SHARED):
        inside.enclu(Enclu.EACCEPT, INNER, SPARE)
    assert accepted(inside) == SUCCESS


# --- EACCEPTCOPY ------------------------------------------------------------------------------------------------


def eacceptcopy(machine: Machine, flags: int = RW, source: int = MORE) -> tuple[Status, int, str]:
    inner(machine, flags)
    machine.enclu(Enclu.EACCEPTCOPY, INNER, SPARE, source)
    return accepted(machine)


@pytest.mark.parametrize("flags", [RW, RWX, PT_REG | SECINFO_R, PT_REG | SECINFO_R | SECINFO_X, PT_REG])
def test_eacceptcopy(inside: Machine, flags: int) -> None:
    inside.eaug()
    inside.user.registers.rflags = 0x8D7
    assert eacceptcopy(inside, flags) == SUCCESS
    assert inside.entry(FREE_PAGE).flags == flags
    assert inside.cpu.read_epc(FREE_PAGE) == b"more".ljust(PAGE_SIZE, b"\0")


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"valid": False}, "eacceptcopy.page"),
        ({"pending": False}, "eacceptcopy.page"),
        ({"modified": True}, "eacceptcopy.page"),
        ({"blocked": True}, "eacceptcopy.page"),
        ({"pt": PT_TCS}, "eacceptcopy.page"),
        ({"enclave_secs": 12}, "eacceptcopy.enclavesecs"),
        ({"r": False}, "eacceptcopy.mismatch"),
        ({"w": False}, "eacceptcopy.mismatch"),
        ({"x": True}, "eacceptcopy.mismatch"),
        ({"enclave_address": SPARE + PAGE_SIZE}, "eacceptcopy.mismatch"),
    ],
)
def test_eacceptcopy_mismatch(inside: Machine, fields: dict[str, Any], rule: str) -> None:
    inside.eaug()
    inside.change(FREE_PAGE, **fields)
    before = inside.entry(FREE_PAGE).flags
    assert eacceptcopy(inside) == (Status.SGX_PAGE_ATTRIBUTES_MISMATCH, ZF, rule)
    assert inside.entry(FREE_PAGE).flags == before


@pytest.mark.parametrize("flags", [PT_TCS, PT_TRIM, PT_REG | SECINFO_W, PT_REG | SECINFO_W | SECINFO_X, RW | 1 << 6])
def test_eacceptcopy_secinfo(inside: Machine, flags: int) -> None:
    inside.eaug()
    inner(inside, flags)
    with inside.faults(GeneralProtection, "eacceptcopy.secinfo"):
        inside.enclu(Enclu.EACCEPTCOPY, INNER, SPARE, MORE)


def test_eacceptcopy_concurrency(inside: Machine) -> None:
    inside.eaug()
    inner(inside, RW)
    for access in Access:
        with (
            inside.cpu.locks.held(FREE_PAGE, access, Resource.MODIFICATION),
            inside.faults(GeneralProtection, "eacceptcopy.modification-conflict"),
        ):
            inside.enclu(Enclu.EACCEPTCOPY, INNER, SPARE, MORE)
    with inside.cpu.locks.held(FREE_PAGE, Access.EXCLUSIVE):
        assert eacceptcopy(inside) == SUCCESS


# --- EMODPE -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "flags", "after"),
    [
        (RW, SECINFO_X, RWX),
        (RW, 0, RW),
        (PT_REG | SECINFO_R, SECINFO_W, RW),
        (PT_REG, SECINFO_R | SECINFO_W, RW),
        (PT_REG, SECINFO_R, PT_REG | SECINFO_R),
        (PT_REG, SECINFO_X, PT_REG | SECINFO_X),
        (PT_REG | SECINFO_X, SECINFO_R, PT_REG | SECINFO_R | SECINFO_X),
        (RWX, 0, RWX),
    ],
)
def test_emodpe(inside: Machine, before: int, flags: int, after: int) -> None:
    inside.change(MORE_PAGE, r=bool(before & 1), w=bool(before & 2), x=bool(before & 4))
    inner(inside, flags)
    registers = inside.enclu(Enclu.EMODPE, INNER, MORE)
    assert inside.entry(MORE_PAGE).flags == after
    assert registers.rax == Enclu.EMODPE


def test_emodpe_takes_effect_at_once(inside: Machine) -> None:
    """A translation that was less permissive is looked up again."""
    inside.space.map_epc(MORE, MORE_PAGE, writable=True, executable=True)
    with pytest.raises(PageFault):
        inside.user.read(MORE, 1, "x")
    inner(inside, SECINFO_X)
    inside.enclu(Enclu.EMODPE, INNER, MORE)
    assert inside.user.read(MORE, 4, "x") == b"more"


@pytest.mark.parametrize(
    ("rule", "fields"),
    [
        ("epcm.valid", {"valid": False}),
        ("epcm.pending", {"pending": True}),
        ("epcm.modified", {"modified": True}),
        ("epcm.blocked", {"blocked": True}),
        ("epcm.pt", {"pt": PT_TCS}),
        ("epcm.enclavesecs", {"enclave_secs": 12}),
        ("epcm.enclaveaddress", {"enclave_address": SPARE}),
    ],
)
def test_emodpe_page(inside: Machine, rule: str, fields: dict[str, Any]) -> None:
    inner(inside, SECINFO_X)
    inside.change(MORE_PAGE, **fields)
    with inside.faults(PageFault, rule, address=MORE, sgx=True, write=False):
        inside.enclu(Enclu.EMODPE, INNER, MORE)


def test_emodpe_permissions(inside: Machine) -> None:
    inside.change(MORE_PAGE, r=False, w=False)
    inner(inside, SECINFO_W)
    with inside.faults(GeneralProtection, "emodpe.permissions"):
        inside.enclu(Enclu.EMODPE, INNER, MORE)


def test_emodpe_concurrency(inside: Machine) -> None:
    inner(inside, SECINFO_X)
    for access in Access:
        with (
            inside.cpu.locks.held(MORE_PAGE, access, Resource.MODIFICATION),
            inside.faults(GeneralProtection, "emodpe.modification-conflict"),
        ):
            inside.enclu(Enclu.EMODPE, INNER, MORE)
    with inside.cpu.locks.held(MORE_PAGE, Access.EXCLUSIVE):
        inside.enclu(Enclu.EMODPE, INNER, MORE)


# --- operands that the three have in common ---------------------------------------------------------------------

OUTSIDE = HOST_DATA
LEAVES = {Enclu.EACCEPT: RW | SECINFO_PENDING, Enclu.EACCEPTCOPY: RW, Enclu.EMODPE: SECINFO_X}


@pytest.mark.parametrize("leaf", LEAVES)
class TestOperands:
    def prepared(self, machine: Machine, leaf: Enclu) -> str:
        machine.eaug()
        inner(machine, LEAVES[leaf])
        return leaf.name.lower()

    def target(self, leaf: Enclu) -> int:
        return MORE if leaf is Enclu.EMODPE else SPARE

    def test_secinfo(self, inside: Machine, leaf: Enclu) -> None:
        rule = f"{self.prepared(inside, leaf)}.secinfo"
        inner(inside, LEAVES[leaf], INNER + 0x20)
        with inside.faults(GeneralProtection, rule):
            inside.enclu(leaf, INNER + 0x20, self.target(leaf), DATA)
        with inside.faults(GeneralProtection, rule):
            inside.enclu(leaf, OUTSIDE, self.target(leaf), DATA)
        inner(inside, 1 << 6 | LEAVES[leaf])
        with inside.faults(GeneralProtection, rule):
            inside.enclu(leaf, INNER, self.target(leaf), DATA)

    def test_secinfo_does_not_resolve_within_the_epc(self, inside: Machine, leaf: Enclu) -> None:
        rule = f"{self.prepared(inside, leaf)}.secinfo"
        inside.space.map_ram(SPARE + PAGE_SIZE, PAGE_SIZE)
        with inside.faults(PageFault, rule, address=SPARE + PAGE_SIZE, sgx=True):
            inside.enclu(leaf, SPARE + PAGE_SIZE, self.target(leaf), DATA)

    @pytest.mark.parametrize(
        ("rule", "fields"),
        [
            ("epcm.valid", {"valid": False}),
            ("epcm.r", {"r": False}),
            ("epcm.pending", {"pending": True}),
            ("epcm.modified", {"modified": True}),
            ("epcm.blocked", {"blocked": True}),
            ("epcm.pt", {"pt": PT_TCS}),
            ("epcm.enclavesecs", {"enclave_secs": 12}),
            ("epcm.enclaveaddress", {"enclave_address": SPARE}),
        ],
    )
    def test_secinfo_page(self, inside: Machine, leaf: Enclu, rule: str, fields: dict[str, Any]) -> None:
        self.prepared(inside, leaf)
        inside.user.flush()
        inside.change(DATA_PAGE, **fields)
        with inside.faults(PageFault, rule, address=INNER, sgx=True):
            inside.enclu(leaf, INNER, self.target(leaf), MORE)

    def test_target(self, inside: Machine, leaf: Enclu) -> None:
        name = self.prepared(inside, leaf)
        rule = f"{name}.target" if leaf is Enclu.EACCEPTCOPY else f"{name}.epcpage"
        for linear in (self.target(leaf) + 2048, OUTSIDE, BASE - PAGE_SIZE, BASE + SIZE):
            with inside.faults(GeneralProtection, rule):
                inside.enclu(leaf, INNER, linear, DATA)
        inside.space.map_ram(SPARE + PAGE_SIZE, PAGE_SIZE)
        with inside.faults(PageFault, rule, address=SPARE + PAGE_SIZE, sgx=True):
            inside.enclu(leaf, INNER, SPARE + PAGE_SIZE, DATA)


@pytest.mark.parametrize("leaf", LEAVES)
def test_read_only_mappings(inside: Machine, leaf: Enclu) -> None:
    """EACCEPTCOPY writes its target; nothing else needs a writable mapping."""
    inside.eaug()
    inner(inside, LEAVES[leaf])
    inside.user.flush()
    for linear in (DATA, MORE):
        inside.space.protect(linear, writable=False, executable=False)
    if leaf is Enclu.EACCEPTCOPY:
        inside.space.protect(SPARE, writable=False, executable=False)
        with inside.faults(PageFault, "paging.writable", address=SPARE, write=True):
            inside.enclu(leaf, INNER, SPARE, MORE)
        inside.space.protect(SPARE, writable=True, executable=False)
    elif leaf is Enclu.EACCEPT:
        inside.space.protect(SPARE, writable=False, executable=False)
    inside.enclu(leaf, INNER, MORE if leaf is Enclu.EMODPE else SPARE, MORE)
    assert inside.events[-1].rule == ""


def test_eacceptcopy_source(inside: Machine) -> None:
    inside.eaug()
    inner(inside, RW)
    for linear in (MORE + 2048, OUTSIDE, BASE + SIZE):
        with inside.faults(GeneralProtection, "eacceptcopy.source"):
            inside.enclu(Enclu.EACCEPTCOPY, INNER, SPARE, linear)
    inside.space.map_ram(SPARE + PAGE_SIZE, PAGE_SIZE)
    with inside.faults(PageFault, "eacceptcopy.source", address=SPARE + PAGE_SIZE, sgx=True):
        inside.enclu(Enclu.EACCEPTCOPY, INNER, SPARE, SPARE + PAGE_SIZE)


@pytest.mark.parametrize(
    ("rule", "fields"),
    [
        ("epcm.valid", {"valid": False}),
        ("epcm.r", {"r": False}),
        ("epcm.pending", {"pending": True}),
        ("epcm.modified", {"modified": True}),
        ("epcm.blocked", {"blocked": True}),
        ("epcm.pt", {"pt": PT_TCS}),
        ("epcm.enclavesecs", {"enclave_secs": 12}),
        ("epcm.enclaveaddress", {"enclave_address": SPARE}),
    ],
)
def test_eacceptcopy_source_page(inside: Machine, rule: str, fields: dict[str, Any]) -> None:
    inside.eaug()
    inner(inside, RW)
    inside.change(MORE_PAGE, **fields)
    with inside.faults(PageFault, rule, address=MORE, sgx=True):
        inside.enclu(Enclu.EACCEPTCOPY, INNER, SPARE, MORE)
