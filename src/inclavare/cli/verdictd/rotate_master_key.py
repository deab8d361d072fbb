"""``inclavare verdictd rotate-master-key``: exchange the master key while the service runs."""

from __future__ import annotations

from pathlib import Path

import click

from .._output import json_option, note, print_json
from ._service import config_option, load, opened


@click.command("rotate-master-key")
@config_option
@click.option(
    "--new-config",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A configuration whose [master_key] is the new one; made now if its file is not there. "
    "[default: the same master key; the keys under it are exchanged]",
)
@click.option("--keep-old", is_flag=True, help="Both keys open the store, until --retire-others: for several replicas.")
@click.option("--retire-others", is_flag=True, help="Only the configured master key opens the store from now on.")
@json_option
def command(
    *, config_path: Path | None, new_config: Path | None, keep_old: bool, retire_others: bool, as_json: bool
) -> None:
    """Exchange the master key, and every key under it, while the service runs.

    Several replicas: rotate with --keep-old, restart them with the new configuration, then --retire-others with it.
    Interrupted, it goes on when run again.
    """
    from ...verdict.config import VerdictConfig
    from ...verdict.server import master_key
    from .init import make_master_key

    config = load(config_path)
    if retire_others and (new_config is not None or keep_old):
        raise click.UsageError("--retire-others goes with neither --new-config nor --keep-old.")
    with opened(config) as store:
        if retire_others:
            store.keyring.retire_others()
            wrapped = 0
        else:
            new = master_key(config)
            if new_config is not None:
                other = VerdictConfig.load(new_config)
                make_master_key(other)
                new = master_key(other)
            wrapped = store.keyring.rotate(new, retire=not keep_old)
    if as_json:
        print_json({"wrapped": wrapped})
        return
    click.echo(f"{wrapped} keys were wrapped again")
    if new_config is not None:
        note(f"restart the service with {new_config}")
