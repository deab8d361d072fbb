"""SDM vol. 3D, 38.3 "Access-control requirements" and 38.5 "Page-based access control"."""

from __future__ import annotations

from typing import Any

import pytest
from sgx_machine import (
    AEP,
    BASE,
    CODE,
    CODE_PAGE,
    DATA,
    DATA_PAGE,
    HOST_CODE,
    HOST_DATA,
    MORE,
    MORE_PAGE,
    NON_CANONICAL,
    NOWHERE,
    RW,
    SECS_PAGE,
    SIZE,
    SPARE,
    TCS,
    VA_PAGE,
    Machine,
    epc,
)

from inclavare.errors import IntegrityError
from inclavare.sgx.codes import Enclu
from inclavare.sgx.paging import PAGE_SIZE, PT_SECS, PT_SS_REST, PT_TCS, PT_TRIM, PT_VA
from inclavare.tee.sgx_sim.processor import Fault, GeneralProtection, LogicalProcessor, PageFault

ACCESSES: list[Any] = ["r", "w", "x"]
CODES = {"r": 0, "w": 2, "x": 16}
USER, PRESENT, SGX = 4, 1, 1 << 15


def refused(lp: LogicalProcessor, linear: int, access: Any) -> Fault:
    with pytest.raises(Fault) as caught:
        lp.translate(linear, access)
    return caught.value


# --- from inside ------------------------------------------------------------------------------------------------


def test_own_pages(inside: Machine) -> None:
    user = inside.user
    assert user.read(CODE, 4, "x") == b"code"
    assert user.read(CODE, 4) == b"code"
    user.write(DATA + 4, b"!")
    assert user.read(DATA, 6) == b"data!\0"
    assert inside.cpu.read_epc(DATA_PAGE, 0, 6) == b"data!\0"
    found = user.translate(DATA, "r")
    assert (found.epc_page, found.ram, found.abort) == (DATA_PAGE, None, False)


@pytest.mark.parametrize(("letter", "page", "linear"), [("r", 5, DATA), ("w", 5, DATA), ("x", 1, CODE)])
def test_epcm_permissions(inside: Machine, letter: str, page: int, linear: int) -> None:
    inside.space.map_epc(linear, page, writable=True, executable=True)
    inside.user.translate(linear, letter)  # type: ignore[arg-type]
    inside.user.flush()
    inside.change(page, **{letter: False})
    fault = refused(inside.user, linear + 5, letter)
    assert isinstance(fault, PageFault)
    assert (fault.rule, fault.address) == (f"epcm.{letter}", linear + 5)
    assert fault.error_code == SGX | USER | PRESENT | CODES[letter]
    for other in set("rwx") - {letter}:
        if getattr(inside.entry(page), other):
            inside.user.translate(linear, other)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rule", "fields"),
    [
        ("epcm.valid", {"valid": False}),
        ("epcm.blocked", {"blocked": True}),
        ("epcm.pending", {"pending": True}),
        ("epcm.modified", {"modified": True}),
        ("epcm.enclavesecs", {"enclave_secs": 12}),
        ("epcm.enclavesecs", {"enclave_secs": None}),
        ("epcm.enclaveaddress", {"enclave_address": MORE}),
        ("epcm.pt", {"pt": PT_SECS}),
        ("epcm.pt", {"pt": PT_TCS}),
        ("epcm.pt", {"pt": PT_VA}),
        ("epcm.pt", {"pt": PT_TRIM}),
        ("epcm.pt", {"pt": PT_SS_REST}),
    ],
)
@pytest.mark.parametrize("access", ACCESSES)
def test_epcm_state(inside: Machine, rule: str, fields: dict[str, Any], access: Any) -> None:
    inside.space.map_epc(DATA, DATA_PAGE, writable=True, executable=True)
    inside.change(DATA_PAGE, x=True)
    inside.user.translate(DATA, access)
    inside.user.flush()
    inside.change(DATA_PAGE, **fields)
    fault = refused(inside.user, DATA, access)
    assert fault.rule == rule
    assert fault.error_code == SGX | USER | PRESENT | CODES[access]


def test_own_tcs_and_secs(inside: Machine) -> None:
    assert refused(inside.user, TCS, "r").rule == "epcm.pt"
    inside.space.map_epc(SPARE, SECS_PAGE, writable=True, executable=True)
    assert refused(inside.user, SPARE, "r").rule == "epcm.pt"
    inside.space.map_epc(SPARE, VA_PAGE, writable=True, executable=True)
    assert refused(inside.user, SPARE, "w").rule == "epcm.pt"


def test_page_tables_are_checked_first(inside: Machine) -> None:
    """Their faults do not have the SGX bit."""
    inside.space.unmap(DATA)
    fault = refused(inside.user, DATA, "w")
    assert (fault.rule, fault.error_code) == ("paging.present", USER | 2)
    inside.space.map_epc(DATA, DATA_PAGE, writable=False, executable=False)
    fault = refused(inside.user, DATA, "w")
    assert (fault.rule, fault.error_code) == ("paging.writable", USER | PRESENT | 2)
    fault = refused(inside.user, DATA, "x")
    assert (fault.rule, fault.error_code) == ("paging.executable", USER | PRESENT | 16)
    inside.user.translate(DATA, "r")


def test_remapped_page(inside: Machine) -> None:
    """The operating system swaps two pages of the enclave: each is good at its own address only."""
    inside.space.map_epc(DATA, MORE_PAGE, writable=True, executable=False)
    inside.space.map_epc(MORE, DATA_PAGE, writable=True, executable=False)
    assert refused(inside.user, DATA, "r").rule == "epcm.enclaveaddress"
    assert refused(inside.user, MORE, "r").rule == "epcm.enclaveaddress"


def test_alias_of_an_own_page(inside: Machine) -> None:
    inside.space.map_epc(SPARE, DATA_PAGE, writable=True, executable=False)
    assert refused(inside.user, SPARE, "r").rule == "epcm.enclaveaddress"


def test_page_of_another_enclave(inside: Machine) -> None:
    inside.ecreate(page=9)
    inside.eadd(SPARE, 10, RW, b"secret", secs_page=9)
    inside.space.map_epc(SPARE, 10, writable=True, executable=True)
    assert refused(inside.user, SPARE, "r").rule == "epcm.enclavesecs"


def test_elrange_that_is_not_epc(inside: Machine) -> None:
    """Ordinary memory cannot pose as enclave memory."""
    inside.space.map_ram(SPARE, PAGE_SIZE, executable=True)
    inside.space.poke(SPARE, b"forged")
    for access in ACCESSES:
        fault = refused(inside.user, SPARE + 1, access)
        assert (fault.rule, fault.address) == ("access.elrange-not-epc", SPARE + 1)
        assert fault.error_code == SGX | USER | PRESENT | CODES[access]


def test_elrange_limits(inside: Machine) -> None:
    for linear in (BASE - PAGE_SIZE, BASE + SIZE):
        inside.space.map_ram(linear, PAGE_SIZE)
        inside.user.write(linear, b"outside")
        assert inside.user.translate(linear, "r").ram is not None
    inside.space.map_ram(BASE + SIZE - PAGE_SIZE, PAGE_SIZE)
    assert refused(inside.user, BASE + SIZE - 1, "r").rule == "access.elrange-not-epc"


def test_ordinary_memory_from_inside(inside: Machine) -> None:
    inside.user.write(HOST_DATA, b"out")
    assert not inside.user.translate(HOST_DATA, "w").abort
    assert inside.space.peek(HOST_DATA, 3) == b"out"
    assert inside.user.read(HOST_DATA, 3) == b"out"


def test_code_fetch_outside_of_elrange(inside: Machine) -> None:
    for linear in (HOST_CODE, AEP, BASE - 1, BASE + SIZE, NOWHERE):
        fault = refused(inside.user, linear, "x")
        assert isinstance(fault, GeneralProtection)
        assert fault.rule == "access.fetch-outside-elrange"


def test_epc_outside_of_elrange_from_inside(inside: Machine) -> None:
    """Even an own page, at another address, is the abort page."""
    inside.space.map_epc(NOWHERE, DATA_PAGE, writable=True, executable=False)
    assert inside.user.translate(NOWHERE, "r").abort
    assert inside.user.read(NOWHERE, 4) == b"\xff" * 4
    inside.user.write(NOWHERE, b"lost")
    assert inside.cpu.read_epc(DATA_PAGE, 0, 4) == b"data"


def test_data_access_that_splits_across_elrange(inside: Machine) -> None:
    """38.5.2: two accesses, each checked for itself."""
    inside.space.map_ram(BASE - PAGE_SIZE, PAGE_SIZE)
    inside.space.poke(BASE - 2, b"ab")
    assert inside.user.read(BASE - 2, 4) == b"abco"
    assert refused(inside.user, BASE - 2, "x").rule == "access.fetch-outside-elrange"


def test_split_write_is_all_or_nothing(inside: Machine) -> None:
    with pytest.raises(PageFault) as caught:
        inside.user.write(MORE + PAGE_SIZE - 2, b"abcd")
    assert caught.value.address == MORE + PAGE_SIZE
    assert inside.user.read(MORE + PAGE_SIZE - 2, 2) == bytes(2)


def test_split_access_within_the_enclave(inside: Machine) -> None:
    inside.user.write(DATA + PAGE_SIZE - 2, b"abcd")
    assert inside.user.read(DATA + PAGE_SIZE - 3, 6) == b"\0abcdr"
    assert inside.cpu.read_epc(MORE_PAGE, 0, 4) == b"cdre"


def test_canonical_addresses(inside: Machine) -> None:
    for linear in (NON_CANONICAL, 1 << 47, (1 << 64) - (1 << 47) - 1):
        fault = refused(inside.user, linear, "r")
        assert isinstance(fault, GeneralProtection)
        assert fault.rule == "access.canonical"
    assert refused(inside.user, (1 << 47) - 1, "r").rule == "paging.present"
    assert refused(inside.user, (1 << 64) - (1 << 47), "r").rule == "paging.present"


# --- from outside -----------------------------------------------------------------------------------------------


def test_abort_page(enclave: Machine) -> None:
    user = enclave.user
    for linear in (CODE, TCS, DATA, epc(SECS_PAGE), epc(12)):
        assert user.translate(linear, "r").abort
        assert user.read(linear + 100, 16) == b"\xff" * 16
    user.write(DATA, b"overwritten")
    assert enclave.cpu.read_epc(DATA_PAGE, 0, 4) == b"data"
    assert user.read(CODE, 2, "x") == b"\xff\xff"


def test_abort_page_for_the_operating_system(enclave: Machine) -> None:
    assert enclave.os.read(epc(CODE_PAGE), 8) == b"\xff" * 8
    enclave.os.write(epc(CODE_PAGE), b"overwritten")
    assert enclave.cpu.read_epc(CODE_PAGE, 0, 4) == b"code"


def test_enclave_that_another_thread_executes(inside: Machine) -> None:
    assert inside.another().read(DATA, 4) == b"\xff" * 4


def test_page_tables_from_outside(enclave: Machine) -> None:
    assert refused(enclave.user, NOWHERE, "r").error_code == USER
    enclave.space.protect(DATA, writable=False, executable=False)
    assert refused(enclave.user, DATA, "w").error_code == USER | PRESENT | 2
    assert refused(enclave.os, NOWHERE, "w").error_code == 2
    assert refused(enclave.user, HOST_DATA, "x").error_code == USER | PRESENT | 16
    enclave.user.translate(HOST_CODE, "x")


def test_operands_in_the_epc_read_as_ones(enclave: Machine) -> None:
    """A PAGEINFO in the EPC is a non-enclave access: all its addresses are misaligned."""
    with enclave.faults(GeneralProtection, "eadd.srcpge"):
        enclave.encls(1, epc(DATA_PAGE), epc(12))


# --- cached translations ----------------------------------------------------------------------------------------


def test_translations_are_cached_until_exit(inside: Machine) -> None:
    inside.user.read(DATA, 1)
    inside.block(DATA_PAGE)
    assert inside.user.read(DATA, 4) == b"data"
    assert refused(inside.user, DATA, "w").rule == "epcm.blocked"
    inside.user.aex(0x20)
    inside.user.enclu()
    assert refused(inside.user, DATA, "r").rule == "epcm.blocked"


@pytest.mark.parametrize("exit", ["EEXIT", "AEX"])
def test_nothing_is_cached_outside(inside: Machine, exit: str) -> None:
    """What the enclave could read a moment ago is the abort page once it has been left."""
    inside.user.read(DATA, 1)
    inside.user.write(DATA, b"data")
    if exit == "AEX":
        inside.user.aex(0x20)
    else:
        inside.enclu(Enclu.EEXIT, HOST_CODE)
    assert inside.user.read(DATA, 4) == b"\xff" * 4
    inside.user.write(DATA, b"lost")
    assert inside.cpu.read_epc(DATA_PAGE, 0, 4) == b"data"


def test_each_processor_caches_for_itself(inside: Machine) -> None:
    inside.user.read(DATA, 1)
    inside.block(DATA_PAGE)
    inside.set_tcs(state=0)
    other = inside.enter(inside.another())
    assert refused(other, DATA, "r").rule == "epcm.blocked"


def test_page_table_changes_take_effect(inside: Machine) -> None:
    """The operating system's shoot-down goes with them."""
    inside.user.read(DATA, 1)
    inside.space.unmap(DATA)
    assert refused(inside.user, DATA, "r").rule == "paging.present"
    inside.space.map_epc(DATA, MORE_PAGE, writable=True, executable=False)
    assert refused(inside.user, DATA, "r").rule == "epcm.enclaveaddress"


# --- memory encryption ------------------------------------------------------------------------------------------


def test_no_plaintext_in_the_store(inside: Machine) -> None:
    inside.user.write(DATA, b"a very recognisable secret")
    for ciphertext in inside.cpu.memory.store.pages.values():
        assert b"recognisable" not in ciphertext
        assert b"code\0\0\0\0" not in ciphertext


def test_store_that_was_changed(inside: Machine) -> None:
    pages = inside.cpu.memory.store.pages
    pages[DATA_PAGE] = bytes([pages[DATA_PAGE][0] ^ 1]) + pages[DATA_PAGE][1:]
    with pytest.raises(IntegrityError) as caught:
        inside.user.read(DATA, 1)
    assert caught.value.id == "tee.memory.integrity"
    assert inside.cpu.memory.locked
    with pytest.raises(IntegrityError):
        inside.user.read(CODE, 1)
