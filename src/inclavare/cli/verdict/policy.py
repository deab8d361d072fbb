"""``inclavare verdict policy``: policies: set, show, history, roll back, try out."""

from __future__ import annotations

from typing import Any

import click

from ...errors import AppraisalError, UsageError
from .._files import FILE, read_input
from .._output import print_json, print_table
from ._client import Client, client_options, show, show_list

_MAX = 1 << 20
_KINDS = ("toml", "attestation-rego", "resource-rego")
_COLUMNS = ("id", "kind", "version", "default", "author", "created", "restored_from")
_kind_option = click.option(
    "--kind", type=click.Choice(_KINDS), help="[default: toml for *.toml; in Rego, what the policy defines]"
)


@click.group("policy")
def command() -> None:
    """Policies: set, show, history, roll back, try out."""


@command.command("set")
@click.argument("id")
@click.argument("file", type=FILE)
@_kind_option
@click.option("--default", "default", is_flag=True, help="Make it the tenant's default of its kind.")
@click.option("--after", type=int, help="Only if this version is in force now; 0: only if there is none.")
@client_options
def set_(*, client: Client, id: str, file: str, kind: str | None, default: bool, after: int | None,
         as_json: bool) -> None:  # fmt: skip
    """Put the policy ID's next version into force: the text of FILE, `-` for standard input."""
    kind, text = _read(file, kind)
    headers = {}
    if after == 0:
        headers["If-None-Match"] = "*"
    elif after is not None:
        old = client.call("GET", client.of_tenant("policies", id), query={"version": after})
        headers["If-Match"] = f'"{after}-{old["sha256"][:16]}"'
    found = client.call("PUT", client.of_tenant("policies", id), {"kind": kind, "text": text}, headers=headers)
    if default:
        found = client.call("PUT", client.of_tenant("policies", id, "default"))
    _show_policy(found, as_json)


@command.command("show")
@click.argument("id")
@click.option("--version", type=int, help="[default: the one in force]")
@client_options
def show_(*, client: Client, id: str, version: int | None, as_json: bool) -> None:
    """A policy's text."""
    found = client.call("GET", client.of_tenant("policies", id), query={"version": version})
    if as_json:
        print_json(found)
    else:
        click.echo(found["text"], nl=not found["text"].endswith("\n"))


@command.command("list")
@client_options
def list_(*, client: Client, as_json: bool) -> None:
    """The version in force of each policy."""
    show_list(client.pages(client.of_tenant("policies")), _COLUMNS, as_json)


@command.command("history")
@click.argument("id")
@client_options
def history(*, client: Client, id: str, as_json: bool) -> None:
    """A policy's versions, the newest first."""
    show_list(client.call("GET", client.of_tenant("policies", id, "history")), _COLUMNS, as_json)


@command.command("diff")
@click.argument("id")
@click.argument("old", type=int)
@click.argument("new", type=int, required=False)
@client_options
def diff(*, client: Client, id: str, old: int, new: int | None, as_json: bool) -> None:
    """What changed from version OLD to NEW, by default the one in force."""
    found = client.call("GET", client.of_tenant("policies", id, "diff"), query={"old": old, "new": new})
    if as_json:
        print_json(found)
    else:
        click.echo(found["diff"], nl=bool(found["diff"]))


@command.command("rollback")
@click.argument("id")
@click.argument("version", type=int)
@client_options
def rollback(*, client: Client, id: str, version: int, as_json: bool) -> None:
    """Bring back the text of VERSION, as a new version."""
    _show_policy(client.call("POST", client.of_tenant("policies", id, "rollback"), {"version": version}), as_json)


@command.command("default")
@click.argument("id", required=False)
@click.option("--clear", type=click.Choice(_KINDS), help="Have no default of this kind.")
@client_options
def default(*, client: Client, id: str | None, clear: str | None, as_json: bool) -> None:
    """Make the policy ID the tenant's default of its kind."""
    if (id is None) == (clear is None):
        raise click.UsageError("Name a policy, or --clear a kind.")
    if clear is not None:
        client.call("DELETE", client.of_tenant("policy-defaults", clear))
    else:
        _show_policy(client.call("PUT", client.of_tenant("policies", str(id), "default")), as_json)


@command.command("delete")
@click.argument("id")
@client_options
def delete(*, client: Client, id: str, as_json: bool) -> None:
    """Remove a policy with its history."""
    client.call("DELETE", client.of_tenant("policies", id))


@command.command("dry-run")
@click.argument("file", type=FILE, required=False)
@_kind_option
@click.option("--policy", help="A policy that the tenant has, instead of FILE.")
@click.option("--version", type=int, help="Of that policy. [default: the one in force]")
@click.option("--evidence", multiple=True, help="Digest; may be repeated. [default: the newest]")
@click.option("--resource", help="What a resource policy is asked about: repo/type/tag.")
@click.option("--limit", type=int, default=20, show_default=True, help="How much of the newest.")
@client_options
def dry_run(
    *,
    client: Client,
    file: str | None,
    kind: str | None,
    policy: str | None,
    version: int | None,
    evidence: tuple[str, ...],
    resource: str | None,
    limit: int,
    as_json: bool,
) -> None:
    """Try a policy out on evidence that the service has kept; without one, the tenant's policies as they are.

    Nothing is changed or released. Exit code 3 if any of the evidence is refused.
    """
    if file is not None and policy is not None:
        raise click.UsageError("A file or --policy, not both.")
    body: dict[str, Any] = {"policy": policy, "version": version, "limit": limit}
    if file is not None:
        body["kind"], body["text"] = _read(file, kind)
    body |= {"evidence": list(evidence)} if evidence else {}
    body |= {"resource": resource} if resource else {}
    found = client.call("POST", client.of_tenant("dry-run"), body)
    if as_json:
        print_json(found)
    else:
        print_table(("EVIDENCE", "TEE", "KEPT", "RESULT", "WHY"), [_row(result) for result in found["results"]])
    if found["refused"]:
        raise click.exceptions.Exit(AppraisalError.exit_code)


def _row(result: dict[str, Any]) -> tuple[object, ...]:
    release = result["release"]
    failures = [*result["failures"], *(release["failures"] if release else ())]
    why = "; ".join(
        f"{one['id']}: found {one['found']}, expected {one['expected']}"
        + (f" ({one['remedy']})" if one["remedy"] else "")
        for one in failures
    )
    good = result["accepted"] and (release is None or release["allowed"])
    return result["evidence"][:16], result["tee"], result["kept"], "accepted" if good else "refused", why or "-"


def _read(file: str, kind: str | None) -> tuple[str, str]:
    """Kind and text."""
    import re

    try:
        text = read_input(file, _MAX).decode()
    except UnicodeDecodeError:
        raise UsageError(f"{file} is not text", id="verdict.policy.text", expected="UTF-8") from None
    if kind is None and str(file).endswith(".rego"):
        kind = "resource-rego" if re.search(r"^\s*(default\s+)?allow\b", text, re.MULTILINE) else "attestation-rego"
    if kind is None and str(file).endswith(".toml"):
        kind = "toml"
    if kind is None:
        raise click.UsageError(f"Say with --kind what {file} is: {', '.join(_KINDS)}.")
    return kind, text


def _show_policy(found: dict[str, Any], as_json: bool) -> None:
    show({name: value for name, value in found.items() if as_json or name != "text"}, as_json)
