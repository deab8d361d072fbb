"""``inclavare verdict secret``: secrets that a verdictd releases; values go in and never come out."""

from __future__ import annotations

import base64
import re
import sys
from pathlib import Path

import click

from ...errors import UsageError
from .._files import read_input
from .._output import note
from ._client import Client, client_options, show, show_list

_MAX = 1 << 20


@click.group("secret")
def command() -> None:
    """Secrets that the service releases to attested workloads; values go in and never come out."""


@command.command("put")
@click.argument("path")
@click.option("--from", "source", type=click.Path(path_type=Path, exists=True, dir_okay=False),
              help="File with the value. [default: standard input]")  # fmt: skip
@click.option("-p", "--policy", help="Policy that it is released by. [default: the tenant's]")
@click.option("--release-once", is_flag=True, help="To one workload only, ever.")
@click.option("--metadata", multiple=True, metavar="NAME=VALUE", help="Not secret. May be repeated.")
@client_options
def put(
    *,
    client: Client,
    path: str,
    source: Path | None,
    policy: str | None,
    release_once: bool,
    metadata: tuple[str, ...],
    as_json: bool,
) -> None:
    """Store the next version of the secret PATH (repo/type/tag)."""
    if not re.fullmatch(r"[^/]+/[^/]+/[^/]+", path):
        raise click.BadParameter(f"{path!r} is not repo/type/tag", param_hint="PATH")
    if source is None and sys.stdin.isatty():
        value = str(click.prompt("value", hide_input=True)).encode()
    else:
        value = read_input(source or "-", _MAX)
    body = {
        "value": base64.b64encode(value).decode(),
        "policy": policy,
        "release_once": release_once,
        "metadata": dict(_pair(item) for item in metadata),
    }
    show(client.call("PUT", client.of_tenant("secrets", path), body), as_json)


@command.command("list")
@click.argument("path", required=False)
@client_options
def list_(*, client: Client, path: str | None, as_json: bool) -> None:
    """The newest version of each secret, or all versions of PATH."""
    if path is None:
        found = client.pages(client.of_tenant("secrets"))
    else:
        found = client.call("GET", client.of_tenant("secrets", path, "versions"))
    show_list(found, ("path", "version", "size", "policy", "release_once", "released_to", "created"), as_json)


@command.command("delete")
@click.argument("path")
@click.option("--version", type=int, help="[default: all of them]")
@client_options
def delete(*, client: Client, path: str, version: int | None, as_json: bool) -> None:
    """Delete a secret. Workloads that have it keep it."""
    client.call("DELETE", client.of_tenant("secrets", path), query={"version": version})
    note(f"{path} is deleted; workloads that have it keep it until they end")


def _pair(text: str) -> tuple[str, str]:
    name, found, value = text.partition("=")
    if not found:
        raise UsageError("metadata need a name and a value", id="verdict.secret.metadata", found=text,
                         expected="NAME=VALUE")  # fmt: skip
    return name, value
