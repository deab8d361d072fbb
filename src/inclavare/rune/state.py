"""``state`` of an enclave container: the low-level runtime's answer, with the bundle that the caller named."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from ..config import load as load_config
from ..runelet.job import read_meta
from .dispatch import directory_of, low_level_output, print_json

if TYPE_CHECKING:
    from .main import Call


def run(call: Call) -> None:
    """Print the state."""
    config = load_config()
    code, output = low_level_output(call, config, [call.command, *call.rest])
    if code != 0:
        os._exit(code)
    state = json.loads(output)
    meta = read_meta(directory_of(call, config))
    state["bundle"] = meta.get("bundle", state.get("bundle"))
    annotations = state.get("annotations") or {}
    for name in ("tee", "runtime", "mrenclave", "mrsigner"):
        if name in meta:
            annotations[f"org.inclavare.{name}"] = meta[name]
    state["annotations"] = annotations
    print_json(state)
