"""``inclavare install``: tell docker, containerd or podman of rune."""

from __future__ import annotations

from pathlib import Path

import click

from ._engines import ENGINES, Change, install, rune_path


@click.command("install")
@click.argument("engine", type=click.Choice(sorted(ENGINES)))
@click.option("--dry-run", is_flag=True, help="Show the changes as a diff, write nothing.")
@click.option(
    "--config", type=click.Path(path_type=Path), help="The engine's configuration file, if not the usual one."
)
@click.option("--rune", type=click.Path(path_type=Path), help="The rune to call, if not this installation's.")
def command(engine: str, dry_run: bool, config: Path | None, rune: Path | None) -> None:
    """Add rune to the configuration of docker, containerd or podman.

    Keeps everything else in the file, saves it once as FILE.inclavare-backup, and may be repeated.
    """
    chosen = ENGINES[engine]
    apply(install(chosen, rune_path(rune), config=config), dry_run, nothing=f"{engine} is configured for rune already.")
    if not dry_run:
        click.echo(f"To make {engine} see it: {chosen.reload}\nThen: {chosen.use}")


def apply(changes: list[Change], dry_run: bool, *, nothing: str) -> None:
    """Write the changes, or show them; say what was done, or ``nothing``."""
    if not changes:
        click.echo(nothing)
    for change in changes:
        if dry_run:
            click.echo(change.diff(), nl=False)
        else:
            change.write()
            click.echo(f"{'removed' if change.after is None else 'wrote'} {change.path}")
