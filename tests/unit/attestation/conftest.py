"""Evidence that the tests of this package share."""

from __future__ import annotations

import pytest
from attested import Attested, attest
from small_enclaves import Signers

from inclavare.tee.sgx_sim import SimulatedPlatform


@pytest.fixture(scope="session")
def attested(platform: SimulatedPlatform, signers: Signers) -> Attested:
    return attest(platform, signers, b"attested")


@pytest.fixture(scope="session")
def debug_attested(platform: SimulatedPlatform, signers: Signers) -> Attested:
    return attest(platform, signers, b"attested", debug=True)
