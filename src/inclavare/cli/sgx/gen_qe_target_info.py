"""``inclavare sgx gen-qe-target-info``: the quoting enclave's TARGETINFO, for reports that are to become quotes."""

from __future__ import annotations

from pathlib import Path

import click

from .._files import FILE, write_output
from .._output import json_option, print_json
from ._quotes import platform, quote_type_option, tee_option


@click.command("gen-qe-target-info")
@tee_option
@quote_type_option
@click.option(
    "-o",
    "--targetinfo",
    "output_path",
    type=FILE,
    default="qe_targetinfo.bin",
    show_default=True,
    help="File for the TARGETINFO, 512 bytes; - is standard output.",
)
@json_option
def command(*, tee: str, output_path: Path, as_json: bool) -> None:
    """Get the quoting enclave's TARGETINFO. An enclave needs it to make the report that gen-quote takes."""
    from ...sgx.structs import TargetInfo

    found = platform(tee).quote_target_info()
    if as_json:
        parsed = TargetInfo.from_bytes(found)
        print_json({"tee": tee, "mrenclave": parsed.mrenclave, "attributes": parsed.attributes, "targetinfo": found})
        return
    write_output(output_path, found, mode=0o644)
    if str(output_path) != "-":
        click.echo(f"{output_path}: TARGETINFO of the quoting enclave", err=True)
