"""SDM vol. 3D, EINIT."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import pytest
from sgx_machine import (
    CODE_PAGE,
    NON_CANONICAL,
    NOWHERE,
    ROOTS,
    SECS_PAGE,
    SIGSTRUCT,
    SOURCE,
    TOKEN,
    VA_PAGE,
    Machine,
    a_secs,
    attributes,
    epc,
)
from small_enclaves import Signers, resigned

from inclavare.sgx.codes import Encls, Status
from inclavare.sgx.keys import Identity, egetkey
from inclavare.sgx.launch import EinitToken
from inclavare.sgx.sigstruct import mrsigner
from inclavare.sgx.structs import (
    ATTRIBUTE_DEBUG,
    ATTRIBUTE_EINITTOKENKEY,
    ATTRIBUTE_INIT,
    ATTRIBUTE_KSS,
    ATTRIBUTE_MODE64BIT,
    Attributes,
    Sigstruct,
)
from inclavare.sgx.tokens import make_token
from inclavare.tee.sgx_sim.processor import Access, GeneralProtection, PageFault, Resource

RFLAGS_ZF = 1 << 6


@pytest.fixture
def built(machine: Machine) -> Machine:
    """An enclave that only EINIT is missing from."""
    machine.ecreate()
    machine.add_pages()
    machine.space.poke(SIGSTRUCT, machine.sign().to_bytes())
    return machine


def einit(machine: Machine) -> None:
    machine.encls(Encls.EINIT, SIGSTRUCT, epc(SECS_PAGE), TOKEN)


def refused(machine: Machine, status: Status, rule: str) -> None:
    """EINIT ends with an error code, and the enclave is as before."""
    before = machine.state()
    einit(machine)
    registers = machine.os.registers
    assert (Status(registers.rax), machine.events[-1].rule) == (status, rule)
    assert registers.rflags == 0x202 & ~0x200 | RFLAGS_ZF
    assert machine.events[-1].status is status
    assert machine._without_registers(before) == machine._without_registers(machine.state())
    assert not machine.cpu.secs(SECS_PAGE).initialised


def test_success(built: Machine) -> None:
    measured = built.cpu.enclaves[1].measurement.digest()
    signed = built.sign(isv_prod_id=9, isv_svn=4)
    built.space.poke(SIGSTRUCT, signed.to_bytes())
    einit(built)
    assert (built.os.registers.rax, built.os.registers.rflags) == (Status.SGX_SUCCESS, 2)
    secs = built.cpu.secs(SECS_PAGE)
    assert secs.public.mrenclave == measured
    assert secs.public.mrsigner == hashlib.sha256(signed.modulus).digest()
    assert (secs.public.isv_prod_id, secs.public.isv_svn) == (9, 4)
    assert secs.attributes == Attributes(ATTRIBUTE_MODE64BIT | ATTRIBUTE_INIT, 3)
    assert built.events[-1].rule == ""


def test_kss_fields(machine: Machine) -> None:
    machine.ecreate(a_secs(attributes=attributes(ATTRIBUTE_KSS), config_id=b"c" * 64, config_svn=2))
    assert machine.einit(isv_family_id=b"f" * 16, isv_ext_prod_id=b"x" * 16).rax == 0
    identity = machine.cpu.secs(SECS_PAGE).identity
    assert (identity.isv_family_id, identity.isv_ext_prod_id) == (b"f" * 16, b"x" * 16)
    assert (identity.config_id, identity.config_svn) == (b"c" * 64, 2)


@pytest.mark.parametrize(
    ("rule", "operands"),
    [
        ("einit.sigstruct", (SIGSTRUCT + 2048, epc(0), TOKEN)),
        ("einit.secs", (SIGSTRUCT, epc(0) + 2048, TOKEN)),
        ("einit.secs", (SIGSTRUCT, NON_CANONICAL, TOKEN)),
        ("einit.token", (SIGSTRUCT, epc(0), TOKEN + 256)),
    ],
)
def test_operand_alignment(built: Machine, rule: str, operands: tuple[int, int, int]) -> None:
    with built.faults(GeneralProtection, rule):
        built.encls(Encls.EINIT, *operands)


@pytest.mark.parametrize(
    ("rule", "rcx"),
    [("einit.secs", SOURCE), ("einit.secs.valid", epc(12)), ("einit.secs.pt", epc(CODE_PAGE))],
)
def test_secs_operand(built: Machine, rule: str, rcx: int) -> None:
    with built.faults(PageFault, rule, address=rcx, sgx=True):
        built.encls(Encls.EINIT, SIGSTRUCT, rcx, TOKEN)


def test_secs_must_be_writable(built: Machine) -> None:
    built.space.map_epc(NOWHERE, SECS_PAGE, writable=False, executable=False)
    with built.faults(PageFault, "paging.writable", address=NOWHERE):
        built.encls(Encls.EINIT, SIGSTRUCT, NOWHERE, TOKEN)


@pytest.mark.parametrize(
    ("status", "rule", "field"),
    [
        (Status.SGX_INVALID_SIG_STRUCT, "sigstruct.constant", "header"),
        (Status.SGX_INVALID_SIG_STRUCT, "sigstruct.constant", "header2"),
        (Status.SGX_INVALID_SIG_STRUCT, "sigstruct.vendor", "vendor"),
        (Status.SGX_INVALID_SIG_STRUCT, "sigstruct.exponent", "exponent"),
        (Status.SGX_INVALID_SIGNATURE, "sigstruct.signature", "signature"),
        (Status.SGX_INVALID_SIGNATURE, "sigstruct.signature", "date"),
        (Status.SGX_INVALID_SIGNATURE, "sigstruct.signature", "enclave_hash"),
        (Status.SGX_INVALID_SIGNATURE, "sigstruct.q1", "q1"),
        (Status.SGX_INVALID_SIGNATURE, "sigstruct.q2", "q2"),
    ],
)
def test_sigstruct(built: Machine, status: Status, rule: str, field: str) -> None:
    at = SIGSTRUCT + Sigstruct.LAYOUT.offsets[field]
    built.space.poke(at, bytes([built.space.peek(at, 1)[0] ^ 0x02]))
    refused(built, status, rule)


def test_sigstruct_reserved_bytes(built: Machine) -> None:
    for offset in (44, 127, 910, 1028, 1039):
        built.space.poke(SIGSTRUCT, built.sign().to_bytes())
        built.space.poke(SIGSTRUCT + offset, b"\1")
        refused(built, Status.SGX_INVALID_SIG_STRUCT, "sigstruct.reserved")


def test_sigstruct_of_intel(built: Machine) -> None:
    built.space.poke(SIGSTRUCT, built.sign(vendor=0x8086).to_bytes())
    einit(built)
    assert built.os.registers.rax == 0


def test_isvfamilyid_needs_kss(built: Machine) -> None:
    built.space.poke(
        SIGSTRUCT, built.sign(isv_family_id=bytes(15) + b"\1", attribute_mask=ATTRIBUTE_MODE64BIT).to_bytes()
    )
    refused(built, Status.SGX_INVALID_SIG_STRUCT, "einit.isvfamilyid")


def test_enclavehash(built: Machine) -> None:
    built.space.poke(SIGSTRUCT, built.sign(mrenclave=b"m" * 32).to_bytes())
    refused(built, Status.SGX_INVALID_MEASUREMENT, "einit.enclavehash")


def test_nothing_unmeasured_becomes_init(built: Machine) -> None:
    built.eadd(0x1000_9000, 9)
    refused(built, Status.SGX_INVALID_MEASUREMENT, "einit.enclavehash")


def test_controlled_attributes(signers: Signers) -> None:
    """EINITTOKENKEY is for the launch enclave, whose signer IA32_SGXLEPUBKEYHASH names: a token does not help."""
    machine = Machine(signers.ours)
    machine.ecreate(a_secs(attributes=attributes(ATTRIBUTE_EINITTOKENKEY)))
    assert machine.einit().rax == 0
    again = Machine(signers.ours)
    again.ecreate(a_secs(attributes=attributes(ATTRIBUTE_EINITTOKENKEY)))
    again.cpu.le_pubkey_hash = b"l" * 32
    again.space.poke(SIGSTRUCT, again.sign().to_bytes())
    again.space.poke(TOKEN, token(again).to_bytes())
    refused(again, Status.SGX_INVALID_ATTRIBUTE, "einit.controlled")


@pytest.mark.parametrize(
    ("rule", "overrides"),
    [
        ("einit.attributes", {"attributes": ATTRIBUTE_MODE64BIT | ATTRIBUTE_KSS}),
        ("einit.attributes", {"xfrm": 7, "xfrm_mask": 7}),
        ("einit.attributes", {"attributes": ATTRIBUTE_MODE64BIT | ATTRIBUTE_DEBUG, "attribute_mask": (1 << 64) - 1}),
        ("einit.miscselect", {"miscselect": 0}),
        ("einit.miscselect", {"miscselect": 3}),
        ("einit.cet", {"cet_attributes": 1, "cet_attributes_mask": 1}),
    ],
)
def test_signed_attributes(built: Machine, rule: str, overrides: dict[str, Any]) -> None:
    built.space.poke(SIGSTRUCT, built.sign(**overrides).to_bytes())
    refused(built, Status.SGX_INVALID_ATTRIBUTE, rule)


@pytest.mark.parametrize(
    "overrides",
    [
        {"attributes": ATTRIBUTE_MODE64BIT | ATTRIBUTE_KSS, "attribute_mask": ATTRIBUTE_MODE64BIT},
        {"xfrm": 7, "xfrm_mask": 3},
        {"miscselect": 3, "misc_mask": 1},
        {"cet_attributes": 2, "cet_attributes_mask": 1},
    ],
)
def test_bits_outside_of_the_masks(built: Machine, overrides: dict[str, Any]) -> None:
    built.space.poke(SIGSTRUCT, built.sign(**overrides).to_bytes())
    einit(built)
    assert built.os.registers.rax == 0


def test_concurrency(built: Machine) -> None:
    locks = built.cpu.locks
    with locks.held(SECS_PAGE, Access.EXCLUSIVE), built.faults(GeneralProtection, "einit.secs-conflict"):
        einit(built)
    for access in Access:
        with (
            locks.held(SECS_PAGE, access, Resource.MEASUREMENT),
            built.faults(GeneralProtection, "einit.measurement-conflict"),
        ):
            einit(built)
    with locks.held(SECS_PAGE, Access.SHARED), locks.held(SECS_PAGE, Access.EXCLUSIVE, Resource.TRACKING):
        einit(built)


def test_enclave_is_initialised_already(enclave: Machine) -> None:
    with enclave.faults(GeneralProtection, "einit.initialised"):
        einit(enclave)


def test_mrenclave_is_fixed(enclave: Machine) -> None:
    before = enclave.cpu.secs(SECS_PAGE).public.mrenclave
    enclave.eaug()
    enclave.evict(CODE_PAGE)
    assert enclave.cpu.secs(SECS_PAGE).public.mrenclave == before
    assert enclave.entry(VA_PAGE).valid


# --- launch control ---------------------------------------------------------------------------------------------


LAUNCH_KEY_HASH = b"l" * 32


def token(machine: Machine, *, debug_launch_enclave: bool = False, **fields: Any) -> EinitToken:
    """An EINITTOKEN for the enclave as it is, from a launch enclave of signer ``LAUNCH_KEY_HASH``."""
    secs = machine.cpu.secs(SECS_PAGE)
    flags = ATTRIBUTE_INIT | ATTRIBUTE_MODE64BIT | ATTRIBUTE_EINITTOKENKEY | debug_launch_enclave * ATTRIBUTE_DEBUG
    launch_enclave = Identity(bytes(32), LAUNCH_KEY_HASH, Attributes(flags, 3), isv_prod_id=1, isv_svn=2)
    made = {
        "mrenclave": machine.cpu.enclaves[secs.eid].measurement.digest(),
        "mrsigner": mrsigner(machine.sign().modulus),
        "attributes": secs.attributes,
        **fields,
    }
    return make_token(
        lambda request: egetkey(ROOTS, launch_enclave, request), launch_enclave, ROOTS.cpusvn, b"k" * 32, **made
    )


@pytest.fixture
def controlled(built: Machine) -> Machine:
    """IA32_SGXLEPUBKEYHASH names another signer."""
    built.cpu.le_pubkey_hash = LAUNCH_KEY_HASH
    return built


def test_launch_without_token_by_another_signer(controlled: Machine) -> None:
    refused(controlled, Status.SGX_INVALID_EINITTOKEN, "einittoken.missing")


def test_launch_with_token(controlled: Machine) -> None:
    assert controlled.einit(token(controlled).to_bytes()).rax == 0


@pytest.mark.parametrize(
    ("status", "rule", "fields"),
    [
        (Status.SGX_INVALID_MEASUREMENT, "einittoken.measurement", {"mrenclave": bytes(32)}),
        (Status.SGX_INVALID_MEASUREMENT, "einittoken.measurement", {"mrsigner": bytes(32)}),
        (Status.SGX_INVALID_ATTRIBUTE, "einittoken.attributes", {"attributes": Attributes(ATTRIBUTE_MODE64BIT, 7)}),
        (Status.SGX_INVALID_EINITTOKEN, "einittoken.debug", {"debug_launch_enclave": True}),
    ],
)
def test_launch_with_a_token_for_another(
    controlled: Machine, status: Status, rule: str, fields: dict[str, Any]
) -> None:
    controlled.space.poke(TOKEN, token(controlled, **fields).to_bytes())
    refused(controlled, status, rule)


@pytest.mark.parametrize(
    ("status", "rule", "fields"),
    [
        (Status.SGX_INVALID_EINITTOKEN, "einittoken.mac", {"mac": bytes(16)}),
        (Status.SGX_INVALID_EINITTOKEN, "einittoken.mac", {"key_id": bytes(32)}),
        (Status.SGX_INVALID_EINITTOKEN, "einittoken.mac", {"isv_svn_le": 1}),
        (Status.SGX_INVALID_EINITTOKEN, "einittoken.reserved", {"valid": 3}),
        (Status.SGX_INVALID_CPUSVN, "einittoken.cpusvn", {"cpusvn_le": bytes((2, 2, 2)) + bytes(13)}),
    ],
)
def test_launch_with_a_damaged_token(controlled: Machine, status: Status, rule: str, fields: dict[str, Any]) -> None:
    controlled.space.poke(TOKEN, replace(token(controlled), **fields).to_bytes())
    refused(controlled, status, rule)


def test_resigned_is_no_signature(built: Machine) -> None:
    built.space.poke(SIGSTRUCT, resigned(built.sign(), isv_svn=9))
    refused(built, Status.SGX_INVALID_SIGNATURE, "sigstruct.signature")
