"""``inclavare verdictd restore``: bring back a backup."""

from __future__ import annotations

from pathlib import Path

import click

from .._output import json_option, print_json
from ._service import config_option, load


@click.command("restore")
@click.argument("backup", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@config_option
@click.option("--force", is_flag=True, help="Replace the store that is there, its audit trail too.")
@click.option(
    "--release-once-again",
    is_flag=True,
    help="Release-once secrets are free again. Only if none can have been released.",
)
@json_option
def command(*, backup: Path, config_path: Path | None, force: bool, release_once_again: bool, as_json: bool) -> None:
    """Bring back BACKUP, all of it or nothing, into the configured database. No replica may run on it.

    What was revoked since the backup was made is in force again: revoke it once more.
    """
    from dataclasses import asdict

    from ...verdict.server import master_key
    from ...verdict.store.backup import restore

    config = load(config_path)
    info = restore(backup, config.store_url(), master_key(config), force=force, release_once_again=release_once_again)
    if as_json:
        print_json(asdict(info))
    else:
        click.echo(f"{sum(info.rows.values())} rows of schema {info.schema}, as of {info.created}")
