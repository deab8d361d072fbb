"""Fixtures for tests of the software processor."""

from __future__ import annotations

import pytest
from sgx_machine import Machine
from small_enclaves import Signers


@pytest.fixture
def machine(signers: Signers) -> Machine:
    """A processor without enclaves."""
    return Machine(signers.ours)


@pytest.fixture
def enclave(signers: Signers) -> Machine:
    """A processor with an initialised enclave and a VA page."""
    return Machine(signers.ours).build()


@pytest.fixture
def inside(enclave: Machine) -> Machine:
    """A processor whose application thread is in the enclave."""
    enclave.enter()
    return enclave
