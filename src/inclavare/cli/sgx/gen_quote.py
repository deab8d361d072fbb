"""``inclavare sgx gen-quote``: a quote over an enclave's report."""

from __future__ import annotations

from pathlib import Path

import click

from .._files import FILE, read_input, write_output
from .._output import json_option, print_json
from ._quotes import platform, quote_type_option, tee_option


@click.command("gen-quote")
@tee_option
@quote_type_option
@click.option(
    "--report",
    "report_path",
    type=FILE,
    required=True,
    help="The enclave's REPORT for the quoting enclave, 432 bytes; - is standard input.",
)
@click.option(
    "-o",
    "--quote",
    "output_path",
    type=FILE,
    default="quote.bin",
    show_default=True,
    help="File for the quote; - is standard output.",
)
@json_option
def command(*, tee: str, report_path: Path, output_path: Path, as_json: bool) -> None:
    """Have a REPORT quoted. Exit code 4: it was not made for the quoting enclave of this platform."""
    from ...sgx.structs import Report, ReportBody

    report = read_input(report_path, 1 << 16)
    body = ReportBody.from_bytes(Report.from_bytes(report).body)
    quote = platform(tee).quote(report)
    if as_json:
        fields = {"mrenclave": body.mrenclave, "mrsigner": body.mrsigner, "report_data": body.report_data}
        print_json({"tee": tee, **fields, "quote": quote})
        return
    write_output(output_path, quote, mode=0o644)
    if str(output_path) != "-":
        click.echo(f"{output_path}: a quote of {len(quote)} bytes over MRENCLAVE {body.mrenclave.hex()}", err=True)
