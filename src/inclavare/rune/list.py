"""``list``: forwarded, with the bundles of enclave containers as their callers named them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import load as load_config
from ..runelet.job import read_meta
from .dispatch import forward, low_level_output
from .main import enclave_directory

if TYPE_CHECKING:
    from .main import Call


def run(call: Call) -> None:
    """Print the containers."""
    config = load_config()
    base = Path(enclave_directory(str(config.run_dir), call.root, ""))
    words = call.rest
    if not base.is_dir() or {"-q", "--quiet"} & set(words):
        forward(call, config)
    code, output = low_level_output(call, config, ["list", "--format", "json"])
    if code != 0:
        os._exit(code)
    entries: list[dict[str, Any]] = json.loads(output or b"null") or []
    for entry in entries:
        entry["bundle"] = read_meta(base / str(entry.get("id"))).get("bundle", entry.get("bundle"))
    if "json" in " ".join(words):
        sys.stdout.write(json.dumps(entries) + "\n")
    else:
        _table(entries)
    sys.stdout.flush()


def _table(entries: list[dict[str, Any]]) -> None:
    columns = (("ID", "id"), ("PID", "pid"), ("STATUS", "status"), ("BUNDLE", "bundle"), ("CREATED", "created"),
               ("OWNER", "owner"))  # fmt: skip
    rows = [[title for title, _ in columns], *([str(entry.get(key, "")) for _, key in columns] for entry in entries)]
    widths = [max(len(row[index]) for row in rows) for index in range(len(columns))]
    for row in rows:
        sys.stdout.write("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n")
