"""The native runtime says where it would protect nothing."""

from __future__ import annotations

from typing import Any

import pytest

from inclavare.errors import PlatformError
from inclavare.runtimes.native import RUNTIME
from inclavare.tee.sgx import HardwarePlatform


def test_hardware_is_refused() -> None:
    """Its application runs beside the enclave, not in it: on hardware that would look protected and be bare."""
    stopped = []

    class Prepared:
        def stop(self) -> None:
            stopped.append(True)

    nothing: Any = None
    prepared: Any = Prepared()
    with pytest.raises(PlatformError) as caught:
        RUNTIME.start(nothing, nothing, HardwarePlatform(), prepared)
    assert caught.value.id == "runtime.native.hardware" and caught.value.exit_code == 5
    assert "gramine" in str(caught.value.expected) and "sgx-sim" in str(caught.value.remedy)
    assert stopped == [True], "what was begun is taken back"
