"""Write the ``rune`` launcher: an interpreter that starts isolated and without ``site``, for the forwarding path.

An installer's console script costs about 15 ms more per call, because it imports ``site``, ``re`` and what else it
does not need.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

_TEMPLATE = """#!{python} -IS
import sys
sys.path.insert(0, {source!r})
from inclavare.rune.main import main
main({site!r})
"""


def write(target: Path) -> Path:
    """Write the launcher for this interpreter and this installation, mode 0755, replacing what is there.

    Raises:
        OSError: the directory is missing or not writable.
    """
    source = Path(__file__).resolve().parents[2]
    python = getattr(sys, "_base_executable", None) or sys.executable
    text = _TEMPLATE.format(python=os.path.realpath(python), source=str(source), site=sysconfig.get_path("purelib"))
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.chmod(0o755)
    temporary.replace(target)
    return target


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m inclavare.rune.launcher TARGET")
    print(write(Path(sys.argv[1])))
