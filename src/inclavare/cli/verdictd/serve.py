"""``inclavare verdictd serve``: serve until SIGTERM or SIGINT."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from .._output import note
from ._service import config_option, load


@click.command("serve")
@config_option
def command(*, config_path: Path | None) -> None:
    """Serve until SIGTERM or SIGINT; requests under way are answered first. Log lines go to standard error."""
    from ... import serving
    from ...verdict.server import serve

    config = load(config_path)

    def ready(url: str) -> None:
        note(f"certificate {config.certificate}, SHA-256 {serving.fingerprint(config.certificate)}")
        click.echo(f"listening on {url}")
        sys.stdout.flush()

    serve(config, ready)
