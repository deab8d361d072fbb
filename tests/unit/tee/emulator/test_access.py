"""Who reaches what: each rule of SGX's access control (SDM vol. 3D, 38.3 to 38.5), by instructions that try."""

from __future__ import annotations

import pytest
from emulated import (
    BASE,
    EXIT,
    HEAP,
    HOST_CODE,
    HOST_DATA,
    JUMP,
    READ,
    WRITE,
    answer,
    fault,
    host,
    load,
    new_processor,
)
from small_enclaves import Signers, sign_image, small_image

from inclavare.sgx.codes import Encls
from inclavare.sgx.paging import PAGE_SIZE
from inclavare.tee.sgx_sim.emulator import EmulatedEnclave
from inclavare.tee.sgx_sim.processor import GeneralProtection, InvalidOpcode, PageFault

pytest.importorskip("unicorn", reason="needs the extra emulator")

ONES = (1 << 64) - 1
P, W, U, FETCH, SGX = 1, 2, 4, 16, 1 << 15
#: Writes RSI to [RDI] if it is not zero, and exits with what is there then.
#: test rsi, rsi; je 1f; mov [rdi], rsi; 1:
ACCESS = bytes.fromhex("4885f6 7403 488937") + READ + EXIT
SECRET = 0x5EC2E7_5EC2E7


@pytest.fixture
def enclave(signers: Signers) -> EmulatedEnclave:
    return load(ACCESS, signers.ours)


def put(enclave: EmulatedEnclave, value: int, offset: int = HEAP) -> None:
    assert answer(enclave, enclave.enter(rdi=enclave.loaded.base + offset, rsi=value)) == value


def get(enclave: EmulatedEnclave, offset: int = HEAP) -> int:
    return answer(enclave, enclave.enter(rdi=enclave.loaded.base + offset))


def epc_page(enclave: EmulatedEnclave, offset: int) -> int:
    found = enclave.loaded.pages[enclave.loaded.base + offset].epc_page
    assert found is not None
    return found


def neighbour(enclave: EmulatedEnclave, signers: Signers) -> EmulatedEnclave:
    """Another enclave in the same address space."""
    image = small_image(ACCESS + b"other")
    other = enclave.driver.load(image, sign_image(image, signers.ours).to_bytes(), base=BASE * 2)
    return EmulatedEnclave(enclave.machine, enclave.driver, other, host_base=0x20_0000)


def test_enclave_reads_and_writes_its_own_pages(enclave: EmulatedEnclave) -> None:
    put(enclave, SECRET)
    put(enclave, 7, HEAP + PAGE_SIZE)
    assert get(enclave) == SECRET
    assert get(enclave, HEAP + PAGE_SIZE) == 7


def test_access_across_two_pages(enclave: EmulatedEnclave) -> None:
    put(enclave, SECRET, HEAP + PAGE_SIZE - 3)
    assert get(enclave, HEAP + PAGE_SIZE - 3) == SECRET
    assert get(enclave, HEAP + PAGE_SIZE) == SECRET >> 24


def test_enclave_reads_and_writes_ordinary_memory(enclave: EmulatedEnclave) -> None:
    enclave.machine.space.map_ram(HOST_DATA, PAGE_SIZE)
    enclave.machine.space.poke(HOST_DATA, b"ordinary")
    assert answer(enclave, enclave.enter(rdi=HOST_DATA)) == int.from_bytes(b"ordinary", "little")
    answer(enclave, enclave.enter(rdi=HOST_DATA, rsi=SECRET))
    assert enclave.machine.space.peek(HOST_DATA, 8) == SECRET.to_bytes(8, "little")


def test_host_reads_ones(enclave: EmulatedEnclave) -> None:
    put(enclave, SECRET)
    # mov rdi, [rdi]
    assert host(enclave.machine, READ, rdi=BASE + HEAP).fault is None
    assert enclave.machine.logical.registers.rdi == ONES
    # movups xmm0, [rdi]; movq rdi, xmm0
    assert host(enclave.machine, bytes.fromhex("0f1007 66480f7ec7"), rdi=BASE + HEAP).fault is None
    assert enclave.machine.logical.registers.rdi == ONES
    # movzx edi, byte ptr [rdi]
    assert host(enclave.machine, bytes.fromhex("0fb63f"), rdi=BASE + HEAP + 1).fault is None
    assert enclave.machine.logical.registers.rdi == 0xFF


def test_host_reads_ones_from_code_tcs_and_ssa(enclave: EmulatedEnclave) -> None:
    for offset in (0, PAGE_SIZE, 2 * PAGE_SIZE):
        host(enclave.machine, READ, rdi=BASE + offset)
        assert enclave.machine.logical.registers.rdi == ONES


@pytest.mark.parametrize(
    "code",
    [
        "488937",  # mov [rdi], rsi
        "f048ff07",  # lock inc qword ptr [rdi]
        "0f1107",  # movups [rdi], xmm0
        "c60700",  # mov byte ptr [rdi], 0
    ],
)
def test_host_writes_are_dropped(enclave: EmulatedEnclave, code: str) -> None:
    put(enclave, SECRET)
    assert host(enclave.machine, bytes.fromhex(code) + READ, rdi=BASE + HEAP, rsi=1).fault is None
    assert enclave.machine.logical.registers.rdi == ONES
    assert get(enclave) == SECRET


def test_host_cannot_execute_enclave_memory(enclave: EmulatedEnclave) -> None:
    found = fault(host(enclave.machine, JUMP, rdi=BASE))
    assert isinstance(found, InvalidOpcode)
    assert found.rule == "access.abort-page"


def test_enclave_reads_ones_from_another_enclave(enclave: EmulatedEnclave, signers: Signers) -> None:
    other = neighbour(enclave, signers)
    put(other, SECRET)
    assert answer(enclave, enclave.enter(rdi=other.loaded.base + HEAP)) == ONES


def test_enclave_writes_to_another_enclave_are_dropped(enclave: EmulatedEnclave, signers: Signers) -> None:
    other = neighbour(enclave, signers)
    put(other, SECRET)
    assert answer(enclave, enclave.enter(rdi=other.loaded.base + HEAP, rsi=1)) == ONES
    assert get(other) == SECRET


def test_enclave_executes_nothing_outside_of_itself(signers: Signers) -> None:
    enclave = load(JUMP, signers.ours)
    enclave.machine.space.map_ram(HOST_CODE, PAGE_SIZE, executable=True)
    enclave.machine.space.poke(HOST_CODE, EXIT)
    found = fault(enclave.enter(rdi=HOST_CODE))
    assert isinstance(found, GeneralProtection)
    assert found.rule == "access.fetch-outside-elrange"
    assert not enclave.machine.logical.enclave_mode


def test_page_moved_to_another_linear_address(enclave: EmulatedEnclave) -> None:
    put(enclave, SECRET)
    enclave.machine.space.map_epc(BASE + HEAP + PAGE_SIZE, epc_page(enclave, HEAP), writable=True, executable=False)
    found = fault(enclave.enter(rdi=BASE + HEAP + PAGE_SIZE))
    assert isinstance(found, PageFault)
    assert (found.rule, found.error_code, found.address) == (
        "epcm.enclaveaddress",
        P | U | SGX,
        BASE + HEAP + PAGE_SIZE,
    )


def test_two_pages_swapped(enclave: EmulatedEnclave) -> None:
    space, first, second = enclave.machine.space, epc_page(enclave, HEAP), epc_page(enclave, HEAP + PAGE_SIZE)
    space.map_epc(BASE + HEAP, second, writable=True, executable=False)
    space.map_epc(BASE + HEAP + PAGE_SIZE, first, writable=True, executable=False)
    assert fault(enclave.enter(rdi=BASE + HEAP, rsi=1)).rule == "epcm.enclaveaddress"
    space.map_epc(BASE + HEAP, first, writable=True, executable=False)
    assert answer(enclave, enclave.resume()) == 1


def test_ordinary_memory_in_the_enclave(enclave: EmulatedEnclave) -> None:
    enclave.machine.space.map_ram(BASE + HEAP, PAGE_SIZE)
    found = fault(enclave.enter(rdi=BASE + HEAP))
    assert (found.rule, found.error_code) == ("access.elrange-not-epc", P | U | SGX)


def test_code_replaced_by_ordinary_memory(enclave: EmulatedEnclave) -> None:
    put(enclave, SECRET)
    enclave.machine.space.map_ram(BASE, PAGE_SIZE, executable=True)
    enclave.machine.space.poke(BASE, READ + EXIT)
    found = fault(enclave.enter(rdi=BASE + HEAP))
    assert (found.rule, found.error_code) == ("access.elrange-not-epc", P | U | FETCH | SGX)


def test_page_of_another_enclave_in_the_enclave(enclave: EmulatedEnclave, signers: Signers) -> None:
    other = neighbour(enclave, signers)
    enclave.machine.space.map_epc(BASE + HEAP, epc_page(other, HEAP), writable=True, executable=False)
    found = fault(enclave.enter(rdi=BASE + HEAP))
    assert (found.rule, found.error_code) == ("epcm.enclavesecs", P | U | SGX)


def test_page_table_takes_a_permission_away(enclave: EmulatedEnclave) -> None:
    enclave.machine.space.protect(BASE + HEAP, writable=False, executable=False)
    assert get(enclave) == 0
    found = fault(enclave.enter(rdi=BASE + HEAP, rsi=1))
    assert (found.rule, found.error_code, found.address) == ("paging.writable", P | W | U, BASE + HEAP)
    enclave.machine.space.protect(BASE + HEAP, writable=True, executable=False)
    assert answer(enclave, enclave.resume()) == 1


def test_page_table_takes_execution_away(enclave: EmulatedEnclave) -> None:
    enclave.machine.space.protect(BASE, writable=False, executable=False)
    found = fault(enclave.enter(rdi=BASE + HEAP))
    assert (found.rule, found.error_code) == ("paging.executable", P | U | FETCH)


def test_page_table_gives_a_permission_that_epcm_does_not(enclave: EmulatedEnclave) -> None:
    enclave.machine.space.protect(BASE, writable=True, executable=True)
    found = fault(enclave.enter(rdi=BASE, rsi=1))
    assert (found.rule, found.error_code) == ("epcm.w", P | W | U | SGX)


def test_heap_made_executable_by_the_page_table(signers: Signers) -> None:
    enclave = load(JUMP, signers.ours)
    enclave.machine.space.protect(BASE + HEAP, writable=True, executable=True)
    found = fault(enclave.enter(rdi=BASE + HEAP))
    assert (found.rule, found.error_code) == ("epcm.x", P | U | FETCH | SGX)


def test_page_not_mapped(enclave: EmulatedEnclave) -> None:
    enclave.machine.space.unmap(BASE + HEAP)
    found = fault(enclave.enter(rdi=BASE + HEAP, rsi=1))
    assert (found.rule, found.error_code, found.address) == ("paging.present", W | U, BASE + HEAP)
    assert enclave.machine.logical.cr2 == BASE + HEAP


def test_address_that_is_not_canonical(enclave: EmulatedEnclave) -> None:
    assert isinstance(fault(enclave.enter(rdi=1 << 52)), GeneralProtection)


def test_enclave_cannot_read_its_tcs(enclave: EmulatedEnclave) -> None:
    found = fault(enclave.enter(rdi=enclave.tcs))
    assert (found.rule, found.error_code) == ("epcm.pt", P | U | SGX)


def test_blocked_page(enclave: EmulatedEnclave) -> None:
    page = epc_page(enclave, HEAP)
    enclave.driver.encls(Encls.EBLOCK, rcx=enclave.driver.window(page))
    assert fault(enclave.enter(rdi=BASE + HEAP)).rule == "epcm.blocked"


def test_translations_do_not_outlive_an_exit(enclave: EmulatedEnclave) -> None:
    """What was translated before the operating system changed the page tables is not used after the next entry."""
    put(enclave, SECRET)
    enclave.machine.space.unmap(BASE + HEAP)
    assert fault(enclave.enter(rdi=BASE + HEAP)).rule == "paging.present"


def test_host_memory_is_what_the_host_says_it_is(enclave: EmulatedEnclave) -> None:
    """Ordinary memory is shared, not copied: both see each other's writes at once."""
    machine = enclave.machine
    assert host(machine, WRITE, rdi=HOST_DATA + 8, rsi=SECRET).fault is None
    assert machine.space.peek(HOST_DATA + 8, 8) == SECRET.to_bytes(8, "little")
    assert answer(enclave, enclave.enter(rdi=HOST_DATA + 8)) == SECRET


def test_enclaves_of_two_processors(signers: Signers) -> None:
    """The same image at the same address, twice: nothing is shared."""
    one, two = load(ACCESS, signers.ours, processor=new_processor()), load(ACCESS, signers.ours)
    put(one, SECRET)
    assert get(two) == 0
