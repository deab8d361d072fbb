"""CPUID: executed for real, and the SGX leaves of processors as the SDM lays them out."""

from __future__ import annotations

import os
import platform as machine
import re
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from cpuid_leaves import processor
from small_enclaves import small_image

from inclavare.errors import PlatformError
from inclavare.tee.sgx import cpuid
from inclavare.tee.sgx.cpuid import EpcSection, SgxCpu, enumerate_sgx, lacking

x86_64 = pytest.mark.skipif(machine.machine() != "x86_64", reason="CPUID is x86's")


@x86_64
def test_the_instruction_agrees_with_the_kernel() -> None:
    info = Path("/proc/cpuinfo").read_text()
    highest, ebx, ecx, edx = cpuid.execute(0, 0)
    assert struct.pack("<3I", ebx, edx, ecx).decode() in info
    level = re.search(r"^cpuid level\s*: (\d+)$", info, re.MULTILINE)
    assert level is None or int(level[1]) == highest
    eax = cpuid.execute(1, 0)[0]
    family = (eax >> 8 & 0xF) + (eax >> 20 & 0xFF if eax >> 8 & 0xF == 0xF else 0)
    model = (eax >> 4 & 0xF) | (eax >> 16 & 0xF) << 4
    assert re.search(rf"^cpu family\s*: {family}$", info, re.MULTILINE)
    assert re.search(rf"^model\s*: {model}$", info, re.MULTILINE)
    # RBX, which CPUID overwrites, belongs to the caller: many calls would not end well if it were lost.
    assert len({cpuid.execute(0, 0) for _ in range(10000)}) == 1


@x86_64
def test_this_machine_says_the_same_as_proc_cpuinfo() -> None:
    flags = set(re.findall(r"^flags\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[0].split())
    cpu = enumerate_sgx()
    if "sgx" in flags:
        assert cpu.sgx and cpu.sgx1 and cpu.epc_size
    if not cpu.sgx:
        assert "sgx" not in flags and cpu == SgxCpu(cpu.vendor, False, cpu.flc)


@x86_64
def test_without_executable_memory_the_kernels_device_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def forbidden() -> None:
        raise PermissionError(13, "Permission denied")

    device = tmp_path / "cpuid"
    monkeypatch.setattr(cpuid, "_function", forbidden)
    monkeypatch.setattr(cpuid, "_DEVICE", str(device))
    with pytest.raises(PlatformError) as caught:
        cpuid.execute(0, 0)
    assert caught.value.id == "tee.sgx.cpuid" and "execmem" in str(caught.value.remedy)
    # cpuid(4): the leaf is the position, the subleaf its upper half.
    with device.open("wb") as file:
        os.pwrite(file.fileno(), struct.pack("<4I", 1, 2, 3, 4), 0x12)
        os.pwrite(file.fileno(), struct.pack("<4I", 5, 6, 7, 8), 1 << 32 | 0x12)
    assert cpuid.execute(0x12, 0) == (1, 2, 3, 4)
    assert cpuid.execute(0x12, 1) == (5, 6, 7, 8)


def test_a_processor_with_everything() -> None:
    cpu = enumerate_sgx(processor(sgx=(0b1000_0000_0011, 1, 0x241F)))
    assert cpu == SgxCpu(
        "GenuineIntel",
        sgx=True,
        flc=True,
        sgx1=True,
        sgx2=True,
        edeccssa=True,
        miscselect=1,
        max_size_32=1 << 31,
        max_size_64=1 << 36,
        attributes=0xB6,
        xfrm=0xE7,
        epc=(EpcSection(0x2080000000, 0x310000000),),
    )
    assert cpu.kss and cpu.epc_size == 0x310000000


def test_upper_halves_of_attributes_and_xfrm() -> None:
    cpu = enumerate_sgx(processor(attributes=(6, 0x80000000), xfrm=(3, 4)))
    assert (cpu.attributes, cpu.xfrm, cpu.kss) == (0x80000000_00000006, 0x4_00000003, False)


def test_an_old_or_a_plain_processor_is_not_asked_further() -> None:
    assert enumerate_sgx(processor(highest=4)) == SgxCpu("GenuineIntel")
    assert enumerate_sgx(processor(features=(0, 1 << 30))) == SgxCpu("GenuineIntel", False, True)
    assert enumerate_sgx(processor(highest=0x11)) == SgxCpu("GenuineIntel", True, True)


def test_sections_end_at_the_first_that_is_not_valid() -> None:
    one, two = (0x1001, 0, 0x2001, 0), (0x5001, 1, 0x3001, 0)
    assert enumerate_sgx(processor(epc=(one, two))).epc == (EpcSection(0x1000, 0x2000), EpcSection(0x100005000, 0x3000))
    assert enumerate_sgx(processor(epc=(one, (0, 0, 0, 0), two))).epc == (EpcSection(0x1000, 0x2000),)
    assert enumerate_sgx(processor(epc=((0x1002, 0, 0x2001, 0), one))).epc == (EpcSection(0x1000, 0x2000),)
    assert enumerate_sgx(processor(epc=())).epc_size == 0
    assert len(enumerate_sgx(processor(epc=(one,) * 1000)).epc) == 64


def test_what_an_enclave_needs_and_the_processor_lacks() -> None:
    cpu, image = enumerate_sgx(processor()), small_image()
    assert lacking(cpu, image) == []
    assert lacking(cpu, replace(image, xfrm=0x3 | 1 << 18)) == ["XFRM 0x40000"]
    assert lacking(cpu, replace(image, miscselect=2)) == ["MISCSELECT 0x2"]
    assert lacking(cpu, replace(image, attributes=image.attributes | 1 << 10)) == ["ATTRIBUTES 0x400"]
    assert lacking(replace(cpu, max_size_64=4096), image) == ["enclaves of 0x8000 bytes (at most 0x1000)"]
