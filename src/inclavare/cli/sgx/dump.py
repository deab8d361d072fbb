"""``inclavare sgx dump``: show any SGX or TDX structure, quote or certificate as an annotated table."""

from __future__ import annotations

import sys
from typing import BinaryIO

import click

from ...sgx.describe import KINDS, MAX_SIZE, describe
from .._output import json_option, print_json, print_table

#: Bytes of a value that a terminal shows.
_SHOWN = 24


@click.command("dump")
@click.argument("file", type=click.File("rb"))
@click.option("--as", "kind", type=click.Choice(sorted(KINDS)), help="What it is, if that cannot be told from FILE.")
@json_option
def command(*, file: BinaryIO, kind: str | None, as_json: bool) -> None:
    """Show FILE (or - for standard input): offset, size, field, value, meaning.

    Structures are recognised by their size and content, quotes by their header, certificates (PEM or DER) by their
    form. Nothing is verified: `inclavare verify` does that.
    """
    name, rows = describe(file.read(MAX_SIZE + 1), kind)
    if as_json:
        print_json({"kind": name, "fields": [row.to_dict() for row in rows]})
        return
    print_table(
        ("offset", "size", "field", "value", "meaning"),
        ((row.offset, len(row.value), row.field, _value(row.value), row.meaning) for row in rows),
        title=KINDS[name].title,
    )


def _value(value: bytes) -> str:
    """Hexadecimal; whole for programs, the start of it for people."""
    if len(value) <= _SHOWN or not sys.stdout.isatty():
        return value.hex()
    return f"{value[:_SHOWN].hex()}…"
