"""``--help`` and ``--version``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from .. import __version__
from ..config import load as load_config
from . import low_level
from .dispatch import low_level_output
from .main import COMMANDS, OTHER_COMMANDS

if TYPE_CHECKING:
    from .main import Call

#: The version of the runtime-spec that enclave containers follow.
SPEC = "1.2.0"

_TEXT = """rune - OCI runtime that runs containers in enclaves, and ordinary ones through crun or runc

Usage: rune [global options] COMMAND [options] [arguments]

Commands:
  {commands}

Global options:
  --root DIR            state directory (default /run/rune)
  --log FILE            log file
  --log-format FORMAT   text or json
  --systemd-cgroup      let systemd make the cgroups
  --debug               more log
  --version, --help

A container runs in an enclave if its environment has ENCLAVE_TYPE (intelSgx or sgx-sim), if its annotation
enclave.type says so, or if its image was built with `inclavare build`. A command's own options: rune COMMAND --help.
"""


def run(call: Call) -> None:
    """Print it."""
    if call.command in ("version", "v", "V"):
        path = low_level.find("crun") or low_level.find("runc") or "none"
        config = load_config()
        if config.low_level != "auto":
            path = config.low_level
        text = f"rune version {__version__}\nspec: {SPEC}\nlow-level runtime: {path}\n"
        # Its lines tell callers and test-suites what it was built with (+SECCOMP +SYSTEMD …).
        _, output = low_level_output(call, config, ["--version"])
        text += output.decode(errors="replace")
    else:
        text = _TEXT.format(commands=" ".join(sorted(COMMANDS.keys() | OTHER_COMMANDS)))
    os.write(1, text.encode())
