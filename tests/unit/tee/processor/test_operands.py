"""SDM vol. 3D, "Memory parameter semantics": which operands of ENCLS need a writable mapping, and what a fault says."""

from __future__ import annotations

import pytest
from sgx_machine import (
    CODE,
    CODE_PAGE,
    DATA_PAGE,
    FREE_PAGE,
    NOWHERE,
    PAGEINFO,
    PCMD,
    RDINFO,
    SECINFO,
    SECS_PAGE,
    SOURCE,
    SPARE,
    VA_PAGE,
    Machine,
    epc,
)

from inclavare.sgx.codes import Encls
from inclavare.sgx.paging import PAGE_SIZE, PT_TRIM, SECINFO_R
from inclavare.tee.sgx_sim.processor import PageFault

#: Leaf, which of RBX, RCX, RDX and PAGEINFO.SECS is meant, and the EPC page that it is for.
WRITTEN = [
    (Encls.EBLOCK, "rcx", CODE_PAGE),
    (Encls.ETRACK, "rcx", SECS_PAGE),
    (Encls.ETRACKC, "rcx", CODE_PAGE),
    (Encls.EWB, "rcx", CODE_PAGE),
    (Encls.EWB, "rdx", VA_PAGE),
    (Encls.ELDU, "rcx", FREE_PAGE),
    (Encls.ELDU, "rdx", VA_PAGE),
    (Encls.ELDU, "secs", SECS_PAGE),
    (Encls.EAUG, "rcx", FREE_PAGE),
    (Encls.EAUG, "secs", SECS_PAGE),
    (Encls.EMODPR, "rcx", DATA_PAGE),
    (Encls.EMODT, "rcx", DATA_PAGE),
]


def execute(machine: Machine, leaf: Encls, which: str) -> None:
    """The leaf as it would succeed, but for one operand that is mapped read-only at ``NOWHERE``."""
    secs = NOWHERE if which == "secs" else epc(SECS_PAGE)
    operands = {
        Encls.EBLOCK: (0, epc(CODE_PAGE), 0),
        Encls.ETRACK: (0, epc(SECS_PAGE), 0),
        Encls.ETRACKC: (0, epc(CODE_PAGE), 0),
        Encls.EWB: (PAGEINFO, epc(CODE_PAGE), epc(VA_PAGE)),
        Encls.ELDU: (PAGEINFO, epc(FREE_PAGE), epc(VA_PAGE)),
        Encls.EAUG: (PAGEINFO, epc(FREE_PAGE), 0),
        Encls.EMODPR: (SECINFO, epc(DATA_PAGE), 0),
        Encls.EMODT: (SECINFO, epc(DATA_PAGE), 0),
    }[leaf]
    machine.secinfo(SECINFO_R if leaf is Encls.EMODPR else PT_TRIM)
    if leaf is Encls.EWB:
        machine.pageinfo(srcpge=SOURCE, secinfo=PCMD)
    elif leaf is Encls.ELDU:
        machine.pageinfo(linaddr=CODE, srcpge=SOURCE, secinfo=PCMD, secs=secs)
    else:
        machine.pageinfo(linaddr=SPARE, secs=secs)
    rbx, rcx, rdx = operands
    machine.encls(leaf, rbx, NOWHERE if which == "rcx" else rcx, NOWHERE if which == "rdx" else rdx)


@pytest.mark.parametrize(("leaf", "which", "page"), WRITTEN)
def test_read_only_mapping(enclave: Machine, leaf: Encls, which: str, page: int) -> None:
    if leaf is Encls.EWB:
        enclave.block(CODE_PAGE)
        enclave.track()
    elif leaf is Encls.ELDU:
        enclave.evict(CODE_PAGE)
    enclave.space.map_epc(NOWHERE, page, writable=False, executable=False)
    with enclave.faults(PageFault, "paging.writable", address=NOWHERE, sgx=False, write=True):
        execute(enclave, leaf, which)
    enclave.space.map_epc(NOWHERE, page, writable=True, executable=False)
    execute(enclave, leaf, which)
    assert enclave.events[-1].rule == ""


def test_operands_that_are_only_read(machine: Machine) -> None:
    machine.build()
    machine.space.map_epc(NOWHERE, CODE_PAGE, writable=False, executable=False)
    assert machine.encls(Encls.ERDINFO, RDINFO, NOWHERE).rax == 0
    other = Machine(machine.key)
    other.ecreate()
    other.add_pages()
    other.space.map_epc(NOWHERE, SECS_PAGE, writable=False, executable=False)
    other.space.map_epc(NOWHERE + PAGE_SIZE, CODE_PAGE, writable=False, executable=False)
    other.encls(Encls.EEXTEND, NOWHERE, NOWHERE + PAGE_SIZE)


def test_faults_of_written_pages_say_so(enclave: Machine) -> None:
    """Bit 1 of the error code."""
    enclave.pageinfo(srcpge=SOURCE, secinfo=PCMD)
    with enclave.faults(PageFault, "ewb.valid", sgx=True, write=True):
        enclave.encls(Encls.EWB, PAGEINFO, epc(FREE_PAGE), epc(VA_PAGE))
    with enclave.faults(PageFault, "eldu.occupied", sgx=True, write=True):
        enclave.encls(Encls.ELDU, PAGEINFO, epc(DATA_PAGE), epc(VA_PAGE))
    enclave.pageinfo(linaddr=SPARE, secs=epc(SECS_PAGE))
    with enclave.faults(PageFault, "eaug.occupied", sgx=True, write=True):
        enclave.encls(Encls.EAUG, PAGEINFO, epc(DATA_PAGE))
    for name, page in (("valid", FREE_PAGE), ("pt", VA_PAGE)):
        with enclave.faults(PageFault, f"etrack.secs.{name}", sgx=True, write=False):
            enclave.encls(Encls.ETRACK, rcx=epc(page))
    for leaf, flags in ((Encls.EMODPR, SECINFO_R), (Encls.EMODT, PT_TRIM)):
        enclave.secinfo(flags)
        for name, page in (("valid", FREE_PAGE), ("pt", VA_PAGE)):
            with enclave.faults(PageFault, f"{leaf.name.lower()}.{name}", sgx=True, write=True):
                enclave.encls(leaf, SECINFO, epc(page))
