"""``inclavare verdictd purge``: remove what has expired."""

from __future__ import annotations

from pathlib import Path

import click

from ._service import config_option, load, opened


@click.command("purge")
@config_option
def command(*, config_path: Path | None) -> None:
    """Remove what has expired: sessions, tokens, retired signing keys. A running service does it by itself."""
    with opened(load(config_path)) as store:
        click.echo(f"{store.purge()} rows removed")
