"""SDM vol. 3D, ECREATE."""

from __future__ import annotations

from typing import Any

import pytest
from sgx_machine import (
    BASE,
    NON_CANONICAL,
    NOWHERE,
    ODD_PAGEINFO,
    ODD_SECINFO,
    PAGEINFO,
    SECINFO,
    SECS_PAGE,
    SIZE,
    SOURCE,
    Machine,
    a_secs,
    attributes,
    epc,
)
from small_enclaves import Signers

from inclavare.sgx.codes import Encls
from inclavare.sgx.measure import Measurement
from inclavare.sgx.paging import PAGE_SIZE, PT_REG, PT_SECS, SECINFO_R
from inclavare.sgx.structs import (
    ATTRIBUTE_AEXNOTIFY,
    ATTRIBUTE_CET,
    ATTRIBUTE_DEBUG,
    ATTRIBUTE_EINITTOKENKEY,
    ATTRIBUTE_INIT,
    ATTRIBUTE_KSS,
    ATTRIBUTE_MODE64BIT,
    ATTRIBUTE_PROVISIONKEY,
)
from inclavare.tee.sgx_sim.processor import Access, EpcmEntry, Features, GeneralProtection, PageFault


def prepared(machine: Machine) -> Machine:
    machine.space.poke(SOURCE, a_secs().to_bytes())
    machine.secinfo(PT_SECS)
    machine.pageinfo(srcpge=SOURCE, secinfo=SECINFO)
    return machine


def test_success(machine: Machine) -> None:
    registers = machine.ecreate(a_secs(isv_prod_id=5, isv_svn=6, mrenclave=b"e" * 32, mrsigner=b"s" * 32))
    assert (registers.rax, registers.rflags) == (Encls.ECREATE, 0x8D7)
    assert machine.entry(SECS_PAGE) == EpcmEntry(valid=True, pt=PT_SECS)
    secs = machine.cpu.secs(SECS_PAGE)
    assert (secs.base, secs.public.size, secs.public.isv_prod_id, secs.public.isv_svn) == (BASE, SIZE, 0, 0)
    assert (secs.public.mrenclave, secs.public.mrsigner) == (bytes(32), bytes(32))
    assert secs.internal.enclave_context == epc(SECS_PAGE)
    assert not secs.initialised
    expected = Measurement()
    expected.ecreate(1, SIZE)
    assert machine.cpu.enclaves[secs.eid].measurement.digest() == expected.digest()
    assert machine.cpu.enclaves[secs.eid].epoch == 0


def test_eids_are_never_used_again(machine: Machine) -> None:
    machine.ecreate()
    first = machine.cpu.secs(SECS_PAGE).eid
    machine.encls(Encls.EREMOVE, rcx=epc(SECS_PAGE))
    machine.ecreate()
    assert machine.cpu.secs(SECS_PAGE).eid == first + 1
    assert first > 0


@pytest.mark.parametrize(
    ("rule", "rbx", "rcx"),
    [
        ("ecreate.pageinfo", ODD_PAGEINFO, epc(0)),
        ("ecreate.epcpage", PAGEINFO, epc(0) + 2048),
        ("ecreate.epcpage", PAGEINFO, NON_CANONICAL),
        ("access.canonical", NON_CANONICAL, epc(0)),
    ],
)
def test_operand_alignment(machine: Machine, rule: str, rbx: int, rcx: int) -> None:
    with prepared(machine).faults(GeneralProtection, rule):
        machine.encls(Encls.ECREATE, rbx, rcx)


def test_epcpage_does_not_resolve_within_an_epc(machine: Machine) -> None:
    with prepared(machine).faults(PageFault, "ecreate.epcpage", address=SOURCE, sgx=True):
        machine.encls(Encls.ECREATE, PAGEINFO, SOURCE)
    with prepared(machine).faults(PageFault, "paging.present", address=NOWHERE, sgx=False):
        machine.encls(Encls.ECREATE, PAGEINFO, NOWHERE)
    machine.space.map_epc(NOWHERE, 0, writable=False, executable=False)
    with prepared(machine).faults(PageFault, "paging.writable", address=NOWHERE, sgx=False):
        machine.encls(Encls.ECREATE, PAGEINFO, NOWHERE)


@pytest.mark.parametrize(
    ("rule", "fields"),
    [
        ("ecreate.srcpge", {"srcpge": SOURCE + 2048}),
        ("ecreate.secinfo", {"secinfo": ODD_SECINFO}),
        ("ecreate.pageinfo", {"linaddr": 4096}),
        ("ecreate.pageinfo", {"secs": 4096}),
    ],
)
def test_pageinfo(machine: Machine, rule: str, fields: dict[str, int]) -> None:
    prepared(machine).pageinfo(**{"srcpge": SOURCE, "secinfo": SECINFO, **fields})
    with machine.faults(GeneralProtection, rule):
        machine.encls(Encls.ECREATE, PAGEINFO, epc(0))


def test_secinfo(machine: Machine) -> None:
    for flags in (PT_REG, 1 << 6, 1 << 16, 1 << 63):
        prepared(machine).secinfo(flags)
        with machine.faults(GeneralProtection, "ecreate.secinfo"):
            machine.encls(Encls.ECREATE, PAGEINFO, epc(0))
    prepared(machine).space.poke(SECINFO + 63, b"\1")
    with machine.faults(GeneralProtection, "ecreate.secinfo"):
        machine.encls(Encls.ECREATE, PAGEINFO, epc(0))
    prepared(machine).secinfo(PT_SECS | SECINFO_R)
    machine.encls(Encls.ECREATE, PAGEINFO, epc(0))
    assert not machine.entry(0).r


def test_source_faults_like_any_access(machine: Machine) -> None:
    prepared(machine).pageinfo(srcpge=NOWHERE, secinfo=SECINFO)
    with machine.faults(PageFault, "paging.present", address=NOWHERE):
        machine.encls(Encls.ECREATE, PAGEINFO, epc(0))


def test_concurrency(machine: Machine) -> None:
    for access in Access:
        with machine.cpu.locks.held(0, access), prepared(machine).faults(GeneralProtection, "ecreate.conflict"):
            machine.encls(Encls.ECREATE, PAGEINFO, epc(0))
    machine.ecreate()


def test_epc_page_is_valid_already(machine: Machine) -> None:
    machine.epa(0)
    with prepared(machine).faults(PageFault, "ecreate.occupied", address=epc(0), sgx=True, write=True):
        machine.encls(Encls.ECREATE, PAGEINFO, epc(0))


SECS_RULES: list[tuple[str, dict[str, Any]]] = [
    ("ecreate.xfrm", {"attributes": attributes(xfrm=1)}),
    ("ecreate.xfrm", {"attributes": attributes(xfrm=2)}),
    ("ecreate.xfrm", {"attributes": attributes(xfrm=3 | 1 << 3)}),
    ("ecreate.xfrm", {"attributes": attributes(xfrm=3 | 1 << 63)}),
    ("ecreate.xfrm", {"attributes": attributes(xfrm=0x23), "ssa_frame_size": 4}),
    ("ecreate.xfrm", {"attributes": attributes(xfrm=0xE3), "ssa_frame_size": 4}),
    ("ecreate.xfrm", {"attributes": attributes(xfrm=0x20003), "ssa_frame_size": 4}),
    ("ecreate.miscselect", {"miscselect": 1 << 2}),
    ("ecreate.miscselect", {"miscselect": 1 << 31}),
    ("ecreate.ssaframesize", {"ssa_frame_size": 0}),
    ("ecreate.ssaframesize", {"attributes": attributes(xfrm=0x60003), "ssa_frame_size": 2}),
    ("ecreate.base", {"base": NON_CANONICAL}),
    ("ecreate.base", {"base": 1 << 47}),
    ("ecreate.base", {"base": BASE + SIZE // 2}),
    ("ecreate.base", {"base": BASE + 1}),
    ("ecreate.base", {"base": 1 << 32, "attributes": attributes(without=ATTRIBUTE_MODE64BIT)}),
    ("ecreate.size", {"base": 0, "size": 1 << 56}),
    ("ecreate.size", {"base": 0, "size": 1 << 31, "attributes": attributes(without=ATTRIBUTE_MODE64BIT)}),
    ("ecreate.size", {"base": 0, "size": PAGE_SIZE}),
    ("ecreate.size", {"base": 0, "size": 0}),
    ("ecreate.size", {"base": 0, "size": 3 * PAGE_SIZE}),
    ("ecreate.attributes", {"attributes": attributes(ATTRIBUTE_INIT)}),
    ("ecreate.attributes", {"attributes": attributes(ATTRIBUTE_CET)}),
    ("ecreate.attributes", {"attributes": attributes(1 << 3)}),
    ("ecreate.attributes", {"attributes": attributes(1 << 63)}),
    ("ecreate.cet", {"cet_attributes": 1}),
    ("ecreate.cet", {"cet_legacy_bitmap": 4096}),
    ("ecreate.cet", {"cet_leg_bitmap_size": 1}),
    ("ecreate.config", {"config_id": bytes(63) + b"\1"}),
    ("ecreate.config", {"config_svn": 1}),
]


@pytest.mark.parametrize(("rule", "fields"), SECS_RULES)
def test_secs(machine: Machine, rule: str, fields: dict[str, Any]) -> None:
    prepared(machine).space.poke(SOURCE, a_secs(**fields).to_bytes())
    with machine.faults(GeneralProtection, rule):
        machine.encls(Encls.ECREATE, PAGEINFO, epc(0))


@pytest.mark.parametrize(
    "fields",
    [
        {"attributes": attributes(xfrm=0x602E7), "ssa_frame_size": 3},
        {"attributes": attributes(xfrm=7)},
        {"attributes": attributes(xfrm=0xE7)},
        {"miscselect": 3},
        {"miscselect": 0},
        {"base": 0, "size": 1 << 55},
        {"base": 0, "size": 1 << 46},
        {"base": 0, "size": 2 * PAGE_SIZE},
        {"base": (1 << 47) - SIZE},
        {"base": (1 << 64) - SIZE},
        {"base": 0, "size": 1 << 30, "attributes": attributes(without=ATTRIBUTE_MODE64BIT)},
        {"base": (1 << 32) - SIZE, "attributes": attributes(without=ATTRIBUTE_MODE64BIT)},
        {"attributes": attributes(ATTRIBUTE_DEBUG | ATTRIBUTE_PROVISIONKEY | ATTRIBUTE_EINITTOKENKEY)},
        {"attributes": attributes(ATTRIBUTE_KSS), "config_id": b"c" * 64, "config_svn": 7},
        {"attributes": attributes(ATTRIBUTE_AEXNOTIFY)},
    ],
)
def test_secs_at_the_limits(machine: Machine, fields: dict[str, Any]) -> None:
    machine.ecreate(a_secs(**fields))
    assert machine.entry(0).valid


def test_secs_reserved_bytes(machine: Machine) -> None:
    for offset in (28, 44, 96, 160, 262, 512, 4095):
        prepared(machine).space.poke(SOURCE + offset, b"\1")
        with machine.faults(GeneralProtection, "ecreate.reserved"):
            machine.encls(Encls.ECREATE, PAGEINFO, epc(0))


@pytest.mark.parametrize(
    ("rule", "features", "fields"),
    [
        ("ecreate.attributes", Features(kss=False), {"attributes": attributes(ATTRIBUTE_KSS)}),
        ("ecreate.attributes", Features(aexnotify=False), {"attributes": attributes(ATTRIBUTE_AEXNOTIFY)}),
        ("ecreate.xfrm", Features(xfrm=3), {"attributes": attributes(xfrm=7)}),
        ("ecreate.miscselect", Features(miscselect=0), {"miscselect": 1}),
        ("ecreate.size", Features(max_size_64=36), {"base": 0, "size": 1 << 36}),
    ],
)
def test_features(signers: Signers, rule: str, features: Features, fields: dict[str, Any]) -> None:
    machine = Machine(signers.ours, features)
    with machine.faults(GeneralProtection, rule):
        machine.ecreate(a_secs(**fields))
    Machine(signers.ours).build(secs=a_secs(attributes=fields.get("attributes", attributes())))


def test_page_fault_error_code(machine: Machine) -> None:
    """SDM 38.9.2.2, as the supervisor: P, W and SGX are set, U is not."""
    with pytest.raises(PageFault) as caught:
        prepared(machine).encls(Encls.ECREATE, PAGEINFO, SOURCE)
    assert caught.value.error_code == 1 << 15 | 1 << 1 | 1 << 0
    assert caught.value.by_epcm
    assert caught.value.vector == 14
