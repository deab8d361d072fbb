"""A running verdictd, which the tests of this package share."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_enclaves import Signers
from verdict_service import SECRET, Service, make_config, make_store, running

from inclavare.tee.sgx_sim import SimulatedPlatform
from inclavare.verdict.config import VerdictConfig
from inclavare.verdict.store import Quotas, Store


@pytest.fixture(scope="session")
def service_config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VerdictConfig]:
    base = Path("/dev/shm") if Path("/dev/shm").is_dir() else tmp_path_factory.mktemp("verdictd")
    with tempfile.TemporaryDirectory(dir=base, prefix="verdictd") as directory:
        yield make_config(Path(directory), "[limits]\nclient_requests = 1000000\n")


@pytest.fixture(scope="session")
def service_store(service_config: VerdictConfig) -> Iterator[Store]:
    with make_store(service_config) as store:
        for tenant in ("default", "other"):
            store.tenants.create(tenant, quotas=Quotas(requests=10_000_000))
        yield store


@pytest.fixture(scope="session")
def shared_service(
    service_config: VerdictConfig, service_store: Store, platform: SimulatedPlatform, signers: Signers
) -> Iterator[Service]:
    with running(service_config, service_store, platform, signers) as service:
        yield service


@pytest.fixture
def service(shared_service: Service) -> Service:
    """The shared service, its default tenant with a policy for the enclave ``workload`` and one secret."""
    store = shared_service.store
    for kind in ("attestation-rego", "resource-rego"):
        store.policies.clear_default("default", kind)  # type: ignore[arg-type]
    shared_service.default_policy(shared_service.policy())
    for info in store.secrets.list("default"):
        store.secrets.delete("default", info.path)
    store.secrets.put("default", "app/key/1", SECRET)
    return shared_service
