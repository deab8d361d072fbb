"""The EPC ledger: full is a clear error, and whatever ends an owner frees its pages."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from small_enclaves import Signers, sign_image, small_image

from inclavare.config import Config
from inclavare.errors import PlatformError, ResourceError
from inclavare.tee.sgx_sim import create, epc, usage

HOLD = """
import sys
from pathlib import Path
from inclavare.config import Config
from inclavare.tee.sgx_sim import epc
epc.reserve(Config(run_dir=Path(sys.argv[1]), epc_size=int(sys.argv[2])), int(sys.argv[3]), sys.argv[4])
print("held", flush=True)
sys.stdin.read()
"""


def hold(config: Config, pages: int, label: str) -> subprocess.Popen[str]:
    """Another process that holds pages until it ends."""
    arguments = [str(config.run_dir), str(config.epc_size), str(pages), label]
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_accounting(config: Config) -> None:
    one, two = epc.reserve(config, 10, "one"), epc.reserve(config, 20, "two")
    assert usage(config) == [("two", 20, os.getpid()), ("one", 10, os.getpid())]
    two.release()
    two.release()
    assert usage(config) == [("one", 10, os.getpid())]
    one.release()
    assert usage(config) == []


def test_no_ledger_yet(config: Config) -> None:
    assert usage(config) == []


def test_full(config: Config, signers: Signers) -> None:
    small = replace(config, epc_size=20 * 4096, source="/some/config.toml")
    holder = epc.reserve(small, 13, "the-large-one")
    image = small_image()
    signature = sign_image(image, signers.ours).to_bytes()
    with pytest.raises(ResourceError) as caught:
        create(small).load(image, signature, label="late")
    error = caught.value
    assert error.id == "tee.epc.full" and error.exit_code == 6
    assert "13 of 20" in str(error.found) and "the-large-one (13 pages" in str(error.found)
    assert error.expected == "8 free pages"
    assert "epc_size" in str(error.remedy) and "/some/config.toml" in str(error.remedy)
    assert [label for label, _, _ in usage(small)] == ["the-large-one"]
    holder.release()
    enclave = create(small).load(image, signature, label="now")
    assert usage(small) == [("now", 8, os.getpid())]
    enclave.destroy()


def test_exactly_full_is_not_too_full(config: Config) -> None:
    small = replace(config, epc_size=10 * 4096)
    held = epc.reserve(small, 10, "all")
    with pytest.raises(ResourceError):
        epc.reserve(small, 1, "one more")
    held.release()


def test_refused_enclave_holds_nothing(config: Config, signers: Signers) -> None:
    signature = sign_image(small_image(b"other"), signers.ours).to_bytes()
    with pytest.raises(Exception, match="another enclave"):
        create(config).load(small_image(), signature, label="refused")
    assert usage(config) == []


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_dead_owner_frees_its_pages(config: Config, ending: signal.Signals) -> None:
    total = config.epc_size // 4096
    process = hold(config, total, "doomed")
    assert usage(config) == [("doomed", total, process.pid)]
    with pytest.raises(ResourceError):
        epc.reserve(config, 1, "waiting")
    process.send_signal(ending)
    process.wait()
    assert usage(config) == []
    epc.reserve(config, total, "next").release()
    assert [name for name in os.listdir(epc.directory(config)) if not name.startswith(".")] == []


def test_lock_does_not_leak_into_programs_that_the_owner_starts(config: Config) -> None:
    held = epc.reserve(config, 5, "parent")
    child = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        held.release()
        assert usage(config) == []
        again = epc.reserve(config, 5, "parent")
        os.close(again._handle)  # What the kernel does to a killed owner, while its child lives on.
        assert usage(config) == []
    finally:
        child.kill()
        child.wait()


def test_many_processes_never_overcommit(config: Config) -> None:
    small = replace(config, epc_size=40 * 4096)
    code = HOLD.replace("epc.reserve(", "\ntry:\n    epc.reserve(", 1).replace(
        'print("held"', "except Exception: print('full', flush=True); sys.exit()\nprint(\"held\""
    )
    arguments = [str(small.run_dir), str(small.epc_size), "10", "racer"]
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(8)
    ]
    try:
        answers = [racer.stdout.readline() for racer in racers if racer.stdout is not None]
        assert sorted(answers) == ["full\n"] * 4 + ["held\n"] * 4
    finally:
        for racer in racers:
            racer.kill()
            racer.wait()
    assert usage(small) == []


def test_ledger_that_others_could_write_is_refused(config: Config) -> None:
    epc.reserve(config, 1, "x").release()
    epc.directory(config).chmod(0o777)
    with pytest.raises(PlatformError) as caught:
        epc.reserve(config, 1, "x")
    assert caught.value.id == "tee.state.permissions"
