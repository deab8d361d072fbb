"""The driver: enclaves built, paged and removed through ENCLS alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from sgx_machine import AEP, HOST_CODE, HOST_DATA, ROOTS
from small_enclaves import Signers, sign_image, small_image

from inclavare.errors import IntegrityError, ResourceError
from inclavare.sgx.codes import Encls, Enclu, Status
from inclavare.sgx.image import EnclaveImage, PageRun
from inclavare.sgx.measure import measure
from inclavare.sgx.paging import (
    PAGE_SIZE,
    PT_REG,
    PT_TCS,
    PT_TRIM,
    SECINFO_MODIFIED,
    SECINFO_PENDING,
    SECINFO_PR,
    SECINFO_R,
    SECINFO_W,
)
from inclavare.sgx.structs import SecInfo
from inclavare.tee.sgx_sim.processor import (
    AddressSpace,
    Driver,
    GeneralProtection,
    LoadedEnclave,
    LogicalProcessor,
    PageFault,
    Processor,
    Registers,
)
from inclavare.tee.sgx_sim.processor.driver import EPC_WINDOW

BASE = 0x2000_0000
RW = PT_REG | SECINFO_R | SECINFO_W


class Node:
    """A processor, a driver and an application thread."""

    def __init__(self, signers: Signers, epc_pages: int = 32) -> None:
        self.signers = signers
        self.cpu = Processor(ROOTS, epc_pages=epc_pages)
        self.space = AddressSpace()
        self.driver = Driver(self.cpu, self.space)
        self.user = LogicalProcessor(self.cpu, self.space)
        self.space.map_ram(HOST_CODE, PAGE_SIZE, executable=True)
        self.space.map_ram(HOST_DATA, PAGE_SIZE)

    def load(self, image: EnclaveImage | None = None, *, base: int = BASE, **signing: Any) -> LoadedEnclave:
        image = image or small_image()
        return self.driver.load(image, sign_image(image, self.signers.ours, **signing).to_bytes(), base=base)

    def enter(self, enclave: LoadedEnclave) -> LogicalProcessor:
        """EENTER, with evicted pages brought in as a page-fault handler does."""
        self.user.registers = Registers(rax=Enclu.EENTER, rbx=enclave.tcs[0], rcx=AEP, rip=HOST_CODE)
        self.faulting(self.user.enclu)
        return self.user

    def faulting(self, action: Any) -> Any:
        """Repeat the action while page faults can be handled."""
        while True:
            try:
                return action()
            except PageFault as fault:
                assert fault.address is not None
                if not self.driver.handle_fault(fault.address):
                    raise

    def read(self, linear: int, size: int) -> bytes:
        data: bytes = self.faulting(lambda: self.user.read(linear, size))
        return data

    def accounts(self) -> None:
        """Every EPC page is valid or free, and the driver knows which can be evicted."""
        free = self.driver._free
        assert sorted(free) == [page for page, entry in enumerate(self.cpu.epcm) if not entry.valid]
        assert set(self.driver._resident) == {
            page for enclave in self.driver.enclaves for page in enclave.pages.values() if page.epc_page is not None
        }

    def valid_pages(self) -> int:
        return sum(entry.valid for entry in self.cpu.epcm)


@pytest.fixture
def node(signers: Signers) -> Node:
    return Node(signers)


def test_load(node: Node) -> None:
    image = small_image(b"hello")
    enclave = node.load(image)
    secs = node.cpu.secs(enclave.secs_page)
    assert secs.initialised and secs.public.mrenclave == measure(image)
    assert (secs.base, enclave.base, enclave.size) == (BASE, BASE, image.size)
    assert enclave.tcs == [BASE + PAGE_SIZE]
    # SECS, seven pages, one version array.
    assert node.valid_pages() == 9
    assert len(enclave.slots) == 512
    user = node.enter(enclave)
    assert user.read(BASE, 5, "x") == b"hello"
    with pytest.raises(PageFault):
        user.write(BASE, b"x")


def test_partly_measured_pages(node: Node) -> None:
    image = small_image()
    runs = (*image.runs[:2], replace(image.runs[2], chunks=0b101), *image.runs[3:])
    image = replace(image, runs=runs)
    enclave = node.load(image)
    assert node.cpu.secs(enclave.secs_page).public.mrenclave == measure(image)


def test_two_enclaves(node: Node) -> None:
    one, two = node.load(small_image(b"one")), node.load(small_image(b"two"), base=BASE + 0x100000)
    assert node.enter(two).read(two.base, 3) == b"two"
    node.user.aex(0x20)
    assert node.enter(one).read(one.base, 3) == b"one"
    # The other enclave's memory is the abort page.
    assert node.user.read(two.base, 3) == b"\xff" * 3


def test_remove(node: Node) -> None:
    enclave = node.load()
    node.enter(enclave)
    node.driver.remove(enclave)
    node.driver.remove(enclave)
    assert not node.user.enclave_mode and node.user.registers.rip == AEP
    assert node.valid_pages() == 0
    assert node.cpu.memory.store.pages == {}
    assert node.space.lookup(BASE) is None
    assert node.driver.enclaves == []
    node.accounts()
    node.load()


@pytest.mark.parametrize(
    ("id", "change"),
    [
        ("sgx.ecreate.size", {"size": 3 * PAGE_SIZE}),
        ("sgx.eadd.range", {"size": 4 * PAGE_SIZE}),
        ("sgx.eadd.secinfo", {"runs": (PageRun(0, RW | 1 << 6, 1),)}),
        ("sgx.eadd.occupied", {"runs": (PageRun(0, RW, 2), PageRun(PAGE_SIZE, RW, 1))}),
        ("sgx.einit.enclavehash", {"runs": (PageRun(0, RW, 1),)}),
    ],
)
def test_refusals_leave_nothing_behind(node: Node, id: str, change: dict[str, Any]) -> None:
    image = replace(small_image(), **change)
    signature = sign_image(small_image(), node.signers.ours).to_bytes()
    with pytest.raises(IntegrityError) as caught:
        node.driver.load(image, signature, base=BASE)
    assert caught.value.id == id
    assert node.valid_pages() == 0
    assert caught.value.found
    assert node.driver.enclaves == []
    node.accounts()
    node.load()


def test_enclave_larger_than_the_epc_can_hold_at_once(signers: Signers) -> None:
    """Sixteen pages in an EPC of eight: everything is there when it is touched."""
    node = Node(signers, epc_pages=8)
    heap = b"".join(bytes([number]) * PAGE_SIZE for number in range(1, 9))
    image = small_image()
    image = replace(image, size=32 * PAGE_SIZE, runs=(*image.runs[:3], PageRun(8 * PAGE_SIZE, RW, 8, heap)))
    enclave = node.load(image)
    assert node.cpu.secs(enclave.secs_page).public.mrenclave == measure(image)
    user = node.enter(enclave)
    for number in range(8):
        linear = BASE + (8 + number) * PAGE_SIZE
        # A page that comes in may throw this thread out.
        while True:
            data = node.read(linear, 4)
            if user.enclave_mode:
                break
            node.faulting(user.enclu)
        assert data == bytes([number + 1]) * 4
    assert node.valid_pages() <= 8


def test_epc_that_is_too_small(signers: Signers) -> None:
    node = Node(signers, epc_pages=1)
    with pytest.raises(ResourceError) as caught:
        node.load()
    assert caught.value.id == "tee.epc.full"
    assert node.valid_pages() == 0


def test_evict_and_reload(node: Node) -> None:
    enclave = node.load(small_image(b"to be evicted"))
    page = enclave.pages[BASE]
    node.driver.evict(page)
    assert page.epc_page is None and page.evicted is not None
    assert b"evicted" not in page.evicted.contents
    assert node.space.lookup(BASE) is None
    with pytest.raises(ValueError, match="evicted already"):
        node.driver.evict(page)
    assert node.driver.handle_fault(BASE + 0x123)
    assert page.evicted is None
    assert not node.driver.handle_fault(BASE)
    assert not node.driver.handle_fault(0x6660_0000)
    with pytest.raises(ValueError, match="not evicted"):
        node.driver.reload(page)
    assert node.enter(enclave).read(BASE, 13, "x") == b"to be evicted"
    assert len(enclave.slots) == 512


def test_evict_makes_threads_leave(node: Node) -> None:
    enclave = node.load()
    user = node.enter(enclave)
    user.read(BASE, 1)
    node.driver.evict(enclave.pages[BASE])
    assert not user.enclave_mode
    user.enclu()
    with pytest.raises(PageFault) as caught:
        user.read(BASE, 1)
    assert caught.value.rule == "paging.present"
    assert node.driver.handle_fault(BASE)
    assert user.read(BASE, 4) == b"code"


@pytest.mark.parametrize("what", ["contents", "pcmd"])
def test_reload_of_a_damaged_page(node: Node, what: str) -> None:
    enclave = node.load()
    page = enclave.pages[BASE]
    node.driver.evict(page)
    good = page.evicted
    assert good is not None
    data: bytes = getattr(good, what)
    page.evicted = replace(good, **{what: bytes([data[0] ^ 1]) + data[1:]})
    with pytest.raises(IntegrityError) as caught:
        node.driver.reload(page)
    assert caught.value.id == "sgx.eldu.mac"
    node.accounts()
    page.evicted = good
    node.driver.reload(page)
    node.driver.remove(enclave)
    assert node.valid_pages() == 0


def test_evicted_pages_of_a_removed_enclave(node: Node) -> None:
    enclave = node.load()
    node.driver.evict(enclave.pages[BASE])
    node.driver.remove(enclave)
    assert node.valid_pages() == 0


def test_track_waits_for_the_previous_cycle(node: Node) -> None:
    enclave = node.load()
    user = node.enter(enclave)
    assert node.driver.encls(Encls.ETRACK, rcx=node.driver.window(enclave.secs_page)) is Status.SGX_SUCCESS
    assert user.enclave_mode
    node.driver.track(enclave)
    assert not user.enclave_mode
    assert node.cpu.enclaves[1].epoch == 2
    node.driver.track(enclave)
    assert node.cpu.enclaves[1].epoch == 3


# --- dynamic memory ---------------------------------------------------------------------------------------------


def accept(node: Node, flags: int, linear: int, secinfo: int) -> Status:
    """EACCEPT inside, with a SECINFO that is written there."""
    node.user.write(secinfo, SecInfo(flags).to_bytes())
    registers = node.user.registers
    registers.rax, registers.rbx, registers.rcx = Enclu.EACCEPT, secinfo, linear
    node.user.enclu()
    return Status(registers.rax)


def test_augment(node: Node) -> None:
    enclave = node.load()
    linear = BASE + enclave.size - PAGE_SIZE
    page = node.driver.augment(enclave, linear)
    node.enter(enclave)
    with pytest.raises(PageFault):
        node.user.read(linear, 1)
    assert accept(node, RW | SECINFO_PENDING, linear, BASE + 4 * PAGE_SIZE) is Status.SGX_SUCCESS
    node.user.write(linear, b"new")
    node.user.aex(0x20)
    node.driver.evict(page)
    node.user.enclu()
    assert node.read(linear, 3) == b"new"
    with pytest.raises(GeneralProtection):
        node.driver.augment(enclave, BASE + enclave.size)
    node.accounts()


def test_restrict(node: Node) -> None:
    enclave = node.load()
    linear, secinfo = BASE + 3 * PAGE_SIZE, BASE + 4 * PAGE_SIZE
    node.enter(enclave)
    assert node.driver.restrict(enclave.pages[linear], SECINFO_R) is Status.SGX_SUCCESS
    assert not node.user.enclave_mode
    node.user.enclu()
    assert accept(node, PT_REG | SECINFO_R | SECINFO_PR, linear, secinfo) is Status.SGX_SUCCESS
    with pytest.raises(PageFault):
        node.user.write(linear, b"x")


def test_trim_and_remove_a_page(node: Node) -> None:
    enclave = node.load()
    linear, secinfo = BASE + 3 * PAGE_SIZE, BASE + 4 * PAGE_SIZE
    page = enclave.pages[linear]
    node.driver.evict(page)
    node.enter(enclave)
    assert node.driver.change_type(page, PT_TRIM) is Status.SGX_SUCCESS
    node.user.enclu()
    assert node.driver.remove_page(page) is Status.SGX_ENCLAVE_ACT
    assert accept(node, PT_TRIM | SECINFO_MODIFIED, linear, secinfo) is Status.SGX_SUCCESS
    before = node.valid_pages()
    assert node.driver.remove_page(page) is Status.SGX_SUCCESS
    assert node.user.enclave_mode
    assert node.valid_pages() == before - 1
    assert linear not in enclave.pages
    assert node.space.lookup(linear) is None
    node.accounts()
    node.driver.augment(enclave, linear)


def test_modification_that_is_refused(node: Node) -> None:
    enclave = node.load()
    page = enclave.pages[BASE + 3 * PAGE_SIZE]
    assert node.driver.change_type(page, PT_TCS) is Status.SGX_SUCCESS
    epoch = node.cpu.enclaves[1].epoch
    assert node.driver.change_type(page, PT_TRIM) is Status.SGX_PAGE_NOT_MODIFIABLE
    assert node.cpu.enclaves[1].epoch == epoch


def test_evicted_page_cannot_be_removed(node: Node) -> None:
    enclave = node.load()
    page = enclave.pages[BASE]
    node.driver.evict(page)
    with pytest.raises(ValueError, match="evicted"):
        node.driver.remove_page(page)


def test_launch_with_a_token_leaves_the_launch_key_alone(node: Node) -> None:
    image = small_image()
    token = bytes([1]) + bytes(303)
    with pytest.raises(IntegrityError) as caught:
        node.driver.load(image, sign_image(image, node.signers.ours).to_bytes(), base=BASE, token=token)
    assert caught.value.id == "sgx.einittoken.mac"
    assert node.cpu.le_pubkey_hash == bytes(32)


def test_short_sigstruct(node: Node) -> None:
    with pytest.raises(IntegrityError):
        node.driver.load(small_image(), b"short", base=BASE)
    assert node.valid_pages() == 0


def test_leaves_without_a_code_succeed(node: Node) -> None:
    assert node.driver.encls(Encls.EPA, 3, node.driver.window(5)) is Status.SGX_SUCCESS
    assert node.cpu.epcm[5].valid


def test_windows_are_where_they_are_said_to_be(node: Node) -> None:
    assert node.driver.window(0) == EPC_WINDOW
    assert node.driver.window(3) == EPC_WINDOW + 3 * PAGE_SIZE


def test_a_version_slot_for_every_page(signers: Signers) -> None:
    """One version array holds 512 slots: the 513th page needs another."""
    node = Node(signers, epc_pages=600)
    image = small_image(heap_pages=509)
    enclave = node.load(replace(image, size=1024 * PAGE_SIZE), base=BASE * 2)
    assert (len(enclave.pages), len(enclave.va_pages), len(enclave.slots)) == (512, 1, 512)
    node.driver.augment(enclave, enclave.base + 1000 * PAGE_SIZE)
    assert (len(enclave.va_pages), len(enclave.slots)) == (2, 1024)
    assert len(set(enclave.slots)) == 1024
    node.accounts()


def test_page_tables_follow_secinfo(node: Node) -> None:
    """Code cannot be written, data cannot be executed; a TCS is written by the processor; EAUG's pages may become anything."""
    enclave = node.load()
    linear = BASE + enclave.size - PAGE_SIZE
    node.driver.augment(enclave, linear)
    expected = {0: (False, True), 1: (True, False), 2: (True, False), 3: (True, False)}
    for number, permissions in expected.items():
        found = node.space.lookup(BASE + number * PAGE_SIZE)
        assert found is not None and (found.writable, found.executable) == permissions
    augmented = node.space.lookup(linear)
    assert augmented is not None and augmented.writable and augmented.executable
