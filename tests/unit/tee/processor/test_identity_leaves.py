"""SDM vol. 3D, EREPORT and EGETKEY."""

from __future__ import annotations

from typing import Any

import pytest
from sgx_machine import (
    BASE,
    DATA,
    DATA_PAGE,
    HOST_DATA,
    MORE,
    MORE_PAGE,
    ROOTS,
    SECS_PAGE,
    SIZE,
    SPARE,
    Machine,
    a_secs,
    attributes,
)
from small_enclaves import Signers

from inclavare.sgx import keys, report
from inclavare.sgx.codes import Enclu, Status
from inclavare.sgx.paging import PAGE_SIZE, PT_TCS
from inclavare.sgx.structs import ATTRIBUTE_KSS, KeyRequest, Report
from inclavare.tee.sgx_sim.processor import GeneralProtection, Kind, PageFault

#: Operands: a page for what is read, another for what is written.
TARGETINFO, REPORTDATA, KEYREQUEST = DATA, DATA + 0x200, DATA + 0x400
OUTPUT = MORE + 0x200

EPCM_RULES: list[tuple[str, dict[str, Any]]] = [
    ("epcm.valid", {"valid": False}),
    ("epcm.blocked", {"blocked": True}),
    ("epcm.pt", {"pt": PT_TCS}),
    ("epcm.enclavesecs", {"enclave_secs": 12}),
    ("epcm.pending", {"pending": True}),
    ("epcm.modified", {"modified": True}),
    ("epcm.enclaveaddress", {"enclave_address": SPARE}),
]


def prepared(machine: Machine, data: bytes = b"r" * 64) -> Machine:
    """A TARGETINFO for the enclave itself and REPORTDATA."""
    identity = machine.cpu.secs(SECS_PAGE).identity
    machine.user.write(TARGETINFO, report.target_info(identity).to_bytes())
    machine.user.write(REPORTDATA, data)
    return machine


def ereport(machine: Machine, rbx: int = TARGETINFO, rcx: int = REPORTDATA, rdx: int = OUTPUT) -> Report:
    machine.enclu(Enclu.EREPORT, rbx, rcx, rdx)
    return Report.from_bytes(machine.user.read(rdx, 432))


def test_ereport(inside: Machine) -> None:
    prepared(inside)
    inside.user.registers.rflags = 0x8D7
    made = ereport(inside)
    assert (inside.user.registers.rax, inside.user.registers.rflags) == (Enclu.EREPORT, 0x8D7)
    identity = inside.cpu.secs(SECS_PAGE).identity
    body = report.verify(ROOTS, identity, made)
    assert (body.mrenclave, body.mrsigner) == (identity.mrenclave, identity.mrsigner)
    assert (body.report_data, body.cpusvn, body.isv_prod_id, body.isv_svn) == (b"r" * 64, ROOTS.cpusvn, 7, 3)
    assert body.attributes == identity.attributes.to_bytes()
    assert (body.miscselect, body.cet_attributes) == (1, 0)
    assert made.key_id == inside.cpu.report_key_id


def test_ereport_does_not_look_at_reserved_bytes_of_targetinfo(inside: Machine) -> None:
    prepared(inside)
    for offset in (49, 56, 128, 400, 500):
        inside.user.write(TARGETINFO + offset, b"!")
    report.verify(ROOTS, inside.cpu.secs(SECS_PAGE).identity, ereport(inside))


@pytest.mark.parametrize(
    ("rule", "operands"),
    [
        ("ereport.targetinfo", (TARGETINFO + 256, REPORTDATA, OUTPUT)),
        ("ereport.targetinfo", (HOST_DATA, REPORTDATA, OUTPUT)),
        ("ereport.targetinfo", (BASE + SIZE, REPORTDATA, OUTPUT)),
        ("ereport.reportdata", (TARGETINFO, REPORTDATA + 64, OUTPUT)),
        ("ereport.reportdata", (TARGETINFO, HOST_DATA, OUTPUT)),
        ("ereport.outputdata", (TARGETINFO, REPORTDATA, OUTPUT + 256)),
        ("ereport.outputdata", (TARGETINFO, REPORTDATA, HOST_DATA)),
    ],
)
def test_ereport_operands(inside: Machine, rule: str, operands: tuple[int, int, int]) -> None:
    with prepared(inside).faults(GeneralProtection, rule):
        inside.enclu(Enclu.EREPORT, *operands)


def test_ereport_operands_outside_of_the_epc(inside: Machine) -> None:
    inside.space.map_ram(SPARE, PAGE_SIZE)
    for rule, operands in (
        ("access.elrange-not-epc", (SPARE, REPORTDATA, OUTPUT)),
        ("access.elrange-not-epc", (TARGETINFO, SPARE, OUTPUT)),
        ("access.elrange-not-epc", (TARGETINFO, REPORTDATA, SPARE)),
    ):
        with prepared(inside).faults(PageFault, rule, address=SPARE, sgx=True):
            inside.enclu(Enclu.EREPORT, *operands)


@pytest.mark.parametrize(("rule", "fields"), [*EPCM_RULES, ("epcm.r", {"r": False})])
def test_ereport_input_page(inside: Machine, rule: str, fields: dict[str, Any]) -> None:
    prepared(inside)
    inside.user.flush()
    inside.change(DATA_PAGE, **fields)
    with inside.faults(PageFault, rule, address=TARGETINFO, sgx=True):
        inside.enclu(Enclu.EREPORT, TARGETINFO, MORE, OUTPUT)
    with inside.faults(PageFault, rule, address=REPORTDATA, sgx=True):
        inside.enclu(Enclu.EREPORT, MORE, REPORTDATA, OUTPUT)


@pytest.mark.parametrize(("rule", "fields"), [*EPCM_RULES, ("epcm.w", {"w": False})])
def test_output_page(inside: Machine, rule: str, fields: dict[str, Any]) -> None:
    prepared(inside).user.write(KEYREQUEST, KeyRequest(key_name=keys.KEY_REPORT).to_bytes())
    inside.user.flush()
    inside.change(MORE_PAGE, **fields)
    with inside.faults(PageFault, rule, address=OUTPUT, sgx=True):
        inside.enclu(Enclu.EREPORT, TARGETINFO, REPORTDATA, OUTPUT)
    with inside.faults(PageFault, rule, address=OUTPUT, sgx=True):
        inside.enclu(Enclu.EGETKEY, KEYREQUEST, OUTPUT)


def test_inputs_need_no_writable_mapping(inside: Machine) -> None:
    prepared(inside).user.write(KEYREQUEST, KeyRequest(key_name=keys.KEY_REPORT).to_bytes())
    inside.space.protect(DATA, writable=False, executable=False)
    inside.enclu(Enclu.EREPORT, TARGETINFO, REPORTDATA, OUTPUT)
    inside.enclu(Enclu.EGETKEY, KEYREQUEST, OUTPUT)


def test_egetkey_checks_its_output_before_the_request(inside: Machine) -> None:
    inside.user.write(KEYREQUEST, KeyRequest(key_name=99).to_bytes())
    inside.user.flush()
    inside.change(MORE_PAGE, w=False)
    with inside.faults(PageFault, "epcm.w", address=OUTPUT, sgx=True):
        inside.enclu(Enclu.EGETKEY, KEYREQUEST, OUTPUT)


def test_outputs_need_a_writable_mapping(inside: Machine) -> None:
    prepared(inside).user.write(KEYREQUEST, KeyRequest(key_name=keys.KEY_REPORT).to_bytes())
    inside.space.protect(MORE, writable=False, executable=False)
    with inside.faults(PageFault, "paging.writable", address=OUTPUT, sgx=False):
        inside.enclu(Enclu.EREPORT, TARGETINFO, REPORTDATA, OUTPUT)
    with inside.faults(PageFault, "paging.writable", address=OUTPUT, sgx=False):
        inside.enclu(Enclu.EGETKEY, KEYREQUEST, OUTPUT)


# --- EGETKEY ----------------------------------------------------------------------------------------------------


def egetkey(machine: Machine, request: KeyRequest | bytes, rbx: int = KEYREQUEST, rcx: int = OUTPUT) -> tuple[Any, ...]:
    """Code, flags, rule, and the key."""
    machine.user.write(rbx, request if isinstance(request, bytes) else request.to_bytes())
    registers = machine.enclu(Enclu.EGETKEY, rbx, rcx)
    status = Status(registers.rax)
    return status, registers.rflags & 0x8D5, machine.events[-1].rule, machine.user.read(rcx, 16)


def test_egetkey(inside: Machine) -> None:
    request = KeyRequest(key_name=keys.KEY_SEAL, key_policy=keys.POLICY_MRSIGNER, cpusvn=ROOTS.cpusvn, isv_svn=3)
    inside.user.registers.rflags = 0x8D7
    expected = keys.egetkey(ROOTS, inside.cpu.secs(SECS_PAGE).identity, request)
    assert egetkey(inside, request) == (Status.SGX_SUCCESS, 0, "", expected)
    assert inside.events[-1].kind is Kind.KEY
    assert expected.hex() not in repr(inside.events)


def test_report_key_verifies_own_reports(inside: Machine) -> None:
    made = ereport(prepared(inside))
    key = egetkey(inside, KeyRequest(key_name=keys.KEY_REPORT, key_id=made.key_id))[3]
    assert keys.aes_cmac(key, made.body) == made.mac


@pytest.mark.parametrize(
    ("status", "rule", "request_"),
    [
        (Status.SGX_INVALID_KEYNAME, "egetkey.keyname", KeyRequest(key_name=5)),
        (Status.SGX_INVALID_ATTRIBUTE, "egetkey.attribute", KeyRequest(key_name=keys.KEY_PROVISION)),
        (Status.SGX_INVALID_ATTRIBUTE, "egetkey.attribute", KeyRequest(key_name=keys.KEY_EINITTOKEN)),
        (Status.SGX_INVALID_CPUSVN, "egetkey.cpusvn", KeyRequest(key_name=keys.KEY_SEAL, cpusvn=b"\3" * 16)),
        (Status.SGX_INVALID_ISVSVN, "egetkey.isvsvn", KeyRequest(key_name=keys.KEY_SEAL, isv_svn=4)),
    ],
)
def test_egetkey_refusals(inside: Machine, status: Status, rule: str, request_: KeyRequest) -> None:
    inside.user.write(OUTPUT, b"untouched output")
    assert egetkey(inside, request_) == (status, 1 << 6, rule, b"untouched output")


def test_egetkey_configsvn(signers: Signers) -> None:
    machine = Machine(signers.ours).build(secs=a_secs(attributes=attributes(ATTRIBUTE_KSS), config_svn=2))
    machine.enter()
    assert egetkey(machine, KeyRequest(key_name=keys.KEY_SEAL, config_svn=2))[0] is Status.SGX_SUCCESS
    assert egetkey(machine, KeyRequest(key_name=keys.KEY_SEAL, config_svn=3))[0] is Status.SGX_INVALID_ISVSVN


@pytest.mark.parametrize(
    ("rule", "request_"),
    [
        ("egetkey.keypolicy", KeyRequest(key_name=keys.KEY_SEAL, key_policy=1 << 6).to_bytes()),
        ("egetkey.keypolicy", KeyRequest(key_name=keys.KEY_SEAL, key_policy=keys.POLICY_CONFIGID).to_bytes()),
        ("egetkey.keypolicy", KeyRequest(key_name=keys.KEY_SEAL, config_svn=1).to_bytes()),
        ("egetkey.reserved", KeyRequest(key_name=keys.KEY_SEAL).to_bytes()[:-1] + b"\1"),
        ("egetkey.reserved", KeyRequest(key_name=keys.KEY_SEAL).to_bytes()[:7] + b"\1" + bytes(504)),
    ],
)
def test_egetkey_request(inside: Machine, rule: str, request_: bytes) -> None:
    inside.user.write(KEYREQUEST, request_)
    with inside.faults(GeneralProtection, rule):
        inside.enclu(Enclu.EGETKEY, KEYREQUEST, OUTPUT)


@pytest.mark.parametrize(
    ("rule", "rbx", "rcx"),
    [
        ("egetkey.keyrequest", KEYREQUEST + 256, OUTPUT),
        ("egetkey.keyrequest", HOST_DATA, OUTPUT),
        ("egetkey.outputdata", KEYREQUEST, OUTPUT + 8),
        ("egetkey.outputdata", KEYREQUEST, HOST_DATA),
    ],
)
def test_egetkey_operands(inside: Machine, rule: str, rbx: int, rcx: int) -> None:
    inside.user.write(KEYREQUEST, KeyRequest(key_name=keys.KEY_REPORT).to_bytes())
    with inside.faults(GeneralProtection, rule):
        inside.enclu(Enclu.EGETKEY, rbx, rcx)


def test_egetkey_operands_outside_of_the_epc(inside: Machine) -> None:
    inside.space.map_ram(SPARE, PAGE_SIZE)
    with inside.faults(PageFault, "access.elrange-not-epc", address=SPARE, sgx=True):
        inside.enclu(Enclu.EGETKEY, SPARE, OUTPUT)
    with inside.faults(PageFault, "access.elrange-not-epc", address=SPARE, sgx=True):
        inside.enclu(Enclu.EGETKEY, KEYREQUEST, SPARE)


@pytest.mark.parametrize(("rule", "fields"), [*EPCM_RULES, ("epcm.r", {"r": False})])
def test_egetkey_input_page(inside: Machine, rule: str, fields: dict[str, Any]) -> None:
    inside.user.flush()
    inside.change(DATA_PAGE, **fields)
    with inside.faults(PageFault, rule, address=KEYREQUEST, sgx=True):
        inside.enclu(Enclu.EGETKEY, KEYREQUEST, OUTPUT)


def test_output_may_end_where_the_page_does(inside: Machine) -> None:
    last = MORE + PAGE_SIZE - 16
    assert egetkey(inside, KeyRequest(key_name=keys.KEY_REPORT), rcx=last)[0] is Status.SGX_SUCCESS
