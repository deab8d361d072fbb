"""The API against its own description: schemathesis in this process, a bounded number of requests to each operation."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from verdict_service import make_config, make_store

from inclavare.verdict.admin import router
from inclavare.verdict.admin.common import TENANT_PATTERN
from inclavare.verdict.auth import issue
from inclavare.verdict.store import SYSTEM, Quotas


@pytest.fixture(scope="module")
def headers() -> dict[str, str]:
    """Filled by :func:`api`."""
    return {}


@pytest.fixture(scope="module")
def api(headers: dict[str, str]) -> Iterator[Any]:
    base = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    with (
        tempfile.TemporaryDirectory(dir=base, prefix="verdictd-schema") as directory,
        make_store(config := make_config(Path(directory))) as store,
    ):
        store.tenants.create("default", quotas=Quotas())
        store.secrets.put("default", "app/key/1", b"x")
        store.policies.put("default", "production", "toml", 'mrsigner = ["' + "ab" * 32 + '"]\n')
        headers["Authorization"] = f"Bearer {issue(store, SYSTEM, 'schema', 'admin', 3600)[1]}"
        schema = schemathesis.openapi.from_asgi("/api/v1/openapi.json", router(store, config), headers=headers)
        # The credentials are ours: a request whose Authorization alone was to be wrong would be a good one.
        schema.config.generation.update(with_security_parameters=False)
        yield schema


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["good", "bad"])
@pytest.mark.parametrize("tag", ["service", "secrets", "policies", "references", "tokens", "audit"])
def test_answers_are_as_described(api: Any, headers: dict[str, str], tag: str, mode: GenerationMode) -> None:
    operations = [found.ok() for found in api.get_all_operations()]
    mine = [operation for operation in operations if tag in operation.definition.raw["tags"]]
    assert mine
    for operation in mine:
        _run(operation, headers, mode)


def _run(operation: Any, headers: dict[str, str], mode: GenerationMode) -> None:
    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=10,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def run(case: Any) -> None:
        tenant = str(case.path_parameters.get("tenant", ""))
        if re.match(TENANT_PATTERN, tenant) and case.method != "DELETE":
            case.path_parameters["tenant"] = "default"
        # Whether a policy's text or a bundle is a good one, no schema says.
        case.call_and_validate(headers=headers, excluded_checks=[positive_data_acceptance])

    try:
        run()
    except Unsatisfiable:
        assert mode is GenerationMode.NEGATIVE, "an operation without parameters cannot be asked wrongly"


def test_the_document_describes_everything(api: Any) -> None:
    document = api.raw_schema
    assert {"token", "certificate"} <= set(document["components"]["securitySchemes"]) and document["security"]
    operations = [
        (path, method, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    assert len(operations) >= 40
    for path, method, operation in operations:
        assert operation["summary"], (path, method)
        assert {"401", "403", "404", "422", "429", "503"} <= set(operation["responses"]), (path, method)
    for name, model in document["components"]["schemas"].items():
        assert model.get("description"), name
    secret = document["components"]["schemas"]["Secret"]["properties"]
    assert "value" not in secret
