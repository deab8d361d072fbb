"""``inclavare verdictd``: the relying party's service: verifies evidence, applies policies, releases secrets."""

from __future__ import annotations

import click

from .._group import Commands


@click.group("verdictd", cls=Commands, package=__name__)
def command() -> None:
    """The relying party's service: verifies evidence, applies policies, releases secrets."""
