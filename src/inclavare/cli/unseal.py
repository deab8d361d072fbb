"""``inclavare unseal``: open data that were sealed to the enclave that this runs in, or show their header."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import UsageError
from ._files import FILE, output_option, read_input, write_output
from ._output import json_option, print_fields, print_json
from .seal import aad_options, additional_data


@click.command("unseal")
@click.argument("input_path", metavar="[FILE]", type=FILE, default="-")
@output_option
@aad_options[0]
@aad_options[1]
@click.option("--policy", help="Refuse it unless it is sealed under this policy (see seal).")
@click.option("--min-isv-svn", type=click.IntRange(0, 65535), default=0, help="Refuse what an older enclave sealed.")
@click.option("--counter", metavar="NAME", help="Refuse it unless it is bound to this monotonic counter.")
@click.option("--info", is_flag=True, help="Show the header instead; works anywhere, and proves nothing.")
@json_option
def command(
    *,
    input_path: Path,
    output_path: Path | None,
    aad: str | None,
    aad_file: Path | None,
    policy: str | None,
    min_isv_svn: int,
    counter: str | None,
    info: bool,
    as_json: bool,
) -> None:
    """Open FILE (default: standard input), which `seal` made, in the same enclave.

    Nothing is written unless everything is right. Data that are bound to a counter and older than the newest that were
    stored are refused (exit code 7), as is what another enclave sealed, or what was changed.
    """
    from ..sdk import seal
    from ..sgx.sealing import HEADER_SIZE, MAX_SIZE, TAG_SIZE, Sealed

    blob = read_input(input_path, HEADER_SIZE + MAX_SIZE + TAG_SIZE)
    if info:
        shown = Sealed.parse(blob).describe()
        if as_json:
            print_json(shown)
            return
        bound = shown["counter"]
        shown["counter"] = "-" if bound is None else f"{bound['name']}, number {bound['value']}, id {bound['id']}"
        print_fields(shown.items(), title="sealed data (as they say themselves)")
        return
    if as_json and (output_path is None or str(output_path) == "-"):
        raise UsageError(
            "--json takes standard output", id="cli.unseal.output", remedy="write the data to a file with -o"
        )
    extra = additional_data(aad, aad_file)
    data = seal.unseal(blob, aad=extra, policy=policy, minimum_isv_svn=min_isv_svn, counter=counter)
    write_output(output_path, data)
    if as_json:
        print_json({"unsealed": str(output_path), **Sealed.parse(blob).describe()})
