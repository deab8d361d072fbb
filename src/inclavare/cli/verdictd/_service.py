"""What the commands of the service share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ...verdict.config import VerdictConfig
    from ...verdict.store import Store

ENV_CONFIG = "VERDICTD_CONFIG"

config_option = click.option(
    "-c",
    "--config",
    "config_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help=f"[default: ${ENV_CONFIG}, else /etc/inclavare/verdictd.toml]",
)


def path_of(given: Path | None) -> Path:
    """The configuration's file."""
    from ...verdict.config import DEFAULT_PATH

    return given or Path(os.environ.get(ENV_CONFIG) or DEFAULT_PATH)


def load(given: Path | None) -> VerdictConfig:
    """The configuration.

    Raises:
        UsageError: see :meth:`inclavare.verdict.config.VerdictConfig.load`.
    """
    from ...verdict.config import VerdictConfig

    return VerdictConfig.load(path_of(given))


def opened(config: VerdictConfig) -> Store:
    """The configured store; use it in a ``with`` statement.

    Raises:
        InclavareError: see :func:`inclavare.verdict.server.open_store`.
    """
    from ...verdict.server import open_store

    return open_store(config)
