"""``inclavare verdict token``: administrators' tokens."""

from __future__ import annotations

from pathlib import Path

import click

from .._files import FILE, write_output
from .._output import note, print_json
from ._client import Client, client_options, show_list


@click.group("token")
def command() -> None:
    """Administrators' tokens."""


@command.command("create")
@click.argument("name")
@click.option("--role", type=click.Choice(("admin", "operator", "auditor")), required=True)
@click.option("--days", type=click.FloatRange(min=0.001), default=1.0, show_default=True, help="How long it counts.")
@click.option("--all-tenants", is_flag=True, help="For every tenant.")
@click.option("-o", "--output", type=FILE, help="File for the token, mode 0600. [default: standard output]")
@client_options
def create(
    *, client: Client, name: str, role: str, days: float, all_tenants: bool, output: Path | None, as_json: bool
) -> None:
    """Make a token for NAME. It is shown once, and kept nowhere."""
    if all_tenants:
        client.tenant = "_system"
    body = {"name": name, "role": role, "lifetime": max(60, round(days * 86400))}
    made = client.call("POST", client.of_tenant("tokens"), body)
    if output is not None:
        write_output(output, made.pop("token").encode() + b"\n")
    if as_json:
        print_json(made)
        return
    if output is None:
        click.echo(made["token"])
    note(f"{made['jti']} expires {made['expires']}")


@command.command("list")
@client_options
def list_(*, client: Client, as_json: bool) -> None:
    """Tokens, without themselves; those for every tenant: --tenant _system."""
    columns = ("jti", "name", "role", "created", "expires", "revoked")
    show_list(client.pages(client.of_tenant("tokens")), columns, as_json)


@command.command("revoke")
@click.argument("jti")
@client_options
def revoke(*, client: Client, jti: str, as_json: bool) -> None:
    """Refuse a token from now on."""
    client.call("DELETE", client.of_tenant("tokens", jti))
