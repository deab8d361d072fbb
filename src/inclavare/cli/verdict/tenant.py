"""``inclavare verdict tenant``: tenants and their quotas."""

from __future__ import annotations

import click

from ._client import Client, client_options, show, show_list


@click.group("tenant")
def command() -> None:
    """Tenants and their quotas."""


@command.command("create")
@click.argument("name")
@click.option("--secrets", type=int, help="Quota: secrets.")
@click.option("--bytes", "size", type=int, help="Quota: bytes of everything.")
@click.option("--policies", type=int, help="Quota: policies.")
@click.option("--requests", type=int, help="Quota: requests a minute.")
@client_options
def create(
    *,
    client: Client,
    name: str,
    secrets: int | None,
    size: int | None,
    policies: int | None,
    requests: int | None,
    as_json: bool,
) -> None:
    """Make a tenant."""
    quotas = {"secrets": secrets, "bytes": size, "policies": policies, "requests": requests}
    show(client.call("POST", "/tenants", {"name": name, "quotas": quotas}), as_json)


@command.command("list")
@client_options
def list_(*, client: Client, as_json: bool) -> None:
    """The tenants that you have a role for."""
    columns = ("name", "created", "used_secrets", "used_bytes", "used_policies")
    show_list(client.pages("/tenants"), columns, as_json)


@command.command("delete")
@click.argument("name")
@click.confirmation_option(prompt="With all its secrets and policies?")
@client_options
def delete(*, client: Client, name: str, as_json: bool) -> None:
    """Remove a tenant with everything but its audit trail."""
    client.tenant = name
    client.call("DELETE", client.of_tenant())
