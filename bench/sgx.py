"""Enclave calls, quotes and seals per second on the software platform; used by run.py.

An enclave call is one EENTER, the skeleton enclave's own instructions in the emulator, and one EEXIT. The round trip is
an enclave that does nothing but leave.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from inclavare.config import Config
from inclavare.enclave.signing import sign_once
from inclavare.sgx import sealing
from inclavare.sgx.image import (
    PAGE_SIZE,
    PT_REG,
    PT_TCS,
    SECINFO_R,
    SECINFO_W,
    SECINFO_X,
    EnclaveImage,
    PageRun,
)
from inclavare.sgx.keys import POLICY_MRENCLAVE
from inclavare.sgx.structs import ATTRIBUTE_MODE64BIT, XFRM_LEGACY, KeyRequest, Report, ReportBody, Tcs
from inclavare.tee import base, skeleton
from inclavare.tee.sgx_sim import fuses
from inclavare.tee.sgx_sim.emulator import EmulatedEnclave
from inclavare.tee.sgx_sim.processor import Processor
from inclavare.tee.skeleton.protocol import Client


def leaving() -> EnclaveImage:
    """An enclave of one thread whose code is ``mov %rcx, %rbx; mov $4, %eax; enclu``: EEXIT to where it came from."""
    code = bytes.fromhex("4889cb b804000000 0f01d7").ljust(PAGE_SIZE, b"\0")
    tcs = Tcs(ossa=2 * PAGE_SIZE, nssa=2).to_bytes()
    runs = (
        PageRun(0, PT_REG | SECINFO_R | SECINFO_X, 1, code),
        PageRun(PAGE_SIZE, PT_TCS, 1, tcs),
        PageRun(2 * PAGE_SIZE, PT_REG | SECINFO_R | SECINFO_W, 2),
    )
    return EnclaveImage(4 * PAGE_SIZE, 1, ATTRIBUTE_MODE64BIT, XFRM_LEGACY, 0, runs)


def rate(work: Callable[[], object], seconds: float = 0.5) -> float:
    """Calls per second over about ``seconds``."""
    work()
    count, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds:
        work()
        count += 1
    return count / spent


def contenders() -> Iterator[tuple[str, Callable[[], object]]]:
    """What is measured: name and one call of it."""
    image = skeleton.image()
    signed = sign_once(image)
    with tempfile.TemporaryDirectory() as directory:
        state = Path(directory)
        config = Config(state_dir=state / "state", run_dir=state / "run", log_dir=state / "log")
        roots = fuses.load(config.platform_dir)
        empty = leaving()
        round_trip = EmulatedEnclave.load(Processor(roots, epc_pages=64), empty, sign_once(empty))
        yield "EENTER–EEXIT round trip", round_trip.enter
        loaded = EmulatedEnclave.load(Processor(roots, epc_pages=4096), image, signed)
        client = Client(loaded.call)
        client.init()
        yield "enclave call (ECHO)", lambda: client.echo(bytes(16))
        yield "enclave call (SEAL 64 B)", lambda: client.seal(bytes(64))
        platform = base.platform("sgx-sim", config)
        enclave = platform.load(image, signed, label="bench")
        target = platform.quote_target_info()
        report = enclave.report(target, bytes(64))
        yield "EREPORT", lambda: enclave.report(target, bytes(64))
        yield "EGETKEY (seal key)", lambda: enclave.seal_key("mrenclave")
        yield "quote (DCAP v3)", lambda: platform.quote(report)
        own = ReportBody.from_bytes(Report.from_bytes(report).body)

        def egetkey(request: KeyRequest) -> bytes:
            return enclave.egetkey(request.to_bytes())

        def seal() -> bytes:
            return sealing.seal(bytes(1024), sealing.new_request(own, POLICY_MRENCLAVE), egetkey)

        blob = seal()
        yield "seal 1 KiB", seal
        yield "unseal 1 KiB", lambda: sealing.Sealed.parse(blob).open(egetkey)
        enclave.destroy()
