"""``inclavare reference revoke``: make a signed revocation of reference values."""

from __future__ import annotations

import re
from pathlib import Path

import click

from .._files import write_output
from .._references import now, output_option, reference_key_option, signer


@click.command("revoke")
@click.argument("ids", nargs=-1, required=True)
@click.option("--reason", required=True, help="Why; those whom it stops read this.")
@reference_key_option
@output_option
def command(*, ids: tuple[str, ...], reason: str, key_path: Path | None, output_path: Path | None) -> None:
    """Sign that the bundles with these IDS do not count any more, for `verify --revocation` and verdictd."""
    from ...attestation.references import revocation, sign
    from ...errors import UsageError

    for one in ids:
        if not re.fullmatch("[0-9a-f]{64}", one):
            raise UsageError(
                "this is not the id of a bundle",
                id="reference.id",
                found=one[:80],
                expected="64 hexadecimal digits, as `inclavare reference show` prints them",
            )
    write_output(output_path, sign(revocation(ids, reason, now()), signer(key_path)), mode=0o644)
