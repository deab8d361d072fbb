"""``inclavare reference verify``: check who signed reference values, and whether they are in force."""

from __future__ import annotations

from pathlib import Path

import click

from .._appraisals import at_option, moment
from .._files import read_input
from .._output import json_option, print_json
from .._references import show_bundle, trust_options, trusted


@click.command("verify")
@click.argument("bundle")
@trust_options
@click.option(
    "--revocation",
    "revocations",
    multiple=True,
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="A signed revocation; may be repeated.",
)
@at_option
@json_option
def command(
    *,
    bundle: str,
    trust: tuple[Path, ...],
    sigstore_root: Path | None,
    sigstore_identity: str | None,
    sigstore_issuer: str | None,
    revocations: tuple[Path, ...],
    at: str | None,
    as_json: bool,
) -> None:
    """Verify BUNDLE (or - for standard input). Exit code 7: damaged, signed by nobody trusted, expired or revoked."""
    from ...attestation.references import MAX_BUNDLE, ReferenceBundle, References, revoked

    signers = trusted(trust, sigstore_root, sigstore_identity, sigstore_issuer)
    found = ReferenceBundle.parse(read_input(bundle, MAX_BUNDLE), signers)
    gone: dict[str, str] = {}
    for path in revocations:
        gone |= revoked(read_input(path, MAX_BUNDLE), signers)
    References([found], gone).require_active(found, None if at is None else moment(at))
    if as_json:
        print_json(found.to_dict())
        return
    click.secho("verified", fg="green")
    show_bundle(found)
