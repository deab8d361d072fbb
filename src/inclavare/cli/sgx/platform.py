"""``inclavare sgx platform``: the simulated platform: its identity, its certificates."""

from __future__ import annotations

import base64

import click

from .._output import json_option, print_fields, print_json

_names = click.Choice(["sgx", "sgx-sim"])


@click.group("platform")
def command() -> None:
    """The simulated platform's identity and certificates."""


@command.command("show")
@click.option("--tee", type=_names, default="sgx-sim", show_default=True)
@click.option("--root-ca", is_flag=True, help="Print the root CA certificate (PEM), a relying party's trust anchor.")
@click.option("--collateral", is_flag=True, help="Print the collateral for quotes of this platform (JSON).")
@json_option
def show(*, tee: str, root_ca: bool, collateral: bool, as_json: bool) -> None:
    """Show a platform; its keys are made at first use."""
    from hashlib import sha256

    from ...config import load
    from ...tee.base import usable_platform

    config = load()
    found = usable_platform(tee, config)
    root = found.root_ca()
    if root_ca:
        click.echo(_pem(root), nl=False)
        return
    if collateral:
        print_json(found.collateral())
        return
    fields = {
        "tee": found.name,
        "simulated": found.simulated,
        "root_ca_sha256": sha256(root).hexdigest(),
        "epc_bytes": config.epc_size,
        "state": str(config.platform_dir),
    }
    if as_json:
        print_json(fields)
    else:
        print_fields(fields.items())


def _pem(certificate: bytes) -> str:
    text = base64.b64encode(certificate).decode()
    lines = "\n".join(text[start : start + 64] for start in range(0, len(text), 64))
    return f"-----BEGIN CERTIFICATE-----\n{lines}\n-----END CERTIFICATE-----\n"
