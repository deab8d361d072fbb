"""``inclavare reference``: signed reference values, which say what an image's measurements are."""

from __future__ import annotations

import click

from .._group import Commands


@click.group("reference", cls=Commands, package=__name__)
def command() -> None:
    """Signed reference values, which say what an image's measurements are."""
