"""``inclavare list``: enclave containers of this machine."""

from __future__ import annotations

import click

from ._output import json_option, print_json, print_table


@click.command("list")
@json_option
def command(*, as_json: bool) -> None:
    """Enclave containers of this machine, whoever started them: their identity and their EPC pages."""
    from ..config import load
    from ..runelet import client

    rows = []
    for directory, meta in client.containers(load()):
        status = "ended" if "ended" in meta else "running" if "pid" in meta else "starting"
        rows.append({"id": directory.name, "status": status, **meta})
    if as_json:
        print_json(rows)
    else:
        keys = ("id", "status", "tee", "runtime", "debug", "epc_pages", "pid", "mrenclave")
        print_table(
            [key.upper().replace("_", " ") for key in keys], [[row.get(key, "-") for key in keys] for row in rows]
        )
