"""Without the extra: a clear refusal, and nothing imported too early."""

from __future__ import annotations

import subprocess
import sys

import pytest

from inclavare.errors import PlatformError
from inclavare.sgx.keys import RootKeys
from inclavare.tee.sgx_sim.emulator import Machine
from inclavare.tee.sgx_sim.processor import Processor


@pytest.mark.parametrize("missing", ["unicorn", "capstone"])
def test_missing_module_is_named(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    processor = Processor(RootKeys(bytes(16), bytes(16), bytes(16), bytes(16)), epc_pages=4)
    with pytest.raises(PlatformError) as caught:
        Machine(processor)
    assert caught.value.id == "tee.emulator.missing"
    assert missing in str(caught.value.found)
    assert caught.value.remedy == "pip install 'inclavare[emulator]'"


def test_importing_needs_neither() -> None:
    code = "import sys, inclavare.tee.sgx_sim.emulator; print(any(m in sys.modules for m in ('unicorn', 'capstone')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
