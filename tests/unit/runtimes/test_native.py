"""The native runtime says where it would protect nothing."""

from __future__ import annotations

import pytest

from inclavare.config import Config
from inclavare.errors import PlatformError
from inclavare.runtimes.native import RUNTIME
from inclavare.tee.base import platform
from inclavare.tee.sgx import HardwarePlatform


def test_hardware_is_refused() -> None:
    """Its application runs beside the enclave, not in it: on hardware that would look protected and be bare."""
    with pytest.raises(PlatformError) as caught:
        RUNTIME.check(HardwarePlatform())
    assert caught.value.id == "runtime.native.hardware" and caught.value.exit_code == 5
    assert "gramine" in str(caught.value.expected) and "sgx-sim" in str(caught.value.remedy)
    RUNTIME.check(platform("sgx-sim", Config()))
