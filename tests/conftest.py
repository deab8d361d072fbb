"""Shared fixtures."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

# What `make test` and CI use: the same examples each time, so that a change is judged by what it changes. Plain pytest
# and `make property` draw new ones.
settings.register_profile("repeatable", derandomize=True, database=None)

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def vectors() -> Path:
    """Real-world test data beside the repository, where it is there."""
    path = REPO.parent / "shared" / "vectors"
    if not path.is_dir():
        pytest.skip(f"no test vectors at {path}")
    return path
