"""SDM vol. 3D, ENCLS and ENCLU: where they exist, which leaves there are, and what observers are told."""

from __future__ import annotations

import pytest
from sgx_machine import AEP, CODE_PAGE, FREE_PAGE, HOST_CODE, SECS_PAGE, TCS, Machine, epc
from small_enclaves import Signers

from inclavare.sgx.codes import Encls, Enclu, Status
from inclavare.tee import sgx_sim
from inclavare.tee.sgx_sim import processor
from inclavare.tee.sgx_sim.processor import (
    Features,
    GeneralProtection,
    InvalidOpcode,
    Kind,
    LogicalProcessor,
    Processor,
    Registers,
)
from inclavare.tee.sgx_sim.processor.leaves import ENCLS, ENCLU

SGX2_ENCLS = {Encls.EAUG, Encls.EMODPR, Encls.EMODT}
SGX2_ENCLU = {Enclu.EACCEPT, Enclu.EMODPE, Enclu.EACCEPTCOPY}
OVERSUB = {Encls.ERDINFO, Encls.ETRACKC, Encls.ELDBC, Encls.ELDUC}
INSIDE = set(ENCLU) - {Enclu.EENTER, Enclu.ERESUME}


def test_every_leaf_of_the_two_instructions() -> None:
    assert set(ENCLS) == set(Encls) - {Encls.EUPDATESVN}
    assert set(ENCLU) == set(Enclu) - {Enclu.EVERIFYREPORT2}


@pytest.mark.parametrize("cpl", [1, 2, 3])
def test_encls_privilege_level(machine: Machine, cpl: int) -> None:
    machine.os.cpl = cpl
    with machine.faults(InvalidOpcode, "encls.cpl"):
        machine.epa()


@pytest.mark.parametrize("cpl", [0, 1, 2])
def test_enclu_privilege_level(enclave: Machine, cpl: int) -> None:
    enclave.user.cpl = cpl
    with enclave.faults(InvalidOpcode, "enclu.cpl"):
        enclave.enter()


def test_processor_without_sgx(signers: Signers) -> None:
    machine = Machine(signers.ours, Features(sgx=False))
    with machine.faults(InvalidOpcode, "encls.sgx"):
        machine.epa()
    with machine.faults(InvalidOpcode, "enclu.sgx"):
        machine.enter()
    assert InvalidOpcode.vector == 6


def test_feature_control(signers: Signers) -> None:
    machine = Machine(signers.ours, Features(enabled=False))
    with machine.faults(GeneralProtection, "encls.enabled"):
        machine.epa()
    with machine.faults(GeneralProtection, "enclu.enabled"):
        machine.enter()


@pytest.mark.parametrize("leaf", [0x14, 0x18, 0xFFFF_FFFF])
def test_encls_unknown_leaf(machine: Machine, leaf: int) -> None:
    machine.os.registers = Registers(rax=leaf)
    with machine.faults(GeneralProtection, "encls.leaf"):
        machine.os.encls()


@pytest.mark.parametrize("leaf", [8, 10, 0xFFFF_FFFF])
def test_enclu_unknown_leaf(inside: Machine, leaf: int) -> None:
    inside.user.registers.rax = leaf
    with inside.faults(GeneralProtection, "enclu.leaf"):
        inside.user.enclu()


def test_leaf_is_in_eax(machine: Machine) -> None:
    machine.os.registers = Registers(rax=0xFFFF_FFFF_0000_000A, rbx=3, rcx=epc(3))
    machine.os.encls()
    assert machine.entry(3).valid


@pytest.mark.parametrize("leaf", sorted(ENCLS))
def test_encls_features(signers: Signers, leaf: Encls) -> None:
    for features, missing in ((Features(sgx2=False), SGX2_ENCLS), (Features(oversub=False), OVERSUB)):
        machine = Machine(signers.ours, features)
        with pytest.raises(GeneralProtection) as caught:
            # Whatever the leaf: no operand of it is this badly aligned.
            machine.encls(leaf, 1, 1, 1)
        assert (caught.value.rule == "encls.leaf") is (leaf in missing)


@pytest.mark.parametrize("leaf", sorted(ENCLU))
def test_enclu_features(signers: Signers, leaf: Enclu) -> None:
    for features, missing in ((Features(sgx2=False), SGX2_ENCLU), (Features(aexnotify=False), {Enclu.EDECCSSA})):
        machine = Machine(signers.ours, features).build()
        if leaf in INSIDE:
            machine.enter()
        with pytest.raises(GeneralProtection) as caught:
            machine.enclu(leaf, 1 << 52 | 1, 1, 1)
        assert (caught.value.rule == "enclu.leaf") is (leaf in missing)


@pytest.mark.parametrize("leaf", sorted(ENCLU))
def test_enclu_mode(enclave: Machine, leaf: Enclu) -> None:
    """EENTER and ERESUME from outside only, all others from inside only."""
    if leaf not in INSIDE:
        enclave.enter()
    with enclave.faults(GeneralProtection, "enclu.mode"):
        enclave.enclu(leaf, TCS, AEP)


def test_rip_moves_behind_the_instruction(enclave: Machine) -> None:
    assert enclave.epa(9).rip == HOST_CODE + 3
    assert enclave.block(CODE_PAGE).rip == HOST_CODE + 3
    assert enclave.block(CODE_PAGE).rip == HOST_CODE + 3
    assert enclave.os.registers.rax == Status.SGX_BLKSTATE
    enclave.os.registers.rip = (1 << 64) - 3
    enclave.os.registers.rax = Encls.EBLOCK
    enclave.os.encls()
    assert enclave.os.registers.rip == 0


def test_rip_stays_at_an_instruction_that_faults(enclave: Machine) -> None:
    with pytest.raises(GeneralProtection):
        enclave.encls(Encls.EREMOVE, rcx=1)
    assert enclave.os.registers.rip == HOST_CODE
    assert enclave.os.registers.rax == Encls.EREMOVE


def test_events(enclave: Machine) -> None:
    enclave.track()
    event = enclave.events[-1]
    assert (event.kind, event.name, event.status, event.rule) == (Kind.ENCLS, "ETRACK", Status.SGX_SUCCESS, "")
    assert (event.operands, event.processor, event.enclave) == ((0, epc(SECS_PAGE), 0), 0, None)
    enclave.block(FREE_PAGE)
    event = enclave.events[-1]
    assert (event.status, event.rule) == (Status.SGX_PG_INVLD, "eblock.valid")
    with pytest.raises(GeneralProtection) as caught:
        enclave.encls(Encls.EREMOVE, rcx=1)
    event = enclave.events[-1]
    assert (event.kind, event.name, event.fault, event.rule) == (
        Kind.FAULT,
        "EREMOVE",
        caught.value,
        "eremove.epcpage",
    )
    enclave.os.registers.rax = 0x99
    with pytest.raises(GeneralProtection):
        enclave.os.encls()
    assert enclave.events[-1].name == ""
    enclave.enter()
    with pytest.raises(GeneralProtection):
        enclave.enclu(Enclu.EMODPE, 1)
    event = enclave.events[-1]
    assert (event.kind, event.name, event.enclave, event.tcs) == (Kind.FAULT, "EMODPE", 1, TCS)


def test_leaf_of_enclu_without_a_kind_of_its_own(inside: Machine) -> None:
    with pytest.raises(GeneralProtection):
        inside.enclu(Enclu.EMODPE, 1)
    inside.user.write(0x1000_4000, bytes(64))
    inside.enclu(Enclu.EMODPE, 0x1000_4000, 0x1000_5000)
    assert inside.events[-1].kind is Kind.ENCLU


def test_fault_says_what_and_where(enclave: Machine) -> None:
    with pytest.raises(GeneralProtection) as caught:
        enclave.encls(Encls.EREMOVE, rcx=1)
    assert str(caught.value) == "#GP(0x0): eremove.epcpage"
    with pytest.raises(processor.PageFault) as missing:
        enclave.user.read(0x6660_0010, 1)
    assert str(missing.value) == "#PF(0x4) at 0x66600010: paging.present"
    assert not missing.value.by_epcm


def test_processor_needs_an_epc(machine: Machine) -> None:
    with pytest.raises(ValueError, match="0 pages"):
        Processor(machine.cpu.roots, epc_pages=0)
    assert Processor(machine.cpu.roots, epc_pages=1).epc_pages == 1


def test_logical_processors_have_numbers(machine: Machine) -> None:
    assert [lp.number for lp in machine.cpu.logical] == [0, 1]
    assert LogicalProcessor(machine.cpu, machine.space).number == 2


def test_package_exports() -> None:
    for name in processor.__all__:
        assert getattr(processor, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing"):
        processor.nothing  # noqa: B018
    assert sgx_sim.__name__ == "inclavare.tee.sgx_sim"


def test_keys_are_drawn_at_the_start(machine: Machine) -> None:
    other = Processor(machine.cpu.roots, epc_pages=1)
    assert other.page_key != machine.cpu.page_key
    assert other.report_key_id != machine.cpu.report_key_id
    assert (len(other.page_key), len(other.report_key_id)) == (16, 32)
