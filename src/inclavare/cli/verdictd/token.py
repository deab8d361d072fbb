"""``inclavare verdictd token``: make an administrator's token on the service's machine, for the beginning."""

from __future__ import annotations

from pathlib import Path

import click

from .._files import FILE, write_output
from .._output import json_option, note, print_json
from ._service import config_option, load, opened


@click.group("token")
def command() -> None:
    """Make an administrator's token on the service's machine, for the beginning."""


@command.command("create")
@click.argument("name")
@click.option("--role", type=click.Choice(("admin", "operator", "auditor")), default="admin", show_default=True)
@click.option("--tenant", help="[default: every tenant]")
@click.option("--days", type=click.FloatRange(min=0.001), default=1.0, show_default=True, help="How long it counts.")
@click.option("-o", "--output", type=FILE, help="File for the token, mode 0600. [default: standard output]")
@config_option
@json_option
def create(
    *,
    name: str,
    role: str,
    tenant: str | None,
    days: float,
    output: Path | None,
    config_path: Path | None,
    as_json: bool,
) -> None:
    """Make a token for NAME, for `inclavare verdict login`. It is shown once, and kept nowhere."""
    from ...errors import UsageError
    from ...verdict.auth import issue
    from ...verdict.store import SYSTEM

    config = load(config_path)
    lifetime = max(60, round(days * 86400))
    if lifetime > config.auth.token_life:
        raise UsageError("the token would live too long", id="verdict.api.token.lifetime", found=f"{lifetime} seconds",
                         expected=f"at most {config.auth.token_life}")  # fmt: skip
    owner = tenant or SYSTEM
    with opened(config) as store:
        detail = {"name": name, "role": role, "lifetime": lifetime}
        store.audit.append(owner, "host", "token.create", "allowed", detail)
        info, token = issue(store, owner, name, role, lifetime)  # type: ignore[arg-type]
    if output is not None:
        write_output(output, token.encode() + b"\n")
    if as_json:
        print_json({**info.to_dict(), **({} if output else {"token": token})})
        return
    if output is None:
        click.echo(token)
    note(f"{info.jti} expires {info.to_dict()['expires']}")
