"""``inclavare verdict audit``: the audit trail: list, export, verify."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ...errors import IntegrityError, UsageError
from .._files import FILE, read_input
from .._output import print_json, print_table
from ._client import Client, client_options

_MAX_KEYS = 1 << 20


@click.group("audit")
def command() -> None:
    """The audit trail: list, export, verify."""


@command.command("list")
@click.option("-n", "--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="The newest so many.")
@click.option("--action", help="For example kbs.release.")
@click.option("--decision", help="For example denied.")
@click.option("--actor")
@click.option("--since", help="ISO 8601.")
@click.option("--until", help="ISO 8601.")
@client_options
def list_(*, client: Client, as_json: bool, **fields: Any) -> None:
    """The newest entries, the newest last. They are not verified here."""
    page = client.call("GET", client.of_tenant("audit"), query={**fields, "newest_first": True})
    items = list(reversed(page["items"]))
    if as_json:
        print_json(items)
        return
    rows = [(one["seq"], one["time"], one["actor"], one["action"], one["decision"], _about(one["detail"]))
            for one in items]  # fmt: skip
    print_table(("SEQ", "TIME", "ACTOR", "ACTION", "DECISION", "ABOUT"), rows)


@command.command("export")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="[default: standard output]")
@client_options
def export(*, client: Client, output: Path | None, as_json: bool) -> None:
    """The whole trail with its signed end, as JSON lines."""
    pieces = client.stream("GET", client.of_tenant("audit", "export"))
    if output is None:
        for piece in pieces:
            click.echo(piece, nl=False)
        return
    fresh = output.with_name(f".{output.name}.new")
    try:
        with fresh.open("wb") as stream:
            stream.writelines(pieces)
        fresh.replace(output)
    finally:
        fresh.unlink(missing_ok=True)


@command.command("keys")
@client_options
def keys(*, client: Client, as_json: bool) -> None:
    """The public keys (JWKS) that trails are signed with. Keep them where you will find them as they were."""
    print_json(client.call("GET", "/keys/audit"))


@command.command("checkpoint")
@client_options
def checkpoint(*, client: Client, as_json: bool) -> None:
    """Sign the ends of all trails. Keep what it prints where the database's administrator cannot reach."""
    print_json(client.call("POST", "/audit/checkpoints"))


@command.command("verify")
@click.option("--export", "export_path", type=FILE, help="Verify an export, here, without the service.")
@click.option("--keys", "keys_path", type=FILE, help="With --export: the keys, as `audit keys` printed them once.")
@click.option("--checkpoint", "anchors", type=FILE, multiple=True, help="A checkpoint that was kept elsewhere.")
@client_options
def verify(
    *, client: Client, export_path: str | None, keys_path: str | None, anchors: tuple[str, ...], as_json: bool
) -> None:
    """Verify the tenant's trail. Exit code 7 if anything was changed, removed, reordered or cut off."""
    if (export_path is None) != (keys_path is None) or (export_path and anchors):
        raise click.UsageError("--export and --keys go together, and without --checkpoint.")
    if export_path is not None:
        from ...verdict.store.audit import verify_export

        trusted = _json(str(keys_path))["keys"]
        with Path(export_path).open(encoding="utf-8") as lines:
            found = verify_export(lines, trusted)
        report = {**found.to_dict(), "whole": found.whole}
    else:
        body = {"anchors": [_json(anchor) for anchor in anchors]}
        report = client.call("POST", client.of_tenant("audit", "verify"), body)
    if as_json:
        print_json(report)
    else:
        for one in report["findings"]:
            click.echo(f"{one['seq'] or '-'}\t{one['id']}\t{one['message']}")
    if not report["whole"]:
        if as_json:
            raise click.exceptions.Exit(IntegrityError.exit_code)
        raise IntegrityError(
            "the audit trail is not whole",
            id="verdict.audit.damaged",
            found=f"{len(report['findings'])} findings in {report['entries']} entries",
            remedy="compare with backups and exports; find out who can write to the database",
        )
    if not as_json:
        click.echo(f"{report['entries']} entries, whole")


def _json(path: str) -> Any:
    try:
        return json.loads(read_input(path, _MAX_KEYS))
    except ValueError:
        raise UsageError(f"{path} is not JSON", id="verdict.audit.json") from None


def _about(detail: dict[str, Any]) -> str:
    reasons = ", ".join(str(reason.get("id")) for reason in detail.get("reasons", ()))
    names = ("resource", "secret", "policy", "image", "tenant", "name", "path", "tee")
    what = " ".join(str(detail[name]) for name in names if detail.get(name))
    return f"{what}: {reasons}" if reasons else what or "-"
