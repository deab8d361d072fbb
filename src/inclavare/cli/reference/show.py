"""``inclavare reference show``: show what is in a bundle of reference values, without verifying it."""

from __future__ import annotations

import click

from .._files import read_input
from .._output import json_option, note, print_json
from .._references import show_bundle


@click.command("show")
@click.argument("bundle")
@json_option
def command(bundle: str, as_json: bool) -> None:
    """Show what is in BUNDLE (or - for standard input). Nothing is verified: see `verify`."""
    from ...attestation.references import MAX_BUNDLE, ReferenceBundle, envelope_payload

    found = ReferenceBundle.read(envelope_payload(read_input(bundle, MAX_BUNDLE)))
    if as_json:
        print_json(found.to_dict() | {"verified": False})
        return
    show_bundle(found)
    note("no signature was verified")
