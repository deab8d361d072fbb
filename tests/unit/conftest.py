"""Fixtures for tests that load enclaves on a simulated platform of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from small_enclaves import Signers, sign_image, small_image

from inclavare.config import Config
from inclavare.tee.sgx_sim import SimulatedEnclave, SimulatedPlatform, create


@pytest.fixture(scope="session")
def signers() -> Signers:
    return Signers(*(rsa.generate_private_key(public_exponent=3, key_size=3072) for _ in range(2)))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A node of its own, with 4 MB of EPC."""
    return Config(state_dir=tmp_path / "state", run_dir=tmp_path / "run", log_dir=tmp_path / "log", epc_size=4 << 20)


@pytest.fixture(scope="session")
def shared_config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A node whose platform many tests share, because making a certificate authority takes a moment."""
    base = tmp_path_factory.mktemp("platform")
    return Config(state_dir=base / "state", run_dir=base / "run", log_dir=base / "log", epc_size=64 << 20)


@pytest.fixture(scope="session")
def platform(shared_config: Config) -> SimulatedPlatform:
    return create(shared_config)


Load = Callable[..., SimulatedEnclave]


@pytest.fixture
def load(platform: SimulatedPlatform, signers: Signers) -> Load:
    """Load a small enclave on the shared platform: ``load(content, debug=, key=, **signing overrides)``."""

    def loader(
        content: bytes = b"code", *, debug: bool = False, key: rsa.RSAPrivateKey | None = None, **overrides: Any
    ) -> SimulatedEnclave:
        image = small_image(content, debug=debug)
        signed = sign_image(image, key or signers.ours, **overrides)
        return platform.load(image, signed.to_bytes(), label="test")

    return loader
