"""``inclavare uninstall``: take rune out of the configuration of docker, containerd or podman."""

from __future__ import annotations

from pathlib import Path

import click

from ._engines import ENGINES, uninstall
from .install import apply


@click.command("uninstall")
@click.argument("engine", type=click.Choice(sorted(ENGINES)))
@click.option("--dry-run", is_flag=True, help="Show the changes as a diff, write nothing.")
@click.option(
    "--config", type=click.Path(path_type=Path), help="The engine's configuration file, if not the usual one."
)
def command(engine: str, dry_run: bool, config: Path | None) -> None:
    """Undo `install`: the file becomes what it was, or loses only rune if it was changed since."""
    chosen = ENGINES[engine]
    changes = uninstall(chosen, config=config)
    apply(changes, dry_run, nothing=f"{engine} is not configured for rune.")
    if changes and not dry_run:
        click.echo(f"To make {engine} see it: {chosen.reload}")
