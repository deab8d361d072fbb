"""``inclavare verdictd backup``: write the whole store to an encrypted file."""

from __future__ import annotations

from pathlib import Path

import click

from .._output import json_option, print_json
from ._service import config_option, load, opened


@click.command("backup")
@click.argument("output", type=click.Path(path_type=Path, dir_okay=False))
@config_option
@json_option
def command(*, output: Path, config_path: Path | None, as_json: bool) -> None:
    """Write the whole store to OUTPUT (mode 0600) while the service runs.

    It opens with the master key only: keep that apart from it, and keep it.
    """
    from dataclasses import asdict

    from ...verdict.store.backup import backup

    with opened(load(config_path)) as store:
        info = backup(store, output)
    if as_json:
        print_json(asdict(info))
    else:
        click.echo(f"{sum(info.rows.values())} rows of schema {info.schema}, as of {info.created}")
