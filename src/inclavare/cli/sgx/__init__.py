"""``inclavare sgx``: SGX platforms, and tools for SGX's structures, quotes and enclaves."""

from __future__ import annotations

import click

from .._group import Commands


@click.group("sgx", cls=Commands, package=__name__)
def command() -> None:
    """SGX platforms, and tools for SGX's structures, quotes and enclaves."""
