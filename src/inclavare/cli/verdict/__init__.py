"""``inclavare verdict``: administrate a verdictd: tenants, secrets, policies, reference values, tokens, audit."""

from __future__ import annotations

import click

from .._group import Commands


@click.group("verdict", cls=Commands, package=__name__)
def command() -> None:
    """Administrate a verdictd: tenants, secrets, policies, reference values, tokens, audit."""
