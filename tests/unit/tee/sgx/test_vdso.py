"""The vDSO is read as the dynamic linker reads it, and its entry is called by the kernel's convention."""

from __future__ import annotations

import ctypes
import platform as machine
import struct
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inclavare.errors import PlatformError
from inclavare.sgx.codes import Enclu
from inclavare.tee.sgx import vdso
from inclavare.tee.sgx.syscalls import LINUX, executable
from inclavare.tee.sgx.vdso import SYMBOL, VERSION, EnclaveRun, Exit, Gate, VdsoError, fault, find_symbol

pytestmark = pytest.mark.skipif(machine.machine() != "x86_64", reason="x86-64 machine code and vDSO")

# Functions with the entry's convention, which stand for the kernel's. The first keeps what it is given in the record that
# R9 points to (rdi, rsi, rdx, rcx, r8, run->tcs, rsp), spoils r12–r15, MXCSR, the x87 control word and stack and DF as
# an enclave may, leaves 0x11, 0x22 … in rdi, rsi, rdx, r8, r9, and says EEXIT.
EXITS = bytes.fromhex(
    "554889e553488b5d104989394989710849895110498949184d894120488b03498941284989613049c7c4ffffffff4d89e54d89e64d89e7"
    "68807f00000fae142458687f0f0000d92c2458d9eed9eefdc743080400000048c7c71100000048c7c62200000048c7c23300000049c7c0"
    "4400000049c7c15500000031c05bc9c3"
)
# The second reports an exception: run->function = ecx, vector = di, error code = si, address = rdx.
FAULTS = bytes.fromhex("554889e553488b5d10894b0866897b0c6689730e4889531031c05bc9c3")
# Calls a trampoline (rdi) with run (rsi), target (rdx), out (rcx) and R9 = r8, with known values in rbx, rbp and r12–r15,
# and returns zero if they come back.
PRESERVES = bytes.fromhex(
    "555341544155415641574d89c14889f8515256b902000000bb0b000000bdbb00000041bc1200000041bd1300000041be1400000041bf15"
    "000000ffd04883c41831c04883eb0b4809d84881edbb0000004809e84983ec124c09e04983ed134c09e84983ee144c09f04983ef154c09"
    "f8415f415e415d415c5b5dc3"
)
# The third returns -EINVAL.
REFUSES = bytes.fromhex("b8eaffffffc3")


def test_a_function_of_this_machines_vdso() -> None:
    """The symbol's function is called and tells the time, so its address is right."""
    found = vdso.process_vdso()
    if found is None:
        pytest.skip("no vDSO (vdso=0)")
    base, image = found
    offset = find_symbol(image, "__vdso_clock_gettime")
    assert offset is not None
    result = (ctypes.c_int64 * 2)()
    call = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p)(base + offset)
    assert call(time.CLOCK_MONOTONIC, ctypes.addressof(result)) == 0
    assert abs(result[0] + result[1] / 1e9 - time.monotonic()) < 5
    assert find_symbol(image, "__vdso_clock_gettime", "LINUX_9.9") is None
    assert find_symbol(image, "__vdso_nothing") is None


def test_the_entry_is_there_or_its_absence_is_said() -> None:
    found = vdso.process_vdso()
    there = found is not None and SYMBOL.encode() + b"\0" in found[1]
    vdso.enter_function.cache_clear()
    if there:
        assert vdso.enter_function() > 0
    else:
        with pytest.raises(PlatformError) as caught:
            vdso.enter_function()
        assert caught.value.id == "tee.sgx.vdso" and "5.11" in str(caught.value.remedy)


# --- a synthetic vDSO


def vdso_image(
    symbols: dict[str, int], *, version: str | None = VERSION, gnu: bool = False, bias: int = 0, defined: bool = True
) -> bytes:
    """A shared object with one loadable segment at ``bias`` and dynamic symbols ``name: offset``."""
    names = b"\0"
    at = {}
    for name in [*symbols, *([version] if version else []), "linux-vdso.so.1"]:
        at[name] = len(names)
        names += name.encode() + b"\0"
    table = bytes(24)
    for name, offset in symbols.items():
        table += struct.pack("<IBBHQQ", at[name], 0x12, 0, 7 if defined else 0, offset + bias, 16)
    count = len(symbols) + 1
    if gnu:
        # One bucket, all symbols in one chain, the last one marked.
        hashes = struct.pack("<4IQI", 1, 1, 1, 0, 2**64 - 1, 1)
        hashes += b"".join(struct.pack("<I", 2 * n | (n == count - 2)) for n in range(count - 1))
    else:
        hashes = struct.pack(f"<{3 + count}I", 1, count, 1, *range(2, count), 0, 0)
    versym = struct.pack(f"<{count}H", 0, *[2] * (count - 1))
    verdef = struct.pack("<HHHHIII", 1, 1, 1, 1, 0, 20, 28) + struct.pack("<II", at["linux-vdso.so.1"], 0)
    if version:
        verdef += struct.pack("<HHHHIII", 1, 0, 2, 1, 0, 20, 0) + struct.pack("<II", at[version], 0)
    parts, offsets, place = [names, table, hashes, versym, verdef], [], 64 + 2 * 56 + 16 * 8
    for part in parts:
        place += -place % 8
        offsets.append(place)
        place += len(part)
    tags = [(5, offsets[0]), (6, offsets[1]), (0x6FFFFEF5 if gnu else 4, offsets[2])]
    if version:
        tags += [(0x6FFFFFF0, offsets[3]), (0x6FFFFFFC, offsets[4])]
    dynamic = b"".join(struct.pack("<QQ", tag, value + bias) for tag, value in tags)
    dynamic += struct.pack("<QQ", 0x6FFFFFFD, 2) + bytes(16)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 3, 62, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0
    )  # fmt: skip
    segments = struct.pack("<IIQQQQQQ", 1, 5, 0, bias, bias, place, place, 4096)
    segments += struct.pack("<IIQQQQQQ", 2, 4, 176, 176 + bias, 176 + bias, len(dynamic), len(dynamic), 8)
    image = bytearray((header + segments + dynamic).ljust(place, b"\0"))
    for offset, part in zip(offsets, parts, strict=True):
        image[offset : offset + len(part)] = part
    return bytes(image)


SYMBOLS = {"__vdso_time": 0x400, SYMBOL: 0x1230, "__vdso_getcpu": 0x800}


@pytest.mark.parametrize("gnu", [False, True])
@pytest.mark.parametrize("bias", [0, 0xFFFFFFFFFF700000])
@pytest.mark.parametrize("version", [VERSION, None])
def test_the_entry_is_found(gnu: bool, bias: int, version: str | None) -> None:
    """With either hash table, with a vDSO linked at an address of its own as old kernels did, with and without versions."""
    image = vdso_image(SYMBOLS, gnu=gnu, bias=bias, version=version)
    assert find_symbol(image, SYMBOL) == 0x1230
    assert find_symbol(image, "__vdso_getcpu") == 0x800
    assert find_symbol(image, SYMBOL[:-1]) is None


@pytest.mark.parametrize("gnu", [False, True])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_number_of_symbols(gnu: bool, count: int) -> None:
    """The GNU hash table does not say it: the end of the last chain does."""
    image = vdso._Image(vdso_image({f"f{n}": n for n in range(count)}, gnu=gnu))
    assert image._symbol_count() == count + 1
    assert [name for _, name, _ in image.symbols()] == [f"f{n}" for n in range(count)]


def test_the_entry_lies_in_the_vdso(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vdso, "process_vdso", lambda: (0x7FFF00000000, vdso_image(SYMBOLS)))
    vdso.enter_function.cache_clear()
    assert vdso.enter_function() == 0x7FFF00001230
    monkeypatch.setattr(vdso, "process_vdso", lambda: (0x7FFF00000000, b"no ELF"))
    vdso.enter_function.cache_clear()
    with pytest.raises(PlatformError) as caught:
        vdso.enter_function()
    assert "cannot be read" in str(caught.value.found)
    vdso.enter_function.cache_clear()


def test_a_symbol_of_another_version_is_another() -> None:
    assert find_symbol(vdso_image(SYMBOLS, version="LINUX_9.9"), SYMBOL) is None


def test_a_symbol_that_is_not_defined_is_none() -> None:
    assert find_symbol(vdso_image(SYMBOLS, defined=False), SYMBOL) is None


def test_what_is_no_vdso() -> None:
    good = vdso_image(SYMBOLS)
    damaged = [
        b"",
        good[:63],
        b"\x7fELF\1" + good[5:],
        good[:18] + b"\x28" + good[19:],
        good[:56] + b"\0\0" + good[58:],
    ]
    for image in damaged:
        with pytest.raises(VdsoError):
            find_symbol(image, SYMBOL)


@settings(max_examples=300, deadline=1000)
@given(st.integers(0, len(vdso_image(SYMBOLS)) - 1), st.integers(0, 255), st.booleans())
def test_damage_is_found_or_harmless(place: int, value: int, gnu: bool) -> None:
    image = bytearray(vdso_image(SYMBOLS, gnu=gnu))
    image[place % len(image)] = value
    try:
        find_symbol(bytes(image), SYMBOL)
    except VdsoError:
        pass


@settings(max_examples=100, deadline=1000)
@given(st.integers(0, len(vdso_image(SYMBOLS))))
def test_a_part_of_an_image(length: int) -> None:
    try:
        assert find_symbol(vdso_image(SYMBOLS)[:length], SYMBOL) in (None, 0x1230)
    except VdsoError:
        pass


# --- the call


def test_the_structure_has_256_bytes() -> None:
    assert ctypes.sizeof(EnclaveRun) == 256
    offsets = {name: getattr(EnclaveRun, name).offset for name, *_ in EnclaveRun._fields_}  # type: ignore[misc]
    assert offsets == {
        "tcs": 0, "function": 8, "exception_vector": 12, "exception_error_code": 14, "exception_addr": 16,
        "user_handler": 24, "user_data": 32, "reserved": 40,
    }  # fmt: skip


def test_registers_go_through_and_what_an_enclave_spoils_is_restored() -> None:
    gate = Gate(executable(EXITS))
    record = (ctypes.c_uint64 * 7)()
    for _ in range(1000):
        left = gate.enter(0x7000, rdi=1, rsi=2**64 - 2, rdx=3, r8=5, r9=ctypes.addressof(record))
        assert left.exited and left == Exit(4, 0, 0, 0, (0x11, 0x22, 0x33, 0x44, 0x55))
    assert list(record[:6]) == [1, 2**64 - 2, 3, Enclu.EENTER, 5, 0x7000]
    # The x86-64 ABI: 16-byte aligned at the call, so 8 more after it, and two registers were pushed since.
    assert record[6] % 16 == 8
    # Rounding towards zero, had MXCSR stayed as it was left, and no x87 stack left, had it not been cleared.
    large, small = [1e16], [1.5]
    assert large[0] + small[0] == 1e16 + 2
    libm = ctypes.CDLL("libm.so.6")
    libm.sqrtl.restype, libm.sqrtl.argtypes = ctypes.c_longdouble, [ctypes.c_longdouble]
    assert libm.sqrtl(2.25) == 1.5
    gate.enter(0, function=Enclu.ERESUME, r9=ctypes.addressof(record))
    assert record[3] == Enclu.ERESUME


def test_registers_that_a_function_has_to_keep() -> None:
    check = ctypes.CFUNCTYPE(ctypes.c_uint64, *[ctypes.c_void_p] * 5)(executable(PRESERVES))
    run, out, record = EnclaveRun(tcs=1), (ctypes.c_uint64 * 5)(), (ctypes.c_uint64 * 7)()
    trampoline, target = executable(vdso._TRAMPOLINE), executable(EXITS)
    places = [ctypes.addressof(item) for item in (run, out, record)]
    assert check(trampoline, places[0], target, places[1], places[2]) == 0
    assert out[0] == 0x11 and run.function == Enclu.EEXIT


def test_an_exception_is_reported() -> None:
    gate = Gate(executable(FAULTS))
    left = gate.enter(0x7000, rdi=14, rsi=0x8007, rdx=0x12345000, function=Enclu.ERESUME)
    assert (left.function, left.vector, left.error_code, left.address) == (Enclu.ERESUME, 14, 0x8007, 0x12345000)
    assert not left.exited


def test_a_call_that_the_kernel_refuses() -> None:
    with pytest.raises(PlatformError) as caught:
        Gate(executable(REFUSES)).enter(0)
    assert caught.value.id == "tee.sgx.vdso" and "Invalid argument" in str(caught.value.found)


def test_other_threads_run_while_one_is_in_an_enclave() -> None:
    waiting, go = threading.Event(), threading.Event()

    @ctypes.CFUNCTYPE(ctypes.c_int)
    def inside() -> int:
        waiting.set()
        return 0 if go.wait(10) else -5

    gate = Gate(ctypes.cast(inside, ctypes.c_void_p).value)
    thread = threading.Thread(target=gate.enter, args=(0,))
    thread.start()
    assert waiting.wait(10)
    go.set()
    thread.join(10)
    assert not thread.is_alive()


BASE, SIZE = 0x7F0000000000, 0x10000


@pytest.mark.parametrize(
    ("left", "found", "remedy"),
    [
        (Exit(3, 6, 0, 0, (0,) * 5), "#UD", "happens again"),
        (Exit(3, 14, 0x7, BASE + 0x2000, (0,) * 5), "#PF at offset 0x2000, error code 0x7", "happens again"),
        (Exit(3, 14, 0x4, 0x1000, (0,) * 5), "#PF at 0x1000, outside the enclave", "happens again"),
        (Exit(3, 14, 0x8007, BASE, (0,) * 5), "error code 0x8007", "slept"),
        (Exit(2, 13, 0, 0, (0,) * 5), "#GP", "slept"),
        (Exit(3, 99, 0, 0, (0,) * 5), "exception 99", "happens again"),
    ],
)
def test_faults_say_what_happened(left: Exit, found: str, remedy: str) -> None:
    error = fault(left, BASE, SIZE)
    assert error.id == "tee.sgx.fault" and found in str(error.found) and remedy in str(error.remedy)


def test_executable_memory_is_not_writable() -> None:
    address = executable(REFUSES)
    with open("/proc/self/maps") as maps:
        line = next(
            line for line in maps if int(line.split("-")[0], 16) <= address < int(line.split("-")[1].split()[0], 16)
        )
    assert line.split()[1] == "r-xp"


def test_a_policy_against_executable_memory() -> None:
    class Strict(type(LINUX)):  # type: ignore[misc]
        def mprotect(self, address: int, length: int, prot: int) -> None:
            raise PermissionError(13, "Permission denied")

    with pytest.raises(PlatformError) as caught:
        Gate(1, syscalls=Strict())
    assert caught.value.id == "tee.sgx.executable" and "execmem" in str(caught.value.remedy)
