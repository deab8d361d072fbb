"""Enclave memory while code runs: the plaintext's life, the backing store, paging; instructions of the emulator's own."""

from __future__ import annotations

from dataclasses import replace

import pytest
from emulated import BASE, EXIT, HEAP, READ, WRITE, answer, fault, load, new_processor
from small_enclaves import Signers, sign_image, small_image

from inclavare.errors import IntegrityError
from inclavare.sgx.paging import PAGE_SIZE, SECINFO_W
from inclavare.tee.sgx_sim.emulator import EmulatedEnclave, engine

pytest.importorskip("unicorn", reason="needs the extra emulator")

SECRET = 0x53454352_45544F46
PATTERN = SECRET.to_bytes(8, "little")


@pytest.fixture
def enclave(signers: Signers) -> EmulatedEnclave:
    """Stores RSI at RDI, if it is not zero, and exits with what is there."""
    # test rsi, rsi; je 1f; mov [rdi], rsi; 1:
    return load(bytes.fromhex("4885f6 7403") + WRITE + READ + EXIT, signers.ours)


def put(enclave: EmulatedEnclave) -> int:
    """Store the secret; the number of the EPC page."""
    answer(enclave, enclave.enter(rdi=BASE + HEAP, rsi=SECRET))
    page = enclave.loaded.pages[BASE + HEAP].epc_page
    assert page is not None
    return page


def test_plaintext_is_nowhere_outside_of_enclave_mode(enclave: EmulatedEnclave) -> None:
    page = put(enclave)
    memory = enclave.machine.logical.processor.memory
    assert PATTERN in memory.read(page)
    assert not any(PATTERN in data for data in memory.store.pages.values())
    unicorn = enclave.machine._engine._uc
    cache = bytes(unicorn.mem_read(engine._EPC, enclave.machine.logical.processor.epc_pages * PAGE_SIZE))
    assert not any(cache)
    assert not any(unicorn.mem_read(engine._SCRATCH + engine._AREA, 512))


def test_plaintext_is_gone_after_an_asynchronous_exit(signers: Signers) -> None:
    enclave = load(WRITE + bytes.fromhex("0f0b"), signers.ours)
    fault(enclave.enter(rdi=BASE + HEAP, rsi=SECRET))
    unicorn = enclave.machine._engine._uc
    assert not any(unicorn.mem_read(engine._EPC, enclave.machine.logical.processor.epc_pages * PAGE_SIZE))


def test_flipped_bit_in_the_backing_store_locks(enclave: EmulatedEnclave) -> None:
    page = put(enclave)
    memory = enclave.machine.logical.processor.memory
    data = bytearray(memory.store.pages[page])
    data[100] ^= 1
    memory.store.pages[page] = bytes(data)
    with pytest.raises(IntegrityError) as caught:
        enclave.enter(rdi=BASE + HEAP)
    assert caught.value.id == "tee.memory.integrity"
    assert memory.locked
    with pytest.raises(IntegrityError) as caught:
        enclave.enter(rdi=BASE + HEAP + PAGE_SIZE)
    assert caught.value.id == "tee.memory.locked"
    unicorn = enclave.machine._engine._uc
    assert not any(unicorn.mem_read(engine._EPC, enclave.machine.logical.processor.epc_pages * PAGE_SIZE))


def test_replayed_backing_store_locks(enclave: EmulatedEnclave) -> None:
    memory = enclave.machine.logical.processor.memory
    put(enclave)
    old = memory.store.copy()
    answer(enclave, enclave.enter(rdi=BASE + HEAP, rsi=1))
    memory.store = old
    with pytest.raises(IntegrityError):
        enclave.enter(rdi=BASE + HEAP)
    assert memory.locked


def test_pages_that_were_only_read_are_not_written_back(enclave: EmulatedEnclave) -> None:
    page = put(enclave)
    store = enclave.machine.logical.processor.memory.store
    before = store.pages[page]
    assert answer(enclave, enclave.enter(rdi=BASE + HEAP)) == SECRET
    assert store.pages[page] == before
    put(enclave)
    assert store.pages[page] != before


def test_evicted_page_comes_back_when_it_is_missed(enclave: EmulatedEnclave) -> None:
    put(enclave)
    page = enclave.loaded.pages[BASE + HEAP]
    enclave.driver.evict(page)
    assert page.evicted is not None
    assert PATTERN not in page.evicted.contents
    assert answer(enclave, enclave.enter(rdi=BASE + HEAP)) == SECRET
    assert page.evicted is None


def test_every_page_evicted(enclave: EmulatedEnclave) -> None:
    put(enclave)
    for page in list(enclave.loaded.pages.values()):
        enclave.driver.evict(page)
    assert answer(enclave, enclave.enter(rdi=BASE + HEAP)) == SECRET


def test_damaged_evicted_page_is_refused(enclave: EmulatedEnclave) -> None:
    put(enclave)
    page = enclave.loaded.pages[BASE + HEAP]
    enclave.driver.evict(page)
    assert page.evicted is not None
    page.evicted = replace(page.evicted, contents=bytes(PAGE_SIZE))
    with pytest.raises(IntegrityError) as caught:
        enclave.enter(rdi=BASE + HEAP)
    assert caught.value.id == "sgx.eldu.mac"


def test_page_evicted_while_the_enclave_is_interrupted(enclave: EmulatedEnclave) -> None:
    """The operating system takes pages away at every interrupt; the enclave does not notice."""
    put(enclave)
    machine, page = enclave.machine, enclave.loaded.pages[BASE + HEAP]
    machine.interrupt_every = 1
    exits = 0

    def evict(event: object) -> None:
        nonlocal exits
        if getattr(event, "name", "") == "AEX" and page.epc_page is not None:
            exits += 1
            enclave.driver.evict(page)

    machine.logical.processor.observers.append(evict)
    assert answer(enclave, enclave.enter(rdi=BASE + HEAP)) == SECRET
    assert exits >= 2


def test_code_that_changes_itself(signers: Signers) -> None:
    """On a page that is both writable and executable: the changed instruction is executed, then and later."""
    # mov byte ptr [rip + 1f + 2], 0xcf; jmp 1f; 1: inc rdi – which becomes dec rdi
    code = bytes.fromhex("c60504000000cf eb00 48ffc7") + EXIT
    image = small_image(code)
    image = replace(image, runs=(replace(image.runs[0], flags=image.runs[0].flags | SECINFO_W), *image.runs[1:]))
    enclave = EmulatedEnclave.load(new_processor(), image, sign_image(image, signers.ours).to_bytes(), base=BASE)
    assert answer(enclave, enclave.enter(rdi=10)) == 9
    assert answer(enclave, enclave.enter(rdi=10)) == 9


def test_other_code_at_the_same_place(signers: Signers) -> None:
    """Nothing of an enclave's code stays translated when another takes its pages and its addresses."""
    from emulated import new_processor

    processor = new_processor(epc_pages=16)
    # inc rdi / dec rdi
    first, second = (small_image(bytes.fromhex(code) + EXIT) for code in ("48ffc7", "48ffcf"))
    enclave = EmulatedEnclave.load(processor, first, sign_image(first, signers.ours).to_bytes(), base=BASE)
    assert answer(enclave, enclave.enter(rdi=10)) == 11
    enclave.driver.remove(enclave.loaded)
    again = enclave.driver.load(second, sign_image(second, signers.ours).to_bytes(), base=BASE)
    other = EmulatedEnclave(enclave.machine, enclave.driver, again, host_base=0x20_0000)
    assert answer(other, other.enter(rdi=10)) == 9


RANDOM = {"rdrand rdi": ("480fc7f7", 64), "rdrand edi": ("0fc7f7", 32), "rdseed rdi": ("480fc7ff", 64)}


@pytest.mark.parametrize(("code", "bits"), RANDOM.values(), ids=RANDOM.keys())
def test_random_numbers(signers: Signers, code: str, bits: int) -> None:
    enclave = load(bytes.fromhex(code) + EXIT, signers.ours)
    drawn = {answer(enclave, enclave.enter(rdi=(1 << 64) - 1)) for _ in range(8)}
    assert len(drawn) == 8
    assert all(number < 1 << bits for number in drawn)


def test_random_word_leaves_the_rest_of_the_register(signers: Signers) -> None:
    # rdrand di; then carry into rsi: mov esi, 0; adc esi, 0
    enclave = load(bytes.fromhex("660fc7f7 be00000000 83d600") + EXIT, signers.ours)
    before = 0x1122_3344_5566_7788
    assert answer(enclave, enclave.enter(rdi=before)) >> 16 == before >> 16
    assert enclave.machine.logical.registers.rsi == 1


def test_xgetbv_tells_what_the_enclave_has(signers: Signers) -> None:
    # mov r8, rcx; xor ecx, ecx; xgetbv; mov edi, eax; mov rcx, r8
    enclave = load(bytes.fromhex("4989c8 31c9 0f01d0 89c7 4c89c1") + EXIT, signers.ours)
    assert answer(enclave, enclave.enter()) == 3
