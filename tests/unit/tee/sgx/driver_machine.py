"""A machine with SGX, as far as a process can tell: the recorded driver, and behind it the software processor.

What our driver hands to the kernel becomes an enclave of :mod:`inclavare.tee.sgx_sim.processor`; where the vDSO would
execute ENCLU, the emulator does. So the path from :class:`HardwarePlatform` to the enclave's code and back is the real
one, except for the processor.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path
from typing import Any

from cpuid_leaves import processor as cpuid_of
from sgx_kernel import PAGE, Kernel, State

from inclavare.errors import IntegrityError
from inclavare.sgx.image import EnclaveImage, PageRun
from inclavare.sgx.keys import RootKeys
from inclavare.sgx.structs import Secs
from inclavare.tee.sgx import HardwarePlatform
from inclavare.tee.sgx.syscalls import executable
from inclavare.tee.sgx.vdso import EnclaveRun

_WORD = ctypes.c_uint64
#: ``vdso_sgx_enter_enclave_t`` of the header.
PROTOTYPE = ctypes.CFUNCTYPE(
    ctypes.c_int, _WORD, _WORD, _WORD, ctypes.c_uint32, _WORD, _WORD, ctypes.POINTER(EnclaveRun)
)
HOST = 0x10_0000
# Calls a Python function (the first address) with the entry's arguments, and then has in RDI, RSI, RDX, R8 and R9 what lies
# at the second: push rbp; mov rbp,rsp; push rbx; sub rsp,8; push [rbp+16] twice; movabs rax; call rax; movabs rbx;
# mov rdi,[rbx]; … mov r9,[rbx+32]; mov rbx,[rbp-8]; leave; ret.
_SHIM = (
    bytes.fromhex("554889e5534883ec08ff7510ff751048b8")
    + b"%b"
    + bytes.fromhex("ffd048bb")
    + b"%b"
    + bytes.fromhex("488b3b488b7308488b53104c8b43184c8b4b20488b5df8c9c3")
)


class SgxMachine(Kernel):
    """A kernel with a software processor under it.

    Args:
        roots: the processor's fuse keys.
        root: a directory that stands for ``/``, where the device nodes are made.

    Attributes:
        platform: our platform on this machine.
        errors: what went wrong where no exception could be raised.
    """

    def __init__(self, roots: RootKeys, root: Path) -> None:
        super().__init__()
        from inclavare.tee.sgx_sim.emulator import Machine
        from inclavare.tee.sgx_sim.processor import AddressSpace, Driver, Processor

        self.processor = Processor(roots, epc_pages=256)
        self.space = AddressSpace()
        self.driver = Driver(self.processor, self.space)
        self.machine = Machine(self.processor, self.space)
        self.errors: list[BaseException] = []
        self.loaded: dict[int, Any] = {}
        self.responses: dict[int, tuple[int, int]] = {}
        self._enter = PROTOTYPE(self._vdso)
        self._registers = (ctypes.c_uint64 * 5)()
        callback = ctypes.cast(self._enter, ctypes.c_void_p).value or 0
        places = (callback, ctypes.addressof(self._registers))
        entry = executable(_SHIM % tuple(place.to_bytes(8, "little") for place in places))
        self.root = root
        for place, text in (
            ("proc/cpuinfo", "processor\t: 0\nflags\t\t: fpu sgx sgx_lc\n"),
            ("dev/sgx_enclave", ""),
            ("dev/sgx_provision", ""),
        ):
            (root / place).parent.mkdir(parents=True, exist_ok=True)
            (root / place).write_text(text)
        self.platform = HardwarePlatform(root, cpuid=cpuid_of(), syscalls=self, enter=entry)

    def _init(self, state: State, values: dict[str, int]) -> int:
        """EINIT by the software processor, of the pages that were handed over."""
        result = super()._init(state, values)
        secs = Secs.from_bytes(state.secs)
        flags = int.from_bytes(secs.attributes[:8], "little")
        image = EnclaveImage(
            size=secs.size,
            ssa_frame_size=secs.ssa_frame_size,
            attributes=flags,
            xfrm=int.from_bytes(secs.attributes[8:], "little"),
            miscselect=secs.miscselect,
            runs=tuple(
                PageRun(at, page.flags, 1, page.content, measured=page.measured) for at, page in state.pages.items()
            ),
        )
        try:
            self.loaded[state.base] = self.driver.load(
                image, ctypes.string_at(values["sigstruct"], 1808), base=state.base
            )
        except IntegrityError as error:
            state.initialised = False
            raise OSError(errno.EPERM, os.strerror(errno.EPERM)) from error
        return result

    def close(self, fd: int) -> None:
        state = self.files[fd]
        super().close(fd)
        if state is not None and state.base in self.loaded:
            self.driver.remove(self.loaded.pop(state.base))

    def _vdso(self, rdi: int, rsi: int, rdx: int, function: int, r8: int, r9: int, run: Any) -> int:
        try:
            return self._execute(rdi, rsi, rdx, function, r8, r9, run.contents)
        except BaseException as error:
            self.errors.append(error)
            return -errno.EIO

    def _execute(self, rdi: int, rsi: int, rdx: int, function: int, r8: int, r9: int, run: EnclaveRun) -> int:
        from inclavare.tee.sgx_sim.emulator import EmulatedEnclave, Reason

        if function not in (2, 3) or any(run.reserved) or run.user_handler:
            return -errno.EINVAL
        buffers = [(at, size) for at, size in ((rdi, rsi), (rdx, r8)) if size]
        for at, size in buffers:
            first = at // PAGE * PAGE
            length = -(-(at + size - first) // PAGE) * PAGE
            for page in range(first, first + length, PAGE):
                if self.space.lookup(page) is None:
                    self.space.map_ram(page, PAGE)
            self.space.poke(at, ctypes.string_at(at, size))
        loaded = next(one for one in self.loaded.values() if one.base <= run.tcs < one.base + one.size)
        host = EmulatedEnclave(self.machine, self.driver, loaded, host_base=HOST)
        assert host.tcs == run.tcs
        stop = host.resume() if function == 3 else host.enter(rdi=rdi, rsi=rsi, rdx=rdx, r8=r8, r9=r9)
        if r8:
            # A page that was given to an earlier call stays mapped, because ERESUME is given no buffers.
            self.responses[run.tcs] = rdx, r8
        at, size = self.responses[run.tcs]
        ctypes.memmove(at, self.space.peek(at, size), size)
        registers = self.machine.logical.registers
        self._registers[:] = [registers.rdi, registers.rsi, registers.rdx, registers.r8, registers.r9]
        if stop.reason is Reason.REACHED:
            run.function = 4
            return 0
        assert stop.fault is not None
        # An asynchronous exit leaves at the AEP with ERESUME in RAX; a fault of EENTER itself leaves EENTER there.
        run.function = 3 if registers.rip == host.aep else 2
        run.exception_vector = stop.fault.vector
        run.exception_error_code = stop.fault.error_code & 0xFFFF
        run.exception_addr = stop.fault.address or 0
        return 0
