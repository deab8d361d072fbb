"""The driver's ABI against the kernel's header, and our loader against what the kernel does with its calls."""

from __future__ import annotations

import ctypes
import errno
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sgx_kernel import HEADER, Kernel
from small_enclaves import Signers, sign_image, small_image

from inclavare.errors import InclavareError, IntegrityError, PlatformError, ResourceError
from inclavare.sgx.image import PAGE_SIZE, PT_REG, PT_TCS, SECINFO_R, SECINFO_W, SECINFO_X, EnclaveImage, PageRun
from inclavare.sgx.measure import measure
from inclavare.sgx.structs import ATTRIBUTE_MODE64BIT, XFRM_LEGACY, Attributes, Secs
from inclavare.tee.sgx import driver
from inclavare.tee.sgx.driver import EnclaveFile, protection
from inclavare.tee.sgx.vdso import EnclaveRun

pytestmark = pytest.mark.skipif(not HEADER.exists(), reason=f"no {HEADER} (linux-libc-dev)")
RW = SECINFO_R | SECINFO_W


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


def secs_of(image: EnclaveImage) -> Secs:
    attributes = Attributes(image.attributes, image.xfrm).to_bytes()
    return Secs(image.size, 0, image.ssa_frame_size, image.miscselect, attributes=attributes)


def build(kernel: Kernel, image: EnclaveImage, sigstruct: bytes | None = None) -> EnclaveFile:
    file = EnclaveFile(image.size, syscalls=kernel)
    file.create(secs_of(image))
    for run in image.runs:
        file.add(run)
    if sigstruct is not None:
        file.init(sigstruct)
    return file


@pytest.fixture
def running(kernel: Kernel, signers: Signers) -> Iterator[EnclaveFile]:
    image = small_image(heap_pages=8)
    file = build(kernel, image, sign_image(image, signers.ours).to_bytes())
    yield file
    file.close()


# --- the header


def test_numbers_and_offsets_are_those_of_a_c_compiler(tmp_path: Path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    lines = []
    for call in driver.IOCTLS:
        struct = call.name.replace("SGX_IOC_ENCLAVE_", "sgx_enclave_").lower()
        lines.append(f'printf("{call.name} %lu %zu\\n", (unsigned long){call.name}, sizeof(struct {struct}));')
        for name, *_ in call.argument._fields_:  # type: ignore[misc]
            lines.append(
                f'printf("{call.name}.{name} %zu %zu\\n", offsetof(struct {struct}, {name}), '
                f"sizeof(((struct {struct} *)0)->{name}));"
            )
    for name, *_ in EnclaveRun._fields_:  # type: ignore[misc]
        lines.append(
            f'printf("run.{name} %zu %zu\\n", offsetof(struct sgx_enclave_run, {name}), '
            f"sizeof(((struct sgx_enclave_run *)0)->{name}));"
        )
    lines.append('printf("MEASURE %d 4\\n", SGX_PAGE_MEASURE);')
    source = tmp_path / "abi.c"
    source.write_text(
        "#include <stdio.h>\n#include <stddef.h>\n#include <asm/sgx.h>\nint main(void) {" + "\n".join(lines) + "}\n"
    )
    try:
        subprocess.run(["gcc", "-o", tmp_path / "abi", source], check=True, capture_output=True)
    except subprocess.CalledProcessError as error:
        if b"undeclared" in error.stderr or b"incomplete" in error.stderr:
            pytest.skip("the header is older than EDMM")
        raise
    out = subprocess.run([tmp_path / "abi"], check=True, capture_output=True, text=True).stdout
    expected = {}
    for line in out.splitlines():
        name, first, second = line.split()
        expected[name] = int(first), int(second)
    found: dict[str, tuple[int, int]] = {"MEASURE": (driver.PAGE_MEASURE, 4)}
    for name, *_ in EnclaveRun._fields_:  # type: ignore[misc]
        where = getattr(EnclaveRun, name)
        found[f"run.{name}"] = where.offset, where.size
    for call in driver.IOCTLS:
        found[call.name] = call.request, ctypes.sizeof(call.argument)
        for name, *_ in call.argument._fields_:  # type: ignore[misc]
            where = getattr(call.argument, name)
            found[f"{call.name}.{name}"] = where.offset, where.size
    assert found == expected


def test_every_enclave_ioctl_of_the_header_is_known(kernel: Kernel) -> None:
    assert {(name, code) for code, (name, _) in kernel.ioctls.items()} == {
        (call.name, call.request) for call in driver.IOCTLS
    }


@pytest.mark.parametrize(
    ("flags", "prot"),
    [(PT_TCS, 3), (PT_REG | RW, 3), (PT_REG | SECINFO_R | SECINFO_X, 5), (PT_REG | SECINFO_R, 1), (PT_REG, 0)],
)
def test_pages_are_mapped_with_their_own_permissions(flags: int, prot: int) -> None:
    assert protection(flags) == prot


# --- loading


def test_an_enclave_is_built_as_it_was_measured(kernel: Kernel, signers: Signers) -> None:
    image = small_image(b"\x0f\x01\xd7", heap_pages=3)
    file = build(kernel, image, sign_image(image, signers.ours).to_bytes())
    state = next(iter(kernel.files.values()))
    assert state is not None and state.initialised
    assert state.measurement.digest() == measure(image)
    assert file.base % file.size == 0 and state.base == file.base
    assert {at - file.base: what for at, what in kernel.mapped.items()} == {
        run.offset: (run.count * PAGE_SIZE, protection(run.flags)) for run in image.runs
    }
    assert kernel.calls == ["CREATE", "ADD_PAGES", "ADD_PAGES", "ADD_PAGES", "ADD_PAGES", "INIT"]
    file.close()
    file.close()
    assert not kernel.files and not kernel.mapped and not kernel.reserved and kernel.free == 1 << 20


def test_permissions_of_a_tcs_are_not_handed_over(kernel: Kernel) -> None:
    """The processor clears them; the kernel refuses a SECINFO that has them."""
    image = small_image()
    tcs = image.runs[1]
    image = replace(image, runs=(image.runs[0], replace(tcs, flags=tcs.flags | RW), *image.runs[2:]))
    file = build(kernel, image)
    state = next(iter(kernel.files.values()))
    assert state is not None and state.measurement.digest() == measure(image)
    file.close()


@pytest.mark.parametrize("pages_a_call", [1, 3, 1000])
def test_a_call_that_does_a_part_is_continued(kernel: Kernel, signers: Signers, pages_a_call: int) -> None:
    kernel.pages_a_call, kernel.interruptions = pages_a_call, 5
    image = small_image(bytes(range(256)) * 16, heap_pages=10)
    file = build(kernel, image, sign_image(image, signers.ours).to_bytes())
    assert kernel.interruptions == 0 and kernel.calls.count("ADD_PAGES") > 3
    file.close()


def test_large_runs_are_handed_over_in_pieces(kernel: Kernel) -> None:
    count = 2 * driver._PIECE // PAGE_SIZE + 3
    data = b"".join(number.to_bytes(4, "little") * 1024 for number in range(count))
    runs = (
        PageRun(0, PT_REG | RW, count, data),
        PageRun(len(data), PT_REG | RW, count, None),
        PageRun(2 * len(data), PT_REG | RW, count, data, measured=False),
    )
    image = EnclaveImage(1 << 25, 1, ATTRIBUTE_MODE64BIT, XFRM_LEGACY, 0, runs)
    file = build(kernel, image)
    state = next(iter(kernel.files.values()))
    assert state is not None and state.measurement.digest() == measure(image)
    assert kernel.calls.count("ADD_PAGES") == 9
    assert b"".join(state.pages[2 * len(data) + at].content for at in range(0, len(data), PAGE_SIZE)) == data
    assert list(kernel.reserved.values()) == [image.size], "staging memory is given back"
    file.close()


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 3), st.integers(1, 4), st.sampled_from([SECINFO_R, RW, 5, 7]), st.booleans(), st.booleans()
        ),
        max_size=6,
    ),
    st.integers(1, 5),
    st.integers(0, 3),
)
def test_any_layout_measures_the_same(runs: list[Any], pages_a_call: int, interruptions: int) -> None:
    kernel = Kernel()
    kernel.pages_a_call, kernel.interruptions = pages_a_call, interruptions
    at, made = 0, []
    for number, (gap, count, permissions, measured, zero) in enumerate(runs):
        at += gap * PAGE_SIZE
        data = None if zero else bytes([number + 1]) * (count * PAGE_SIZE)
        made.append(PageRun(at, PT_REG | permissions, count, data, measured))
        at += count * PAGE_SIZE
    image = EnclaveImage(1 << 18, 1, ATTRIBUTE_MODE64BIT, XFRM_LEGACY, 0, tuple(made))
    file = build(kernel, image)
    state = next(iter(kernel.files.values()))
    assert state is not None and state.measurement.digest() == measure(image)
    file.close()


# --- refusals


def refused(call: Any, kind: type[InclavareError], id: str, *, found: str = "", remedy: str = "") -> None:
    with pytest.raises(kind) as caught:
        call()
    assert caught.value.id == id
    assert found in str(caught.value.found) and remedy in str(caught.value.remedy)


@pytest.mark.parametrize(
    ("code", "remedy"),
    [(errno.EACCES, "group (sgx)"), (errno.ENODEV, "selftest"), (errno.EIO, "reboot")],
)
def test_the_device_does_not_open(kernel: Kernel, code: int, remedy: str) -> None:
    kernel.failures["open"] = [code]
    refused(lambda: EnclaveFile(1 << 16, syscalls=kernel), PlatformError, "tee.sgx.device", remedy=remedy)


def test_an_opening_that_the_kernel_wants_repeated(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_PAUSE", 0)
    kernel.failures["open"] = [errno.EAGAIN] * 3
    EnclaveFile(1 << 16, syscalls=kernel).close()
    kernel.failures["open"] = [errno.EAGAIN] * 1000
    refused(lambda: EnclaveFile(1 << 16, syscalls=kernel), PlatformError, "tee.sgx.device", remedy="try again")


def test_no_room_in_the_address_space(kernel: Kernel) -> None:
    kernel.failures["mmap"] = [errno.ENOMEM]
    refused(lambda: EnclaveFile(1 << 16, syscalls=kernel), ResourceError, "tee.sgx.range", remedy="ulimit")
    assert not kernel.files


def test_a_secs_that_the_processor_refuses(kernel: Kernel) -> None:
    image = small_image()
    file = EnclaveFile(image.size, syscalls=kernel)
    refused(lambda: file.create(replace(secs_of(image), ssa_frame_size=0)), PlatformError, "tee.sgx.ecreate")
    file.close()


@pytest.mark.parametrize("free", [0, 1, 4])
def test_the_epc_is_full(kernel: Kernel, free: int) -> None:
    kernel.free = free
    refused(lambda: build(kernel, small_image()), ResourceError, "tee.epc.full", remedy="misc.max")


@pytest.mark.parametrize(
    ("code", "id", "found"),
    [
        (errno.EIO, "tee.sgx.lost", "slept"),
        (errno.EBUSY, "tee.sgx.driver", "repeated"),
        (errno.EINVAL, "tee.sgx.driver", "W without R"),
        (errno.EACCES, "tee.sgx.driver", "executable"),
    ],
)
def test_a_page_that_is_not_added(kernel: Kernel, code: int, id: str, found: str) -> None:
    kernel.failures["ADD_PAGES"] = [code]
    refused(lambda: build(kernel, small_image()), PlatformError, id, found=found)


def test_a_driver_that_does_nothing_does_not_hang(kernel: Kernel) -> None:
    kernel.interruptions = 1 << 30
    refused(lambda: build(kernel, small_image()), PlatformError, "tee.sgx.driver")


def test_a_driver_that_says_nothing(kernel: Kernel, running: EnclaveFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero, and nothing done: as drivers before 5.11 could."""
    monkeypatch.setattr(driver, "_PAUSE", 0)
    kernel._add_pages = kernel._modify = lambda *_: 0  # type: ignore[method-assign]
    refused(lambda: build(kernel, small_image()), PlatformError, "tee.sgx.driver", found="no reason given")
    refused(lambda: running.modify_types(HEAP, PAGE_SIZE, 4), PlatformError, "tee.sgx.edmm", found="no reason given")


def test_a_full_cgroup_is_named(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    from inclavare.tee.sgx import sysfs

    kernel.free = 2
    for current, found in ((8 << 20, "cgroup /a: 8388608 of 8388608 bytes"), (0, "no free page")):
        group = sysfs.EpcGroup("/a", current, 8 << 20, 0)
        monkeypatch.setattr(sysfs, "epc_accounting", lambda: sysfs.EpcAccounting(1 << 30, (group,)))  # noqa: B023
        refused(lambda: build(kernel, small_image()), ResourceError, "tee.epc.full", found=found)


def test_two_pages_at_one_offset(kernel: Kernel) -> None:
    image = small_image()
    refused(lambda: build(kernel, replace(image, runs=(*image.runs, image.runs[0]))), PlatformError, "tee.sgx.driver")


@pytest.mark.parametrize(("executable", "code", "remedy"), [(False, 0, "remount,exec")])
def test_a_dev_without_exec(kernel: Kernel, executable: bool, code: int, remedy: str) -> None:
    kernel.device_exec = executable
    refused(lambda: build(kernel, small_image()), PlatformError, "tee.sgx.map", remedy=remedy)


def test_another_enclaves_sigstruct(kernel: Kernel, signers: Signers) -> None:
    other = sign_image(small_image(b"other"), signers.ours).to_bytes()
    refused(lambda: build(kernel, small_image(), other), IntegrityError, "tee.sgx.einit")


def test_a_code_of_einit_that_is_handed_through(kernel: Kernel, signers: Signers) -> None:
    image = small_image()
    file = build(kernel, image)
    kernel._init = lambda *_: 4  # type: ignore[method-assign]
    sigstruct = sign_image(image, signers.ours).to_bytes()
    refused(lambda: file.init(sigstruct), IntegrityError, "tee.sgx.einit", found="SGX_INVALID_MEASUREMENT")
    kernel._init = lambda *_: 77  # type: ignore[method-assign]
    refused(lambda: file.init(sigstruct), IntegrityError, "tee.sgx.einit", found="code 77")
    file.close()


@pytest.mark.parametrize(
    ("code", "id"),
    [(errno.EACCES, "tee.sgx.attributes"), (errno.EINVAL, "tee.sgx.sigstruct"), (errno.EIO, "tee.sgx.lost")],
)
def test_einit_is_refused_by_the_kernel(kernel: Kernel, signers: Signers, code: int, id: str) -> None:
    image = small_image()
    kernel.failures["INIT"] = [code]
    refused(lambda: build(kernel, image, sign_image(image, signers.ours).to_bytes()), PlatformError, id)


def test_einit_that_is_interrupted_is_repeated(kernel: Kernel, signers: Signers) -> None:
    image = small_image()
    kernel.failures["INIT"] = [errno.EINTR, errno.EINTR]
    build(kernel, image, sign_image(image, signers.ours).to_bytes()).close()
    assert kernel.calls.count("INIT") == 3


# --- the provisioning key


def provisioned(kernel: Kernel, signers: Signers, *, ask: bool) -> EnclaveFile:
    image = small_image()
    image = replace(image, attributes=image.attributes | 1 << 4)
    file = EnclaveFile(image.size, syscalls=kernel)
    file.create(secs_of(image))
    if ask:
        file.provision()
    for run in image.runs:
        file.add(run)
    file.init(sign_image(image, signers.ours).to_bytes())
    return file


def test_the_provisioning_key_takes_its_device(kernel: Kernel, signers: Signers) -> None:
    provisioned(kernel, signers, ask=True).close()
    assert not kernel.files, "the device is closed again"
    refused(
        lambda: provisioned(kernel, signers, ask=False), PlatformError, "tee.sgx.attributes", remedy="sgx_provision"
    )


def test_a_user_without_the_provisioning_device(kernel: Kernel, signers: Signers) -> None:
    kernel.provisioning = False
    refused(lambda: provisioned(kernel, signers, ask=True), PlatformError, "tee.sgx.provision", remedy="sgx_prv")


# --- EDMM

HEAP = 3 * PAGE_SIZE


@pytest.mark.parametrize("pages_a_call", [1, 3, 100])
def test_permissions_are_taken_away(kernel: Kernel, running: EnclaveFile, pages_a_call: int) -> None:
    kernel.pages_a_call, kernel.interruptions = pages_a_call, 2
    running.restrict_permissions(HEAP, 8 * PAGE_SIZE, SECINFO_R)
    state = next(iter(kernel.files.values()))
    assert state is not None
    assert [state.pages[HEAP + n * PAGE_SIZE].flags for n in range(8)] == [SECINFO_R] * 8


def test_pages_are_trimmed_accepted_and_removed(kernel: Kernel, running: EnclaveFile) -> None:
    free = kernel.free
    running.modify_types(HEAP, 2 * PAGE_SIZE, 4)
    refused(lambda: running.remove_pages(HEAP, 2 * PAGE_SIZE), PlatformError, "tee.sgx.edmm", found="EACCEPT")
    kernel.accepted = {HEAP, HEAP + PAGE_SIZE}
    kernel.pages_a_call = 1
    running.remove_pages(HEAP, 2 * PAGE_SIZE)
    assert kernel.free == free + 2


def test_a_page_becomes_a_tcs(kernel: Kernel, running: EnclaveFile) -> None:
    running.modify_types(HEAP, PAGE_SIZE, 1)
    assert kernel.mapped[running.base + HEAP] == (PAGE_SIZE, 3)
    refused(lambda: running.modify_types(HEAP, PAGE_SIZE, 1), PlatformError, "tee.sgx.edmm", found="another type")


def test_a_processor_or_a_kernel_without_edmm(kernel: Kernel, running: EnclaveFile) -> None:
    assert running.offers_edmm()
    kernel.sgx2 = False
    assert not running.offers_edmm()
    refused(lambda: running.remove_pages(0, PAGE_SIZE), PlatformError, "tee.sgx.edmm", found="SGX2", remedy="6.0")
    kernel.failures["RESTRICT_PERMISSIONS"] = [errno.ENOTTY]
    refused(lambda: running.restrict_permissions(0, PAGE_SIZE, 1), PlatformError, "tee.sgx.edmm", found="Linux 6.0")


def test_what_the_processor_says_to_edmm(kernel: Kernel, running: EnclaveFile) -> None:
    def modify(state: Any, values: dict[str, int]) -> int:
        values["result"] = 20
        raise OSError(errno.EFAULT, "EMODT failed")

    kernel._modify = modify  # type: ignore[method-assign]
    refused(
        lambda: running.modify_types(HEAP, PAGE_SIZE, 4), PlatformError, "tee.sgx.edmm", found="SGX_PAGE_NOT_MODIFIABLE"
    )


def test_a_page_that_is_never_free_does_not_hang(
    kernel: Kernel, running: EnclaveFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "_PAUSE", 0)
    kernel.failures["MODIFY_TYPES"] = [errno.EBUSY] * 1000
    refused(lambda: running.modify_types(HEAP, PAGE_SIZE, 4), PlatformError, "tee.sgx.edmm")
