"""``inclavare verdictd migrate``: bring the database to this version's schema."""

from __future__ import annotations

from pathlib import Path

import click

from ._service import config_option, load


@click.command("migrate")
@config_option
def command(*, config_path: Path | None) -> None:
    """Bring the database to this version's schema. Stop all replicas, and make a backup, before."""
    from ...verdict.store import migrate

    click.echo(f"schema {migrate(load(config_path).store_url())}")
