"""``inclavare keyprovider``: ocicrypt's key provider, on a builder's machine or in an enclave."""

from __future__ import annotations

import click

from .._group import Commands


@click.group("keyprovider", cls=Commands, package=__name__)
def command() -> None:
    """The local half of ocicrypt's key provider, behind a unix socket that only this user reaches.

    OCICRYPT_KEYPROVIDER_CONFIG names a file with:
    {"key-providers": {"attestation-agent": {"grpc": "unix:///path/of/the/socket"}}}
    """
