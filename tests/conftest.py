"""Shared fixtures."""

from __future__ import annotations

from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def vectors() -> Path:
    """Real-world test data beside the repository, where it is there."""
    path = REPO.parent / "shared" / "vectors"
    if not path.is_dir():
        pytest.skip(f"no test vectors at {path}")
    return path
