"""``inclavare verdict reference``: reference values that a tenant decides by, and whose it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ...errors import UsageError
from .._files import FILE, read_input, write_output
from ._client import Client, client_options, show, show_list

_MAX = 4 << 20


@click.group("reference")
def command() -> None:
    """Reference values that a tenant decides by, and whose it takes."""


@command.command("register")
@click.argument("bundle", type=FILE)
@client_options
def register(*, client: Client, bundle: str, as_json: bool) -> None:
    """Register the signed BUNDLE (`inclavare build --reference-bundle`), `-` for standard input."""
    headers = {"Content-Type": "application/json"}
    _show(client.call("POST", client.of_tenant("references"), read_input(bundle, _MAX), headers=headers), as_json)


@command.command("list")
@client_options
def list_(*, client: Client, as_json: bool) -> None:
    """Bundles, revoked and expired ones too."""
    columns = ("digest", "image", "not_before", "not_after", "registered_by", "revoked")
    show_list(client.pages(client.of_tenant("references")), columns, as_json)


@command.command("show")
@click.argument("digest")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="[default: standard output]")
@client_options
def show_(*, client: Client, digest: str, output: Path | None, as_json: bool) -> None:
    """A bundle as it was signed; with --json, what the service knows of it. DIGEST: its beginning will do."""
    found = _find(client, digest)
    if as_json:
        show(found, as_json)
    else:
        path = client.of_tenant("references", found["digest"], "bundle")
        write_output(output, b"".join(client.stream("GET", path)), mode=0o644)


@command.command("revoke")
@click.argument("digest")
@click.option("--reason", required=True, help="Those whom it stops read this.")
@client_options
def revoke(*, client: Client, digest: str, reason: str, as_json: bool) -> None:
    """Take a bundle out of all decisions, for ever. DIGEST: its, or its statement's id; the beginning will do."""
    path = client.of_tenant("references", _find(client, digest)["digest"], "revoke")
    _show(client.call("POST", path, {"reason": reason}), as_json)


@command.command("trust")
@click.argument("name")
@click.argument("key", type=FILE)
@client_options
def trust(*, client: Client, name: str, key: str, as_json: bool) -> None:
    """Take bundles signed by KEY (PEM, the public one) from now on."""
    pem = read_input(key, 8192)
    if b"PRIVATE" in pem:
        raise UsageError("this is a private key: it stays where it is", id="reference.key",
                         remedy="openssl pkey -in KEY -pubout")  # fmt: skip
    show(client.call("PUT", client.of_tenant("signers", name), {"public_key": pem.decode("ascii", "replace")}), as_json)


@command.command("distrust")
@click.argument("name")
@client_options
def distrust(*, client: Client, name: str, as_json: bool) -> None:
    """Take no more bundles of a signer; those that are registered count no more."""
    client.call("DELETE", client.of_tenant("signers", name))


@command.command("signers")
@client_options
def signers(*, client: Client, as_json: bool) -> None:
    """Whose bundles the tenant takes."""
    show_list(client.call("GET", client.of_tenant("signers")), ("name", "created"), as_json)


def _find(client: Client, digest: str) -> dict[str, Any]:
    known: list[dict[str, Any]] = client.pages(client.of_tenant("references"))
    names = [(one["digest"], str(one["metadata"].get("id")), one) for one in known]
    found = [one for own, statement, one in names if len(digest) >= 6 and (own.startswith(digest) or
                                                                           statement.startswith(digest))]  # fmt: skip
    if len(found) != 1:
        raise UsageError(
            "this names no bundle" if not found else "this names more than one bundle",
            id="verdict.reference.digest",
            found=digest,
            expected="6 digits at least of a digest that `inclavare verdict reference list` shows",
        )
    return found[0]


def _show(found: dict[str, Any], as_json: bool) -> None:
    show({name: value for name, value in found.items() if as_json or name != "metadata"}, as_json)
